"""The index lists what a copy needs and no manifest has; a partial copy says what it holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hdcache import index as indexes
from hdcache.durable import durable_write, stored_object
from hdcache.errors import StoreCorrupt
from hdcache.index import (
    CROISSANT,
    HELD,
    Held,
    build_index,
    check_records,
    check_seals,
    held_taps,
    is_held,
    lost_records,
    sealed_ledgers,
    write_index,
)
from hdcache.integrity import verify
from hdcache.ledgers import INDEX, Index, read_index, teacher_ledger
from hdcache.records import canonical_json
from hdcache.schema import StoredObject
from hdcache.store import Store


def closure(root: Path) -> set[str]:
    """Every object that can be reached from the index."""
    index = read_index(root)
    assert index is not None
    found = {INDEX, *index.objects}
    for key in index.objects:
        record = json.loads((root / key).read_bytes())
        if key.endswith("manifest.json"):
            found |= record["objects"].keys()
        if key == "samples/receipt.json":
            found |= {f"samples/{name}" for name in record["objects"]}
    return found


def test_all_of_a_store_is_reached_from_its_index(sealed_store: Path) -> None:
    write_index(Store.open(sealed_store))
    files = {path.relative_to(sealed_store).as_posix() for path in sealed_store.rglob("*") if path.is_file()}
    assert {key for key in files if not key.endswith((".lock", ".owner"))} == closure(sealed_store) | {"about.json"}
    assert verify(Store.open(sealed_store)).good
    assert not verify(Store.open(sealed_store)).unlisted


def test_every_entry_is_what_the_file_is_and_equal_indexes_are_equal_bytes(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    first = write_index(store)
    assert all(stored_object((sealed_store / key).read_bytes()) == entry for key, entry in first.objects.items())
    before = (sealed_store / INDEX).stat()
    assert write_index(store) == read_index(sealed_store) == first
    assert (sealed_store / INDEX).stat().st_mtime_ns == before.st_mtime_ns, "nothing changed, nothing is written"


def test_only_what_is_sealed_is_listed(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    teacher_ledger(store, "t", 0).unseal()
    assert [ledger.key for ledger in sealed_ledgers(store)] == ["views/0"]
    assert not [key for key in write_index(store).objects if key.startswith("teachers/t/views")]


def test_the_index_does_not_grow_with_the_shards(sealed_store: Path) -> None:
    """A manifest lists the receipts of its shards, and has bounds of its own."""
    index = write_index(Store.open(sealed_store))
    assert not [key for key in index.objects if "/receipts/" in key]
    assert set(teacher_ledger(Store.open(sealed_store), "t", 0).manifest().objects) > {
        f"teachers/t/views/0/receipts/{shard}.json" for shard in range(3)
    }


def test_receipts_that_an_earlier_version_did_not_list(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index lists them instead, and those of a seal that is known are not read again."""
    store = Store.open(sealed_store)
    path = sealed_store / "views/0/manifest.json"
    seal = json.loads(path.read_bytes())
    seal.pop("check")
    seal["objects"] = {key: entry for key, entry in seal["objects"].items() if "/receipts/" not in key}
    path.write_bytes(canonical_json(seal))
    known = write_index(store)
    assert [key for key in known.objects if "/receipts/" in key] == [f"views/0/receipts/{n}.json" for n in range(3)]
    assert verify(store).good
    read: list[Path] = []
    real = indexes.read_record
    monkeypatch.setattr(indexes, "read_record", lambda path: read.append(path) or real(path))
    assert build_index(store, known) == known
    assert not [path for path in read if path.parent.name == "receipts"]
    path.write_bytes(b"{}")
    build_index(store, known)
    assert len([path for path in read if path.parent.name == "receipts"]) == 3


def test_an_altered_index_is_a_fault_and_made_anew(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    good = write_index(store)
    path = sealed_store / INDEX
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"size":', b'"size":1', 1))
    with pytest.raises(StoreCorrupt, match=r"index\.json: altered since it was written"):
        read_index(sealed_store)
    assert [fault for fault in verify(store).faults if "index.json: altered" in fault]
    assert write_index(store) == good
    assert path.read_bytes() == whole


def test_a_kill_while_the_index_is_written_leaves_no_damage(
    sealed_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(sealed_store)
    ledger = teacher_ledger(store, "t", 0)
    seal = (ledger.folder / "manifest.json").read_bytes()
    ledger.unseal()
    write_index(store)
    durable_write(ledger.folder / "manifest.json", seal)
    written: list[str] = []

    def dying(path: Path, data: bytes) -> StoredObject:
        found = durable_write(path, data)
        written.append(path.name)
        assert verify(store).good, written
        return found

    monkeypatch.setattr(indexes, "durable_write", dying)
    write_index(store)
    assert written == [INDEX, CROISSANT, INDEX]
    assert CROISSANT in read_index(sealed_store).objects  # type: ignore[union-attr]


# Partial copies


def test_a_copy_with_some_taps_is_whole_without_the_others(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    assert held_taps(store, "t") is None
    for path in sorted((sealed_store / "teachers/t").rglob("*")):
        key = path.relative_to(sealed_store).as_posix()
        if path.is_file() and not is_held(key, "t", frozenset({"final"})):
            path.unlink()
    assert len(verify(store).faults) > 5
    durable_write(sealed_store / "teachers/t" / HELD, Held(taps=("final",)).canonical())
    assert held_taps(store, "t") == {"final"}
    assert verify(store).good
    (sealed_store / "teachers/t/views/0/final/values/c.1.0.0").unlink()
    assert "final/values/c.1.0.0: missing" in "\n".join(verify(store).faults)


@pytest.mark.parametrize(
    ("key", "held"),
    [
        ("teachers/t/views/0/final/values/c.0.0.0", True),
        ("teachers/t/views/0/pooled/values/c.0.0", False),
        ("teachers/t/views/0/pooled/zarr.json", False),
        ("teachers/t/encodings/pooled/basis/c.0.0", False),
        ("teachers/t/encodings/zarr.json", True),
        ("teachers/t/views/0/zarr.json", True),
        ("teachers/t/views/0/receipts/0.json", True),
        ("teachers/t/views/0/manifest.json", True),
        ("teachers/t/views/0/mask/visible/c.0.0", True),
        ("teachers/t/weights/block9/qkv_bias/c.0", True),
        ("teachers/u/views/0/pooled/values/c.0.0", True),
        ("views/0/geometry/c.0.0", True),
        ("samples/label/c.0", True),
    ],
)
def test_what_a_partial_copy_has(key: str, held: bool) -> None:
    assert is_held(key, "t", frozenset({"final"})) is held
    assert is_held(key, "t", None)


def test_a_note_of_nonsense_is_named(sealed_store: Path) -> None:
    (sealed_store / "teachers/t" / HELD).write_text('{"taps": 3}')
    with pytest.raises(StoreCorrupt, match=r"held\.json: taps: .*tuple"):
        held_taps(Store.open(sealed_store), "t")
    assert "held.json: taps" in "\n".join(verify(Store.open(sealed_store)).faults)


# What is lost


@pytest.mark.parametrize("teachers", [None, ["t"], []])
@pytest.mark.parametrize("key", ["teachers/t/views/0/manifest.json", "views/0/manifest.json", "teachers/t/zarr.json"])
def test_a_record_that_is_gone_is_told_from_one_that_never_was(
    key: str, teachers: list[str] | None, sealed_store: Path
) -> None:
    store = Store.open(sealed_store)
    write_index(store)
    assert lost_records(store, teachers) == []
    (sealed_store / key).unlink()
    asked = teachers != [] or key.startswith("views/")
    assert lost_records(store, teachers) == [key] * asked
    if asked:
        with pytest.raises(
            StoreCorrupt,
            match=rf"{key}: missing, though it was there when index.json was written; 'hdcache repair .* says how",
        ):
            check_records(store, teachers)
    (sealed_store / INDEX).unlink()
    gone = asked and (key == "teachers/t/zarr.json" or (key.startswith("views/") and teachers != []))
    assert lost_records(store, teachers) == [key] * gone, "nothing says that it was ever sealed"


def test_a_seal_that_was_withdrawn_is_not_lost(sealed_store: Path) -> None:
    """Rows that failed are tried again without a seal, and with a receipt less; so ends a store whose index is damaged."""
    store = Store.open(sealed_store)
    write_index(store)
    ledger = teacher_ledger(store, "t", 0)
    ledger.unseal()
    ledger.withdraw(1)
    assert lost_records(store) == []
    assert verify(store).unsealed == ["teachers/t/views/0"]
    assert verify(store).good


def test_a_seal_that_the_index_does_not_list_is_none(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    check_seals(store)
    write_index(store)
    check_seals(store)
    path = sealed_store / "views/0/manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(
        StoreCorrupt, match=r"views/0/manifest\.json: not the seal that index\.json lists; run the same"
    ):
        check_seals(store)
    (sealed_store / INDEX).write_text("{")
    with pytest.raises(StoreCorrupt, match=r"index\.json: not valid JSON"):
        check_seals(store)


@pytest.mark.parametrize(
    ("folder", "lost"),
    [
        ("teachers/t/views/0", ["teachers/t/views/0/manifest.json"]),
        ("teachers/t/views", ["teachers/t/views/0/manifest.json"]),
        ("views/0", ["views/0/manifest.json"]),
        ("views", ["views/0/manifest.json"]),
        ("teachers/t", ["teachers/t/views/0/manifest.json", "teachers/t/zarr.json"]),
        ("teachers", ["teachers/t/views/0/manifest.json", "teachers/t/zarr.json"]),
    ],
)
def test_a_folder_that_is_gone_is_missed(folder: str, lost: list[str], sealed_store: Path) -> None:
    """The store would pass for one that never had that view or teacher."""
    store = Store.open(sealed_store)
    before = write_index(store).objects
    shutil.rmtree(sealed_store / folder)
    assert lost_records(store) == lost
    assert {*lost} <= {fault.removeprefix(f"{sealed_store}/").partition(": ")[0] for fault in verify(store).faults}
    # Who seals something else meanwhile does not make it forgotten.
    after = write_index(store).objects
    assert {key: after[key] for key in lost} == {key: before[key] for key in lost}
    assert lost_records(store) == lost
    # Who removed it on purpose says so; but not of a view that sealed rows belong to.
    (sealed_store / INDEX).unlink()
    assert lost_records(store) == [key for key in lost if key.startswith("views/")]


def test_a_seal_that_is_withdrawn_between_two_looks_is_not_lost(
    sealed_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(sealed_store)
    write_index(store)
    ledger, real = teacher_ledger(store, "t", 0), indexes.read_index

    def slow(path: Path) -> Index | None:
        found = real(path)
        ledger.unseal()
        return found

    monkeypatch.setattr(indexes, "read_index", slow)
    assert lost_records(store) == []


def test_a_store_that_is_made_anew_misses_nothing_of_the_old_one(sealed_store: Path) -> None:
    store = Store.open(sealed_store)
    write_index(store)
    shutil.rmtree(sealed_store / "views")
    shutil.rmtree(sealed_store / "teachers")
    assert store.withdraw()
    assert not [path.name for path in sealed_store.iterdir() if path.suffix == ".json" and path.name != "about.json"]
