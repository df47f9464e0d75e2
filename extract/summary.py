"""What an extraction did, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hdcache.extract.pipeline import Timing
from hdcache.masks import mask_facts, mask_text
from hdcache.progress import counted, size
from hdcache.reader import TeacherReader
from hdcache.schema import TeacherRecord
from hdcache.store import Store


@dataclass
class ExtractSummary:
    """What an extraction did."""

    store: str
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per teacher: its mask, rows written now, rows in all, bytes, failed rows, saturated values, seconds, rate,
    bottleneck, stages (seconds; in the threads that drive the teacher), beside (seconds of all decoding threads and of the
    writing ones meanwhile), taps, identity, manifests."""
    failed: dict[str, str] = field(default_factory=dict)
    """Sample id -> reason."""

    def json(self) -> dict[str, Any]:
        return asdict(self)


def account(store: Store, record: TeacherRecord, timing: Timing, seconds: float, num_views: int) -> dict[str, Any]:
    """The numbers of one teacher for the summary."""
    reader = TeacherReader(store, record.name)
    manifests = {view: reader.manifest(view) for view in range(num_views)}
    stored = sum(
        entry.size
        for view, manifest in manifests.items()
        for key, entry in manifest.objects.items()
        if key.startswith(own := f"teachers/{record.name}/views/{view}/") and not key.startswith(f"{own}receipts/")
    )
    return {
        "mask": mask_facts(record.card),
        "rows_written": timing.rows,
        "rows": sum(manifest.rows for manifest in manifests.values()),
        "bytes": stored,
        "failed_rows": sum(len(manifest.failed) for manifest in manifests.values()),
        "saturated": sum(manifest.saturated for manifest in manifests.values()),
        "seconds": round(seconds, 3),
        "rows_per_second": round(timing.rows / max(seconds, 1e-9), 1),
        "bottleneck": timing.bottleneck() if timing.rows else "nothing left to do",
        "stages": {stage: round(value, 3) for stage, value in timing.stages().items()},
        "beside": {"decoding": round(timing.decoding, 3), "writing": round(timing.writing, 3)},
        "taps": {
            tap: card.certificate.model_dump(mode="json") | {"encoding": card.encoding}
            for tap, card in record.taps.items()
        },
        "identity": record.identity_digest(),
        "manifests": {str(view): manifest.digest() for view, manifest in manifests.items()},
    }


def shares(stages: Mapping[str, float]) -> dict[str, float]:
    """Each stage's share of the seconds."""
    total = max(sum(stages.values()), 1e-9)
    return {stage: round(value / total, 3) for stage, value in stages.items()}


def shares_text(found: Mapping[str, float]) -> str:
    """``teacher forward 93 %, encoding 5 %``; what is next to nothing is left out."""
    return ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in found.items() if share >= 0.005)


def format_summary(summary: ExtractSummary) -> str:
    """The summary as text, failed images named."""
    lines = []
    for name, facts in summary.teachers.items():
        lines.append(
            f"{summary.store}: teacher {name}, {counted(facts['rows'], 'rows')}, {size(facts['bytes'])} "
            f"({counted(facts['rows_written'], 'rows')} written at {facts['rows_per_second']:,.0f} rows/s, bottleneck: {facts['bottleneck']})"
        )
        if facts["rows_written"]:
            lines.append(f"  {shares_text(shares(facts['stages']))}")
        if facts["mask"] is not None:
            lines.append(f"  {mask_text(facts['mask'])}")
        for tap, seal in facts["taps"].items():
            lines.append(
                f"  {tap}: {seal['encoding']}, {seal['bits_per_value']:.2f} bits/value, relative RMSE {100 * seal['relative_rmse']:.2f} %"
            )
        if facts["saturated"]:
            lines.append(
                f"  {counted(facts['saturated'], 'values')} clipped to the integer range; see docs/store-format.md"
            )
    if summary.failed:
        lines.append(
            f"{counted(len(summary.failed), 'samples')} failed (recorded as failed rows); the same command tries again:"
        )
        lines += [f"  {reason}" for reason in list(summary.failed.values())[:20]]
        if len(summary.failed) > 20:
            lines.append(f"  and {len(summary.failed) - 20} more (--json lists all)")
    return "\n".join(lines)
