"""``index.json``: what a copy of a store needs and no manifest lists. ``held.json``: which taps a copy has.

A reader of a bucket or of a plain web server cannot list a folder. From the index follow the manifests, the receipts and the
records; from a manifest all of its objects; from ``samples/receipt.json`` the sample ids and labels. The index is derived: it
lists sealed ledgers only, and whoever seals writes it anew. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import filelock
from pydantic import FailFast

from hdcache.array_metadata import contained, names_in, read_json, read_record
from hdcache.croissant import croissant_json
from hdcache.durable import durable_write, stored_object
from hdcache.errors import StoreCorrupt
from hdcache.ledgers import INDEX as INDEX
from hdcache.ledgers import MANIFEST, RECEIPTS, SAMPLES_RECEIPT, Ledger
from hdcache.ledgers import Index as Index
from hdcache.ledgers import read_index as read_index
from hdcache.records import NAME, Record
from hdcache.schema import Objects, StoredObject
from hdcache.store import PIXELS, ROOT_LOCK, Store, is_view

HELD, CROISSANT = "held.json", "croissant.json"
RECORDS = (CROISSANT, "zarr.json", SAMPLES_RECEIPT, "samples/zarr.json", "views/zarr.json", "teachers/zarr.json")


class Held(Record):
    """Which taps of a teacher this copy of a store has; written beside the teacher's record by a partial copy alone."""

    taps: Annotated[tuple[str, ...], FailFast()]


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
        names = [name for name in names_in(ledger.folder / RECEIPTS) if name[0].isdecimal() and name.endswith(".json")]
        objects |= _listed(store.path, [folder + name for name in names])
    return Index(objects=dict(sorted(objects.items())))


def _listed(root: Path, keys: Iterable[str]) -> dict[str, StoredObject]:
    return {key: stored_object(read_record(root / key)) for key in keys if (root / key).is_file()}


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
            if known is not None and CROISSANT in known.objects:
                # A kill between the two leaves no index that lists the old one beside the new one.
                others = {key: entry for key, entry in known.objects.items() if key != CROISSANT}
                known = known.model_copy(update={"objects": others})
                durable_write(store.path / INDEX, known.checked())
            durable_write(path, described)
        index = build_index(store, known)
        if index != known:
            durable_write(store.path / INDEX, index.checked())
        return index


def lost_records(store: Store, teachers: Iterable[str] | None = None) -> list[str]:
    """Keys of records that are gone while what was made after them is there: of the views, and of ``teachers`` (None: of all).

    Without them a store looks like one that never had these teachers or views, and readers would go on with what is left. A ledger whose
    failed rows are tried again has no seal either, but then a receipt is missing too, or the index does not list the seal.
    """
    folder = store.path / "teachers"
    names = teachers if teachers is not None else [name for name in names_in(folder) if NAME.fullmatch(name)]
    found, unsealed = [], []
    for name in ["", *sorted(names)]:
        views = Path("teachers", name, "views") if name else Path("views")
        here = [(store.path / views / str(number)) for number in _views(store.path / views)]
        if name and not (folder / name / "zarr.json").is_file() and any((path / MANIFEST).is_file() for path in here):
            found.append(f"teachers/{name}/zarr.json")
        unsealed += [f"{views}/{path.name}" for path in here if not (path / MANIFEST).is_file()]
    unsealed += [PIXELS] * ((store.path / PIXELS).is_dir() and not (store.path / PIXELS / MANIFEST).is_file())
    known: Objects = {}
    if unsealed:
        with suppress(StoreCorrupt):  # it is derived
            known = getattr(read_index(store.path), "objects", {})
    shards = -(-store.card.dataset.count // store.card.rows_per_shard)
    for key in unsealed:
        receipts = (store.path / key / RECEIPTS / f"{number}.json" for number in range(shards))
        if f"{key}/{MANIFEST}" in known and all(path.is_file() for path in receipts):
            found.append(f"{key}/{MANIFEST}")
    return found


def check_records(store: Store, teachers: Iterable[str] | None = None) -> None:
    """:class:`StoreCorrupt` names the first of the :func:`lost_records`."""
    for key in lost_records(store, teachers):
        raise StoreCorrupt(
            f"{store.path}/{key}: missing, and all that it speaks of is there; 'hdcache repair {store.path}' makes it again"
        )


def check_seals(store: Store) -> None:
    """As :func:`check_records` of all teachers, and :class:`StoreCorrupt` for a seal that is none that the index lists."""
    check_records(store)
    known: Objects = {}
    with suppress(StoreCorrupt):  # it is derived
        known = getattr(read_index(store.path), "objects", {})
    for key, entry in known.items():
        path = store.path / key
        if path.name == MANIFEST and path.is_file() and stored_object(read_record(path)) != entry:
            raise StoreCorrupt(
                f"{path}: not the seal that {INDEX} lists; run the same 'hdcache extract' again, or copy the store again"
            )


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
