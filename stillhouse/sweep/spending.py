"""Add up the device-hours and the price of a sweep so far, by what the devices did.

    queued     a Job waits for its turn: it holds no device, and costs nothing but time
    starting   a pod has its devices and does not work yet: image, volumes
    running    training, by phase where the run's cost.json is on this machine, and scoring
    lost       attempts and tasks that failed, less the work that a later attempt resumed from

Times come from the ledger, which has a record of each task that ended. Where there is no record (on
this machine), they come from cost.json alone. A point that diverged or was stopped by a watch rule
is a result, and its time is not lost. Device-hours are hours times devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from stillhouse.errors import DIVERGED, ContractError
from stillhouse.rundir import Json, RunDir
from stillhouse.spec import SiteSpec
from stillhouse.sweep.cost import Price, no_price, prices
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.state import Record
from stillhouse.text import number_of

KINDS = ("queued", "starting", "running", "lost")
PHASES = ("load", "rollout", "teacher", "train", "eval", "save")  # of cost.json, in this order
OTHER = "start and end"  # of a process: imports before the first phase, and its shutdown
UNKNOWN, UNFINISHED, SCORING = "not collected", "unfinished", "scoring"


@dataclass
class Spent:
    """What a sweep has cost; amounts by kind, `phases` in device-hours of running."""

    hours: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    usd: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS[1:], 0.0))
    phases: dict[str, float] = field(default_factory=dict[str, float])
    unpriced: float = 0.0  # device-hours without a price
    bases: set[str] = field(default_factory=set[str])  # whose prices, and what lacks one
    uncollected: int = 0  # points whose time by phase is not here

    def add(self, kind: str, device_s: float, price: Price | None) -> None:
        """Count device-seconds of one kind."""
        hours = device_s / 3600
        self.hours[kind] += hours
        if kind == "queued" or not hours:
            return
        if price is None:
            self.unpriced += hours
        else:
            self.usd[kind] += hours * price.usd_per_hour

    def add_phase(self, phase: str, device_s: float) -> None:
        if device_s > 0:
            self.phases[phase] = self.phases.get(phase, 0.0) + device_s / 3600

    def lines(self) -> list[str]:
        """The same as a person reads it."""
        held = sum(self.hours[kind] for kind in KINDS[1:])
        if not held and not self.hours["queued"]:
            return ["nothing was spent yet: no task has ended"]
        rows = [("tasks that ended", "device-hours", "cost")]
        for kind in KINDS:
            usd = "holds none" if kind == "queued" else self._usd(self.usd[kind])
            rows.append((f"  {kind}", _hours(self.hours[kind]), usd))
            for phase in self._phases() if kind == "running" else ():
                rows.append((f"    {phase}", _hours(self.phases[phase]), ""))
        rows.append(("  all but queued", _hours(held), self._usd(sum(self.usd.values()))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows
        ]
        if self.uncollected:
            points = number_of(self.uncollected, "point")
            lines.append(f"  phases of {points}: `stillhouse collect` brings them")
        if self.unpriced and any(self.usd.values()):
            lines.append(f"  {_hours(self.unpriced)} device-hours have no price and are left out")
        return lines + [f"  {basis}" for basis in sorted(self.bases)]

    def as_json(self) -> Json:
        return {
            "device_hours": {kind: round(hours, 6) for kind, hours in self.hours.items()},
            "usd": {kind: round(usd, 4) for kind, usd in self.usd.items()},
            "phases": {phase: round(self.phases[phase], 6) for phase in self._phases()},
            "unpriced_device_hours": round(self.unpriced, 6),
            "uncollected_points": self.uncollected,
            "prices": sorted(self.bases),
        }

    def _phases(self) -> list[str]:
        order = [*PHASES, OTHER, UNKNOWN, UNFINISHED, SCORING]
        return sorted(self.phases, key=lambda p: (order.index(p) if p in order else 0, p))

    def _usd(self, amount: float) -> str:
        return f"${amount:.2f}" if amount or not self.unpriced else "not known"


def spent(sweep: Sweep, records: Mapping[str, Record], site: SiteSpec | None = None) -> Spent:
    """What the points and baselines of a sweep have cost.

    `records`: the ledger by its keys, {} on this machine. `site`: where a price of its own counts.
    """
    found = Spent()
    told = site.price_usd_per_hour if site else None
    own = None if told is None else Price(told, "site.price_usd_per_hour")
    for point in sweep.points:
        record, cost = records.get(point.id), _cost_of(sweep.run(point.id))
        if record is not None:
            _add_training(found, record, cost, _price(found, record, own))
        elif cost is not None:
            _add_local(found, cost)
    scored = {*sweep.by_id, *(row.directory.name for row in sweep.meant_baselines)}
    for key, record in records.items():
        what, dot, _ = key.partition(".")
        if dot and what in scored:
            _add_scoring(found, record, _price(found, record, own))
    return found


def _cost_of(run: RunDir) -> Json | None:
    """What a run says that it cost; an odd file is the business of `report`, which names it."""
    with contextlib.suppress(ContractError):
        return run.cost()
    return None


def _price(found: Spent, record: Record, own: Price | None) -> Price | None:
    """The price of a record's devices; what it rests on is noted."""
    price = own or (prices().get(record.gpu) if record.gpu else None)
    product = f"{record.gpu}: " if record.gpu else ""
    if record.devices:  # a task without devices needs no price
        found.bases.add(f"{product}{price}" if price else no_price(record.gpu))
    return price


def _add_training(found: Spent, record: Record, cost: Json | None, price: Price | None) -> None:
    devices = record.devices
    running, lost = _running_and_lost(record)
    useful = cost["seconds"]["total"] * cost["devices"] if cost else 0.0
    # A run that goes on from a checkpoint counts on: what it has beyond its last attempt was done
    # in attempts before it, and is not lost.
    saved = min(lost, max(0.0, useful - running))
    running, lost = running + saved, lost - saved
    found.add("queued", record.queued * devices, price)
    found.add("starting", record.starting * devices, price)
    found.add("running", running, price)
    found.add("lost", lost, price)
    if cost is not None:
        _add_phases(found, cost, running)
    elif record.state == "done":
        found.add_phase(UNKNOWN, running)
        found.uncollected += running > 0
    else:  # a run writes its cost.json when it is done
        found.add_phase(UNFINISHED, running)


def _running_and_lost(record: Record) -> tuple[float, float]:
    """Device-seconds of a record; all that failed tasks took was in vain."""
    running, lost = record.running * record.devices, record.lost * record.devices
    if record.state in ("failed", "alone") and record.code != DIVERGED:
        return 0.0, running + lost
    return running, lost


def _add_phases(found: Spent, cost: Json, running: float) -> None:
    """Split device-seconds that a run took into its phases and the rest."""
    devices = cost["devices"]
    phases = {phase: s * devices for phase, s in cost["seconds"].items() if phase != "total"}
    known = sum(phases.values())
    for phase, device_s in phases.items():
        # A clock inside the run cannot have seen more than there was.
        found.add_phase(phase, device_s * min(1.0, running / known) if known else 0.0)
    found.add_phase(OTHER, running - known)


def _add_local(found: Spent, cost: Json) -> None:
    """A run without a record: all that is known is what it wrote itself."""
    told = cost["price_usd_per_hour"]
    price = None if told is None else Price(told, f"cost.json, {cost['device']}")
    found.bases.add(str(price) if price else "price not known (site: price_usd_per_hour)")
    running = cost["seconds"]["total"] * cost["devices"]
    found.add("running", running, price)
    _add_phases(found, cost, running)


def _add_scoring(found: Spent, record: Record, price: Price | None) -> None:
    running, lost = _running_and_lost(record)
    found.add("queued", record.queued * record.devices, price)
    found.add("starting", record.starting * record.devices, price)
    found.add("running", running, price)
    found.add("lost", lost, price)
    found.add_phase(SCORING, running)


def _hours(amount: float) -> str:
    return f"{amount:.2f}" if amount >= 0.1 or not amount else f"{amount:.1g}"
