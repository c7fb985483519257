"""This file is where a report's evidence is put in order: per question a text, its tables, a note.

The page and the Markdown show the same sections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stillhouse.results import budget, collapse, overlaps, predictions, prefixes, requantised
from stillhouse.results.answer import Answer, untrained_name
from stillhouse.results.comparisons import Comparison
from stillhouse.results.layout import Table, comparison_tables

LONG = 8  # rows above which a table that is not the answer is folded away
MANY = 8  # tables of one kind above which they are folded
PAIRED = (
    "Paired by seed: each difference is between runs of one seed, and its 95 % interval is"
    " Student's t over seeds, on these documents. “Other documents too” adds the noise of a finite"
    " test set (two-way random effects). p is adjusted for the number of comparisons in its table"
    " (Holm); “within noise” means p ≥ 0.05. “Detectable” is the true difference that these seeds"
    " would have found 4 times in 5, at the strictest step of that adjustment."
    " “Gap recovered” is the difference as a share of the teacher's lead over the untrained"
    " student, given where that is at least 10 points (arXiv:2604.13016)."
)
COLLAPSED = (
    "“Collapsed”: the final score lies below that of the untrained student, p adjusted over all"
    " arms. “Fell during training”: held-out accuracy, measured on the way, ended below the arm's"
    " own best, paired by seed; the best step is chosen after looking, so p is adjusted over every"
    " measurement of every arm. Highest and lowest are of the mean over seeds; ± is one standard"
    " error over seeds."
)
BUDGET = (
    "Compute is counted in tokens processed: written by student or teacher, and read in training"
    " steps (prompts and completions). A seed's budget is what its cheapest run needed, and each"
    " arm stands at its last measurement within it: up to one measurement short, never over. A"
    " written token costs more than one that is read, and an anchor's second forward pass is no"
    " token: time, per run on the machines it had, counts both. Held-out accuracy is measured"
    " during training, on other problems than the score above."
)
OVERLAP = (
    "Measured on the student's own rollouts, on the tokens that the loss counts (arXiv:2604.13016,"
    " Eq. 6 to 10). First and last are of the first and last steps that were looked at; the change"
    " is by seed, ± one standard error, with a 95 % t interval. In a vocabulary of a few hundred"
    " tokens the sixteen likeliest hold many that neither side would write: there the masses say"
    " little, and the ratio less than among 150,000."
)
REQUANTISED = (
    "The same adapters, scored as another function than they were trained as: Q(W + BA) instead of"
    " Q(W) + BA. The difference is the size of that mistake. “All arms” averages the arms of each"
    " seed; the arms below it are one family."
)


@dataclass(frozen=True)
class Exhibit:
    """A table with its heading."""

    heading: str
    table: Table
    is_folded: bool


@dataclass(frozen=True)
class Section:
    """One question's evidence."""

    title: str
    text: str
    exhibits: list[Exhibit]
    note: str


def sections(
    found: Answer,
    standings: Sequence[collapse.Standing],
    equal: budget.EqualCompute,
    rescored: Mapping[str, list[Comparison]],
    overlap: Sequence[overlaps.ArmOverlap],
    asked: predictions.Predictions,
) -> list[Section]:
    """The sections that have something to show, in the order in which they are read."""
    compared = [
        *_against(found.main, is_main=True),
        *_against(found.settings, where=", within each setting of the other axes", fold=0),
        *_against(found.untrained, gaps=found.gaps),
    ]
    at_budget = [
        *_against(equal.comparisons, is_main=True),
        *_against(equal.settings, where=", within each setting of the other axes", fold=0),
    ]
    if equal.spent:
        at_budget.append(Exhibit("What a run takes", budget.table_of(equal.spent), False))
    became = [Exhibit("", collapse.table_of(standings), False)] if standings else []
    long = len(overlap) > LONG // 2
    alike = [Exhibit("", overlaps.table_of(overlap), long)] if overlap else []
    again = [
        Exhibit(f"{name}, against the same adapters as trained", rows, False)
        for name, family in rescored.items()
        for _, rows in comparison_tables(family)
    ]
    predicted = [
        Exhibit(f"Runs {name}", predictions.table_of_areas(part), False)
        for name, part in asked.parts().items()
        if predictions.is_rankable(part)
    ]
    if asked.cases:
        predicted.append(Exhibit("Run by run", predictions.table_of_cases(asked), False))
    reached = prefixes.reaches(asked.cases)
    along = [Exhibit("", prefixes.table_of(reached), False)] if reached else []
    made = [
        Section(
            "Did the preflights predict?", predictions.told(asked), predicted, predictions.NOTE
        ),
        Section(f"Comparisons on {found.task}/{found.metric}", "", compared, PAIRED),
        Section("What became of each arm", "", became, COLLAPSED),
        Section("How student and teacher overlap", overlaps.told(overlap), alike, OVERLAP),
        Section(
            "How far along does the teacher help?", prefixes.told(reached), along, prefixes.NOTE
        ),
        Section("At equal compute", budget.told(equal), at_budget, BUDGET),
        Section(
            "Merged into the unquantised base, quantised again",
            requantised.told(rescored),
            again,
            REQUANTISED,
        ),
    ]
    return [section for section in made if section.exhibits]


def _against(
    family: Sequence[Comparison],
    where: str = "",
    fold: int = LONG,
    is_main: bool = False,
    gaps: Mapping[str, float] | None = None,
) -> list[Exhibit]:
    tables = comparison_tables(family, gaps)
    many = len(tables) > MANY
    return [
        Exhibit(
            f"Against {untrained_name(reference)}{where}",
            rows,
            not is_main and (many or len(rows[1]) > fold),
        )
        for reference, rows in tables
    ]
