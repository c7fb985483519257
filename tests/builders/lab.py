"""Prepare a namespace on the fake API server in which a sweep can run."""

from __future__ import annotations

import json
from pathlib import Path

from stillhouse.rundir import Json
from tests.fakes.fake_api import FakeApi

IMAGE = "lab.example/stillhouse@sha256:" + "a1" * 32
SITE = ("--image", IMAGE)  # the site arguments of every command of a test


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
