"""The images that a store was made from, where it says that they were: looked at only if they are just that.

Anybody may have written what the store says. So what is there has to be a file or a folder, of the right count by a look
that costs little, before any of it is listed or loaded; nothing is read without a bound; the fingerprint has the last word.
"""

from __future__ import annotations

import glob
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from hdcache.dataset_rows import Dataset, Listed
from hdcache.dataset_specs import Spec, parse
from hdcache.datasets import Member, store_dataset
from hdcache.errors import InputNotFound, StoreMismatch, UnreadableImage
from hdcache.listings import EXTENSIONS, VIDEO_EXTENSIONS, expand_braces
from hdcache.pixels import Source
from hdcache.shrinking import Shrunk
from hdcache.store import Store

LOCAL = ("folder", "video", "tar", "npz", "store")
"""Kinds of data sets that are opened where a store says they were; other libraries might reach the network."""
SPEC_LETTERS = 4096
"""Letters of what a store says, at most."""
SLACK = 10_000
"""Entries of a folder that are walked over beside two for each sample."""
SHARDS = 100_000
"""Tars of a data set, at most."""
NPZ_BYTES, ARRAYS = 2 << 30, 1000
"""Bytes of arrays that are loaded whole, and arrays in their file, at most."""
SAMPLE_BYTES = 1 << 30
"""Bytes of one sample's file, at most."""


def open_originals(store: Store) -> Dataset:
    """The data set that ``store`` was made from, at the place that it names.

    Raises
    ------
    InputNotFound
        where it names none, one that is not local or cannot be opened, or more than is opened to be looked at.
    StoreMismatch
        when what is there now is not what the store was made from.
    """
    said, card = store.about.data, store.card.dataset
    if not said:
        raise InputNotFound("the store keeps no images, and does not say where its data set was")
    if len(said) > SPEC_LETTERS or not said.isprintable():
        raise InputNotFound("the store keeps no images, and what it says of where its data set was is no place")
    spec = parse(said)
    if spec.kind not in LOCAL:
        raise InputNotFound(
            f"the store keeps no images, and its data set {said!r} may need the network; only local ones are opened"
        )
    try:
        count = _CHECKS[spec.kind](spec, card.count)
    except (InputNotFound, StoreMismatch):
        raise
    except OSError as error:
        raise InputNotFound(f"{said!r}: cannot be read ({error.strerror or error})") from None
    if count is not None and count != card.count:
        raise _other(said, f"it has {count:,} samples, the store {card.count:,}")
    found = store_dataset(store)
    if found.card.fingerprint != card.fingerprint:
        raise _other(said, "their fingerprints differ")
    return _bounded(found, spec)


def _other(said: str, why: str) -> StoreMismatch:
    return StoreMismatch(f"what is at {said!r} now is not the data set that this store was made from: {why}")


def _require(path: str, said: str, what: str, is_it: Callable[[int], bool]) -> int:
    """Bytes of what is at ``path``, which has to be a file, or a folder; never a pipe or a device."""
    try:
        facts = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputNotFound(f"{said!r}: no such {what} ({path})") from None
    if not is_it(facts.st_mode):
        raise InputNotFound(f"{said!r}: {path} is no {what}; it is not opened")
    return facts.st_size


def _folder(spec: Spec, count: int) -> int:
    """Files that the folder lists; a walk over much more than the store has samples ends in a refusal."""
    _require(spec.path, spec.text, "folder", stat.S_ISDIR)
    suffixes = tuple(f".{name}" for name in (VIDEO_EXTENSIONS if spec.kind == "video" else EXTENSIONS))
    left, files = 2 * count + SLACK, 0
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(spec.path, ())]
    while pending:
        path, above = pending.pop()
        facts = os.stat(path)
        here = (facts.st_dev, facts.st_ino)
        if here in above:
            continue  # a link that leads back
        with os.scandir(path) as entries:
            for entry in entries:
                if not left:
                    raise _other(spec.text, f"it holds far more than {count:,} samples")
                left -= 1
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append((entry.path, (*above, here)))
                elif entry.name.lower().endswith(suffixes):
                    # Links that lead nowhere are listed too: reading them fails by name.
                    files += entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    return files


def _tars(spec: Spec, count: int) -> None:
    """Every tar is a file, and they are few; their samples are counted as they are listed."""
    patterns = [spec.path] if os.path.exists(spec.path) else list(islice(expand_braces(spec.path), SHARDS + 1))
    if len(patterns) > SHARDS:
        raise InputNotFound(f"{spec.text!r}: more than {SHARDS:,} tars; they are not opened to be looked at")
    for pattern in patterns:
        if os.path.exists(pattern) or not glob.has_magic(pattern):
            found = [pattern]
        elif "**" in pattern or glob.has_magic(os.path.dirname(pattern)):
            raise InputNotFound(f"{spec.text!r}: folders are not searched for tars to be looked at")
        else:
            found = glob.glob(pattern)
        for path in found:
            _require(path, spec.text, "file", stat.S_ISREG)


def _arrays(spec: Spec, count: int) -> int:
    """Rows of the arrays, by their headers, which also say what would be loaded."""
    if _require(spec.path, spec.text, "file", stat.S_ISREG) > NPZ_BYTES:
        raise _large(spec)
    rows: set[int] = set()
    try:
        with zipfile.ZipFile(spec.path) as archive:
            members = archive.infolist()
            if len(members) > ARRAYS or sum(member.file_size for member in members) > NPZ_BYTES:
                raise _large(spec)
            for member in members:
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(file)
                    if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
                        raise ValueError(f"{member.filename} is not as long as it says")
                    rows.update(shape[:1])
    except (ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise InputNotFound(f"{spec.text!r}: not a readable .npz: {error}") from None
    return count if count in rows else max(rows, default=0)


def _large(spec: Spec) -> InputNotFound:
    return InputNotFound(f"{spec.text!r}: more than {NPZ_BYTES >> 30} GiB of arrays are not loaded to be looked at")


def _stored(spec: Spec, count: int) -> int:
    _require(spec.path, spec.text, "folder", stat.S_ISDIR)
    return Store.open(spec.path).card.dataset.count


_CHECKS: dict[str, Callable[[Spec, int], int | None]] = {
    "folder": _folder,
    "video": _folder,
    "tar": _tars,
    "npz": _arrays,
    "store": _stored,
}


def _bounded(found: Dataset, spec: Spec) -> Dataset:
    """``found``, whose files are looked at before they are read: they may have been changed since they were listed."""
    if isinstance(found, Shrunk):
        return replace(found, whole=_bounded(found.whole, spec))
    if spec.kind not in ("folder", "video", "tar") or not isinstance(found, Listed):
        return found
    fetch = found.fetch

    def read(place: Any) -> Source:
        if isinstance(place, Member):
            path, count = place.tar, place.size
        else:
            path = os.path.join(spec.path, place)
            count = os.stat(path).st_size
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableImage(f"{path}: not a file")
        if count > SAMPLE_BYTES:
            raise UnreadableImage(f"{path}: a sample of {count:,} bytes is not opened to be looked at")
        return fetch(place)

    return replace(found, fetch=read)
