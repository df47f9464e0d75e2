"""Shard by shard: decode, forward, encode and write, each overlapped with the others.

A shard is written whole by one task, its receipt last. Batches are cut inside a shard and a failed row keeps its
place as a blank image, so a shard's bytes depend on nothing but its own rows: a killed run, rerun, writes the same.

    decoding threads -> lanes (:mod:`hdcache.extract.lanes`) -> writing threads, each a shard; this thread waits and counts
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hdcache import stopping
from hdcache.datasets import Dataset
from hdcache.errors import InputNotFound, TooManyFailures, UsageError
from hdcache.extract.capacity import AHEAD, held_per_row, shards_ahead
from hdcache.extract.lanes import Encoded, Lanes
from hdcache.extract.pixel_digests import pixel_digests
from hdcache.extract.rows import decode_row, order_of, shard_rows
from hdcache.extract.writer import Row, ViewWriter
from hdcache.plain_encodings import Parts
from hdcache.progress import counted
from hdcache.row_arrays import MASK_ARRAY
from hdcache.samples import Recorded
from hdcache.store import Store
from hdcache.teachers import Teacher, batches

ENOUGH_TO_JUDGE = 8
"""Rows of one shard that, all without finite features, condemn the teacher and, all gone, the data set."""


@dataclass
class Timing:
    """Where an extraction's seconds went, seen from the threads that drive the teacher (their mean)."""

    waiting_for_images: float = 0.0
    forward: float = 0.0
    encode: float = 0.0
    waiting_for_disk: float = 0.0
    decoding: float = 0.0
    """Seconds of the decoding threads, all together: beside the others."""
    writing: float = 0.0
    """Seconds of the writing threads: compression, checksums, files and flushing them, beside the others."""
    rows: int = 0
    """Rows written; a retry that mended nothing writes none."""
    bytes: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Sample id -> reason, over all views."""

    def bottleneck(self) -> str:
        """The stage to speed up first."""
        stages = self.stages()
        return max(stages, key=lambda name: stages[name])

    def busy(self) -> float:
        """Seconds in which batches were under way."""
        return self.waiting_for_images + self.forward + self.encode

    def stages(self) -> dict[str, float]:
        """Seconds of each stage."""
        return {
            "reading and decoding": self.waiting_for_images,
            "teacher forward": self.forward,
            "encoding": self.encode,
            "writing": self.waiting_for_disk,
        }


@dataclass
class _Shard:
    """A shard whose batches are under way."""

    number: int
    rows: list[Future[Row]]
    batches: list[Future[Encoded]]


class Pipeline:
    """Decoding threads, lanes that drive the teacher, writing threads."""

    def __init__(
        self,
        store: Store,
        dataset: Dataset,
        teacher: Teacher,
        *,
        threads: int,
        max_failures: int | None,
        lanes: int = 1,
    ) -> None:
        self.store, self.dataset, self.teacher = store, dataset, teacher
        self.threads, self.max_failures, self.lanes = threads, max_failures, lanes
        self.timing = Timing()
        self._counting = threading.Lock()

    def run(self, writer: ViewWriter, shards: Sequence[int], advance: Callable[[int, Timing], None]) -> None:
        """Extract ``shards`` of one view; on any error what was finished stays, with its receipts.

        Raises
        ------
        UsageError
            when a shard's pixels and arrays do not fit into memory, or the teacher's features are not finite.
        TooManyFailures
            when more images fail than ``max_failures`` allows.
        InputNotFound
            when the system can read no file of a whole shard: the data set is gone, not its images broken.
        Interrupted
            when a signal asked for a stop; the shards that were finished by then are written.
        """
        # With one shard at a time, decoding, the teacher and writing wait for each other.
        ahead = self._ahead(writer)
        with (
            Lanes(self.teacher, self.lanes) as lanes,
            ThreadPoolExecutor(AHEAD, "write") as writing,
            ThreadPoolExecutor(self.threads, "decode") as decoding,
            ThreadPoolExecutor(self.lanes, "teacher", initializer=lanes.begin) as driving,
        ):
            under_way: list[_Shard] = []
            written: list[tuple[int, Future[int]]] = []
            idle = self._idle()
            listed: list[tuple[int, Future[list[tuple[int, Recorded | None]]]]] = []
            try:
                # Before two threads ask for it at once, and both sort.
                order_of(self.store.card.dataset.count, self.store.card.views.seed, writer.view)
                waiting = [shard for shard in shards if self._worthwhile(decoding, writer, shard, advance)]
                while waiting or listed or under_way:
                    if stopping.requested():
                        self._settle(written, 0)
                        self._heed_a_stop()
                    # A shard's recorded geometry is read by a thread too, one shard before it is needed.
                    while (waiting or listed) and len(under_way) < ahead:
                        while waiting and len(listed) < 2:
                            number = waiting.pop(0)
                            listed.append((number, decoding.submit(shard_rows, self.store, writer.view, number)))
                        number, entries = listed.pop(0)
                        under_way.append(self._begin(decoding, driving, lanes, writer, number, entries.result()))
                    shard = under_way.pop(0)
                    encoded = [batch.result() for batch in shard.batches]
                    # What waits to be written needs the rows' numbers, not their pixels.
                    seen = [row.result() for row in shard.rows]
                    readable = [row.pixels is not None for row in seen]
                    digests = pixel_digests([row.pixels for row in seen])
                    rows = [
                        dataclasses.replace(row, pixels=None, pixel_digest=digest.tobytes())
                        for row, digest in zip(seen, digests, strict=True)
                    ]
                    # Their results would stay in memory until the next shard is encoded.
                    seen.clear()
                    shard.rows.clear()
                    shard.batches.clear()
                    self._check_data(shard.number, rows)
                    self._settle(written, ahead - 1)
                    parts, failed, saturated = self._joined(writer, shard.number, rows, readable, encoded)
                    del encoded
                    written.append(
                        (len(rows), writing.submit(self._write, writer, shard.number, rows, parts, failed, saturated))
                    )
                    del parts
                    first = shard.number * self.store.card.rows_per_shard
                    self.timing.failed |= {self.store.ids[rows[row - first].sample]: why for row, why in failed.items()}
                    self.timing.waiting_for_disk = idle()
                    advance(len(rows), self.timing)
                    self.check_failures()
                self._settle(written, 0)
                self.timing.waiting_for_disk = idle()
            except BaseException:
                driving.shutdown(wait=False, cancel_futures=True)
                decoding.shutdown(wait=False, cancel_futures=True)
                raise

    def _ahead(self, writer: ViewWriter) -> int:
        card = self.store.card
        taps = [encoder.card for encoder in writer.encoders.values()]
        rows = min(card.rows_per_shard, card.dataset.count)
        return shards_ahead(self.teacher.name, rows, held_per_row(self.teacher.card, taps))

    def _idle(self) -> Callable[[], float]:
        """Seconds in which lanes had no batch, those of earlier runs included: writing was behind, or nothing else was left."""
        began, before = time.perf_counter(), self.timing.waiting_for_disk
        lanes = self.timing.busy()
        return lambda: before + max(0.0, time.perf_counter() - began - (self.timing.busy() - lanes))

    def _settle(self, written: list[tuple[int, Future[int]]], leave: int) -> None:
        """Wait until no more than ``leave`` shards are still being written; the first error of a write is raised here."""
        while len(written) > leave:
            rows, future = written.pop(0)
            count = future.result()
            self.timing.bytes += count
            self.timing.rows += rows if count else 0

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
        self.check_failures()
        return False

    def _heed_a_stop(self) -> None:
        if stopping.requested():
            raise stopping.stop(f"all finished shards written to {self.store.path}")

    def check_failures(self) -> None:
        """:class:`TooManyFailures` when more rows failed than are allowed."""
        if self.max_failures is not None and len(self.timing.failed) > self.max_failures:
            raise TooManyFailures(
                f"{counted(len(self.timing.failed), self.dataset.card.noun)} failed, more than --max-failures {self.max_failures}; "
                f"the first: {next(iter(self.timing.failed.values()))}"
            )

    def _begin(
        self,
        decoding: ThreadPoolExecutor,
        driving: ThreadPoolExecutor,
        lanes: Lanes,
        writer: ViewWriter,
        number: int,
        entries: Sequence[tuple[int, Recorded | None]],
    ) -> _Shard:
        rows = self._decode(decoding, writer.view, entries)
        spans = batches(len(rows), self.teacher.batch)
        return _Shard(number, rows, [driving.submit(self._batch, lanes, writer, rows[span]) for span in spans])

    def _decode(
        self, pool: ThreadPoolExecutor, view: int, entries: Sequence[tuple[int, Recorded | None]]
    ) -> list[Future[Row]]:
        return [pool.submit(self._row, view, sample, recorded) for sample, recorded in entries]

    def _row(self, view: int, sample: int, recorded: Recorded | None) -> Row:
        started = time.perf_counter()
        row = decode_row(self.store, self.dataset, self.teacher.card.preprocessing, view, sample, recorded)
        self._count(decoding=time.perf_counter() - started)
        return row

    def _batch(self, lanes: Lanes, writer: ViewWriter, futures: Sequence[Future[Row]]) -> Encoded:
        started = time.perf_counter()
        rows = [future.result() for future in futures]
        waited = time.perf_counter() - started
        ids = [self.store.ids[row.sample] for row in rows]
        found = lanes.run([row.pixels for row in rows], ids, writer.view, writer.encoders)
        shared = {"waiting_for_images": waited, "forward": found.forward, "encode": found.encode}
        self._count(**{stage: seconds / self.lanes for stage, seconds in shared.items()})
        return found

    def _write(self, writer: ViewWriter, *shard: Any) -> int:
        started = time.perf_counter()
        count = writer.write(*shard)
        self._count(writing=time.perf_counter() - started)
        return count

    def _count(self, **seconds: float) -> None:
        with self._counting:
            for stage, more in seconds.items():
                setattr(self.timing, stage, getattr(self.timing, stage) + more)

    def _check_data(self, shard: int, rows: Sequence[Row]) -> None:
        if len(rows) >= ENOUGH_TO_JUDGE and all(row.gone for row in rows):
            raise InputNotFound(
                f"{self.dataset.card.spec}: none of the {self.dataset.card.noun} of shard {shard} could be read ({rows[0].reason}); is the "
                "data set still there? Finished shards are safe: bring it back and run the same command again"
            )

    def _joined(
        self, writer: ViewWriter, shard: int, rows: Sequence[Row], readable: Sequence[bool], encoded: Sequence[Encoded]
    ) -> tuple[dict[str, Parts], dict[int, str], int]:
        """The arrays of a shard, its failed rows with their reasons, and how many values were clipped."""
        start = shard * self.store.card.rows_per_shard
        failed = {start + i: row.reason for i, row in enumerate(rows) if not readable[i]}
        for span, batch in zip(batches(len(rows), self.teacher.batch), encoded, strict=True):
            for i in batch.bad:
                name = self.store.ids[rows[span.start + i].sample]
                failed.setdefault(
                    start + span.start + i, f"{name}: the features of teacher {self.teacher.name} are not finite"
                )
        seen = [start + i for i, good in enumerate(readable) if good]
        if len(seen) >= ENOUGH_TO_JUDGE and failed.keys() >= set(seen):
            raise UsageError(
                f"teacher {self.teacher.name}: no row of shard {shard} has finite features in {self.teacher.card.precision}; "
                + ("use --precision fp32" if self.teacher.card.precision == "bf16" else "check the checkpoint")
            )
        joined = {
            tap: {name: np.concatenate([batch.parts[tap][name] for batch in encoded]) for name in encoded[0].parts[tap]}
            for tap in writer.encoders
        }
        masks = [batch.mask for batch in encoded if batch.mask is not None]
        if masks:
            folder, name = MASK_ARRAY.split("/")
            joined[folder] = {name: np.concatenate(masks)}
        return joined, failed, sum(batch.clipped for batch in encoded)
