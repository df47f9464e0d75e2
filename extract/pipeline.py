"""Shard by shard: decode, forward, encode and write, each overlapped with the others.

A shard is written whole by one task, its receipt last. Batches are cut inside a shard and a failed row keeps its
place as a blank image, so a shard's bytes depend on nothing but its own rows: a killed run, rerun, writes the same.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache import stopping
from hdcache.datasets import Dataset
from hdcache.encodings import Encoder
from hdcache.errors import InputNotFound, StoreMismatch, TooManyFailures, UnreadableImage, UsageError
from hdcache.extract.writer import Row, ViewWriter, is_recorded
from hdcache.masks import pack_visible
from hdcache.plain_encodings import Parts
from hdcache.progress import counted
from hdcache.reader import MASK_ARRAY, read_shard_geometry
from hdcache.rendering import input_shape
from hdcache.resources import memory_budget
from hdcache.samples import Recorded, open_sample
from hdcache.schema import Preprocessing
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.teachers import Teacher, batches
from hdcache.views import row_order

AHEAD = 2
"""Shards whose pixels are held at once, the one that the teacher sees among them, and shards waiting to be written."""
ENOUGH_TO_JUDGE = 8
"""Rows of one shard that, all without finite features, condemn the teacher and, all gone, the data set."""


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
            "reading and decoding": self.waiting_for_images,
            "teacher forward": self.forward,
            "encoding": self.encode,
            "writing": self.waiting_for_disk,
        }
        return max(stages, key=lambda name: stages[name])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, view: int) -> NDArray[np.int64]:
    """The view's order, kept: a million rows take a tenth of a second to sort, and every shard asks for it."""
    order = row_order(count, seed, view)
    order.setflags(write=False)
    return order


def shard_rows(store: Store, view: int, shard: int) -> list[tuple[int, Recorded | None]]:
    """Sample index of each row of a shard, and its recorded geometry where a teacher has been here before.

    Raises
    ------
    StoreMismatch
        when the recorded rows are in another order than the store's seed gives.
    """
    size = store.card.rows_per_shard
    order = _order(store.card.dataset.count, store.card.views.seed, view)[shard * size : (shard + 1) * size]
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
        return Row(sample, None, reason=str(error), gone=_by_the_system(error))
    return Row(
        sample,
        opened.pixels(preprocessing),
        opened.box,
        opened.flip,
        opened.image.size,
        opened.digest,
        frames=opened.frames,
    )


def _by_the_system(error: BaseException | None) -> bool:
    """Whether an error goes back to the operating system (no such file, stale mount) and not to the bytes read."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return True
        error = error.__cause__ or error.__context__
    return False


class Pipeline:
    """Decoding threads, the teacher on this thread, one writing thread."""

    def __init__(
        self, store: Store, dataset: Dataset, teacher: Teacher, *, threads: int, max_failures: int | None
    ) -> None:
        self.store, self.dataset, self.teacher = store, dataset, teacher
        self.threads, self.max_failures = threads, max_failures
        self.timing = Timing()
        pixels = store.card.rows_per_shard * math.prod(input_shape(teacher.card.preprocessing))
        self.ahead = AHEAD if AHEAD * pixels <= memory_budget() else 1
        """Shards of pixels that fit into memory; with one, decoding and the teacher wait for each other."""

    def run(self, writer: ViewWriter, shards: Sequence[int], advance: Callable[[int, Timing], None]) -> None:
        """Extract ``shards`` of one view; on any error what was finished stays, with its receipts.

        Raises
        ------
        TooManyFailures
            when more images fail than ``max_failures`` allows.
        InputNotFound
            when the system can read no file of a whole shard: the data set is gone, not its images broken.
        Interrupted
            when a signal asked for a stop; the shards that were finished by then are written.
        """
        with ThreadPoolExecutor(self.threads, "decode") as decoding, ThreadPoolExecutor(1, "write") as writing:
            ahead: list[tuple[int, list[Future[Row]]]] = []
            written: list[tuple[int, Future[int]]] = []
            listed: list[tuple[int, Future[list[tuple[int, Recorded | None]]]]] = []
            try:
                # Before two threads ask for it at once, and both sort.
                _order(self.store.card.dataset.count, self.store.card.views.seed, writer.view)
                waiting = [shard for shard in shards if self._worthwhile(decoding, writer, shard, advance)]
                while waiting or listed or ahead:
                    if stopping.requested():
                        self._settle(written, 0)
                        self._heed_a_stop()
                    # A shard's recorded geometry is read by a thread too, one shard before it is needed.
                    while (waiting or listed) and len(ahead) < self.ahead:
                        while waiting and len(listed) < 2:
                            shard = waiting.pop(0)
                            listed.append((shard, decoding.submit(shard_rows, self.store, writer.view, shard)))
                        shard, entries = listed.pop(0)
                        ahead.append((shard, self._decode(decoding, writer.view, entries.result())))
                    shard, futures = ahead.pop(0)
                    started = time.perf_counter()
                    rows = [future.result() for future in futures]
                    self.timing.waiting_for_images += time.perf_counter() - started
                    if len(rows) >= ENOUGH_TO_JUDGE and all(row.gone for row in rows):
                        raise InputNotFound(
                            f"{self.dataset.card.spec}: none of the {self.dataset.card.noun} of shard {shard} could be read ({rows[0].reason}); is the "
                            "data set still there? Finished shards are safe: bring it back and run the same command again"
                        )
                    parts, failed, saturated = self._forward(writer, shard, rows)
                    # What waits to be written needs the rows' numbers, not their pixels.
                    rows = [dataclasses.replace(row, pixels=None) for row in rows]
                    futures.clear()
                    self._settle(written, AHEAD - 1)
                    written.append((len(rows), writing.submit(writer.write, shard, rows, parts, failed, saturated)))
                    first = shard * self.store.card.rows_per_shard
                    self.timing.failed |= {self.store.ids[rows[row - first].sample]: why for row, why in failed.items()}
                    advance(len(rows), self.timing)
                    self._check_failures()
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

    def repair(self, writer: ViewWriter) -> None:
        """Write lost geometry of shards whose rows are stored again: images are decoded, the teacher does not run."""
        with ThreadPoolExecutor(self.threads, "decode") as decoding:
            for shard in writer.lost_geometry():
                self._heed_a_stop()
                entries = shard_rows(self.store, writer.view, shard)
                rows = [future.result() for future in self._decode(decoding, writer.view, entries)]
                writer.rebuild_geometry(shard, rows)

    def _worthwhile(
        self, pool: ThreadPoolExecutor, writer: ViewWriter, shard: int, advance: Callable[[int, Timing], None]
    ) -> bool:
        """Whether a shard needs the teacher: a complete one does only when one of its failed rows can be read now."""
        receipt = writer.ledger.receipt(shard)
        if receipt is None or not receipt.failed:
            return True
        self._heed_a_stop()
        entries = shard_rows(self.store, writer.view, shard)
        broken = [entries[row - receipt.rows[0]] for row in receipt.failed]
        rows = [future.result() for future in self._decode(pool, writer.view, broken)]
        if any(row.pixels is not None for row in rows):
            return True
        self.timing.failed |= {self.store.ids[row.sample]: row.reason for row in rows}
        advance(len(entries), self.timing)
        self._check_failures()
        return False

    def _heed_a_stop(self) -> None:
        if stopping.requested():
            raise stopping.stop(f"all finished shards written to {self.store.path}")

    def _check_failures(self) -> None:
        if self.max_failures is not None and len(self.timing.failed) > self.max_failures:
            raise TooManyFailures(
                f"{counted(len(self.timing.failed), self.dataset.card.noun)} failed, more than --max-failures {self.max_failures}; "
                f"the first: {next(iter(self.timing.failed.values()))}"
            )

    def _decode(
        self, pool: ThreadPoolExecutor, view: int, entries: Sequence[tuple[int, Recorded | None]]
    ) -> list[Future[Row]]:
        card = self.teacher.card.preprocessing
        return [
            pool.submit(decode_row, self.store, self.dataset, card, view, sample, recorded)
            for sample, recorded in entries
        ]

    def _forward(
        self, writer: ViewWriter, shard: int, rows: Sequence[Row]
    ) -> tuple[dict[str, Parts], dict[int, str], int]:
        start = shard * self.store.card.rows_per_shard
        blank = np.zeros(input_shape(self.teacher.card.preprocessing), np.uint8)
        failed = {start + i: row.reason for i, row in enumerate(rows) if row.pixels is None}
        collected: dict[str, dict[str, list[NDArray[np.generic]]]] = {tap: {} for tap in writer.encoders}
        masks: list[NDArray[np.uint8]] = []
        saturated = 0
        for span in batches(len(rows), self.teacher.batch):
            part = rows[span]
            started = time.perf_counter()
            features: dict[str, Tokens | Tensor]
            visible = self.teacher.visible([self.store.ids[row.sample] for row in part], writer.view)
            if all(row.pixels is None for row in part):
                features = {
                    tap: _zeros(encoder, len(part), self.teacher.device) for tap, encoder in writer.encoders.items()
                }
            else:
                pixels = torch.from_numpy(np.stack([blank if row.pixels is None else row.pixels for row in part]))
                features = self.teacher.forward(pixels, list(writer.encoders), visible)
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
            if visible is not None:
                masks.append(pack_visible(visible, self.teacher.card.tokens))
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
        if masks:
            folder, name = MASK_ARRAY.split("/")
            joined[folder] = {name: np.concatenate(masks)}
        return joined, failed, saturated


def finite_rows(features: Mapping[str, Tokens | Tensor]) -> Tensor:
    """bool [R]: rows whose every value in every tap is finite."""
    tensors = [
        t
        for value in features.values()
        for t in ([value] if isinstance(value, Tensor) else [value.prefix, value.patches])
    ]
    return torch.stack([torch.isfinite(tensor).flatten(1).all(dim=1) for tensor in tensors]).all(dim=0)


def _zeros(encoder: Encoder, rows: int, device: torch.device) -> Tokens | Tensor:
    """Features of rows that all failed, as :func:`_blank_rows` would leave them."""
    card = encoder.card
    if not card.tokens:
        return torch.zeros(rows, *card.row, device=device)
    shapes = ((rows, count, card.channels) for count in (card.prefix_tokens, card.tokens))
    return Tokens(*(torch.zeros(shape, device=device) for shape in shapes))


def _blank_rows(value: Tokens | Tensor, rows: Tensor) -> Tokens | Tensor:
    """Zero the failed rows: what a reader must never see should at least be the same bytes in every run."""
    if not bool(rows.any()):
        return value
    if isinstance(value, Tensor):
        return value.clone().index_fill_(0, rows.nonzero().flatten().to(value.device), 0)
    index = rows.nonzero().flatten().to(value.patches.device)
    return Tokens(value.prefix.clone().index_fill_(0, index, 0), value.patches.clone().index_fill_(0, index, 0))
