"""The small files of a store, read as what they may be: records, and the metadata of arrays, before zarr sees them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdcache.errors import StoreCorrupt, StoreUnreadable
from hdcache.records import canonical_json, record_check
from hdcache.schema import StoredObject

_CODECS = {"bytes", "blosc", "crc32c", "sharding_indexed"}
_KEYS = {"name": "default", "configuration": {"separator": "."}}
_METADATA_LIMIT = 4 << 20
RECORD_BYTES = 64 << 20
"""The largest record that is read: a manifest of some 400,000 objects."""
NESTED, ENTRIES = 450_000, 1_500_000
"""Objects and lists, and commas, that a record may hold: with them a parser's memory is bounded before it parses."""
GROUP_NESTED = 20_000
"""Objects and lists in the record of a store or of a teacher, which lists no shards."""
CHECK = "hdcache_check"
"""Attribute of a group beside its record; stores of earlier versions have none."""


def contained(root: Path, key: str) -> Path:
    """``root/key``; :class:`StoreCorrupt` where links lead out of the store: what lies there is not its own."""
    path = root / key
    real, inside = os.path.realpath(path), os.path.realpath(root)
    if real != inside and not real.startswith(inside.rstrip(os.sep) + os.sep):
        raise StoreCorrupt(
            f"{path}: a link that leads out of the store, to {real}; copy the store with its links followed (cp -rL)"
        )
    return path


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, sorted; nothing where there is none. ``glob`` takes a folder that cannot be read for an empty one."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_record(path: Path) -> bytes:
    """The bytes of a small file of a store; :class:`StoreCorrupt` when it is missing, huge, a link or cannot be read."""
    try:
        # Not blocking: what pretends to be a record may be a pipe that nobody writes to.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            found = os.fstat(number)
            if not stat.S_ISREG(found.st_mode):
                raise StoreCorrupt(f"{path}: not a file; copy the store again")
            if found.st_size > RECORD_BYTES:
                raise StoreCorrupt(f"{path}: {found.st_size} bytes is too large for a record; copy the store again")
            with open(number, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(number)
    except FileNotFoundError:
        raise StoreCorrupt(f"{path}: missing; copy the store again or rerun 'hdcache extract'") from None
    except OSError as error:
        if path.is_symlink():
            raise StoreCorrupt(
                f"{path}: a link; copy the store with its links followed (cp -rL), or its file again"
            ) from None
        raise StoreUnreadable(f"{path}: cannot be read ({error.strerror}); check the disk and permissions") from None


def read_json(path: Path) -> Any:
    """A small JSON file of a store; :class:`StoreCorrupt` when it is missing, huge or malformed."""
    return parse_json(path, read_record(path))


def read_attributes(path: Path) -> Any:
    """The ``hdcache`` attribute of a group's metadata, None where there is none."""
    return attributes_of(parse_json(path, read_record(path), GROUP_NESTED), path)


def attributes_of(found: Any, where: str | Path) -> Any:
    """As :func:`read_attributes`, of metadata that was read from ``where``."""
    attributes = found.get("attributes") if isinstance(found, dict) else None
    if not isinstance(attributes, dict):
        return None
    record = attributes.get("hdcache")
    if CHECK in attributes and attributes[CHECK] != record_check(record):
        raise StoreCorrupt(f"{where}: altered since it was written (its check differs); copy the store again")
    return record


def group_metadata(record: Mapping[str, Any]) -> bytes:
    """``zarr.json`` of a group that carries an hdcache record."""
    attributes: dict[str, Any] = {"hdcache": dict(record)}
    if record:
        attributes[CHECK] = record_check(attributes["hdcache"])
    return canonical_json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def parse_json(where: str | Path, data: bytes, nested: int = NESTED) -> Any:
    """The value of a JSON text that was read from ``where``; :class:`StoreCorrupt` when it is malformed or says a thing twice.

    What would take more memory than any record does is refused before it is parsed.
    """
    if data.count(b"{") + data.count(b"[") > nested or data.count(b",") > ENTRIES:
        raise StoreCorrupt(f"{where}: more than {nested:,} entries; not a record of hdcache")
    try:
        return json.loads(data, parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError):
        raise StoreCorrupt(f"{where}: not valid JSON; copy the store again") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two equal keys a parser keeps one, and another parser the other.
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def check_array_metadata(
    path: Path, shape: tuple[int, ...], dtype: str, shard: int | None, listed: StoredObject | None = None
) -> dict[str, Any]:
    """The metadata of an array; refused where it is not what the store's records say, before zarr sees it."""
    if path.is_file() and path.stat().st_size > _METADATA_LIMIT:
        raise StoreCorrupt(f"{path}: metadata of {path.stat().st_size} bytes")
    data = read_record(path)
    if listed is not None and listed.sha256 != hashlib.sha256(data).hexdigest():
        raise StoreCorrupt(f"{path}: altered since the store was sealed; copy the store again")
    meta = parse_json(path, data)
    if not isinstance(meta, dict) or meta.get("zarr_format") != 3 or meta.get("node_type") != "array":
        raise StoreCorrupt(f"{path}: not the metadata of a Zarr v3 array")
    if meta.get("shape") != list(shape) or meta.get("data_type") != dtype:
        raise StoreCorrupt(
            f"{path}: {meta.get('data_type')}{meta.get('shape')}, but the store's records say {dtype}{list(shape)}"
        )
    grid = {"name": "regular", "configuration": {"chunk_shape": [shard or shape[0], *shape[1:]]}}
    if meta.get("chunk_grid") != grid:
        raise StoreCorrupt(f"{path}: chunks {meta.get('chunk_grid')} do not fit the store's {shard} rows per shard")
    # Under another naming of chunks, zarr would look for files that are not there and read zeros.
    if meta.get("chunk_key_encoding") != _KEYS or meta.get("storage_transformers"):
        raise StoreCorrupt(f"{path}: its chunks are not named as a store names them; copy the store again")
    _check_codecs(path, meta.get("codecs"))
    return meta


def _check_codecs(path: Path, codecs: Any) -> None:
    for codec in codecs if isinstance(codecs, list) and codecs else [None]:
        name = codec.get("name") if isinstance(codec, dict) else None
        if not isinstance(name, str) or name not in _CODECS:
            raise StoreCorrupt(
                f"{path}: codec {name!r} is not one of those that stores use: {', '.join(sorted(_CODECS))}"
            )
        inner = codec["configuration"] if isinstance(codec, dict) and "configuration" in codec else None
        for key in ("codecs", "index_codecs"):
            if isinstance(inner, dict) and key in inner:
                _check_codecs(path, inner[key])
