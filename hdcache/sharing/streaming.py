"""A store that lies elsewhere, read as if it lay here: records are copied, objects come through a cache when they are read.

``hdcache distill ... --store s3://bucket/train.hdc``. The records (some kilobytes for each view, and the manifests) are copied
to a folder of the cache; codes, values and constants are fetched whole, proven, and kept by their sha256.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import filelock

from hdcache.array_metadata import parse_json, read_json, read_record
from hdcache.durable import durable_write, stored_object
from hdcache.errors import StoreCorrupt
from hdcache.index import CROISSANT, HELD, Held
from hdcache.ledgers import Index
from hdcache.object_files import ObjectFiles
from hdcache.progress import size
from hdcache.records import canonical_json
from hdcache.schema import StoredObject
from hdcache.sharing.object_cache import ObjectCache, cache_folder, cache_limit
from hdcache.sharing.objects import Place
from hdcache.sharing.places import open_place
from hdcache.sharing.selection import Contents, read_listed
from hdcache.store import ABOUT, PIXELS, About, Store

if TYPE_CHECKING:
    from hdcache.target_sources import StoredTargets

PARALLEL, AHEAD = 8, 32
"""Requests at a time; objects that are fetched before anybody waits for them."""
_NOTE_BYTES, _COPIED = 1 << 20, "copied.json"
_FORGOTTEN = 30 * 86400
"""Seconds after which the records of a store that nobody has opened are removed."""
log = logging.getLogger(__name__)


def open_store(
    where: str | Path, *, cache: str | Path | None = None, cache_size: str | int | None = None, anonymous: bool = False,
    endpoint_url: str | None = None,
) -> Store:  # fmt: skip
    """Open the store in a folder, or at a URL through a cache on this machine.

    Parameters
    ----------
    cache
        folder of the cache; else ``$HDCACHE_CACHE``, else ``~/.cache/hdcache``.
    cache_size
        bytes that objects may take there, ``50GB``; else ``$HDCACHE_CACHE_BYTES``, else 100 GB or half of the free disk.
    anonymous, endpoint_url
        as for ``hdcache pull``.

    Raises
    ------
    InputNotFound, StoreMismatch, StoreCorrupt
        as :meth:`~hdcache.store.Store.open` does; :class:`StoreCorrupt` also where a record is not what the index lists.
    Unreachable
        when the place does not answer or refuses.
    """
    if isinstance(where, Path) or "://" not in where:
        return Store.open(where)
    place = open_place(where, endpoint_url=endpoint_url, anonymous=anonymous)
    folder = cache_folder(cache)
    contents = Contents.read(place)
    records = copy_records(contents, folder / "stores")
    objects = ObjectCache(folder / "objects", cache_limit(folder / "objects", cache_size))
    store = Store.open(records)
    files = StreamedFiles(records, place, objects)
    return Store(records, store.card, store.about, files)


def copy_records(contents: Contents, folder: Path) -> Path:
    """The folder that holds the records of a store as it is now; they are copied there where they are not yet."""
    place = contents.place
    state = {key: entry.sha256 for key, entry in contents.index.items()}
    held = {name: sorted(taps) for name in contents.teachers if (taps := contents.held(name)) is not None}
    digest = hashlib.sha256(canonical_json([place.url, state, held])).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", place.url.rpartition("://")[2]).strip("-.")[-60:]
    path = folder / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / f".{name}-{digest}.lock"):
        if not _is_whole(contents, path, held):
            _forget(folder)
            shutil.rmtree(path, ignore_errors=True)
            copied = _copy(contents, path)
            for key in (ABOUT, *(f"teachers/{teacher}/{ABOUT}" for teacher in contents.teachers)):
                _note(place, key, path)
            for teacher, names in held.items():
                durable_write(path / "teachers" / teacher / HELD, Held(taps=tuple(names)).canonical())
            durable_write(path / _COPIED, Index(objects=copied).checked())
            root = read_listed(place, "zarr.json", contents.index["zarr.json"])
            durable_write(path / "zarr.json", root)  # last: it is complete
        (path / "zarr.json").touch()
    return path


def _records(contents: Contents) -> dict[str, StoredObject]:
    """Records that the index lists and a reader needs."""
    return {key: entry for key, entry in contents.index.items() if "/receipts/" not in key and key != CROISSANT}


def _is_whole(contents: Contents, path: Path, held: Mapping[str, Sequence[str]]) -> bool:
    """Whether the records of an earlier time are all there and as they were copied: somebody may have cleared a cache."""
    expected = _records(contents)
    try:
        copied = Index.parse(read_json(path / _COPIED), path / _COPIED).objects | expected
        notes = {
            note.parent.name: list(Held.parse(read_json(note), note).taps) for note in path.glob(f"teachers/*/{HELD}")
        }
        return notes == held and all(stored_object(read_record(path / key)) == entry for key, entry in copied.items())
    except StoreCorrupt:
        return False


def _copy(contents: Contents, path: Path) -> dict[str, StoredObject]:
    """Copy all records but the root's; what they are."""
    wanted = {key: entry for key, entry in _records(contents).items() if key != "zarr.json"}
    wanted |= {key: entry for key, entry in contents.samples.items() if key.endswith("/zarr.json")}
    ledgers = [PIXELS] * contents.pixels + [f"views/{view}" for view in contents.views()]
    ledgers += [f"teachers/{name}/views/{view}" for name in contents.teachers for view in contents.views(name)]
    with ThreadPoolExecutor(PARALLEL, "records") as pool:
        for manifest in pool.map(contents.manifest, ledgers):
            held = contents.held(manifest.teacher) if manifest.teacher else None
            objects = contents.objects("", manifest, held)
            wanted |= {key: entry for key, entry in objects.items() if key.endswith("/zarr.json")}

        def fetch(key: str) -> None:
            durable_write(path / key, read_listed(contents.place, key, wanted[key]))

        for _ in pool.map(fetch, sorted(wanted)):
            pass
    return dict(sorted(wanted.items()))


def _note(place: Place, key: str, path: Path) -> None:
    """Where the data and the weights were, as far as the place says so: nothing rests on it."""
    found = place.read(key, _NOTE_BYTES, optional=True)
    if found is not None:
        with suppress(StoreCorrupt):
            durable_write(path / key, About.parse(parse_json(key, found), key).canonical())


def _forget(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(OSError):
            if path.is_dir() and time.time() - (path / "zarr.json").stat().st_mtime > _FORGOTTEN:
                shutil.rmtree(path)


class StreamedFiles(ObjectFiles):
    """Objects of a store elsewhere, through a cache."""

    on_disk = False

    def __init__(
        self, root: Path, place: Place, cache: ObjectCache, prefix: str = "", ahead: _Ahead | None = None
    ) -> None:
        super().__init__(root, prefix)
        self.place, self.cache = place, cache
        self._ahead = ahead or _Ahead()

    @property
    def where(self) -> str:
        return self.place.url

    def below(self, folder: str) -> StreamedFiles:
        return StreamedFiles(self.root, self.place, self.cache, f"{self.prefix}{folder}/", self._ahead)

    def open(self, key: str, listed: StoredObject | None) -> BinaryIO:
        if listed is None:
            raise StoreCorrupt(
                f"{self.place.url}/{self.prefix}{key}: not listed in the manifest; the store was changed after it was sealed"
            )
        self._ahead.wait(listed.sha256)
        return self.cache.open(listed, lambda: self._parts(key, listed))

    def unproved(self, key: str, listed: StoredObject | None) -> BinaryIO:
        return self.open(key, listed)

    def expect(self, key: str, listed: StoredObject | None) -> BinaryIO | None:
        if listed is None:
            return None
        found = self.cache.peek(listed)
        if found is None:
            self._ahead.fetch(listed.sha256, lambda: self.cache.open(listed, lambda: self._parts(key, listed)).close())
        return found

    def _parts(self, key: str, listed: StoredObject) -> Iterator[bytes]:
        return self.place.parts(self.prefix + key, listed)


class _Ahead:
    """Objects that are being fetched before they are asked for."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(PARALLEL, "fetch")
        self._under_way: dict[str, Future[None]] = {}

    def fetch(self, digest: str, work: object) -> None:
        if len(self._under_way) < AHEAD and digest not in self._under_way and callable(work):
            future = self._pool.submit(work)
            self._under_way[digest] = future
            future.add_done_callback(lambda _: self._under_way.pop(digest, None))

    def wait(self, digest: str) -> None:
        future = self._under_way.get(digest)
        if future is not None:
            with suppress(Exception):  # who asked for it tries again, and is told what is wrong
                future.result()


def warn_of_small_cache(stored: Iterable[StoredTargets], view: int) -> None:
    """Say so where an epoch's objects do not fit into the cache: they are then fetched again and again."""
    needed, files = 0, None
    for target in stored:
        objects = target.reader.manifest(view).objects
        keys = tuple(f"teachers/{target.name}/views/{view}/{key}/" for key in target.arrays)
        needed += sum(entry.size for key, entry in objects.items() if key.startswith(keys))
        files = target.reader.store.files
    if isinstance(files, StreamedFiles) and needed > files.cache.limit:
        log.warning(
            "an epoch reads %s of %s, and the cache may hold %s: objects are fetched several times in each epoch; raise "
            "--cache-size, or copy the store with 'hdcache pull'", size(needed), files.where, size(files.cache.limit),
        )  # fmt: skip
