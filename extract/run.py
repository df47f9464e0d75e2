"""Teachers run once, rows are stored: the story of ``hdcache extract``.

    hdcache extract folder:train --store train.hdc --teacher dino=timm:vit_small_patch14_dinov2.lvd142m

The same command again finishes what is missing, retries rows that failed, and changes nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import filelock
import numpy as np
import torch

from hdcache.datasets import Dataset, open_dataset
from hdcache.encodings import Encoder
from hdcache.errors import InputNotFound, OutOfSpace, StoreMismatch, UsageError
from hdcache.extract.calibrate import calibrate, repair_constants, write_record
from hdcache.extract.engine import Pipeline, Timing
from hdcache.extract.summary import ExtractSummary, account
from hdcache.extract.writer import ViewWriter
from hdcache.progress import Progress, size
from hdcache.reader import TeacherReader
from hdcache.records import differences
from hdcache.rendering import input_shape
from hdcache.resources import available_cores
from hdcache.schema import MaskSpec, StoreCard, TapCard, TapRequest, TeacherRecord, ViewSpec
from hdcache.store import ROOT_LOCK, Store
from hdcache.tap_requests import request_all
from hdcache.taps import check_readable, parse_tap
from hdcache.targets import default_block
from hdcache.teachers import Teacher, absolute_spec, choose_device, load_teacher, split_name
from hdcache.views import check_input, check_views, default_views, parse_views

SHARD_PIXELS = 256 << 20
"""Bytes of pixels that a shard may need while it is decoded and waits for its teacher."""


def extract(
    data: str | None = None,
    *,
    store: str | Path,
    teachers: Sequence[str],
    taps: Sequence[str] = (),
    views: str | ViewSpec | None = None,
    num_views: int = 1,
    view_seed: int = 0,
    encoding: str | None = None,
    fidelity: float | None = None,
    top_k: int | None = None,
    img_size: int | None = None,
    teacher_mask: str | MaskSpec | None = None,
    teacher_mask_seed: int = 0,
    precision: str = "auto",
    device: str = "auto",
    batch: int = 32,
    threads: int | None = None,
    rows_per_shard: int = 256,
    max_failures: int | None = None,
    quiet: bool = True,
) -> ExtractSummary:
    """Run ``teachers`` over ``data`` and write their taps to ``store``.

    Parameters
    ----------
    data
        data-set spec (:mod:`hdcache.datasets`); may be left out when the store exists and the data has not moved.
    teachers
        ``NAME=SPEC`` or ``SPEC`` of :mod:`hdcache.backbones`.
    taps
        tap names (:mod:`hdcache.taps`); by default the ``attn_in`` of TinyMIM's target block, and ``final``.
    views
        a preset name of :mod:`hdcache.views` or a :class:`ViewSpec`; ``mae`` for a new store, ``videomae`` for videos.
    num_views
        views per sample; more can be added by a later call.
    encoding, fidelity, top_k
        see :mod:`hdcache.tap_requests`; klt at 5 % relative RMSE by default, every class of logits.
    teacher_mask, teacher_mask_seed
        run the teachers on some of their patch tokens (:func:`~hdcache.masks.parse_mask`: ``0.75``, ``random:0.75``,
        ``tube:0.75``; the share is hidden): another mask or seed is another teacher, under a name of its own.
    batch
        images per forward pass; a rerun uses the number that the teacher was started with.
    rows_per_shard
        rows that are written together, at most: fewer for small data, and where their pixels would fill more than
        :data:`SHARD_PIXELS` bytes.
    max_failures
        stop when more images than this cannot be read; None never stops.

    Raises
    ------
    HdcacheError
        one of :mod:`hdcache.errors`, each saying what to do.
    """
    for setting, value in (("num_views", num_views), ("threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{setting} {value} must be at least 1")
    if not teachers:
        raise UsageError(
            "no teacher given; say --teacher NAME=SPEC, for example --teacher dino=timm:vit_small_patch14_dinov2.lvd142m"
        )
    where = choose_device(device)
    workers = available_cores() if threads is None else threads

    def prepare(
        spec: str, drawn: ViewSpec, on: torch.device, fixed: Path | None = None
    ) -> tuple[Teacher, list[TapRequest]]:
        teacher = load_teacher(
            spec,
            img_size=img_size,
            mask=teacher_mask,
            mask_seed=teacher_mask_seed,
            precision=precision,
            device=on,
            batch=batch,
            taps=list(taps),
        )
        check_input(drawn, teacher.card.preprocessing, f"teacher {teacher.name}", fixed)
        requests = request_all(taps or default_taps(teacher), encoding, fidelity, top_k)
        for request in requests:
            check_readable(teacher.backbone.model, parse_tap(request.tap, teacher.card.depth))
        return teacher, requests

    prepared: list[tuple[Teacher, list[TapRequest]]] = []

    def check(spec: str, drawn: ViewSpec) -> int:
        # Several teachers may not fit beside each other: each is looked at on the CPU, and loaded again for its turn.
        alone = len(teachers) == 1
        teacher, requests = prepare(spec, drawn, where if alone else torch.device("cpu"))
        prepared.extend([(teacher, requests)] * alone)
        return math.prod(input_shape(teacher.card.preprocessing))

    def check_all(drawn: ViewSpec) -> int:
        return max(check(spec, drawn) for spec in teachers)

    path = Path(store).expanduser()
    dataset, opened = open_or_create(data, path, views, view_seed, rows_per_shard, check_all)
    summary = ExtractSummary(str(opened.path))

    def take(spec: str) -> None:
        """The turn of one teacher; its network is gone when this returns."""
        name = split_name(spec)[0]
        with opened.lock(name):
            known = opened.teacher(name) if name in opened.teachers() else None
            teacher, requests = prepared.pop() if prepared else prepare(spec, opened.card.views, where, path)
            check_input(opened.card.views, teacher.card.preprocessing, f"teacher {name}", path)
            teacher = dataclasses.replace(teacher, batch=known.batch if known else batch)
            record, encoders = open_or_calibrate(
                opened, dataset, teacher, requests, known, threads=workers, source=absolute_spec(split_name(spec)[1])
            )
            pipeline = Pipeline(opened, dataset, teacher, threads=workers, max_failures=max_failures)
            started = time.perf_counter()
            extract_views(pipeline, record, encoders, num_views, quiet=quiet)
            summary.failed |= pipeline.timing.failed
            summary.teachers[name] = account(opened, record, pipeline.timing, time.perf_counter() - started, num_views)

    for spec in teachers:
        take(spec)
    return summary


def open_or_create(
    data: str | None,
    path: Path,
    views: str | ViewSpec | None,
    seed: int,
    rows_per_shard: int,
    prepare: Callable[[ViewSpec], int] = lambda drawn: 1,
) -> tuple[Dataset, Store]:
    """The data set and its store; a store that holds something must have been made from the same data and views.

    ``prepare`` is called with the views before a store is made, refuses what would not fit them, and returns the bytes
    of one row's pixels. A store that nothing was written to, as a refused command leaves it, is made anew.
    """
    asked = views if isinstance(views, ViewSpec) else parse_views(views or "mae", seed)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; give --store a folder")
    there = Store.open(path) if (path / "zarr.json").is_file() else None
    if there is None and data is None:
        raise InputNotFound(
            f"{path}: no store there yet; name the data set too: 'hdcache extract DATA --store {path} ...'"
        )
    if data is not None and (there is None or not there.begun):
        dataset = open_dataset(data)
        if views is None:
            same = there is not None and not seed and not dataset_differences(dataset, there)
            asked = there.card.views if there and same else parse_views(default_views(dataset.card), seed)
        check_views(asked, dataset.card)
        shard = shard_size(dataset.card.count, rows_per_shard, prepare(asked))
        card = StoreCard(dataset=dataset.card, views=asked, rows_per_shard=shard, rows_per_chunk=min(8, shard))
        path.mkdir(parents=True, exist_ok=True)
        # Processes that make one store together wait for each other: the lock is held for moments.
        with filelock.FileLock(path / ROOT_LOCK):
            # Another process may have been faster; its store is then held to the same settings.
            if (path / "zarr.json").is_file():
                other = Store.open(path)
                here = other.card.model_copy(update={"dataset": card.dataset})
                if here != card or dataset_differences(dataset, other):
                    other.withdraw()
            if not (path / "zarr.json").is_file():
                return dataset, Store.create(
                    path,
                    card,
                    list(dataset.ids),
                    dataset.labels,
                    written_with={name: version(name) for name in decoders(dataset.card.kind)},
                )
    store = Store.open(path)
    known = store.card.dataset
    try:
        dataset = open_dataset(data or known.spec, classes=known.classes)
    except InputNotFound as error:
        if data is not None:
            raise
        raise InputNotFound(f"{error}; if the data set has moved, name it: 'hdcache extract DATA ...'") from None
    lines = dataset_differences(dataset, store)
    if views is not None or seed:
        found = store.card.views
        compared = asked if views is not None else found.model_copy(update={"seed": seed})
        lines += differences(compared.whole(), found.whole(), "views")
    if lines:
        raise StoreMismatch(
            f"{path} was made with other settings ({'; '.join(lines)}); give --store another folder, or the settings it has"
        )
    return dataset, store


def decoders(kind: str) -> list[str]:
    """The packages whose versions may show in what a store of data of this kind holds."""
    return ["hdcache", "zarr", "numcodecs", "numpy", "pillow", *(["av"] if kind == "video" else [])]


def shard_size(count: int, wanted: int, pixels: int = 1) -> int:
    """Rows per shard: whole chunks of 8, and for a small data set so few that it still gets several shards.

    Fewer too where rows of ``pixels`` bytes are so large that a shard of them would need more than :data:`SHARD_PIXELS`.
    """
    if wanted < 1:
        raise UsageError(f"rows_per_shard {wanted} must be at least 1")
    return wanted if wanted < 8 else max(8, min(wanted, -(-count // 8), SHARD_PIXELS // pixels) // 8 * 8)


def dataset_differences(dataset: Dataset, store: Store) -> list[str]:
    """What sets a data set apart from the one that the store was made from, in one line; empty if nothing does."""
    if dataset.card.fingerprint == store.card.dataset.fingerprint:
        return []
    now, then = set(dataset.ids), set(store.ids)
    if now == then:
        return ["dataset: the same samples, but labels or contents have changed"]
    new, gone = sorted(now - then), sorted(then - now)
    parts = [
        f"{len(ids)} samples are {what}, such as {ids[0]!r}" for what, ids in (("new", new), ("gone", gone)) if ids
    ]
    return [f"dataset: of {store.card.dataset.count} samples, {' and '.join(parts)}"]


def default_taps(teacher: Teacher) -> list[str]:
    """The QKV input of TinyMIM's target block (18 of 24, the last of 12), and the deepest features that were trained.

    The latter is ``final``, or for a student of relation distillation the output of its last block but one.
    """
    return [f"block{default_block(teacher.card.depth)}.attn_in", teacher.backbone.last_trained]


def open_or_calibrate(
    store: Store,
    dataset: Dataset,
    teacher: Teacher,
    requests: Sequence[TapRequest],
    known: TeacherRecord | None,
    *,
    threads: int,
    source: str,
) -> tuple[TeacherRecord, dict[str, Encoder]]:
    """A new teacher is calibrated; one that the store has must be the same in all that changes values."""
    if known is None:
        record, encoders = calibrate(store, dataset, teacher, requests, threads=threads, source=source)
        return write_record(store, teacher, record, encoders), encoders
    asked = {
        "card": teacher.card.whole(),
        "requests": [entry.whole() for entry in requests],
        "dataset": store.card.dataset.fingerprint,
        "views": store.card.views.whole(),
    }
    found = {key: known.whole()[key] for key in asked} | {"card": known.card.told_by(teacher.card).whole()}
    found["requests"] = sorted(found["requests"], key=lambda entry: str(entry["tap"]))
    lines = differences(asked, found)
    if lines:
        raise StoreMismatch(
            f"teacher {teacher.name!r} in {store.path} was made with other settings ({'; '.join(lines)}); "
            f"repeat its settings, or add this one under another name: --teacher {store.free_name(teacher.name)}=..."
        )
    repair_constants(store, dataset, teacher, known, threads=threads)
    return known, TeacherReader(store, teacher.name).encoders


def extract_views(
    pipeline: Pipeline, record: TeacherRecord, encoders: dict[str, Encoder], num_views: int, *, quiet: bool
) -> None:
    """Write and seal every view that is not complete."""
    writers = [ViewWriter(pipeline.store, record, encoders, view) for view in range(num_views)]
    pending = [(writer, todo) for writer in writers if (todo := writer.todo()) or not writer.sealed()]
    total = sum(writer.rows for writer in writers)
    left = sum(rows_of(writer, todo) for writer, todo in pending)
    new = sum(rows_of(writer, [s for s in todo if writer.ledger.receipt(s) is None]) for writer, todo in pending)
    check_space(pipeline.store, record, new)
    with Progress(f"extract {record.name}", total, "rows", quiet=quiet) as bar:
        bar.skip(total - left)

        def advance(rows: int, timing: Timing) -> None:
            seconds = max(1e-9, timing.forward + timing.encode + timing.waiting_for_images + timing.waiting_for_disk)
            failed = f"  {len(timing.failed)} failed" if timing.failed else ""
            bar.advance(rows, f"{size(timing.bytes / seconds)}/s{failed}  [{timing.bottleneck()}]")

        for writer, todo in pending:
            writer.open()
            pipeline.repair(writer)
            pipeline.run(writer, todo, advance)
            writer.seal()


def rows_of(writer: ViewWriter, shards: Sequence[int]) -> int:
    """Rows that some shards of a view hold; the last one may be short."""
    size = writer.store.card.rows_per_shard
    return sum(min(size, writer.rows - shard * size) for shard in shards)


def check_space(store: Store, record: TeacherRecord, rows: int) -> None:
    """Refuse a run whose rows, all views together, will not fit: by the bits per value measured at calibration."""
    need = rows * sum(row_bytes(card) for card in record.taps.values())
    free = shutil.disk_usage(store.path).free
    if need > free:
        raise OutOfSpace(
            f"{store.path}: about {size(need)} are needed for {rows:,} rows, {size(free)} are free; "
            "free space, store fewer taps or views, or ask for a coarser --fidelity"
        )


def row_bytes(card: TapCard) -> float:
    """Bytes on disk of one row of a tap: its values at the measured rate, and its prefix tokens, which no codec shrinks."""
    values = math.prod(card.row)
    prefix = card.arrays.get("prefix")
    raw = math.prod(prefix.shape) * np.dtype(prefix.dtype).itemsize if prefix else 0
    return values * card.certificate.bits_per_value / 8 + raw
