"""Random numbers as pure functions of what they are for: no generator object ever travels.

Every draw is keyed by ``(seed, sample id, view or epoch, purpose)``, so the result does not depend on the
number of threads, ranks or restarts. Only Philox's raw bit stream is used, which NumPy promises to keep;
the streams of ``numpy.random.Generator`` methods carry no such promise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def _words(count: int, key: tuple[object, ...]) -> NDArray[np.uint64]:
    text = "\x1f".join(str(part) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    bits = np.random.Philox(key=np.frombuffer(digest, "<u8"))
    return np.asarray(bits.random_raw(count), dtype=np.uint64)


def uniform(count: int, *key: object) -> NDArray[np.float64]:
    """``count`` float64 numbers in [0, 1), the same for the same ``key`` on every machine.

    The parts of ``key`` are compared by their ``str``; by convention (seed, sample id, view, purpose).
    """
    return (_words(count, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *key: object) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` (int64), the same for the same ``key`` on every machine."""
    # Ranks of independent 64-bit words; a tie (probability < count^2 / 2^65) falls to the lower index.
    return np.argsort(_words(count, key), kind="stable").astype(np.int64)


def uniform_rows(count: int, keys: Sequence[tuple[object, ...]]) -> NDArray[np.float64]:
    """One row of ``count`` uniform numbers for each key: float64 [len(keys), count]."""
    out = np.empty((len(keys), count))
    for row, key in enumerate(keys):
        out[row] = uniform(count, *key)
    return out


def integer_seed(*key: object) -> int:
    """A 63-bit seed for libraries that insist on their own generator object (``torch.Generator``)."""
    return int(_words(1, key)[0] >> np.uint64(1))
