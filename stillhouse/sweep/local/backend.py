"""Implement the backend of this machine: the files below `runs/`, and processes that write them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

from stillhouse.errors import ContractError
from stillhouse.local_models import require_libraries
from stillhouse.rundir import RunDir, code_identity, make_directory, write_json
from stillhouse.sweep import commits, registry
from stillhouse.sweep.backend import Executor
from stillhouse.sweep.local.outcomes import forget_failures
from stillhouse.sweep.points import Point, Sweep
from stillhouse.sweep.registry import log_file
from stillhouse.sweep.show import SHOWN, TAIL_LINES
from stillhouse.sweep.snapshot import Observations, Snapshot, observe, on_disk
from stillhouse.sweep.state import FAILED, Observation
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
        shown: dict[Path, int] = {}
        while True:
            for title, path in _of_interest(sweep, observations):
                _show_new(title, path, shown, len(sweep.points) == 1)
            states = {seen.state for seen in observations.values()}
            if not follows or not states & {"new", "waiting", "running"}:
                return bool(shown)
            time.sleep(FOLLOW_S)
            observations = observe(sweep)

    def log_texts(self, sweep: Sweep, observations: Observations) -> dict[str, str]:
        ids = {sweep.run(point.id).log_file: point.id for point in sweep.points}
        found: dict[str, str] = {}
        for _, path in _of_interest(sweep, observations):
            if path in ids and path.is_file():
                lines = path.read_text(errors="replace").splitlines()
                lines = lines if len(sweep.points) == 1 else lines[-TAIL_LINES:]
                found[ids[path]] = "\n".join(lines)
        return found

    def require(self, sweep: Sweep) -> None:
        require_libraries(point.spec for point in sweep.points)
        cache_dir = Path(sweep.points[0].spec.place.cache_dir)
        if not cache_dir.is_dir():  # one that is full of prepared pairs may be read-only
            make_directory(cache_dir, "--cache-dir")

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

        return WorkerPool(sweep, snapshot)

    def forget(self, sweep: Sweep) -> int:
        baselines = [RunDir(baseline.directory) for baseline in sweep.meant_baselines]
        failed = [run for run in baselines if _has_given_up(run)]
        for run in [*map(sweep.run, sweep.by_id), *failed]:
            forget_failures(run)
        return len(failed)

    def cancel(self, sweep: Sweep) -> list[str]:
        if sweep.is_whole:
            registry.cancel(self.runs, sweep.name)  # before the points: nothing follows them
        observations = observe(sweep)
        stopping = [point for point in sweep.points if _ask_to_stop(point, observations[point.id])]
        return [f"asked to save and stop: {point}" for point in stopping]


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


# ------------------------------------------------------------------------------------------- logs


FOLLOW_S = 0.3  # how often a followed log is looked at


def _of_interest(sweep: Sweep, observations: Observations) -> list[tuple[str, Path]]:
    if len(sweep.points) == 1:
        return [(str(sweep.points[0]), sweep.run(sweep.points[0].id).log_file)]
    at_work = [
        point for point in sweep.points if observations[point.id].state in ("running", *FAILED)
    ]
    found = [(str(point), sweep.run(point.id).log_file) for point in at_work[-SHOWN:]]
    return [*found, (f"{sweep.name}: pairs and scores", log_file(sweep.runs, sweep.name))]


def _show_new(title: str, path: Path, shown: dict[Path, int], is_single: bool) -> None:
    """Print what a log has that was not shown yet, under its name where there are several."""
    if not path.is_file() or path.stat().st_size == shown.get(path, 0):
        return
    with path.open("rb") as file:
        file.seek(shown.get(path, 0))
        new = file.read()
    lines = new.decode(errors="replace").splitlines()
    if not is_single:
        say(f"==> {title} <==")
        lines = lines if path in shown else lines[-TAIL_LINES:]
    say("\n".join(lines), flush=True)
    shown[path] = shown.get(path, 0) + len(new)
