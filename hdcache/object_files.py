"""Objects of a store as open files: listed, of the listed size, and proven by their sha256 when they are first read."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import defaultdict
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from hdcache.array_metadata import contained
from hdcache.errors import StoreCorrupt
from hdcache.schema import StoredObject


class ObjectFiles:
    """The objects of a store that lies in a folder. Another place has a subclass that overrides :meth:`open`.

    One instance proves each object once, whoever reads it.
    """

    on_disk = True
    """Whether every object lies in its :meth:`folder`."""

    def __init__(self, root: Path, prefix: str = "") -> None:
        """``prefix`` goes before every key: keys of some records are relative to a folder of the store."""
        self.root, self.prefix = root, prefix
        self._proved: set[str] = set()
        self._proving: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    @property
    def where(self) -> str:
        """The store, for people: its folder, or its URL."""
        return str(self.root)

    def below(self, folder: str) -> ObjectFiles:
        """The same objects by keys relative to a folder of the store."""
        return ObjectFiles(self.root, f"{self.prefix}{folder}/")

    def folder(self, key: str) -> Path:
        """Where the records beside an object lie; :class:`StoreCorrupt` where that is a link out of the store."""
        return contained(self.root, self.prefix + key)

    def open(self, key: str, listed: StoredObject | None) -> BinaryIO:
        """An object, open for reading.

        Raises
        ------
        StoreCorrupt
            naming it, when it is not listed, missing, of another size or content, or behind a link out of the store.
        """
        file = self._open(key, listed)
        try:
            self._prove(key, file, listed)
        except BaseException:
            file.close()
            raise
        return file

    def unproved(self, key: str, listed: StoredObject | None) -> BinaryIO:
        """As :meth:`open`, for who proves each part of it that is read, by a digest of its own."""
        return self._open(key, listed)

    def expect(self, key: str, listed: StoredObject | None) -> BinaryIO | None:
        """Told that an object will be read soon: the open file, where it is at hand and the system may fetch a part of it.

        What is wrong with it is for :meth:`open` to say.
        """
        try:
            return self._open(key, listed)
        except StoreCorrupt:
            return None

    def _open(self, key: str, listed: StoredObject | None) -> FileIO:
        path = self.root / (self.prefix + key)
        if listed is None:
            raise StoreCorrupt(f"{path}: not listed in the manifest; the store was changed after it was sealed")
        try:
            # Not blocking: what pretends to be a shard may be a pipe that nobody writes to.
            number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            raise StoreCorrupt(
                f"{path}: missing, expected {listed.size} bytes; copy the store again or rerun 'hdcache extract'"
            ) from None
        except OSError as error:
            raise StoreCorrupt(f"{path}: cannot be read ({error.strerror}); check the disk and permissions") from None
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode) or found.st_size != listed.size:
            os.close(number)
            raise StoreCorrupt(
                f"{path}: {found.st_size} bytes, expected {listed.size}; copy the store again or rerun 'hdcache extract'"
            )
        return open(number, "rb", buffering=0)

    def _prove(self, key: str, file: FileIO, listed: StoredObject | None) -> None:
        """Compare the sha256 of an object that is read for the first time: nothing else tells it from an equally long sibling.

        It is that of the open file itself: another may have its name by now.
        """
        if key in self._proved or listed is None:
            return
        with self._proving[key]:
            if key in self._proved:
                return
            path = self.folder(key)
            try:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
            except OSError as error:
                raise StoreCorrupt(
                    f"{path}: cannot be read ({error.strerror}); check the disk and permissions"
                ) from None
            if found != listed.sha256:
                raise StoreCorrupt(
                    f"{path}: sha256 {found[:12]}..., expected {listed.sha256[:12]}...; run 'hdcache verify' to list the "
                    "damaged objects, then copy the store again"
                )
            self._proved.add(key)
