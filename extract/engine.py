"""Shard by shard: decode, forward, encode and write, each overlapped with the others.

A shard is written whole by one task, its receipt last. Batches are cut inside a shard and a failed row keeps its
place as a blank image, so a shard's bytes depend on nothing but its own rows: a killed run, rerun, writes the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache import stopping
from hdcache.datasets import Dataset
from hdcache.encodings import Parts
from hdcache.errors import StoreMismatch, TooManyFailures, UnreadableImage, UsageError
from hdcache.extract.writer import Row, ViewWriter, is_recorded
from hdcache.reader import read_shard_geometry
from hdcache.samples import Recorded, open_sample
from hdcache.schema import Preprocessing
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.teachers import Teacher, batches
from hdcache.views import row_order

AHEAD = 2
"""Shards decoded ahead of the forward pass, and shards waiting to be written."""
ENOUGH_TO_JUDGE = 8
"""Readable images of one shard that, all without finite features, condemn the teacher and not the images."""


@dataclass
class Timing:
    """Where an extraction's seconds went, seen from the thread that drives the teacher."""

    waiting_for_images: float = 0.0
    forward: float = 0.0
    encode: float = 0.0
    waiting_for_disk: float = 0.0
    rows: int = 0
    """Rows written; a retry that mended nothing writes none."""
    bytes: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Sample id -> reason, over all views."""

    def bottleneck(self) -> str:
        """The stage to speed up first."""
        stages = {
            "reading and decoding images": self.waiting_for_images,
            "teacher forward": self.forward,
            "encoding": self.encode,
            "writing": self.waiting_for_disk,
        }
        return max(stages, key=lambda name: stages[name])


def shard_rows(store: Store, view: int, shard: int) -> list[tuple[int, Recorded | None]]:
    """Sample index of each row of a shard, and its recorded geometry where a teacher has been here before.

    Raises
    ------
    StoreMismatch
        when the recorded rows are in another order than the store's seed gives.
    """
    size = store.card.rows_per_shard
    order = row_order(store.card.dataset.count, store.card.views.seed, view)[shard * size : (shard + 1) * size]
    rows: list[tuple[int, Recorded | None]] = [(int(sample), None) for sample in order]
    known = read_shard_geometry(store, view, shard)
    for i, (numbers, digest) in enumerate(zip(*known, strict=True) if known is not None else ()):
        if int(numbers[0]) != rows[i][0]:
            raise StoreMismatch(
                f"{store.path}/views/{view}: row {i} of shard {shard} names another sample than the store's seed gives; "
                "run 'hdcache verify', or extract to a new store"
            )
        if is_recorded(numbers):
            rows[i] = (rows[i][0], (numbers, digest.tobytes()))
    return rows


def decode_row(
    store: Store,
    dataset: Dataset,
    preprocessing: Preprocessing,
    view: int,
    sample: int,
    recorded: Recorded | None = None,
) -> Row:
    """Open one sample and render its view for one network; a failure becomes the row's reason."""
    try:
        opened = open_sample(dataset, store.ids[sample], store.card.views, view, recorded)
    except (UnreadableImage, StoreMismatch) as error:
        return Row(sample, None, reason=str(error))
    return Row(sample, opened.pixels(preprocessing), opened.box, opened.flip, opened.image.size, opened.digest)


class Pipeline:
    """Decoding threads, the teacher on this thread, one writing thread."""

    def __init__(
        self, store: Store, dataset: Dataset, teacher: Teacher, *, threads: int, max_failures: int | None
    ) -> None:
        self.store, self.dataset, self.teacher = store, dataset, teacher
        self.threads, self.max_failures = threads, max_failures
        self.timing = Timing()

    def run(self, writer: ViewWriter, shards: Sequence[int], advance: Callable[[int, Timing], None]) -> None:
        """Extract ``shards`` of one view; on any error what was finished stays, with its receipts.

        Raises
        ------
        TooManyFailures
            when more images fail than ``max_failures`` allows.
        Interrupted
            when a signal asked for a stop; the shards that were finished by then are written.
        """
        with ThreadPoolExecutor(self.threads, "decode") as decoding, ThreadPoolExecutor(1, "write") as writing:
            ahead: list[tuple[int, list[Future[Row]]]] = []
            written: list[tuple[int, Future[int]]] = []
            waiting = list(shards)
            try:
                while waiting or ahead:
                    if stopping.requested():
                        self._settle(written, 0)
                        raise stopping.stop(f"all finished shards written to {self.store.path}")
                    while waiting and len(ahead) < AHEAD:
                        shard = waiting.pop(0)
                        ahead.append((shard, self._decode(decoding, writer.view, shard)))
                    shard, futures = ahead.pop(0)
                    started = time.perf_counter()
                    rows = [future.result() for future in futures]
                    self.timing.waiting_for_images += time.perf_counter() - started
                    parts, failed, saturated = self._forward(writer, shard, rows)
                    self._settle(written, AHEAD - 1)
                    written.append((len(rows), writing.submit(writer.write, shard, rows, parts, failed, saturated)))
                    first = shard * self.store.card.rows_per_shard
                    self.timing.failed |= {self.store.ids[rows[row - first].sample]: why for row, why in failed.items()}
                    advance(len(rows), self.timing)
                    if self.max_failures is not None and len(self.timing.failed) > self.max_failures:
                        raise TooManyFailures(
                            f"{len(self.timing.failed)} images failed, more than --max-failures {self.max_failures}; "
                            f"the first: {next(iter(self.timing.failed.values()))}"
                        )
                self._settle(written, 0)
            except BaseException:
                decoding.shutdown(wait=False, cancel_futures=True)
                raise

    def _settle(self, written: list[tuple[int, Future[int]]], leave: int) -> None:
        """Wait until no more than ``leave`` shards are still being written; the first error of a write is raised here."""
        started = time.perf_counter()
        while len(written) > leave:
            rows, future = written.pop(0)
            count = future.result()
            self.timing.bytes += count
            self.timing.rows += rows if count else 0
        self.timing.waiting_for_disk += time.perf_counter() - started

    def _decode(self, pool: ThreadPoolExecutor, view: int, shard: int) -> list[Future[Row]]:
        card = self.teacher.card.preprocessing
        return [
            pool.submit(decode_row, self.store, self.dataset, card, view, sample, recorded)
            for sample, recorded in shard_rows(self.store, view, shard)
        ]

    def _forward(
        self, writer: ViewWriter, shard: int, rows: Sequence[Row]
    ) -> tuple[dict[str, Parts], dict[int, str], int]:
        start = shard * self.store.card.rows_per_shard
        size = self.teacher.card.preprocessing.size
        blank = np.zeros((3, size, size), np.uint8)
        failed = {start + i: row.reason for i, row in enumerate(rows) if row.pixels is None}
        collected: dict[str, dict[str, list[NDArray[np.generic]]]] = {tap: {} for tap in writer.encoders}
        saturated = 0
        for span in batches(len(rows), self.teacher.batch):
            part = rows[span]
            started = time.perf_counter()
            pixels = torch.from_numpy(np.stack([blank if row.pixels is None else row.pixels for row in part]))
            features = self.teacher.forward(pixels, list(writer.encoders))
            bad = ~finite_rows(features).cpu()
            self.timing.forward += time.perf_counter() - started
            started = time.perf_counter()
            for i in bad.nonzero().flatten().tolist():
                name = self.store.ids[part[i].sample]
                failed.setdefault(
                    start + span.start + i, f"{name}: the features of teacher {self.teacher.name} are not finite"
                )
            blanked = torch.tensor([start + span.start + i in failed for i in range(len(part))])
            for tap, encoder in writer.encoders.items():
                arrays, clipped = encoder.encode(_blank_rows(features[tap], blanked))
                saturated += clipped
                for name, block in arrays.items():
                    collected[tap].setdefault(name, []).append(block)
            self.timing.encode += time.perf_counter() - started
        readable = [start + i for i, row in enumerate(rows) if row.pixels is not None]
        if len(readable) >= ENOUGH_TO_JUDGE and failed.keys() >= set(readable):
            raise UsageError(
                f"teacher {self.teacher.name}: no row of shard {shard} has finite features in {self.teacher.card.precision}; "
                + ("use --precision fp32" if self.teacher.card.precision == "bf16" else "check the checkpoint")
            )
        joined = {
            tap: {name: np.concatenate(blocks) for name, blocks in arrays.items()} for tap, arrays in collected.items()
        }
        return joined, failed, saturated


def finite_rows(features: Mapping[str, Tokens | Tensor]) -> Tensor:
    """bool [R]: rows whose every value in every tap is finite."""
    tensors = [
        t
        for value in features.values()
        for t in ([value] if isinstance(value, Tensor) else [value.prefix, value.patches])
    ]
    return torch.stack([torch.isfinite(tensor).flatten(1).all(dim=1) for tensor in tensors]).all(dim=0)


def _blank_rows(value: Tokens | Tensor, rows: Tensor) -> Tokens | Tensor:
    """Zero the failed rows: what a reader must never see should at least be the same bytes in every run."""
    if not bool(rows.any()):
        return value
    if isinstance(value, Tensor):
        return value.clone().index_fill_(0, rows.nonzero().flatten().to(value.device), 0)
    index = rows.nonzero().flatten().to(value.patches.device)
    return Tokens(value.prefix.clone().index_fill_(0, index, 0), value.patches.clone().index_fill_(0, index, 0))
