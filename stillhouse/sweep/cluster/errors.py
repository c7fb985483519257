"""Parse the API server's errors, and read its streams so that another thread can end them."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

PIECE = 65536  # bytes


class ApiError(Exception):
    """A final error of the API server. `status` is HTTP's, or 0 where no complete answer came."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason, self.message = status, reason, message


class Gone(ApiError):
    """410: the page or the watch needs history that the server no longer keeps. List again."""


@dataclass(frozen=True)
class Watched:
    """One line of a watch; a BOOKMARK's object has a resourceVersion and nothing else."""

    kind: str  # ADDED MODIFIED DELETED BOOKMARK
    object: Json


def refusal(status: int, body: bytes) -> ApiError:
    """What a Status object says, or whatever a proxy on the way wrote."""
    try:
        said = json.loads(body)
        reason, message = str(said.get("reason", "")), str(said["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        reason, message = "", in_words(body.decode(errors="replace")) or "no explanation"
    return (Gone if status == 410 else ApiError)(status, reason, message)


def is_contention(no: ApiError) -> bool:
    """A 409 that is not about the object: two writers collided, at a quota for example."""
    return no.status == 409 and no.reason == "Conflict" and "precondition" not in no.message


def is_denied(no: ApiError) -> bool:
    """Whether it is for want of a right (and not a quota, say)."""
    return no.status == 403 and "is forbidden: User " in no.message


def seconds(retry_after: str) -> float:
    """What a Retry-After header asks for; 0 for a date, which no API server sends."""
    return float(retry_after) if retry_after.isdigit() else 0.0


def in_words(error: object) -> str:
    """An error on one line: its cause where it has one, no addresses of Python objects."""
    if isinstance(error, Exception) and error.args and isinstance(error.args[-1], Exception):
        error = error.args[-1]
    plain = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>:? ?|^\w+\([^()]*\): ", "", str(error))
    return " ".join(plain.split())[:300]


class Streams:
    """The open streams, so that another thread than their reader can end them."""

    def __init__(self) -> None:
        self._open: set[Any] = set()
        self._is_over = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def kept(self, stream: Any) -> Generator[Any, None, None]:
        with self._lock:
            self._open.add(stream)
            if self._is_over:  # it was being opened when all were ended
                _cut(stream)
        try:
            yield stream
        finally:
            with self._lock:
                self._open.discard(stream)
            stream.close()

    def end(self) -> None:
        with self._lock:
            self._is_over = True
            for stream in self._open:
                _cut(stream)


def _cut(stream: Any) -> None:
    """End a stream under its reader."""
    with contextlib.suppress(Exception):  # it ended while we looked
        (stream.abort if hasattr(stream, "abort") else stream.shutdown)()


def chunks(answer: Any) -> Iterator[bytes]:
    """A response's pieces as they come, until it ends or its connection does."""
    from urllib3.exceptions import HTTPError

    with contextlib.suppress(HTTPError, OSError, ValueError):
        while chunk := answer.read1(PIECE):
            yield chunk


def lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines of a stream that breaks anywhere; half a line at its end is dropped."""
    begun: list[bytes] = []
    for piece in pieces:
        first, *others = piece.split(b"\n")
        begun.append(first)
        if others:
            yield from filter(None, (b"".join(begun), *others[:-1]))
            begun = [others[-1]]
