"""Inject faults between a client and an API server, fake or real.

A fault is drawn from (seed, method, path, how often that was requested before), so the order in
which threads run changes nothing. Kinds:

    refuse       the connection is reset, nothing was done
    drop_before  the connection is closed, nothing was done
    drop_after   it was done, and the connection is closed without an answer (a read is not done)
    busy         429 with Retry-After            error        500, a webhook that is down
    unavailable  503                             contention   409 about another object, a quota
    slow         the answer comes `slow_s` later
    twice        a write is done twice, the second answer is given
    cut          the answer, or the watch, ends after `cut_bytes`

The fake API server has them built in; `Proxy` adds them to a real server.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

from stillhouse.sweep.cluster.errors import Streams
from tests.fakes.wire import Door, HungUp, Reply, Request

Kind = Literal[
    "refuse", "drop_before", "drop_after", "busy", "error", "unavailable", "contention", "slow",
    "twice", "cut",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)


class Faults:
    """The faults on the way to a server; without arguments, none.

    Args:
        seed: decides which requests get a fault.
        kill_at: the number of the write at which this connection is closed for good, as if the
            writing client had been killed then.
        kill_after: that write is still done, without an answer.
        on_kill: called at that moment; a client's `stop.set`, so that its threads unwind.
        rates: kind -> probability per request; in sum at most 1.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        kill_at: int | None = None,
        kill_after: bool = False,
        on_kill: Callable[[], object] = lambda: None,
        slow_s: float = 0.02,
        cut_bytes: int = 500,
        retry_after_s: int = 0,
        **rates: float,
    ) -> None:
        unknown = sorted(set(rates) - set(KINDS))
        assert not unknown and sum(rates.values()) <= 1, f"no such fault, or too many: {unknown}"
        self.seed = seed
        self.rates: dict[Kind, float] = {kind: rates[kind] for kind in KINDS if kind in rates}
        self.kill_at, self.kill_after, self.on_kill = kill_at, kill_after, on_kill
        self.slow_s, self.cut_bytes, self.retry_after_s = slow_s, cut_bytes, retry_after_s
        self.is_away = False
        self.struck: Counter[str] = Counter()  # kind -> how often it happened
        self._asked: Counter[tuple[str, str]] = Counter()
        self._scripts: list[tuple[str, str, list[Kind]]] = []
        self._writes = 0
        self._lock = threading.Lock()

    def script(self, method: str, path_part: str, *kinds: Kind) -> None:
        """The next requests of `method` with `path_part` in their path meet these, in order."""
        with self._lock:
            self._scripts.append((method, path_part, list(kinds)))

    def draw(self, method: str, path: str) -> Kind | None:
        """What happens to this request."""
        with self._lock:
            kind = self._draw(method, path)
            if kind is not None:
                self.struck[kind] += 1
            return kind

    def _draw(self, method: str, path: str) -> Kind | None:
        if self.is_away:
            return "refuse"
        if method not in ("GET", "HEAD"):
            self._writes += 1
            if self._writes == self.kill_at:
                self.is_away = True
                self.on_kill()
                return "drop_after" if self.kill_after else "drop_before"
        for asked, part, kinds in self._scripts:
            if kinds and asked == method and part in path:
                return kinds.pop(0)
        if not self.rates:
            return None
        self._asked[method, path] += 1
        drawn = Random(f"{self.seed} {method} {path} {self._asked[method, path]}").random()
        limits = itertools.accumulate(self.rates.values())
        return next((k for k, top in zip(self.rates, limits, strict=True) if drawn < top), None)


BETWEEN_TWO = ("connection", "content-length", "host", "transfer-encoding")  # not passed on


class Proxy:
    """A proxy that adds faults to an API server: HTTP on loopback, forwarded as an administrator.

    Every client acts as the user of `kubeconfig`. Closes as a context manager.
    """

    def __init__(self, kubeconfig: Path, faults: Faults | None = None) -> None:
        from kubernetes.client import Configuration
        from kubernetes.client.rest import RESTClientObject
        from kubernetes.config import load_kube_config

        self.configuration = Configuration()
        cast(Any, load_kube_config)(str(kubeconfig), client_configuration=self.configuration)
        self.configuration.proxy = None
        self.configuration.connection_pool_maxsize = 64
        self.server = urlsplit(cast(str, self.configuration.host))
        manager = RESTClientObject(self.configuration).pool_manager
        self._pool: Any = manager.connection_from_url(self.server.geturl())
        self._streams = Streams()
        self.door = Door(self._handle, faults or Faults())

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def faults(self) -> Faults:
        return self.door.faults

    def kubeconfig(self, path: Path, namespace: str = "lab") -> Path:
        return self.door.kubeconfig(path, namespace)

    def away(self) -> None:
        self.door.away()
        self._streams.end()

    def back(self) -> None:
        self.door.back()

    def close(self) -> None:
        self.door.close()
        self._streams.end()
        self._pool.close()

    def _handle(self, request: Request, reply: Reply) -> None:
        from urllib3.exceptions import HTTPError

        headers = {k: v for k, v in request.headers.items() if k not in BETWEEN_TWO}
        token = self.configuration.get_api_key_with_prefix("BearerToken")
        headers |= {"authorization": token} if token else {}
        if "upgrade" in headers:
            return self._tunnel(request, headers, reply)
        try:
            answer = self._pool.urlopen(
                request.method, request.target, body=request.body or None, headers=headers,
                retries=False, redirect=False, preload_content=False, decode_content=False,
            )  # fmt: skip
            with self._streams.kept(answer):
                _pass_on(answer, reply)
                answer.release_conn()
        except (HTTPError, OSError) as error:
            raise HungUp from error

    def _tunnel(self, request: Request, headers: dict[str, str], reply: Reply) -> None:
        """Switch to another protocol: copy bytes both ways until one side closes."""
        port = self.server.port or 443
        there: socket.socket = socket.create_connection((self.server.hostname, port))
        if self.server.scheme == "https":
            context = ssl.create_default_context(cafile=cast(Any, self.configuration).ssl_ca_cert)
            if self.configuration.cert_file:
                context.load_cert_chain(self.configuration.cert_file, self.configuration.key_file)
            there = context.wrap_socket(there, server_hostname=self.server.hostname)
        lines = [f"GET {request.target} HTTP/1.1", f"Host: {self.server.netloc}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += ["Connection: Upgrade", "", ""]
        with there:
            there.sendall("\r\n".join(lines).encode("latin-1"))
            back = threading.Thread(target=_pump, args=(reply.connection, there), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while data := there.recv(65536):
                    reply.raw(data)
        raise HungUp


def _pass_on(answer: Any, reply: Reply) -> None:
    """An answer as it came, whole or in its pieces."""
    headers = {k: v for k, v in answer.headers.items() if k.lower() not in BETWEEN_TWO}
    if "content-length" in answer.headers:
        return reply.send(answer.status, answer.read(decode_content=False), headers)
    reply.stream(answer.status, headers)
    while chunk := answer.read1(65536, decode_content=False):
        if reply.is_gone():
            raise HungUp
        reply.chunk(chunk)
    reply.end()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
