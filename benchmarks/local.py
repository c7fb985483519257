"""Time the local backend on points that have nothing to do.

    python benchmarks/local.py       prints a Markdown table

The points are already trained, so a worker starts, runs the real entry point, finds the run done,
and ends. The time is the backend's, from a task's start until its end is known. The server's
imports are the real ones.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stillhouse.rundir import Runs, new_record, write_json
from stillhouse.sweep.backend import Task
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.local.workers import CUDA_DEVICE, PRELOAD, PRELOAD_WITHOUT_CUDA, WorkerPool
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Point
from stillhouse.sweep.snapshot import on_disk

POINTS = 21  # the first pays for the server
LIMIT_S = 0.5


def done_point(point: Point, runs: Path) -> Task:
    """The task of training a point that is trained."""
    run = Runs(runs).of(point.spec)
    write_json(run.spec_file, new_record(point.spec, {}))
    write_json(run.adapter / "stillhouse.json", {"id": point.id, "files": {}})
    return Task(
        Action("train", "tiny/int4", (point.id,)), (point.spec,), (run,), None, run.log_file
    )


def wait_for(backend: WorkerPool, count: int) -> None:
    while count:
        for finished in backend.wait(1.0):
            assert finished.exit_code == 0, finished
            count -= 1


def one_after_the_other(backend: WorkerPool, tasks: list[Task]) -> list[float]:
    """Seconds from each task's start until its end was known."""
    seconds: list[float] = []
    for task in tasks:
        begin = time.perf_counter()
        backend.start(task)
        wait_for(backend, 1)
        seconds.append(time.perf_counter() - begin)
    return seconds


def spawned() -> float:
    """Seconds of a process of its own that imports what the server has imported."""
    names = PRELOAD if CUDA_DEVICE.exists() else PRELOAD_WITHOUT_CUDA
    program = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        runs = Path(directory)
        sweep = load_sweep(None, ["pair=tiny", f"seeds={POINTS}"], runs)
        tasks = [done_point(point, runs) for point in sweep.points]
        backend = WorkerPool(sweep, on_disk(sweep, is_to_run=True))
        first, *others = one_after_the_other(backend, tasks)
        begin = time.perf_counter()
        for task in tasks[1:]:
            backend.start(task)
        wait_for(backend, len(tasks) - 1)
        together = (time.perf_counter() - begin) / len(others)
    alone = spawned()
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, load average"
        f" {os.getloadavg()[0]:.1f} at the end.\n"
    )
    middle, low, high = statistics.median(others), min(others), max(others)
    print("| a point that does nothing, local backend | s | limit, s |\n|---|---|---|")
    print(f"| the first: the server imports torch and its family | {first:.2f} | |")
    print(f"| each one after it, median of {len(others)} | {middle:.3f} | {LIMIT_S} |")
    print(f"| … from the quickest to the slowest | {low:.3f}–{high:.3f} | |")
    print(f"| {len(others)} started together, each | {together:.3f} | {LIMIT_S} |")
    print(f"| instead: a process of its own with the same imports | {alone:.2f} | |")
    if middle > LIMIT_S:
        sys.exit(f"a point that does nothing cost {middle:.2f} s, the limit is {LIMIT_S} s")


if __name__ == "__main__":
    main()
