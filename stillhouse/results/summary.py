"""Summarize a frame: the table of arms, and notes on what is missing or not comparable."""

from __future__ import annotations

import math
from collections import Counter

from stillhouse.results.format import Table
from stillhouse.results.provenance import Frame, mixture, mixtures
from stillhouse.results.stats import estimate, number
from stillhouse.results.table import is_set, is_unscored, points_of
from stillhouse.rundir import Json
from stillhouse.spec import REQUANTISED

WARNED = 6  # arms that a note about a watch rule names
KINDS = ("teacher", "student", "ptq", "point")  # in the order in which a table shows them


def notes(frame: Frame) -> list[str]:
    """What to know before comparing rows: what is missing, and what was not made alike."""
    points = points_of(frame)
    late = set(frame[(frame["kind"] == "point") & is_unscored(frame)]["id"])
    texts: list[str] = []
    if late:
        counts = Counter(map(_phase, points[points["id"].isin(late)].to_dict("records")))
        states = ", ".join(f"{n} {phase}" for phase, n in counts.most_common())
        texts.append(f"{len(late)} of {len(points)} points are not fully scored: {states}.")
    bare = frame[(frame["kind"] != "point") & is_unscored(frame)]
    if len(bare):
        names = ", ".join(bare["arm"].drop_duplicates())
        texts.append(f"Baselines that are not fully scored: {names}.")
    odd = [*points[points["phase"] == "unreadable"]["cause"], *frame.attrs.get("odd", [])]
    texts += [f"Left out because it cannot be read: {why}." for why in dict.fromkeys(odd)]
    texts += _warnings(points)
    texts += _step_counts(frame)
    compare: Json = frame.attrs["sweep"]["compare"] or {}
    by = compare.get("by")
    for field in [field for field, other in frame.attrs["follows"].items() if other == by]:
        texts.append(
            f"{field} follows from {by}, so a difference between values of {by} is of both."
        )
    otherwise = int(frame["scored_otherwise"].eq(True).sum())
    if otherwise:
        texts.append(
            f"{otherwise} scores were made with other settings than this sweep's suite and are left"
            " out; `stillhouse run` scores them again."
        )
    texts += mixtures(frame)
    texts += mixture("code", points["code_digest"])
    if points["code_dirty"].eq(True).any():
        texts.append("Some points were trained by code with uncommitted changes (code_dirty).")
    for column in [c for c in frame if c.startswith("version_")]:
        texts += mixture(f"{column.removeprefix('version_')} in training", points[column])
    for column in [c for c in frame if c.startswith("eval_version_")]:
        what = f"{column.removeprefix('eval_version_')} in scoring"
        texts += [m for _, part in frame.groupby("task") for m in mixture(what, part[column])]
    return list(dict.fromkeys(texts))


def _phase(point: Json) -> str:
    """How far a point got that is not fully scored."""
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
    texts: list[str] = []
    for rule, arms in rules.items():
        counts = Counter(arms).most_common()
        named = [f"{n} of {arm}" for arm, n in counts[:WARNED]]
        named += [f"and {len(counts) - WARNED} more arms"] if counts[WARNED:] else []
        where = f"{len(arms)} of {len(points)} runs"
        texts.append(f"Watch rule {rule} warned in {where}: {', '.join(named)}.")
    return texts


def _step_counts(frame: Frame) -> list[str]:
    """Which arms train longer than most, unless the sweep varies just that."""
    steps = points_of(frame).dropna(subset=["max_steps"]).drop_duplicates("arm")
    counts = steps["max_steps"].value_counts()
    if len(counts) < 2 or "max_steps" in frame.attrs["fields"]:
        return []
    other = steps[steps["max_steps"] != counts.index[0]]
    listed = ", ".join(f"{row.max_steps} in {row.arm}" for row in other.itertuples())
    return [f"Steps differ: {counts.index[0]} in most arms, {listed}."]


def summary(frame: Frame) -> Frame:
    """One row per (arm, task): mean, se, n, low, high over seeds; baselines first, with doc_se.

    se, low, and high (95 % t interval) are over seeds and NaN for one seed. A baseline has no seed:
    its n is missing, and doc_se is the binomial error over documents instead.
    `missing` counts points without a score, `stopped` says which watch rules ended some of them,
    `shown` is the cell as text.
    """
    import pandas as pd

    rows: list[Json] = []
    for kind in KINDS:
        part = frame[(frame["kind"] == kind) & frame["task"].notna()]
        for _, group in part.groupby(["arm", "task", "metric"], sort=False, dropna=False):
            first, scored = group.iloc[0], group.dropna(subset="value")
            e = estimate(scored["value"].tolist())
            row: Json = {"kind": kind, "arm": first["arm"]}
            row |= {field: first.get(field) for field in frame.attrs["fields"]}
            row |= {"task": first["task"], "metric": first["metric"]}
            row |= {"mean": e.mean, "se": e.se, "n": e.n if kind == "point" else None}
            row |= {"low": e.low, "high": e.high, "missing": len(group) - e.n}
            for column in ("n_docs", "doc_se", "higher_is_better", "examples"):
                row[column] = scored.iloc[0][column] if e.n else None
            rules = group["stopped_by"].dropna().value_counts(sort=False).items()
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


def wide(table: Frame) -> Table:
    """The summary as people read it: an arm per row, a task per column."""
    if table.empty:
        return ["arm"], []
    tasks: list[tuple[str, str]] = list(
        table[["task", "metric"]].drop_duplicates().itertuples(index=False, name=None)
    )
    better = table.groupby("task")["higher_is_better"].first()
    arrows = {t: {True: " ↑", False: " ↓"}.get(up, "") for t, up in better.items()}
    cells = {(r.arm, r.task, r.metric): r.shown for r in table.itertuples()}
    body = [
        [arm, *(cells.get((arm, task, metric), "") for task, metric in tasks)]
        for arm in table["arm"].drop_duplicates()
    ]
    return ["arm", *(titled(task, metric) + arrows.get(task, "") for task, metric in tasks)], body


def titled(task: str, metric: str) -> str:
    """The title of a column or a panel, which says if adapters were requantized for it."""
    base = task.removesuffix(REQUANTISED)
    return f"{base}/{metric}" + (", requantized" if base != task else "")
