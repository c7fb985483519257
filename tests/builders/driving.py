"""Drive a sweep over the fake API server, and play the cluster behind it.

A `World` ends Jobs as a script says. Drivers start and stop; each connects through a port of its
own (`Door`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from stillhouse.sweep.cluster.connect import Cluster, connect
from stillhouse.sweep.cluster.jobs import JobExecutor
from stillhouse.sweep.cluster.ledger import write_sweep
from stillhouse.sweep.cluster.watch import Watcher
from stillhouse.sweep.driver import Driver
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.progress import Lines
from stillhouse.sweep.registry import record_of
from tests.fakes.fake_api import FakeApi
from tests.fakes.faults import Faults

IMAGE = f"image=lab/stillhouse@sha256:{'1' * 64}"
POISON = json.dumps({"exit_code": 42, "cause": "ConfigError: no", "tail": "the last line"})
EVICTED = json.dumps({"exit_code": 85, "cause": "Interrupted: saved at step 7", "tail": ""})


_LOGIN = threading.Lock()  # the environment is one for all threads


@functools.cache
def sweep_of(points: int = 4, *more: str) -> Sweep:
    """A sweep of the tiny pair at the site `cluster`: one group, packs of two."""
    lmbdas = ",".join(str(i / 8) for i in range(points))
    words = ["pair=tiny", f"lmbda={lmbdas}", "max_parallel=3", IMAGE, *more]
    sweep = load_sweep(None, words, Path("/nowhere/runs"), site="cluster")
    return dataclasses.replace(sweep, name="s", pack=2)


def ids(sweep: Sweep) -> list[str]:
    return [point.id for point in sweep.points]


@contextlib.contextmanager
def cluster_of(fake: Any, path: Path, namespace: str | None = None) -> Iterator[Cluster]:
    """A client of a server, or of one of its ports (`Door`)."""
    with _LOGIN, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(fake.kubeconfig(path)))
        cluster = connect(None, namespace)
    cluster.first_delay_s, cluster.longest_delay_s = 0.001, 0.01
    with contextlib.closing(cluster):
        yield cluster


@contextlib.contextmanager
def backend_of(cluster: Cluster, sweep: Sweep, **how: float) -> Iterator[JobExecutor]:
    """A backend of it, as `run` makes one."""
    write_sweep(cluster, record_of(sweep))
    watcher = Watcher(cluster, sweep.site.runs_claim)
    backend = JobExecutor(sweep, watcher)
    for name, seconds in how.items():  # keep_s, write_s, retry_s, blocked_s
        setattr(backend, name, seconds)
    with contextlib.closing(backend):
        yield backend


def drive(cluster: Cluster, sweep: Sweep, **how: float) -> int:
    """The loop, to its end."""
    with backend_of(cluster, sweep, **how) as backend:
        return Driver(sweep, backend, Lines(sweep, [].append)).run()


class World:
    """Ends Jobs step by step. `script`: part of a Job's name -> what happens to its pods, in order.

    complete; poison (42, the Job fails); crash (1, it goes on); evicted (85, it goes on);
    give-up (1, the Job fails); rows (42, the Job fails: of its first member, all others are
    scored); death (137, the Job fails: its first member was at work). The default is complete.
    """

    def __init__(self, fake: FakeApi, script: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self.fake, self.script = fake, dict(script or {})
        self.ended: Counter[str] = Counter()  # name of the Job -> how often one of it ended
        self._pods: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> World:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self.step()

    def step(self) -> None:
        """One thing happens to each unfinished Job: its pod starts, or ends."""
        with self.fake.store.changed:
            for job in self.fake.all("jobs"):
                if not is_over(job) and "deletionTimestamp" not in job["metadata"]:
                    self._move(job["metadata"]["name"], job.get("status", {}))

    def _move(self, name: str, status: dict[str, Any]) -> None:
        if not status.get("ready"):
            self.fake.run_pod(name)
            return
        what = self._next(name)
        if what == "complete":
            self.fake.complete(name)
        elif what == "poison":
            self.fake.fail(name, 42, POISON)
        elif what == "give-up":
            self.fake.fail(name, 1, ends="BackoffLimitExceeded")
        elif what == "rows":
            self.fake.fail(name, 42, self._of_rows(name, 42, "ContractError: NaN"))
        elif what == "death":
            words = self._of_rows(name, 137, "killed by SIGKILL, while it was scored", is_all=False)
            self.fake.fail(name, 137, words, ends="BackoffLimitExceeded")
        elif what == "evicted":
            self.fake.disrupt(name, exit_code=85, message=EVICTED)
        else:
            self.fake.fail(name, 1, ends=None)
        self.ended[name] += what not in ("crash", "evicted")

    def _of_rows(self, name: str, code: int, cause: str, is_all: bool = True) -> str:
        """What an evaluation's pod says whose first point failed, and all others did not."""
        job = self.fake.get("jobs", name) or {}
        notes = job["metadata"]["annotations"]
        points = notes["stillhouse/points"].split(",")
        others = [*points[1:], *filter(None, notes.get("stillhouse/baselines", "").split(","))]
        said = {"exit_code": code, "cause": "see its rows", "failed": {points[0]: [code, cause]}}
        return json.dumps(said | ({"done": ",".join(others)} if is_all else {}))

    def _next(self, name: str) -> str:
        script = next((s for key, s in self.script.items() if key in name), ())
        nth = self._pods[name]
        self._pods[name] += 1
        return script[nth] if nth < len(script) else "complete"


def is_over(job: Mapping[str, Any]) -> bool:
    conditions = job.get("status", {}).get("conditions") or ()
    return any(c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in conditions)


def launch(kubeconfig: str, points: int) -> None:
    """Run a driver as a process of its own, which a test can kill."""
    os.environ["KUBECONFIG"] = kubeconfig
    with contextlib.closing(connect(None, None)) as cluster:
        sys.exit(drive(cluster, sweep_of(points)))


def start_driver(kubeconfig: Path, points: int) -> subprocess.Popen[bytes]:
    program = f"from tests.builders import driving; driving.launch({str(kubeconfig)!r}, {points})"
    return subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Wait until something is so; a test that waits for longer has failed."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def until_told(backend: JobExecutor, condition: Callable[[], object]) -> None:
    """Let a backend take in news until something is so; what ended meanwhile is not asked for."""
    until(lambda: (backend.wait(0.01), condition())[1])


__all__ = ["Faults", "FakeApi"]
