"""Records: one canonical spelling, nothing unknown, nothing unsafe."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from hdcache.errors import StoreCorrupt, UsageError
from hdcache.records import (
    CheckedRecord,
    Facts,
    Record,
    canonical_json,
    check_key,
    check_name,
    differences,
    first_fault,
)
from hdcache.schema import DatasetCard, Receipt, StoreCard, ViewSpec

jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


class Shelf(Record):
    """A record with a default, free JSON, and a part that is a record too."""

    name: str
    rows: int = 3
    facts: Facts = Field(default_factory=dict)
    inner: Shelf | None = None


@settings(max_examples=60)
@given(value=jsons)
def test_equal_values_have_equal_bytes(value: Any) -> None:
    """The canonical spelling survives a round trip and does not know the order of keys."""
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(value.items()))) == text


def test_a_record_is_frozen_closed_and_finite() -> None:
    shelf = Shelf(name="a")
    with pytest.raises(ValidationError, match="frozen"):
        shelf.rows = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Shelf.model_validate({"name": "a", "colour": "red"})
    with pytest.raises(ValidationError, match="facts"):
        Shelf(name="a", facts={"x": float("nan")})


def test_the_digest_is_that_of_the_one_spelling() -> None:
    shelf = Shelf(name="ü", inner=Shelf(name="b"))
    spelling = '{"facts":{},"inner":{"facts":{},"inner":null,"name":"b","rows":3},"name":"ü","rows":3}'.encode()
    assert shelf.canonical() == spelling
    assert shelf.digest() == hashlib.sha256(spelling).hexdigest()
    assert Shelf.parse(json.loads(spelling), "x") == shelf
    assert Shelf(name="ü").digest() != shelf.digest()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"^here: record: Input should be a valid dictionary"),
        ({}, r"^here: name: Field required \(found \{\}\)"),
        ({"name": "a", "rows": "x"}, r"^here: rows: Input should be a valid integer.* \(found 'x'\)"),
        ({"name": "a", "inner": {"name": 1}}, r"^here: inner.name: Input should be a valid string \(found 1\)"),
        ({"name": "a", "\x1b[2J": 1}, r"^here: '\\x1b\[2J': Extra inputs"),
        ({"name": "a", "rows": "x" * 500}, r"^here: rows: .* \(found 'x{79}\)$"),
        ({"name": "a", "k" * 500: 1}, r"^here: k{160}: Extra"),
    ],
)
def test_the_first_fault_is_one_line_that_names_its_field(value: object, message: str) -> None:
    """Keys and values of a hostile record are cut short, and control characters are spelled out."""
    with pytest.raises(StoreCorrupt, match=message) as caught:
        Shelf.parse(value, "here")
    assert str(caught.value).isprintable()


def test_a_fault_of_a_huge_record_is_told_in_a_line() -> None:
    """Whatever lies where a number should be, and however much of it."""
    for value in ("x" * 10**7, ["y" * 10**6] * 10, {"z" * 10**6: 1}, {str(n): n for n in range(10**5)}, -(10**4000)):
        with pytest.raises(StoreCorrupt) as caught:
            Receipt.parse({"shard": value, "rows": [0, 1], "objects": {}}, "r.json")
        assert len(str(caught.value)) < 400


def test_a_fault_is_told_without_a_place_too() -> None:
    with pytest.raises(ValidationError) as caught:
        Shelf.model_validate({"name": "a", "rows": 1.5})
    assert first_fault(caught.value).startswith("rows: Input should be a valid integer")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_what_json_cannot_spell_has_no_canonical_bytes(value: object) -> None:
    with pytest.raises(ValueError):
        canonical_json({"a": value})


bad_keys = ["", "/a", "a//b", "../a", "a/../b", "a/..", "a/.", "./a", "a/", "a\n", "a b", "é", "a\\b", "x" * 513, "a\0"]


@pytest.mark.parametrize("key", bad_keys)
def test_an_unsafe_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="unsafe object key"):
        check_key(key)


@settings(max_examples=100)
@given(key=st.text("ab./-_", max_size=12))
def test_a_safe_key_stays_inside_its_folder(key: str) -> None:
    try:
        check_key(key)
    except ValueError:
        return
    assert not key.startswith("/")
    assert all(part not in ("", ".", "..") for part in key.split("/"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "-a", ".a", "a\n", "é", "x" * 129])
def test_names_that_cannot_be_folders(name: str) -> None:
    with pytest.raises(UsageError, match=r"^teacher .* may hold only letters, digits"):
        check_name(name, "teacher")


@pytest.mark.parametrize("name", ["a", "0", "dino.v2-S_14", "x" * 128])
def test_names_that_can(name: str) -> None:
    assert check_name(name, "teacher") == name


def test_differences_name_the_leaves() -> None:
    asked = {"a": {"b": 1, "c": [1, 2]}, "d": 1, "e": [1]}
    found = {"a": {"b": 2, "c": [1, 3]}, "d": 1, "e": [1, 2]}
    assert differences(asked, found) == [
        "a.b: the store has 2, asked was 1",
        "a.c[1]: the store has 3, asked was 2",
        "e: the store has [1, 2], asked was [1]",
    ]
    assert differences({"x": 1}, {}) == ["x: the store has None, asked was 1"]


@settings(max_examples=60)
@given(first=jsons, second=jsons)
def test_equal_values_have_no_differences_and_other_lists_do(first: Any, second: Any) -> None:
    assert differences(first, json.loads(canonical_json(first))) == []
    assert bool(differences({"x": [first, 1]}, {"x": [second]}))


def test_a_whole_record_says_its_silent_defaults() -> None:
    """So that a message names the default, at any depth; the stored spelling stays as it was."""
    plain, clip = ViewSpec(), ViewSpec(frames=16, stride=2)
    assert differences(plain.whole(), clip.whole()) == [
        "frames: the store has 16, asked was None",
        "stride: the store has 2, asked was 1",
    ]
    card = StoreCard(dataset=DatasetCard(spec="", kind="npz", fingerprint="", count=1), views=plain)
    assert card.whole()["views"]["stride"] == 1
    assert "stride" not in plain.model_dump(mode="json")
    assert ViewSpec.model_validate(plain.whole()) == plain
    assert "stride" not in card.model_dump(mode="json")["views"]


class Kept(CheckedRecord):
    """A record with a check of its own."""

    rows: int = 3
    note: str = ""


@given(rows=st.integers(), note=st.text(st.characters(exclude_categories=["Cs"])))
def test_a_checked_record_is_read_as_it_was_and_altered_is_refused(rows: int, note: str) -> None:
    kept = Kept(rows=rows, note=note)
    spelled = json.loads(kept.checked())
    assert spelled["check"] == kept.digest() == hashlib.sha256(kept.canonical()).hexdigest()
    assert Kept.parse(spelled, "x") == kept
    assert Kept.parse(json.loads(kept.canonical()), "x") == kept, "earlier versions wrote none"
    for change in ({"rows": rows + 1}, {"note": note + "a"}, {"note": "\ud800"}, {"check": "0" * 64}):
        with pytest.raises(
            StoreCorrupt, match=r"^x: altered since it was written \(its check differs\); copy the store"
        ):
            Kept.parse(spelled | change, "x")
