"""Objects by key, wherever they lie: read until they are proven, tried again where that can help. What every place shares.

What is read is held to the size and sha256 that a record lists: a cut body goes on where it was cut, where Range is ignored
what is known already is skipped, another length is seen before a byte is kept.
"""

from __future__ import annotations

import hashlib
import re
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from hdcache import stopping
from hdcache.errors import StoreCorrupt, StoreMismatch, Unreachable
from hdcache.records import check_key
from hdcache.schema import StoredObject

T = TypeVar("T")
Parts = Callable[[], Iterator[bytes]]
"""Begins to give the bytes of an object, from its start each time it is called."""

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts, lengthened by up to a half that depends on the key."""
PART = 1 << 20
"""Bytes that are read at a time, and that must have come before the attempts are counted anew."""
HIDDEN = (".lock", ".owner", ".lease")


class Found(NamedTuple):
    """An object that a place lists."""

    size: int
    etag: str | None
    version: str | None = None


class Trouble(Exception):
    """One attempt that failed, in words that hold no secret."""

    def __init__(
        self, reason: str, *, again: bool = False, missing: bool = False, denied: bool = False, advice: str = ""
    ) -> None:
        super().__init__(reason)
        self.reason, self.again, self.missing, self.denied = reason, again, missing, denied
        self.advice = advice or "run the same command again; what has arrived stays"


class RangeIgnored(Exception):
    """A server that answers a Range request with the whole object."""


class Conflict(Exception):
    """There is an object where one was to be created, or another than was to be replaced."""


class Place(ABC):
    """Objects by key. ``url`` is for people: it holds no credentials."""

    url: str
    listable = True
    """Whether :meth:`listing` works; a web server has no listing."""

    def read(self, key: str, limit: int, *, optional: bool = False) -> bytes | None:
        """A small object whole; None where there is none, and with ``optional`` where the place refuses to say.

        Raises
        ------
        StoreCorrupt
            when it is larger than ``limit`` bytes.
        Unreachable
            when the place does not answer, refuses, or sends a web page instead.
        """

        def attempt() -> bytes | None:
            try:
                size, parts = self._open(key, 0)
            except Trouble as trouble:
                if trouble.missing or (optional and trouble.denied):
                    return None
                raise
            if size > limit:
                raise StoreCorrupt(
                    f"{self.url}/{key}: {size} bytes, a record has {limit} at most; not a store of hdcache"
                )
            data = bytearray()
            for part in parts:
                data += part
                if len(data) > limit:
                    raise StoreCorrupt(f"{self.url}/{key}: longer than the {size} bytes that were announced")
            if len(data) != size:
                raise Trouble(f"ended after {len(data)} of {size} bytes", again=True)
            return bytes(data)

        return self._tried("read", key, attempt)

    def parts(self, key: str, listed: StoredObject) -> Iterator[bytes]:
        """An object in parts, proven: the last part comes only after size and sha256 were those that are listed.

        Raises
        ------
        StoreCorrupt
            when it is missing or another object.
        Unreachable
            as :meth:`read`.
        """
        hasher, done, failures, counted = hashlib.sha256(), 0, 0, 0
        last = b""
        ranged = True
        while True:
            try:
                start = done if ranged else 0
                size, parts = self._open(key, start)
                if size != listed.size:
                    raise self._other(key, listed, f"{size} bytes, expected {listed.size}")
                for raw in parts:
                    part = raw[max(0, done - start) :] if start < done else raw
                    start += len(raw)
                    if not part:
                        continue
                    done += len(part)
                    if done > listed.size:
                        raise self._other(key, listed, f"longer than the {listed.size} bytes that are listed")
                    hasher.update(part)
                    if last:
                        yield last
                    last = part
                    if stopping.requested():
                        raise stopping.stop("what has arrived kept")
                if done < listed.size:
                    raise Trouble(f"ended after {done} of {listed.size} bytes", again=True)
                break
            except RangeIgnored:
                ranged = False
            except Trouble as trouble:
                if trouble.missing:
                    raise self._other(key, listed, f"missing, expected {listed.size} bytes") from None
                failures = 0 if done - counted >= PART else failures
                counted = done
                self._rest("read", key, trouble, failures)
                failures += 1
        if (found := hasher.hexdigest()) != listed.sha256:
            raise self._other(key, listed, f"sha256 {found[:12]}..., expected {listed.sha256[:12]}...")
        if last:
            yield last

    def proves(self, key: str, listed: StoredObject, found: Found, md5: Callable[[], str]) -> bool:
        """Whether what lies at ``key`` is what is listed; ``md5`` gives the one that the listed object has."""
        if found.size != listed.size:
            return False
        # Object stores that do not encrypt with keys of their own name the md5 of what was written in one request.
        if re.fullmatch(r'"?[0-9a-f]{32}"?', found.etag or "") and (found.etag or "").strip('"') == md5():
            return True
        try:
            for _ in self.parts(key, listed):
                pass
        except StoreCorrupt:
            return False
        return True

    def size(self, key: str) -> int | None:
        """Bytes of an object, None where there is none."""
        found = self.find(key)
        return None if found is None else found.size

    @abstractmethod
    def find(self, key: str) -> Found | None:
        """An object as :meth:`listing` has it, None where there is none."""

    @abstractmethod
    def listing(self, folder: str = "") -> dict[str, Found]:
        """Every object in and below a folder; :class:`UsageError` where the place has no listing."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder: folders and objects."""

    def folders(self, folder: str = "") -> list[str]:
        """Folders that lie directly in a folder."""
        return [name for name in self.names(folder) if self.find(f"{folder}/{name}" if folder else name) is None]

    @abstractmethod
    def write(self, key: str, listed: StoredObject, parts: Parts, *, read_back: bool = False) -> None:
        """Create an object of what ``parts`` begins to give, as :meth:`parts` of its source proves it; then prove it here.

        Raises
        ------
        StoreMismatch
            when another object is there.
        """

    @abstractmethod
    def replace(self, key: str, change: Callable[[bytes | None], bytes | None], limit: int) -> None:
        """Change a small derived object: ``change`` is told what is there and says what shall be; None removes it."""

    @abstractmethod
    def _open(self, key: str, offset: int) -> tuple[int, Iterator[bytes]]:
        """Size of the whole object, and its bytes from ``offset``; :class:`Trouble` and :class:`RangeIgnored`."""

    def _other(self, key: str, listed: StoredObject, what: str) -> StoreCorrupt:
        return StoreCorrupt(f"{self.url}/{key}: {what}; it is not what the store lists, and nothing of it was kept")

    def occupied(self, key: str) -> StoreMismatch:
        """The refusal to overwrite."""
        return StoreMismatch(
            f"{self.url}/{key}: is there already with other content, and nothing is overwritten; choose another place, "
            "or delete it and run the same command again"
        )

    def _tried(self, what: str, key: str, attempt: Callable[[], T]) -> T:
        for failures in range(len(WAITS) + 1):
            try:
                return attempt()
            except Trouble as trouble:
                self._rest(what, key, trouble, failures)
        raise AssertionError

    def _rest(self, what: str, key: str, trouble: Trouble, failures: int) -> None:
        """Wait before the next attempt, or give up."""
        if not trouble.again or failures >= len(WAITS):
            tried = f" ({failures + 1} attempts)" if failures else ""
            raise Unreachable(
                f"{self.url}/{key}: cannot be {what}: {trouble.reason}{tried}; {trouble.advice}"
            ) from None
        until = time.monotonic() + WAITS[failures] * (1 + zlib.crc32(key.encode()) / 2**33)
        while (left := until - time.monotonic()) > 0:
            if stopping.requested():
                raise stopping.stop("what has arrived kept")
            time.sleep(min(left, 0.1))


def checked_key(key: str, where: str) -> str:
    """``key`` if it names an object of a store; :class:`StoreCorrupt` for what leads elsewhere or names a lock."""
    try:
        check_key(key)
    except ValueError:
        raise StoreCorrupt(
            f"{where}: lists the key {key[:80]!r}, which leads out of a store; do not use this store"
        ) from None
    if any(part.startswith(".") for part in key.split("/")) or key.endswith(HIDDEN):
        raise StoreCorrupt(f"{where}: lists the key {key[:80]!r}, which is no object's; do not use this store")
    return key
