"""Which stores a folder has and what is said of each; nothing that lies there stops the listing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdcache.errors import InputNotFound
from hdcache.ledgers import teacher_ledger
from hdcache.sharing.catalogue import DEPTH, Catalogue, describe, find_stores
from hdcache.sharing.catalogue_entries import StoreEntry, select
from hdcache.store import Store


def paths(root: Path) -> list[tuple[str, str]]:
    return list(find_stores(root))


def test_an_entry_says_what_a_store_is(sealed_store: Path) -> None:
    (entry,) = Catalogue(sealed_store.parent).entries()
    store = Store.open(sealed_store)
    assert (entry.path, entry.fault, entry.sealed) == ("store", "", True)
    assert (entry.kind, entry.noun, entry.samples, entry.classes) == ("folder", "images", 20, 2)
    assert entry.data == "folder:/data"
    assert entry.id == store.id
    (teacher,) = entry.teachers
    assert teacher.id == store.teacher("t").identity_digest()[:16]
    assert (teacher.architecture, teacher.licence, teacher.views) == ("vit_tiny_patch16_224", "none", (0,))
    assert [tap.tap for tap in teacher.taps] == list(store.teacher("t").taps)
    assert teacher.bytes == sum(tap.bytes for tap in teacher.taps)
    listed = teacher_ledger(store, "t", 0).manifest().objects
    listed |= {
        key: value
        for view in (sealed_store / "views").iterdir()
        if view.name == "0"
        for key, value in json.loads((view / "manifest.json").read_text())["objects"].items()
    }
    sizes = [entry.size if hasattr(entry, "size") else entry["size"] for entry in listed.values()]
    assert entry.bytes == sum(sizes)


def test_the_id_does_not_depend_on_where_the_data_lies(sealed_store: Path) -> None:
    before = Store.open(sealed_store).id
    about = json.loads((sealed_store / "about.json").read_text())
    (sealed_store / "about.json").write_text(json.dumps(about | {"data": "folder:/elsewhere"}))
    assert Store.open(sealed_store).id == before


def test_stores_are_found_at_any_depth_and_not_inside_of_each_other(sealed_store: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    deep = root / "/".join("abcdef"[:DEPTH])
    for place in (root / "one", root / "b" / "two", deep, deep / "too-deep", root / ".hidden" / "three"):
        place.parent.mkdir(parents=True, exist_ok=True)
        if place != deep / "too-deep":
            shutil.copytree(sealed_store, place)
    shutil.copytree(sealed_store, root / "one" / "teachers" / "inner")
    shutil.copytree(sealed_store, root / "x" / "/".join("abcdef"[:DEPTH]))
    assert paths(root) == [("a/b/c/d/e/f", ""), ("b/two", ""), ("one", "")]
    assert paths(root / "one") == [(".", "")]


def test_links_are_not_followed(sealed_store: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(sealed_store)
    (root / "loop").symlink_to(root)
    assert paths(root) == []
    assert not Catalogue(root).holds("link")


def test_folders_of_others_are_left_out(tmp_path: Path) -> None:
    for name, text in (("group", "{}"), ("array", '{"zarr_format":3,"node_type":"array"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "zarr.json").write_text(text)
    (tmp_path / "photos" / "samples").mkdir(parents=True)
    assert paths(tmp_path) == []


def test_what_cannot_be_read_is_listed_with_its_fault(sealed_store: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("good", "half", "json", "newer", "teacher"):
        shutil.copytree(sealed_store, root / name)
    (root / "half" / "zarr.json").unlink()
    (root / "json" / "zarr.json").write_text("{")
    newer = json.loads((root / "newer" / "zarr.json").read_text())
    newer["attributes"] = {"hdcache": newer["attributes"]["hdcache"] | {"format": 99}}
    (root / "newer" / "zarr.json").write_text(json.dumps(newer))
    (root / "teacher" / "teachers" / "t" / "zarr.json").write_text("[]")
    found = {entry.path: entry for entry in Catalogue(root).entries()}
    assert list(found) == ["good", "half", "json", "newer", "teacher"]
    assert found["good"].sealed
    assert "creation was cut short" in found["half"].fault
    assert "json/zarr.json: not valid JSON" in found["json"].fault
    assert str(root) not in found["json"].fault, "a page must not say where the folder lies"
    assert "store format 99" in found["newer"].fault
    assert found["teacher"].fault == ""
    assert not found["teacher"].sealed
    assert found["teacher"].teachers[0].fault


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_folder_without_permission_is_listed_with_its_fault(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    assert paths(tmp_path) == [("closed", "cannot be read (Permission denied)")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_a_broken_record_never_stops_the_listing(sealed_store: Path, mutations: Any, data: st.DataObject) -> None:
    """One record of the store becomes something else; the other store is listed as before."""
    root = sealed_store.parent / "many"
    if not root.exists():
        shutil.copytree(sealed_store, root / "other")
        shutil.copytree(sealed_store, root / "store")
    records = [
        "zarr.json",
        "about.json",
        "teachers/t/zarr.json",
        "teachers/t/views/0/manifest.json",
        "views/0/manifest.json",
    ]
    path = root / "store" / data.draw(st.sampled_from(records))
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(mutations(whole)))
        entries = {entry.path: entry for entry in Catalogue(root).entries()}
    finally:
        path.write_bytes(whole)
    assert entries["other"].sealed
    assert len(entries) in (1, 2), "a root record may have become that of somebody else's Zarr group"


def test_an_entry_is_made_anew_only_when_a_record_changed(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(root: Path, path: str) -> StoreEntry:
        made.append(path)
        return describe(root, path)

    monkeypatch.setattr("hdcache.sharing.catalogue.describe", counted)
    catalogue = Catalogue(sealed_store)
    first = catalogue.entries()
    assert catalogue.entries() == first
    assert made == ["."]
    (sealed_store / "teachers" / "t" / "views" / "1").mkdir()
    (entry,) = catalogue.entries()
    assert made == [".", "."]
    assert (entry.sealed, entry.teachers[0].unsealed) == (False, (1,))
    (sealed_store / "zarr.json").unlink()
    assert catalogue.entry(".") is None


def test_a_listing_of_ten_stores_loads_no_torch(sealed_store: Path, tmp_path: Path, python: Any) -> None:
    for number in range(10):
        shutil.copytree(sealed_store, tmp_path / "root" / str(number))
    code = """
import sys
from hdcache.sharing.catalogue import Catalogue
import hdcache.sharing.server
print(len(Catalogue(sys.argv[1]).entries()), [name for name in ("torch", "zarr") if name in sys.modules])
"""
    process = python(code, tmp_path / "root")
    assert process.communicate()[0].strip() == "10 []"


def test_a_part_of_a_copy_says_what_it_holds(sealed_store: Path) -> None:
    whole = Catalogue(sealed_store).entries()[0]
    (sealed_store / "teachers" / "t" / "held.json").write_text('{"taps":["final"]}')
    (entry,) = Catalogue(sealed_store).entries()
    (teacher,) = entry.teachers
    assert (teacher.held, teacher.elsewhere) == (("final",), ("block1.attn_in", "pooled"))
    assert [tap.tap for tap in teacher.taps] == ["final"]
    gone = [
        path.stat().st_size for tap in teacher.elsewhere for path in sealed_store.rglob(f"{tap}/**/*") if path.is_file()
    ]
    assert entry.bytes == whole.bytes - sum(gone)
    assert 0 < teacher.bytes < whole.teachers[0].bytes


def test_who_made_it_is_said_where_that_was_told(
    tmp_path: Path, make_npz: Any, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdcache.extract.run import extract

    monkeypatch.setenv("HDCACHE_MADE_BY", " the vision group ")
    data = make_npz(tmp_path / "d.npz", 8)
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["pooled"], device="cpu", quiet=True)
    (entry,) = Catalogue(tmp_path / "s").entries()
    assert entry.made_by == "the vision group"
    assert "made_by" not in entry.written_with


def test_search_by_teacher_by_tap_and_by_any_word(sealed_store: Path) -> None:
    entries = [*Catalogue(sealed_store.parent).entries(), StoreEntry(path="broken", fault="not valid JSON")]
    assert [one.path for one in select(entries)] == ["store", "broken"]
    assert [one.path for one in select(entries, teacher="VIT_TINY", tap="attn_in")] == ["store"]
    assert select(entries, teacher="vit_tiny", tap="rel.qk") == []
    assert select(entries, teacher="dino") == []
    assert [one.path for one in select(entries, search="folder: klt")] == ["store"]
    assert [one.path for one in select(entries, search="json")] == ["broken"]
    assert select(entries, search="klt nowhere") == []


@pytest.mark.parametrize(
    "path", ["..", "../store", "store/..", "store//", "store/teachers/t", ".hidden", "a\0b", "x" * 5000]
)
def test_no_path_leads_elsewhere(sealed_store: Path, path: str) -> None:
    catalogue = Catalogue(sealed_store.parent)
    assert catalogue.holds("store")
    assert not catalogue.holds(path)
    assert catalogue.entry(path) is None


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match="no such folder; name one that holds stores, or a store"):
        Catalogue(tmp_path / "nowhere")
