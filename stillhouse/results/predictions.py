"""This file is where a report shows whether preflights predicted: tables, a sentence, a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.results.calibration import (
    LEAST_GAIN,
    Case,
    Score,
    area_of,
    best_split,
    by_number,
    by_verdict,
)
from stillhouse.results.layout import Table, interval, signed
from stillhouse.results.plots import COLOURS, Drawn, categories, legend, panels
from stillhouse.results.stats import number
from stillhouse.verdict import Measured

# Single numbers that the verdict is held against, each turned so that more of it promises more.
NUMBERS: dict[str, tuple[str, float]] = {
    "ratio_16": ("overlap ratio, k = 16", 1),
    "ratio_4": ("overlap ratio, k = 4", 1),
    "ratio_1": ("overlap ratio, k = 1", 1),
    "mass_teacher_16": ("teacher's mass on shared tokens, k = 16", 1),
    "entropy_gap": ("entropy gap (less is more)", -1),
    "reverse_kl": ("reverse KL on rollouts (less is more)", -1),
    "forward_kl": ("forward KL on the teacher's answers (less is more)", -1),
    "told_apart": ("told apart (less is more)", -1),
    "teacher_lead": ("teacher's accuracy minus the student's", 1),
    "continuation_25": ("continuation from 25 %: teacher minus student", 1),
    "kept_25": ("share of its accuracy the teacher keeps from 25 %", 1),
    "continuation_50": ("continuation from 50 %: teacher minus student", 1),
    "kept_50": ("share of its accuracy the teacher keeps from 50 %", 1),
    "pilot_gain": ("gain in the pilot", 1),
}
STYLE_OF = {"likely": ("o", 2), "unsure": ("s", 4), "unlikely": ("X", 1)}  # marker, colour
NOTE = (
    "A success is a gain whose 95 % interval over documents lies above"
    f" {LEAST_GAIN:.0%}. The area under the curve is the chance that, of a success and a failure,"
    " the success ranks higher (ties count half); its 95 % interval resamples pairs, for the runs"
    " of one pair are alike. “Best cut” was chosen on these very outcomes and flatters."
)


@dataclass(frozen=True)
class Predictions:
    """Runs whose pairs were asked about, and the pairs that the thresholds were set on."""

    cases: Sequence[Case]
    fitted_on: Sequence[str]

    def parts(self) -> dict[str, list[Case]]:
        """The cases that were predicted, and those that were known; empty ones left out."""
        parts = {
            "that were predicted": [c for c in self.cases if c.pair not in self.fitted_on],
            "that set the thresholds": [c for c in self.cases if c.pair in self.fitted_on],
        }
        return {name: part for name, part in parts.items() if part}

    def name_of(self, pair: str) -> str:
        """The pair, and whether its outcome was known."""
        return pair + (" (fitted)" if pair in self.fitted_on else "")


def told(asked: Predictions) -> str:
    """What the verdicts were worth, in a sentence per part."""
    said: list[str] = []
    for name, part in asked.parts().items():
        counts = {
            v: (
                sum(c.is_success for c in part if c.verdict == v),
                sum(c.verdict == v for c in part),
            )
            for v in STYLE_OF
        }
        parts = [
            f"of {n} {verdict}, {good} succeeded" for verdict, (good, n) in counts.items() if n
        ]
        worth = ""
        if is_rankable(part):
            worth = f"; area under the curve {_area(area_of(part, by_verdict))}"
        runs = f"{len(part)} run{'s' * (len(part) > 1)}"
        said.append(f"{runs} {name}: {'; '.join(parts)}{worth}.")
    return " ".join(said)


def table_of_cases(asked: Predictions) -> Table:
    """A row per run."""
    header = [
        "pair",
        "seed",
        "β",
        "verdict",
        "rule",
        "student",
        "teacher",
        "change",
        "95 % interval",
    ]
    rows = [
        [
            asked.name_of(c.pair),
            str(c.pair_seed),
            f"{c.beta:g}",
            c.verdict,
            c.rule,
            number(c.before),
            number(c.teacher),
            signed(c.change.value),
            interval(c.change.low, c.change.high),
            "yes" if c.is_success else "no",
            "–" if math.isnan(c.recovered) else f"{c.recovered:.0%}",
            c.point[:6],
        ]
        for c in asked.cases
    ]
    return [*header, "success", "gap recovered", "point"], rows


def is_rankable(found: Sequence[Case]) -> bool:
    """Whether there are successes and failures to tell apart, of pairs to resample."""
    return len({c.is_success for c in found}) == 2 and len({c.pair for c in found}) > 1


def table_of_areas(found: Sequence[Case]) -> Table:
    """The verdict and single numbers, best first."""
    scores: dict[str, Score] = {"the verdict": by_verdict}
    for name, (words, sign) in NUMBERS.items():
        if any(name in c.numbers for c in found):
            scores[words] = by_number(name, sign)
    rows: list[tuple[float, list[str]]] = []
    for words, score in scores.items():
        area, (cut, balanced) = area_of(found, score), best_split(found, score)
        best = "–" if math.isnan(cut) else f"{number(abs(cut))} ({balanced:.0%} balanced)"
        rows.append((area.value, [words, _area(area), best]))
    rows.sort(key=lambda row: -row[0])
    return ["ranked by", "area under the curve", "best cut"], [cells for _, cells in rows]


def _area(area: Measured) -> str:
    return f"{area.value:.2f} [{area.low:.2f}, {area.high:.2f}]"


def predicted(asked: Predictions) -> Drawn | None:
    """Each run's change with its interval, marked by what was said before; a panel per β."""
    found = asked.cases
    if not found:
        return None
    betas = sorted({c.beta for c in found}, reverse=True)
    pairs = list(dict.fromkeys(c.pair for c in found))
    drawn, axes = panels(len(betas), 0.9 + 0.26 * len(pairs), sharey=True)
    for axis, beta in zip(axes, betas, strict=True):
        for place, pair in enumerate(pairs):
            mine = [c for c in found if c.pair == pair and c.beta == beta]
            for index, c in enumerate(mine):
                at = place + 0.5 * ((index + 0.5) / len(mine) - 0.5)
                marker, colour = STYLE_OF[c.verdict]
                axis.plot([c.change.low, c.change.high], [at, at], color=COLOURS[colour], lw=1)
                axis.plot(
                    c.change.value, at, marker, color=COLOURS[colour], markersize=5,
                    label=c.verdict, linestyle="none",
                )  # fmt: skip
        axis.axvline(0, color="#888888", lw=0.8)
        axis.axvline(LEAST_GAIN, color="#888888", lw=0.8, ls=":")
        axis.set_title(f"β = {beta:g}", loc="left")
        axis.set_xlabel("change of accuracy")
        categories(axis, [asked.name_of(pair) for pair in pairs])
    legend(drawn, axes)
    caption = (
        "Change of each run against its untrained student, with 95 % intervals over documents."
        f" Dotted: {LEAST_GAIN:.0%}, which a success surely gains. Marks: the preflight's verdict."
    )
    return drawn, "predictions", "What preflights said, and what became of it", caption
