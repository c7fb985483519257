"""This file is where time and price of points are foretold, and those of done runs are added up.

An estimate says what it rests on: runs that were measured here, a rule of thumb, or nothing. Plain
functions; the only files read are those that runs have written.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.methods import value_at
from stillhouse.rundir import FORMAT, RunDir, Runs, read_json
from stillhouse.spec import TrainSpec, to_plain
from stillhouse.sweep.asked import text
from stillhouse.sweep.grid import Point

# Seconds of a generated pair's step, per sequence. A step of 32 at λ = 1 with int4 took 0.20 s on
# one thread of a busy 2-core machine, and 0.07 to 0.10 s without quantiser and metrics on a quiet
# one; 0.15 s lies between. It is used only until the first run of the same shape is done.
GENERATED_SEQUENCE_S = 0.15 / 32
READ_AT_MOST = 500  # run directories: a plan must stay quick beside thousands of finished runs

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Cost:
    """Time and price of one run."""

    seconds: float | None  # wall time; None: not known
    device_hours: float | None
    usd: float | None  # None: no time, or no price given
    basis: str  # "measured: …", "rule of thumb: …", "not known: …"


@dataclass(frozen=True)
class Total:
    """Runs under one label, added up; what is not known is left out and counted."""

    label: str
    runs: int
    hours: float
    device_hours: float
    usd: float | None  # None: no run has a price
    unknown: int  # runs whose time is not known
    unpriced: int  # runs whose price is not known


def estimate(points: Sequence[Point], runs: Path) -> dict[str, Cost]:
    """What each point costs from start to end, by id, whether or not it is done already."""
    shapes = {point.id: shape(to_plain(point.spec)) for point in points}
    measured = _measured(runs, {point.slug for point in points}, set(shapes.values()))
    return {point.id: _foretell(point.spec, measured.get(shapes[point.id])) for point in points}


def spent(runs: Path, ids: Iterable[str]) -> dict[str, Cost]:
    """What runs cost so far, by id; a run that has not written cost.json yet is left out."""
    wanted = set(ids)
    found: dict[str, Cost] = {}
    for run in Runs(runs).all():
        cost = read_json(run.cost_file) if run.id in wanted else None
        if cost is not None:
            seconds = cost["seconds"]["total"]
            found[run.id] = _cost(
                seconds, cost["devices"], cost["price_usd_per_hour"], f"measured: {cost['device']}"
            )
    return found


def totals(costs: Mapping[str, Cost], labels: Mapping[str, str]) -> list[Total]:
    """One row per label, then "all"; an id without a label or without a cost is left out."""
    groups: dict[str, list[Cost]] = {}
    for point_id, name in labels.items():
        if point_id in costs:
            groups.setdefault(name, []).append(costs[point_id])
    return [_total(name, group) for name, group in groups.items()] + [
        _total("all", list(itertools.chain(*groups.values())))
    ]


def labels_by(points: Sequence[Point], by: str) -> dict[str, str]:
    """id -> "lmbda = 0.5", for `totals`; `by` is an axis, "seed" or any leaf ("method_name")."""
    found: dict[str, str] = {}
    for point in points:
        if by in point.overrides:
            value = point.overrides[by]
        else:
            section = next(s for s, leaves in to_plain(point.spec).items() if by in leaves)
            value = getattr(getattr(point.spec, section), by)
        found[point.id] = f"{by} = {text(value)}"
    return found


def shape(plain: Mapping[str, Any]) -> Shape:
    """What decides how long a step takes, of a spec as plain dicts (spec.json has it so)."""
    pair, training, rollout = plain["pair"], plain["training"], plain["rollout"]
    lmbda: float | list[tuple[float, float]] = plain["method"]["lmbda"]
    source = plain["method"]["off_policy_source"]
    schedule = tuple((f, v) for f, v in lmbda) if isinstance(lmbda, list) else lmbda
    # Mean λ over the run: how much of it is spent on rollouts, which are the dearest part.
    on_policy = statistics.fmean(value_at(schedule, (i + 0.5) / 100) for i in range(100))
    return (
        *(pair[k] for k in ("pair_name", "student", "teacher", "student_dtype", "teacher_dtype")),
        plain["quant"]["quant_type"],
        *(training[k] for k in ("per_device_train_batch_size", "gradient_accumulation_steps")),
        *(training[k] for k in ("num_processes", "mixed_precision", "gradient_checkpointing")),
        plain["data"]["max_length"],
        rollout["max_new_tokens"],
        round(on_policy, 2),
        source if on_policy < 1 else None,
    )


def _measured(runs: Path, slugs: set[str], wanted: set[Shape]) -> dict[Shape, list[_Measure]]:
    found: dict[Shape, list[_Measure]] = {}
    alike = (run for run in Runs(runs).all() if run.path.name.rpartition("-")[0] in slugs)
    for run in itertools.islice(alike, READ_AT_MOST):
        measure = _measure(run, wanted)
        if measure is not None:
            found.setdefault(measure.shape, []).append(measure)
    return found


@dataclass(frozen=True)
class _Measure:
    shape: Shape
    fixed_s: float  # loading: paid once, however many steps
    step_s: float
    device: str


def _measure(run: RunDir, wanted: set[Shape]) -> _Measure | None:
    """Seconds of a run, if it is done and of a wanted shape."""
    cost = read_json(run.cost_file)
    record = read_json(run.spec_file) if cost else None
    if cost is None or record is None or record.get("format") != FORMAT or not run.is_trained():
        return None
    plain = record["spec"]
    steps, this = plain["training"]["max_steps"], shape(plain)
    if this not in wanted or not steps:
        return None
    # "total" holds the loading too, which is paid once.
    load, total = cost["seconds"]["load"], cost["seconds"]["total"]
    return _Measure(this, load, (total - load) / steps, cost["device"])


def _foretell(spec: TrainSpec, measured: list[_Measure] | None) -> Cost:
    training = spec.training
    devices, price = training.num_processes, spec.site.price_usd_per_hour
    if measured:
        step_s = statistics.median(m.step_s for m in measured)
        seconds = statistics.median(m.fixed_s for m in measured) + step_s * training.max_steps
        where = ", ".join(sorted({m.device for m in measured}))
        count = f"{len(measured)} run{'s' if len(measured) > 1 else ''}"
        return _cost(seconds, devices, price, f"measured: {step_s:.2g} s a step, {count} ({where})")
    if spec.pair.pair_source == "generated":
        sequences = (
            training.per_device_train_batch_size * training.gradient_accumulation_steps * devices
        )
        step_s = GENERATED_SEQUENCE_S * sequences
        basis = f"rule of thumb: {step_s:.2g} s a step of a generated pair on one core"
        return _cost(step_s * training.max_steps, devices, price, basis)
    return Cost(None, None, None, "not known: no run like it was measured here")


def _cost(seconds: float, devices: int, price: float | None, basis: str) -> Cost:
    device_hours = seconds * devices / 3600
    return Cost(seconds, device_hours, None if price is None else device_hours * price, basis)


def _total(name: str, costs: Sequence[Cost]) -> Total:
    priced = [cost.usd for cost in costs if cost.usd is not None]
    return Total(
        label=name,
        runs=len(costs),
        hours=sum(cost.seconds or 0 for cost in costs) / 3600,
        device_hours=sum(cost.device_hours or 0 for cost in costs),
        usd=sum(priced) if priced else None,
        unknown=sum(cost.seconds is None for cost in costs),
        unpriced=len(costs) - len(priced),
    )
