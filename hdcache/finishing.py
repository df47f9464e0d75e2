"""From a batch on the host to one on the device: copied, decoded, augmented, normalised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hdcache.backbones import normalize
from hdcache.batch import Batch, HostBatch
from hdcache.options import Options
from hdcache.photometric import apply_photometric
from hdcache.stages import Stages
from hdcache.taps import Tokens
from hdcache.target_sources import LiveTargets, StoredTargets


class Finisher:
    """Finishes batches, or pieces of them, on the consumer's thread."""

    def __init__(
        self, options: Options, stored: Sequence[StoredTargets], live: Sequence[LiveTargets], stages: Stages
    ) -> None:
        self.options, self.stored, self.live, self.stages = options, stored, live, stages

    def finish(self, ready: HostBatch, epoch: int, view: int, index: int) -> Batch:
        """``ready`` on the device of the options, with its targets; on a GPU the work is queued, not awaited."""
        slots = len(ready.augment)
        targets: dict[str, dict[str, Tokens | Tensor]] = {}
        with self.stages.of("teachers"):
            for live, pixels in zip(self.live, ready.pixels[slots:], strict=True):
                visible = ready.visible.get(live.name)
                targets[live.name] = live.finish(pixels, None if visible is None else visible.numpy())
        with self.stages.of("finish"):
            for target in self.stored:
                arrays = {name: self._to_device(value) for name, value in ready.arrays[target.name].items()}
                targets[target.name] = target.finish(arrays)
            images = [self._student_view(ready.pixels[slot], ready.augment[slot], slot) for slot in range(slots)]
            # Where no images are wanted, they have no pixels.
            first = images[0] if images else torch.empty(len(ready.ids), 0, device=self.options.device)
            return Batch(
                first,
                ready.ids,
                self._to_device(ready.labels),
                targets,
                epoch,
                view,
                index,
                ready.piece,
                ready.pieces,
                ready.share,
                tuple(images[1:]),
                {name: self._to_device(value) for name, value in ready.visible.items()},
            )

    def _student_view(self, pixels: Tensor, augment: Tensor | None, slot: int) -> Tensor:
        images = self._to_device(pixels)
        spec = self.options.augment[slot]
        if augment is not None and spec is not None:
            images = apply_photometric(images.to(torch.float32) / 255, augment, spec)
        return normalize(images, self.options.preprocessing)

    def _to_device(self, value: Tensor) -> Tensor:
        return value.to(self.options.device, non_blocking=self.options.device.type == "cuda")
