"""This file is where preflights are held against what became of their pairs: did they predict?

One case per trained point that somebody asked a preflight of, and that learnt from rollouts alone.
Its outcome is the change of its accuracy on the documents of the suite, against its own untrained
student, with a 95 % interval over documents; it is a success where the interval's lower end is
above LEAST_GAIN. What is judged is the verdict of the rules as they stand now, and beside it single
numbers: how well each ranks successes above failures (the area under the curve). Cases of one pair
are alike, so intervals resample pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stillhouse import verdict
from stillhouse.results.answer import LEAST_GAP
from stillhouse.results.stats import NAN
from stillhouse.results.table import Frame, right_answers
from stillhouse.rundir import Json, RunDir, Runs, read_json
from stillhouse.sources import differences
from stillhouse.verdict import Measured, Rules

LEAST_GAIN = 0.1  # of accuracy: a smaller one is not what a person distils for
RESAMPLES = 2000
SEED = 0
NORMAL = 1.96  # of a normal variable, 95 % lie within so many standard deviations
RANK = {"unlikely": 0.0, "unsure": 0.5, "likely": 1.0}


@dataclass(frozen=True)
class Case:
    """A pair under a loss, what was said of it before it was trained, and what became of it."""

    point: str  # id
    pair: str
    pair_seed: int | None
    beta: float
    max_steps: int
    before: float  # accuracy of the untrained student
    after: float
    teacher: float
    change: Measured
    numbers: dict[str, Measured]  # of the preflight
    verdict: str
    rule: str

    @property
    def is_success(self) -> bool:
        """Whether the student surely gained LEAST_GAIN."""
        return self.change.low > LEAST_GAIN

    @property
    def recovered(self) -> float:
        """The share of the gap to the teacher that was made up for; NaN where there is hardly one.

        Never to be read alone: it is above 1 where a student outdoes its teacher, and reads well
        where a student falls to a teacher that is worse.
        """
        gap = self.teacher - self.before
        return self.change.value / gap if gap >= LEAST_GAP else NAN


def cases(frame: Frame, runs: Runs, rules: Rules) -> list[Case]:
    """The trained and scored points of a sweep that preflights were asked of, in the sweep's order.

    Empty where nobody asked, or the metric is not right-or-wrong.
    """
    found: list[Case] = []
    own = frame[(frame["kind"] == "point") & frame["file"].notna()]
    baselines = {
        kind: frame[(frame["kind"] == kind) & frame["file"].notna()]
        .drop_duplicates("pair_key")
        .set_index("pair_key")
        for kind in ("student", "teacher")
    }
    for row in own.drop_duplicates("id").to_dict("records"):
        if any(row["pair_key"] not in part.index for part in baselines.values()):
            continue
        student, teacher = (part.loc[row["pair_key"]] for part in baselines.values())
        record = RunDir(runs.root / row["directory"]).record()
        assert record is not None  # it was scored
        spec = record["spec"]
        if not _is_plain(spec):
            continue
        told = read_json(runs.verdict_file(row["pair_name"], verdict.key_of_plain(spec)))
        if told is None or _is_of_others(told, record):
            continue
        numbers = verdict.numbers_of(told)
        beta, max_steps = spec["loss"]["beta"], spec["training"]["max_steps"]
        said = verdict.decide(rules, numbers | verdict.asked_numbers(beta, max_steps))
        found.append(
            Case(
                point=row["id"],
                pair=row["pair_name"],
                pair_seed=spec["pair"]["pair_seed"],
                beta=beta,
                max_steps=max_steps,
                before=float(student["value"]),
                after=float(row["value"]),
                teacher=float(teacher["value"]),
                change=_change(row["file"], student["file"]),
                numbers=numbers,
                verdict=said["verdict"],
                rule=said["rule"],
            )
        )
    return found


def left_out(frame: Frame, runs: Runs) -> list[str]:
    """Says how many runs had a preflight of their pair that looked at other weights or rows."""
    count = 0
    points = frame[frame["kind"] == "point"].drop_duplicates("id").dropna(subset=["pair_name"])
    for row in points.to_dict("records"):
        record = RunDir(runs.root / row["directory"]).record()
        if record is not None:
            key = verdict.key_of_plain(record["spec"])
            told = read_json(runs.verdict_file(row["pair_name"], key))
            count += told is not None and _is_of_others(told, record)
    if not count:
        return []
    return [
        f"The preflights of {count} runs looked at other weights or rows than these were trained on"
        " and are left out."
    ]


def _is_of_others(told: Json, record: Json) -> bool:
    """Whether a preflight looked at something else than a run rests on."""
    return bool(differences(told.get("sources") or {}, record.get("sources") or {}))


def _is_plain(spec: Json) -> bool:
    """Whether a point is what a verdict speaks of: rollouts alone, and no rescue."""
    rescue = spec.get("rescue", {})
    is_rescued = rescue.get("cold_start", 0) > 0 or rescue.get("kept_prompts", 1) != 1
    is_rescued = is_rescued or rescue.get("other_prompts", 0) > 0
    method = spec["method"]
    return method["lmbda"] == 1 and method["seed_tokens"] == 0 and not is_rescued


def _change(after: str, before: str) -> Measured:
    """How much more often the trained student is right on the same documents."""
    answers = [right_answers(read_json(Path(file)) or {"samples": []}) for file in (after, before)]
    new, old = (a or {} for a in answers)
    shared = sorted(new.keys() & old.keys())
    difference_D = np.array([new[d] - old[d] for d in shared])
    n, mean = len(difference_D), float(difference_D.mean())
    half = NORMAL * float(difference_D.std(ddof=1)) / math.sqrt(n)
    return Measured(mean, mean - half, mean + half, n)


# ---------------------------------------------------------------------- how well it ranks

Score = Callable[[Case], float]


def by_verdict(case: Case) -> float:
    """unlikely < unsure < likely."""
    return RANK[case.verdict]


def by_number(name: str, sign: float = 1.0) -> Score:
    """A number of the preflight as it is, or turned round; NaN where it was not measured."""
    return lambda case: sign * case.numbers[name].value if name in case.numbers else NAN


def area(scores: Sequence[float], successes: Sequence[bool]) -> float:
    """The chance that a success has a higher score than a failure; ties count half. NaN for one
    class only. A score that is NaN ranks lowest: what was not measured speaks for nothing."""
    known = [-math.inf if math.isnan(s) else s for s in scores]
    good = np.array([s for s, ok in zip(known, successes, strict=True) if ok])
    bad = np.array([s for s, ok in zip(known, successes, strict=True) if not ok])
    if not len(good) or not len(bad):
        return NAN
    above = (good[:, None] > bad).mean() + (good[:, None] == bad).mean() / 2
    return float(above)


def area_of(found: Sequence[Case], score: Score) -> Measured:
    """The area under the curve of a score, with an interval over resampled pairs."""
    by_pair: dict[str, list[tuple[float, bool]]] = {}
    for case in found:
        by_pair.setdefault(case.pair, []).append((score(case), case.is_success))
    pairs = list(by_pair.values())
    rng = np.random.default_rng(SEED)

    def of(chosen: Sequence[list[tuple[float, bool]]]) -> float:
        rows = [row for rows in chosen for row in rows]
        return area([s for s, _ in rows], [ok for _, ok in rows])

    drawn = [
        of([pairs[i] for i in rng.integers(len(pairs), size=len(pairs))]) for _ in range(RESAMPLES)
    ]
    known = [value for value in drawn if not math.isnan(value)]
    low, high = np.quantile(known, [0.025, 0.975]) if known else (NAN, NAN)
    return Measured(of(pairs), float(low), float(high), len(pairs))


def best_split(found: Sequence[Case], score: Score) -> tuple[float, float]:
    """(threshold, balanced accuracy) of the best cut of a score: successes above it.

    Of several cuts that are equally good, the one in the widest gap; its middle.
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


def as_rows(found: Sequence[Case]) -> list[Json]:
    """The cases for a CSV file."""
    names = list(dict.fromkeys(name for case in found for name in case.numbers))
    return [
        {
            "point": c.point,
            "pair": c.pair,
            "pair_seed": c.pair_seed,
            "beta": c.beta,
            "max_steps": c.max_steps,
            "before": c.before,
            "after": c.after,
            "teacher": c.teacher,
            "change": c.change.value,
            "change_low": c.change.low,
            "change_high": c.change.high,
            "documents": c.change.n,
            "success": c.is_success,
            "gap_recovered": c.recovered,
            "verdict": c.verdict,
            "rule": c.rule,
            **{
                name + end: getattr(c.numbers[name], part) if name in c.numbers else NAN
                for name in names
                for end, part in (("", "value"), ("_low", "low"), ("_high", "high"))
            },
        }
        for c in found
    ]
