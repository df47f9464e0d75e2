"""An object is opened when it is listed, whole and proven, or named as what it is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from hdcache import object_files
from hdcache.durable import durable_write
from hdcache.errors import StoreCorrupt
from hdcache.object_files import ObjectFiles
from hdcache.schema import StoredObject

DATA = b"the bytes of a shard"


@pytest.fixture
def listed(tmp_path: Path) -> StoredObject:
    return durable_write(tmp_path / "s/a/c.0", DATA)


def test_an_object_is_read_and_proven_once(
    tmp_path: Path, listed: StoredObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(object_files.hashlib, "file_digest", lambda *a: digested.append(a[1]) or real(*a))
    files = ObjectFiles(tmp_path / "s")
    for _ in range(3):
        with files.open("a/c.0", listed) as file:
            assert file.read() == DATA
    assert digested == ["sha256"]
    found = files.expect("a/c.0", listed)
    assert found is not None
    found.close()


@pytest.mark.parametrize("good_first", [True, False])
def test_what_is_proven_is_what_is_read(
    good_first: bool, tmp_path: Path, listed: StoredObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file has the name by then."""
    path, other = tmp_path / "s/a/c.0", tmp_path / "other"
    other.write_bytes(DATA.upper())
    if not good_first:
        path.rename(tmp_path / "good")
        other.rename(path)
        (tmp_path / "good").rename(other)
    real = ObjectFiles.folder

    def exchanged(files: ObjectFiles, key: str) -> Path:
        other.replace(path)
        return real(files, key)

    monkeypatch.setattr(ObjectFiles, "folder", exchanged)
    files = ObjectFiles(tmp_path / "s")
    if good_first:
        with files.open("a/c.0", listed) as file:
            assert file.tell() == 0
            assert file.read() == DATA
    else:
        with pytest.raises(StoreCorrupt, match=r"a/c\.0: sha256 "):
            files.open("a/c.0", listed)


@pytest.mark.parametrize("damage", [b"", b"t", DATA[:-1], DATA + b"!", DATA.upper(), bytes(len(DATA)), None])
def test_damage_is_named(tmp_path: Path, listed: StoredObject, damage: bytes | None) -> None:
    path = tmp_path / "s/a/c.0"
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    said = (
        "missing, expected 20"
        if damage is None
        else "sha256 "
        if len(damage) == 20
        else f"{len(damage)} bytes, expected 20"
    )
    with pytest.raises(StoreCorrupt, match=f"a/c.0: {said}"):
        ObjectFiles(tmp_path / "s").open("a/c.0", listed)


def test_what_no_record_lists_is_not_opened(tmp_path: Path, listed: StoredObject) -> None:
    files = ObjectFiles(tmp_path / "s")
    with pytest.raises(StoreCorrupt, match=r"a/c\.0: not listed in the manifest"):
        files.open("a/c.0", None)
    assert files.expect("a/c.0", None) is None
    assert files.expect("a/c.1", listed) is None


def test_links_out_folders_and_pipes_are_refused(tmp_path: Path, listed: StoredObject) -> None:
    (tmp_path / "other").write_bytes(DATA)
    (tmp_path / "s/b").symlink_to(tmp_path / "other")
    with pytest.raises(StoreCorrupt, match="s/b: a link that leads out of the store"):
        ObjectFiles(tmp_path / "s").open("b", listed)
    os.mkfifo(tmp_path / "s/pipe")
    for key in ("a", "pipe"):
        with pytest.raises(StoreCorrupt, match=rf"s/{key}: \d+ bytes, expected 20"):
            ObjectFiles(tmp_path / "s").open(key, listed)


def test_a_file_that_may_not_be_read(tmp_path: Path, listed: StoredObject, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(
        StoreCorrupt, match=r"a/c.0: cannot be read \(Permission denied\); check the disk and permissions"
    ):
        ObjectFiles(tmp_path / "s").open("a/c.0", listed)
