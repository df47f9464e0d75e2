"""Chunks of a shard, decoded straight from its file.

Zarr's readers cost a fixed time for each read (zarr-python about a millisecond, in Python's lock) or a copy of each part of
a shard (zarrs), which an epoch of short runs feels. A shard that this project wrote is chunks one after the other, each of
them bytes, perhaps blosc, and a crc32c, and at its end an index of their offsets and lengths (Zarr v3, ``sharding_indexed``).
A shard that is laid out in any other way is none of this project's, and refused. No torch here.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from hdcache.errors import StoreCorrupt

_CRC: dict[str, Any] = {"name": "crc32c"}
_LITTLE: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_BLOSC_HEADER = 16
_BLOSC_SIZE, _BLOSC_PACKED = slice(4, 8), slice(12, 16)
"""Where blosc's header says how many bytes come out, and how many it is made of."""


_local = threading.local()


@dataclass(frozen=True)
class ShardLayout:
    """How the shards of one array are laid out."""

    row: tuple[int, ...]
    dtype: str
    chunk: int
    """Rows of a chunk."""
    count: int
    """Chunks of a shard."""
    blosc: bool

    READABLE: ClassVar[bool] = sys.byteorder == "little" and hasattr(os, "pread")
    """Whether :meth:`read` works here; zarr does everywhere."""

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> ShardLayout | None:
        """The layout that the metadata of a Zarr v3 array describes; None where it is none of this project's."""
        (shard, *row), codecs = metadata["chunk_grid"]["configuration"]["chunk_shape"], metadata["codecs"]
        try:
            inner = codecs[0]["configuration"]
            chunk, *rest = inner["chunk_shape"]
            found = inner["codecs"]
            compressed = len(found) == 3 and found[1]["name"] == "blosc"
            # A type of one byte has no order of bytes.
            good = codecs[0]["name"] == "sharding_indexed" and found[0] in ({"name": "bytes"}, _LITTLE) and rest == row
            good = good and isinstance(chunk, int) and chunk > 0 and shard % chunk == 0
        except (LookupError, TypeError, ValueError):
            return None
        expected = {
            "chunk_shape": [chunk, *row],
            "codecs": [found[0], *([found[1]] if compressed else []), _CRC],
            "index_codecs": [_LITTLE, _CRC],
            "index_location": "end",
        }
        if not good or len(codecs) != 1 or inner != expected:
            return None
        return cls(tuple(row), metadata["data_type"], chunk, shard // chunk, compressed)

    def read(self, file: int, size: int, chunks: Sequence[int]) -> Iterator[tuple[int, NDArray[np.generic]]]:
        """These chunks of a shard, by number: each one's first row, and all of its rows.

        ``file`` is the descriptor of the shard's file, of ``size`` bytes. The memory of a chunk may be that of every other that this
        thread reads, of any array.

        Raises
        ------
        ValueError
            where a checksum or a length is wrong.
        """
        for number, (offset, length) in zip(chunks, self._places(file, size, chunks), strict=True):
            yield number * self.chunk, self._decode(_checked(_read(file, length, offset), length))

    def check(self, file: int, size: int, chunks: Sequence[int]) -> None:
        """Whether these chunks are as large as they should be, once decoded: for who lets another library decode them.

        Raises
        ------
        ValueError
            where one is not: that library would make all that its header promises before it compares.
        """
        for offset, length in self._places(file, size, chunks):
            head = _read(file, min(_BLOSC_HEADER, length - 4), offset) if self.blosc else b""
            self._check_size(np.frombuffer(head, np.uint8), length - 4)

    def expect(self, file: int, size: int, chunks: Sequence[int]) -> None:
        """Have the system fetch what :meth:`read` will, without waiting for it; errors are those of :meth:`read`."""
        if hasattr(os, "posix_fadvise"):
            for offset, length in self._places(file, size, chunks):
                os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)

    def _places(self, file: int, size: int, chunks: Sequence[int]) -> list[tuple[int, int]]:
        """Offset and length of each chunk, inside of the shard and no part of another."""
        index, places, end = self._index(file, size), [], 0
        last = size - 16 * self.count - 4
        for number in chunks:
            offset, length = index[number]
            if length <= 4 or offset + length > last:
                raise ValueError(f"the index places chunk {number} outside of the shard")
            if offset < end:
                raise ValueError(f"the index places chunk {number} inside of another")
            places.append((offset, length))
            end = offset + length
        return places

    def _index(self, file: int, size: int) -> Sequence[Sequence[int]]:
        length = 16 * self.count + 4
        if size < length:
            raise ValueError("the shard is shorter than its index")
        return _checked(_read(file, length, size - length), length).view("<u8").reshape(-1, 2).tolist()

    def _decode(self, data: NDArray[np.uint8]) -> NDArray[np.generic]:
        shape, size = (self.chunk, *self.row), self._check_size(data, data.size)
        if not self.blosc:
            return data.view(self.dtype).reshape(shape)
        block = _scratch(size).view(self.dtype).reshape(shape)
        # From any thread but the main one, this leaves Python's lock.
        blosc.decompress(data, block)
        return block

    def _check_size(self, head: NDArray[np.uint8], length: int) -> int:
        """Bytes of a decoded chunk, of which ``length`` bytes are stored and ``head`` are the first."""
        size = math.prod((self.chunk, *self.row)) * np.dtype(self.dtype).itemsize
        if (_number(head, _BLOSC_SIZE) if self.blosc else length) != size:
            raise ValueError("a chunk of another size")
        # The library trusts its header, and would read what lies behind a chunk that says it is longer.
        if self.blosc and (length < _BLOSC_HEADER or _number(head, _BLOSC_PACKED) != length):
            raise ValueError("a chunk whose header names another length than its own")
        return size


def known_layout(path: Path, metadata: Mapping[str, Any], shard: int | None) -> ShardLayout | None:
    """The layout of an array's shards, None where it has none and its one chunk is plain values.

    Raises
    ------
    StoreCorrupt
        for an array that no version has written. A library that decodes what we do not know may make gigabytes of a small file
        before anybody sees that they do not fit.
    """
    found = ShardLayout.of(metadata) if shard is not None else None
    if found is None and (shard is not None or metadata["codecs"] not in ([{"name": "bytes"}, _CRC], [_LITTLE, _CRC])):
        raise StoreCorrupt(f"{path}: its codecs are not put together as those of a store are; copy the store again")
    return found


def _scratch(size: int) -> NDArray[np.uint8]:
    """So many bytes of this thread's own memory, which is as large as the largest chunk that it has read."""
    if not hasattr(_local, "memory") or len(_local.memory) < size:
        _local.memory = np.empty(size, np.uint8)
    found: NDArray[np.uint8] = _local.memory[:size]
    return found


def _number(data: NDArray[np.uint8], place: slice) -> int:
    return int.from_bytes(data[place].tobytes(), "little")


def _read(file: int, length: int, offset: int) -> bytes:
    """So many bytes, or all up to the end of the file: the system may give fewer at a time."""
    data = os.pread(file, length, offset)
    while len(data) < length and (more := os.pread(file, length - len(data), offset + len(data))):
        data += more
    return data


def _checked(data: bytes, length: int) -> NDArray[np.uint8]:
    """What a crc32c at the end of ``data`` vouches for."""
    if len(data) != length:
        raise ValueError("the file ends early")
    found = np.frombuffer(data, np.uint8)
    if google_crc32c.value(found[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("a checksum does not match")
    return found[:-4]
