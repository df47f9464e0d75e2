"""Files that are there after a power cut, or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from hdcache.errors import OutOfSpace
from hdcache.schema import StoredObject

PARTIAL = ".partial"
"""How the names of files end that are being written; they begin with a dot. A killed process leaves them."""
_UNSUPPORTED = (errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def stored_object(data: bytes) -> StoredObject:
    """How a record lists a file that holds ``data``."""
    return StoredObject(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def durable_write(path: Path, data: bytes, *, create_only: bool = False) -> StoredObject:
    """Write ``data`` so that after return it survives a power cut: temporary file, fsync, rename, fsync of the folder.

    Raises
    ------
    OutOfSpace
        when the disk or quota is full.
    FileExistsError
        with ``create_only``, when ``path`` exists.
    """
    return durable_parts(path, (data,), create_only=create_only)


def durable_parts(path: Path, parts: Iterable[bytes], *, create_only: bool = False) -> StoredObject:
    """As :func:`durable_write`, of a file that need not fit into memory; nothing is left when ``parts`` raises."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    count, hasher = 0, hashlib.sha256()
    try:
        with _room(path):
            _make_folder(path.parent)
            with open(partial, "wb") as file:
                for part in parts:
                    file.write(part)
                    hasher.update(part)
                    count += len(part)
                file.flush()
                os.fsync(file.fileno())
            if create_only and _link(partial, path):
                os.unlink(partial)  # renaming one name of a file to another of its names would do nothing
            else:
                os.replace(partial, path)
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return StoredObject(size=count, sha256=hasher.hexdigest())


def durable_move(source: Path, path: Path) -> None:
    """Rename a durable file within its folder, over what may be there; after return that survives a power cut.

    Raises
    ------
    OutOfSpace
        when the disk or quota is full.
    """
    with _room(path):
        os.replace(source, path)
        sync_folder(path.parent)


def durable_unlink(path: Path) -> None:
    """Remove a file, if it is there, so that it does not come back after a power cut; :class:`OutOfSpace` as above."""
    with _room(path):
        if path.is_file():
            path.unlink(missing_ok=True)
            sync_folder(path.parent)


def partial_files(folder: Path) -> list[Path]:
    """Unfinished files in and below a folder. Those of a living process are among them: who asks must know its locks."""
    return sorted(folder.rglob(f".*{PARTIAL}"))


@contextlib.contextmanager
def _room(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(
                error.errno,
                f"no space left while writing {path}; finished shards are safe: free space and run the same command again",
            ) from None
        raise


def _link(partial: Path, path: Path) -> bool:
    """Let exactly one process create ``path``, FileExistsError for all others; True where it has its content already."""
    try:
        os.link(partial, path)
        return True
    except OSError as error:
        # exFAT, SMB and some FUSE mounts have no hard links.
        if error.errno not in _UNSUPPORTED:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        return False


def _make_folder(folder: Path) -> None:
    """``mkdir -p`` that survives a power cut too."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: files added, replaced or removed."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(number)
