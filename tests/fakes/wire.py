"""Read and write HTTP/1.1 by hand, so that a test's server can misbehave.

A `Door` is one listening port with its own faults. The server behind it (the fake API server, or
the proxy before a real one) sees a `Request`, answers with a `Reply`, and knows nothing of faults.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

if TYPE_CHECKING:
    from tests.fakes.faults import Faults

PHRASES = {200: "OK", 201: "Created", 404: "Not Found", 409: "Conflict", 429: "Too Many Requests"}
JSON = {"Content-Type": "application/json"}
DOWN = (
    'Internal error occurred: failed calling webhook "mjob.kb.io": failed to call webhook: Post'
    ' "https://127.0.0.1:9443/mutate-batch-v1-job?timeout=10s": connect: connection refused'
)

CONTENTION = (
    'Operation cannot be fulfilled on resourcequotas "lab": the object has been modified; please'
    " apply your changes to the latest version and try again"
)


@dataclass
class Request:
    method: str
    target: str  # as it came: path and query
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def is_write(self) -> bool:
        return self.method not in ("GET", "HEAD")


class HungUp(Exception):
    """This connection ends here."""


class Reply:
    """One answer being sent; `muted`: nothing is sent; `budget`: bytes until the cut."""

    def __init__(self, connection: socket.socket, faults: Faults, muted: bool = False) -> None:
        self.connection, self.faults, self.muted = connection, faults, muted
        self.budget: int | None = None

    def is_gone(self) -> bool:
        """Whether this server went away while the answer was under way."""
        return self.faults.is_away

    def raw(self, data: bytes) -> None:
        """Bytes as they are: a proxy's, or another protocol's."""
        self._write(b"", data)

    def send(self, status: int, body: bytes, headers: dict[str, str] = JSON) -> None:
        """A whole answer."""
        self._write(_head(status, {**headers, "Content-Length": str(len(body))}), body)

    def stream(self, status: int, headers: dict[str, str] = JSON) -> None:
        """The head of an answer whose body comes by `chunk` until `end`."""
        self._write(_head(status, {**headers, "Transfer-Encoding": "chunked"}), b"")

    def chunk(self, data: bytes) -> None:
        if data:
            self._write(b"", b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        self._write(b"", b"0\r\n\r\n")

    def _write(self, head: bytes, body: bytes) -> None:
        if self.muted:
            return
        if self.budget is not None:
            self.budget -= len(body)
            if self.budget < 0:
                self._send(head + body[: self.budget])
                raise HungUp
        self._send(head + body)

    def _send(self, data: bytes) -> None:
        try:
            self.connection.sendall(data)
        except OSError as error:
            raise HungUp from error


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {PHRASES.get(status, 'Status')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def read_request(file: BufferedIOBase) -> Request | None:
    """The next request of a connection; None where it ended."""
    try:
        words = file.readline().decode("latin-1").split()
        headers: dict[str, str] = {}
        while (line := file.readline().decode("latin-1").strip()) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if len(words) != 3:
            return None
        length = int(headers.get("content-length", 0))
        body = file.read(length) if length else b""
        if headers.get("transfer-encoding", "") == "chunked":
            body = _read_chunks(file)
        if len(body) < length:
            return None
    except (OSError, ValueError):
        return None
    parts = urlsplit(words[1])
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    return Request(words[0], words[1], unquote(parts.path), query, headers, body)


def _read_chunks(file: BufferedIOBase) -> bytes:
    body = b""
    while size := int(file.readline(), 16):
        body += file.read(size)
        file.readline()
    file.readline()
    return body


def status_body(code: int, reason: str, message: str, **details: Any) -> bytes:
    """A Kubernetes Status object that reports a failure."""
    said: dict[str, Any] = {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason,
    }  # fmt: skip
    return json.dumps({**said, **({"details": details} if details else {}), "code": code}).encode()


class Door:
    """A port on loopback; every request passes `faults` and then `handle`. Starts at once.

    `login` is the user's part of a kubeconfig for it.
    """

    def __init__(
        self,
        handle: Callable[[Request, Reply], None],
        faults: Faults,
        login: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.handle, self.faults, self.login = handle, faults, login
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        door = self

        class Handler(socketserver.StreamRequestHandler):
            disable_nagle_algorithm = True
            rbufsize = 65536

            def handle(self) -> None:
                door._serve(self.connection, self.rfile)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False
            allow_reuse_address = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not door.is_closed:  # a mistake in the handler: let it be seen in the output
                    super().handle_error(request, client_address)

        self.is_closed = False
        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    def kubeconfig(self, path: Path, namespace: str = "lab") -> Path:
        """Write a kubeconfig whose current context, "fake", leads to this port."""
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "ada", "user": self.login()}],
            "contexts": [{
                "name": "fake",
                "context": {"cluster": "fake", "user": "ada", "namespace": namespace},
            }],
        }  # fmt: skip
        path.write_text(json.dumps(config))
        return path

    def away(self) -> None:
        """Act as if the server were gone: cut open connections and refuse new ones."""
        self.faults.is_away = True
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def back(self) -> None:
        self.faults.is_away = False

    def close(self) -> None:
        self.is_closed = True
        self.away()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, connection: socket.socket, file: BufferedIOBase) -> None:
        with self._lock:
            self._open.add(connection)
        try:
            if self.faults.is_away:
                _reset(connection)
                return
            while (request := read_request(file)) is not None:
                self._answer(request, connection)
        except HungUp:
            pass
        finally:
            with self._lock:
                self._open.discard(connection)

    def _answer(self, request: Request, connection: socket.socket) -> None:
        fault = self.faults.draw(request.method, request.path)
        reply = Reply(connection, self.faults)
        match fault:
            case "refuse":
                _reset(connection)
                raise HungUp
            case "drop_before":
                raise HungUp
            case "drop_after" if request.is_write:
                self.handle(request, Reply(connection, self.faults, muted=True))
                raise HungUp
            case "drop_after":
                raise HungUp
            case "busy":
                wait = {"Retry-After": str(self.faults.retry_after_s)}
                said = b"Too many requests, please try again later.\n"
                reply.send(429, said, {"Content-Type": "text/plain; charset=utf-8", **wait})
            case "error":
                reply.send(500, status_body(500, "InternalError", DOWN))
            case "unavailable":
                said = "the server is currently unable to handle the request"
                reply.send(503, status_body(503, "ServiceUnavailable", said))
            case "contention":
                said = status_body(409, "Conflict", CONTENTION)
                reply.send(409, said)
            case _:
                if fault == "slow":
                    time.sleep(self.faults.slow_s)
                if fault == "twice" and request.is_write:
                    self.handle(request, Reply(connection, self.faults, muted=True))
                if fault == "cut":
                    reply.budget = self.faults.cut_bytes
                self.handle(request, reply)
                if fault == "cut":
                    raise HungUp
        if self.faults.is_away:
            raise HungUp


def _reset(connection: socket.socket) -> None:
    """Close so that the other side reads "connection reset"."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
