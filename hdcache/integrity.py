"""Receipts, manifests, the seal, and whole-store verification.

A *ledger* is a folder of shards that are written one by one: ``views/K`` (the geometry of a view) or
``teachers/NAME/views/K`` (a teacher's rows). A receipt is written after its shard's objects are durable, so
"the shards without a receipt" is exactly the work that is left. A manifest seals the ledger.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hdcache.arrays import durable_write, read_json
from hdcache.errors import StoreCorrupt
from hdcache.schema import Manifest, Receipt, StoredObject
from hdcache.store import Store

RECEIPTS, MANIFEST = "receipts", "manifest.json"


class Ledger:
    """The receipts and the seal of one folder of shards."""

    def __init__(self, root: Path, key: str) -> None:
        self.root, self.key, self.folder = root, key, root / key

    def receipt(self, shard: int) -> Receipt | None:
        """The receipt of a shard, or None where the shard is not complete (an object gone or of another size)."""
        path = self.folder / RECEIPTS / f"{shard}.json"
        if not path.is_file():
            return None
        receipt = Receipt.parse(read_json(path), path)
        for key, listed in receipt.objects.items():
            found = self.folder / key
            if not found.is_file() or found.stat().st_size != listed.size:
                return None
        return receipt

    def record(self, receipt: Receipt) -> None:
        """Write a shard's receipt; its objects must be durable already."""
        durable_write(self.folder / RECEIPTS / f"{receipt.shard}.json", receipt.canonical())

    def unseal(self) -> None:
        """Withdraw the seal before rows that failed are tried again."""
        (self.folder / MANIFEST).unlink(missing_ok=True)

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
        """
        objects = dict(static)
        failed: dict[int, str] = {}
        saturated = covered = 0
        for receipt in receipts:
            objects |= {f"{self.key}/{key}": value for key, value in receipt.objects.items()}
            failed |= receipt.failed
            saturated += receipt.saturated
            covered += receipt.rows[1] - receipt.rows[0]
        if covered != rows:
            raise StoreCorrupt(
                f"{self.folder}: receipts cover {covered} of {rows} rows; run the same 'hdcache extract' again"
            )
        manifest = Manifest(
            teacher=teacher,
            identity=identity,
            view=view,
            rows=rows,
            objects=dict(sorted(objects.items())),
            failed=dict(sorted(failed.items())),
            saturated=saturated,
        )
        try:
            durable_write(self.folder / MANIFEST, manifest.canonical(), create_only=True)
        except FileExistsError:
            if self.manifest().digest() != manifest.digest():
                raise StoreCorrupt(
                    f"{self.folder / MANIFEST}: already sealed with other content; run 'hdcache verify'"
                ) from None
        return manifest

    @property
    def sealed(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def manifest(self) -> Manifest:
        path = self.folder / MANIFEST
        return Manifest.parse(read_json(path), path)


def view_ledger(store: Store, view: int) -> Ledger:
    """The ledger of a view's geometry."""
    return Ledger(store.path, f"views/{view}")


def teacher_ledger(store: Store, teacher: str, view: int) -> Ledger:
    """The ledger of one teacher's rows of one view."""
    return Ledger(store.path, f"teachers/{teacher}/views/{view}")


@dataclass
class Verification:
    """What a check of the whole store found."""

    objects: int = 0
    bytes: int = 0
    faults: list[str] = field(default_factory=list)
    """One line per damaged object: path, expected against found."""
    unsealed: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    """Files that no record lists (leftovers of a killed process; harmless)."""

    @property
    def good(self) -> bool:
        return not self.faults


def verify(store: Store, *, quick: bool = False, progress: Callable[[int], None] | None = None) -> Verification:
    """Check every object that the store lists: sizes (``quick``), and sha256 otherwise.

    Finds flipped bits, swapped, truncated, foreign and missing objects; lists ledgers without a seal and files
    that nothing lists.
    """
    result = Verification()
    listed: dict[str, StoredObject] = {}
    samples = Receipt.parse(read_json(store.path / "samples" / "receipt.json"), store.path / "samples" / "receipt.json")
    listed |= {f"samples/{key}": value for key, value in samples.objects.items()}
    ledgers = sorted(
        path.parent
        for pattern in ("views/*/zarr.json", "teachers/*/views/*/zarr.json")
        for path in store.path.glob(pattern)
    )
    for folder in ledgers:
        ledger = Ledger(store.path, folder.relative_to(store.path).as_posix())
        receipts = _receipts(ledger, result)
        if ledger.sealed:
            try:
                manifest = ledger.manifest()
            except StoreCorrupt as error:
                result.faults.append(str(error))
                continue
            listed |= manifest.objects
            for key, value in receipts.items():
                if manifest.objects.get(key) != value:
                    result.faults.append(f"{ledger.key}/{RECEIPTS}: the receipt of {key} differs from the manifest")
        else:
            result.unsealed.append(ledger.key)
            listed |= receipts
    for key, expected in sorted(listed.items()):
        _check_object(store.path / key, expected, result, quick=quick)
        if progress is not None:
            progress(expected.size)
    records = {"zarr.json", "samples/receipt.json", "samples/zarr.json", "views/zarr.json", "teachers/zarr.json"}
    for base, _, names in os.walk(store.path):
        for name in names:
            key = (Path(base) / name).relative_to(store.path).as_posix()
            own = name in (MANIFEST, "zarr.json") or f"/{RECEIPTS}/" in key or name.endswith((".lock", ".owner"))
            if key not in listed and key not in records and not own:
                result.unlisted.append(key)
    return result


def _receipts(ledger: Ledger, result: Verification) -> dict[str, StoredObject]:
    found: dict[str, StoredObject] = {}
    for path in sorted((ledger.folder / RECEIPTS).glob("*.json")):
        try:
            receipt = Receipt.parse(read_json(path), path)
        except StoreCorrupt as error:
            result.faults.append(str(error))
            continue
        found |= {f"{ledger.key}/{key}": value for key, value in receipt.objects.items()}
    return found


def _check_object(path: Path, expected: StoredObject, result: Verification, *, quick: bool) -> None:
    result.objects += 1
    if not path.is_file():
        result.faults.append(f"{path}: missing, expected {expected.size} bytes")
        return
    found = path.stat().st_size
    result.bytes += found
    if found != expected.size:
        result.faults.append(f"{path}: {found} bytes, expected {expected.size}")
    elif not quick:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected.sha256:
            result.faults.append(f"{path}: sha256 {digest[:12]}..., expected {expected.sha256[:12]}...")
