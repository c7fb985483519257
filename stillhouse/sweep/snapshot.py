"""Hold what one look at a sweep found: plain data, which asks nobody anything.

`on_disk` looks at the run directories of this machine, `collected` at those that were fetched from
a cluster that cannot be reached; how a cluster is looked at is in `cluster.backend`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stillhouse.errors import ContractError
from stillhouse.rundir import RunDir, now
from stillhouse.sweep.grid import Sweep
from stillhouse.sweep.outcome import Record
from stillhouse.sweep.plan import Baseline, Observation, baselines_of, groups_of, observe
from stillhouse.sweep.registry import Roster

Observations = Mapping[str, Observation]


@dataclass(frozen=True)
class Snapshot:
    """The points of a sweep, and all that counts beside them, at one moment."""

    observations: Observations  # by the points' ids
    baselines: tuple[Baseline, ...] = ()  # the rows that no run trains; of a look before a run
    # What no point shows, of preparing pairs and scoring baselines: what failed -> why.
    failures: Mapping[str, str] = field(default_factory=dict[str, str])
    prepared: Mapping[str, bool] = field(default_factory=dict[str, bool])  # groups, where known
    records: Mapping[str, Record] | None = None  # a cluster's ledger; None: this machine has none
    unreachable: str | None = None  # why the cluster could not be asked
    at: float = field(default_factory=now)  # seconds since the epoch

    @property
    def to_begin_anew(self) -> list[str]:
        """The points whose training rests on weights or rows that are others now."""
        return [id_ for id_, seen in self.observations.items() if seen.must_begin_anew]

    @property
    def of_other_code(self) -> list[str]:
        """The points that other code began, and ours would have to go on with."""
        seen_by_id = self.observations.items()
        return [i for i, s in seen_by_id if s.state == "drifted" and not s.must_begin_anew]

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to train or to score."""
        states = {seen.state for seen in self.observations.values()}
        rows_left = any(not (row.is_scored or row.cause) for row in self.baselines)
        is_open = states & {"new", "waiting", "running", "drifted"}
        return not is_open and not (rows_left and "done" in states)


def on_disk(rows: Roster, sweep: Sweep | None = None) -> Snapshot:
    """What the run directories of this machine say; with `sweep`, its baselines, too."""
    baselines = baselines_of(sweep, groups_of(sweep)) if sweep else ()
    return Snapshot(observe(rows), baselines, _failures(rows))


def collected(rows: Roster, why: str) -> Snapshot:
    """What is known of a cluster that cannot be reached (`why`): the runs that were collected."""
    found = observe(rows)
    for id_ in found:
        if not rows.run(id_).collected_file.exists():
            found[id_] = Observation("new")
    return Snapshot(found, records={}, unreachable=why)


def _failures(rows: Roster) -> dict[str, str]:
    found: dict[str, str] = {}
    for directory in rows.baselines:
        try:
            status = RunDir(directory).status()
        except ContractError as error:
            found[f"baseline {directory.name}"] = str(error)
            continue
        if status.get("eval_gave_up"):
            found[f"baseline {directory.name}"] = status.get("eval_cause") or "no cause told"
    return found
