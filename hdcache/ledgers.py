"""Receipts, manifests and the seal of one folder of shards.

A *ledger* is a folder of shards that are written one by one: ``views/K`` (the geometry of a view),
``teachers/NAME/views/K`` (a teacher's rows) or ``samples/pixels`` (the samples themselves). A receipt is written after its shard's objects are durable, so
"the shards without a receipt" is exactly the work that is left. A manifest seals the ledger.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import filelock
from pydantic import Field

from hdcache.array_metadata import RECORD_BYTES, contained, read_json, read_record
from hdcache.durable import PARTIAL, durable_move, durable_unlink, durable_write, stored_object
from hdcache.errors import StoreCorrupt
from hdcache.leases import check_held
from hdcache.records import CheckedRecord
from hdcache.schema import FORMAT, Manifest, Objects, Receipt, StoredObject
from hdcache.store import ROOT_LOCK, Store

RECEIPTS, MANIFEST, SAMPLES_RECEIPT = "receipts", "manifest.json", "samples/receipt.json"
INDEX = "index.json"


class Index(CheckedRecord):
    """What ``index.json`` says (:mod:`hdcache.index`)."""

    format: int = FORMAT
    objects: Objects = Field(default_factory=dict)
    """Relative to the store's root: groups' records, the samples' receipt; of every sealed ledger its manifest (and its receipts,
    where that was written by a version whose manifests did not list them)."""


def read_index(path: Path) -> Index | None:
    """The index of a store at ``path``; None where it has none. :class:`StoreCorrupt` where it was altered."""
    if not (path / INDEX).is_file():
        return None
    return Index.parse(read_json(path / INDEX), path / INDEX)


def lists_receipts(manifest: bytes, ledger: str) -> bool:
    """Whether a manifest, as it is written, lists the receipts of its shards; those of earlier versions did not."""
    return f'"{ledger}/{RECEIPTS}/'.encode() in manifest


def _without_receipts(objects: Objects, ledger: str) -> Objects:
    return {key: entry for key, entry in objects.items() if not key.startswith(f"{ledger}/{RECEIPTS}/")}


@dataclass
class Total:
    """What a ledger's receipts say together."""

    covered: int = 0
    """Rows from 0 up to the first gap or overlap."""
    objects: dict[str, StoredObject] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    saturated: int = 0


def total_of(key: str, receipts: Iterable[Receipt]) -> Total:
    total = Total()
    for receipt in sorted(receipts, key=lambda receipt: receipt.rows):
        total.covered = receipt.rows[1] if receipt.rows[0] == total.covered else total.covered
        total.objects |= {f"{key}/{name}": value for name, value in receipt.objects.items()}
        total.failed |= receipt.failed
        total.saturated += receipt.saturated
    return total


def file_size(path: str) -> int | None:
    """Bytes of a file; None where there is none. What cannot be looked at now, an :class:`OSError`, is not to be taken for lost."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


class Ledger:
    """The receipts and the seal of one folder of shards."""

    def __init__(self, root: Path, key: str) -> None:
        self.root, self.key = root, key

    @cached_property
    def folder(self) -> Path:
        """Where it lies; :class:`StoreCorrupt` where that is a link out of the store."""
        return contained(self.root, self.key)

    def receipt(self, shard: int) -> Receipt | None:
        """The receipt of a shard, or None where the shard is not complete (an object gone or of another size)."""
        path = self.folder / RECEIPTS / f"{shard}.json"
        if not path.is_file():
            return None
        receipt = Receipt.parse(read_json(path), path)
        if receipt.shard != shard:
            raise StoreCorrupt(f"{path}: the receipt of shard {receipt.shard}; delete it and rerun 'hdcache extract'")
        if any(file_size(f"{self.folder}/{key}") != listed.size for key, listed in receipt.objects.items()):
            return None
        return receipt

    def record(self, receipt: Receipt) -> None:
        """Write a shard's receipt; its objects must be durable already.

        Raises
        ------
        StoreLocked
            here, and wherever something is withdrawn, replaced or sealed, when the lease was lost meanwhile.
        """
        check_held(self.root)
        durable_write(self.folder / RECEIPTS / f"{receipt.shard}.json", receipt.checked())

    def unseal(self) -> None:
        """Withdraw the seal before rows that failed are tried again; the index lists it no more, so that nobody misses it."""
        if not self.sealed:
            return
        check_held(self.root)
        own = f"{self.key}/{MANIFEST}", f"{self.key}/{RECEIPTS}/"
        # Both under the lock: who writes the index meanwhile must not list again what is about to go.
        with filelock.FileLock(self.root / ROOT_LOCK):
            with suppress(StoreCorrupt):  # it is derived
                known = read_index(self.root)
                if known is not None and own[0] in known.objects:
                    others = {key: entry for key, entry in known.objects.items() if not key.startswith(own)}
                    durable_write(self.root / INDEX, known.model_copy(update={"objects": others}).checked())
            durable_unlink(self.folder / MANIFEST)

    def withdraw(self, shard: int) -> None:
        """Forget that a shard is complete, before its objects are overwritten: a kill must not leave a false receipt."""
        check_held(self.root)
        durable_unlink(self.folder / RECEIPTS / f"{shard}.json")

    def aside(self, key: str) -> Path:
        """Where an object is written until :meth:`replace`, so that a kill leaves the old shard or the new one, whole."""
        path = self.folder / key
        return path.with_name(f".{path.name}.next{PARTIAL}")

    def replace(self, receipt: Receipt) -> None:
        """Put a shard whose objects lie :meth:`aside`, durable, in the place of what was there; its receipt comes last."""
        check_held(self.root)
        durable_write(self.aside(f"{RECEIPTS}/{receipt.shard}.json"), receipt.checked())
        self.settle(receipt.shard)

    def settle(self, shard: int) -> None:
        """Finish what a kill cut short in :meth:`replace`. Only who may write the shard may call it."""
        path = self.aside(f"{RECEIPTS}/{shard}.json")
        if not path.is_file():
            return
        receipt = Receipt.parse(read_json(path), path)
        self.unseal()
        self.withdraw(shard)
        for key in receipt.objects:
            if (written := self.aside(key)).is_file():
                durable_move(written, self.folder / key)
        durable_move(path, self.folder / RECEIPTS / f"{shard}.json")

    def seal(
        self,
        receipts: Iterable[Receipt],
        static: Mapping[str, StoredObject],
        *,
        teacher: str,
        identity: str,
        view: int,
        rows: int,
    ) -> Manifest:
        """Write the manifest, last and create-only; an equal one is left as it is.

        ``static`` lists objects by key relative to the store's root: metadata, constants, weights.

        Raises
        ------
        StoreCorrupt
            when receipts are missing, an object of ``static`` is missing or of another size, or another seal is there.
        """
        check_held(self.root)
        receipts = list(receipts)
        total = total_of(self.key, receipts)
        if total.covered != rows:
            raise StoreCorrupt(
                f"{self.folder}: receipts cover {total.covered} of {rows} rows; run the same 'hdcache extract' again"
            )
        for key, listed in static.items():
            if (found := file_size(f"{self.root}/{key}")) != listed.size:
                there = "missing" if found is None else f"{found} bytes"
                raise StoreCorrupt(
                    f"{self.root / key}: {there}, expected {listed.size} bytes; not sealed: run the same command again, or "
                    f"'hdcache repair {self.root}'"
                )
        manifest = Manifest(
            teacher=teacher,
            identity=identity,
            view=view,
            rows=rows,
            objects=dict(
                sorted({**self.records(teacher), **static, **total.objects, **self._written(receipts)}.items())
            ),
            failed=dict(sorted(total.failed.items())),
            saturated=total.saturated,
        )
        data = manifest.checked()
        if len(data) > RECORD_BYTES:
            raise StoreCorrupt(
                f"{self.folder / MANIFEST}: {len(data):,} bytes, for {len(manifest.objects):,} objects and {len(manifest.failed):,} "
                "failed rows, are more than a record may have; extract into a store with larger --rows-per-shard"
            )
        try:
            durable_write(self.folder / MANIFEST, data, create_only=True)
        except FileExistsError:
            known = self.manifest()
            if not lists_receipts(known.canonical(), self.key):  # an earlier version sealed it
                manifest = manifest.model_copy(update={"objects": _without_receipts(manifest.objects, self.key)})
            if known.digest() != manifest.digest():
                raise StoreCorrupt(
                    f"{self.folder / MANIFEST}: already sealed with other content; run 'hdcache verify'"
                ) from None
        return manifest

    def _written(self, receipts: Iterable[Receipt]) -> dict[str, StoredObject]:
        """Receipts as they lie there: an earlier version may have spelled them."""
        keys = [f"{RECEIPTS}/{receipt.shard}.json" for receipt in receipts]
        return {f"{self.key}/{key}": stored_object(read_record(self.folder / key)) for key in keys}

    def records(self, teacher: str) -> dict[str, StoredObject]:
        """The records that this seal rests on and that never change; the manifest's digest covers them too."""
        keys = ["zarr.json", "samples/zarr.json", SAMPLES_RECEIPT] + [f"teachers/{teacher}/zarr.json"] * bool(teacher)
        found = {key: read_record(self.root / key) for key in keys if (self.root / key).is_file()}
        return {key: stored_object(data) for key, data in found.items()}

    @property
    def sealed(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def manifest(self) -> Manifest:
        """The seal as it is written."""
        return Manifest.parse(read_json(self.folder / MANIFEST), self.folder / MANIFEST)

    def proved_manifest(self) -> Manifest:
        """The seal, once the records that it rests on are those that it lists.

        Raises
        ------
        StoreCorrupt
            naming the record that was altered or exchanged since.
        """
        manifest = self.manifest()
        for key, found in self.records(manifest.teacher).items():
            if manifest.objects.get(key, found) != found:
                raise StoreCorrupt(
                    f"{self.root / key}: not the record that {self.folder / MANIFEST} was sealed with; copy the store again"
                )
        return manifest


def view_ledger(store: Store, view: int) -> Ledger:
    """The ledger of a view's geometry."""
    return Ledger(store.path, f"views/{view}")


def teacher_ledger(store: Store, teacher: str, view: int) -> Ledger:
    """The ledger of one teacher's rows of one view."""
    return Ledger(store.path, f"teachers/{teacher}/views/{view}")
