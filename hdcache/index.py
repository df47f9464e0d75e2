"""``index.json``: what a copy of a store needs and no manifest lists. ``held.json``: which taps a copy has.

A reader of a bucket or of a plain web server cannot list a folder. From the index follow the manifests, the receipts and the
records; from a manifest all of its objects; from ``samples/receipt.json`` the sample ids and labels. The index is derived: it
lists sealed ledgers only, and whoever seals writes it anew. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import filelock
from pydantic import Field

from hdcache.array_metadata import contained, read_json, read_record
from hdcache.croissant import croissant_json
from hdcache.durable import durable_write, stored_object
from hdcache.errors import StoreCorrupt
from hdcache.ledgers import MANIFEST, RECEIPTS, SAMPLES_RECEIPT, Ledger
from hdcache.records import CheckedRecord, Record
from hdcache.schema import FORMAT, Objects, StoredObject
from hdcache.store import PIXELS, ROOT_LOCK, Store, is_view

INDEX, HELD, CROISSANT = "index.json", "held.json", "croissant.json"
RECORDS = (CROISSANT, "zarr.json", SAMPLES_RECEIPT, "samples/zarr.json", "views/zarr.json", "teachers/zarr.json")


class Index(CheckedRecord):
    """What ``index.json`` says."""

    format: int = FORMAT
    objects: Objects = Field(default_factory=dict)
    """Relative to the store's root: groups' records, the samples' receipt; of every sealed ledger its manifest and receipts."""


class Held(Record):
    """Which taps of a teacher this copy of a store has; written beside the teacher's record by a partial copy alone."""

    taps: tuple[str, ...]


def sealed_ledgers(store: Store) -> list[Ledger]:
    """Every sealed ledger: kept samples, then views, then teachers' rows."""
    views = [f"views/{number}" for number in _views(store.path / "views")]
    rows = [
        f"teachers/{name}/views/{number}"
        for name in store.teachers()
        for number in _views(store.path / "teachers" / name / "views")
    ]
    found = [Ledger(store.path, key) for key in (PIXELS, *views, *rows)]
    return [ledger for ledger in found if ledger.sealed]


def _views(folder: Path) -> list[int]:
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if is_view(name))


def build_index(store: Store, known: Index | None = None) -> Index:
    """The index of what is sealed now; entries of ledgers whose manifest ``known`` lists as it is are taken from there."""
    before = known.objects if known is not None else {}
    teachers = [f"teachers/{name}/zarr.json" for name in store.teachers()]
    objects = _listed(store.path, [*RECORDS, *teachers])
    for ledger in sealed_ledgers(store):
        manifest = f"{ledger.key}/{MANIFEST}"
        objects |= _listed(store.path, [manifest])
        folder = f"{ledger.key}/{RECEIPTS}/"
        if before.get(manifest) == objects.get(manifest):
            objects |= {key: entry for key, entry in before.items() if key.startswith(folder)}
            continue
        names = sorted(path.name for path in (ledger.folder / RECEIPTS).glob("[0-9]*.json"))
        objects |= _listed(store.path, [folder + name for name in names])
    return Index(objects=dict(sorted(objects.items())))


def _listed(root: Path, keys: Iterable[str]) -> dict[str, StoredObject]:
    return {key: stored_object(read_record(root / key)) for key in keys if (root / key).is_file()}


def read_index(path: Path) -> Index | None:
    """The index of a store at ``path``; None where it has none. :class:`StoreCorrupt` where it was altered."""
    if not (path / INDEX).is_file():
        return None
    return Index.parse(read_json(path / INDEX), path / INDEX)


def write_index(store: Store) -> Index:
    """Bring ``index.json`` up to date, and ``croissant.json``, which describes the store to others; whoever seals calls it."""
    with filelock.FileLock(store.path / ROOT_LOCK):
        try:
            known = read_index(store.path)
        except StoreCorrupt:
            known = None  # it is derived
        described = croissant_json(store)
        path = store.path / CROISSANT
        if not path.is_file() or path.read_bytes() != described:
            durable_write(path, described)
        index = build_index(store, known)
        if index != known:
            durable_write(store.path / INDEX, index.checked())
        return index


def held_taps(store: Store, teacher: str) -> frozenset[str] | None:
    """The taps that this copy has of a teacher; None where it has them all.

    Raises
    ------
    StoreCorrupt
        when the note that says so cannot be read.
    """
    path = contained(store.path, f"teachers/{teacher}") / HELD
    if not path.is_file():
        return None
    return frozenset(Held.parse(read_json(path), path).taps)


def is_held(key: str, teacher: str, taps: frozenset[str] | None) -> bool:
    """Whether a copy that has ``taps`` of a teacher has the object ``key``, relative to the store's root."""
    own = f"teachers/{teacher}/"
    if taps is None or not key.startswith(own):
        return True
    match key.removeprefix(own).split("/"):
        case ["views", _, tap, _, *_] | ["encodings", tap, _, *_] if tap not in (RECEIPTS, "mask", "pixels"):
            return tap in taps
    return True
