"""Which teacher AMD is to store again, under which name; and which student has a teacher's tokens."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from hdcache.backbones import create_vit
from hdcache.distill.amd_teachers import check_layouts, free_name, mask_name, same_network
from hdcache.errors import UsageError
from hdcache.records import check_name
from hdcache.schema import MaskSpec, Preprocessing, TeacherCard

HALF = MaskSpec(kind="random", ratio=0.5)


def vit(**arguments: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    return create_vit("vit_tiny_patch16_224", small | arguments)


def card(
    mask: MaskSpec | None = None, weights: str = "0", frames: int | None = None, slots: int = 1, size: int = 16
) -> TeacherCard:
    return TeacherCard(
        architecture="vit_tiny_patch16_224",
        weights=weights,
        preprocessing=Preprocessing(size=size, frames=frames),
        patch_size=4,
        grid=(size // 4, size // 4),
        slots=slots,
        prefix_tokens=0 if frames else 1,
        class_token=not frames,
        width=32,
        depth=4,
        heads=4,
        mask=mask,
        precision="fp32",
    )


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ({}, None),
        ({"b": card()}, "b"),
        # A teacher that has a mask already is the network that is meant; the others serve other losses.
        ({"a": card(), "b": card(HALF, "1"), "c": card(HALF, "1")}, "b"),
        ({"a": card(HALF, "0"), "b": card(HALF, "1")}, None),
        ({"a": card(weights="0"), "b": card(weights="1")}, None),
        ({"a": card(weights="1"), "b": card(weights="1")}, "a"),
    ],
)
def test_the_network_that_is_meant(cards: dict[str, TeacherCard], expected: str | None) -> None:
    assert same_network(cards) == expected


def test_a_suggested_name_is_free_and_tells_the_ratio() -> None:
    assert free_name("mae-l", 0.75, {"mae-l": card()}) == "mae-l-75"
    assert free_name("mae", 0.125, {}) == check_name("mae-12.5", "teacher")
    taken = {name: card() for name in ("mae", "mae-75", "mae-75-2")}
    assert free_name("mae", 0.75, taken) == "mae-75-3"
    assert free_name("mae", 0.9, taken) == "mae-90"


def test_masks_are_named_as_on_the_command_line() -> None:
    assert (mask_name(HALF), mask_name(None)) == ("random:0.5", "no mask")


@pytest.mark.parametrize(
    ("arguments", "teacher", "expected"),
    [
        ({}, {"size": 32}, {"img_size": "32"}),
        ({"frames": 4}, {"frames": 8, "slots": 4}, {"frames": "8"}),
        ({"frames": 4}, {"frames": 8, "slots": 2}, {"frames": "8", "tubelet": "4"}),
        # As many slots, of other frames: the student could not be shown the teacher's clips.
        ({"frames": 2, "tubelet": 1}, {"frames": 4, "slots": 2}, {"frames": "4", "tubelet": "2"}),
        ({}, {"frames": 3, "slots": 3}, {"frames": "3", "tubelet": "1"}),
        ({"frames": 4, "tubelet": 4}, {}, {"frames": "null", "tubelet": "null"}),
    ],
)
def test_the_arguments_that_are_advised_fit(
    arguments: dict[str, Any], teacher: dict[str, Any], expected: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match="AMD compares token with token") as caught:
        check_layouts(vit(**arguments), "mae", card(**teacher))
    pairs = [setting.partition("=") for setting in str(caught.value).rpartition("; set ")[2].split(", ")]
    advised = {key.removeprefix("student.arguments."): value for key, _, value in pairs}
    assert advised == expected
    changes = {key: None if value == "null" else int(value) for key, value in advised.items()}
    check_layouts(vit(**arguments | changes), "mae", card(**teacher))


def test_what_differs_is_told_apart() -> None:
    message = r"the student has 2 slots of 4x4 .* of 2 frames and teacher 'mae' 2 slots of 4x4 .* of 4 frames; set"
    with pytest.raises(UsageError, match=message):
        check_layouts(vit(frames=2, tubelet=1), "mae", card(frames=4, slots=2))
    with pytest.raises(UsageError, match=r"of still images and teacher 'mae' 2 slots .* of 4 frames; set"):
        check_layouts(vit(), "mae", card(frames=4, slots=2))
