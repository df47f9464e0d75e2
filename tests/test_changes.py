from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcache.distill.changes import merge, nested_changes, parse_value, validated
from hdcache.distill.recipes import RECIPES
from hdcache.errors import UsageError

VALUES: dict[str, Any] = {
    "3": 3,
    "-3": -3,
    "+3": 3,
    "0": 0,
    "1e-4": 1e-4,
    "1E-4": 1e-4,
    "2.5e-3": 2.5e-3,
    ".5": 0.5,
    "1.": 1.0,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "off": "off",
    "no": "no",
    "yes": "yes",
    "010": 10,
    "1:30": "1:30",
    "1_000": "1_000",
    "2020-01-01": "2020-01-01",
    "NaN": "NaN",
    ".inf": ".inf",
    "e": "e",
    "block18.qkv": "block18.qkv",
    "'3'": "3",
    '"1e-4"': "1e-4",
    "[qk, vv]": ["qk", "vv"],
    '["qk", 1e-4, true]': ["qk", 1e-4, True],
    "{a: 1}": {"a": 1},
    '{\n\t"a": 1\n}': {"a": 1},
}


@pytest.mark.parametrize("text", VALUES, ids=repr)
def test_scalars_mean_what_yaml_1_2_says(text: str) -> None:
    value = parse_value(text, "x")
    assert value == VALUES[text]
    assert type(value) is type(VALUES[text])


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.none())
def test_json_scalars_come_back(value: Any) -> None:
    found = parse_value(json.dumps(value), "x")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["@16", "[1, 2", "a: b: c", "!!python/object:os.system x", "--- 1\n--- 2"])
def test_text_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"--set name: not a YAML or JSON value \(.*\); put text with special characters"
    ):
        parse_value(text, "--set name")


def test_dotted_changes_become_mappings() -> None:
    found = nested_changes({"a.b": "1", "a.c": [2], "d": "x", "a.e.f": True})
    assert found == {"a": {"b": 1, "c": [2], "e": {"f": True}}, "d": "x"}


def test_merge_alters_neither_side() -> None:
    base: dict[str, Any] = {"a": {"b": 1, "c": [1]}, "d": 2}
    changes: dict[str, Any] = {"a": {"b": 3}, "e": 4}
    assert merge(base, changes) == {"a": {"b": 3, "c": [1]}, "d": 2, "e": 4}
    assert base == {"a": {"b": 1, "c": [1]}, "d": 2}
    assert changes == {"a": {"b": 3}, "e": 4}


def test_another_kind_of_objective_keeps_nothing_of_the_old_one() -> None:
    base = {"objective": {"kind": "tinymim", "heads": 12}}
    assert merge(base, {"objective": {"kind": "mae"}}) == {"objective": {"kind": "mae"}}
    assert merge(base, {"objective": {"kind": "tinymim"}}) == base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, "file.yaml: unknown field 'epoch'; did you mean 'epochs'"),
        ({"student": {"archtecture": "x"}}, "unknown field 'student.archtecture'; did you mean 'architecture'"),
        ({"objective": {"head": 3}}, "unknown field 'objective.head'; did you mean 'heads'"),
        (
            {"objective": {"kind": "mae", "mask_rate": 0.5}},
            "unknown field 'objective.mask_rate'; did you mean 'mask_ratio'",
        ),
        ({"jitter": {"gamma": 0.1}}, "unknown field 'jitter.gamma'; choose from: blur, blur_sigma, brightness, "),
        ({"epochs": {"x": 1}}, r"epochs: Input should be a valid integer \(found {'x': 1}\)"),
        ({"epochs": -1}, r"epochs: Input should be greater than or equal to 0 \(found -1\)"),
        ({"amp": "fp16"}, r"amp: Input should be 'auto', 'bf16' or 'off' \(found 'fp16'\)"),
        ({"objective": {"kind": "dino"}}, "objective: Input tag 'dino' found using 'kind' does not match any"),
        (
            {"objective": {"strategy": "x"}},
            "objective.strategy: Input should be 'relation', 'feature' or 'class-token'",
        ),
        (
            {"objective": {"heads": 4, "strategy": "feature"}},
            "objective: strategy 'feature' does not read heads, which is not at its default",
        ),
        ({"student": {"drop_path": 1.0}}, "student.drop_path: Input should be less than 1"),
        ({"min_lr": float("inf")}, "min_lr: Input should be a finite number"),
        ({"epochs": -1, "epoch": 1}, "epochs: .*; unknown field 'epoch'"),
        ({"epochs": -1}, r"\('hdcache recipes show NAME' explains every field\)$"),
    ],
)
def test_every_fault_names_its_field(changes: dict[str, Any], message: str) -> None:
    base = RECIPES["tinymim-b"].recipe.model_dump(mode="json")
    with pytest.raises(UsageError, match=message):
        validated(merge(base, changes), "file.yaml")


def test_missing_fields_are_all_named() -> None:
    with pytest.raises(
        UsageError, match="name is missing; objective is missing; student is missing; epochs is missing"
    ):
        validated({}, "file.yaml")
