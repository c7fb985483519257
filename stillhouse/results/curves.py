"""This file is where the metrics of many runs become one curve: grouped, smoothed, with spread.

It decides what a figure's lines are; `plots` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.results.table import Frame, is_set, points_of, spell
from stillhouse.rundir import RunDir, Runs

# What tells how good a student's answers are, the best first, and what an axis calls it.
SCORE_KEYS = {
    "train/score": "score against a teacher sample",
    "eval/avg_score": "mean held-out score",
    "train/reverse_kl": "reverse KL, nats per token",
}


@dataclass(frozen=True)
class Group:
    """Runs that share a line in a plot."""

    name: str  # for the legend
    pair_name: str
    runs: list[Frame]  # the metrics of each, indexed by step
    schedule: Any  # λ of the first run, a number or knots
    max_steps: int


def groups(frame: Frame, runs: Runs, by: str) -> list[Group]:
    """Runs with metrics that share a value of the column `by` and a pair, in the sweep's order."""
    import pandas as pd

    found: dict[tuple[str, str], Group] = {}
    started = points_of(frame).dropna(subset=["pair_name"])
    for row in started.to_dict("records"):
        run = RunDir(runs.root / row["directory"])
        metrics = run.metrics()
        record: Mapping[str, Any] = run.record() or {}
        if not metrics:
            continue
        key = (spell(row[by]) if is_set(row[by]) else "base", row["pair_name"])
        if key not in found:
            spec = record["spec"]
            name = f"{by} = {key[0]}" if by in frame.attrs["leaves"] else key[0]
            steps = spec["training"]["max_steps"]
            found[key] = Group(name, key[1], [], spec["method"]["lmbda"], steps)
        found[key].runs.append(pd.DataFrame(metrics).set_index("step"))
    return list(found.values())


def lines_of(frame: Frame, runs: Runs, most: int) -> list[Group]:
    """One group per arm, or per compared value and pair where there are more than `most` arms."""
    arms = points_of(frame)["arm"].nunique()
    found = groups(frame, runs, "arm" if arms <= most else compared_leaf(frame))
    if len({group.name for group in found}) == len(found):
        return found
    return [replace(group, name=f"{group.name} ({group.pair_name})") for group in found]


def compared_leaf(frame: Frame) -> str:
    """What scores are laid out by: the compared override, the one with most values, or the arm."""
    compare, leaves = frame.attrs["sweep"]["compare"], frame.attrs["leaves"]
    if compare is not None:
        return compare["by"]
    points = points_of(frame)
    always = [leaf for leaf in leaves if points[leaf].notna().all()]
    return max(always, key=lambda leaf: points[leaf].nunique(), default="arm")


def ordered(column: Any) -> list[str]:
    """The values of an override, numbers by size, words as they first come."""
    values = list(dict.fromkeys(column.dropna()))
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    return list(dict.fromkeys(spell(value) for value in values))


def over_steps(group: Group, key: str, window: int = 1) -> Frame | None:
    """mean, low and high over a group's runs by step; None where the metric was never logged.

    Each run is first smoothed by a centred running mean of `window` of its logged values. A step
    that only some runs have reached is the mean of those.
    """
    import pandas as pd

    logged = [run[key].dropna() for run in group.runs if key in run]
    smooth = [s.rolling(window, center=True, min_periods=1).mean() for s in logged if len(s)]
    if not smooth:
        return None
    table: Frame = pd.concat(smooth, axis=1).sort_index()
    return pd.DataFrame(
        {"mean": table.mean(axis=1), "low": table.min(axis=1), "high": table.max(axis=1)}
    )


def jumps(group: Group) -> list[tuple[float, str]]:
    """(step, "to on-policy" or "to off-policy") of each jump in the method's λ schedule."""
    if not isinstance(group.schedule, list):
        return []
    pairs = zip(group.schedule, group.schedule[1:], strict=False)
    return [
        (x0 * group.max_steps, "to on-policy" if y1 > y0 else "to off-policy")
        for (x0, y0), (x1, y1) in pairs
        if x0 == x1 and y0 != y1
    ]


def score_key(lines: Sequence[Group]) -> str | None:
    """The best measure of a student's answers that was logged."""
    logged = {key for group in lines for run in group.runs for key in run}
    return next((key for key in SCORE_KEYS if key in logged), None)
