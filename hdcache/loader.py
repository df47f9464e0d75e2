"""Shuffled batches: each image under its stored view, beside the targets that its teachers gave for that view.

Threads, not processes: decompression, JPEG decoding and resizing release the interpreter lock, nothing is pickled,
and the Rust reader cannot be forked. Stored codes travel to the device as they are and are decoded there.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.backbones import normalize
from hdcache.batch import Batch, HostBatch, handed_over
from hdcache.datasets import Dataset
from hdcache.errors import InputNotFound, StoreMismatch, UnreadableImage, UsageError
from hdcache.options import Options
from hdcache.order import epoch_order, rank_slice
from hdcache.photometric import apply_photometric, draw_photometric
from hdcache.reader import MASK_ARRAY, TeacherReader, geometry_manifest, read_geometry, sealed_geometry
from hdcache.rendering import Pixels, Rendering, input_shape
from hdcache.resources import memory_budget
from hdcache.samples import Recorded
from hdcache.schema import Manifest, ViewSpec
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.target_sources import RUN_ROWS, LiveTargets, Runs, StoredTargets
from hdcache.views import check_input, check_views, row_order


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
        check_views(views, dataset.card)
        where = None if store is None else store.path
        check_input(views, options.preprocessing, "the student", where)
        for target in self.live:
            check_input(views, target.teacher.card.preprocessing, f"teacher {target.name}", where)
        inputs = [target.teacher.card.preprocessing for target in self.live]
        self.rendering = Rendering(dataset, views, options.preprocessing, inputs, options.fresh)
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
        self.views = self._usable_views(num_views)
        self._geometry: dict[int, tuple[NDArray[np.int32], NDArray[np.uint8]]] = {}
        self.waited = 0.0
        """Seconds that the consumer has spent waiting for batches."""
        self.dropped: dict[str, str] = {}
        """Samples that could not be read while training without a store: id -> reason."""
        self.left_out: dict[str, str] = {}
        """Those of them that were known before the first step, and that no batch asks for."""
        self._present = np.ones(len(self.ids), bool)
        self._next_epoch = 0
        self._prefetch = self._affordable_prefetch()

    def leave_out(self, unreadable: Mapping[str, str]) -> None:
        """Take no row of these samples, id -> reason, as a store takes none that failed; said before the first step."""
        self.left_out = dict(unreadable)
        self.dropped |= self.left_out
        self._present = np.array([sample_id not in self.left_out for sample_id in self.ids])

    def _affordable_prefetch(self) -> int:
        """Batches to prepare ahead: what was asked for, or as many as fit the byte budget. The order never changes."""
        options = self.options
        stored = sum(target.reader.bytes_per_row(target.derivation.taps) for target in self.stored)
        images = sum(3 * (wanted.frames or 1) * wanted.size**2 for wanted in self.rendering.inputs)
        local = -(-options.batch_size // options.world)
        budget = memory_budget()
        for prefetch in range(options.prefetch, 0, -1):
            # Runs are held from one buffer ahead of the batch that needs them; gathered batches wait beside them.
            rows = 2 * -(-max(options.buffer_rows, options.batch_size) // options.world) + prefetch * local
            if stored * (rows + prefetch * local) + images * (prefetch + 1) * local <= budget:
                return prefetch
        raise UsageError(
            f"batches of {local} rows with a shuffle buffer of {options.buffer_rows} rows need more than the "
            f"{budget / 1e9:.1f} GB that may be used for them ({stored:,} bytes of targets a row); "
            "lower buffer_rows or batch_size, or raise HDCACHE_BUFFER_BYTES"
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
        options, view, order = self.options, self._view(epoch), self.order(epoch)
        count = self.batches_per_epoch(epoch)
        if not 0 <= start <= count:
            raise UsageError(f"cannot start at batch {start}: epoch {epoch} has {count}")
        shares = []
        for index in range(start, count):
            batch = order[index * options.batch_size : (index + 1) * options.batch_size]
            shares.append(batch[rank_slice(len(batch), options.rank, options.world)])
        runs = Runs(self.stored, view, len(self.ids), shares)
        table, samples = self._table(view)
        ahead = max(self._prefetch, -(-options.buffer_rows // options.batch_size))
        cuda = options.device.type == "cuda"
        stream = torch.cuda.Stream(options.device) if cuda else None  # type: ignore[no-untyped-call]  # torch's constructor has no types
        with (
            ThreadPoolExecutor(options.threads, "decode") as decoding,
            ThreadPoolExecutor(2, "read") as reading,
            ThreadPoolExecutor(1, "collate") as collating,
        ):
            pending: list[Future[HostBatch]] = []
            submitted = 0
            waiting: tuple[Batch, torch.cuda.Event] | None = None
            try:
                for number in range(len(shares)):
                    runs.request(reading, number + ahead + 1)
                    while submitted < min(len(shares), number + self._prefetch):
                        rows = shares[submitted]
                        futures = [
                            decoding.submit(self._open, view, epoch, int(row), int(samples[row]), table) for row in rows
                        ]
                        pending.append(
                            collating.submit(self._collate, runs, submitted, rows, samples, futures, epoch, view)
                        )
                        submitted += 1
                    began = time.perf_counter()
                    ready = pending.pop(0).result()
                    self.waited += time.perf_counter() - began
                    for part in ready.split(options.pieces):
                        if stream is None:
                            yield self._finish(part, epoch, view, start + number)
                            continue
                        # One piece ahead on a stream of its own: copies and decoding overlap with the step before.
                        with torch.cuda.stream(stream):
                            following = self._finish(part, epoch, view, start + number), stream.record_event()
                        if waiting is not None:
                            yield handed_over(*waiting)
                        waiting = following
                if waiting is not None:
                    yield handed_over(*waiting)
            finally:
                for pool in (collating, decoding, reading):
                    pool.shutdown(wait=False, cancel_futures=True)

    def _table(self, view: int) -> tuple[tuple[NDArray[np.int32], NDArray[np.uint8]] | None, NDArray[np.int64]]:
        if self.store is None or not self._replays:
            return None, row_order(len(self.ids), self.spec.seed, view)
        if view not in self._geometry:
            self._geometry = {view: read_geometry(self.store, view)}
        table = self._geometry[view]
        return table, table[0][:, 0].astype(np.int64)

    def _open(
        self, view: int, epoch: int, row: int, sample: int, table: tuple[NDArray[np.int32], NDArray[np.uint8]] | None
    ) -> list[Pixels] | str:
        recorded: Recorded | None = None if table is None else (table[0][row], table[1][row].tobytes())
        try:
            return self.rendering.open(self.ids[sample], view, epoch, recorded)
        except UnreadableImage as error:
            if table is not None:
                raise StoreMismatch(f"{error}; it could be read when the store was made") from None
            return str(error)

    def _collate(
        self,
        runs: Runs,
        number: int,
        rows: NDArray[np.int64],
        samples: NDArray[np.int64],
        futures: Sequence[Future[list[Pixels] | str]],
        epoch: int,
        view: int,
    ) -> HostBatch:
        opened = [future.result() for future in futures]
        kept = [i for i, found in enumerate(opened) if not isinstance(found, str)]
        reasons = {self.ids[samples[rows[i]]]: found for i, found in enumerate(opened) if isinstance(found, str)}
        self.dropped |= reasons
        if reasons and not kept:
            raise InputNotFound(
                f"none of the {self.dataset.card.noun} of a whole batch could be read; the first: {next(iter(reasons.values()))}"
            )
        chosen = samples[rows[kept]]
        ids = [self.ids[sample] for sample in chosen]
        images = [found for found in opened if not isinstance(found, str)]
        pixels = [
            np.stack([image[which] for image in images]) if images else np.empty((0, *input_shape(wanted)), np.uint8)
            for which, wanted in enumerate(self.rendering.inputs)
        ]
        augment = [
            None if spec is None else draw_photometric(spec, self.options.seed, ids, epoch, slot)
            for slot, spec in enumerate(self.options.augment)
        ]
        gathered = runs.gather(number, rows)
        seen = {target.name: target.visible(gathered[target.name]) for target in self.stored}
        seen |= {target.name: target.teacher.visible(ids, view) for target in self.live}
        arrays = {
            teacher: {name: self._host(value) for name, value in found.items() if name != MASK_ARRAY}
            for teacher, found in gathered.items()
        }
        return HostBatch(
            ids,
            self._host(self.labels[chosen]),
            [self._host(value) for value in pixels],
            arrays,
            augment,
            {name: self._host(value) for name, value in seen.items() if value is not None},
        )

    def _finish(self, ready: HostBatch, epoch: int, view: int, index: int) -> Batch:
        slots = len(ready.augment)
        targets: dict[str, dict[str, Tokens | Tensor]] = {}
        for target in self.stored:
            arrays = {name: self._to_device(value) for name, value in ready.arrays[target.name].items()}
            targets[target.name] = target.finish(arrays)
        for live, pixels in zip(self.live, ready.pixels[slots:], strict=True):
            visible = ready.visible.get(live.name)
            targets[live.name] = live.finish(pixels, None if visible is None else visible.numpy())
        images, *more = (self._student_view(ready.pixels[slot], ready.augment[slot], slot) for slot in range(slots))
        return Batch(
            images,
            ready.ids,
            self._to_device(ready.labels),
            targets,
            epoch,
            view,
            index,
            ready.piece,
            ready.pieces,
            ready.share,
            tuple(more),
            {name: self._to_device(value) for name, value in ready.visible.items()},
        )

    def _student_view(self, pixels: Tensor, augment: Tensor | None, slot: int) -> Tensor:
        images = self._to_device(pixels)
        spec = self.options.augment[slot]
        if augment is not None and spec is not None:
            images = apply_photometric(images.to(torch.float32) / 255, augment, spec)
        return normalize(images, self.options.preprocessing)

    def _host(self, value: NDArray[np.generic]) -> Tensor:
        """``value`` as a tensor that can travel to the device while the device computes; pinned on the collating thread."""
        tensor = torch.from_numpy(value)
        return tensor.pin_memory() if self.options.device.type == "cuda" else tensor

    def _to_device(self, value: Tensor) -> Tensor:
        return value.to(self.options.device, non_blocking=self.options.device.type == "cuda")
