"""Records, metadata and the list of samples of a store, made again from what is left of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hdcache.array_metadata import RECORD_BYTES, group_metadata, read_json, read_record
from hdcache.arrays import constant_objects
from hdcache.datasets import Dataset
from hdcache.durable import durable_unlink, durable_write, stored_object
from hdcache.errors import StoreCorrupt, StoreMismatch
from hdcache.extract.checked_rows import images_of
from hdcache.extract.damage import Damaged, Survey, receipt_of, teacher_of
from hdcache.extract.packing import write_metadata
from hdcache.extract.remaking import Remade
from hdcache.index import Held
from hdcache.ledgers import MANIFEST, RECEIPTS, SAMPLES_RECEIPT, Ledger, total_of
from hdcache.packed import array_writers
from hdcache.progress import counted
from hdcache.resources import available_cores
from hdcache.schema import Manifest, Receipt
from hdcache.store import PIXELS, Store
from hdcache.teachers import Teacher

FROM_COPY = "take it from a good copy (--from COPY)"
RECORD_ADVICE = f"a record cannot be made again; {FROM_COPY}"
EXTRACT_ADVICE = f"{FROM_COPY}, or delete what is left of the seal and of this receipt, and run the same 'hdcache extract' command again"
OTHER_RECEIPT = f"made again, but it is not the one that the seal lists; {FROM_COPY}"
OTHER_SEAL = "made again, but it is not the seal that index.json lists"


class RecordMender:
    """Mends what needs no teacher. Every :class:`~hdcache.extract.damage.Damaged` is told what became of it."""

    def __init__(
        self, store: Store, found: Survey, data: Dataset | str | None, teachers: Sequence[str], device: torch.device,
        threads: int | None, *, reseal: bool, quiet: bool,
    ) -> None:  # fmt: skip
        self.store, self.found, self.reseal, self.quiet = store, found, reseal, quiet
        self.sources = {name: spec for name, _, spec in (text.partition("=") for text in teachers)}
        self.device, self.threads = device, threads or available_cores()
        self._data = data if isinstance(data, str) else None
        self._images: dict[bool, Dataset] = {} if data is None or isinstance(data, str) else {True: data, False: data}
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
        kept = (self.store.path / PIXELS).is_dir() and not any(
            one.ledger == PIXELS or one.kind == "samples" for one in self.found.open()
        )
        if kept not in self._images:
            self._images[kept] = images_of(self.store, self._data, kept=kept)
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
            return  # what its shard comes out as tells, if that is what is there
        clipped = manifest.saturated - sum(receipt.saturated for receipt in own.values())
        if clipped and len(self.found.open("receipt", one.ledger)) > 1:
            return  # extracting one of them again tells
        self._record(one, receipt_of(manifest, one.ledger, one.shard, size).model_copy(update={"saturated": clipped}))

    def _record(self, one: Damaged, receipt: Receipt, how: str = "written again from the manifest") -> None:
        spelled = (receipt.checked(), receipt.canonical())
        if one.expected is not None:
            fits = [data for data in spelled if stored_object(data) == one.expected]
        else:
            fits = [spelled[0] if self._checked(one.ledger) else spelled[1]]
        if not fits:
            one.why_not = OTHER_RECEIPT
            return
        make_room(self.store.path / one.key)
        durable_write(self.store.path / one.key, fits[0])
        self.found.receipts[one.ledger][receipt.shard] = receipt
        one.outcome, one.why_not = how, ""

    def _checked(self, key: str) -> bool:
        """Whether the version that wrote a ledger has checks in its records."""
        folder = Ledger(self.store.path, key).folder
        others = [folder / RECEIPTS / f"{shard}.json" for shard in self.found.receipts[key]]
        known = [folder / MANIFEST] if key in self.found.manifests else others
        return all("check" in read_json(path) for path in known[:1])

    def _untold(self, key: str) -> list[Damaged]:
        """Receipts of shards of which nothing says what they were: their seal is damaged too."""
        lost = [one for one in self.found.open("receipt", key) if not one.why_not and one.shard is not None]
        return [one for one in lost if self.found.receipt(key, one.shard or 0) is None]

    def _tell(self, one: Damaged, made: Receipt) -> None:
        """Write a receipt that nothing lists, of a shard that was made again: if that is, to the byte, what lies there."""
        folder = self.store.path / one.ledger
        for name, entry in made.objects.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry.size or stored_object(path.read_bytes()) != entry:
                one.why_not = f"nothing says what its shard was, and {one.ledger}/{name} is not what it is when made again; {EXTRACT_ADVICE}"
                return
        self._record(one, made, "written again, of a shard that was made again and is what lies there")

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
        """Seal a ledger whose seal is lost, from its receipts; the index is written when all else is mended."""
        if waiting := [one for one in self.found.open() if one.ledger == key and one.kind != "manifest"]:
            raise StoreCorrupt(
                f"{counted(len(waiting), 'objects')} of {key} must be mended first, such as {waiting[0].key}"
            )
        ledger, rows = Ledger(self.store.path, key), self.store.card.dataset.count
        covered = total_of(key, self.found.receipts[key].values()).covered
        if covered != rows:
            delete = "delete it and " if (ledger.folder / MANIFEST).exists() else ""
            raise StoreCorrupt(
                f"the receipts of {key} cover {covered} of {rows} rows; {FROM_COPY}, or {delete}run the same 'hdcache extract' "
                "command again"
            )
        remade = None if key == PIXELS else self._remade(key)
        if remade is not None and teacher_of(key):
            remade.open()
        path, before = ledger.folder / MANIFEST, None
        if path.is_file():
            with open(path, "rb") as file:
                before = file.read(RECORD_BYTES + 1)  # larger ones are none, and stay so
        else:
            make_room(path)
        try:
            durable_unlink(path)
            if remade is None:
                listed = write_metadata(self.store, array_writers(self.store))
                ledger.seal(self.found.receipts[key].values(), listed, teacher="", identity="", view=0, rows=rows)
            elif teacher_of(key):
                remade.seal_rows()
            else:
                remade.seal_geometry()
            for one in self.found.open("manifest", key):
                one.outcome = "sealed again from its receipts" + self._as_listed(one, ledger.manifest())
        except BaseException:
            # A seal that is wrong is found by all who read; one that is not there may pass for rows that are not extracted yet.
            if before is not None:
                durable_write(path, before)
            else:
                durable_unlink(path)
            raise

    def _as_listed(self, one: Damaged, made: Manifest) -> str:
        """Whether a new seal is the one that the index lists, in words; that is made so if it was another version's spelling."""
        if one.expected is None:
            return ""
        own = f"{one.ledger}/{RECEIPTS}/"
        plain = {name: entry for name, entry in made.objects.items() if not name.startswith(own)}
        for manifest in (made, made.model_copy(update={"objects": plain})):
            for data in (manifest.checked(), manifest.canonical()):
                if stored_object(data) == one.expected:
                    if data != made.checked():
                        durable_write(self.store.path / one.key, data)
                    return ", as it was"
        if not self.reseal:
            one.differs = True
            raise StoreMismatch(OTHER_SEAL)
        return "; it was another one"


def mend_held(store: Store, found: Survey) -> list[Damaged]:
    """Write the notes again that say which taps a copy has, from what is there; none is needed where all are."""
    mended = found.open("held")
    for one in mended:
        path, taps = store.path / one.key, found.held.get(one.teacher)
        if taps is None:
            one.why_not = (
                f"the record of teacher {one.teacher} is damaged too; mend that first, and run the same command again"
            )
            continue
        make_room(path)
        if taps >= store.teacher(one.teacher).taps.keys():
            durable_unlink(path)
            one.outcome = "removed: something of every tap is there"
        else:
            durable_write(path, Held(taps=tuple(sorted(taps))).canonical())
            one.outcome = "written again: something of " + ", ".join(sorted(taps)) + " is there"
    return mended


def make_room(path: Path) -> None:
    """Remove an empty folder from where a file belongs; StoreCorrupt for one that holds something."""
    if path.is_dir() and not path.is_symlink():
        try:
            path.rmdir()
        except OSError:
            raise StoreCorrupt(f"{path}: a folder that holds something, where a file belongs; move it away") from None
