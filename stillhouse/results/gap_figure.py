"""This file is where it is drawn how far rollouts were from the function trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from stillhouse.results.curves import Run, grouped, named, rows_of
from stillhouse.results.plots import (
    MAX_GROUPS,
    MAX_LINES,
    MAX_ROWS,
    RUNS,
    Drawn,
    legend,
    line,
    panels,
    steps,
)
from stillhouse.results.table import Frame

PANELS = {  # what a panel shows, and its unit
    "rollout/gap_mean": ("mean |log p trained - as drawn|", "nats per token"),
    "rollout/ess": ("effective sample size, per token", "share of tokens"),
}


def gap_records(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Of each arm that drew anything, what its steps came to, as columns of a CSV file."""
    found: dict[str, dict[str, Any]] = {}
    for group in grouped(runs, lambda run: named(run, "arm")):
        tables = [run.metrics for run in group.runs if "rollout/gap_mean" in run.metrics]
        if tables:
            means = [table["rollout/gap_mean"] for table in tables]
            found[group.name] = {
                "arm": group.name,
                "rollout_gap_mean": fmean(float(column.mean()) for column in means),
                "rollout_gap_largest": max(float(column.max()) for column in means),
                "rollout_ess_lowest": min(float(table["rollout/ess"].min()) for table in tables),
            }
    return found


def gap_curves(frame: Frame, runs: Sequence[Run]) -> Drawn | None:
    """Two numbers over steps, a row of panels per setting; None where nothing was drawn."""
    seen = [run for run in runs if "rollout/gap_mean" in run.metrics]
    if not seen:
        return None
    laid = rows_of(frame, seen, MAX_GROUPS)
    figure, axes = panels(2 * len(laid.rows[:MAX_ROWS]), 2.6)
    for row, two in zip(laid.rows, zip(*[iter(axes)] * 2, strict=True), strict=False):
        for axis, (key, (title, unit)) in zip(two, PANELS.items(), strict=True):
            for group in laid.lines(row)[:MAX_LINES]:
                line(axis, group, laid.places[group.name], key, 1, RUNS)
            steps(axis, title)
            axis.set_ylabel(unit)
        two[0].set_yscale("log")
        if row.name:
            two[0].set_ylabel(f"{row.name}\n{two[0].get_ylabel()}")
    legend(figure, axes)
    largest = max(float(run.metrics["rollout/gap_mean"].max()) for run in seen)
    caption = (
        "Of tokens drawn in each step. Rounding is about 1e-6 in float32 and 0.05 in bfloat16;"
        f" the largest mean of a step here is {largest:.2g}, and a run beyond max_rollout_gap ends."
        " Means over seeds; bands: lowest to highest run."
    )
    return figure, "rollout_gap", "How far rollouts are from the trained function", caption
