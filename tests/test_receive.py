"""Test the pod's half of `stillhouse push`: files arrive in pieces and are verified.

A file is put in its place only when it is complete.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillhouse import receive, transfer
from stillhouse.errors import ConfigError
from stillhouse.rundir import Json, file_digest

CONTENT = {"config.json": b"{}", "empty.txt": b"", "deep/model.safetensors": bytes(range(256)) * 40}


@pytest.fixture
def sent(tmp_path: Path) -> Json:
    """The list of some files."""
    for name, data in CONTENT.items():
        path = tmp_path / "laptop" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return {
        name: {"size": len(data), "sha256": file_digest(tmp_path / "laptop" / name)}
        for name, data in CONTENT.items()
    }


def told(root: Path, files: Json, stdin: bytes = b"", **request: Any) -> Json:
    asked = {"root": str(root), "name": receive.name_of("small", files), **request}
    return receive.take(asked, io.BytesIO(stdin))


def ask(root: Path, files: Json) -> Json:
    data = json.dumps(files).encode()
    return told(root, files, data, do="ask", bytes=len(data))


def piece(number: int, at: int, data: bytes, size: int | None = None) -> bytes:
    line = {"file": number, "at": at, "size": len(data) if size is None else size}
    return json.dumps(line).encode() + b"\n" + data


def add(root: Path, files: Json, *pieces: bytes) -> Json:
    return told(root, files, b"".join(pieces), do="add", pieces=len(pieces))


def everything(have: list[int]) -> list[bytes]:
    return [
        piece(number, max(at, 0), data[max(at, 0) :])
        for number, (at, data) in enumerate(zip(have, CONTENT.values(), strict=True))
        if at != len(data)
    ]


def test_what_comes_by_pieces_is_in_its_place_when_it_is_whole(tmp_path: Path, sent: Json) -> None:
    root = tmp_path / "volume/pushed"
    assert ask(root, sent)["have"] == [0, -1, 0]
    there = add(root, sent, piece(0, 0, b"{}"), piece(2, 0, CONTENT["deep/model.safetensors"][:99]))
    assert there["have"] == [2, -1, 99] and there["free"] > 0
    final = root / receive.name_of("small", sent)
    assert not final.exists(), "half of it is nowhere where somebody would read it"
    with pytest.raises(ConfigError, match="empty.txt is not whole"):
        told(root, sent, do="finish")
    assert add(root, sent, *everything([2, -1, 99]))["have"] == [len(d) for d in CONTENT.values()]
    assert told(root, sent, do="finish")["is_there"]
    came = {p.relative_to(final).as_posix(): p.read_bytes() for p in final.rglob("*.*")}
    assert came == CONTENT
    assert [p.name for p in root.iterdir() if p != final] == [".coming"]
    assert list((root / ".coming").iterdir()) == []
    again = ask(root, sent)
    assert again["is_there"] and list((root / ".coming").iterdir()) == []


@pytest.mark.parametrize("cut", [1, 30, 60, 3000, 10_200])
def test_a_stream_that_is_cut_leaves_what_came_and_goes_on_there(
    tmp_path: Path, sent: Json, cut: int
) -> None:
    root = tmp_path / "pushed"
    stream = b"".join(everything(ask(root, sent)["have"]))
    with pytest.raises(receive.Cut):
        told(root, sent, stream[:cut], do="add", pieces=3)
    have = ask(root, sent)["have"]
    assert sum(max(0, n) for n in have) >= cut - 3 * 45 - 1
    add(root, sent, *everything(have))
    assert told(root, sent, do="finish")["is_there"]


def test_a_file_that_is_not_what_its_digest_says_is_not_kept(tmp_path: Path, sent: Json) -> None:
    root = tmp_path / "pushed"
    ask(root, sent)
    there = add(root, sent, piece(2, 0, b"x" * len(CONTENT["deep/model.safetensors"])))
    assert (there["spoilt"], there["have"][2]) == ([2], 0)


def test_a_part_that_was_full_when_its_pod_died_is_proven_by_its_last_byte(
    tmp_path: Path, sent: Json
) -> None:
    root, data = tmp_path / "pushed", CONTENT["deep/model.safetensors"]
    ask(root, sent)
    part = root / ".coming" / receive.name_of("small", sent) / "parts/2"
    part.write_bytes(data)
    at = ask(root, sent)["have"][2]
    assert at == len(data) - 1
    assert add(root, sent, piece(2, at, data[at:]))["have"][2] == len(data)


def test_nothing_is_written_outside_of_its_place(tmp_path: Path, sent: Json) -> None:
    root = tmp_path / "pushed"
    for bad in ("../x", "/x", "a//b", "a/../../x", "~/x", "a\nb", ""):
        with pytest.raises(ConfigError, match="no plain path"):
            ask(root, {bad: {"size": 1, "sha256": "0"}})
    for name in ("../small-0123456789ab", ".coming", "a/b", ".."):
        with pytest.raises(ConfigError, match="is no name"):
            receive.take({"root": str(root), "name": name, "do": "ask", "bytes": 0}, io.BytesIO())
    ask(root, sent)
    for odd in (piece(9, 0, b"x"), piece(0, 1, b"x"), piece(0, 0, b"{}x"), piece(0, -1, b"x")):
        with pytest.raises((ConfigError, receive.Cut)):
            add(root, sent, odd)
    with pytest.raises(ConfigError, match="another list"):
        receive.take(
            {"root": str(root), "name": "small-0123456789ab", "do": "ask", "bytes": 2},
            io.BytesIO(b"{}"),
        )
    assert {p.name for p in tmp_path.iterdir()} == {"laptop", "pushed"}


def test_what_was_changed_on_the_volume_is_said_and_not_mended(tmp_path: Path, sent: Json) -> None:
    root = tmp_path / "pushed"
    add(root, sent, *everything(ask(root, sent)["have"]))
    told(root, sent, do="finish")
    final = root / receive.name_of("small", sent)
    (final / "config.json").write_bytes(b"{ }")
    with pytest.raises(ConfigError, match="config.json was changed there"):
        ask(root, sent)


def test_a_volume_that_cannot_be_written_is_a_sentence(tmp_path: Path, sent: Json) -> None:
    (tmp_path / "pushed").write_text("a file")
    with pytest.raises(ConfigError, match="of the volume: "):
        ask(tmp_path / "pushed", sent)


def test_the_command_of_an_exec_takes_it_from_stdin(tmp_path: Path, sent: Json) -> None:
    """Through process 1's own door, and a stdin that stays open."""
    root = tmp_path / "pushed"
    data = json.dumps(sent).encode()
    request = {"root": str(root), "name": receive.name_of("small", sent), "do": "ask"}
    code = Path(receive.__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, code / "stillhouse/pod.py", "take", "--",
         transfer.pack(request | {"bytes": len(data)})],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=code,
        env={**os.environ, "TMPDIR": str(tmp_path), "STILLHOUSE_POD_ROOT": str(tmp_path)},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    with process:
        process.stdin.write(data)
        process.stdin.flush()
        assert json.loads(process.stdout.read())["have"] == [0, -1, 0]
    assert process.returncode == 0
    assert (tmp_path / "stillhouse-sent").exists(), "the pod knows that it is needed"
