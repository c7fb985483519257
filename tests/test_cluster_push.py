"""Test that weights, rows and tasks reach the cache volume complete, once, and alone."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cluster_collect import kubelet

from stillhouse import receive, transfer
from stillhouse.cli import main
from stillhouse.compose import _composed  # pyright: ignore[reportPrivateUsage]
from stillhouse.errors import ConfigError
from stillhouse.rundir import Json
from stillhouse.sweep.cluster import push as pushing
from stillhouse.sweep.cluster.push import PUSHED, load
from tests.builders.lab import SITE, furnish
from tests.fakes.fake_api import FakeApi

WEIGHTS = bytes(range(256)) * 800
Spoil = Callable[[int, Json, Iterator[bytes]], Iterator[bytes]]


class Lab:
    """A cluster whose pods have a cache volume, and a laptop with a model."""

    def __init__(self, fake: FakeApi, place: Path) -> None:
        self.fake, self.volume = fake, place / "volume"
        self.model = place / "models/small"
        (self.model / "deep").mkdir(parents=True)
        (self.model / "config.json").write_text('{"model_type": "llama", "bos_token": "<s>"}')
        (self.model / "deep/model.safetensors").write_bytes(WEIGHTS)
        (self.model / "empty.txt").touch()
        self.asked: list[Json] = []
        self.stdin: list[int] = []  # bytes that each request brought
        self.spoil: Spoil = lambda turn, request, stdin: stdin
        self.answer: Callable[[Json], Any] = lambda said: said
        fake.takes = self.take

    def take(
        self, pod: str, command: list[str], stdin: Iterator[bytes]
    ) -> tuple[Iterable[bytes], bytes, int]:
        """What `exec` does: the pod's own code, with the volume where the pod would have it."""
        assert command[:4] == ["python", "/bundle/pod.py", "take", "--"]
        request = transfer.unpack(command[4])
        assert request["root"] == PUSHED
        self.asked.append(request)
        pipe = _Pipe(self.spoil(len(self.asked), request, stdin))
        here = {**request, "root": str(self.volume / "pushed")}
        try:
            said = receive.take(here, io.BufferedReader(pipe))
            return [json.dumps(self.answer(said)).encode()], b"", 0
        except ConfigError as error:
            return [], f"ConfigError: {error}".encode(), 42
        except receive.Cut as error:
            return [], str(error).encode(), 1
        finally:
            self.stdin.append(pipe.came)

    def did(self, what: str) -> int:
        return sum(request["do"] == what for request in self.asked)

    def files(self) -> dict[str, bytes]:
        paths = [path for path in self.volume.rglob("*") if path.is_file()]
        return {p.relative_to(self.volume / "pushed").as_posix(): p.read_bytes() for p in paths}


class _Pipe(io.RawIOBase):
    """A pod's stdin: what frames bring, and no end as long as the connection lasts."""

    def __init__(self, frames: Iterator[bytes]) -> None:
        self.frames, self.rest, self.came = frames, b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.rest = self.rest or next(self.frames, b"")
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        self.came += count
        return count


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Lab, None, None]:
    with FakeApi() as fake:
        furnish(fake)
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "memory"))
        monkeypatch.chdir(tmp_path)
        _composed.cache_clear()  # it holds what the environment said
        with kubelet(fake, fake.run_pod):
            yield Lab(fake, tmp_path)
        _composed.cache_clear()


@pytest.fixture
def push(lab: Lab, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `stillhouse push` printed; it is to end with 0, or `code`."""

    def run(path: str | Path, *words: str, code: int = 0) -> str:
        capsys.readouterr()
        ended = main(["push", str(path), *SITE, *words])
        out, error = capsys.readouterr()
        assert ended == code, f"{out}{error}"
        return error if code else out

    return run


def test_a_model_is_on_the_volume_and_its_words_are_said(
    lab: Lab, push: Callable[..., str]
) -> None:
    out = push("models/small")
    first, *rest = out.splitlines()
    assert first == "models/small: 3 files, 205 kB"
    assert "deep/model.safetensors" in rest[0], "the largest is shown first"
    [name] = {path.partition("/")[0] for path in lab.files()}
    assert name.startswith("small-") and len(name) == len("small-") + 12
    assert f"student=/cache/pushed/{name}" in rest[-1] and "teacher=" in rest[-1]
    assert lab.files() == {
        f"{name}/{path.relative_to(lab.model).as_posix()}": path.read_bytes()
        for path in lab.model.rglob("*.*")
    }
    assert lab.fake.names("jobs") == [], "its pod is not left behind"
    assert sum(lab.fake.created("jobs").values()) == 1


def test_what_is_there_is_not_sent_again_and_other_content_has_another_place(
    lab: Lab, push: Callable[..., str]
) -> None:
    push("models/small")
    sent = sum(lab.stdin)
    assert sent > len(WEIGHTS)
    assert "was there" in push("models/small/")
    assert (lab.did("add"), sum(lab.stdin) < sent + 2000) == (1, True)
    (lab.model / "config.json").write_text("{}")
    told = json.loads(push("models/small", "--json"))
    assert told["sent"] == told["bytes"] == len(WEIGHTS) + 2
    assert len({path.partition("/")[0] for path in lab.files()}) == 2


def test_rows_are_one_file_below_their_digest(lab: Lab, push: Callable[..., str]) -> None:
    Path("my rows.jsonl").write_text('{"prompt": "a token: of thanks"}\n')
    out = push("my rows.jsonl")
    [path] = lab.files()
    assert path.startswith("my-rows-") and path.endswith("/my rows.jsonl")
    assert f"data=local data_path=/cache/pushed/{path}" in out
    Path("rows").mkdir()
    Path("rows/train.jsonl").write_text("{}\n")
    assert "data=local data_path=/cache/pushed/rows-" in push("rows")
    Path("tasks").mkdir()
    Path("tasks/mine.yaml").write_text("task: mine\n")
    assert "include_path=tasks" in push("tasks")


def test_a_push_that_is_cut_goes_on_where_it_was(
    lab: Lab, push: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(turn: int, request: Json, stdin: Iterator[bytes]) -> Iterator[bytes]:
        if request["do"] != "add" or lab.did("add") > 1:
            yield from stdin
            return
        yield next(stdin)  # the line of a piece …
        yield from (frame for _, frame in zip(range(4), stdin, strict=False))

    monkeypatch.setattr(pushing, "FRAME", 10_000)
    lab.spoil = cut
    push("models/small")
    adds = [n for n, request in zip(lab.stdin, lab.asked, strict=True) if request["do"] == "add"]
    assert len(adds) == 2 and sum(adds) < len(WEIGHTS) + 1000, "nothing came twice"


def test_a_large_file_comes_in_rounds(
    lab: Lab, push: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "ROUND_BYTES", 50_000)
    push("models/small")
    assert lab.did("add") == 5
    assert WEIGHTS in lab.files().values()


def test_a_push_that_is_killed_is_gone_on_with_by_the_same_command(
    lab: Lab, push: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "ROUND_BYTES", 50_000)
    with monkeypatch.context() as patched:
        patched.setattr(pushing._Push, "_say", _interrupt)
        assert "the same command goes on" in push("models/small", code=85)
    assert lab.did("finish") == 0 and lab.fake.names("jobs") == []
    lab.stdin.clear()
    told = json.loads(push("models/small", "--json"))
    assert 0 < told["sent"] < told["bytes"] - 49_000


def _interrupt(self: object, there: Json) -> None:
    raise KeyboardInterrupt


def test_bytes_that_change_on_the_way_are_never_kept(lab: Lab, push: Callable[..., str]) -> None:
    def flip(turn: int, request: Json, stdin: Iterator[bytes]) -> Iterator[bytes]:
        for frame in stdin:
            wrong = request["do"] == "add" and lab.did("add") == 1 and len(frame) > 1000
            yield frame[:-1] + b"?" if wrong else frame

    lab.spoil = flip
    push("models/small")
    assert lab.did("add") == 2 and WEIGHTS in lab.files().values()


def test_a_file_that_changes_meanwhile_is_said(lab: Lab, push: Callable[..., str]) -> None:
    def change(turn: int, request: Json, stdin: Iterator[bytes]) -> Iterator[bytes]:
        if request["do"] == "ask":  # its digest is known by now
            (lab.model / "deep/model.safetensors").write_bytes(b"!" * len(WEIGHTS))
        yield from stdin

    lab.spoil = change
    error = push("models/small", code=42)
    assert "deep/model.safetensors changed while it was sent" in error
    assert not [path for path in lab.files() if not path.startswith(".coming")]


@pytest.mark.parametrize(
    "change",
    [
        {"have": [5, 0]}, {"have": [10**9, 0, 0]}, {"have": ["../x", 0, 0]}, {"spoilt": [7]},
        {"format": 2}, {"is_there": "yes"}, {"free": None},
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_not_believed(
    lab: Lab, push: Callable[..., str], change: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "TRIES", 1)
    lab.answer = lambda said: {**said, **change}
    assert "is not about these files" in push("models/small", code=85)
    assert lab.did("add") == 0


def test_a_full_volume_is_said_before_anything_comes(lab: Lab, push: Callable[..., str]) -> None:
    lab.answer = lambda said: {**said, "free": 1000}
    assert "the cache volume has 1 kB left, and 205 kB are to come" in push("models/small", code=42)
    assert lab.did("add") == 0 and lab.fake.names("jobs") == []


def test_a_right_that_is_missing_is_named(lab: Lab, push: Callable[..., str]) -> None:
    lab.fake.deny("get", "pods", sub="exec")
    lab.fake.deny("create", "pods", sub="exec")
    assert "stillhouse-collector of k8s/access.yaml" in push("models/small", code=42)


def test_what_the_pod_refuses_is_told_in_its_words(lab: Lab, push: Callable[..., str]) -> None:
    lab.volume.mkdir()
    (lab.volume / "pushed").write_text("a file")
    assert "pushed of the volume: " in push("models/small", code=42)


# ----------------------------------------------------------------- what is not sent at all


def test_too_much_is_refused_with_the_other_ways_and_sent_on_request(
    lab: Lab, push: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "LIMIT_BYTES", 1000)
    error = push("models/small", code=42)
    assert "more than 1 kB" in error and "OWNER/NAME" in error and "mounted" in error
    assert sum(lab.fake.created("jobs").values()) == 0
    assert "student=" in push("models/small", "--yes")


def test_links_are_not_followed_and_hidden_files_stay(lab: Lab, push: Callable[..., str]) -> None:
    secret = Path("outside.txt").absolute()
    secret.write_text("outside")
    (lab.model / ".env").write_text("private")
    (lab.model / ".git").mkdir()
    assert "left out: 2 that begin with a dot" in push("models/small")
    assert not any(b"private" in content for content in lab.files().values())
    (lab.model / "deep/link.txt").symlink_to(secret)
    assert "link.txt is a link" in push("models/small", code=42)
    (lab.model / "deep/link.txt").unlink()
    (lab.model / "folder").symlink_to(secret.parent)
    assert "folder is a link" in push("models/small", code=42)
    Path("way").symlink_to(lab.model)
    assert "way is a link: push what it leads to" in push("way", code=42)
    assert sum(lab.fake.created("jobs").values()) == 1


def test_a_key_in_a_text_file_is_refused_and_not_shown(lab: Lab, push: Callable[..., str]) -> None:
    key = "hf_" + "aB3" * 12
    Path("rows.jsonl").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": f"use {key}"}))
    error = push("rows.jsonl", code=42)
    assert "rows.jsonl, line 2, looks like a Hugging Face token" in error and key not in error
    assert sum(lab.fake.created("jobs").values()) == 0
    commits = {"commit": "0123456789" * 4, "eos_token": "</s>", "prompt": "password: what is it?"}
    Path("rows.jsonl").write_text(json.dumps(commits))
    push("rows.jsonl")
    (lab.model / "deep/model.safetensors").write_bytes(b"\0" + key.encode())
    push("models/small")  # weights are no text


@pytest.mark.parametrize("path", ["nowhere", "empty", "odd", "x" * 300])
def test_what_cannot_be_pushed_is_42(path: str, lab: Lab, push: Callable[..., str]) -> None:
    Path("empty").mkdir()
    Path("odd").mkdir()
    Path("odd/a\nb").touch()
    push(path, code=42)
    assert sum(lab.fake.created("jobs").values()) == 0


def test_a_place_that_nothing_answers_from_is_42(
    lab: Lab, push: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "make image" in push("models/small", "--image", "stillhouse:latest", code=42)
    assert main(["push", *SITE]) == 42
    assert "push what?" in capsys.readouterr().err
    assert main(["push", "models/small", "--backend", "local"]) == 42
    assert main(["push", "models/small", "lmbda=0"]) == 42


def test_no_pipe_is_read(lab: Lab, push: Callable[..., str]) -> None:
    os.mkfifo(lab.model / "pipe")
    assert "neither a file nor a directory" in push("models/small", code=42)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_this_machine_does_not_let_us_read_is_42(lab: Lab, push: Callable[..., str]) -> None:
    (lab.model / "config.json").chmod(0)
    assert "config.json: Permission denied" in push("models/small", code=42)
    (lab.model / "deep").chmod(0)
    assert "deep: Permission denied" in push("models/small", code=42)
    (lab.model / "deep").chmod(0o700)


def test_a_label_is_a_name_on_any_file_system(tmp_path: Path) -> None:
    names = {"rows.jsonl": "rows", "Qwen3-4B": "Qwen3-4B", "ß x!.json.gz": "x", "ß": "pushed"}
    for name, label in names.items():
        (tmp_path / name).write_text("x")
        assert load(tmp_path / name).label == label
