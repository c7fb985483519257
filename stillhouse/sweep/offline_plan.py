"""Plan a sweep for a cluster that cannot be reached.

Without a kubeconfig or a network, points, costs and prices are known all the same. The states are
those of the runs that `collect` fetched: a point of which nothing was fetched counts as new.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stillhouse.spec import SiteSpec
from stillhouse.sweep import commits, cost, registry, show
from stillhouse.sweep.grid import Sweep
from stillhouse.sweep.local.backend import Here
from stillhouse.sweep.plan import Baseline, Observation, observe
from stillhouse.sweep.registry import Roster

Observations = Mapping[str, Observation]


class Unasked(Here):
    """A cluster as known from what was collected; `why`: the reason it cannot be reached."""

    name = "on this cluster"

    def __init__(self, site: SiteSpec, runs: Path, why: str) -> None:
        super().__init__(runs)
        self.site, self.why = site, why

    def observe(self, rows: Roster, minds_code: bool = False) -> dict[str, Observation]:
        found = observe(rows)
        return {
            row.id: found[row.id]
            if rows.run(row.id).collected_file.exists()
            else Observation("new")
            for row in rows.rows
        }

    def pinned(self, sweep: Sweep, begins: bool = False) -> Sweep:
        # What lies on this machine is not what a pod would take.
        recorded = registry.recorded_commits(self.runs, sweep.name)
        return commits.pinned(sweep, recorded, commits.unasked)

    def baselines(self, sweep: Sweep) -> tuple[Baseline, ...]:
        return ()

    def costs(self, sweep: Sweep, observations: Observations) -> dict[str, cost.Cost]:
        left = show.still_to_train(sweep, observations)
        return cost.estimate(left, self.runs, jobs=()) if left else {}

    def forecast(self, sweep: Sweep, costs: Mapping[str, cost.Cost]) -> list[str]:
        return cost.estimate_lines(sweep.points, costs, sweep.site) if costs else []

    def remarks(self, rows: Roster | None) -> list[str]:
        return [
            f"no cluster could be asked: {self.why}",
            "  states are those of what was collected; all else counts as new",
        ]
