"""A data set whose larger images are shrunk, once, before any network sees them.

An image whose shorter side is larger than asked for is decoded by the rules of :mod:`hdcache.pixels`, resized with
Pillow's antialiased Lanczos filter and encoded as JPEG of quality 95 without chroma subsampling (as PNG beyond JPEG's
65,535 pixels a side). Others stay the bytes that they are. What comes out is a sample like any other, with a sha256 of its
own: teachers and students see these pixels and no others.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdcache.dataset_rows import Dataset
from hdcache.errors import UsageError
from hdcache.pixels import Source, decode
from hdcache.schema import DatasetCard

QUALITY = 95
_JPEG_SIDE = 65_535
_SIDES = (16, 8192)


def parse_pixels(text: str | int | None) -> int | None:
    """The shorter side that ``--pixels`` asks for; None for ``source``, or where nothing is asked."""
    if text is None or text == "source":
        return None
    side = int(text) if isinstance(text, int) or (text.isascii() and text.isdecimal()) else -1
    if not _SIDES[0] <= side <= _SIDES[1]:
        raise UsageError(
            f"--pixels {text!r}: write 'source' to keep the samples as they are, or the shorter side that larger images are "
            f"shrunk to, {_SIDES[0]} to {_SIDES[1]} pixels"
        )
    return side


def shrink(source: Source, shorter_side: int) -> Source:
    """``source`` itself, or the encoded image that it was shrunk to.

    Raises
    ------
    UnreadableImage
        as :func:`~hdcache.pixels.decode` does.
    """
    image = decode(source)
    short = min(image.size)
    if short <= shorter_side:
        return source
    width, height = (max(shorter_side, round(side * shorter_side / short)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if max(small.size) > _JPEG_SIDE:
        small.save(file, "PNG")
    else:
        small.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()


@dataclass(frozen=True)
class Shrunk:
    """A data set of images, shrunk as they are read."""

    whole: Dataset
    shorter_side: int

    @cached_property
    def card(self) -> DatasetCard:
        """That of the whole, with another fingerprint: these are other images."""
        how = f"{self.whole.card.fingerprint}\nshorter side {self.shorter_side}, Lanczos, JPEG {QUALITY} 4:4:4"
        fingerprint = hashlib.sha256(how.encode()).hexdigest()
        return self.whole.card.model_copy(update={"fingerprint": fingerprint, "shorter_side": self.shorter_side})

    @property
    def ids(self) -> tuple[str, ...]:
        """Those of the whole."""
        return self.whole.ids

    @property
    def labels(self) -> NDArray[np.int64]:
        """Those of the whole."""
        return self.whole.labels

    def read(self, sample_id: str) -> Source:
        """The image, shrunk; :class:`UnreadableImage` where it cannot be decoded too."""
        return shrink(self.whole.read(sample_id), self.shorter_side)


def shrunk(dataset: Dataset, shorter_side: int | None) -> Dataset:
    """``dataset`` at this shorter side, itself where it is that already or nothing is asked.

    Raises
    ------
    UsageError
        for videos.
    """
    if shorter_side is None or dataset.card.shorter_side == shorter_side:
        return dataset
    if dataset.card.kind == "video":
        raise UsageError(f"--pixels {shorter_side} shrinks images, not videos; keep them as they are: --pixels source")
    return Shrunk(dataset, shorter_side)
