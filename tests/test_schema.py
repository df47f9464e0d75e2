"""The records on disk: identities that last, nothing unknown, nothing unsafe, nothing without bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from hdcache.errors import StoreCorrupt
from hdcache.schema import (
    ArrayCard,
    DatasetCard,
    Manifest,
    Preprocessing,
    Receipt,
    StoreCard,
    StoredObject,
    TapCard,
    TapRequest,
    TeacherCard,
    TeacherRecord,
    ViewSpec,
)

ZERO = "0" * 64
DATA = {"spec": "folder:/x", "kind": "folder", "fingerprint": ZERO, "count": 3, "classes": ["a"]}
CERTIFICATE = {
    "calibration_rows": 1,
    "heldout_rows": 1,
    "relative_rmse": 0.0,
    "cosine_mean": 1.0,
    "cosine_min": 1.0,
    "bits_per_value": 8.0,
}
TAP: dict[str, Any] = {
    "tap": "final",
    "encoding": "klt",
    "tokens": 4,
    "channels": 6,
    "prefix_tokens": 1,
    "arrays": {
        "codes": {"shape": [5, 4], "dtype": "int8"},
        "wide": {"shape": [1, 4], "dtype": "int16"},
        "prefix": {"shape": [1, 6], "dtype": "float16"},
    },
    "constants": {
        "basis": {"shape": [6, 6], "dtype": "float32"},
        "mean": {"shape": [6], "dtype": "float32"},
        "step": {"shape": [1], "dtype": "float32"},
    },
    "certificate": CERTIFICATE,
}
TEACHER: dict[str, Any] = {
    "architecture": "vit",
    "weights": ZERO,
    "preprocessing": {"size": 32},
    "patch_size": 16,
    "grid": [2, 2],
    "prefix_tokens": 1,
    "class_token": True,
    "width": 6,
    "depth": 1,
    "heads": 2,
    "precision": "fp32",
}


def record(**changes: Any) -> TeacherRecord:
    fields = {
        "name": "t",
        "card": TEACHER,
        "taps": {"final": TAP},
        "requests": [{"tap": "final", "encoding": "klt", "fidelity": 0.05}],
        "dataset": ZERO,
        "views": {},
        "batch": 4,
    }
    return TeacherRecord.model_validate(fields | changes)


def test_digests_that_no_release_may_change() -> None:
    """Identities in stores of format 1."""
    assert ViewSpec().digest() == "8930112ef8dd64567e19bea410bac5ba9d5644e6ce8e5015cdc923b8327b94ae"
    assert record().identity_digest() == "0835932ad732f30803a3b8d486bb38598ea7d80089cd4801f2d2b9074990d343"


@pytest.mark.parametrize(
    "made",
    [
        ViewSpec(),
        DatasetCard.model_validate(DATA),
        StoreCard(dataset=DatasetCard.model_validate(DATA), views=ViewSpec()),
        TapCard.model_validate(TAP),
        record(),
        Receipt(shard=0, rows=(0, 2), objects={"a/c.0": StoredObject(size=1, sha256=ZERO)}, failed={1: "ünreadable"}),
        Manifest(teacher="t", identity=ZERO, view=0, rows=2, objects={}, failed={1: "x"}),
    ],
    ids=lambda made: type(made).__name__,
)
def test_records_survive_json(made: Any) -> None:
    again = type(made).parse(json.loads(made.canonical()), "x")
    assert again == made
    assert again.digest() == made.digest()
    with pytest.raises(StoreCorrupt, match=r"^x: nosuch: Extra inputs are not permitted"):
        type(made).parse(json.loads(made.canonical()) | {"nosuch": 1}, "x")
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, next(iter(type(made).model_fields)), 1)


@pytest.mark.parametrize(
    ("old", "changes"),
    [
        (ViewSpec(), {"frames": 4, "stride": 2}),
        (Preprocessing(size=16), {"frames": 4}),
        (TeacherCard.model_validate(TEACHER), {"slots": 2, "qk_norm": True, "classes": 3, "mask": {"kind": "tube", "ratio": 0.5, "seed": 0}}),
        (TapRequest(tap="logits", encoding="topk"), {"top_k": 5, "row_budget": 9}),
        (TapCard.model_validate(TAP), {"grid": [1, TAP["tokens"]], "dead_zone": 0.1, "block_bytes": 4096, "typesize": 2, "code_precision": "bf16"}),
        (TapCard.model_validate(TAP).certificate, {"bound_bits": 1.5}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_fields_that_came_later_are_spelled_where_they_say_something(old: Any, changes: dict[str, Any]) -> None:
    """Each alone too: a record of the first release is read with defaults, and keeps its digest."""
    assert changes.keys() == old.ADDED
    spelled = json.loads(old.canonical())
    assert not spelled.keys() & old.ADDED
    assert type(old).parse(spelled, "x") == old
    for some in ({name: value} for name, value in changes.items()):
        new = type(old).parse(spelled | some, "x")
        assert json.loads(new.canonical()) == spelled | some
        assert new.digest() != old.digest()
        assert type(old).parse(spelled | {name: type(old).model_fields[name].default for name in some}, "x") == old


def test_a_card_that_lacks_what_its_network_tells() -> None:
    live = TeacherCard.model_validate(TEACHER | {"qk_norm": True, "classes": 7, "slots": 2})
    old = TeacherCard.model_validate(TEACHER)
    told = old.told_by(live)
    assert (told.qk_norm, told.classes, told.slots) == (True, 7, 1), "slots decide what is stored"
    other = TeacherCard.model_validate(TEACHER | {"classes": 5})
    assert other.told_by(live).classes == 5, "what is recorded is compared"


@pytest.mark.parametrize("value", [None, 3, [], "x", [[]]])
def test_a_record_that_is_none(value: object) -> None:
    with pytest.raises(StoreCorrupt, match=r"^x: record: .*valid dictionary"):
        Manifest.parse(value, "x")


def test_identity_holds_what_changes_values_and_nothing_else() -> None:
    base = record().identity_digest()
    for same in ({"source": "y"}, {"licence": "y"}, {"batch": 9}, {"name": "u"}, {"attention": {"a": 1}}):
        assert record(**same).identity_digest() == base
    for other in (
        {"card": TEACHER | {"weights": "1" * 64}},
        {"card": TEACHER | {"precision": "bf16"}},
        {"requests": []},
        {"dataset": "1" * 64},
        {"views": {"seed": 1}},
    ):
        assert record(**other).identity_digest() != base


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../b", "a/", "a b", "é", "a\\b"])
def test_unsafe_keys_are_refused_in_every_record(key: str) -> None:
    """A key never leaves its folder, whichever record names it."""
    listed = {key: {"size": 1, "sha256": ZERO}}
    for parse in (
        lambda: Receipt.parse({"shard": 0, "rows": [0, 1], "objects": listed}, "r"),
        lambda: Manifest.parse({"teacher": "t", "identity": ZERO, "view": 0, "rows": 1, "objects": listed}, "r"),
        lambda: TeacherRecord.parse(json.loads(record().canonical()) | {"objects": listed}, "r"),
        lambda: TeacherRecord.parse(
            json.loads(record().canonical()) | {"weights": {key: TAP["constants"]["mean"]}}, "r"
        ),
    ):
        with pytest.raises(StoreCorrupt, match=r"^r: .*unsafe object key"):
            parse()


def changed(path: str, value: object) -> dict[str, Any]:
    """``TAP`` with the field at a dotted path replaced, or dropped where ``value`` is None."""
    tap: dict[str, Any] = json.loads(json.dumps(TAP))
    *parents, last = path.split(".")
    inside = tap
    for name in parents:
        inside = inside[name]
    if value is None:
        del inside[last]
    else:
        inside[last] = value
    return tap


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("encoding", "int8"),
        ("encoding", "fp32"),
        ("constants.step", None),
        ("arrays.prefix", None),
        ("arrays.extra", {"shape": [5, 4], "dtype": "int8"}),
        ("arrays.codes", {"shape": [5, 3], "dtype": "int8"}),
        ("prefix_tokens", 0),
        ("tokens", 5),
        ("arrays", {"prefix": {"shape": [1, 6], "dtype": "float16"}}),
    ],
)
def test_a_tap_whose_arrays_do_not_fit_its_encoding(path: str, value: object) -> None:
    with pytest.raises(StoreCorrupt, match=r"arrays and constants are not those of a .* tap"):
        TapCard.parse(changed(path, value), "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"shape": [0], "dtype": "int8"}, "greater than or equal to 1"),
        ({"shape": [10**6, 10**6], "dtype": "int8"}, "more than 4294967296 values"),
        ({"shape": [1], "dtype": "object"}, "dtype"),
    ],
)
def test_shapes_are_bounded_and_types_are_plain(value: object, message: str) -> None:
    with pytest.raises(StoreCorrupt, match=message):
        ArrayCard.parse(value, "x")


def test_a_count_beyond_all_data_is_refused() -> None:
    with pytest.raises(StoreCorrupt, match="count: "):
        DatasetCard.parse(DATA | {"count": 10**12}, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
@pytest.mark.parametrize("where", ["arguments", "attention"])
def test_free_json_has_a_canonical_spelling_too(value: object, where: str) -> None:
    """What json.loads lets through but UTF-8 JSON cannot spell never reaches a digest."""
    raw = json.loads(record().canonical())
    (raw["card"] if where == "arguments" else raw)[where] = {"a": value}
    with pytest.raises(StoreCorrupt, match=where):
        TeacherRecord.parse(raw, "x")


def test_shards_hold_whole_chunks() -> None:
    with pytest.raises(ValidationError, match="rows_per_shard 256 is not a multiple of rows_per_chunk 7"):
        StoreCard(dataset=DatasetCard.model_validate(DATA), views=ViewSpec(), rows_per_chunk=7)


def test_preprocessing_is_bounded() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 8192"):
        Preprocessing(size=100_000)


def test_a_teacher_card_names_the_wrong_field() -> None:
    with pytest.raises(StoreCorrupt, match=r"^x: precision: .* \(found 'fp8'\)"):
        TeacherCard.parse(TEACHER | {"precision": "fp8"}, "x")
