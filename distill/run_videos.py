"""Which videos of a run without a store can give no clip: found and named before its first step, and left out."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hdcache import stopping
from hdcache.datasets import Dataset
from hdcache.distill.collective import gather_rows
from hdcache.distill.ranks import Ranks, first_alone
from hdcache.distill.state import saved_facts
from hdcache.errors import InputNotFound, UnreadableImage
from hdcache.progress import Progress, counted
from hdcache.samples import check_clip
from hdcache.schema import ViewSpec

NAMED = 5
"""Videos that the warning names."""

log = logging.getLogger(__name__)


def unreadable_videos(
    dataset: Dataset, spec: ViewSpec, folder: Path, ranks: Ranks, *, threads: int, quiet: bool
) -> dict[str, str]:
    """Id -> reason, of the videos that are none or shorter than the clip; the same in all processes, which share the work.

    Every file is read once, and its frames are counted (:func:`hdcache.samples.check_clip`). A run that goes on in
    ``folder`` keeps to what was found when it began.

    Raises
    ------
    InputNotFound
        when no video is left.
    Interrupted
        when a signal asked for a stop.
    """
    if begun := saved_facts(folder):
        kept: dict[str, str] = begun.get("left_out", {})
        return kept
    # Each process does its share, and waits for the slowest.
    with first_alone(ranks):
        share = _check(dataset, spec, dataset.ids[ranks.rank :: ranks.world], threads, quiet or not ranks.first)
    found = _of_all(share)
    if not found:
        return {}
    count, reason = len(dataset.ids), next(iter(found.values()))
    if len(found) == count:
        raise InputNotFound(
            f"{dataset.card.spec}: none of {counted(count, 'videos')} could be read; the first: {reason}"
        )
    if ranks.first:
        rest = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
        log.warning(
            "%d of %d videos cannot be read and are left out: %s%s (%s)",
            len(found), count, ", ".join(list(found)[:NAMED]), rest, f"the first: {reason}",
        )  # fmt: skip
    return found


def _check(dataset: Dataset, spec: ViewSpec, ids: tuple[str, ...], threads: int, quiet: bool) -> dict[str, str]:
    def fault(sample_id: str) -> str | None:
        try:
            check_clip(dataset, sample_id, spec)
        except UnreadableImage as error:
            return str(error)
        return None

    found = {}
    with ThreadPoolExecutor(threads, "check") as pool, Progress("check", len(ids), "videos", quiet=quiet) as bar:
        try:
            for sample_id, reason in zip(ids, pool.map(fault, ids), strict=True):
                if reason is not None:
                    found[sample_id] = reason
                bar.advance(1)
                if stopping.requested():
                    raise stopping.stop("no step taken")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return found


def _of_all(found: dict[str, str]) -> dict[str, str]:
    """What all processes found, by id."""
    # Lines of JSON, so that those of all processes are one text.
    text = "".join(json.dumps(entry) + "\n" for entry in found.items()).encode()
    rows, _ = gather_rows(torch.tensor(list(text), dtype=torch.uint8))
    return dict(sorted(json.loads(line) for line in bytes(rows.tolist()).splitlines()))
