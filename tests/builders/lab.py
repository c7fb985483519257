"""Prepare a namespace on the fake API server in which a sweep can run."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from stillhouse.rundir import Json
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep
from tests.fakes.fake_api import FakeApi

IMAGE = "lab.example/stillhouse@sha256:" + "a1" * 32
SITE = ("--image", IMAGE)  # the site arguments of every command of a test
GRID = ("pair=tiny", "lmbda=0,0.5", "seeds=2")
CLUSTER = ("--backend", "cluster")
TAIL = "step 6\nstep 7"  # what points that fail printed last


def furnish(fake: FakeApi) -> FakeApi:
    """Give the namespace the volumes and accounts that a sweep needs."""
    for name in ("stillhouse-runs", "stillhouse-cache"):
        fake.put("persistentvolumeclaims", _claim(name))
    for name in ("stillhouse-worker", "stillhouse-driver"):
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}
        fake.put("serviceaccounts", account)
    return fake


def _claim(name: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
        "status": {"phase": "Bound"},
    }


def said(exit_code: int, cause: str, tail: str = "") -> str:
    """A termination message as our pods write it."""
    return json.dumps({"exit_code": exit_code, "cause": cause, "tail": tail})


def kubeconfig(fake: FakeApi, folder: Path) -> Path:
    return fake.kubeconfig(folder / "kubeconfig")


def grid(runs: Path = Path("runs"), *more: str) -> Sweep:
    """Four points."""
    return load_sweep(None, [*GRID, *SITE, *more], runs, "cluster")


def train(name: str, *words: str) -> tuple[str, ...]:
    """What a line of k8s/train.sh comes to."""
    return ("train", name, "--pair", "tiny", *words, *SITE)


def only(fake: FakeApi, kind: str = "train") -> str:
    """The name of the one Job of a kind."""
    (job,) = fake.all("jobs", f"stillhouse/kind={kind}")
    return job["metadata"]["name"]


def finish(fake: FakeApi, until: threading.Event, exit_codes: dict[str, int] | None = None) -> None:
    """Do what a cluster does: every Job that comes runs and ends."""
    while not until.is_set():
        for job in fake.all("jobs"):
            meta, conditions = job["metadata"], job.get("status", {}).get("conditions") or ()
            if any(c["type"] in ("Complete", "Failed") for c in conditions):
                continue
            code = (exit_codes or {}).get(meta["labels"].get("stillhouse/point", ""), 0)
            try:
                if code:
                    fake.fail(
                        meta["name"], exit_code=code, message=said(code, "as it was told to", TAIL)
                    )
                else:
                    fake.complete(meta["name"])
            except KeyError:  # it was deleted while we looked
                continue
        until.wait(0.02)
