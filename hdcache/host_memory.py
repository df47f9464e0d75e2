"""Memory on the host for batches: used again once nothing refers to it, since fresh pages cost as much as what fills them."""

from __future__ import annotations

import math
import threading
import weakref
from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class HostMemory:
    """Gives out tensors that are not filled in. ``pinned`` ones can travel to a GPU while it computes.

    ``limit`` are the bytes that may wait to be used again: what comes back beyond them goes to the system, with all that waits.
    """

    def __init__(self, *, pinned: bool = False, limit: int = 1 << 30) -> None:
        self.pinned, self.limit = pinned, limit
        self._free: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)
        self._waiting = 0
        # The end of a tensor may come at any place in any thread, this one's included.
        self._lock = threading.RLock()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A tensor of ``shape``; ``dtype`` is NumPy's name of its type. Any thread may ask."""
        if self.pinned:
            # torch keeps pinned memory itself, and knows what a GPU still copies from.
            return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with self._lock:
            memory = self._free[size].pop() if self._free.get(size) else None
            self._waiting -= size if memory is not None else 0
        if memory is None:
            memory = np.empty(size, np.uint8)
        lent = memory.view(dtype).reshape(shape)
        # The storage of the tensor holds this very array, whatever views are made of it; when it goes, the memory is free.
        weakref.finalize(lent, self._back, memory).atexit = False
        return torch.from_numpy(lent)

    def _back(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            if self._waiting + memory.nbytes > self.limit:
                # Some may be of sizes that nobody asks for any more.
                self._free.clear()
                self._waiting = 0
            if memory.nbytes <= self.limit:
                self._free[memory.nbytes].append(memory)
                self._waiting += memory.nbytes
