"""What a copy will be: what is wanted together with what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hdcache.errors import InputNotFound, OutOfSpace, StoreCorrupt, StoreMismatch
from hdcache.integrity import verify
from hdcache.ledgers import Ledger
from hdcache.sharing.folder import Folder
from hdcache.sharing.merging import Plan
from hdcache.sharing.selection import Contents, Wanted
from hdcache.sharing.transfer import Copied, copy_store
from hdcache.store import Store
from travelling import snapshot, write_travelling


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_travelling(tmp_path_factory.mktemp("merging") / "source")


def copy(source: Path, target: Path, *, dry_run: bool = False, pixels: bool = True, **wanted: tuple) -> Copied:  # type: ignore[type-arg]
    found = copy_store(Folder(source), Folder(target), Wanted(**wanted, pixels=pixels), dry_run=dry_run, quiet=True)
    if not dry_run:
        checked = verify(Store.open(target))
        assert (checked.faults, checked.unsealed, checked.unlisted) == ([], [], [])
    return found


def held(target: Path, teacher: str = "u") -> list[str] | None:
    path = target / f"teachers/{teacher}/held.json"
    return json.loads(path.read_bytes())["taps"] if path.is_file() else None


def test_a_dry_run_counts_what_would_move_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    told = copy(source, tmp_path / "a", dry_run=True)
    assert not (tmp_path / "a").exists()
    done = copy(source, tmp_path / "a")
    assert (told.whole, told.moved, told.teachers, told.views) == (done.whole, done.moved, done.teachers, done.views)
    derived = ("about.json", "index.json", "croissant.json")
    moved = {key: data for key, data in snapshot(tmp_path / "a").items() if key.rpartition("/")[2] not in derived}
    assert (done.moved.objects, done.moved.bytes) == (len(moved), sum(map(len, moved.values())))
    again = copy(source, tmp_path / "a", dry_run=True)
    assert (again.whole, again.moved.objects, again.moved.bytes) == (done.whole, 0, 0)


def test_bytes_are_told_by_teacher_and_tap(source: Path, tmp_path: Path) -> None:
    told = copy(source, tmp_path / "a", dry_run=True)
    assert {name: list(taps) for name, taps in told.teachers.items()} == {
        "t": ["block1.attn_in", "final", "pooled", "constants and weights"],
        "u": ["block2.out", "final", "constants and weights"],
    }
    assert told.views == {"t": [0], "u": [0, 1]}
    files = [path for view in "01" for path in (source / f"teachers/u/views/{view}/final").rglob("*") if path.is_file()]
    final = told.teachers["u"]["final"]
    assert (final.objects, final.bytes) == (len(files), sum(path.stat().st_size for path in files))
    assert (
        told.pixels.objects
        == len([path for path in (source / "samples/pixels/digest").rglob("*") if path.is_file()]) + 1
    )


def test_taps_and_views_are_added_until_the_copy_is_whole(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "a"
    copy(source, target, teachers=("u",), taps=("final",), views=(0,), pixels=False)
    assert held(target) == ["final"]
    assert not (target / "teachers/u/encodings/block2.out").exists()
    assert not (target / "views/1").exists()
    # Another tap of a view more: both taps of both views.
    copy(source, target, teachers=("u",), taps=("block2.out",), views=(1,), pixels=False)
    assert held(target) is None
    assert Store.open(target).views("u") == [0, 1]
    copy(source, target)
    assert snapshot(target) == snapshot(source)


def test_another_view_comes_with_the_taps_that_are_there(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "a"
    copy(source, target, teachers=("u",), taps=("final",), views=(0,))
    copy(source, target, teachers=("u",), taps=("final",), views=(1,))
    assert held(target) == ["final"]
    # The whole teacher is there of view 0: a part of view 1 would make it a part.
    shutil.rmtree(target)
    copy(source, target, teachers=("u",), views=(0,))
    told = copy(source, target, teachers=("u",), taps=("final",), views=(1,))
    assert held(target) is None
    assert "block2.out" in told.teachers["u"]


def test_a_copy_that_was_begun_and_given_up_is_no_copy(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "a"
    copy(source, target, teachers=("u",), taps=("final",))
    for view in "01":
        (target / f"teachers/u/views/{view}/manifest.json").unlink()
    copy_store(Folder(source), Folder(target), Wanted(teachers=("u",), taps=("block2.out",)), quiet=True)
    assert held(target) == ["block2.out"]
    checked = verify(Store.open(target))
    assert checked.good
    assert all("/final/" in key for key in checked.unlisted)  # what was begun, in nobody's way


def test_a_part_is_copied_on_as_a_part(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "a", teachers=("u",), taps=("final",))
    copy(tmp_path / "a", tmp_path / "b")
    assert held(tmp_path / "b") == ["final"]
    assert snapshot(tmp_path / "b") == snapshot(tmp_path / "a")
    # It completes no other copy that would then need more.
    copy(source, tmp_path / "c", teachers=("u",), views=(0,))
    with pytest.raises(
        InputNotFound, match=r"lacks tap 'block2.out' of view 1 of teacher 'u', which the copy at .*c then needs"
    ):
        copy(tmp_path / "a", tmp_path / "c")


def test_a_view_that_the_source_lacks(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "one", teachers=("u",), views=(0,))
    copy(source, tmp_path / "both", teachers=("u",), taps=("final",))
    with pytest.raises(InputNotFound, match=r"lacks view 1 of teacher 'u', which the copy at .*both then needs"):
        copy(tmp_path / "one", tmp_path / "both")


def test_another_store_is_refused_with_what_differs(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "a")
    before = snapshot(tmp_path / "a")
    other = write_other(tmp_path / "other", seed=4)
    with pytest.raises(
        StoreMismatch, match=r"a: is another store \(views.seed: the store has 3, asked was 4\); choose another place"
    ):
        copy(other, tmp_path / "a")
    assert snapshot(tmp_path / "a") == before


def write_other(root: Path, seed: int) -> Path:
    """The samples of another store, without teachers."""
    import numpy as np

    from small_store import IDS, ROWS, store_card

    card = store_card()
    card = card.model_copy(update={"views": card.views.model_copy(update={"seed": seed})})
    Store.create(root, card, IDS, np.arange(ROWS, dtype=np.int64) % 2)
    return root


def test_a_store_without_teachers_travels_too(tmp_path: Path) -> None:
    other = write_other(tmp_path / "other", seed=4)
    copy(other, tmp_path / "a")
    assert Store.open(tmp_path / "a").ids == Store.open(other).ids


def test_another_teacher_of_the_name_is_refused_with_what_differs(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "a")
    data = (tmp_path / "a/teachers/t/zarr.json").read_bytes()
    value = json.loads(data)
    value["attributes"]["hdcache"]["card"]["patch_size"] = 8
    (tmp_path / "a/teachers/t/zarr.json").write_text(json.dumps(value))
    with pytest.raises(
        StoreMismatch, match=r"teacher 't' there is another one \(card.patch_size: the store has 8, asked was 16\)"
    ):
        Plan(Contents.read(Folder(source)), Folder(tmp_path / "a"), Wanted())


def test_other_rows_of_the_same_teacher_are_refused(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "a")
    (tmp_path / "a/views/0/manifest.json").write_bytes((source / "views/1/manifest.json").read_bytes())
    with pytest.raises(StoreMismatch, match=r"a/views/0/manifest.json: seals other rows than those of"):
        copy(source, tmp_path / "a")


def test_a_folder_of_other_things_is_no_place_for_a_store(source: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.jpg").write_bytes(b"")
    with pytest.raises(StoreMismatch, match=r"photos: not empty and not a store \(me.jpg\); choose another place"):
        copy(source, tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["me.jpg"]


def test_rows_of_a_view_that_is_not_sealed(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "a")
    Ledger(tmp_path / "a", "views/1").unseal()
    with pytest.raises(StoreCorrupt, match="rows of view 1 are sealed, the view itself is not; copy from elsewhere"):
        copy(tmp_path / "a", tmp_path / "b")


def test_a_copy_that_will_not_fit_is_not_begun(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))  # type: ignore[attr-defined]
    with pytest.raises(
        OutOfSpace,
        match=r"are to be copied, 100 B are free; free space, choose another place, or copy less \(--teacher",
    ):
        copy(source, tmp_path / "deep/a")
    assert not (tmp_path / "deep").exists()
