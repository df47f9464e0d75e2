"""Token features as colours: their three leading principal components as red, green and blue. NumPy only.

Legend: n tokens that the colours are fitted to, m tokens that are coloured, C channels.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FITTED = 1024
"""Tokens that a fit looks at, at most: evenly spaced ones, since the cost is cubic in their number."""
CLIPPED = 1.0
"""Percentage of the tokens at either end of a component that are drawn as black or as full colour."""


@dataclass(frozen=True)
class Colours:
    """A map from features to colours."""

    mean: NDArray[np.float64]
    """[C]."""
    axes: NDArray[np.float64]
    """[C, 3]: principal axes, each with its largest entry positive, so that the same tokens have the same colours."""
    low: NDArray[np.float64]
    """[3]: value that becomes 0."""
    high: NDArray[np.float64]

    @classmethod
    def fit(cls, features_nC: NDArray[np.floating]) -> Colours:
        """Fit to tokens, n >= 1; axes that they do not have are zero."""
        step = -(-len(features_nC) // FITTED)
        chosen = np.asarray(features_nC[::step], np.float64)
        mean = chosen.mean(axis=0)
        centred = chosen - mean
        tokens, channels = centred.shape
        # Of the two Gram matrices the smaller one gives the same axes.
        if channels <= tokens:
            _, vectors = np.linalg.eigh(centred.T @ centred)
            axes = vectors[:, ::-1][:, :3]
        else:
            _, vectors = np.linalg.eigh(centred @ centred.T)
            axes = centred.T @ vectors[:, ::-1][:, :3]
        lengths = np.linalg.norm(axes, axis=0)
        axes = np.divide(axes, lengths, out=np.zeros_like(axes), where=lengths > 1e-9)
        signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
        axes = np.pad(axes * signs, ((0, 0), (0, 3 - axes.shape[1])))
        low, high = np.percentile(centred @ axes, [CLIPPED, 100 - CLIPPED], axis=0)
        return cls(mean, axes, low, high)

    def paint(self, features_mC: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Colours uint8 [m, 3]; a component without any spread is mid-grey."""
        values = (np.asarray(features_mC, np.float64) - self.mean) @ self.axes
        spread = self.high - self.low
        share = np.divide(values - self.low, spread, out=np.full_like(values, 0.5), where=spread > 1e-9)
        return (share.clip(0, 1) * 255).round().astype(np.uint8)


def map_png(
    colours_m3: NDArray[np.uint8], visible: NDArray[np.int64] | None, slots: int, grid: tuple[int, int]
) -> bytes:
    """One pixel a token, temporal slots side by side: a PNG [rows, slots * columns]; hidden tokens are transparent.

    ``visible`` are the indices [m] of the tokens that there are, None where all are.
    """
    rows, columns = grid
    pixels = np.zeros((slots * rows * columns, 4), np.uint8)
    where = slice(None) if visible is None else visible
    pixels[where, :3] = colours_m3
    pixels[where, 3] = 255
    strip = pixels.reshape(slots, rows, columns, 4).transpose(1, 0, 2, 3).reshape(rows, slots * columns, 4)
    return png(Image.fromarray(np.ascontiguousarray(strip)))


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_uri(image: bytes) -> str:
    """A PNG file as an address that a page can show without a request."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
