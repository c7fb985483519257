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
MAX_PANELS = 6
NOTE = (
    "The student's own answers are cut off behind so many tokens, and both models go on from there"
    " with their likeliest tokens. Lead: the share that the teacher ends right minus the"
    " share that the student does. Only answers that are longer count, so problems grow harder with"
    " the number of tokens. 95 % intervals over prompts."
)


@dataclass(frozen=True)
class Reach:
    """What the teacher makes of the student's first tokens, by how many of them."""

    name: str
    leads: dict[int, Measured]  # share of right answers: the teacher's minus the student's
    teachers: dict[int, Measured]


def reaches(cases: Sequence[Case]) -> list[Reach]:
    """One per verdict that was asked with prefixes, in the sweep's order."""
    found: list[Reach] = []
    for case in cases:
        leads, teachers = (
            {
                int(name.removeprefix(part)): value
                for name, value in case.numbers.items()
                if name.startswith(part)
            }
            for part in (LEAD, TEACHER)
        )
        known = [(reach.leads, reach.teachers) for reach in found]
        if leads and (leads, teachers) not in known:  # a verdict is of all training seeds
            name = f"{case.pair}, seed {case.pair_seed}, point {case.point[:6]}"
            found.append(Reach(name, leads, teachers))
    return found


def told(found: Sequence[Reach]) -> str:
    """Where the teacher's lead begins, and how far it is seen, in a sentence per verdict."""
    said: list[str] = []
    for reach in found:
        places = sorted(reach.leads)
        seen = [at for at in places if reach.leads[at].low > 0]
        most = max(places, key=lambda at: reach.leads[at].value)
        said.append(
            f"{reach.name}: the teacher leads most after {most} tokens of the student"
            f" ({signed(reach.leads[most].value)}), and"
            + (f" last after {seen[-1]}" if seen else " nowhere for sure")
            + f" (of {', '.join(map(str, places))})."
        )
    return " ".join(said)


def table_of(found: Sequence[Reach]) -> Table:
    """A row per verdict and number of tokens."""
    header = ["pair", "tokens", "answers", "teacher right", "95 % interval"]
    rows = [
        [
            reach.name,
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
    """Both numbers over tokens, a panel per verdict; None where nobody asked."""
    if not found:
        return None
    shown = found[:MAX_PANELS]
    figure, axes = panels(len(shown), 2.8, sharey=True)
    for axis, reach in zip(axes, shown, strict=True):
        curves = (("teacher ends right", reach.teachers, 2, "o"), ("its lead", reach.leads, 0, "s"))
        for name, values, colour, marker in curves:
            places = sorted(values)
            middle = [values[at].value for at in places]
            ends = [  # of very few answers, all of them right, the interval is below the value
                [max(0.0, values[at].value - values[at].low) for at in places],
                [max(0.0, values[at].high - values[at].value) for at in places],
            ]
            axis.errorbar(
                places, middle, yerr=ends, color=COLOURS[colour], marker=marker, markersize=4,
                linewidth=1.2, elinewidth=0.8, label=name,
            )  # fmt: skip
        axis.axhline(0, color="#888888", lw=0.8)
        axis.set_title(reach.name, loc="left")
        axis.set_xlabel("tokens of the student's answer")
        axis.set_ylabel("share of answers")
    legend(figure, axes)
    more = f" The first {MAX_PANELS} of {len(found)}." if len(found) > MAX_PANELS else ""
    return figure, "prefixes", "How far along the teacher helps", NOTE + more
