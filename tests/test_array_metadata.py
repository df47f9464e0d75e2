"""Small files of a store: read as what they may be. What the metadata of arrays may say is tried in test_arrays.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import zarr

from hdcache.array_metadata import read_attributes, read_json
from hdcache.arrays import group_metadata
from hdcache.durable import durable_write
from hdcache.errors import StoreCorrupt


def test_records_that_are_not_there_or_no_json(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(StoreCorrupt, match=r"r\.json: missing"):
        read_json(path)
    for data in (b"", b"{", b"\xff\xfe", b'{"a": NaN}', b"[-Infinity]", b"[" * 100_000, b"9" * 5000):
        path.write_bytes(data)
        with pytest.raises(StoreCorrupt, match=r"r\.json: not valid JSON"):
            read_json(path)
    with pytest.raises(StoreCorrupt, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path)
    with open(path, "wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(StoreCorrupt, match="314572800 bytes is too large for a record"):
        read_json(path)


def test_attributes_of_groups(tmp_path: Path) -> None:
    path = tmp_path / "zarr.json"
    durable_write(path, group_metadata({"a": "ü"}))
    assert read_attributes(path) == {"a": "ü"}
    assert dict(zarr.open_group(tmp_path, mode="r").attrs) == {"hdcache": {"a": "ü"}}
    for data in (b"[]", b"3", b"{}", b'{"attributes": []}', b'{"attributes": {"b": 1}}'):
        path.write_bytes(data)
        assert read_attributes(path) is None
