"""Test the analyses behind a report: numbers computed by hand, and whole tables as golden text."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stillhouse.errors import DIVERGED
from stillhouse.results.analyses import (
    ANALYSES,
    collapse,
    equal_compute,
    overlap,
    requantised,
    rollout_gap,
)
from stillhouse.results.answer import answer
from stillhouse.results.comparisons import design
from stillhouse.results.curves import Run, read_runs
from stillhouse.results.report import write_report
from stillhouse.results.section import Evidence
from stillhouse.results.stats import compare, detectable_difference, holm
from stillhouse.results.summary import notes, summary, wide
from stillhouse.results.table import load, points_of
from stillhouse.rundir import RunDir, Runs, read_json, write_atomic, write_json
from tests.builders.cliff_runs import SMALL, write_cliff
from tests.builders.sample_runs import OVERLAP, REQUANTIZED, Sample, write_sample

GOLDEN = Path(__file__).parent / "golden" / "report"
TWO = dataclasses.replace(SMALL, methods=("on_policy_gkd", "hybrid"))
BEHIND = ["loss = ce_pg, method = hybrid", "loss = ce_pg, method = reverse_curriculum"]


def evidence(name: str, root: Path) -> Evidence:
    frame: Any = load(name, root)
    return Evidence(frame, Runs(root), answer(frame), read_runs(frame, Runs(root)))


def titles(seen: Evidence) -> list[str]:
    return [made.title for made in (analyze(seen) for analyze in ANALYSES) if made.exhibits]


def standings(seen: Evidence) -> list[collapse.Standing]:
    return collapse.standings(seen.frame, seen.curves, seen.answer)


@pytest.fixture(scope="module")
def cliff(finished: Path) -> Evidence:
    return evidence("cliff", finished)


@pytest.mark.parametrize("name", ["cliff", "methods", "overlap", "requantized"])
def test_every_sentence_and_number_of_a_report_is_the_golden_one(
    name: str, report: Callable[[str], Path]
) -> None:
    assert (report(name) / "table.md").read_text() == (GOLDEN / f"{name}.md").read_text()


# ----------------------------------------------------------------------- comparisons of many arms


def test_methods_are_compared_within_each_loss_and_adjusted_over_all(cliff: Evidence) -> None:
    frame, found = cliff.frame, cliff.answer
    assert frame.attrs["follows"] == {"learning_rate": "loss"}
    assert points_of(frame)["arm"].iloc[0] == "loss = ce_pg, method = on_policy_gkd"
    made = design(frame)
    assert made is not None and made.others == ["loss"] and not made.averages
    assert found.settings == []
    both = ["extended_on_policy", "hybrid", "reverse_curriculum", "teacher_seeded"]
    assert [(c.setting, c.arm.removeprefix("method = ")) for c in found.main] == [
        *(("loss = ce_pg", method) for method in [*both, "sft"]),
        *(("loss = jsd", method) for method in [*both, "off_policy"]),
    ]
    points = frame[(frame["kind"] == "point") & (frame["task"] == "tiny_gen")]
    values = points.set_index(["loss", "method", "seed"])["value"]
    sft = next(c for c in found.main if c.arm == "method = sft")
    by_hand = [values["ce_pg", "sft", s] - values["ce_pg", "on_policy_gkd", s] for s in range(4)]
    assert sft.paired.difference.mean == pytest.approx(np.mean(by_hand))
    assert [c.p for c in found.main] == holm([c.paired.p for c in found.main])
    # What is detectable is so at 0.05 / 10: ten comparisons are read together.
    spread = float(np.std(by_hand, ddof=1))
    assert sft.paired.detectable == pytest.approx(detectable_difference(spread, 4, alpha=0.005))


def test_what_the_compared_field_determines_is_compared_with_it_and_said(tmp_path: Path) -> None:
    write_cliff(tmp_path, dataclasses.replace(SMALL, methods=("on_policy_gkd", "sft"), seeds=2))
    path = Runs(tmp_path).sweep_file("cliff")
    sweep = read_json(path) or {}
    wanted = (("jsd", "on_policy_gkd"), ("ce_pg", "sft"))
    points = [
        p for p in sweep["points"] if (p["overrides"]["loss"], p["overrides"]["method"]) in wanted
    ]
    write_json(path, sweep | {"points": points})
    frame: Any = load("cliff", tmp_path)
    assert frame.attrs["follows"] == {"learning_rate": "loss", "loss": "method"}
    assert [(c.arm, c.setting) for c in answer(frame).main] == [("method = sft", "")]
    (said,) = [note for note in notes(frame) if "follows from" in note]
    assert said == "loss follows from method, so a difference between values of method is of both."


def test_a_sweep_that_is_half_trained_is_answered_as_far_as_it_came(tmp_path: Path) -> None:
    for run in write_cliff(tmp_path, TWO)[:4]:  # the whole baseline of one loss
        unstart(run)
    seen = evidence("cliff", tmp_path)
    assert [c.setting for c in seen.answer.main] == ["loss = jsd"]
    shown = ["Comparisons on tiny_gen/exact_match", "Collapse and decline", "At equal compute"]
    assert titles(seen) == shown


def unstart(run: RunDir) -> None:
    for file in (run.spec_file, run.metrics_file, run.cost_file, *run.path.glob("eval/*.json")):
        file.unlink()
    (run.adapter / "adapter_model.safetensors").unlink()


# --------------------------------------------------------------------------- collapse and decline


def test_which_arms_collapsed_and_which_declined_is_said(cliff: Evidence) -> None:
    made = standings(cliff)
    assert len(made) == 12
    assert [s.arm for s in made if s.has_collapsed] == BEHIND[:1]
    assert [s.arm for s in made if s.has_declined] == BEHIND
    hybrid = next(s for s in made if s.arm == BEHIND[0])
    assert hybrid.verdict == "collapsed, declined during training"
    assert (hybrid.below, hybrid.seeds, hybrid.diverged) == (4, 4, 0)
    assert hybrid.curve is not None and hybrid.curve.highest[0] == 40
    said = collapse.summary_text(made)
    assert said.startswith("Collapsed (below the untrained student, 0.350): 1 of 12 arms (")
    assert f"Declined during training: 2 of 12 arms ({'; '.join(BEHIND)})." in said
    assert f"Seeds that ended below it: 4 of 4 ({BEHIND[0]})." in said


def test_a_decline_is_the_last_minus_the_best_paired_by_seed_and_adjusted_by_hand() -> None:
    fell = {10: {0: 0.6, 1: 0.7, 2: 0.8}, 20: {0: 0.3, 1: 0.3, 2: 0.5}}
    rose = {10: {0: 0.1, 1: 0.2, 2: 0.3}, 20: {0: 0.4, 1: 0.5, 2: 0.7}}
    made = collapse.curves_of({"fell": fell, "rose": rose})
    curve = made["fell"]
    assert curve.highest[0] == 10 and curve.last[0] == 20 == curve.lowest[0]
    assert curve.decline is not None
    # Differences -0.3, -0.4, -0.3: t = -10, and P(|T| > t) = 1 - t / sqrt(2 + t^2) with 2 degrees
    # of freedom. Two arms have one earlier measurement each, so Holm doubles it.
    assert curve.decline.paired.difference.mean == pytest.approx(-1 / 3)
    assert curve.decline.p == pytest.approx(2 * (1 - 10 / math.sqrt(102)))
    assert made["rose"].decline is None
    assert collapse.curves_of({"once": {10: fell[10]}})["once"].decline is None


def test_seeds_that_diverged_are_counted_and_are_in_no_mean(tmp_path: Path) -> None:
    made = write_cliff(tmp_path, TWO)
    made[0].update_status(phase="failed", exit_code=DIVERGED, cause="Diverged: loss nan at step 9")
    made[0].eval_file("tiny_gen").unlink()
    (made[0].adapter / "adapter_model.safetensors").unlink()
    found = standings(evidence("cliff", tmp_path))
    assert (found[0].diverged, found[0].seeds) == (1, 3)
    assert found[0].curve is not None and found[0].curve.last[1].n == 3
    said = "Seeds that diverged, and are in no mean: 1 (loss = ce_pg, method = on_policy_gkd)."
    assert said in collapse.summary_text(found)


def test_one_seed_lets_nothing_be_said_of_a_collapse(tmp_path: Path) -> None:
    write_cliff(tmp_path, dataclasses.replace(TWO, seeds=1))
    made = standings(evidence("cliff", tmp_path))
    assert not any(s.has_collapsed or s.has_declined for s in made)
    assert {s.verdict for s in made} == {"no statement against the untrained student"}
    assert collapse.summary_text(made) == ""


def test_a_sweep_that_measured_nothing_in_training_has_only_comparisons(finished: Path) -> None:
    seen = evidence("sample", finished)
    assert titles(seen) == ["Comparisons on tiny_gen/exact_match"]
    made = [analyze(seen) for analyze in ANALYSES]
    assert not any(section.arms or section.notes or section.context for section in made)
    assert all(draw() is None for section in made for draw in section.figures)


# --------------------------------------------------------------------------------- equal compute


def test_arms_stand_at_their_last_measurement_within_the_cheapest_runs_tokens(
    cliff: Evidence,
) -> None:
    found = equal_compute.at_equal_compute(cliff.frame, cliff.curves)
    spending = {s.arm: s for s in found.spending}
    # 1,600 tokens read in a step, 800 written by a student or 700 by a teacher; seeding has both.
    whole = {"off_policy": 230_000, "on_policy_gkd": 240_000, "extended_on_policy": 480_000}
    for method, tokens in (whole | {"teacher_seeded": 310_000}).items():
        assert spending[f"loss = jsd, method = {method}"].processed == tokens
    # The budget is that of teacher sequences only, 230,000; on-policy passed it after step 95.
    reached = {"off_policy": 100, "on_policy_gkd": 80, "extended_on_policy": 80}
    for method, steps in (reached | {"teacher_seeded": 60}).items():
        assert spending[f"loss = jsd, method = {method}"].steps == steps
    assert all(s.spent <= 230_000 for s in found.spending)
    accuracy = {
        (run.point["loss"], run.point["method"], run.point["seed"]): run.metrics["eval/accuracy"]
        for run in cliff.curves
    }
    ours: dict[Any, float] = {s: float(accuracy["jsd", "off_policy", s][100]) for s in range(4)}
    theirs: dict[Any, float] = {s: float(accuracy["jsd", "on_policy_gkd", s][80]) for s in range(4)}
    off = next(c for c in found.comparisons if c.arm == "method = off_policy")
    assert off.setting == "loss = jsd"
    assert off.paired == compare(ours, theirs, len(found.comparisons))


# ------------------------------------------------------------------------------------ requantized


def test_the_size_of_scoring_another_function_is_shown_paired(tmp_path: Path) -> None:
    lost = {0: 0.1, 1: 0.2, 2: 0.3}  # by seed
    for index, run in enumerate(write_sample(tmp_path, REQUANTIZED)):
        first, second = (run.eval_file(task.task) for task in REQUANTIZED.suite.tasks)
        value = (read_json(first) or {})["value"] - lost[index % 3]
        write_json(second, (read_json(second) or {}) | {"value": value, "samples": []})
    frame: Any = load("requantized", tmp_path)
    found = requantised.rescored(frame)
    assert list(found) == ["tiny_gen/exact_match, requantized"]
    pooled, *arms = found["tiny_gen/exact_match, requantized"]
    assert [c.arm for c in (pooled, *arms)] == ["all arms", "lmbda = 0", "lmbda = 1"]
    for c in (pooled, *arms):
        # -0.1, -0.2, -0.3 over three seeds: t = -0.2 / (0.1 / sqrt 3) = -3.4641.
        assert c.paired.difference.mean == pytest.approx(-0.2) and c.paired.difference.n == 3
        assert c.paired.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert arms[0].p == pytest.approx(2 * arms[0].paired.p) and pooled.p == pooled.paired.p
    said = "a difference of −0.200 ± 0.058 (n = 3) over all arms; of 2 arms, 2"
    assert said in requantised.summary_text(found)
    header = wide(summary(frame))[0]
    assert header == ["arm", "tiny_gen/exact_match ↑", "tiny_gen/exact_match, requantized ↑"]


# ---------------------------------------------------------------------------------------- overlap

STILL = dict.fromkeys(overlap.MEASURES, (0.5, 0.5))


def run_of(arm: str, seed: int, **ends: tuple[float, float]) -> Run:
    """A run that was measured twice; what is not given stays where it is."""
    columns = {f"overlap/{name}": list(pair) for name, pair in (STILL | ends).items()}
    columns |= {"overlap/positions": [100.0, 200.0], "overlap/empty": [50.0, 20.0]}
    return Run({"arm": arm, "seed": seed}, pd.DataFrame(columns, index=[1, 100]), 1.0, 100, 4)


def arm_of(name: str, **ends: tuple[float, float]) -> list[Run]:
    """An arm whose three seeds end a little apart, so that there is noise to judge by."""
    return [
        run_of(name, seed, **{k: (a, b + 0.01 * seed) for k, (a, b) in ends.items()})
        for seed in range(3)
    ]


def test_a_change_is_by_seed_from_the_first_measurement_to_the_last() -> None:
    (arm,) = overlap.overlaps(arm_of("a", ratio=(0.6, 0.8)))
    course = arm.courses["ratio"]
    assert course.first.mean == 0.6 and course.last.mean == pytest.approx(0.81)
    # 0.20, 0.21, 0.22: 0.21 ± 4.302653 × 0.01 / sqrt(3), by the t table.
    assert course.change.low == pytest.approx(0.21 - 4.302653 * 0.01 / 3**0.5)
    assert (arm.moved("ratio"), arm.moved("mass_teacher")) == (1, 0)
    assert arm.empty == pytest.approx(0.1)


def test_an_arm_that_was_measured_once_or_never_has_no_course() -> None:
    once = run_of("once", 0)
    once.metrics.loc[100] = float("nan")
    never = Run({"arm": "never"}, pd.DataFrame({"train/loss": [1.0]}, index=[1]), 0.0, 1, None)
    assert overlap.overlaps([once, never]) == []
    assert overlap.summary_text([]) == ""


def test_one_seed_shows_no_movement() -> None:
    found = overlap.overlaps([run_of("a", 0, ratio=(0.1, 0.9)), *arm_of("b", ratio=(0.6, 0.4))])
    assert found[0].moved("ratio") == 0
    said = overlap.summary_text(found)
    assert "failing pattern: the one arm." in said, "of b alone"
    assert said.endswith(
        "1 arm with one run each allow no statement: at the end the overlap ratio is higher in 1,"
        " the advantage closer to 0 in 0, the entropy gap smaller in 0."
    )


def test_overlap_is_told_by_the_papers_successful_and_failing_patterns() -> None:
    better = {"advantage": (-0.2, -0.05), "entropy_gap": (0.5, 0.2)}
    said = overlap.summary_text(overlap.overlaps(arm_of("a", ratio=(0.6, 0.8), **better)))
    assert "The overlap ratio of the 4 likeliest tokens of each side rose in the one arm" in said
    assert "(from 0.60 to 0.81; in the paper's successful runs from 0.72 to above 0.91)" in said
    assert "The entropy gap shrank in the one arm." in said
    assert said.endswith("That is the paper's successful pattern.")

    grows = arm_of("grows", ratio=(0.6, 0.8), advantage=(-0.2, -0.1))
    shrinks = arm_of("shrinks", ratio=(0.6, 0.4), entropy_gap=(0.1, 0.3))
    said = overlap.summary_text(overlap.overlaps([*grows, *arm_of("stands"), *shrinks]))
    assert "rose in 1 of 3 arms (grows) (from 0.60 to 0.81;" in said
    assert "and fell in 1 of 3 arms (shrinks)." in said
    assert "The entropy gap shrank in none of 3 arms and grew in 1 of 3 arms (shrinks)." in said
    assert said.endswith("is the paper's failing pattern: 2 of 3 arms (stands; shrinks).")

    said = overlap.summary_text(overlap.overlaps(arm_of("a", **better)))
    assert "rose in none of 1 arm." in said
    assert said.endswith(
        "The overlap ratio alone shows the paper's failing pattern, the other two its successful"
        " one: the one arm. In a small vocabulary they say more."
    )


def test_the_page_draws_overlap_over_steps_and_along_an_answer(
    report: Callable[[str], Path],
) -> None:
    directory = report("overlap")
    curves, mapped = ((directory / f"{n}.svg").read_text() for n in ("overlap", "overlap_map"))
    assert "<!-- advantage on shared tokens -->" in curves
    assert "<!-- 0–7 -->" in mapped and "<!-- 8– -->" in mapped
    assert (directory / "advantage_map.svg").exists()
    row = pd.read_csv(directory / "arms.csv").iloc[0]
    assert row["arm"] == "lmbda = 1" and row["overlap_empty"] == pytest.approx(0.025)


def test_a_bin_that_one_arms_rollouts_never_reach_is_blank_in_its_map(tmp_path: Path) -> None:
    sample = dataclasses.replace(OVERLAP, axes={"lmbda": [0.5, 1]})
    for run in write_sample(tmp_path, sample)[:3]:
        lines = [{k: v for k, v in m.items() if k != "overlap/ratio/8-"} for m in run.metrics()]
        write_atomic(run.metrics_file, "".join(json.dumps(m) + "\n" for m in lines).encode())
    page = write_report("overlap", tmp_path)
    assert "<!-- 8– -->" in (page.parent / "overlap_map.svg").read_text()


def test_a_sweep_without_overlap_has_neither_section_nor_figure(
    report: Callable[[str], Path],
) -> None:
    directory = report("sample")
    assert "overlap" not in (directory / "report.html").read_text()
    assert not list(directory.glob("overlap*"))


def test_how_far_rollouts_are_from_what_is_trained_is_shown_where_any_step_drew(
    tmp_path: Path,
) -> None:
    write_sample(tmp_path, Sample(gaps=True))
    seen = evidence("sample", tmp_path)
    found = rollout_gap.as_records(seen.curves)
    assert set(found) == {"lmbda = 0.5", "lmbda = 1"}
    assert 3.9e-6 < found["lmbda = 1"]["rollout_gap_largest"] < 4e-6
    assert rollout_gap.as_table(found)[1][1][2:] == ["4e-06", "1"]
    assert titles(seen)[-1] == "Rollout gap"
    drawn = rollout_gap.gap_curves(seen.frame, seen.curves)
    assert drawn is not None and drawn[1] == "rollout_gap"
    assert [axis.get_yscale() for axis in drawn[0].axes] == ["log", "linear"]
    # λ = 0 draws nothing, so two of three arms have a line.
    assert [len(axis.lines) for axis in drawn[0].axes] == [2, 2]


def test_a_teacher_that_reads_examples_first_is_shown_as_such(tmp_path: Path) -> None:
    write_sample(tmp_path, Sample(seeds=1))
    file = next((tmp_path / "baselines").glob("teacher-*/eval/tiny_gen.json"))
    write_json(file, (read_json(file) or {}) | {"examples": 4})
    shown = summary(load("sample", tmp_path)).set_index(["arm", "task"])["shown"]
    assert shown["teacher", "tiny_gen"].endswith(", after 4 examples)")
    assert "examples" not in shown["student", "tiny_gen"] + shown["teacher", "tiny_mc"]
