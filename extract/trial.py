"""A small extraction of the same kind as a large one, and what it measures: seconds, rates and bytes.

a few hundred rows -> the same pipeline into a scratch folder on the same disk -> a :class:`Trial`
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hdcache.datasets import Dataset, Subset
from hdcache.encodings import fit, request
from hdcache.errors import UsageError
from hdcache.extract.calibrate import features_of, pixels_of, token_grid, write_record
from hdcache.extract.lanes import lanes_for
from hdcache.extract.opening import open_or_calibrate
from hdcache.extract.pipeline import Pipeline, Timing
from hdcache.extract.writer import ViewWriter
from hdcache.klt import prepare
from hdcache.reader import TeacherReader
from hdcache.schema import StoreCard, TapRequest, TeacherRecord, ViewSpec
from hdcache.shards import LEAST_ROWS
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.teachers import Teacher
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


@dataclass(frozen=True)
class Trial:
    """What a small extraction measured."""

    record: TeacherRecord
    calibration: float
    """Seconds; no more rows need more of them."""
    rates: tuple[float, float]
    """Slowest and fastest rows/s that its shards were, at least 10 % apart from their mean."""
    rows: int
    """Rows behind :attr:`timing` and :attr:`reading`."""
    timing: Timing
    reading: float
    """Seconds to read and decode these rows in one thread."""
    others: dict[str, dict[str, float]]
    """Tap -> encoding that was not asked for -> bytes a row."""


def sample_of(dataset: Dataset, seed: int, batch: int) -> Dataset:
    """The samples of the first rows of view 0, or all: enough for :data:`PROBE_SHARDS` batches."""
    count, rows = dataset.card.count, max(PROBE_ROWS, PROBE_SHARDS * batch)
    if count <= rows:
        return dataset
    chosen = np.sort(row_order(count, seed, 0)[:rows])
    return Subset(dataset, tuple(dataset.ids[int(place)] for place in chosen))


def try_out(
    sample: Dataset,
    folder: Path,
    teacher: Teacher,
    requests: Sequence[TapRequest],
    views: ViewSpec,
    rows_per_shard: int,
    rows_per_chunk: int,
    threads: int,
) -> Trial:
    """Extract ``sample`` with one teacher into ``folder``, in shards of :func:`probe_shard` rows.

    Raises
    ------
    UsageError
        when there are too few rows to time, or one shard does not fit into memory.
    """
    of_probe = probe_shard(len(sample.ids), rows_per_shard, teacher.batch)
    # Whole shards where none of the store's chunks divides them: how much is compressed together tells on the time to read.
    together = math.gcd(of_probe, rows_per_chunk)
    together = together if together >= LEAST_ROWS else of_probe
    card = StoreCard(dataset=sample.card, views=views, rows_per_shard=of_probe, rows_per_chunk=together)
    store = Store.create(folder, card, sample.ids, sample.labels)
    began = time.perf_counter()
    record, encoders = open_or_calibrate(store, sample, teacher, requests, None, threads=threads, source="")
    record = write_record(store, teacher, record, encoders)
    calibration = time.perf_counter() - began
    writer = ViewWriter(store, record, encoders, 0)
    writer.open()
    lanes = lanes_for(teacher, [card.encoding for card in record.taps.values()])
    pipeline = Pipeline(store, sample, teacher, threads=threads, max_failures=None, lanes=lanes)
    marks: list[tuple[float, int]] = []
    pipeline.run(writer, writer.todo(), lambda rows, _: marks.append((time.perf_counter(), rows)))
    writer.seal()
    return Trial(
        record, calibration, _rates(marks), sum(rows for _, rows in marks), pipeline.timing,
        _read_seconds(store, record), _others(store, sample, teacher, requests, threads),
    )  # fmt: skip


def probe_shard(count: int, rows_per_shard: int, batch: int) -> int:
    """Rows of a probe's shards: those of the extraction where three of them fit, else whole batches.

    The last batch of a shard is filled up, and costs the teacher as much as a whole one.
    """
    if 3 * rows_per_shard <= count:
        return rows_per_shard
    rows = max(1, min(rows_per_shard, count // PROBE_SHARDS))
    return rows if rows < batch else rows - rows % batch


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
                card = fit(request(tap, encoding, fidelity), first, held, grid, prepared, teacher.card.precision).card
                found.setdefault(tap, {})[named(encoding, fidelity)] = card.bytes_per_row
    return found


def named(encoding: str, fidelity: float | None) -> str:
    """``klt 5 %``, ``fp16``."""
    return encoding + (f" {100 * fidelity:g} %" if fidelity else "")
