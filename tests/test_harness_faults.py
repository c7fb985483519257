"""Test what an evaluation keeps and whom it blames where it is stopped, killed or refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from stillhouse import pod
from stillhouse.errors import ContractError, exit_code_of
from stillhouse.evals.suite import LoadedTask, Scorer
from stillhouse.identity import baseline_key
from stillhouse.rundir import Runs, read_eval_note, read_json, write_json
from stillhouse.spec import EvalSpec
from tests.builders.micro_models import (
    ADAPTERS_ONLY,
    After,
    eval_spec,
    run_suite,
    scores_below,
    trained_run,
)


def test_of_two_that_score_the_same_at_once_one_score_stays(models_dir, tmp_path, monkeypatch):
    spec = eval_spec(models_dir, tmp_path, "eval_student=false", "eval_ptq=false")
    score, overtaken = Scorer.score, []

    def slowly(self: Scorer, model: Any, task: LoadedTask, label: str, examples: int = 0) -> Any:
        if not overtaken:
            overtaken.append(label)
            run_suite(spec)
            overtaken.extend(file.read_bytes() for file in scored())
        return score(self, model, task, label, examples)

    def scored() -> list[Path]:
        return sorted(tmp_path.glob("baselines/teacher-*/eval/*.json"))

    monkeypatch.setattr(Scorer, "score", slowly)
    run_suite(spec)
    assert overtaken == ["teacher", *(file.read_bytes() for file in scored())]


def test_being_stopped_keeps_what_is_finished_and_goes_on_to_the_same_table(
    models_dir, tmp_path, capsys
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for runs in (whole, stopped):
        trained_run(models_dir, runs, "name=one")

    def spec(runs: Path) -> EvalSpec:
        return eval_spec(models_dir, runs, "eval_teacher=false", "eval_student=false")

    run_suite(spec(whole))
    expected = capsys.readouterr().out
    codes, finished = [], []
    for polls in (4, 20, 10_000):
        codes.append(exit_code_of(lambda n=polls: run_suite(spec(stopped), After(n))))
        finished.append(len(scores_below(stopped)))
    assert codes == [85, 85, 0], (
        f"{finished}: the first stop falls into the middle of the first task"
    )
    assert finished[0] == 0 and 0 < finished[1] < 4 and finished[2] == 4
    printed = capsys.readouterr().out
    assert printed[printed.index("model  ") :] == expected[expected.index("model  ") :]


@pytest.mark.parametrize(
    ("size", "message"), [(0.0, "leaves every output as it is"), (float("nan"), "NaN")]
)
def test_an_adapter_without_effect_or_without_numbers_is_refused_and_costs_others_nothing(
    models_dir, tmp_path, size, message
):
    runs, apart = tmp_path / "runs", tmp_path / "apart"
    bad, good = (
        trained_run(models_dir, runs, "seed=1", size=size),
        trained_run(models_dir, runs, "seed=2"),
    )
    spec = eval_spec(models_dir, runs, f"lora_paths=[{bad.path},{good.path}]", "eval_teacher=false")
    with pytest.raises(ContractError, match=message):
        run_suite(spec)
    note = read_eval_note(bad.path, "error")
    assert note["code"] == 42 and message in note["cause"]
    assert scores_below(bad.path) == {} and len(scores_below(runs)) == 2 * 3

    alone = trained_run(models_dir, apart, "seed=2")
    run_suite(eval_spec(models_dir, apart, *ADAPTERS_ONLY))
    for task in ("tiny_gen", "tiny_mc"):
        beside, by_itself = (read_json(run.eval_file(task)) for run in (good, alone))
        assert beside and by_itself and beside["samples"] == by_itself["samples"]

    shutil.rmtree(bad.adapter)
    trained_run(models_dir, runs, "seed=1")
    before = scores_below(good.path)
    assert run_suite(spec) == 0
    assert len(scores_below(bad.path)) == 2 and scores_below(good.path) == before
    assert read_eval_note(bad.path, "error") == {}


def score_as_a_pod(spec: EvalSpec, deadly: str, told: Path) -> None:
    """An evaluation in a process of its own, which dies when it comes to the row `deadly`."""
    os.environ |= {"STILLHOUSE_JOB": "uid", "STILLHOUSE_EXIT_FILE": str(told)}
    score = Scorer.score

    def mortal(self: Scorer, model: Any, task: LoadedTask, label: str, examples: int = 0) -> Any:
        if label == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, model, task, label, examples)

    Scorer.score = mortal
    sys.exit(exit_code_of(lambda: run_suite(spec)))


def test_an_adapter_that_kills_its_process_is_blamed_and_the_others_are_scored(
    models_dir, tmp_path
):
    runs = tmp_path / "runs"
    bad, good = (
        trained_run(models_dir, runs, "name=bad"),
        trained_run(models_dir, runs, "name=good", "seed=2"),
    )
    spec = eval_spec(models_dir, runs, f"lora_paths=[{bad.path},{good.path}]", *ADAPTERS_ONLY)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.test_harness_faults"])

    def ended(deadly: str, told: Path) -> tuple[int | None, dict[str, Any]]:
        process = processes.Process(target=score_as_a_pod, args=(spec, deadly, told))
        process.start()
        process.join()
        lines = [json.loads(line) for line in told.read_text().splitlines()]
        return process.exitcode, pod.rows_of(lines, 137, "killed")

    at_work = {"failed": {bad.id: [137, "killed, while it was scored"]}}
    assert ended("int4_bad", tmp_path / "1") == (-signal.SIGKILL, at_work)
    assert scores_below(runs) == {}, "it was the first"
    code, rows = ended("int4_bad", tmp_path / "2")
    assert (code, rows) == (-signal.SIGKILL, at_work | {"done": good.id})
    assert len(scores_below(good.path)) == 2, "it comes last"
    code, rows = ended("int4_bad", tmp_path / "3")
    assert (code, rows["done"], rows["failed"][bad.id][0]) == (42, good.id, 42)
    assert "2 processes in a row died" in read_eval_note(bad.path, "error")["cause"]
    assert ended("nobody", tmp_path / "4")[0] == 0
    assert len(scores_below(bad.path)) == 2
    assert [*runs.glob("**/eval_*.json")] == []


def test_an_adapter_that_cannot_be_rebuilt_is_refused(models_dir, tmp_path):
    runs = tmp_path / "runs"
    run = trained_run(models_dir, runs)
    contract = json.loads((run.adapter / "stillhouse.json").read_text())

    def refused(message: str, **changes: Any) -> None:
        write_json(run.adapter / "stillhouse.json", contract | changes)
        with pytest.raises(ContractError, match=message):
            run_suite(eval_spec(models_dir, runs, f"lora_paths=[{run.path}]", *ADAPTERS_ONLY))
        assert scores_below(runs) == {}

    refused("trained over", base=contract["base"] | {"digest": "0" * 64})
    refused("would rebuild", numerics=contract["numerics"] | {"library_version": "0"})
    refused("unknown to this version", quant=contract["quant"] | {"quant_type": "nvfp4"})
    (run.adapter / "stillhouse.json").unlink()
    with pytest.raises(ContractError, match="numerics contract"):
        run_suite(eval_spec(models_dir, runs, f"lora_paths=[{run.path}]"))


def test_an_adapter_with_a_changed_tensor_is_refused(models_dir, tmp_path):
    runs = tmp_path / "runs"
    run = trained_run(models_dir, runs)
    file = run.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ContractError, match="not the file that training saved"):
        run_suite(eval_spec(models_dir, runs, f"lora_paths=[{run.path}]"))


def test_only_the_first_process_of_a_launcher_scores(models_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert run_suite(eval_spec(models_dir, tmp_path / "runs")) == 0
    assert capsys.readouterr().out == "" and not (tmp_path / "runs").exists()


def test_a_base_that_cannot_be_loaded_and_a_directory_without_room_fail_their_rows_alone(
    models_dir, tmp_path
):
    """/proc/self is a directory in which nobody can make a file, root included."""
    for role in ("student", "teacher"):
        shutil.copytree(models_dir / role, tmp_path / role)
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    runs = Runs(tmp_path / "runs")
    spec = eval_spec(tmp_path, runs.root)
    homes = {
        kind: runs.baseline(kind, baseline_key(kind, spec.pair, spec.quant, spec.data))
        for kind in ("teacher", "student", "ptq")
    }
    homes["ptq"].parent.mkdir(parents=True)
    homes["ptq"].symlink_to("/proc/self")
    with pytest.raises(ContractError, match=r"2 rows could not be scored") as error:
        run_suite(spec)
    assert "teacher cannot be loaded" in str(error.value)
    assert f"{homes['ptq']}/baseline.json: cannot be written" in str(error.value)
    assert {file.parent.parent for file in runs.root.rglob("eval/*.json")} == {homes["student"]}
