"""What killed processes left in a store, and its removal: ``hdcache gc``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from hdcache.durable import PARTIAL, durable_unlink
from hdcache.errors import StoreLocked
from hdcache.integrity import verify
from hdcache.leases import lease
from hdcache.progress import counted, size
from hdcache.store import LEASE, PIXELS, Store


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

    All leases of the store are held meanwhile. While somebody else has one, nothing is removed.
    """
    found = Leftovers()
    with ExitStack() as held:
        names = {path.name for path in store.path.glob(".*.lock")} - {".lock"}
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
                found.partial[path.relative_to(store.path).as_posix()] = path.stat().st_size
        if unlisted:
            others = [key for key in verify(store, quick=True).unlisted if key not in found.partial]
            found.unlisted = {key: (store.path / key).lstat().st_size for key in others}
        if not dry_run:
            for key in (*found.partial, *found.unlisted):
                _remove(store.path / key)
            found.removed = True
    return found


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
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
