"""Teachers run once, rows are stored: the story of ``hdcache extract``.

    hdcache extract folder:train --store train.hdc --teacher dino=timm:vit_small_patch14_dinov2.lvd142m

The same command again finishes what is missing, retries rows that failed, and changes nothing else.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from hdcache.encodings import Encoder
from hdcache.errors import UsageError
from hdcache.extract.budget import budget_share, with_budget
from hdcache.extract.calibrate import write_record
from hdcache.extract.capacity import check_manifest, check_memory, check_space, rows_left, samples_left
from hdcache.extract.engine_choice import open_engine, parse_engine
from hdcache.extract.engines import Engine, Job
from hdcache.extract.lanes import lanes_for
from hdcache.extract.opening import Asked, check_teacher, open_or_calibrate, open_or_create, pixel_bytes
from hdcache.extract.packing import bytes_per_sample, pack
from hdcache.extract.pipeline import Pipeline, Timing
from hdcache.extract.summary import ExtractSummary, account
from hdcache.extract.writer import ViewWriter
from hdcache.index import write_index
from hdcache.progress import Progress, size
from hdcache.resources import available_cores
from hdcache.schema import MaskSpec, TapRequest, TeacherRecord, ViewSpec
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
    pixels: str | int | None = None,
    engine: str | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    worker_resource: str | Sequence[str] = (),
    worker_timeout: float | None = None,
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
        see :mod:`hdcache.tap_requests`; by default klt at 10 % relative RMSE, or what a teacher that is in the store already was
        begun with, and every class of logits.
    budget
        bytes that the rows may need, views asked for now and all teachers (in equal shares) together: klt taps then get the
        fidelities whose errors together are least (:mod:`hdcache.extract.budget`). A number, or ``100GB``.
    teacher_mask, teacher_mask_seed
        run the teachers on some of their patch tokens (:func:`~hdcache.masks.parse_mask`: ``0.75``, ``random:0.75``,
        ``tube:0.75``; the share is hidden): another mask or seed is another teacher, under a name of its own.
    batch
        images per forward pass; a rerun uses the number that the teacher was started with, another one is another name's.
    rows_per_shard
        rows that are written together, at most: fewer for small data, and where their pixels would fill more than
        :data:`SHARD_PIXELS` bytes.
    max_failures
        stop when more images than this cannot be read; None never stops.
    pixels
        ``source`` keeps every sample's bytes in the store, which then needs its data set no more; a number does so with
        images whose shorter side was larger shrunk to it, before any teacher sees them.
    engine
        ``inline``: this process; ``local``: processes that are started here; ``dask``: the workers of a scheduler. The
        store is the same, to the byte where torch gives every batch the same bits: docs/scaling.md says when. Left out,
        ``workers`` means local, ``scheduler`` dask, neither inline.
    workers
        local: processes; by default one for each CUDA device.
    scheduler
        dask: ``tcp://HOST:PORT``, ``tls://HOST:PORT``, or the file that the scheduler wrote. Store and data must lie under
        the same paths on all machines.
    worker_resource
        dask: what a task takes of its worker's resources, ``GPU=1``; several as a list.
    worker_timeout
        dask: seconds to wait for a first worker, or for another one when all are gone; 60 by default.

    Raises
    ------
    HdcacheError
        one of :mod:`hdcache.errors`, each saying what to do.
    """
    for setting, value in (("num_views", num_views), ("threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{setting} {value} must be at least 1")
    if "://" in str(store):
        raise UsageError(
            f"{store}: extraction writes to a folder of this machine; give one, then copy it: hdcache push FOLDER {store}"
        )
    if not teachers:
        raise UsageError(
            "no teacher given; say --teacher NAME=SPEC, for example --teacher dino=timm:vit_small_patch14_dinov2.lvd142m"
        )
    share = budget_share(budget, fidelity, len(teachers))
    spread = parse_engine(engine, workers, scheduler, worker_resource, worker_timeout)
    where = choose_device(device)
    decoding = available_cores() if threads is None else threads

    asked = Asked(tuple(taps), encoding, fidelity, top_k, img_size, teacher_mask, teacher_mask_seed, precision, batch)
    with open_engine(spread, where) as running:
        prepared: list[tuple[Teacher, list[TapRequest]]] = []
        alone = len(teachers) == 1

        def check(spec: str, drawn: ViewSpec) -> int:
            # Several teachers may not fit beside each other: each is looked at on the CPU, and loaded again for its turn.
            teacher, requests = asked.prepare(spec, drawn, where if alone else torch.device("cpu"))
            prepared.extend([(teacher, requests)] * alone)
            return pixel_bytes(teacher)

        def check_all(drawn: ViewSpec) -> int:
            return max(check(spec, drawn) for spec in teachers)

        path = Path(store).expanduser()
        dataset, opened = open_or_create(data, path, views, view_seed, rows_per_shard, check_all, pixels)
        summary = ExtractSummary(str(opened.path))
        measured: dict[str, tuple[TeacherRecord, dict[str, Encoder]]] = {}

        def load(spec: str) -> tuple[Teacher, list[TapRequest], TeacherRecord | None]:
            name = split_name(spec)[0]
            known = opened.teacher(name) if name in opened.teachers() else None
            teacher, requests = prepared.pop() if prepared else asked.prepare(spec, opened.card.views, where, path)
            check_input(opened.card.views, teacher.card.preprocessing, f"teacher {name}", path)
            requests = asked.as_recorded(requests, known)
            if share is not None:
                requests = with_budget(requests, share, opened.card.dataset.count * num_views)
            return dataclasses.replace(teacher, batch=known.batch if known else batch), requests, known

        def measure(spec: str) -> None:
            """Calibrate a teacher, or hold it to its record; nothing is written yet."""
            teacher, requests, known = load(spec)
            record, encoders = open_or_calibrate(
                opened, dataset, teacher, requests, known, threads=decoding, source=absolute_spec(split_name(spec)[1])
            )
            check_memory(opened.card, teacher.name, teacher.card, record.taps.values(), running.at_once())
            if known is None:
                check_manifest(opened.card, teacher.name, record.taps)
            measured[teacher.name] = (record, encoders)
            prepared.extend([(teacher, requests)] * alone)

        def take(spec: str) -> None:
            """The turn of one teacher; its network is gone when this returns."""
            teacher, requests, known = load(spec)
            record, encoders = measured[teacher.name]
            if known is None:
                record = write_record(opened, teacher, record, encoders)
            else:
                check_teacher(opened, teacher, requests, known)
            lanes = lanes_for(teacher, [card.encoding for card in record.taps.values()])
            pipeline = Pipeline(opened, dataset, teacher, threads=decoding, max_failures=max_failures, lanes=lanes)
            started = time.perf_counter()
            job = Job(pipeline, record, absolute_spec(split_name(spec)[1]), device, threads)
            extract_views(job, encoders, num_views, running, quiet=quiet)
            summary.failed |= pipeline.timing.failed
            seconds = time.perf_counter() - started
            summary.teachers[teacher.name] = account(opened, record, pipeline.timing, seconds, num_views)
            summary.teachers[teacher.name]["workers"] = running.report()

        with ExitStack() as held:
            for name in dict.fromkeys(split_name(spec)[0] for spec in teachers):
                held.enter_context(opened.lock(name))
            for spec in teachers:
                measure(spec)
            rows = {
                name: (rows_left(opened, name, num_views), sum(card.bytes_per_row for card in record.taps.values()))
                for name, (record, _) in measured.items()
            }
            left = samples_left(opened) if pixels is not None else 0
            check_space(opened, rows, left * bytes_per_sample(dataset) if left else 0)
            if pixels is not None:
                dataset = pack(opened, dataset, threads=decoding, quiet=quiet)
            for spec in teachers:
                take(spec)
            write_index(opened)  # a kill may have come between a seal and its entry
        return summary


def extract_views(job: Job, encoders: dict[str, Encoder], num_views: int, engine: Engine, *, quiet: bool) -> None:
    """Write and seal every view that is not complete."""
    pipeline, record = job.pipeline, job.record
    writers = [ViewWriter(pipeline.store, record, encoders, view) for view in range(num_views)]
    pending = [(writer, todo) for writer in writers if (todo := writer.todo()) or not writer.sealed()]
    total = sum(writer.rows for writer in writers)
    left = sum(rows_of(writer, todo) for writer, todo in pending)
    with Progress(f"extract {record.name}", total, "rows", quiet=quiet) as bar:
        bar.skip(total - left)

        def advance(rows: int, timing: Timing) -> None:
            seconds = max(1e-9, time.perf_counter() - began)
            failed = f"  {len(timing.failed)} failed" if timing.failed else ""
            bar.advance(rows, f"{size(timing.bytes / seconds)}/s{failed}  [{timing.bottleneck()}]")

        began = time.perf_counter()
        engine.write(job, pending, advance)


def rows_of(writer: ViewWriter, shards: Sequence[int]) -> int:
    """Rows that some shards of a view hold; the last one may be short."""
    size = writer.store.card.rows_per_shard
    return sum(min(size, writer.rows - shard * size) for shard in shards)
