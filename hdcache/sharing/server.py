"""``hdcache serve``: the stores below a folder over HTTP, for reading only. From the standard library.

Served are the files of stores, by their path, with single Range requests; the catalogue; a page for each store. Nothing
is written, no link is followed, and no other file is reached, whatever an address says. Bound to this machine alone unless
told otherwise, it also refuses requests that a web page elsewhere made a browser send (a Host that is not this machine).
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import socket
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import BinaryIO
from urllib.parse import parse_qsl, unquote, urlsplit

from hdcache.errors import HdcacheError, UsageError
from hdcache.sharing import pages
from hdcache.sharing.catalogue import DEPTH, Catalogue
from hdcache.sharing.connections import PATIENCE, BoundedServer
from hdcache.sharing.site import Answer, Site, failure

log = logging.getLogger(__name__)
PARTS = ("samples", "views", "teachers")
"""Folders of a store."""
_FILE = re.compile(r"(zarr|about|index|croissant|held|manifest|receipt|[0-9]+)\.json|c(\.[0-9]+)*")
"""Names of a store's files: records and chunks. Locks, notes and what is being written have others."""
_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
SILENCE = 60.0
"""Seconds in which some of an answer has to be taken."""
PART = 1 << 16
"""Bytes of an answer that are sent at a time."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to ``host``."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_server(
    catalogue: Catalogue, host: str, port: int, *, originals: bool = False, patience: float = PATIENCE
) -> Server:
    """A server that is bound and not yet started; port 0 takes a free one.

    Parameters
    ----------
    originals
        whether pages may show images from where a store says its data set was: no seal covers what it says there.
    patience
        seconds in which the head of a request has to come.

    Raises
    ------
    UsageError
        when the address cannot be had.
    """
    local = is_loopback(host)
    site = Site(catalogue, originals=originals)
    try:
        return Server(host, port, site, local, patience)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{host}:{port} cannot be had ({reason}); choose another --port (0: any that is free) or --host"
        ) from None


def _opened(root: str, parts: Sequence[str]) -> int:
    """A descriptor of ``root/parts``, by way of no link, not even of one that is put there meanwhile."""
    # Not blocking: a pipe may lie there, which nobody writes to.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    if os.open not in os.supports_dir_fd:
        return os.open(os.path.join(root, *parts), flags)
    folder = os.open(root, os.O_RDONLY)
    for part in parts:
        try:
            inner = os.open(part, flags, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder


class Server(BoundedServer):
    """The pages and the files of one catalogue."""

    def __init__(self, host: str, port: int, site: Site, local: bool, patience: float = PATIENCE) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.site, self.local = site, local
        super().__init__((host, port), Handler, patience)
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
        if not isinstance(error, OSError):  # whoever asked has gone
            log.exception("a request from %s failed", client_address)

    def run(self, stopped: Callable[[], bool]) -> None:
        """Answer until ``stopped`` says so; it is asked ten times a second."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            while thread.is_alive() and not stopped():
                thread.join(0.1)
        finally:
            self.shutdown()
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection, which may ask many times."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "hdcache", ""
    disable_nagle_algorithm = True
    timeout = SILENCE

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._refuse_method
        raise AttributeError(name)

    def handle_one_request(self) -> None:
        self.server.waits(self.connection)
        super().handle_one_request()

    def parse_request(self) -> bool:
        if super().parse_request() and self.server.answers(self.connection):
            return True
        self.close_connection = True
        return False

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _refuse_method(self) -> None:
        self.close_connection = True  # what follows may be a body
        self._fail(405, "this server is only read from", {"Allow": "GET, HEAD"})

    def _answer(self) -> None:
        lengths = self.headers.get_all("Content-Length", [])
        if any(length != "0" for length in lengths) or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # its body is not read
        host = ",".join(self.headers.get_all("Host", []))  # of two, one would be checked and the other be meant
        if (fault := self._host_fault(host)) is not None:
            self._fail(*fault)
            return
        try:
            address = urlsplit(self.path)
            path = unquote(address.path, errors="strict").removeprefix("/")
            query = dict(parse_qsl(address.query, max_num_fields=20))
        except ValueError:
            self._fail(400, "the address cannot be read")
            return
        if (file := self._open(path)) is not None:
            with file:
                self._send_file(path, file)
            return
        try:
            answer = self.server.site.answer(path, query, f"http://{host}" if host else self.server.url)
        except (HdcacheError, OSError) as error:
            self._fail(*failure(error), wants_json=path.startswith("look/"))
            return
        except Exception:  # a store that nobody thought of must not end the connection without an answer
            log.exception("no answer to %r", self.path)
            self._fail(500, "this server failed; its log says how", wants_json=path.startswith("look/"))
            return
        self._send(answer)

    def _host_fault(self, host: str) -> tuple[int, str] | None:
        if not host and self.request_version == "HTTP/1.0":
            return None
        match = _HOST.fullmatch(host)
        if match is None:
            return 400, "a request needs one Host header"
        # A page elsewhere may have its own name point here, and would then be allowed to read the answers.
        if self.server.local and not is_loopback(match[1].strip("[]")):
            return 421, "this server answers requests for this machine alone; open it as localhost"
        # What another site's page asks for without its reader: it could read nothing, and must not give us work.
        if self.headers.get("Sec-Fetch-Site") == "cross-site" and self.headers.get("Sec-Fetch-Mode") != "navigate":
            return 403, "this server does not answer what pages of other sites ask for"
        return None

    # Files of stores

    def _open(self, path: str) -> BinaryIO | None:
        """The file of a store at a path; None where there is none."""
        catalogue, parts = self.server.site.catalogue, path.split("/")
        if not _FILE.fullmatch(parts[-1]) or not path.isprintable():
            return None
        for depth in range(min(len(parts), DEPTH + 1)):
            inner = parts[depth:]
            if (len(inner) == 1 or inner[0] in PARTS) and catalogue.holds("/".join(parts[:depth]) or "."):
                break
        else:
            return None
        root = os.path.realpath(catalogue.root)
        full = os.path.join(root, *parts)
        if any(not part or part.startswith(".") for part in parts) or os.path.realpath(full) != full:
            return None
        try:
            number = _opened(root, parts)
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            return None
        return open(number, "rb")

    def _send_file(self, path: str, file: BinaryIO) -> None:
        facts = os.fstat(file.fileno())
        etag = f'"{facts.st_size:x}-{facts.st_mtime_ns:x}"'
        headers = {
            "ETag": etag,
            "Last-Modified": formatdate(facts.st_mtime, usegmt=True),
            "Accept-Ranges": "bytes",
            "Cache-Control": "no-cache",
            "Content-Type": "application/json" if path.endswith(".json") else "application/octet-stream",
        }
        if etag in [given.strip().removeprefix("W/") for given in self.headers.get("If-None-Match", "").split(",")]:
            self._head(304, headers)
            return
        first, last = 0, facts.st_size - 1
        asked = _RANGE.fullmatch(self.headers.get("Range", "").strip())
        if asked is not None and self.headers.get("If-Range", etag) == etag:
            if asked[3] is not None:
                first = max(0, facts.st_size - int(asked[3]))
                empty = int(asked[3]) == 0
            else:
                first = int(asked[1])
                last = min(last, int(asked[2])) if asked[2] else last
                empty = False
            if asked[2] and int(asked[2]) < first:
                first, last, asked = 0, facts.st_size - 1, None  # no range at all
            elif empty or first >= facts.st_size:
                self._fail(416, "there are no such bytes", {"Content-Range": f"bytes */{facts.st_size}"})
                return
        else:
            asked = None
        count = last - first + 1
        if asked is not None:
            headers["Content-Range"] = f"bytes {first}-{last}/{facts.st_size}"
        self._head(200 if asked is None else 206, headers, count)
        if self.command == "HEAD" or not count:
            return
        self.wfile.flush()
        # A file that became shorter cannot be made up for: the connection ends before the length that was said.
        if self.connection.sendfile(file, first, count) != count:
            self.close_connection = True

    # Everything else

    def _send(self, answer: Answer) -> None:
        self._head(answer.status, {"Content-Type": answer.type, "Cache-Control": answer.cache}, len(answer.body))
        if self.command != "HEAD":
            # Each part has its time: together they may take as long as whoever takes them needs.
            for start in range(0, len(answer.body), PART):
                self.wfile.write(answer.body[start : start + PART])

    def _fail(
        self, status: int, message: str, headers: dict[str, str] | None = None, *, wants_json: bool = False
    ) -> None:
        reason = HTTPStatus(status).phrase
        if wants_json:
            body, kind = json.dumps({"error": message}).encode(), "application/json"
        elif "text/html" in self.headers.get("Accept", ""):
            body, kind = pages.error_page(status, reason, message), "text/html; charset=utf-8"
        else:
            body, kind = (
                f"{status} {reason}: {message}\n".encode("utf-8", "backslashreplace"),
                "text/plain; charset=utf-8",
            )
        self._head(status, {"Content-Type": kind, "Cache-Control": "no-store", **(headers or {})}, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str], count: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, **SECURITY}.items():
            self.send_header(name, value)
        if count is not None:
            self.send_header("Content-Length", str(count))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library calls for a request that is none."""
        self.close_connection = True
        body = f"{int(code)} {HTTPStatus(code).phrase}\n".encode()
        self._head(int(code), {"Content-Type": "text/plain; charset=utf-8"}, len(body))
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        # An address may hold what a terminal would obey.
        log.info("%s", "".join(letter if letter.isprintable() else "?" for letter in format % args))
