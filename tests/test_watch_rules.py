"""Test watch rules: what they detect, what they stop, and what they report."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse import entrypoints
from stillhouse.cli import main
from stillhouse.compose import Overrides, as_command_line, compose, data_file, from_command_line
from stillhouse.distill.encoded import Example
from stillhouse.distill.loop import Logits, Scorer
from stillhouse.distill.run import Run
from stillhouse.errors import STOPPED, Stopped
from stillhouse.rundir import RunDir, Runs
from stillhouse.spec import TrainSpec
from stillhouse.stop import StopFlag
from stillhouse.watch_rules import Watch, logged, replayed, rules_of
from tests.builders.cheap import cheap, words
from tests.builders.sample_runs import write_sample

PACKAGED = ["overlap_stuck", "length_inflation", "repetition", "entropy_collapse", "kl_runaway"]


# As they are for a pair that says nothing of its own.
SHIPPED = data_file("train")["watch"]["watch_rules"]


def rule(name: str = "mine", **fields: Any) -> str:
    """One rule, and no other, as a word of a command line."""
    whole = {
        "metric": "train/loss", "condition": "above", "limit": 1, "window": 2,
        "unless_above": None, "action": "warn", "optional": False,
    } | fields  # fmt: skip
    inside = ",".join(f"{key}:{_word(value)}" for key, value in whole.items())
    return f"watch_rules={{{name}:{{{inside}}}}}"


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"'{value}'" if isinstance(value, str) else f"{value}"


def spec_of(*more: str, steps: int = 40) -> TrainSpec:
    line = ["pair=tiny", "method=on_policy_gkd", f"max_steps={steps}", *more]
    return compose(from_command_line(line, TrainSpec), TrainSpec)


def fires(values: Sequence[float | None], **fields: Any) -> int | None:
    """The step at which a rule on this course of the loss finds something."""
    watch = Watch(spec_of(rule(**fields)))
    for step, value in enumerate(values):
        found = watch.see({"step": step} | ({} if value is None else {"train/loss": value}))
        if found:
            return step
    return None


# ---- conditions, by hand


def test_above_and_below_are_of_the_mean_over_a_whole_window() -> None:
    course = [9, 0, 0, 2, 1, 0]  # means of two: –, 4.5, 0, 1, 1.5, 0.5
    assert fires(course, condition="above", limit=4) == 1
    assert fires(course, condition="above", limit=5) is None
    assert fires(course, condition="below", limit=0.5) == 2
    assert fires(course[1:], condition="below", limit=-1) is None


def test_nothing_is_said_before_a_window_is_full() -> None:
    assert fires([9, 9, 9, 9], limit=1, window=4) == 3
    assert fires([9, 9, 9], limit=1, window=4) is None


def test_gains_less_compares_the_halves_of_a_window() -> None:
    rising, flat = [0.1 * step for step in range(8)], [0.5] * 8
    fields = {"condition": "gains_less", "limit": 0.05, "window": 4}
    assert fires(rising, **fields) is None
    assert fires(flat, **fields) == 3
    assert fires([*rising, *[0.7] * 8], **fields) == 9  # 0.6 0.7 0.7 0.7: gains 0.05, and is off


def test_what_stands_high_enough_may_stand_still() -> None:
    fields = {"condition": "gains_less", "limit": 0.05, "window": 4, "unless_above": 0.9}
    assert fires([0.95] * 8, **fields) is None
    assert fires([0.85] * 8, **fields) == 3


def test_above_lowest_compares_with_windows_that_ended_before_this_one_began() -> None:
    course = [4, 4, 1, 1, 2, 2, 3.2, 3.2]  # means: 4 2.5 1 1.5 2 2.6 3.2 at steps 1 to 7
    fields = {"condition": "above_lowest", "limit": 3, "window": 2}
    assert fires(course, **fields) == 7
    assert fires(course, **{**fields, "limit": 1.9}) == 5  # 2 over 1, of steps 2 and 3
    assert fires([1, 1, 5, 5], **{**fields, "window": 4}) is None


def test_steps_that_do_not_log_the_metric_are_left_out_of_a_window() -> None:
    course = [0, None, None, 3, None, None, 3, None, None, 3]
    assert fires(course, limit=2, window=6) == 6
    assert fires(course, condition="gains_less", limit=0.1, window=6) == 6


def test_a_rule_speaks_once_and_says_where_what_and_what_was_allowed() -> None:
    watch = Watch(spec_of(rule(limit=2)))
    found = [f for step in range(5) for f in watch.see({"step": step, "train/loss": 3.0})]
    (finding,) = found
    assert finding.step == 1
    assert finding.text == "mine: train/loss is 3 on average over steps 0 to 1, above 2"


def test_a_replay_finds_what_the_run_found() -> None:
    course = [{"step": step, "train/loss": value} for step, value in enumerate([0, 0, 9, 9, 0.0])]
    _, found = replayed(spec_of(rule(limit=8)), course)
    assert [f.step for f in found] == [3]


# ---- at plan time

REFUSED = {
    rule(metric="train/los"): 'this run logs no metric train/los. Did you mean "train/loss"?',
    rule(metric="overlap/ratio") + " overlap_steps=0": "this run logs no metric overlap/ratio",
    rule(metric="overlap/ratio") + " method=off_policy": "this run logs no metric overlap/ratio",
    rule(metric="eval/accuracy"): "this run logs no metric eval/accuracy",
    rule(metric="time/step"): "this run logs no metric time/step",
    rule(window=41) + " max_steps=40": "its window of 41 steps is longer than the run, 40",
    rule(
        condition="gains_less", window=1
    ): "gains_less compares the halves of its window: 2 or more",
    rule(condition="sideways"): "input should be 'above', 'below', 'gains_less' or 'above_lowest'",
    "stop_on=[kl_runway]": "stop_on: no watch rule kl_runway; there is overlap_stuck,",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_rule_that_can_find_nothing_is_refused_before_anything_starts(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "pair=tiny", *line.split(), "--runs", str(tmp_path)]) == 42
    said = capsys.readouterr()
    assert said.out == "" and REFUSED[line] in said.err


def test_optional_rules_are_left_out_where_they_have_nothing_to_look_at() -> None:
    assert [*rules_of(spec_of(steps=100))] == PACKAGED
    assert [*rules_of(spec_of(steps=15))] == ["repetition", "kl_runaway"]
    off = spec_of("method=off_policy", steps=100)
    assert [*rules_of(off)] == ["entropy_collapse", "kl_runaway"]


def test_a_rule_is_no_part_of_a_point(tmp_path: Path) -> None:
    plain, stopping = cheap(tmp_path), cheap(tmp_path, rule(action="stop"))
    assert Runs(tmp_path).of(plain) == Runs(tmp_path).of(stopping)


@pytest.mark.parametrize(
    "line",
    [
        "lmbda=1", "lmbda=0", "method=mixture", "method=kl_anchored", "method=replay_buffer",
        "lmbda=1 overlap_steps=0",
        "lmbda=1 accuracy_steps=1 score_steps=1 do_eval=true eval_steps=1",
    ],
)  # fmt: skip
def test_what_is_said_to_be_logged_is_what_is_logged(line: str, tmp_path: Path) -> None:
    spec = cheap(tmp_path, "max_steps=3", "held_out_rows=4", *line.split())
    run = Runs(tmp_path).of(spec)
    assert entrypoints.train(spec) == 0
    found = {name for metrics in run.metrics() for name in metrics}
    names = {name for name in found if name != "step" and not name.startswith("time/")}
    never = {name for name in logged(spec) - names if not name.startswith("overlap/")}
    assert names <= logged(spec)
    # A buffer may not have drawn what was put into it within three steps.
    assert never <= {"train/off_policy_loss"}


# ---- the packaged rules, on runs that have the illness and on one that has none


# The cheap pair's models know next to nothing; these are a teacher and a student of it.
PAIR = ["teacher_steps=100", "student_steps=150", "max_new_tokens=16", "overlap_steps=1"]
PAIR += as_command_line(Overrides({}, {"watch.watch_rules": SHIPPED}))
PAIR += ["beta=0", "per_device_train_batch_size=4", "sanity_max_nll=99"]


def trained(root: Path, *more: str, ill: Callable[[Run], None] | None = None) -> set[str]:
    """The packaged rules that warn of a run of 52 steps, of a student with something to learn."""
    spec = cheap(root, *PAIR, "lmbda=1", "max_steps=52", "save_steps=52", *more)
    run = Run(spec, Runs(root).of(spec), StopFlag())
    if ill is not None:
        ill(run)
    run.train()
    return set(run.dir.status().get("warnings") or {})


def taught(change: Callable[[Run, int, torch.Tensor], torch.Tensor]) -> Callable[[Run], None]:
    """A teacher whose logits are changed, from step to step."""

    def ill(run: Run) -> None:
        score: Scorer = run.loop.score
        steps = itertools.count()

        def scored(
            examples: Sequence[Example],
            completions: Sequence[Sequence[int]],
            forced: Sequence[int],
        ) -> Logits:
            logits, step = score(examples, completions, forced), next(steps)
            return lambda rows: change(run, step, logits(rows))

        run.loop.score = scored

    return ill


def wants(token_of: Callable[[Run], int], by: Callable[[int], float]) -> Callable[[Run], None]:
    """A teacher that wants one token more, or less, than it does."""

    def change(run: Run, step: int, logits_nV: torch.Tensor) -> torch.Tensor:
        bent_nV = logits_nV.clone()
        bent_nV[:, token_of(run)] += by(step)
        return bent_nV

    return taught(change)


def end_of_text(run: Run) -> int:
    return run.roles.eos_ids[0]


def a_digit(run: Run) -> int:
    return run.prompts.train[0].completion_ids[0]


def changes_its_mind(step: int) -> float:
    """First it wants answers to end at once, then never."""
    return 20.0 if step < 25 else -20.0


ILL: dict[tuple[str, ...], tuple[list[str], Callable[[Run], None]]] = {
    # A teacher that doubts everything, and a student that does not and learns nothing.
    ("overlap_stuck", "entropy_collapse"): (
        ["learning_rate=1e-9"], taught(lambda run, step, z_nV: 0.2 * z_nV),
    ),
    ("length_inflation", "kl_runaway"): ([], wants(end_of_text, changes_its_mind)),
    ("repetition",): (
        ["max_new_tokens=24", "per_device_train_batch_size=8", "max_steps=60"],
        wants(a_digit, lambda step: 20.0),
    ),
}  # fmt: skip


def test_every_packaged_rule_has_its_illness() -> None:
    assert {*itertools.chain(*ILL)} == {*PACKAGED}


@pytest.mark.parametrize("names", ILL, ids="-".join)
def test_packaged_rules_warn_of_their_illness(names: tuple[str, ...], tmp_path: Path) -> None:
    line, ill = ILL[names]
    assert {*names} <= trained(tmp_path, *line, ill=ill)


def test_no_packaged_rule_warns_of_a_run_that_learns(tmp_path: Path) -> None:
    assert trained(tmp_path) == set()


def test_rollouts_that_grow_by_schedule_are_no_inflation(tmp_path: Path) -> None:
    growing = ["horizon=[[0,0.2],[1,1]]"]
    assert "length_inflation" not in trained(tmp_path, *growing)
    (run,) = (p for p in tmp_path.iterdir() if (p / "metrics.jsonl").exists())
    lengths = [m["rollout/length"] for m in RunDir(run).metrics()]
    assert max(lengths) > 2 * min(lengths), "they do grow"


# ---- stopping


def test_a_rule_ends_the_run_with_its_state_saved_and_says_which_it_was(tmp_path: Path) -> None:
    spec = cheap(tmp_path, "lmbda=0", rule("too_high", limit=-1, window=3, action="stop"))
    with pytest.raises(Stopped) as stopped:
        entrypoints.train(spec)
    assert stopped.value.exit_code == STOPPED
    run = Runs(tmp_path).of(spec)
    status = run.status()
    assert (status["exit_code"], status["stopped_by"], status["step"]) == (46, "too_high", 3)
    assert status["cause"].startswith("Stopped: by watch rule too_high: train/loss is ")
    assert "step-3" in [path.name for path in run.checkpoints.iterdir()]
    assert len(run.metrics()) == 3 and not run.is_trained()


def test_the_same_line_stops_again_without_a_step_and_without_the_rule_goes_on_to_the_same_bits(
    tmp_path: Path,
) -> None:
    stopping = rule("too_high", limit=-1, window=3, action="stop")
    spec = cheap(tmp_path / "a", "lmbda=1", stopping)
    for _ in range(5):  # more often than attempts without progress are forgiven
        with pytest.raises(Stopped, match="over steps 0 to 2"):
            entrypoints.train(spec)
    run = Runs(tmp_path / "a").of(spec)
    assert len(run.metrics()) == 3
    assert entrypoints.train(cheap(tmp_path / "a", "lmbda=1")) == 0
    status = run.status()
    assert not status["stopped_by"] and not status["warnings"], "it is not stopped any more"
    never = cheap(tmp_path / "b", "lmbda=1")
    assert entrypoints.train(never) == 0
    assert timeless(run) == timeless(Runs(tmp_path / "b").of(never))


def timeless(run: RunDir) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in run.metrics()]


def test_a_warning_ends_nothing_and_stands_in_the_status(tmp_path: Path) -> None:
    spec = cheap(tmp_path, "lmbda=0", rule(limit=-1))
    assert entrypoints.train(spec) == 0
    warnings = Runs(tmp_path).of(spec).status()["warnings"]
    assert list(warnings) == ["mine"] and warnings["mine"].startswith("mine: train/loss is ")


def test_stop_on_makes_a_warning_the_end(tmp_path: Path) -> None:
    spec = cheap(tmp_path, "lmbda=0", rule(limit=-1), "stop_on=[mine]")
    with pytest.raises(Stopped):
        entrypoints.train(spec)


def test_warnings_stand_in_the_status_and_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "kl_runaway: train/reverse_kl is 2.82 on average"
    for run in write_sample(tmp_path)[:2]:
        run.update_status(warnings={"kl_runaway": text})
    main(["status", "sample", "--runs", str(tmp_path)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert line.startswith(f"  warning  2: {text} [")
    assert main(["report", "sample", "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "- Watch rule kl_runaway warned in 2 of 9 runs: 2 of lmbda = 0." in said


def test_in_a_sweep_a_stopped_point_is_an_outcome_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping = rule("slow", metric="train/learning_rate", condition="below", limit=1e-3)
    line = words(tmp_path, "lmbda=0", stopping, "stop_on=[slow]", "suite=tiny", "limit=4")
    line = [word for word in line if not word.startswith("runs=")]
    sweep = ["learning_rate=1e-4,5e-3", "--runs", str(tmp_path)]
    assert main(["run", *line, *sweep]) == 1
    said = capsys.readouterr()
    assert "stopped" in said.out + said.err
    (name,) = (file.stem for file in (tmp_path / "sweeps").glob("*.json"))
    assert main(["status", name, "--runs", str(tmp_path), "--json"]) == 1
    points = json.loads(capsys.readouterr().out)["points"]
    assert sorted(point["state"] for point in points) == ["done", "stopped"]
    (stopped,) = (point for point in points if point["state"] == "stopped")
    assert "by watch rule slow: train/learning_rate is 0.0001" in stopped["cause"]
    assert main(["run", *line, *sweep]) == 1  # asked again: it is not tried again
    capsys.readouterr()
    assert main(["report", name, "--runs", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| 1 stopped by slow" in table
    assert "1 of 2 points are not fully scored: 1 stopped by slow." in table


def test_what_is_infinite_says_the_same_live_and_after_a_resume_which_reads_null() -> None:
    course = [1.0, math.inf, 1.0, 9.0]
    live = fires(course, condition="above", limit=4, window=1)
    resumed = fires(
        [None if v == math.inf else v for v in course], condition="above", limit=4, window=1
    )
    assert live == resumed == 3
