from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdcache.errors import HdcacheError, InputNotFound, StoreCorrupt, StoreMismatch, UsageError
from hdcache.integrity import teacher_ledger, view_ledger
from hdcache.reader import TeacherReader, read_geometry, read_shard_geometry
from hdcache.schema import ViewSpec
from hdcache.store import GEOMETRY_COLUMNS, Store
from hdcache.taps import Tokens
from hdcache.views import row_order


def reader(path: Path) -> TeacherReader:
    return TeacherReader(Store.open(path), "t")


def edit_manifest(path: Path, **fields: Any) -> None:
    manifest = path / "teachers/t/views/0/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | fields))


# Rows


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


def test_any_span_of_rows_is_a_piece_of_the_whole(sealed_store: Path) -> None:
    """Spans across chunks and shards hold the rows that reading everything gives."""
    source = reader(sealed_store)
    whole = source.rows(0, "block1.attn_in", 0, 20)
    for start in range(20):
        for stop in range(start + 1, 21):
            part = source.rows(0, "block1.attn_in", start, stop)
            assert all(np.array_equal(part[name], whole[name][start:stop]) for name in whole)


@pytest.mark.parametrize("pipeline", ["zarr", "zarrs"])
def test_both_pipelines_read_the_same(sealed_store: Path, pipeline: str) -> None:
    one = TeacherReader(Store.open(sealed_store), "t", pipeline).rows(0, "final", 0, 20)
    assert all(np.array_equal(value, reader(sealed_store).rows(0, "final", 0, 20)[name]) for name, value in one.items())


@pytest.mark.parametrize("span", [(-1, 3), (3, 3), (5, 4), (0, 21), (20, 21)])
def test_rows_that_do_not_exist_are_refused(sealed_store: Path, span: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=rf"rows {span[0]} to {span[1]}: choose a range inside 0 to 20"):
        reader(sealed_store).tap(0, "final", *span)


def test_a_tap_that_is_not_stored_is_named_with_those_that_are(sealed_store: Path) -> None:
    with pytest.raises(InputNotFound, match=r"teacher 't' holds block1.attn_in, final, pooled, not 'block2.out'"):
        reader(sealed_store).tap(0, "block2.out", 0, 1)


def test_bytes_per_row_are_those_of_the_arrays(sealed_store: Path) -> None:
    source = reader(sealed_store)
    for taps in (["final"], ["final", "pooled"], ["block1.attn_in"], []):
        arrays = [value for tap in taps for value in source.rows(0, tap, 0, 1).values()]
        assert source.bytes_per_row(taps) == sum(value.nbytes for value in arrays)


def test_threads_may_share_a_reader(sealed_store: Path) -> None:
    """Opening arrays from many threads gives each its rows and leaves zarr's settings as they were."""
    before = zarr.config.get("codec_pipeline.path")
    for _ in range(5):
        source, wrong = reader(sealed_store), []

        def work(source: TeacherReader = source, wrong: list[Any] = wrong) -> None:
            taps = ("final", "pooled", "block1.attn_in")
            wrong.extend(tap for tap in taps if len(next(iter(source.rows(0, tap, 0, 20).values()))) != 20)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
    assert zarr.config.get("codec_pipeline.path") == before


def test_weights_are_float32_by_the_record_s_names(tiny_store: Path) -> None:
    source = reader(tiny_store)
    assert source.weights.keys() == source.record.weights.keys() == {"block3/qkv_weight", "block3/qkv_bias"}
    assert source.weights["block3/qkv_weight"].shape == (144, 48)
    assert all(value.dtype == np.float32 for value in source.weights.values())


# The seal


def test_a_view_that_is_not_sealed_says_how_to_finish_it(sealed_store: Path) -> None:
    teacher_ledger(Store.open(sealed_store), "t", 0).unseal()
    with pytest.raises(
        InputNotFound, match=r"view 0 of teacher 't' is not complete \(sealed views: none\); run the same"
    ):
        reader(sealed_store).tap(0, "final", 0, 1)


def test_a_view_that_does_not_exist_lists_those_that_do(tiny_store: Path) -> None:
    with pytest.raises(InputNotFound, match=r"view 7 of teacher 't' is not complete \(sealed views: \[0, 1\]\)"):
        reader(tiny_store).manifest(7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": "u"}, r"manifest.json: seals 'u' view 0 \(identity \w{12}\), not 't' view 0"),
        ({"view": 3}, r"seals 't' view 3 .*, not 't' view 0"),
        ({"identity": "0" * 64}, r"seals 't' view 0 \(identity 000000000000\), not 't' view 0 \(\w{12}\); copy"),
        ({"rows": 21}, r"manifest.json: its rows are not the 20 of the store"),
        ({"failed": {"20": "x"}}, r"manifest.json: its rows are not the 20 of the store"),
    ],
)
def test_the_seal_of_something_else_is_refused(sealed_store: Path, fields: dict[str, Any], message: str) -> None:
    edit_manifest(sealed_store, **fields)
    with pytest.raises(StoreCorrupt, match=message):
        reader(sealed_store).manifest(0)


def test_the_seal_is_read_once(sealed_store: Path) -> None:
    source = reader(sealed_store)
    manifest = source.manifest(0)
    edit_manifest(sealed_store, teacher="u")
    assert source.manifest(0) is manifest


def test_an_object_that_went_missing_is_no_zeros(sealed_store: Path) -> None:
    source = reader(sealed_store)
    chunk = next((sealed_store / "teachers/t/views/0/final/values").glob("c.1.*"))
    chunk.unlink()
    assert len(source.rows(0, "final", 0, 8)["values"]) == 8
    with pytest.raises(StoreCorrupt, match=r"missing, expected \d+ bytes"):
        source.rows(0, "final", 8, 9)


# Geometry


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
    monkeypatch.setattr("hdcache.reader.ArrayReader.rows", lambda *_: np.zeros((20, 8), np.int32))
    with pytest.raises(StoreMismatch, match="views/0: its rows do not name every sample once"):
        read_geometry(Store.open(sealed_store), 0)


# Records and numbers that nothing could have written


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
        patch.setattr("hdcache.reader.ArrayReader", lambda *_: SimpleNamespace(rows=lambda *_: geometry))
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
    monkeypatch.setattr("hdcache.reader.ArrayReader.rows", lambda *_: wrong)
    with pytest.raises(StoreCorrupt, match=r"row 11 is no view of a sample .*flip 2.*; copy the store again"):
        read_shard_geometry(store, 0, 1)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"grid": [2, 4]}, "tap block1.attn_in has 9 tokens of 6 channels and 1 prefix tokens, its teacher 8 of 6 and 1"),
        ({"width": 8}, "of 6 channels and 1 prefix tokens, its teacher 9 of 8 and 1"),
        ({"prefix_tokens": 2}, "and 1 prefix tokens, its teacher 9 of 6 and 2"),
        ({"depth": 0}, "tap 'block1.attn_in': the network has 0 blocks"),
        ({"mask": {"kind": "random", "ratio": 0.5}}, "has 9 tokens of 6 channels .* its teacher 5 of 6"),
        ({"mask": {"kind": "random", "ratio": 0.01}}, "hides 0 and leaves 9 visible"),
    ],
)  # fmt: skip
def test_taps_that_the_network_cannot_have_are_corrupt(sealed_store: Path, card: dict[str, Any], message: str) -> None:
    path = sealed_store / "teachers/t/zarr.json"
    record = json.loads(path.read_bytes())
    record["attributes"]["hdcache"]["card"] |= card
    path.write_text(json.dumps(record))
    with pytest.raises(StoreCorrupt, match=rf"teachers/t/zarr\.json: .*{message}.*; copy the store again"):
        reader(sealed_store)


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
