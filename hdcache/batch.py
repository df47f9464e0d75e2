"""One batch: on the host, on the device, and handed from the stream that made it to the one that uses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hdcache.taps import Tokens


@dataclass(frozen=True)
class Batch:
    """One batch on the loader's device."""

    images: Tensor
    """float32 [B, 3, H, W], or [B, 3, F, H, W] of clips: the stored view, or the first fresh one (``Options.fresh``);
    augmented if asked for, normalised for the student."""
    ids: list[str]
    labels: Tensor
    """int64 [B], -1 where a sample has none."""
    targets: dict[str, dict[str, Tokens | Tensor]]
    """Teacher name -> target name -> value (see :mod:`hdcache.taps`)."""
    epoch: int
    """Epoch that random choices of this batch are keyed by."""
    view: int
    """Number of the view that the targets belong to."""
    index: int
    """Number of this batch within its epoch."""
    piece: int = 0
    """Number of this piece of the batch, where a loader cuts batches (``Options.pieces``)."""
    pieces: int = 1
    share: float = 1.0
    """Rows of this piece over rows of the whole (local) batch."""
    more: tuple[Tensor, ...] = ()
    """Further fresh views, like ``images``."""
    visible: dict[str, Tensor] = field(default_factory=dict)
    """Teacher name -> int64 [B, M], ascending indices of the patch tokens that it saw; none for one that saw all."""


@dataclass
class HostBatch:
    """A batch ready on the host, pinned where it will travel to a GPU."""

    ids: list[str]
    labels: Tensor
    pixels: list[Tensor]
    """The student's views first, then the pixels of each live teacher; uint8 [B, 3, size, size]."""
    arrays: dict[str, dict[str, Tensor]]
    augment: list[Tensor | None]
    """Photometric draws of each student view, [B, numbers]."""
    visible: dict[str, Tensor]
    """As in :class:`Batch`, on the host."""
    piece: int = 0
    pieces: int = 1
    share: float = 1.0

    def split(self, pieces: int) -> Iterator[HostBatch]:
        """Consecutive pieces, of equal length where it divides; views of this batch's memory."""
        rows = len(self.ids)
        pieces = max(1, min(pieces, rows))
        for number in range(pieces):
            part = slice(rows * number // pieces, rows * (number + 1) // pieces)
            yield HostBatch(
                self.ids[part],
                self.labels[part],
                [value[part] for value in self.pixels],
                {name: {key: value[part] for key, value in found.items()} for name, found in self.arrays.items()},
                [None if value is None else value[part] for value in self.augment],
                {name: value[part] for name, value in self.visible.items()},
                number,
                pieces,
                (part.stop - part.start) / max(1, rows),
            )


def handed_over(batch: Batch, ready: torch.cuda.Event) -> Batch:
    """``batch``, made on another stream and complete at ``ready``, safe to use on the consumer's stream."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(ready)
    tensors = [batch.images, *batch.more, batch.labels, *batch.visible.values()]
    for targets in batch.targets.values():
        for value in targets.values():
            tensors += [value.prefix, value.patches] if isinstance(value, Tokens) else [value]
    for tensor in tensors:
        tensor.record_stream(current)
    return batch
