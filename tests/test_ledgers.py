"""Receipts and seals: what is complete is known, whenever the writer is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdcache import ledgers
from hdcache.durable import durable_write, partial_files, stored_object
from hdcache.errors import StoreCorrupt
from hdcache.index import write_index
from hdcache.integrity import verify
from hdcache.ledgers import Ledger, read_index, teacher_ledger, view_ledger
from hdcache.records import canonical_json
from hdcache.schema import Receipt, StoredObject
from hdcache.store import Store

ROWS = "teachers/t/views/0"
SHARD = f"{ROWS}/final/values/c.1.0.0"
CONSTANT = "teachers/t/encodings/block1.attn_in/step/c.0"
SEAL: dict[str, Any] = {"teacher": "", "identity": "", "view": 0}


def receipts(ledger: Ledger) -> list[Receipt]:
    return [receipt for shard in range(3) if (receipt := ledger.receipt(shard)) is not None]


def faults(root: Path, *, quick: bool = False) -> str:
    return "\n".join(verify(Store.open(root), quick=quick).faults)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a record as one does who knows of its check."""
    value = json.loads(path.read_bytes())
    value.pop("check", None)
    value.get("attributes", {}).pop("hdcache_check", None)
    change(value)
    path.write_bytes(canonical_json(value))


# Receipts


def test_a_receipt_holds_while_its_objects_do(sealed_store: Path) -> None:
    """Whole: the receipt. An object gone or of another size: None, so the shard is written again."""
    ledger = teacher_ledger(Store.open(sealed_store), "t", 0)
    assert ledger.receipt(1) == Receipt.parse(json.loads((ledger.folder / "receipts/1.json").read_bytes()), "")
    assert ledger.receipt(3) is None
    path = sealed_store / SHARD
    data = path.read_bytes()
    for damage in (path.unlink, lambda: path.write_bytes(data[:-1]), lambda: path.write_bytes(b"")):
        damage()
        assert ledger.receipt(1) is None
        assert ledger.receipt(0) is not None
        path.write_bytes(data)
        assert ledger.receipt(1) is not None


def test_a_receipt_of_another_shard_is_refused(sealed_store: Path) -> None:
    ledger = teacher_ledger(Store.open(sealed_store), "t", 0)
    shutil.copy(ledger.folder / "receipts/0.json", ledger.folder / "receipts/1.json")
    with pytest.raises(StoreCorrupt, match=r"1\.json: the receipt of shard 0; delete it and rerun"):
        ledger.receipt(1)


def test_a_receipt_that_is_no_record(sealed_store: Path) -> None:
    ledger = teacher_ledger(Store.open(sealed_store), "t", 0)
    (ledger.folder / "receipts/1.json").write_text("{")
    with pytest.raises(StoreCorrupt, match=r"1\.json: not valid JSON"):
        ledger.receipt(1)


# The seal


def ledger_of(root: Path, *spans: tuple[int, int]) -> tuple[Ledger, list[Receipt]]:
    listed = {f"x/c.{i}": StoredObject(size=i, sha256="0" * 64) for i in range(len(spans))}
    made = [
        Receipt(shard=i, rows=span, objects={key: listed[key]}, failed={span[0]: f"bad {i}"}, saturated=i)
        for i, (span, key) in enumerate(zip(spans, listed, strict=True))
    ]
    ledger = Ledger(root, "views/0")
    for receipt in made:
        ledger.record(receipt)
    return ledger, made


def test_a_seal_adds_up_its_receipts_in_any_order(tmp_path: Path) -> None:
    ledger, made = ledger_of(tmp_path, (0, 4), (4, 8), (8, 9))
    static = {"views/0/zarr.json": durable_write(tmp_path / "views/0/zarr.json", b"{}")}
    sealed = ledger.seal(made[::-1], static, rows=9, **SEAL)
    assert ledger.sealed
    assert ledger.manifest() == sealed
    receipts, shards = ([f"views/0/{name}" for name in names] for names in (
        ("receipts/0.json", "receipts/1.json", "receipts/2.json"), ("x/c.0", "x/c.1", "x/c.2")
    ))  # fmt: skip
    assert list(sealed.objects) == [*receipts, *shards, "views/0/zarr.json"]
    assert sealed.objects[receipts[1]] == stored_object(made[1].checked())
    assert sealed.failed == {0: "bad 0", 4: "bad 1", 8: "bad 2"}
    assert sealed.saturated == 3


def test_what_a_seal_would_list_must_be_there(tmp_path: Path) -> None:
    """Not only what the receipts tell of: a teacher's constants too."""
    ledger, made = ledger_of(tmp_path, (0, 4))
    constant = tmp_path / "teachers/t/encodings/final/mean/c.0"
    static = {"teachers/t/encodings/final/mean/c.0": durable_write(constant, b"12345")}
    for damage, said in ((None, "missing"), (b"", "0 bytes"), (b"123456", "6 bytes")):
        constant.unlink() if damage is None else constant.write_bytes(damage)
        with pytest.raises(
            StoreCorrupt, match=rf"mean/c\.0: {said}, expected 5 bytes; not sealed: run the same command"
        ):
            ledger.seal(made, static, rows=4, **SEAL)
        assert not ledger.sealed
    constant.write_bytes(b"12345")
    assert ledger.seal(made, static, rows=4, **SEAL).objects.keys() > static.keys()


def test_a_seal_that_nobody_could_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, made = ledger_of(tmp_path, (0, 4), (4, 8))
    monkeypatch.setattr(ledgers, "RECORD_BYTES", 600)
    with pytest.raises(
        StoreCorrupt,
        match=r"manifest\.json: \d+ bytes, for 4 objects and 2 failed rows, .*with larger --rows-per-shard",
    ):
        ledger.seal(made, {}, rows=8, **SEAL)
    assert not ledger.sealed


def test_sealing_twice_is_sealing_once(tmp_path: Path) -> None:
    """An equal seal leaves the file alone; another one is refused and leaves it alone too."""
    ledger, made = ledger_of(tmp_path, (0, 4), (4, 8))
    first = ledger.seal(made, {}, rows=8, **SEAL)
    before = (ledger.folder / "manifest.json").stat().st_mtime_ns
    assert ledger.seal(made, {}, rows=8, **SEAL) == first
    with pytest.raises(StoreCorrupt, match=r"manifest\.json: already sealed with other content; run 'hdcache verify'"):
        ledger.seal(made, {}, rows=8, **{**SEAL, "view": 1})
    assert (ledger.folder / "manifest.json").stat().st_mtime_ns == before
    assert ledger.manifest() == first


@pytest.mark.parametrize(
    ("spans", "covered"),
    [
        ([(0, 4)], 4),
        ([(4, 8)], 0),
        ([], 0),
        ([(0, 4), (0, 4)], 4),
        ([(0, 4), (2, 6)], 4),
        ([(0, 3), (4, 9)], 3),
        ([(0, 4), (4, 9)], 9),
    ],
)
def test_receipts_that_do_not_cover_the_rows(spans: list[tuple[int, int]], covered: int, tmp_path: Path) -> None:
    """Gaps, overlaps and repeats are not rows, even where their lengths add up to 8."""
    ledger, made = ledger_of(tmp_path, *spans)
    with pytest.raises(StoreCorrupt, match=f"receipts cover {covered} of 8 rows; run the same 'hdcache extract' again"):
        ledger.seal(made, {}, rows=8, **SEAL)
    assert not ledger.sealed


def test_what_cannot_be_looked_at_now_is_not_lost(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a shard would be written again, on another machine perhaps with other last bits, and a seal withdrawn."""
    ledger, stat = teacher_ledger(Store.open(sealed_store), "t", 0), os.stat

    def failing(path: Any, **more: Any) -> os.stat_result:
        if str(path).endswith("c.1.0.0"):
            raise OSError(110, "Connection timed out", path)
        return stat(path, **more)

    assert ledger.receipt(1) is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing)
        with pytest.raises(OSError, match="Connection timed out"):
            ledger.receipt(1)
        assert f"{SHARD}: cannot be read (Connection timed out)" in faults(sealed_store)
    assert ledger.receipt(1) is not None


def test_a_seal_that_is_withdrawn_is_no_longer_listed(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    whole = write_index(store).objects
    view_ledger(store, 0).unseal()
    left = read_index(sealed_store)
    assert left is not None
    assert whole.keys() - left.objects.keys() == {"views/0/manifest.json"}
    assert {key: whole[key] for key in left.objects} == left.objects
    assert verify(store).good
    (sealed_store / "index.json").write_bytes(b"broken")
    teacher_ledger(store, "t", 0).unseal()
    assert not teacher_ledger(store, "t", 0).sealed


def test_a_seal_can_be_withdrawn(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    ledger = teacher_ledger(store, "t", 0)
    sealed = ledger.manifest()
    ledger.unseal()
    ledger.unseal()
    assert not ledger.sealed
    assert store.views("t") == []
    assert verify(store).unsealed == [ROWS, "index.json"]
    static = {k: v for k, v in sealed.objects.items() if not k.startswith(ROWS) or k.endswith("zarr.json")}
    again = ledger.seal(receipts(ledger), static, teacher="t", identity=sealed.identity, view=0, rows=20)
    assert again == sealed


def test_a_seal_covers_the_records_it_rests_on(sealed_store: Path) -> None:
    """Nothing that a reader believes is without a sha256, except the manifest, whose digest is the store's identity."""
    listed = teacher_ledger(Store.open(sealed_store), "t", 0).manifest().objects.keys()
    listed |= view_ledger(Store.open(sealed_store), 0).manifest().objects.keys()
    files = {path.relative_to(sealed_store).as_posix() for path in sealed_store.rglob("*") if path.is_file()}
    samples = {key for key in files if key.startswith("samples/")}
    groups = {"views/zarr.json", "teachers/zarr.json"}
    assert files - listed - samples - groups == {
        *(f"{key}/manifest.json" for key in (ROWS, "views/0")),
        "about.json",
    }
    assert {"zarr.json", "samples/receipt.json", "teachers/t/zarr.json"} <= listed


# Replaced


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(0, 3), min_size=1, max_size=4), moment=st.integers(1, 30), again=st.integers(1, 30))
def test_a_shard_that_is_replaced_is_the_old_one_or_the_new_one(
    sizes: list[int], moment: int, again: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Killed at any flush, and while it is settled once more; what its receipt says is what lies there."""

    class Killed(BaseException):
        pass

    ledger = Ledger(tmp_path_factory.mktemp("s"), "views/0")
    sync = os.fsync

    def write(byte: bytes) -> None:
        objects = {f"a{n}/c.0": durable_write(ledger.aside(f"a{n}/c.0"), byte * size) for n, size in enumerate(sizes)}
        ledger.replace(Receipt(shard=0, rows=(0, 1), objects=objects, failed={0: byte.decode()}))

    def until(count: int, work: Callable[[], None]) -> None:
        left = [count]

        def fsync(file: int) -> None:
            left[0] -= 1
            if not left[0]:
                raise Killed
            sync(file)

        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            patch.setattr(os, "fsync", fsync)
            work()

    def held() -> bytes | None:
        receipt = ledger.receipt(0)
        if receipt is None:
            return None
        byte = receipt.failed[0].encode()
        for n, size in enumerate(sizes):
            assert (ledger.folder / f"a{n}/c.0").read_bytes() == byte * size
        return byte

    write(b"x")
    ledger.seal([ledger.receipt(0)], {}, teacher="", identity="", view=0, rows=1)  # type: ignore[list-item]
    until(moment, lambda: write(b"y"))
    assert held() in (b"x", b"y", None)
    assert held() == b"x" or not ledger.sealed
    until(again, lambda: ledger.settle(0))
    ledger.settle(0)
    assert held() in (b"x", b"y")
    write(b"z")
    assert held() == b"z"
    assert not ledger.sealed
    assert partial_files(ledger.folder) == []


# The records that a seal rests on


@pytest.mark.parametrize("key", ["zarr.json", "samples/zarr.json", "samples/receipt.json", "teachers/t/zarr.json"])
def test_a_record_that_was_exchanged_since_the_seal_is_refused(sealed_store: Path, key: str) -> None:
    """Another record may be right in itself: of another store, or of the time before."""
    ledger = teacher_ledger(Store.open(sealed_store), "t", 0)
    assert ledger.proved_manifest() == ledger.manifest()
    path = sealed_store / key
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(
        StoreCorrupt, match=rf"{key}: not the record that .*manifest\.json was sealed with; copy the store"
    ):
        ledger.proved_manifest()
    path.unlink()
    assert ledger.proved_manifest() == ledger.manifest(), "who reads it says that it is missing"


def test_a_ledger_behind_a_link_is_not_the_store_s(sealed_store: Path, tmp_path: Path) -> None:
    folder = sealed_store / "teachers/t/views"
    (folder / "0").rename(tmp_path / "away")
    (folder / "0").symlink_to(tmp_path / "away")
    store = Store.open(sealed_store)
    with pytest.raises(StoreCorrupt, match="views/0: a link that leads out of the store"):
        teacher_ledger(store, "t", 0).manifest()
    assert any("views/0: a link that leads out of the store" in fault for fault in verify(store).faults)
    with pytest.raises(StoreCorrupt, match="views/0: a link that leads out of the store"), store.lock("t"):
        pass
    with store.lock("other"):
        pass
