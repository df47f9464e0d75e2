"""What a copy of a store will be: what is wanted of the source together with what the target has already."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hdcache.array_metadata import RECORD_BYTES
from hdcache.durable import stored_object
from hdcache.errors import InputNotFound, OutOfSpace, StoreCorrupt, StoreMismatch
from hdcache.index import CROISSANT, RECORDS, is_held
from hdcache.ledgers import MANIFEST, RECEIPTS
from hdcache.progress import size
from hdcache.records import differences
from hdcache.schema import Manifest, StoreCard, StoredObject
from hdcache.sharing.folder import Folder
from hdcache.sharing.held_notes import sealed_views
from hdcache.sharing.objects import Found, Place
from hdcache.sharing.selection import Contents, Share, Wanted, bounded_json, read_card, read_held
from hdcache.store import ABOUT, PIXELS

SHARED = "constants and weights"
"""What a teacher's taps have together."""
_OF_A_STORE = {"samples", "views", "teachers", "zarr.json", ABOUT}


@dataclass
class Amount:
    """Objects and their bytes."""

    objects: int = 0
    bytes: int = 0

    def add(self, sizes: Iterable[int]) -> None:
        for count in sizes:
            self.objects, self.bytes = self.objects + 1, self.bytes + count


@dataclass
class Copied:
    """What a copy is, and what of it was moved."""

    whole: Amount = field(default_factory=Amount)
    moved: Amount = field(default_factory=Amount)
    """What was not there yet."""
    teachers: dict[str, dict[str, Amount]] = field(default_factory=dict)
    """Of each teacher what its taps, its mask and the rest (constants, weights) are."""
    views: dict[str, list[int]] = field(default_factory=dict)
    """Of each teacher the views."""
    pixels: Amount = field(default_factory=Amount)
    unsealed: list[str] = field(default_factory=list)
    """What was left behind since it is not complete."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Part:
    """One ledger of the copy."""

    ledger: str
    teacher: str = ""
    taps: frozenset[str] | None = None
    """What the copy will have of the teacher's taps; None: all."""
    sealed: bool = False
    """Whether the target has it, complete but for taps that it did not hold."""
    held: frozenset[str] | None = None
    """Taps that the target has of it, where it is sealed there."""

    @property
    def manifest(self) -> str:
        return f"{self.ledger}/{MANIFEST}"

    @property
    def view(self) -> int:
        """The number of the view whose rows or geometry it has."""
        return int(self.ledger.rpartition("/")[2])

    @property
    def folders(self) -> list[str]:
        """Where its objects lie."""
        own = [f"teachers/{self.teacher}/encodings", f"teachers/{self.teacher}/weights"] if self.teacher else []
        return [self.ledger, *own]

    def trusted(self, key: str) -> bool:
        """Whether an object was proven when the target's ledger was sealed."""
        return self.sealed and is_held(key, self.teacher, self.held)


class Merged(NamedTuple):
    """What a teacher will be at the target."""

    taps: frozenset[str] | None
    """None: all."""
    begun: bool
    """Whether the target has sealed views of it."""
    parts: list[Part]


class Plan:
    """What is copied of ``contents`` to a target, given what that has already. Reads both, writes nothing.

    Raises
    ------
    InputNotFound
        when the source lacks what is wanted, or what the copy would then need.
    StoreMismatch
        when the target is another store, or not empty and none.
    StoreCorrupt
        when a record of the source is not what the store lists.
    """

    def __init__(self, contents: Contents, target: Place, wanted: Wanted) -> None:
        self.contents, self.source, self.target = contents, contents.place, target
        self.report = Copied(unsealed=contents.unsealed)
        self._check_root(target.names())
        self._wanted, self.shares = wanted, contents.choose(wanted)
        self.teachers: dict[str, Merged] = {}
        self.views: list[Part] = []
        """Ledgers of views, then that of kept samples."""
        self.decide()

    def decide(self, *names: str) -> None:
        """Look at what the target has of these teachers, or of all; again where others may have written there since."""
        for name in names or self.shares:
            self.teachers[name] = self._merged(name, self.shares[name])
        views = {part.view for merged in self.teachers.values() for part in merged.parts}
        if not self._wanted.teachers and not self._wanted.views:
            views |= {*self.contents.views()}
        self.views = []
        for view in sorted(views):
            if view not in self.contents.views():
                raise StoreCorrupt(
                    f"{self.source.url}: rows of view {view} are sealed, the view itself is not; copy from elsewhere"
                )
            self.views.append(self._ledger(f"views/{view}"))
        if self._wanted.pixels and self.contents.pixels:
            self.views.append(self._ledger(PIXELS))

    def _check_root(self, names: list[str]) -> None:
        if "zarr.json" not in names:
            if strays := sorted({*names} - _OF_A_STORE):
                raise StoreMismatch(f"{self.target.url}: not empty and not a store ({strays[0]}); choose another place")
            return
        data = self.target.read("zarr.json", RECORD_BYTES) or b""
        if stored_object(data) == self.contents.index["zarr.json"]:
            return
        lines = differences(_told(self.contents.card), _told(read_card(self.target, data)))
        raise StoreMismatch(
            f"{self.target.url}: is another store ({'; '.join(lines[:4]) or 'another version of hdcache wrote its record'}); "
            "choose another place"
        )

    def _merged(self, name: str, share: Share) -> Merged:
        """What a teacher will be at the target: what is wanted, and what it has there."""
        folder, key = f"teachers/{name}", f"teachers/{name}/zarr.json"
        data = self.target.read(key, RECORD_BYTES)
        if data is not None and stored_object(data) != self.contents.index[key]:
            raise self._other_teacher(name, data)
        have = sealed_views(self.target, name)
        held = read_held(self.target, name) if have else None
        every, here = frozenset(self.contents.teachers[name].taps), self.contents.held(name)
        taps, views = share.taps, {*share.views}
        if have:
            taps = None if held is None or taps is None or held | taps >= every else held | taps
            views |= {*have} if taps != held else set()
        for view in sorted(views):
            there = frozenset() if view not in have else every if held is None else held
            lacking = (every if taps is None else taps) - there
            sealed = view in self.contents.views(name)
            if lacking and (not sealed or (here is not None and not lacking <= here)):
                what = (
                    f"tap {min(lacking - (here or frozenset()), default='')!r} of view {view}"
                    if sealed
                    else f"view {view}"
                )
                raise InputNotFound(
                    f"{self.source.url}: lacks {what} of teacher {name!r}, which the copy at {self.target.url} then needs; copy "
                    "from where the whole store is"
                )
        keep = [view for view in sorted(views) if view in self.contents.views(name)]
        return Merged(taps, bool(have), [self._ledger(f"{folder}/views/{view}", name, taps, held) for view in keep])

    def _other_teacher(self, name: str, data: bytes) -> StoreMismatch:
        lines = ["its record differs"]
        with suppress(StoreCorrupt, KeyError, TypeError):
            where = f"{self.target.url}/teachers/{name}/zarr.json"
            there = bounded_json(where, data)["attributes"]["hdcache"]
            own = self.contents.teachers[name].identity()
            lines = differences(own, {key: there.get(key) for key in own}) or lines
        return StoreMismatch(
            f"{self.target.url}: teacher {name!r} there is another one ({'; '.join(lines[:4])}); choose another place"
        )

    def _same(self, key: str) -> bool:
        """Whether a record of the target is that of the source."""
        data = self.target.read(key, RECORD_BYTES)
        return data is not None and stored_object(data) == self.contents.index[key]

    def _ledger(
        self, ledger: str, teacher: str = "", taps: frozenset[str] | None = None, held: frozenset[str] | None = None
    ) -> Part:
        key = f"{ledger}/{MANIFEST}"
        there = self.target.size(key) is not None
        if there and not self._same(key):
            raise StoreMismatch(
                f"{self.target.url}/{key}: seals other rows than those of {self.source.url}; choose another place"
            )
        return Part(ledger, teacher, taps, there, held if there else None)

    @property
    def parts(self) -> list[Part]:
        """Every ledger of the copy, in the order in which they are sealed."""
        return [*self.views, *(part for merged in self.teachers.values() for part in merged.parts)]

    def tally(self) -> None:
        """Count what the copy is, and what of it is not there yet."""
        counted: set[str] = set()
        samples = self.samples()
        self._count(samples, present(self.target, ["samples"], samples))
        for part in self.parts:
            manifest = self.contents.manifest(part.ledger)
            objects = self.contents.objects(part.ledger, manifest, part.taps)
            all_of = objects | self.records(part, manifest)
            new = {key: entry for key, entry in all_of.items() if key not in counted}
            counted |= {key for key in new if not key.startswith(f"{part.ledger}/")}
            self._count(new, present(self.target, part.folders, new))
            if part.teacher:
                amounts = self.report.teachers.setdefault(part.teacher, {})
                self.report.views.setdefault(part.teacher, []).append(part.view)
                for key in objects.keys() & new.keys():
                    amounts.setdefault(_tap(key, part.ledger), Amount()).add((new[key].size,))
            elif part.ledger == PIXELS:
                self.report.pixels.add(entry.size for entry in objects.values())
        for name, amounts in self.report.teachers.items():
            self.report.teachers[name] = dict(sorted(amounts.items(), key=lambda item: (item[0] == SHARED, item[0])))

    def _count(self, objects: Mapping[str, StoredObject], present: Mapping[str, Found]) -> None:
        self.report.whole.add(entry.size for entry in objects.values())
        self.report.moved.add(entry.size for key, entry in objects.items() if key not in present)

    def records(self, part: Part, manifest: Manifest | None = None) -> dict[str, StoredObject]:
        """What seals a ledger, and the record of its teacher; its receipts, with ``manifest`` those too that only that lists."""
        own = [f"teachers/{part.teacher}/zarr.json"] if part.teacher else []
        return self.contents.receipts(part.ledger, manifest) | {
            key: self.contents.index[key] for key in (*own, part.manifest)
        }

    def samples(self) -> dict[str, StoredObject]:
        """Sample ids, labels and the records of the root, which itself is to be written after them."""
        index = self.contents.index
        return self.contents.samples | {key: index[key] for key in RECORDS if key in index and key != CROISSANT}

    def check_room(self) -> None:
        """Refuse a copy that will not fit; :class:`OutOfSpace`."""
        if not isinstance(self.target, Folder):
            return
        folder = next(path for path in (self.target.path, *self.target.path.absolute().parents) if path.is_dir())
        if (free := shutil.disk_usage(folder).free) < self.report.moved.bytes:
            raise OutOfSpace(
                f"{self.target.url}: {size(self.report.moved.bytes)} are to be copied, {size(free)} are free; free space, choose "
                "another place, or copy less (--teacher, --tap, --view, --no-pixels)"
            )


def present(target: Place, folders: Iterable[str], keys: Iterable[str]) -> dict[str, Found]:
    """What a target has of ``keys``, most of which lie in ``folders``."""
    found: dict[str, Found] = {}
    for folder in folders:
        found |= target.listing(folder)
    for key in keys:
        if not any(key.startswith(f"{folder}/") for folder in folders) and (there := target.find(key)) is not None:
            found[key] = there
    return found


def _told(card: StoreCard) -> dict[str, Any]:
    """A store's record as it is compared: where its data lay is no difference."""
    return card.model_copy(update={"dataset": card.dataset.model_copy(update={"spec": ""})}).whole()


def _tap(key: str, ledger: str) -> str:
    """To which tap an object of a teacher belongs; :data:`SHARED` for what all of them share."""
    inner = key.removeprefix(f"{ledger}/").split("/") if key.startswith(f"{ledger}/") else []
    return inner[0] if len(inner) > 2 and inner[0] != RECEIPTS else SHARED
