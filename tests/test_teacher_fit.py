from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from hdcache.backbones import create_vit
from hdcache.distill.teacher_fit import (
    choose_teachers,
    class_tokens,
    divisible,
    plain_queries,
    plain_student,
    same_grid,
    same_prefix,
    whole_images,
)
from hdcache.errors import UsageError
from hdcache.schema import MaskSpec, Preprocessing, TeacherCard

CARD = TeacherCard(
    architecture="vit_tiny_patch16_224",
    weights="0",
    preprocessing=Preprocessing(size=16),
    patch_size=4,
    grid=(4, 4),
    prefix_tokens=1,
    class_token=True,
    width=32,
    depth=4,
    heads=4,
    precision="fp32",
)


NEEDED = {"": "", "feature": "--tap final", "relation": "--tap block3.attn_in"}


def vit(**arguments: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    return create_vit("vit_tiny_patch16_224", small | arguments)


def changed(**changes: Any) -> TeacherCard:
    return CARD.model_copy(update=changes)


# Which teacher


@pytest.mark.parametrize(
    ("named", "teachers", "chosen"),
    [
        ({"relation": "a", "feature": "b"}, "ab", {"relation": "a", "feature": "b"}),
        ({"relation": "a", "feature": "a"}, "ab", {"relation": "a", "feature": "a"}),
        ({"feature": None}, "b", {"feature": "b"}),
        ({}, "", {}),
    ],
)
def test_names_are_chosen(named: dict[str, str | None], teachers: str, chosen: dict[str, str]) -> None:
    assert choose_teachers(named, dict.fromkeys(teachers, CARD), NEEDED) == chosen


@pytest.mark.parametrize(
    ("named", "teachers", "message"),
    [
        (
            {"feature": None},
            "",
            "objective.feature_teacher not given, and there is no teacher; add one: "
            "hdcache extract --store STORE --teacher NAME=MODEL --tap final$",
        ),
        ({"": None}, "", "^objective.teacher not given.*--teacher NAME=MODEL$"),
        (
            {"": None},
            "ab",
            r"^objective.teacher is null, which needs exactly one teacher, but there are 2 \(a, b\); set objective.teacher=NAME$",
        ),
        (
            {"": "b"},
            "",
            "^objective.teacher: no teacher 'b'; there is none; or add it: hdcache extract --store STORE --teacher b=MODEL$",
        ),
        (
            {"feature": "supervised"},
            ["mae", "sup"],
            "^objective.feature_teacher: no teacher 'supervised'; choose from: mae, sup; or add it: "
            "hdcache extract --store STORE --teacher supervised=MODEL --tap final$",
        ),
        (
            {"feature": "mea"},
            ["mae", "sup"],
            r"did you mean 'mae'\? The teachers are mae, sup; or add it: hdcache extract .* --tap final$",
        ),
        (
            {"feature": None},
            "ba",
            r"feature_teacher is null, which needs exactly one teacher, but there are 2 \(a, b\); set objective.feature_",
        ),
        (
            {"relation": None, "feature": None},
            "ab",
            "relation_teacher and objective.feature_teacher not given, and nothing says which teacher is meant; "
            "the teachers are a, b: set objective.relation_teacher=NAME and objective.feature_teacher=NAME",
        ),
        ({"relation": "a", "feature": None}, "ab", "teachers are a, b: set objective.feature_teacher=NAME"),
        ({"relation": "a", "feature": None}, "a", "objective.feature_teacher not given"),
        (
            {"relation": "mea", "feature": "a"},
            ["mae", "a"],
            "objective.relation_teacher: no teacher 'mea'; did you mean 'mae'",
        ),
    ],
)
def test_names_that_cannot_be_meant(named: dict[str, str | None], teachers: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_teachers(named, dict.fromkeys(teachers, CARD), NEEDED)


# Whether it fits


def test_null_is_no_advice_where_the_teacher_s_own_heads_do_not_fit() -> None:
    for asked in (None, 16):
        with pytest.raises(
            UsageError, match=r"16 heads do not divide the width 24 .*; set objective.heads to a divisor of 32 and 24$"
        ):
            divisible(vit(), "t", changed(heads=16), asked)


def test_grids_that_are_not_square() -> None:
    with pytest.raises(
        UsageError, match=r"; set student.arguments.img_size=\[32, 16\], or store the teacher at 16 pixels"
    ):
        same_grid(vit(), {"": ("t", changed(grid=(8, 4)))}, {"t": ("final",)})
    teachers = {"relation": ("a", changed(grid=(8, 8))), "feature": ("b", changed(grid=(2, 2)))}
    with pytest.raises(UsageError, match=r"give the student a square student.arguments.img_size$"):
        same_grid(vit(img_size=(16, 32)), teachers, {"a": ("final",), "b": ("final",)})


def test_class_tokens_are_needed_on_both_sides() -> None:
    class_tokens(vit(), "t", CARD)
    with pytest.raises(UsageError, match="needs a class token, which teacher 't' lacks"):
        class_tokens(vit(), "t", changed(class_token=False))


def test_a_masked_teacher_is_refused_with_the_command_that_stores_it_whole() -> None:
    whole_images("t", CARD, "feature", ["final"])
    masked = changed(mask=MaskSpec(kind="tube", ratio=0.9))
    message = (
        "teacher 't' saw only the tokens that its mask tube:0.9 left, but every token is compared; store it without --teacher-mask: "
        "set objective.feature_teacher=t-2 and add it: "
        "hdcache extract --store STORE --teacher t-2=MODEL --tap block3.attn_in --tap final"
    )
    with pytest.raises(UsageError) as caught:
        whole_images("t", masked, "feature", ["final", "block3.qkv", "block3.attn_in"])
    assert str(caught.value) == message


def test_normalised_queries_are_refused() -> None:
    plain_queries("t", CARD)
    with pytest.raises(
        UsageError, match=r"'t' normalises Q and K per head, after the stored QKV; set objective.relations"
    ):
        plain_queries("t", changed(qk_norm=True))
    plain_student(vit(), 2)
    with pytest.raises(UsageError, match=r"block2 of the student normalises Q and K per head.*arguments.qk_norm=false"):
        plain_student(vit(qk_norm=True), 2)


@pytest.mark.parametrize(
    ("heads", "whose"), [(3, "32 of teacher 't'"), (16, "24 of the student"), (64, "32 of teacher")]
)
def test_heads_must_divide_both_widths(heads: int, whose: str) -> None:
    divisible(vit(), "t", CARD, 8)
    message = f"{heads} heads do not divide the width {whose}.*; set objective.heads=null for the teacher's own 4, or objective.heads "
    with pytest.raises(UsageError, match=f"{message}to a divisor of 32 and 24$"):
        divisible(vit(), "t", CARD, heads)


def test_prefix_tokens_must_agree_where_they_are_compared() -> None:
    same_prefix(vit(), "t", CARD, "tokens")
    with pytest.raises(
        UsageError, match=r"student has 4x4 patch \+ 1 .* 't' 4x4 patch \+ 5 .*; set objective.tokens=patches"
    ):
        same_prefix(vit(), "t", changed(prefix_tokens=5), "tokens")


def test_one_teacher_of_another_grid_can_be_met_from_both_sides() -> None:
    teacher = {"feature": ("clip", changed(grid=(8, 8), patch_size=14))}
    with pytest.raises(UsageError) as caught:
        same_grid(vit(), teacher, {"clip": ("final",)})
    assert str(caught.value) == (
        "tokens are compared one by one, but the student has 4x4 patch + 1 prefix tokens and teacher 'clip' "
        "8x8 patch + 1 prefix tokens; set student.arguments.img_size=32, or store the teacher at 56 pixels: "
        "set objective.feature_teacher=clip-2 and add it: "
        "hdcache extract --store STORE --teacher clip-2=MODEL --img-size 56 --tap final"
    )


def test_clip_large_at_196_pixels_has_the_grid_of_a_base_student() -> None:
    teacher = {"feature": ("clip", changed(grid=(16, 16), patch_size=14)), "relation": ("mae", changed(grid=(14, 14)))}
    targets = {"clip": ("final",), "mae": ("block9.qkv",)}
    with pytest.raises(
        UsageError, match=r"14x14 .* 16x16 .*; store the teacher at 196 pixels: .* --img-size 196 --tap final"
    ):
        same_grid(vit(img_size=224, patch_size=16), teacher, targets)
    with pytest.raises(
        UsageError, match=r"'mae' 14x14 .*; store the teacher at 64 pixels: set objective.rel.*block9.attn_in$"
    ):
        same_grid(vit(img_size=256, patch_size=16), teacher, targets)


def test_teachers_that_differ_from_each_other_leave_the_student_alone() -> None:
    teachers = {"relation": ("a", changed(grid=(8, 8))), "feature": ("b", changed(grid=(2, 2)))}
    with pytest.raises(UsageError) as caught:
        same_grid(vit(), teachers, {"a": ("block3.qkv",), "b": ("final",)})
    assert "student.arguments.img_size" not in str(caught.value)


def test_clips_and_pictures_do_not_mix() -> None:
    with pytest.raises(
        UsageError, match=r"teacher 't' 2 slots of 4x4 patch .*; both need clips of the same number of frames"
    ):
        same_grid(vit(), {"feature": ("t", changed(slots=2))}, {"t": ("final",)})
