"""What a place holds of a store, as its records say, and what of that is to be copied.

Records that come from a place are untrusted: they are bounded before they are parsed, held to the index, and may list only
what is their own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdcache.array_metadata import GROUP_NESTED, NESTED, RECORD_BYTES, attributes_of, parse_json
from hdcache.durable import stored_object
from hdcache.errors import InputNotFound, StoreCorrupt, StoreMismatch, nearest
from hdcache.index import HELD, RECORDS, Held, build_index, check_records, is_held
from hdcache.ledgers import INDEX, MANIFEST, RECEIPTS, SAMPLES_RECEIPT, Index, Total, lists_receipts
from hdcache.records import NAME
from hdcache.schema import FORMAT, Manifest, Objects, Receipt, StoreCard, StoredObject, TeacherRecord
from hdcache.sharing.folder import Folder
from hdcache.sharing.objects import Place, checked_key
from hdcache.store import ABOUT, PIXELS, Store, is_view

_OWN_RECORDS = ("zarr.json", "samples/zarr.json", "views/zarr.json", "teachers/zarr.json", SAMPLES_RECEIPT)


def read_listed(place: Place, key: str, listed: StoredObject) -> bytes:
    """A record that is listed, proven; :class:`StoreCorrupt` when it is another, or too large for one."""
    if listed.size > RECORD_BYTES:
        raise StoreCorrupt(f"{place.url}/{key}: {listed.size} bytes are too large for a record; not a store of hdcache")
    return b"".join(place.parts(key, listed))


def bounded_json(where: str, data: bytes, nested: int = NESTED) -> Any:
    """The value of a JSON text of a place."""
    if data[:1] == b"<":
        raise StoreCorrupt(f"{where}: a page of HTML, not a record; check the URL, and any proxy or login before it")
    return parse_json(where, data, nested)


def read_index(place: Place) -> dict[str, StoredObject] | None:
    """What ``index.json`` of a place lists; None where it has none."""
    data = place.read(INDEX, RECORD_BYTES, optional=True)
    if data is None:
        return None
    where = f"{place.url}/{INDEX}"
    found = bounded_json(where, data)
    _check_format(found.get("format") if isinstance(found, dict) else None, where)
    return Index.parse(found, where).objects


def listed_index(place: Place) -> dict[str, StoredObject]:
    """What an index of a place would list, where it has a listing."""
    keys = place.listing().keys()
    ledgers = [key.removesuffix(f"/{MANIFEST}") for key in sorted(keys) if ledger_of(key) is not None]
    records = [key for key in RECORDS if key in keys]
    records += [key for key in sorted(keys) if _teacher_of_record(key)]
    found = {}
    for key in (*records, *(f"{ledger}/{MANIFEST}" for ledger in ledgers)):
        if (data := place.read(key, RECORD_BYTES)) is None:
            continue
        found[key] = stored_object(data)
        ledger = ledger_of(key)
        if ledger is None or lists_receipts(data, ledger):
            continue
        for receipt in sorted(other for other in keys if other.startswith(f"{ledger}/{RECEIPTS}/")):
            if (data := place.read(receipt, RECORD_BYTES)) is not None:
                found[receipt] = stored_object(data)
    return found


def ledger_of(key: str) -> str | None:
    """The ledger that a manifest's key seals, None for any other key."""
    match key.split("/"):
        case ["samples", "pixels", "manifest.json"]:
            return PIXELS
        case ["views", view, "manifest.json"] if is_view(view):
            return f"views/{view}"
        case ["teachers", name, "views", view, "manifest.json"] if NAME.fullmatch(name) and is_view(view):
            return f"teachers/{name}/views/{view}"
    return None


def _teacher_of_record(key: str) -> str:
    match key.split("/"):
        case ["teachers", name, "zarr.json"] if NAME.fullmatch(name):
            return name
    return ""


def _check_format(version: Any, where: str) -> None:
    if isinstance(version, int) and version > FORMAT:
        raise StoreMismatch(
            f"{where}: store format {version}, this hdcache reads up to {FORMAT}; 'pip install -U hdcache'"
        )


def read_card(place: Place, data: bytes) -> StoreCard:
    """The root record of a store, of what its ``zarr.json`` holds."""
    where = f"{place.url}/zarr.json"
    record = attributes_of(bounded_json(where, data, GROUP_NESTED), where)
    if not isinstance(record, dict):
        raise InputNotFound(f"{place.url}: a Zarr group, but not an hdcache store (no 'hdcache' attribute)")
    _check_format(record.get("format"), where)
    return StoreCard.parse(record, where)


def read_held(place: Place, teacher: str) -> frozenset[str] | None:
    """The taps that a copy has of a teacher, None for all of them."""
    key = f"teachers/{teacher}/{HELD}"
    data = place.read(key, RECORD_BYTES, optional=True)
    where = f"{place.url}/{key}"
    return None if data is None else frozenset(Held.parse(bounded_json(where, data), where).taps)


def seal_faults(manifest: Manifest, total: Total) -> list[str]:
    """In what a manifest and the receipts of its shards differ; together they are a sealed ledger."""
    faults = [] if total.covered == manifest.rows else [f"its receipts cover {total.covered} of {manifest.rows} rows"]
    faults += [
        f"the receipt of {key} differs" for key, entry in total.objects.items() if manifest.objects.get(key) != entry
    ]
    if not faults and (manifest.failed, manifest.saturated) != (total.failed, total.saturated):
        faults.append("failed rows or saturated values differ from its receipts")
    return faults[:3]


@dataclass(frozen=True)
class Wanted:
    """What of a store is to be copied; empty: all of it."""

    teachers: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    views: tuple[int, ...] = ()
    pixels: bool = True


@dataclass(frozen=True)
class Share:
    """What is copied of one teacher."""

    taps: frozenset[str] | None
    """None: all that there are."""
    views: tuple[int, ...]


@dataclass
class Contents:
    """The records of a store at some place: enough to say what there is, before anything is copied."""

    place: Place
    index: dict[str, StoredObject]
    card: StoreCard
    samples: Objects
    """Relative to the store's root."""
    teachers: dict[str, TeacherRecord] = field(default_factory=dict)
    """Those with a sealed view."""
    unsealed: list[str] = field(default_factory=list)
    """Ledgers and teachers that are not complete, as far as the place shows them."""
    _held: dict[str, frozenset[str] | None] = field(default_factory=dict)

    @classmethod
    def read(cls, place: Place) -> Contents:
        """Read what there is.

        Raises
        ------
        InputNotFound
            when there is no store.
        StoreMismatch
            when it was written in a newer format.
        StoreCorrupt
            when a record is malformed, altered, or lists what is not its own.
        """
        index = cls._index(place)
        if "zarr.json" not in index or SAMPLES_RECEIPT not in index:
            raise InputNotFound(f"{place.url}: no store there; check the path or the URL")
        for key in index:
            checked_key(key, f"{place.url}/{INDEX}")
        card = read_card(place, read_listed(place, "zarr.json", index["zarr.json"]))
        where = f"{place.url}/{SAMPLES_RECEIPT}"
        data = read_listed(place, SAMPLES_RECEIPT, index[SAMPLES_RECEIPT])
        listed = Receipt.parse(bounded_json(where, data), where).objects
        samples = {f"samples/{key}": value for key, value in listed.items()}
        for key in samples:
            checked_key(key, where)
            if key.startswith(f"{PIXELS}/") or key in _OWN_RECORDS:
                raise StoreCorrupt(f"{where}: lists {key}, which is not its own; do not use this store")
        found = cls(place, index, card, samples)
        found._read_teachers()
        return found

    @staticmethod
    def _index(place: Place) -> dict[str, StoredObject]:
        if isinstance(place, Folder):
            check_records(store := Store.open(place.path))
            return dict(build_index(store).objects)
        found = read_index(place)
        if found is None and not place.listable:
            raise InputNotFound(
                f"{place.url}: no store there, since it has no {INDEX}; check the URL, or copy the store there with "
                "'hdcache push', which writes one"
            )
        return listed_index(place) if found is None else found

    def _read_teachers(self) -> None:
        for name in filter(None, map(_teacher_of_record, sorted(self.index))):
            key = f"teachers/{name}/zarr.json"
            where = f"{self.place.url}/{key}"
            if not self.views(name):
                self.unsealed.append(f"teachers/{name}")
                continue
            data = read_listed(self.place, key, self.index[key])
            record = TeacherRecord.parse(attributes_of(bounded_json(where, data, GROUP_NESTED), where), where)
            if record.name != name:
                raise StoreCorrupt(f"{where}: the record of teacher {record.name[:80]!r}; do not use this store")
            if (record.dataset, record.views) != (self.card.dataset.fingerprint, self.card.views):
                raise StoreCorrupt(f"{where}: made for other data or views than the store's; do not use this store")
            self.teachers[name] = record
        if isinstance(self.place, Folder):
            self.unsealed += [key for key in _begun(self.place.path) if f"{key}/{MANIFEST}" not in self.index]

    def views(self, teacher: str = "") -> list[int]:
        """Sealed views of a teacher, or of the samples, ascending."""
        folder = f"teachers/{teacher}/views/" if teacher else "views/"
        ledgers = (ledger_of(key) for key in self.index if key.startswith(folder))
        return sorted(int(key.rpartition("/")[2]) for key in ledgers if key is not None)

    def held(self, teacher: str) -> frozenset[str] | None:
        """The taps that there are of a teacher, None for all of them."""
        if teacher not in self._held:
            self._held[teacher] = read_held(self.place, teacher)
        return self._held[teacher]

    @property
    def pixels(self) -> bool:
        """Whether it has its samples, sealed."""
        return f"{PIXELS}/{MANIFEST}" in self.index

    def receipts(self, ledger: str, manifest: Manifest | None = None) -> dict[str, StoredObject]:
        """Receipts of a sealed ledger: those that its manifest lists, and those that the index lists instead."""
        listed = self.index if manifest is None else self.index | manifest.objects
        return {key: entry for key, entry in listed.items() if key.startswith(f"{ledger}/{RECEIPTS}/")}

    def manifest(self, ledger: str) -> Manifest:
        """The seal of a ledger; :class:`StoreCorrupt` where it is not this store's, or lists what is not its own."""
        key = f"{ledger}/{MANIFEST}"
        where = f"{self.place.url}/{key}"
        found = Manifest.parse(bounded_json(where, read_listed(self.place, key, self.index[key])), where)
        parts = ledger.split("/")
        teacher, view = parts[1] if parts[0] == "teachers" else "", 0 if ledger == PIXELS else int(parts[-1])
        identity = self.teachers[teacher].identity_digest() if teacher else found.identity
        sealed = found.format, found.teacher, found.view, found.identity, found.rows
        if sealed != (self.card.format, teacher, view, identity, self.card.dataset.count):
            raise StoreCorrupt(f"{where}: the seal of another ledger or store; do not use this store")
        shards = -(-self.card.dataset.count // self.card.rows_per_shard)
        receipts = {f"{ledger}/{RECEIPTS}/{shard}.json" for shard in range(min(shards, len(found.objects)))}
        for name, entry in found.objects.items():
            checked_key(name, where)
            if name in self.index:
                own = self.index[name] == entry
            elif teacher and name.startswith(f"teachers/{teacher}/"):
                inner = name.removeprefix(f"teachers/{teacher}/")
                own = not inner.startswith("views/") or name.startswith(f"{ledger}/") or inner == "views/zarr.json"
                own = own and inner not in (HELD, ABOUT)
            else:
                own = name.startswith(f"{ledger}/")
            if not own or (name.startswith(f"{ledger}/{RECEIPTS}/") and name not in receipts):
                raise StoreCorrupt(
                    f"{where}: lists {name}, which is not its own or lies elsewhere too; do not use this store"
                )
        return found

    def objects(self, ledger: str, manifest: Manifest, taps: frozenset[str] | None) -> dict[str, StoredObject]:
        """What a manifest lists beside receipts, and records that the index lists too, of the taps that are meant."""
        return {
            key: entry
            for key, entry in manifest.objects.items()
            if key not in self.index
            and not key.startswith(f"{ledger}/{RECEIPTS}/")
            and is_held(key, manifest.teacher, taps)
        }

    def choose(self, wanted: Wanted) -> dict[str, Share]:
        """What is meant of each teacher.

        Raises
        ------
        InputNotFound
            for a teacher, tap or view that is not there or not complete.
        """
        for name in wanted.teachers:
            if name not in self.teachers:
                begun = any(key == f"teachers/{name}" or key.startswith(f"teachers/{name}/") for key in self.unsealed)
                why = (
                    "is not complete; finish it with 'hdcache extract'"
                    if begun
                    else f"is not there; {nearest(name, self.teachers)}"
                )
                raise InputNotFound(f"{self.place.url}: teacher {name!r} {why}")
        names = wanted.teachers or tuple(self.teachers)
        if wanted.taps and not names:
            raise InputNotFound(
                f"{self.place.url}: holds no complete teacher, so that --tap says nothing; leave it out"
            )
        known = {tap for name in names for tap in self.teachers[name].taps}
        for tap in wanted.taps:
            if tap not in known:
                raise InputNotFound(f"{self.place.url}: no tap {tap!r} of {', '.join(names)}; {nearest(tap, known)}")
        shares = {}
        for name in names:
            views = self.views(name)
            missing = sorted({*wanted.views} - {*views})
            if missing:
                raise InputNotFound(
                    f"{self.place.url}: teacher {name!r} has no sealed view {missing[0]} (sealed: {views})"
                )
            shares[name] = Share(self._taps(name, wanted), wanted.views or tuple(views))
        return shares

    def _taps(self, name: str, wanted: Wanted) -> frozenset[str] | None:
        """The taps that are meant of a teacher, None for all of them; what is not there is refused."""
        every = frozenset(self.teachers[name].taps)
        here = self.held(name)
        if not wanted.taps:
            return here if here is not None and here < every else None
        asked = every & frozenset(wanted.taps)
        if not asked:
            raise InputNotFound(
                f"{self.place.url}: teacher {name!r} has none of these taps ({', '.join(sorted(every))}); name the teachers "
                "that have them with --teacher"
            )
        if here is not None and (gone := sorted(asked - here)):
            raise InputNotFound(
                f"{self.place.url}: holds a part of teacher {name!r} ({', '.join(sorted(here))}), without {gone[0]!r}; copy it from "
                "where the whole store is"
            )
        return asked if asked < every else None


def _begun(root: Path) -> list[str]:
    """Keys of all ledgers of a folder, sealed or not."""
    folders = [PIXELS, *(f"views/{name}" for name in _names(root / "views"))]
    for teacher in _names(root / "teachers"):
        folders += [f"teachers/{teacher}/views/{name}" for name in _names(root / "teachers" / teacher / "views")]
    return [key for key in folders if ledger_of(f"{key}/{MANIFEST}") is not None and (root / key).is_dir()]


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []
