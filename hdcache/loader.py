"""Shuffled batches: each image under its stored view, beside the targets that its teachers gave for that view.

Threads, not processes: decompression, JPEG decoding and resizing release the interpreter lock, nothing is pickled,
and the Rust reader cannot be forked. Stored codes travel to the device as they are and are decoded there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray

from hdcache.batch import Batch, HostBatch, handed_over
from hdcache.collation import Collator, Table
from hdcache.datasets import Dataset
from hdcache.errors import InputNotFound, UsageError
from hdcache.finishing import Finisher
from hdcache.geometry import geometry_manifest, read_geometry, sealed_geometry
from hdcache.host_memory import HostMemory
from hdcache.index import check_records
from hdcache.options import Options
from hdcache.order import epoch_order, rank_slice
from hdcache.reader import TeacherReader
from hdcache.rendering import Rendering
from hdcache.resources import memory_budget
from hdcache.runs import RUN_ROWS, Runs
from hdcache.schema import Manifest, ViewSpec
from hdcache.stages import Stages
from hdcache.store import Store
from hdcache.target_sources import LiveTargets, StoredTargets
from hdcache.views import check_input, check_views, row_order

READERS = 2
"""Threads that read and decompress stored rows, at the least."""


class Loader:
    """Iterates over epochs of a data set, with targets from a store, from live teachers, or without any.

    Parameters
    ----------
    dataset, views, ids, labels
        the samples, and how their views are drawn when ``store`` is None.
    store
        replay the views that it recorded; needed for stored targets. Without any teacher, neither ``stored`` nor
        ``teachers``, every row of them comes whose image could be read, whatever teachers the store has.
    stored, live
        where targets come from.
    num_views
        distinct views to go through, one per epoch. None: with a store those that every teacher that is read has sealed
        (all that are recorded, where none is), without one another view in each epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        options: Options,
        *,
        views: ViewSpec,
        store: Store | None = None,
        stored: Sequence[StoredTargets] = (),
        live: Sequence[LiveTargets] = (),
        num_views: int | None = None,
        teachers: Sequence[str] = (),
    ) -> None:
        self.dataset, self.options, self.spec, self.store = dataset, options, views, store
        self.stored, self.live = list(stored), list(live)
        if not options.images and (self.live or options.fresh):
            raise UsageError(
                "images=False is for stored targets: fresh views and teachers in the loop are made of images"
            )
        check_views(views, dataset.card)
        where = None if store is None else store.path
        check_input(views, options.preprocessing, "the student", where)
        for target in self.live:
            check_input(views, target.teacher.card.preprocessing, f"teacher {target.name}", where)
        inputs = [target.teacher.card.preprocessing for target in self.live]
        self.rendering = Rendering(dataset, views, options.preprocessing, inputs, options.fresh)
        if store is not None:
            store.adopt_ids(dataset.card.fingerprint, dataset.ids)
        self.ids = store.ids if store is not None else tuple(dataset.ids)
        self.labels = store.labels if store is not None else dataset.labels
        self.readers = [target.reader for target in self.stored]
        self.readers += [
            TeacherReader(store, name)
            for name in teachers
            if store is not None and name not in {r.name for r in self.readers}
        ]
        # What reads no target still sees the views that were recorded, so that students can be compared. They belong to no
        # teacher: which ones the store has, or gets later, changes nothing.
        self._replays = store is not None and (bool(self.readers) or not options.fresh)
        if store is not None:
            check_records(store, [reader.name for reader in self.readers])
        self.views = self._usable_views(num_views)
        self._geometry: dict[int, Table] = {}
        self._awaited = 0.0
        self._prefetch, most = self._affordable_prefetch()
        on_gpu = options.device.type == "cuda"
        self._stages, self._memory = Stages(), HostMemory(pinned=on_gpu, limit=most)
        # One for all epochs: memory that was freed on a stream is used again on that stream alone.
        self._stream = torch.cuda.Stream(options.device) if on_gpu else None  # type: ignore[no-untyped-call]  # torch's constructor has no types
        self._collator = Collator(
            self.rendering, options, self.ids, self.labels, self.stored, self.live, self._memory, self._stages
        )
        self._finisher = Finisher(options, self.stored, self.live, self._stages)
        self.dropped = self._collator.dropped
        """Samples that could not be read while training without a store: id -> reason."""
        self.left_out: dict[str, str] = {}
        """Those of them that were known before the first step, and that no batch asks for."""
        self._present = np.ones(len(self.ids), bool)
        self._next_epoch = 0

    def leave_out(self, unreadable: Mapping[str, str]) -> None:
        """Take no row of these samples, id -> reason, as a store takes none that failed; said before the first step."""
        self.left_out = dict(unreadable)
        self.dropped.update(self.left_out)
        self._present = np.array([sample_id not in self.left_out for sample_id in self.ids])

    def go_on_from(self, other: Loader) -> None:
        """Take over what ``other``, of the same rows and views, has counted, and what it knows to be unreadable."""
        self.leave_out(other.left_out)
        self.dropped.update(other.dropped)
        self._awaited += other._awaited
        self._stages.add(other.stages)

    def _affordable_prefetch(self) -> tuple[int, int]:
        """Batches to prepare ahead, and the bytes that they and what is read for them need at most.

        As many as were asked for, or as fit the byte budget. The order never changes.
        """
        options = self.options
        stored = sum(target.reader.bytes_per_row(target.derivation.taps) for target in self.stored)
        images = sum(3 * (wanted.frames or 1) * wanted.size**2 for wanted in self.rendering.inputs if options.images)
        local = -(-options.batch_size // options.world)
        chunks = [target.reader.chunk_bytes(target.derivation.taps) for target in self.stored]
        scratch = max(READERS, options.threads) * max(chunks, default=0)
        budget = memory_budget()
        for prefetch in range(options.prefetch, 0, -1):
            # Runs are read one buffer ahead of the batch that needs them, and a run at the end of that one has rows of the
            # next; gathered batches wait beside them.
            rows = 3 * -(-max(options.buffer_rows, options.batch_size) // options.world) + prefetch * local
            needed = stored * (rows + prefetch * local) + images * (prefetch + 1) * local + scratch
            if needed <= budget:
                return prefetch, needed - scratch
        raise UsageError(
            f"batches of {local} rows with a shuffle buffer of {options.buffer_rows} rows need more than the "
            f"{budget / 1e9:.1f} GB that may be used for them ({stored:,} bytes of targets a row, "
            f"{scratch:,} for {max(READERS, options.threads)} threads); lower buffer_rows, batch_size or threads, or raise HDCACHE_BUFFER_BYTES"
        )

    def _usable_views(self, wanted: int | None) -> list[int]:
        if wanted is not None and wanted < 1:
            raise UsageError(f"num_views {wanted} must be at least 1")
        if self.store is None or not self._replays:
            return list(range(wanted or 0))
        sealed = {reader.name: set(self.store.views(reader.name)) for reader in self.readers}
        common = sorted(set.intersection(*sealed.values()) if sealed else sealed_geometry(self.store))
        if not common or (wanted is not None and len(common) < wanted):
            found = f"complete are {common or 'none'}"
            if sealed:
                names = ", ".join(f"{name}: {sorted(views) or 'none'}" for name, views in sealed.items())
                found = f"complete in every teacher are {common or 'none'} (sealed: {names})"
            raise InputNotFound(
                f"{self.store.path}: {wanted or 1} views asked for, {found}; "
                f"finish with 'hdcache extract --store {self.store.path} --num-views {wanted or 1} ...'"
            )
        return common[:wanted]

    def rows(self, view: int) -> NDArray[np.int64]:
        """Rows of a view that every teacher holds, ascending; without a teacher, those whose image could be read."""
        good = np.ones(len(self.ids), bool)
        for seal in self.seals(view).values():
            good[list(seal.failed)] = False
        if self.left_out:
            good &= self._present[self._table(view)[1]]
        found = np.flatnonzero(good)
        if not len(found):
            raise InputNotFound(f"no row of view {view} is usable: every one failed in extraction")
        return found

    def seals(self, view: int) -> dict[str, Manifest]:
        """What decides the rows of a view, by teacher; that of its geometry, under no name, where no teacher is read."""
        if self.store is not None and self._replays and not self.readers:
            return {"": geometry_manifest(self.store, view)}
        return {reader.name: reader.manifest(view) for reader in self.readers}

    def batches_per_epoch(self, epoch: int = 0) -> int:
        """Global batches of an epoch."""
        # Views that nothing has recorded have the same rows in another order, which takes time to draw.
        count = len(self.rows(self._view(epoch))) if self.store is not None else int(self._present.sum())
        size = self.options.batch_size
        batches = count // size if self.options.drop_last else -(-count // size)
        if not batches:
            raise UsageError(f"{count} usable rows do not fill one batch of {size}; choose a smaller batch_size")
        return batches

    def __len__(self) -> int:
        return self.batches_per_epoch()

    def _view(self, epoch: int) -> int:
        # Views that nothing has recorded cost nothing: unless a number was asked for, each epoch has its own.
        return self.views[epoch % len(self.views)] if self.views else epoch

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Rows of an epoch in order; every usable row exactly once."""
        options = self.options
        return epoch_order(
            self.rows(self._view(epoch)),
            options.batch_size,
            run_rows=RUN_ROWS,
            buffer_rows=options.buffer_rows,
            seed=options.seed,
            epoch=epoch,
        )

    def __iter__(self) -> Iterator[Batch]:
        """The next epoch: 0 at the first call, then 1, ..."""
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        return self.epoch(epoch)

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """Batches of ``epoch`` from number ``start`` on: the state of a loader is these two numbers.

        A last batch of fewer rows than processes leaves some of them an empty one (``drop_last`` leaves it out).
        """
        view, stream, finish = self._view(epoch), self._stream, self._finisher.finish
        waiting: tuple[Batch, torch.cuda.Event] | None = None
        with closing(self.host_batches(epoch, start)) as batches:
            for number, ready in enumerate(batches, start):
                for part in ready.split(self.options.pieces):
                    if stream is None:
                        yield finish(part, epoch, view, number)
                        continue
                    # One piece ahead on a stream of its own: copies and decoding overlap with the step before.
                    with torch.cuda.stream(stream):
                        following = finish(part, epoch, view, number), stream.record_event()
                    if waiting is not None:
                        yield handed_over(*waiting)
                    waiting = following
            if waiting is not None:
                yield handed_over(*waiting)

    def host_batches(self, epoch: int, start: int = 0) -> Generator[HostBatch, None, None]:
        """As :meth:`epoch`, but on the host and as stored, neither decoded nor cut into pieces."""
        options, view, order = self.options, self._view(epoch), self.order(epoch)
        count = self.batches_per_epoch(epoch)
        if not 0 <= start <= count:
            raise UsageError(f"cannot start at batch {start}: epoch {epoch} has {count}")
        shares = []
        for index in range(start, count):
            batch = order[index * options.batch_size : (index + 1) * options.batch_size]
            shares.append(batch[rank_slice(len(batch), options.rank, options.world)])
        runs = Runs(self.stored, view, len(self.ids), shares, memory=self._memory, stages=self._stages)
        table, samples = self._table(view)
        ahead = max(self._prefetch, -(-options.buffer_rows // options.batch_size))
        decoding = ThreadPoolExecutor(options.threads, "decode")
        reading = ThreadPoolExecutor(max(READERS, options.threads), "read")
        collating = ThreadPoolExecutor(1, "collate")
        # Looked up now: when the interpreter ends, modules may go before an iterator that nobody finished.
        interpreter_ends = sys.is_finalizing
        pending: list[Future[HostBatch]] = []
        try:
            for number in range(len(shares)):
                runs.request(reading, number + ahead + 1)
                for rows in shares[number + len(pending) : number + self._prefetch]:
                    opened = self._collator.open(decoding, view, epoch, rows, samples, table)
                    pending.append(
                        collating.submit(
                            self._collator.collate, runs, number + len(pending), samples[rows], opened, epoch, view
                        )
                    )
                began = time.perf_counter()
                ready = pending.pop(0).result()
                self._awaited += time.perf_counter() - began
                yield ready
        finally:
            # By then all threads have been joined.
            if not interpreter_ends():
                for pool in (collating, decoding, reading):
                    pool.shutdown(wait=False, cancel_futures=True)
                for pool in (collating, decoding, reading):
                    pool.shutdown()

    @property
    def waited(self) -> float:
        """Seconds that the consumer has spent on data: waiting for batches and finishing them; not those of live teachers."""
        return self._awaited + self._stages.seconds()["finish"]

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage, of all epochs so far.

        ``read`` and ``images`` are the sums over the threads that read targets and open images; ``await_images``,
        ``await_targets`` and ``collate`` are those of the one thread that puts batches together, ``finish`` (copies, decoding,
        jitter) and ``teachers`` (live ones) those of the consumer; on a GPU both are queued, not awaited.
        """
        return self._stages.seconds()

    def _table(self, view: int) -> tuple[Table | None, NDArray[np.int64]]:
        if self.store is None or not self._replays:
            return None, row_order(len(self.ids), self.spec.seed, view)
        if view not in self._geometry:
            self._geometry = {view: read_geometry(self.store, view)}
        table = self._geometry[view]
        return table, table[0][:, 0].astype(np.int64)
