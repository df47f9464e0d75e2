"""Which recipes a run trains: their names, changes to one of them, sweeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcache.distill.recipes import get_recipe
from hdcache.distill.run_recipes import named, resolve, resolve_several
from hdcache.errors import UsageError


def names(*given: Any, **settings: Any) -> list[str]:
    return [recipe.name for recipe in resolve_several(*given, **settings)]


def test_recipes_are_changed_together_and_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps({"base": "hybrid-tiny", "name": "mine", "lr": 0.5}))
    record = get_recipe("supervised-tiny")
    found = resolve_several(
        ["tinymim-tiny", tmp_path / "mine.yaml", record],
        {"epochs": "5", "warmup_epochs": "1"},
        {2: {"epochs": "7"}, 3: {"name": "labels"}},
    )
    assert [recipe.name for recipe in found] == ["tinymim-tiny", "mine", "labels"]
    assert [recipe.epochs for recipe in found] == [5, 7, 5]
    assert [recipe.lr for recipe in found] == [0.001, 0.5, 0.001]
    assert found[0] == get_recipe("tinymim-tiny", {"epochs": 5, "warmup_epochs": 1})


def test_a_sweep_is_every_recipe_with_every_value() -> None:
    found = resolve_several(
        ["tinymim-tiny", "supervised-tiny"], sweep={"lr": "1e-3,3e-4", "student.drop_path": "0,0.1"}
    )
    assert [recipe.name for recipe in found] == [
        f"{name}-lr-{lr}-drop_path-{drop}"
        for name in ("tinymim-tiny", "supervised-tiny")
        for lr in ("0.001", "0.0003")
        for drop in ("0", "0.1")
    ]
    assert [(recipe.lr, recipe.student.drop_path) for recipe in found[:4]] == [
        (1e-3, 0),
        (1e-3, 0.1),
        (3e-4, 0),
        (3e-4, 0.1),
    ]
    assert names(["tinymim-tiny"], sweep={"seed": [3]}) == ["tinymim-tiny-seed-3"]


def test_values_of_a_sweep_are_yaml() -> None:
    sweep = {"betas": "[0.9, 0.95], [0.9, 0.99]", "objective.strategy": "relation, feature", "lr": ".5"}
    found = resolve_several(["tinymim-tiny"], sweep=sweep)
    assert [recipe.betas for recipe in found] == [(0.9, 0.95)] * 2 + [(0.9, 0.99)] * 2
    assert found[1].name == "tinymim-tiny-betas-0.9-0.95-strategy-feature-lr-0.5"
    assert names(["tinymim-tiny"], sweep={"ema": "null,0.9"}) == ["tinymim-tiny-ema-null", "tinymim-tiny-ema-0.9"]


@given(st.lists(st.floats(min_value=1e-6, max_value=1.0), min_size=1, max_size=5, unique=True))
def test_names_of_a_sweep_are_those_of_folders_and_differ(rates: list[float]) -> None:
    found = resolve_several(["tinymim-tiny"], sweep={"lr": rates})
    assert [recipe.lr for recipe in found] == rates
    assert len({recipe.name for recipe in found}) == len(rates)
    for recipe in found:
        assert Path("runs", recipe.name).name == recipe.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipes": []}, "nothing to train; name at least one recipe"),
        ({"recipes": ["tinymim-tiny"] * 2}, "^recipes 1 and 2 are called 'tinymim-tiny', which is the name of the run's folder; "
         "give one another name: --set-recipe 2:name=OTHER$"),
        ({"recipes": ["tinymim-tiny"] * 2, "sweep": {"lr": "1,2"}}, "^two students are called 'tinymim-tiny-lr-1', "
         "which is the name of the run's folder; give one another name: --set-recipe 2:name=OTHER$"),
        ({"sweep": {"lr": "0.1,0.1"}}, "^two students are called 'tinymim-tiny-lr-0.1', which is the name of the run's folder; "
         "leave out one of two --sweep values that are spelled alike in a folder's name$"),
        ({"recipe_overrides": {3: {"lr": 1}}}, "^--set-recipe 3: there are recipes 1 to 2$"),
        ({"recipe_overrides": {0: {"lr": 1}}}, "^--set-recipe 0: there are recipes 1 to 2$"),
        ({"sweep": {"lr": ""}}, "^--sweep lr= has no values; give them with commas between, such as lr=1e-3,3e-4$"),
        ({"sweep": {"lr": "[1"}}, "^--sweep lr=.1: not a YAML or JSON value"),
        ({"sweep": {"lrr": "1,2"}}, "unknown field 'lrr'; did you mean 'lr'"),
        ({"overrides": {"name": "a/b"}}, "^recipe name 'a/b' may hold only letters"),
        ({"recipe_overrides": {1: {"name": ".."}}}, r"^recipe name '\.\.' may hold only letters"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_several(**{"recipes": ["tinymim-tiny", "supervised-tiny"]} | settings)


def test_one_of_several_is_named_in_messages() -> None:
    recipe = resolve("tinymim-tiny", None)
    for several, message in ((True, "^recipe 'tinymim-tiny': too few heads$"), (False, "^too few heads$")):
        with pytest.raises(UsageError, match=message), named(recipe, several=several):
            raise UsageError("too few heads")
