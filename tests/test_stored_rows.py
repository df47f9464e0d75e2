"""Rows as they are stored: whole, of the seal that was asked for, or an error. Nothing here needs torch."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdcache.array_metadata import group_metadata, read_attributes
from hdcache.errors import HdcacheError, InputNotFound, StoreCorrupt, UsageError
from hdcache.ledgers import teacher_ledger
from hdcache.row_arrays import codec_of
from hdcache.store import Store
from hdcache.stored_rows import StoredRows
from small_store import IDS, MadeTap, make_tap, store_card, write_ledger, write_record


def rows_of(path: Path) -> StoredRows:
    return StoredRows(Store.open(path), "t")


def edit_manifest(path: Path, **fields: Any) -> None:
    manifest = path / "teachers/t/views/0/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | fields | {"check": ""}))


# Rows


def test_any_span_of_rows_is_a_piece_of_the_whole(sealed_store: Path) -> None:
    """Spans across chunks and shards hold the rows that reading everything gives."""
    source = rows_of(sealed_store)
    whole = source.rows(0, "block1.attn_in", 0, 20)
    for start in range(20):
        for stop in range(start + 1, 21):
            part = source.rows(0, "block1.attn_in", start, stop)
            assert all(np.array_equal(part[name], whole[name][start:stop]) for name in whole)


@pytest.mark.parametrize("pipeline", ["zarr", "zarrs"])
def test_both_pipelines_read_the_same(sealed_store: Path, pipeline: str) -> None:
    one = StoredRows(Store.open(sealed_store), "t", pipeline).rows(0, "final", 0, 20)
    assert all(
        np.array_equal(value, rows_of(sealed_store).rows(0, "final", 0, 20)[name]) for name, value in one.items()
    )


@pytest.mark.parametrize("span", [(-1, 3), (3, 3), (5, 4), (0, 21), (20, 21)])
def test_rows_that_do_not_exist_are_refused(sealed_store: Path, span: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=rf"rows {span[0]} to {span[1]}: choose a range inside 0 to 20"):
        rows_of(sealed_store).rows(0, "final", *span)


def test_a_tap_that_is_not_stored_is_named_with_those_that_are(sealed_store: Path) -> None:
    with pytest.raises(InputNotFound, match=r"teacher 't' holds block1.attn_in, final, pooled, not 'block2.out'"):
        rows_of(sealed_store).rows(0, "block2.out", 0, 1)


def test_bytes_per_row_are_those_of_the_arrays(sealed_store: Path) -> None:
    source = rows_of(sealed_store)
    for taps in (["final"], ["final", "pooled"], ["block1.attn_in"], []):
        arrays = [value for tap in taps for value in source.rows(0, tap, 0, 1).values()]
        assert source.bytes_per_row(taps) == sum(value.nbytes for value in arrays)


def test_threads_may_share_a_reader(sealed_store: Path) -> None:
    """Opening arrays from many threads gives each its rows and leaves zarr's settings as they were."""
    before = zarr.config.get("codec_pipeline.path")
    for _ in range(5):
        source, wrong = rows_of(sealed_store), []

        def work(source: StoredRows = source, wrong: list[Any] = wrong) -> None:
            taps = ("final", "pooled", "block1.attn_in")
            wrong.extend(tap for tap in taps if len(next(iter(source.rows(0, tap, 0, 20).values()))) != 20)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
    assert zarr.config.get("codec_pipeline.path") == before


# The seal


def test_a_view_that_is_not_sealed_says_how_to_finish_it(sealed_store: Path) -> None:
    teacher_ledger(Store.open(sealed_store), "t", 0).unseal()
    with pytest.raises(
        InputNotFound, match=r"view 0 of teacher 't' is not complete \(sealed views: none\); run the same"
    ):
        rows_of(sealed_store).rows(0, "final", 0, 1)


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
        rows_of(sealed_store).manifest(0)


def test_the_seal_is_read_once(sealed_store: Path) -> None:
    source = rows_of(sealed_store)
    manifest = source.manifest(0)
    edit_manifest(sealed_store, teacher="u")
    assert source.manifest(0) is manifest


def test_an_object_that_went_missing_is_no_zeros(sealed_store: Path) -> None:
    source = rows_of(sealed_store)
    chunk = next((sealed_store / "teachers/t/views/0/final/values").glob("c.1.*"))
    chunk.unlink()
    assert len(source.rows(0, "final", 0, 8)["values"]) == 8
    with pytest.raises(StoreCorrupt, match=r"missing, expected \d+ bytes"):
        source.rows(0, "final", 8, 9)


# Records that nothing could have written


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
    del record["attributes"]["hdcache_check"]
    record["attributes"]["hdcache"]["card"] |= card
    path.write_text(json.dumps(record))
    with pytest.raises(StoreCorrupt, match=rf"teachers/t/zarr\.json: .*{message}.*; copy the store again"):
        rows_of(sealed_store)


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
            source = rows_of(sealed_store)
            for tap in source.record.taps:
                source.rows(0, tap, 0, 4)
        except HdcacheError as error:
            message = str(error)
        assert "\n" not in message
    finally:
        path.write_bytes(whole)


# The record


def test_a_record_that_no_seal_lists_is_refused_before_it_is_believed(sealed_store: Path) -> None:
    """Its numbers are as if they were the teacher's: other errors, other constants, of the same identity."""
    path = sealed_store / "teachers/t/zarr.json"
    record = read_attributes(path)
    record["taps"]["final"]["certificate"]["cosine_mean"] = 1.0
    path.write_bytes(group_metadata(record))
    with pytest.raises(
        StoreCorrupt, match=r"teachers/t/zarr\.json: not the record that .*manifest\.json was sealed with"
    ):
        rows_of(sealed_store)


def test_a_damaged_seal_concerns_its_own_view(sealed_store: Path) -> None:
    shutil.copytree(sealed_store / "teachers/t/views/0", sealed_store / "teachers/t/views/1")
    with pytest.raises(StoreCorrupt, match=r"views/1/manifest\.json: seals 't' view 0"):
        rows_of(sealed_store).rows(1, "final", 0, 1)
    (sealed_store / "teachers/t/views/0").rename(sealed_store / "teachers/t/views/2")
    with pytest.raises(StoreCorrupt, match=r"views/1/manifest\.json: seals 't' view 0"):
        rows_of(sealed_store)


@pytest.mark.parametrize("value", [1000, 2**16 - 1])
def test_classes_are_some_that_there_are(value: int, tmp_path: Path) -> None:
    """A GPU that is sent to others takes the process down."""
    store = Store.create(tmp_path / "s", store_card(), IDS, np.zeros(len(IDS), np.int64))
    tap = make_tap("logits", "topk")
    good = StoredRows(store, write_rows(store, tap))
    assert good.rows(0, "logits", 0, 20)["classes"].max() < 1000
    tap.parts["classes"][7, 2] = value
    shutil.rmtree(store.teacher_path("u"))
    bad = StoredRows(store, write_rows(store, tap))
    into = [np.zeros(3, np.uint16) for _ in range(20)]
    bad.copy_rows(0, "logits/classes", 0, 7, into[:7])
    for read in (lambda: bad.rows(0, "logits", 0, 20), lambda: bad.copy_rows(0, "logits/classes", 0, 20, into)):
        with pytest.raises(
            StoreCorrupt, match="teacher 'u': tap logits holds a class that is none of its 1000; copy the"
        ):
            read()


def write_rows(store: Store, tap: MadeTap) -> str:
    """A teacher of one tap."""
    record = write_record(store, "u", [tap])
    rows = {
        f"{tap.card.tap}/{name}": (tap.card.arrays[name], codec_of(tap.card, name), part)
        for name, part in tap.parts.items()
    }
    write_ledger(teacher_ledger(store, "u", 0), rows, teacher="u", identity=record.identity_digest(), view=0)
    return "u"
