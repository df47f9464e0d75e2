"""Shards made again as they were: the extraction's own code, which hands over bytes instead of putting them into the store.

Whether they are what the store lists is for :mod:`hdcache.extract.repair` to say, before anything that is there is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hdcache.arrays import group_metadata
from hdcache.datasets import Dataset
from hdcache.encodings import Encoder
from hdcache.errors import StoreCorrupt, StoreMismatch
from hdcache.extract.lanes import lanes_for
from hdcache.extract.packing import Packer
from hdcache.extract.pipeline import Pipeline, Timing
from hdcache.extract.pixel_digests import PIXEL_DIGESTS
from hdcache.extract.rows import decode_row, order_of
from hdcache.extract.writer import Row, ViewWriter, is_recorded
from hdcache.ledgers import Ledger
from hdcache.plain_encodings import Parts
from hdcache.reader import TeacherReader
from hdcache.resources import available_cores
from hdcache.samples import Recorded
from hdcache.schema import Receipt, TeacherRecord
from hdcache.store import Store
from hdcache.teachers import Teacher

Made = Callable[[int, dict[str, bytes], Mapping[int, str], int], None]
"""Takes a shard: its number, its objects by their names in the ledger's folder, failed rows, and how many values were clipped."""


class SurveyedReader(TeacherReader):
    """A reader of a teacher whose record is known to be good, though none of its seals may be."""

    def _prove_record(self) -> None:
        pass


class Remade(ViewWriter):
    """A writer whose shards go to ``made``."""

    def __init__(
        self, store: Store, record: TeacherRecord, view: int, made: Made, encoders: Mapping[str, Encoder] | None = None
    ) -> None:
        # What is in a shard's metadata and geometry does not depend on what the encodings were fitted to.
        super().__init__(store, record, encoders or {tap: Encoder(card, {}) for tap, card in record.taps.items()}, view)
        self._made = made

    def write(
        self, shard: int, rows: Sequence[Row], parts: Mapping[str, Parts], failed: Mapping[int, str], saturated: int
    ) -> int:
        """Encode a shard and hand it over; returns its bytes."""
        blocks: dict[str, Any] = {
            f"{tap}/{name}": block for tap, arrays in parts.items() for name, block in arrays.items()
        }
        if PIXEL_DIGESTS in self._writers:
            blocks[PIXEL_DIGESTS] = np.frombuffer(b"".join(row.pixel_digest for row in rows), np.uint8).reshape(-1, 32)
        objects: dict[str, bytes] = {}
        with ThreadPoolExecutor(available_cores(), "compress") as pool:
            for key, block in blocks.items():
                writer = self._writers[key]
                objects[f"{key}/{writer.key(shard)}"] = writer.encode(shard, block, pool.map)
        self._made(shard, objects, failed, saturated)
        return sum(map(len, objects.values()))

    def metadata(self) -> dict[str, bytes]:
        """Every ``zarr.json`` below the ledgers of the view and of the teacher's rows, by key relative to the store's root."""
        found: dict[str, bytes] = {}
        for ledger, writers in ((self.geometry, self._geometry_writers), (self.ledger, self._writers)):
            found[f"{ledger.key}/zarr.json"] = group_metadata({})
            for key, writer in writers.items():
                if folder := key.rpartition("/")[0]:
                    found[f"{ledger.key}/{folder}/zarr.json"] = group_metadata({})
                found[f"{ledger.key}/{key}/zarr.json"] = writer.metadata
        return found

    def geometry_objects(self, shard: int, rows: Sequence[Row]) -> dict[str, bytes]:
        """The objects of a shard of the view, by name in its folder."""
        geometry = np.array([row.geometry(self._columns) for row in rows], np.int32)
        digests = np.frombuffer(b"".join(row.digest for row in rows), np.uint8).reshape(-1, 32)
        blocks: tuple[tuple[str, Any], ...] = (("geometry", geometry), ("source_digest", digests))
        writers = {name: self._geometry_writers[name] for name, _ in blocks}
        return {f"{name}/{writers[name].key(shard)}": writers[name].encode(shard, block) for name, block in blocks}

    def seal_rows(self) -> None:
        """Seal the teacher's rows alone; the index stays as it is."""
        root = f"teachers/{self.record.name}"
        static = {f"{root}/{key}": value for key, value in self.record.objects.items()} | self._static
        with self._record_lock():
            self._seal(self.ledger, static, teacher=self.record.name, identity=self.record.identity_digest())

    def seal_geometry(self) -> None:
        """Seal the view alone; the index stays as it is."""
        with self._view_lock():
            self._open(self.geometry, self._geometry_writers, self._geometry_static)
            self._seal(self.geometry, self._geometry_static, teacher="", identity="")

    def kept_geometry(self, name: str, shard: int) -> Any:
        """What can still be read of a shard of ``geometry`` or ``source_digest``; None: it is damaged."""
        size = self.store.card.rows_per_shard
        return self._salvaged(name, (shard * size, min(self.rows, (shard + 1) * size)))


class Again(Pipeline):
    """Runs a teacher over shards once more. Rows that failed then stay failed, whatever could be read of them by now."""

    def __init__(
        self,
        store: Store,
        dataset: Dataset,
        teacher: Teacher,
        *,
        threads: int,
        failed: Mapping[int, str],
        encodings: Iterable[str],
    ) -> None:
        super().__init__(
            store, dataset, teacher, threads=threads, max_failures=None, lanes=lanes_for(teacher, list(encodings))
        )
        self._failed = failed

    def _worthwhile(
        self, pool: ThreadPoolExecutor, writer: ViewWriter, shard: int, advance: Callable[[int, Timing], None]
    ) -> bool:
        return True

    def _row(self, view: int, sample: int, recorded: Recorded | None) -> Row:
        if sample in self._failed:
            return Row(sample, None, reason=self._failed[sample])
        return super()._row(view, sample, recorded)


def unread_again(store: Store, dataset: Dataset, remade: Remade, shard: int) -> dict[int, str]:
    """Rows of a shard of a view that could not be read when it was recorded, and why; its arrays are whole.

    Raises
    ------
    StoreCorrupt
        when they are not.
    StoreMismatch
        when such a row can be read by now: why it could not be is forgotten.
    """
    size, geometry = store.card.rows_per_shard, remade.kept_geometry("geometry", shard)
    if geometry is None or remade.kept_geometry("source_digest", shard) is None:
        raise StoreCorrupt(
            f"nothing says what shard {shard} of {remade.geometry.key} was, and its arrays are damaged too"
        )
    order = order_of(store.card.dataset.count, store.card.views.seed, remade.view)
    found: dict[int, str] = {}
    for place in np.flatnonzero(~is_recorded(geometry)).tolist():
        sample = int(order[shard * size + place])
        row = decode_row(store, dataset, remade.record.card.preprocessing, remade.view, sample)
        if not row.reason:
            raise StoreMismatch(
                f"{store.ids[sample]}: it could not be read when its view was recorded, and can be by now; name the original data: "
                "--data DATA"
            )
        found[shard * size + place] = row.reason
    return found


class KeptApart(Ledger):
    """The ledger of kept samples, whose shards are made beside what is there and go to ``made`` instead of in its place."""

    def __init__(self, store: Store, key: str, made: Callable[[Receipt], None]) -> None:
        super().__init__(store.path, key)
        self._made = made

    def replace(self, receipt: Receipt) -> None:
        """Hand over what lies aside."""
        self._made(receipt)


def geometry_again(
    store: Store,
    dataset: Dataset,
    remade: Remade,
    shard: int,
    failed: Mapping[int, str],
    intact: Collection[str],
    threads: int,
) -> list[Row]:
    """The rows of a shard of a view, drawn anew; those that ``failed`` stay so. Of its two arrays some may be ``intact``.

    Raises
    ------
    StoreMismatch
        when an image cannot be read any more, or is not the one that it was, as far as what is left tells.
    """
    size, view = store.card.rows_per_shard, remade.view
    order = order_of(store.card.dataset.count, store.card.views.seed, view)[shard * size : (shard + 1) * size]
    preprocessing = remade.record.card.preprocessing

    def drawn(place: int) -> Row:
        sample = int(order[place])
        if shard * size + place in failed:
            return Row(sample, None, reason=failed[shard * size + place])
        return decode_row(store, dataset, preprocessing, view, sample)

    with ThreadPoolExecutor(threads, "decode") as pool:
        rows = list(pool.map(drawn, range(len(order))))
    geometry, digests = (
        remade.kept_geometry(name, shard) if name in intact else None for name in ("geometry", "source_digest")
    )
    for place, row in enumerate(rows):
        if shard * size + place in failed:
            continue
        why = row.reason
        seen = digests is None or digests[place].tobytes() == row.digest
        alike = geometry is None or not is_recorded(geometry[place]) or tuple(geometry[place][6:8]) == row.source_size
        if not why and not (seen and alike):
            why = f"{store.ids[row.sample]}: the {dataset.card.noun.removesuffix('s')} changed since its view was recorded"
        if why:
            raise StoreMismatch(f"{why}; restore it, or name the original data: --data DATA")
    return rows


def kept_again(
    store: Store, dataset: Dataset, shards: Mapping[int, Mapping[int, str]], untrusted: Collection[int],
    made: Callable[[Receipt], None], threads: int,
) -> None:  # fmt: skip
    """Make shards of the kept samples beside what is there; ``shards``: number -> rows that failed and stay so.

    Of those that are ``untrusted`` the digests of the samples are damaged.
    """
    packer = Packer(store, dataset, threads)
    packer.ledger = KeptApart(store, packer.ledger.key, made)
    with ThreadPoolExecutor(threads, "pack") as pool:
        for number, failed in shards.items():
            packer.restore(pool, number, lambda rows: None, failed, trusted=number not in untrusted)
