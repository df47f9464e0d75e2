"""``hdcache export-store``: decoded features in layouts that others read.

::

    OUT/export.json                what was asked for; anything else is refused there
    OUT/shard-00000.safetensors    [rows, ...] of every tap; or shard-00000.tar, with a safetensors object a sample and tap
    OUT/receipts/0.json            proof that shard 0 is complete, written after it
    OUT/index.json                 shards with rows, size and sha256, arrays, rows that are left out; written last

Finished shards are kept, once their sha256 is compared, so the same command again goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch

from hdcache import stopping
from hdcache.durable import durable_parts, durable_write, partial_files
from hdcache.errors import InputNotFound, UsageError, nearest
from hdcache.index import held_taps
from hdcache.leases import lease
from hdcache.progress import Progress, counted, size
from hdcache.reader import TeacherReader
from hdcache.records import canonical_json
from hdcache.resources import available_cores, memory_budget
from hdcache.schema import Receipt
from hdcache.sharing.export_folder import (
    INDEX,
    RECEIPTS,
    SETTINGS,
    Dtype,
    ExportSettings,
    ShardFile,
    check_folder,
    check_space,
    finished,
    record,
)
from hdcache.sharing.exported_rows import BLOCK_BYTES, BLOCK_ROWS, DTYPES, ExportedRows, TeacherRows
from hdcache.sharing.exported_shards import SafetensorsShards, Shards, TarShards
from hdcache.store import Store

SHARD_BYTES, SHARD_ROWS = 256 << 20, 1024
"""A shard is as large as both allow, unless a number of rows is asked for."""
LAYOUTS: dict[str, type[Shards]] = {"safetensors": SafetensorsShards, "webdataset": TarShards}


def export_store(
    store: str | Path,
    out: str | Path,
    *,
    layout: str,
    teachers: Sequence[str] = (),
    taps: Sequence[str] = (),
    targets: Sequence[str] = (),
    view: int = 0,
    dtype: str = "fp16",
    images: bool = False,
    data: str | None = None,
    rows_per_shard: int | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """Write decoded rows of one view to the folder ``out``; the same call again goes on.

    Parameters
    ----------
    layout
        ``safetensors``: shards of arrays [rows, tokens, channels]; ``webdataset``: tars of one object a sample and tap.
    teachers
        names; all that the store holds where none is given.
    taps, targets
        stored taps as they are, and targets derived from them (``block9.rel.qk@12``), of each of the teachers; all
        stored taps where neither is given.
    dtype
        ``fp16``, ``bf16`` or ``fp32``.
    images
        the view's pixels too, as the teachers saw them: uint8, in tars as PNG.
    data
        where the data set is now, for ``images``.
    dry_run
        count bytes, write nothing.

    Returns
    -------
    dict
        rows, bytes, shards (and how many of them were written now), arrays of one row, rows that are left out.

    Raises
    ------
    UsageError
        for settings that cannot be meant, and values that ``dtype`` cannot hold.
    InputNotFound
        for a teacher, tap, view or data set that is not there.
    StoreMismatch
        when ``out`` holds something else, with the fields that differ.
    OutOfSpace
        before the first byte is written, saying how many are needed.
    Interrupted
        after a signal, between two shards.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"--format {layout!r}: {nearest(layout, LAYOUTS)}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r}: {nearest(dtype, get_args(Dtype))}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads} must be at least 1")
    opened, folder = Store.open(store), Path(out).expanduser()
    if folder.resolve().is_relative_to(opened.path.resolve()):
        raise UsageError(f"{folder} lies in the store, where nothing else may be; choose another folder")
    rows = _rows(opened, view, teachers, taps, targets, dtype, images, data)
    shards = LAYOUTS[layout](rows)
    settings = ExportSettings(
        format=layout,  # type: ignore[arg-type]  # one of LAYOUTS
        dataset=opened.card.dataset.fingerprint,
        view=view,
        seals={name: seal.digest() for name, seal in rows.seals.items()},
        features={teacher.name: tuple(teacher.names) for teacher in rows.teachers},
        taps={teacher.name: tuple(sorted(teacher.taps)) for teacher in rows.teachers},
        dtype=dtype,  # type: ignore[arg-type]  # one of DTYPES
        images=images,
        rows_per_shard=_rows_per_shard(shards, rows_per_shard),
    )
    check_folder(folder, settings)
    planned = _planned(shards, settings)
    begun = (folder / SETTINGS).is_file()
    need = sum(shards.size(shard.rows) for shard in planned) if dry_run or not begun else 0
    if dry_run:
        return _facts(folder, shards, settings, len(planned), need, None)
    check_space(folder, need)
    with lease(folder / ".export.lock"):
        check_folder(folder, settings)
        return _write(folder, shards, settings, planned, threads or available_cores(), quiet)


def _rows(
    store: Store,
    view: int,
    teachers: Sequence[str],
    taps: Sequence[str],
    targets: Sequence[str],
    dtype: str,
    images: bool,
    data: str | None,
) -> ExportedRows:
    names = sorted({*teachers}) or store.teachers()
    if not names:
        raise InputNotFound(
            f"{store.path}: no teacher to export; add one: {store.extract_command()} --teacher NAME=MODEL"
        )
    if data and not images:
        raise UsageError("--data says where the images are; add --images, or leave it out")
    found = []
    for name in names:
        reader = TeacherReader(store, name)
        held = held_taps(store, name)
        chosen = taps if taps or targets else [tap for tap in reader.record.taps if held is None or tap in held]
        found.append(TeacherRows(reader, sorted({*chosen}), sorted({*targets}), DTYPES[dtype]))
    return ExportedRows(store, view, found, images=images, data=data)


def _rows_per_shard(shards: Shards, asked: int | None) -> int:
    each, room = max(1, shards.row_bytes), memory_budget()
    if asked is None:
        asked = max(1, min(SHARD_ROWS, SHARD_BYTES // each))
    elif asked < 1:
        raise UsageError(f"--rows-per-shard {asked} must be at least 1")
    held = min(asked, len(shards.source.rows)) * each
    # A tar is written sample by sample; in a safetensors file each array lies in one piece.
    if isinstance(shards, SafetensorsShards) and held > room:
        raise UsageError(
            f"--rows-per-shard {asked}: a shard of {size(held)} is put together in memory, and {size(room)} may be held; "
            f"choose at most {max(1, room // each)}, or raise HDCACHE_BUFFER_BYTES"
        )
    return asked


def _planned(shards: Shards, settings: ExportSettings) -> list[ShardFile]:
    each, rows = settings.rows_per_shard, shards.source.rows
    return [
        ShardFile(number, f"shard-{number:05d}{shards.suffix}", first, rows[first : first + each])
        for number, first in enumerate(range(0, len(rows), each))
    ]


def _write(
    folder: Path, shards: Shards, settings: ExportSettings, planned: Sequence[ShardFile], threads: int, quiet: bool
) -> dict[str, Any]:
    for partial in partial_files(folder):
        partial.unlink(missing_ok=True)
    with Progress("check", len(planned), "shards", quiet=quiet or not (folder / RECEIPTS).is_dir()) as bar:
        receipts: dict[int, Receipt] = {}
        for shard in planned:
            if (receipt := finished(folder, shard)) is not None:
                receipts[shard.number] = receipt
            bar.advance(1)
    left = [shard for shard in planned if shard.number not in receipts]
    check_space(folder, sum(shards.size(shard.rows) for shard in left))
    durable_write(folder / SETTINGS, settings.canonical())
    together = max(1, min(BLOCK_ROWS, BLOCK_BYTES // max(1, shards.row_bytes)))
    with (
        Progress("export", len(shards.source.rows), "rows", quiet=quiet) as bar,
        _single_threaded(),
        ThreadPoolExecutor(threads, "export") as pool,
    ):
        bar.skip(len(shards.source.rows) - sum(len(shard.rows) for shard in left))
        for count, shard in enumerate(left):
            if stopping.requested():
                raise stopping.stop(f"{len(planned) - len(left) + count} of {len(planned)} shards in {folder}")
            blocks = shards.source.blocks(shard.rows, together, pool, threads)
            written = durable_parts(folder / shard.name, shards.parts(shard.rows, blocks))
            receipts[shard.number] = record(folder, shard, written)
            bar.advance(len(shard.rows), f"{count + 1} of {counted(len(left), 'shards')}")
    objects = {name: found for receipt in receipts.values() for name, found in receipt.objects.items()}
    facts = _facts(folder, shards, settings, len(planned), sum(found.size for found in objects.values()), len(left))
    listed = [{"file": shard.name, "rows": len(shard.rows)} | objects[shard.name].model_dump() for shard in planned]
    index = {key: facts[key] for key in ("rows", "bytes", "arrays", "failed")}
    whole = settings.whole() | index | {"classes": list(shards.source.store.card.dataset.classes), "shards": listed}
    durable_write(folder / INDEX, canonical_json(whole))
    return facts


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Threads that begin in here compute alone: several decode side by side, and how many must not show in the values."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _facts(
    folder: Path, shards: Shards, settings: ExportSettings, count: int, total: int, written: int | None
) -> dict[str, Any]:
    arrays = {
        name: {"shape": list(card.shape), "dtype": "bfloat16" if card.dtype == "uint16" else card.dtype}
        for name, card in sorted(shards.arrays().items())
    }
    return {
        "out": str(folder),
        "format": settings.format,
        "view": settings.view,
        "rows": len(shards.source.rows),
        "failed": shards.source.failed(),
        "shards": count,
        "written": written,
        "rows_per_shard": settings.rows_per_shard,
        "bytes": total,
        "arrays": arrays,
    }


def format_export(facts: dict[str, Any]) -> str:
    """What :func:`export_store` did, or would do, as text."""
    did = "would need" if facts["written"] is None else "in"
    lines = [
        f"{facts['out']}: {counted(facts['rows'], 'rows')} of view {facts['view']} as {facts['format']}, "
        f"{did} {size(facts['bytes'])} ({facts['bytes']:,} bytes), {counted(facts['shards'], 'shards')} of up to "
        f"{counted(facts['rows_per_shard'], 'rows')}"
        + (f", {facts['written']} of them written now" if facts["written"] is not None else "")
    ]
    lines += [f"  {name:<40} {entry['dtype']} {entry['shape']} a row" for name, entry in facts["arrays"].items()]
    lines += [
        f"left out: row {row['row']} ({row['id']}), failed in teacher {row['teacher']}: {row['reason']}"
        for row in facts["failed"]
    ]
    return "\n".join(lines)
