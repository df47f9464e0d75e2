"""Durable writes on file systems that lack what they would like to have."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hdcache.durable import durable_parts, durable_write, sync_folder


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
