"""Masks: a function of what they are for, exact in number, and nothing lost in their packed bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hdcache.errors import UsageError
from hdcache.masks import (
    draw_among,
    draw_visible,
    first_sorted,
    hidden_count,
    mask_facts,
    mask_text,
    over_slots,
    pack_visible,
    parse_mask,
    unpack_visible,
    visible_count,
)
from hdcache.schema import MaskSpec, Preprocessing, TeacherCard

IDS = ["a/x.png", "b/ünï.png", "c"]

specs = st.builds(
    MaskSpec,
    kind=st.sampled_from(["random", "tube"]),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)


def fits(spec: MaskSpec, cells: int, slots: int) -> bool:
    """Whether the ratio hides something and leaves something to see."""
    count = cells if spec.kind == "tube" else cells * slots
    return 0 < int(spec.ratio * count + 1e-9) < count


@pytest.mark.parametrize(
    ("text", "clips", "expected"),
    [
        ("0.75", False, MaskSpec(kind="random", ratio=0.75, seed=3)),
        ("0.75", True, MaskSpec(kind="tube", ratio=0.75, seed=3)),
        ("random:0.9", True, MaskSpec(kind="random", ratio=0.9, seed=3)),
        ("tube:.5", False, MaskSpec(kind="tube", ratio=0.5, seed=3)),
    ],
)
def test_a_bare_ratio_is_tube_for_clips_and_random_for_images(text: str, clips: bool, expected: MaskSpec) -> None:
    assert parse_mask(text, seed=3, clips=clips) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tub:0.5", r"^mask 'tub:0.5': unknown kind 'tub'; did you mean 'tube'"),
        ("block:0.5", r"^mask 'block:0.5': unknown kind 'block'; choose from: random, tube"),
        (":0.5", r"^mask ':0.5': unknown kind ''"),
        ("half", r"^mask 'half': 'half' is no number; write a ratio such as random:0.75$"),
        ("tube:", r"^mask 'tube:': '' is no number; write a ratio such as tube:0.75$"),
        ("0", r"^mask '0': the ratio must lie between 0 and 1, for example random:0.75$"),
        ("tube:1", r"must lie between 0 and 1, for example tube:0.75$"),
        ("75", r"must lie between 0 and 1"),
        ("-0.5", r"must lie between 0 and 1"),
        ("nan", r"must lie between 0 and 1"),
        ("random:inf", r"must lie between 0 and 1"),
    ],
)
def test_masks_that_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_mask(text)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^mask seed -1 must be at least 0$"):
        parse_mask("0.5", seed=-1)


def test_a_teacher_s_mask_is_told_with_what_it_leaves() -> None:
    card = TeacherCard(
        architecture="vit", weights="0", preprocessing=Preprocessing(size=64, frames=4), patch_size=16, grid=(4, 4),
        slots=2, prefix_tokens=0, class_token=False, width=8, depth=1, heads=1, precision="fp32",
        mask=MaskSpec(kind="tube", ratio=0.7, seed=3),
    )  # fmt: skip
    facts = mask_facts(card)
    assert facts == {"kind": "tube", "ratio": 0.7, "seed": 3, "visible": 10, "tokens": 32}
    assert mask_text(facts) == "tube mask of ratio 0.7, seed 3: sees 10 of 32 patch tokens"
    assert mask_facts(card.model_copy(update={"mask": None})) is None


@pytest.mark.parametrize(
    ("cells", "ratio", "hidden"), [(196, 0.75, 147), (196, 0.9, 176), (100, 0.29, 29), (10, 0.7, 7), (16, 0.99, 15)]
)
def test_hidden_cells_are_rounded_down_whatever_floating_point_says(cells: int, ratio: float, hidden: int) -> None:
    """0.29 * 100 is 28.999999999999996: still 29 of 100 cells."""
    assert hidden_count(cells, ratio) == hidden


@pytest.mark.parametrize(
    ("cells", "ratio", "message"),
    [
        (
            4,
            0.2,
            r"^mask ratio 0.2 of 4 cells hides 0 and leaves 4 visible; at least one must be hidden and one visible",
        ),
        (1, 0.5, r"^mask ratio 0.5 of 1 cell hides 0 and leaves 1 visible"),
        (1, 1.0, r"hides 1 and leaves 0 visible; .*: choose another ratio$"),
    ],
)
def test_ratios_that_hide_nothing_or_all_are_refused(cells: int, ratio: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hidden_count(cells, ratio)
    with pytest.raises(UsageError, match=r"^objective\.mask_ratio 1 of 3 cells hides 3"):
        hidden_count(3, 1.0, "objective.mask_ratio")


@settings(max_examples=150)
@given(spec=specs, cells=st.integers(2, 40), slots=st.integers(1, 4), view=st.integers(-3, 3))
def test_a_mask_is_exact_in_number_ascending_and_inside(spec: MaskSpec, cells: int, slots: int, view: int) -> None:
    assume(fits(spec, cells, slots))
    visible = draw_visible(spec, IDS, view, cells, slots)
    assert visible.dtype == np.int64
    assert visible.shape == (len(IDS), visible_count(spec, cells, slots))
    assert (np.diff(visible, axis=1) > 0).all()
    assert visible.min() >= 0
    assert visible.max() < cells * slots
    assert visible.shape[1] >= math.floor((1 - spec.ratio) * cells) * slots


@settings(max_examples=60)
@given(spec=specs, cells=st.integers(8, 40), slots=st.integers(1, 3))
def test_a_mask_is_a_function_of_seed_id_view_and_purpose(spec: MaskSpec, cells: int, slots: int) -> None:
    """The batch that a sample comes in does not matter; each part of the key does."""
    assume(fits(spec, cells, slots))
    ids = [f"{number}" for number in range(40)]
    whole = draw_visible(spec, ids, 1, cells, slots)
    assert np.array_equal(whole[5:7], draw_visible(spec, ids[5:7], 1, cells, slots))
    assert np.array_equal(whole[::-1], draw_visible(spec, ids[::-1], 1, cells, slots))
    others = [
        draw_visible(spec, ids, 2, cells, slots),
        draw_visible(spec, ids, 1, cells, slots, "another purpose"),
        draw_visible(spec.model_copy(update={"seed": spec.seed + 1}), ids, 1, cells, slots),
    ]
    assert all(not np.array_equal(whole, other) for other in others)
    assert len({row.tobytes() for row in whole}) > 1


@settings(max_examples=60)
@given(cells=st.integers(2, 30), slots=st.integers(2, 5), ratio=st.floats(0.05, 0.95))
def test_a_tube_shows_the_same_cells_in_every_slot(cells: int, slots: int, ratio: float) -> None:
    spec = MaskSpec(kind="tube", ratio=ratio)
    assume(fits(spec, cells, slots))
    visible = draw_visible(spec, IDS, 0, cells, slots).reshape(len(IDS), slots, -1)
    for slot in range(slots):
        assert np.array_equal(visible[:, slot], visible[:, 0] + slot * cells)
    still = draw_visible(spec, IDS, 0, cells)
    assert np.array_equal(over_slots(still, cells, slots), visible.reshape(len(IDS), -1))


def test_a_random_mask_of_a_clip_differs_between_slots() -> None:
    visible = draw_visible(MaskSpec(kind="random", ratio=0.5), IDS, 0, 16, 4)
    shown = [{int(token) % 16 for token in visible[0] if token // 16 == slot} for slot in range(4)]
    assert len({frozenset(cells) for cells in shown}) == 4


def test_every_token_is_shown_equally_often() -> None:
    """2,000 draws of 4 of 16 tokens: each is shown 500 times, give or take 5 standard deviations."""
    visible = draw_visible(MaskSpec(kind="random", ratio=0.75), [str(i) for i in range(2000)], 0, 16)
    shown = np.bincount(visible.ravel(), minlength=16)
    assert abs(shown - 500).max() < 5 * math.sqrt(2000 * 0.25 * 0.75)


@settings(max_examples=80)
@given(seen=st.integers(1, 30), share=st.floats(0, 1), epoch=st.integers(0, 3))
def test_a_nested_mask_takes_some_of_the_columns_it_is_given(seen: int, share: float, epoch: int) -> None:
    """Positions among what the teacher sees, so that what they pick lies inside it."""
    spec = MaskSpec(kind="random", ratio=1 - seen / 40)
    assume(fits(spec, 40, 1))
    outer = draw_visible(spec, IDS, 0, 40)
    count = max(1, round(share * outer.shape[1]))
    keys = [(7, name, epoch, "student mask") for name in IDS]
    places = draw_among(outer, count, keys)
    assert places.dtype == np.int64
    assert places.shape == (len(IDS), count)
    assert (np.diff(places, axis=1) > 0).all()
    inner = np.take_along_axis(outer, places, axis=1)
    assert (np.diff(inner, axis=1) > 0).all()
    assert all(set(few) <= set(many) for few, many in zip(inner.tolist(), outer.tolist(), strict=True))
    assert np.array_equal(places, draw_among(outer, count, keys))
    assert np.array_equal(places[1:], draw_among(outer[1:], count, keys[1:]))


def test_ties_are_broken_by_position() -> None:
    assert first_sorted(np.zeros((2, 5)), 3).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert first_sorted(np.array([[3.0, 1.0, 2.0]]), 2).tolist() == [[1, 2]]


@settings(max_examples=100)
@given(data=st.data(), tokens=st.integers(1, 70), rows=st.integers(0, 4))
def test_packed_bits_give_the_mask_back(data: st.DataObject, tokens: int, rows: int) -> None:
    count = data.draw(st.integers(1, tokens))
    chosen = [data.draw(st.permutations(range(tokens)))[:count] for _ in range(rows)]
    visible = np.array([sorted(row) for row in chosen], np.int64).reshape(rows, count)
    packed = pack_visible(visible, tokens)
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, -(-tokens // 8))
    again = unpack_visible(packed, tokens, count)
    assert again.dtype == np.int64
    assert np.array_equal(again, visible)


def test_token_0_is_the_highest_bit_and_the_tail_is_empty() -> None:
    assert pack_visible(np.array([[0, 9]]), 10).tolist() == [[0b10000000, 0b01000000]]


@pytest.mark.parametrize(("count", "found"), [(1, 2), (3, 2)])
def test_a_mask_of_another_number_of_tokens_is_refused(count: int, found: int) -> None:
    packed = pack_visible(np.array([[0, 1, 2][:count], [3, 4, 5][:count]]), 10)
    packed[1] = pack_visible(np.array([[3, 4]]), 10)
    with pytest.raises(ValueError, match=rf"^a mask of {found} visible tokens where {count} are expected \(row 1\)$"):
        unpack_visible(packed, 10, count)


def test_bits_beyond_the_last_token_are_no_tokens() -> None:
    packed = pack_visible(np.array([[0, 1]]), 10)
    packed[0, 1] |= 0b00111111
    assert unpack_visible(packed, 10, 2).tolist() == [[0, 1]]


@settings(max_examples=80)
@given(spec=specs, cells=st.integers(2, 40), slots=st.integers(1, 4))
def test_the_count_is_known_before_a_mask_is_drawn(spec: MaskSpec, cells: int, slots: int) -> None:
    if not fits(spec, cells, slots):
        with pytest.raises(UsageError, match="choose another ratio"):
            visible_count(spec, cells, slots)
        with pytest.raises(UsageError, match="choose another ratio"):
            draw_visible(spec, IDS, 0, cells, slots)
        return
    assert draw_visible(spec, IDS, 0, cells, slots).shape[1] == visible_count(spec, cells, slots)
    assert draw_visible(spec, [], 0, cells, slots).shape == (0, visible_count(spec, cells, slots))
