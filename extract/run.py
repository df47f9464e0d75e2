"""Teachers run once, rows are stored: the story of ``hdcache extract``.

    hdcache extract folder:train --store train.hdc --teacher dino=timm:vit_small_patch14_dinov2.lvd142m

The same command again finishes what is missing, retries rows that failed, and changes nothing else.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hdcache.encodings import Encoder
from hdcache.errors import OutOfSpace, UsageError
from hdcache.extract.budget import budget_share, with_budget
from hdcache.extract.opening import Asked, open_or_calibrate, open_or_create, pixel_bytes
from hdcache.extract.pipeline import Pipeline, Timing
from hdcache.extract.summary import ExtractSummary, account
from hdcache.extract.writer import ViewWriter
from hdcache.progress import Progress, size
from hdcache.resources import available_cores
from hdcache.schema import MaskSpec, TapRequest, TeacherRecord, ViewSpec
from hdcache.store import Store
from hdcache.teachers import Teacher, absolute_spec, choose_device, split_name
from hdcache.views import check_input


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
    budget: str | int | None = None,
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
    budget
        bytes that the rows may need, views asked for now and all teachers (in equal shares) together: klt taps then get the
        fidelities whose errors together are least (:mod:`hdcache.extract.budget`). A number, or ``100GB``.
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
    share = budget_share(budget, fidelity, len(teachers))
    where = choose_device(device)
    workers = available_cores() if threads is None else threads

    asked = Asked(tuple(taps), encoding, fidelity, top_k, img_size, teacher_mask, teacher_mask_seed, precision, batch)
    prepared: list[tuple[Teacher, list[TapRequest]]] = []

    def check(spec: str, drawn: ViewSpec) -> int:
        # Several teachers may not fit beside each other: each is looked at on the CPU, and loaded again for its turn.
        alone = len(teachers) == 1
        teacher, requests = asked.prepare(spec, drawn, where if alone else torch.device("cpu"))
        prepared.extend([(teacher, requests)] * alone)
        return pixel_bytes(teacher)

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
            teacher, requests = prepared.pop() if prepared else asked.prepare(spec, opened.card.views, where, path)
            check_input(opened.card.views, teacher.card.preprocessing, f"teacher {name}", path)
            teacher = dataclasses.replace(teacher, batch=known.batch if known else batch)
            if share is not None:
                requests = with_budget(requests, share, opened.card.dataset.count * num_views)
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
    need = rows * sum(card.bytes_per_row for card in record.taps.values())
    free = shutil.disk_usage(store.path).free
    if need > free:
        raise OutOfSpace(
            f"{store.path}: about {size(need)} are needed for {rows:,} rows, {size(free)} are free; "
            "free space, store fewer taps or views, or ask for a coarser --fidelity"
        )
