"""Memory on the host for batches: used again once nothing refers to it, since fresh pages cost as much as what fills them."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class HostMemory:
    """Gives out tensors that are not filled in. ``pinned`` ones can travel to a GPU while it computes."""

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self._free: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A tensor of ``shape``; ``dtype`` is NumPy's name of its type. Any thread may ask."""
        if self.pinned:
            # torch keeps pinned memory itself, and knows what a GPU still copies from.
            return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            memory = self._free[size].pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        lent = memory.view(dtype).reshape(shape)
        # The storage of the tensor holds this very array, whatever views are made of it; when it goes, the memory is free.
        weakref.finalize(lent, self._free[size].append, memory).atexit = False
        return torch.from_numpy(lent)
