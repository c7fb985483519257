"""This file is where scores and training curves are drawn, as SVG for the page and PNG beside it.

A figure is drawn only where its data vary: see `draw`. Arms differ by colour, marker and line
style, so the figures read without colour. Ink in the SVG is `currentColor`: the page decides
whether it is dark or light. Files depend on the data alone: no dates, fixed ids.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.results.curves import (
    SCORE_KEYS,
    Group,
    compared_leaf,
    groups,
    jumps,
    lines_of,
    ordered,
    over_steps,
    score_key,
)
from stillhouse.results.stats import estimate
from stillhouse.results.table import Frame, points_of, spell
from stillhouse.rundir import Runs, write_atomic

Draw = Any  # matplotlib's Figure and Axes: imported inside functions, it costs half a second
# Okabe and Ito's colours without black and yellow: told apart by colour-blind readers, and readable
# on white and on near-black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv*"
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
BASELINE_LINES = {"teacher": (0, (6, 2)), "student": (0, (1, 2)), "ptq": (0, (4, 1, 1, 1))}
INK = "#1f2328"
MAX_GROUPS = len(COLOURS)
MAX_PANELS = 6
PAIR_LEAVES = ("pair", "pair_name")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "stillhouse",  # ids in the file follow from its content
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its files, and what a reader is told."""

    name: str
    title: str
    caption: str
    svg: Path
    png: Path


def draw(frame: Frame, runs: Runs, directory: Path) -> list[Picture]:
    """Every figure that this sweep's data can fill, written below `directory`.

    scores               scores by the compared axis: where anything is scored
    method_comparison    the compared metric by method: where methods differ
    training             loss, reverse KL and entropies over steps: where anything was trained
    distribution_cliff   score (or reverse KL) by method: where a schedule jumps during the run
    teacher_seeding      forced tokens and score over steps: where any run seeds
    """
    from matplotlib import rc_context

    directory.mkdir(parents=True, exist_ok=True)
    made: list[Picture] = []
    with rc_context(STYLE):
        for make in (_scores, _method_comparison, _training, _cliff, _seeding):
            drawn = make(frame, runs)
            if drawn is not None:
                made.append(_save(*drawn, directory))
    return made


Drawn = tuple[Draw, str, str, str]  # figure, name, title, caption


def _save(figure: Draw, name: str, title: str, caption: str, directory: Path) -> Picture:
    svg, png = (directory / f"{name}.{kind}" for kind in ("svg", "png"))
    figure.draw_without_rendering()  # lay out once, not once per format
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    write_atomic(svg, buffer.getvalue().replace(INK.encode(), b"currentColor"))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    write_atomic(png, buffer.getvalue())
    return Picture(name, title, caption, svg, png)


def _panels(count: int, height: float = 3.0, sharey: bool = False) -> tuple[Draw, list[Draw]]:
    """A figure with `count` axes, at most three in a row, a row `height` inches high."""
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    width = {1: 5.6, 2: 7.2}.get(columns, 9.0)
    figure = Figure(figsize=(width, height * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for spare in axes[count:]:
        spare.remove()
    for axis in axes[:count]:
        axis.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[:count]


def _legend(figure: Draw, axes: Sequence[Draw]) -> None:
    """One legend below the panels, each name once; none where there is one thing only."""
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if len(entries) > 1:
        widest = max(len(label) for label in entries) + 8  # the handle and the gap count too
        columns = max(1, min(len(entries), int(figure.get_figwidth() * 12 / widest)))
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)


def _scores(frame: Frame, runs: Runs) -> Drawn | None:
    scored = frame[frame["value"].notna() & frame["task"].notna()]
    if not (scored["kind"] == "point").any():
        return None
    by = compared_leaf(frame)
    pairs = scored["pair_name"].nunique() > 1 and by not in PAIR_LEAVES
    given = ("arm", by, *(PAIR_LEAVES if pairs else ()))
    others = [leaf for leaf in frame.attrs["leaves"] if by != "arm" and leaf not in given]
    series = max(others, key=lambda leaf: frame[leaf].nunique(), default=None)
    panels = scored.groupby(["task", "metric", *(["pair_name"] if pairs else [])], sort=False)
    shown = list(panels)[:MAX_PANELS]
    figure, axes = _panels(len(shown))
    for axis, ((task, metric, *pair), part) in zip(axes, shown, strict=True):
        _score_panel(axis, part, by, series)
        axis.set_title(": ".join((task, metric, *pair)), loc="left")
        axis.set_xlabel(by)
        arrow = "higher is better" if part.iloc[0]["higher_is_better"] else "lower is better"
        axis.set_ylabel(f"{metric} ({arrow})")
    _legend(figure, axes)
    caption = "Marks: means over seeds with 95 % t intervals (cut off at the frame). Dots: seeds."
    if len(others) > 1:
        averaged = ", ".join(leaf for leaf in others if leaf != series)
        caption += f" A mean is also over {averaged}."
    if set(scored["kind"]) != {"point"}:
        caption += " Horizontal lines: models that nobody trained here."
    return figure, "scores", f"Scores by {by}", caption


def _score_panel(axis: Draw, part: Frame, by: str, series: str | None) -> None:
    points = part[part["kind"] == "point"]
    ticks = ordered(points[by])
    names = ordered(points[series])[:MAX_GROUPS] if series else [None]
    for place, name in enumerate(names):
        mine = points if name is None else points[points[series].map(spell) == name]
        shift = 0.0 if len(names) == 1 else 0.5 * (place / (len(names) - 1) - 0.5)
        for x, tick in enumerate(ticks):
            values = mine[mine[by].map(spell) == tick].groupby("seed")["value"].mean().tolist()
            legend = f"{series} = {name}" if series and x == 0 else None
            _mark(axis, x + shift, values, place, legend)
    _baselines(axis, part)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_xlim(-0.6, len(ticks) - 0.4)
    if max(len(tick) for tick in ticks) * len(ticks) > 36:
        axis.tick_params(axis="x", rotation=25)
        for text in axis.get_xticklabels():
            text.set_horizontalalignment("right")
    _frame_values(axis.set_ylim, part)


def _mark(
    axis: Draw, at: float, values: list[float], place: int, legend: str | None, flat: bool = False
) -> None:
    """One arm: its mean with its interval at `at`, its seeds as dots; `flat` runs along x."""
    if not values:
        return
    e = estimate(values)
    colour = COLOURS[place % len(COLOURS)]
    look = {"color": colour, "marker": MARKERS[place % len(MARKERS)], "linestyle": "none"}
    reach = [[e.mean - e.low], [e.high - e.mean]] if e.n > 1 else None
    error = {"xerr" if flat else "yerr": reach}
    centre = ([e.mean], [at]) if flat else ([at], [e.mean])
    axis.errorbar(*centre, **error, **look, markersize=6, capsize=3, label=legend, zorder=3)
    if e.n > 1:
        beside = [at + 0.11] * e.n
        dots = (values, beside) if flat else (beside, values)
        axis.plot(*dots, ".", color=colour, markersize=4, alpha=0.6, zorder=2)


def _baselines(axis: Draw, part: Frame, flat: bool = False) -> None:
    line = axis.axvline if flat else axis.axhline
    for row in part[part["kind"] != "point"].itertuples():
        style = BASELINE_LINES[row.kind]
        line(row.value, color=INK, linewidth=1.1, linestyle=style, label=row.name, zorder=1)


def _frame_values(set_limits: Callable[[float, float], Any], part: Frame) -> None:
    """Limits from the values, so that the wide interval of two seeds does not flatten all else."""
    low, high = part["value"].min(), part["value"].max()
    room = 0.15 * (high - low) or 0.1 * abs(high) or 0.1
    bounded = part["doc_se"].notna().all()  # a share of right answers lies in [0, 1]
    low, high = low - room, high + room
    set_limits(max(low, -0.02) if bounded else low, min(high, 1.02) if bounded else high)


def _method_comparison(frame: Frame, runs: Runs) -> Drawn | None:
    points = points_of(frame)
    if points["method_name"].nunique() < 2:
        return None
    scored = frame[frame["value"].notna() & frame["task"].notna()]
    compare = frame.attrs["sweep"]["compare"]
    if compare is not None:
        names = scored["task"] + "/" + scored["metric"]
        scored = scored[names == compare["metric"]]
    if not (scored["kind"] == "point").any():
        return None
    first = scored.iloc[0]
    scored = scored[(scored["task"] == first["task"]) & (scored["metric"] == first["metric"])]
    pairs = ordered(scored[scored["kind"] == "point"]["pair_name"])[:3]
    methods = ordered(scored["method_name"])
    figure, axes = _panels(len(pairs), 0.9 + 0.34 * len(methods), sharey=True)
    for axis, pair in zip(axes, pairs, strict=True):
        part = scored[scored["pair_name"] == pair]
        for place, method in enumerate(methods):
            values = part[part["method_name"] == method].groupby("seed")["value"].mean().tolist()
            _mark(axis, place, values, place, None, flat=True)
        _baselines(axis, part, flat=True)
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", color="#888888", alpha=0.25, linewidth=0.6)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        _frame_values(axis.set_xlim, part)
        axis.set_title(pair, loc="left")
        axis.set_xlabel(f"{first['task']}: {first['metric']}")
    _legend(figure, axes)
    caption = "Means over seeds with 95 % t intervals (cut off at the frame); dots: seeds."
    return figure, "method_comparison", "Final score by method", caption


def _training(frame: Frame, runs: Runs) -> Drawn | None:
    lines = lines_of(frame, runs, MAX_GROUPS)
    if not lines:
        return None
    longest = max(len(run) for group in lines for run in group.runs)
    window = max(1, longest // 30)
    figure, axes = _panels(3)
    for place, group in enumerate(lines[:MAX_GROUPS]):
        _line(axes[0], group, place, "train/loss", window)
        _line(axes[1], group, place, "train/reverse_kl", window)
        _line(axes[2], group, place, "train/student_entropy", window)
        teacher = over_steps(group, "train/teacher_entropy", window)
        if teacher is not None:
            axes[2].plot(teacher["mean"], color=COLOURS[place], linewidth=0.8, alpha=0.8)
    titles = ("loss, as differentiated", "reverse KL(student || teacher)")
    for axis, title in zip(axes, (*titles, "entropy: student, teacher thin"), strict=True):
        _steps(axis, title)
        axis.set_ylabel("nats per token")
    _legend(figure, axes)
    caption = "Means over the runs of a line; bands: lowest to highest run."
    if window > 1:
        caption += f" Each run is a running mean of {window} steps."
    if len(lines) > MAX_GROUPS:
        caption += f" The first {MAX_GROUPS} of {len(lines)} groups."
    caption += " Losses at different β are not comparable; each line is on what its arm trains on."
    return figure, "training", "Training", caption


def _line(axis: Draw, group: Group, place: int, key: str, window: int = 1) -> None:
    """A group's mean curve and the band of its runs; nothing where the metric was not logged."""
    curve = over_steps(group, key, window)
    if curve is None:
        return
    colour, style = COLOURS[place % MAX_GROUPS], LINES[place % MAX_GROUPS]
    axis.plot(curve["mean"], color=colour, linestyle=style, linewidth=1.5, label=group.name)
    if len(group.runs) > 1:
        band = (curve.index, curve["low"], curve["high"])
        axis.fill_between(*band, color=colour, alpha=0.14, linewidth=0)


def _steps(axis: Draw, title: str, above: float = 0) -> None:
    axis.set_title(title, loc="left", pad=6 + above)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _cliff(frame: Frame, runs: Runs) -> Drawn | None:
    # λ is a method's schedule, unless the sweep sets it: then it is what its arms differ in.
    lines = groups(frame, runs, "lmbda" if "lmbda" in frame.attrs["leaves"] else "method_name")
    key = score_key(lines)
    if key is None or not any(jumps(group) for group in lines):
        return None
    by_pair: dict[str, list[Group]] = {}
    for group in lines:
        by_pair.setdefault(group.pair_name, []).append(group)
    places = {name: i for i, name in enumerate(dict.fromkeys(g.name for g in lines))}
    figure, axes = _panels(min(3, len(by_pair)), 3.4, sharey=True)
    for axis, (pair, mine) in zip(axes, by_pair.items(), strict=False):
        for group in mine:
            _line(axis, group, places[group.name], key)
        switches = [(places[g.name], g, *jump) for g in mine for jump in jumps(g)]
        for row, (place, group, step, towards) in enumerate(reversed(switches)):
            look = {"color": COLOURS[place % MAX_GROUPS], "linestyle": LINES[place % MAX_GROUPS]}
            axis.axvline(step, linewidth=0.9, **look)
            axis.annotate(
                f"{group.name} turns {towards}" if len(group.name) < 24 else f"turns {towards}",
                (step, 1),
                (0, 3 + 11 * row),  # above the frame, each in a row of its own
                xycoords=axis.get_xaxis_transform(),
                textcoords="offset points",
                ha="left" if step < group.max_steps / 3 else "right",
                color=look["color"],
                fontsize=8,
            )
        _steps(axis, pair, above=11 * len(switches))
        axis.set_ylabel(SCORE_KEYS[key])
    _legend(figure, axes)
    caption = "Vertical lines: a schedule switches there. Means over runs; bands: all runs."
    return figure, "distribution_cliff", "What a phase switch does", caption


def _seeding(frame: Frame, runs: Runs) -> Drawn | None:
    lines = lines_of(frame, runs, MAX_GROUPS)
    forced = [over_steps(group, "train/seed_tokens") for group in lines]
    if not any((curve["high"] > 0).any() for curve in forced if curve is not None):
        return None
    key = score_key(lines) or "train/loss"
    figure, axes = _panels(2)
    for place, group in enumerate(lines[:MAX_GROUPS]):
        _line(axes[0], group, place, "train/seed_tokens")
        _line(axes[1], group, place, key)
    titles = ("tokens forced from the teacher", SCORE_KEYS.get(key, "loss, nats per token"))
    for axis, title in zip(axes, titles, strict=True):
        _steps(axis, title)
    axes[0].set_ylabel("tokens")
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    caption = "Left: how many tokens of each answer the teacher writes first. Right: what follows."
    return figure, "teacher_seeding", "Teacher seeding", caption
