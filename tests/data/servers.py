"""Servers on loopback that do what servers in the wild do wrong, by a script."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import sys
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Reply = tuple[int, Mapping[str, str], bytes]
"""Status, headers and body."""


@dataclass(frozen=True)
class Fault:
    """What is done to one response, in the middle of its body or instead of it."""

    kind: Literal["status", "reset", "stall", "truncate", "ignore range", "corrupt", "none"]
    at: int | None = None
    """Bytes of the body that are sent before; None: no header is sent either."""
    status: int = 503


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    path: str
    range: str | None
    headers: Mapping[str, str]


class FaultyServer(ThreadingHTTPServer):
    """Answers with ``reply``, spoiled by ``faults``: one for each GET, in order, then none."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply: Callable[[Request], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.faults: deque[Fault] = deque()
        self.requests: list[Request] = []
        self.stalls = threading.Semaphore(0)
        """Counts clients that are kept waiting; they wait until the server is closed."""
        self._released = threading.Event()
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def script(self, *faults: Fault) -> None:
        """Forget the past; do this from now on."""
        self.requests.clear()
        self.faults = deque(faults)

    def ranges(self) -> list[str | None]:
        return [request.range for request in self.requests]

    def stall(self) -> None:
        self.stalls.release()
        self._released.wait()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients may leave, this must not fail
            super().handle_error(request, client_address)

    def close(self) -> None:
        self._released.set()
        self.shutdown()
        self._thread.join()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_GET(self) -> None:
        headers = {name.title(): value for name, value in self.headers.items()}
        request = Request(self.path, headers.get("Range"), headers)
        self.server.requests.append(request)
        fault = self.server.faults.popleft() if self.server.faults else Fault("none")
        if fault.kind == "status":
            self._send((fault.status, {}, b"fault"))
            return
        if fault.kind == "ignore range":
            headers = {name: value for name, value in headers.items() if name != "Range"}
            request = Request(self.path, None, headers)
        breaks = fault.kind in ("reset", "stall", "truncate")
        if fault.at is not None or not breaks:
            status, sent, body = self.server.reply(request)
            if fault.kind == "corrupt":
                body = bytes(255 - byte for byte in body)
            self._send((status, sent, body), fault.at if breaks else None)
        if fault.kind == "stall":
            self.server.stall()
        if fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if breaks:
            self.close_connection = True
        if fault.kind == "reset":
            # Closing the last descriptor sends the reset; shutdown() would end it in order.
            self.rfile.close()
            self.connection.close()

    def _send(self, reply: Reply, until: int | None = None) -> None:
        status, headers, body = reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:until])
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


def files(content: Mapping[str, bytes]) -> Callable[[Request], Reply]:
    """Replies of a file server that knows ranges; ``content`` by path, query left out."""

    def reply(request: Request) -> Reply:
        body = content.get(request.path.partition("?")[0])
        if body is None:
            return 404, {}, b"none"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range or "")
        if asked is None:
            return 200, {}, body
        start, end = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
        if start >= len(body):
            return 416, {"Content-Range": f"bytes */{len(body)}"}, b""
        return 206, {"Content-Range": f"bytes {start}-{end}/{len(body)}"}, body[start : end + 1]

    return reply


def put(s3: str, content: Mapping[str, bytes]) -> None:
    """Store files in an S3 server that asks nobody who they are; the bucket is made."""
    kind = {"Content-Type": "application/octet-stream"}
    bucket = next(iter(content)).split("/")[1]
    for path, body in {f"/{bucket}": b"", **content}.items():
        request = urllib.request.Request(s3 + path, body, kind, method="PUT")
        with urllib.request.urlopen(request, timeout=60):
            pass


def forwarded(address: str) -> Callable[[Request], Reply]:
    """Replies of another server."""
    host = address.removeprefix("http://")

    def reply(request: Request) -> Reply:
        with contextlib.closing(http.client.HTTPConnection(host)) as upstream:
            upstream.request("GET", request.path, headers=dict(request.headers))
            response = upstream.getresponse()
            body = response.read()
        own = ("content-length", "connection", "transfer-encoding", "date", "server")
        kept = {k: v for k, v in response.getheaders() if k.lower() not in own}
        return response.status, kept, body

    return reply


@contextlib.contextmanager
def serving(
    reply: Callable[[Request], Reply], faults: Iterable[Fault] = ()
) -> Iterator[FaultyServer]:
    server = FaultyServer(reply)
    server.script(*faults)
    try:
        yield server
    finally:
        server.close()
