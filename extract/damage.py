"""What is damaged in a store, object by object: what it should be, and of which shard of which ledger it is.

Two things say what an object should be: the manifest of its ledger and, where that is damaged or not there yet, the receipt of its
shard. A record of either kind that is damaged alone follows from the other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hdcache.array_metadata import CHECK, group_metadata, read_json, read_record
from hdcache.durable import stored_object
from hdcache.errors import HdcacheError, InputNotFound, StoreCorrupt, StoreUnreadable
from hdcache.extract.calibrate import damaged_constants
from hdcache.index import CROISSANT, HELD, RECORDS, held_taps, is_held
from hdcache.integrity import Verification, verify
from hdcache.ledgers import INDEX, MANIFEST, RECEIPTS, SAMPLES_RECEIPT, Ledger, read_index, total_of
from hdcache.schema import Manifest, Receipt, StoredObject
from hdcache.store import PIXELS, Store, is_view

GROUPS = ("samples/zarr.json", "views/zarr.json", "teachers/zarr.json")
"""Records that every store has and that say nothing."""
_CHUNK = re.compile(r"c\.(\d+)\.[\d.]+")
_RECORD = re.compile(r"(?:teachers/[^/]+/)?zarr\.json")
_GONE = re.compile(r"no teacher '([^']+)'")
_HELD = re.compile(rf"teachers/[^/]+/{re.escape(HELD)}")
UNREADABLE = (
    "what the system cannot read now is not taken for damaged: check the disk, the mount and permissions, and run the same command "
    "again; if the disk has lost it for good, delete it first"
)
_RECEIPT = re.compile(rf"{RECEIPTS}/(\d+)\.json")


@dataclass
class Damaged:
    """One object that is not what it should be."""

    key: str
    """Relative to the store's root."""
    fault: str
    kind: str
    """``record`` (of the store or of a teacher), ``index`` (what is derived), ``manifest``, ``receipt``, ``metadata``, ``samples``, ``constants``,
    ``shard``, ``held`` (which taps a copy has) or ``other``."""
    expected: StoredObject | None = None
    """None where nothing that can be read says so."""
    ledger: str = ""
    shard: int | None = None
    outcome: str = ""
    """How it was mended, or would be; empty: it was not."""
    why_not: str = ""
    differs: bool = False
    """Whether it could be made again, but with other bytes."""

    @property
    def teacher(self) -> str:
        """Whose it is; empty for what belongs to all."""
        parts = self.key.split("/")
        return parts[1] if parts[0] == "teachers" and len(parts) > 2 else ""


@dataclass
class Survey:
    """What a store lists, and what of it is damaged."""

    found: Verification
    damaged: list[Damaged] = field(default_factory=list)
    listed: dict[str, StoredObject] = field(default_factory=dict)
    """What every object should be, as far as a good record says so."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """The good ones, by ledger."""
    receipts: dict[str, dict[int, Receipt]] = field(default_factory=dict)
    """The good ones, by ledger and shard."""
    held: dict[str, frozenset[str]] = field(default_factory=dict)
    """Of teachers whose :data:`~hdcache.held.HELD` is damaged: the taps of which something is there."""
    notes: list[str] = field(default_factory=list)
    rows_per_shard: int = 1

    def open(self, kind: str = "", ledger: str | None = None) -> list[Damaged]:
        """What is still damaged: of one kind, of one ledger."""
        return [
            one
            for one in self.damaged
            if not one.outcome and (not kind or one.kind == kind) and (ledger is None or one.ledger == ledger)
        ]

    def receipt(self, ledger: str, shard: int) -> Receipt | None:
        """What a shard's receipt says or, from the manifest, must have said (but how many of its values were clipped)."""
        if (known := self.receipts.get(ledger, {}).get(shard)) is not None:
            return known
        manifest = self.manifests.get(ledger)
        return None if manifest is None else receipt_of(manifest, ledger, shard, self.rows_per_shard)


def ledger_keys(root: Path) -> list[str]:
    """The folders of a store that are ledgers: views, then kept samples, then teachers' rows, in which order they build on each other."""
    folders = ["views", *(f"teachers/{name}/views" for name in _folders(root / "teachers"))]
    keys = [f"{folder}/{name}" for folder in folders for name in _folders(root / folder) if is_view(name)]
    views = sorted((key for key in keys if key.startswith("views/")), key=lambda key: int(key.rpartition("/")[2]))
    return [*views, *[PIXELS] * (root / PIXELS).is_dir(), *(key for key in keys if not key.startswith("views/"))]


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def teacher_of(ledger: str) -> str:
    """The teacher whose rows a ledger is of; empty for views and kept samples."""
    parts = ledger.split("/")
    return parts[1] if parts[0] == "teachers" else ""


def shard_of(name: str) -> int | None:
    """The shard that an object of a ledger is of, by its name in the ledger's folder; None: of none."""
    parts = name.split("/")
    if parts[0] == "bytes" and len(parts) == 3 and is_view(parts[1]):
        return int(parts[1])
    found = _CHUNK.fullmatch(parts[-1])
    return int(found[1]) if found else None


def receipt_of(manifest: Manifest, ledger: str, shard: int, size: int) -> Receipt:
    """The receipt of a shard, by the manifest that covers it; which of the shards' values were clipped it does not say."""
    span = (shard * size, min(manifest.rows, (shard + 1) * size))
    own = {
        key.removeprefix(f"{ledger}/"): entry for key, entry in manifest.objects.items() if key.startswith(f"{ledger}/")
    }
    return Receipt(
        shard=shard,
        rows=span,
        objects={name: entry for name, entry in own.items() if shard_of(name) == shard},
        failed={row: why for row, why in manifest.failed.items() if span[0] <= row < span[1]},
    )


def survey(store: Store, *, quick: bool = False, progress: Callable[[int, int], None] | None = None) -> Survey:
    """Check a store (by sizes alone, if ``quick``), and sort what is found.

    Raises
    ------
    InputNotFound
        when something is there and cannot be read: whether it is damaged nobody can say.
    """
    try:
        return _surveyed(store, quick, progress)
    except StoreUnreadable as error:
        raise InputNotFound(f"{error}; {UNREADABLE}") from None
    except OSError as error:
        if isinstance(error, HdcacheError):
            raise
        raise InputNotFound(
            f"{error.filename or store.path}: cannot be read ({error.strerror}); {UNREADABLE}"
        ) from None


def _surveyed(store: Store, quick: bool, progress: Callable[[int, int], None] | None) -> Survey:
    found = verify(store, quick=quick, progress=progress)
    faults: dict[str, str] = {}
    others: list[str] = []
    for line in found.faults:
        key, colon, why = line.removeprefix(f"{store.path}/").partition(": ")
        if why.startswith("cannot be read ("):
            raise InputNotFound(f"{line.partition('; ')[0]}; {UNREADABLE}")
        if colon and line.startswith(f"{store.path}/"):
            faults.setdefault(key, why)
        elif gone := _GONE.match(line.removeprefix(f"{store.path}: ")):
            faults.setdefault(f"teachers/{gone[1]}/zarr.json", "missing")
        else:
            others.append(line)
    result = Survey(found, rows_per_shard=store.card.rows_per_shard)
    records = {key for key in faults if _RECORD.fullmatch(key)}
    sealed = [key.removesuffix(f"/{MANIFEST}") for key in faults if key.endswith(f"/{MANIFEST}")]
    for key in dict.fromkeys((*ledger_keys(store.path), *sealed)):
        _read_ledger(store, key, faults, records, result)
    _read_samples(store, faults, result)
    for key in GROUPS:
        expected = stored_object(group_metadata({}))
        result.listed.setdefault(key, expected)
        if _stored(store.path / key) != result.listed[key]:
            faults.setdefault(key, "missing or not the record of a group")
    _read_constants(store, faults, records, result)
    _read_index(store.path, faults, result)
    _read_held(store, faults, records, result)
    result.damaged = [_sorted_out(key, why, store, result) for key, why in sorted(faults.items())]
    result.damaged += [Damaged("", line, "other", why_not="") for line in others]
    return result


def _read_constants(store: Store, faults: dict[str, str], records: set[str], result: Survey) -> None:
    """A teacher's record lists its constants too, where none of its seals can be read."""
    for name in store.teachers():
        folder = f"teachers/{name}"
        if f"{folder}/zarr.json" in records:
            continue
        record = store.teacher(name)
        result.listed = {f"{folder}/{key}": entry for key, entry in record.objects.items()} | result.listed
        if not any(teacher_of(key) == name for key in result.manifests):
            held = None if f"{folder}/{HELD}" in faults else held_taps(store, name)
            for key in damaged_constants(store, record):
                if is_held(f"{folder}/{key}", name, held):
                    faults.setdefault(f"{folder}/{key}", "missing, or not what the teacher's record lists")


def _read_index(root: Path, faults: dict[str, str], result: Survey) -> None:
    """What the index knows that nothing else says: the records that never change, where no seal lists them."""
    index = None if INDEX in faults else read_index(root)
    if index is None:
        # Stores that have none were written before records were checked.
        if result.manifests and CHECK in read_json(root / "zarr.json")["attributes"]:
            faults.setdefault(INDEX, "missing")
        return
    for key, entry in index.objects.items():
        if key in RECORDS or key.endswith(f"/{MANIFEST}") or _RECORD.fullmatch(key):
            result.listed.setdefault(key, entry)
    if result.manifests and _stored(root / CROISSANT) != index.objects.get(CROISSANT):
        faults.setdefault(CROISSANT, f"not what {INDEX} lists")


def _read_held(store: Store, faults: dict[str, str], records: set[str], result: Survey) -> None:
    """Which taps a copy has, where its note of that is damaged: those of which anything is there. Others are not missed."""
    for name in store.teachers():
        folder = f"teachers/{name}"
        damaged = f"{folder}/{HELD}" in faults
        if f"{folder}/zarr.json" in records or (not damaged and held_taps(store, name) is not None):
            continue
        every = frozenset(store.teacher(name).taps)
        own = [key for key in result.listed if not is_held(key, name, frozenset())]
        there = {_tap_of(key) for key in own if (damaged or key not in faults) and (store.path / key).is_file()}
        gone = sorted(every - there)
        if not gone or not there:
            result.held |= {name: every} if damaged else {}
        elif damaged:
            result.held[name] = every & there
            for key in [key for key in faults if not is_held(key, name, every & there)]:
                del faults[key]
        else:
            result.notes.append(
                f"nothing of tap {', '.join(gone)} of teacher {name} is there: if this is a partial copy, whose {HELD} is lost, "
                f"run the same 'hdcache pull' with '--teacher {name} --tap {sorted(there)[0]}' again instead"
            )


def _tap_of(key: str) -> str:
    parts = key.split("/")
    return parts[4] if parts[2] == "views" else parts[3]


def _stored(path: Path) -> StoredObject | None:
    try:
        return stored_object(read_record(path))
    except StoreUnreadable:
        raise
    except StoreCorrupt:
        return None


def _read_samples(store: Store, faults: Mapping[str, str], result: Survey) -> None:
    if SAMPLES_RECEIPT not in faults:
        receipt = Receipt.parse(read_json(store.path / SAMPLES_RECEIPT), store.path / SAMPLES_RECEIPT)
        result.listed |= {f"samples/{name}": entry for name, entry in receipt.objects.items()}


def _read_ledger(store: Store, key: str, faults: dict[str, str], records: set[str], result: Survey) -> None:
    """Read what is good of a ledger's records, and note in ``faults`` what is missing of them."""
    ledger, where = Ledger(store.path, key), f"{key}/{MANIFEST}"
    shards = -(-store.card.dataset.count // store.card.rows_per_shard)
    own = {f"teachers/{teacher_of(key)}/zarr.json", "zarr.json"}
    if records & own and where in faults and _parsed(ledger) is not None:
        del faults[where]  # it is the record that does not fit
    receipts = result.receipts[key] = _receipts(store.path, key, faults)
    result.listed |= total_of(key, receipts.values()).objects
    if where not in faults and (manifest := _parsed(ledger)) is not None:
        result.manifests[key] = manifest
        result.listed |= manifest.objects
        for shard in set(range(shards)) - receipts.keys():
            faults.setdefault(f"{key}/{RECEIPTS}/{shard}.json", "missing")
    elif where in faults and receipts:
        for shard in set(range(shards)) - receipts.keys():
            faults.setdefault(f"{key}/{RECEIPTS}/{shard}.json", "missing, as is a seal that says what it was")
    elif where not in faults and total_of(key, receipts.values()).covered == store.card.dataset.count:
        faults[where] = "missing, and all of its shards are there"


def _parsed(ledger: Ledger) -> Manifest | None:
    try:
        return ledger.manifest() if ledger.sealed else None
    except StoreUnreadable:
        raise
    except StoreCorrupt:
        return None


def _receipts(root: Path, key: str, faults: Mapping[str, str]) -> dict[int, Receipt]:
    folder, found = root / key / RECEIPTS, {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if name.endswith(".json") and f"{key}/{RECEIPTS}/{name}" not in faults:
            receipt = Receipt.parse(read_json(folder / name), folder / name)
            found[receipt.shard] = receipt
    return found


def _sorted_out(key: str, why: str, store: Store, result: Survey) -> Damaged:
    expected = result.listed.get(key)
    if key.endswith(f"/{MANIFEST}"):
        return Damaged(key, why, "manifest", expected, key.removesuffix(f"/{MANIFEST}"))
    ledger = next((one for one in ledger_keys(store.path) if key.startswith(f"{one}/")), "")
    name = key.removeprefix(f"{ledger}/")
    if ledger:
        if number := _RECEIPT.fullmatch(name):
            return Damaged(key, why, "receipt", expected, ledger, int(number[1]))
        if (shard := shard_of(name)) is not None:
            return Damaged(key, why, "shard", expected, ledger, shard)
        return Damaged(key, why, "metadata" if name.endswith("zarr.json") else "other", expected, ledger)
    if key in (INDEX, CROISSANT):
        return Damaged(key, why, "index")
    if _RECORD.fullmatch(key):
        return Damaged(key, why, "record", expected)
    if _HELD.fullmatch(key):
        return Damaged(key, why, "held")
    if key in GROUPS:
        return Damaged(key, why, "metadata", expected)
    if key.startswith("samples/"):
        return Damaged(key, why, "samples", expected)
    if re.match(r"teachers/[^/]+/(encodings|weights|views)/", key):
        return Damaged(key, why, "constants", expected)
    return Damaged(key, why, "other", expected)
