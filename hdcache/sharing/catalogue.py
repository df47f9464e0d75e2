"""Which stores lie below a folder, and what each of them is: ``hdcache catalog``. No torch here.

Everything in an entry comes from records of a store, which anybody may have written. A record that cannot be read is
the entry's ``fault`` and stops nothing. Links are not followed, so that no walk leaves its folder or goes in circles.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hdcache.errors import HdcacheError, InputNotFound
from hdcache.index import held_taps, is_held, sealed_ledgers
from hdcache.info import MADE_BY, describe_pixels, describe_teacher, views_text
from hdcache.masks import mask_text
from hdcache.sharing.catalogue_entries import CatalogueRecord, StoreEntry, TapEntry, TeacherEntry
from hdcache.store import Store

DEPTH = 6
"""Folders below the root in which stores are looked for."""
CATALOGUE_FILE = "catalog.json"
"""What a server names its catalogue; beside stores on a plain web server, the output of ``hdcache catalog --json``."""
RECORDS = (
    "*.json",
    "samples/pixels/manifest.json",
    "views/*/manifest.json",
    "teachers/*/*.json",
    "teachers/*/views/*",
    "teachers/*/views/*/manifest.json",
)
"""Below a store, what its entry is made of."""


class Catalogue:
    """The stores below a folder. Each is described again only when one of its records has changed."""

    def __init__(self, root: str | Path) -> None:
        """:class:`InputNotFound` when ``root`` is no folder."""
        self.root = Path(root).expanduser().absolute()
        if not self.root.is_dir():
            raise InputNotFound(f"{self.root}: no such folder; name one that holds stores, or a store")
        self._real = os.path.realpath(self.root)
        self._stores: dict[str, tuple[int, int]] = {}
        self._known: dict[str, tuple[tuple[Any, ...], StoreEntry]] = {}

    def entries(self) -> list[StoreEntry]:
        """All stores, in the order of their paths."""
        found = [
            StoreEntry(path=path, fault=fault) if fault else self._described(path)
            for path, fault in find_stores(self.root)
        ]
        there = {entry.path for entry in found}
        for path in list(self._known):  # others may look something up meanwhile
            if path not in there:
                self._known.pop(path, None)
        return found

    def entry(self, path: str) -> StoreEntry | None:
        """The store at a path that anybody may have asked for; None where there is none."""
        return self._described(path) if self.holds(path) else None

    def holds(self, path: str) -> bool:
        """Whether there is a store at ``path``, reached without a link or a hidden folder."""
        parts = [] if path == "." else path.split("/")
        if len(parts) > DEPTH or any(not part or part.startswith(".") or not part.isprintable() for part in parts):
            return False
        folder = self._real
        for part in parts:
            if os.path.lexists(f"{folder}/zarr.json"):
                return False  # what lies inside of a store is none
            folder = os.path.join(folder, part)
        if os.path.realpath(folder) != folder:
            return False
        try:
            facts = os.lstat(f"{folder}/zarr.json")
        except OSError:
            return False
        stamp = (facts.st_mtime_ns, facts.st_size)
        if self._stores.get(folder) != stamp:
            if _foreign(folder):
                return False
            self._stores[folder] = stamp
        return True

    def stamp(self, path: str) -> tuple[Any, ...]:
        """Changes whenever a record of the store at ``path`` does."""
        return _stamp(self.root / path)

    def _described(self, path: str) -> StoreEntry:
        stamp = self.stamp(path)
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            known = self._known[path] = stamp, describe(self.root, path)
        return known[1]

    def record(self) -> CatalogueRecord:
        """The whole as it is served."""
        return CatalogueRecord(stores=tuple(self.entries()))


def find_stores(root: Path, depth: int = DEPTH) -> Iterator[tuple[str, str]]:
    """Path relative to ``root`` of every store in or below it, ascending, and why a folder cannot be read, else ``""``.

    A folder with a ``zarr.json`` is not descended into; one whose root record is missing, but which has samples, is a
    store whose creation was cut short.
    """
    yield from _walk(root, "", depth)


def _walk(root: Path, below: str, depth: int) -> Iterator[tuple[str, str]]:
    here = root / below
    try:
        with os.scandir(here) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        yield below or ".", f"cannot be read ({error.strerror})"
        return
    if any(entry.name == "zarr.json" for entry in entries):
        if not _foreign(here):
            yield below or ".", ""
        return
    if "samples" in folders and (here / "samples" / "receipt.json").is_file():
        yield below or ".", "its creation was cut short; run the same 'hdcache extract' command again"
        return
    for name in folders if depth else ():
        if not name.startswith("."):
            yield from _walk(root, f"{below}/{name}" if below else name, depth - 1)


def _foreign(folder: str | Path) -> bool:
    """Whether a folder with a ``zarr.json`` is a Zarr group or array of somebody else."""
    try:
        Store.open(folder)
    except InputNotFound:
        return True
    except HdcacheError:
        return False
    return False


def _stamp(folder: Path) -> tuple[Any, ...]:
    """Changes whenever a record of a store does, or a view is begun: names, times and sizes."""
    found = [(path, path.lstat()) for pattern in RECORDS for path in folder.glob(pattern)]
    return tuple(sorted((str(path), facts.st_mtime_ns, facts.st_size) for path, facts in found))


def describe(root: Path, path: str) -> StoreEntry:
    """The entry of the store at ``root/path``; what cannot be read of it is a fault, with paths relative to ``root``."""

    def reason(error: Exception) -> str:
        return str(error.args[-1] if error.args else error).replace(f"{root}{os.sep}", "")

    try:
        store = Store.open(root / path)
        dataset = store.card.dataset
        pixels = describe_pixels(store)
        teachers = []
        for name in store.teachers():
            try:
                teachers.append(_teacher(name, describe_teacher(store, name)))
            except (HdcacheError, OSError, ValueError) as error:
                teachers.append(TeacherEntry(name=name, fault=reason(error)))
        return StoreEntry(
            path=path,
            id=store.id,
            format=store.card.format,
            kind=dataset.kind,
            noun=dataset.noun,
            samples=dataset.count,
            classes=len(dataset.classes),
            data=store.about.data,
            views=views_text(store.card.views.model_dump(mode="json")),
            shorter_side=dataset.shorter_side,
            pixels=pixels["bytes"] if pixels else None,
            written_with={name: value for name, value in store.about.written_with.items() if name != MADE_BY},
            made_by=store.about.written_with.get(MADE_BY, ""),
            sealed=bool(teachers) and all(one.views and not one.unsealed and not one.fault for one in teachers),
            bytes=_sealed_bytes(store),
            teachers=tuple(teachers),
        )
    except (HdcacheError, OSError, ValueError) as error:
        return StoreEntry(path=path, fault=reason(error))


def _teacher(name: str, facts: Mapping[str, Any]) -> TeacherEntry:
    card, views = facts["card"], facts["sealed_views"]
    return TeacherEntry(
        name=name,
        id=facts["identity"][:16],
        architecture=card["architecture"],
        size=card["preprocessing"]["size"],
        frames=card["preprocessing"].get("frames"),
        **{name: card[name] for name in ("grid", "patch_size", "width", "depth", "heads", "precision")},
        slots=card.get("slots", 1),
        mask=mask_text(facts["mask"]) if facts["mask"] else "",
        licence=facts["licence"],
        source=facts["source"],
        views=tuple(int(view) for view in views),
        unsealed=tuple(facts["unsealed_views"]),
        failed=sum(seal["failed"] for seal in views.values()),
        bytes=facts["bytes"],
        held=None if facts["held"] is None else tuple(facts["held"]),
        elsewhere=tuple(facts["elsewhere"]),
        taps=tuple(
            TapEntry(tap=tap, **{name: value for name, value in entry.items() if name in TapEntry.model_fields})
            for tap, entry in facts["taps"].items()
        ),
    )


def _sealed_bytes(store: Store) -> int:
    """Bytes of every object that a seal lists and this copy has, each counted once."""
    objects: dict[str, int] = {}
    for ledger in sealed_ledgers(store):
        manifest = ledger.manifest()
        held = held_taps(store, manifest.teacher) if manifest.teacher else None
        objects |= {key: entry.size for key, entry in manifest.objects.items() if is_held(key, manifest.teacher, held)}
    return sum(objects.values())
