"""Rows decoded. How they are read, and what is refused, is in test_stored_rows.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdcache.errors import HdcacheError, InputNotFound
from hdcache.index import Held
from hdcache.reader import TeacherReader
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.target_sources import open_targets


def reader(path: Path) -> TeacherReader:
    return TeacherReader(Store.open(path), "t")


def test_taps_have_their_shapes(sealed_store: Path) -> None:
    """Prefix and patch tokens apart, vectors as rows, whatever the encoding; float32 on the CPU."""
    source = reader(sealed_store)
    for tap in ("block1.attn_in", "final"):
        found = source.tap(0, tap, 3, 17)
        assert isinstance(found, Tokens)
        assert (found.prefix.shape, found.patches.shape) == ((14, 1, 6), (14, 9, 6))
        assert found.patches.dtype == found.prefix.dtype == torch.float32
    pooled = source.tap(0, "pooled", 19, 20)
    assert isinstance(pooled, torch.Tensor)
    assert (pooled.shape, pooled.dtype) == ((1, 6), torch.float32)


def test_weights_are_float32_by_the_record_s_names(tiny_store: Path) -> None:
    source = reader(tiny_store)
    assert source.weights.keys() == source.record.weights.keys() == {"block3/qkv_weight", "block3/qkv_bias"}
    assert source.weights["block3/qkv_weight"].shape == (144, 48)
    assert all(value.dtype == np.float32 for value in source.weights.values())


def test_a_view_that_does_not_exist_lists_those_that_do(tiny_store: Path) -> None:
    with pytest.raises(InputNotFound, match=r"view 7 of teacher 't' is not complete \(sealed views: \[0, 1\]\)"):
        reader(tiny_store).manifest(7)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), which=st.sampled_from(["teachers/t/zarr.json", "teachers/t/views/0/manifest.json"]))
def test_a_changed_record_is_read_or_says_why(
    data: st.DataObject, which: str, sealed_store: Path, mutations: Callable[[bytes], st.SearchStrategy[bytes]]
) -> None:
    path = sealed_store / which
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(mutations(whole)))
        message = ""
        try:
            source = reader(sealed_store)
            for tap in source.record.taps:
                source.tap(0, tap, 0, 4)
        except HdcacheError as error:
            message = str(error)
        assert "\n" not in message
    finally:
        path.write_bytes(whole)


# Partial copies


def test_a_tap_that_this_copy_lacks_names_the_way_to_get_it(sealed_store: Path) -> None:
    (sealed_store / "teachers/t/held.json").write_bytes(Held(taps=("final",)).canonical())
    found = reader(sealed_store)
    assert list(found.record.taps) == list(found.encoders) == ["final"]
    assert found.tap(0, "final", 0, 2)
    said = (
        r"teacher 't' holds final, not 'pooled'; this copy was made without block1\.attn_in, pooled: add what is needed with "
        r"'hdcache pull URL \S+ --teacher t --tap TAP'$"
    )
    with pytest.raises(InputNotFound, match=said):
        found.tap(0, "pooled", 0, 2)
    with pytest.raises(InputNotFound, match=r"pooled.*add what is needed with 'hdcache pull"):
        open_targets(Store.open(sealed_store), {"t": ["pooled"]})
