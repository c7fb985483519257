"""Test a teacher that is served: the same bits, and what is done when it does not answer."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from stillhouse import entrypoints, local_models
from stillhouse.distill import models, teacher_client, teacher_server
from stillhouse.distill.teacher import Draws, ModelTeacher, described, probe
from stillhouse.distill.teacher_client import ServedTeacher
from stillhouse.errors import (
    ConfigError,
    ContractError,
    Diverged,
    Interrupted,
    OutOfMemory,
)
from stillhouse.rundir import Runs
from tests.builders.cheap import cheap, forked, words
from tests.test_teacher import CPU, DESCRIBED, ROWS, asked, drawn, in_process

TOKEN = "a-token-of-a-test"
LONG_S = 600.0  # no test waits so long, unless it fails


class Here:
    """A server in a thread of this process, at an address that stays."""

    def __init__(self, model=None):
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.server = teacher_server.Server(model or drawn(), DESCRIBED, TOKEN, 1)
        self.start()

    def start(self):
        config = uvicorn.Config(self.server.app(), log_level="error", lifespan="off")
        self.web = uvicorn.Server(config)
        own = self.listening.dup()
        self.thread = threading.Thread(target=self.web.run, args=([own],), daemon=True)
        self.thread.start()

    def stop(self):
        self.web.should_exit = True
        self.thread.join()

    def teacher(self, poll=lambda: None, token=TOKEN):
        return ServedTeacher(self.url, token, LONG_S, CPU, 0, [1], poll)


@pytest.fixture
def here():
    server = Here()
    yield server
    server.stop()
    server.listening.close()


def test_what_is_served_has_the_bits_of_the_teacher_in_process(here, tmp_path):
    served, whole = here.teacher(), in_process(here.server.model)
    for alone in (True, False):
        assert torch.equal(asked(served, alone=alone), asked(whole, alone=alone))
    assert probe(served) == probe(whole) == served.manifest["probe"]
    rollout = cheap(tmp_path).rollout
    ways: list[dict[str, Any]] = [{}, {"greedy": True}, {"prefixes": [[4], [], [5, 6]]}]
    for how in ways:
        answers = [
            one.write([p for p, _ in ROWS], Draws(1, "teacher", 3, range(3)), rollout, **how)
            for one in (served, whole)
        ]
        assert answers[0] == answers[1]


def test_a_scored_token_takes_the_bytes_of_its_hidden_state(here):
    ids = [[place % 60 for place in range(1, 65)]] * 8
    rows = {"rows": [[[5]] * 8, ids, [0] * 8], "alone": False, "pad_id": 0, "threads": 1}
    content, _ = here.server._hidden(rows)
    width = here.server.model.config.hidden_size
    assert len(content) <= 1.05 * 4 * width * 8 * 64


@pytest.mark.parametrize("token", ["", "another-token-of-a-test"])
def test_a_missing_or_wrong_token_is_refused(here, token):
    with pytest.raises(ConfigError, match="does not take this token"):
        here.teacher(token=token)
    assert httpx.get(f"{here.url}/manifest").status_code == 401


def test_a_busy_server_sends_requests_away_and_they_come_again(here, monkeypatch):
    monkeypatch.setattr(teacher_client, "PAUSE_S", 0.01)
    served = here.teacher()
    here.server.count = teacher_server.WAITING
    token = {"authorization": f"Bearer {TOKEN}"}
    answer = httpx.get(f"{here.url}/manifest", headers=token)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    looks = []
    served.poll = lambda: setattr(here.server, "count", 0) if looks else looks.append(1)
    assert torch.equal(asked(served), asked(in_process(here.server.model))) and looks


def test_a_server_that_starts_again_answers_what_was_asked_meanwhile(here):
    served = here.teacher()
    here.stop()
    looks = []
    served.poll = lambda: (looks or here.start(), looks.append(1))
    assert torch.equal(asked(served), asked(in_process(here.server.model))) and looks


def test_a_request_that_is_lost_or_answered_twice_gives_the_same(here, monkeypatch):
    served, sent = here.teacher(), []
    request = served._client.request

    def lossy(*args, **kwargs):
        sent.append(args)
        answer = request(*args, **kwargs)  # it is computed, and the answer never arrives
        if len(sent) == 1:
            raise httpx.ReadError("connection reset")
        return answer

    monkeypatch.setattr(served._client, "request", lossy)
    assert torch.equal(asked(served), asked(in_process(here.server.model))) and len(sent) == 2


def test_a_point_waits_for_an_answer_as_long_as_its_patience_then_ends_with_85(
    here, monkeypatch, capsys
):
    monkeypatch.setattr(teacher_client, "SAID_S", 0)
    served = here.teacher()
    served.patience_s = 0.5
    here.stop()
    here.listening.close()
    with pytest.raises(Interrupted, match=r"gave no answer for 0\.5 s \(teacher_patience_s") as why:
        asked(served)
    assert why.value.exit_code == 85
    assert capsys.readouterr().out.count(f"waiting for the teacher at {here.url}") == 1
    here.listening = socket.create_server(("127.0.0.1", 0))
    here.start()


def test_a_stop_is_heard_while_a_slow_teacher_computes(here, monkeypatch):
    go, stops = threading.Event(), []

    def poll():
        if stops:
            raise Interrupted("asked to stop")

    served = here.teacher(poll=poll)
    monkeypatch.setattr(ModelTeacher, "hidden", lambda *_, **__: (stops.append(1), go.wait(LONG_S)))
    with pytest.raises(Interrupted, match="asked to stop"):
        asked(served)
    go.set()


def test_a_teacher_that_answers_nan_is_refused(here):
    served = here.teacher()
    here.server.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(Diverged, match="are no numbers"):
        asked(served)


def test_another_teacher_at_the_same_address_is_refused(here):
    served = here.teacher()
    here.server.name = "another"
    with pytest.raises(ContractError, match="another teacher answers"):
        asked(served)


def test_a_server_of_another_version_is_refused(here, monkeypatch):
    monkeypatch.setattr(teacher_server, "VERSION", 99)
    with pytest.raises(ContractError, match="speaks 99 where this one speaks"):
        here.teacher()


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"version": 1, "manifest": {}}'])
def test_what_is_no_teacher_at_all_is_named_so(here, monkeypatch, answer):
    monkeypatch.setattr(here.server, "_manifest", lambda _: (answer, "text/html"))
    here.stop()
    here.start()
    with pytest.raises(ContractError, match="is no server of `stillhouse teacher`"):
        here.teacher()


def test_what_no_server_can_answer_is_not_asked_again(here, monkeypatch):
    served = here.teacher()
    with pytest.raises(ContractError, match="refuses: IndexError"):
        asked(served, [([5], [10_000])])

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(ModelTeacher, "hidden", full)
    with pytest.raises(OutOfMemory, match="lower micro_batch"):
        asked(served)
    token = {"authorization": f"Bearer {TOKEN}"}
    monkeypatch.setattr(teacher_server, "LARGEST", 10)
    said = httpx.post(f"{here.url}/hidden", headers=token, content=b"x" * 11)
    assert said.status_code == 413


def test_a_run_without_an_address_or_a_token_or_with_another_pairs_teacher_is_refused(
    here, tmp_path, monkeypatch
):
    monkeypatch.delenv("STILLHOUSE_TEACHER_URL", raising=False)
    monkeypatch.delenv("STILLHOUSE_TEACHER_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="without an address"):
        entrypoints.train(cheap(tmp_path, "teacher_at=server"))
    with pytest.raises(ConfigError, match="STILLHOUSE_TEACHER_TOKEN is not set"):
        entrypoints.train(cheap(tmp_path, "teacher_at=server", f"teacher_url={here.url}"))
    monkeypatch.setenv("STILLHOUSE_TEACHER_TOKEN", TOKEN)
    with pytest.raises(ContractError, match="is not that of pair tiny on this machine"):
        entrypoints.train(cheap(tmp_path, "teacher_at=server", f"teacher_url={here.url}"))


def _serve(line: list[str], log: str, token: str) -> None:
    os.environ["STILLHOUSE_TEACHER_TOKEN"] = token
    with open(log, "w") as out, contextlib.redirect_stdout(out):
        code = entrypoints.teacher_main(line)
    sys.exit(code)


def test_a_teacher_that_is_started_by_hand_serves_until_it_is_told_to_stop(tmp_path):
    log, found = tmp_path / "log", None
    line = words(tmp_path, "teacher_url=http://127.0.0.1:0")
    process = forked(_serve, line, str(log), TOKEN)
    while found is None:
        assert process.is_alive()
        time.sleep(0.02)
        found = re.search(r"at (http://\S+)", log.read_text() if log.exists() else "")
    served = ServedTeacher(found[1], TOKEN, LONG_S, CPU, 0, [1], lambda: None)
    assert served.manifest["probe"] == probe(served)
    process.terminate()
    process.join(LONG_S)
    assert process.exitcode == 0


def test_a_teacher_that_cannot_be_loaded_is_refused_to_its_points_in_words(tmp_path):
    spec = cheap(tmp_path, "teacher=nobody")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = forked(teacher_server.serve, spec, listening, TOKEN)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ContractError, match='refuses: ConfigError: .* no recipe "nobody"'):
            ServedTeacher(url, TOKEN, LONG_S, CPU, 0, [1], lambda: None)
    process.terminate()
    process.join(LONG_S)
    assert process.exitcode == 0


def test_a_teacher_is_not_served_without_a_token_or_where_somebody_listens(
    here, tmp_path, monkeypatch, capsys
):
    line = words(tmp_path, f"teacher_url={here.url}")
    monkeypatch.delenv("STILLHOUSE_TEACHER_TOKEN", raising=False)
    assert entrypoints.teacher_main(line) == 42
    assert "openssl rand" in capsys.readouterr().err
    monkeypatch.setenv("STILLHOUSE_TEACHER_TOKEN", TOKEN)
    assert entrypoints.teacher_main(line) == 42
    assert f"cannot listen at {here.url}" in capsys.readouterr().err


def test_a_missing_library_is_named_before_anything_starts(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else there(name)
    )
    with pytest.raises(ConfigError, match="needs uvicorn, which this environment lacks"):
        entrypoints.train(cheap(tmp_path, "teacher_at=server"))
    local_models.require_libraries([cheap(tmp_path)])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (["quant=none", "student_steps=null"], "nothing would be saved"),
        (["quant=none", "student_steps=null", "ema_decay=0.9"], "only the student's process has"),
        (["teacher_url=10.0.0.5:1"], "is http://HOST:PORT, not 10.0.0.5:1"),
        (["teacher_url=http://10.0.0.5:99999"], "is http://HOST:PORT, not"),
    ],
)
def test_what_no_server_can_be_is_refused(tmp_path, line, why):
    with pytest.raises(ConfigError, match=why):
        cheap(tmp_path, "teacher_at=server", *line)


def test_an_address_without_a_server_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is of teacher_at server, and teacher_at is process"):
        cheap(tmp_path, "teacher_url=http://10.0.0.5:8765")


@pytest.fixture
def tiny(here, tmp_path, monkeypatch):
    """A server of the teacher of the cheap pair."""
    spec = cheap(tmp_path)
    cache = Path(spec.place.cache_dir)
    prepared = models.prepare(spec.pair, spec.quant, cache)
    model = models.load_base(prepared.teacher, prepared.teacher_revision, "float32", None, CPU)
    here.server = teacher_server.Server(
        model, described(spec.pair, cache, {}) or {}, TOKEN, workers=1
    )
    here.stop()
    here.start()
    monkeypatch.setenv("STILLHOUSE_TEACHER_TOKEN", TOKEN)
    return here


@pytest.mark.parametrize(
    "line",
    [
        ["lmbda=0.5", "beta=0"],
        ["lmbda=0", "beta=1", "off_policy_source=teacher"],
    ],
)
def test_a_point_whose_teacher_is_silent_saves_and_goes_on_to_the_bits_of_one_in_process(
    tiny, tmp_path, monkeypatch, line
):
    whole = cheap(tmp_path / "whole", *line)
    assert entrypoints.train(whole) == 0
    where = ["teacher_at=server", f"teacher_url={tiny.url}"]
    spec = cheap(tmp_path / "served", *line, *where)
    run, there = Runs(tmp_path / "served").of(spec), Runs(tmp_path / "whole").of(whole)
    score = ServedTeacher.hidden

    def falls_silent(self, *args, **kwargs):
        if len(run.metrics()) == 3:
            tiny.server.count, self.patience_s = teacher_server.WAITING, 0.1
        return score(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ServedTeacher, "hidden", falls_silent)
        with pytest.raises(Interrupted, match="gave no answer for 0.1 s"):
            entrypoints.train(spec)
    status = run.status()
    assert (status["phase"], status["exit_code"], status["step"]) == ("waiting", 85, 3)
    tiny.server.count = 0
    assert entrypoints.train(spec) == 0
    name = "adapter_model.safetensors"
    assert run.id == there.id
    assert (run.adapter / name).read_bytes() == (there.adapter / name).read_bytes()
    plain = [[{k: v for k, v in m.items() if not k.startswith("time/")} for m in r.metrics()]
             for r in (run, there)]  # fmt: skip
    assert plain[0] == plain[1]
