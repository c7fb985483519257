"""Measure how well preflight verdicts and single numbers rank successes above failures.

    .venv/bin/python -m studies.preflight_calibration zoo zoo_again

prints a Markdown table for the pairs that were predicted and one for those that the thresholds of
conf/preflight.yaml were set on: the area under the curve and the best cut, for the verdict and for
each number. Runs of one pair are alike, so intervals resample pairs. The package knows nothing of
this: a report shows verdicts and outcomes only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from stillhouse import preflight_rules
from stillhouse.compose import data_file
from stillhouse.preflight_rules import Measured
from stillhouse.results.analyses.preflight import Case, cases, parts
from stillhouse.results.format import Table, as_markdown
from stillhouse.results.stats import NAN, number
from stillhouse.results.table import load
from stillhouse.rundir import Runs

RESAMPLES = 2000
SEED = 0
RANK = {"unlikely": 0.0, "unsure": 0.5, "likely": 1.0}
# Single numbers to compare the verdict with, each with the sign that makes more of it promise more.
NUMBERS: dict[str, tuple[str, float]] = {
    "ratio_16": ("overlap ratio, k = 16", 1),
    "ratio_4": ("overlap ratio, k = 4", 1),
    "ratio_1": ("overlap ratio, k = 1", 1),
    "mass_teacher_16": ("teacher's mass on shared tokens, k = 16", 1),
    "entropy_gap": ("entropy gap (less is more)", -1),
    "reverse_kl": ("reverse KL on rollouts (less is more)", -1),
    "forward_kl": ("forward KL on the teacher's answers (less is more)", -1),
    "told_apart": ("discriminability (less is more)", -1),
    "teacher_lead": ("teacher's accuracy minus the student's", 1),
    "continuation_25": ("continuation from 25 %: teacher minus student", 1),
    "kept_25": ("share of its accuracy that the teacher keeps from 25 %", 1),
    "continuation_50": ("continuation from 50 %: teacher minus student", 1),
    "kept_50": ("share of its accuracy that the teacher keeps from 50 %", 1),
    "pilot_gain": ("gain in the pilot", 1),
}
Score = Callable[[Case], float]


def by_verdict(case: Case) -> float:
    """unlikely < unsure < likely."""
    return RANK[case.verdict]


def by_number(name: str, sign: float = 1.0) -> Score:
    """A number of the preflight, with this sign; NaN if it was not measured."""
    return lambda case: sign * case.numbers[name].value if name in case.numbers else NAN


def area(scores: Sequence[float], successes: Sequence[bool]) -> float:
    """The chance that a success has a higher score than a failure; ties count half. NaN for one
    class only. A score that is NaN ranks lowest: what was not measured speaks for nothing."""
    known = [-math.inf if math.isnan(s) else s for s in scores]
    good = np.array([s for s, ok in zip(known, successes, strict=True) if ok])
    bad = np.array([s for s, ok in zip(known, successes, strict=True) if not ok])
    if not len(good) or not len(bad):
        return NAN
    return float((good[:, None] > bad).mean() + (good[:, None] == bad).mean() / 2)


def area_of(found: Sequence[Case], score: Score) -> Measured:
    """The area under the curve of a score, with a 95 % interval over resampled pairs."""
    by_pair: dict[str, list[tuple[float, bool]]] = {}
    for case in found:
        by_pair.setdefault(case.pair, []).append((score(case), case.is_success))
    pairs = list(by_pair.values())
    rng = np.random.default_rng(SEED)

    def of(chosen: Sequence[int]) -> float:
        rows = [row for i in chosen for row in pairs[i]]
        return area([s for s, _ in rows], [ok for _, ok in rows])

    drawn = [
        of([int(i) for i in rng.integers(len(pairs), size=len(pairs))]) for _ in range(RESAMPLES)
    ]
    known = [value for value in drawn if not math.isnan(value)]
    low, high = np.quantile(known, [0.025, 0.975]) if known else (NAN, NAN)
    return Measured(of(range(len(pairs))), float(low), float(high), len(pairs))


def best_split(found: Sequence[Case], score: Score) -> tuple[float, float]:
    """(threshold, balanced accuracy) of the best cut of a score: successes above it.

    Of several cuts that are equally good, the middle of the widest gap.
    """
    rows = sorted((score(c), c.is_success) for c in found if not math.isnan(score(c)))
    good, bad = sum(ok for _, ok in rows), sum(not ok for _, ok in rows)
    if not good or not bad:
        return NAN, NAN
    best = (-1.0, 0.0, NAN)
    for i in range(1, len(rows)):
        low, high = rows[i - 1][0], rows[i][0]
        right = sum(ok for _, ok in rows[i:]) / good + sum(not ok for _, ok in rows[:i]) / bad
        if high > low:
            best = max(best, (round(right / 2, 9), high - low, (low + high) / 2))
    return best[2], best[0]


def is_rankable(found: Sequence[Case]) -> bool:
    """Whether there are successes and failures to rank, and several pairs to resample."""
    return len({c.is_success for c in found}) == 2 and len({c.pair for c in found}) > 1


def as_table(found: Sequence[Case]) -> Table:
    """The verdict and single numbers, best first."""
    scores: dict[str, Score] = {"the verdict": by_verdict}
    for name, (text, sign) in NUMBERS.items():
        if any(name in c.numbers for c in found):
            scores[text] = by_number(name, sign)
    rows: list[tuple[float, list[str]]] = []
    for text, score in scores.items():
        a, (cut, balanced) = area_of(found, score), best_split(found, score)
        best = "–" if math.isnan(cut) else f"{number(abs(cut))} ({balanced:.0%} balanced)"
        rows.append((a.value, [text, f"{a.value:.2f} [{a.low:.2f}, {a.high:.2f}]", best]))
    rows.sort(key=lambda row: -row[0])
    return ["ranked by", "area under the curve", "best cut"], [cells for _, cells in rows]


def calibration(sweeps: Sequence[str], runs: Path) -> str:
    """The tables of all cases of these sweeps, as Markdown."""
    rules = preflight_rules.rules_of(data_file("preflight"), "conf/preflight.yaml")
    found = [case for name in sweeps for case in cases(load(name, runs), Runs(runs), rules)]
    texts: list[str] = []
    for name, part in parts(found).items():
        successes = sum(case.is_success for case in part)
        text = f"{len(part)} runs {name}, {successes} of them successes"
        table = as_markdown(as_table(part)) if is_rankable(part) else "Nothing to rank.\n"
        texts.append(f"{text}:\n\n{table}")
    note = "The best cut was chosen on these very outcomes, so it flatters."
    return "\n".join([*texts, note]) if texts else "No run of these sweeps has a preflight."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.preflight_calibration")
    parser.add_argument("sweeps", nargs="+", help="names of finished sweeps")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="where runs lie (%(default)s)"
    )
    asked = parser.parse_args()
    print(calibration(asked.sweeps, asked.runs))


if __name__ == "__main__":
    main()
