"""Who writes: one process at a time, whichever machine it is on; a dead one's right is taken over.

The right itself is a lock of the system (``.NAME.lock``), which is free as soon as its process is gone, however it went. Not
every shared file system knows the locks of other machines. So the owner also leaves a note (``.NAME.owner``) that says who it
is and that it touches every :data:`BEAT` seconds: while the note of another machine is fresh, its owner counts as alive.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
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

    @classmethod
    def here(cls) -> Self:
        """This process, now."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError, ImportError):  # a container's user without a name
            user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
        return cls(user, platform.node(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))

    @classmethod
    def read(cls, note: Path) -> Self | None:
        """Whom a note names; None where there is none, or one that nobody can read."""
        try:
            # Not blocking, no links: what pretends to be a note may be a pipe that nobody writes to.
            number = os.open(note, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            with open(number, "rb") as file:
                found = json.loads(file.read(_NOTE_LIMIT) or b"")
            fields = found["user"], found["host"], found["process"], found["since"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        user, host, process, since = fields
        return cls(str(user)[:80], str(host)[:255], process if isinstance(process, int) else 0, str(since)[:40])

    def __str__(self) -> str:
        return f"{self.user}, process {self.process} on {self.host}, since {self.since}"


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
    me, ended = Owner.here(), threading.Event()
    try:
        _take(path, note, me)
        beating = threading.Thread(target=_beat, args=(note, me, ended), name="lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            with suppress(OSError):
                if Owner.read(note) == me:
                    note.unlink()
    finally:
        lock.release()


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
    if owner.host != platform.node() or os.name != "posix" or owner.process < 1:
        return False
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's
    return False


def _take(lock: Path, note: Path, me: Owner) -> None:
    other = Owner.read(note)
    if other is not None and other.host != me.host and (silent := _silence(lock, note)) is not None and silent < STALE:
        raise _refusal(lock, other, silent)
    # The note is for people and for other machines; a full disk or a read-only mount is the work's to report.
    with suppress(OSError):
        _write(note, me)


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


def _beat(note: Path, me: Owner, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            if Owner.read(note) == me:
                os.utime(note)


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
