"""Measure how student and teacher distributions overlap, and whether that changed in training.

The numbers are those that `distill/diagnostics.py` logs on the student's own rollouts. Whether one
rose or fell is decided by seed: the last measurement minus the first, with its t interval.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from stillhouse.results import plots
from stillhouse.results.curves import Group, Run, joined, over_steps, rows_of
from stillhouse.results.format import Table, first_of, interval, mean_and_error, signed
from stillhouse.results.plots import Draw, Drawn
from stillhouse.results.provenance import Frame
from stillhouse.results.section import Evidence, Exhibit, Section
from stillhouse.results.stats import Estimate, estimate
from stillhouse.rundir import Json

# Logged metric -> name, and the direction in which the paper's successful runs move it.
MEASURES = {
    "ratio": ("overlap ratio", +1),
    "advantage": ("advantage on shared tokens", +1),
    "entropy_gap": ("entropy gap", -1),
    "mass_student": ("student's mass on shared tokens", +1),
    "mass_teacher": ("teacher's mass on shared tokens", +1),
}
# What arXiv:2604.13016 reports, with k = 16 of 151,936 tokens. Shown beside ours, not a threshold.
PAPER = "from 0.72 to above 0.91"
NAMED = 4  # more arms than this are counted, and are in the table
LONG = 4  # more arms than this fold the table
MAPS = 6  # arms of a map
WIDTH = 32  # characters of a line of a map's title
AXIS = re.compile(r", (?=\w+ = )")  # where the name of an arm may be broken
MAPPED = {  # drawn by position in the answer: metric -> figure's name, title, unit
    "ratio": ("overlap_map", "Overlap by position in the answer", "overlap ratio"),
    "advantage": (
        "advantage_map",
        "Advantage by position in the answer",
        "advantage on shared tokens, nats",
    ),
}
EDGE = 0.02  # of a map's cells, at either end, that may exceed its color scale
CURVES = {  # what a panel shows, and its unit
    "ratio": ("overlap ratio", "share of the likeliest tokens"),
    "advantage": ("advantage on shared tokens", "nats"),
    "entropy_gap": ("entropy gap", "nats"),
    "mass_student": ("mass on shared tokens", "probability"),
}
NOTE = (
    "Measured on the student's own rollouts, on the tokens that the loss counts (arXiv:2604.13016,"
    " Eq. 6 to 10). First and last are the first and last measured steps; the change is by seed,"
    " ± one standard error, with a 95 % t interval. In a vocabulary of a few hundred tokens the"
    " sixteen likeliest include many that neither side would generate: there the masses say little,"
    " and the ratio says less than among 150,000."
)


@dataclass(frozen=True)
class Course:
    """Where an arm's number began and ended, over seeds, and how far it moved."""

    first: Estimate
    last: Estimate
    change: Estimate  # last minus first, by seed


@dataclass(frozen=True)
class ArmOverlap:
    """How an arm's overlap with its teacher changed."""

    arm: str
    courses: dict[str, Course]  # of MEASURES, in their order
    k: int | None  # likeliest tokens of each side
    empty: float  # share of positions without a shared token, at the last measurement

    def moved(self, name: str) -> int:
        """+1 up, -1 down, 0: the seeds do not say."""
        change = self.courses[name].change
        if change.n < 2:
            return 0
        return (change.low > 0) - (change.high < 0)


def analyze(evidence: Evidence) -> Section:
    """How the overlap of each arm changed; no exhibit if no run measured it twice."""
    frame, runs = evidence.frame, evidence.curves
    found = overlaps(runs)
    return Section(
        title="Student–teacher overlap",
        text=summary_text(found),
        exhibits=[Exhibit("", as_table(found), len(found) > LONG)] if found else [],
        note=NOTE,
        figures=[
            partial(overlap_curves, frame, runs),
            *(partial(overlap_map, frame, runs, measure) for measure in MAPPED),
        ],
        arms={a.arm: as_record(a) for a in found},
    )


def overlaps(runs: Sequence[Run]) -> list[ArmOverlap]:
    """Each arm whose runs measured overlap more than once, in the sweep's order."""
    found: list[ArmOverlap] = []
    for arm in dict.fromkeys(str(run.point["arm"]) for run in runs):
        mine = [run for run in runs if run.point["arm"] == arm]
        logged = [run for run in mine if "overlap/ratio" in run.metrics]
        courses = {name: course for name in MEASURES if (course := _course(logged, name))}
        if len(courses) == len(MEASURES):
            counts = [
                run.metrics[["overlap/empty", "overlap/positions"]].dropna() for run in logged
            ]
            empty, all_positions = (sum(float(c.iloc[-1, i]) for c in counts) for i in (0, 1))
            found.append(ArmOverlap(arm, courses, logged[0].overlap_k, empty / all_positions))
    return found


def _course(runs: Sequence[Run], name: str) -> Course | None:
    columns = [run.metrics[f"overlap/{name}"].dropna() for run in runs]
    ends = [(float(c.iloc[0]), float(c.iloc[-1])) for c in columns if len(c) > 1]
    if not ends:
        return None
    changes = [last - first for first, last in ends]
    firsts, lasts = ([pair[i] for pair in ends] for i in (0, 1))
    return Course(estimate(firsts), estimate(lasts), estimate(changes))


def summary_text(found: Sequence[ArmOverlap]) -> str:
    """What the numbers mean for these runs, in sentences."""
    single = [a for a in found if a.courses["ratio"].change.n < 2]
    several = [a for a in found if a not in single]
    return " ".join(filter(None, (_text_of_seeds(several), _text_of_single(single))))


def _text_of_single(found: Sequence[ArmOverlap]) -> str:
    """One run per arm gives no interval: signs are counted, and nothing is claimed."""
    if not found:
        return ""
    ways = {
        name: sum(direction * a.courses[name].change.mean > 0 for a in found)
        for name, (_, direction) in MEASURES.items()
    }
    return (
        f"{len(found)} arm{'s' * (len(found) > 1)} with one run each allow no statement: at the end"
        f" the overlap ratio is higher in {ways['ratio']}, the advantage closer to 0 in"
        f" {ways['advantage']}, the entropy gap smaller in {ways['entropy_gap']}."
    )


def _text_of_seeds(found: Sequence[ArmOverlap]) -> str:
    if not found:
        return ""
    sentences = [_ratio_text(found)]
    for name, good, bad in (
        ("advantage", "moved closer to 0", "moved away from 0"),
        ("entropy_gap", "shrank", "grew"),
    ):
        title, direction = MEASURES[name]
        closer, away = _movers(name, direction, found), _movers(name, -direction, found)
        more = f" and {bad} in {_counted(away, found)}" if away else ""
        sentences.append(f"The {title} {good} in {_counted(closer, found)}{more}.")
    stuck = [a for a in found if a.moved("ratio") <= 0]
    mixed = [a.arm for a in stuck if a.moved("advantage") > 0 and a.moved("entropy_gap") < 0]
    failing = [a.arm for a in stuck if a.arm not in mixed]
    if failing:
        who = _counted(failing, found)
        sentences.append(
            f"An overlap ratio that does not rise is the paper's failing pattern: {who}."
        )
    if mixed:
        sentences.append(
            "The overlap ratio alone shows the paper's failing pattern, the other two its"
            f" successful one: {_counted(mixed, found)}. In a small vocabulary they say more."
        )
    if not stuck and all(a.moved("advantage") > 0 for a in found):
        sentences.append("That is the paper's successful pattern.")
    return " ".join(sentences)


def _ratio_text(found: Sequence[ArmOverlap]) -> str:
    grown, shrunk = (_movers("ratio", sign, found) for sign in (+1, -1))
    k = f"the {found[0].k} likeliest tokens of each side"
    text = f"The overlap ratio of {k} rose in {_counted(grown, found)}"
    if grown:
        risen = [a.courses["ratio"] for a in found if a.arm in grown]
        first, last = _range([c.first.mean for c in risen]), _range([c.last.mean for c in risen])
        text += f" (from {first} to {last}; in the paper's successful runs {PAPER})"
    return text + (f" and fell in {_counted(shrunk, found)}" if shrunk else "") + "."


def _movers(name: str, sign: int, found: Sequence[ArmOverlap]) -> list[str]:
    return [a.arm for a in found if a.moved(name) == sign]


def _range(values: Sequence[float]) -> str:
    return "–".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))


def _counted(arms: Sequence[str], found: Sequence[ArmOverlap]) -> str:
    if len(found) == 1:
        return "the one arm" if arms else "none of 1 arm"
    names = f" ({'; '.join(arms)})" if 0 < len(arms) < len(found) and len(arms) <= NAMED else ""
    return f"{len(arms) or 'none'} of {len(found)} arms{names}"


def as_table(found: Sequence[ArmOverlap]) -> Table:
    """Per arm and number: first, last, and the change with its interval."""
    header = ["arm", "number", "first", "last", "last − first", "95 % interval", "moved"]
    words = {1: "up", -1: "down", 0: "not detectably"}
    rows = [
        [
            arm.arm, MEASURES[name][0], mean_and_error(c.first), mean_and_error(c.last),
            signed(c.change.mean), interval(c.change.low, c.change.high), words[arm.moved(name)],
        ]
        for arm in found
        for name, c in arm.courses.items()
    ]  # fmt: skip
    return header, rows


def as_record(arm: ArmOverlap) -> Json:
    """An arm's overlap as columns of arms.csv."""
    row: Json = {"arm": arm.arm, "overlap_k": arm.k, "overlap_empty": arm.empty}
    for name, c in arm.courses.items():
        row |= {f"overlap_{name}_first": c.first.mean, f"overlap_{name}_last": c.last.mean}
        row[f"overlap_{name}_change_se"] = c.change.se
    return row


def overlap_curves(frame: Frame, runs: Sequence[Run]) -> Drawn | None:
    """Four numbers over steps, a row of panels per setting; None if none was measured."""
    measured = [run for run in runs if "overlap/ratio" in run.metrics]
    if not measured:
        return None
    laid = rows_of(frame, measured, plots.MAX_GROUPS)
    shown = laid.rows[: plots.MAX_ROWS]
    figure, axes = plots.panels(4 * len(shown), 2.6, columns=4 if len(shown) > 1 else 2)
    for row, four in zip(laid.rows, zip(*[iter(axes)] * 4, strict=True), strict=False):
        for group in laid.lines(row)[: plots.MAX_LINES]:
            _draw_group(four, group, laid.places[group.name])
        for axis, (title, unit) in zip(four, CURVES.values(), strict=True):
            plots.steps(axis, title)
            axis.set_ylabel(unit)
        if row.name:
            setting = row.name.replace(", ", "\n")
            four[0].set_ylabel(f"{setting}\n{CURVES['ratio'][1]}")
    plots.legend(figure, axes)
    caption = (
        f"On the student's own rollouts, the {measured[0].overlap_k} likeliest tokens of each side;"
        " means over seeds, bands: lowest to highest run. Thin: the teacher's mass. An arm without"
        " a line generated no rollouts."
    )
    caption += first_of(plots.MAX_ROWS, len(laid.rows), "settings")
    return figure, "overlap", "Student–teacher overlap", caption


def _draw_group(four: Sequence[Draw], group: Group, place: int) -> None:
    for axis, name in zip(four, CURVES, strict=True):
        plots.line(axis, group, place, f"overlap/{name}", 1, plots.RUNS)
    plots.thin_line(four[3], over_steps(group, "overlap/mass_teacher"), place)


def overlap_map(frame: Frame, runs: Sequence[Run], measure: str) -> Drawn | None:
    """A number of MAPPED by step and position in the answer, a panel per arm, means over seeds."""
    import pandas as pd

    name, title, unit = MAPPED[measure]
    prefix = f"overlap/{measure}/"
    bins = {key for run in runs for key in run.metrics if key.startswith(prefix)}
    ordered = sorted(bins, key=lambda key: int(key.removeprefix(prefix).partition("-")[0]))
    laid = rows_of(frame, runs, plots.MAX_GROUPS)
    groups = [
        Group(joined(row.name, group.name), group.runs)
        for row in laid.rows
        for group in laid.lines(row)
        if any(f"overlap/{measure}" in run.metrics for run in group.runs)
    ]
    if len(ordered) < 2 or not groups:
        return None
    shown = groups[:MAPS]
    figure, axes = plots.panels(len(shown), 2.6, sharey=True)
    tables = [_means(group, ordered) for group in shown]
    cells: Frame = pd.concat([table.melt()["value"] for table in tables]).dropna()
    low, high = math.floor(20 * cells.quantile(EDGE)), math.ceil(20 * cells.quantile(1 - EDGE))
    image: Any = None
    for axis, group, table in zip(axes, shown, tables, strict=True):
        at: list[float] = list(table.index)
        middles = [(a + b) / 2 for a, b in zip(at, at[1:], strict=False)]
        image = axis.pcolormesh(
            [at[0] - 0.5, *middles, at[-1] + 0.5], range(len(ordered) + 1), table.T.to_numpy(),
            vmin=low / 20, vmax=high / 20, cmap="cividis", rasterized=True,
        )  # fmt: skip
        lines = (textwrap.fill(part, WIDTH) for part in AXIS.split(group.name))
        plots.steps(axis, "\n".join(lines))
        axis.grid(visible=False)
        axis.set_yticks(
            [place + 0.5 for place in range(len(ordered))],
            [key.removeprefix(prefix).replace("-", "–") for key in ordered],
        )
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("token of the answer")
    figure.colorbar(image, ax=axes, label=unit, shrink=0.8)
    caption = (
        "Means over seeds; blank: no rollout got that far. Colors span all but the"
        f" {EDGE:.0%} of cells with the lowest and with the highest values."
    )
    return figure, name, title, caption + first_of(MAPS, len(groups), "arms")


def _means(group: Group, keys: Sequence[str]) -> Frame:
    """The mean over a group's runs of each metric, by step; NaN where no run has it."""
    import pandas as pd

    curves = {key: over_steps(group, key) for key in keys}
    means = {key: curve["mean"] for key, curve in curves.items() if curve is not None}
    return pd.DataFrame(means, columns=[*keys], dtype=float).sort_index()
