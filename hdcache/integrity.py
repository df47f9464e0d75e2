"""Whole-store verification: every object that a store lists, against what it lists."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hdcache.array_metadata import contained, read_json, read_record
from hdcache.durable import stored_object
from hdcache.errors import HdcacheError, StoreCorrupt
from hdcache.index import CROISSANT, HELD, LOST, held_taps, is_held, lost_records
from hdcache.ledgers import INDEX, MANIFEST, RECEIPTS, SAMPLES_RECEIPT, Ledger, file_size, read_index, total_of
from hdcache.schema import Receipt, StoredObject
from hdcache.store import ABOUT, LEASE, PIXELS, Store, is_view

_RECEIPT = re.compile(rf".*/{RECEIPTS}/\d+\.json")


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
    records = {"zarr.json", SAMPLES_RECEIPT, "samples/zarr.json", "views/zarr.json", "teachers/zarr.json"}
    for name in _folders(store.path / "teachers"):
        if name in store.teachers() or any(store.path.glob(f"teachers/{name}/views/*/{MANIFEST}")):
            _check_teacher(store, name, result)
        else:  # begun by an extraction or a copy that was stopped
            result.unsealed.append(f"teachers/{name}")
    sizes = dict(_files(store.path, result))
    listed = _listed(store, [key for key in sizes if key.endswith("/zarr.json")], result)
    partial = _partial_copies(store, result)
    listed = {key: entry for key, entry in listed.items() if all(is_held(key, *held) for held in partial)}
    total, done = sum(entry.size for entry in listed.values()), 0
    for key, expected in sorted(listed.items()):
        _check_object(f"{store.path}/{key}", sizes.get(key), expected, result, quick=quick)
        done += expected.size
        if progress is not None:
            progress(done, total)
    with suppress(StoreCorrupt):  # the index is looked at below
        result.faults += [f"{store.path}/{key}: {LOST}" for key in lost_records(store)]
    _check_index(store, sizes, listed, result)
    signs = (".lock", ".owner", LEASE)
    for key in sizes:
        name = key.rpartition("/")[2]
        own = (
            name in (MANIFEST, "zarr.json", ABOUT, INDEX, HELD, CROISSANT)
            or _RECEIPT.fullmatch(key)
            or name.endswith(signs)
        )
        if key not in listed and key not in records and not own:
            result.unlisted.append(key)
    return result


def _files(root: Path, result: Verification, prefix: str = "") -> Iterator[tuple[str, int | None]]:
    """Key and size of every file of a store, each looked at once; None for what is no file. Links out of it are faults."""
    inner = []
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            if entry.is_symlink():
                try:
                    contained(root, prefix + entry.name)
                except StoreCorrupt as error:
                    result.faults.append(str(error))
            if entry.is_dir(follow_symlinks=False):
                inner.append(entry.name)
            else:
                try:
                    yield prefix + entry.name, file_size(entry.path)
                except OSError:
                    yield prefix + entry.name, None  # why is said of what is listed, below
    for name in inner:
        yield from _files(root, result, f"{prefix}{name}/")


def _listed(store: Store, metadata: Collection[str], result: Verification) -> dict[str, StoredObject]:
    """Every object that a record lists, once, by its key; faults of the records are noted in ``result``.

    ``metadata`` are the keys of all groups and arrays that there are.
    """
    listed: dict[str, StoredObject] = {}
    try:
        samples = Receipt.parse(read_json(store.path / SAMPLES_RECEIPT), store.path / SAMPLES_RECEIPT)
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


def _check_index(store: Store, sizes: Mapping[str, int | None], listed: Collection[str], result: Verification) -> None:
    """Compare ``index.json`` with the records that it lists, whole, since they are few: of some nothing else says what they were."""
    where = store.path / INDEX
    if not where.is_file():
        if any(f"/{RECEIPTS}/" in key for key in listed):  # a version sealed them that writes one
            result.unsealed.append(INDEX)
        return
    # Who seals meanwhile has changed records and the index after them: neither is damaged.
    for look in (sizes.get, *[lambda key: file_size(f"{store.path}/{key}")] * 4):
        before, found = read_record(where), Verification(faults=list(result.faults))
        _compare_index(store, look, found)
        same = look != sizes.get and (not where.is_file() or read_record(where) == before)
        if same or len(found.faults) == len(result.faults):
            break
    result.faults = found.faults


def _compare_index(store: Store, size_of: Callable[[str], int | None], result: Verification) -> None:
    where = store.path / INDEX
    try:
        index = read_index(store.path)
        if index is None:
            return
        if index.checked() != read_record(where):
            result.faults.append(f"{where}: not spelled as it was written")
    except StoreCorrupt as error:
        result.faults.append(str(error))
        return
    other = []
    for key in filter(lambda key: key.endswith(f"/{MANIFEST}"), index.objects):
        ledger = Ledger(store.path, key.removesuffix(f"/{MANIFEST}"))
        if size_of(key) is None:
            pass  # lost, which is a fault already
        elif stored_object(read_record(store.path / key)) == index.objects[key]:
            continue
        elif not any(fault.startswith(f"{store.path}/{ledger.key}/") for fault in result.faults):
            same = stored_object(ledger.manifest().checked()) == index.objects[key]
            result.faults.append(
                f"{store.path}/{key}: not spelled as it was written"
                if same
                else f"{where}: older than {key}; run the same 'hdcache extract' again"
            )
        other.append(f"{ledger.key}/")
    named, records = {fault.partition(": ")[0] for fault in result.faults}, Verification(faults=result.faults)
    for key, expected in index.objects.items():
        path = f"{store.path}/{key}"
        if path not in named and not key.startswith(tuple(other)):
            _check_object(path, size_of(key), expected, records, quick=False)


def _partial_copies(store: Store, result: Verification) -> list[tuple[str, frozenset[str]]]:
    """Teachers of whom this copy has some taps only, and which."""
    found = []
    for name in store.teachers():
        try:
            if (taps := held_taps(store, name)) is not None:
                found.append((name, taps))
        except StoreCorrupt as error:
            result.faults.append(str(error))
    return found


def _check_teacher(store: Store, name: str, result: Verification) -> None:
    folder = store.path / "teachers" / name
    if not (folder / "zarr.json").exists() and not any(folder.glob(f"views/*/{MANIFEST}")):
        result.unsealed.append(f"teachers/{name}")  # its constants are written first; a kill came before its record
        return
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
    try:
        total = total_of(ledger.key, receipts := _receipts(ledger, result))
    except StoreCorrupt:
        return {}  # its folder is a link, which is a fault already
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
    for receipt in receipts:
        for name, value in receipt.objects.items():
            if manifest.objects.get(f"{ledger.key}/{name}") != value:
                path = ledger.folder / RECEIPTS / f"{receipt.shard}.json"
                result.faults.append(f"{path}: says other than {where} of {ledger.key}/{name}")
                break
    whole = receipts and total.covered == manifest.rows and before == len(result.faults)
    if whole and (manifest.failed, manifest.saturated) != (total.failed, total.saturated):
        result.faults.append(f"{where}: failed rows or saturated values differ from the receipts")
    return {**total.objects, **manifest.objects}


def _resting(store: Store, ledger: Ledger, teacher: str, metadata: set[str]) -> set[str]:
    """Keys of all that a seal rests on beside its shards: records, the arrays' metadata, a teacher's constants."""
    try:
        return (
            metadata
            | ledger.records(teacher).keys()
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
    try:
        if found != expected.size:  # below a folder that is a link, or written since
            found = file_size(path)
    except OSError as error:
        result.faults.append(f"{path}: cannot be read ({error.strerror})")
        return
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
