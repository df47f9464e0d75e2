"""A server's connections: so many at a time, and each asks within a deadline or makes room for who does.

A connection waits, for a request's head, or is answered. Whoever holds it open in silence, or sends a head letter by
letter, is dropped after the deadline, or before when another wants in. An answer under way is never cut here, however
long it takes: who takes it has only to go on taking.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any

MOST = 64
"""Connections at a time."""
PATIENCE = 30.0
"""Seconds in which the head of a request has to come, from when the connection opened or the answer before it ended."""
_PAUSE = 0.05
"""Seconds until it is looked again whether there is room."""


class BoundedServer(ThreadingHTTPServer):
    """Answers each connection in a thread of its own, at most :data:`MOST` of them; others wait until there is room."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[Any], patience: float = PATIENCE) -> None:
        self._patience = patience
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._waiting: dict[socket.socket, float] = {}
        """Since when, the longest first."""
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks a name server who we are, which may take seconds, for a name that nothing here uses.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "hdcache", int(self.server_address[1])

    def waits(self, connection: socket.socket) -> None:
        """The head of a request is to come on it from now on."""
        with self._lock:
            if connection in self._open:
                self._waiting.pop(connection, None)
                self._waiting[connection] = time.monotonic()

    def answers(self, connection: socket.socket) -> bool:
        """The head has come and is answered now; False when it came too late."""
        with self._lock:
            return self._waiting.pop(connection, None) is not None

    def get_request(self) -> tuple[socket.socket, Any]:
        with self._lock:
            full = len(self._open) >= MOST
            if full and self._waiting:
                self._drop(next(iter(self._waiting)))
                full = False
        if full:
            time.sleep(_PAUSE)
            raise BlockingIOError("as many connections as there may be")  # it stays in the queue of the system
        connection, address = super().get_request()
        with self._lock:
            self._open.add(connection)
            self._waiting[connection] = time.monotonic()
        return connection, address

    def service_actions(self) -> None:
        """Called by the loop of :meth:`serve_forever`, some times a second."""
        with self._lock:
            late = time.monotonic() - self._patience
            for connection in [one for one, since in self._waiting.items() if since < late]:
                self._drop(connection)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
            self._waiting.pop(request, None)
        super().shutdown_request(request)

    def _drop(self, connection: socket.socket) -> None:
        """Have the thread that reads from it find its end."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)
        with contextlib.suppress(OSError):  # whoever it was has gone
            connection.shutdown(socket.SHUT_RDWR)
