"""The rows of one teacher and view: what is left to do, what a shard holds, and what is never written again."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from hdcache.arrays import ShardWriter
from hdcache.errors import OutOfSpace, StoreCorrupt, StoreMismatch
from hdcache.extract.writer import Row, ViewWriter, is_recorded, write_once
from hdcache.geometry import read_geometry, read_shard_geometry
from hdcache.integrity import verify
from hdcache.reader import TeacherReader
from hdcache.store import Store
from hdcache.views import row_order

Tree = Callable[[Path], dict[str, bytes]]


class Killed(BaseException):
    """The end of the process, as far as a test can have it."""


@pytest.fixture
def writer(sealed_store: Path) -> ViewWriter:
    """A writer of view 1 of a store of 20 samples in shards of 8, whose view 0 is sealed."""
    store = Store.open(sealed_store)
    reader = TeacherReader(store, "t")
    return ViewWriter(store, reader.record, reader.encoders, 1)


def rows_of(writer: ViewWriter, shard: int) -> list[Row]:
    order = row_order(20, writer.store.card.views.seed, writer.view)[shard * 8 : shard * 8 + 8]
    pixels = np.zeros((3, 4, 4), np.uint8)
    return [Row(int(sample), pixels, (0, 1, 2, 3), True, (9, 8), bytes([int(sample)] * 32)) for sample in order]


def parts_for(writer: ViewWriter, rows: int, value: int) -> dict[str, dict[str, np.ndarray]]:
    return {
        tap: {name: np.full((rows, *card.shape), value, card.dtype) for name, card in encoder.card.arrays.items()}
        for tap, encoder in writer.encoders.items()
    }


def write(
    writer: ViewWriter, shard: int, value: int = 1, failed: dict[int, str] | None = None, unread: bool = True
) -> int:
    """Write a shard whose values all are ``value``; ``failed`` rows have no pixels if ``unread``."""
    rows = rows_of(writer, shard)
    for row, reason in (failed or {}).items():
        if unread:
            rows[row - 8 * shard] = Row(rows[row - 8 * shard].sample, None, reason=reason)
    return writer.write(shard, rows, parts_for(writer, len(rows), value), failed or {}, 0)


def complete(writer: ViewWriter, **changes: dict[int, str]) -> None:
    writer.open()
    for shard in writer.todo():
        write(writer, shard, failed={k: v for k, v in changes.get("failed", {}).items() if k // 8 == shard})
    writer.seal()


def test_making_a_writer_writes_nothing(sealed_store: Path, tree: Tree) -> None:
    before = tree(sealed_store)
    store = Store.open(sealed_store)
    reader = TeacherReader(store, "t")
    assert ViewWriter(store, reader.record, reader.encoders, 1).todo() == [0, 1, 2]
    assert tree(sealed_store) == before


def test_what_is_written_is_what_is_read(writer: ViewWriter) -> None:
    complete(writer)
    assert writer.todo() == []
    store = Store.open(writer.store.path)
    assert store.views("t") == [0, 1]
    geometry, digests = read_geometry(store, 1)
    assert np.array_equal(geometry[:, 0], row_order(20, 3, 1))
    assert (geometry[:, 1:] == [0, 1, 2, 3, 1, 9, 8]).all()
    assert np.array_equal(digests[:, 5], geometry[:, 0])
    for arrays in (TeacherReader(store, "t").rows(1, tap, 0, 20) for tap in writer.encoders):
        assert all((value == 1).all() and len(value) == 20 for value in arrays.values())


def test_a_shard_counts_its_bytes(writer: ViewWriter) -> None:
    writer.open()
    assert write(writer, 2) == sum(entry.size for entry in writer.ledger.receipt(2).objects.values())  # type: ignore[union-attr]
    assert writer.todo() == [0, 1]


def test_a_view_with_missing_shards_is_not_sealed(writer: ViewWriter) -> None:
    writer.open()
    write(writer, 0)
    with pytest.raises(StoreCorrupt, match="receipts cover 8 of 20 rows; run the same 'hdcache extract' again"):
        writer.seal()
    assert not writer.ledger.sealed


def test_a_lost_object_makes_its_shard_work_again(writer: ViewWriter, tree: Tree) -> None:
    complete(writer)
    before = tree(writer.store.path)
    victim = next(iter((writer.ledger.folder / "final").glob("values/c.1*")))
    victim.unlink()
    assert writer.todo() == [1]
    complete(writer)
    assert tree(writer.store.path) == before


def test_a_retry_replaces_a_shard_only_where_it_mends_something(writer: ViewWriter, tree: Tree) -> None:
    complete(writer, failed={9: "torn", 12: "gone"})
    assert writer.todo() == [1]
    before = tree(writer.store.path)
    assert write(writer, 1, 2, {9: "torn", 12: "gone"}) == 0
    assert write(writer, 1, 2, {9: "torn", 13: "gone"}) == 0
    assert write(writer, 1, 2, {9: "torn", 12: "gone", 13: "gone"}) == 0
    assert tree(writer.store.path) == before
    assert write(writer, 1, 2, {9: "torn"}) > 0
    assert not writer.ledger.sealed
    assert writer.ledger.receipt(1).failed == {9: "torn"}  # type: ignore[union-attr]
    assert write(writer, 1, 3) > 0
    assert writer.todo() == []


def test_a_kill_during_a_retry_leaves_no_false_receipt(writer: ViewWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects are overwritten one by one; a receipt of what they were must be gone before."""
    complete(writer, failed={9: "torn"})
    monkeypatch.setattr(writer.ledger, "record", lambda _: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        write(writer, 1, 2)
    monkeypatch.undo()
    assert not writer.ledger.sealed
    assert writer.ledger.receipt(1) is None
    assert verify(writer.store).faults == []
    # The images cannot be read again: what is sealed now is what was written now.
    assert write(writer, 1, 3, {9: "torn", 10: "gone"}) > 0
    writer.seal()
    assert verify(writer.store).faults == []
    assert writer.ledger.manifest().failed == {9: "torn", 10: "gone"}
    values = TeacherReader(writer.store, "t").rows(1, "final", 8, 16)["values"]
    assert (values == 3).all()


def test_recorded_geometry_survives_a_row_that_cannot_be_read_any_more(writer: ViewWriter) -> None:
    complete(writer, failed={9: "torn"})
    before, _ = read_geometry(writer.store, 1)
    assert not is_recorded(before[9])
    assert is_recorded(before).sum() == 19
    rows = rows_of(writer, 1)
    rows[4] = Row(rows[4].sample, None, reason="gone")
    writer._write_geometry(1, (8, 16), rows)
    found = read_shard_geometry(writer.store, 1, 1)
    assert found is not None
    assert found[0][1].tolist() == [rows[1].sample, 0, 1, 2, 3, 1, 9, 8]
    others = [i for i in range(8) if i != 1]
    assert np.array_equal(found[0][others], before[8:16][others])
    assert writer.geometry.receipt(1).failed == {}  # type: ignore[union-attr]


def test_a_row_that_was_read_but_has_no_finite_features_is_recorded(writer: ViewWriter) -> None:
    writer.open()
    write(writer, 0, failed={3: "not finite"}, unread=False)
    found = read_shard_geometry(writer.store, 1, 0)
    assert found is not None
    assert is_recorded(found[0]).all()
    assert writer.geometry.receipt(0).failed == {}  # type: ignore[union-attr]


def test_sealing_twice_changes_nothing(writer: ViewWriter, tree: Tree) -> None:
    complete(writer)
    stamps = {
        path: path.stat().st_mtime_ns for path in writer.store.path.rglob("*") if path.is_file() and path.name[0] != "."
    }
    complete(writer)
    assert stamps == {
        path: path.stat().st_mtime_ns for path in writer.store.path.rglob("*") if path.is_file() and path.name[0] != "."
    }


def test_writers_of_one_view_wait_for_each_other_and_keep_what_is_recorded(writer: ViewWriter) -> None:
    writer.open()
    rows = rows_of(writer, 0)
    flaky = [Row(rows[0].sample, None, reason="flaky"), *rows[1:]]
    other = ViewWriter(writer.store, writer.record, writer.encoders, 1)
    late = threading.Thread(target=writer._write_geometry, args=(0, (0, 8), flaky))
    with other._view_lock():
        late.start()
        late.join(0.3)
        assert late.is_alive()
        other._merge_geometry(0, (0, 8), rows)
    late.join(60)
    found = read_shard_geometry(writer.store, 1, 0)
    assert found is not None
    assert is_recorded(found[0]).all()


def test_lost_geometry_is_rebuilt_from_what_is_left(writer: ViewWriter, tree: Tree) -> None:
    complete(writer)
    before = tree(writer.store.path)
    folder = writer.geometry.folder
    drawn = [replace(row, box=(0, 0, 1, 1)) for row in rows_of(writer, 1)]
    for lost, rows in (
        (["receipts/1.json"], drawn),
        (["source_digest/c.1.0"], drawn),
        (["geometry/c.1.0"], rows_of(writer, 1)),
        (["geometry/c.1.0", "source_digest/c.1.0", "receipts/1.json"], rows_of(writer, 1)),
    ):
        for name in lost:
            (folder / name).unlink()
        assert writer.lost_geometry() == [1]
        assert writer.todo() == []
        assert not writer.sealed()
        writer.rebuild_geometry(1, rows)
        writer.seal()
        assert writer.sealed()
        assert tree(writer.store.path) == before, lost


def test_geometry_is_not_rebuilt_from_another_image(writer: ViewWriter) -> None:
    complete(writer)
    (writer.geometry.folder / "geometry/c.1.0").unlink()
    rows = rows_of(writer, 1)
    for bad, why in (
        (replace(rows[2], digest=bytes(31) + b"x"), "the image changed"),
        (Row(rows[2].sample, None, reason="torn"), "torn"),
    ):
        with pytest.raises(StoreMismatch, match=rf"geometry of shard 1 is lost .*{why}.*run the same command again"):
            writer.rebuild_geometry(1, [*rows[:2], bad, *rows[3:]])
    writer.rebuild_geometry(1, rows)
    assert writer.lost_geometry() == []


def test_the_arrays_of_a_shard_are_encoded_side_by_side(writer: ViewWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    writer.open()
    encode, both, first = ShardWriter.encode, threading.Barrier(2, timeout=60), iter(range(2))

    def met(self: ShardWriter, *block: Any) -> bytes:
        if next(first, None) is not None:
            both.wait()  # breaks unless a second array is being encoded
        return encode(self, *block)

    monkeypatch.setattr(ShardWriter, "encode", met)
    assert write(writer, 0) > 0


def test_a_small_file_is_written_once(tmp_path: Path) -> None:
    first = write_once(tmp_path / "a" / "zarr.json", b"{}")
    stamp = (tmp_path / "a" / "zarr.json").stat().st_mtime_ns
    assert write_once(tmp_path / "a" / "zarr.json", b"{}") == first
    assert (tmp_path / "a" / "zarr.json").stat().st_mtime_ns == stamp
    assert write_once(tmp_path / "a" / "zarr.json", b"{ }").size == 3
    assert (tmp_path / "a" / "zarr.json").read_bytes() == b"{ }"


def again(writer: ViewWriter, store: Path) -> ViewWriter:
    """What another process would have, of a copy of the store."""
    return ViewWriter(Store.open(store), writer.record, writer.encoders, writer.view)


@pytest.mark.parametrize("full", [False, True])
def test_a_kill_at_any_moment_of_mending_geometry_loses_none(
    full: bool, writer: ViewWriter, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any flush, that of a folder after a rename or a removal among them, or from then on where the disk is full."""
    complete(writer, failed={9: "torn"})
    known, digests = read_geometry(writer.store, 1)
    write(again(writer, shutil.copytree(writer.store.path, tmp_path / "whole")), 1, 2)
    whole = tree(tmp_path / "whole")
    sync, moment, died = os.fsync, 0, True
    while died:
        moment += 1
        late = again(writer, shutil.copytree(writer.store.path, tmp_path / f"s{moment}"))
        count, died = [0], False

        def fsync(file: int, count: list[int] = count, moment: int = moment) -> None:
            count[0] += 1
            if count[0] == moment and not full:
                raise Killed
            if count[0] >= moment and full:
                raise OSError(28, "No space left on device")
            sync(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                late._write_geometry(1, (8, 16), rows_of(late, 1))
            except (Killed, OutOfSpace):
                died = True
        # The other images are gone by now: what was recorded of them is all that is left.
        late = again(late, late.store.path)
        late.open()
        assert late.lost_geometry() == []
        rows = [row if i == 1 else Row(row.sample, None, reason="gone") for i, row in enumerate(rows_of(late, 1))]
        late._write_geometry(1, (8, 16), rows)
        found = read_shard_geometry(late.store, 1, 1)
        assert found is not None
        others = [0, 2, 3, 4, 5, 6, 7]
        assert np.array_equal(found[0][others], known[8:16][others])
        assert np.array_equal(found[1][others], digests[8:16][others])
        assert is_recorded(found[0]).all()
        assert write(late, 1, 2) > 0
        late.seal()
        assert verify(late.store).faults == verify(late.store).unlisted == []
        left = {key: value for key, value in tree(late.store.path).items() if not key.endswith("manifest.json")}
        assert left == {key: value for key, value in whole.items() if not key.endswith("manifest.json")}
    assert moment > 10


def test_an_image_that_changed_while_another_process_recorded_it_is_no_row(writer: ViewWriter) -> None:
    """Both have drawn it anew; what the second one has made of it would not be what its geometry says."""
    writer.open()
    rows = rows_of(writer, 0)
    write(writer, 1)
    writer._write_geometry(0, (0, 8), rows)
    for other in (replace(rows[3], digest=bytes(32)), replace(rows[3], box=(1, 1, 1, 1))):
        changed = [*rows[:3], other, *rows[4:]]
        with pytest.raises(StoreMismatch, match=r"png: another process has recorded view 1 of it from another file"):
            writer.write(0, changed, parts_for(writer, 8, 1), {}, 0)
        assert writer.todo() == [0, 2]
    assert write(writer, 0) > 0


def test_two_writers_of_one_shard_leave_one_shard(writer: ViewWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker left over from a killed command, and the same command again in one process: their last bits may differ."""
    writer.open()
    write(writer, 1)
    write(writer, 2)
    others = [again(writer, writer.store.path) for _ in range(3)]
    write_array, met = ViewWriter._write_array, threading.Event()

    def slow(self: ViewWriter, shard: int, key: str, *rest: Any) -> Any:
        if not met.is_set():
            met.set()
            time.sleep(0.3)
        return write_array(self, shard, key, *rest)

    monkeypatch.setattr(ViewWriter, "_write_array", slow)
    threads = [threading.Thread(target=write, args=(other, 0, value)) for value, other in enumerate(others, 1)]
    for thread in threads:
        thread.start()
        met.wait(60)
    for thread in threads:
        thread.join(60)
    writer.seal()
    assert verify(writer.store).faults == []
    assert len({float(value) for value in TeacherReader(writer.store, "t").rows(1, "final", 0, 8)["values"].flat}) == 1


def test_unfinished_files_of_dead_processes_are_removed(writer: ViewWriter) -> None:
    writer.open()
    write(writer, 0)
    own, shared = writer.ledger.folder, writer.geometry.folder
    left = [
        own / "final/values/.c.1.0.0.77-1.partial", own / "receipts/.1.json.77-1.partial", own / ".zarr.json.77-1.partial",
        shared / "geometry/.c.1.0.77-1.partial", shared / "geometry/.c.2.0.next.partial", shared / ".manifest.json.7-1.partial",
    ]  # fmt: skip
    for end in (writer.open, writer.seal):
        for path in left:
            path.write_bytes(b"x")
        for shard in writer.todo() if end == writer.seal else ():
            write(writer, shard)
        end()
        assert [path.name for path in left if path.exists()] == []
    assert verify(writer.store).unlisted == []


def test_an_unfinished_file_of_a_living_process_stays(writer: ViewWriter) -> None:
    writer.open()
    path = writer.ledger.folder / "final/values/.c.1.0.0.77-1.partial"
    path.write_bytes(b"x")
    with filelock.FileLock(writer.ledger.folder / ".1.lock"):
        late = threading.Thread(target=again(writer, writer.store.path).open)
        late.start()
        late.join(0.3)
        assert path.exists()
    late.join(60)
    assert not path.exists()
