"""Samples: a view drawn afresh or replayed from recorded numbers, of the image it was recorded from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdcache.datasets import Dataset, open_dataset
from hdcache.errors import InputNotFound, StoreMismatch, UnreadableImage
from hdcache.pixels import digest
from hdcache.samples import OpenedSample, Recorded, check_clip, open_sample
from hdcache.schema import Preprocessing, ViewSpec
from hdcache.views import draw, render

SPEC = ViewSpec(seed=5)


def picture(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data" / "a"
    root.mkdir(parents=True)
    (root / "x.png").write_bytes(picture())
    (root / "bad.png").write_bytes(b"no image")
    return open_dataset(str(root.parent))


def recorded(sample: OpenedSample) -> Recorded:
    return np.array([0, *sample.box, int(sample.flip), *sample.image.size], np.int32), sample.digest


def test_a_fresh_view_is_the_drawn_one(dataset: Dataset) -> None:
    sample = open_sample(dataset, "a/x.png", SPEC, 3)
    assert (sample.box, sample.flip) == draw(SPEC, "a/x.png", 3, 40, 30)
    assert sample.digest == digest(picture())
    pixels = sample.pixels(Preprocessing(size=16, interpolation="bilinear"))
    assert pixels.shape == (3, 16, 16)
    assert pixels.flags.c_contiguous
    expected = np.asarray(render(sample.image, sample.box, sample.flip, 16, "bilinear"))
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), expected)


def test_a_recorded_view_is_replayed_whatever_would_be_drawn(dataset: Dataset) -> None:
    """The numbers win over the spec, so views outlive a change of how they are drawn."""
    row, digest_ = recorded(open_sample(dataset, "a/x.png", SPEC, 0))
    row[1:6] = [1, 2, 30, 20, 1]
    found = open_sample(dataset, "a/x.png", ViewSpec(seed=6), 1, (row, digest_))
    assert (found.box, found.flip) == ((1, 2, 30, 20), True)
    assert all(type(number) is int for number in found.box)


def test_another_image_under_the_same_name_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    row, digest_ = recorded(open_sample(dataset, "a/x.png", SPEC, 0))
    other = row.copy()
    other[6] += 1
    with pytest.raises(StoreMismatch, match=r"a/x\.png: the image changed since its view was recorded"):
        open_sample(dataset, "a/x.png", SPEC, 0, (other, digest_))
    (tmp_path / "data/a/x.png").write_bytes(picture(1))
    with pytest.raises(StoreMismatch, match=r"was [0-9a-f]{12}\.\.\.\); restore it, or extract to a new store"):
        open_sample(dataset, "a/x.png", SPEC, 0, (row, digest_))


def test_what_cannot_be_read_names_the_sample(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"^a/bad\.png: "):
        open_sample(dataset, "a/bad.png", SPEC, 0)
    (tmp_path / "data/a/x.png").unlink()
    with pytest.raises(UnreadableImage, match=r"^a/x\.png: .*No such file"):
        open_sample(dataset, "a/x.png", SPEC, 0)


def test_a_sample_of_another_data_set_is_not_a_broken_image(dataset: Dataset) -> None:
    """It must stop the work, not become one failed row after another."""
    with pytest.raises(InputNotFound, match=r"no sample 'b/y\.png'; is this the data set the id came from\?"):
        open_sample(dataset, "b/y.png", SPEC, 0)


def test_only_the_bytes_of_a_file_can_be_a_clip(dataset: Dataset) -> None:
    """Videos themselves are in test_video.py and test_run_videos.py."""
    clip = SPEC.model_copy(update={"frames": 4})
    with pytest.raises(UnreadableImage, match=r"^a/bad\.png: not a video that can be read"):
        check_clip(dataset, "a/bad.png", clip)
    with pytest.raises(InputNotFound, match=r"no sample 'b/y\.png'"):
        check_clip(dataset, "b/y.png", clip)
    pixels: Any = type("Array", (), {"read": staticmethod(lambda name: np.zeros((4, 4, 3), np.uint8))})
    with pytest.raises(UnreadableImage, match=r"^0: an array of pixels, not a video$"):
        check_clip(pixels, "0", clip)
    with pytest.raises(UnreadableImage, match=r"^0: an array of pixels, not a video$"):
        open_sample(pixels, "0", clip, 0)
