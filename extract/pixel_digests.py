"""Digests of the pixels that a teacher saw, of a few rows of each shard: whether a library decodes otherwise since.

A view's ``source_digest`` says that a file is the same. What becomes of it is for the libraries that decode and resize. sha256 of
the pixels of every row would cost a tenth of decoding small images; one row in :data:`EVERY` tells as well, at a thousandth.
Views that an earlier version began have none, and are finished without.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hdcache.pixels import digest
from hdcache.schema import ArrayCard

PIXEL_DIGESTS = "pixels/digest"
"""The array, beside the taps: uint8 [rows, 32], zeros where a row has none."""
EVERY = 32
"""Rows of a shard from one digest to the next, the first one's included."""
LOOKED_AT = 8
"""Receipts that are asked where the array's metadata is not there: one may be damaged."""
DIGEST_CARD = ArrayCard(shape=(32,), dtype="uint8")


def pixel_digests(pixels: Sequence[NDArray[np.uint8] | None]) -> NDArray[np.uint8]:
    """uint8 [rows, 32] of a whole shard; None is a row that could not be read."""
    found = np.zeros((len(pixels), 32), np.uint8)
    for row in range(0, len(pixels), EVERY):
        if (seen := pixels[row]) is not None:
            found[row] = np.frombuffer(digest(seen), np.uint8)
    return found


def keeps_digests(folder: Path) -> bool:
    """Whether the rows of a teacher's view, in ``folder``, are written with digests: where they were begun so, or begin now.

    The array's metadata is the first file of a view. Where there are others without it, and no receipt speaks of it, an earlier version
    wrote them.
    """
    if (folder / PIXEL_DIGESTS / "zarr.json").is_file():
        return True
    if receipts := list(islice(folder.glob("receipts/*.json"), LOOKED_AT)):
        return any(PIXEL_DIGESTS.encode() in path.read_bytes() for path in receipts if path.is_file())
    return not any(folder.rglob("zarr.json"))
