"""This file is where a sweep's figures are drawn: each only where its data vary, see `draw`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillhouse.results import prefixes
from stillhouse.results.comparisons import other_axes, setting_of
from stillhouse.results.curves import (
    ACCURACY,
    PAIR_LEAVES,
    SCORE_KEYS,
    Group,
    Run,
    compared_leaf,
    grouped,
    jumps,
    named,
    ordered,
    over_steps,
    rows_of,
    score_key,
    settings_by,
    together,
)
from stillhouse.results.gap_figure import gap_curves
from stillhouse.results.overlap_figures import MAPPED, overlap_curves, overlap_map
from stillhouse.results.plots import (
    BASELINE_LINES,
    COLOURS,
    INK,
    LINES,
    MAX_BASELINES,
    MAX_GROUPS,
    MAX_LINES,
    MAX_ROWS,
    RUNS,
    Draw,
    Drawn,
    Picture,
    baselines,
    categories,
    frame_values,
    legend,
    line,
    mark,
    panels,
    save,
    steps,
    style,
)
from stillhouse.results.predictions import Predictions, predicted
from stillhouse.results.summary import titled
from stillhouse.results.table import Frame, spell

MAX_PANELS = 6
LONG_TICKS = 40  # letters of all names below an axis
MAX_METHODS = 16  # panels of the cliff figure: small multiples that still show a fall
GREY = "#8a8f94"
INTERVALS = "Means over seeds; bands: 95 % t intervals over seeds, cut off at the frame."


def draw(frame: Frame, runs: Sequence[Run], asked: Predictions, directory: Path) -> list[Picture]:
    """Every figure that this sweep's data can fill, written below `directory`.

    predictions          what preflights said, and what became of it: where any was asked
    scores               scores by the compared axis: where anything is scored
    method_comparison    the compared metric by method: where methods differ
    training             loss, reverse KL and entropies over steps: where anything was trained
    rollout_gap          how far rollouts are from the function trained on them
    overlap              how student and teacher overlap over steps: where that was looked at
    overlap_map          the shared part by where in an answer
    advantage_map        the advantage on shared tokens by where in an answer
    prefixes             what the teacher makes of the student's first tokens: where that was asked
    distribution_cliff   score (or reverse KL) by method: where a schedule jumps during the run
    teacher_seeding      forced tokens and score over steps: where any run seeds
    """
    directory.mkdir(parents=True, exist_ok=True)
    with style():
        made = [
            predicted(asked),
            _scores(frame),
            _method_comparison(frame),
            _training(frame, runs),
            overlap_curves(frame, runs),
            *(overlap_map(frame, runs, measure) for measure in MAPPED),
            gap_curves(frame, runs),
            prefixes.drawn(prefixes.reaches(asked.cases)),
            _cliff(frame, runs),
            _seeding(frame, runs),
        ]
        return [save(*drawn, directory) for drawn in made if drawn is not None]


def _scores(frame: Frame) -> Drawn | None:
    scored = frame[frame["value"].notna() & frame["task"].notna()]
    if not (scored["kind"] == "point").any():
        return None
    by = compared_leaf(frame)
    pairs = scored["pair_name"].nunique() > 1 and by not in PAIR_LEAVES
    others = [] if by == "arm" else other_axes(frame, by, *(PAIR_LEAVES if pairs else ()))
    series = max(others, key=lambda leaf: frame[leaf].nunique(), default=None)
    if len(others) > 1:
        settings = [setting_of(row, others) for row in scored.to_dict("records")]
        if len({s for s in settings if s}) <= MAX_GROUPS:  # a baseline has none
            scored, others, series = scored.assign(setting=settings), ["setting"], "setting"
    parts = scored.groupby(["task", "metric", *(["pair_name"] if pairs else [])], sort=False)
    shown = list(parts)[:MAX_PANELS]
    ticks = ordered(scored[scored["kind"] == "point"][by])
    flat = (
        sum(map(len, ticks)) > LONG_TICKS
    )  # names that would overlap below an axis stand beside it
    figure, axes = panels(len(shown), 0.9 + 0.36 * len(ticks) if flat else 3.0, sharey=flat)
    for axis, ((task, metric, *pair), part) in zip(axes, shown, strict=True):
        _score_panel(axis, part, by, series, ticks, flat)
        axis.set_title(": ".join((titled(task, metric), *pair)), loc="left")
        arrow = "higher is better" if part.iloc[0]["higher_is_better"] else "lower is better"
        values = f"{metric} ({arrow})"
        axis.set_xlabel(values if flat else by)
        axis.set_ylabel("" if flat else values)
    legend(figure, axes)
    caption = "Marks: means over seeds with 95 % t intervals (cut off at the frame). Dots: seeds."
    if len(others) > 1:
        averaged = ", ".join(leaf for leaf in others if leaf != series)
        caption += f" A mean is also over {averaged}."
    if 0 < (scored["kind"] != "point").sum() <= MAX_BASELINES * len(shown):
        caption += " Lines: models that nobody trained here."
    return figure, "scores", f"Scores by {by}", caption


def _score_panel(
    axis: Draw, part: Frame, by: str, series: str | None, ticks: list[str], flat: bool
) -> None:
    points = part[part["kind"] == "point"]
    names = ordered(points[series])[:MAX_GROUPS] if series else [None]
    for place, name in enumerate(names):
        mine = points if name is None else points[points[series].map(spell) == name]
        shift = 0.0 if len(names) == 1 else 0.5 * (place / (len(names) - 1) - 0.5)
        for at, tick in enumerate(ticks):
            values = mine[mine[by].map(spell) == tick].groupby("seed")["value"].mean().tolist()
            named = (name if series == "setting" else f"{series} = {name}") if series else None
            mark(axis, at + shift, values, place, named, flat)
    baselines(axis, part, flat)
    if flat:
        categories(axis, ticks)
    else:
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_xlim(-0.6, len(ticks) - 0.4)
    frame_values(axis.set_xlim if flat else axis.set_ylim, part)


def _method_comparison(frame: Frame) -> Drawn | None:
    scored = frame[frame["value"].notna() & frame["task"].notna()]
    points = scored[scored["kind"] == "point"]
    if points["method_name"].nunique() < 2:
        return None
    compare = frame.attrs["sweep"]["compare"]
    first = points.iloc[0]
    metric = compare["metric"] if compare else f"{first['task']}/{first['metric']}"
    scored = scored[scored["task"] + "/" + scored["metric"] == metric]
    setting = settings_by(frame, "method", "method_name")
    names = {row["id"]: setting(row) for row in scored.to_dict("records") if row["kind"] == "point"}
    methods = ordered(scored["method_name"])
    settings = list(dict.fromkeys(names.values()))
    shown = settings[:MAX_PANELS]
    figure, axes = panels(len(shown), 0.9 + 0.3 * len(methods), sharey=True)
    for axis, name in zip(axes, shown, strict=True):
        mine = scored[scored["id"].map(names) == name]
        pairs = set(mine["pair_name"])
        part = scored[(scored["kind"] != "point") & scored["pair_name"].isin(pairs)]
        for place, method in enumerate(methods):
            mark(axis, place, mine[mine["method_name"] == method]["value"].tolist(), 0, flat=True)
        baselines(axis, part, flat=True)
        categories(axis, methods)
        frame_values(axis.set_xlim, scored)
        axis.set_title(name, loc="left")
        axis.set_xlabel(metric)
    legend(figure, axes)
    caption = (
        "Means over seeds with 95 % t intervals over seeds (cut off at the frame); dots: seeds."
    )
    if len(shown) > 1:
        caption += " A row without a mark: no arm there."
    if len(settings) > len(shown):
        caption += f" The first {len(shown)} of {len(settings)} settings."
    return figure, "method_comparison", "Final score by method", caption


def _training(frame: Frame, runs: Sequence[Run]) -> Drawn | None:
    if not runs:
        return None
    laid = rows_of(frame, runs, MAX_GROUPS)
    rows, places = laid.rows, laid.places
    window = max(1, max(len(run.metrics) for run in runs) // 30)
    figure, axes = panels(3 * len(rows[:MAX_ROWS]))
    for row, three in zip(rows, zip(*[iter(axes)] * 3, strict=True), strict=False):
        for group in laid.lines(row)[:MAX_LINES]:
            for axis, key in zip(three, ("loss", "reverse_kl", "student_entropy"), strict=True):
                line(axis, group, places[group.name], f"train/{key}", window, RUNS)
            teacher = over_steps(group, "train/teacher_entropy", window)
            if teacher is not None:
                colour = COLOURS[places[group.name] % len(COLOURS)]
                three[2].plot(teacher["mean"], color=colour, linewidth=0.8, alpha=0.8)
        titles = ("loss, as differentiated", "reverse KL(student || teacher)")
        for axis, title in zip(three, (*titles, "entropy: student, teacher thin"), strict=True):
            steps(axis, title)
            axis.set_ylabel("nats per token")
        three[0].set_ylabel(f"{row.name}\nnats per token" if row.name else "nats per token")
    legend(figure, axes)
    caption = "Means over seeds; bands: lowest to highest run."
    if window > 1:
        caption += f" Each run is a running mean of {window} steps."
    if len(rows) > MAX_ROWS:
        caption += f" The first {MAX_ROWS} of {len(rows)} settings."
    if len(places) > MAX_LINES:
        caption += f" The first {MAX_LINES} of {len(places)} arms."
    caption += " Losses at different β are not comparable; each line is on what its arm trains on."
    return figure, "training", "Training", caption


def _cliff(frame: Frame, runs: Sequence[Run]) -> Drawn | None:
    # λ is a method's schedule, unless the sweep sets it: then it is what its arms differ in.
    leaf, by = ("lmbda",) * 2 if "lmbda" in frame.attrs["leaves"] else ("method", "method_name")
    key = score_key(runs)
    if key is None or not any(jumps(run) for run in runs):
        return None
    setting = settings_by(frame, leaf, by)
    names = list(dict.fromkeys(setting(run.point) for run in runs))
    places = {name: i for i, name in enumerate(names[:MAX_GROUPS])}
    runs = [run for run in runs if setting(run.point) in places]
    compare = frame.attrs["sweep"]["compare"]
    asked = spell(compare["baseline"]) if compare and compare["by"] in (leaf, by) else None
    reference = [run for run in runs if spell(run.point[by]) == asked]
    shown = grouped(runs, lambda run: named(run, by))[:MAX_METHODS]
    figure, axes = panels(len(shown), 1.9 if len(shown) > 3 else 3.0, sharey=True)
    untrained = _untrained(frame) if key == ACCURACY else None
    for axis, arm in zip(axes, shown, strict=True):
        if untrained is not None:
            kind, value = untrained
            dots = {"linestyle": BASELINE_LINES[kind], "color": INK, "linewidth": 1.0}
            axis.axhline(value, **dots, label="untrained student, test set", zorder=1)
        for group in grouped(reference, lambda run: setting(run.point)):
            curve = over_steps(group, key)
            if curve is not None and spell(arm.runs[0].point[by]) != asked:
                label = together(str(asked), group.name)
                look = {"linestyle": LINES[places[group.name]], "color": GREY}
                axis.plot(curve["mean"], **look, linewidth=1.1, label=label, zorder=1.5)
        for group in grouped(arm.runs, lambda run: setting(run.point)):
            label = group.name or "this panel's arm"
            line(axis, Group(label, group.runs), places[group.name], key)
        switches = jumps(arm.runs[0])
        for at, _ in switches:
            axis.axvline(at, color=INK, linewidth=0.8, alpha=0.6, zorder=0)
        turns = [f"turns {towards} at step {at:.0f}" for at, towards in switches]
        steps(axis, arm.name, ", ".join(turns), room=10)
        axis.set_xlim(0, None)
    _within_values(axes, runs, key)
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(SCORE_KEYS[key])
    legend(figure, axes)
    caption = f"{INTERVALS} Vertical lines: a schedule switches there."
    if reference:
        caption += f" Grey: {asked}, the same in every panel."
    if untrained is not None:
        caption += " Dotted: the untrained student on the test problems, which are other ones."
    if len(names) > len(places):
        caption += f" The first {len(places)} of {len(names)} settings."
    return figure, "distribution_cliff", "What a phase switch does", caption


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


def _seeding(frame: Frame, runs: Sequence[Run]) -> Drawn | None:
    key = "train/seed_tokens"
    by = compared_leaf(frame)
    compare = frame.attrs["sweep"]["compare"]
    seeded = {named(r, by) for r in runs if key in r.metrics and (r.metrics[key] > 0).any()}
    if not seeded:
        return None
    asked = f"{by} = {spell(compare['baseline'])}" if compare else None
    mine = [run for run in runs if named(run, by) in {*seeded, asked}]
    score = score_key(mine) or "train/loss"
    lines = [group.name for group in grouped(mine, lambda run: named(run, by))][:MAX_GROUPS]
    setting = settings_by(frame, by)
    parts = grouped(mine, lambda run: setting(run.point))[: MAX_PANELS - 1]
    figure, axes = panels(1 + len(parts))
    follows = zip(axes[1:], parts, strict=True)
    for axis, part, what in [(axes[0], mine, key), *((a, p.runs, score) for a, p in follows)]:
        for group in grouped(part, lambda run: named(run, by)):
            if group.name in lines:
                line(axis, group, lines.index(group.name), what)
    steps(axes[0], "forced from the teacher")
    axes[0].set_ylabel("tokens of a rollout")
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    for axis, part in zip(axes[1:], parts, strict=True):
        steps(axis, part.name or SCORE_KEYS.get(score, "loss"))
        axis.set_ylabel(SCORE_KEYS.get(score, "loss, nats per token"))
    _within_values(axes[1:], mine, score)
    legend(figure, axes)
    caption = f"First: how many tokens of each rollout the teacher writes. {INTERVALS}"
    return figure, "teacher_seeding", "Teacher seeding", caption
