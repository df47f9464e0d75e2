"""The catalogue of a bucket or of a web server: the records of its stores are fetched, and described as those of a folder.

A bucket is listed. A web server has no listing: it has ``catalog.json``, which ``hdcache serve`` makes and a plain server
may keep (the output of ``hdcache catalog --json``), or it is the address of one store with an ``index.json``.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from hdcache.errors import InputNotFound, StoreCorrupt
from hdcache.index import INDEX, Index
from hdcache.records import first_fault
from hdcache.sharing.catalogue import CATALOGUE_FILE, DEPTH, RECORDS, Catalogue, describe
from hdcache.sharing.catalogue_entries import CatalogueRecord, StoreEntry
from hdcache.sharing.folder import Folder
from hdcache.sharing.objects import Place, checked_key
from hdcache.sharing.places import open_place

CATALOGUE_LIMIT, RECORD_LIMIT = 64 << 20, 256 << 20
"""Bytes of a catalogue, and of one record of a store, at most."""
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
        return _described(place, place.listing())
    data = place.read(CATALOGUE_FILE, CATALOGUE_LIMIT)
    if data is not None:
        try:
            return list(CatalogueRecord.model_validate_json(data).stores)
        except ValidationError as error:
            raise StoreCorrupt(f"{place.url}/{CATALOGUE_FILE}: no catalogue: {first_fault(error)}") from None
    index = place.read(INDEX, RECORD_LIMIT)
    if index is None:
        raise InputNotFound(
            f"{place.url}: has neither {CATALOGUE_FILE} nor {INDEX}; start 'hdcache serve' there, put the output of 'hdcache catalog "
            "FOLDER --json' beside the stores, or give the URL of a store"
        )
    try:
        listed = Index.parse(json.loads(index), f"{place.url}/{INDEX}").objects
    except ValueError:
        raise StoreCorrupt(f"{place.url}/{INDEX}: not valid JSON") from None
    return _described(place, [*listed, "about.json"])


def _described(place: Place, keys: Iterable[str]) -> list[StoreEntry]:
    """The stores among the objects of a place."""
    entries = []
    for path, inner in sorted(_stores(keys).items()):
        with tempfile.TemporaryDirectory(prefix="hdcache-") as scratch:
            root = Path(scratch)
            try:
                _fetch(place, path, inner, root / path)
            except StoreCorrupt as error:
                entries.append(StoreEntry(path=path, fault=str(error.args[-1])))
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
    folder.mkdir(parents=True, exist_ok=True)
    wanted = []
    for key in keys:
        checked_key(key, f"{place.url}/{path}")
        parts = key.split("/")
        if parts[0] == "teachers" and len(parts) > 4 and parts[2] == "views":
            (folder / "/".join(parts[:4])).mkdir(parents=True, exist_ok=True)
        if any(PurePosixPath(f"/{key}").match(f"/{pattern}") for pattern in RECORDS):
            wanted.append(key)

    def fetch(key: str) -> None:
        data = place.read(key if path == "." else f"{path}/{key}", RECORD_LIMIT)
        if data is not None:
            target = folder / key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

    with ThreadPoolExecutor(TOGETHER) as pool:
        for _ in pool.map(fetch, wanted):
            pass
