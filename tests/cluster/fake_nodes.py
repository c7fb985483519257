"""Run fake nodes, and let tests say what the pods on them do.

The nodes are kwok's: it writes the states of nodes and pods into the API, by the rules in
stages.yaml.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tests.cluster.api import PATHS, Json
from tests.cluster.processes import free_port, until

if TYPE_CHECKING:
    from tests.cluster.cluster import Kubernetes

STAGES = Path(__file__).parent / "stages.yaml"
GPU = "NVIDIA-H100-80GB-HBM3"  # what every node of a test says its GPUs are
# Beside a real node: only pods that tolerate it get to a fake one.
TAINT = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
FOREVER_S = 10 * 365 * 86400.0


class Fakes:
    """The fake nodes of one cluster."""

    def __init__(self, kube: Kubernetes) -> None:
        self.kube = kube
        self.made = itertools.count()

    @functools.cached_property
    def stages(self) -> dict[str, Json]:
        with open(STAGES) as file:
            return {stage["metadata"]["name"]: stage for stage in yaml.safe_load_all(file)}

    def start(self, count: int, gpus: int, tainted: bool, lease_s: int) -> None:
        """Starts kwok and makes the nodes; waits until they are Ready."""
        kind = (self.kube.binaries / "manifests" / "kwok-stages.yaml").read_bytes()
        self.kube.call("POST", PATHS["CustomResourceDefinition"], kind, kind="yaml")
        until("the API knows stages", lambda: self.kube.call("GET", PATHS["Stage"]))
        self.kube.create(*(stage for name, stage in self.stages.items() if name != "pod-waits"))
        self.kube.processes.start(
            "kwok",
            str(self.kube.binaries / "kwok"),
            f"--kubeconfig={self.kube.kubeconfig}",
            "--manage-all-nodes=false",
            "--manage-nodes-with-label-selector=type=fake",
            "--enable-crds=Stage",
            f"--server-address=127.0.0.1:{free_port()}",
            "--node-ip=10.252.0.1",
            "--cidr=10.253.0.0/16",
            f"--node-lease-duration-seconds={lease_s}",
        )
        has = {"cpu": "64", "memory": "256Gi", "pods": "1000", "nvidia.com/gpu": str(gpus)}
        for name in (f"fake-{number}" for number in range(count)):
            labels = {"type": "fake", "kubernetes.io/hostname": name, "nvidia.com/gpu.product": GPU}
            node = {
                "kind": "Node",
                "metadata": {"name": name, "labels": labels},
                "spec": {"taints": [TAINT] if tainted else []},
                "status": {"capacity": has, "allocatable": has},
            }
            self.kube.create(node)
        self.kube.processes.wait_for("kwok", lambda: self.kube.ready_nodes("type=fake") == count)

    def behave(
        self,
        *,
        namespace: str | None = None,
        labels: Mapping[str, str] | None = None,
        after_s: float | tuple[float, float] = 0.2,
        exit_code: int = 0,
        reason: str | None = None,
        message: str = "",
        share: float = 1.0,
        forever: bool = False,
        waiting: bool = False,
        stopped: bool = False,
    ) -> ExitStack:
        """Says what fake pods do, those of a namespace or (and) with these labels. A pod that runs
        keeps what it drew. To close the returned context, with `with` or close(), takes it back.

        They run `after_s` seconds (or evenly between two numbers) and end with `exit_code`, with a
        `reason` and a `message` (by default Completed or Error, and none). A `share` of them do so,
        drawn by chance, the others succeed. `forever`: they do not end by themselves. `waiting`:
        they never start, for a `reason` such as ImagePullBackOff. `stopped`: it is about pods that
        are deleted (suspended, preempted, evicted): how long they take to end, and how (by default
        at once, with 143). Where several fit, more labels win, and a namespace over none.
        """
        what = "pod-waits" if waiting else "pod-is-stopped" if stopped else "pod-ends"
        reason = reason or (
            "ImagePullBackOff" if waiting else "Error" if exit_code else "Completed"
        )
        low, high = after_s if isinstance(after_s, tuple) else (after_s, after_s)
        if forever or waiting:
            low = high = FOREVER_S if forever else 0.0
        # Weights are all that kwok ranks by: what is said more closely wins by a million to one.
        rank = 1000 * 10 ** (6 * min(len(labels or {}) + bool(namespace), 2))
        drawn = ((share, exit_code, reason, message), (1 - share, 0, "Completed", ""))
        stages: list[Json] = []
        for part, code, why, text in drawn:
            if weight := round(part * rank):
                stage = copy.deepcopy(self.stages[what])
                stage["metadata"]["name"] = f"{what}-{next(self.made)}"
                spec = stage["spec"]
                spec["weight"] = weight
                spec["delay"] = {
                    "durationMilliseconds": round(low * 1000),
                    "jitterDurationMilliseconds": round(high * 1000),
                }
                spec["selector"]["matchLabels"] = dict(labels or {})
                if namespace:
                    here = {"key": ".metadata.namespace", "operator": "In", "values": [namespace]}
                    spec["selector"]["matchExpressions"].append(here)
                spec["next"]["statusTemplate"] = told(
                    spec["next"]["statusTemplate"], code, why, text
                )
                stages.append(stage)
        self.kube.create(*stages)
        until_closed = ExitStack()
        for stage in stages:
            path = f"{PATHS['Stage']}/{stage['metadata']['name']}"
            until_closed.callback(self.kube.call, "DELETE", path)
        return until_closed


def told(template: str, code: int, reason: str, message: str) -> str:
    """A stage's template with another first line, the one that says how it ends."""
    values = {"code": code, "reason": reason, "message": message}
    first = "".join(f"{{{{ ${name} := {json.dumps(value)} }}}}" for name, value in values.items())
    return f"{first}\n{template.split(chr(10), 1)[1]}"
