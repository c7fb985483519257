"""This file is where a sweep's frame becomes the table that people read, and what to know before.

`summary` reduces seeds to means with their noise, `wide` lays them out for a page or Markdown,
`remarks` says what is missing and what was not made alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from stillhouse.results.rests import mixed, mixed_counts
from stillhouse.results.stats import estimate, number
from stillhouse.results.table import Frame, Json, is_set, is_unscored, points_of
from stillhouse.spec import REQUANTISED

WARNED = 6  # arms that a remark about a watch rule names
KINDS = ("teacher", "student", "ptq", "point")  # in the order in which a table shows them


def remarks(frame: Frame) -> list[str]:
    """What to know before comparing rows: what is missing, and what was not made alike."""
    points = points_of(frame)
    late = set(frame[(frame["kind"] == "point") & is_unscored(frame)]["id"])
    said: list[str] = []
    if late:
        unscored = points[points["id"].isin(late)].to_dict("records")
        counts = Counter(map(_phase, unscored)).most_common()
        states = ", ".join(f"{n} {phase}" for phase, n in counts)
        said.append(f"{len(late)} of {len(points)} points are not scored in full: {states}.")
    bare = frame[(frame["kind"] != "point") & is_unscored(frame)]
    if len(bare):
        names = ", ".join(bare["arm"].drop_duplicates())
        said.append(f"Baselines not scored in full: {names}.")
    odd = [*points[points["phase"] == "unreadable"]["cause"], *frame.attrs.get("odd", [])]
    said += [f"Left out, since it cannot be read: {why}." for why in dict.fromkeys(odd)]
    said += _warnings(points)
    said += _budgets(frame)
    by = (frame.attrs["sweep"]["compare"] or {}).get("by")
    for leaf in [leaf for leaf, other in frame.attrs["follows"].items() if other == by]:
        said.append(f"{leaf} follows from {by}: a difference between values of {by} is of both.")
    otherwise = int(frame["scored_otherwise"].eq(True).sum())
    if otherwise:
        said.append(
            f"{otherwise} scores here were made under other settings than this sweep's suite"
            " and are left out; `stillhouse run` makes them anew."
        )
    said += mixed(frame)
    said += _mixed("code", points["code_digest"])
    if points["code_dirty"].eq(True).any():
        said.append("Some points were trained by code with uncommitted changes (code_dirty).")
    for column in [c for c in frame if c.startswith("version_")]:
        said += _mixed(f"{column.removeprefix('version_')} in training", points[column])
    for column in [c for c in frame if c.startswith("eval_version_")]:
        what = f"{column.removeprefix('eval_version_')} in scoring"
        said += [m for _, part in frame.groupby("task") for m in _mixed(what, part[column])]
    return list(dict.fromkeys(said))


def _phase(point: Json) -> str:
    """How far a point came that is not scored in full."""
    if is_set(point["stopped_by"]):
        return f"stopped by {point['stopped_by']}"
    if not is_set(point["phase"]):
        return "not started"
    return "trained, not scored" if point["phase"] == "done" else point["phase"]


def _warnings(points: Frame) -> list[str]:
    """Which watch rules warned, and of which arms."""
    rules: dict[str, list[str]] = {}
    for row in points.to_dict("records"):
        for rule in row["warnings"].split() if is_set(row["warnings"]) else ():
            rules.setdefault(rule, []).append(row["arm"])
    said: list[str] = []
    for rule, arms in rules.items():
        counts = Counter(arms).most_common()
        named = [f"{n} of {arm}" for arm, n in counts[:WARNED]]
        named += [f"and of {len(counts) - WARNED} arms more"] if counts[WARNED:] else []
        said.append(
            f"Watch rule {rule} warned in {len(arms)} of {len(points)} runs: {', '.join(named)}."
        )
    return said


def _budgets(frame: Frame) -> list[str]:
    """Says which arms train longer than most, unless the sweep asks about just that."""
    steps = points_of(frame).dropna(subset=["max_steps"]).drop_duplicates("arm")
    counts = steps["max_steps"].value_counts()
    if len(counts) < 2 or "max_steps" in frame.attrs["leaves"]:
        return []
    other = steps[steps["max_steps"] != counts.index[0]]
    told = ", ".join(f"{row.max_steps} in {row.arm}" for row in other.itertuples())
    return [f"Steps differ: {counts.index[0]} in most arms, {told}."]


def _mixed(what: str, column: Any) -> list[str]:
    return mixed_counts(what, Counter(column.dropna()))


def summary(frame: Frame) -> Frame:
    """One row per (arm, task): mean, se, n, low, high over seeds; baselines first, with doc_se.

    se, low and high (95 % t interval) are over seeds and NaN for one seed. A baseline has no seed:
    its n is missing, and doc_se is the binomial error over documents, another kind of noise.
    `missing` counts points without a score, `stopped` says which watch rules ended some of them,
    `shown` is the cell as text.
    """
    import pandas as pd

    leaves: list[str] = frame.attrs["leaves"]
    rows: list[Json] = []
    for kind in KINDS:
        part = frame[(frame["kind"] == kind) & frame["task"].notna()]
        for _, group in part.groupby(["arm", "task", "metric"], sort=False, dropna=False):
            first = group.iloc[0]
            scored = group.dropna(subset="value")
            e = estimate(scored["value"].tolist())
            row = {"kind": kind, "arm": first["arm"]}
            row |= {leaf: first.get(leaf) for leaf in leaves}
            row |= {"task": first["task"], "metric": first["metric"]}
            row |= {"mean": e.mean, "se": e.se, "n": e.n if kind == "point" else None}
            row |= {"low": e.low, "high": e.high, "missing": len(group) - e.n}
            for column in ("n_docs", "doc_se", "higher_is_better", "examples"):
                row[column] = scored.iloc[0][column] if e.n else None
            rules = Counter(group["stopped_by"].dropna()).items()
            row["stopped"] = "; ".join(f"{count} stopped by {rule}" for rule, count in rules)
            row["codes"] = " ".join(sorted(set(scored["code_digest"].dropna())))
            rows.append(row | {"shown": _shown(row, e.n)})
    table: Frame = pd.DataFrame(rows)
    if rows:
        table[["n", "n_docs"]] = table[["n", "n_docs"]].astype("Int64")
    table.attrs = frame.attrs
    return table


def _shown(row: Json, scored: int) -> str:
    if scored == 0:
        return row["stopped"] or "not scored yet"
    if row["kind"] == "point":
        more = f"; {row['stopped']}" if row["stopped"] else ""
        if scored == 1:
            return f"{number(row['mean'])} (one seed{more})"
        return f"{number(row['mean'])} ± {number(row['se'])} (n = {scored}{more})"
    noise = "" if math.isnan(row["doc_se"]) else f", binomial s.e. {number(row['doc_se'])}"
    examples = f", after {row['examples']:.0f} examples" if row["examples"] else ""
    return f"{number(row['mean'])} ({row['n_docs']} documents{noise}{examples})"


def wide(table: Frame) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table as people read it: an arm per row, a task per column."""
    if table.empty:
        return ["arm"], []
    tasks = table[["task", "metric"]].drop_duplicates().itertuples(index=False, name=None)
    columns = [(task, metric, titled(task, metric)) for task, metric in tasks]
    better = table.groupby("task")["higher_is_better"].first()
    arrows = {t: {True: " ↑", False: " ↓"}.get(up, "") for t, up in better.items()}
    cells = {(r.arm, r.task, r.metric): r.shown for r in table.itertuples()}
    body = [
        [arm, *(cells.get((arm, task, metric), "") for task, metric, _ in columns)]
        for arm in table["arm"].drop_duplicates()
    ]
    return ["arm", *(title + arrows.get(task, "") for task, _, title in columns)], body


def titled(task: str, metric: str) -> str:
    """A column's or a panel's name; says so where adapters were not scored as they were trained."""
    asked = task.removesuffix(REQUANTISED)
    return f"{asked}/{metric}" + (", requantised" if asked != task else "")


def to_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns padded so that it reads as plain text too."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in escaped) for i in range(len(header))]
    lines = [" | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in escaped]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "".join(f"| {line} |\n" for line in lines)
