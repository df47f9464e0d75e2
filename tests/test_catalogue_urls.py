"""The catalogue of a server, of a plain web server and of a bucket says what that of the folder says."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import sys
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
from hdcache.sharing import catalogue_urls as module
from hdcache.sharing.catalogue import Catalogue
from hdcache.sharing.catalogue_entries import StoreEntry
from hdcache.sharing.catalogue_urls import _described, _stores, _walked, read_catalogue
from hdcache.sharing.folder import Folder
from hdcache.sharing.objects import Found
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


def test_a_path_that_leads_elsewhere_is_a_fault_and_writes_nothing(stores: Path) -> None:
    for path in ("../evil", "a//b", "/evil"):
        (found,) = _described(Folder(stores), [f"{path}/zarr.json"])
        assert "leads out of it" in found.fault
    assert not (stores.parent / "evil").exists()
    assert not Path("/evil").exists()


def refused(store: dict[str, Any]) -> bytes:
    return json.dumps({"format": 1, "stores": [{"path": "a"} | store]}).encode()


HOSTILE = [
    (b"[" * 400_000, "not valid JSON"), (b'{"stores": ' + b"[" * 500_000, "more than 450,000 entries"),
    (b'{"stores": [' + b'{"path": "a"},' * 10_000 + b'{"path": "a"}]}', "10,001 stores, a catalogue has 10,000 at most"),
    (b'{"stores": [' + b"1," * 2_000_000 + b"1]}", "more than 450,000 entries"), (b'{"stores": [], "stores": []}', "not valid JSON"),
    (b"[]", "no catalogue: record"), (b"\xff\xfe", "not valid JSON"), (b'{"stores": {"a": 1}}', "no catalogue: stores"),
    (b'{"stores": [{"path": "a", "bytes": %s}]}' % (b"9" * 5000), "not valid JSON"), (b'{"stores": [{"path": "a", "bytes": NaN}]}', "not valid JSON"),
    (refused({"bytes": 10**30}), "no catalogue: stores.0.bytes"), (refused({"samples": -1}), "no catalogue: stores.0.samples"),
    (refused({"noun": ["x"]}), "no catalogue: stores.0.noun"),
    (refused({"teachers": [{"name": "t", "taps": [{"tap": "f", "encoding": "e", "certificate": {"kl": 1e308}, "bytes": "\x1b[2J"}]}]}), "no catalogue: stores.0.teachers.0.taps.0.bytes"),
    (b'{"stores": [{"path": "a", "written_with": {"a": "b"}, "teachers": [{"name": "t", "taps": [{"tap": "f", "encoding": "e", "certificate": {"kl": 1e999}}]}]}]}', "no catalogue: stores.0.teachers.0.taps.0.certificate.kl"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_catalogue_is_refused_in_a_line(data: bytes, message: str, plain_server: str, tmp_path: Path) -> None:
    (tmp_path / "catalog.json").write_bytes(data)
    result = CliRunner().invoke(cli, ["catalog", plain_server])
    assert isinstance(result.exception, StoreCorrupt)
    assert message in str(result.exception)
    assert len(str(result.exception)) < 500
    assert str(result.exception).isprintable()


def test_names_of_a_hostile_catalogue_reach_no_terminal(plain_server: str, tmp_path: Path) -> None:
    evil = "\x1b[2J\x07\u202e\r\n<b>"
    teacher = {"name": evil, "licence": evil, "architecture": evil, "taps": [{"tap": evil, "encoding": evil}]}
    store = {"path": evil, "noun": evil, "made_by": evil, "id": evil, "teachers": [teacher]}
    (tmp_path / "catalog.json").write_text(json.dumps({"stores": [store, {"path": evil, "fault": evil}]}))
    result = CliRunner().invoke(cli, ["catalog", plain_server])
    assert result.exit_code == 0
    assert result.stdout.replace("\n", "").isprintable()


def test_a_catalogue_without_end_is_given_up_in_little_memory() -> None:
    """A server that never stops sending, and one that sends as much as may be, each read by a process of its own."""

    class Endless(Quiet):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(int(self.path.split("/")[1])))
            self.end_headers()
            part = b'{"stores": [' + b" " * (1 << 20)
            try:
                for _ in range(80):
                    self.wfile.write(part)
                    part = b'"%s",' % (b"x" * 500) * 2000
            except OSError:
                pass

    code = (
        "import resource, sys, time\n"
        "from hdcache.errors import HdcacheError\n"
        "from hdcache.sharing.catalogue_urls import read_catalogue\n"
        "base, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()\n"
        "try: read_catalogue(sys.argv[1])\n"
        "except HdcacheError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base, time.monotonic() - before)\n"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            for count, message in ((1 << 40, "bytes, a record has 67108864 at most"), (60 << 20, "not valid JSON")):
                url = f"http://127.0.0.1:{server.server_address[1]}/{count}"
                done = subprocess.run(
                    [sys.executable, "-c", code, url], capture_output=True, text=True, timeout=120, check=True
                )
                *said, measured = done.stdout.splitlines()
                assert message in said[0]
                assert int(measured.split()[0]) < 500_000, "KiB"
        finally:
            server.shutdown()
            thread.join()


def test_an_index_of_more_than_a_store_has_is_refused(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, keys = Folder(stores), ["store/zarr.json", *(f"store/views/{view}/manifest.json" for view in range(5))]
    monkeypatch.setattr(module, "RECORD_COUNT", 5)
    assert "more than 5 records" in _described(place, keys)[0].fault
    begun = ["store/zarr.json", *(f"store/teachers/t/views/{view}/receipts/0.json" for view in range(6))]
    assert "more than 5 records" in _described(place, begun)[0].fault
    monkeypatch.undo()
    monkeypatch.setattr(module, "STORE_BYTES", 100)
    assert "a record has 100 at most" in _described(place, keys)[0].fault
    monkeypatch.setattr(module, "STORES", 1)
    with pytest.raises(StoreCorrupt, match="2 stores; give the URL of a folder with 1 at most"):
        _described(place, ["a/zarr.json", "b/zarr.json"])


def test_names_that_no_folder_can_have_are_a_fault(stores: Path) -> None:
    (found,) = _described(Folder(stores), ["store/zarr.json", f"store/teachers/{'x' * 300}/views/0/receipts/0.json"])
    assert found.fault == "its objects have names that no store has (File name too long)"


def test_a_part_of_a_copy_on_a_plain_server_is_described_as_one(stores: Path, plain_server: str) -> None:
    (stores / "store/teachers/t/held.json").write_text('{"taps":["final"]}')
    (found,) = read_catalogue(f"{plain_server}/store")
    assert found.teachers[0].held == ("final",)
    assert found == Catalogue(stores / "store").entries()[0]


def test_no_shard_of_a_bucket_is_listed(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stores / "store/teachers/t/held.json").write_text('{"taps":["final"]}')
    asked = []

    class Counted(Folder):
        def listing(self, folder: str = "") -> dict[str, Found]:
            raise AssertionError(folder)

        def folders(self, folder: str = "") -> list[str]:
            asked.append(folder)
            return super().folders(folder)

    place = Counted(stores)
    assert _described(place, _walked(place)) == Catalogue(stores).entries()
    below = [folder for folder in asked if folder.startswith("store")]
    assert below == ["store/views", "store/teachers", "store/teachers/t/views"]
