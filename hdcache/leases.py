"""Who writes: one process at a time, whichever machine it is on; a dead one's right is taken over.

The right itself is a lock of the system (``.NAME.lock``), which is free as soon as its process is gone, however it went. Not
every shared file system knows the locks of other machines. So the owner also leaves a note (``.NAME.owner``) that says who it
is and that it touches every :data:`BEAT` seconds: while the note of another machine is fresh, its owner counts as alive.

An owner may have been suspended (a stopped process, a paused machine, a file system that hangs) for so long that another has
taken over. So it asks :func:`check_held` before it writes what counts.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Self

import filelock

from hdcache.durable import PARTIAL
from hdcache.errors import StoreCorrupt, StoreLocked

BEAT = 15.0
"""Seconds between two signs of life."""
STALE = 60.0
"""Seconds without one after which an owner on another machine counts as dead."""
PATIENCE = 0.5
"""Seconds that the note of an owner who has just begun is waited for."""
_NOTE_LIMIT = 4096


@dataclass(frozen=True)
class Owner:
    """Who holds a lease."""

    user: str
    host: str
    process: int
    since: str
    """UTC, ISO 8601, to the second."""
    machine: str = ""
    """What tells machines and containers of one name apart; empty where that is unknown, as in notes of earlier versions."""

    @classmethod
    def here(cls) -> Self:
        """This process, now."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError, ImportError):  # a container's user without a name
            user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(user, platform.node(), os.getpid(), since, _machine())

    @classmethod
    def read(cls, note: Path) -> Self | None:
        """Whom a note names; None where there is none, or one that nobody can read."""
        try:
            # Not blocking, no links: what pretends to be a note may be a pipe that nobody writes to.
            number = os.open(note, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            with open(number, "rb") as file:
                found = json.loads(file.read(_NOTE_LIMIT) or b"")
            fields = found["user"], found["host"], found["process"], found["since"], found.get("machine", "")
        except (OSError, ValueError, TypeError, KeyError):
            return None
        user, host, process, since, machine = fields
        number = process if isinstance(process, int) else 0
        return cls(str(user)[:80], str(host)[:255], number, str(since)[:40], str(machine)[:120])

    def is_on_machine_of(self, other: Owner) -> bool:
        """Whether both see each other's locks and processes."""
        known = bool(self.machine and other.machine)
        return self.host == other.host and (not known or self.machine == other.machine)

    def __str__(self) -> str:
        return f"{self.user}, process {self.process} on {self.host}, since {self.since}"


@cache
def _machine() -> str:
    """This start of the system, and where processes are counted: both may differ under one host name."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""  # not Linux
    with suppress(OSError):
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    return started


class _Lease:
    """A right of this process, until another process takes it over."""

    def __init__(self, lock: Path, me: Owner) -> None:
        self.lock, self.note, self.me = lock, lock.with_suffix(".owner"), me
        self._turn, self._lost = threading.Lock(), ""
        self._seen = _clocks(lock)
        self._noted = False
        """Whether the note could be written."""
        self._leave_note()

    def beat(self, ended: threading.Event) -> None:
        """Give signs of life until ``ended``."""
        while not ended.wait(BEAT):
            with self._turn:
                if self._is_own():
                    self._touch()

    def check(self) -> None:
        with self._turn:
            if not self._is_own():
                raise StoreLocked(
                    f"{self.lock.parent} was taken over by {self._lost} while this process was suspended; run the same command "
                    "again"
                )

    def _is_own(self) -> bool:
        if self._lost:
            return False
        stale = any(now - last > STALE for now, last in zip(_clocks(self.lock), self._seen, strict=True))
        found = Owner.read(self.note)
        if stale and found == self.me:
            # Who found it stale just now may be about to write another.
            self._touch()
            time.sleep(PATIENCE)
            found = Owner.read(self.note)
        if found is None and not (stale and self._noted):
            # Nobody may take over so soon: a person removed it, or it cannot be read now.
            if not os.path.lexists(self.note):
                self._leave_note()
        elif found != self.me:
            self._lost = str(found or "another process")
        return not self._lost

    def _touch(self) -> None:
        with suppress(OSError):
            os.utime(self.note)
            self._seen = _clocks(self.lock)

    def _leave_note(self) -> None:
        # The note is for people and for other machines; a full disk or a read-only mount is the work's to report.
        with suppress(OSError):
            _write(self.note, self.me)
            self._noted = True


_held: dict[str, list[_Lease]] = {}
"""The leases of this process, by the folder that their lock is in."""


def check_held(folder: Path) -> None:
    """Ask, before something is written that counts, whether all leases in ``folder`` are still this process's.

    Who holds none there, a worker for instance, is not asked.

    Raises
    ------
    StoreLocked
        when another process has taken one over while this one was suspended.
    """
    for one in tuple(_held.get(os.path.realpath(folder), ())):
        if one.me.process == os.getpid():  # and not that of the process that this one was forked from
            one.check()


@contextmanager
def lease(path: Path) -> Iterator[None]:
    """Hold the lease whose lock is at ``path`` (``.NAME.lock``).

    Raises
    ------
    StoreLocked
        when a living process has it: who, where, since when, and what to do.
    StoreCorrupt
        when a link lies where the lock should, which would have another file written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, note = filelock.FileLock(path, timeout=0), path.with_suffix(".owner")
    try:
        lock.acquire()
    except filelock.Timeout:
        raise _refusal(path, _awaited(note)) from None
    except OSError:
        if not path.is_symlink():
            raise
        raise StoreCorrupt(f"{path}: a link in place of a lock; remove it") from None
    try:
        me, ended = Owner.here(), threading.Event()
        refuse_elsewhere(path, me)
        own = _Lease(path, me)
        beating = threading.Thread(target=own.beat, args=(ended,), name="lease", daemon=True)
        beating.start()
        others = _held.setdefault(os.path.realpath(path.parent), [])
        others.append(own)
        try:
            yield
        finally:
            others.remove(own)
            ended.set()
            beating.join()
            with suppress(OSError):
                if Owner.read(note) == me:
                    note.unlink()
    finally:
        lock.release()


def refuse_elsewhere(lock: Path, me: Owner | None = None) -> None:
    """:class:`StoreLocked` while the note beside ``lock`` is that of a living owner on another machine."""
    note = lock.with_suffix(".owner")
    other = Owner.read(note)
    if other is None or other.is_on_machine_of(me or Owner.here()):
        return
    if (silent := _silence(lock, note)) is not None and silent < STALE:
        raise _refusal(lock, other, silent)


def alive(path: Path) -> bool:
    """Whether a living process holds the lease at ``path``, as far as this machine can tell."""
    try:
        with lease(path):
            return False
    except StoreLocked:
        return True


def _awaited(note: Path) -> Owner | None:
    """Whom a note names. It is written just after the lock is taken: there may be none yet, or a dead owner's."""
    until = time.monotonic() + PATIENCE
    while True:
        found = Owner.read(note)
        if (found is not None and not _is_dead(found)) or time.monotonic() > until:
            return found
        time.sleep(0.02)


def _is_dead(owner: Owner) -> bool:
    if not owner.is_on_machine_of(Owner.here()) or os.name != "posix" or owner.process < 1:
        return False
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's
    return False


def _write(note: Path, me: Owner) -> None:
    partial = note.with_name(f".{note.name}.{me.process}-{threading.get_ident()}{PARTIAL}")
    try:
        partial.write_text(json.dumps(asdict(me)))
        os.replace(partial, note)
    finally:
        partial.unlink(missing_ok=True)


def _silence(lock: Path, note: Path) -> float | None:
    """Seconds since a note was touched, by the clock of the file system that both are on; None where there is none."""
    with suppress(OSError):
        os.utime(lock)
        return lock.stat().st_mtime - note.stat().st_mtime
    return None


def _clocks(lock: Path) -> tuple[float, float]:
    """Seconds of this machine's clock that nobody sets, and of the file system's, which goes on while a machine is paused."""
    own = time.monotonic()
    with suppress(OSError):
        os.utime(lock)
        return own, lock.stat().st_mtime
    return own, math.nan  # no later and no earlier than anything


def _refusal(lock: Path, owner: Owner | None, silent: float | None = None) -> StoreLocked:
    who = str(owner) if owner is not None else "another process"
    if silent is None:
        advice = "wait for it, or stop it and run the same command again"
    else:
        advice = (
            f"last sign of life {max(0, silent):.0f} s ago; wait for it, or stop it and run the same command again "
            f"{STALE:.0f} s later"
        )
    return StoreLocked(f"{lock.parent} is being written by {who}; {advice}")
