"""A file system that fails at its N-th call: a layer between Python and the system, for the files below one folder.

It stands in for the functions of ``os`` and for ``open``, so that whatever is written in Python meets it, whichever library
it is in. A fault is an error of the system, or a read or write that does a part of what it was asked for.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES, "ETIMEDOUT": errno.ETIMEDOUT}
SHORT = "short"
"""A read or write of half of the bytes. The next one goes on: nothing is wrong."""
_OF_PATHS = (
    "open", "stat", "lstat", "scandir", "listdir", "mkdir", "replace", "rename", "link", "unlink", "remove", "rmdir", "utime",
    "readlink", "statvfs",
)  # fmt: skip
_OF_FILES = ("fstat", "fsync", "pread", "ftruncate")
_TRANSFERS = ("pread", "read", "write")


class FailingSystem:
    """Counts the calls for files below a folder, and fails at one of them, or at all from that one on."""

    def __init__(self, folder: str, kind: str = "", at: int | None = None, *, lasting: bool = False) -> None:
        self.folder, self.kind, self.at, self.lasting = folder, kind, at, lasting
        self.count = 0
        self.failed: str = ""
        """The call that failed first, with its file."""
        self._numbers = itertools.count(1)
        self._files: set[int] = set()
        self._real: dict[tuple[Any, str], Any] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> FailingSystem:
        for name in _OF_PATHS:
            self._replace(os, name, self._of_path(name, getattr(os, name)))
        for name in _OF_FILES:
            self._replace(os, name, self._of_file(name, getattr(os, name)))
        opened = self._opener(builtins.open)
        for owner in (builtins, io):
            self._replace(owner, "open", opened)
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), real in self._real.items():
            setattr(owner, name, real)

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        self._real[owner, name] = getattr(owner, name)
        setattr(owner, name, new)

    def _mine(self, path: Any) -> bool:
        if isinstance(path, int):
            return path in self._files
        try:
            return os.fsdecode(path).startswith(self.folder)
        except TypeError:
            return False

    def fails(self, name: str, path: object) -> bool:
        """Count a call; True where it is to do a part of its work only.

        Raises
        ------
        OSError
            where it is to fail.
        """
        if self.kind == SHORT and name not in _TRANSFERS:
            return False
        with self._lock:
            number = self.count = next(self._numbers)
            hit = self.at is not None and (number == self.at or (self.lasting and number > self.at))
            if not hit:
                return False
            self.failed = self.failed or f"{name} {path}"
        if self.kind == SHORT:
            return True
        code = ERRORS[self.kind]
        raise OSError(code, os.strerror(code), None if isinstance(path, int) else os.fsdecode(path))  # type: ignore[arg-type]

    def _of_path(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(path: Any = ".", *given: Any, **more: Any) -> Any:
            mine = self._mine(path)
            if mine:
                self.fails(name, path)
            found = call(path, *given, **more)
            if name == "open":
                (self._files.add if mine else self._files.discard)(found)
            return found

        return failing

    def _of_file(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(file: int, *given: Any) -> Any:
            if not self._mine(file):
                return call(file, *given)
            part = self.fails(name, file)
            if name == "fsync":
                return None  # this is about what is said, not about a power cut
            if name == "pread" and part:
                return call(file, max(1, given[0] // 2), *given[1:])
            return call(file, *given)

        return failing

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def failing(
            file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
            newline: str | None = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if opener is not None or not self._mine(file):
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not isinstance(file, int):
                self.fails("open", file)
            raw = _FailingFile(self, file, mode.replace("b", "").replace("t", ""), closefd)
            self._files.add(raw.fileno())
            if buffering == 0:
                return raw
            if "+" in mode:
                buffered: Any = io.BufferedRandom(raw)
            else:
                buffered = io.BufferedReader(raw) if mode.startswith("r") else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return failing


class _FailingFile(io.FileIO):
    """What ``open`` gives, under its buffer."""

    def __init__(self, system: FailingSystem, file: Any, mode: str, closefd: bool) -> None:
        self._system = system
        super().__init__(file, mode, closefd)

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        if size is None or size < 0:
            return self.readall()
        part = self._system.fails("read", self.name)
        return super().read(max(1, size // 2) if part and size else size) or b""

    def readall(self) -> bytes:
        found = b""
        while data := self.read(max(1, os.fstat(self.fileno()).st_size - len(found))):
            found += data
        return found

    def readinto(self, buffer: Any) -> int:  # type: ignore[override]
        part = self._system.fails("read", self.name)
        view = memoryview(buffer).cast("B")
        return super().readinto(view[: max(1, len(view) // 2)] if part and len(view) else view) or 0

    def write(self, data: Any) -> int:  # type: ignore[override]
        part = self._system.fails("write", self.name)
        view = memoryview(data).cast("B")
        return super().write(view[: max(1, len(view) // 2)] if part and len(view) > 1 else view) or 0
