"""``held.json``: which taps a copy of a store has of a teacher. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import FailFast

from hdcache.array_metadata import contained, read_json
from hdcache.records import Record
from hdcache.store import Store

HELD = "held.json"


class Held(Record):
    """Which taps of a teacher this copy of a store has; written beside the teacher's record by a partial copy alone."""

    taps: Annotated[tuple[str, ...], FailFast()]


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
