"""Writes the rows of one teacher and one view, shard by shard, and seals them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdcache.arrays import ShardWriter, durable_write, group_metadata
from hdcache.encodings import Encoder, Parts, compresses
from hdcache.integrity import Ledger, teacher_ledger, view_ledger
from hdcache.reader import read_shard_geometry
from hdcache.schema import ArrayCard, Receipt, StoredObject, TeacherRecord
from hdcache.store import GEOMETRY_COLUMNS, Store
from hdcache.views import Box


def is_recorded(geometry: NDArray[np.int32]) -> Any:
    """Whether a row [8] (or each row, [rows, 8]) of a view's geometry was read when it was written."""
    return geometry[..., GEOMETRY_COLUMNS.index("source_width")] > 0


def write_once(path: Path, data: bytes) -> StoredObject:
    """Write a small file, unless it is there with the same bytes: a rerun of a finished store changes nothing."""
    if path.is_file() and path.read_bytes() == data:
        return StoredObject(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return durable_write(path, data)


@dataclass(frozen=True)
class Row:
    """One decoded row. A failed one has a reason and no pixels."""

    sample: int
    pixels: NDArray[np.uint8] | None
    """[3, size, size]."""
    box: Box = (0, 0, 0, 0)
    flip: bool = False
    source_size: tuple[int, int] = (0, 0)
    digest: bytes = bytes(32)
    reason: str = ""

    def geometry(self) -> list[int]:
        return [self.sample, *self.box, int(self.flip), *self.source_size]


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
            for name, array in encoder.card.arrays.items():
                about = {"hdcache": {"tap": tap, "array": name, "encoding": encoder.card.encoding}}
                codec = compresses(array.dtype, name)
                self._writers[f"{tap}/{name}"] = ShardWriter(
                    self.rows, array, chunk, shard, codec=codec, attributes=about
                )
        columns = {"hdcache": {"columns": list(GEOMETRY_COLUMNS)}}
        self._geometry_writers = {
            "geometry": ShardWriter(
                self.rows, ArrayCard(shape=(8,), dtype="int32"), shard, shard, codec=True, attributes=columns
            ),
            "source_digest": ShardWriter(
                self.rows, ArrayCard(shape=(32,), dtype="uint8"), shard, shard, codec=False, attributes={}
            ),
        }

    def open(self) -> None:
        """Write the metadata of every group and array, where it is not there yet."""
        groups = [(self.ledger, tap) for tap in self.encoders] + [(self.ledger, ""), (self.geometry, "")]
        for ledger, key in groups:
            static = self._static if ledger is self.ledger else self._geometry_static
            path = "/".join(part for part in (ledger.key, key, "zarr.json") if part)
            static[path] = write_once(self.store.path / path, group_metadata({}))
        for ledger, writers, static in (
            (self.ledger, self._writers, self._static),
            (self.geometry, self._geometry_writers, self._geometry_static),
        ):
            for key, writer in writers.items():
                path = f"{ledger.key}/{key}/zarr.json"
                static[path] = write_once(self.store.path / path, writer.metadata)

    def todo(self) -> list[int]:
        """Shards without a receipt, and shards with failed rows, which are tried again."""
        receipts = {shard: self.ledger.receipt(shard) for shard in range(self.shards)}
        return [shard for shard, receipt in receipts.items() if receipt is None or receipt.failed]

    def write(
        self, shard: int, rows: Sequence[Row], parts: Mapping[str, Parts], failed: Mapping[int, str], saturated: int
    ) -> int:
        """Write a shard of every tap, then its receipt; returns bytes written.

        A retry that mended no row, or that lost one which is stored, writes nothing.
        """
        known = self.ledger.receipt(shard)
        if known is not None and not failed.keys() < known.failed.keys():
            return 0
        self.ledger.unseal()
        start = shard * self.store.card.rows_per_shard
        span = (start, start + len(rows))
        objects: dict[str, StoredObject] = {}
        for tap, arrays in parts.items():
            for name, block in arrays.items():
                key, writer = f"{tap}/{name}", self._writers[f"{tap}/{name}"]
                path = f"{key}/{writer.key(shard)}"
                objects[path] = durable_write(self.ledger.folder / path, writer.encode(shard, block))
        self._write_geometry(shard, span, rows)
        self.ledger.record(Receipt(shard=shard, rows=span, objects=objects, failed=dict(failed), saturated=saturated))
        return sum(found.size for found in objects.values())

    def _write_geometry(self, shard: int, span: tuple[int, int], rows: Sequence[Row]) -> None:
        blocks: dict[str, NDArray[Any]] = {
            "geometry": np.array([row.geometry() for row in rows], np.int32),
            "source_digest": np.frombuffer(b"".join(row.digest for row in rows), np.uint8).reshape(-1, 32).copy(),
        }
        known = read_shard_geometry(self.store, self.view, shard)
        if known is not None:
            # Recorded rows are replayed, never rewritten; only rows that could not be read before may gain numbers.
            recorded = is_recorded(known[0])
            if not (is_recorded(blocks["geometry"]) & ~recorded).any():
                return
            blocks["geometry"][recorded], blocks["source_digest"][recorded] = known[0][recorded], known[1][recorded]
        unread = {span[0] + i: row.reason for i, row in enumerate(rows) if not is_recorded(blocks["geometry"][i])}
        self.geometry.unseal()
        objects = {}
        for name, writer in self._geometry_writers.items():
            path = f"{name}/{writer.key(shard)}"
            objects[path] = durable_write(self.geometry.folder / path, writer.encode(shard, blocks[name]))
        self.geometry.record(Receipt(shard=shard, rows=span, objects=objects, failed=unread))

    def seal(self) -> None:
        """Seal the geometry and the teacher's rows of this view."""
        self._seal(self.geometry, self._geometry_static, teacher="", identity="")
        root = f"teachers/{self.record.name}"
        static = {f"{root}/{key}": value for key, value in self.record.objects.items()} | self._static
        self._seal(self.ledger, static, teacher=self.record.name, identity=self.record.identity_digest())

    def _seal(self, ledger: Ledger, static: Mapping[str, StoredObject], *, teacher: str, identity: str) -> None:
        receipts = [receipt for shard in range(self.shards) if (receipt := ledger.receipt(shard)) is not None]
        ledger.seal(receipts, static, teacher=teacher, identity=identity, view=self.view, rows=self.rows)
