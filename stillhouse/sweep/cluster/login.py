"""Hold the login to a Kubernetes server while it is in use, and renew its token."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any


def _version() -> str:
    try:
        return metadata.version("stillhouse")
    except metadata.PackageNotFoundError:  # a pod runs unpacked code
        return "unpacked"


USER_AGENT = f"stillhouse/{_version()}"
LASTS_S = 10.0  # to ask the official client for the header costs more than a request


@dataclass(frozen=True)
class Login:
    """An identity at one server, with its connection pool."""

    configuration: Any  # the official client's
    pool: Any  # urllib3's connections to that server
    prefix: str  # what stands before a path; "" for most servers
    context: str
    namespace: str
    is_pod: bool
    again: Callable[[], Login]  # when a token ran out
    open_socket: Callable[[Any, str, dict[str, str]], Any]  # (configuration, URL, headers)
    _lock: Any = field(default_factory=threading.Lock)
    _kept: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def server(self) -> str:
        return self.configuration.host

    def headers(self) -> dict[str, str]:
        """User agent and authorization; a token that is about to run out is renewed."""
        if time.monotonic() >= self._kept.get("until", 0.0):
            with self._lock, error_lines():
                if time.monotonic() >= self._kept.get("until", 0.0):
                    token = self.configuration.get_api_key_with_prefix("BearerToken")
                    who = {"authorization": token} if token else {}
                    self._kept["headers"] = {"User-Agent": USER_AGENT, **who}
                    self._kept["until"] = time.monotonic() + LASTS_S
        return self._kept["headers"]

    def __str__(self) -> str:
        who = "this pod's service account" if self.is_pod else f'context "{self.context}"'
        return f"{self.server} ({who})"

    def how(self) -> str:
        """What a person can do whose login is refused."""
        if self.is_pod:
            return "its account must exist, and the pod say automountServiceAccountToken: true"
        return "log in again, as you did to get the kubeconfig, then run the same line"


@contextlib.contextmanager
def error_lines() -> Generator[list[str], None, None]:
    """What the official client logs as an error meanwhile: it says it nowhere else."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keep, root = Keep(logging.ERROR), logging.getLogger()
    root.addHandler(keep)
    try:
        yield lines
    finally:
        root.removeHandler(keep)
