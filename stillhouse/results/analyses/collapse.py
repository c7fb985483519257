"""Decide which arms collapsed, or declined during training.

    collapsed  its final score on the compared metric is below the untrained student's, quantized as
               the arm's students are: their comparison says "worse", p adjusted over all arms
    declined   its held-out accuracy ended below its own best: paired by seed, the last measurement
               minus the one at the step where the arm's mean is highest. That step is chosen after
               the fact, so p is adjusted over every earlier measurement of every arm

Both are about means over seeds. An arm in which a few seeds fail may show neither, so seeds that
ended below the untrained student are counted too, and those that diverged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import DIVERGED
from stillhouse.results.answer import Answer, untrained_name
from stillhouse.results.comparisons import Cell, Comparison, Planned, compare_family
from stillhouse.results.curves import ACCURACY, Run
from stillhouse.results.format import (
    Table,
    comparison_record,
    interval,
    mean_and_error,
    probability,
    signed,
)
from stillhouse.results.provenance import Frame
from stillhouse.results.section import Evidence, Exhibit, Section
from stillhouse.results.stats import ALPHA, Estimate, estimate, number
from stillhouse.results.table import points_of
from stillhouse.rundir import Json

NOTE = (
    "“Collapsed”: the final score is below that of the untrained student, p adjusted over all arms."
    " “Declined during training”: held-out accuracy, measured during training, ended below the"
    " arm's own best, paired by seed; the best step is chosen after the fact, so p is adjusted over"
    " every measurement of every arm. Highest and lowest are of the mean over seeds; ± is one"
    " standard error over seeds."
)
Measured = dict[int, dict[Any, float]]  # steps done -> seed -> held-out accuracy


@dataclass(frozen=True)
class Curve:
    """An arm's held-out accuracy during training, as (steps done, mean over seeds)."""

    highest: tuple[int, Estimate]
    lowest: tuple[int, Estimate]
    last: tuple[int, Estimate]
    # The last against the highest, in the family of all earlier measurements of all arms; None if
    # the last is the highest.
    decline: Comparison | None


@dataclass(frozen=True)
class Standing:
    """The final score and the curve of one arm."""

    arm: str
    untrained: Comparison | None  # the final score against the untrained student
    seeds: int  # scored
    below: int  # of them, ended below the untrained student
    diverged: int  # seeds without a score because they diverged
    curve: Curve | None  # of the seeds that were trained to the end

    @property
    def has_collapsed(self) -> bool:
        return self.untrained is not None and self.untrained.verdict.kind == "worse"

    @property
    def has_declined(self) -> bool:
        decline = self.curve.decline if self.curve else None
        return decline is not None and decline.p < ALPHA

    @property
    def verdict(self) -> str:
        verdicts = ["collapsed"] if self.has_collapsed else []
        verdicts += ["declined during training"] if self.has_declined else []
        if not verdicts and self.untrained is not None:
            kind = self.untrained.verdict.kind
            above = {"better": "above the untrained student"}
            verdicts = [above.get(kind, f"{kind} against the untrained student")]
        return ", ".join(verdicts) or "no statement"


def analyze(evidence: Evidence) -> Section:
    """The standing of each arm; no exhibit if no run measured held-out accuracy."""
    made = standings(evidence.frame, evidence.curves, evidence.answer)
    return Section(
        title="Collapse and decline",
        text="",
        exhibits=[Exhibit("", as_table(made))] if made else [],
        note=NOTE,
        context=summary_text(made),
        arms={s.arm: as_record(s) for s in made},
    )


def standings(frame: Frame, runs: Sequence[Run], found: Answer) -> list[Standing]:
    """Each arm's standing, in the sweep's order; none if no run measured held-out accuracy."""
    measured = {str(arm): _measured(runs, arm) for arm in dict.fromkeys(points_of(frame)["arm"])}
    if not any(measured.values()):
        return []
    curves = curves_of({arm: at for arm, at in measured.items() if at})
    scored = frame[(frame["task"] == found.task) & (frame["metric"] == found.metric)]
    made: list[Standing] = []
    for arm in measured:
        rows = scored[(scored["arm"] == arm) & (scored["kind"] == "point")]
        against = [c for c in found.untrained if c.arm == arm]
        # In the arm's own quantizer if that was scored: the student that training started from.
        against.sort(key=lambda c: not c.reference.startswith("ptq"))
        values = rows["value"].dropna()
        below = 0
        if against:
            gap = values - against[0].reference_mean
            below = int((gap < 0 if found.higher_is_better else gap > 0).sum())
        diverged = int((rows["exit_code"] == DIVERGED).sum())
        untrained = against[0] if against else None
        made.append(Standing(arm, untrained, len(values), below, diverged, curves.get(arm)))
    return made


def _measured(runs: Sequence[Run], arm: str) -> Measured:
    """An arm's held-out accuracy at the steps that all of its trained seeds have measured."""
    ended = [r for r in runs if r.point["arm"] == arm and r.point["trained"]]
    logged = {r.point["seed"]: r.metrics[ACCURACY].dropna() for r in ended if ACCURACY in r.metrics}
    steps = [{int(at) for at in series.index} for series in logged.values()]
    shared = sorted(set[int].intersection(*steps)) if steps else []
    return {at: {seed: float(series[at]) for seed, series in logged.items()} for at in shared}


def curves_of(measured: Mapping[str, Measured]) -> dict[str, Curve]:
    """Each arm's curve; every arm has at least one measurement."""
    cells: dict[tuple[str, int], Cell] = {
        (arm, at): {seed: (value, None) for seed, value in by_seed.items()}
        for arm, steps in measured.items()
        for at, by_seed in steps.items()
    }
    last = {arm: max(steps) for arm, steps in measured.items()}
    earlier = [(arm, at) for arm, at in cells if at != last[arm]]
    planned: Planned = [
        (arm, "", str(at), [(cells[arm, last[arm]], cells[arm, at])]) for arm, at in earlier
    ]
    declines = dict(zip(earlier, compare_family(planned, True, {}), strict=True))
    curves: dict[str, Curve] = {}
    for arm, steps in measured.items():
        means = {at: estimate(list(by_seed.values())) for at, by_seed in steps.items()}
        # Of equal means the latest: what is reached again has not been lost.
        best = max(means, key=lambda at: (means[at].mean, at))
        worst = min(means, key=lambda at: means[at].mean)
        highest, lowest, end = ((at, means[at]) for at in (best, worst, last[arm]))
        curves[arm] = Curve(highest, lowest, end, declines.get((arm, best)))
    return curves


def summary_text(made: Sequence[Standing]) -> str:
    """Whether any arm collapsed or declined, in sentences; "" if there is no standing."""
    compared = [(s, s.untrained) for s in made if s.untrained is not None]
    judged = [(s, c) for s, c in compared if c.paired.difference.n > 1]
    traced = [s for s in made if s.curve and s.curve.last[1].n > 1]
    sentences: list[str] = []
    if judged:
        names = {f"{untrained_name(c.reference)}, {number(c.reference_mean)}" for _, c in judged}
        reference = f" (below {names.pop()})" if len(names) == 1 else ""
        collapsed = [s.arm for s, _ in judged if s.has_collapsed]
        sentences.append(f"Collapsed{reference}: {_counted(collapsed, len(judged))}.")
    if traced:
        declined = [s.arm for s in traced if s.has_declined]
        sentences.append(f"Declined during training: {_counted(declined, len(traced))}.")
    if judged:
        below = "; ".join(f"{s.below} of {s.seeds} ({s.arm})" for s in made if s.below)
        sentences.append(f"Seeds that ended below it: {below or 'none'}.")
    diverged = "; ".join(f"{s.diverged} ({s.arm})" for s in made if s.diverged)
    if diverged:
        sentences.append(f"Seeds that diverged, and are in no mean: {diverged}.")
    return " ".join(sentences)


def _counted(arms: Sequence[str], of: int) -> str:
    return f"{len(arms) or 'none'} of {of} arms" + (f" ({'; '.join(arms)})" if arms else "")


def as_table(made: Sequence[Standing]) -> Table:
    """A row per arm; ± is one standard error over seeds."""
    header = ["arm", "verdict", "final − untrained", "95 % interval", "p (Holm)", "seeds below"]
    header += ["highest (step)", "lowest (step)", "last (step)", "last − highest", "95 % interval"]
    header += ["p (Holm)", "detectable"]
    return header, [[s.arm, s.verdict, *_final_cells(s), *_curve_cells(s.curve)] for s in made]


def _final_cells(s: Standing) -> list[str]:
    if s.untrained is None:
        return ["–"] * 4
    d = s.untrained.paired.difference
    below = f"{s.below} of {s.seeds}"
    return [signed(d.mean), interval(d.low, d.high), probability(s.untrained.p), below]


def _curve_cells(curve: Curve | None) -> list[str]:
    if curve is None:
        return ["–"] * 7
    ends = (curve.highest, curve.lowest, curve.last)
    cells = [f"{mean_and_error(e)} ({at})" for at, e in ends]
    if curve.decline is None:
        return [*cells, *["–"] * 4]
    d = curve.decline.paired.difference
    cells += [signed(d.mean), interval(d.low, d.high), probability(curve.decline.p)]
    return [*cells, number(curve.decline.paired.detectable)]


def as_record(s: Standing) -> Json:
    """A standing as columns of arms.csv."""
    row: Json = {"arm": s.arm, "standing": s.verdict, "seeds": s.seeds}
    row |= {"seeds_below_untrained": s.below, "seeds_diverged": s.diverged}
    if s.untrained is not None:
        row |= {"final_minus_untrained": s.untrained.paired.difference.mean}
        row |= {"p_untrained_holm": s.untrained.p}
    if s.curve is not None:
        ends = {"highest": s.curve.highest, "lowest": s.curve.lowest, "last": s.curve.last}
        for name, (at, e) in ends.items():
            row |= {f"{name}_steps": at, name: e.mean, f"{name}_se": e.se}
        if s.curve.decline is not None:
            c = comparison_record(s.curve.decline)
            row |= {"fall": c["difference"], "fall_se": c["se"], "fall_p_holm": c["p_holm"]}
            row |= {"fall_detectable": c["detectable"]}
    return row
