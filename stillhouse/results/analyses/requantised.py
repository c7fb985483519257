"""Measure the cost of scoring another function than the one that was trained.

A task that ends in `@requantised` scores each adapter merged into the unquantized base, which is
then quantized again, `Q(W + BA)`; training made `Q(W) + BA`. Both scores are of one adapter on one
set of documents, so their difference, paired by seed, is the size of that mistake.
"""

from __future__ import annotations

from collections.abc import Mapping

from stillhouse.results.comparisons import (
    Cell,
    Comparison,
    Documents,
    Planned,
    cell_entry,
    compare_family,
)  # fmt: skip
from stillhouse.results.format import comparison_tables, signed
from stillhouse.results.provenance import Frame
from stillhouse.results.section import Evidence, Exhibit, Section
from stillhouse.results.stats import number
from stillhouse.results.summary import titled
from stillhouse.spec import REQUANTISED

TRAINED = "as trained"
ALL = "all arms"
NOTE = (
    "The same adapters, scored as another function than they were trained as: Q(W + BA) instead of"
    " Q(W) + BA. The difference is the size of that mistake. “All arms” averages the arms of each"
    " seed; the arms below it are one family."
)


def analyze(evidence: Evidence) -> Section:
    """Each task that was scored both ways."""
    found = rescored(evidence.frame)
    exhibits = [
        Exhibit(f"{name}, against the same adapters as trained", rows)
        for name, family in found.items()
        for _, rows in comparison_tables(family)
    ]
    title = "Merged into the unquantized base and requantized"
    return Section(title, summary_text(found), exhibits, NOTE, families=found)


def rescored(frame: Frame) -> dict[str, list[Comparison]]:
    """By "task/metric": requantized against as trained, all arms averaged seed by seed, then each.

    Only tasks that were scored both ways. The average and the arms are two families.
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
        arms: Planned = [(arm, TRAINED, "", [pair]) for arm, pair in pairs.items()]
        pooled: Planned = [(ALL, TRAINED, "", list(pairs.values()))] if len(arms) > 1 else []
        found[titled(task, metric)] = [
            *compare_family(pooled, higher, documents),
            *compare_family(arms, higher, documents),
        ]
    return found


def _by_arm(part: Frame) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for row in part.to_dict("records"):
        cells.setdefault(row["arm"], {})[row["seed"]] = cell_entry(row)
    return cells


def summary_text(found: Mapping[str, list[Comparison]]) -> str:
    """The size of the mistake, in a sentence per task."""
    sentences: list[str] = []
    for name, comparisons in found.items():
        kinds = [c.verdict.kind for c in comparisons if c.arm != ALL]
        arms = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        whole = comparisons[0]
        d = whole.paired.difference
        error = f" ± {number(d.se)} (n = {d.n})" if d.n > 1 else ""
        sentences.append(
            f"{name}: {number(whole.arm_mean)} instead of {number(whole.reference_mean)}"
            f" as trained, a difference of {signed(d.mean)}{error} over {whole.arm}; of"
            f" {len(kinds)} arms, {arms}."
        )
    return " ".join(sentences)
