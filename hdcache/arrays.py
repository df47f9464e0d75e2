"""One stored array at a time: durable files, deterministic shards, reads that never return zeros for what is missing.

The only file that imports zarr, which writes every array's metadata. Shards are put together in memory
(:mod:`hdcache.shards`) and written by :func:`durable_write`; rows are read through zarrs, written in Rust, where it is installed, and those of an epoch
chunk by chunk (:mod:`hdcache.chunks`). No torch here.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hdcache.array_metadata import check_array_metadata, parse_json
from hdcache.array_metadata import group_metadata as group_metadata
from hdcache.array_metadata import read_attributes as read_attributes
from hdcache.array_metadata import read_json as read_json
from hdcache.array_metadata import read_record as read_record
from hdcache.chunks import ShardLayout, known_layout
from hdcache.durable import durable_write
from hdcache.errors import StoreCorrupt
from hdcache.object_files import ObjectFiles
from hdcache.schema import ArrayCard, StoredObject
from hdcache.shards import LEVEL, Codec, Map, shard_bytes

_opening = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class ShardWriter:
    """Encodes the shards of one array in memory; the bytes depend on the values alone."""

    def __init__(
        self,
        rows: int,
        card: ArrayCard,
        chunk: int,
        shard: int,
        *,
        codec: Codec | None,
        attributes: Mapping[str, Any],
    ) -> None:
        import zarr
        from zarr.codecs import BloscCodec, Crc32cCodec
        from zarr.storage import MemoryStore

        objects: dict[str, Any] = {}
        size = np.dtype(card.dtype).itemsize
        filters: list[Any] = []
        if codec is not None:
            filters = [
                BloscCodec(
                    cname="zstd", clevel=LEVEL, shuffle="bitshuffle", typesize=codec.typesize or size,
                    blocksize=codec.block_bytes,
                )
            ]  # fmt: skip
        self._rows, self._chunk, self._shard = rows, chunk, shard
        self._row, self._dtype = tuple(card.shape), np.dtype(card.dtype)
        self._codec = None if codec is None else codec.blosc(size)
        zarr.create_array(
            MemoryStore(objects),
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
        self.metadata: bytes = objects["zarr.json"].to_bytes()

    def follow(self, path: Path) -> None:
        """Go on as the metadata at ``path`` says, where an earlier version wrote it of the same array.

        It may have compressed other numbers of rows together, or at another level: shards that are there, and seals that list
        the file, stay right only if it stays. What describes another array, or nothing, is left to be written anew.
        """
        try:
            data = read_record(path)
            found, own = parse_json(path, data), json.loads(self.metadata)
            chunk = _tuning(found)
            _tuning(own)
        except (StoreCorrupt, LookupError, TypeError, AttributeError):
            return
        if found == own and isinstance(chunk, int) and 0 < chunk <= self._shard and self._shard % chunk == 0:
            self.metadata, self._chunk = data, chunk

    def key(self, shard: int) -> str:
        """Object key of a shard, relative to the array."""
        return ".".join(["c", str(shard), *["0"] * len(self._row)])

    def encode(self, shard: int, block: NDArray[np.generic], each: Map = map) -> bytes:
        """The object that holds rows ``[shard * rows_per_shard, ...)``; ``block`` must be the whole shard.

        ``each`` may run the codec in threads (``ThreadPoolExecutor.map``).
        """
        start = shard * self._shard
        stop = min(start + self._shard, self._rows)
        if block.shape != (stop - start, *self._row) or block.dtype != self._dtype:
            raise ValueError(
                f"shard {shard}: got {block.dtype}{list(block.shape)}, expected "
                f"{self._dtype}{[stop - start, *self._row]}"
            )
        return shard_bytes(block, self._chunk, self._shard // self._chunk, self._codec, each)


def _tuning(metadata: dict[str, Any]) -> Any:
    """Take out of an array's metadata what changes no value; the rows of its chunks."""
    inner = metadata["codecs"][0]["configuration"]
    for codec in inner["codecs"]:
        if codec["name"] == "blosc":
            for key in ("clevel", "typesize", "blocksize"):
                codec["configuration"].pop(key, None)
    rows = inner["chunk_shape"][0]
    inner["chunk_shape"][0] = 0
    return rows


def constant_objects(value: NDArray[np.generic]) -> dict[str, bytes]:
    """``zarr.json`` and the single chunk of an array that is written whole."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

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
        files: ObjectFiles | Path,
        key: str,
        shape: Sequence[int],
        dtype: str,
        listed: Mapping[str, StoredObject],
        shard: int | None,
        pipeline: str | None = None,
    ) -> None:
        """``files`` has the objects by the keys of ``listed``; a path: those in and below that folder."""
        import zarr
        from zarr.storage import LocalStore

        self._files = ObjectFiles(files) if isinstance(files, Path) else files
        self._folder, self._key, self._listed, self._shard = self._files.folder(key), key, listed, shard
        self._pipeline = pipeline or read_pipeline()
        self._refuse_fork()
        path = self._folder / "zarr.json"
        metadata = check_array_metadata(path, tuple(shape), dtype, shard, listed.get(f"{key}/zarr.json"))
        self._layout = known_layout(path, metadata, shard)
        config = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"} if self._pipeline == "zarrs" else {}
        try:
            # zarr's configuration is global: two threads that set and restore it could leave it changed.
            with _opening, zarr.config.set(config):
                self._array: Any = zarr.open_array(LocalStore(self._folder, read_only=True), mode="r", zarr_format=3)
        except Exception as error:
            raise StoreCorrupt(f"{path}: zarr cannot open it ({_reason(error)}); copy the store again") from error
        self._straight = self._layout is not None and pipeline is None and ShardLayout.READABLE

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
        parts = list(self._parts(start, max(stop, start + 1)))
        for name, base, first, last in parts:
            self._check(name, first - base, min(last, stop) - base)
        names = [name for name, *_ in parts]
        if not self._files.on_disk:
            return self._rows_of(names, start, stop)
        try:
            found = np.asarray(self._array[start:stop])
        except Exception as error:
            raise self._undecodable(start, stop, error) from error
        for name in names:
            self._open(name).close()  # zarr reads zeros from an object that was removed since the first look
        return found

    def _rows_of(self, names: Sequence[str], start: int, stop: int) -> NDArray[np.generic]:
        """As :meth:`rows`, of objects that do not lie in the array's folder: zarr is given their bytes."""
        import zarr
        from zarr.core.buffer import default_buffer_prototype
        from zarr.storage import MemoryStore

        whole = default_buffer_prototype().buffer.from_bytes
        memory = {"zarr.json": whole((self._folder / "zarr.json").read_bytes())}
        for name in names:
            with self._open(name) as file:
                memory[name] = whole(file.read())
        try:
            with _opening, zarr.config.set({}):
                array: Any = zarr.open_array(MemoryStore(memory, read_only=True), mode="r", zarr_format=3)
            return np.asarray(array[start:stop])
        except Exception as error:
            raise self._undecodable(start, stop, error) from error

    def copy_rows(self, start: int, stop: int, into: Sequence[NDArray[np.generic] | None]) -> None:
        """Copy rows ``[start, stop)`` to where each of them is wanted, an array of one row's shape; None: nowhere.

        Raises
        ------
        StoreCorrupt
            as :meth:`rows` does.
        """
        if not 0 <= start < stop <= self._array.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {self._array.shape[0]}")
        if not self._straight or self._layout is None:
            for row, place in zip(self.rows(start, stop), into, strict=True):
                if place is not None:
                    place[...] = row
            return
        for name, base, first, last in self._parts(start, stop):
            chunk = self._layout.chunk
            chunks = sorted({(n - base) // chunk for n in range(first, last) if into[n - start] is not None})
            with self._open(name) as file:
                try:
                    for row, block in self._layout.read(file.fileno(), self._size(name), chunks):
                        for number in range(max(first, base + row), min(last, base + row + len(block))):
                            place = into[number - start]
                            if place is not None:
                                place[...] = block[number - base - row]
                except Exception as error:
                    raise self._undecodable(start, stop, error) from error

    def expect_rows(self, start: int, stop: int) -> None:
        """Have the system fetch rows ``[start, stop)``, which :meth:`copy_rows` will read soon, without waiting for them.

        Else the disk rests while a thread decodes, and the thread while the disk reads. What is wrong with them is for
        :meth:`copy_rows` to say.
        """
        if not self._straight or self._layout is None:
            return
        for name, base, first, last in self._parts(start, stop):
            key = f"{self._key}/{name}"
            if (file := self._files.expect(key, self._listed.get(key))) is None:
                continue
            chunks = range((first - base) // self._layout.chunk, (last - 1 - base) // self._layout.chunk + 1)
            with suppress(OSError, ValueError), file:
                self._layout.expect(file.fileno(), self._size(name), chunks)

    def _check(self, name: str, start: int, stop: int) -> None:
        """Have an object proven, and measured what zarr will make of the rows ``[start, stop)`` that it holds."""
        with self._open(name) as file:
            if self._layout is None:
                size = math.prod(self._array.shape) * self._array.dtype.itemsize
                if self._size(name) not in (size, size + 4):
                    raise StoreCorrupt(f"{self._folder}/{name}: {self._size(name)} bytes do not hold {size} of values")
            elif ShardLayout.READABLE:
                chunks = range(start // self._layout.chunk, (stop - 1) // self._layout.chunk + 1)
                try:
                    self._layout.check(file.fileno(), self._size(name), chunks)
                except ValueError as error:
                    raise self._undecodable(start, stop, error) from error

    def _open(self, name: str) -> BinaryIO:
        key = f"{self._key}/{name}"
        return self._files.open(key, self._listed.get(key))

    def _size(self, name: str) -> int:
        return self._listed[f"{self._key}/{name}"].size

    def _parts(self, start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
        """Shards of rows ``[start, stop)``: object, its first row, and the rows of it that are meant."""
        size = self._shard or max(1, self._array.shape[0])
        for shard in range(start // size, (stop - 1) // size + 1):
            yield self._name(shard), shard * size, max(start, shard * size), min(stop, (shard + 1) * size)

    def _name(self, shard: int) -> str:
        return ".".join(["c", str(shard), *["0"] * (self._array.ndim - 1)])

    def _undecodable(self, start: int, stop: int, error: Exception) -> StoreCorrupt:
        return StoreCorrupt(
            f"{self._folder}: rows {start} to {stop} cannot be decoded ({_reason(error)}); "
            "run 'hdcache verify' to list the damaged objects"
        )

    def _refuse_fork(self) -> None:
        if _forked and self._pipeline == "zarrs":
            raise RuntimeError(
                "this process was forked after hdcache was imported, and the Rust reader hangs in such a child; "
                "use threads, or multiprocessing with the 'spawn' or 'forkserver' start method"
            )


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
