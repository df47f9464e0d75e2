"""Writes the rows of one teacher and one view, shard by shard, and seals them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
from numpy.typing import NDArray

from hdcache.arrays import ArrayReader, ShardWriter, group_metadata
from hdcache.durable import durable_write, partial_files, stored_object
from hdcache.errors import StoreCorrupt, StoreMismatch
from hdcache.extract.pixel_digests import DIGEST_CARD, PIXEL_DIGESTS, keeps_digests
from hdcache.geometry import read_shard_geometry
from hdcache.index import write_index
from hdcache.leases import check_held
from hdcache.ledgers import Ledger, teacher_ledger, view_ledger
from hdcache.resources import available_cores
from hdcache.row_arrays import MASK_ARRAY, Parts, codec_of, mask_array, row_bytes
from hdcache.schema import ArrayCard, Receipt, StoredObject, TapCard, TeacherRecord
from hdcache.shards import Codec, Map, rows_together
from hdcache.store import GEOMETRY_COLUMNS, Store, geometry_columns
from hdcache.views import Box

if TYPE_CHECKING:
    # Rows that were encoded elsewhere are written without torch.
    from hdcache.encodings import Encoder

ARRAYS = 4
"""Arrays of one shard that are compressed and flushed to disk at once."""
WRITE_LOCKS = 61
"""Files that shards are locked by while they are written: two tasks for one shard must not write at once."""
_SHARD_FILE = re.compile(r"\.(?:c\.)?(\d+)\.")
"""How the name of an unfinished file of a shard begins: of a chunk's, or of its receipt's."""


def is_recorded(geometry: NDArray[np.int32]) -> Any:
    """Whether a row [columns] (or each row, [rows, columns]) of a view's geometry was read when it was written."""
    return geometry[..., GEOMETRY_COLUMNS.index("source_width")] > 0


def write_once(path: Path, data: bytes) -> StoredObject:
    """Write a small file, unless it is there with the same bytes: a rerun of a finished store changes nothing."""
    if path.is_file() and path.read_bytes() == data:
        return stored_object(data)
    return durable_write(path, data)


def salvaged(
    store: Store, key: str, chunk: str, shape: tuple[int, ...], dtype: str, span: tuple[int, int]
) -> NDArray[Any] | None:
    """One array of a shard whose receipt is no help: its own checksums tell whether it is whole."""
    path = store.path / key / chunk
    if not path.is_file():
        return None
    try:
        data = path.read_bytes()
        listed = {f"{key}/{chunk}": stored_object(data)}
        return ArrayReader(store.path, key, shape, dtype, listed, store.card.rows_per_shard).rows(*span).copy()
    except (StoreCorrupt, OSError):
        return None


@dataclass(frozen=True)
class Row:
    """One decoded row. A failed one has a reason and no pixels."""

    sample: int
    pixels: NDArray[np.uint8] | None
    """[3, size, size], or [3, frames, size, size] of a clip."""
    box: Box = (0, 0, 0, 0)
    flip: bool = False
    source_size: tuple[int, int] = (0, 0)
    digest: bytes = bytes(32)
    reason: str = ""
    gone: bool = False
    """Whether the system could not read the file, as against bytes that are no image."""
    frames: tuple[int, ...] = ()
    """Indices of a clip's frames in its video."""
    pixel_digest: bytes = bytes(32)
    """Of the pixels that a teacher saw, where one is kept (:mod:`hdcache.extract.pixel_digests`)."""

    def geometry(self, columns: int) -> list[int]:
        """The row's numbers in the order of the store's columns; a failed one has no frames."""
        numbers = [self.sample, *self.box, int(self.flip), *self.source_size, *self.frames]
        return numbers + [0] * (columns - len(numbers))


def tap_writer(card: TapCard, name: str, rows: int, chunk: int, shard: int) -> ShardWriter:
    """Encodes the shards of array ``name`` of a tap of ``rows`` rows, in a store of so many rows a chunk and a shard."""
    array, codec = card.arrays[name], codec_of(card, name)
    about = {"hdcache": {"tap": card.tap, "array": name, "encoding": card.encoding}}
    together = rows_together(chunk, row_bytes(array), codec)
    return ShardWriter(rows, array, together, shard, codec=codec, attributes=about)


class ViewWriter:
    """Writes one teacher's rows of one view, and the view's geometry where no teacher has before."""

    def __init__(self, store: Store, record: TeacherRecord, encoders: Mapping[str, Encoder], view: int) -> None:
        card = store.card
        self.store, self.record, self.encoders, self.view = store, record, encoders, view
        self.rows = card.dataset.count
        self.shards = -(-self.rows // card.rows_per_shard)
        self.ledger = teacher_ledger(store, record.name, view)
        self.geometry = view_ledger(store, view)
        self._static: dict[str, StoredObject] = {}
        self._geometry_static: dict[str, StoredObject] = {}
        chunk, shard = card.rows_per_chunk, card.rows_per_shard
        self._writers: dict[str, ShardWriter] = {}
        for tap, encoder in encoders.items():
            for name in encoder.card.arrays:
                self._writers[f"{tap}/{name}"] = tap_writer(encoder.card, name, self.rows, chunk, shard)
        if record.card.mask is not None:
            # Which tokens a row's teacher saw belongs to the teacher: other teachers share the view without it.
            bits = {"tokens": record.card.tokens, "bits": "visible patch tokens, the first in the highest bit"}
            self._writers[MASK_ARRAY] = ShardWriter(
                self.rows, mask_array(record.card), chunk, shard, codec=None, attributes={"hdcache": bits}
            )
        if keeps_digests(self.ledger.folder):
            # The last of them: its metadata is written before that of all others.
            self._writers[PIXEL_DIGESTS] = ShardWriter(
                self.rows, DIGEST_CARD, shard, shard, codec=Codec(), attributes={}
            )
        columns = geometry_columns(card.views)
        self._columns = len(columns)
        named = {"hdcache": {"columns": list(columns)}}
        self._geometry_writers = {
            "geometry": ShardWriter(
                self.rows,
                ArrayCard(shape=(len(columns),), dtype="int32"),
                shard,
                shard,
                codec=Codec(),
                attributes=named,
            ),
            "source_digest": ShardWriter(
                self.rows, ArrayCard(shape=(32,), dtype="uint8"), shard, shard, codec=None, attributes={}
            ),
        }
        for ledger, writers in ((self.ledger, self._writers), (self.geometry, self._geometry_writers)):
            for key, writer in writers.items():
                writer.follow(ledger.folder / key / "zarr.json")

    def open(self) -> None:
        """Write the metadata of every group and array, where it is not there yet; mend and clear what a kill left."""
        self._clear()
        with self._view_lock():
            for shard in range(self.shards):
                self.geometry.settle(shard)
            self._clear_geometry()
            self._open(self.geometry, self._geometry_writers, self._geometry_static)
        with self._record_lock():
            self._open(self.ledger, self._writers, self._static)

    def _open(self, ledger: Ledger, writers: Mapping[str, ShardWriter], static: dict[str, StoredObject]) -> None:
        folders = {f"/{folder}" for key in writers if (folder := key.rpartition("/")[0])}
        metadata = {f"{ledger.key}{folder}": group_metadata({}) for folder in sorted({"", *folders})}
        metadata |= {f"{ledger.key}/{key}": writer.metadata for key, writer in writers.items()}
        for folder, data in reversed(metadata.items()):
            static[f"{folder}/zarr.json"] = write_once(self.store.path / folder / "zarr.json", data)

    def _clear(self) -> None:
        """Remove unfinished files of processes that were killed. A shard's lock tells that nobody writes it still."""
        for path in partial_files(self.ledger.folder):
            named = _SHARD_FILE.match(path.name)
            with self._shard_lock(int(named[1])) if named else self._record_lock():
                path.unlink(missing_ok=True)

    def _clear_geometry(self) -> None:
        for path in partial_files(self.geometry.folder):
            path.unlink(missing_ok=True)

    def todo(self) -> list[int]:
        """Shards without a receipt, and shards with failed rows, which are tried again."""
        receipts = {shard: self.ledger.receipt(shard) for shard in range(self.shards)}
        return [shard for shard, receipt in receipts.items() if receipt is None or receipt.failed]

    def lost_geometry(self) -> list[int]:
        """Shards that hold this teacher's rows while the geometry of the view, or its receipt, is gone."""
        return [
            shard
            for shard in range(self.shards)
            if self.geometry.receipt(shard) is None and self.ledger.receipt(shard) is not None
        ]

    def sealed(self) -> bool:
        """Whether nothing is left to do for a view without shards in :meth:`todo`."""
        return self.ledger.sealed and self.geometry.sealed and not self.lost_geometry()

    def write(
        self, shard: int, rows: Sequence[Row], parts: Mapping[str, Parts], failed: Mapping[int, str], saturated: int
    ) -> int:
        """Write a shard of every tap, then its receipt; returns bytes written.

        A retry that mended no row, or that lost one which is stored, writes nothing. Nobody writes alone: a task may have
        been given out twice, or be left over from a run that died. Who comes second finds the receipt.

        Raises
        ------
        StoreMismatch
            when a row was made from another image or box than the one that is recorded for it by now.
        """
        with self._shard_lock(shard):
            return self._write_shard(shard, rows, parts, failed, saturated)

    def _shard_lock(self, shard: int) -> filelock.BaseFileLock:
        return filelock.FileLock(self.ledger.folder / f".{shard % WRITE_LOCKS}.lock")

    def _record_lock(self) -> filelock.BaseFileLock:
        """Held while the view's metadata and seal are written; no other lock is taken meanwhile."""
        return filelock.FileLock(self.store.teacher_path(self.record.name) / f".{self.view}.lock")

    def _write_shard(
        self, shard: int, rows: Sequence[Row], parts: Mapping[str, Parts], failed: Mapping[int, str], saturated: int
    ) -> int:
        known = self.ledger.receipt(shard)
        if known is not None and not failed.keys() < known.failed.keys():
            return 0
        self.ledger.unseal()
        self.ledger.withdraw(shard)
        start = shard * self.store.card.rows_per_shard
        span = (start, start + len(rows))
        blocks = {f"{tap}/{name}": block for tap, arrays in parts.items() for name, block in arrays.items()}
        if PIXEL_DIGESTS in self._writers:
            blocks[PIXEL_DIGESTS] = np.frombuffer(b"".join(row.pixel_digest for row in rows), np.uint8).reshape(-1, 32)
        with ThreadPoolExecutor(available_cores(), "compress") as pool, ThreadPoolExecutor(ARRAYS, "arrays") as arrays:
            written = arrays.map(lambda key: self._write_array(shard, key, blocks[key], pool.map), blocks)
            objects = dict(written)
        self._write_geometry(shard, span, rows)
        self.ledger.record(Receipt(shard=shard, rows=span, objects=objects, failed=dict(failed), saturated=saturated))
        return sum(found.size for found in objects.values())

    def _write_array(self, shard: int, key: str, block: NDArray[np.generic], each: Map) -> tuple[str, StoredObject]:
        writer = self._writers[key]
        data, path = writer.encode(shard, block, each), f"{key}/{writer.key(shard)}"
        check_held(self.store.path)  # encoding takes its time
        return path, durable_write(self.ledger.folder / path, data)

    def _view_lock(self) -> filelock.BaseFileLock:
        """The view's geometry belongs to all teachers, so its writers wait for each other."""
        return filelock.FileLock(self.store.path / "views" / f".{self.view}.lock")

    def _write_geometry(self, shard: int, span: tuple[int, int], rows: Sequence[Row]) -> None:
        with self._view_lock():
            self._merge_geometry(shard, span, rows)

    def _merge_geometry(self, shard: int, span: tuple[int, int], rows: Sequence[Row]) -> None:
        self.geometry.settle(shard)
        geometry = np.array([row.geometry(self._columns) for row in rows], np.int32)
        digests = np.frombuffer(b"".join(row.digest for row in rows), np.uint8).reshape(-1, 32).copy()
        known = read_shard_geometry(self.store, self.view, shard)
        if known is not None:
            # Recorded rows are replayed, never rewritten; only rows that could not be read before may gain numbers.
            recorded, seen = is_recorded(known[0]), is_recorded(geometry)
            other = (geometry != known[0]).any(1) | (digests != known[1]).any(1)
            for i in np.flatnonzero(recorded & seen & other)[:1]:
                raise StoreMismatch(
                    f"{self.store.ids[rows[i].sample]}: another process has recorded view {self.view} of it from another file "
                    "since this one read it; restore that file, and run the same command again"
                )
            if not (seen & ~recorded).any():
                return
            geometry[recorded], digests[recorded] = known[0][recorded], known[1][recorded]
        self._record_geometry(shard, span, geometry, digests, [row.reason for row in rows])

    def _record_geometry(
        self,
        shard: int,
        span: tuple[int, int],
        geometry: NDArray[np.int32],
        digests: NDArray[np.uint8],
        reasons: Sequence[str],
    ) -> None:
        unread = {span[0] + i: why for i, why in enumerate(reasons) if not is_recorded(geometry[i])}
        objects = {}
        for name, block in (("geometry", geometry), ("source_digest", digests)):
            writer = self._geometry_writers[name]
            path = f"{name}/{writer.key(shard)}"
            objects[path] = durable_write(self.geometry.aside(path), writer.encode(shard, block))
        self.geometry.replace(Receipt(shard=shard, rows=span, objects=objects, failed=unread))

    def rebuild_geometry(self, shard: int, rows: Sequence[Row]) -> None:
        """Write lost geometry again: what can still be read of it is kept, the rest is taken from ``rows``, drawn anew.

        Raises
        ------
        StoreMismatch
            when the numbers of a row that the teacher stores are lost, and its image is gone or has changed.
        """
        stored, start = self.ledger.receipt(shard), shard * self.store.card.rows_per_shard
        span = (start, start + len(rows))
        with self._view_lock():
            if stored is None or self.geometry.receipt(shard) is not None:
                return  # another process was faster
            what, an = ("video", "a video") if self.store.card.views.frames else ("image", "an image")
            geometry, digests = (self._salvaged(name, span) for name in self._geometry_writers)
            if geometry is not None and [row.sample for row in rows] != geometry[:, 0].tolist():
                geometry = None
            drawn = np.array([row.geometry(self._columns) for row in rows], np.int32)
            hashes = np.frombuffer(b"".join(row.digest for row in rows), np.uint8).reshape(-1, 32).copy()
            for i, row in enumerate(rows):
                old = geometry[i] if geometry is not None and is_recorded(geometry[i]) else None
                seen = digests[i] if digests is not None and digests[i].any() else None
                if old is not None and seen is not None:
                    drawn[i], hashes[i] = old, seen
                    continue
                why = row.reason
                if row.pixels is not None and (
                    (old is not None and tuple(old[6:8]) != row.source_size)
                    or (seen is not None and seen.tobytes() != row.digest)
                ):
                    why = f"{self.store.ids[row.sample]}: the {what} changed since its view was recorded"
                if why and span[0] + i not in stored.failed:
                    raise StoreMismatch(
                        f"{self.geometry.folder}: the geometry of shard {shard} is lost and {an} it is made from "
                        f"cannot be used ({why}); restore that {what} and run the same command again"
                    )
                if why:
                    drawn[i], hashes[i] = Row(row.sample, None).geometry(self._columns), 0
                elif old is not None:
                    drawn[i] = old
            self._record_geometry(shard, span, drawn, hashes, [row.reason for row in rows])

    def _salvaged(self, name: str, span: tuple[int, int]) -> NDArray[Any] | None:
        card = {"geometry": ((self.rows, self._columns), "int32"), "source_digest": ((self.rows, 32), "uint8")}[name]
        chunk = self._geometry_writers[name].key(span[0] // self.store.card.rows_per_shard)
        return salvaged(self.store, f"{self.geometry.key}/{name}", chunk, *card, span)

    def seal(self) -> None:
        """Seal the geometry and the teacher's rows of this view."""
        self._clear()
        with self._view_lock():
            self._clear_geometry()
            self._seal(self.geometry, self._geometry_static, teacher="", identity="")
        root = f"teachers/{self.record.name}"
        static = {f"{root}/{key}": value for key, value in self.record.objects.items()} | self._static
        with self._record_lock():
            self._seal(self.ledger, static, teacher=self.record.name, identity=self.record.identity_digest())
        write_index(self.store)

    def _seal(self, ledger: Ledger, static: Mapping[str, StoredObject], *, teacher: str, identity: str) -> None:
        receipts = [receipt for shard in range(self.shards) if (receipt := ledger.receipt(shard)) is not None]
        ledger.seal(receipts, static, teacher=teacher, identity=identity, view=self.view, rows=self.rows)
