"""Receipts, manifests, the seal, and whole-store verification.

A *ledger* is a folder of shards that are written one by one: ``views/K`` (the geometry of a view),
``teachers/NAME/views/K`` (a teacher's rows) or ``samples/pixels`` (the samples themselves). A receipt is written after its shard's objects are durable, so
"the shards without a receipt" is exactly the work that is left. A manifest seals the ledger.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hdcache.arrays import read_json, read_record
from hdcache.durable import PARTIAL, durable_move, durable_unlink, durable_write, stored_object
from hdcache.errors import HdcacheError, StoreCorrupt
from hdcache.schema import Manifest, Receipt, StoredObject
from hdcache.store import ABOUT, LEASE, PIXELS, Store, is_view

RECEIPTS, MANIFEST, _SAMPLES = "receipts", "manifest.json", "samples/receipt.json"


@dataclass
class _Sum:
    """What a ledger's receipts say together."""

    covered: int = 0
    """Rows from 0 up to the first gap or overlap."""
    objects: dict[str, StoredObject] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    saturated: int = 0


def _sum(key: str, receipts: Iterable[Receipt]) -> _Sum:
    total = _Sum()
    for receipt in sorted(receipts, key=lambda receipt: receipt.rows):
        total.covered = receipt.rows[1] if receipt.rows[0] == total.covered else total.covered
        total.objects |= {f"{key}/{name}": value for name, value in receipt.objects.items()}
        total.failed |= receipt.failed
        total.saturated += receipt.saturated
    return total


def _size(path: str) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


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
        if receipt.shard != shard:
            raise StoreCorrupt(f"{path}: the receipt of shard {receipt.shard}; delete it and rerun 'hdcache extract'")
        if any(_size(f"{self.folder}/{key}") != listed.size for key, listed in receipt.objects.items()):
            return None
        return receipt

    def record(self, receipt: Receipt) -> None:
        """Write a shard's receipt; its objects must be durable already."""
        durable_write(self.folder / RECEIPTS / f"{receipt.shard}.json", receipt.canonical())

    def unseal(self) -> None:
        """Withdraw the seal before rows that failed are tried again."""
        durable_unlink(self.folder / MANIFEST)

    def withdraw(self, shard: int) -> None:
        """Forget that a shard is complete, before its objects are overwritten: a kill must not leave a false receipt."""
        durable_unlink(self.folder / RECEIPTS / f"{shard}.json")

    def aside(self, key: str) -> Path:
        """Where an object is written until :meth:`replace`, so that a kill leaves the old shard or the new one, whole."""
        path = self.folder / key
        return path.with_name(f".{path.name}.next{PARTIAL}")

    def replace(self, receipt: Receipt) -> None:
        """Put a shard whose objects lie :meth:`aside`, durable, in the place of what was there; its receipt comes last."""
        durable_write(self.aside(f"{RECEIPTS}/{receipt.shard}.json"), receipt.canonical())
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
        """
        total = _sum(self.key, receipts)
        if total.covered != rows:
            raise StoreCorrupt(
                f"{self.folder}: receipts cover {total.covered} of {rows} rows; run the same 'hdcache extract' again"
            )
        manifest = Manifest(
            teacher=teacher,
            identity=identity,
            view=view,
            rows=rows,
            objects=dict(sorted({**self._records(teacher), **static, **total.objects}.items())),
            failed=dict(sorted(total.failed.items())),
            saturated=total.saturated,
        )
        try:
            durable_write(self.folder / MANIFEST, manifest.canonical(), create_only=True)
        except FileExistsError:
            if self.manifest().digest() != manifest.digest():
                raise StoreCorrupt(
                    f"{self.folder / MANIFEST}: already sealed with other content; run 'hdcache verify'"
                ) from None
        return manifest

    def _records(self, teacher: str) -> dict[str, StoredObject]:
        """The records that this seal rests on and that never change; the manifest's digest covers them too."""
        keys = ["zarr.json", "samples/zarr.json", _SAMPLES] + [f"teachers/{teacher}/zarr.json"] * bool(teacher)
        found = {key: read_record(self.root / key) for key in keys if (self.root / key).is_file()}
        return {key: stored_object(data) for key, data in found.items()}

    @property
    def sealed(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def manifest(self) -> Manifest:
        return Manifest.parse(read_json(self.folder / MANIFEST), self.folder / MANIFEST)


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
    """Files that no record lists (leftovers of a killed process; harmless, and removed by the next extraction)."""

    @property
    def good(self) -> bool:
        return not self.faults


def verify(store: Store, *, quick: bool = False, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Check every object that the store lists: sizes (``quick``), and sha256 otherwise.

    Finds flipped bits, swapped, truncated, foreign and missing objects; lists ledgers without a seal and files
    that nothing lists. ``progress`` is told the bytes that are checked and those that are listed.
    """
    result = Verification()
    records = {"zarr.json", _SAMPLES, "samples/zarr.json", "views/zarr.json", "teachers/zarr.json"}
    for name in _folders(store.path / "teachers"):
        _check_teacher(store, name, result)
    sizes = dict(_files(str(store.path)))
    listed = _listed(store, [key for key in sizes if key.endswith("/zarr.json")], result)
    total, done = sum(entry.size for entry in listed.values()), 0
    for key, expected in sorted(listed.items()):
        _check_object(f"{store.path}/{key}", sizes.get(key), expected, result, quick=quick)
        done += expected.size
        if progress is not None:
            progress(done, total)
    signs = (".lock", ".owner", LEASE)
    for key in sizes:
        name = key.rpartition("/")[2]
        own = name in (MANIFEST, "zarr.json", ABOUT) or f"/{RECEIPTS}/" in key or name.endswith(signs)
        if key not in listed and key not in records and not own:
            result.unlisted.append(key)
    return result


def _files(folder: str, prefix: str = "") -> Iterator[tuple[str, int | None]]:
    """Key and size of every file below a folder, each looked at once; None for what is no file."""
    inner = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                inner.append(entry.name)
            else:
                yield prefix + entry.name, _size(entry.path)
    for name in inner:
        yield from _files(f"{folder}/{name}", f"{prefix}{name}/")


def _listed(store: Store, metadata: Collection[str], result: Verification) -> dict[str, StoredObject]:
    """Every object that a record lists, once, by its key; faults of the records are noted in ``result``.

    ``metadata`` are the keys of all groups and arrays that there are.
    """
    listed: dict[str, StoredObject] = {}
    try:
        samples = Receipt.parse(read_json(store.path / _SAMPLES), store.path / _SAMPLES)
        listed |= {f"samples/{key}": value for key, value in samples.objects.items()}
    except StoreCorrupt as error:
        result.faults.append(str(error))
    for key in _ledgers(store.path):
        inside = {name for name in metadata if name.startswith(f"{key}/")}
        listed |= _check_ledger(store, Ledger(store.path, key), inside, result)
    return listed


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def _ledgers(root: Path) -> list[str]:
    keys = ["views", *(f"teachers/{name}/views" for name in _folders(root / "teachers"))]
    own = [PIXELS] * (root / PIXELS).is_dir()
    return own + [f"{key}/{name}" for key in keys for name in _folders(root / key) if is_view(name)]


def _check_teacher(store: Store, name: str, result: Verification) -> None:
    try:
        record = store.teacher(name)
    except HdcacheError as error:
        result.faults.append(str(error))
        return
    if (record.dataset, record.views) != (store.card.dataset.fingerprint, store.card.views):
        result.faults.append(f"{store.teacher_path(name)}/zarr.json: made for other data or views than the store's")


def _check_ledger(store: Store, ledger: Ledger, metadata: set[str], result: Verification) -> dict[str, StoredObject]:
    """Compare the records of a ledger with each other; returns the objects that they list."""
    before = len(result.faults)
    total = _sum(ledger.key, receipts := _receipts(ledger, result))
    if not ledger.sealed:
        result.unsealed.append(ledger.key)
        return total.objects
    try:
        manifest = ledger.manifest()
    except StoreCorrupt as error:
        result.faults.append(str(error))
        return total.objects
    parts = ledger.key.split("/")
    teacher, where = parts[1] if parts[0] == "teachers" else "", f"{ledger.folder / MANIFEST}"
    view = 0 if ledger.key == PIXELS else int(parts[-1])
    if (manifest.teacher, manifest.view) != (teacher, view):
        result.faults.append(f"{where}: the seal of {manifest.teacher or 'the views'}/{manifest.view}")
    if teacher:
        try:
            if store.teacher(teacher).identity_digest() != manifest.identity:
                result.faults.append(f"{where}: seals another identity than that of the teacher's record")
        except HdcacheError:
            pass  # already a fault of the teacher
    if manifest.format != store.card.format:
        result.faults.append(f"{where}: format {manifest.format}, the store has {store.card.format}")
    if manifest.rows != store.card.dataset.count:
        result.faults.append(f"{where}: {manifest.rows} rows, the store has {store.card.dataset.count} samples")
    for key in sorted(_resting(store, ledger, teacher, metadata) - manifest.objects.keys()):
        result.faults.append(f"{where}: does not list {key}")
    for key, value in total.objects.items():
        if manifest.objects.get(key) != value:
            result.faults.append(f"{ledger.key}/{RECEIPTS}: the receipt of {key} differs from the manifest")
    whole = receipts and total.covered == manifest.rows and before == len(result.faults)
    if whole and (manifest.failed, manifest.saturated) != (total.failed, total.saturated):
        result.faults.append(f"{where}: failed rows or saturated values differ from the receipts")
    return {**total.objects, **manifest.objects}


def _resting(store: Store, ledger: Ledger, teacher: str, metadata: set[str]) -> set[str]:
    """Keys of all that a seal rests on beside its shards: records, the arrays' metadata, a teacher's constants."""
    try:
        return (
            metadata
            | ledger._records(teacher).keys()
            | ({f"teachers/{teacher}/{key}" for key in store.teacher(teacher).objects} if teacher else set())
        )
    except HdcacheError:
        return metadata  # the record is a fault already


def _receipts(ledger: Ledger, result: Verification) -> list[Receipt]:
    found: list[Receipt] = []
    folder = ledger.folder / RECEIPTS
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if not name.endswith(".json"):
            continue
        path = folder / name
        try:
            receipt = Receipt.parse(read_json(path), path)
        except StoreCorrupt as error:
            result.faults.append(str(error))
            continue
        if f"{receipt.shard}.json" != name:
            result.faults.append(f"{path}: the receipt of shard {receipt.shard}")
        found.append(receipt)
    return found


def _check_object(path: str, found: int | None, expected: StoredObject, result: Verification, *, quick: bool) -> None:
    result.objects += 1
    found = _size(path) if found is None else found  # below a folder that is a link
    if found is None:
        result.faults.append(f"{path}: missing, expected {expected.size} bytes")
        return
    result.bytes += found
    if found != expected.size:
        result.faults.append(f"{path}: {found} bytes, expected {expected.size}")
    elif not quick:
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            result.faults.append(f"{path}: cannot be read ({error.strerror})")
            return
        if digest != expected.sha256:
            result.faults.append(f"{path}: sha256 {digest[:12]}..., expected {expected.sha256[:12]}...")
