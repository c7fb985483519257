"""This file is where a report shows how far along an answer the teacher can still help.

A preflight that was asked with `--prefixes` lets the teacher go on from the student's first so many
tokens: how often does it end right there, and how much more often than the student itself?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.results.calibration import Case
from stillhouse.results.layout import Table, interval, signed
from stillhouse.results.plots import COLOURS, Drawn, legend, panels
from stillhouse.results.stats import number
from stillhouse.verdict import Measured

LEAD, TEACHER = "continuation_at_", "teacher_at_"  # of a preflight's numbers, tokens behind
NOTE = (
    "From the student's own answers, cut off behind so many tokens, by the teacher; of answers that"
    " are longer than that, so that problems grow harder down the table. Lead: how much more often"
    " the teacher ends right than the student that wrote the rest itself. 95 % intervals over"
    " prompts."
)


@dataclass(frozen=True)
class Reach:
    """What the teacher makes of the student's first tokens, by how many of them."""

    pair: str
    pair_seed: int | None
    leads: dict[int, Measured]  # share of right answers: the teacher's minus the student's
    teachers: dict[int, Measured]


def reaches(cases: Sequence[Case]) -> list[Reach]:
    """One per pair that was asked with prefixes, in the sweep's order."""
    found: dict[tuple[str, int | None], Reach] = {}
    for case in cases:
        leads, teachers = (
            {
                int(name.removeprefix(part)): value
                for name, value in case.numbers.items()
                if name.startswith(part)
            }
            for part in (LEAD, TEACHER)
        )
        if leads:
            found.setdefault(
                (case.pair, case.pair_seed), Reach(case.pair, case.pair_seed, leads, teachers)
            )
    return list(found.values())


def told(found: Sequence[Reach]) -> str:
    """Where the teacher's lead begins, and where it ends, in a sentence per pair."""
    said: list[str] = []
    for reach in found:
        first, *_ = places = sorted(reach.leads)
        begin = reach.leads[first]
        gone = next((at for at in places if not reach.leads[at].low > 0), None)
        end = (
            f"after {gone} no lead is seen"
            if gone is not None
            else f"after {places[-1]} it leads by {number(reach.leads[places[-1]].value)}"
        )
        said.append(
            f"{reach.pair}: after {first} tokens of the student the teacher ends right"
            f" {number(begin.value)} more often than the student; {end}."
        )
    return " ".join(said)


def table_of(found: Sequence[Reach]) -> Table:
    """A row per pair and number of tokens."""
    header = ["pair", "seed", "tokens", "answers", "teacher right", "95 % interval"]
    rows = [
        [
            reach.pair,
            str(reach.pair_seed),
            str(at),
            str(lead.n),
            number(reach.teachers[at].value),
            f"[{number(reach.teachers[at].low)}, {number(reach.teachers[at].high)}]",
            signed(lead.value),
            interval(lead.low, lead.high),
        ]
        for reach in found
        for at, lead in sorted(reach.leads.items())
    ]
    return [*header, "lead", "95 % interval of it"], rows


def drawn(found: Sequence[Reach]) -> Drawn | None:
    """Both numbers over tokens, a panel per pair; None where nobody asked."""
    if not found:
        return None
    figure, axes = panels(len(found), 2.8, sharey=True)
    for axis, reach in zip(axes, found, strict=True):
        curves = (("teacher ends right", reach.teachers, 2, "o"), ("its lead", reach.leads, 0, "s"))
        for name, values, colour, marker in curves:
            places = sorted(values)
            middle = [values[at].value for at in places]
            ends = [
                [values[at].value - values[at].low for at in places],
                [values[at].high - values[at].value for at in places],
            ]
            axis.errorbar(
                places, middle, yerr=ends, color=COLOURS[colour], marker=marker, markersize=4,
                linewidth=1.2, elinewidth=0.8, label=name,
            )  # fmt: skip
        axis.axhline(0, color="#888888", lw=0.8)
        axis.set_title(reach.pair, loc="left")
        axis.set_xlabel("tokens of the student's answer")
        axis.set_ylabel("share of answers")
    legend(figure, axes)
    return figure, "prefixes", "How far along does the teacher help?", NOTE
