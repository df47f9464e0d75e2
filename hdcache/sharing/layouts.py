"""Files that other libraries read: one safetensors file of many rows, or a tar of one safetensors object a sample.

Equal values give equal bytes: names are sorted and tars know neither times nor owners. A file is made piece by piece, so that
it need not be in memory twice. No torch here.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdcache.errors import UsageError

DTYPES = {"uint16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8", "int32": "I32", "int64": "I64"}
"""NumPy's name -> safetensors'; NumPy has no bfloat16, whose bits are in uint16."""
HEADER_LIMIT = 100_000_000
"""Readers of safetensors refuse a longer header."""
_USTAR_LIMIT = 8**11
PIECE = 1 << 24
"""Bytes of an array that are handed on together."""


class TensorCard(NamedTuple):
    """Shape, and type as NumPy names it, of one array."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def times(self, rows: int) -> TensorCard:
        """That of ``rows`` rows of this shape."""
        return TensorCard((rows, *self.shape), self.dtype)


def card_of(value: NDArray[np.generic]) -> TensorCard:
    """Shape and type of an array."""
    return TensorCard(value.shape, value.dtype.name)


def _in_file(cards: Mapping[str, TensorCard]) -> list[str]:
    """Names in the order of the file: the widest numbers first, so that each array begins at a multiple of its numbers' size."""
    return sorted(cards, key=lambda name: (-np.dtype(cards[name].dtype).itemsize, name))


def safetensors_header(cards: Mapping[str, TensorCard], metadata: Mapping[str, str]) -> bytes:
    """What precedes the values of a safetensors file; :class:`UsageError` where no reader would take it."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in _in_file(cards):
        card = cards[name]
        offsets = [start, start := start + card.nbytes]
        header[name] = {"dtype": DTYPES[card.dtype], "shape": list(card.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise UsageError(
            f"a header of {len(text):,} bytes, mostly ids, is more than the {HEADER_LIMIT:,} of safetensors; "
            "choose fewer --rows-per-shard"
        )
    return len(text).to_bytes(8, "little") + text


def safetensors_parts(arrays: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """A safetensors file of ``arrays``, piece by piece."""
    cards = {name: card_of(value) for name, value in arrays.items()}
    yield safetensors_header(cards, metadata)
    for name in _in_file(cards):
        value = arrays[name]
        flat = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
        for start in range(0, len(flat), PIECE):
            yield flat[start : start + PIECE].tobytes()


def safetensors_size(cards: Mapping[str, TensorCard], metadata: Mapping[str, str]) -> int:
    """Bytes of :func:`safetensors_parts`."""
    return len(safetensors_header(cards, metadata)) + sum(card.nbytes for card in cards.values())


def _member_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    # Names beyond 100 characters need the POSIX form; all others are plain ustar in it.
    return info.tobuf(tarfile.PAX_FORMAT)


def tar_parts(members: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """A tar of ``members``, name and content each, in this order, piece by piece."""
    count = 0
    for name, data in members:
        for part in (_member_header(name, len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)):
            count += len(part)
            yield part
    yield bytes(_tar_end(count))


def tar_size(members: Iterable[tuple[str, int]]) -> int:
    """Bytes of :func:`tar_parts` of members with these names, in ASCII, and sizes."""
    count = 0
    for name, size in members:
        short = len(name) <= tarfile.LENGTH_NAME and size < _USTAR_LIMIT
        header = tarfile.BLOCKSIZE if short else len(_member_header(name, size))
        count += header + size + -size % tarfile.BLOCKSIZE
    return count + _tar_end(count)


def _tar_end(count: int) -> int:
    """Zeros that end a tar of ``count`` bytes."""
    end = 2 * tarfile.BLOCKSIZE
    return end + -(count + end) % tarfile.RECORDSIZE


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels uint8 [3, H, W] as PNG: without loss; the bytes are those of this version of Pillow."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG")
    return file.getvalue()
