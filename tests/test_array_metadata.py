"""Small files of a store: read as what they may be. What the metadata of arrays may say is tried in test_arrays.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zarr

from hdcache.array_metadata import contained, group_metadata, read_attributes, read_json
from hdcache.durable import durable_write
from hdcache.errors import StoreCorrupt


def test_records_that_are_not_there_or_no_json(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(StoreCorrupt, match=r"r\.json: missing"):
        read_json(path)
    for data in (
        b"",
        b"{",
        b"\xff\xfe",
        b'{"a": NaN}',
        b"[-Infinity]",
        b"[" * 100_000,
        b"9" * 5000,
        b'{"a": 1, "a": 1}',
    ):
        path.write_bytes(data)
        with pytest.raises(StoreCorrupt, match=r"r\.json: not valid JSON"):
            read_json(path)
    with pytest.raises(StoreCorrupt, match="not a file"):
        read_json(tmp_path)
    with open(path, "wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(StoreCorrupt, match="314572800 bytes is too large for a record"):
        read_json(path)


def test_attributes_of_groups(tmp_path: Path) -> None:
    path = tmp_path / "zarr.json"
    durable_write(path, group_metadata({"a": "ü"}))
    assert read_attributes(path) == {"a": "ü"}
    attributes = dict(zarr.open_group(tmp_path, mode="r").attrs)
    assert attributes == {"hdcache": {"a": "ü"}, "hdcache_check": attributes["hdcache_check"]}
    for data in (b"[]", b"3", b"{}", b'{"attributes": []}', b'{"attributes": {"b": 1}}'):
        path.write_bytes(data)
        assert read_attributes(path) is None


def test_a_record_that_was_altered_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "zarr.json"
    whole = group_metadata({"a": [1, 2]})
    for old, new in ((b"[1,2]", b"[1,3]"), (b"[1,2]", b"null"), (b'"a"', b'"b"'), (b"[1,2]", b'"\\ud800"')):
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(StoreCorrupt, match=r"zarr\.json: altered since it was written \(its check differs\); copy"):
            read_attributes(path)
    assert b"hdcache_check" not in group_metadata({}), "groups without a record are spelled as they always were"


def test_links_and_pipes_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    with pytest.raises(StoreCorrupt, match=r"link\.json: a link; copy the store with its links followed \(cp -rL\)"):
        read_json(tmp_path / "link.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(StoreCorrupt, match=r"pipe\.json: not a file"):
        read_json(tmp_path / "pipe.json")


def test_what_lies_behind_a_link_is_not_the_store_s(tmp_path: Path) -> None:
    (tmp_path / "store/a").mkdir(parents=True)
    (tmp_path / "store-2").mkdir()
    (tmp_path / "store/inside").symlink_to("a")
    (tmp_path / "way").symlink_to("store")
    for root in ("store", "way"):
        assert contained(tmp_path / root, "a/b") == tmp_path / root / "a/b"
        assert contained(tmp_path / root, "inside/b") == tmp_path / root / "inside/b"
        assert contained(tmp_path / root, "") == tmp_path / root
    for target in ("../store-2", "/etc", ".."):
        (tmp_path / "store/out").unlink(missing_ok=True)
        (tmp_path / "store/out").symlink_to(target)
        with pytest.raises(
            StoreCorrupt, match=r"out/b: a link that leads out of the store, to /.*; copy the store with"
        ):
            contained(tmp_path / "way", "out/b")
