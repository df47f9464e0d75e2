"""From rows to a batch on the host: images opened and stacked, stored arrays beside them, in memory that a GPU can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdcache.batch import HostBatch
from hdcache.errors import InputNotFound, StoreMismatch, UnreadableImage
from hdcache.host_memory import HostMemory
from hdcache.options import Options
from hdcache.photometric import draw_photometric
from hdcache.rendering import Pixels, Rendering, input_shape
from hdcache.row_arrays import MASK_ARRAY
from hdcache.runs import Runs
from hdcache.samples import Recorded
from hdcache.stages import Stages
from hdcache.target_sources import LiveTargets, StoredTargets

Table = tuple[NDArray[np.int32], NDArray[np.uint8]]
"""The rows of a view as recorded: geometry, and sha256 of the sources."""


class Collator:
    """Opens the images of a batch on the threads of a pool, and puts it together on one."""

    def __init__(
        self,
        rendering: Rendering,
        options: Options,
        ids: Sequence[str],
        labels: NDArray[np.int64],
        stored: Sequence[StoredTargets],
        live: Sequence[LiveTargets],
        memory: HostMemory,
        stages: Stages,
    ) -> None:
        self.rendering, self.options, self.ids, self.labels = rendering, options, ids, labels
        self.stored, self.live, self.memory, self.stages = stored, live, memory, stages
        self.dropped: dict[str, str] = {}
        """Samples that could not be read while training without a store: id -> reason."""

    def open(
        self,
        pool: Executor,
        view: int,
        epoch: int,
        rows: NDArray[np.int64],
        samples: NDArray[np.int64],
        table: Table | None,
    ) -> list[Future[list[Pixels] | str]]:
        """Start opening the images of ``rows``, each of the sample in ``samples`` [rows of the view]; none where none are wanted."""
        if not self.options.images:
            return []
        return [pool.submit(self._open, view, epoch, int(row), int(samples[row]), table) for row in rows]

    def _open(self, view: int, epoch: int, row: int, sample: int, table: Table | None) -> list[Pixels] | str:
        recorded: Recorded | None = None if table is None else (table[0][row], table[1][row].tobytes())
        with self.stages.of("images"):
            try:
                return self.rendering.open(self.ids[sample], view, epoch, recorded)
            except UnreadableImage as error:
                if table is not None:
                    raise StoreMismatch(f"{error}; it could be read when the store was made") from None
                return str(error)

    def collate(
        self,
        runs: Runs,
        number: int,
        chosen: NDArray[np.int64],
        futures: Sequence[Future[list[Pixels] | str]],
        epoch: int,
        view: int,
    ) -> HostBatch:
        """Batch ``number`` of ``runs``: the samples ``chosen``, less those whose image cannot be read without a store."""
        with self.stages.of("await_images"):
            opened = [future.result() for future in futures]
        images = [found for found in opened if not isinstance(found, str)]
        if len(images) < len(opened):
            chosen = self._drop(chosen, opened)
        with self.stages.of("await_targets"):
            gathered = runs.gather(number)
        with self.stages.of("collate"):
            ids = [self.ids[sample] for sample in chosen]
            options = self.options
            slots = options.augment if options.images else ()
            augment = [
                None if spec is None else draw_photometric(spec, options.seed, ids, epoch, slot)
                for slot, spec in enumerate(slots)
            ]
            seen = {target.name: target.visible(gathered[target.name]) for target in self.stored}
            seen |= {target.name: target.teacher.visible(ids, view) for target in self.live}
            return HostBatch(
                ids,
                self._host(self.labels[chosen]),
                self._stacked(images) if options.images else [],
                _without_masks(gathered),
                augment,
                {name: self._host(value) for name, value in seen.items() if value is not None},
            )

    def _drop(self, chosen: NDArray[np.int64], opened: Sequence[list[Pixels] | str]) -> NDArray[np.int64]:
        """The samples that could be read; the others are noted with their reasons."""
        kept = [i for i, found in enumerate(opened) if not isinstance(found, str)]
        reasons = {self.ids[chosen[i]]: found for i, found in enumerate(opened) if isinstance(found, str)}
        self.dropped |= reasons
        if not kept:
            raise InputNotFound(
                f"none of the {self.rendering.dataset.card.noun} of a whole batch could be read; the first: "
                f"{next(iter(reasons.values()))}"
            )
        return chosen[kept]

    def _stacked(self, images: Sequence[list[Pixels]]) -> list[Tensor]:
        """One tensor for each input of the rendering: a single copy, into the memory that the batch travels from."""
        found = []
        for which, wanted in enumerate(self.rendering.inputs):
            pixels = self.memory.empty((len(images), *input_shape(wanted)), "uint8")
            filled = pixels.numpy()
            for place, image in enumerate(images):
                filled[place] = image[which]
            found.append(pixels)
        return found

    def _host(self, value: NDArray[np.generic]) -> Tensor:
        """``value`` as a tensor that can travel to the device while the device computes."""
        tensor = torch.from_numpy(value)
        return tensor.pin_memory() if self.memory.pinned else tensor


def _without_masks(gathered: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {
        teacher: {name: value for name, value in found.items() if name != MASK_ARRAY}
        for teacher, found in gathered.items()
    }
