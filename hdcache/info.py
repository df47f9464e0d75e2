"""What a store is and what it costs, as data and as text: ``hdcache info``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from hdcache.index import check_seals
from hdcache.ledgers import Ledger
from hdcache.masks import mask_facts, mask_text
from hdcache.progress import size
from hdcache.schema import TapCard, TeacherRecord
from hdcache.store import PIXELS, Store, is_view
from hdcache.stored_rows import StoredRows

MADE_BY = "made_by"
"""Key in a store's ``written_with`` of who made it, where ``HDCACHE_MADE_BY`` said so: no name is taken unasked."""


def describe_store(store: Store) -> dict[str, Any]:
    """A JSON-able description: data set, views, and per teacher its card, taps, certificates, sizes and seals."""
    check_seals(store)
    card = store.card
    return {
        "path": str(store.path),
        "format": card.format,
        "dataset": card.dataset.model_dump(mode="json", exclude={"classes"}) | {"classes": len(card.dataset.classes)},
        "views": card.views.model_dump(mode="json"),
        "rows_per_shard": card.rows_per_shard,
        "rows_per_chunk": card.rows_per_chunk,
        "written_with": store.about.written_with,
        "pixels": describe_pixels(store),
        "teachers": {name: describe_teacher(store, name) for name in store.teachers()},
    }


def describe_pixels(store: Store) -> dict[str, Any] | None:
    """What the store keeps of the samples themselves; None where it keeps none, or not yet all."""
    ledger = Ledger(store.path, PIXELS)
    if not ledger.sealed:
        return None
    manifest = ledger.proved_manifest()
    kept = sum(
        entry.size for key, entry in manifest.objects.items() if f"{PIXELS}/bytes/" in key and key.endswith("/c.0")
    )
    return {
        "manifest": manifest.digest(),
        "samples": manifest.rows,
        "failed": len(manifest.failed),
        "bytes": kept,
        "shorter_side": store.card.dataset.shorter_side,
    }


def describe_teacher(store: Store, name: str) -> dict[str, Any]:
    """One teacher: its card, seals, and certificates and sizes of the taps that are here."""
    record, rows = store.teacher(name), StoredRows(store, name)
    views = {}
    # Beside the taps lie which tokens a masked teacher saw, and digests of some rows' pixels.
    stored: dict[str, int] = dict.fromkeys([*rows.record.taps, "mask", "pixels"], 0)
    sealed_rows = 0
    for view in store.views(name):
        manifest = rows.manifest(view)
        views[str(view)] = {"manifest": manifest.digest(), "rows": manifest.rows, "failed": len(manifest.failed)}
        sealed_rows += manifest.rows
        for key, entry in manifest.objects.items():
            for tap in stored:
                if f"/views/{view}/{tap}/" in key:
                    stored[tap] += entry.size
    folders = (path.name for path in (store.teacher_path(name) / "views").glob("*"))
    unsealed = sorted(int(folder) for folder in folders if is_view(folder) and folder not in views)
    return {
        "identity": record.identity_digest(),
        "card": record.card.model_dump(mode="json"),
        "source": record.source,
        "licence": record.licence,
        "mask": mask_facts(record.card),
        "sealed_views": views,
        "unsealed_views": unsealed,
        "bytes": sum(stored.values()),
        "held": sorted(rows.record.taps) if rows.elsewhere else None,
        "elsewhere": list(rows.elsewhere),
        "taps": {tap: _tap(record, card, stored[tap], sealed_rows) for tap, card in rows.record.taps.items()},
    }


def _tap(record: TeacherRecord, card: TapCard, stored: int, rows: int) -> dict[str, Any]:
    values = (card.tokens + card.prefix_tokens) * card.channels if card.tokens else int(np.prod(card.row))
    half = rows * values * 2
    facts: dict[str, Any] = {
        "encoding": card.encoding,
        "fidelity": card.fidelity,
        "tokens": card.tokens,
        "prefix_tokens": card.prefix_tokens,
        "channels": card.channels,
        "certificate": card.certificate.model_dump(mode="json"),
        "bytes": stored,
        "bytes_fp16": half,
        "smaller_than_fp16": round(half / stored, 2) if stored else None,
    }
    if card.tap.endswith(".attn_in"):
        matrices = rows * 2 * record.card.heads * (card.tokens + card.prefix_tokens) ** 2 * 2
        facts["smaller_than_relation_matrices_fp16"] = round(matrices / stored, 1) if stored else None
    return facts


def _pixels_text(facts: dict[str, Any]) -> str:
    kept, side = facts["pixels"], facts["dataset"].get("shorter_side")
    shrunk = f"; larger images shrunk to a shorter side of {side} pixels" if side else ""
    if not kept:
        return f"samples   not kept here{shrunk}"
    failed = f" ({kept['failed']} failed)" if kept["failed"] else ""
    return f"samples   kept here, {size(kept['bytes'])}{failed}{shrunk}"


def views_text(views: Mapping[str, Any]) -> str:
    """How views are drawn, in words, of a :class:`~hdcache.schema.ViewSpec` as JSON."""
    geometry = {
        "random-resized-crop": f"random resized crops of area {views['scale'][0]:g} to {views['scale'][1]:g}",
        "center-crop": f"centre crops of {views['fraction']:g} of the shorter side",
        "multi-scale-crop": "crops of 2/3 to all of the shorter side",
        "resize": "whole images",
    }[views["kind"]]
    if views.get("frames") is not None:
        geometry = f"clips of {views['frames']} frames at stride {views.get('stride', 1)}, {geometry}"
    return f"{geometry}, flip {views['flip']:g}, seed {views['seed']}"


def held_text(held: Collection[str], elsewhere: Collection[str]) -> str:
    """What a copy has of a teacher's taps, in words."""
    return f"held {', '.join(sorted(held)) or 'none'} of {len(held) + len(elsewhere)} taps"


def format_store(facts: dict[str, Any]) -> str:
    """The description as a page of text."""
    data = facts["dataset"]
    lines = [
        f"{facts['path']}  (store format {facts['format']})",
        f"data      {data['count']:,} {'videos' if data['kind'] == 'video' else 'images'}, {data['classes']} classes, from {data['spec']}",
        *([_pixels_text(facts)] if facts["pixels"] or data.get("shorter_side") else []),
        f"views     {views_text(facts['views'])}",
    ]
    for name, teacher in facts["teachers"].items():
        card = teacher["card"]
        seals = ", ".join(
            f"{view} ({seal['rows']:,} rows{', ' + str(seal['failed']) + ' failed' if seal['failed'] else ''})"
            for view, seal in teacher["sealed_views"].items()
        )
        frames = card["preprocessing"].get("frames")
        clips = "" if frames is None else f"{frames} frames in {card.get('slots', 1)} slots, "
        lines += [
            "",
            f"teacher   {name}: {card['architecture']} at {card['preprocessing']['size']} px, {clips}{card['grid'][0]}x{card['grid'][1]} patch "
            f"+ {card['prefix_tokens']} prefix tokens, width {card['width']}, {card['heads']} heads, {card['precision']}",
            *([f"          {mask_text(teacher['mask'])}"] if teacher["mask"] else []),
            f"          from {teacher['source']}, licence {teacher['licence']}, id {teacher['identity'][:16]}",
            f"          sealed views: {seals or 'none'}"
            + (f"; not complete: {teacher['unsealed_views']}" if teacher["unsealed_views"] else ""),
            *([f"          {held_text(teacher['taps'], teacher['elsewhere'])}"] if teacher["elsewhere"] else []),
            f"          {'tap':<18}{'encoding':<10}{'rel. RMSE':>10}{'cosine':>9}{'bits/value':>12}{'bytes':>11}{'vs fp16':>9}",
        ]
        for tap, entry in teacher["taps"].items():
            seal = entry["certificate"]
            ratio = f"{entry['smaller_than_fp16']:.1f}x" if entry["smaller_than_fp16"] else "-"
            lines.append(
                f"          {tap:<18}{entry['encoding']:<10}{100 * seal['relative_rmse']:>8.2f} %{seal['cosine_mean']:>9.5f}"
                f"{seal['bits_per_value']:>12.2f}{size(entry['bytes']):>11}{ratio:>9}"
            )
            if (
                entry.get("smaller_than_relation_matrices_fp16")
                and seal["kl_qk"] is not None
                and seal["kl_vv"] is not None
            ):
                lines.append(
                    f"          {'':<18}relations from it: KL {seal['kl_qk']:.5f} (QK), {seal['kl_vv']:.5f} (VV), "
                    f"{entry['smaller_than_relation_matrices_fp16']:g}x smaller than fp16 matrices"
                )
            if seal["kl"] is not None:
                lines.append(f"          {'':<18}KL from the exact distributions {seal['kl']:.5f} nats")
    if not facts["teachers"]:
        lines.append(f"no teacher yet; 'hdcache extract --store {facts['path']} --teacher NAME=SPEC' adds one")
    return "\n".join(lines)
