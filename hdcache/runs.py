"""Runs of stored rows: each is read and decompressed once, and its rows go straight to the batches that want them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hdcache.host_memory import HostMemory
from hdcache.shards import CHUNK_ROWS
from hdcache.stages import Stages
from hdcache.target_sources import HostArrays, StoredTargets

RUN_ROWS = CHUNK_ROWS
"""Rows that are read together."""
EXPECTED = 16
"""Runs that the system is asked for before one is read."""


class _Buffer(NamedTuple):
    """The stored arrays of one batch, by teacher: one memory, seen by torch and by numpy."""

    tensors: dict[str, dict[str, Tensor]]
    arrays: Mapping[str, HostArrays]


class Runs:
    """Reads runs of rows on the threads of a pool, each run once, into the batches of an epoch.

    ``shares`` are the rows of each batch, ``count`` those of the view.
    """

    def __init__(
        self,
        stored: Sequence[StoredTargets],
        view: int,
        count: int,
        shares: Sequence[NDArray[np.int64]],
        *,
        memory: HostMemory | None = None,
        stages: Stages | None = None,
    ) -> None:
        self._stored, self._view, self._count, self._shares = stored, view, count, shares
        self._memory, self._stages = memory or HostMemory(), stages or Stages()
        self._needs = [np.unique(rows // RUN_ROWS).tolist() for rows in shares] if stored else [[] for _ in shares]
        self._uses: dict[int, int] = {}
        for needed in self._needs:
            for run in needed:
                self._uses[run] = self._uses.get(run, 0) + 1
        # Row -> the batch that it belongs to and its place there.
        self._batch, self._place = np.full(count, -1, np.int32), np.zeros(count, np.int32)
        for number, rows in enumerate(shares):
            self._batch[rows], self._place[rows] = number, np.arange(len(rows), dtype=np.int32)
        self._futures: dict[int, Future[None]] = {}
        self._buffers: dict[int, _Buffer] = {}
        self._lock = threading.Lock()
        self._requested = 0

    def request(self, pool: ThreadPoolExecutor, until: int) -> None:
        """Start reading what the batches before number ``until`` need."""
        new: dict[int, None] = {}
        while self._requested < min(until, len(self._needs)):
            new |= {run: None for run in self._needs[self._requested] if run not in self._futures}
            self._requested += 1
        expected = iter(new)
        for run in islice(expected, EXPECTED):
            pool.submit(self._expect, run)
        for run in new:
            for following in islice(expected, 1):
                pool.submit(self._expect, following)
            self._futures[run] = pool.submit(self._read, run)

    def gather(self, number: int) -> dict[str, dict[str, Tensor]]:
        """Stored arrays of batch ``number``, by teacher, once all of its rows are there; forgets runs that no later batch needs."""
        for run in self._needs[number]:
            self._futures[run].result()
            self._uses[run] -= 1
            if not self._uses[run]:
                del self._futures[run], self._uses[run]
        buffer = self._buffer(number)
        del self._buffers[number]
        return buffer.tensors

    def _read(self, run: int) -> None:
        with self._stages.of("read"):
            start, stop = self._rows(run)
            numbers, places = self._batch[start:stop].tolist(), self._place[start:stop].tolist()
            buffers = {number: self._buffer(number).arrays for number in set(numbers) - {-1}}
            for target in self._stored:
                target.read(
                    self._view, start, stop,
                    [
                        (buffers[number][target.name], place) if number in buffers else None
                        for number, place in zip(numbers, places, strict=True)
                    ],
                )  # fmt: skip

    def _expect(self, run: int) -> None:
        for target in self._stored:
            target.expect(self._view, *self._rows(run))

    def _rows(self, run: int) -> tuple[int, int]:
        return run * RUN_ROWS, min((run + 1) * RUN_ROWS, self._count)

    def _buffer(self, number: int) -> _Buffer:
        with self._lock:
            if number not in self._buffers:
                rows = len(self._shares[number])
                tensors = {
                    target.name: {key: self._memory.empty((rows, *card.shape), card.dtype) for key, card in target.arrays.items()}
                    for target in self._stored
                }  # fmt: skip
                arrays = {name: {key: value.numpy() for key, value in found.items()} for name, found in tensors.items()}
                self._buffers[number] = _Buffer(tensors, arrays)
            return self._buffers[number]
