"""Start a complete Kubernetes cluster in a folder of its own, and remove it again.

    with Kubernetes(binaries.ready(), fake_nodes=3) as kube:
        space = kube.namespace("demo")
        kube.behave(namespace="demo", labels={"stillhouse/point": "0123456789"}, exit_code=42)
        kube.kubectl("get", "pods", "-n", "demo")

etcd, API server, controllers and scheduler are the real ones. So is Kueue (kueue.py) and, for root
on Linux, one node that runs real pods (node.py). Fake nodes (fake_nodes.py) only report that pods
run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import keys
from tests.cluster.api import PATHS, Api, Json, Refused
from tests.cluster.fake_nodes import Fakes
from tests.cluster.kueue import Kueue
from tests.cluster.node import Node
from tests.cluster.processes import Processes, free_port, until

__all__ = ["Json", "Kubernetes", "Refused", "Space", "until"]

SERVICES = "10.251.0.0/16"  # where Services would be; there is one, the API server's, for pods
SERVICE_IP = "10.251.0.1"
# With a real node: its loss is noticed after so long, and its pods are given up after so long again
# (by default 40 s and 300 s). What a node says must hold for less than the first.
NOTICED_S, GIVEN_UP_S, LEASE_S = 12, 5, 8


@dataclass(frozen=True)
class Space:
    """A namespace that enforces Pod Security *restricted*, and the folders behind its claims."""

    name: str
    runs: Path
    cache: Path


class Kubernetes:
    """One cluster: a context manager, or `up` and `down`. Several fit beside each other. All of one
    is in `work`, a folder with a short name: the path of a socket has 100 characters at most."""

    def __init__(
        self,
        binaries: Path,
        fake_nodes: int = 1,
        real_node: bool = False,
        images: Sequence[Path] = (),
        fast: bool = True,
        kueue: bool = False,
        gpus: int = 8,
        kueue_gates: Sequence[str] = (),
    ) -> None:
        """`binaries`: see binaries.py. `images`: OCI archives for the real node. `fast`: the
        controllers may ask as often as they like (by default: 20 times a second). `gpus`: how many
        each node says it has. `kueue_gates`: feature gates of Kueue that are on."""
        self.binaries = binaries
        self.fake_nodes = fake_nodes
        self.fast = fast
        self.gpus = gpus
        self.work = Path(tempfile.mkdtemp(prefix="kube-"))
        self.work.chmod(0o711)  # pods of a real node reach their volumes through it
        self.keys = self.work / "keys"
        self.logs = self.work / "logs"
        self.logs.mkdir()
        self.kubeconfig = self.work / "kubeconfig"
        self.processes = Processes(self.work, self.logs)
        self.port = free_port()
        self.node = Node(self, images) if real_node else None
        self.host = self.node.address if self.node else "127.0.0.1"
        self.url = f"https://{self.host}:{self.port}"
        self.api = Api(self.url, self.keys)
        self.call = self.api.call
        self.create = self.api.create
        self.fakes = Fakes(self)
        self.behave = self.fakes.behave
        self.installed = Kueue(self, kueue_gates) if kueue else None

    def __enter__(self) -> Kubernetes:
        try:
            self.up()
        except BaseException:
            self.down(keep=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def kueue(self) -> Kueue:
        """Kueue, where the cluster was asked to have it."""
        assert self.installed, "Kubernetes(kueue=True) has it"
        return self.installed

    def up(self) -> None:
        """Brings everything up: about 5 s, 2 s more with a real node, 6 s more with Kueue."""
        if self.node:
            self.node.make_network(SERVICE_IP, self.port)
        self.make_keys()
        self.start_etcd()
        self.start_apiserver()
        self.start_controllers()
        if self.fake_nodes:
            lease_s = LEASE_S if self.node else 40
            self.fakes.start(self.fake_nodes, self.gpus, tainted=bool(self.node), lease_s=lease_s)
        if self.node:
            self.node.start(LEASE_S)
        if self.installed:
            self.installed.install()
            self.installed.start()

    def down(self, keep: bool = False) -> None:
        """Ends everything. Its folder goes too, unless the logs in it are to be kept."""
        self.processes.stop_all()
        if self.node:
            self.node.remove()
        if not keep:
            shutil.rmtree(self.work)

    # Its parts

    def make_keys(self) -> None:
        keys.authority(self.keys)
        called = {"127.0.0.1", self.host, SERVICE_IP}
        names = [f"IP:{address}" for address in sorted(called)]
        names += ["DNS:localhost", "DNS:kubernetes.default.svc", f"DNS:{Kueue.HOST}"]
        keys.certificate(self.keys, "server", "/CN=server", ",".join(names))
        keys.certificate(self.keys, "admin", "/O=system:masters/CN=admin")
        self.write_kubeconfig(self.kubeconfig, "admin", self.certificate("admin"))

    def certificate(self, name: str) -> Json:
        """The user entry of a kubeconfig: certificate and key."""
        paths = {"client-certificate": f"{name}.crt", "client-key": f"{name}.key"}
        return {key: str(self.keys / file) for key, file in paths.items()}

    def start_etcd(self) -> None:
        self.etcd, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self.processes.start(
            "etcd",
            str(self.binaries / "etcd"),
            "--name=test",
            f"--data-dir={self.work}/etcd",
            "--unsafe-no-fsync",
            "--quota-backend-bytes=4294967296",
            "--log-level=warn",
            f"--listen-client-urls={self.etcd}",
            f"--advertise-client-urls={self.etcd}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=test={peer}",
        )

    def start_apiserver(self) -> None:
        """Starts the API server, on the same port each time, and waits until it is ready."""
        ca, server, admin = self.keys / "ca", self.keys / "server", self.keys / "admin"
        endpoints = "lease" if self.node else "none"  # a loopback address cannot be one
        in_flight = ("--max-requests-inflight=4000", "--max-mutating-requests-inflight=2000")
        self.processes.start(
            "kube-apiserver",
            str(self.binaries / "kube-apiserver"),
            f"--etcd-servers={self.etcd}",
            f"--bind-address={self.host}",
            f"--advertise-address={self.host}",
            f"--secure-port={self.port}",
            f"--endpoint-reconciler-type={endpoints}",
            f"--service-cluster-ip-range={SERVICES}",
            f"--tls-cert-file={server}.crt",
            f"--tls-private-key-file={server}.key",
            f"--client-ca-file={ca}.crt",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={ca}.crt",
            f"--service-account-signing-key-file={ca}.key",
            f"--kubelet-certificate-authority={ca}.crt",
            f"--kubelet-client-certificate={admin}.crt",
            f"--kubelet-client-key={admin}.key",
            "--kubelet-preferred-address-types=InternalIP",
            # The way to what others serve as part of the API: Kueue, the positions in its queues.
            f"--proxy-client-cert-file={admin}.crt",
            f"--proxy-client-key-file={admin}.key",
            f"--requestheader-client-ca-file={ca}.crt",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--anonymous-auth=false",
            "--profiling=false",
            f"--default-not-ready-toleration-seconds={GIVEN_UP_S}",
            f"--default-unreachable-toleration-seconds={GIVEN_UP_S}",
            *(in_flight if self.fast else ()),
        )
        self.processes.wait_for("kube-apiserver", lambda: self.call("GET", "/readyz"))

    def stop_apiserver(self) -> None:
        """The API server's crash."""
        self.processes.stop("kube-apiserver")

    def start_controllers(self) -> None:
        common = [f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--secure-port=0"]
        syncs = ["--concurrent-job-syncs=50", "--concurrent-gc-syncs=50"] if self.fast else []
        if self.fast:
            common += ["--kube-api-qps=1000", "--kube-api-burst=2000"]
        self.processes.start(
            "kube-controller-manager",
            str(self.binaries / "kube-controller-manager"),
            *common,
            *syncs,
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={self.keys / 'ca.key'}",
            f"--root-ca-file={self.keys / 'ca.crt'}",
            "--pvclaimbinder-sync-period=1s",  # a pod waits that long for its volume; default 15 s
            f"--node-monitor-grace-period={NOTICED_S if self.node else 50}s",
        )
        scheduler = str(self.binaries / "kube-scheduler")
        self.processes.start("kube-scheduler", scheduler, *common)
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        self.processes.wait_for("kube-controller-manager", lambda: self.call("GET", account))

    def ready_nodes(self, selector: str) -> int:
        """How many of these nodes are Ready."""
        nodes = self.call("GET", f"{PATHS['Node']}?labelSelector={selector}")["items"]
        conditions = [c for node in nodes for c in node["status"].get("conditions", ())]
        return sum(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    # The real node

    def kill_node(self) -> None:
        """A power cut: nothing on the node can shut down cleanly."""
        self.processes.stop("node")

    def start_node(self) -> None:
        """It is back, as after a reboot."""
        assert self.node
        self.node.start(LEASE_S)

    def real_image(self) -> str:
        """An image NAME@sha256:... of the real node, whose `python` is the one that runs this, with
        all its packages. Stillhouse itself is not among them."""
        assert self.node
        return self.node.image

    def add_image(self, archive: Path) -> str:
        """Gives the real node an image from an OCI archive. Returns what a site calls it."""
        assert self.node
        return self.node.add_image(archive)

    # Using it

    def kubectl(self, *args: str, input: str | None = None, check: bool = True) -> str:
        """What kubectl prints, on both ways out where it need not succeed (`check`).

        Raises RuntimeError with what it said where it fails.
        """
        command = [str(self.binaries / "kubectl"), *args]
        env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        env |= {"HOME": str(self.work), "KUBECONFIG": str(self.kubeconfig)}
        done = subprocess.run(command, input=input, capture_output=True, text=True, env=env)
        if check and done.returncode:
            raise RuntimeError(f"kubectl {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout if check else done.stdout + done.stderr

    def look_again(self, namespace: str) -> None:
        """Let every controller look at the pods again; one that is gone by then needs no look."""
        words = ["annotate", "pods", "--all", "-n", namespace, "look=again", "--overwrite"]
        self.kubectl(*words, check=False)

    def events(self) -> str:
        """The latest events, to explain why a test failed."""
        said = self.kubectl("get", "events", "-A", "--request-timeout=5s", check=False)
        return "\n".join(said.splitlines()[-40:])

    def write_kubeconfig(
        self, path: Path, user: str, who: Json, namespace: str = "default"
    ) -> Path:
        """A kubeconfig with one context, named as its user."""
        server = {"server": self.url, "certificate-authority": str(self.keys / "ca.crt")}
        context = {"cluster": "test", "user": user, "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": user,
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": user, "user": who}],
            "contexts": [{"name": user, "context": context}],
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1))
        return path

    def kubeconfig_in(self, namespace: str) -> Path:
        """The administrator's kubeconfig with this as its current namespace."""
        path = self.work / f"{namespace}.kubeconfig"
        return self.write_kubeconfig(path, "admin", self.certificate("admin"), namespace)

    def kubeconfig_for(self, namespace: str, service_account: str) -> Path:
        """A kubeconfig of that account, by a token good for a day, in its namespace."""
        token = f"{PATHS['ServiceAccount'].format(namespace)}/{service_account}/token"
        answer = self.call("POST", token, {"spec": {"expirationSeconds": 86400}})
        path = self.work / f"{namespace}-{service_account}.kubeconfig"
        who = {"token": answer["status"]["token"]}
        return self.write_kubeconfig(path, service_account, who, namespace)

    def namespace(self, name: str, volumes: bool = True, accounts: bool = True) -> Space:
        """A namespace that enforces *restricted*. `volumes`: claims stillhouse-runs and -cache, on
        folders of this machine (else only their volumes are there, waiting for claims of these
        names, without a storage class). `accounts`: stillhouse-worker and stillhouse-driver."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.create({"kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        space = Space(name, *(self.work / "volumes" / name / part for part in ("runs", "cache")))
        for folder in (space.runs, space.cache):
            folder.mkdir(parents=True)
            folder.chmod(0o777)  # there is no user namespace: uid 1000 in a pod is uid 1000 here
            source, claim = volume(name, f"stillhouse-{folder.name}", folder)
            self.create(source, *([claim] if volumes else []))
        for account in ("stillhouse-worker", "stillhouse-driver") if accounts else ():
            meta = {"name": account, "namespace": name}
            self.create({"kind": "ServiceAccount", "metadata": meta})
        # A pod that names no account cannot be made before this one is there.
        default = f"{PATHS['ServiceAccount'].format(name)}/default"
        until(f"{name} has its default account", lambda: self.call("GET", default))
        return space


def volume(namespace: str, claim: str, folder: Path) -> tuple[Json, Json]:
    """A volume on a folder of this machine, and the claim that it waits for. (*restricted* refuses
    a hostPath in a pod, not in a PersistentVolume.)"""
    size = {"storage": "100Gi"}
    meant = {"namespace": namespace, "name": claim}
    shared = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    source = {
        "kind": "PersistentVolume",
        "metadata": {"name": f"{namespace}-{claim}"},
        "spec": {
            **shared,
            "capacity": size,
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", **meant},
            "hostPath": {"path": str(folder)},
        },
    }
    wanted = {**shared, "resources": {"requests": size}}
    return source, {"kind": "PersistentVolumeClaim", "metadata": meant, "spec": wanted}
