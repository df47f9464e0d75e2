"""Principal components as colours: what they show, and that they never change."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hdcache.sharing.colours import FITTED, Colours, data_uri, map_png


def tokens(count: int, channels: int, seed: int = 0) -> np.ndarray:
    """Tokens whose first three channels have most of the spread."""
    noise = np.random.default_rng(seed).standard_normal((count, channels))
    noise[:, :3] *= np.array([30, 20, 10])[: min(3, channels)]
    return noise.astype(np.float32)


@pytest.mark.parametrize(("count", "channels"), [(400, 8), (12, 64), (FITTED * 3 + 1, 5)])
def test_the_axes_are_the_directions_of_most_spread(count: int, channels: int) -> None:
    features = tokens(count, channels)
    found = Colours.fit(features)
    chosen = features[:: -(-count // FITTED)]
    _, _, exact = np.linalg.svd(chosen.astype(np.float64) - chosen.mean(axis=0, dtype=np.float64), full_matrices=False)
    assert np.allclose(np.abs(found.axes.T @ exact[:3].T), np.eye(3), atol=1e-6)


@given(seed=st.integers(0, 1000), channels=st.integers(1, 12), count=st.integers(1, 40))
def test_colours_do_not_depend_on_an_axis_sign_nor_on_the_run(seed: int, channels: int, count: int) -> None:
    features = tokens(count, channels, seed) if channels >= 3 else tokens(count, 3, seed)[:, :channels]
    first, again = Colours.fit(features), Colours.fit(features)
    assert np.array_equal(first.axes, again.axes)
    largest = np.abs(first.axes).argmax(axis=0)
    assert (first.axes[largest, np.arange(3)] >= 0).all()
    painted = first.paint(features)
    assert painted.dtype == np.uint8
    assert painted.shape == (count, 3)


def test_equal_tokens_are_grey_and_extremes_are_full() -> None:
    flat = Colours.fit(np.ones((9, 4), np.float32))
    assert (flat.paint(np.ones((2, 4), np.float32)) == 128).all()
    line = np.arange(200, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    red = Colours.fit(line).paint(line)[:, 0].astype(int)
    assert red[0] == 0
    assert red[-1] == 255
    assert (np.diff(red) >= 0).all(), "the largest entry of an axis is positive: more is brighter"


def test_a_map_has_one_pixel_a_token_slots_side_by_side() -> None:
    colours = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(12, 3)
    with Image.open(io.BytesIO(map_png(colours, None, 2, (2, 3)))) as image:
        pixels = np.array(image)
    assert pixels.shape == (2, 6, 4)
    assert (pixels[..., 3] == 255).all()
    assert pixels[1, 2, :3].tolist() == colours[1 * 3 + 2].tolist()
    assert pixels[1, 5, :3].tolist() == colours[6 + 1 * 3 + 2].tolist(), "the same cell of the second slot"


def test_hidden_tokens_are_transparent() -> None:
    visible = np.array([0, 3])
    with Image.open(io.BytesIO(map_png(np.full((2, 3), 7, np.uint8), visible, 1, (2, 2)))) as image:
        alpha = np.array(image)[..., 3]
    assert alpha.tolist() == [[255, 0], [0, 255]]


def test_an_address_holds_the_picture() -> None:
    assert data_uri(b"\x89PNG") == "data:image/png;base64,iVBORw=="
