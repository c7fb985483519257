"""Implement the backend of this machine: the files below `runs/`, and processes that write them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from stillhouse.errors import ContractError
from stillhouse.local_models import require_torch
from stillhouse.rundir import RunDir, code_identity, write_json
from stillhouse.sweep import commits, registry
from stillhouse.sweep.backend import Executor
from stillhouse.sweep.grid import Sweep
from stillhouse.sweep.local import logs
from stillhouse.sweep.local.outcomes import forget_failures
from stillhouse.sweep.registry import Roster
from stillhouse.sweep.snapshot import Observations, Snapshot, observe, on_disk
from stillhouse.sweep.state import Observation
from stillhouse.text import say


class LocalBackend:
    """This machine, and the runs below one directory of it."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def names(self) -> list[str]:
        return registry.names(self.runs)

    def find(self, word: str) -> Roster:
        return registry.find(word, self.runs)

    def pinned(self, sweep: Sweep, begins: bool = False) -> Sweep:
        # What lies here is what a run would take, so a plan says what it would say.
        return commits.pinned(sweep, registry.recorded_commits(self.runs, sweep.name), commits.here)

    def look(self, rows: Roster, sweep: Sweep | None = None) -> Snapshot:
        return on_disk(rows, sweep)

    def describe(self, rows: Roster | None) -> list[str]:
        return []

    def show_logs(self, rows: Roster, observations: Observations, follows: bool) -> bool:
        return logs.show(rows, observations, follows)

    def log_texts(self, rows: Roster, observations: Observations) -> dict[str, str]:
        return logs.texts(rows, observations)

    def require(self, sweep: Sweep, rows: Roster) -> None:
        require_torch()

    def save(self, sweep: Sweep) -> None:
        registry.write(sweep)

    def adopt(self, rows: Roster, snapshot: Snapshot) -> list[str]:
        for id_ in snapshot.of_other_code:
            _adopt_code(rows.run(id_))
        said: list[str] = []
        for id_ in snapshot.to_begin_anew:
            run = rows.run(id_)
            with run.lock():
                said.append(f"{rows.by_id[id_]} begins anew; before: {run.set_aside()}")
        return said

    def executor(
        self, sweep: Sweep, rows: Roster, snapshot: Snapshot
    ) -> AbstractContextManager[Executor]:
        from stillhouse.sweep.local.workers import WorkerPool

        return nullcontext(WorkerPool(sweep, rows, snapshot))

    def forget(self, rows: Roster, is_whole: bool) -> int:
        given_up = [RunDir(d) for d in rows.baselines if is_whole and _has_given_up(RunDir(d))]
        for run in [*(rows.run(row.id) for row in rows.rows), *given_up]:
            forget_failures(run)
        return len(given_up)

    def cancel(self, rows: Roster, is_whole: bool) -> list[str]:
        if is_whole:
            registry.cancel(self.runs, rows.name)  # before the points, so that nothing follows them
        observations = observe(rows)
        asked = [row for row in rows.rows if _ask_to_stop(row, observations[row.id])]
        return [f"asked to save and stop: {row}" for row in asked]


def _adopt_code(run: RunDir) -> None:
    """Let a run go on under the code at hand, and write down that it did.

    spec.json keeps every digest that had a part in a run: the report names mixed code.
    """
    record = run.record()
    assert record is not None, "a point drifts from the code that its record names"
    earlier = [*record.get("earlier_code", []), record["code"]]
    write_json(run.spec_file, record | {"code": code_identity(), "earlier_code": earlier})


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
