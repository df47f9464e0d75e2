"""Whether an extraction fits, asked before anything of it is written: a shard into memory, the rows onto the disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from hdcache.array_metadata import NESTED, RECORD_BYTES
from hdcache.errors import OutOfSpace, UsageError
from hdcache.extract.pixel_digests import PIXEL_DIGESTS
from hdcache.ledgers import Ledger, teacher_ledger
from hdcache.packed import pixels_ledger
from hdcache.progress import size
from hdcache.rendering import input_shape
from hdcache.resources import ranks_here
from hdcache.row_arrays import MASK_ARRAY
from hdcache.schema import ITEM_BYTES, StoreCard, TapCard, TeacherCard
from hdcache.store import Store

AHEAD = 2
"""Shards that are held at once where memory allows it: one is encoded while another is written."""
COPIES = 3
"""A shard's arrays while it is in the works: as encoded, and as they are written, in arrays and in files."""
LISTED, LISTED_BYTES = NESTED - 20_000, RECORD_BYTES - (4 << 20)
"""Objects that a manifest may list, and their bytes; some are left for metadata and for rows that fail."""
ENTRY_BYTES = 105
"""Of an object's entry in a manifest, without its key: size, sha256, punctuation."""


def machine_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 16 << 30


def room_for_shards() -> int:
    """Bytes that the shards of this process may take: half of the memory, shared with its like on the machine."""
    return machine_memory() // 2 // ranks_here()


def held_per_row(card: TeacherCard, taps: Iterable[TapCard]) -> int:
    """Bytes that one row needs while its shard is in the works: its pixels, and its arrays before any codec, copied."""
    arrays = sum(math.prod(each.shape) * ITEM_BYTES[each.dtype] for tap in taps for each in tap.arrays.values())
    return math.prod(input_shape(card.preprocessing)) + COPIES * arrays


def shards_ahead(name: str, rows: int, per_row: int, at_once: int = 1) -> int:
    """Shards of ``rows`` rows to have in the works: :data:`AHEAD`, or 1 where no more fit beside ``at_once`` of them.

    Raises
    ------
    UsageError
        where not even so many fit, with the rows that would.
    """
    room = room_for_shards() // at_once
    if rows * per_row > room:
        fit = room // per_row if room // per_row < 8 else room // per_row // 8 * 8
        beside = f" ({at_once} such shards at once)" if at_once > 1 else ""
        raise UsageError(
            f"teacher {name}: a shard of {rows} rows needs about {size(rows * per_row)} of memory while it is extracted, "
            f"{size(room)} are there for it{beside}; "
            + (
                f"give --rows-per-shard {fit}, to a new store where this one holds rows already"
                if fit
                else "not even one row fits: store fewer taps, or in --encoding fp16 instead of fp32"
            )
        )
    return AHEAD if AHEAD * rows * per_row <= room else 1


def check_memory(store: StoreCard, name: str, card: TeacherCard, taps: Iterable[TapCard], at_once: int) -> None:
    """:class:`UsageError` where ``at_once`` shards of this teacher do not fit into memory."""
    shards_ahead(name, min(store.rows_per_shard, store.dataset.count), held_per_row(card, taps), at_once)


def check_manifest(store: StoreCard, name: str, taps: Mapping[str, TapCard]) -> None:
    """:class:`UsageError` where so many shards would not fit into a manifest that readers accept, before the first is written."""
    shards = -(-store.dataset.count // store.rows_per_shard)
    keys = [f"{tap}/{array}" for tap, card in taps.items() for array in card.arrays]
    keys += [MASK_ARRAY, PIXEL_DIGESTS, "receipts"]
    key = len(f"teachers/{name}/views/00/c.{shards}.0.0.0.0")
    fit = min(LISTED_BYTES // sum(key + len(other) + ENTRY_BYTES for other in keys), LISTED // len(keys))
    if shards > fit:
        rows = -(-store.dataset.count // fit)
        raise UsageError(
            f"teacher {name}: {shards:,} shards of {len(keys)} arrays are more than one manifest may list; give --rows-per-shard "
            f"{-(-rows // 32) * 32} or more, to a new store where this one holds rows already, or store fewer taps"
        )


def place_of(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there: what lies on the disk that it is, or will be, on."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def free_at(path: Path) -> int:
    """Bytes that are free where ``path`` is, or will be."""
    return shutil.disk_usage(place_of(path)).free


def scratch_beside(path: Path) -> Path | None:
    """A folder to write on the disk of ``path`` that is, if possible, not ``path`` itself; None where none may be written."""
    place = place_of(path)
    above = [place.parent] if place.parent.stat().st_dev == place.stat().st_dev and place == path.absolute() else []
    return next((folder for folder in (*above, place) if os.access(folder, os.W_OK)), None)


def rows_left(store: Store, teacher: str, num_views: int) -> int:
    """Rows of all views that have yet to be written for the first time."""
    return sum(_left(store.card, teacher_ledger(store, teacher, view)) for view in range(num_views))


def samples_left(store: Store) -> int:
    """Samples that the store has yet to keep (``--pixels``)."""
    return 0 if pixels_ledger(store).sealed else _left(store.card, pixels_ledger(store))


def _left(card: StoreCard, ledger: Ledger) -> int:
    count, shard = card.dataset.count, card.rows_per_shard
    starts = range(0, count, shard)
    return sum(min(shard, count - start) for start in starts if ledger.receipt(start // shard) is None)


def check_space(store: Store, rows: Mapping[str, tuple[int, float]], samples: float = 0) -> None:
    """Refuse what will not fit: per teacher, rows that are new and the bytes of each, and the bytes of samples to keep.

    Raises
    ------
    OutOfSpace
        saying who needs how much.
    """
    free = free_at(store.path)
    each = {name: count * per_row for name, (count, per_row) in rows.items()}
    need = sum(each.values()) + samples
    # Samples that do not fit by themselves are refused where they are copied, with ways to make them smaller.
    if need <= free or samples > free:
        return
    parts = [f"{name} {size(count)}" for name, count in each.items()] + [f"samples {size(samples)}"] * bool(samples)
    apart = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    raise OutOfSpace(
        f"{store.path}: about {size(need)} are needed for {sum(count for count, _ in rows.values()):,} rows{apart}, "
        f"{size(free)} are free; "
        "free space, store fewer taps or views, or ask for a coarser --fidelity"
    )
