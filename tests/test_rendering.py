"""The pixels of one row: one decoding, the teachers' view for teachers, fresh views for a student that asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdcache.datasets import Dataset, open_dataset
from hdcache.errors import InputNotFound, StoreMismatch, UnreadableImage
from hdcache.rendering import Rendering, input_shape
from hdcache.samples import open_sample
from hdcache.schema import Preprocessing, ViewSpec
from hdcache.views import draw, fresh_view

SPEC = ViewSpec(seed=5)
STUDENT = Preprocessing(size=16)
TEACHER = Preprocessing(size=24, interpolation="bilinear")
ID = "a/00.png"


@pytest.fixture
def dataset(tmp_path: Path, make_folder: Callable[..., Path]) -> Dataset:
    return open_dataset(str(make_folder(tmp_path / "d", 2)))


def test_inputs_have_frames_only_for_clips() -> None:
    assert input_shape(STUDENT) == (3, 16, 16)
    assert input_shape(Preprocessing(size=8, frames=4)) == (3, 4, 8, 8)


def test_without_fresh_views_student_and_teachers_see_one_view(dataset: Dataset) -> None:
    found = Rendering(dataset, SPEC, STUDENT, [TEACHER]).open(ID, 3, 7, None)
    opened = open_sample(dataset, ID, SPEC, 3)
    assert len(found) == 2
    for pixels, wanted in zip(found, (STUDENT, TEACHER), strict=True):
        assert np.array_equal(pixels, opened.pixels(wanted))
        assert pixels.shape == input_shape(wanted)


@pytest.mark.parametrize("fresh", [1, 2, 3])
def test_fresh_views_differ_by_slot_and_epoch_while_the_teachers_stay(dataset: Dataset, fresh: int) -> None:
    rendering = Rendering(dataset, SPEC, STUDENT, [TEACHER], fresh)
    assert rendering.inputs == [STUDENT] * fresh + [TEACHER]
    epochs = [rendering.open(ID, 3, epoch, None) for epoch in range(3)]
    students = [pixels.tobytes() for found in epochs for pixels in found[:fresh]]
    assert len(set(students)) == 3 * fresh
    assert {found[-1].tobytes() for found in epochs} == {open_sample(dataset, ID, SPEC, 3).pixels(TEACHER).tobytes()}
    again = rendering.open(ID, 3, 1, None)
    assert all(map(np.array_equal, again, epochs[1]))


def test_a_fresh_view_belongs_to_the_epoch_and_not_to_the_teachers_view(dataset: Dataset) -> None:
    rendering = Rendering(dataset, SPEC, STUDENT, [TEACHER], 1)
    one, other = rendering.open(ID, 0, 2, None), rendering.open(ID, 1, 2, None)
    assert np.array_equal(one[0], other[0])
    assert not np.array_equal(one[1], other[1])


@settings(max_examples=100)
@given(slots=st.integers(1, 3), data=st.data())
def test_numbers_of_fresh_views_are_their_own(slots: int, data: st.DataObject) -> None:
    """Negative, so that no stored view has them, and each pair of epoch and slot has another."""
    pairs = st.tuples(st.integers(0, 1000), st.integers(0, slots - 1))
    one, other = data.draw(pairs), data.draw(pairs)
    numbers = [fresh_view(epoch, slot, slots) for epoch, slot in (one, other)]
    assert max(numbers) < 0
    assert (numbers[0] == numbers[1]) == (one == other)


def test_a_recorded_view_is_replayed_and_fresh_ones_are_drawn(dataset: Dataset) -> None:
    opened = open_sample(dataset, ID, SPEC, 0)
    row = np.array([0, 1, 2, 20, 20, 1, *opened.image.size], np.int32)
    student, teacher = Rendering(dataset, SPEC, STUDENT, [STUDENT], 1).open(ID, 0, 0, (row, opened.digest))
    replayed = open_sample(dataset, ID, SPEC, 0, (row, opened.digest))
    assert replayed.box == (1, 2, 20, 20)
    assert np.array_equal(teacher, replayed.pixels(STUDENT))
    fresh = open_sample(dataset, ID, SPEC, fresh_view(0, 0, 1))
    assert (fresh.box, fresh.flip) == draw(SPEC, ID, -1, *opened.image.size)
    assert np.array_equal(student, fresh.pixels(STUDENT))


def test_an_image_is_read_and_decoded_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many views and networks want it."""
    from hdcache import samples

    calls: list[str] = []
    decode, read = samples.decode, type(dataset).read

    def decoded(*arguments: Any) -> Any:
        calls.append("decode")
        return decode(*arguments)

    def reading(self: Dataset, sample_id: str) -> bytes:
        calls.append("read")
        return read(self, sample_id)

    monkeypatch.setattr(samples, "decode", decoded)
    monkeypatch.setattr(type(dataset), "read", reading)
    found = Rendering(dataset, SPEC, STUDENT, [TEACHER, STUDENT], 2).open(ID, 0, 0, None)
    assert len(found) == 4
    assert calls == ["read", "decode"]


def test_networks_that_differ_in_mean_and_std_alone_share_their_pixels(dataset: Dataset) -> None:
    other = Preprocessing(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    student, same, filtered = Rendering(
        dataset, SPEC, STUDENT, [other, STUDENT.model_copy(update={"interpolation": "nearest"})]
    ).open(ID, 0, 0, None)
    assert student is same
    assert not np.array_equal(student, filtered)


def test_faults_of_a_sample_reach_the_caller(dataset: Dataset, tmp_path: Path) -> None:
    rendering = Rendering(dataset, SPEC, STUDENT, fresh=1)
    opened = open_sample(dataset, ID, SPEC, 0)
    row = np.array([0, *opened.box, 0, *opened.image.size], np.int32)
    with pytest.raises(StoreMismatch, match=r"^a/00\.png: the image changed since its view was recorded"):
        rendering.open(ID, 0, 0, (row, bytes(32)))
    (tmp_path / "d/a/00.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=r"^a/00\.png: "):
        rendering.open(ID, 0, 0, None)
    with pytest.raises(InputNotFound, match=r"no sample 'b/99\.png'"):
        rendering.open("b/99.png", 0, 0, None)
