"""Records, metadata and the list of samples of a store, made again from what is left of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdcache.array_metadata import group_metadata, read_json, read_record
from hdcache.arrays import constant_objects
from hdcache.datasets import Dataset
from hdcache.durable import PARTIAL, durable_move, durable_write, stored_object
from hdcache.errors import StoreCorrupt
from hdcache.extract.checked_rows import images_of
from hdcache.extract.damage import Damaged, Survey, receipt_of, teacher_of
from hdcache.extract.packing import write_metadata
from hdcache.extract.remaking import Remade
from hdcache.index import read_index
from hdcache.integrity import MANIFEST, Ledger
from hdcache.ledgers import SAMPLES_RECEIPT
from hdcache.packed import array_writers
from hdcache.progress import counted
from hdcache.resources import available_cores
from hdcache.schema import Receipt
from hdcache.store import PIXELS, Store
from hdcache.teachers import Teacher, choose_device

FROM_COPY = "take it from a good copy (--from COPY)"
RECORD_ADVICE = f"a record cannot be made again; {FROM_COPY}"


class RecordMender:
    """Mends what needs no teacher. Every :class:`~hdcache.extract.damage.Damaged` is told what became of it."""

    def __init__(
        self, store: Store, found: Survey, data: str | None, teachers: Sequence[str], device: str, threads: int | None, *,
        reseal: bool, quiet: bool,
    ) -> None:  # fmt: skip
        self.store, self.found, self.data, self.reseal, self.quiet = store, found, data, reseal, quiet
        self.sources = {name: spec for name, _, spec in (text.partition("=") for text in teachers)}
        self.device, self.threads = choose_device(device), threads or available_cores()
        self._images: dict[bool, Dataset] = {}
        self._teacher: Teacher | None = None
        self._accepted: set[str] = set()
        """Ledgers with shards whose bytes are others now."""

    def _install(self, one: Damaged, data: bytes, how: str) -> bool:
        """Replace an object by ``data``, if that is what it should be."""
        if one.expected is None or stored_object(data) != one.expected:
            return False
        make_room(self.store.path / one.key)
        durable_write(self.store.path / one.key, data)
        one.outcome = how
        return True

    def _dataset(self) -> Dataset:
        """The images; not those that the store keeps as long as these, or the list of samples, are damaged."""
        kept = not any(one.ledger == PIXELS or one.kind == "samples" for one in self.found.open())
        if kept not in self._images:
            self._images[kept] = images_of(self.store, self.data, kept=kept)
        return self._images[kept]

    def _twins(self) -> None:
        """What lies in the store a second time: groups' records, metadata of arrays that other views have too."""
        bad = {one.key for one in self.found.open()}
        intact = {entry: key for key, entry in self.found.listed.items() if key not in bad}
        for one in self.found.open():
            if one.expected is None or self._install(one, group_metadata({}), "written again"):
                continue
            if one.expected in intact and (path := self.store.path / intact[one.expected]).is_file():
                self._install(one, path.read_bytes(), f"copied from {intact[one.expected]}")

    def _samples(self) -> None:
        damaged = {one.key: one for one in self.found.open("samples")}
        arrays = ("id_bytes", "id_offsets", "label")
        names = [f"samples/{name}/{file}" for name in arrays for file in ("c.0", "zarr.json")]
        receipt = damaged.pop(SAMPLES_RECEIPT, None)
        if receipt is not None and all((self.store.path / key).is_file() for key in names):
            self._samples_receipt(receipt, {key: read_record(self.store.path / key) for key in names})
        if not damaged and (receipt is None or receipt.outcome):
            return
        dataset = self._dataset()
        lengths = np.fromiter((len(sample.encode()) for sample in dataset.ids), np.int64, len(dataset.ids))
        values: tuple[NDArray[Any], ...] = (
            np.frombuffer("".join(dataset.ids).encode(), np.uint8),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            np.asarray(dataset.labels, np.int64),
        )
        made = {
            f"samples/{name}/{file}": data
            for name, value in zip(arrays, values, strict=True)
            for file, data in constant_objects(value).items()
        }
        if receipt is not None and not receipt.outcome and self._samples_receipt(receipt, made):
            for key, data in made.items():
                durable_write(self.store.path / key, data)
        for key, one in damaged.items():
            if key in made:
                self._install(one, made[key], "written again from the data set")

    def _samples_receipt(self, one: Damaged, objects: Mapping[str, bytes]) -> bool:
        listed = {key.removeprefix("samples/"): stored_object(data) for key, data in sorted(objects.items())}
        made = Receipt(shard=0, rows=(0, self.store.card.dataset.count), objects=listed)
        return any(self._install(one, data, "written again") for data in (made.checked(), made.canonical()))

    def _receipt(self, one: Damaged) -> None:
        """From the manifest, but for how many values were clipped where that is not known of several shards."""
        manifest, own = self.found.manifests.get(one.ledger), self.found.receipts[one.ledger]
        size = self.store.card.rows_per_shard
        if one.shard is None or one.shard * size >= self.store.card.dataset.count:
            raise StoreCorrupt("there is no such shard; delete it")
        if manifest is None:
            raise StoreCorrupt(
                f"the seal of {one.ledger} is damaged too, or not there yet; {FROM_COPY}, or delete both and run the same 'hdcache "
                "extract' command again"
            )
        clipped = manifest.saturated - sum(receipt.saturated for receipt in own.values())
        if clipped and len(self.found.open("receipt", one.ledger)) > 1:
            return  # extracting one of them again tells
        self._record(one, receipt_of(manifest, one.ledger, one.shard, size).model_copy(update={"saturated": clipped}))

    def _record(self, one: Damaged, receipt: Receipt) -> None:
        ledger = Ledger(self.store.path, one.ledger)
        # As the version spelled it that wrote the seal.
        checked = "check" in read_json(ledger.folder / MANIFEST)
        make_room(self.store.path / one.key)
        durable_write(self.store.path / one.key, receipt.checked() if checked else receipt.canonical())
        self.found.receipts[one.ledger][receipt.shard] = receipt
        one.outcome = "written again from the manifest"

    def _metadata(self) -> None:
        # A writer of a store that is not there follows nothing that is.
        empty = Store(self.store.path / ".nowhere", self.store.card, self.store.about)
        made = {f"{key}/zarr.json": writer.metadata for key, writer in array_writers(empty).items()}
        for ledger in {one.ledger for one in self.found.open("metadata") if one.ledger not in ("", PIXELS)}:
            made |= self._remade(ledger, empty).metadata()
        for one in self.found.open("metadata"):
            if one.key in made:
                self._install(one, made[one.key], "written again")

    def _remade(self, ledger: str, store: Store | None = None) -> Remade:
        """A writer for a view, or for a teacher's rows of it."""
        view = int(ledger.rpartition("/")[2])
        having = [teacher_of(key) for key in self.found.receipts if teacher_of(key) and key.endswith(f"/views/{view}")]
        for name in [teacher_of(ledger)] if teacher_of(ledger) else having:
            return Remade(store or self.store, self.store.teacher(name), view, lambda *_: None)
        raise StoreCorrupt(f"no teacher has rows of {ledger}; {FROM_COPY}")

    def _seal(self, key: str) -> None:
        """Seal a ledger whose seal is lost, from its receipts."""
        if waiting := [one for one in self.found.open() if one.ledger == key and one.kind != "manifest"]:
            raise StoreCorrupt(
                f"{counted(len(waiting), 'objects')} of {key} must be mended first, such as {waiting[0].key}"
            )
        ledger = Ledger(self.store.path, key)
        path = ledger.folder / MANIFEST
        if path.is_file():
            durable_move(path, path.with_name(f".{MANIFEST}.damaged{PARTIAL}"))
        else:
            make_room(path)
        if key == PIXELS:
            listed = write_metadata(self.store, array_writers(self.store))
            rows = self.store.card.dataset.count
            ledger.seal(self.found.receipts[key].values(), listed, teacher="", identity="", view=0, rows=rows)
        elif teacher_of(key):
            writer = self._remade(key)
            writer.open()
            writer.seal()
        else:
            self._remade(key).seal_geometry()
        path.with_name(f".{MANIFEST}.damaged{PARTIAL}").unlink(missing_ok=True)
        for one in self.found.open("manifest", key):
            one.outcome = "sealed again from its receipts" + _as_indexed(self.store, one.key)


def _as_indexed(store: Store, key: str) -> str:
    """Whether a record is the one that the index has, in words."""
    try:
        index = read_index(store.path)
    except StoreCorrupt:
        index = None
    if index is None or key not in index.objects:
        return ""
    same = stored_object(read_record(store.path / key)) == index.objects[key]
    return ", as it was" if same else "; it was another one"


def make_room(path: Path) -> None:
    """Remove an empty folder from where a file belongs; StoreCorrupt for one that holds something."""
    if path.is_dir() and not path.is_symlink():
        try:
            path.rmdir()
        except OSError:
            raise StoreCorrupt(f"{path}: a folder that holds something, where a file belongs; move it away") from None
