"""This file is where it is decided, arm by arm, whether it collapsed, or fell during training.

    collapsed  its final score on the compared metric is below the untrained student's, quantised as
               the arm's students are: their comparison says "worse", p adjusted over all arms
    fell       its held-out accuracy ended below its own best: paired by seed, the last measurement
               minus the one at the step where the arm's mean is highest. That step is chosen after
               looking, so p is adjusted over every earlier measurement of every arm

Both speak of means over seeds. An arm in which a few seeds fail may show neither, so the seeds that
ended below the untrained student are counted too, and those that diverged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import DIVERGED
from stillhouse.results.answer import Answer, untrained_name
from stillhouse.results.comparisons import Comparison
from stillhouse.results.curves import ACCURACY, Run
from stillhouse.results.layout import Table, interval, probability, signed, spread
from stillhouse.results.stats import ALPHA, Estimate, Paired, compare, estimate, holm, number
from stillhouse.results.table import Frame, points_of

Measured = dict[int, dict[Any, float]]  # steps done -> seed -> held-out accuracy


@dataclass(frozen=True)
class Curve:
    """An arm's held-out accuracy on the way, as (steps done, mean over seeds with its noise)."""

    highest: tuple[int, Estimate]
    lowest: tuple[int, Estimate]
    last: tuple[int, Estimate]
    fall: Paired | None  # the last minus the highest; None where the last is the highest
    p: float  # of the fall, adjusted over all earlier measurements of all arms


@dataclass(frozen=True)
class Standing:
    """What became of one arm."""

    arm: str
    untrained: Comparison | None  # the final score against the untrained student
    seeds: int  # that are scored
    below: int  # of them, ended below the untrained student
    diverged: int  # seeds that have no score because they diverged
    curve: Curve | None  # of the seeds that were trained to the end

    @property
    def has_collapsed(self) -> bool:
        return self.untrained is not None and self.untrained.verdict.kind == "worse"

    @property
    def has_fallen(self) -> bool:
        fall = self.curve.fall if self.curve else None
        return fall is not None and self.curve is not None and self.curve.p < ALPHA

    @property
    def verdict(self) -> str:
        """What is said of the arm, in a few words."""
        said = ["collapsed"] if self.has_collapsed else []
        said += ["fell during training"] if self.has_fallen else []
        if not said and self.untrained is not None:
            kind = self.untrained.verdict.kind
            above = {"better": "above the untrained student"}
            said = [above.get(kind, f"{kind} against the untrained student")]
        return ", ".join(said) or "no statement"


def standings(frame: Frame, runs: Sequence[Run], found: Answer) -> list[Standing]:
    """Each arm's standing, in the sweep's order; none where no run measured held-out accuracy."""
    measured = {arm: _measured(runs, arm) for arm in dict.fromkeys(points_of(frame)["arm"])}
    if not any(measured.values()):
        return []
    curves = traced({arm: at for arm, at in measured.items() if at})
    scored = frame[(frame["task"] == found.task) & (frame["metric"] == found.metric)]
    made: list[Standing] = []
    for arm in measured:
        rows = scored[(scored["arm"] == arm) & (scored["kind"] == "point")]
        against = [c for c in found.untrained if c.arm == arm]
        # In the arm's own quantiser where that was scored: the student that training started from.
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
    shared = sorted(set.intersection(*(set(s.index) for s in logged.values()))) if logged else []
    return {int(at): {seed: float(s[at]) for seed, s in logged.items()} for at in shared}


def traced(measured: dict[str, Measured]) -> dict[str, Curve]:
    """Each arm's curve; every arm has at least one measurement."""
    earlier = [(arm, at) for arm, steps in measured.items() for at in list(steps)[:-1]]
    falls = {
        (arm, at): compare(measured[arm][max(measured[arm])], measured[arm][at], len(earlier))
        for arm, at in earlier
    }
    adjusted = dict(zip(falls, holm([fall.p for fall in falls.values()]), strict=True))
    found: dict[str, Curve] = {}
    for arm, steps in measured.items():
        means = {at: estimate(list(by_seed.values())) for at, by_seed in steps.items()}
        last = max(means)
        # Of equal means the latest: what is reached again has not been lost.
        best = max(means, key=lambda at: (means[at].mean, at))
        worst = min(means, key=lambda at: means[at].mean)
        ends = [(at, means[at]) for at in (best, worst, last)]
        p = adjusted.get((arm, best), float("nan"))
        found[arm] = Curve(ends[0], ends[1], ends[2], falls.get((arm, best)), p)
    return found


def told(made: Sequence[Standing]) -> str:
    """Whether any arm collapsed or fell, in sentences; "" where there is no standing."""
    judged = [s for s in made if s.untrained is not None and s.untrained.paired.difference.n > 1]
    said: list[str] = []
    if judged:
        references = {
            f"{untrained_name(s.untrained.reference)}, {number(s.untrained.reference_mean)}"
            for s in judged
            if s.untrained is not None
        }
        reference = f" (below {references.pop()})" if len(references) == 1 else ""
        said.append(f"Collapsed{reference}: {_who(judged, [s.has_collapsed for s in judged])}.")
    traced = [s for s in made if s.curve and s.curve.last[1].n > 1]
    if traced:
        said.append(f"Fell during training: {_who(traced, [s.has_fallen for s in traced])}.")
    some = [f"{s.below} of {s.seeds} ({s.arm})" for s in made if s.below]
    if judged:
        said.append(f"Seeds that ended below it: {'; '.join(some) or 'none'}.")
    lost = [f"{s.diverged} ({s.arm})" for s in made if s.diverged]
    if lost:
        said.append(f"Seeds that diverged, and are in no mean: {'; '.join(lost)}.")
    return " ".join(said)


def _who(arms: Sequence[Standing], did: Sequence[bool]) -> str:
    names = [s.arm for s, yes in zip(arms, did, strict=True) if yes]
    return f"{len(names) or 'none'} of {len(arms)} arms" + (f" ({'; '.join(names)})" * bool(names))


def table_of(made: Sequence[Standing]) -> Table:
    """The standings as people read them; ± is one standard error over seeds."""
    header = ["arm", "standing", "final − untrained", "95 % interval", "p (Holm)", "seeds below"]
    header += ["highest (after step)", "lowest", "last", "last − highest", "95 % interval"]
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
    cells = [f"{spread(e)} ({at})" for at, e in (curve.highest, curve.lowest, curve.last)]
    if curve.fall is None:
        return [*cells, *["–"] * 4]
    d = curve.fall.difference
    cells += [signed(d.mean), interval(d.low, d.high), probability(curve.p)]
    return [*cells, number(curve.fall.detectable)]


def record(s: Standing) -> dict[str, Any]:
    """A standing as a row of a CSV file."""
    row: dict[str, Any] = {"arm": s.arm, "standing": s.verdict, "seeds": s.seeds}
    row |= {"seeds_below_untrained": s.below, "seeds_diverged": s.diverged}
    if s.untrained is not None:
        row |= {"final_minus_untrained": s.untrained.paired.difference.mean}
        row |= {"p_untrained_holm": s.untrained.p}
    if s.curve is not None:
        for name in ("highest", "lowest", "last"):
            at, e = getattr(s.curve, name)
            row |= {f"{name}_steps": at, name: e.mean, f"{name}_se": e.se}
        if s.curve.fall is not None:
            fall = s.curve.fall
            row |= {"fall": fall.difference.mean, "fall_se": fall.difference.se}
            row |= {"fall_p_holm": s.curve.p, "fall_detectable": fall.detectable}
    return row
