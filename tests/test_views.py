"""Views: boxes inside the image, pure functions of (seed, id, view), pixels that come from the box alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from hdcache.errors import UnreadableImage, UsageError
from hdcache.schema import Preprocessing, ViewSpec
from hdcache.views import (
    PRESETS,
    center_box,
    check_input,
    draw,
    draw_frames,
    parse_views,
    render,
    row_order,
    vary,
    views_text,
)

sides = st.one_of(st.integers(1, 12), st.integers(1, 20_000))
shares = st.floats(1e-6, 1)
ratios = st.floats(0.001, 1000)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=300)
@given(
    width=sides,
    height=sides,
    scale=st.tuples(shares, shares).map(sorted),
    ratio=st.tuples(ratios, ratios).map(sorted),
    kind=st.sampled_from(["random-resized-crop", "multi-scale-crop", "center-crop", "resize"]),
    view=st.integers(0, 5),
    name=st.text(max_size=6),
)
def test_every_box_lies_inside_its_image(
    width: int, height: int, scale: list[float], ratio: list[float], kind: str, view: int, name: str
) -> None:
    spec = ViewSpec.model_validate({"kind": kind, "scale": scale, "ratio": ratio, "seed": 7})
    (left, top, box_width, box_height), flip = draw(spec, name, view, width, height)
    assert left >= 0
    assert top >= 0
    assert 1 <= box_width <= width - left
    assert 1 <= box_height <= height - top
    assert draw(spec, name, view, width, height) == ((left, top, box_width, box_height), flip)


def test_a_view_is_a_pure_function_of_seed_id_and_view() -> None:
    """Each of the three changes the box, and nothing else does."""
    spec = parse_views("mae", seed=1)
    box = draw(spec, "a", 0, 640, 480)
    for name in "bcd":
        draw(spec, name, 0, 640, 480)
    assert draw(spec, "a", 0, 640, 480) == box
    others = [draw(spec, "b", 0, 640, 480), draw(spec, "a", 1, 640, 480), draw(parse_views("mae", 2), "a", 0, 640, 480)]
    assert all(other[0] != box[0] for other in others)


def test_recorded_views_that_no_release_may_change() -> None:
    """Boxes that stores of format 1 hold."""
    assert draw(parse_views("mae"), "a.png", 0, 640, 480) == ((297, 80, 320, 357), True)
    assert row_order(6, 0, 1).tolist() == [3, 0, 5, 1, 4, 2]
    clip = parse_views("videomae")
    assert draw(clip, "a.mp4", 0, 640, 480) == ((0, 0, 420, 480), False)
    assert draw_frames(clip, "a.mp4", 0, 300)[0] == 11


def test_multi_scale_boxes_are_those_of_the_released_code() -> None:
    """GroupMultiScaleCrop of VideoMAE and AMD, spelled out: 10 pairs of sides, 13 places each, all equally likely."""
    sides = [480, 420, 360, 316]
    expected = set()
    for i, across in enumerate(sides):
        for j, down in enumerate(sides):
            if abs(i - j) <= 1:
                right, below = (640 - across) // 4, (480 - down) // 4
                corners = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2)]
                more = [(0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
                expected |= {(x * right, y * below, across, down) for x, y in corners + more}
    spec = parse_views("videomae")
    drawn = Counter(draw(spec, str(number), 0, 640, 480) for number in range(13_000))
    assert {box for box, flip in drawn} == expected
    assert not any(flip for _, flip in drawn)
    shapes = Counter(box[2:] for box, _ in drawn.elements())
    assert len(shapes) == 10
    # 1,300 of each are expected; 5 sigma.
    assert all(abs(count - 1300) < 5 * (1300 * 0.9) ** 0.5 for count in shapes.values())


@settings(max_examples=200)
@given(
    frames=st.integers(1, 32),
    stride=st.integers(1, 8),
    spare=st.integers(0, 300),
    kind=st.sampled_from(["random-resized-crop", "multi-scale-crop", "center-crop", "resize"]),
    view=st.integers(-3, 3),
)
def test_frames_of_a_clip_lie_inside_the_video(frames: int, stride: int, spare: int, kind: str, view: int) -> None:
    spec = ViewSpec.model_validate({"kind": kind, "frames": frames, "stride": stride})
    span = (frames - 1) * stride + 1
    found = draw_frames(spec, "a", view, span + spare)
    assert found == tuple(range(found[0], found[0] + span, stride))
    assert len(found) == frames
    assert 0 <= found[0] <= spare
    assert draw_frames(spec, "a", view, span + spare) == found
    if kind in ("center-crop", "resize"):
        assert found[0] == spare // 2


def test_starts_of_clips_are_uniform_and_independent_of_the_box() -> None:
    spec = parse_views("videomae?frames=4&stride=2")
    starts = Counter(draw_frames(spec, str(number), 0, 16)[0] for number in range(5000))
    assert starts.keys() == set(range(10))
    assert all(abs(count - 500) < 5 * 450**0.5 for count in starts.values())
    names = [str(number) for number in range(5000) if draw_frames(spec, str(number), 0, 16)[0] == 0]
    shares = Counter(draw(spec, name, 0, 640, 480)[0][2:] for name in names)
    assert len(shares) == 10, "every shape of box occurs beside one start"
    for changed in (
        draw_frames(spec, "a", 1, 10_000),
        draw_frames(spec.model_copy(update={"seed": 1}), "a", 0, 10_000),
    ):
        assert changed != draw_frames(spec, "a", 0, 10_000)


@pytest.mark.parametrize(
    ("views", "count", "advice"),
    [
        (
            "videomae",
            60,
            "v: 60 frames, but a clip of 16 frames at stride 4 spans 61; use a smaller stride (--views "
            "'videomae?stride=3', --stride 3 in knn-eval)",
        ),
        (
            "videomae",
            16,
            "v: 16 frames, but a clip of 16 frames at stride 4 spans 61; use a smaller stride (--views "
            "'videomae?stride=1', --stride 1 in knn-eval)",
        ),
        (
            "videomae",
            15,
            "v: 15 frames, but a clip of 16 frames at stride 4 spans 61; leave the video out, or use networks of 15 frames "
            "or fewer at stride 1 (--views 'videomae?frames=15&stride=1')",
        ),
        (
            "videomae-ssv2?frames=8&flip=0.5",
            3,
            "v: 3 frames, but a clip of 8 frames at stride 2 spans 15; leave the video out, or use networks of 3 frames "
            "or fewer at stride 1 (--views 'videomae?flip=0.5&frames=3&stride=1')",
        ),
        (
            "clip-center?frames=2&stride=9",
            9,
            "v: 9 frames, but a clip of 2 frames at stride 9 spans 10; use a smaller stride (--views "
            "'clip-center?frames=2&stride=8', --stride 8 in knn-eval)",
        ),
    ],
)
def test_a_video_shorter_than_the_clip_names_what_would_fit(views: str, count: int, advice: str) -> None:
    spec = parse_views(views)
    with pytest.raises(UnreadableImage) as refused:
        draw_frames(spec, "v", 0, count)
    assert str(refused.value) == advice
    fitting = re.search(r"--views '(.*?)'", advice)
    assert fitting
    assert draw_frames(parse_views(fitting[1]), "v", 0, count)


@given(
    frames=st.integers(2, 64),
    stride=st.integers(1, 9),
    count=st.integers(1, 600),
    preset=st.sampled_from(["videomae", "videomae-ssv2", "clip-center", "gentle", "resize"]),
)
def test_the_views_of_the_advice_fit_at_once(frames: int, stride: int, count: int, preset: str) -> None:
    """No second round: what the message proposes can be pasted, and its clip fits into that video."""
    spec = parse_views(f"{preset}?frames={frames}&stride={stride}")
    try:
        draw_frames(spec, "v", 0, count)
    except UnreadableImage as refused:
        found = re.search(r"--views '(.*?)'", str(refused))
        assert found
        fitting = parse_views(found[1])
        assert draw_frames(fitting, "v", 0, count)
        assert fitting.frames == min(frames, count)
        assert fitting.model_copy(update={"frames": frames, "stride": stride}) == spec


@given(
    kind=st.sampled_from(["random-resized-crop", "multi-scale-crop", "center-crop", "resize"]),
    scale=st.tuples(shares, shares).map(sorted),
    flip=st.floats(0, 1),
    frames=st.integers(1, 4096),
    stride=st.integers(1, 4096),
    seed=st.integers(),
)
def test_views_of_clips_have_a_text_that_reads_back(
    kind: str, scale: list[float], flip: float, frames: int, stride: int, seed: int
) -> None:
    fields = {"kind": kind, "scale": scale, "flip": flip, "frames": frames, "stride": stride, "seed": seed}
    spec = ViewSpec.model_validate(fields)
    assert parse_views(views_text(spec)) == spec


def test_the_text_of_views_is_the_shortest() -> None:
    for text in ("videomae", "videomae-ssv2", "clip-center", "clip-center?fraction=1", "videomae?frames=8&stride=1"):
        assert views_text(parse_views(text)) == text
    assert views_text(parse_views("videomae?stride=2&frames=8&seed=3")) == "videomae-ssv2?frames=8&seed=3"


def test_area_and_ratio_are_drawn_from_their_ranges() -> None:
    """Where every box fits, areas are uniform and log-ratios uniform (4 sigma), up to rounding to pixels."""
    spec = ViewSpec(scale=(0.2, 0.4), ratio=(0.8, 1.25))
    boxes = np.array([draw(spec, str(i), 0, 1000, 1000)[0] for i in range(1000)], float)
    area, ratio = boxes[:, 2] * boxes[:, 3] / 1e6, np.log(boxes[:, 2] / boxes[:, 3])
    assert 0.198 < area.min() < 0.205 < 0.395 < area.max() < 0.402
    assert abs(area.mean() - 0.3) < 4 * 0.2 / 12**0.5 / 1000**0.5
    assert np.abs(ratio).max() < np.log(1.25) + 0.01
    assert abs(ratio.mean()) < 4 * 2 * np.log(1.25) / 12**0.5 / 1000**0.5
    free = 1000 - boxes[:, 2]
    assert abs((boxes[:, 0] / free).mean() - 0.5) < 4 / 12**0.5 / 1000**0.5


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_flips(share: float) -> None:
    flips = np.array([draw(ViewSpec(flip=share), str(i), 0, 50, 50)[1] for i in range(1000)])
    assert abs(flips.mean() - share) <= 5 * (share * (1 - share) / 1000) ** 0.5


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (495, 0, 10, 10)), ((10, 1000), (0, 495, 10, 10))])
def test_a_box_that_never_fits_becomes_the_largest_centred_one(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert draw(ViewSpec(scale=(1, 1), ratio=(1, 1)), "a", 0, *size)[0] == box


def test_center_box() -> None:
    assert center_box(640, 480, 0.5) == (200, 120, 240, 240)
    assert center_box(1, 1, 0.1) == (0, 0, 1, 1)
    assert center_box(5, 9, 1.0) == (0, 2, 5, 5)


@settings(max_examples=40)
@given(data=st.data(), size=st.integers(1, 24), filter_=st.sampled_from(["bicubic", "bilinear", "lanczos", "nearest"]))
def test_render_reads_the_box_alone(data: st.DataObject, size: int, filter_: str) -> None:
    """Cropping by hand and resizing with Pillow gives the same pixels, and no pixel outside the box matters."""
    width, height = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (left, top, data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top)))
    image = noise(width, height)
    inside = np.asarray(image)[top : top + box[3], left : left + box[2]]
    expected = np.asarray(Image.fromarray(inside).resize((size, size), Image.Resampling[filter_.upper()]))
    found = np.asarray(render(image, box, False, size, filter_))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.asarray(render(image, box, True, size, filter_)), expected[:, ::-1])
    other = np.asarray(noise(width, height, 1)).copy()
    other[top : top + box[3], left : left + box[2]] = inside
    np.testing.assert_array_equal(np.asarray(render(Image.fromarray(other), box, False, size, filter_)), found)


def test_an_image_of_one_pixel() -> None:
    image = Image.new("RGB", (1, 1), (1, 2, 3))
    box, flip = draw(parse_views("supervised"), "dot", 0, 1, 1)
    assert box == (0, 0, 1, 1)
    assert (np.asarray(render(image, box, flip, 4)) == (1, 2, 3)).all()


@pytest.mark.parametrize("box", [(-1, 0, 2, 2), (0, -1, 2, 2), (0, 0, 0, 2), (0, 0, 2, 0), (3, 0, 2, 2), (0, 3, 2, 2)])
def test_a_box_outside_the_image_is_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="does not lie inside the 4x4 image"):
        render(noise(4, 4), box, False, 2)


def test_presets_and_their_options() -> None:
    assert parse_views("mae", 5) == PRESETS["mae"].model_copy(update={"seed": 5})
    asked = parse_views("gentle?flip=0&scale=0.7,1", 2)
    assert asked == PRESETS["gentle"].model_copy(update={"seed": 2, "flip": 0.0, "scale": (0.7, 1.0)})
    clip = parse_views("videomae?stride=2&frames=8")
    assert (clip.kind, clip.flip, clip.frames, clip.stride) == ("multi-scale-crop", 0.0, 8, 2)
    assert parse_views("videomae-ssv2") == PRESETS["videomae"].model_copy(update={"stride": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mea", "unknown views 'mea'; did you mean 'mae'"),
        ("zzz", "unknown views 'zzz'; choose from: center, clip-center, gentle, mae, resize"),
        ("mae?flop=1", r"views 'mae\?flop=1': unknown option 'flop'; did you mean 'flip'"),
        ("mae?kind=resize", "unknown option 'kind'"),
        ("mae?flip", r"views 'mae\?flip': flip: .*valid number"),
        ("mae?scale=0.9,0.1", r"must satisfy 0 < low <= high <= 1"),
        ("mae?flip=nan", "flip: Input should be"),
    ],
)
def test_view_options_that_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_views(text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scale", (0, 1), r"must satisfy 0 < low <= high <= 1"),
        ("scale", (0.5, 0.2), r"must satisfy 0 < low <= high <= 1"),
        ("scale", (0.5, 1.1), r"must satisfy 0 < low <= high <= 1"),
        ("ratio", (2, 1), r"must satisfy 0.001 <= low <= high <= 1000"),
        ("ratio", (1e-320, 1e308), r"must satisfy 0.001 <= low <= high <= 1000"),
        ("flip", 1.5, "less than or equal to 1"),
        ("fraction", 0, "greater than 0"),
        ("scale", (float("nan"), 1), "finite number"),
    ],
)
def test_specs_that_cannot_be_meant(field: str, value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViewSpec.model_validate({field: value})


def test_row_order_is_a_permutation_of_its_own_for_each_view() -> None:
    orders = [row_order(50, 3, view) for view in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(50))
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["random-resized-crop", "multi-scale-crop", "center-crop", "resize"])
def test_views_vary_where_two_of_them_differ(kind: Any, flip: float) -> None:
    spec = ViewSpec(kind=kind, flip=flip)
    assert vary(spec) == (len({draw(spec, "a", view, 60, 40) for view in range(20)}) > 1)


def test_the_advice_for_another_number_of_frames_knows_whether_there_is_a_store() -> None:
    """Views of a store are fixed; without one they are simply chosen."""
    views, network = parse_views("videomae"), Preprocessing(size=16, frames=4)
    with pytest.raises(UsageError) as bare:
        check_input(views, network, "the student")
    assert str(bare.value).endswith("; use --views 'videomae?frames=4', or a network of 16 frames")
    # What else the user asked of the views stays.
    for asked, advised in (
        ("videomae-ssv2", "videomae-ssv2?frames=4"),
        ("clip-center?fraction=1", "clip-center?fraction=1&frames=4"),
        ("videomae?stride=1", "videomae?frames=4&stride=1"),
    ):
        with pytest.raises(UsageError) as kept:
            check_input(parse_views(asked), network, "the student")
        assert f"; use --views '{advised}', or a network of 16 frames" in str(kept.value)
    with pytest.raises(
        UsageError, match=r"of 16 frames \(the views of x\.hdc are fixed: extract to another --store\)$"
    ):
        check_input(views, network, "the student", Path("x.hdc"))
