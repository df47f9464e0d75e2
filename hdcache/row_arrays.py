"""The arrays that one row of a teacher has: bytes, codecs, the mask of a masked teacher. No torch here."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hdcache.schema import ITEM_BYTES, ArrayCard, TapCard, TeacherCard
from hdcache.shards import Codec

MASK_ARRAY = "mask/visible"
"""Where a masked teacher's rows hold the tokens that it saw, beside its taps."""

Parts = dict[str, NDArray[np.generic]]
"""Stored arrays of some rows, on the host."""


def mask_array(card: TeacherCard) -> ArrayCard:
    """One row of :data:`MASK_ARRAY`: packed bits, one per patch token of a whole input."""
    return ArrayCard(shape=(-(-card.tokens // 8),), dtype="uint8")


def row_bytes(card: ArrayCard) -> int:
    """Uncompressed bytes of one row of an array."""
    return math.prod(card.shape) * ITEM_BYTES[card.dtype]


def codec_of(card: TapCard, name: str) -> Codec | None:
    """What compresses array ``name`` of a tap; None: nothing does."""
    if not compresses(card.arrays[name].dtype, name):
        return None
    return Codec(card.block_bytes, card.typesize if name == "codes" else 0)


def compresses(dtype: str, name: str) -> bool:
    """Whether a per-row array is worth a codec: integer codes are, float mantissas are nearly noise."""
    return name == "wide" or (dtype in ("int8", "int16", "uint8") and name != "prefix")
