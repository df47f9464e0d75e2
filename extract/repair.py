"""``hdcache repair``: what is damaged in a store is made again, or taken from a copy, and proven before it takes its place.

::

    survey (hdcache.extract.damage)  ->  what belongs to what  ->  made again, in the order in which things build on each other:
    equal files, samples, geometry, kept samples, constants, metadata, receipts, rows, seals

An object is replaced, in one rename, by bytes of the size and sha256 that the store lists for it, and by no others: the seals stay
where they are, a store can be read meanwhile, and a repair that was killed is gone on with by the next one. Bytes of rows may come out
otherwise on another machine. Those are not taken, unless ``reseal`` says so: then the view gets another seal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import filelock

from hdcache.array_metadata import read_json
from hdcache.errors import InputNotFound, StoreCorrupt, StoreMismatch, StoreUnreadable, UsageError
from hdcache.extract.copying import copied, take_from_copy
from hdcache.extract.damage import UNREADABLE, Survey, ledger_keys, survey
from hdcache.extract.mending import Mender
from hdcache.extract.record_mending import RECORD_ADVICE, mend_held
from hdcache.extract.repair_requests import check_asked, named_folders
from hdcache.index import write_index
from hdcache.integrity import verify
from hdcache.ledgers import INDEX, MANIFEST, Ledger, read_index
from hdcache.progress import Progress, counted
from hdcache.records import NAME
from hdcache.schema import Manifest, StoredObject
from hdcache.store import PIXELS, ROOT_LOCK, Store
from hdcache.teachers import choose_device

WAYS = {
    "record": "",
    "index": "written anew",
    "manifest": "sealed again from its receipts",
    "receipt": "written again from the manifest",
    "metadata": "written again",
    "samples": "written again from the data set",
    "constants": "made again from the teacher",
    "shard": "extracted again",
    "held": "written again",
    "other": "",
}
"""Kind of object -> how it is mended where nothing else is damaged."""


def repair(
    path: str | Path,
    *,
    copy: str | Path | None = None,
    data: str | None = None,
    teachers: Sequence[str] = (),
    device: str = "auto",
    threads: int | None = None,
    quick: bool = False,
    dry_run: bool = False,
    reseal: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """Find what is damaged in a store, and mend it.

    Parameters
    ----------
    copy
        folder of another copy of the same store: damaged objects are taken from there, once their sha256 is right, and
        nothing is made again.
    data
        the data set, if it has moved and the store does not keep its samples, or if these are damaged.
    teachers
        ``NAME=MODEL`` of teachers whose weights have moved.
    device, threads
        as the extraction had them, if the bytes are to come out as they were.
    quick
        compare sizes alone.
    dry_run
        only say what is damaged, and how it would be mended.
    reseal
        take rows that come out with other bytes, and seal their views anew.

    Returns
    -------
    dict
        ``damaged``: a list of ``key``, ``fault``, ``kind``, ``teacher``, ``ledger``, ``shard``, ``outcome`` (empty: not mended),
        ``why_not`` and ``differs``. ``seals``: ledger -> ``before`` and ``after``, digests of the manifest (None: there was none that could be
        read). ``unsealed``: ledgers that an extraction has still to finish. ``good``: whether the store is whole now.

    Raises
    ------
    UsageError
        for settings that cannot be meant, a copy of another store among them; before anything is looked at.
    InputNotFound
        when there is no store, no copy or no data; or when something is there and cannot be read now.
    StoreLocked
        when another process is writing.
    StoreCorrupt
        when the store's own record is damaged, and no ``copy`` is given that has it.
    """
    root, other = named_folders(path, copy)
    where = choose_device(device)
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads} must be at least 1")
    store = _opened(root, other, dry_run=dry_run)
    dataset = check_asked(store, other, data, teachers)
    listed = _listed_ledgers(store)
    with ExitStack() as held:
        if not dry_run:
            for name in _writers(store):
                held.enter_context(store.lock(name))
        found = _survey(store, quick=quick, quiet=quiet)
        before = {key: manifest.digest() for key, manifest in found.manifests.items()}
        notes = _index_notes(store, found)
        if dry_run:
            found.notes += notes
            return _result(store, _planned(found, copy is not None), before, dry_run=True)
        if found.damaged:
            held_notes = mend_held(store, found)
            if other is not None:
                again = None if quick else partial(_survey, quick=False, quiet=quiet)
                found = take_from_copy(store, other, found, again)
            else:
                Mender(
                    store,
                    found,
                    data if dataset is None else dataset,
                    teachers,
                    where,
                    threads,
                    reseal=reseal,
                    quiet=quiet,
                ).run()
            again_held = {one.key for one in held_notes}
            found.damaged = held_notes + [one for one in found.damaged if one.key not in again_held]
            derived = found.open("index")
            if len(found.open()) == len(derived):
                write_index(store)
            for one in derived:
                whole = len(found.open()) == len(derived)
                one.outcome, one.why_not = (
                    (WAYS["index"], "") if whole else ("", "it is written when all else is mended")
                )
        found.notes = (found.notes if found.open() else []) + notes
        return _result(store, found, before, dry_run=False, listed=listed)


def _listed_ledgers(store: Store) -> frozenset[str]:
    """What was sealed when the index was written."""
    try:
        index = read_index(store.path)
    except StoreCorrupt:
        return frozenset()
    return frozenset(
        key.removesuffix(f"/{MANIFEST}")
        for key in (index.objects if index is not None else ())
        if key.endswith(f"/{MANIFEST}")
    )


def _index_notes(store: Store, found: Survey) -> list[str]:
    """Without the index a teacher or view that is gone as a whole, or a seal with receipts of its, is not missed."""
    if not any(one.key == INDEX for one in found.damaged):
        return []
    there = [
        f"{name} with {counted(len(views := store.views(name)), 'sealed views')} {views}" for name in store.teachers()
    ]
    open_ones = f"; not sealed: {', '.join(found.found.unsealed)}" if found.found.unsealed else ""
    return [
        f"{INDEX} was damaged, which alone tells whether a whole teacher or view, or its seal, is gone; there are "
        f"{', '.join(there) or 'no teachers'}{open_ones}: if something lacks, take it from a good copy (hdcache pull)"
    ]


def _writers(store: Store) -> list[str]:
    folder = store.path / "teachers"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    return [*[PIXELS] * (store.path / PIXELS).is_dir(), *(name for name in names if NAME.fullmatch(name))]


def _survey(store: Store, *, quick: bool, quiet: bool) -> Survey:
    with Progress("verify", 0, "bytes", quiet=quiet) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done - bar.done)

        return survey(store, quick=quick, progress=advance)


def _planned(found: Survey, copied: bool) -> Survey:
    for one in found.damaged:
        one.outcome = "to be taken from the copy" if copied and one.kind != "index" else WAYS[one.kind]
        one.outcome = f"would be {one.outcome}" if one.outcome and not copied else one.outcome
        if not one.outcome:
            one.why_not = RECORD_ADVICE if one.kind == "record" else "hdcache did not write it so; look at it yourself"
    return found


def _result(
    store: Store, found: Survey, before: dict[str, str], *, dry_run: bool, listed: Collection[str] = ()
) -> dict[str, Any]:
    after: dict[str, str | None] = dict.fromkeys(before)
    for key in ledger_keys(store.path):
        try:
            ledger = Ledger(store.path, key)
            after[key] = ledger.manifest().digest() if ledger.sealed else None
        except StoreCorrupt:
            after[key] = None
    touched = {one.ledger for one in found.damaged if one.ledger}
    left = verify(store, quick=True)
    mended = all(one.outcome for one in found.damaged)
    lost = [key for key in sorted(listed) if not Ledger(store.path, key).sealed]
    faults = [
        *left.faults,
        *(f"{store.path}/{key}: sealed when the index was written, and not any more" for key in lost),
    ]
    return {
        "store": str(store.path), "dry_run": dry_run,
        "damaged": [
            {
                "key": one.key, "fault": one.fault, "kind": one.kind, "teacher": one.teacher, "ledger": one.ledger,
                "shard": one.shard, "outcome": one.outcome, "why_not": one.why_not, "differs": one.differs,
            }
            for one in found.damaged
        ],
        "seals": {key: {"before": before.get(key), "after": after.get(key)} for key in sorted(touched)},
        "unsealed": left.unsealed,
        "good": not found.damaged if dry_run else mended and not faults,
        "left": [] if dry_run or not mended else faults,
        "notes": found.notes,
    }  # fmt: skip


def _opened(root: Path, other: Path | None, *, dry_run: bool) -> Store:
    """The store, its own record taken from the copy where it is damaged."""
    try:
        return Store.open(root)
    except StoreUnreadable as error:
        raise InputNotFound(f"{error}; {UNREADABLE}") from None
    except (StoreCorrupt, InputNotFound) as error:
        expected = _expected_root(root)
        if expected is None:
            raise
        if other is None or dry_run:
            raise StoreCorrupt(f"{error}; {RECORD_ADVICE}: hdcache repair {root} --from COPY") from None
        with filelock.FileLock(root / ROOT_LOCK):
            if why := copied(other / "zarr.json", root / "zarr.json", expected):
                raise StoreCorrupt(f"{error}; {why}") from None
        return Store.open(root)


def _expected_root(root: Path) -> StoredObject | None:
    """What the store's own record should be, by any of its seals."""
    for path in sorted(root.glob(f"views/*/{MANIFEST}")) + sorted(root.glob(f"teachers/*/views/*/{MANIFEST}")):
        try:
            found = Manifest.parse(read_json(path), path).objects.get("zarr.json")
        except StoreCorrupt:
            continue
        if found is not None:
            return found
    return None


# What is said


def format_repair(result: Mapping[str, Any]) -> str:
    """What was damaged and what became of it, a line for each; and what became of the seals."""
    lines = [
        f"{result['store']}: {counted(len(result['damaged']), 'damaged objects')}"
        if result["damaged"]
        else f"{result['store']}: all good"
    ]
    lines += [
        f"{one['key'] or 'the store'}: {one['fault']}; {one['outcome'] or 'NOT mended: ' + one['why_not']}"
        for one in result["damaged"]
    ]
    for key, seal in result["seals"].items():
        if seal["before"] is not None and seal["after"] == seal["before"]:
            lines.append(f"seal of {key}: as it was ({seal['after'][:12]})")
        elif seal["after"] is not None:
            was = f"it was {seal['before'][:12]}" if seal["before"] else "it could not be read before"
            lines.append(f"seal of {key}: {seal['after'][:12]}, {was}")
    lines += [f"not sealed yet: {key}; run the same 'hdcache extract' command again" for key in result["unsealed"]]
    return "\n".join([*lines, *result["notes"], *result["left"]])


def check_repaired(result: Mapping[str, Any]) -> None:
    """:class:`StoreMismatch` where objects came out with other bytes, :class:`StoreCorrupt` where others could not be mended."""
    store = result["store"]
    if result["good"] or result["dry_run"]:
        return
    left = [one for one in result["damaged"] if not one["outcome"]]
    mended = len(result["damaged"]) - len(left)
    done = f"{mended} of {counted(len(result['damaged']), 'damaged objects')} mended"
    if not left:
        raise StoreCorrupt(f"{store}: {done}, but it is not whole: {result['left'][0]}")
    if others := [one for one in left if not one["differs"]]:
        # What others wait for first.
        others.sort(key=lambda one: (one["kind"] in ("manifest", "index"), bool(one["teacher"]), one["key"]))
        raise StoreCorrupt(f"{store}: {done}; {others[0]['key'] or others[0]['fault']}: {others[0]['why_not']}")
    raise StoreMismatch(
        f"{store}: {done}; {counted(len(left), 'others')} would come out with other bytes, such as {left[0]['key']}: this machine, device, number of "
        "threads or versions round otherwise than those that extracted it. Nothing of that was replaced, and the seals are as they were. "
        "Take them from a good copy (--from COPY), repair where they were extracted, or accept them with --reseal: the view then gets "
        "another seal, so that copies of it and caches of its rows no longer count as the same"
    )
