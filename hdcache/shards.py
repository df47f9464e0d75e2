"""Shards put together chunk by chunk, as Zarr v3's ``sharding_indexed`` has them: the other side of :mod:`hdcache.chunks`.

The bytes are zarr-python's own (a test compares them), which spends as long on handing chunks from coroutine to coroutine,
and on copying a shard each time a chunk is added, as the codec needs for its work. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import google_crc32c
import numcodecs
import numpy as np
from numpy.typing import NDArray

LEVEL = 1
"""zstd's, as blosc counts. 5 takes five times as long for about 1 % fewer bytes of klt codes, up to 9 % where nearly all are 0."""
CHUNK_ROWS = 32
"""Rows that are compressed and read together, at most. What Python adds to each chunk, under its lock, is felt with fewer."""
LEAST_ROWS = 8
"""Rows that are compressed together where those of a whole chunk would be larger than :data:`CHUNK_BYTES`."""
CHUNK_BYTES = 8 << 20
"""Each thread that reads holds one chunk."""
EMPTY = 2**64 - 1
"""Offset and length, in an index, of a chunk behind the end of the array."""
Piece = tuple[memoryview, bytes]
"""A chunk as stored, and its checksum."""
Map = Callable[[Callable[[NDArray[np.generic]], Piece], Iterable[NDArray[np.generic]]], Iterable[Piece]]


class Codec(NamedTuple):
    """How an array's chunks are compressed: zstd over bit planes, by blosc."""

    block_bytes: int = 0
    """What is compressed together; 0: the library's own choice."""
    typesize: int = 0
    """Bytes that give their bits to a plane as one element; 0: those of the dtype."""

    def blosc(self, itemsize: int) -> numcodecs.Blosc:
        """The codec, for elements of ``itemsize`` bytes."""
        return numcodecs.Blosc(
            "zstd", LEVEL, numcodecs.Blosc.BITSHUFFLE, self.block_bytes, typesize=self.typesize or itemsize
        )


def chunk_rows(shard: int) -> int:
    """Rows of the chunks of a store whose shards have ``shard``: they divide it, and (from 8 rows on) runs of :data:`CHUNK_ROWS`."""
    return math.gcd(shard, CHUNK_ROWS) if shard >= LEAST_ROWS else shard


def rows_together(chunk: int, row_bytes: int, codec: Codec | None) -> int:
    """Rows of one array's chunks in a store whose chunks have ``chunk`` rows: fewer of long rows, and of those that no codec shrinks.

    The last chunk of an array is filled up with zeros, which cost bytes where nothing compresses them.
    """
    while chunk > LEAST_ROWS and chunk % 2 == 0 and (codec is None or chunk * row_bytes > CHUNK_BYTES):
        chunk //= 2
    return chunk


def shard_bytes(
    block: NDArray[np.generic], chunk: int, count: int, codec: numcodecs.Blosc | None, each: Map = map
) -> bytes:
    """The object that holds rows ``block`` [R, ...] in ``count`` chunks of ``chunk`` rows, the last of them perhaps short.

    ``each`` runs the codec on every chunk, in any number of threads. Rows behind the end of the array are zeros.
    """
    rows = np.ascontiguousarray(block.astype(block.dtype.newbyteorder("<"), copy=False))
    if short := -len(rows) % chunk:
        rows = np.concatenate([rows, np.zeros((short, *rows.shape[1:]), rows.dtype)])

    def encode(part: NDArray[np.generic]) -> Piece:
        stored = part if codec is None else np.frombuffer(codec.encode(part), np.uint8)
        flat = stored.reshape(-1).view(np.uint8)
        return flat.data, google_crc32c.value(flat).to_bytes(4, "little")

    pieces = list(each(encode, (rows[start : start + chunk] for start in range(0, len(rows), chunk))))
    index = np.full((count, 2), EMPTY, "<u8")
    lengths = np.array([len(data) + len(checksum) for data, checksum in pieces])
    index[: len(pieces), 0], index[: len(pieces), 1] = np.cumsum(lengths) - lengths, lengths
    table = index.tobytes()
    parts = [part for piece in pieces for part in piece]
    return b"".join([*parts, table, google_crc32c.value(table).to_bytes(4, "little")])
