"""Durable writes on file systems that lack what they would like to have."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hdcache.durable import durable_move, durable_parts, durable_unlink, durable_write, partial_files, sync_folder
from hdcache.errors import OutOfSpace


def fail(number: int) -> object:
    def broken(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return broken


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_create_only_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """exFAT and SMB have no links: the first writer still wins, the second is told, the content is the first's."""
    monkeypatch.setattr(os, "link", fail(number))
    durable_write(tmp_path / "m", b"one", create_only=True)
    with pytest.raises(FileExistsError):
        durable_write(tmp_path / "m", b"two", create_only=True)
    assert (tmp_path / "m").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_create_only_with_hard_links_leaves_one_file(tmp_path: Path) -> None:
    durable_write(tmp_path / "m", b"one", create_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m").stat().st_nlink == 1


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some mounts refuse fsync of a folder; a real input/output error is raised."""
    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def test_a_file_in_parts_is_one_file_or_none(tmp_path: Path) -> None:
    path = tmp_path / "d" / "f"
    listed = durable_parts(path, (bytes([number]) * number for number in range(200)))
    assert (listed.size, listed.sha256) == (len(path.read_bytes()), hashlib.sha256(path.read_bytes()).hexdigest())
    before = path.read_bytes()

    def broken() -> Iterator[bytes]:
        yield b"new"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        durable_parts(path, broken())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_moved_over_another_and_removed(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    durable_move(tmp_path / "a", tmp_path / "b")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("b", "a")]
    durable_unlink(tmp_path / "b")
    durable_unlink(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_whatever_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    with pytest.raises(OutOfSpace, match=r"no space left while writing .*/d; finished shards are safe: free space"):
        durable_write(tmp_path / "d", b"d")
    with pytest.raises(OutOfSpace, match=r"no space left while writing .*/b;"):
        durable_move(tmp_path / "a", tmp_path / "b")
    with pytest.raises(OutOfSpace, match=r"no space left while writing .*/c;"):
        durable_unlink(tmp_path / "c")


def test_unfinished_files_are_found(tmp_path: Path) -> None:
    path, found = tmp_path / "d" / "f", []

    def parts() -> Iterator[bytes]:
        found.extend(partial_files(tmp_path))
        yield b"x"

    assert partial_files(tmp_path / "none") == []
    durable_parts(path, parts())
    assert [one.parent for one in found] == [path.parent]
    assert partial_files(tmp_path) == []
