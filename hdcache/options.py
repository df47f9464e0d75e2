"""What a loader yields and in which order; what is known of a student that trains on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hdcache.errors import UsageError
from hdcache.photometric import Photometric
from hdcache.schema import Preprocessing


@dataclass(frozen=True)
class Options:
    """What a loader yields and in which order; the order depends on nothing else."""

    batch_size: int
    """Rows of a global batch, over all ranks."""
    preprocessing: Preprocessing
    """The student's input."""
    seed: int = 0
    buffer_rows: int = 1024
    augment: tuple[Photometric | None, ...] = (None,)
    """Photometric augmentation of each of the student's views."""
    fresh: int = 0
    """Views of its own that the student sees in every epoch, in place of the view that targets belong to; 0: none."""
    images: bool = True
    """False: targets alone, with no image opened; ``Batch.images`` is [B, 0]. Not with teachers in the loop."""
    pieces: int = 1
    """Pieces that a batch is yielded in; only one of them is decoded on the device at a time."""
    drop_last: bool = False
    rank: int = 0
    world: int = 1
    threads: int = 2
    prefetch: int = 3
    """Batches in preparation at a time."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    """What codes are decoded to."""

    def __post_init__(self) -> None:
        if len(self.augment) != max(1, self.fresh):
            raise UsageError(
                f"{len(self.augment)} augmentations for {max(1, self.fresh)} student views; give one for each"
            )
        for name in ("batch_size", "world", "threads", "prefetch", "buffer_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.rank < self.world:
            raise UsageError(
                f"rank {self.rank} must lie between 0 and {self.world - 1}: the processes are {self.world}"
            )
        if self.batch_size < self.world:
            raise UsageError(f"batch size {self.batch_size} is smaller than the {self.world} processes that share it")


@dataclass(frozen=True)
class Trained:
    """How a student trains, for those who measure it on the way: where and how its frozen features are best read."""

    last_trained: str
    """The deepest layer that training reaches."""
    pool: str = "cls"
    """How its tokens are pooled: cls or mean."""
    stride: int | None = None
    """Frames from one to the next in the clips of its training; still images have 1."""
