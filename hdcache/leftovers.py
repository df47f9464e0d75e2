"""What killed processes left in a store, and its removal: ``hdcache gc``."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from hdcache.durable import PARTIAL, durable_unlink
from hdcache.errors import StoreLocked
from hdcache.integrity import verify
from hdcache.leases import check_held, lease
from hdcache.progress import counted, size
from hdcache.store import GC_LOCK, LEASE, PIXELS, ROOT_LOCK, Store

PATIENCE = 5.0
"""Seconds that the root lock is waited for, which others hold for moments."""


@dataclass
class Leftovers:
    """What is of no use in a store, by key, with its bytes."""

    partial: dict[str, int] = field(default_factory=dict)
    """Unfinished files and leases of processes that are dead."""
    unlisted: dict[str, int] = field(default_factory=dict)
    """Files that no record lists: of an extraction that was stopped, which its rerun would use or overwrite, or foreign ones."""
    busy: list[str] = field(default_factory=list)
    """Who writes now, in words: nothing of a store that is being written is judged."""
    removed: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of all that :func:`collect` removes, or would."""
        return sum(self.partial.values()) + sum(self.unlisted.values())


def collect(store: Store, *, unlisted: bool = False, dry_run: bool = False) -> Leftovers:
    """Remove unfinished files that nobody writes any more; with ``unlisted`` files too that no record lists.

    All leases of the store are held meanwhile, and the root lock, which everybody passes who takes one: who begins now waits.
    While somebody else has one, nothing is removed.
    """
    found = Leftovers()
    with ExitStack() as held:
        try:
            held.enter_context(filelock.FileLock(store.path / ROOT_LOCK, timeout=PATIENCE))
            # Where that lock does not reach other machines, its note says that nobody may begin there.
            held.enter_context(lease(store.path / GC_LOCK))
        except filelock.Timeout:
            found.busy.append(f"{store.path} is being written by another process; wait for it")
            return found
        except StoreLocked as error:
            found.busy.append(str(error))
            return found
        names = {path.name for path in store.path.glob(".*.lock")} - {ROOT_LOCK, GC_LOCK}
        names |= {f".{name}.lock" for name in (*store.teachers(), PIXELS.replace("/", "+"))}
        for name in sorted(names):
            try:
                held.enter_context(lease(store.path / name))
            except StoreLocked as error:
                found.busy.append(str(error))
        if found.busy:
            return found
        for path in sorted(store.path.rglob(".*")):
            if path.is_file() and not path.is_symlink() and path.name.endswith((PARTIAL, LEASE)):
                _note(found.partial, store, path.relative_to(store.path).as_posix())
        if unlisted:
            for key in verify(store, quick=True).unlisted:
                if key not in found.partial:
                    _note(found.unlisted, store, key)
        if not dry_run:
            for key in (*found.partial, *found.unlisted):
                check_held(store.path)
                _remove(store.path / key)
            found.removed = True
    return found


def _note(found: dict[str, int], store: Store, key: str) -> None:
    # A worker whose command was killed may finish or give up a file even now.
    with suppress(FileNotFoundError):
        found[key] = (store.path / key).lstat().st_size


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        durable_unlink(path)


def format_leftovers(found: Leftovers) -> str:
    """What was found, or removed, as lines of text."""
    if found.busy:
        return "\n".join(["nothing was removed:", *found.busy])
    lines = [*found.partial, *found.unlisted]
    if not lines:
        return "nothing left over"
    verb = "removed" if found.removed else "would remove"
    return "\n".join([f"{verb} {counted(len(lines), 'files')}, {size(found.bytes)}", *lines])
