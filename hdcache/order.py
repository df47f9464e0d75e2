"""The order of an epoch: a function of (rows, batch size, seed, epoch) alone.

Rows are stored in runs that are read together, and several ranks should not all read everything. So an epoch is
laid out in three steps: runs are permuted; consecutive runs fill a buffer that is cut into *lanes*, and rows are
permuted inside each lane; every global batch takes an equal part of each lane, lane after lane. A rank's share of
a batch is a contiguous piece of it, which is a set of whole lanes when the number of ranks divides the lanes. Where a
lane is also whole runs (as of batches that are a power of two, without failed rows), each rank reads its own runs only;
else those at the ends of its lanes are read by two. The global batches are the same for any number of ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hdcache import draws

MAX_LANES = 64
"""Ranks that can share an epoch without reading one another's runs, where batch and buffer are large enough."""
PIECE_ROWS = 1 << 14
"""Rows that are permuted at a time."""


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
    runs = np.arange(rows[0] // run_rows, rows[-1] // run_rows + 2) if len(rows) else np.zeros(1, np.int64)
    bounds = np.searchsorted(rows, runs * run_rows)
    first, length = bounds[:-1], np.diff(bounds)
    first, length = first[length > 0], length[length > 0]
    drawn = draws.permutation(len(first), seed, epoch, "runs")
    first, length = first[drawn], length[drawn]
    index = np.repeat(first - (np.cumsum(length) - length), length)
    index += np.arange(len(rows))
    sequence: NDArray[np.int64] = rows[index]
    batches = max(1, -(-buffer_rows // batch_size))
    size = batches * batch_size
    most = min(MAX_LANES, batch_size, max(1, size // run_rows))
    lanes = next(n for n in range(most, 0, -1) if batch_size % n == 0)
    shuffle = draws.uniform(len(sequence), seed, epoch, "rows")
    whole = len(sequence) // size * size
    # A few buffers at a time stay in the processor's cache: a million rows cost no more each than ten thousand.
    step = max(1, PIECE_ROWS // size) * size
    for start in range(0, whole, step):
        piece = slice(start, min(start + step, whole))
        lane = sequence[piece].reshape(-1, lanes, size // lanes)
        places = np.argsort(shuffle[piece].reshape(lane.shape), axis=-1, kind="stable")
        lane = np.take_along_axis(lane, places, axis=-1)
        sequence[piece] = lane.reshape(-1, lanes, batches, batch_size // lanes).transpose(0, 2, 1, 3).reshape(-1)
    sequence[whole:] = sequence[whole:][np.argsort(shuffle[whole:], kind="stable")]
    return sequence


def rank_slice(length: int, rank: int, world: int) -> slice:
    """The contiguous share of rank ``rank`` of ``world`` in a global batch of ``length`` rows."""
    return slice(length * rank // world, length * (rank + 1) // world)
