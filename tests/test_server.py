"""The server over real sockets: bytes, ranges, headers, and that nothing but the files of stores is reached."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hdcache.cli import cli
from hdcache.errors import UsageError
from hdcache.index import write_index
from hdcache.sharing.catalogue import Catalogue
from hdcache.sharing.server import SECURITY, Server, is_loopback, make_server
from hdcache.store import Store

Answer = tuple[int, dict[str, str], bytes]
KEY = "teachers/t/views/0/manifest.json"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers that end with the test."""
    stop, threads = threading.Event(), []

    def start(root: Path, host: str = "127.0.0.1") -> Server:
        server = make_server(Catalogue(root), host, 0)
        threads.append(threading.Thread(target=server.run, args=(stop.is_set,)))
        threads[-1].start()
        return server

    yield start
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def server(serve: Callable[..., Server], sealed_store: Path) -> Server:
    """A server of a folder with the store ``store``, and with things beside it that nobody may read."""
    root = sealed_store.parent
    (root / "secret.txt").write_text("secret")
    (root / "c.0").write_text("secret")
    (root / "not-a-store").mkdir()
    (root / "not-a-store" / "zarr.json").write_text("{}")
    return serve(root)


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_every_file_of_a_store_is_served_byte_for_byte(server: Server, sealed_store: Path) -> None:
    files = [path for path in sealed_store.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert len(files) > 20
    for path in files:
        status, headers, body = ask(server, f"/store/{path.relative_to(sealed_store).as_posix()}")
        assert (status, body) == (200, path.read_bytes())
        assert int(headers["Content-Length"]) == len(body)
        assert headers["Accept-Ranges"] == "bytes"
        assert {name: headers[name] for name in SECURITY} == SECURITY


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("bytes=0-0", (0, 1)), ("bytes=3-9", (3, 10)), ("bytes=5-", (5, None)), ("bytes=-4", (-4, None)),
        ("bytes=0-999999999", (0, None)), ("bytes=-999999999", (0, None)),
    ],
)  # fmt: skip
def test_a_range_is_answered_with_its_bytes(
    server: Server, sealed_store: Path, asked: str, expected: tuple[int, int | None]
) -> None:
    whole = (sealed_store / KEY).read_bytes()
    status, headers, body = ask(server, f"/store/{KEY}", Range=asked)
    first, stop = expected
    wanted = whole[first:stop]
    begin = len(whole) + first if first < 0 else first
    assert (status, body) == (206, wanted)
    assert headers["Content-Range"] == f"bytes {begin}-{begin + len(wanted) - 1}/{len(whole)}"
    assert int(headers["Content-Length"]) == len(wanted)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(first=st.integers(0, 400), length=st.integers(1, 400))
def test_any_range_is_the_slice_that_it_names(server: Server, sealed_store: Path, first: int, length: int) -> None:
    whole = (sealed_store / "zarr.json").read_bytes()
    status, headers, body = ask(server, "/store/zarr.json", Range=f"bytes={first}-{first + length - 1}")
    if first >= len(whole):
        assert (status, headers["Content-Range"]) == (416, f"bytes */{len(whole)}")
    else:
        assert (status, body) == (206, whole[first : first + length])


@pytest.mark.parametrize("asked", ["bytes=9-3", "bytes=a-b", "items=0-1", "bytes=0-1,4-5", "bytes=-", "0-5"])
def test_what_is_no_single_range_is_answered_whole(server: Server, sealed_store: Path, asked: str) -> None:
    status, headers, body = ask(server, f"/store/{KEY}", Range=asked)
    assert (status, body) == (200, (sealed_store / KEY).read_bytes())
    assert "Content-Range" not in headers


def test_ranges_beyond_the_end_are_refused(server: Server, sealed_store: Path) -> None:
    count = (sealed_store / KEY).stat().st_size
    for asked in (f"bytes={count}-", "bytes=-0"):
        status, headers, _ = ask(server, f"/store/{KEY}", Range=asked)
        assert (status, headers["Content-Range"]) == (416, f"bytes */{count}")


def test_an_object_that_changed_is_not_joined_from_two(server: Server, sealed_store: Path) -> None:
    """If-Range with another tag gives the whole; If-None-Match with the same tag gives nothing."""
    _, headers, whole = ask(server, f"/store/{KEY}")
    assert ask(server, f"/store/{KEY}", Range="bytes=5-", If_Range=headers["ETag"])[0] == 206
    assert ask(server, f"/store/{KEY}", Range="bytes=5-", If_Range='"other"')[::2] == (200, whole)
    assert ask(server, f"/store/{KEY}", If_None_Match=headers["ETag"])[::2] == (304, b"")
    (sealed_store / KEY).write_bytes(whole + b" ")
    status, changed, _ = ask(server, f"/store/{KEY}", If_None_Match=headers["ETag"])
    assert status == 200
    assert changed["ETag"] != headers["ETag"]


def test_an_empty_file_is_served(server: Server, sealed_store: Path) -> None:
    (sealed_store / "samples" / "c.0").write_bytes(b"")
    assert ask(server, "/store/samples/c.0")[::2] == (200, b"")
    assert ask(server, "/store/samples/c.0", Range="bytes=0-")[0] == 416


def test_head_says_the_same_without_a_body(server: Server) -> None:
    for path in (f"/store/{KEY}", "/", "/catalog.json", "/store/missing"):
        got, got_headers, body = ask(server, path)
        head, head_headers, nothing = ask(server, path, "HEAD")
        assert (head, nothing) == (got, b"")
        assert int(head_headers["Content-Length"]) == int(got_headers["Content-Length"]) == len(body)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND", "BREW"])
def test_nothing_can_be_written(
    server: Server, sealed_store: Path, tree: Callable[[Path], object], method: str
) -> None:
    before = tree(sealed_store)
    status, headers, _ = ask(server, f"/store/{KEY}", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert tree(sealed_store) == before


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt", "/c.0", "/store/../secret.txt", "/store/%2e%2e/secret.txt", "/..%2fstore/zarr.json", "/%2e%2e/etc/passwd",
        "//etc/passwd", "/store//zarr.json", "/store/./zarr.json", "/store/samples/%00c.0", "/store/samples\\c.0",
        "/not-a-store/zarr.json", "/store", "/store/", "/store/samples", "/store/samples/", "/store/.lock", "/store/.t.lock",
        "/store/.t.owner", "/store/.c.0.1-2.partial", "/store/samples/notes.txt", "/store/missing.json", "/assets/pages.py",
        "/assets/base.html", "/assets/../pages.py", "/view/nowhere", "/view/../store", "/look/row/nowhere?view=0&row=0",
        "/look/other/store", "/store/teachers/t/views/0/receipts/../manifest.json",
    ],
)  # fmt: skip
def test_nothing_else_is_reached(server: Server, sealed_store: Path, path: str) -> None:
    for name in (".lock", ".t.lock", ".t.owner", ".c.0.1-2.partial", "samples/notes.txt"):
        (sealed_store / name).write_text("secret")
    status, _, body = ask(server, path)
    assert status == 404
    assert b"secret" not in body


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    parts=st.lists(
        st.sampled_from(
            ["store", "..", ".", "", "samples", "zarr.json", "secret.txt", "c.0", "%2e%2e", "%2f", "etc", "\\", "~"]
        ),
        min_size=1,
        max_size=7,
    )
)
def test_no_address_gives_a_file_that_is_not_the_stores(server: Server, sealed_store: Path, parts: list[str]) -> None:
    status, headers, body = ask(server, "/" + "/".join(parts))
    assert b"secret" not in body
    if status == 200 and headers["Content-Type"] == "application/octet-stream":
        assert parts[0] == "store"


def test_a_store_is_pulled_from_it_byte_for_byte(
    server: Server, sealed_store: Path, tmp_path: Path, tree: Callable[[Path], object]
) -> None:
    pytest.importorskip("obstore")
    write_index(Store.open(sealed_store))
    result = CliRunner().invoke(cli, ["pull", f"{server.url}/store", str(tmp_path / "copy"), "-q"])
    assert result.exit_code == 0, result.output
    assert tree(tmp_path / "copy") == tree(sealed_store)


def test_links_lead_nowhere(server: Server, sealed_store: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "c.0").write_text("secret")
    shutil.copy(sealed_store / "zarr.json", outside / "zarr.json")
    os.symlink(outside / "c.0", sealed_store / "samples" / "c.0")
    os.symlink(outside, sealed_store / "samples" / "linked")
    os.symlink(outside, sealed_store.parent / "linked")
    os.symlink(sealed_store / "zarr.json", sealed_store / "samples" / "c.1")
    for path in (
        "store/samples/c.0",
        "store/samples/linked/c.0",
        "linked/zarr.json",
        "store/samples/c.1",
        "view/linked",
    ):
        assert ask(server, f"/{path}")[0] == 404
    os.mkfifo(sealed_store / "samples" / "c.2")
    assert ask(server, "/store/samples/c.2")[0] == 404


def test_a_link_that_is_put_there_meanwhile_leads_nowhere(
    server: Server, sealed_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each came right after addresses were looked at."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "c.0").write_text("secret")
    os.symlink(tmp_path / "outside", sealed_store / "samples" / "linked")
    os.symlink(tmp_path / "outside" / "c.0", sealed_store / "samples" / "c.0")
    monkeypatch.setattr(os.path, "realpath", lambda path, **more: os.fspath(path))
    for path in ("samples/linked/c.0", "samples/c.0"):
        status, _, body = ask(server, f"/store/{path}")
        assert (status, b"secret" in body) == (404, False)
    assert ask(server, f"/store/{KEY}")[0] == 200


def test_another_name_of_this_machine_is_refused(server: Server) -> None:
    """A page elsewhere whose name was made to point here must not read what is here."""
    for host in ("evil.example", "evil.example:8008", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1"):
        for path in ("/", f"/store/{KEY}"):
            status, _, body = ask(server, path, Host=host)
            assert (status, b"open it as localhost" in body) == (421, True)
    for host in ("localhost", "LOCALHOST:9000", "127.0.0.1", "127.0.0.2:1", "[::1]:8008"):
        assert ask(server, "/", Host=host)[0] == 200
    for host in ("", "a b", "localhost/x", "user@localhost"):
        assert ask(server, "/", Host=host)[0] == 400


def test_a_name_of_this_machine_in_the_network_is_allowed_when_it_is_bound_to_all(
    serve: Callable[..., Server], sealed_store: Path
) -> None:
    server = serve(sealed_store.parent, "0.0.0.0")
    assert not server.local
    status, _, body = ask(server, "/view/store", Host="teachers.lab:8008")
    assert status == 200
    assert b"hdcache pull http://teachers.lab:8008/store store" in body


def raw(server: Server, data: bytes) -> bytes:
    """What comes back for these bytes."""
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_a_connection_is_used_again_and_a_body_is_never_a_request(server: Server) -> None:
    two = b"GET /catalog.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2
    assert raw(server, two).count(b"HTTP/1.1 200") == 2
    inner = b"GET /secret.txt HTTP/1.1\r\nHost: localhost\r\n\r\n"
    smuggled = b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(inner), inner)
    assert raw(server, smuggled).count(b"HTTP/1.1") == 1
    twice = smuggled.replace(b"Content-Length", b"Content-Length: 0\r\nContent-Length", 1)
    assert raw(server, twice).count(b"HTTP/1.1") == 1
    posted = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(inner), inner)
    assert raw(server, posted).count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "data", [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\xff\r\n\r\n", b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n"]
)  # fmt: skip
def test_what_is_no_request_ends_the_connection_alone(server: Server, data: bytes) -> None:
    raw(server, data)
    assert ask(server, "/")[0] == 200


def test_a_file_that_became_shorter_ends_before_its_length(
    server: Server, sealed_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte is made up, and the next answer is not taken for the rest of this one."""
    sent = socket.socket.sendfile

    def cut(self: socket.socket, file: object, offset: int = 0, count: int | None = None) -> int:
        return sent(self, file, offset, (count or 0) // 2)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "sendfile", cut)
    with pytest.raises(http.client.IncompleteRead):
        ask(server, f"/store/{KEY}")


def test_the_catalogue_is_served_for_programs(server: Server) -> None:
    status, headers, body = ask(server, "/catalog.json")
    found = json.loads(body)
    assert (status, headers["Content-Type"], found["format"]) == (200, "application/json", 1)
    assert [(store["path"], store["sealed"]) for store in found["stores"]] == [("store", True)]


def test_a_store_that_is_the_root_is_served_too(serve: Callable[..., Server], sealed_store: Path) -> None:
    server = serve(sealed_store)
    assert ask(server, "/zarr.json")[2] == (sealed_store / "zarr.json").read_bytes()
    assert ask(server, f"/{KEY}")[0] == 200
    assert b"<h1>store</h1>" in ask(server, "/view/")[2]


def test_names_with_every_letter_are_reached(serve: Callable[..., Server], sealed_store: Path) -> None:
    name = "é #?%<b>&'\" ü"
    sealed_store.rename(sealed_store.parent / name)
    server = serve(sealed_store.parent)
    page = ask(server, "/")[2].decode()
    assert f'href="/view/{quote(name)}"' in page
    assert "<b>" not in page.replace("<b>hdcache", "")
    assert ask(server, f"/view/{quote(name)}")[0] == 200
    assert ask(server, f"/{quote(name)}/zarr.json")[0] == 200


def test_faults_of_a_look_are_said_as_json(server: Server) -> None:
    for query, status in (
        ("view=0&row=x", 400),
        ("view=0&row=99&teacher=t&tap=final", 400),
        ("view=0&row=0&teacher=nobody", 404),
    ):
        got, headers, body = ask(server, f"/look/row/store?{query}")
        assert (got, headers["Content-Type"]) == (status, "application/json")
        assert json.loads(body)["error"]


def test_a_look_is_answered(server: Server) -> None:
    found = json.loads(ask(server, "/look/row/store?view=0&row=3&teacher=t&tap=final")[2])
    assert found["map"].startswith("data:image/png;base64,")
    relation = json.loads(
        ask(server, "/look/relation/store?view=0&row=3&teacher=t&tap=final&token=4&kind=cosine&head=mean")[2]
    )
    assert relation["values"][4] == pytest.approx(1, abs=1e-5)
    assert json.loads(ask(server, "/look/image/store?view=0&row=3")[2])["why"]


def test_texts_of_a_look_change_nothing_beside_them(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample's name or a reason may hold what turns the direction of writing."""
    from hdcache.sharing.look import Look

    monkeypatch.setattr(Look, "image", lambda *asked: {"image": "", "why": "\u202egpj.a\x1b"})
    assert json.loads(ask(server, "/look/image/store?view=0&row=3")[2])["why"] == r"\u202egpj.a\x1b"


def test_an_unforeseen_fault_is_an_answer_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(server.site, "answer", fail)
    status, _, body = ask(server, "/")
    assert (status, b"unforeseen" in body) == (500, False)


def test_people_get_a_page_and_programs_a_line(server: Server) -> None:
    assert ask(server, "/nowhere", Accept="text/html")[2].startswith(b"<!doctype html>")
    assert ask(server, "/nowhere")[2] == b"404 Not Found: there is nothing at this address\n"


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True), ("0.0.0.0", False), ("::", False), ("lab", False)],
)  # fmt: skip
def test_which_addresses_are_this_machine_alone(host: str, local: bool) -> None:
    assert is_loopback(host) == local


def test_a_taken_port_is_refused_with_the_way_out(server: Server, sealed_store: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be had \(Address already in use\); choose another --port"):
        make_server(Catalogue(sealed_store), "127.0.0.1", server.server_address[1])


def test_originals_are_shown_when_asked_for(sealed_store: Path) -> None:
    """Where a store says its data lies, anybody can have written."""
    for more, expected in (({}, False), ({"originals": True}, True), ({"originals": False}, False)):
        server = make_server(Catalogue(sealed_store), "127.0.0.1", 0, **more)
        server.server_close()
        assert server.site._originals is expected


def test_of_two_hosts_none_is_taken(server: Server) -> None:
    two = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert raw(server, two).startswith(b"HTTP/1.1 400")
    assert raw(server, two.replace(b"evil.example", b"localhost")).startswith(b"HTTP/1.1 400")


def test_pages_of_other_sites_cannot_give_it_work(server: Server) -> None:
    """They may lead here, and load nothing from here."""
    look = "/look/row/store?view=0&row=3&teacher=t&tap=final"
    assert ask(server, look, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
    assert ask(server, f"/store/{KEY}", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="cors")[0] == 403
    assert ask(server, "/view/store", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
    for site in ("same-origin", "none"):
        assert ask(server, look, Sec_Fetch_Site=site, Sec_Fetch_Mode="cors")[0] == 200


def test_every_answer_may_load_and_run_nothing_else(server: Server) -> None:
    """Pages, files, JSON, errors, and what is said to a request that is none."""
    assert SECURITY["Content-Security-Policy"].startswith("default-src 'none'")
    for path in (
        "/",
        "/view/store",
        "/assets/page.js",
        "/catalog.json",
        f"/store/{KEY}",
        "/nowhere",
        "/look/row/x?view=0&row=0",
    ):
        _, headers, _ = ask(server, path, Accept="text/html")
        assert {name: headers[name] for name in SECURITY} == SECURITY
    assert b"Content-Security-Policy: default-src 'none'" in raw(server, b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n")


def test_an_address_in_a_page_stays_text(server: Server) -> None:
    evil = quote('"><script>alert(1)</script>')
    for path in (
        f"/{evil}",
        f"/view/{evil}",
        f"/?q={evil}",
        f"/look/row/{evil}?view=0&row=0",
        f"/look/row/store?view={evil}&row=0",
    ):
        _, headers, body = ask(server, path, Accept="text/html")
        assert b"<script>alert" not in body or headers["Content-Type"] == "application/json"
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_names_that_are_no_text_stop_no_page(server: Server, sealed_store: Path) -> None:
    """A folder's name that is not UTF-8, and a record that holds half a letter."""
    (sealed_store / "about.json").write_text(
        json.dumps({"data": "folder:/\ud800", "source": "\ud800", "written_with": {"a\ud800": "b\ud800"}})
    )
    os.rename(
        shutil.copytree(sealed_store, sealed_store.parent / "copy"), os.fsencode(sealed_store.parent) + b"/c\xffpy"
    )
    for path in ("/", "/?q=folder", "/catalog.json", "/view/store", "/?q=%ff", "/view/c%ffpy", "/view/c%EDB3%BFpy"):
        status, _, body = ask(server, path)
        assert status in ((200,) if "view/c" not in path else (400, 404)), path
        body.decode()
    found = json.loads(ask(server, "/catalog.json")[2])
    assert [store["path"] for store in found["stores"]] == ["c\\udcffpy", "store"]


@pytest.mark.parametrize("address", ["/store/samples/%00/zarr.json", "/%00", "/a%0ab/zarr.json"])
def test_an_address_of_control_characters_is_answered(address: str, server: Server) -> None:
    assert ask(server, address)[0] == 404


def test_the_command_serves_until_it_is_told_to_stop(sealed_store: Path, python: Callable[..., object]) -> None:
    import signal

    process = python("import sys; from hdcache.cli import main; main(sys.argv[1:])", "serve", sealed_store, "--port", 0)
    line = process.stdout.readline()  # type: ignore[attr-defined]
    port = int(line.split()[0].rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/zarr.json")
    assert connection.getresponse().read() == (sealed_store / "zarr.json").read_bytes()
    connection.close()
    process.send_signal(signal.SIGINT)  # type: ignore[attr-defined]
    rest = process.communicate(timeout=20)[0]  # type: ignore[attr-defined]
    assert process.returncode == 0, rest  # type: ignore[attr-defined]
    assert "Traceback" not in rest


def test_who_opens_it_to_the_network_is_warned(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "run", lambda self, stopped: self.server_close())
    result = CliRunner().invoke(cli, ["serve", str(sealed_store), "--host", "0.0.0.0", "--port", "0"])
    assert result.exit_code == 0
    assert "WARNING: whoever reaches http://0.0.0.0:" in result.stderr
    quiet = CliRunner().invoke(cli, ["serve", str(sealed_store), "--port", "0", "--json"])
    assert "WARNING" not in quiet.stderr
    assert json.loads(quiet.stdout)["url"].startswith("http://127.0.0.1:")
