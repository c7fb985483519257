"""Test that work whose inputs have changed is reported as drifted, and never counts as done."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse import scores, sources
from stillhouse.cli import main
from stillhouse.errors import MISTAKE
from stillhouse.identity import from_plain, point_id, score_key, to_plain
from stillhouse.rundir import Json, RunDir, Runs, eval_file, new_record, write_json
from stillhouse.spec import TaskSpec
from stillhouse.sweep import registry, verbs
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Point, Sweep
from stillhouse.sweep.snapshot import baselines_on_disk, observe
from stillhouse.sweep.state import Observation
from tests.fakes import behaving

GOLDEN = Path(__file__).parent / "golden"
LINE = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}


class Lab:
    """A person's own models and rows, and a sweep over them whose points are done."""

    def __init__(self, root: Path) -> None:
        self.root, self.runs = root, root / "runs"
        self.rows = root / "rows.jsonl"
        for role in ("student", "teacher"):
            self.write(f"{role}/config.json", "{}")
            self.write(f"{role}/tokenizer.json", "{}")
            self.write(f"{role}/model.safetensors", f"the {role}'s weights")
        self.write("rows.jsonl", json.dumps(LINE) + "\n")

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(exist_ok=True)
        (self.root / name).write_text(text)

    def words(self, *more: str) -> tuple[str, ...]:
        mine = [f"{role}={self.root / role}" for role in ("student", "teacher")]
        where = [f"data_path={self.rows}", f"cache_dir={self.runs}"]
        pair = ["pair=tiny", "pair_source=hub", *mine, "data=local", *where, "suite=tiny"]
        return (*pair, "lmbda=0,1", "quant=int4", *more)

    def sweep(self, *more: str) -> Sweep:
        return load_sweep(None, [*self.words(*more)], self.runs)

    def call(self, *more: str, **options: Any) -> verbs.Call:
        return verbs.Call(words=self.words(*more), runs=self.runs, **options)

    def finish(self, point: Point) -> RunDir:
        """Leave what training and scoring leave."""
        run = self.sweep().run(point.id)
        here = sources.sources_of(point.spec, self.runs)
        write_json(run.spec_file, new_record(point.spec, {}) | {"sources": here})
        run.update_status(phase="done", exit_code=0)
        write_json(run.adapter / "stillhouse.json", {"id": run.id, "files": {}})
        self.score(run.path, "point", here)
        return run

    def score(self, directory: Path, label: str, here: Json, **more: Any) -> None:
        suite = self.sweep().suite
        assert suite is not None
        for task in suite.tasks:
            score = {"key": score_key(suite, task), "value": 0.5, "versions": {}}
            score["sources"] = scores.rests_on(label, here)
            write_json(eval_file(directory, task.task), score | more)

    def seen(self, *more: str) -> list[Observation]:
        return [*observe(self.sweep(*more)).values()]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    made = Lab(tmp_path)
    sweep = made.sweep()
    for point in sweep.points:
        made.finish(point)
    registry.write(sweep)
    return made


# ------------------------------------------------------------------------------ points


@pytest.mark.parametrize(
    ("file", "cause"),
    [
        ("rows.jsonl", "data: {lab}/rows.jsonl is not what it was: sha256 "),
        ("student/model.safetensors", "student: the weights of {lab}/student are not what"),
        ("teacher/model.safetensors", "teacher: the weights of {lab}/teacher are not what"),
        ("student/tokenizer.json", "tokenizer: the tokenizer or the chat template of {lab}"),
        ("teacher/config.json", "teacher: config.json"),
    ],
)
def test_a_point_over_what_changed_is_drifted_and_over_what_was_restored_is_done(
    lab: Lab, file: str, cause: str
) -> None:
    before = (lab.root / file).read_text()
    assert [seen.state for seen in lab.seen()] == ["done", "done"]
    lab.write(file, '{"another": 1}')
    for seen in lab.seen():
        assert (seen.state, seen.must_begin_anew, seen.is_trained) == ("drifted", True, True)
        assert seen.cause is not None
        assert seen.cause.startswith(cause.format(lab=lab.root))
    lab.write(file, before)
    assert [seen.state for seen in lab.seen()] == ["done", "done"]


def test_a_point_that_has_begun_drifts_and_one_at_work_or_failed_stays_what_it_is(
    lab: Lab,
) -> None:
    first, second = (lab.sweep().run(point.id) for point in lab.sweep().points)
    for run in (first, second):
        (run.adapter / "stillhouse.json").unlink()
    first.update_status(phase="training", exit_code=None)
    second.update_status(phase="failed", exit_code=43, cause="Diverged: NaN")
    lab.write("rows.jsonl", "{}\n")
    assert [seen.state for seen in lab.seen()] == ["drifted", "failed"]
    with first.lock():
        assert [seen.state for seen in lab.seen()] == ["running", "failed"]


def test_what_is_not_on_this_machine_is_not_compared(lab: Lab) -> None:
    (lab.root / "teacher").rename(lab.root / "gone")
    lab.rows.rename(lab.root / "gone.jsonl")
    assert [seen.state for seen in lab.seen()] == ["done", "done"]


def test_plan_status_and_run_say_it_and_run_refuses(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.write("rows.jsonl", "{}\n")
    name = lab.sweep().name
    assert verbs.plan(lab.call()) == 0
    said = capsys.readouterr().out
    assert "2 points: 2 drifted" in said
    assert "drifted 2: data: " in said and "rows.jsonl is not what it was" in said
    assert "--sources=new" in said
    assert verbs.status(verbs.Call(target=name, runs=lab.runs)) == 0
    assert "drifted  2: data: " in capsys.readouterr().out
    assert verbs.run(lab.call(), behaving.executor_for) == MISTAKE
    error = capsys.readouterr().err
    assert error.startswith("ContractError: drifted 2: data: ")
    assert "nothing was started" in error and "restore" in error and "--sources=new" in error
    assert verbs.run(lab.call(is_json=True), behaving.executor_for) == MISTAKE
    told = json.loads(capsys.readouterr().out)
    assert told["totals"]["drifted"] == 2
    assert "rows.jsonl is not what it was" in told["points"][0]["cause"]
    lab.write("rows.jsonl", json.dumps(LINE) + "\n")
    write_baselines(lab)
    assert verbs.run(lab.call(), behaving.executor_for) == 0
    assert "nothing left to do" in capsys.readouterr().out


def test_a_new_start_keeps_what_was_there_beside_it_and_takes_it_for_nothing(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.write("rows.jsonl", "{}\n")
    before = {p.id: (lab.sweep().run(p.id)).record() for p in lab.sweep().points}
    words = ["run", *lab.words(), "--runs", str(lab.runs)]
    assert main(words) == MISTAKE
    assert verbs.run(lab.call("--sources=new"), behaving.executor_for) == 0
    assert "begins anew; before: " in capsys.readouterr().out
    assert [seen.state for seen in lab.seen()] == ["done", "done"]
    trained = behaving.begun(lab.runs, "train")
    assert sorted(trained) == sorted(before)
    kept = sorted((lab.runs / ".before").iterdir())
    assert [RunDir(path).record() for path in kept] == [before[RunDir(p).id] for p in kept]
    assert all(RunDir(path).is_trained() for path in kept)
    assert sorted(run.id for run in Runs(lab.runs).all()) == sorted(before)
    assert all((path / "eval" / "tiny_gen.json").is_file() for path in kept)
    assert main([*words, "--sources=new"]) == 0  # and the same line again begins nothing
    assert behaving.begun(lab.runs, "train") == trained


def test_sources_are_looked_at_once_however_many_points_rest_on_them(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Path] = []
    whole = sources.fingerprints.of_weights
    monkeypatch.setattr(
        sources.fingerprints,
        "of_weights",
        lambda path, cache: counted.append(path) or whole(path, cache),
    )
    lab.seen()
    assert sorted(path.name for path in counted) == ["student", "teacher"]


def test_a_record_of_before_is_read_as_what_it_was() -> None:
    plain = json.loads((GOLDEN / "record.json").read_text())
    spec = from_plain(plain["spec"])
    assert point_id(spec) == plain["id"]
    assert spec.place.commits == {}
    assert to_plain(spec)["place"] | plain["spec"]["place"] == to_plain(spec)["place"]


# ------------------------------------------------------------------------------ scores


def write_baselines(lab: Lab, **more: Any) -> None:
    sweep = lab.sweep()
    plain = to_plain(sweep.points[0].spec)
    here = sources.sources_of(sweep.points[0].spec, lab.runs)
    for row in sweep.baselines:
        told = {"label": row.label, "pair": plain["pair"], "quant": None}
        write_json(row.directory / "baseline.json", told)
        lab.score(row.directory, row.label, here, **more)


def stale(lab: Lab) -> dict[str, tuple[str, ...]]:
    return {b.label: b.rests_on_other for b in baselines_on_disk(lab.sweep())}


def test_a_baseline_of_other_weights_is_not_scored_and_says_so(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    write_baselines(lab)
    assert not any(stale(lab).values())
    lab.write("teacher/model.safetensors", "a better teacher")
    found = stale(lab)
    assert found["student"] == found["ptq"] == ()
    (said,) = found["teacher"]
    assert said.startswith("its scores on tiny_gen, tiny_mc drifted: teacher: the weights of")
    assert verbs.plan(lab.call()) == 0
    assert "baseline teacher-" in capsys.readouterr().out


def test_a_score_by_another_lm_eval_waits_to_be_made_anew(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "lm_eval_version", lambda: "0.4.13")
    run = lab.sweep().run(lab.sweep().points[0].id)
    here = (run.record() or {})["sources"]
    lab.score(run.path, "point", here, versions={"lm_eval": "0.4.13", "task_version": 1})
    assert lab.seen()[0].state == "done"
    lab.score(run.path, "point", here, versions={"lm_eval": "0.4.12", "task_version": 1})
    seen = lab.seen()[0]
    assert (seen.state, seen.is_trained) == ("waiting", True)
    assert seen.cause == (
        "its scores on tiny_gen, tiny_mc drifted: lm-eval was 0.4.12 and is 0.4.13 here; to be"
        " scored anew"
    )
    monkeypatch.setattr(scores, "lm_eval_version", lambda: None)  # a laptop without it
    assert lab.seen()[0].state == "done"
    lab.score(run.path, "point", here, versions={"task_version": 0})
    assert "task tiny_gen was version 0 and is 1 here" in str(lab.seen()[0].cause)


def test_a_score_of_another_adapter_is_none(lab: Lab) -> None:
    run = lab.sweep().run(lab.sweep().points[0].id)
    lab.score(run.path, "point", (run.record() or {})["sources"], adapter_digest="0" * 16)
    assert "it is of adapter 0000000000000000" in str(lab.seen()[0].cause)


def test_an_older_score_is_kept_where_its_revision_says_what_it_rests_on(lab: Lab) -> None:
    task, cache = TaskSpec("tiny_gen", "exact_match", None, True), lab.runs
    pair = dataclasses.replace(lab.sweep().points[0].spec.pair, student="lab/s", teacher="lab/t")
    here = {"student": {"what": "lab/s", "kind": "model", "commit": "1" * 40}}

    def why(revision: str | None, here: Json = here) -> list[str]:
        score = {"base_revision": revision}
        return scores.changes(score, task, "student", pair, here, cache)

    assert why("1" * 40) == []
    assert why("2" * 40, {}) == []  # not on this machine
    assert why("2" * 40) == [f"student: its weights were {'2' * 16} and are {'1' * 16} here"]
    assert why(None) == [scores.NOT_RECORDED]  # of a directory


def test_a_new_score_notes_what_it_replaces() -> None:
    old = {"value": 0.25, "n": 8, "samples": [1, 2], "before": [{"value": 0.125}], "key": "k"}
    first, second = scores.replaced(old, ["lm-eval was 1 and is 2 here"])
    assert first == {"value": 0.125}
    assert (second["value"], second["n"]) == (0.25, 8)
    assert second["why"] == ["lm-eval was 1 and is 2 here"]
    assert "samples" not in second
    assert scores.replaced(None, []) == []
