"""What the tests of push and pull share: a store with two views, two teachers and samples; a web server with faults; a bucket."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import numpy as np
import pytest

from hdcache.index import write_index
from hdcache.ledgers import Ledger, teacher_ledger, view_ledger
from hdcache.row_arrays import codec_of
from hdcache.schema import ArrayCard
from hdcache.store import PIXELS, Store
from small_store import ROWS, make_tap, numbers, write_ledger, write_record, write_sealed

Server = TypeVar("Server", bound="FaultyServer")
SECRET = "wJalrXUtnFEMIsecretK7MDENG"
KEY = "AKIATESTONLYKEY00000"


def write_teacher(store: Store, name: str, views: tuple[int, ...], **encodings: str) -> None:
    """Teacher ``name`` with taps ``TAP=ENCODING`` (``_`` for ``.``), sealed for ``views``."""
    taps = {view: [make_tap(tap.replace("_", ".", 1), kind, view) for tap, kind in encodings.items()] for view in views}
    record = write_record(store, name, taps[views[0]])
    static = {f"teachers/{name}/{key}": value for key, value in record.objects.items()}
    for view in views:
        rows = {
            f"{tap.card.tap}/{part}": (tap.card.arrays[part], codec_of(tap.card, part), value)
            for tap in taps[view]
            for part, value in tap.parts.items()
        }
        ledger = teacher_ledger(store, name, view)
        write_ledger(ledger, rows, static, teacher=name, identity=record.identity_digest(), view=view)


def write_travelling(root: Path) -> Path:
    """The small sealed store, with a second view, a second teacher ``u`` of two views, and something for samples."""
    write_sealed(root)
    store = Store.open(root)
    geometry = np.tile(np.array([0, 0, 0, 4, 4, 0, 4, 4], np.int32), (ROWS, 1))
    geometry[:, 0] = np.arange(ROWS)[::-1]
    arrays = {"geometry": (ArrayCard(shape=(8,), dtype="int32"), None, geometry)}
    write_ledger(view_ledger(store, 1), arrays, teacher="", identity="", view=1)
    write_teacher(store, "u", (0, 1), block2_out="int8", final="fp16")
    kept = {"digest": (ArrayCard(shape=(32,), dtype="uint8"), None, numbers("uint8", ROWS, 32, key="kept"))}
    write_ledger(Ledger(root, PIXELS), kept, teacher="", identity="", view=0)
    write_index(store)
    return root


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file below a folder but locks: relative path -> bytes."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in files
        if not path.name.endswith((".lock", ".owner", ".lease"))
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: else each answer waits for the acknowledgement of the first
    disable_nagle_algorithm = True
    server: FaultyServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        key = unquote(self.path).split("/", 2)[2]
        asked = self.headers.get("Range")
        fault = self.server.fault(key, asked)
        path = self.server.root / key
        if fault == "reset":
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            return
        if not fault.isdigit() and not path.is_file():
            fault = "404"
        if fault.isdigit():
            self._send(int(fault), b"<html>no</html>" if self.command == "GET" else b"")
            return
        body, start = path.read_bytes(), 0
        whole = len(body)
        if fault == "html":
            self._send(200, b"<!doctype html><html>log in</html>", {"Content-Type": "text/html; charset=utf-8"})
            return
        if fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif fault == "short":
            body = body[:-1]
        elif fault == "long":
            body += b"x" * (1 << 20)
        elif fault == "slow":
            time.sleep(0.1)
        headers, status = {}, 200
        if asked and fault != "norange":
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers, status = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}, 206
        if fault == "nolength":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            return
        self._send(status, body[start:], headers, cut=fault in ("cut", "cutnorange") and whole > 1)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder under ``/s/`` with Range; ``faults[key]`` are those of the next requests for a key, one each."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.url = root, f"http://127.0.0.1:{self.server_port}/s"
        self.faults: dict[str, list[str]] = {}
        self.every = ""
        """The fault of every first request for a key."""
        self.asked: list[tuple[str, str | None]] = []
        self._lock = threading.Lock()

    def fault(self, key: str, ranged: str | None) -> str:
        with self._lock:
            first = not any(key == before for before, _ in self.asked)
            self.asked.append((key, ranged))
            left = self.faults.get(key)
            return left.pop(0) if left else self.every if first else ""

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are no news."""


@contextmanager
def web_server(root: Path, kind: type[Server] = FaultyServer) -> Iterator[Server]:  # type: ignore[assignment]
    """A web server on a free port of this machine."""
    server = kind(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def bucket_server(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server with the bucket ``team``; its URL. The environment has an endpoint and credentials, as a user's would."""
    pytest.importorskip("obstore")
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    given = {"ENDPOINT_URL": url, "ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET, "REGION": "us-east-1"}
    for name, value in given.items():
        patch.setenv(f"AWS_{name}", value)
    for name in ("team", "other"):
        urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT")).close()
    try:
        yield url
    finally:
        urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
        server.stop()
