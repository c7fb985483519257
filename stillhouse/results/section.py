"""Define what an analysis gets and what it returns: one section of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stillhouse.results.answer import Answer, untrained_name
from stillhouse.results.comparisons import Comparison
from stillhouse.results.curves import Run
from stillhouse.results.format import Table, comparison_tables
from stillhouse.results.plots import Figure
from stillhouse.results.provenance import Frame
from stillhouse.rundir import Json, Runs

LONG = 8  # rows above which a table that is not the answer is folded
MANY = 8  # tables of one kind above which they are folded


@dataclass(frozen=True)
class Evidence:
    """What an analysis may read."""

    frame: Frame  # of `table.load`
    runs: Runs
    answer: Answer
    curves: Sequence[Run]  # the metrics of each run


@dataclass(frozen=True)
class Exhibit:
    """A table with its heading."""

    heading: str
    table: Table
    is_folded: bool = False


@dataclass(frozen=True)
class Section:
    """One analysis; the page and table.md leave it out if it has no exhibits."""

    title: str
    text: str
    exhibits: list[Exhibit]
    note: str
    context: str = ""  # a sentence for the top of the page
    answer: str = ""  # the top of the page if the sweep compares nothing
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = ()  # drawn when the page is written
    families: Mapping[str, list[Comparison]] = field(default_factory=dict[str, list[Comparison]])
    arms: Mapping[str, Json] = field(default_factory=dict[str, Json])  # arm -> columns of arms.csv
    files: Mapping[str, list[Json]] = field(default_factory=dict[str, list[Json]])  # name -> rows


def comparison_exhibits(
    family: Sequence[Comparison],
    where: str = "",
    fold: int | None = LONG,
    gaps: Mapping[str, float] | None = None,
) -> list[Exhibit]:
    """A table per reference; folded if longer than `fold` or one of many, never if that is None."""
    tables = comparison_tables(family, gaps)
    many = len(tables) > MANY
    return [
        Exhibit(
            f"Against {untrained_name(reference)}{where}",
            rows,
            fold is not None and (many or len(rows[1]) > fold),
        )
        for reference, rows in tables
    ]


def along_axis(main: Sequence[Comparison], settings: Sequence[Comparison]) -> list[Exhibit]:
    """The tables of `comparisons.compare_by_axis`, those within each setting folded."""
    where = ", within each setting of the other axes"
    return [*comparison_exhibits(main, fold=None), *comparison_exhibits(settings, where, fold=0)]
