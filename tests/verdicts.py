"""What becomes of a damaged store: whether anything was read that was not there, and whether errors name what is damaged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from damage import Injection, is_smaller
from hdcache.errors import HdcacheError
from hdcache.integrity import verify
from hdcache.store import Store
from whole_reading import Outcome

LISTING = {"teachers", "info", "samples", "loader"}
"""Ways of reading that say what a store has."""
EVERYWHERE = re.compile(r"\.|teachers(?:/[^/]+)?|views|samples")
"""Folders that many messages name, whatever is damaged."""


@dataclass(frozen=True)
class Verdict:
    """What became of one injection."""

    reading: str
    """As :func:`reading_of` says it."""
    quick: bool
    """Whether ``verify --quick`` named it: as a fault, or as not sealed yet."""
    full: bool
    bugs: tuple[str, ...] = ()
    """Errors of another class than ours, and messages that do not name what is damaged."""


def judge(
    injection: Injection, root: Path, objects: Mapping[str, bytes], truth: Mapping[str, Outcome], found: Mapping[str, Outcome]
) -> Verdict:  # fmt: skip
    """Compare what was read of a damaged store with the truth, and verify the store as it lies there."""
    reading = reading_of(injection, objects, truth, found)
    bugs = bugs_of(injection, root, found, reading)
    full, quick = (_verified(injection, root, bugs, quick=quick) for quick in (False, True))
    return Verdict(reading, quick, full, tuple(bugs))


def reading_of(
    injection: Injection, objects: Mapping[str, bytes], truth: Mapping[str, Outcome], found: Mapping[str, Outcome]
) -> str:
    """What became of reading.

    ``open`` or ``read``: that refused it; ``same``: what was read is what was there; ``fewer``: less is there, and nothing that is left can
    tell (:func:`is_smaller`); ``wrong``: what was read is not what was there, less of it included, and nobody said so.
    """
    if wrong := wrong_ways(truth, found):
        return "fewer" if set(wrong) <= LISTING and is_smaller(injection, objects) else "wrong"
    if isinstance(found["open"], Exception):
        return "open"
    return "read" if any(isinstance(outcome, Exception) for outcome in found.values()) else "same"


def bugs_of(injection: Injection, root: Path, found: Mapping[str, Outcome], reading: str = "") -> list[str]:
    """As :attr:`Verdict.bugs`, of reading. Of what nothing is left that tells of it, an error is only to say that it is not there."""
    errors = [(name, outcome) for name, outcome in found.items() if isinstance(outcome, Exception)]
    if reading == "fewer":
        errors = [(name, error) for name, error in errors if not isinstance(error, HdcacheError)]
    return [fault for name, error in errors for fault in _faults(injection, root, name, error)]


def wrong_ways(truth: Mapping[str, Outcome], found: Mapping[str, Outcome]) -> list[str]:
    """Ways of reading that gave something else than was there, without an error."""
    return [name for name, outcome in found.items() if isinstance(outcome, str) and outcome != truth.get(name)]


def _faults(injection: Injection, root: Path, name: str, error: Exception) -> list[str]:
    if not isinstance(error, HdcacheError):
        return [f"{name}: {type(error).__name__}: {error}"]
    return [] if names(injection, root, str(error)) else [f"{name}: does not name it: {error}"]


def names(injection: Injection, root: Path, message: str) -> bool:
    """Whether a message names what is damaged, or its folder, unless that is one that is named whatever is damaged."""
    folders = {str(PurePosixPath(key).parent) for key in injection.change}
    named = {*injection.change, *injection.folders, *(name for name in folders if not EVERYWHERE.fullmatch(name))}
    any_of = "|".join(map(re.escape, named))
    return re.search(rf"(?:{re.escape(str(root))}/|(?<![\w./-]))(?:{any_of})(?!\w|[./-]\w)", message) is not None


def _verified(injection: Injection, root: Path, bugs: list[str], *, quick: bool) -> bool:
    name = "verify --quick" if quick else "verify"
    try:
        found = verify(Store.open(root), quick=quick)
    except Exception as error:
        bugs += _faults(injection, root, name, error)
        return True
    if found.faults and not any(names(injection, root, fault) for fault in found.faults):
        bugs.append(f"{name}: does not name it: {found.faults[0]}")
    begun = any(f"{changed}/".startswith(f"{key}/") for key in found.unsealed for changed in injection.change)
    return bool(found.faults) or begun
