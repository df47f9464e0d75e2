"""Objects of stores elsewhere, kept on this machine by their sha256, within a number of bytes.

A file has the name of its sha256 only once all of its bytes were proven to have it, and is proven again by each process that
opens it: nothing partial or altered is ever served. Any number of processes may share a cache, and stores that hold equal
objects share them too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import filelock

from hdcache.durable import PARTIAL, durable_parts
from hdcache.errors import OutOfSpace, StoreCorrupt
from hdcache.resources import parse_bytes
from hdcache.schema import StoredObject

MOST_BYTES = 100 << 30
"""The limit where none is asked for: this, or half of what is free on the disk."""
KEEP = 0.9
"""Share of the limit that is left when room is made: the oldest files go many at a time."""
_FRESH, _ABANDONED = 60.0, 86400.0
"""Seconds after which a use is noted again; after which an unfinished file counts as left by a killed process."""
log = logging.getLogger(__name__)


def cache_folder(folder: str | Path | None = None) -> Path:
    """Where things are cached: ``folder``, else ``$HDCACHE_CACHE``, else ``~/.cache/hdcache``."""
    return Path(folder or os.environ.get("HDCACHE_CACHE") or Path.home() / ".cache" / "hdcache").expanduser()


def cache_limit(folder: Path, asked: str | int | None = None) -> int:
    """Bytes that a cache may take: ``asked``, else ``$HDCACHE_CACHE_BYTES``, else :data:`MOST_BYTES` or half of the free disk."""
    given = asked if asked is not None else os.environ.get("HDCACHE_CACHE_BYTES")
    if given is not None:
        return parse_bytes(given, "--cache-size" if asked is not None else "HDCACHE_CACHE_BYTES")
    folder.mkdir(parents=True, exist_ok=True)
    return min(MOST_BYTES, (shutil.disk_usage(folder).free + _bytes_of(folder)) // 2)


class ObjectCache:
    """A folder of proven objects, the least recently used of which go first."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.fetched = 0
        """Bytes that this process has fetched."""
        self._bytes, self._uncounted = _bytes_of(folder), 0
        self._proved: dict[str, tuple[int, int]] = {}
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def open(self, listed: StoredObject, parts: Callable[[], Iterator[bytes]]) -> BinaryIO:
        """An object, open for reading, whole and proven; where it is not here, what ``parts`` gives is kept.

        ``parts`` proves what it gives, as :meth:`~hdcache.sharing.objects.Place.parts` does: its errors are passed on.
        A file that is removed to make room stays readable to who has it open.

        Raises
        ------
        OutOfSpace
            when the disk is full, even after room was made.
        """
        found = self.peek(listed)
        if found is not None:
            return found
        with self._only_here(listed.sha256), self._only_process(listed.sha256):
            found = self.peek(listed)
            if found is None:
                found = self._fetch(listed, parts)
        # Others fill the cache too: it is counted anew before they all could pass the limit by much.
        if self._bytes > self.limit or self._uncounted > self.limit * (1 - KEEP) / 2:
            self._make_room(int(self.limit * KEEP), unless=self.limit)
        return found

    def _fetch(self, listed: StoredObject, parts: Callable[[], Iterator[bytes]]) -> BinaryIO:
        """Fetch an object, and open it before it has a name that somebody who makes room could remove."""
        path = self._path(listed)
        own = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.new{PARTIAL}")
        try:
            durable_parts(own, parts())
        except OutOfSpace:
            log.warning("%s: the disk is full; making room", self.folder)
            self._make_room(self._bytes // 2)
            try:
                durable_parts(own, parts())
            except OutOfSpace as error:
                raise OutOfSpace(
                    error.errno,
                    f"{self.folder}: no space for an object of {listed.size:,} bytes; free some, or put the cache elsewhere "
                    "(HDCACHE_CACHE=DIR)",
                ) from None
        found = self._look(own, listed)
        if found is None:
            raise StoreCorrupt(
                f"{path}: the disk gives other bytes than were written; put the cache elsewhere (HDCACHE_CACHE=DIR)"
            )
        os.replace(own, path)
        with self._lock:
            self.fetched += listed.size
            self._bytes += listed.size
            self._uncounted += listed.size
        return found

    def peek(self, listed: StoredObject) -> BinaryIO | None:
        """An object that is here, open and proven; None where it is not. One that was altered is removed."""
        return self._look(self._path(listed), listed)

    def _look(self, path: Path, listed: StoredObject) -> BinaryIO | None:
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115  # the caller closes it
        except OSError:
            return None
        try:
            found = os.fstat(file.fileno())
            known = found.st_ino, found.st_mtime_ns
            if found.st_size != listed.size or self._proved.get(listed.sha256) != known:
                whole = (
                    found.st_size == listed.size and hashlib.file_digest(file, "sha256").hexdigest() == listed.sha256
                )
                if not whole:
                    log.warning("%s: altered since it was cached; it is fetched again", path)
                    with suppress(OSError):
                        path.unlink()
                    file.close()
                    return None
                file.seek(0)
                self._proved[listed.sha256] = known
            now = time.time()
            if now - self._used.get(listed.sha256, 0.0) > _FRESH:
                self._used[listed.sha256] = now
                with suppress(OSError):
                    os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
        except BaseException:
            file.close()
            raise
        return file

    def _path(self, listed: StoredObject) -> Path:
        return self.folder / listed.sha256[:2] / listed.sha256

    def _only_here(self, digest: str) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(digest, threading.Lock())

    def _only_process(self, digest: str) -> filelock.BaseFileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self.folder / f".{digest[:3]}.lock")

    def _make_room(self, most: int, unless: int = 0) -> None:
        """Remove what was used longest ago until at most ``most`` bytes are left; nothing where all are within ``unless``."""
        with self._lock, filelock.FileLock(self.folder / ".room.lock"):
            now, held = time.time(), 0
            files = []
            for path, size, used in _files(self.folder):
                if path.name.endswith(PARTIAL):
                    if now - used > _ABANDONED:
                        path.unlink(missing_ok=True)
                        continue
                else:
                    files.append((used, size, path))
                held += size
            for _, size, path in sorted(files) if held > unless else ():
                if held <= most:
                    break
                path.unlink(missing_ok=True)
                held -= size
            self._bytes, self._uncounted = held, 0


def _files(folder: Path) -> Iterator[tuple[Path, int, float]]:
    for path in folder.glob("[0-9a-f][0-9a-f]/*"):
        with suppress(OSError):
            found = path.stat()
            yield path, found.st_size, found.st_atime
    for path in folder.glob(f"[0-9a-f][0-9a-f]/.*{PARTIAL}"):
        with suppress(OSError):
            found = path.stat()
            yield path, found.st_size, found.st_atime


def _bytes_of(folder: Path) -> int:
    return sum(size for _, size, _ in _files(folder))
