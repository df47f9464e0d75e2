"""``hdcache push`` and ``hdcache pull``: a store copied from one place to another, or a part of it.

Only sealed ledgers travel. What seals comes last: the root's record after the samples, of each ledger its manifest after its
objects and receipts, the index after all. A kill at any moment therefore leaves nothing that opens as complete, and the same
command goes on: what is there is proven and skipped. Nothing that is there is overwritten; notes that are derived from what a
copy has (``index.json``, ``croissant.json``, ``held.json``) are written anew.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress

import filelock

from hdcache import stopping
from hdcache.array_metadata import RECORD_BYTES
from hdcache.croissant import croissant_json
from hdcache.durable import stored_object
from hdcache.errors import Interrupted, StoreCorrupt, StoreLocked, StoreMismatch, UsageError
from hdcache.index import CROISSANT, HELD, write_index
from hdcache.leases import check_held
from hdcache.ledgers import INDEX, Index, total_of
from hdcache.progress import Progress, counted, size
from hdcache.schema import Receipt, StoredObject
from hdcache.sharing.folder import Folder
from hdcache.sharing.held_notes import Changed, HeldNote, note_of
from hdcache.sharing.merging import Copied, Merged, Part, Plan, present
from hdcache.sharing.objects import Found, Place
from hdcache.sharing.selection import (
    Contents,
    Wanted,
    bounded_json,
    ledger_of,
    listed_index,
    read_index,
    read_listed,
    seal_faults,
)
from hdcache.store import ABOUT, PIXELS, ROOT_LOCK, About, Store

MOST_PARALLEL = 64
ROUNDS = 16
"""How often what is to be copied is decided anew, when others change what a bucket has of a teacher."""
_ABOUT_BYTES = 1 << 20


def copy_store(
    source: Place,
    target: Place,
    wanted: Wanted | None = None,
    *,
    dry_run: bool = False,
    parallel: int = 8,
    read_back: bool = False,
    quiet: bool = False,
) -> Copied:
    """Copy what is ``wanted`` of the store at ``source`` to ``target``; with ``dry_run`` only say what that would move.

    Parameters
    ----------
    parallel
        Objects that travel at a time.
    read_back
        Read every object that was written back, also where the target named its md5.

    Raises
    ------
    InputNotFound
        when there is no store, or not what is wanted of it.
    StoreMismatch
        when another store, or another object, is where something is to be written.
    StoreCorrupt
        when an object or a record of the source is not what the store lists; nothing of it is kept.
    StoreLocked
        when another process writes a teacher of the target.
    Unreachable
        when a place does not answer or refuses.
    OutOfSpace
        when the copy would not fit.
    """
    if not 1 <= parallel <= MOST_PARALLEL:
        raise UsageError(f"--parallel {parallel}: choose from 1 to {MOST_PARALLEL}")
    if isinstance(source, Folder) and isinstance(target, Folder) and source.path.resolve() == target.path.resolve():
        raise UsageError(f"{source.url}: source and target are the same folder")
    started = time.monotonic()
    target.names()  # a target that takes nothing says so before anything is read
    plan = Plan(Contents.read(source), target, wanted or Wanted())
    plan.tally()
    if not dry_run:
        plan.check_room()
        with Progress("copy", plan.report.whole.bytes, "bytes", quiet=quiet) as bar:
            _Copy(plan, bar, parallel, read_back).run()
    plan.report.seconds = time.monotonic() - started
    return plan.report


class _Copy:
    def __init__(self, plan: Plan, bar: Progress, parallel: int, read_back: bool) -> None:
        self._plan, self._contents, self._source, self._target = plan, plan.contents, plan.source, plan.target
        self._bar, self._parallel, self._read_back = bar, parallel, read_back
        self._counting, self._abandoned = threading.Lock(), threading.Event()
        self._shared: set[str] = set()
        """What was copied with an earlier view: constants, weights, the teacher's record."""
        self._done: set[str] = set()

    def run(self) -> None:
        """Copy all of the plan, what seals last."""
        with self._root_lock():
            samples = self._plan.samples()
            there = present(self._target, ["samples"], samples)
            root = samples.pop("zarr.json")
            self._objects(samples, there)
            self._note(ABOUT)
            self._objects({"zarr.json": root}, there)
        with ExitStack() as held:
            if isinstance(self._target, Folder):
                store = Store.open(self._target.path)
                names = [*self._plan.teachers] + [PIXELS] * any(part.ledger == PIXELS for part in self._plan.views)
                for name in names:
                    held.enter_context(store.lock(name))
                self._plan.decide()  # until now others may have written there
            self._views()
            for name in self._plan.shares:
                self._note(f"teachers/{name}/{ABOUT}")
                if isinstance(self._target, Folder):
                    self._teacher(name, self._plan.teachers[name])
                else:
                    self._teacher_among_others(name)
        self._index()

    def _views(self) -> None:
        """Ledgers that are no teacher's, each once."""
        for part in self._plan.views:
            if part.ledger not in self._done:
                with self._view_lock(part):
                    self._ledger(part)
                self._done.add(part.ledger)

    def _root_lock(self) -> AbstractContextManager[object]:
        if not isinstance(self._target, Folder):
            return nullcontext()
        self._target.path.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self._target.path / ROOT_LOCK)

    def _view_lock(self, part: Part) -> AbstractContextManager[object]:
        """Of the geometry of a view, which an extraction of another teacher may be writing."""
        folder, _, view = part.ledger.partition("/")
        if not isinstance(self._target, Folder) or folder != "views":
            return nullcontext()
        (self._target.path / folder).mkdir(exist_ok=True)
        return filelock.FileLock(self._target.path / folder / f".{view}.lock")

    def _teacher(self, name: str, merged: Merged) -> None:
        """A teacher in a folder, whose lease is held."""
        key, note = f"teachers/{name}/{HELD}", note_of(merged.taps)
        # A copy never says that it has more than it has.
        if not merged.begun:
            self._target.replace(key, lambda _: note, RECORD_BYTES)
        for part in merged.parts:
            self._ledger(part)
        if merged.begun:
            self._target.replace(key, lambda _: note, RECORD_BYTES)

    def _teacher_among_others(self, name: str) -> None:
        """A teacher in a bucket, to which others may push at the same time."""
        note = HeldNote(self._target, name, frozenset(self._contents.teachers[name].taps), self._plan.shares[name].taps)
        for _ in range(ROUNDS):
            with suppress(Changed):
                self._plan.decide(name)
                self._views()
                merged = self._plan.teachers[name]
                if not merged.begun:
                    note.begin(merged.taps)
                for part in merged.parts:
                    self._ledger(part, note)
                note.end(merged.taps, [part.view for part in merged.parts])
                return
        raise StoreLocked(
            f"{self._target.url}: others change what it has of teacher {name!r} all the time; run the same command again "
            "when they are done"
        )

    def _ledger(self, part: Part, note: HeldNote | None = None) -> None:
        manifest = self._contents.manifest(part.ledger)
        objects = self._contents.objects(part.ledger, manifest, part.taps)
        wanted, records = (
            {key: entry for key, entry in of.items() if key not in self._shared}
            for of in (objects, self._plan.records(part, manifest))
        )
        there = present(self._target, part.folders, wanted | records)
        self._objects(wanted, there, part)
        self._shared |= {key for key in wanted | records if not key.startswith(f"{part.ledger}/")}
        seal = {part.manifest: records.pop(part.manifest)}
        self._objects(records, there, part)
        receipts = self._contents.receipts(part.ledger, manifest)
        # Read once more, where they are read fastest.
        place = self._target if isinstance(self._target, Folder) else self._source
        found = []
        for key, entry in receipts.items():
            where = f"{self._source.url}/{key}"
            found.append(Receipt.parse(bounded_json(where, read_listed(place, key, entry)), where))
        if faults := seal_faults(manifest, total_of(part.ledger, found)):
            raise StoreCorrupt(
                f"{self._source.url}/{part.manifest}: {faults[0]}; run 'hdcache verify' where the store was made"
            )
        if note is not None:
            note.check(part.taps)
        if isinstance(self._target, Folder):
            check_held(self._target.path)
        self._objects(seal, there, part)

    def _objects(
        self, objects: Mapping[str, StoredObject], there: Mapping[str, Found], part: Part | None = None
    ) -> None:
        """Copy objects, several at a time; the first that fails stops all."""
        with ThreadPoolExecutor(min(self._parallel, max(1, len(objects))), "hdcache-copy") as pool:
            waiting = [
                pool.submit(self._object, key, entry, there.get(key), part) for key, entry in sorted(objects.items())
            ]
            try:
                for done in as_completed(waiting):
                    done.result()
            except BaseException:
                self._abandoned.set()
                for other in waiting:
                    other.cancel()
                raise

    def _object(self, key: str, listed: StoredObject, there: Found | None, part: Part | None) -> None:
        self._go_on()
        if there is None:
            self._target.write(key, listed, lambda: self._counted(key, listed), read_back=self._read_back)
            return
        trusted = part is not None and part.trusted(key) and there.size == listed.size
        if not trusted and not self._target.proves(key, listed, there, lambda: self._md5(key, listed)):
            raise self._target.occupied(key)
        with self._counting:
            self._bar.skip(listed.size)

    def _counted(self, key: str, listed: StoredObject) -> Iterator[bytes]:
        for part in self._source.parts(key, listed):
            self._go_on()
            with self._counting:
                self._bar.advance(len(part))
            yield part

    def _md5(self, key: str, listed: StoredObject) -> str:
        hasher = hashlib.md5(usedforsecurity=False)
        for part in self._source.parts(key, listed):
            hasher.update(part)
        return hasher.hexdigest()

    def _go_on(self) -> None:
        if stopping.requested():
            raise stopping.stop("what has arrived kept")
        if self._abandoned.is_set():
            raise Interrupted("another object could not be copied")

    def _note(self, key: str) -> None:
        """Where things came from: no seal covers it, and one that is there stays."""
        data = self._source.read(key, _ABOUT_BYTES, optional=True)
        if data is None or self._target.size(key) is not None:
            return
        with suppress(StoreCorrupt, StoreMismatch):
            About.parse(bounded_json(key, data), key)
            self._target.write(key, stored_object(data), lambda: iter((data,)))

    def _index(self) -> None:
        """Let the copy say what it has, as its last word."""
        if isinstance(self._target, Folder):
            write_index(Store.open(self._target.path))
            return
        index = self._contents.index
        new = {key: index[key] for key in self._plan.samples() if key in index}
        for part in self._plan.parts:
            new |= self._plan.records(part)
        self._target.replace(INDEX, lambda old: self._merged_index(old, new), RECORD_BYTES)

    def _merged_index(self, old: bytes | None, new: dict[str, StoredObject]) -> bytes:
        try:
            known = None if old is None else read_index(self._target)
        except StoreCorrupt:
            known = None
        # It is derived: where it is lost, or was never written, the listing says what is sealed.
        before = listed_index(self._target) if known is None else known
        merged = {key: entry for key, entry in {**before, **new}.items() if key != CROISSANT}
        if described := self._described(merged):
            merged[CROISSANT] = stored_object(described)
        self._target.replace(CROISSANT, lambda _: described, RECORD_BYTES)
        return Index(objects=dict(sorted(merged.items()))).checked()

    def _described(self, merged: Mapping[str, StoredObject]) -> bytes | None:
        """``croissant.json`` where the copy is all of this store; of another copy, this store does not know what to say."""
        if not isinstance(self._source, Folder) or any(
            merged.taps is not None for merged in self._plan.teachers.values()
        ):
            return None
        seals = {key for key in merged if ledger_of(key) is not None}
        own = {key for key in self._contents.index if ledger_of(key) is not None}
        return croissant_json(Store.open(self._source.path)) if seals == own else None


def format_copied(copied: Copied, *, dry_run: bool) -> str:
    """What was copied, or would be, as text."""
    there = copied.whole.objects - copied.moved.objects
    lines = [
        f"{'would copy' if dry_run else 'copied'} {counted(copied.moved.objects, 'objects')}, {size(copied.moved.bytes)}; "
        f"{counted(there, 'objects')} there already, {size(copied.whole.bytes - copied.moved.bytes)}"
    ]
    for name, taps in copied.teachers.items():
        lines.append(f"  teacher {name}, views {', '.join(map(str, copied.views[name]))}")
        lines += [
            f"    {tap:<24} {counted(amount.objects, 'objects'):>14}  {size(amount.bytes):>9}"
            for tap, amount in taps.items()
        ]
    if copied.pixels.objects:
        lines.append(f"  samples  {counted(copied.pixels.objects, 'objects')}, {size(copied.pixels.bytes)}")
    return "\n".join(lines + [f"  left behind, not complete: {key}" for key in copied.unsealed])
