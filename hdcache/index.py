"""``index.json``: what a copy of a store needs and no manifest lists. ``held.json``: which taps a copy has.

A reader of a bucket or of a plain web server cannot list a folder. From the index follow the manifests and the records; from a
manifest all of its objects and receipts; from ``samples/receipt.json`` the sample ids and labels. The index is derived: it
lists sealed ledgers only, and whoever seals writes it anew. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import filelock

from hdcache.array_metadata import names_in, read_record
from hdcache.croissant import croissant_json
from hdcache.durable import durable_write, stored_object
from hdcache.errors import StoreCorrupt
from hdcache.held import HELD as HELD
from hdcache.held import Held as Held
from hdcache.held import held_taps as held_taps
from hdcache.ledgers import INDEX, MANIFEST, RECEIPTS, SAMPLES_RECEIPT, Index, Ledger, lists_receipts, read_index
from hdcache.records import NAME
from hdcache.schema import StoredObject
from hdcache.store import PIXELS, ROOT_LOCK, Store, is_view

CROISSANT = "croissant.json"
RECORDS = (CROISSANT, "zarr.json", SAMPLES_RECEIPT, "samples/zarr.json", "views/zarr.json", "teachers/zarr.json")

LOST = f"missing, though it was there when {INDEX} was written"
_LASTING = re.compile(
    rf"(?:samples/pixels|(?:teachers/[^/]+/)?views/\d+)/{re.escape(MANIFEST)}|teachers/[^/]+/zarr\.json"
)


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
        manifest, folder = f"{ledger.key}/{MANIFEST}", f"{ledger.key}/{RECEIPTS}/"
        data = read_record(store.path / manifest)
        objects[manifest] = stored_object(data)
        if lists_receipts(data, ledger.key):
            continue
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
        if known is not None and (lost := {key: known.objects[key] for key in _missing(store.path)}):
            # Nothing else remembers that they were there.
            index = Index(objects=dict(sorted((lost | index.objects).items())))
        if index != known:
            durable_write(store.path / INDEX, index.checked())
        return index


def lost_records(store: Store, teachers: Iterable[str] | None = None) -> list[str]:
    """Keys of records that are gone: of the views and kept samples, and of ``teachers`` (None: of all).

    Without them a store looks like one that never had these teachers or views, and readers would go on with what is left. A ledger
    whose failed rows are tried again has no seal either, but the index does not list it: that is taken back first.

    Raises
    ------
    StoreCorrupt
        when the index cannot be read: no kill leaves it so, and it alone may know what is gone.
    """
    names = set(names_in(store.path / "teachers") if teachers is None else teachers)
    found = [
        key for key in _missing(store.path) if (teacher := _teacher(key)) == "" or teachers is None or teacher in names
    ]
    for name in sorted(filter(NAME.fullmatch, names)):
        key, views = f"teachers/{name}/zarr.json", store.path / "teachers" / name / "views"
        sealed = any((views / str(number) / MANIFEST).is_file() for number in _views(views))
        if sealed and key not in found and not (store.path / key).is_file():
            found.append(key)
    if not (store.path / INDEX).is_file():
        found += _unseen(store, names)
    return sorted({*found})


def _unseen(store: Store, teachers: Iterable[str]) -> list[str]:
    """Seals of views of which sealed rows of teachers are there, which are sealed after them."""
    rows = (store.path / "teachers" / name / "views" for name in teachers if NAME.fullmatch(name))
    sealed = {number for views in rows for number in _views(views) if (views / str(number) / MANIFEST).is_file()}
    keys = [f"views/{number}/{MANIFEST}" for number in sorted(sealed)]
    return [key for key in keys if not (store.path / key).is_file()]


def _missing(root: Path) -> list[str]:
    """Seals and teachers' records that the index lists and that are not there."""

    def missing() -> set[str]:
        known = read_index(root)
        keys = () if known is None else known.objects
        return {key for key in keys if _LASTING.fullmatch(key) and not (root / key).is_file()}

    # Twice: a seal may be withdrawn between two looks.
    return sorted(missing() and missing())


def _teacher(key: str) -> str:
    parts = key.split("/")
    return parts[1] if parts[0] == "teachers" else ""


def check_records(store: Store, teachers: Iterable[str] | None = None) -> None:
    """:class:`StoreCorrupt` names the first of the :func:`lost_records`, or a record of the store that is another or gone."""
    _check_samples(store)
    known = read_index(store.path)
    for key in ("zarr.json", SAMPLES_RECEIPT):
        listed = None if known is None else known.objects.get(key)
        if listed is not None and stored_object(read_record(store.path / key)) != listed:
            raise StoreCorrupt(
                f"{store.path}/{key}: not the record that {INDEX} lists; take it from a copy: hdcache repair {store.path} --from COPY"
            )
    for key in lost_records(store, teachers):
        raise StoreCorrupt(
            f"{store.path}/{key}: {LOST}; 'hdcache repair {store.path}' says how to get it back (if you removed it, delete {INDEX} too)"
        )


def _check_samples(store: Store) -> None:
    if not (store.path / SAMPLES_RECEIPT).is_file():
        raise StoreCorrupt(
            f"{store.path}/{SAMPLES_RECEIPT}: missing, which every store has; take it from a copy: hdcache repair {store.path} --from COPY"
        )


def check_seal(store: Store, ledger: str) -> None:
    """:class:`StoreCorrupt` where a ledger is not sealed and the index lists its seal, or the list of samples is gone too."""
    _check_samples(store)
    if f"{ledger}/{MANIFEST}" in _missing(store.path):
        raise StoreCorrupt(
            f"{store.path}/{ledger}/{MANIFEST}: {LOST}; 'hdcache repair {store.path}' says how to get it back"
        )


def check_seals(store: Store) -> None:
    """As :func:`check_records` of all teachers, and :class:`StoreCorrupt` for a seal that is none that the index lists."""
    check_records(store)
    known = read_index(store.path)
    for key, entry in () if known is None else known.objects.items():
        path = store.path / key
        if path.name == MANIFEST and path.is_file() and stored_object(read_record(path)) != entry:
            raise StoreCorrupt(
                f"{path}: not the seal that {INDEX} lists; run the same 'hdcache extract' again, or copy the store again"
            )


def is_held(key: str, teacher: str, taps: frozenset[str] | None) -> bool:
    """Whether a copy that has ``taps`` of a teacher has the object ``key``, relative to the store's root."""
    own = f"teachers/{teacher}/"
    if taps is None or not key.startswith(own):
        return True
    match key.removeprefix(own).split("/"):
        case ["views", _, tap, _, *_] | ["encodings", tap, _, *_] if tap not in (RECEIPTS, "mask", "pixels"):
            return tap in taps
    return True
