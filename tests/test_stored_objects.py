"""What records list: sizes and digests of files by safe keys; what is none of that is refused at its first fault."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from hdcache.errors import StoreCorrupt
from hdcache.records import Record
from hdcache.stored_objects import Objects, Reasons, StoredObject


class Listing(Record):
    """As manifests and receipts have them."""

    objects: Objects = Field(default_factory=dict)
    failed: Reasons = Field(default_factory=dict)


@given(
    objects=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9._@-]{0,8}(/[a-z][a-z0-9._@-]{0,8}){0,3}", fullmatch=True),
        st.builds(StoredObject, size=st.integers(0, 2**60), sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True)),
    ),
    failed=st.dictionaries(st.integers(-3, 2**40), st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_what_is_listed_comes_back(objects: dict[str, StoredObject], failed: dict[int, str]) -> None:
    listing = Listing(objects=objects, failed=failed)
    assert Listing.parse(listing.model_dump(mode="json"), "x") == listing
    assert (listing.objects, listing.failed) == (objects, failed)


GOOD: dict[str, Any] = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"../x": GOOD}, "x: objects: Value error, unsafe object key '../x'"),
        ({"a": 7}, "x: objects: Value error, no size and sha256 of a"),
        ({"a": {}}, "no size and sha256 of a"),
        ({"a": {"size": 1}}, "no size and sha256 of a"),
        ({"a": GOOD | {"size": -1}}, "no size and sha256 of a"),
        ({"a": GOOD | {"size": 1.0}}, "no size and sha256 of a"),
        ({"a": GOOD | {"size": "1"}}, "no size and sha256 of a"),
        ({"a": GOOD | {"sha256": "0" * 63}}, "no size and sha256 of a"),
        ({"a": GOOD | {"sha256": "0" * 64 + "\n"}}, "no size and sha256 of a"),
        ({"a": GOOD | {"sha256": "A" * 64}}, "no size and sha256 of a"),
        ({"a": GOOD | {"sha256": None}}, "no size and sha256 of a"),
        ({"a": GOOD | {"more": 1}}, "no size and sha256 of a"),
        ([], "x: objects: Input should be a valid dictionary"),
    ],
)
def test_what_is_no_file_of_a_store(objects: Any, message: str) -> None:
    with pytest.raises(StoreCorrupt) as caught:
        Listing.parse({"objects": objects}, "x")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "failed", [{"x": "y"}, {"1.5": "y"}, {"": "y"}, {"--1": "y"}, {"1": 2}, {"1": None}, {1: ["y"]}]
)
def test_what_is_no_failed_row(failed: Any) -> None:
    with pytest.raises(StoreCorrupt, match="x: failed: Value error, no reason why row "):
        Listing.parse({"failed": failed}, "x")


def test_a_row_is_not_repeated_in_full() -> None:
    with pytest.raises(StoreCorrupt) as caught:
        Listing.parse({"failed": {"x" * 10**6: "y"}}, "x")
    assert len(str(caught.value)) < 400
