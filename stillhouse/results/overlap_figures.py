"""This file is where the overlap of student and teacher is drawn: over steps, along an answer."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from stillhouse.results.curves import Group, Rows, Run, over_steps, rows_of
from stillhouse.results.plots import (
    COLOURS,
    MAX_GROUPS,
    MAX_LINES,
    MAX_ROWS,
    RUNS,
    Draw,
    Drawn,
    legend,
    line,
    panels,
    steps,
)
from stillhouse.results.table import Frame

MAPS = 6  # arms of a map
WIDTH = 32  # characters of a line of a map's title
AXIS = re.compile(r", (?=\w+ = )")  # where the name of an arm may be broken
MAPPED = {  # what is drawn along an answer: name, title, unit
    "ratio": ("overlap_map", "Where in an answer they overlap", "overlap ratio"),
    "advantage": (
        "advantage_map",
        "Where in an answer there is something to learn",
        "advantage on shared tokens, nats",
    ),
}
EDGE = 0.02  # of a map's cells, on either side, that may lie beyond the ends of its colours
CURVES = {  # what a panel shows, and its unit
    "ratio": ("shared part of the likeliest tokens", "overlap ratio"),
    "advantage": ("advantage on shared tokens", "nats"),
    "entropy_gap": ("entropy gap", "nats"),
    "mass_student": ("mass on shared tokens", "probability"),
}


def overlap_curves(frame: Frame, runs: Sequence[Run]) -> Drawn | None:
    """Four numbers over steps, a row of panels per setting; None where none was looked at."""
    seen = [run for run in runs if "overlap/ratio" in run.metrics]
    if not seen:
        return None
    laid = rows_of(frame, seen, MAX_GROUPS)
    figure, axes = panels(4 * len(laid.rows[:MAX_ROWS]), 2.6)
    for row, four in zip(laid.rows, zip(*[iter(axes)] * 4, strict=True), strict=False):
        for group in laid.lines(row)[:MAX_LINES]:
            _curves(four, group, laid.places[group.name])
        for axis, (title, unit) in zip(four, CURVES.values(), strict=True):
            steps(axis, title)
            axis.set_ylabel(unit)
        if row.name:
            setting = row.name.replace(", ", "\n")
            four[0].set_ylabel(f"{setting}\n{CURVES['ratio'][1]}")
    legend(figure, axes)
    k = seen[0].overlap_k
    caption = (
        f"On the student's own rollouts, the {k} likeliest tokens of either side; means over seeds,"
        " bands: lowest to highest run. Thin: the teacher's mass. An arm without a line wrote no"
        " rollout."
    )
    return figure, "overlap", "How student and teacher overlap", caption + _left_out(laid)


def _curves(four: Sequence[Draw], group: Group, place: int) -> None:
    for axis, name in zip(four, CURVES, strict=True):
        line(axis, group, place, f"overlap/{name}", 1, RUNS)
    teacher = over_steps(group, "overlap/mass_teacher")
    if teacher is not None:
        colour = COLOURS[place % len(COLOURS)]
        four[3].plot(teacher["mean"], color=colour, linewidth=0.8, alpha=0.8)


def _left_out(laid: Rows) -> str:
    more = len(laid.rows) - MAX_ROWS
    return f" The first {MAX_ROWS} of {len(laid.rows)} settings." if more > 0 else ""


def overlap_map(frame: Frame, runs: Sequence[Run], measure: str) -> Drawn | None:
    """A number of MAPPED by step and place in the answer, a panel per arm, means over seeds."""
    import pandas as pd

    name, title, unit = MAPPED[measure]
    prefix = f"overlap/{measure}/"
    bins = {key for run in runs for key in run.metrics if key.startswith(prefix)}
    ordered = sorted(bins, key=lambda key: int(key.removeprefix(prefix).partition("-")[0]))
    laid = rows_of(frame, runs, MAX_GROUPS)
    groups = [
        Group(", ".join(filter(None, (row.name, group.name))), group.runs)
        for row in laid.rows
        for group in laid.lines(row)
        if any(f"overlap/{measure}" in run.metrics for run in group.runs)
    ]
    if len(ordered) < 2 or not groups:
        return None
    shown = groups[:MAPS]
    figure, axes = panels(len(shown), 2.6, sharey=True)
    tables = []
    for group in shown:
        curves = {key: over_steps(group, key) for key in ordered}
        tables.append(
            pd.DataFrame(
                {key: curve["mean"] for key, curve in curves.items() if curve is not None},
                columns=ordered,
                dtype=float,  # a bin that no run of this arm reaches is a column of nothing
            ).sort_index()
        )
    cells: Any = pd.concat([table.melt()["value"] for table in tables]).dropna()
    low, high = math.floor(20 * cells.quantile(EDGE)), math.ceil(20 * cells.quantile(1 - EDGE))
    image = None
    for axis, group, table in zip(axes, shown, tables, strict=True):
        at = list(table.index)
        edges = [
            at[0] - 0.5,
            *((a + b) / 2 for a, b in zip(at, at[1:], strict=False)),
            at[-1] + 0.5,
        ]
        image = axis.pcolormesh(
            edges, range(len(ordered) + 1), table.T.to_numpy(), vmin=low / 20, vmax=high / 20,
            cmap="cividis", rasterized=True,
        )  # fmt: skip
        lines = (textwrap.fill(part, WIDTH) for part in AXIS.split(group.name))
        steps(axis, "\n".join(lines))
        axis.grid(visible=False)
        axis.set_yticks(
            [place + 0.5 for place in range(len(ordered))],
            [key.removeprefix(prefix).replace("-", "–") for key in ordered],
        )
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("token of the answer")
    figure.colorbar(image, ax=axes, label=unit, shrink=0.8)
    caption = (
        "Means over seeds; a blank: no rollout got there. Colours span all but the"
        f" {EDGE:.0%} of cells with the lowest and with the highest values."
    )
    if len(groups) > MAPS:
        caption += f" The first {MAPS} of {len(groups)} arms."
    return figure, name, title, caption
