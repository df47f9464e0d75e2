"""The catalogue of a server, of a plain web server and of a bucket says what that of the folder says."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hdcache.cli import cli
from hdcache.durable import stored_object
from hdcache.errors import InputNotFound, StoreCorrupt
from hdcache.index import write_index
from hdcache.sharing.catalogue import Catalogue
from hdcache.sharing.catalogue_entries import StoreEntry
from hdcache.sharing.catalogue_urls import _described, _stores, read_catalogue
from hdcache.sharing.folder import Folder
from hdcache.sharing.places import open_place
from hdcache.sharing.server import make_server
from hdcache.store import Store
from travelling import bucket_server

pytest.importorskip("obstore")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A plain web server of a folder."""

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[str]:
    """The URL of a plain web server of the folder that stores are copied to."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def stores(sealed_store: Path) -> Path:
    """A folder with two stores, one of them with a view that was cut off and a broken teacher beside."""
    write_index(Store.open(sealed_store))
    other = shutil.copytree(sealed_store, sealed_store.parent / "deep" / "other")
    (other / "teachers" / "t" / "views" / "1" / "receipts").mkdir(parents=True)
    (other / "teachers" / "t" / "views" / "1" / "receipts" / "0.json").write_text("{}")
    return sealed_store.parent


def test_a_served_catalogue_is_that_of_the_folder(stores: Path) -> None:
    stop = threading.Event()
    server = make_server(Catalogue(stores), "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=(stop.is_set,))
    thread.start()
    try:
        assert read_catalogue(server.url) == Catalogue(stores).entries()
    finally:
        stop.set()
        thread.join()


def test_a_plain_server_may_keep_the_output_of_the_command(stores: Path, plain_server: str) -> None:
    result = CliRunner().invoke(cli, ["catalog", str(stores), "--json"])
    (stores / "catalog.json").write_text(result.stdout)
    assert read_catalogue(plain_server) == Catalogue(stores).entries()
    shown = CliRunner().invoke(cli, ["catalog", plain_server, "--search", "deep"])
    assert shown.stdout.startswith(f"1 store found in {plain_server}")


def test_a_store_on_a_plain_server_is_described_from_its_index(stores: Path, plain_server: str) -> None:
    (found,) = read_catalogue(f"{plain_server}/store")
    assert found == Catalogue(stores / "store").entries()[0]


def test_what_is_no_catalogue_is_refused(stores: Path, plain_server: str) -> None:
    with pytest.raises(InputNotFound, match=r"has neither catalog.json nor index.json; start 'hdcache serve' there"):
        read_catalogue(f"{plain_server}/deep")
    (stores / "catalog.json").write_text('{"stores": [{"path": 3}]}')
    with pytest.raises(StoreCorrupt, match=r"catalog.json: no catalogue: stores.0.path"):
        read_catalogue(plain_server)
    (stores / "deep" / "index.json").write_text("nothing")
    with pytest.raises(StoreCorrupt, match=r"index.json: not valid JSON"):
        read_catalogue(f"{plain_server}/deep")


def test_a_listed_place_is_described_as_the_folder_is(stores: Path) -> None:
    """Every object is listed by its key, as a bucket does."""
    place = Folder(stores)
    assert _described(place, place.listing()) == Catalogue(stores).entries()


def test_a_bucket_is_listed_as_the_folder_is(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bucket_server(monkeypatch):
        place = open_place("s3://team/stores")
        for path in (path for path in stores.rglob("*") if path.is_file() and not path.name.startswith(".")):
            data = path.read_bytes()
            place.write(path.relative_to(stores).as_posix(), stored_object(data), lambda data=data: iter([data]))
        assert read_catalogue("s3://team/stores") == Catalogue(stores).entries()


def test_a_later_version_may_say_more(stores: Path) -> None:
    facts: dict[str, Any] = json.loads(Catalogue(stores).record().model_dump_json())["stores"][0]
    assert StoreEntry.model_validate(facts | {"mood": "good"}) == Catalogue(stores).entries()[0]


def test_keys_belong_to_the_outermost_store() -> None:
    keys = ["a/zarr.json", "a/teachers/t/zarr.json", "a/b/zarr.json", "loose", "c/d/samples/c.0", "c/d/zarr.json"]
    assert _stores(keys) == {
        "a": ["zarr.json", "teachers/t/zarr.json", "b/zarr.json"],
        "c/d": ["samples/c.0", "zarr.json"],
    }
    assert _stores(["zarr.json", "samples/c.0"]) == {".": ["zarr.json", "samples/c.0"]}


def test_a_key_that_leads_elsewhere_is_a_fault_and_writes_nothing(stores: Path) -> None:
    found = _described(Folder(stores), ["store/zarr.json", "store/teachers/../../../evil/zarr.json"])
    assert "leads out of a store" in found[0].fault
    assert not (stores.parent / "evil").exists()
