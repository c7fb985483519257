"""Test preflight verdicts against outcomes: in a report, and how well they rank (studies/)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.preflight_rules import Measured, key_of_plain, rules_of
from stillhouse.results.analyses import preflight as analysis
from stillhouse.results.analyses.preflight import Case, cases, summary_text
from stillhouse.results.report import write_report
from stillhouse.results.table import load
from stillhouse.rundir import RunDir, Runs, read_json, write_json
from studies.preflight_calibration import (
    area,
    area_of,
    as_table,
    best_split,
    by_number,
    by_verdict,
    calibration,
    is_rankable,
)
from tests.builders.sample_runs import Sample, write_sample

NONE = {"rule": "none", "when": [], "verdict": "unsure", "reason": "so", "recipe": None}
REVERSE_ONLY = {
    "rule": "reverse_only",
    "when": [
        {"number": "kept_25", "end": "value", "side": "above", "threshold": 0.4},
        {"number": "beta", "end": "value", "side": "above", "threshold": 0.5},
    ],
    "verdict": "likely",
    "reason": "it keeps",
    "recipe": None,
}
KEPT = by_number("kept_25")


def rules(*rules: dict[str, Any]) -> Any:
    plain = {"calibrated_on": "a test", "fitted_on": ["tiny"], "rules": [*rules, NONE]}
    return rules_of(plain, "a test")


def case(pair: str, kept: float, gain: float, verdict: str = "likely") -> Case:
    """A run whose gain is known to ±0.05."""
    return Case(
        point=f"{pair}{kept}",
        pair=pair,
        pair_seed=0,
        beta=1.0,
        max_steps=200,
        before=0.3,
        after=0.3 + gain,
        teacher=0.9,
        change=Measured(gain, gain - 0.05, gain + 0.05, 256),
        numbers={"kept_25": Measured(kept, kept - 0.1, kept + 0.1, 64)},
        verdict=verdict,
        rule="a_rule",
        is_fitted=pair == "old",
    )


def preflight(run: RunDir, *names: str) -> None:
    """Write a preflight of a run's pair, with these numbers."""
    told = {name: Measured(0.5, 0.4, 0.6, 64).as_json() for name in names}
    spec = (run.record() or {})["spec"]
    file = Runs(run.path.parent).verdict_file("tiny", key_of_plain(spec))
    write_json(file, {"numbers": told, "verdict": "unlikely"})


def test_a_success_gains_ten_points_with_its_uncertainty() -> None:
    assert case("a", 1, 0.16).is_success
    assert not case("a", 1, 0.14).is_success, "its lower end is 0.09"
    assert case("a", 1, 0.3).recovered == pytest.approx(0.5)
    level = dataclasses.replace(case("a", 1, 0.3), teacher=0.35)
    assert math.isnan(level.recovered), "of a gap of 5 points no share is told"


def test_the_area_is_the_share_of_success_and_failure_pairs_in_the_right_order() -> None:
    # Successes 0.9 and 0.4, failures 0.5 and 0.1: of four pairs three are in order.
    assert area([0.9, 0.4, 0.5, 0.1], [True, True, False, False]) == 0.75
    assert area([1, 1], [True, False]) == 0.5, "a tie counts half"
    assert area([0.5, math.nan], [True, False]) == 1, "what was not measured ranks lowest"
    assert math.isnan(area([1, 2], [True, True]))


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=12))
def test_turning_a_score_round_turns_its_area_round(rows: list[tuple[int, bool]]) -> None:
    scores, good = [float(s) for s, _ in rows], [ok for _, ok in rows]
    found, turned = area(scores, good), area([-s for s in scores], good)
    assert math.isnan(found) == (len(set(good)) == 1)
    if not math.isnan(found):
        assert found + turned == pytest.approx(1)


def test_the_interval_of_an_area_resamples_pairs_not_runs() -> None:
    # Twenty runs, but two pairs: whoever draws the one pair twice sees no failure, or no success.
    two = [case("a", 0.9, 0.3) for _ in range(10)] + [case("b", 0.1, 0.0) for _ in range(10)]
    assert area_of(two, KEPT) == Measured(1, 1, 1, 2)
    mixed = [case(p, k, g) for p in "abcdef" for k, g in ((0.9, 0.3), (0.5, 0.0), (0.4, 0.3))]
    found = area_of(mixed, KEPT)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5), "all pairs are alike"


def test_the_best_cut_lies_in_the_middle_of_the_widest_clean_gap() -> None:
    found = [case("a", 0.1, 0), case("b", 0.2, 0), case("c", 0.6, 0.3), case("d", 0.7, 0.3)]
    cut, balanced = best_split(found, KEPT)
    assert cut == pytest.approx(0.4) and balanced == 1
    assert all(map(math.isnan, best_split(found[:2], KEPT)))


def test_verdicts_and_successes_are_counted_and_fitted_pairs_are_told_apart() -> None:
    old, new = case("old", 0.9, 0.3, "likely"), case("new", 0.9, 0.3, "likely")
    newer, newest = case("newer", 0.2, 0.0, "unlikely"), case("newest", 0.5, 0.3, "unsure")
    found = [old, new, newer, newest]
    assert summary_text(found) == (
        "3 runs that were predicted: of 1 likely, 1 succeeded; of 1 unsure, 1 succeeded; of 1"
        " unlikely, 0 succeeded. 1 run that set the thresholds: of 1 likely, 1 succeeded."
    )
    assert [c.name for c in found[:2]] == ["old (fitted)", "new"]
    assert is_rankable(found) and not is_rankable(found[:2]), "both succeeded"
    assert not is_rankable([new, case("new", 0.1, 0.0)]), "one pair, two losses"
    header, rows = as_table(found)
    assert header == ["ranked by", "area under the curve", "best cut"]
    kept = "share of its accuracy that the teacher keeps from 25 %"
    assert rows[0] == ["the verdict", "1.00 [1.00, 1.00]", "0.250 (100% balanced)"]
    assert rows[1] == [kept, "1.00 [1.00, 1.00]", "0.350 (100% balanced)"]
    assert by_verdict(newer) < by_verdict(newest) < by_verdict(new)


def test_how_far_along_the_teacher_helps_is_told_from_prefixes() -> None:
    lead = {8: (0.6, 0.5), 32: (0.1, 0.02), 128: (0.01, -0.05)}
    asked = {f"continuation_at_{at}": Measured(v, low, 0.7, 64) for at, (v, low) in lead.items()}
    asked |= {f"teacher_at_{at}": Measured(v + 0.1, v, 0.9, 64) for at, (v, _) in lead.items()}
    seen = dataclasses.replace(case("a", 0.9, 0.3), numbers=asked)
    found = analysis.reaches([case("a", 0.9, 0.3), seen, seen])
    assert analysis.reach_text(found) == (
        "a, seed 0, point a0.9: the teacher's lead is largest after 8 tokens of the student"
        " (+0.600) and is last detected after 32 (of 8, 32, 128)."
    )
    _, rows = analysis.reach_table(found)
    assert [row[1] for row in rows] == ["8", "32", "128"]
    assert rows[1][2:6] == ["64", "0.200", "[0.100, 0.900]", "+0.100"]
    for at in (8, 32):
        found[0].leads[at] = Measured(0.1, -0.1, 0.3, 64)
    assert "is detected nowhere" in analysis.reach_text(found)


def test_prefixes_of_two_answers_are_drawn_though_their_value_lies_beyond_its_interval() -> None:
    asked = {"continuation_at_8": Measured(1, 0.2, 0.83, 2), "teacher_at_8": Measured(1, 0.4, 1, 2)}
    found = analysis.reaches([dataclasses.replace(case("a", 0.9, 0.3), numbers=asked)])
    assert analysis.continuations(found) is not None and analysis.continuations([]) is None


# ---- from files


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    sample = Sample(
        compare=None, axes={"beta": [0, 1]}, seeds=2, ability=lambda o: 1.5 if o["beta"] else -1.0
    )
    for run in write_sample(root, sample):
        preflight(run, "kept_25", "continuation_at_8", "teacher_at_8")
    return root


def test_a_case_is_a_scored_point_its_students_documents_and_a_verdict(runs: Path) -> None:
    found = cases(load("sample", runs), Runs(runs), rules(REVERSE_ONLY))
    assert [c.beta for c in found] == [0, 0, 1, 1] and all(c.is_fitted for c in found)
    # By the rules of now, whatever the file said when it was written; β decides too.
    assert [c.verdict for c in found] == ["unsure", "unsure", "likely", "likely"]
    assert [c.is_success for c in found] == [False, False, True, True]
    first = found[2]
    folders = next(runs.glob(f"*{first.point}")), next(runs.glob("baselines/student*"))
    files = [read_json(folder / "eval" / "tiny_gen.json") or {} for folder in folders]
    after, before = ([s["value"] for s in file["samples"]] for file in files)
    gains = [a - b for a, b in zip(after, before, strict=True)]
    mean = sum(gains) / 200
    sd = math.sqrt(sum((g - mean) ** 2 for g in gains) / 199)
    assert first.change.value == pytest.approx(mean) == pytest.approx(first.after - first.before)
    assert first.change.high - mean == pytest.approx(1.96 * sd / math.sqrt(200))


def test_verdicts_are_not_held_against_runs_that_they_do_not_speak_of(tmp_path: Path) -> None:
    bases: dict[str, dict[str, Any]] = {"mixed": {"lmbda": 0.5}, "none": {"lmbda": 0}}
    bases["rescued"] = {"cold_start": 0.5, "cold_prompts": 8}
    bases["seeded"] = {"lmbda": 1, "seed_tokens": 4}
    for name, base in bases.items():
        (run,) = write_sample(
            tmp_path, Sample(name=name, compare=None, axes={}, seeds=1, base=base)
        )
        preflight(run)
        assert cases(load(name, tmp_path), Runs(tmp_path), rules()) == []


def test_a_torn_verdict_is_left_out_of_the_cases_and_named(tmp_path: Path) -> None:
    made = write_sample(tmp_path, Sample(name="sample", seeds=1))
    plain = (made[0].record() or {})["spec"]
    file = Runs(tmp_path).verdict_file("tiny", key_of_plain(plain))
    file.parent.mkdir()
    file.write_text("{")
    frame = load("sample", tmp_path)
    assert any(
        note.startswith(f"{file}: not JSON") for note in analysis.excluded(frame, Runs(tmp_path))
    )
    assert all(case.point != made[0].id for case in cases(frame, Runs(tmp_path), rules()))


def test_a_report_shows_verdicts_where_pairs_were_preflighted(runs: Path) -> None:
    page = write_report("sample", runs)
    text = page.read_text()
    assert "Preflight verdicts and outcomes" in text
    answer = text[text.index('class="answer"') :]
    assert answer[:60].startswith('class="answer">4 runs that were predicted: of 4'), "no `compare`"
    assert (page.parent / "predictions.png").stat().st_size > 10_000
    assert "Teacher continuations from student prefixes" in text
    assert (page.parent / "prefixes.png").stat().st_size > 5_000
    lines = (page.parent / "predictions.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("point,pair,pair_seed,beta,max_steps,before")
    assert calibration(["sample"], runs).startswith(
        "4 runs that were predicted, 2 of them successes:\n\nNothing to rank."
    )


def test_without_a_preflight_a_report_says_nothing_of_it(tmp_path: Path) -> None:
    write_sample(tmp_path, Sample(seeds=1))
    page = write_report("sample", tmp_path)
    assert "Preflight" not in page.read_text() and "continuations" not in page.read_text()
    assert not (page.parent / "predictions.csv").exists()
    assert calibration(["sample"], tmp_path) == "No run of these sweeps has a preflight."
