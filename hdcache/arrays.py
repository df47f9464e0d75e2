"""One stored array at a time: durable files, deterministic shards, reads that never return zeros for what is missing.

The only file that imports zarr. Shards are encoded in memory by zarr-python (its bytes are deterministic) and
written by :func:`durable_write`; rows are read through zarrs, written in Rust, where it is installed. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore, MemoryStore

from hdcache.durable import durable_write
from hdcache.errors import StoreCorrupt
from hdcache.records import canonical_json
from hdcache.schema import ArrayCard, StoredObject

_CODECS = {"bytes", "transpose", "blosc", "zstd", "gzip", "crc32c", "sharding_indexed"}
_KEYS = {"name": "default", "configuration": {"separator": "."}}
_METADATA_LIMIT, _RECORD_LIMIT = 4 << 20, 256 << 20
_opening = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def group_metadata(record: Mapping[str, Any]) -> bytes:
    """``zarr.json`` of a group that carries an hdcache record."""
    return canonical_json({"zarr_format": 3, "node_type": "group", "attributes": {"hdcache": dict(record)}})


class ShardWriter:
    """Encodes the shards of one array in memory; the bytes depend on the values alone."""

    def __init__(
        self,
        rows: int,
        card: ArrayCard,
        chunk: int,
        shard: int,
        *,
        codec: bool,
        attributes: Mapping[str, Any],
        block_bytes: int = 0,
    ) -> None:
        self._objects: dict[str, Any] = {}
        size = np.dtype(card.dtype).itemsize
        blosc = BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=size, blocksize=block_bytes)
        filters: list[Any] = [blosc] if codec else []
        self._shard = shard
        self._rows = rows
        # Only zarr-python's own pipeline writes the same bytes each time, whatever the user's configuration says.
        with _opening, zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
            self._array = zarr.create_array(
                MemoryStore(self._objects),
                shape=(rows, *card.shape),
                dtype=card.dtype,
                chunks=(chunk, *card.shape),
                shards=(shard, *card.shape),
                compressors=[*filters, Crc32cCodec()],
                fill_value=0,
                chunk_key_encoding={"name": "default", "separator": "."},
                attributes=dict(attributes),
                config={"write_empty_chunks": True},
            )
        self.metadata: bytes = self._objects["zarr.json"].to_bytes()

    def key(self, shard: int) -> str:
        """Object key of a shard, relative to the array."""
        return ".".join(["c", str(shard), *["0"] * (self._array.ndim - 1)])

    def encode(self, shard: int, block: NDArray[np.generic]) -> bytes:
        """The object that holds rows ``[shard * rows_per_shard, ...)``; ``block`` must be the whole shard."""
        start = shard * self._shard
        stop = min(start + self._shard, self._rows)
        if block.shape != (stop - start, *self._array.shape[1:]) or block.dtype != self._array.dtype:
            raise ValueError(
                f"shard {shard}: got {block.dtype}{list(block.shape)}, expected "
                f"{self._array.dtype}{[stop - start, *self._array.shape[1:]]}"
            )
        self._array[start:stop] = block
        return bytes(self._objects.pop(self.key(shard)).to_bytes())


def constant_objects(value: NDArray[np.generic]) -> dict[str, bytes]:
    """``zarr.json`` and the single chunk of an array that is written whole."""
    objects: dict[str, Any] = {}
    array = zarr.create_array(
        MemoryStore(objects),
        shape=value.shape,
        dtype=value.dtype,
        chunks=value.shape,
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    array[...] = value
    return {key: bytes(found.to_bytes()) for key, found in objects.items()}


def write_constant(root: Path, key: str, value: NDArray[np.generic]) -> dict[str, StoredObject]:
    """Write a whole array at ``root/key``; returns its objects by key relative to ``root``."""
    if value.size == 0:
        raise ValueError(f"{key}: an empty array cannot be stored")
    return {
        f"{key}/{name}": durable_write(root / key / name, data)
        for name, data in sorted(constant_objects(value).items())
    }


@lru_cache(maxsize=1)
def read_pipeline() -> str:
    """``zarrs`` (Rust) where it is installed, else ``zarr``."""
    try:
        import zarrs  # noqa: F401
    except ImportError:
        return "zarr"
    return "zarrs"


class ArrayReader:
    """Rows of one stored array; an object that is missing or has another size than listed is an error, never zeros."""

    def __init__(
        self,
        root: Path,
        key: str,
        shape: Sequence[int],
        dtype: str,
        listed: Mapping[str, StoredObject],
        shard: int | None,
        pipeline: str | None = None,
    ) -> None:
        self._folder, self._key, self._listed, self._shard = root / key, key, listed, shard
        self._pipeline = pipeline or read_pipeline()
        self._proved: set[str] = set()
        self._refuse_fork()
        path = self._folder / "zarr.json"
        check_array_metadata(path, tuple(shape), dtype, shard, listed.get(f"{key}/zarr.json"))
        config = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"} if self._pipeline == "zarrs" else {}
        try:
            # zarr's configuration is global: two threads that set and restore it could leave it changed.
            with _opening, zarr.config.set(config):
                self._array: Any = zarr.open_array(LocalStore(self._folder, read_only=True), mode="r", zarr_format=3)
        except Exception as error:
            raise StoreCorrupt(f"{path}: zarr cannot open it ({_reason(error)}); copy the store again") from error

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        """Rows ``[start, stop)`` as a fresh array.

        Raises
        ------
        StoreCorrupt
            naming the object, when one is missing, has the wrong size or fails its checksum.
        """
        self._refuse_fork()
        if not 0 <= start <= stop <= self._array.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {self._array.shape[0]}")
        size = self._shard or max(1, self._array.shape[0])
        names = [
            ".".join(["c", str(shard), *["0"] * (self._array.ndim - 1)])
            for shard in range(start // size, (max(stop, start + 1) - 1) // size + 1)
        ]
        for name in names:
            self._check(name)
            self._prove(name)
        try:
            found = np.asarray(self._array[start:stop])
        except Exception as error:
            raise StoreCorrupt(
                f"{self._folder}: rows {start} to {stop} cannot be decoded ({_reason(error)}); "
                "run 'hdcache verify' to list the damaged objects"
            ) from error
        for name in names:
            self._check(name)  # zarr reads zeros from an object that was removed since the first look
        return found

    def _refuse_fork(self) -> None:
        if _forked and self._pipeline == "zarrs":
            raise RuntimeError(
                "this process was forked after hdcache was imported, and the Rust reader hangs in such a child; "
                "use threads, or multiprocessing with the 'spawn' or 'forkserver' start method"
            )

    def _check(self, name: str) -> None:
        path, listed = self._folder / name, self._listed.get(f"{self._key}/{name}")
        if listed is None:
            raise StoreCorrupt(f"{path}: not listed in the manifest; the store was changed after it was sealed")
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise StoreCorrupt(
                f"{path}: missing, expected {listed.size} bytes; copy the store again or rerun 'hdcache extract'"
            ) from None
        except OSError as error:
            raise StoreCorrupt(f"{path}: cannot be read ({error.strerror}); check the disk and permissions") from None
        if found != listed.size:
            raise StoreCorrupt(
                f"{path}: {found} bytes, expected {listed.size}; copy the store again or rerun 'hdcache extract'"
            )

    def _prove(self, name: str) -> None:
        """Compare an object's sha256 when it is first read: nothing else tells a shard from its equally long sibling."""
        if name in self._proved:
            return
        path, listed = self._folder / name, self._listed[f"{self._key}/{name}"]
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != listed.sha256:
            raise StoreCorrupt(
                f"{path}: sha256 {found[:12]}..., expected {listed.sha256[:12]}...; run 'hdcache verify' to list the "
                "damaged objects, then copy the store again"
            )
        self._proved.add(name)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


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
) -> None:
    """Refuse an array whose metadata is not what the store's records say, before zarr sees it."""
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
