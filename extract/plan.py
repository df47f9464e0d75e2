"""What an extraction will cost, told by a small one of the same kind: the story of ``hdcache plan``.

    a few hundred rows -> the same pipeline into a scratch folder on the same disk -> bytes, objects, hours, break-even

Nothing is written to the store itself.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hdcache.datasets import Dataset, Subset, open_dataset, store_dataset
from hdcache.encodings import fit, request
from hdcache.errors import InputNotFound, OutOfSpace, UsageError
from hdcache.extract.budget import budget_share, with_budget
from hdcache.extract.calibrate import features_of, pixels_of, token_grid
from hdcache.extract.lanes import lanes_for
from hdcache.extract.opening import Asked, check_pixels, open_or_calibrate, open_or_create, pixel_bytes, shard_size
from hdcache.extract.packing import bytes_per_sample
from hdcache.extract.pipeline import Pipeline
from hdcache.extract.summary import shares, shares_text
from hdcache.extract.writer import ViewWriter
from hdcache.klt import prepare
from hdcache.packed import pixels_ledger
from hdcache.progress import counted, duration, size
from hdcache.reader import TeacherReader
from hdcache.resources import available_cores
from hdcache.schema import TapRequest, TeacherRecord, ViewSpec
from hdcache.shrinking import parse_pixels, shrunk
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.teachers import Teacher, choose_device
from hdcache.views import row_order

PROBE_ROWS = 320
"""Rows that are extracted to see how fast that is."""
PROBE_SHARDS = 5
"""In so many shards; the first fills the pipeline and is not timed."""
OTHERS_ROWS = 64
"""Rows on which encodings that were not asked for are tried."""
OTHERS: tuple[tuple[str, float | None], ...] = (
    ("fp32", None), ("fp16", None), ("int8", None), ("klt", 0.05), ("klt", 0.1), ("klt", 0.2)
)  # fmt: skip
READ_ROWS = 32


@dataclass
class TeacherPlan:
    """What one teacher will cost."""

    rows: int
    """Rows of all views."""
    taps: dict[str, dict[str, Any]]
    """Tap -> its encoding, bytes a row, bytes in all, certificate, and ``others``: encoding -> bytes in all."""
    bytes: int
    objects: int
    """Files that the rows will be in."""
    rows_per_second: tuple[float, float]
    """Slowest and fastest that the probe's shards were, at least 10 % apart from their mean."""
    seconds: tuple[float, float]
    """Fastest and slowest, calibration included."""
    shares: dict[str, float]
    """Stage -> share of the probe's time, as seen from the threads that drive the teacher."""
    bottleneck: str
    forward_seconds_per_epoch: float
    """What running this teacher costs an epoch of training (``--online``)."""
    read_seconds_per_epoch: float
    """What reading and decoding its rows costs an epoch, in one thread and with nothing else to do."""
    pays_after: float | None
    """Epochs, over all students, after which storing was cheaper than running the teacher; None: never."""


@dataclass
class Plan:
    """What an extraction will cost."""

    store: str
    samples: int
    num_views: int
    free: int
    """Bytes free where the store will be."""
    pixels: int = 0
    """Bytes of the samples themselves, where they are still to be kept (``--pixels``)."""
    teachers: dict[str, TeacherPlan] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all teachers, and of the samples."""
        return self.pixels + sum(found.bytes for found in self.teachers.values())

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.bytes <= self.free

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"bytes": self.bytes, "fits": self.fits}


def plan(
    data: str | None = None,
    *,
    store: str | Path,
    teachers: Sequence[str],
    taps: Sequence[str] = (),
    views: str | ViewSpec | None = None,
    num_views: int = 1,
    view_seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    rows_per_shard: int = 256,
    quiet: bool = True,
    max_failures: int | None = None,
    budget: str | int | None = None,
    pixels: str | int | None = None,
    **asked: Any,
) -> Plan:
    """Probe ``hdcache extract`` with these arguments (:func:`hdcache.extract.run.extract`) and say what it will cost.

    Raises
    ------
    HdcacheError
        what the extraction itself would refuse: data, teachers, taps or views that do not fit each other.
    """
    if num_views < 1:
        raise UsageError(f"num_views {num_views} must be at least 1")
    share = budget_share(budget, asked.get("fidelity"), len(teachers))
    path, where = Path(store).expanduser(), choose_device(device)
    there = Store.open(path) if (path / "zarr.json").is_file() else None
    if there is None and data is None:
        raise InputNotFound(
            f"{path}: no store there yet; name the data set too: 'hdcache plan DATA --store {path} ...'"
        )
    side = parse_pixels(pixels)
    if there is not None and there.begun:
        check_pixels(there, pixels)
        side = there.card.dataset.shorter_side
    whole = store_dataset(there) if data is None and there is not None else open_dataset(data or "")
    dataset = shrunk(whole, side)
    drawn = there.card.views if there is not None and there.begun and views is None else views
    known = Asked(taps=tuple(taps), **asked)
    home = next(folder for folder in path.absolute().parents if folder.is_dir())
    sample = _sample(dataset, drawn.seed if isinstance(drawn, ViewSpec) else view_seed)
    found = Plan(str(path), dataset.card.count, num_views, shutil.disk_usage(home).free)
    if pixels is not None and not (there is not None and pixels_ledger(there).sealed):
        found.pixels = round(dataset.card.count * bytes_per_sample(dataset))
    for spec in teachers:
        # Beside the store: its disk is the one that has to keep up.
        scratch = home if os.access(home, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix=".hdcache-plan-", dir=scratch) as folder:
            name, part = _probe(
                spec, sample, Path(folder) / "probe", known, drawn, view_seed, where,
                available_cores() if threads is None else threads, dataset.card.count, num_views, rows_per_shard,
                share,
            )  # fmt: skip
        found.teachers[name] = part
    return found


def _sample(dataset: Dataset, seed: int) -> Dataset:
    """The samples of the first rows of view 0, or all."""
    count = dataset.card.count
    if count <= PROBE_ROWS:
        return dataset
    chosen = np.sort(row_order(count, seed, 0)[:PROBE_ROWS])
    return Subset(dataset, tuple(dataset.ids[int(place)] for place in chosen))


def _probe(
    spec: str,
    sample: Dataset,
    folder: Path,
    asked: Asked,
    views: str | ViewSpec | None,
    seed: int,
    device: torch.device,
    threads: int,
    count: int,
    num_views: int,
    rows_per_shard: int,
    budget: int | None,
) -> tuple[str, TeacherPlan]:
    """Extract the sample with one teacher; its name, and what ``count`` samples under ``num_views`` views will cost."""
    prepared: list[tuple[Teacher, list[TapRequest]]] = []

    def check(drawn: ViewSpec) -> int:
        prepared.append(asked.prepare(spec, drawn, device))
        return pixel_bytes(prepared[0][0])

    of_probe = max(1, len(sample.ids) // PROBE_SHARDS)
    _, store = open_or_create(sample, folder, views, seed, of_probe, check)
    teacher, requests = prepared[0]
    if budget is not None:
        requests = with_budget(requests, budget, count * num_views)
    began = time.perf_counter()
    record, encoders = open_or_calibrate(store, sample, teacher, requests, None, threads=threads, source="")
    calibrated = time.perf_counter() - began
    writer = ViewWriter(store, record, encoders, 0)
    writer.open()
    lanes = lanes_for(teacher, [card.encoding for card in record.taps.values()])
    pipeline = Pipeline(store, sample, teacher, threads=threads, max_failures=None, lanes=lanes)
    marks: list[tuple[float, int]] = []
    pipeline.run(writer, writer.todo(), lambda rows, _: marks.append((time.perf_counter(), rows)))
    writer.seal()
    slow, fast = _rates(marks)
    rows = count * num_views
    shard = shard_size(count, rows_per_shard, pixel_bytes(teacher))
    arrays = sum(len(encoder.card.arrays) for encoder in encoders.values()) + (record.card.mask is not None)
    # A shard's arrays and receipt, the view's geometry and its receipt; and what a view has once.
    objects = num_views * (-(-count // shard) * (arrays + 4) + arrays + 8)
    others = _others(store, sample, teacher, requests, threads)
    taps: dict[str, dict[str, Any]] = {
        tap: {
            "encoding": card.encoding,
            "fidelity": card.fidelity,
            "bytes_per_row": round(card.bytes_per_row, 1),
            "bytes": round(rows * card.bytes_per_row),
            "certificate": card.certificate.model_dump(mode="json"),
            "others": {name: round(rows * each) for name, each in others.get(tap, {}).items()},
        }
        for tap, card in record.taps.items()
    }
    timing, probed = pipeline.timing, sum(number for _, number in marks)
    forward = count * timing.forward / max(1, probed)
    reading = count * _read_seconds(store, record) / max(1, probed)
    extraction = rows / ((slow + fast) / 2)
    return teacher.name, TeacherPlan(
        rows=rows,
        taps=taps,
        bytes=sum(found["bytes"] for found in taps.values()),
        objects=objects,
        rows_per_second=(round(slow, 1), round(fast, 1)),
        seconds=(round(calibrated + rows / fast, 1), round(calibrated + rows / slow, 1)),
        shares=shares(timing.stages()),
        bottleneck=timing.bottleneck(),
        forward_seconds_per_epoch=round(forward, 1),
        read_seconds_per_epoch=round(reading, 1),
        pays_after=round((calibrated + extraction) / (forward - reading), 1) if forward > reading else None,
    )


def _rates(marks: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Slowest and fastest rows/s of the shards after the first, at least 10 % from their mean."""
    times = [now - before for (before, _), (now, _) in itertools.pairwise(marks)]
    rates = [rows / max(seconds, 1e-9) for seconds, (_, rows) in zip(times, marks[1:], strict=True)]
    if not rates:
        raise UsageError("too few samples to plan for: they are extracted sooner than measured; run 'hdcache extract'")
    mean = sum(rows for _, rows in marks[1:]) / max(sum(times), 1e-9)
    return min(statistics.quantiles(rates, n=4)[0] if len(rates) > 1 else mean, 0.9 * mean), max(
        statistics.quantiles(rates, n=4)[2] if len(rates) > 1 else mean, 1.1 * mean
    )


def _read_seconds(store: Store, record: TeacherRecord) -> float:
    """Seconds to read and decode every row of the probe, as a training run does."""
    reader, count = TeacherReader(store, record.name), store.card.dataset.count
    began = time.perf_counter()
    for start in range(0, count, READ_ROWS):
        for tap in record.taps:
            reader.tap(0, tap, start, min(start + READ_ROWS, count))
    return time.perf_counter() - began


def _others(
    store: Store, sample: Dataset, teacher: Teacher, requests: Sequence[TapRequest], threads: int
) -> dict[str, dict[str, float]]:
    """Tap -> encoding -> bytes a row, of token taps in encodings that were not asked for."""
    asked = {entry.tap: (entry.encoding, entry.fidelity) for entry in requests}
    pixels, ids = pixels_of(store, sample, teacher, OTHERS_ROWS, threads)
    features = features_of(teacher, pixels, list(asked), teacher.visible(ids, 0))
    found: dict[str, dict[str, float]] = {}
    for tap, value in features.items():
        if not isinstance(value, Tokens) or len(ids) < 2:
            continue
        half = max(1, len(ids) * 3 // 4)
        first, held = (Tokens(value.prefix[rows], value.patches[rows]) for rows in (slice(0, half), slice(half, None)))
        grid = token_grid(teacher.card)
        prepared = prepare(first.patches, grid)
        for encoding, fidelity in OTHERS:
            if (encoding, fidelity) != asked[tap]:
                card = fit(request(tap, encoding, fidelity), first, held, grid, prepared).card
                found.setdefault(tap, {})[named(encoding, fidelity)] = card.bytes_per_row
    return found


def named(encoding: str, fidelity: float | None) -> str:
    """``klt 5 %``, ``fp16``."""
    return encoding + (f" {100 * fidelity:g} %" if fidelity else "")


def format_plan(found: Plan) -> str:
    """The plan as text."""
    lines = [f"{found.store}: {counted(found.samples, 'samples')} x {counted(found.num_views, 'views')}"]
    for name, part in found.teachers.items():
        for tap, facts in part.taps.items():
            others = ", ".join(f"{other} {size(count)}" for other, count in facts["others"].items())
            lines.append(
                f"  {name} {tap}: {named(facts['encoding'], facts['fidelity'])}, {size(facts['bytes_per_row'])} a row, "
                f"{size(facts['bytes'])}" + (f" ({others})" if others else "")
            )
        slow, fast = part.rows_per_second
        lines.append(
            f"  {name}: {part.rows:,} rows, {size(part.bytes)} in {counted(part.objects, 'objects')}; "
            f"{duration(part.seconds[0])} to {duration(part.seconds[1])} at {slow:,.0f} to {fast:,.0f} rows/s ({shares_text(part.shares)})"
        )
        lines.append(f"  {name}: {_advice(part)}")
    lines += [f"  the samples themselves: {size(found.pixels)}"] * bool(found.pixels)
    room = f"{size(found.free)} are free there"
    lines.append(
        f"{size(found.bytes)} in all; {room}" if found.fits else f"{size(found.bytes)} in all do NOT fit: {room}"
    )
    return "\n".join(lines)


def _advice(part: TeacherPlan) -> str:
    costs = (
        f"the teacher's forward costs {duration(part.forward_seconds_per_epoch)} an epoch, reading its rows "
        f"{duration(part.read_seconds_per_epoch)} in one thread"
    )
    if part.pays_after is None:
        return f"{costs}; the store never pays: train with --online"
    return f"{costs}; the store pays after {part.pays_after:g} epochs, all students together"


def check_room(found: Plan) -> None:
    """:class:`OutOfSpace` where the plan does not fit."""
    if not found.fits:
        raise OutOfSpace(
            f"{found.store}: about {size(found.bytes)} are needed, {size(found.free)} are free; "
            "free space, store fewer taps or views, or ask for a coarser --fidelity"
        )
