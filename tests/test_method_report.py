"""What a report says of many methods: within each loss, of a fall, and at equal compute."""

# pandas annotates its results as unions of everything it could return.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from cliff_runs import Cliff, write_cliff
from sample_runs import SUITE, Sample, write_sample

from stillhouse.errors import DIVERGED
from stillhouse.results import budget, collapse, requantised
from stillhouse.results.answer import answer
from stillhouse.results.comparisons import design
from stillhouse.results.curves import read
from stillhouse.results.predictions import Predictions
from stillhouse.results.report import write_report
from stillhouse.results.sections import sections
from stillhouse.results.stats import compare, detectable_difference, holm
from stillhouse.results.summary import remarks, summary, wide
from stillhouse.results.table import load, points_of
from stillhouse.rundir import RunDir, Runs, read_json, write_json
from stillhouse.spec import REQUANTISED, TaskSpec

NOBODY = Predictions([], [])  # of whose pair a preflight was asked
SMALL = Cliff(
    methods=("on_policy_gkd", "extended_on_policy", "hybrid", "reverse_curriculum")
    + ("teacher_seeded", "off_policy", "sft"),
    seeds=4,
)
FELL = ["loss = ce_pg, method = hybrid", "loss = ce_pg, method = reverse_curriculum"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_cliff(root, SMALL)
    return root


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    return write_report("cliff", runs).read_text()


def test_a_rate_that_follows_from_the_loss_is_in_no_arms_name(runs: Path, page: str) -> None:
    frame = load("cliff", runs)
    assert frame.attrs["follows"] == {"learning_rate": "loss"}
    assert points_of(frame)["arm"].iloc[0] == "loss = ce_pg, method = on_policy_gkd"
    made = design(frame)
    assert made is not None and made.others == ["loss"] and not made.averages
    assert "0.001, 0.005 (follows from loss)" in page


def test_methods_are_compared_within_each_loss_and_adjusted_over_all(runs: Path) -> None:
    frame = load("cliff", runs)
    found = answer(frame)
    assert found.settings == []
    made = [(c.setting, c.arm.removeprefix("method = ")) for c in found.main]
    both = ["extended_on_policy", "hybrid", "reverse_curriculum", "teacher_seeded"]
    assert made == [
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
    assert "within each loss, against method = on_policy_gkd: at loss = ce_pg, of 5" in found.text
    assert "at loss = jsd, of 5 other values, 5 within noise (" in found.text


def test_what_the_compared_leaf_decides_is_compared_with_it_and_said(tmp_path: Path) -> None:
    write_cliff(tmp_path, dataclasses.replace(SMALL, methods=("on_policy_gkd", "sft"), seeds=2))
    path = Runs(tmp_path).sweep_file("cliff")
    sweep = read_json(path)
    assert sweep is not None
    wanted = (("jsd", "on_policy_gkd"), ("ce_pg", "sft"))
    points = [
        p for p in sweep["points"] if (p["overrides"]["loss"], p["overrides"]["method"]) in wanted
    ]
    write_json(path, sweep | {"points": points})
    frame = load("cliff", tmp_path)
    assert frame.attrs["follows"] == {"learning_rate": "loss", "loss": "method"}
    assert [(c.arm, c.setting) for c in answer(frame).main] == [("method = sft", "")]
    assert "loss follows from method: a difference between values of method is of both." in remarks(
        frame
    )


def test_which_arms_collapsed_and_which_fell_is_said(runs: Path) -> None:
    frame = load("cliff", runs)
    made = collapse.standings(frame, read(frame, Runs(runs)), answer(frame))
    assert len(made) == 12
    assert [s.arm for s in made if s.has_collapsed] == FELL[:1]
    assert [s.arm for s in made if s.has_fallen] == FELL
    hybrid = next(s for s in made if s.arm == FELL[0])
    assert hybrid.verdict == "collapsed, fell during training"
    assert (hybrid.below, hybrid.seeds, hybrid.diverged) == (4, 4, 0)
    assert hybrid.curve is not None and hybrid.curve.highest[0] == 40
    said = collapse.told(made)
    assert said.startswith("Collapsed (below the untrained student, 0.350): 1 of 12 arms (")
    assert f"Fell during training: 2 of 12 arms ({'; '.join(FELL)})." in said
    assert f"Seeds that ended below it: 4 of 4 ({FELL[0]})." in said
    header, rows = collapse.table_of(made)
    assert {len(row) for row in rows} == {len(header)}


def test_a_fall_is_the_last_minus_the_best_paired_by_seed_and_adjusted_by_hand() -> None:
    fell = {10: {0: 0.6, 1: 0.7, 2: 0.8}, 20: {0: 0.3, 1: 0.3, 2: 0.5}}
    rose = {10: {0: 0.1, 1: 0.2, 2: 0.3}, 20: {0: 0.4, 1: 0.5, 2: 0.7}}
    made = collapse.traced({"fell": fell, "rose": rose})
    curve = made["fell"]
    assert curve.highest[0] == 10 and curve.last[0] == 20 == curve.lowest[0]
    assert curve.fall is not None
    # Differences -0.3, -0.4, -0.3: t = -10, and P(|T| > t) = 1 - t / sqrt(2 + t^2) with 2 degrees
    # of freedom. Two arms have one earlier measurement each, so Holm doubles it.
    assert curve.fall.difference.mean == pytest.approx(-1 / 3)
    assert curve.p == pytest.approx(2 * (1 - 10 / math.sqrt(102)))
    assert made["rose"].fall is None and math.isnan(made["rose"].p)
    assert collapse.traced({"once": {10: fell[10]}})["once"].fall is None


def test_seeds_that_diverged_are_counted_and_are_in_no_mean(tmp_path: Path) -> None:
    made = write_cliff(tmp_path, dataclasses.replace(SMALL, methods=("on_policy_gkd", "hybrid")))
    made[0].update_status(phase="failed", exit_code=DIVERGED, cause="Diverged: loss nan at step 9")
    made[0].eval_file("tiny_gen").unlink()
    (made[0].adapter / "adapter_model.safetensors").unlink()
    frame = load("cliff", tmp_path)
    found = collapse.standings(frame, read(frame, Runs(tmp_path)), answer(frame))
    assert (found[0].diverged, found[0].seeds) == (1, 3)
    assert found[0].curve is not None and found[0].curve.last[1].n == 3
    said = "Seeds that diverged, and are in no mean: 1 (loss = ce_pg, method = on_policy_gkd)."
    assert said in collapse.told(found)


def test_one_seed_lets_nothing_be_said_of_a_collapse(tmp_path: Path) -> None:
    write_cliff(tmp_path, dataclasses.replace(SMALL, methods=("on_policy_gkd", "hybrid"), seeds=1))
    frame = load("cliff", tmp_path)
    made = collapse.standings(frame, read(frame, Runs(tmp_path)), answer(frame))
    assert not any(s.has_collapsed or s.has_fallen for s in made)
    assert {s.verdict for s in made} == {"no statement against the untrained student"}
    assert collapse.told(made) == ""


def test_a_sweep_that_measured_nothing_on_the_way_has_no_such_sections(tmp_path: Path) -> None:
    write_sample(tmp_path)
    frame = load("sample", tmp_path)
    logged = read(frame, Runs(tmp_path))
    assert collapse.standings(frame, logged, answer(frame)) == []
    assert budget.equal_compute(frame, logged) == budget.EqualCompute([], [], [])


def test_arms_stand_at_their_last_measurement_within_the_cheapest_runs_tokens(runs: Path) -> None:
    frame = load("cliff", runs)
    found = budget.equal_compute(frame, read(frame, Runs(runs)))
    spent = {s.arm: s for s in found.spent}
    # 1,600 tokens read in a step, 800 written by a student or 700 by a teacher; seeding has both.
    whole = {"off_policy": 230_000, "on_policy_gkd": 240_000, "extended_on_policy": 480_000}
    for method, tokens in (whole | {"teacher_seeded": 310_000}).items():
        assert spent[f"loss = jsd, method = {method}"].processed == tokens
    # The budget is that of teacher sequences only, 230,000; on-policy passed it after step 95.
    reached = {"off_policy": 100, "on_policy_gkd": 80, "extended_on_policy": 80}
    for method, steps in (reached | {"teacher_seeded": 60}).items():
        assert spent[f"loss = jsd, method = {method}"].steps == steps
    assert all(s.paid <= 230_000 for s in found.spent)
    accuracy = {
        (run.point["loss"], run.point["method"], run.point["seed"]): run.metrics["eval/accuracy"]
        for run in read(frame, Runs(runs))
    }
    ours = {s: float(accuracy["jsd", "off_policy", s][100]) for s in range(4)}
    theirs = {s: float(accuracy["jsd", "on_policy_gkd", s][80]) for s in range(4)}
    off = next(c for c in found.comparisons if c.arm == "method = off_policy")
    assert off.setting == "loss = jsd"
    assert off.paired == compare(ours, theirs, len(found.comparisons))
    assert budget.told(found).startswith("At equal compute (held-out accuracy within the tokens of")
    header, rows = budget.table_of(found.spent)
    assert {len(row) for row in rows} == {len(header)}


def rescored(root: Path) -> None:
    """A sweep of two arms, each scored as trained and, 0.1 lower in seed 0, requantised."""
    again = TaskSpec(f"tiny_gen{REQUANTISED}", "exact_match", None, True)
    suite = dataclasses.replace(SUITE, tasks=(SUITE.tasks[0], again))
    made = write_sample(root, Sample(axes={"lmbda": [0, 1]}, suite=suite))
    lost = {0: 0.1, 1: 0.2, 2: 0.3}
    for run in made:
        record, score = run.record(), read_json(run.eval_file("tiny_gen"))
        second = read_json(run.eval_file(again.task))
        assert record is not None and score is not None and second is not None
        seed = record["spec"]["training"]["seed"]
        second |= {"value": score["value"] - lost[seed], "samples": []}
        write_json(run.eval_file(again.task), second)


def test_the_size_of_scoring_another_function_is_shown_paired(tmp_path: Path) -> None:
    rescored(tmp_path)
    frame = load("sample", tmp_path)
    found = requantised.rescored(frame)
    assert list(found) == ["tiny_gen/exact_match, requantised"]
    pooled, *arms = found["tiny_gen/exact_match, requantised"]
    assert [c.arm for c in (pooled, *arms)] == ["all arms", "lmbda = 0", "lmbda = 1"]
    for c in (pooled, *arms):
        # -0.1, -0.2, -0.3 over three seeds: t = -0.2 / (0.1 / sqrt 3) = -3.4641.
        assert c.paired.difference.mean == pytest.approx(-0.2) and c.paired.difference.n == 3
        assert c.paired.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert arms[0].p == pytest.approx(2 * arms[0].paired.p) and pooled.p == pooled.paired.p
    assert "a difference of −0.200 ± 0.058 (n = 3) over all arms; of 2 arms 2" in requantised.told(
        found
    )
    header = wide(summary(frame))[0]
    assert header == ["arm", "tiny_gen/exact_match ↑", "tiny_gen/exact_match, requantised ↑"]
    equal = budget.EqualCompute([], [], [])
    shown = sections(answer(frame), [], equal, found, [], NOBODY)[-1]
    assert shown.title == "Merged into the unquantised base, quantised again"
    assert [len(exhibit.table[1]) for exhibit in shown.exhibits] == [3]


def test_a_teacher_that_reads_examples_first_is_shown_as_such(tmp_path: Path) -> None:
    write_sample(tmp_path)
    file = next((tmp_path / "baselines").glob("teacher-*/eval/tiny_gen.json"))
    write_json(file, (read_json(file) or {}) | {"examples": 4})
    table = summary(load("sample", tmp_path))
    shown = table.set_index(["arm", "task"])["shown"]
    assert shown["teacher", "tiny_gen"].endswith(", after 4 examples)")
    assert "examples" not in shown["student", "tiny_gen"] + shown["teacher", "tiny_mc"]


def test_arms_of_other_lengths_are_named(runs: Path) -> None:
    said = [remark for remark in remarks(load("cliff", runs)) if remark.startswith("Steps differ")]
    assert said == [
        "Steps differ: 100 in most arms, 200 in loss = ce_pg, method = extended_on_policy,"
        " 200 in loss = jsd, method = extended_on_policy."
    ]


def test_the_seeds_three_figures_are_drawn_of_both_losses(runs: Path, page: str) -> None:
    directory = Runs(runs).report("cliff")
    for name in ("distribution_cliff", "method_comparison", "teacher_seeding"):
        text = (directory / f"{name}.svg").read_text()
        assert "<!-- loss = ce_pg -->" in text and "<!-- loss = jsd -->" in text
    assert page.count("95 % t intervals over seeds") == 3
    assert "Grey: on_policy_gkd, the same in every panel." in page
    cliff = (directory / "distribution_cliff.svg").read_text()
    assert all(f"<!-- {method} -->" in cliff for method in SMALL.methods)
    assert "<!-- turns to on-policy at step 50 -->" in cliff


def test_the_page_answers_all_three_questions(runs: Path, page: str) -> None:
    header = page[: page.index("</header>")]
    assert "Collapsed (below the untrained student" in header
    for title in ("What became of each arm", "At equal compute"):
        assert f"<h2>{title}</h2>" in page
    directory = Runs(runs).report("cliff")
    assert (directory / "comparisons.csv").read_text().count("\nequal compute,") == 10
    assert len((directory / "arms.csv").read_text().splitlines()) == 1 + 12
    assert "## At equal compute" in (directory / "table.md").read_text()


def test_a_sweep_that_is_half_trained_is_answered_as_far_as_it_came(tmp_path: Path) -> None:
    made = write_cliff(tmp_path, dataclasses.replace(SMALL, methods=("on_policy_gkd", "hybrid")))
    for run in made[:4]:  # the whole baseline of one loss
        unstart(run)
    frame = load("cliff", tmp_path)
    logged, found = read(frame, Runs(tmp_path)), answer(frame)
    assert [c.setting for c in found.main] == ["loss = jsd"]
    made = sections(
        found,
        collapse.standings(frame, logged, found),
        budget.equal_compute(frame, logged),
        requantised.rescored(frame),
        [],
        NOBODY,
    )
    titles = ["Comparisons on tiny_gen/exact_match", "What became of each arm", "At equal compute"]
    assert [section.title for section in made] == titles


def unstart(run: RunDir) -> None:
    for file in (run.spec_file, run.metrics_file, run.cost_file, *run.path.glob("eval/*.json")):
        file.unlink()
    (run.adapter / "adapter_model.safetensors").unlink()
