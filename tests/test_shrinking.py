"""Shrunk images: which are, to what, and that they are another data set than the whole ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdcache.datasets import open_dataset
from hdcache.errors import UnreadableImage, UsageError
from hdcache.pixels import decode
from hdcache.schema import DatasetCard
from hdcache.shrinking import Shrunk, parse_pixels, shrink, shrunk


def smooth(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("size", "expected"), [((400, 300), (85, 64)), ((300, 400), (64, 85)), ((65, 65), (64, 64)), ((1000, 65), (985, 64))])  # fmt: skip
def test_the_shorter_side_is_the_one_asked_for(size: tuple[int, int], expected: tuple[int, int]) -> None:
    source = png(smooth(*size))
    found = shrink(source, 64)
    assert isinstance(found, bytes)
    image = Image.open(io.BytesIO(found))
    assert (image.format, image.size) == ("JPEG", expected)
    exact = smooth(*size).resize(expected, Image.Resampling.LANCZOS)
    error = np.abs(np.asarray(image).astype(int) - np.asarray(exact)).mean()
    assert error < 1.5, "levels of 256, on average"


def test_smaller_images_and_arrays_stay_what_they_are() -> None:
    source = png(smooth(64, 200))
    assert shrink(source, 64) is source
    array = np.zeros((64, 70, 1), np.uint8)
    assert shrink(array, 64) is array
    assert isinstance(shrink(np.zeros((65, 70), np.uint8), 64), bytes)


def test_colours_are_not_subsampled() -> None:
    """Vertical lines of one pixel in pure red and blue: half the chroma would blend them."""
    lines = np.zeros((80, 80, 3), np.uint8)
    lines[:, ::2, 0] = lines[:, 1::2, 2] = 255
    big = Image.fromarray(lines).resize((160, 160), Image.Resampling.NEAREST)
    found = shrink(png(big), 80)
    seen = np.asarray(decode(found)).astype(int)
    exact = np.asarray(big.resize((80, 80), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(seen - exact).mean() < 3


def test_orientation_and_transparency_are_applied_before() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    smooth(200, 100).save(file, "JPEG", exif=exif)
    assert decode(shrink(file.getvalue(), 50)).size == (50, 100)
    clear = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    assert np.asarray(decode(shrink(png(clear), 50))).min() == 255


def test_what_jpeg_cannot_hold_is_a_png() -> None:
    found = shrink(png(Image.new("L", (70_000, 17), 7)), 16)
    assert isinstance(found, bytes)
    image = Image.open(io.BytesIO(found))
    assert (image.format, image.size) == ("PNG", (65_882, 16))


def test_a_shrunk_data_set_is_another_one(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    whole = open_dataset(str(make_folder(tmp_path / "d", 6)))
    small = shrunk(whole, 16)
    assert small.card == whole.card.model_copy(update={"fingerprint": small.card.fingerprint, "shorter_side": 16})
    assert len({whole.card.fingerprint, small.card.fingerprint, shrunk(whole, 17).card.fingerprint}) == 3
    assert small.ids == whole.ids
    assert small.labels is whole.labels
    assert decode(small.read(small.ids[0])).size == (18, 16)
    assert shrunk(small, 16) is small
    assert shrunk(whole, None) is whole
    (tmp_path / "d/a/00.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        small.read("a/00.png")


def test_the_card_spells_the_side_only_where_there_is_one(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    """Stores of earlier releases keep their bytes and identities."""
    card = open_dataset(str(make_folder(tmp_path / "d", 2))).card
    assert b"shorter_side" not in card.canonical()
    small = card.model_copy(update={"shorter_side": 16})
    assert DatasetCard.parse(small.model_dump(mode="json"), "x") == small


@pytest.mark.parametrize("text", ["0", "15", "8193", "-256", "256px", "all", "²", ""])
def test_what_is_no_side_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write 'source' to keep the samples as they are, or the shorter side"):
        parse_pixels(text)


def test_what_is_asked_for() -> None:
    assert [parse_pixels(text) for text in (None, "source", "256", 16)] == [None, None, 256, 16]


def test_videos_are_not_shrunk(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    whole = open_dataset(str(make_folder(tmp_path / "d", 2)))
    videos = Shrunk(whole, 16)
    object.__setattr__(videos, "card", whole.card.model_copy(update={"kind": "video"}))
    with pytest.raises(UsageError, match="keep them as they are: --pixels source"):
        shrunk(videos, 32)
