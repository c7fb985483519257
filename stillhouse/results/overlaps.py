"""This file is where it is told how student and teacher came to overlap, arm by arm.

The numbers are those that `distill/diagnostics.py` logs on the student's own rollouts; whether one
rose or fell is decided by seed: the last measurement minus the first, with its t interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.results.curves import Run
from stillhouse.results.layout import Table, interval, signed, spread
from stillhouse.results.stats import Estimate, estimate

# What is logged, what it is called, and which way the paper's successful runs move it.
MEASURES = {
    "ratio": ("overlap ratio", +1),
    "advantage": ("advantage on shared tokens", +1),
    "entropy_gap": ("entropy gap", -1),
    "mass_student": ("student's mass on shared tokens", +1),
    "mass_teacher": ("teacher's mass on shared tokens", +1),
}
# What arXiv:2604.13016 reports, with k = 16 of 151,936 tokens. Told beside ours, not a threshold.
PAPER = "from 0.72 to above 0.91"
NAMED = 4  # more arms than this are counted, and are in the table


@dataclass(frozen=True)
class Course:
    """Where an arm's number began and ended, over seeds, and how far it went."""

    first: Estimate
    last: Estimate
    change: Estimate  # last minus first, by seed


@dataclass(frozen=True)
class ArmOverlap:
    """What became of an arm's overlap with its teacher."""

    arm: str
    courses: dict[str, Course]  # of MEASURES, in their order
    k: int | None  # likeliest tokens of a side
    empty: float  # share of positions without a shared token, at the last measurement

    def moved(self, name: str) -> int:
        """+1 up, -1 down, 0: the seeds do not say."""
        change = self.courses[name].change
        if change.n < 2:
            return 0
        return (change.low > 0) - (change.high < 0)


def overlaps(runs: Sequence[Run]) -> list[ArmOverlap]:
    """Each arm whose runs were looked at more than once, in the sweep's order."""
    found: list[ArmOverlap] = []
    for arm in dict.fromkeys(run.point["arm"] for run in runs):
        mine = [run for run in runs if run.point["arm"] == arm]
        logged = [run for run in mine if "overlap/ratio" in run.metrics]
        if not logged:
            continue
        courses: dict[str, Course] = {}
        for name in MEASURES:
            ends = [
                (float(column.iloc[0]), float(column.iloc[-1]))
                for run in logged
                if len(column := run.metrics[f"overlap/{name}"].dropna()) > 1
            ]
            if ends:
                firsts, lasts = ([pair[i] for pair in ends] for i in (0, 1))
                changes = [last - first for first, last in ends]
                courses[name] = Course(estimate(firsts), estimate(lasts), estimate(changes))
        if len(courses) == len(MEASURES):
            counts = [
                run.metrics[["overlap/empty", "overlap/positions"]].dropna() for run in logged
            ]
            lost, seen = (sum(float(c[column].iloc[-1]) for c in counts) for column in counts[0])
            found.append(ArmOverlap(arm, courses, logged[0].overlap_k, lost / seen))
    return found


def told(found: Sequence[ArmOverlap]) -> str:
    """What the numbers mean for these runs, in sentences."""
    single = [a for a in found if a.courses["ratio"].change.n < 2]
    found = [a for a in found if a not in single]
    return " ".join(filter(None, (_of_seeds(found) if found else "", _of_single(single))))


def _of_single(found: Sequence[ArmOverlap]) -> str:
    """Of arms with one run each there is no interval: signs are counted, and nothing is claimed."""
    if not found:
        return ""
    ways = {
        name: sum(towards * a.courses[name].change.mean > 0 for a in found)
        for name, (_, towards) in MEASURES.items()
    }
    return (
        f"Of {len(found)} arm{'s' * (len(found) > 1)} with one run each it is not said whether they"
        f" moved: at the end the shared part is larger in {ways['ratio']}, the advantage on it"
        f" closer to 0 in {ways['advantage']}, the entropy gap smaller in {ways['entropy_gap']}."
    )


def _of_seeds(found: Sequence[ArmOverlap]) -> str:
    said = [_shared(found)]
    for name, good, bad in (
        ("advantage", "came closer to 0", "moved away from 0"),
        ("entropy_gap", "shrank", "grew"),
    ):
        title, towards = MEASURES[name]
        closer, away = _movers(name, towards, found), _movers(name, -towards, found)
        more = f" and {bad} in {_of(away, found)}" if away else ""
        said.append(f"The {title} {good} in {_of(closer, found)}{more}.")
    stuck = [a for a in found if a.moved("ratio") <= 0]
    torn = [a.arm for a in stuck if a.moved("advantage") > 0 and a.moved("entropy_gap") < 0]
    failing = [a.arm for a in stuck if a.arm not in torn]
    if failing:
        who = _of(failing, found)
        said.append(
            f"A shared part that does not grow is how the paper's failing runs look: {who}."
        )
    if torn:
        said.append(
            "By the shared part alone these would look like the paper's failing runs, by the other"
            f" two like its successful ones: {_of(torn, found)}. In a small vocabulary the other"
            " two say more."
        )
    if not stuck and all(a.moved("advantage") > 0 for a in found):
        said.append("That is how the paper's successful runs look.")
    return " ".join(said)


def _shared(found: Sequence[ArmOverlap]) -> str:
    grown, shrunk = (_movers("ratio", sign, found) for sign in (+1, -1))
    text = (
        f"Of the {found[0].k} likeliest tokens of either side, the shared part grew in"
        f" {_of(grown, found)}"
    )
    if grown:
        risen = [a.courses["ratio"] for a in found if a.arm in grown]
        first, last = _range([c.first.mean for c in risen]), _range([c.last.mean for c in risen])
        text += f" (from {first} to {last}; in the paper's successful runs {PAPER})"
    return text + (f" and shrank in {_of(shrunk, found)}" if shrunk else "") + "."


def _movers(name: str, sign: int, found: Sequence[ArmOverlap]) -> list[str]:
    return [a.arm for a in found if a.moved(name) == sign]


def _range(values: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values)))
    return "–".join(ends)


def _of(arms: Sequence[str], found: Sequence[ArmOverlap]) -> str:
    if len(found) == 1:
        return "the one arm" if arms else "none of 1 arm"
    names = f" ({'; '.join(arms)})" if 0 < len(arms) < len(found) and len(arms) <= NAMED else ""
    return f"{len(arms) or 'none'} of {len(found)} arms{names}"


def table_of(found: Sequence[ArmOverlap]) -> Table:
    """Per arm and number: first, last, and the change with its interval."""
    header = ["arm", "number", "first", "last", "last − first", "95 % interval", "moved"]
    words = {1: "up", -1: "down", 0: "not seen to"}
    rows = [
        [
            arm.arm, title, spread(c.first), spread(c.last), signed(c.change.mean),
            interval(c.change.low, c.change.high), words[arm.moved(name)],
        ]
        for arm in found
        for name, (title, _) in MEASURES.items()
        for c in [arm.courses[name]]
    ]  # fmt: skip
    return header, rows


def record(arm: ArmOverlap) -> dict[str, Any]:
    """An arm's overlap as columns of a CSV file."""
    row: dict[str, Any] = {"overlap_k": arm.k, "overlap_empty": arm.empty}
    for name, c in arm.courses.items():
        row |= {f"overlap_{name}_first": c.first.mean, f"overlap_{name}_last": c.last.mean}
        row[f"overlap_{name}_change_se"] = c.change.se
    return row
