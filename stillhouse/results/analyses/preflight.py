"""Compare preflight verdicts with the outcomes of the runs they predict.

One case per trained point whose pair was preflighted and that learned from rollouts alone. Its
outcome is the change in accuracy on the documents of the suite, against its own untrained student,
with a 95 % interval over documents; it is a success if the lower end is above LEAST_GAIN. The
verdict is that of the current rules.

A preflight with `--prefixes` also shows how far along an answer the teacher can help: it continues
from the student's first so many tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from stillhouse import preflight_rules
from stillhouse.compose import data_file
from stillhouse.errors import ContractError
from stillhouse.preflight_rules import Measured, Rules
from stillhouse.results import plots
from stillhouse.results.answer import LEAST_GAP
from stillhouse.results.format import Table, first_of, interval, signed
from stillhouse.results.plots import Drawn
from stillhouse.results.provenance import Frame
from stillhouse.results.section import Evidence, Exhibit, Section
from stillhouse.results.stats import NAN, number
from stillhouse.results.table import correct_by_document, points_of
from stillhouse.rundir import Json, RunDir, Runs, read_json
from stillhouse.sources import differences

LEAST_GAIN = 0.1  # of accuracy: a smaller one is not worth a distillation
NORMAL = 1.96  # 95 % of a normal variable lie within so many standard deviations
LOOK = {"likely": ("o", 2), "unsure": ("s", 4), "unlikely": ("X", 1)}  # marker, color
LEAD, TEACHER = "continuation_at_", "teacher_at_"  # prefixes of a preflight's numbers
PREFIXES = "Teacher continuations from student prefixes"
NOTE = (
    f"A success is a gain whose 95 % interval over documents lies above {LEAST_GAIN:.0%}."
    " Continuations: the student's own answers are cut after so many tokens, and both models"
    " continue from there with their likeliest tokens. Lead: the share that the teacher ends right"
    " minus the share that the student does. Only longer answers count, so problems grow harder"
    " with the number of tokens."
)


@dataclass(frozen=True)
class Case:
    """A pair under a loss, its preflight, and its outcome."""

    point: str  # id
    pair: str
    pair_seed: int | None
    beta: float
    max_steps: int
    before: float  # accuracy of the untrained student
    after: float
    teacher: float
    change: Measured
    numbers: dict[str, Measured]  # of the preflight
    verdict: str
    rule: str
    is_fitted: bool  # whether the thresholds of the rules were set on this pair

    @property
    def is_success(self) -> bool:
        """Whether the student gained LEAST_GAIN, with its uncertainty."""
        return self.change.low > LEAST_GAIN

    @property
    def recovered(self) -> float:
        """The recovered share of the gap to the teacher; NaN if the gap is tiny.

        Never read it alone: it is above 1 if a student outdoes its teacher, and looks good if a
        student falls to a teacher that is worse.
        """
        gap = self.teacher - self.before
        return self.change.value / gap if gap >= LEAST_GAP else NAN

    @property
    def name(self) -> str:
        """The pair, marked if the thresholds were set on it."""
        return self.pair + (" (fitted)" if self.is_fitted else "")


@dataclass(frozen=True)
class Reach:
    """What the teacher makes of the student's first tokens, by their number."""

    name: str
    leads: dict[int, Measured]  # share of right answers: the teacher's minus the student's
    teachers: dict[int, Measured]


def analyze(evidence: Evidence) -> Section:
    """The cases of a sweep, and their prefixes; no exhibit if no pair was preflighted."""
    rules = preflight_rules.rules_of(data_file("preflight"), "conf/preflight.yaml")
    found = cases(evidence.frame, evidence.runs, rules)
    reached = reaches(found)
    return Section(
        title="Preflight verdicts and outcomes",
        text=" ".join(filter(None, (summary_text(found), reach_text(reached)))),
        exhibits=[
            *([Exhibit("Run by run", as_table(found))] if found else []),
            *([Exhibit(PREFIXES, reach_table(reached))] if reached else []),
        ],
        note=NOTE,
        answer=summary_text(found),
        notes=excluded(evidence.frame, evidence.runs),
        figures=[partial(outcomes, found), partial(continuations, reached)],
        files={"predictions.csv": as_records(found)},
    )


def cases(frame: Frame, runs: Runs, rules: Rules) -> list[Case]:
    """The trained and scored points of a sweep whose pairs were preflighted, in the sweep's order.

    Empty if there is no preflight, or if answers are not right or wrong.
    """
    found: list[Case] = []
    scored = frame[frame["file"].notna()]
    baselines = {
        kind: scored[scored["kind"] == kind].drop_duplicates("pair_key").set_index("pair_key")
        for kind in ("student", "teacher")
    }
    for row in points_of(scored).to_dict("records"):
        if any(row["pair_key"] not in part.index for part in baselines.values()):
            continue
        student, teacher = (part.loc[row["pair_key"]] for part in baselines.values())
        try:
            record, preflight = _preflight(row, runs)
        except ContractError:  # `excluded` names it
            continue
        if preflight is None or _is_of_others(preflight, record) or not _is_plain(record["spec"]):
            continue
        spec, numbers = record["spec"], preflight_rules.numbers_of(preflight)
        beta, max_steps = spec["loss"]["beta"], spec["training"]["max_steps"]
        decided = preflight_rules.decide(
            rules, numbers | preflight_rules.asked_numbers(beta, max_steps)
        )
        found.append(
            Case(
                point=row["id"],
                pair=row["pair_name"],
                pair_seed=spec["pair"]["pair_seed"],
                beta=beta,
                max_steps=max_steps,
                before=float(student["value"]),
                after=float(row["value"]),
                teacher=float(teacher["value"]),
                change=_change(row["file"], student["file"]),
                numbers=numbers,
                verdict=decided["verdict"],
                rule=decided["rule"],
                is_fitted=row["pair_name"] in rules.fitted_on,
            )
        )
    return found


def excluded(frame: Frame, runs: Runs) -> list[str]:
    """Which preflights are unreadable, and how many measured other weights or rows than runs."""
    points = points_of(frame).dropna(subset=["pair_name"]).to_dict("records")
    count, unreadable = 0, dict[str, None]()
    for row in points:
        try:
            record, told = _preflight(row, runs)
            count += told is not None and _is_of_others(told, record)
        except ContractError as error:
            unreadable[str(error)] = None
    if not count:
        return [*unreadable]
    return [
        *unreadable,
        f"The preflights of {count} runs measured other weights or rows than these were trained on"
        " and are left out.",
    ]


def _preflight(row: Json, runs: Runs) -> tuple[Json, Json | None]:
    """A point's record, and the preflight of its pair if there is one.

    Raises:
        ContractError: it is there, and is not what a preflight writes.
    """
    record = RunDir(runs.root / row["directory"]).record()
    if record is None:
        return {}, None
    key = preflight_rules.key_of_plain(record["spec"])
    return record, runs.verdict(row["pair_name"], key)


def _is_of_others(preflight: Json, record: Json) -> bool:
    """Whether a preflight measured other weights or rows than a run depends on."""
    return bool(differences(preflight.get("sources") or {}, record.get("sources") or {}))


def _is_plain(spec: Json) -> bool:
    """Whether a verdict applies to a point: rollouts alone, and no rescue."""
    rescue, method = spec.get("rescue", {}), spec["method"]
    is_rescued = (
        rescue.get("cold_start", 0) > 0
        or rescue.get("kept_prompts", 1) != 1
        or rescue.get("other_prompts", 0) > 0
    )
    return method["lmbda"] == 1 and method["seed_tokens"] == 0 and not is_rescued


def _change(after: str, before: str) -> Measured:
    """How much more often the trained student is right on the same documents."""
    new, old = (
        correct_by_document(read_json(Path(file)) or {"samples": []}) or {}
        for file in (after, before)
    )
    difference_D = np.array([new[d] - old[d] for d in sorted(new.keys() & old.keys())])
    n, mean = len(difference_D), float(difference_D.mean())
    half = NORMAL * float(difference_D.std(ddof=1)) / math.sqrt(n)
    return Measured(mean, mean - half, mean + half, n)


def parts(found: Sequence[Case]) -> dict[str, list[Case]]:
    """Predicted cases, and those whose outcomes the thresholds were set on; empty ones left out."""
    named = {
        "that were predicted": [c for c in found if not c.is_fitted],
        "that set the thresholds": [c for c in found if c.is_fitted],
    }
    return {name: part for name, part in named.items() if part}


def summary_text(found: Sequence[Case]) -> str:
    """The successes among each verdict, in a sentence per part."""
    sentences: list[str] = []
    for name, part in parts(found).items():
        by_verdict = {v: [c.is_success for c in part if c.verdict == v] for v in LOOK}
        counts = [
            f"of {len(outcomes)} {v}, {sum(outcomes)} succeeded"
            for v, outcomes in by_verdict.items()
            if outcomes
        ]
        runs = f"{len(part)} run{'s' * (len(part) > 1)}"
        sentences.append(f"{runs} {name}: {'; '.join(counts)}.")
    return " ".join(sentences)


def as_table(found: Sequence[Case]) -> Table:
    """A row per run."""
    header = ["pair", "seed", "β", "verdict", "rule", "student", "teacher", "change"]
    header += ["95 % interval", "success", "gap recovered", "point"]
    rows = [
        [
            c.name, str(c.pair_seed), f"{c.beta:g}", c.verdict, c.rule,
            number(c.before), number(c.teacher), signed(c.change.value),
            interval(c.change.low, c.change.high), "yes" if c.is_success else "no",
            "–" if math.isnan(c.recovered) else f"{c.recovered:.0%}", c.point[:6],
        ]
        for c in found
    ]  # fmt: skip
    return header, rows


def as_records(found: Iterable[Case]) -> list[Json]:
    """The cases as rows of a CSV file."""
    found = [*found]
    known = ("point", "pair", "pair_seed", "beta", "max_steps", "before", "after", "teacher")
    names = list(dict.fromkeys(name for case in found for name in case.numbers))
    missing, rows = Measured(NAN, NAN, NAN, 0), list[Json]()
    for c in found:
        row: Json = {name: getattr(c, name) for name in known}
        row |= {"change": c.change.value, "change_low": c.change.low, "change_high": c.change.high}
        row |= {"documents": c.change.n, "success": c.is_success, "gap_recovered": c.recovered}
        row |= {"verdict": c.verdict, "rule": c.rule}
        for name in names:
            m = c.numbers.get(name, missing)
            row |= {name: m.value, f"{name}_low": m.low, f"{name}_high": m.high}
        rows.append(row)
    return rows


def outcomes(found: Sequence[Case]) -> Drawn | None:
    """Each run's change with its interval, marked by its verdict; a panel per β."""
    if not found:
        return None
    betas = sorted({c.beta for c in found}, reverse=True)
    pairs = list(dict.fromkeys(c.name for c in found))
    figure, axes = plots.panels(len(betas), 0.9 + 0.26 * len(pairs), sharey=True)
    for axis, beta in zip(axes, betas, strict=True):
        for place, pair in enumerate(pairs):
            mine = [c for c in found if c.name == pair and c.beta == beta]
            for index, c in enumerate(mine):
                at = place + 0.5 * ((index + 0.5) / len(mine) - 0.5)
                marker, color = LOOK[c.verdict][0], plots.COLORS[LOOK[c.verdict][1]]
                axis.plot([c.change.low, c.change.high], [at, at], color=color, lw=1)
                look = {"color": color, "markersize": 5, "linestyle": "none"}
                axis.plot(c.change.value, at, marker, **look, label=c.verdict)
        axis.axvline(0, color="#888888", lw=0.8)
        axis.axvline(LEAST_GAIN, color="#888888", lw=0.8, ls=":")
        axis.set_title(f"β = {beta:g}", loc="left")
        axis.set_xlabel("change in accuracy")
        plots.categories(axis, pairs)
    plots.legend(figure, axes)
    caption = (
        "Change of each run against its untrained student, with 95 % intervals over documents."
        f" Dotted: {LEAST_GAIN:.0%}, which a success exceeds. Marks: the preflight's verdict."
    )
    return figure, "predictions", "Preflight verdicts and outcomes", caption


def reaches(found: Sequence[Case]) -> list[Reach]:
    """One per preflight with prefixes, in the sweep's order."""
    made: list[Reach] = []
    for case in found:
        leads, teachers = (
            {int(name.removeprefix(p)): m for name, m in case.numbers.items() if name.startswith(p)}
            for p in (LEAD, TEACHER)
        )
        # One preflight is of all training seeds.
        if leads and (leads, teachers) not in [(reach.leads, reach.teachers) for reach in made]:
            name = f"{case.pair}, seed {case.pair_seed}, point {case.point[:6]}"
            made.append(Reach(name, leads, teachers))
    return made


def reach_text(found: Sequence[Reach]) -> str:
    """Where the teacher's lead is largest, and how far it is detected, in a sentence each."""
    sentences: list[str] = []
    for reach in found:
        places = sorted(reach.leads)
        detected = [at for at in places if reach.leads[at].low > 0]
        best = max(places, key=lambda at: reach.leads[at].value)
        last = f"is last detected after {detected[-1]}" if detected else "is detected nowhere"
        sentences.append(
            f"{reach.name}: the teacher's lead is largest after {best} tokens of the student"
            f" ({signed(reach.leads[best].value)}) and {last} (of {', '.join(map(str, places))})."
        )
    return " ".join(sentences)


def reach_table(found: Sequence[Reach]) -> Table:
    """A row per preflight and number of tokens."""
    header = ["pair", "tokens", "answers", "teacher right", "95 % interval", "lead"]
    rows = [
        [
            reach.name, str(at), str(lead.n), number(teacher.value),
            f"[{number(teacher.low)}, {number(teacher.high)}]",
            signed(lead.value), interval(lead.low, lead.high),
        ]
        for reach in found
        for at, lead in sorted(reach.leads.items())
        for teacher in [reach.teachers[at]]
    ]  # fmt: skip
    return [*header, "95 % interval of the lead"], rows


def continuations(found: Sequence[Reach]) -> Drawn | None:
    """Both numbers over tokens, a panel per preflight; None if there is none."""
    if not found:
        return None
    shown = found[: plots.MAX_PANELS]
    figure, axes = plots.panels(len(shown), 2.8, sharey=True)
    for axis, reach in zip(axes, shown, strict=True):
        curves = (("teacher ends right", reach.teachers, 2, "o"), ("its lead", reach.leads, 0, "s"))
        for name, by_place, color, marker in curves:
            places = sorted(by_place)
            values = [by_place[at] for at in places]
            ends = [  # of very few answers, all of them right, the interval is below the value
                [max(0.0, m.value - m.low) for m in values],
                [max(0.0, m.high - m.value) for m in values],
            ]
            axis.errorbar(
                places, [m.value for m in values], yerr=ends, color=plots.COLORS[color],
                marker=marker, markersize=4, linewidth=1.2, elinewidth=0.8, label=name,
            )  # fmt: skip
        axis.axhline(0, color="#888888", lw=0.8)
        axis.set_title(reach.name, loc="left")
        axis.set_xlabel("tokens of the student's answer")
        axis.set_ylabel("share of answers")
    plots.legend(figure, axes)
    caption = f"95 % intervals over prompts.{first_of(len(shown), len(found), 'preflights')}"
    return figure, "prefixes", PREFIXES, caption
