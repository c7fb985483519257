"""Estimate the time and the price of points before anything starts.

An estimate states its basis: runs of the same shape that were measured where the points are to run,
a rule of thumb, or nothing. A price states its source and its date. The only files read are those
that runs have written, and k8s/prices.yaml.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stillhouse.compose import k8s_dir
from stillhouse.errors import ConfigError, ContractError
from stillhouse.identity import to_plain
from stillhouse.methods import value_at
from stillhouse.rundir import RunDir, Runs
from stillhouse.spec import NonNegative, SiteSpec, TrainSpec
from stillhouse.sweep.points import Point
from stillhouse.sweep.state import Record
from stillhouse.sweep.sweep_file import text
from stillhouse.text import number_of

# Seconds of a generated pair's step, per sequence. A step of 32 at λ = 1 with int4 took 0.20 s on
# one thread of a busy 2-core machine, and 0.07 to 0.10 s without quantizer and metrics on a quiet
# one; 0.15 s lies between. It is used only until the first run of the same shape is done.
GENERATED_SEQUENCE_S = 0.15 / 32
SHOWN, SHOWN_BASES = 40, 4  # lines of a table before the rest is only counted
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


@dataclass(frozen=True)
class Price:
    """What a device-hour costs, and who says so."""

    usd_per_hour: NonNegative
    source: str
    date: str | None = None

    def __str__(self) -> str:
        """`$2.50 a device-hour (a provider's list, 2026-10-01)`"""
        dated = f"{self.source}, {self.date}" if self.date else self.source
        return f"${self.usd_per_hour:.4g} a device-hour ({dated})"


@dataclass(frozen=True)
class Measure:
    """How long a run of some shape took."""

    shape: Shape
    fixed_s: float  # loading: paid once, however many steps
    step_s: float
    device: str
    is_job: bool = False  # all of a Job's time, its start in the steps


@functools.cache
def prices() -> dict[str, Price]:
    """What k8s/prices.yaml says, by GPU product."""
    return read_prices(k8s_dir() / "prices.yaml")


def read_prices(file: Path) -> dict[str, Price]:
    """The prices in a file, by GPU product.

    Raises:
        ConfigError: a line of it that is no price.
    """
    import yaml

    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        return TypeAdapter(dict[str, Price]).validate_python(content)
    except (yaml.YAMLError, ValidationError) as error:
        where, why = "", str(error).replace("\n", " ")
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where, why = ".".join(map(str, first["loc"])) + ": ", first["msg"]
        raise ConfigError(
            f"{file}: {where}{why}. A line is"
            ' PRODUCT: {usd_per_hour: 2.5, source: who says so, date: "2026-10-01"}'
        ) from error


def price_of(site: SiteSpec) -> Price | None:
    """The price of a device-hour of a site; what the site itself says wins. None: not known."""
    if site.price_usd_per_hour is not None:
        return Price(site.price_usd_per_hour, "site.price_usd_per_hour")
    return prices().get(site.gpu_product) if site.gpu_product else None


def measured_jobs(points: Sequence[Point], records: Mapping[str, Record]) -> list[Measure]:
    """What the Jobs of a sweep's points took, from the ledger (by id); those that nothing broke."""
    found: list[Measure] = []
    for point in points:
        record, steps = records.get(point.id), point.spec.training.max_steps
        if record and record.state == "done" and record.running and not record.lost and steps:
            this = shape(to_plain(point.spec))
            device = record.gpu or "the cluster"
            found.append(Measure(this, 0.0, record.running / steps, device, is_job=True))
    return found


def estimate(
    points: Sequence[Point], runs: Path, jobs: Sequence[Measure] | None = None
) -> dict[str, Cost]:
    """What each point costs from start to end, by id, whether or not it is done already.

    `jobs`: None on this machine, where its own runs are the measure; for a cluster, what its Jobs
    took (`measured_jobs`), beside the runs that were collected from it.
    """
    shapes = {point.id: shape(to_plain(point.spec)) for point in points}
    slugs = {point.slug for point in points}
    runs_here = _measured(runs, slugs, set(shapes.values()), is_collected=jobs is not None)
    measured: dict[Shape, list[Measure]] = {}
    for measure in [*runs_here, *(jobs or ())]:
        measured.setdefault(measure.shape, []).append(measure)
    return {
        point.id: _foretell(point.spec, measured.get(shapes[point.id], []), jobs is not None)
        for point in points
    }


def totals(costs: Mapping[str, Cost], labels: Mapping[str, str]) -> list[Total]:
    """One row per label, then "all"; an id without a label or without a cost is left out."""
    groups: dict[str, list[Cost]] = {}
    for point_id, name in labels.items():
        if point_id in costs:
            groups.setdefault(name, []).append(costs[point_id])
    return [_total(name, group) for name, group in groups.items()] + [
        _total("all", list(itertools.chain(*groups.values())))
    ]


def estimate_lines(points: Sequence[Point], costs: Mapping[str, Cost], site: SiteSpec) -> list[str]:
    """A table by axis of what points that are to be trained would cost, and what it rests on."""
    if not costs:
        return []
    axes = [axis for axis in points[0].overrides if axis != "seed"]
    rows = [row for axis in axes for row in totals(costs, labels_by(points, axis))[:-1]]
    hours = "GPU-hours" if site.gpu_resource else "device-hours"
    lines = _table(rows[:SHOWN], totals(costs, dict.fromkeys(costs, ""))[-1], hours)
    if len(rows) > SHOWN:
        lines.insert(-1, f"  and {len(rows) - SHOWN} more values")
    bases = Counter(cost.basis for cost in costs.values()).most_common()
    lines += [f"  {number_of(count, 'point')}, {basis}" for basis, count in bases[:SHOWN_BASES]]
    if len(bases) > SHOWN_BASES:
        lines.append(f"  and {len(bases) - SHOWN_BASES} other bases")
    price = price_of(site)
    return [*lines, f"  {price or no_price(site.gpu_product)}; scoring is not counted"]


def no_price(product: str | None) -> str:
    """Why there are no dollars, and what would make some."""
    if product:
        return f"price of {product} not known: add it to k8s/prices.yaml"
    return "price not known: set site.gpu_product (k8s/prices.yaml) or site.price_usd_per_hour"


def _table(rows: Sequence[Total], last: Total, hours: str) -> list[str]:
    cells = [["to train", "points", hours, "cost"]]
    for row in (*rows, last):
        is_known = row.unknown < row.runs
        amount = f"{row.device_hours:.3g}" if is_known else "not known"
        if is_known and row.unknown:
            amount = f"{amount} + {row.unknown} not known"
        usd = "" if row.usd is None else f"${row.usd:.2f}"
        cells.append([row.label, str(row.runs), amount, usd])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        f"  {line[0]:<{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}"
        f"  {line[3]:>{widths[3]}}".rstrip()
        for line in cells
    ]


def labels_by(points: Sequence[Point], by: str) -> dict[str, str]:
    """id -> "lmbda = 0.5", for `totals`; `by` is an axis, or "seed"."""
    return {point.id: f"{by} = {text(point.overrides[by])}" for point in points}


def shape(plain: Mapping[str, Any]) -> Shape:
    """What decides how long a step takes, of a spec as plain dicts (spec.json has it so).

    Raises:
        KeyError: the spec was written before some knob existed.
    """
    pair, training, method = plain["pair"], plain["training"], plain["method"]
    # Mean λ over the run: how much of it is spent on rollouts, which are the dearest part.
    on_policy, injected = _mean(method["lmbda"]), method["replay_injection"]
    has_off_policy = on_policy < 1 or injected > 0
    return (
        *(pair[k] for k in ("pair_name", "student", "teacher", "student_dtype", "teacher_dtype")),
        plain["quant"]["quant_type"],
        *(training[k] for k in ("per_device_train_batch_size", "gradient_accumulation_steps")),
        *(training[k] for k in ("num_processes", "mixed_precision", "gradient_checkpointing")),
        plain["data"]["max_length"],
        plain["rollout"]["max_new_tokens"],
        round(on_policy, 2),
        method["lmbda_as"] if 0 < on_policy < 1 else None,
        method["off_policy_source"] if has_off_policy else None,
        plain["loss"]["on_loss"] if on_policy > 0 else None,
        plain["loss"]["off_loss"] if has_off_policy else None,
        round(_mean(method["seed_tokens"])),
        _mean(method["anchor_weight"]) > 0,
        (method["replay_size"] > 0, injected),
    )


def _mean(schedule: float | list[list[float]]) -> float:
    """Its mean over the run; knots come as lists from JSON."""
    if not isinstance(schedule, list):
        return schedule
    knots = tuple((fraction, value) for fraction, value in schedule)
    return statistics.fmean(value_at(knots, (i + 0.5) / 100) for i in range(100))


def _measured(runs: Path, slugs: set[str], wanted: set[Shape], is_collected: bool) -> list[Measure]:
    """The done runs of wanted shapes: those of this machine, or those that came from a cluster."""
    alike = (
        run
        for run in Runs(runs).all()
        if run.path.name.rpartition("-")[0] in slugs and run.collected_file.exists() == is_collected
    )
    measures = (_measure(run, wanted) for run in itertools.islice(alike, READ_AT_MOST))
    return [measure for measure in measures if measure is not None]


def _measure(run: RunDir, wanted: set[Shape]) -> Measure | None:
    """Seconds of a run, if it is done and of a wanted shape."""
    try:
        cost = run.cost()
        record = run.record() if cost else None
        is_done = run.was_trained()
    except ContractError:  # one odd run less to learn from
        return None
    if cost is None or record is None or not is_done:
        return None
    plain = record["spec"]
    try:
        steps = plain["training"]["max_steps"]
        this = shape(plain)
        is_wanted = this in wanted and steps > 0
    # Of a version that knew fewer knobs, or other ones: not known to be alike.
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if not is_wanted:
        return None
    # "total" holds the loading too, which is paid once.
    load, total = cost["seconds"]["load"], cost["seconds"]["total"]
    return Measure(this, load, (total - load) / steps, cost["device"])


def _foretell(spec: TrainSpec, alike: Sequence[Measure], is_cluster: bool) -> Cost:
    """`alike`: what runs of the same shape took."""
    training, product = spec.training, spec.site.gpu_product
    price = price_of(spec.site)
    devices, usd = training.num_processes, price.usd_per_hour if price else None
    if is_cluster and product:
        # torch writes the spaces that a node's label cannot have.
        alike = [m for m in alike if m.device.replace(" ", "-") == product]
    # A run that came home knows its steps apart from its start; a Job's time is second to it.
    measured = [m for m in alike if not m.is_job] or alike
    if measured:
        step_s = statistics.median(m.step_s for m in measured)
        seconds = statistics.median(m.fixed_s for m in measured) + step_s * training.max_steps
        where = ", ".join(sorted({m.device for m in measured}))
        what = "Job" if measured[0].is_job else "run"
        basis = f"measured: {step_s:.2g} s a step, {number_of(len(measured), what)} ({where})"
        return _cost(seconds, devices, usd, basis)
    is_on_cores = not is_cluster or spec.site.gpu_resource is None
    if spec.pair.pair_source == "generated" and is_on_cores:
        sequences = (
            training.per_device_train_batch_size * training.gradient_accumulation_steps * devices
        )
        step_s = GENERATED_SEQUENCE_S * sequences
        basis = f"rule of thumb: {step_s:.2g} s a step of a generated pair on one core"
        return _cost(step_s * training.max_steps, devices, usd, basis)
    where = f"on {product or 'this cluster'}" if is_cluster else "here"
    return Cost(None, None, None, f"not known: no run like it was measured {where}")


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
