"""Objects in a folder of this machine, or in one that is mounted. What it holds it keeps: nothing is overwritten."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from hdcache.array_metadata import contained
from hdcache.durable import durable_parts, durable_unlink, durable_write
from hdcache.errors import StoreMismatch, Unreachable
from hdcache.schema import StoredObject
from hdcache.sharing.objects import HIDDEN, PART, Found, Parts, Place, Trouble, checked_key


class Folder(Place):
    """A folder of this machine, or one that is mounted."""

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, str(path)

    def at(self, key: str) -> Path:
        """Where an object lies; keys and links that lead out of the folder are refused."""
        return contained(self.path, checked_key(key, self.url))

    def find(self, key: str) -> Found | None:
        try:
            found = self.at(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Unreachable(f"{self.path / key}: {error.strerror}; check the disk and permissions") from None
        return Found(found.st_size, None) if stat.S_ISREG(found.st_mode) else None

    def listing(self, folder: str = "") -> dict[str, Found]:
        found = {}
        root = self.at(folder) if folder else self.path

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise Unreachable(f"{error.filename}: {error.strerror}; check the disk and permissions") from None

        for where, folders, files in os.walk(root, onerror=refuse):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in files:
                if not name.startswith(".") and not name.endswith(HIDDEN):
                    key = (Path(where) / name).relative_to(self.path).as_posix()
                    with suppress(OSError):  # a link that leads nowhere
                        found[key] = Found(os.stat(f"{where}/{name}").st_size, None)
        return found

    def names(self, folder: str = "") -> list[str]:
        path = self.at(folder) if folder else self.path
        if not path.exists():
            return []
        if not path.is_dir():
            raise StoreMismatch(f"{path}: a file, not a folder; choose another place")
        return sorted(name for name in os.listdir(path) if not name.startswith("."))

    def write(self, key: str, listed: StoredObject, parts: Parts, *, read_back: bool = False) -> None:
        path = self.at(key)
        try:
            durable_parts(path, parts(), create_only=True)
        except FileExistsError:
            if not self.proves(key, listed, Found(self.size(key) or 0, None), str):
                raise self.occupied(key) from None
        else:
            if read_back and not self.proves(key, listed, Found(self.size(key) or 0, None), str):
                raise self._other(key, listed, "reads back as something else")

    def replace(self, key: str, change: Callable[[bytes | None], bytes | None], limit: int) -> None:
        path = self.at(key)
        wanted = change(old := self.read(key, limit))
        if wanted is None:
            durable_unlink(path)
        elif wanted != old:
            durable_write(path, wanted)

    def _open(self, key: str, offset: int) -> tuple[int, Iterator[bytes]]:
        try:
            # Not blocking: what pretends to be an object may be a pipe that nobody writes to.
            number = os.open(self.at(key), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (FileNotFoundError, NotADirectoryError):
            raise Trouble("no such file", missing=True) from None
        except OSError as error:
            raise Trouble(str(error.strerror), advice="check the disk and permissions") from None
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            os.close(number)
            raise Trouble("not a file", advice="copy the store again")

        def read() -> Iterator[bytes]:
            with open(number, "rb", buffering=0) as file:
                file.seek(offset)
                try:
                    while part := file.read(PART):
                        yield part
                except OSError as error:
                    raise Trouble(str(error.strerror), advice="check the disk and permissions") from None

        return found.st_size, read()
