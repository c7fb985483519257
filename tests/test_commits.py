"""Test that all points of a sweep use one commit of an open revision, even if its branch moves."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.compose import compose, from_command_line
from stillhouse.rundir import Runs, new_record, read_json, write_json
from stillhouse.sources import sources_of
from stillhouse.spec import TrainSpec
from stillhouse.sweep import commits, verbs
from stillhouse.sweep.cluster.jobspec import eval_step, prepare_step, train_step
from stillhouse.sweep.cluster.manifest import refuse_unsendable
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.snapshot import observe
from tests.fakes import behaving

FIRST, SECOND = "1" * 40, "2" * 40


class Cache:
    """A cache of the hub, with one repository whose main branch a test moves."""

    def __init__(self, root: Path) -> None:
        self.home = root / "models--lab--one"
        self.move(FIRST)

    def move(self, commit: str) -> None:
        files = self.home / "snapshots" / commit
        files.mkdir(parents=True, exist_ok=True)
        (files / "config.json").write_text('{"vocab_size": 8, "eos_token_id": 1}')
        place = {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]}
        header = json.dumps({"model.embed_tokens.weight": place}).encode()
        tensors = len(header).to_bytes(8, "little") + header + bytes(128)
        (files / "model.safetensors").write_bytes(tensors)
        (self.home / "refs").mkdir(exist_ok=True)
        (self.home / "refs" / "main").write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Cache(tmp_path / "hub")


def words(runs: Path, *more: str) -> tuple[str, ...]:
    pair = ["pair=tiny", "pair_source=hub", "student=lab/one", "teacher=lab/one", "quant=int4"]
    return (*pair, "data=generated", f"cache_dir={runs}", *more)


def sweep_of(runs: Path, *more: str) -> Sweep:
    return load_sweep(None, [*words(runs, "lmbda=0,1", "suite=tiny", *more)], runs)


def told(runs: Path) -> list[Any]:
    """What each run was told that open revisions mean."""
    return [(run.record() or {})["spec"]["place"]["commits"] for run in Runs(runs).all()]


def test_all_points_of_a_sweep_use_the_commit_with_which_it_began(
    cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    call = verbs.Call(words=words(runs, "lmbda=0,1", "suite=tiny"), runs=runs)
    first = sweep_of(runs).points[0].id[:6]
    some = verbs.Call(words=words(runs, "lmbda=0,1", "suite=tiny"), runs=runs, points=(first,))
    assert verbs.run(some, behaving.executor_for) == 0
    record = read_json(Runs(runs).sweep_file(sweep_of(runs).name)) or {}
    assert record["commits"] == {"lab/one": FIRST}
    cache.move(SECOND)
    capsys.readouterr()
    assert verbs.plan(call) == 0
    said = capsys.readouterr().out
    assert "2 points: 1 done, 1 new" in said
    assert f"lab/one is commit {SECOND[:10]} on this machine now; this sweep began with" in said
    assert verbs.run(call, behaving.executor_for) == 0
    assert told(runs) == [{"lab/one": FIRST}] * 2
    assert verbs.status(verbs.Call(target=sweep_of(runs).name, runs=runs)) == 0
    assert "2 points: 2 done" in capsys.readouterr().out


def test_a_point_of_another_commit_than_its_sweep_uses_is_drifted(
    cache: Cache, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    first = commits.pinned(sweep_of(runs), {}, commits.here)
    for point in first.points:
        run, spec = first.run(point.id), commits.placed(point.spec, first)
        record = new_record(spec, {}) | {"sources": sources_of(spec, runs)}
        write_json(run.spec_file, record)
        run.update_status(phase="training")
    assert {seen.state for seen in observe(first).values()} == {"waiting"}
    cache.move(SECOND)
    assert {seen.state for seen in observe(first).values()} == {"waiting"}
    later = commits.pinned(sweep_of(runs), {}, commits.here)  # another sweep, begun now
    assert later.commits == {"lab/one": SECOND}
    for seen in observe(later).values():
        assert seen.state == "drifted"
        assert seen.cause is not None
        assert "commit 1111111111 then" in seen.cause
        assert "commit 2222222222 now" in seen.cause
    given = commits.pinned(sweep_of(runs, f"commits={{lab/one: '{FIRST}'}}"), {}, commits.here)
    assert {seen.state for seen in observe(given).values()} == {"waiting"}


def test_only_branches_are_open(cache: Cache, tmp_path: Path) -> None:
    def opens(*more: str) -> list[str]:
        spec = compose(from_command_line([*words(tmp_path), *more], TrainSpec), TrainSpec)
        return sorted({one.name for one in commits.open_revisions(spec)})

    assert opens() == ["lab/one"]
    assert opens("student_revision=v2") == ["lab/one", "lab/one@v2"]
    pinned = [f"student_revision='{FIRST}'", f"teacher_revision='{SECOND}'"]
    assert opens(*pinned) == []
    assert opens(*pinned, "data=gsm8k") == ["datasets/openai/gsm8k"]
    assert opens(*pinned, "data=local", f"data_path={tmp_path}") == []
    assert opens(f"student={tmp_path}", f"teacher={tmp_path}") == []


def test_every_pod_of_a_sweep_is_told_the_commits_and_a_tracked_one_its_sweep(
    cache: Cache, tmp_path: Path
) -> None:
    open_ = sweep_of(tmp_path)
    sweep = commits.pinned(open_, {}, commits.here)
    point = sweep.points[0]
    steps = (train_step(point, sweep), prepare_step(point, sweep), eval_step([point], [], sweep))
    told = [step.spec.place for step in steps if step.spec]
    assert [place.commits for place in told] == [{"lab/one": FIRST}] * 3
    refuse_unsendable(steps, sweep.site)  # forty digits that are a commit are no key
    assert train_step(point, sweep).name == train_step(point, open_).name
    prepares = {prepare_step(point, s).name for s in (sweep, open_)}
    assert len(prepares) == 2  # what was prepared of one commit is not there of another
    assert told[0].sweep is None
    tracked = sweep_of(tmp_path, "tracker=wandb")
    spec = train_step(tracked.points[0], tracked).spec
    assert spec is not None and spec.place.sweep == tracked.name
    assert commits.placed(point.spec, sweep).place.sweep == sweep.name


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine that says what main is; the paths that it was asked."""
    asked: list[str] = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"sha": SECOND}).encode())

        def log_message(self, *_: Any) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_launcher_of_pods_asks_the_hub_unless_it_is_to_stay_offline(
    cache: Cache, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = commits.Open("lab/one", None, "model")
    assert commits.of_hub(one) == FIRST  # offline: what lies here
    assert hub == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert commits.of_hub(one) == SECOND
    assert commits.of_hub(commits.Open("lab/two", "v2", "dataset")) == SECOND
    assert hub == ["/api/models/lab/one/revision/main", "/api/datasets/lab/two/revision/v2"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    assert commits.of_hub(one) == FIRST
    assert commits.of_hub(commits.Open("lab/two", None, "model")) is None
