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
from stillhouse.sweep.local import logs
from stillhouse.sweep.local.outcomes import forget_failures
from stillhouse.sweep.points import Point, Sweep
from stillhouse.sweep.snapshot import Observations, Snapshot, observe, on_disk
from stillhouse.sweep.state import Observation
from stillhouse.text import say


class LocalBackend:
    """This machine, and the runs below one directory of it."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def names(self) -> list[str]:
        return registry.names(self.runs)

    def find(self, word: str) -> Sweep:
        return registry.find(word, self.runs)

    def pinned(self, sweep: Sweep, begins: bool = False) -> Sweep:
        # What lies here is what a run would take, so a plan says what it would say.
        return commits.pinned(sweep, registry.recorded_commits(self.runs, sweep.name), commits.here)

    def look(self, sweep: Sweep, is_to_run: bool = False) -> Snapshot:
        return on_disk(sweep, is_to_run)

    def describe(self, sweep: Sweep | None) -> list[str]:
        return []

    def show_logs(self, sweep: Sweep, observations: Observations, follows: bool) -> bool:
        return logs.show(sweep, observations, follows)

    def log_texts(self, sweep: Sweep, observations: Observations) -> dict[str, str]:
        return logs.texts(sweep, observations)

    def require(self, sweep: Sweep) -> None:
        require_torch()

    def save(self, sweep: Sweep) -> None:
        registry.write(sweep)

    def adopt(self, sweep: Sweep, snapshot: Snapshot) -> list[str]:
        for id_ in snapshot.of_other_code:
            _adopt_code(sweep.run(id_))
        said: list[str] = []
        for id_ in snapshot.to_begin_anew:
            run = sweep.run(id_)
            with run.lock():
                said.append(f"{sweep.by_id[id_]} begins anew; before: {run.set_aside()}")
        return said

    def executor(self, sweep: Sweep, snapshot: Snapshot) -> AbstractContextManager[Executor]:
        from stillhouse.sweep.local.workers import WorkerPool

        return nullcontext(WorkerPool(sweep, snapshot))

    def forget(self, sweep: Sweep) -> int:
        baselines = [RunDir(baseline.directory) for baseline in sweep.meant_baselines]
        given_up = [run for run in baselines if _has_given_up(run)]
        for run in [*map(sweep.run, sweep.by_id), *given_up]:
            forget_failures(run)
        return len(given_up)

    def cancel(self, sweep: Sweep) -> list[str]:
        if sweep.is_whole:
            registry.cancel(self.runs, sweep.name)  # before the points: nothing follows them
        observations = observe(sweep)
        asked = [point for point in sweep.points if _ask_to_stop(point, observations[point.id])]
        return [f"asked to save and stop: {point}" for point in asked]


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


def _ask_to_stop(point: Point, seen: Observation) -> bool:
    if seen.state != "running" or seen.pid is None:
        return False
    try:
        os.kill(seen.pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError) as error:
        say(f"  cannot stop {point}, process {seen.pid}: {error}", file=sys.stderr)
        return False
    return True
