"""Show how far rollouts were from the function that was trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean

from stillhouse.results import plots
from stillhouse.results.curves import Run, grouped, line_name, rows_of
from stillhouse.results.format import Table, first_of
from stillhouse.results.plots import Drawn
from stillhouse.results.provenance import Frame
from stillhouse.results.section import Evidence, Exhibit, Section
from stillhouse.rundir import Json

PANELS = {  # metric -> title and unit of its panel
    "rollout/gap_mean": ("mean gap", "nats per token"),
    "rollout/ess": ("effective sample size", "share of tokens"),
}
NOTE = (
    "The gap is the mean absolute difference between a token's log-probability when it was drawn"
    " and when it was trained on, in nats; rounding is about 1e-6 in float32 and 0.05 in"
    " bfloat16. The effective sample size is the share of tokens that importance weights leave."
    " Both are of the tokens drawn in each step; a run beyond max_rollout_gap ends."
)


def analyze(evidence: Evidence) -> Section:
    """The gap of each arm; no exhibit if no arm generated rollouts."""
    records = as_records(evidence.curves)
    return Section(
        title="Rollout gap",
        text="",
        exhibits=[Exhibit("", as_table(records))] if records else [],
        note=NOTE,
        figures=[partial(gap_curves, evidence.frame, evidence.curves)],
        arms=records,
    )


def as_records(runs: Sequence[Run]) -> dict[str, Json]:
    """By arm that generated rollouts: its gap over all steps, as columns of arms.csv."""
    records: dict[str, Json] = {}
    for group in grouped(runs, lambda run: line_name(run, "arm")):
        tables = [run.metrics for run in group.runs if "rollout/gap_mean" in run.metrics]
        if tables:
            gaps = [table["rollout/gap_mean"] for table in tables]
            records[group.name] = {
                "arm": group.name,
                "rollout_gap_mean": fmean(float(column.mean()) for column in gaps),
                "rollout_gap_largest": max(float(column.max()) for column in gaps),
                "rollout_ess_lowest": min(float(table["rollout/ess"].min()) for table in tables),
            }
    return records


def as_table(records: dict[str, Json]) -> Table:
    """A row per arm."""
    header = ["arm", "mean gap", "largest gap of a step", "lowest effective sample size"]
    rows = [
        [r["arm"], *(f"{r[f'rollout_gap_{n}']:.2g}" for n in ("mean", "largest")),
         f"{r['rollout_ess_lowest']:.4g}"]
        for r in records.values()
    ]  # fmt: skip
    return header, rows


def gap_curves(frame: Frame, runs: Sequence[Run]) -> Drawn | None:
    """Two numbers over steps, a row of panels per setting; None if no rollouts were generated."""
    measured = [run for run in runs if "rollout/gap_mean" in run.metrics]
    if not measured:
        return None
    laid = rows_of(frame, measured, plots.MAX_GROUPS)
    figure, axes = plots.panels(2 * len(laid.rows[: plots.MAX_ROWS]), 2.6, columns=2)
    for row, two in zip(laid.rows, zip(*[iter(axes)] * 2, strict=True), strict=False):
        for axis, (key, (title, unit)) in zip(two, PANELS.items(), strict=True):
            for group in laid.lines(row)[: plots.MAX_LINES]:
                plots.line(axis, group, laid.places[group.name], key, 1, plots.RUNS)
            plots.steps(axis, title)
            axis.set_ylabel(unit)
        plots.log_scale(two[0])
        two[1].set_ylim(0, 1.05)
        if row.name:
            two[0].set_ylabel(f"{row.name}\n{two[0].get_ylabel()}")
    plots.legend(figure, axes)
    caption = "Means over seeds; bands: lowest to highest run."
    caption += first_of(plots.MAX_ROWS, len(laid.rows), "settings")
    return figure, "rollout_gap", "Rollout gap", caption
