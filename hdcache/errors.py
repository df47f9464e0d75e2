"""The few ways a data set, store, recipe or checkpoint can be wrong, each with its exit code.

A message says what was asked, where, what was expected and found, and ends with what to do about it.
The command line prints it as one line and leaves with ``exit_code``; Python users catch the class.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class HdcacheError(Exception):
    """Base of every error that hdcache raises on purpose."""

    exit_code = 1


class UsageError(HdcacheError, ValueError):
    """A setting, spec or recipe that cannot be meant (exit 2)."""

    exit_code = 2


class InputNotFound(HdcacheError, FileNotFoundError):
    """A data set, checkpoint or store that is not there or cannot be read (exit 3)."""

    exit_code = 3


class Unreachable(HdcacheError):
    """A place of objects that does not answer, refuses, or answers with something else (exit 3)."""

    exit_code = 3


class UnreadableImage(HdcacheError):
    """One sample that could not be decoded; extraction records it as a failed row and goes on."""

    exit_code = 3


class TooManyFailures(HdcacheError):
    """More failed rows than ``max_failures`` allows (exit 4)."""

    exit_code = 4


class WorkersFailed(HdcacheError):
    """Workers that are not there, lack what is asked of them, or die of a shard (exit 4)."""

    exit_code = 4


class StoreMismatch(HdcacheError):
    """The store was made with other settings than were asked for (exit 5)."""

    exit_code = 5


class StoreLocked(HdcacheError):
    """Another live process is writing what this one wants to write (exit 5)."""

    exit_code = 5


class StoreCorrupt(HdcacheError):
    """An object of the store is missing, short, altered or malformed (exit 5)."""

    exit_code = 5


class StoreUnreadable(StoreCorrupt):
    """An object of the store that is there, and that the system cannot read now: it is not to be taken for lost (exit 5)."""


class OutOfSpace(HdcacheError, OSError):
    """The disk or quota is full; what was finished is safe (exit 6)."""

    exit_code = 6


class Interrupted(HdcacheError):
    """Stopped by SIGTERM or SIGUSR1 with progress saved (exit 75, EX_TEMPFAIL)."""

    exit_code = 75


def printable(text: str) -> str:
    """``text`` for a terminal: names and reasons of a store are others', and may hold escapes that change what is seen."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest valid name, or the list of them all."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(names)}"


def next_to(number: int, fits: Callable[[int], bool], most: int) -> str:
    """``48 or 52`` for 50: the nearest numbers below and above that fit, from 1 to ``most``."""
    below = next((n for n in range(min(number, most + 1) - 1, 0, -1) if fits(n)), None)
    above = next((n for n in range(max(number, 0) + 1, most + 1) if fits(n)), None)
    return " or ".join(str(n) for n in (below, above) if n is not None)
