"""The small files of a store, read as what they may be: records, and the metadata of arrays, before zarr sees them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hdcache.errors import StoreCorrupt
from hdcache.schema import StoredObject

_CODECS = {"bytes", "transpose", "blosc", "zstd", "gzip", "crc32c", "sharding_indexed"}
_KEYS = {"name": "default", "configuration": {"separator": "."}}
_METADATA_LIMIT, _RECORD_LIMIT = 4 << 20, 256 << 20


def read_record(path: Path) -> bytes:
    """The bytes of a small file of a store; :class:`StoreCorrupt` when it is missing, huge or cannot be read."""
    try:
        if (size := path.stat().st_size) > _RECORD_LIMIT:
            raise StoreCorrupt(f"{path}: {size} bytes is too large for a record; copy the store again")
        return path.read_bytes()
    except FileNotFoundError:
        raise StoreCorrupt(f"{path}: missing; copy the store again or rerun 'hdcache extract'") from None
    except OSError as error:
        raise StoreCorrupt(f"{path}: cannot be read ({error.strerror}); check the disk and permissions") from None


def read_json(path: Path) -> Any:
    """A small JSON file of a store; :class:`StoreCorrupt` when it is missing, huge or malformed."""
    return _parse(path, read_record(path))


def read_attributes(path: Path) -> Any:
    """The ``hdcache`` attribute of a group's metadata, None where there is none."""
    found = read_json(path)
    attributes = found.get("attributes") if isinstance(found, dict) else None
    return attributes.get("hdcache") if isinstance(attributes, dict) else None


def _parse(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise StoreCorrupt(f"{path}: not valid JSON; copy the store again") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def check_array_metadata(
    path: Path, shape: tuple[int, ...], dtype: str, shard: int | None, listed: StoredObject | None = None
) -> dict[str, Any]:
    """The metadata of an array; refused where it is not what the store's records say, before zarr sees it."""
    if path.is_file() and path.stat().st_size > _METADATA_LIMIT:
        raise StoreCorrupt(f"{path}: metadata of {path.stat().st_size} bytes")
    data = read_record(path)
    if listed is not None and listed.sha256 != hashlib.sha256(data).hexdigest():
        raise StoreCorrupt(f"{path}: altered since the store was sealed; copy the store again")
    meta = _parse(path, data)
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
                f"{path}: codec {name!r} is not one of the core codecs that stores use: {', '.join(sorted(_CODECS))}"
            )
        inner = codec["configuration"] if isinstance(codec, dict) and "configuration" in codec else None
        for key in ("codecs", "index_codecs"):
            if isinstance(inner, dict) and key in inner:
                _check_codecs(path, inner[key])
