"""Open one sample under one view: drawn afresh, or replayed from recorded numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdcache.datasets import Dataset, decode, digest
from hdcache.errors import InputNotFound, StoreMismatch, UnreadableImage
from hdcache.schema import Preprocessing, ViewSpec
from hdcache.views import Box, draw, render

Recorded = tuple[NDArray[np.int32], bytes]
"""A row of ``GEOMETRY_COLUMNS`` and the sha256 of the source it was recorded from."""


@dataclass(frozen=True)
class OpenedSample:
    """A decoded source with the geometry of one view."""

    image: Image.Image
    box: Box
    flip: bool
    digest: bytes
    """sha256 of the source."""

    def pixels(self, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        """The view at a network's input size: uint8 [3, size, size], contiguous."""
        rendered = render(self.image, self.box, self.flip, preprocessing.size, preprocessing.interpolation)
        return np.ascontiguousarray(rendered.transpose(2, 0, 1))


def open_sample(
    dataset: Dataset, sample_id: str, spec: ViewSpec, view: int, recorded: Recorded | None = None
) -> OpenedSample:
    """Read and decode one sample.

    Raises
    ------
    InputNotFound
        when the data set has no such sample.
    UnreadableImage
        when the source cannot be read or decoded.
    StoreMismatch
        when ``recorded`` belongs to another source than the one found now.
    """
    try:
        source = dataset.read(sample_id)
        image = decode(source)
    except InputNotFound:
        raise  # not a broken image but the wrong data set
    except UnreadableImage as error:
        raise UnreadableImage(f"{sample_id}: {error}") from None
    except OSError as error:
        raise UnreadableImage(f"{sample_id}: {error.strerror or error}") from None
    found = digest(source)
    if recorded is None:
        box, flip = draw(spec, sample_id, view, *image.size)
        return OpenedSample(image, box, flip, found)
    _, left, top, width, height, flipped, source_width, source_height = (int(number) for number in recorded[0])
    if found != recorded[1] or image.size != (source_width, source_height):
        raise StoreMismatch(
            f"{sample_id}: the image changed since its view was recorded (sha256 {found.hex()[:12]}..., "
            f"was {recorded[1].hex()[:12]}...); restore it, or extract to a new store"
        )
    return OpenedSample(image, (left, top, width, height), bool(flipped), found)
