"""Who holds connections open is dropped or makes room, and who only takes an answer slowly is not."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hdcache.sharing import connections
from hdcache.sharing.catalogue import Catalogue
from hdcache.sharing.server import Server, make_server

HEAD = b"GET /catalog.json HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def serve(sealed_store: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server of a store, with the patience that is given."""
    stop, threads = threading.Event(), []

    def start(patience: float = 60.0) -> Server:
        server = make_server(Catalogue(sealed_store), "127.0.0.1", 0, patience=patience)
        threads.append(threading.Thread(target=server.run, args=(stop.is_set,)))
        threads[-1].start()
        return server

    yield start
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20)


def status(server: Server, path: str = "/zarr.json") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def ended(connection: socket.socket) -> bool:
    """Whether the other side has closed it, waiting for that."""
    try:
        return connection.recv(1 << 16) == b""
    except ConnectionError:
        return True


def test_idle_connections_keep_nobody_out(serve: Callable[..., Server]) -> None:
    """More than there may be, all silent or in the middle of a head: whoever asks is answered."""
    server = serve()
    with ExitStack() as held:
        idle = [held.enter_context(connect(server)) for _ in range(100)]
        for connection in idle[::2]:
            connection.sendall(b"GET / HTTP/1.1\r\nHo")
        before = time.monotonic()
        assert [status(server) for _ in range(5)] == [200] * 5
        assert time.monotonic() - before < 10, "the patience of 60 s was not waited for"
        assert len(server._open) <= connections.MOST
        assert ended(idle[0]), "the one that was silent longest made room"


def test_a_head_that_drips_is_cut_off_and_never_answered(serve: Callable[..., Server]) -> None:
    server = serve(patience=0.5)
    with connect(server) as slow:
        slow.settimeout(0.1)
        got, before = None, time.monotonic()
        for letter in HEAD.replace(b"\r\n\r\n", b"\r\nX: ") + b"x" * 100:
            try:
                slow.sendall(bytes([letter]))
                got = slow.recv(1 << 16)
                break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert not got
        assert 0.4 < time.monotonic() - before < 10
    assert status(server) == 200


def test_a_connection_that_asks_no_more_is_closed(serve: Callable[..., Server]) -> None:
    server = serve(patience=0.5)
    with connect(server) as kept:
        for _ in range(3):
            kept.sendall(HEAD)
            answer = http.client.HTTPResponse(kept)
            answer.begin()
            assert (answer.status, len(answer.read()) > 0) == (200, True)
            time.sleep(0.3)  # each head has its own deadline
        assert ended(kept)


def test_an_answer_that_is_taken_slowly_is_given_whole(serve: Callable[..., Server], sealed_store: Path) -> None:
    """It takes longer than a head may, and others want in meanwhile."""
    data = bytes(range(256)) * (1 << 17)  # more than the buffers of a connection hold
    (sealed_store / "samples" / "c.0").write_bytes(data)
    server = serve(patience=0.3)
    with connect(server) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        slow.sendall(b"GET /samples/c.0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        got = slow.recv(1000)
        time.sleep(1)
        with ExitStack() as held:
            for _ in range(connections.MOST + 10):
                held.enter_context(connect(server))
            assert status(server) == 200
        while part := slow.recv(1 << 20):
            got += part
    assert got.partition(b"\r\n\r\n")[2] == data


def test_connections_that_are_all_answered_let_others_wait(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is cut, nobody is turned away."""
    monkeypatch.setattr(connections, "MOST", 3)
    server = serve()
    go, real = threading.Event(), server.site.answer
    monkeypatch.setattr(server.site, "answer", lambda *asked: go.wait(20) and real(*asked))
    with ExitStack() as held:
        busy = [held.enter_context(connect(server)) for _ in range(3)]
        for connection in busy:
            connection.sendall(HEAD)
        while server._waiting or len(server._open) < 3:
            time.sleep(0.01)
        with connect(server) as late:
            late.sendall(HEAD)
            late.settimeout(0.5)
            with pytest.raises(TimeoutError):
                late.recv(1)
            assert len(server._open) == 3
            go.set()
            late.settimeout(20)
            assert late.recv(12) == b"HTTP/1.1 200"
        assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in busy)


def test_connections_that_end_are_forgotten(serve: Callable[..., Server]) -> None:
    server = serve()
    assert [status(server, "/nowhere") for _ in range(3)] == [404] * 3
    with connect(server) as noise:
        noise.sendall(b"nonsense\r\n\r\n")
        while noise.recv(1 << 16):
            pass
    until = time.monotonic() + 10
    while server._open and time.monotonic() < until:
        time.sleep(0.01)
    assert (server._open, server._waiting) == (set(), {})
