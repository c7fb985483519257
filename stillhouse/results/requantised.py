"""This file is where it is measured what scoring another function than the trained one changes.

A task that ends in `@requantised` scores each adapter merged into the unquantised base, which is
then quantised again, `Q(W + BA)`; training made `Q(W) + BA`. Both scores are of one adapter on one
set of documents, so their difference, paired by seed, is the size of that mistake.
"""

from __future__ import annotations

from collections.abc import Mapping

from stillhouse.results.comparisons import Asked, Cell, Comparison, Documents, entry, family
from stillhouse.results.layout import signed
from stillhouse.results.stats import number
from stillhouse.results.summary import titled
from stillhouse.results.table import Frame
from stillhouse.spec import REQUANTISED

TRAINED = "as trained"
ALL = "all arms"


def rescored(frame: Frame) -> dict[str, list[Comparison]]:
    """By "task/metric": requantised against as trained, all arms averaged seed by seed, then each.

    Only of tasks that were scored both ways. The average and the arms are two families.
    """
    points = frame[(frame["kind"] == "point") & frame["value"].notna()]
    found: dict[str, list[Comparison]] = {}
    for (task, metric), part in points.groupby(["task", "metric"], sort=False):
        first = points[
            (points["task"] == task.removesuffix(REQUANTISED)) & (points["metric"] == metric)
        ]
        if not task.endswith(REQUANTISED) or first.empty:
            continue
        higher, documents = bool(part.iloc[0]["higher_is_better"]), Documents()
        again, before = _by_arm(part), _by_arm(first)
        pairs = {arm: (again[arm], before[arm]) for arm in again if arm in before}
        arms: Asked = [(arm, TRAINED, "", [pair]) for arm, pair in pairs.items()]
        pooled: Asked = [(ALL, TRAINED, "", list(pairs.values()))] if len(arms) > 1 else []
        found[titled(task, metric)] = [
            *family(pooled, higher, documents),
            *family(arms, higher, documents),
        ]
    return found


def _by_arm(part: Frame) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for row in part.to_dict("records"):
        cells.setdefault(row["arm"], {})[row["seed"]] = entry(row)
    return cells


def told(found: Mapping[str, list[Comparison]]) -> str:
    """The size of the mistake in a sentence per task."""
    said: list[str] = []
    for name, comparisons in found.items():
        kinds = [c.verdict.kind for c in comparisons if c.arm != ALL]
        counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        arms = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        whole = comparisons[0]
        d = whole.paired.difference
        noise = f" ± {number(d.se)} (n = {d.n})" if d.n > 1 else ""
        said.append(
            f"{name}: {number(whole.arm_mean)} instead of {number(whole.reference_mean)}"
            f" as trained, a difference of {signed(d.mean)}{noise} over {whole.arm}; of"
            f" {len(kinds)} arms {arms}."
        )
    return " ".join(said)
