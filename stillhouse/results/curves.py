"""Turn the metrics of many runs into curves: group runs, smooth them, and add their spread.

This decides what the lines of a figure are; `figures` and the analyses draw them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import ContractError
from stillhouse.results.comparisons import other_axes, setting_of
from stillhouse.results.provenance import Frame
from stillhouse.results.stats import t_quantile
from stillhouse.results.table import format_value, is_set, points_of
from stillhouse.rundir import RunDir, Runs

ACCURACY = "eval/accuracy"  # share of held-out questions answered correctly, every few steps
# Measures of a student's answers, the best first, and what an axis calls them.
SCORE_KEYS = {
    ACCURACY: "held-out accuracy",
    "train/score": "score against a teacher sample",
    "eval/avg_score": "mean held-out score",
    "train/reverse_kl": "reverse KL, nats per token",
}
PAIR_FIELDS = ("pair", "pair_name")


@dataclass(frozen=True)
class Run:
    """A point that has logged metrics."""

    point: Mapping[str, Any]  # its row of `table.points_of`
    metrics: Frame  # one row per step, indexed by the number of steps done after it
    schedule: float | list[tuple[float, float]]  # λ, a number or knots (share of the run, λ)
    max_steps: int
    overlap_k: int | None  # None: written before overlap was measured


@dataclass(frozen=True)
class Group:
    """Runs that share a line in a plot."""

    name: str  # for the legend
    runs: list[Run]


def read_runs(frame: Frame, runs: Runs) -> list[Run]:
    """Every run of the sweep that has logged a step, in the sweep's order."""
    import pandas as pd

    known: list[Run] = []
    for row in points_of(frame).dropna(subset=["pair_name"]).to_dict("records"):
        run = RunDir(runs.root / row["directory"])
        try:
            metrics, record = run.metrics(), run.record()
        except ContractError as error:  # the page says which; the other runs have their curves
            frame.attrs.setdefault("odd", []).append(str(error))
            continue
        if metrics and record is not None:
            table: Frame = pd.DataFrame(metrics)
            table.index = pd.Index(table.pop("step") + 1, name="steps")
            spec = record["spec"]
            steps = spec["training"]["max_steps"]
            k = spec["monitor"].get("overlap_k")
            known.append(Run(row, table, spec["method"]["lmbda"], steps, k))
    return known


def grouped(runs: Sequence[Run], name: Callable[[Run], str]) -> list[Group]:
    """Runs of one name together, in the order in which the names first occur."""
    groups: dict[str, Group] = {}
    for run in runs:
        groups.setdefault(name(run), Group(name(run), [])).runs.append(run)
    return list(groups.values())


def line_name(run: Run, column: str) -> str:
    """A run's value of an override, or of another column of its row, as a line's name."""
    value = run.point[column]
    if not is_set(value):
        return "base"
    return (
        format_value(value)
        if column in ("arm", "method_name")
        else f"{column} = {format_value(value)}"
    )


def settings_by(frame: Frame, *apart: str) -> Callable[[Mapping[str, Any]], str]:
    """Names a point's setting of the axes besides `apart`, with its pair if there are several."""
    axes = other_axes(frame, *apart)
    pairs = frame["pair_name"].nunique() > 1 and not {*axes} & {*PAIR_FIELDS}

    def name(point: Mapping[str, Any]) -> str:
        return joined(setting_of(point, axes), point["pair_name"] if pairs else "")

    return name


def joined(*parts: str) -> str:
    """The parts that are not empty, with commas between."""
    return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Rows:
    """The layout of a figure with a line per arm: a row per setting, lines by name."""

    rows: list[Group]
    names: dict[str, str]  # a run's id -> its line
    places: dict[str, int]  # a line -> its place, which decides its look

    def lines(self, row: Group) -> list[Group]:
        return grouped(row.runs, lambda run: self.names[run.point["id"]])


def rows_of(frame: Frame, runs: Sequence[Run], most: int) -> Rows:
    """One row with a line per arm; with more than `most` arms, a row per setting and a line per
    compared value, because runs of different settings must not share a mean."""
    pair, by = settings_by(frame, *frame.attrs["fields"]), compared_field(frame)
    rows = [Group("", [*runs])]
    names = {run.point["id"]: joined(run.point["arm"], pair(run.point)) for run in runs}
    if len({*names.values()}) > most:
        setting = settings_by(frame, by)
        rows = grouped(runs, lambda run: setting(run.point))
        names = {run.point["id"]: line_name(run, by) for run in runs}
    places = {name: place for place, name in enumerate(dict.fromkeys(names.values()))}
    return Rows(rows, names, places)


def compared_field(frame: Frame) -> str:
    """The axis of a score plot: the compared override, the one with most values, or the arm."""
    compare, fields = frame.attrs["sweep"]["compare"], frame.attrs["fields"]
    if compare is not None:
        return compare["by"]
    points = points_of(frame)
    always = [field for field in fields if points[field].notna().all()]
    return max(always, key=lambda field: points[field].nunique(), default="arm")


def ordered(column: Any) -> list[str]:
    """The values of an override, numbers by size, words in the order of first occurrence."""
    values: list[Any] = list(dict.fromkeys(column.dropna()))
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    return list(dict.fromkeys(format_value(value) for value in values))


def over_steps(group: Group, key: str, window: int = 1) -> Frame | None:
    """A metric over a group's runs by step; None where it was never logged.

    Columns: mean; lowest and highest of the runs; low and high, the 95 % t interval of the mean
    (NaN for one run), which assumes that runs differ in their seed alone. Each run is smoothed
    first, by a centered running mean of `window` logged values. A step that only some runs have
    reached is the mean of those.
    """
    import pandas as pd

    logged = [run.metrics[key].dropna() for run in group.runs if key in run.metrics]
    smooth = [s.rolling(window, center=True, min_periods=1).mean() for s in logged if len(s)]
    if not smooth:
        return None
    table: Frame = pd.concat(smooth, axis=1).sort_index()
    mean, counts = table.mean(axis=1), table.count(axis=1)
    quantiles = {n: t_quantile(n - 1) for n in set(counts) if n > 1}
    half = table.sem(axis=1) * counts.map(quantiles)
    bounds = {"lowest": table.min(axis=1), "highest": table.max(axis=1)}
    return pd.DataFrame({"mean": mean, **bounds, "low": mean - half, "high": mean + half})


def jumps(run: Run) -> list[tuple[float, str]]:
    """(steps, "to on-policy" or "to off-policy") of each jump in a run's λ schedule."""
    if not isinstance(run.schedule, list):
        return []
    pairs = zip(run.schedule, run.schedule[1:], strict=False)
    return [
        (x0 * run.max_steps, "to on-policy" if y1 > y0 else "to off-policy")
        for (x0, y0), (x1, y1) in pairs
        if x0 == x1 and y0 != y1
    ]


def score_key(runs: Sequence[Run]) -> str | None:
    """The best measure of a student's answers that any run logged."""
    logged = {key for run in runs for key in run.metrics}
    return next((key for key in SCORE_KEYS if key in logged), None)
