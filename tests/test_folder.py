"""Objects in a folder: written once, links and pipes refused, locks and leftovers hidden."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hdcache.durable import stored_object
from hdcache.errors import StoreCorrupt, StoreMismatch, Unreachable
from hdcache.sharing.folder import Folder
from hdcache.sharing.objects import Found

DATA = b"data" * 1000


def test_an_object_is_written_once_and_an_equal_one_counts_as_written(tmp_path: Path) -> None:
    place = Folder(tmp_path / "new")
    assert place.names() == []
    assert place.size("a/b") is None
    for _ in range(2):
        place.write("a/b", stored_object(DATA), lambda: iter((DATA,)), read_back=True)
    assert place.read("a/b", 10_000) == DATA
    assert place.size("a/b") == len(DATA)
    with pytest.raises(
        StoreMismatch, match=r"new/a/b: is there already with other content, and nothing is overwritten"
    ):
        place.write("a/b", stored_object(b"other"), lambda: iter((b"other",)))
    assert (tmp_path / "new/a/b").read_bytes() == DATA


def test_nothing_is_left_of_what_could_not_be_read(tmp_path: Path) -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield DATA
        raise StoreCorrupt("poisoned")

    with pytest.raises(StoreCorrupt, match="poisoned"):
        Folder(tmp_path).write("a/b", stored_object(DATA), broken)
    assert os.listdir(tmp_path / "a") == []


def test_a_note_is_replaced_and_removed(tmp_path: Path) -> None:
    place = Folder(tmp_path)
    place.replace("t/held.json", lambda old: b"1" if old is None else b"2", 100)
    place.replace("t/held.json", lambda old: b"1" if old is None else old + b"2", 100)
    assert place.read("t/held.json", 100) == b"12"
    place.replace("t/held.json", lambda old: None, 100)
    place.replace("t/held.json", lambda old: None, 100)
    assert place.read("t/held.json", 100) is None


def test_locks_and_leftovers_are_no_objects(tmp_path: Path) -> None:
    for name in ("a/b", "a/.c.1-2.partial", ".t.lock", "a/.0.lock", "x.lease", ".hidden/y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(DATA)
    (tmp_path / "a/nowhere").symlink_to("gone")
    assert Folder(tmp_path).listing() == {"a/b": Found(len(DATA), None)}
    assert Folder(tmp_path).listing("a") == {"a/b": Found(len(DATA), None)}
    assert Folder(tmp_path).listing("missing") == {}
    assert Folder(tmp_path).names() == ["a", "x.lease"]
    assert Folder(tmp_path).names("a") == ["b", "nowhere"]


def test_links_out_of_the_folder_are_neither_read_nor_written(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/b").write_bytes(DATA)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a").symlink_to(tmp_path / "outside")
    place = Folder(tmp_path / "s")
    with pytest.raises(StoreCorrupt, match="a link that leads out of the store"):
        list(place.parts("a/b", stored_object(DATA)))
    with pytest.raises(StoreCorrupt, match="a link that leads out of the store"):
        place.write("a/c", stored_object(DATA), lambda: iter((DATA,)))
    assert os.listdir(tmp_path / "outside") == ["b"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    with pytest.raises(Unreachable, match=r"p: cannot be read: not a file; copy the store again"):
        list(Folder(tmp_path).parts("p", stored_object(DATA)))


def test_a_file_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(DATA)
    with pytest.raises(StoreMismatch, match="f: a file, not a folder; choose another place"):
        Folder(tmp_path / "f").names()


def test_what_the_disk_says_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(DATA)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(Unreachable, match="a: cannot be read: Input/output error; check the disk and permissions"):
        list(Folder(tmp_path).parts("a", stored_object(DATA)))
