"""Run a teacher's server for the points of a sweep whose `teacher_at` is "server".

One process per teacher, forked like a worker: it ends itself when the launcher is gone. The
launcher keeps the listening socket, so that a server that died starts again at the same address,
and points that ask meanwhile are answered once it is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess

from stillhouse.spec import PairSpec, TrainSpec
from stillhouse.sweep.points import Sweep
from stillhouse.text import say

END_S = 10.0  # between SIGTERM and SIGKILL; it has nothing to save

# (arguments of teacher_server.serve) -> its process
Fork = Callable[[tuple[TrainSpec, socket.socket, str]], ForkServerProcess]
_Key = tuple[PairSpec, str]


@dataclasses.dataclass(eq=False)
class _Server:
    listening: socket.socket
    token: str
    spec: TrainSpec
    process: ForkServerProcess
    deaths: int = 0


class Teachers:
    """The teacher servers of a sweep."""

    def __init__(self, sweep: Sweep, fork: Fork, trained: set[str]) -> None:
        """`trained`: the points that need no teacher any more."""
        self._fork, self._most_deaths = fork, sweep.site.infra_retries
        self._servers: dict[_Key, _Server] = {}
        self._users: dict[_Key, set[str]] = {}  # points that still need each
        for point in sweep.points:
            if is_served(point.spec) and point.id not in trained:
                self._users.setdefault(_key(point.spec), set()).add(point.id)

    def environment(self, spec: TrainSpec) -> dict[str, str]:
        """Environment variables that lead a point to its teacher, whose server starts if it does
        not run. {}: the point needs none."""
        if not is_served(spec):
            return {}
        server = self._servers.get(_key(spec)) or self._start(spec)
        host, port = server.listening.getsockname()
        return {
            "STILLHOUSE_TEACHER_URL": f"http://{host}:{port}",
            "STILLHOUSE_TEACHER_TOKEN": server.token,
        }

    def _start(self, spec: TrainSpec) -> _Server:
        listening, token = socket.create_server(("127.0.0.1", 0)), secrets.token_urlsafe()
        server = _Server(listening, token, spec, self._fork((spec, listening, token)))
        self._servers[_key(spec)] = server
        return server

    def look(self) -> None:
        """Start servers that died again, as often as the site allows."""
        for key, server in self._servers.items():
            code = server.process.exitcode
            if code is None or server.deaths > self._most_deaths:
                continue
            server.deaths += 1
            is_last = server.deaths > self._most_deaths
            say(
                f"the teacher of pair {key[0].pair_name} ended (exit code {code})"
                f"{'; not started again' if is_last else '; it starts again'}: see the sweep's log"
            )
            if not is_last:
                server.process = self._fork((server.spec, server.listening, server.token))

    def given_up(self, spec: TrainSpec) -> str | None:
        """Why a point's teacher will not answer; None if it may."""
        server = self._servers.get(_key(spec)) if is_served(spec) else None
        if server is None or server.deaths <= self._most_deaths:
            return None
        return f"its teacher's server died {server.deaths} times; see the sweep's log"

    def is_trained(self, spec: TrainSpec, id_: str) -> None:
        """A point needs its teacher no more; the last one ends its server."""
        users = self._users.get(_key(spec), set())
        users.discard(id_)
        if is_served(spec) and not users and (server := self._servers.pop(_key(spec), None)):
            _end(server)

    def end(self) -> None:
        """End all servers."""
        while self._servers:
            _end(self._servers.popitem()[1])


def is_served(spec: TrainSpec) -> bool:
    """Whether a point wants a server that its launcher starts."""
    return spec.scoring.teacher_at == "server" and spec.scoring.teacher_url is None


def _key(spec: TrainSpec) -> _Key:
    return spec.pair, spec.place.cache_dir


def _end(server: _Server) -> None:
    with contextlib.closing(server.listening):
        server.process.terminate()
        server.process.join(END_S)
        server.process.kill()
