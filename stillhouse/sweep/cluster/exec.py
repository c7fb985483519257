"""Run a command in a pod (exec), over a WebSocket of five channels."""

from __future__ import annotations

import json
import select
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlencode

from stillhouse.sweep.cluster.errors import PIECE, ApiError, Streams, in_words, refusal
from stillhouse.sweep.cluster.login import Login

INPUT, OUTPUT, ERRORS, END, CLOSED = 0, 1, 2, 3, 255
SILENCE_S = 600.0  # a command that says nothing for so long is given up


class CommandFailed(ApiError):
    """A command in a pod ended with `exit_code`; the text is what it wrote to stderr."""

    def __init__(self, exit_code: int, reason: str, message: str) -> None:
        super().__init__(0, reason, message)
        self.exit_code = exit_code


def run(
    login: Login,
    streams: Streams,
    path: str,
    command: list[str],
    stdin: Iterable[bytes] | None = None,
) -> Iterator[bytes]:
    """What the command writes to stdout, in pieces as they come.

    `stdin`: pieces of its input. The end of the input is not signaled: not every server can.

    Raises:
        CommandFailed: it ended with another code than 0, or was never started.
        ApiError: no such pod, no right to it, or the connection ended before the command did.
    """
    from websocket import WebSocketException

    errors = end = b""
    socket = _open(login, path, command, stdin is not None)
    try:
        with streams.kept(socket):
            for channel, data in _frames(socket, stdin or ()):
                if channel == OUTPUT:
                    yield data
                elif channel == ERRORS:
                    errors = (errors + data)[-PIECE:]
                elif channel == END:
                    end += data
    except (WebSocketException, OSError) as error:
        raise ApiError(0, "Dropped", in_words(error)) from error
    finally:
        socket.shutdown()  # its `close` leaves open what the other side closed first
    _check(end, errors)


def _open(login: Login, path: str, command: list[str], has_stdin: bool) -> Any:
    from websocket import WebSocketBadStatusException, WebSocketException

    streams = ["stdin"] * has_stdin + ["stdout", "stderr"]
    words = [*((name, "true") for name in streams), *(("command", word) for word in command)]
    url = f"{login.server.replace('http', 'ws', 1)}{path}?{urlencode(words)}"
    try:
        socket = login.open_socket(login.configuration, url, login.headers())
    except WebSocketBadStatusException as error:
        raise refusal(error.status_code, error.resp_body or b"") from error
    except (WebSocketException, OSError) as error:
        raise ApiError(0, type(error).__name__, in_words(error)) from error
    socket.settimeout(SILENCE_S)
    return socket


def _frames(socket: Any, stdin: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(channel, data) of a command's WebSocket, until the other side closes it.

    Its output is read before more input is sent: a command that failed reads no more.
    """
    from websocket import ABNF

    pieces = iter(stdin)
    is_sending = True
    while True:
        if is_sending and not _has_news(socket):
            piece = next(pieces, None)
            is_sending = piece is not None
            if piece is not None:
                socket.send_binary(bytes([INPUT]) + piece)
            continue
        kind, frame = socket.recv_data_frame(True)
        if kind == ABNF.OPCODE_CLOSE:
            return
        is_data = kind in (ABNF.OPCODE_BINARY, ABNF.OPCODE_TEXT) and len(frame.data) > 1
        if is_data and frame.data[0] != CLOSED:
            is_sending = is_sending and frame.data[0] != END
            yield frame.data[0], frame.data[1:]


def _has_news(socket: Any) -> bool:
    poll = select.poll()
    poll.register(socket.sock, select.POLLIN)
    return bool(poll.poll(0))


def _check(end: bytes, errors: bytes) -> None:
    """Raise unless the command's status frame reports success.

    Raises:
        CommandFailed: it ended with another code than 0, or was never started.
        ApiError: there is no status frame, so the output may be incomplete.
    """
    if not end:
        raise ApiError(0, "Dropped", "the connection ended before the command did")
    said = json.loads(end)
    if said.get("status") == "Success":
        return
    causes = said.get("details", {}).get("causes", [])
    codes = [int(cause["message"]) for cause in causes if cause.get("reason") == "ExitCode"]
    text = errors.decode(errors="replace").strip() or said.get("message", "")
    raise CommandFailed(codes[0] if codes else 1, said.get("reason", ""), text)
