"""Test the sweep loop over real processes: what it starts, how often, and that it ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from stillhouse.errors import ContractError
from stillhouse.rundir import (
    RunDir,
    Runs,
    code_identity,
    read_eval_note,
    read_json,
    write_json,
)
from stillhouse.sweep import registry, verbs
from stillhouse.sweep.driver import Driver
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.progress import Lines
from stillhouse.sweep.snapshot import observe
from tests.fakes import behaving


def sweep_in(runs: Path, *more: str, points: int = 2, parallel: int = 2) -> Sweep:
    return load_sweep(None, [*behaving.words(runs, *more, points=points, parallel=parallel)], runs)


def drive(sweep: Sweep) -> int:
    return Driver(sweep, behaving.executor_for(sweep), Lines(sweep, [].append)).run()


def states(sweep: Sweep) -> list[str]:
    seen = observe(sweep)
    return [seen[point.id].state for point in sweep.points]


def ids(sweep: Sweep) -> list[str]:
    return [point.id for point in sweep.points]


def check_each_step_once(runs: Sequence[RunDir]) -> None:
    for run in runs:
        steps = [line["step"] for line in run.metrics()]
        assert steps == list(range(len(steps)))


def test_each_point_is_trained_once_scored_once_and_then_left_alone(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, "pack=3", points=5)
    assert drive(sweep) == 0
    assert states(sweep) == ["done"] * 5
    assert sorted(behaving.begun(tmp_path, "train")) == sorted(ids(sweep))
    assert behaving.begun(tmp_path, "prepare") == ["tiny/int4"]
    packs = [pack.split(",") for pack in behaving.begun(tmp_path, "eval")]
    scored = [name for pack in packs for name in pack]
    assert sorted(scored) == sorted([*ids(sweep), "teacher", "student", "ptq"])
    assert max(len(set(pack) & set(ids(sweep))) for pack in packs) == 3
    assert drive(sweep) == 0
    assert len(behaving.begun(tmp_path, "")) == 5 + 1 + len(packs)


def test_poison_is_not_tried_twice_and_infrastructure_is(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, points=3)
    poisoned, killed, well = ids(sweep)
    behaving.misbehave(tmp_path, poisoned, exit="diverged", times=9)
    behaving.misbehave(tmp_path, killed, kill="SIGKILL", times=2)
    assert drive(sweep) == 1
    assert states(sweep) == ["failed", "done", "done"]
    trained = behaving.begun(tmp_path, "train")
    assert [trained.count(id_) for id_ in (poisoned, killed, well)] == [1, 3, 1]
    check_each_step_once([sweep.run(killed)])
    assert drive(sweep) == 1
    assert behaving.begun(tmp_path, "train") == trained


def test_infrastructure_is_given_up_after_a_bound(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, "infra_retries=1", points=1)
    behaving.misbehave(tmp_path, exit="crash", times=9)
    assert drive(sweep) == 1
    assert len(behaving.begun(tmp_path, "train")) == 2
    seen = observe(sweep)[ids(sweep)[0]]
    assert seen.cause == "RuntimeError: as it was told to (given up after 2 attempts)"


def test_one_broken_adapter_does_not_take_its_pack_with_it(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, points=3, parallel=1)
    registry.write(sweep)
    bad = ids(sweep)[1]
    behaving.misbehave(tmp_path, bad, eval_fails="contract")
    assert drive(sweep) == 1
    assert states(sweep) == ["done", "failed", "done"]
    assert observe(sweep)[bad].cause == f"ContractError: {bad} cannot be scored"
    assert not any(sweep.run(id_).is_locked() for id_ in ids(sweep))
    rows = [RunDir(row.directory) for row in sweep.baselines]
    assert all(list((row.path / "eval").iterdir()) for row in rows)
    assert [pack.count(",") for pack in behaving.begun(tmp_path, "eval")] == [3 + 3 - 1]
    behaving.misbehave(tmp_path, bad)
    (name,) = registry.names(tmp_path)
    assert verbs.retry(verbs.Call(target=name, runs=tmp_path)) == 0
    assert drive(sweep) == 0
    assert behaving.begun(tmp_path, "eval")[1:] == [bad], "the others keep their scores"
    assert read_eval_note(sweep.run(bad).path, "error") == {}


def test_what_may_pass_in_one_adapter_is_tried_again_for_that_one(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, "infra_retries=1", points=3, parallel=1)
    bad = ids(sweep)[0]
    behaving.misbehave(tmp_path, bad, eval_fails="crash")
    assert drive(sweep) == 1
    assert states(sweep) == ["failed", "done", "done"]
    assert behaving.begun(tmp_path, "eval")[1:] == [bad]
    cause = f"RuntimeError: {bad} cannot be scored (given up after 2 attempts)"
    assert observe(sweep)[bad].cause == cause


def test_an_adapter_that_kills_its_process_is_blamed_and_the_others_are_scored(
    tmp_path: Path,
) -> None:
    sweep = sweep_in(tmp_path, "infra_retries=1", points=3, parallel=1)
    bad = ids(sweep)[0]
    behaving.misbehave(tmp_path, bad, eval_kill="SIGKILL")
    assert drive(sweep) == 1
    assert states(sweep) == ["failed", "done", "done"]
    cause = "killed by SIGKILL, while it was scored (given up after 2 attempts)"
    assert observe(sweep)[bad].cause == cause
    assert len(behaving.begun(tmp_path, "eval")) == 2, "the second one scored the others first"


def test_a_baseline_that_cannot_be_scored_fails_alone(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, points=2)
    behaving.misbehave(tmp_path, "teacher", eval_fails="contract")
    backend, lines = behaving.executor_for(sweep), Lines(sweep, [].append)
    loop = Driver(sweep, backend, lines)
    assert loop.run() == 1
    assert states(sweep) == ["done", "done"]
    (what,) = loop.failures()
    assert what.startswith("baseline teacher-")


def test_a_pair_that_cannot_be_had_fails_no_point(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path)
    (tmp_path / "no-weights").touch()
    loop = Driver(sweep, behaving.executor_for(sweep), Lines(sweep, [].append))
    assert loop.run() == 1
    cause = "ConfigError: pair tiny: its weights are not at hand; fetch them"
    assert loop.failures() == {"the pair of tiny/int4": cause}
    assert states(sweep) == ["new", "new"]
    (tmp_path / "no-weights").unlink()
    assert drive(sweep) == 0


def test_two_launchers_at_once_train_every_point_once(tmp_path: Path) -> None:
    behaving.misbehave(tmp_path, steps=5, step_s=0.05)
    words = behaving.words(tmp_path, points=6)
    launchers = [behaving.start_launcher(tmp_path, *words) for _ in range(2)]
    assert [launcher.wait(60) for launcher in launchers] == [0, 0]
    sweep = sweep_in(tmp_path, points=6)
    assert states(sweep) == ["done"] * 6
    assert sorted(behaving.begun(tmp_path, "train")) == sorted(ids(sweep))


def test_workers_outlive_a_server_that_dies_and_are_waited_for(tmp_path: Path) -> None:
    behaving.misbehave(tmp_path, steps=60, step_s=0.05)
    launcher = behaving.start_launcher(tmp_path, *behaving.words(tmp_path, points=3))
    run = behaving.at_work(tmp_path, 2)[0]
    os.kill(behaving.parent_of(run.status()["pid"]), signal.SIGKILL)
    assert launcher.wait(60) == 0
    sweep = sweep_in(tmp_path, points=3)
    assert states(sweep) == ["done"] * 3
    assert sorted(behaving.begun(tmp_path, "train")) == sorted(ids(sweep))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_saves_and_the_next_run_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    behaving.misbehave(tmp_path, steps=40, step_s=0.05)
    sweep = sweep_in(tmp_path, points=3)
    launcher = behaving.start_launcher(tmp_path, *behaving.words(tmp_path, points=3))
    runs = behaving.at_work(tmp_path, 2)
    launcher.send_signal(number)
    assert launcher.wait(40) == 85
    assert sorted(states(sweep)) == ["new", "waiting", "waiting"]
    assert [run.status()["exit_code"] for run in runs] == [85, 85]
    steps = [len(run.metrics()) for run in runs]
    assert max(steps) < 40, "it was too quick to be interrupted"
    behaving.misbehave(tmp_path, steps=40, step_s=0.0)
    assert drive(sweep) == 0
    assert states(sweep) == ["done"] * 3
    check_each_step_once([sweep.run(id_) for id_ in ids(sweep)])


def test_a_second_ctrl_c_kills_what_does_not_listen(tmp_path: Path) -> None:
    behaving.misbehave(tmp_path, steps=10_000, step_s=0.02, deaf=True)
    launcher = behaving.start_launcher(tmp_path, *behaving.words(tmp_path, points=1))
    (run,) = behaving.at_work(tmp_path, 1)
    launcher.send_signal(signal.SIGINT)
    launcher.send_signal(signal.SIGTERM)  # as `make` does; it is not a second Ctrl-C
    out = tmp_path / "launcher.out"
    behaving.until(lambda: "stopping: 1 at work" in out.read_text())
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(40) == 85
    assert run.status()["cause"] == "killed by SIGKILL"
    assert states(sweep_in(tmp_path, points=1)) == ["waiting"]


def test_cancel_ends_a_run_that_is_under_way_and_the_next_one_goes_on(tmp_path: Path) -> None:
    behaving.misbehave(tmp_path, steps=2_000, step_s=0.02)
    words = behaving.words(tmp_path, points=3, parallel=1)
    launcher = behaving.start_launcher(tmp_path, *words)
    behaving.at_work(tmp_path, 1)
    (name,) = registry.names(tmp_path)
    assert verbs.cancel(verbs.Call(target=name, runs=tmp_path)) == 0
    assert launcher.wait(40) == 85
    sweep = sweep_in(tmp_path, points=3, parallel=1)
    assert states(sweep) == ["waiting", "new", "new"]
    behaving.misbehave(tmp_path, steps=3)
    assert drive(sweep) == 0


def test_cancelling_one_point_leaves_the_others_to_their_end(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, points=2)
    first, second = ids(sweep)
    behaving.misbehave(tmp_path, first, steps=2_000, step_s=0.02)
    launcher = behaving.start_launcher(tmp_path, *behaving.words(tmp_path, points=2))
    behaving.until(lambda: observe(sweep)[first].step > 1)
    verbs.cancel(verbs.Call(target=first, runs=tmp_path))
    assert launcher.wait(40) == 85
    assert states(sweep) == ["waiting", "done"]
    assert behaving.begun(tmp_path, "train").count(first) == 1


def test_drifted_points_wait_for_a_word_and_remember_both_codes(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, points=1)
    run = sweep.run(ids(sweep)[0])
    behaving.misbehave(tmp_path, exit="crash")
    drive(sweep_in(tmp_path, "infra_retries=0", points=1))
    run.update_status(gave_up=False)
    record = read_json(run.spec_file)
    assert record is not None
    old = {**record["code"], "digest": "0123456789abcdef"}
    write_json(run.spec_file, record | {"code": old})
    assert states(sweep) == ["drifted"]
    words = behaving.words(tmp_path, points=1)
    call = verbs.Call(words=words, runs=tmp_path)
    assert verbs.run(call, behaving.executor_for) == 1
    assert len(behaving.begun(tmp_path, "train")) == 1
    new = verbs.Call(words=words, runs=tmp_path, is_new_code=True)
    assert verbs.run(new, behaving.executor_for) == 0
    record = read_json(run.spec_file)
    assert record is not None
    assert record["code"]["digest"] == code_identity()["digest"]
    assert record["earlier_code"] == [old]


def test_a_name_that_means_another_run_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    other = Runs(tmp_path).of(sweep_in(tmp_path, points=2).points[1].spec)
    Runs(tmp_path).link_name("mine", other)
    sweep = sweep_in(tmp_path, "name=mine", points=1)
    with pytest.raises(ContractError, match="already means"):
        registry.write(sweep)
    assert registry.names(tmp_path) == []


def test_driving_never_loads_torch(tmp_path: Path) -> None:
    launcher = behaving.start_launcher(tmp_path, *behaving.words(tmp_path, points=1))
    assert launcher.wait(40) == 0
    assert (tmp_path / "launcher.out").read_text().endswith("heavy modules: []\n")
