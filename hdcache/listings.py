"""What lies in directories and tar files, listed once and remembered between runs.

A listing is kept as JSON under the sha256 of the real path, written atomically, and simply ignored when it is
corrupt or cannot be written. A directory or tar whose mtime is younger than two seconds is not remembered: it
may still change without its mtime moving.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from hdcache.errors import InputNotFound, UsageError

log = logging.getLogger(__name__)

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
SUFFIXES = tuple(f".{extension}" for extension in EXTENSIONS)
VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "avi", "mov", "m4v")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Coarsest timestamp of a file system in use (FAT).
SETTLED_NS = 2_000_000_000
MAX_LABEL_BYTES = 1 << 20
T = TypeVar("T")

Entry = tuple[str, bool]
"""Name, is it a directory."""
DIRECTORIES = TypeAdapter(dict[str, tuple[int, list[Entry]]])
"""Relative path -> mtime_ns and entries."""
Sample = tuple[str, str, int, int, int | str | None]
"""Key, member name, offset and size of the image in bytes, label."""
INDEX = TypeAdapter(tuple[tuple[int, int], list[Sample]])
"""Size and mtime_ns of the tar, its samples."""


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def checked_label(value: object, where: str) -> str | int | None:
    """A class name or number; negative numbers and ``None`` mean that there is no label."""
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value) if value >= 0 else None
    raise UsageError(f"{where}: label {str(value)[:80]!r} is neither a number nor a name; store one class per sample")


def _load(path: Path, schema: TypeAdapter[T]) -> T | None:
    try:
        return schema.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        log.debug("no usable listing in %s: %s", path, error)
        return None


def _save(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, separators=(",", ":")), encoding="ascii")
        os.replace(temporary, path)
    except OSError as error:
        log.debug("listing not saved to %s: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink()


def _settled(mtime_ns: int, scanned_ns: int) -> bool:
    return scanned_ns - mtime_ns >= SETTLED_NS


def _listing(listings: Path, real: str) -> Path:
    return listings / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"


def walk(folder_path: str, listings: Path, extensions: Sequence[str] = EXTENSIONS) -> list[str]:
    """The relative path of every file with one of ``extensions`` (images by default).

    Only directories that changed since the last listing are read.
    """
    root = os.path.realpath(folder_path)
    suffixes = tuple(f".{extension}" for extension in extensions)
    # No path holds a zero byte, so the listings of images and of videos in one folder stay apart.
    store = _listing(listings, root if suffixes == SUFFIXES else "\0".join((root, *suffixes)))
    known = _load(store, DIRECTORIES) or {}
    keep: dict[str, tuple[int, list[Entry]]] = {}
    files: list[str] = []
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        folder, ancestors = pending.pop()
        path = os.path.join(root, folder)
        try:
            now, info = time.time_ns(), os.stat(path)
            inode = (info.st_dev, info.st_ino)
            if inode in ancestors:
                log.debug("%s leads back to a directory above it; skipped", path)
                continue
            entries = known.get(folder)
            if entries is None or entries[0] != info.st_mtime_ns:
                entries = (info.st_mtime_ns, _scan(path, suffixes))
        except OSError as error:
            raise InputNotFound(f"cannot list {path}: {error.strerror}; check its permissions") from None
        if _settled(info.st_mtime_ns, now):
            keep[folder] = entries
        prefix = f"{folder}/" if folder else ""
        for name, is_directory in entries[1]:
            if is_directory:
                pending.append((prefix + name, (*ancestors, inode)))
            else:
                files.append(prefix + name)
    if keep != known:
        _save(store, keep)
    return files


def _scan(path: str, suffixes: tuple[str, ...]) -> list[Entry]:
    """Directories and files of the wanted kind in ``path``; only links are asked for more than the directory says of them."""
    entries: list[Entry] = []
    with os.scandir(path) as found:
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                entries.append((entry.name, True))
            elif entry.name.lower().endswith(suffixes) and (entry.is_file() or _dangles(entry)):
                entries.append((entry.name, False))
    return entries


def _dangles(entry: os.DirEntry[str]) -> bool:
    """A dangling link stays in the list: reading it fails by name instead of vanishing silently."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def stamp_of(info: os.stat_result) -> tuple[int, int]:
    return info.st_size, info.st_mtime_ns


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand ``{000..007}`` and ``{a,b}`` as a shell does; other braces are literal."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        yield pattern
        return
    words: Iterable[str]
    if match[3] is not None:
        words = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        if abs(last - first) >= 1_000_000:
            raise UsageError(f"{pattern!r}: {match[0]} stands for more than a million files; check the numbers")
        padded = any(len(bound) > 1 and bound[0] == "0" for bound in (match[1], match[2]))
        width = max(len(match[1]), len(match[2])) if padded else 0
        step = 1 if first <= last else -1
        words = (f"{number:0{width}d}" for number in range(first, last + step, step))
    for word in words:
        yield from expand_braces(pattern[: match.start()] + word + pattern[match.end() :])


def index_tar(path: str, listings: Path) -> tuple[tuple[int, int], list[Sample]]:
    """Size and mtime of a tar and its samples, from the cache or by one pass over the headers."""
    store = _listing(listings, os.path.realpath(path))
    known = _load(store, INDEX)
    now = time.time_ns()
    with open(path, "rb") as file:
        stamp = stamp_of(os.fstat(file.fileno()))
        if known and known[0] == stamp:
            return known
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                members = [member for member in archive if member.isreg() and not member.issparse()]
                # tarfile takes a damaged header for the end of the archive; the real end is zeros or nothing.
                end = archive.offset
            if any(os.pread(file.fileno(), tarfile.BLOCKSIZE, end)):
                raise tarfile.ReadError(f"damaged header at byte {end}")
        except tarfile.TarError as error:
            head = os.pread(file.fileno(), 8, 0)
            for magic, name in COMPRESSED.items():
                if head.startswith(magic):
                    raise UsageError(
                        f"{path} is compressed ({name}); random access needs a plain tar: decompress it"
                    ) from None
            raise InputNotFound(f"{path} is not a whole tar file: {error}; fetch or pack it again") from None
        samples = _samples(path, file.fileno(), members)
    if _settled(stamp[1], now):
        _save(store, (stamp, samples))
    return stamp, samples


def _samples(path: str, descriptor: int, members: list[tarfile.TarInfo]) -> list[Sample]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[tuple[str, str], tarfile.TarInfo] = {}
    extra: list[str] = []
    for member in members:
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = base.partition(".")
        key = folder + slash + stem
        if not stem:
            continue
        if extension in ("cls", "json"):
            labels[key, extension] = member
        elif is_image(base):
            if key not in images:
                images[key] = member
            elif images[key].name == member.name:
                raise UsageError(f"{path}: two members are named {member.name}; pack it again with unique names")
            else:
                extra.append(member.name)
    if extra:
        log.warning("%s: %d images share a key with another; only the first is used (%s)", path, len(extra), extra[0])
    samples: list[Sample] = []
    for key, image in images.items():
        label = None
        for extension in ("cls", "json"):
            if label is None and (found := labels.get((key, extension))):
                if found.size > MAX_LABEL_BYTES:
                    raise UsageError(f"{path}:{found.name}: {found.size} bytes are too many for a label")
                label = _tar_label(os.pread(descriptor, found.size, found.offset_data), f"{path}:{found.name}")
        samples.append((key, image.name, image.offset_data, image.size, label))
    return samples


def _tar_label(data: bytes, where: str) -> int | str | None:
    try:
        text = data.decode().strip()
        if where.endswith(".cls"):
            return checked_label(int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text, where)
        value = json.loads(text)
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{where}: not a readable label: {error}; repair or remove the member") from None
    return checked_label(value.get("label"), where) if isinstance(value, dict) else None
