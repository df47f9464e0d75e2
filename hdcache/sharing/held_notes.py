"""``held.json`` at a target that gives no lease: several may push taps of one teacher to a bucket at once.

The note may never say more than is there, and what one pusher has said no other takes back. Who comes first has a note written
before anything is sealed, that of the taps which all of them bring. Who is done adds its own taps, by compare and swap. As others
may seal a view or change the note at any moment, both are looked at before a seal and once more after it: what was
changed meanwhile is seen by one of the two, which then copies what is missing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from hdcache.array_metadata import RECORD_BYTES
from hdcache.index import HELD, Held, is_held
from hdcache.ledgers import MANIFEST
from hdcache.schema import Manifest, StoredObject
from hdcache.sharing.objects import Found, Place
from hdcache.sharing.selection import bounded_json, read_held
from hdcache.store import is_view

Taps = frozenset[str] | None
"""Of one teacher; None: all."""


class Changed(Exception):
    """Others have changed what the target has of a teacher: it is to be looked at again."""


def sealed_views(target: Place, teacher: str) -> list[int]:
    """Views of a teacher that are sealed at a target, ascending."""
    folder = f"teachers/{teacher}/views"
    found = sorted(int(view) for view in target.names(folder) if is_view(view))
    return [view for view in found if target.size(f"{folder}/{view}/{MANIFEST}") is not None]


def note_of(taps: Taps) -> bytes | None:
    """What ``held.json`` says of a copy with these taps; None where there is to be none."""
    return None if taps is None else Held(taps=tuple(sorted(taps))).canonical()


def covers(whole: Taps, part: Taps) -> bool:
    """Whether ``whole`` has every tap of ``part``."""
    return whole is None or (part is not None and part <= whole)


class HeldNote:
    """The note of one teacher at a target, to which others push too."""

    def __init__(self, target: Place, teacher: str, every: frozenset[str], own: Taps) -> None:
        self._target, self._teacher, self._every, self._own = target, teacher, every, own
        self._key = f"teachers/{teacher}/{HELD}"

    def begin(self, taps: Taps) -> None:
        """Before the first seal: the note says no more than what is to be sealed, and no more than what others will seal.

        Raises
        ------
        Changed
            when somebody has sealed a view.
        """

        def change(old: bytes | None) -> bytes | None:
            if sealed_views(self._target, self._teacher):
                raise Changed
            known = self._read(old)
            if taps is None or known is None:
                return note_of(known if taps is None else taps)
            return note_of(known & taps)

        def restore(old: bytes | None) -> bytes | None:
            sealed, known = sealed_views(self._target, self._teacher), self._read(old)
            if known is None:
                return old
            return note_of(self._whole(known | self._proven(sealed, self._complete(sealed) - known)))

        self._target.replace(self._key, change, RECORD_BYTES)
        if sealed_views(self._target, self._teacher):
            # Somebody may have been done after the look and before the note, which then says too little.
            self._target.replace(self._key, restore, RECORD_BYTES)
            raise Changed

    def check(self, taps: Taps) -> None:
        """Before a seal: :class:`Changed` when the note says more than the ``taps`` that were copied."""
        if not covers(taps, self._whole(read_held(self._target, self._teacher))):
            raise Changed

    def end(self, taps: Taps, views: Collection[int]) -> None:
        """Add this pusher's taps, when ``taps`` of all ``views`` have been copied and sealed.

        Raises
        ------
        Changed
            when others have added taps or views that are not copied yet.
        """

        def change(old: bytes | None) -> bytes | None:
            sealed = sealed_views(self._target, self._teacher)
            known = self._read(old)
            goal = None if known is None or self._own is None else self._whole(known | self._own)
            if not covers(taps, goal):
                raise Changed
            others = [view for view in sealed if view not in views]
            if others and not covers(known, self._own) and not covers(self._complete(others), self._own):
                raise Changed
            return note_of(goal)

        self._target.replace(self._key, change, RECORD_BYTES)

    def _read(self, note: bytes | None) -> Taps:
        where = f"{self._target.url}/{self._key}"
        return None if note is None else self._whole(frozenset(Held.parse(bounded_json(where, note), where).taps))

    def _whole(self, taps: Taps) -> Taps:
        return None if taps is None or taps >= self._every else taps

    def _complete(self, views: Iterable[int]) -> frozenset[str]:
        """Taps of which every object of these views is there, by its size."""
        lacking = set()
        for tap, _, listed, found in self._objects(views):
            if found is None or found.size != listed.size:
                lacking.add(tap)
        return self._every - lacking

    def _proven(self, views: Iterable[int], taps: frozenset[str]) -> frozenset[str]:
        """Those of ``taps`` whose objects are read back as what the seals list."""
        bad: set[str] = set()
        for tap, key, listed, found in self._objects(views) if taps else ():
            if (
                tap in taps - bad
                and found is not None
                and not self._target.proves(key, listed, found, str)  # their md5 is not known
            ):
                bad.add(tap)
        return taps - bad

    def _objects(self, views: Iterable[int]) -> Iterable[tuple[str, str, StoredObject, Found | None]]:
        """Tap, key, what the seal lists and what is there, of all objects that belong to a tap."""
        folder = f"teachers/{self._teacher}"
        there = self._target.listing(f"{folder}/encodings")
        for view in views:
            key = f"{folder}/views/{view}/{MANIFEST}"
            where = f"{self._target.url}/{key}"
            seal = Manifest.parse(bounded_json(where, self._target.read(key, RECORD_BYTES) or b""), where)
            there |= self._target.listing(f"{folder}/views/{view}")
            for name, listed in seal.objects.items():
                if not is_held(name, self._teacher, frozenset()):
                    parts = name.split("/")
                    yield parts[4] if parts[2] == "views" else parts[3], name, listed, there.get(name)
