"""This file is where arms are compared at equal compute instead of at the end of their training.

Compute is counted in tokens processed: those that the student or the teacher wrote, one after the
other, and those that both read in a training step (prompt and completion). The count is exact and
the same on every machine. It is no count of work: a token written costs more than one read, and
nothing else (an anchor's second forward pass, measuring) is in it. Seconds, which have all that
and the machine's moods too, stand beside.

A seed's budget is what its cheapest run needed in all, within one setting of the sweep. Each arm
is then taken as it last measured its held-out accuracy at or below that budget: nothing is
interpolated, so a dearer arm may stand up to one measurement short of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.results.answer import told as comparisons_told
from stillhouse.results.comparisons import Comparison, along, design, other_axes, setting_of
from stillhouse.results.curves import ACCURACY, Run
from stillhouse.results.layout import Table, duration, spread
from stillhouse.results.stats import Estimate, estimate
from stillhouse.results.table import Frame

WRITTEN = {"rollout": "tokens the student wrote", "teacher": "the teacher wrote"}
READ = {"prompt": "of prompts read", "completion": "of completions read"}


@dataclass(frozen=True)
class Spending:
    """What one run of an arm takes on average, and how far the cheapest arm's budget carries it."""

    arm: str
    setting: str
    tokens: Mapping[str, float]  # by kind, per run
    seconds: float  # of training, per run
    steps: float  # done where the arm was last measured within the budget
    paid: float  # tokens processed there
    accuracy: Estimate  # there, over seeds
    last: Estimate  # at the end of training

    @property
    def processed(self) -> float:
        """Tokens in all, per run."""
        return sum(self.tokens.values())


@dataclass(frozen=True)
class Reached:
    """One run's last measurement within its budget."""

    steps: int  # done by then
    paid: float  # tokens processed by then
    accuracy: float


@dataclass(frozen=True)
class EqualCompute:
    """The arms within the budget of the cheapest, and their comparisons there."""

    spent: list[Spending]
    comparisons: list[Comparison]
    settings: list[Comparison]


def equal_compute(frame: Frame, runs: Sequence[Run]) -> EqualCompute:
    """Arms at equal compute; empty where no trained run measured held-out accuracy.

    Raises:
        ConfigError: the sweep compares by something that none of its points sets.
    """
    made = design(frame)
    axes = made.others if made else other_axes(frame)
    ended = [r for r in runs if r.point["trained"] and ACCURACY in r.metrics]
    places = [(setting_of(run.point, axes), run.point["seed"]) for run in ended]
    budgets: dict[tuple[str, Any], float] = {}
    for run, place in zip(ended, places, strict=True):
        total = float(processed(run).iloc[-1])
        budgets[place] = min(total, budgets.get(place, total))
    there = [_within(run, budgets[place]) for run, place in zip(ended, places, strict=True)]
    spent: list[Spending] = []
    for arm in dict.fromkeys(run.point["arm"] for run in ended):
        mine = [i for i, run in enumerate(ended) if run.point["arm"] == arm]
        spent.append(_spending([ended[i] for i in mine], [there[i] for i in mine], axes))
    if made is None:
        return EqualCompute(spent, [], [])
    rows = [
        {**run.point, "value": at.accuracy, "file": None}
        for run, at in zip(ended, there, strict=True)
        if at is not None
    ]
    return EqualCompute(spent, *along(rows, made, True, {}))


def processed(run: Run) -> Any:
    """Tokens that a run had written and read in all, by steps done: a pandas series."""
    kinds = [f"tokens/{kind}" for kind in (*WRITTEN, *READ)]
    return run.metrics.reindex(columns=kinds).fillna(0.0).sum(axis=1).cumsum()


def _within(run: Run, budget: float) -> Reached | None:
    """What was last measured within a budget; None: not even once."""
    measured, paid = run.metrics[ACCURACY].dropna(), processed(run)
    within = measured[paid[measured.index] <= budget]
    if within.empty:
        return None
    steps = int(within.index[-1])
    return Reached(steps, float(paid[steps]), float(within.iloc[-1]))


def _spending(runs: Sequence[Run], reached: Sequence[Reached | None], axes: list[str]) -> Spending:
    point, there = runs[0].point, [at for at in reached if at is not None]
    sums = [run.metrics.reindex(columns=[f"tokens/{k}" for k in (*WRITTEN, *READ)]) for run in runs]
    tokens = {
        kind: sum(float(table[f"tokens/{kind}"].sum()) for table in sums) / len(runs)
        for kind in (*WRITTEN, *READ)
    }
    return Spending(
        arm=point["arm"],
        setting=setting_of(point, axes),
        tokens=tokens,
        seconds=estimate([run.point["train_seconds"] for run in runs]).mean,
        steps=estimate([float(at.steps) for at in there]).mean,
        paid=estimate([at.paid for at in there]).mean,
        accuracy=estimate([at.accuracy for at in there]),
        last=estimate([float(run.metrics[ACCURACY].dropna().iloc[-1]) for run in runs]),
    )


def told(found: EqualCompute) -> str:
    """What equal compute changes, in a sentence; "" where nothing can be compared there."""
    if not found.comparisons:
        return ""
    cheap = min(found.spent, key=lambda s: s.processed)
    dear = max(found.spent, key=lambda s: s.processed)
    return (
        f"At equal compute (held-out accuracy within the tokens of the cheapest arm; a run takes"
        f" {cheap.processed:,.0f} of them for {cheap.arm} and up to {dear.processed:,.0f} for"
        f" {dear.arm}), {comparisons_told(found.comparisons)}"
    )


def table_of(spent: Sequence[Spending]) -> Table:
    """What a run of each arm takes, and how far the budget carries it; ± is over seeds."""
    header = ["arm", *WRITTEN.values(), *READ.values()]
    header += ["in all", "time", "within the budget", "after step"]
    header += ["accuracy there", "at the end"]
    rows = [
        [
            s.arm,
            *(f"{s.tokens[kind]:,.0f}" for kind in (*WRITTEN, *READ)),
            f"{s.processed:,.0f}",
            duration(s.seconds) if s.seconds == s.seconds else "not known",
            f"{s.paid:,.0f}" if s.accuracy.n else "no measurement",
            f"{s.steps:.0f}" if s.accuracy.n else "–",
            spread(s.accuracy) if s.accuracy.n else "–",
            spread(s.last),
        ]
        for s in spent
    ]
    return header, rows


def record(s: Spending) -> dict[str, Any]:
    """What an arm spends, as a row of a CSV file."""
    row: dict[str, Any] = {f"tokens_{kind}_per_run": n for kind, n in s.tokens.items()}
    row |= {"tokens_processed_per_run": s.processed, "seconds_per_run": s.seconds}
    row |= {"tokens_in_budget": s.paid, "steps_in_budget": s.steps}
    row |= {"accuracy_in_budget": s.accuracy.mean}
    return row | {"accuracy_in_budget_se": s.accuracy.se, "accuracy_at_end": s.last.mean}
