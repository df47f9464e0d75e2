from __future__ import annotations

import pytest

from hdcache.distill.entry import Entry, derive, fields
from hdcache.distill.recipes import RECIPES
from hdcache.distill.supervised import Supervised

MAE = RECIPES["mae-tiny"]


def entry(**sources: str) -> Entry:
    return Entry(MAE.recipe, "m", "t", "a", {key.replace("__", "."): value for key, value in sources.items()})


def test_the_longest_key_that_fits_a_field_is_its_source() -> None:
    found = entry(student="group", student__arguments="field", epochs="e")
    assert found.source("student.arguments") == "field"
    assert found.source("student.drop_path") == "group"
    assert found.source("epochs") == "e"
    with pytest.raises(KeyError, match="objective"):
        found.source("objective.mask_ratio")


def test_fields_open_inner_records() -> None:
    found = {path: value for path, value, _ in fields(RECIPES["tinymim-b"].recipe)}
    assert found["student.drop_path"] == 0.1
    assert found["jitter.hue"] == 0
    assert "student" not in found
    assert {path: value for path, value, _ in fields(MAE.recipe)}["jitter"] is None


def test_derived_recipes_are_replaced_field_by_field() -> None:
    made = derive(MAE, "mine", "why", {"epochs": 5, "student.arguments": {"depth": 2}}, sources={"epochs": "five"})
    assert (made.recipe.name, made.recipe.epochs, made.recipe.student.arguments) == ("mine", 5, {"depth": 2})
    assert (made.about, made.method, made.teacher) == ("why", MAE.method, MAE.teacher)
    assert (made.source("epochs"), made.source("lr")) == ("five", MAE.source("lr"))
    assert made.recipe.student.init == MAE.recipe.student.init
    assert MAE.recipe.epochs == 30


def test_another_objective_takes_no_source_of_the_old_one() -> None:
    made = derive(MAE, "mine", "why", {"objective": Supervised()})
    with pytest.raises(KeyError):
        made.source("objective.kind")


def test_the_student_in_few_words() -> None:
    assert RECIPES["tinymim-b"].student == "ViT-base/16"
    assert RECIPES["amd-video-s"].student == "ViT-small/16, 16 frames"
    assert RECIPES["tinymim-tiny"].student == "4 blocks of 48, 32 px"
