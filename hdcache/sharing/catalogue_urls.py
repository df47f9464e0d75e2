"""The catalogue of a bucket or of a web server: the records of its stores are fetched, and described as those of a folder.

A bucket is listed. A web server has no listing: it has ``catalog.json``, which ``hdcache serve`` makes and a plain server
may keep (the output of ``hdcache catalog --json``), or it is the address of one store with an ``index.json``.
"""

from __future__ import annotations

import errno
import re
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from hdcache.array_metadata import RECORD_BYTES, parse_json
from hdcache.errors import InputNotFound, StoreCorrupt
from hdcache.held import HELD
from hdcache.ledgers import INDEX, MANIFEST, Index
from hdcache.records import first_fault
from hdcache.sharing.catalogue import CATALOGUE_FILE, DEPTH, RECORDS, Catalogue, describe
from hdcache.sharing.catalogue_entries import CatalogueRecord, StoreEntry
from hdcache.sharing.folder import Folder
from hdcache.sharing.objects import Place, checked_key
from hdcache.sharing.places import open_place
from hdcache.store import ABOUT, PIXELS

STORES = 10_000
"""Stores of a catalogue, at most."""
RECORD_COUNT, STORE_BYTES = 10_000, 1 << 30
"""Records of one store, and bytes of them all, at most."""
_NAMES = (errno.ENAMETOOLONG, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)
"""What the system says of names that are too long, or that are a file's and a folder's."""
_RECORD = re.compile("|".join(re.escape(pattern).replace(r"\*", "[^/]*") for pattern in RECORDS))
TOGETHER = 8
"""Records that are fetched at a time."""


def read_catalogue(where: str | Path, *, endpoint_url: str | None = None, anonymous: bool = False) -> list[StoreEntry]:
    """The stores of a folder, a bucket or a web server.

    Raises
    ------
    InputNotFound
        when there is no such folder, or no catalogue at a web server.
    UsageError
        for a URL that cannot be meant, or when the extra ``cloud`` is not installed.
    Unreachable
        when the place does not answer or refuses.
    StoreCorrupt
        when what a web server calls its catalogue is none.
    """
    place = open_place(where, endpoint_url=endpoint_url, anonymous=anonymous)
    if isinstance(place, Folder):
        return Catalogue(place.path).entries()
    if place.listable:
        return _described(place, _walked(place))
    data = place.read(CATALOGUE_FILE, RECORD_BYTES)
    if data is not None:
        return _parsed(data, f"{place.url}/{CATALOGUE_FILE}")
    index = place.read(INDEX, RECORD_BYTES)
    if index is None:
        raise InputNotFound(
            f"{place.url}: has neither {CATALOGUE_FILE} nor {INDEX}; start 'hdcache serve' there, put the output of 'hdcache catalog "
            "FOLDER --json' beside the stores, or give the URL of a store"
        )
    where = f"{place.url}/{INDEX}"
    listed = Index.parse(parse_json(where, index), where).objects
    teachers = {key.split("/")[1] for key in listed if key.startswith("teachers/") and key.count("/") > 1}
    notes = [f"teachers/{name}/{note}" for name in sorted(teachers) for note in (ABOUT, HELD)]
    return _described(place, dict.fromkeys([*listed, ABOUT, *notes]))


def _walked(place: Place, folder: str = "", depth: int = DEPTH) -> Iterator[str]:
    """Keys of the records of all stores in and below a folder of a bucket; nothing that holds shards is listed."""
    inside = f"{folder}/" if folder else ""
    if place.find(f"{inside}zarr.json") is None:
        for name in place.folders(folder) if depth else ():
            if not name.startswith("."):
                yield from _walked(place, inside + name, depth - 1)
        return
    yield from (f"{inside}{key}" for key in ("zarr.json", ABOUT, f"{PIXELS}/{MANIFEST}"))
    views = [f"{inside}views/{view}" for view in place.folders(f"{inside}views")]
    for name in place.folders(f"{inside}teachers"):
        teacher = f"{inside}teachers/{name}"
        yield from (f"{teacher}/{key}" for key in ("zarr.json", ABOUT, HELD))
        views += [f"{teacher}/views/{view}" for view in place.folders(f"{teacher}/views")]
    yield from (f"{view}/{MANIFEST}" for view in views)


def _parsed(data: bytes, where: str) -> list[StoreEntry]:
    """What a catalogue says, which may be anything, in bounded memory."""
    found = parse_json(where, data)
    stores = found.get("stores") if isinstance(found, dict) else None
    if isinstance(stores, list) and len(stores) > STORES:
        raise StoreCorrupt(f"{where}: {len(stores):,} stores, a catalogue has {STORES:,} at most; split it by folders")
    try:
        return list(CatalogueRecord.model_validate(found).stores)
    except ValidationError as error:
        raise StoreCorrupt(f"{where}: no catalogue: {first_fault(error)}") from None


def _described(place: Place, keys: Iterable[str]) -> list[StoreEntry]:
    """The stores among the objects of a place."""
    entries = []
    stores = _stores(keys)
    if len(stores) > STORES:
        raise StoreCorrupt(f"{place.url}: {len(stores):,} stores; give the URL of a folder with {STORES:,} at most")
    for path, inner in sorted(stores.items()):
        with tempfile.TemporaryDirectory(prefix="hdcache-") as scratch:
            root = Path(scratch)
            try:
                _fetch(place, path, inner, root / path)
            except StoreCorrupt as error:
                entries.append(StoreEntry(path=path, fault=str(error.args[-1])))
                continue
            except OSError as error:
                if error.errno not in _NAMES:
                    raise
                entries.append(
                    StoreEntry(path=path, fault=f"its objects have names that no store has ({error.strerror})")
                )
                continue
            entries.append(describe(root, path))
    return entries


def _stores(keys: Iterable[str]) -> dict[str, list[str]]:
    """Keys by the store that they lie in, whose path is ``.`` at the root; those below no ``zarr.json`` belong to none."""
    listed = list(keys)
    folders = {key.removesuffix("zarr.json").rstrip("/") for key in listed if f"/{key}".endswith("/zarr.json")}
    found: dict[str, list[str]] = defaultdict(list)
    for key in listed:
        parts = key.split("/")
        for depth in range(min(len(parts), DEPTH + 1)):
            if "/".join(parts[:depth]) in folders:
                found["/".join(parts[:depth]) or "."].append("/".join(parts[depth:]))
                break
    return found


def _fetch(place: Place, path: str, keys: Iterable[str], folder: Path) -> None:
    """Fetch the records of a store to a folder, and make the folders of its views, so that those without a seal are seen."""
    if path != "." and any(part in ("", ".", "..") for part in path.split("/")):
        raise StoreCorrupt(f"{place.url}: {path!r} leads out of it; not a store of hdcache")
    folder.mkdir(parents=True, exist_ok=True)
    wanted: list[str] = []
    views: set[str] = set()
    for key in keys:
        checked_key(key, f"{place.url}/{path}")
        parts = key.split("/")
        if parts[0] == "teachers" and len(parts) > 4 and parts[2] == "views":
            views.add("/".join(parts[:4]))
        if _RECORD.fullmatch(key):
            wanted.append(key)
    if max(len(wanted), len(views)) > RECORD_COUNT:
        raise StoreCorrupt(f"{place.url}: more than {RECORD_COUNT:,} records; 'hdcache pull' copies the store")
    for view in views:
        (folder / view).mkdir(parents=True, exist_ok=True)
    lock, left = threading.Lock(), STORE_BYTES

    def fetch(key: str) -> None:
        nonlocal left
        data = place.read(key if path == "." else f"{path}/{key}", min(RECORD_BYTES, left))
        if data is not None:
            with lock:
                left -= len(data)
            if left < 0:
                raise StoreCorrupt(f"{place.url}: records of more than {STORE_BYTES >> 30} GiB; not a store of hdcache")
            target = folder / key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

    with ThreadPoolExecutor(TOGETHER) as pool:
        for _ in pool.map(fetch, wanted):
            pass
