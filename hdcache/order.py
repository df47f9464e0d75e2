"""The order of an epoch: a function of (rows, batch size, seed, epoch) alone.

Rows are stored in runs that are read together, and several ranks should not all read everything. So an epoch is
laid out in three steps: runs are permuted; consecutive runs fill a buffer that is cut into *lanes*, and rows are
permuted inside each lane; every global batch takes an equal part of each lane, lane after lane. A rank's share of
a batch is a contiguous piece of it, which is a set of whole lanes when the number of ranks divides the lanes: each
rank then reads its own runs only, while the global batches are the same for any number of ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hdcache import draws

MAX_LANES = 64
"""Ranks that can share an epoch without reading one another's runs, where batch and buffer are large enough."""


def epoch_order(
    rows: NDArray[np.int64], batch_size: int, *, run_rows: int, buffer_rows: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """A permutation of ``rows`` (int64, ascending): global batches are its consecutive pieces of ``batch_size``.

    Parameters
    ----------
    run_rows
        rows that are read together; rows of one run have equal ``row // run_rows``.
    buffer_rows
        rows within which the order is random; rounded up to whole batches. The larger, the nearer to a full shuffle.
    """
    run = rows // run_rows
    names, run_index = np.unique(run, return_inverse=True)
    rank = np.empty(len(names), np.int64)
    rank[draws.permutation(len(names), seed, epoch, "runs")] = np.arange(len(names))
    sequence = rows[np.argsort(rank[run_index], kind="stable")]
    batches = max(1, -(-buffer_rows // batch_size))
    size = batches * batch_size
    most = min(MAX_LANES, batch_size, max(1, size // run_rows))
    lanes = next(n for n in range(most, 0, -1) if batch_size % n == 0)
    buffers = len(sequence) // size
    shuffle = draws.uniform(len(sequence), seed, epoch, "rows")
    main = sequence[: buffers * size].reshape(buffers, lanes, size // lanes)
    keys = shuffle[: buffers * size].reshape(main.shape)
    main = np.take_along_axis(main, np.argsort(keys, axis=-1, kind="stable"), axis=-1)
    parts = main.reshape(buffers, lanes, batches, batch_size // lanes).transpose(0, 2, 1, 3)
    tail = sequence[buffers * size :][np.argsort(shuffle[buffers * size :], kind="stable")]
    return np.concatenate([parts.reshape(-1), tail])


def rank_slice(length: int, rank: int, world: int) -> slice:
    """The contiguous share of rank ``rank`` of ``world`` in a global batch of ``length`` rows."""
    return slice(length * rank // world, length * (rank + 1) // world)
