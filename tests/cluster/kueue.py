"""Install the real Kueue next to a control plane, and create queues.

Kueue runs as in production, including its certificates, but as a process of this machine. A
Service of type ExternalName leads the API server to localhost, so webhooks and conversions keep the
addresses that Kueue's own manifests give them.
"""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from tests.cluster.api import Json
from tests.cluster.processes import free_port

if TYPE_CHECKING:
    from tests.cluster.cluster import Kubernetes

SYSTEM = "kueue-system"
SERVICE = "kueue-webhook-service"
# On by default from Kueue 0.20: reasons of a Workload that waits have other names (stillhouse's
# sweep/cluster/kueue.py reads both).
OBSERVABILITY = "UnadmittedWorkloadsObservability"
# Webhooks of other groups are for kinds that are not installed here.
HOOKED = {"batch", "kueue.x-k8s.io"}
# A queue is asked for all that a pod asks; there is plenty of what a test does not mean to limit.
PLENTY = {"cpu": "1M", "memory": "1Ei", "ephemeral-storage": "1Ei", "nvidia.com/gpu": "1M"}


class Kueue:
    """Kueue of one cluster, and its queues."""

    HOST = f"{SERVICE}.{SYSTEM}.svc"  # what its server's certificate must be good for

    def __init__(self, kube: Kubernetes, gates: Sequence[str] = ()) -> None:
        """`gates`: feature gates that are switched on."""
        self.kube, self.gates = kube, gates
        self.folder = kube.work / "kueue"
        self.webhook, self.visibility, self.health = (free_port() for _ in range(3))

    def install(self) -> None:
        """Makes kinds, webhooks and services. No Job gets past the webhooks before `start`."""
        manifests = self.kube.binaries / "manifests"
        for path in sorted((manifests / "kueue").iterdir()):
            kind = yaml.load(path.read_text(), yaml.CSafeLoader)
            if len(kind["spec"]["versions"]) > 1:
                client = {"clientConfig": self.client("/convert")}
                hook = {**client, "conversionReviewVersions": ["v1"]}
                kind["spec"]["conversion"] = {"strategy": "Webhook", "webhook": hook}
            self.kube.create(kind)
        self.kube.create(
            {"kind": "Namespace", "metadata": {"name": SYSTEM}},
            outside(SERVICE, self.webhook),
        )
        self.make_certificate()
        for hooks in yaml.safe_load_all((manifests / "kueue-webhooks.yaml").read_text()):
            hooks["metadata"]["name"] = f"kueue-{hooks['metadata']['name']}"
            all_of_them = hooks.pop("webhooks")
            kept = [hook for hook in all_of_them if HOOKED & {*hook["rules"][0]["apiGroups"]}]
            for hook in kept:
                hook["clientConfig"] = self.client(hook["clientConfig"]["service"]["path"])
            self.kube.create({**hooks, "webhooks": kept})

    def client(self, path: str) -> Json:
        """How the API server gets to a path of Kueue's server."""
        service = {"namespace": SYSTEM, "name": SERVICE, "path": path, "port": self.webhook}
        return {"service": service}

    def make_certificate(self) -> None:
        """Kueue looks for its certificates in a Secret, and for the same ones in a folder. It takes
        over the cluster's own, and tells them to webhooks and kinds itself."""
        files = {
            "ca.crt": "ca.crt",
            "ca.key": "ca.key",
            "tls.crt": "server.crt",
            "tls.key": "server.key",
        }
        content = {name: (self.kube.keys / file).read_bytes() for name, file in files.items()}
        self.folder.mkdir()
        for name, data in content.items():
            (self.folder / name).write_bytes(data)
        meta = {"name": "kueue-webhook-server-cert", "namespace": SYSTEM}
        coded = {name: base64.b64encode(data).decode() for name, data in content.items()}
        self.kube.create({"kind": "Secret", "metadata": meta, "data": coded})

    def start(self) -> None:
        """Starts the process and waits until its webhooks answer."""
        config: Json = {
            "apiVersion": "config.kueue.x-k8s.io/v1beta2",
            "kind": "Configuration",
            "namespace": SYSTEM,
            "health": {"healthProbeBindAddress": f"127.0.0.1:{self.health}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"host": "127.0.0.1", "port": self.webhook, "certDir": str(self.folder)},
            "visibilityServer": {"bindAddress": "127.0.0.1", "bindPort": self.visibility},
            "leaderElection": {"leaderElect": False},
            "clientConnection": {"qps": 500, "burst": 1000} if self.kube.fast else {},
            "integrations": {"frameworks": ["batch/job"]},
            # As in the configuration that Kueue ships; else one worker lets go of all Jobs in turn.
            "controller": {
                "groupKindConcurrency": {"Job.batch": 5, "Workload.kueue.x-k8s.io": 5},
            },
        }
        if self.gates:
            config["featureGates"] = dict.fromkeys(self.gates, True)
        (self.folder / "config.yaml").write_text(json.dumps(config))
        program = str(self.kube.binaries / "kueue")
        flags = (f"--config={self.folder}/config.yaml", f"--kubeconfig={self.kube.kubeconfig}")
        self.kube.processes.start("kueue", program, *flags, cwd=self.folder)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def ready() -> bool:
            with opener.open(f"http://127.0.0.1:{self.health}/readyz", timeout=5) as answer:
                return answer.status == 200

        self.kube.processes.wait_for("kueue", ready)

    def stop(self) -> None:
        """Its crash. While it is gone the answer to every create of a Job is a 500."""
        self.kube.processes.stop("kueue")

    # Queues

    def queue(
        self,
        name: str,
        namespace: str,
        quota: Mapping[str, str | int],
        cohort: str | None = None,
        node_labels: Mapping[str, str] | None = None,
    ) -> None:
        """A ClusterQueue NAME with this quota of "nvidia.com/gpu", "cpu" (the rest is plenty) and a
        LocalQueue NAME of the namespace that leads to it. Higher priority preempts lower. Queues
        of one `cohort` lend one another what they do not use, and take it back. `node_labels`: of
        its flavor."""
        kind = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
        flavor = {"nodeLabels": dict(node_labels)} if node_labels else {}
        has = {resource: str(amount) for resource, amount in {**PLENTY, **quota}.items()}
        resources = [{"name": resource, "nominalQuota": amount} for resource, amount in has.items()]
        flavors = [{"name": name, "resources": resources}]
        spec: dict[str, Any] = {
            "namespaceSelector": {},
            "preemption": {"withinClusterQueue": "LowerPriority", "reclaimWithinCohort": "Any"},
            "resourceGroups": [{"coveredResources": list(has), "flavors": flavors}],
        }
        if cohort:
            spec["cohortName"] = cohort
        local = {"name": name, "namespace": namespace}
        self.kube.create(
            {**kind, "kind": "ResourceFlavor", "metadata": {"name": name}, "spec": flavor},
            {**kind, "kind": "ClusterQueue", "metadata": {"name": name}, "spec": spec},
            {**kind, "kind": "LocalQueue", "metadata": local, "spec": {"clusterQueue": name}},
        )

    def priority(self, name: str, value: int) -> None:
        """A WorkloadPriorityClass."""
        kind = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "WorkloadPriorityClass"}
        self.kube.create({**kind, "metadata": {"name": name}, "value": value, "description": ""})


def outside(name: str, port: int) -> Json:
    """A Service that is a port of this machine."""
    spec = {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]}
    return {"kind": "Service", "metadata": {"name": name, "namespace": SYSTEM}, "spec": spec}
