"""Draw the figures of a sweep, each only if its data vary: see `FIGURES`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from stillhouse.results import curves, plots
from stillhouse.results.comparisons import other_axes, setting_of
from stillhouse.results.curves import Group, Run
from stillhouse.results.format import first_of
from stillhouse.results.plots import Draw, Drawn
from stillhouse.results.provenance import Frame
from stillhouse.results.summary import titled
from stillhouse.results.table import format_value

LONG_TICKS = 40  # letters of all names below an axis
MAX_METHODS = 16  # panels of the cliff figure: small multiples that still show a fall
GRAY = "#8a8f94"
INTERVALS = "Means over seeds; bands: 95 % t intervals over seeds, clipped at the frame."


def scores(frame: Frame, _: Sequence[Run]) -> Drawn | None:
    """Scores by the compared axis, if anything is scored."""
    scored = frame[frame["value"].notna() & frame["task"].notna()]
    if not (scored["kind"] == "point").any():
        return None
    by = curves.compared_field(frame)
    pairs = scored["pair_name"].nunique() > 1 and by not in curves.PAIR_FIELDS
    others = [] if by == "arm" else other_axes(frame, by, *(curves.PAIR_FIELDS if pairs else ()))
    series = max(others, key=lambda field: frame[field].nunique(), default=None)
    if len(others) > 1:
        settings = [setting_of(row, others) for row in scored.to_dict("records")]
        if len({s for s in settings if s}) <= plots.MAX_GROUPS:  # a baseline has none
            scored, others, series = scored.assign(setting=settings), ["setting"], "setting"
    parts = scored.groupby(["task", "metric", *(["pair_name"] if pairs else [])], sort=False)
    shown = list(parts)[: plots.MAX_PANELS]
    ticks = curves.ordered(scored[scored["kind"] == "point"][by])
    flat = sum(map(len, ticks)) > LONG_TICKS  # names that would overlap stand beside the axis
    figure, axes = plots.panels(len(shown), 0.9 + 0.36 * len(ticks) if flat else 3.0, sharey=flat)
    for axis, ((task, metric, *pair), part) in zip(axes, shown, strict=True):
        _score_panel(axis, part, by, series, ticks, flat)
        axis.set_title(": ".join((titled(task, metric), *pair)), loc="left")
        arrow = "higher is better" if part.iloc[0]["higher_is_better"] else "lower is better"
        values = f"{metric} ({arrow})"
        axis.set_xlabel(values if flat else by)
        axis.set_ylabel("" if flat else values)
    plots.legend(figure, axes)
    caption = "Marks: means over seeds with 95 % t intervals (clipped at the frame). Dots: seeds."
    if len(others) > 1:
        averaged = ", ".join(field for field in others if field != series)
        caption += f" A mean is also over {averaged}."
    if 0 < (scored["kind"] != "point").sum() <= plots.MAX_BASELINES * len(shown):
        caption += " Lines: the teacher and untrained students."
    return figure, "scores", f"Scores by {by}", caption


def _score_panel(
    axis: Draw, part: Frame, by: str, series: str | None, ticks: list[str], flat: bool
) -> None:
    points = part[part["kind"] == "point"]
    names = curves.ordered(points[series])[: plots.MAX_GROUPS] if series else [None]
    for place, name in enumerate(names):
        mine = points if name is None else points[points[series].map(format_value) == name]
        shift = 0.0 if len(names) == 1 else 0.5 * (place / (len(names) - 1) - 0.5)
        for at, tick in enumerate(ticks):
            seeds = mine[mine[by].map(format_value) == tick].groupby("seed")
            label = name if series in (None, "setting") else f"{series} = {name}"
            plots.mark(axis, at + shift, seeds["value"].mean().tolist(), place, label, flat)
    plots.baselines(axis, part, flat)
    if flat:
        plots.categories(axis, ticks)
    else:
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_xlim(-0.6, len(ticks) - 0.4)
    plots.frame_values(axis.set_xlim if flat else axis.set_ylim, part)


def method_comparison(frame: Frame, _: Sequence[Run]) -> Drawn | None:
    """The compared metric by method, if methods differ."""
    scored = frame[frame["value"].notna() & frame["task"].notna()]
    points = scored[scored["kind"] == "point"]
    if points["method_name"].nunique() < 2:
        return None
    compare = frame.attrs["sweep"]["compare"]
    first = points.iloc[0]
    metric = compare["metric"] if compare else f"{first['task']}/{first['metric']}"
    scored = scored[scored["task"] + "/" + scored["metric"] == metric]
    setting = curves.settings_by(frame, "method", "method_name")
    names = {row["id"]: setting(row) for row in scored.to_dict("records") if row["kind"] == "point"}
    methods = curves.ordered(scored["method_name"])
    settings = list(dict.fromkeys(names.values()))
    shown = settings[: plots.MAX_PANELS]
    figure, axes = plots.panels(len(shown), 0.9 + 0.3 * len(methods), sharey=True)
    for axis, name in zip(axes, shown, strict=True):
        mine = scored[scored["id"].map(names) == name]
        pairs = set(mine["pair_name"])
        part = scored[(scored["kind"] != "point") & scored["pair_name"].isin(pairs)]
        for place, method in enumerate(methods):
            values = mine[mine["method_name"] == method]["value"].tolist()
            plots.mark(axis, place, values, 0, None, flat=True)
        plots.baselines(axis, part, flat=True)
        plots.categories(axis, methods)
        plots.frame_values(axis.set_xlim, scored)
        axis.set_title(name, loc="left")
        axis.set_xlabel(metric)
    plots.legend(figure, axes)
    caption = (
        "Means over seeds with 95 % t intervals over seeds (clipped at the frame); dots: seeds."
    )
    if len(shown) > 1:
        caption += " A row without a mark has no arm in that setting."
    caption += first_of(len(shown), len(settings), "settings")
    return figure, "method_comparison", "Final score by method", caption


def training(frame: Frame, runs: Sequence[Run]) -> Drawn | None:
    """Loss, reverse KL, and entropies over steps, if anything was trained."""
    if not runs:
        return None
    laid = curves.rows_of(frame, runs, plots.MAX_GROUPS)
    rows, places = laid.rows, laid.places
    window = max(1, max(len(run.metrics) for run in runs) // 30)
    figure, axes = plots.panels(3 * len(rows[: plots.MAX_ROWS]))
    for row, three in zip(rows, zip(*[iter(axes)] * 3, strict=True), strict=False):
        for group in laid.lines(row)[: plots.MAX_LINES]:
            for axis, key in zip(three, ("loss", "reverse_kl", "student_entropy"), strict=True):
                plots.line(axis, group, places[group.name], f"train/{key}", window, plots.RUNS)
            teacher = curves.over_steps(group, "train/teacher_entropy", window)
            plots.thin_line(three[2], teacher, places[group.name])
        titles = ("loss, as differentiated", "reverse KL(student || teacher)")
        for axis, title in zip(three, (*titles, "entropy: student, teacher thin"), strict=True):
            plots.steps(axis, title)
            axis.set_ylabel("nats per token")
        three[0].set_ylabel(f"{row.name}\nnats per token" if row.name else "nats per token")
    plots.legend(figure, axes)
    caption = "Means over seeds; bands: lowest to highest run."
    if window > 1:
        caption += f" Each run is a running mean of {window} steps."
    caption += first_of(plots.MAX_ROWS, len(rows), "settings")
    caption += first_of(plots.MAX_LINES, len(places), "arms")
    caption += " Losses at different β are not comparable; each arm's loss is on its own data."
    return figure, "training", "Training", caption


def distribution_cliff(frame: Frame, runs: Sequence[Run]) -> Drawn | None:
    """The score over steps by method, if a schedule curves.jumps during any run."""
    # λ is part of a method, unless the sweep sets it: then arms differ in λ itself.
    field, by = ("lmbda",) * 2 if "lmbda" in frame.attrs["fields"] else ("method", "method_name")
    key = curves.score_key(runs)
    if key is None or not any(curves.jumps(run) for run in runs):
        return None
    setting = curves.settings_by(frame, field, by)
    names = list(dict.fromkeys(setting(run.point) for run in runs))
    places = {name: i for i, name in enumerate(names[: plots.MAX_GROUPS])}
    runs = [run for run in runs if setting(run.point) in places]
    compare = frame.attrs["sweep"]["compare"]
    is_compared = compare and compare["by"] in (field, by)
    baseline = format_value(compare["baseline"]) if is_compared else None
    reference = [run for run in runs if format_value(run.point[by]) == baseline]
    shown = curves.grouped(runs, lambda run: curves.line_name(run, by))[:MAX_METHODS]
    figure, axes = plots.panels(len(shown), 1.9 if len(shown) > 3 else 3.0, sharey=True)
    untrained = _untrained(frame) if key == curves.ACCURACY else None
    for axis, arm in zip(axes, shown, strict=True):
        if untrained is not None:
            kind, value = untrained
            dots = {"linestyle": plots.BASELINE_LINES[kind], "color": plots.INK, "linewidth": 1.0}
            axis.axhline(value, **dots, label="untrained student, test set", zorder=1)
        for group in curves.grouped(reference, lambda run: setting(run.point)):
            curve = curves.over_steps(group, key)
            if curve is not None and format_value(arm.runs[0].point[by]) != baseline:
                label = curves.joined(str(baseline), group.name)
                look = {"linestyle": plots.LINES[places[group.name]], "color": GRAY}
                axis.plot(curve["mean"], **look, linewidth=1.1, label=label, zorder=1.5)
        for group in curves.grouped(arm.runs, lambda run: setting(run.point)):
            label = group.name or "this panel's arm"
            plots.line(axis, Group(label, group.runs), places[group.name], key)
        switches = curves.jumps(arm.runs[0])
        for at, _ in switches:
            axis.axvline(at, color=plots.INK, linewidth=0.8, alpha=0.6, zorder=0)
        turns = [f"switches {towards} at step {at:.0f}" for at, towards in switches]
        plots.steps(axis, arm.name, ", ".join(turns), room=10)
        axis.set_xlim(0, None)
    _within_values(axes, runs, key)
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(textwrap.fill(curves.SCORE_KEYS[key], 20))
    plots.legend(figure, axes)
    caption = f"{INTERVALS} Vertical lines: schedule switches."
    if reference:
        caption += f" Gray: {baseline}, the same in every panel."
    if untrained is not None:
        caption += " Dotted: the untrained student on the test set, which has other problems."
    caption += first_of(len(places), len(names), "settings")
    return figure, "distribution_cliff", "Effect of a phase switch", caption


def _untrained(frame: Frame) -> tuple[str, float] | None:
    """Kind and compared score of the student before training, None unless there is exactly one."""
    compare = frame.attrs["sweep"]["compare"]
    metric = compare["metric"] if compare else None
    scored = frame[(frame["task"] + "/" + frame["metric"] == metric) & frame["value"].notna()]
    for kind in ("ptq", "student"):
        values = scored[scored["kind"] == kind]["value"].tolist()
        if values:
            return (kind, values[0]) if len(values) == 1 else None
    return None


def _within_values(axes: Sequence[Draw], runs: Sequence[Run], key: str) -> None:
    """Limits from the runs, so that the wide interval of two seeds does not flatten all else."""
    values = [run.metrics[key].dropna() for run in runs if key in run.metrics]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    room = 0.06 * (high - low) or 0.1
    for axis in axes:
        axis.set_ylim(low - room, high + room)


def teacher_seeding(frame: Frame, runs: Sequence[Run]) -> Drawn | None:
    """Forced tokens and the score over steps, if any run seeds."""
    key = "train/seed_tokens"
    by = curves.compared_field(frame)
    compare = frame.attrs["sweep"]["compare"]
    seeds = [run for run in runs if key in run.metrics and (run.metrics[key] > 0).any()]
    seeded = {curves.line_name(run, by) for run in seeds}
    if not seeded:
        return None
    baseline = f"{by} = {format_value(compare['baseline'])}" if compare else None
    mine = [run for run in runs if curves.line_name(run, by) in {*seeded, baseline}]
    score = curves.score_key(mine) or "train/loss"
    groups = curves.grouped(mine, lambda run: curves.line_name(run, by))
    lines = [group.name for group in groups[: plots.MAX_GROUPS]]
    setting = curves.settings_by(frame, by)
    parts = curves.grouped(mine, lambda run: setting(run.point))[: plots.MAX_PANELS - 1]
    figure, axes = plots.panels(1 + len(parts))
    follows = zip(axes[1:], parts, strict=True)
    for axis, part, what in [(axes[0], mine, key), *((a, p.runs, score) for a, p in follows)]:
        for group in curves.grouped(part, lambda run: curves.line_name(run, by)):
            if group.name in lines:
                plots.line(axis, group, lines.index(group.name), what)
    plots.steps(axes[0], "teacher-written prefix")
    axes[0].set_ylabel("tokens of a rollout")
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    for axis, part in zip(axes[1:], parts, strict=True):
        plots.steps(axis, part.name or curves.SCORE_KEYS.get(score, "loss"))
        axis.set_ylabel(curves.SCORE_KEYS.get(score, "loss, nats per token"))
    _within_values(axes[1:], mine, score)
    plots.legend(figure, axes)
    caption = f"First panel: tokens of each rollout that the teacher writes. {INTERVALS}"
    return figure, "teacher_seeding", "Teacher seeding", caption


# In the order of the page; each returns None where the sweep has no data for it.
FIGURES = (scores, method_comparison, training, distribution_cliff, teacher_seeding)
