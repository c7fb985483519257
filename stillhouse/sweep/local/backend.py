"""Answer the verbs' questions for this machine, from the files below `runs/`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from stillhouse.errors import ContractError
from stillhouse.local_models import require_torch
from stillhouse.rundir import RunDir
from stillhouse.sweep import commits, cost, registry, show, spending
from stillhouse.sweep.backend import Observations
from stillhouse.sweep.driver import Backend, adopt_code
from stillhouse.sweep.grid import Sweep
from stillhouse.sweep.local import logs
from stillhouse.sweep.local.outcomes import forget_failures
from stillhouse.sweep.plan import Baseline, Observation, baselines_of, groups_of, observe
from stillhouse.sweep.registry import Roster
from stillhouse.text import say


class Here:
    """This machine, and the runs below one directory of it."""

    name = "here"
    parting = "stopped before the end; the same command goes on from here"
    again = "`stillhouse run`"
    has_files = True

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def homeward(self, name: str) -> str:
        return ""

    def trouble(self) -> str:
        return ""

    def names(self) -> list[str]:
        return registry.names(self.runs)

    def find(self, word: str) -> Roster:
        return registry.find(word, self.runs)

    def observe(self, rows: Roster, minds_code: bool = False) -> dict[str, Observation]:
        return observe(rows)  # what lies on disk says whose code it is, to whoever looks

    def baselines(self, sweep: Sweep) -> tuple[Baseline, ...]:
        return baselines_of(sweep, groups_of(sweep))

    def given_up(self, rows: Roster) -> dict[str, str]:
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

    def pinned(self, sweep: Sweep, begins: bool = False) -> Sweep:
        # What lies here is what a run would take, so a plan says what it would say.
        return commits.pinned(sweep, registry.recorded_commits(self.runs, sweep.name), commits.here)

    def drifted_rows(self, sweep: Sweep) -> list[str]:
        return [
            f"baseline {one.directory.name}: {'; '.join(one.rests_on_other)}; to be scored anew"
            for one in self.baselines(sweep)
            if one.rests_on_other
        ]

    def begin_anew(self, rows: Roster, ids: Sequence[str]) -> list[str]:
        said: list[str] = []
        for id_ in ids:
            run = rows.run(id_)
            with run.lock():
                said.append(f"{rows.by_id[id_]} begins anew; before: {run.set_aside()}")
        return said

    def remarks(self, rows: Roster | None) -> list[str]:
        return []

    def costs(self, sweep: Sweep, observations: Observations) -> dict[str, cost.Cost]:
        left = show.still_to_train(sweep, observations)
        return cost.estimate(left, self.runs) if left else {}

    def forecast(self, sweep: Sweep, costs: Mapping[str, cost.Cost]) -> list[str]:
        return show.estimate(sweep, costs)

    def spent(self, rows: Roster) -> spending.Spent:
        return spending.spent(rows, {})

    def show_logs(self, rows: Roster, follows: bool) -> bool:
        return logs.show(rows, follows)

    def log_texts(self, rows: Roster) -> dict[str, str]:
        return logs.texts(rows)

    def require(self, sweep: Sweep, rows: Roster) -> None:
        require_torch()

    def write(self, sweep: Sweep) -> None:
        registry.write(sweep)

    def adopt_code(self, rows: Roster, observations: Observations) -> None:
        adopt_code(rows, observations)

    def backend(self, sweep: Sweep, rows: Roster) -> AbstractContextManager[Backend]:
        from stillhouse.sweep.local.workers import LocalBackend

        return nullcontext(LocalBackend(sweep, rows))

    def forget(self, rows: Roster, is_whole: bool) -> int:
        for row in rows.rows:
            forget_failures(rows.run(row.id))
        if not is_whole:
            return 0
        given_up = [d for d in rows.baselines if _has_given_up(RunDir(d))]
        for directory in given_up:
            forget_failures(RunDir(directory))
        return len(given_up)

    def cancel(self, rows: Roster, is_whole: bool) -> list[str]:
        if is_whole:
            registry.cancel(self.runs, rows.name)  # before the points, so that nothing follows them
        observations = observe(rows)
        asked = [row for row in rows.rows if _ask_to_stop(row, observations[row.id])]
        return [f"asked to save and stop: {row}" for row in asked]


def _has_given_up(run: RunDir) -> bool:
    with contextlib.suppress(ContractError):  # `status` names it, and nobody can take it back
        return bool(run.status().get("eval_gave_up"))
    return False


def _ask_to_stop(row: registry.Row, seen: Observation) -> bool:
    if seen.state != "running" or seen.pid is None:
        return False
    try:
        os.kill(seen.pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError) as error:
        say(f"  cannot stop {row}, process {seen.pid}: {error}", file=sys.stderr)
        return False
    return True
