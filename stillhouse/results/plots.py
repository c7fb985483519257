"""Draw the parts of a figure (panels, marks, lines) and save it as SVG and PNG.

Arms differ by color, marker, and line style, so the figures read without color. Ink in the SVG is
`currentColor`: the page decides whether it is dark or light. Files depend on the data alone: no
dates, fixed ids.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from stillhouse.results.curves import Group, over_steps
from stillhouse.results.provenance import Frame
from stillhouse.results.stats import estimate
from stillhouse.rundir import write_atomic

Draw = Any  # matplotlib's Figure and Axes: imported inside functions, it costs half a second
# Okabe and Ito's colors without black and yellow: distinct for color-blind readers, and readable
# on white and on near-black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv*"
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
BASELINE_LINES = {"teacher": (0, (6, 2)), "student": (0, (1, 2)), "ptq": (0, (4, 1, 1, 1))}
INK = "#1f2328"
MAX_GROUPS = len(COLORS)
MAX_BASELINES = 8  # lines of untrained models and teachers, in one panel
MAX_PANELS = 6
MAX_ROWS = 3  # settings of a figure that has a row of panels for each
MAX_LINES = 12  # arms in one of its panels
RUNS = ("lowest", "highest")  # a band of all runs
FEW = 25  # values of a curve up to which each gets a mark
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # names may have dollars in them
    "axes.formatter.useoffset": False,  # 1 is written as 1, not as 0 beside "+1" in a corner
    "svg.hashsalt": "stillhouse",  # ids in the file follow from its content
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
Drawn = tuple[Draw, str, str, str]  # figure, name, title, caption
Figure = Callable[[], Drawn | None]  # None: the sweep has no data for it


def style() -> AbstractContextManager[None]:
    """The style of all figures, while it is entered."""
    import matplotlib

    untyped: Any = matplotlib
    return untyped.rc_context(STYLE)


def save(figure: Draw, name: str, directory: Path) -> str:
    """Write a figure as SVG and PNG below `directory`; the SVG's text."""
    figure.draw_without_rendering()  # lay out once, not once per format
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue().replace(INK.encode(), b"currentColor")
    write_atomic(directory / f"{name}.svg", svg)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    write_atomic(directory / f"{name}.png", buffer.getvalue())
    return svg.decode()


def panels(
    count: int, height: float = 3.0, sharey: bool = False, columns: int | None = None
) -> tuple[Draw, list[Draw]]:
    """A figure with `count` axes, at most four in a row, a row `height` inches high.

    columns: axes in a row, 1 to 4; by default, it follows from `count`.
    """
    from matplotlib.figure import Figure

    columns = columns or (4 if count > 9 else 2 if count == 4 else min(count, 3))
    rows = math.ceil(count / columns)
    width = {1: 5.6, 2: 7.2, 3: 9.0, 4: 10.0}[columns]
    figure = Figure(figsize=(width, height * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for spare in axes[count:]:
        spare.remove()
    for axis in axes[:count]:
        axis.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[:count]


def legend(figure: Draw, axes: Sequence[Draw]) -> None:
    """One legend below the panels, each name once; none for a single name."""
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if len(entries) > 1:
        widest = max(len(label) for label in entries) + 8  # the handle and the gap count too
        columns = max(1, min(len(entries), int(figure.get_figwidth() * 12 / widest)))
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)


def mark(
    axis: Draw, at: float, values: list[float], place: int, legend: str | None, flat: bool
) -> None:
    """One arm: its mean with its interval at `at`, its seeds as dots; `flat` runs along x."""
    if not values:
        return
    e = estimate(values)
    color = COLORS[place % len(COLORS)]
    look = {"color": color, "marker": MARKERS[place % len(MARKERS)], "linestyle": "none"}
    reach = [[e.mean - e.low], [e.high - e.mean]] if e.n > 1 else None
    error = {"xerr" if flat else "yerr": reach}
    centre = ([e.mean], [at]) if flat else ([at], [e.mean])
    axis.errorbar(*centre, **error, **look, markersize=6, capsize=3, label=legend, zorder=3)
    if e.n > 1:
        beside = [at + 0.11] * e.n
        dots = (values, beside) if flat else (beside, values)
        axis.plot(*dots, ".", color=color, markersize=4, alpha=0.6, zorder=2)


def baselines(axis: Draw, part: Frame, flat: bool = False) -> None:
    """A line per teacher and untrained student; none where there are too many to distinguish."""
    line = axis.axvline if flat else axis.axhline
    rows = part[part["kind"] != "point"]
    for row in rows.itertuples() if len(rows) <= MAX_BASELINES else ():
        untrained = {"student": "untrained student", "ptq": f"untrained in {row.quant_type}"}
        look = {"color": INK, "linewidth": 1.1, "linestyle": BASELINE_LINES[row.kind]}
        line(row.value, **look, label=untrained.get(row.kind, row.name), zorder=1)


def categories(axis: Draw, names: Sequence[str]) -> None:
    """Names down the side of a panel whose values run along x, the first on top."""
    axis.grid(axis="x", color="#888888", alpha=0.25, linewidth=0.6)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)


def frame_values(set_limits: Callable[[float, float], Any], part: Frame) -> None:
    """Limits from the values, so that the wide interval of two seeds does not flatten all else."""
    low, high = part["value"].min(), part["value"].max()
    room = 0.15 * (high - low) or 0.1 * abs(high) or 0.1
    bounded = part["doc_se"].notna().all()  # a share of right answers lies in [0, 1]
    low, high = low - room, high + room
    set_limits(max(low, -0.02) if bounded else low, min(high, 1.02) if bounded else high)


def line(
    axis: Draw, group: Group, place: int, key: str, window: int = 1,
    band: tuple[str, str] = ("low", "high"),
) -> None:  # fmt: skip
    """A group's mean curve and a band around it; nothing where the metric was not logged.

    band: columns of `over_steps`, the 95 % t interval or ("lowest", "highest") of the runs.
    """
    curve = over_steps(group, key, window)
    if curve is None:
        return
    style = LINES[(place + place // len(COLORS)) % len(LINES)]  # a color's second line is another
    look = {"color": COLORS[place % len(COLORS)], "linestyle": style}
    few = {"marker": MARKERS[place % len(MARKERS)], "markersize": 3.5} if len(curve) <= FEW else {}
    axis.plot(curve["mean"], **look, **few, linewidth=1.5, label=group.name)
    if len(group.runs) > 1:
        edges = (curve[band[0]], curve[band[1]])
        axis.fill_between(curve.index, *edges, color=look["color"], alpha=0.16, linewidth=0)


def thin_line(axis: Draw, curve: Frame | None, place: int) -> None:
    """A second metric of a group, thin and in the group's color; nothing for None."""
    if curve is not None:
        axis.plot(curve["mean"], color=COLORS[place % len(COLORS)], linewidth=0.8, alpha=0.8)


def log_scale(axis: Draw) -> None:
    """Logarithms along y; ticks as plain numbers, because no text of a figure is parsed as math."""
    from matplotlib.ticker import LogFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))


def steps(axis: Draw, title: str, below: str = "", room: float = 0) -> None:
    """Steps along x, and a title; `below` it a smaller line."""
    axis.set_title(title, loc="left", pad=6 + room)
    at = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 8}
    axis.annotate(below, (0, 1), (0, 4), **at)
    axis.set_xlabel("steps")
    axis.xaxis.get_major_locator().set_params(integer=True)
