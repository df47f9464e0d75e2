"""The geometry of a view: every sample once, every box possible, or an error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdcache.errors import InputNotFound, StoreCorrupt, StoreMismatch
from hdcache.geometry import read_geometry, read_shard_geometry
from hdcache.ledgers import view_ledger
from hdcache.schema import ViewSpec
from hdcache.store import GEOMETRY_COLUMNS, Store
from hdcache.views import row_order


@pytest.mark.parametrize("view", [0, 1])
def test_geometry_names_every_sample_once_in_the_view_s_order(tiny_store: Path, view: int) -> None:
    store = Store.open(tiny_store)
    geometry, digests = read_geometry(store, view)
    assert (geometry.shape, geometry.dtype, digests.shape, digests.dtype) == ((64, 8), np.int32, (64, 32), np.uint8)
    assert np.array_equal(geometry[:, 0], row_order(64, store.card.views.seed, view))
    columns = {name: geometry[:, number] for number, name in enumerate(GEOMETRY_COLUMNS)}
    assert (columns["left"] + columns["width"] <= columns["source_width"]).all()
    assert (columns["top"] + columns["height"] <= columns["source_height"]).all()
    assert set(columns["source_width"].tolist()) == {44}
    assert set(columns["flip"].tolist()) == {0, 1}


def test_shards_of_geometry_are_pieces_of_it(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    whole = read_geometry(store, 1)
    size = store.card.rows_per_shard
    for shard in range(-(-64 // size)):
        part = read_shard_geometry(store, 1, shard)
        assert part is not None
        for piece, value in zip(part, whole, strict=True):
            assert np.array_equal(piece, value[shard * size : (shard + 1) * size])
    assert read_shard_geometry(store, 1, 99) is None
    assert read_shard_geometry(store, 5, 0) is None


def test_unfinished_geometry_says_how_to_finish_it(sealed_store: Path) -> None:
    view_ledger(Store.open(sealed_store), 0).unseal()
    with pytest.raises(InputNotFound, match="view 0 is not complete; run the same 'hdcache extract' command again"):
        read_geometry(Store.open(sealed_store), 0)


def test_geometry_that_names_a_sample_twice_is_refused(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdcache.geometry.ArrayReader.rows", lambda *_: np.zeros((20, 8), np.int32))
    with pytest.raises(StoreMismatch, match="views/0: its rows do not name every sample once"):
        read_geometry(Store.open(sealed_store), 0)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.integers(0, 19), column=st.integers(1, 12), value=st.integers(-(2**31), 2**31 - 1))
def test_geometry_is_possible_or_names_the_row(
    sealed_store: Path, monkeypatch: pytest.MonkeyPatch, row: int, column: int, value: int
) -> None:
    """A box inside its source, a flip of 0 or 1, frames one stride apart; or a row that was never read."""
    store = Store.open(sealed_store)
    store.card = store.card.model_copy(update={"views": ViewSpec(frames=5, stride=2)})
    geometry = np.tile(np.array([0, 1, 2, 3, 4, 1, 30, 20, 4, 6, 8, 10, 12], np.int64), (20, 1))
    geometry[:, 0] = np.arange(20)
    geometry[row, column] = value
    left, top, width, height, flip, wide, high, *frames = geometry[row, 1:].tolist()
    possible = (
        left >= 0 and top >= 0 and width > 0 and height > 0 and left + width <= wide and top + height <= high
        and flip in (0, 1) and frames == list(range(frames[0], frames[0] + 10, 2)) and frames[0] >= 0
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("hdcache.geometry.ArrayReader", lambda *_: SimpleNamespace(rows=lambda *_: geometry))
        if possible or wide == 0:
            assert np.array_equal(read_geometry(store, 0)[0], geometry)
        else:
            with pytest.raises(
                StoreCorrupt, match=rf"/views/0/geometry: row {row} is no view of a sample \(sample {row}, l"
            ):
                read_geometry(store, 0)


def test_a_shard_s_geometry_is_held_to_the_same(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(sealed_store)
    found = read_shard_geometry(store, 0, 1)
    assert found is not None
    wrong = found[0].copy()
    wrong[3, 5] = 2
    monkeypatch.setattr("hdcache.geometry.ArrayReader.rows", lambda *_: wrong)
    with pytest.raises(StoreCorrupt, match=r"row 11 is no view of a sample .*flip 2.*; copy the store again"):
        read_shard_geometry(store, 0, 1)
