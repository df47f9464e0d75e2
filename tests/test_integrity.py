"""Verification: what is damaged is named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdcache import integrity
from hdcache.arrays import ArrayReader
from hdcache.durable import stored_object
from hdcache.errors import HdcacheError
from hdcache.index import write_index
from hdcache.integrity import verify
from hdcache.ledgers import Ledger, teacher_ledger, view_ledger
from hdcache.records import canonical_json
from hdcache.schema import Receipt
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


def test_the_bytes_to_read_are_those_that_are_counted(sealed_store: Path) -> None:
    """What several seals list is read once, and what no seal lists yet is read too."""
    for _ in range(2):
        store, steps = Store.open(sealed_store), list[tuple[int, int]]()
        found = verify(store, progress=lambda *both, steps=steps: steps.append(both))
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1] == (found.bytes, found.bytes)
        assert {total for _, total in steps} == {found.bytes}
        teacher_ledger(store, "t", 0).unseal()


# Verification


def test_a_good_store(sealed_store: Path) -> None:
    """Every listed object is met once, its bytes are counted, and progress adds up to them."""
    store = Store.open(sealed_store)
    assert verify(store).unsealed == ["index.json"], "a kill came between the seal and the index"
    write_index(store)
    steps: list[tuple[int, int]] = []
    found = verify(store, progress=lambda done, total: steps.append((done, total)))
    assert found.good
    assert (found.faults, found.unsealed, found.unlisted) == ([], [], [])
    assert found.objects == len(steps)
    assert steps[-1] == (found.bytes, found.bytes)
    assert found.bytes > 0
    assert verify(store, quick=True) == found


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "deleted": (Path.unlink, r": missing, expected \d+ bytes", True),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-7]), r": \d+ bytes, expected \d+", True),
    "empty": (lambda p: p.write_bytes(b""), ": 0 bytes, expected", True),
    "flipped": (flip, r": sha256 .*\.\.\., expected", False),
    "swapped": (lambda p: shutil.copy(p.with_name("c.0.0.0"), p), r": sha256 .*\.\.\., expected", False),
    "foreign": (lambda p: p.write_bytes(bytes(p.stat().st_size)), r": sha256 .*\.\.\., expected", False),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), ": missing", True),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_every_damage_is_named(name: str, sealed_store: Path) -> None:
    """The full check finds each and nothing else; the quick one finds what changes a size."""
    damage, message, by_size = DAMAGE[name]
    damage(sealed_store / SHARD)
    store = Store.open(sealed_store)
    (fault,) = verify(store).faults
    assert fault.startswith(str(sealed_store / SHARD))
    assert re.search(message, fault)
    assert (not verify(store, quick=True).good) == by_size


def test_each_listed_object_is_checked(sealed_store: Path) -> None:
    """One flipped bit in any file of the store at all is found; receipts and manifests by comparing them."""
    files = [path for path in sorted(sealed_store.rglob("*")) if path.is_file()]
    groups = {"samples/zarr.json", "views/zarr.json", "teachers/zarr.json", "about.json"}
    missed = []
    for path in files:
        data = path.read_bytes()
        if path.relative_to(sealed_store).as_posix() in groups:
            continue
        flip(path)
        try:
            good = verify(Store.open(sealed_store)).good
        except HdcacheError:
            good = False
        path.write_bytes(data)
        missed += [path] if good else []
    assert missed == []
    assert verify(Store.open(sealed_store)).good


def test_leftovers_are_listed_and_harmless(sealed_store: Path) -> None:
    (sealed_store / ROWS / "final" / ".c.0.0.0.77.partial").write_bytes(b"x")
    (sealed_store / "notes.txt").write_text("mine")
    (sealed_store / ".t.lock").write_text("")
    found = verify(Store.open(sealed_store))
    assert found.good
    assert sorted(found.unlisted) == ["notes.txt", f"{ROWS}/final/.c.0.0.0.77.partial"]


def test_a_ledger_without_its_group_record_is_still_checked(sealed_store: Path) -> None:
    (sealed_store / ROWS / "zarr.json").unlink()
    assert f"{ROWS}/zarr.json: missing" in faults(sealed_store)


def test_an_unsealed_ledger_is_checked_by_its_receipts(sealed_store: Path) -> None:
    teacher_ledger(Store.open(sealed_store), "t", 0).unseal()
    write_index(Store.open(sealed_store))
    flip(sealed_store / SHARD)
    found = verify(Store.open(sealed_store))
    assert found.unsealed == [ROWS]
    assert SHARD in "".join(found.faults)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (f"{ROWS}/manifest.json", lambda m: m["failed"].update({"3": "x"}), "failed rows or saturated values differ"),
        (f"{ROWS}/manifest.json", lambda m: m.update(saturated=1), "failed rows or saturated values differ"),
        (f"{ROWS}/manifest.json", lambda m: m.update(rows=19), "19 rows, the store has 20 samples"),
        (f"{ROWS}/manifest.json", lambda m: m.update(format=7), "format 7, the store has 1"),
        (f"{ROWS}/manifest.json", lambda m: m.update(view=1), "manifest.json: the seal of t/1"),
        (f"{ROWS}/manifest.json", lambda m: m.update(teacher="u"), "manifest.json: the seal of u/0"),
        (f"{ROWS}/manifest.json", lambda m: m.update(identity="0"), "seals another identity"),
        (f"{ROWS}/manifest.json", lambda m: m["objects"].pop(SHARD), f"{ROWS}/manifest.json of {SHARD}"),
        (f"{ROWS}/manifest.json", lambda m: m["objects"][SHARD].update(size=1), f"{ROWS}/manifest.json of {SHARD}"),
        (f"{ROWS}/manifest.json", lambda m: m["objects"].pop("samples/receipt.json"), "does not list samples/receipt"),
        (f"{ROWS}/manifest.json", lambda m: m["objects"].pop(f"{ROWS}/final/values/zarr.json"), "not list teachers/t/v"),
        (f"{ROWS}/manifest.json", lambda m: m["objects"].pop(CONSTANT), f"does not list {CONSTANT}"),
        ("views/0/manifest.json", lambda m: m["objects"].pop("zarr.json"), "manifest.json: does not list zarr.json"),
        (f"{ROWS}/manifest.json", lambda m: m.update(extra=1), "extra: Extra inputs are not permitted"),
        (f"{ROWS}/manifest.json", lambda m: m["objects"].update({"../x": m["objects"][SHARD]}), "unsafe object key"),
        (f"{ROWS}/receipts/1.json", lambda m: m.update(shard=2), "1.json: the receipt of shard 2"),
        (f"{ROWS}/receipts/1.json", lambda m: m.update(failed={"9": "x"}), "failed rows or saturated values differ"),
        (f"{ROWS}/receipts/1.json", lambda m: m.update(rows="x"), "1.json: rows: "),
        ("teachers/t/zarr.json", lambda m: m["attributes"]["hdcache"].update(dataset="0"), "made for other data or views"),
        ("teachers/t/zarr.json", lambda m: m["attributes"]["hdcache"]["views"].update(seed=9), "made for other data"),
        ("teachers/t/zarr.json", lambda m: m["attributes"]["hdcache"].update(licence="x"), "zarr.json: "),
        ("teachers/t/zarr.json", lambda m: m["attributes"].clear(), "record: "),
        ("zarr.json", lambda m: m["attributes"]["hdcache"]["views"].update(seed=9), "made for other data or views"),
        ("zarr.json", lambda m: m["attributes"]["hdcache"]["dataset"].update(classes=["b", "a"]), "zarr.json: "),
        ("samples/receipt.json", lambda m: m.update(objects=[]), "receipt.json: objects: "),
    ],
)  # fmt: skip
def test_changed_records_are_named(path: str, change: Callable[[Any], None], message: str, sealed_store: Path) -> None:
    edit(sealed_store / path, change)
    found = faults(sealed_store)
    assert message in found


def test_missing_records_are_named(sealed_store: Path) -> None:
    (sealed_store / "samples/receipt.json").unlink()
    (sealed_store / "teachers/t/zarr.json").unlink()
    found = faults(sealed_store)
    assert "samples/receipt.json: missing" in found
    assert "teachers/t/zarr.json: missing, and rows of the teacher are there" in found


def test_a_teacher_that_a_kill_left_without_its_record_is_not_damaged(sealed_store: Path) -> None:
    shutil.copytree(sealed_store / "teachers/t/encodings", sealed_store / "teachers/u/encodings")
    found = verify(Store.open(sealed_store))
    assert found.good
    assert found.unsealed == ["teachers/u", "index.json"]


def test_manifests_that_were_swapped(sealed_store: Path) -> None:
    shutil.copy(sealed_store / "views/0/manifest.json", sealed_store / ROWS / "manifest.json")
    assert "manifest.json: the seal of the views/0" in faults(sealed_store)


def test_an_object_that_cannot_be_opened(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", broken)
    assert f"{SHARD}: cannot be read (Input/output error)" in faults(sealed_store)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    which=st.sampled_from(
        [
            "zarr.json",
            "samples/receipt.json",
            "teachers/t/zarr.json",
            f"{ROWS}/manifest.json",
            f"{ROWS}/receipts/1.json",
            "views/0/manifest.json",
            f"{ROWS}/final/values/zarr.json",
        ]
    ),
)
def test_a_changed_record_is_a_fault_or_changes_nothing(
    data: st.DataObject, which: str, sealed_store: Path, mutations: Callable[[bytes], st.SearchStrategy[bytes]]
) -> None:
    """Verification never crashes, and what it calls good reads as before."""
    path = sealed_store / which
    whole = path.read_bytes()
    before = teacher_ledger(Store.open(sealed_store), "t", 0).manifest()
    try:
        path.write_bytes(data.draw(mutations(whole)))
        try:
            store = Store.open(sealed_store)
            good = verify(store, quick=data.draw(st.booleans())).good
            manifest = teacher_ledger(store, "t", 0).manifest()
            teacher_ledger(store, "t", 0).receipt(1)
            reader = ArrayReader(sealed_store, f"{ROWS}/final/values", (20, 9, 6), "float32", manifest.objects, 8)
            rows = reader.rows(0, 20)
        except HdcacheError:
            return
        if good:
            same = ArrayReader(sealed_store, f"{ROWS}/final/values", (20, 9, 6), "float32", before.objects, 8).rows(
                0, 20
            )
            assert rows.tobytes() == same.tobytes()
            assert manifest == before
    finally:
        path.write_bytes(whole)


def test_a_teacher_that_was_begun_is_no_fault(sealed_store: Path) -> None:
    """A pull, or an extraction, that was killed before it wrote the teacher's record."""
    (sealed_store / "teachers/u/encodings").mkdir(parents=True)
    found = verify(Store.open(sealed_store))
    assert found.good
    assert found.unsealed == ["teachers/u", "index.json"]
    (sealed_store / "teachers/t/zarr.json").unlink()
    assert any("teachers/t/zarr.json: missing" in fault for fault in verify(Store.open(sealed_store)).faults), (
        "its rows are sealed"
    )


@pytest.mark.parametrize(
    "key",
    [
        "croissant.json",
        "samples/zarr.json",
        "views/zarr.json",
        "teachers/zarr.json",
        f"{ROWS}/receipts/1.json",
        f"{ROWS}/manifest.json",
        "index.json",
    ],
)
def test_what_the_index_alone_lists_is_checked(key: str, sealed_store: Path) -> None:
    """A space more changes no record, and is found; a byte changed to another where nothing else says what it was."""
    write_index(Store.open(sealed_store))
    path = sealed_store / key
    whole = path.read_bytes()
    for change in (lambda data: data.replace(b":", b": ", 1), lambda data: data + b"\n"):
        path.write_bytes(change(whole))
        assert f"{path}: " in faults(sealed_store)
        assert f"{path}: " in faults(sealed_store, quick=True)
    path.write_bytes(whole.replace(b'"', b"'", 1))
    assert f"{path}: " in faults(sealed_store)
    assert f"{path}: " in faults(sealed_store, quick=True)
    path.unlink()
    assert (f"{path}: missing" in faults(sealed_store)) == (key != "index.json")
    path.write_bytes(whole)
    assert verify(Store.open(sealed_store)).good


def test_an_index_that_is_older_than_a_seal(sealed_store: Path) -> None:
    """A kill came between the two; the records are good, and the next extraction writes it anew."""
    store = Store.open(sealed_store)
    ledger = teacher_ledger(store, "t", 0)

    def seal(saturated: int) -> None:
        key = f"{ROWS}/receipts/1.json"
        edit(sealed_store / key, lambda receipt: receipt.update(saturated=saturated))
        entry = stored_object((sealed_store / key).read_bytes()).model_dump()
        edit(ledger.folder / "manifest.json", lambda manifest: manifest["objects"].update({key: entry}))
        edit(ledger.folder / "manifest.json", lambda manifest: manifest.update(saturated=saturated))

    seal(5)
    write_index(store)
    seal(4)
    older = f"{sealed_store}/index.json: older than {ROWS}/manifest.json; run the same 'hdcache extract' again"
    assert verify(store).faults == [older]
    write_index(store)
    assert verify(store).good


def test_what_is_written_meanwhile_is_not_damage(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are looked at first, the index last: a seal in between changes the index and what it alone lists."""
    store = Store.open(sealed_store)
    teacher_ledger(store, "t", 0).unseal()
    write_index(store)
    real, ledger = integrity.lost_records, teacher_ledger(store, "t", 0)

    def sealing(store: Store) -> list[str]:
        found = real(store)
        if not ledger.sealed:
            records = [receipt for shard in range(3) if (receipt := ledger.receipt(shard)) is not None]
            manifest = view_ledger(store, 0).manifest()
            ledger.seal(
                records, {}, teacher="t", identity=store.teacher("t").identity_digest(), view=0, rows=manifest.rows
            )
            write_index(store)
        return found

    monkeypatch.setattr(integrity, "lost_records", sealing)
    assert [fault for fault in verify(store).faults if "croissant" in fault or "index" in fault] == []
    assert ledger.sealed
