"""Whether preflights predicted: outcomes, areas under the curve, and what a report says of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_runs import Sample, write_sample

from stillhouse.results import prefixes
from stillhouse.results.calibration import (
    Case,
    area,
    area_of,
    best_split,
    by_number,
    by_verdict,
    cases,
)
from stillhouse.results.predictions import Predictions, is_rankable, table_of_areas, told
from stillhouse.results.report import write_report
from stillhouse.results.table import load
from stillhouse.rundir import Runs, read_json, write_json
from stillhouse.verdict import Measured, key_of_plain, rules_of

RULES = rules_of(
    {
        "calibrated_on": "a test",
        "fitted_on": ["tiny"],
        "rules": [
            {
                "rule": "reverse_only",
                "when": [
                    {"number": "kept_25", "end": "value", "side": "above", "threshold": 0.4},
                    {"number": "beta", "end": "value", "side": "above", "threshold": 0.5},
                ],
                "verdict": "likely",
                "reason": "it keeps",
                "recipe": None,
            },
            {"rule": "none", "when": [], "verdict": "unsure", "reason": "so", "recipe": None},
        ],
    },
    "a test",
)


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
    )


def test_a_success_surely_gains_ten_points() -> None:
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
    assert area_of(two, by_number("kept_25")) == Measured(1, 1, 1, 2)
    mixed = [case(p, k, g) for p in "abcdef" for k, g in ((0.9, 0.3), (0.5, 0.0), (0.4, 0.3))]
    found = area_of(mixed, by_number("kept_25"))
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5), "all pairs are alike"


def test_the_best_cut_lies_in_the_middle_of_the_widest_clean_gap() -> None:
    found = [case("a", 0.1, 0), case("b", 0.2, 0), case("c", 0.6, 0.3), case("d", 0.7, 0.3)]
    cut, balanced = best_split(found, by_number("kept_25"))
    assert cut == pytest.approx(0.4) and balanced == 1
    assert all(map(math.isnan, best_split(found[:2], by_number("kept_25"))))


def test_the_sentence_counts_verdicts_and_successes_and_tells_known_pairs_apart() -> None:
    asked = Predictions(
        [
            case("old", 0.9, 0.3, "likely"),
            case("new", 0.9, 0.3, "likely"),
            case("newer", 0.2, 0.0, "unlikely"),
            case("newest", 0.5, 0.3, "unsure"),
        ],
        fitted_on=["old"],
    )
    assert told(asked) == (
        "3 runs that were predicted: of 1 likely, 1 succeeded; of 1 unsure, 1 succeeded; of 1"
        " unlikely, 0 succeeded; area under the curve 1.00 [1.00, 1.00]. 1 run that set the"
        " thresholds: of 1 likely, 1 succeeded."
    )
    assert is_rankable(asked.cases)
    assert not is_rankable(asked.cases[:2]), "both succeeded"
    assert not is_rankable([case("a", 0.9, 0.3), case("a", 0.1, 0.0)]), "one pair, two losses"
    header, rows = table_of_areas(asked.cases)
    assert header == ["ranked by", "area under the curve", "best cut"]
    assert [row[0] for row in rows] == [
        "the verdict",
        "share of its accuracy the teacher keeps from 25 %",
    ]
    assert by_verdict(asked.cases[2]) < by_verdict(asked.cases[3]) < by_verdict(asked.cases[0])


def test_how_far_along_the_teacher_helps_is_told_from_prefixes() -> None:
    lead = {8: (0.6, 0.5), 32: (0.1, 0.02), 128: (0.01, -0.05)}
    asked = {f"continuation_at_{at}": Measured(v, low, 0.7, 64) for at, (v, low) in lead.items()}
    asked |= {f"teacher_at_{at}": Measured(v + 0.1, v, 0.9, 64) for at, (v, _) in lead.items()}
    seen = dataclasses.replace(case("a", 0.9, 0.3), numbers=asked)
    found = prefixes.reaches([case("a", 0.9, 0.3), seen, seen])
    assert prefixes.told(found) == (
        "a, seed 0, point a0.9: the teacher leads most after 8 tokens of the student (+0.600), and"
        " last after 32 (of 8, 32, 128)."
    )
    _, rows = prefixes.table_of(found)
    assert [row[1] for row in rows] == ["8", "32", "128"]
    assert rows[1][2:6] == ["64", "0.200", "[0.100, 0.900]", "+0.100"]
    for at in (8, 32):
        found[0].leads[at] = Measured(0.1, -0.1, 0.3, 64)
    assert "nowhere for sure" in prefixes.told(found)


def test_prefixes_of_two_answers_are_drawn_though_their_value_lies_beyond_its_interval() -> None:
    asked = {"continuation_at_8": Measured(1, 0.2, 0.83, 2), "teacher_at_8": Measured(1, 0.4, 1, 2)}
    found = prefixes.reaches([dataclasses.replace(case("a", 0.9, 0.3), numbers=asked)])
    assert prefixes.drawn(found) is not None
    assert prefixes.drawn([]) is None


# ---- from files


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    sample = Sample(
        compare=None, axes={"beta": [0, 1]}, seeds=2, ability=lambda o: 1.5 if o["beta"] else -1.0
    )
    for run in write_sample(root, sample):
        told = {
            name: Measured(0.5, 0.4, 0.6, 64).as_json()
            for name in ("kept_25", "continuation_at_8", "teacher_at_8")
        }
        record = run.record()
        assert record is not None
        file = Runs(root).verdict_file("tiny", key_of_plain(record["spec"]))
        write_json(file, {"numbers": told, "verdict": "unlikely"})
    return root


def test_a_case_is_a_scored_point_its_students_documents_and_what_was_said(runs: Path) -> None:
    found = cases(load("sample", runs), Runs(runs), RULES)
    assert [c.beta for c in found] == [0, 0, 1, 1]
    # By the rules of now, whatever the file said when it was written; β decides too.
    assert [c.verdict for c in found] == ["unsure", "unsure", "likely", "likely"]
    assert [c.is_success for c in found] == [False, False, True, True]
    first = found[2]
    files = [
        read_json(runs / d / "eval" / "tiny_gen.json") for d in _directories(runs, first.point)
    ]
    after, before = ([s["value"] for s in (file or {})["samples"]] for file in files)
    gains = [a - b for a, b in zip(after, before, strict=True)]
    mean = sum(gains) / 200
    sd = math.sqrt(sum((g - mean) ** 2 for g in gains) / 199)
    assert first.change.value == pytest.approx(mean) == pytest.approx(first.after - first.before)
    assert first.change.high - mean == pytest.approx(1.96 * sd / math.sqrt(200))


def test_verdicts_are_not_held_against_runs_that_they_do_not_speak_of(tmp_path: Path) -> None:
    rescued = {"cold_start": 0.5, "cold_prompts": 8}
    bases = {"mixed": {"lmbda": 0.5}, "none": {"lmbda": 0}, "rescued": rescued}
    bases["seeded"] = {"lmbda": 1, "seed_tokens": 4}
    for name, base in bases.items():
        sample = Sample(name=name, compare=None, axes={}, seeds=1, base=base)
        (run,) = write_sample(tmp_path, sample)
        record = run.record()
        assert record is not None
        file = Runs(tmp_path).verdict_file("tiny", key_of_plain(record["spec"]))
        write_json(file, {"numbers": {}, "verdict": "likely"})
        assert cases(load(name, tmp_path), Runs(tmp_path), RULES) == []


def _directories(runs: Path, point: str) -> tuple[str, str]:
    (run,) = (d.name for d in runs.iterdir() if d.name.endswith(point))
    (student,) = (d.name for d in (runs / "baselines").iterdir() if d.name.startswith("student"))
    return run, f"baselines/{student}"


def test_a_report_shows_predictions_where_preflights_were_asked(runs: Path) -> None:
    page = write_report("sample", runs)
    text = page.read_text()
    assert "Did the preflights predict?" in text and "What preflights said" in text
    assert "nan [" not in text and "ranked by" not in text, "one pair: there is nothing to rank"
    assert (page.parent / "predictions.png").stat().st_size > 10_000
    assert "How far along does the teacher help?" in text
    assert (page.parent / "prefixes.png").stat().st_size > 5_000
    lines = (page.parent / "predictions.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("point,pair,pair_seed,beta,max_steps,before")


def test_where_nobody_asked_a_report_says_nothing_of_it(tmp_path: Path) -> None:
    write_sample(tmp_path)
    page = write_report("sample", tmp_path)
    assert "preflights" not in page.read_text() and "How far along" not in page.read_text()
    assert not (page.parent / "predictions.csv").exists()
