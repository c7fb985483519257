"""Run one real node (containerd, runc and a kubelet) for root on Linux.

The node lives in process and mount namespaces of its own. One SIGKILL of their first process
(`main`, below) therefore acts like the loss of the machine: every pod ends, every mount goes. Pods
are containers of this machine: uid 1000 in one is uid 1000 here. Over a bridge they reach the API
server, and nothing else.

That first process runs this file alone, so the file imports no project module at its top.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.cluster.api import Json
    from tests.cluster.cluster import Kubernetes

NAME = "real-0"
# The kubelet would set these for the whole machine; it gets files of its own to write to instead.
SYSCTLS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}
# Where containerd, the network plugins and the kubelet write, whatever their configuration says.
OVERLAID = ("/run", "/var/lib", "/var/log")


class Node:
    """The real node of one cluster, and what it adds to the machine while it exists: a bridge, a
    rule of the packet filter, a folder in every cgroup hierarchy."""

    def __init__(self, kube: Kubernetes, images: Sequence[Path]) -> None:
        self.kube = kube
        self.images = list(images)
        self.folder = kube.work / "node"
        self.socket = self.folder / "containerd.sock"
        self.cgroup = kube.work.name
        self.undo: list[tuple[str, ...]] = []
        used = os.listdir("/sys/class/net")
        number = next(n for n in range(1, 255) if f"kube{n}" not in used)
        self.bridge, self.subnet = f"kube{number}", f"10.250.{number}"
        self.address = (
            f"{self.subnet}.1"  # the machine's; a kubelet refuses to be at a loopback one
        )

    def make_network(self, service_ip: str, port: int) -> None:
        """The pods' bridge, and a way from its Service's address to the API server's `port`."""
        self.undo.append(("ip", "link", "delete", self.bridge))
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.address}/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        rule = ["PREROUTING", "--in-interface", self.bridge, "--destination", service_ip]
        rule += ["--protocol", "tcp", "--dport", "443"]
        rule += ["--jump", "DNAT", "--to-destination", f"{self.address}:{port}"]
        table = ("iptables", "--wait", "--table", "nat")
        self.undo.append((*table, "--delete", *rule))
        run(*table, "--append", *rule)

    def start(self, lease_s: int) -> None:
        """Starts the node, for the first time or as after a power cut, and waits until it is Ready.
        Its lease lasts `lease_s` seconds."""
        if not self.folder.exists():
            self.prepare(lease_s)
        for root in cgroup_roots():
            (root / self.cgroup).mkdir(exist_ok=True)
            if root.name == "cpuset":  # a new one of version 1 may use nothing
                for name in ("cpuset.cpus", "cpuset.mems"):
                    (root / self.cgroup / name).write_text((root / name).read_text())
        for gone in ("overlays", "containerd-run", "addresses"):
            shutil.rmtree(self.folder / gone, ignore_errors=True)
        namespaces = ("--pid", "--mount", "--fork", "--mount-proc", "--kill-child=SIGKILL")
        init = (sys.executable, "-I", __file__, str(self.folder))
        self.kube.processes.start("node", "unshare", *namespaces, *init)
        self.kube.processes.wait_for("node", lambda: self.kube.ready_nodes("type=real") == 1)
        # GPUs as a fake node has them: who asks for one gets in, and computes on the CPU.
        has = {"nvidia.com/gpu": str(self.kube.gpus)}
        status = {"status": {"capacity": has, "allocatable": has}}
        self.kube.call("PATCH", f"/api/v1/nodes/{NAME}/status", status, kind="merge-patch+json")

    def remove(self) -> None:
        """Removes what the node added to the machine; its processes must be stopped already."""
        for command in reversed(self.undo):
            subprocess.run(command, capture_output=True)
        for root in cgroup_roots():
            remove_cgroup(root / self.cgroup)

    def add_image(self, archive: Path) -> str:
        """Imports an OCI archive of one image while the node runs. Returns what to call it."""
        from tests.cluster import image

        run(*import_command(str(self.socket), image.NAME, str(archive)))
        return image.reference(archive)

    # Configuration

    def prepare(self, lease_s: int) -> None:
        from tests.cluster import fake_nodes, image, keys

        for folder in ("network", "plugins", "logs"):
            (self.folder / folder).mkdir(parents=True)
        names = f"IP:{self.address},DNS:{NAME}"
        keys.certificate(self.kube.keys, "node", f"/O=system:nodes/CN=system:node:{NAME}", names)
        who = self.kube.certificate("node")
        config = self.kube.write_kubeconfig(self.folder / "kubeconfig", "node", who)
        files = {"pause": (self.kube.binaries / "pause").read_bytes()}
        pause = image.write(self.folder / "pause.tar", files, Entrypoint=["/pause"])
        self.image = machine_image(self.folder / "machine.tar")
        self.images += [self.folder / "pause.tar", self.folder / "machine.tar"]
        (self.folder / "network" / "pods.conflist").write_text(json.dumps(self.network()))
        (self.folder / "containerd.toml").write_text(self.containerd(pause))
        (self.folder / "kubelet.yaml").write_text(json.dumps(self.kubelet(lease_s)))
        plan = {
            "socket": str(self.socket),
            "images": [str(path) for path in self.images],
            "name": image.NAME,
            "mounts": machine_mounts(),
            "containerd": ["containerd", f"--config={self.folder}/containerd.toml"],
            "kubelet": [
                str(self.kube.binaries / "kubelet"),
                f"--config={self.folder}/kubelet.yaml",
                f"--kubeconfig={config}",
                f"--hostname-override={NAME}",
                f"--node-ip={self.address}",
                f"--root-dir={self.folder}/kubelet",
                f"--cert-dir={self.folder}/certificates",
                f"--node-labels=type=real,nvidia.com/gpu.product={fake_nodes.GPU}",
            ],
        }
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def network(self) -> Json:
        """What the CNI plugins are told: addresses, a route to Services, and no way out."""
        addresses = {
            "type": "host-local",
            "dataDir": str(self.folder / "addresses"),
            "ranges": [[{"subnet": f"{self.subnet}.0/24", "rangeStart": f"{self.subnet}.10"}]],
            "routes": [{"dst": "10.251.0.0/16", "gw": self.address}],
        }
        bridge = {"type": "bridge", "bridge": self.bridge, "isGateway": False, "ipMasq": False}
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": [{**bridge, "ipam": addresses}]}

    def containerd(self, pause: str) -> str:
        """Its configuration; `pause` is the image of a pod's first container."""
        plugins = next(p for p in ("/usr/lib/cni", "/opt/cni/bin") if Path(p, "bridge").exists())
        absent = ["snapshotter.v1." + name for name in ("aufs", "btrfs", "devmapper", "zfs")]
        absent += ["internal.v1.opt", "internal.v1.tracing", "tracing.processor.v1.otlp"]
        return f"""
version = 2
root = "{self.folder}/containerd"
state = "{self.folder}/containerd-run"
disabled_plugins = {json.dumps(["io.containerd." + name for name in absent])}
[grpc]
address = "{self.socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true  # where root lacks CAP_SYS_RESOURCE no container starts without it
disable_apparmor = true
disable_hugetlb_controller = true
netns_mounts_under_state_dir = true
stream_server_address = "127.0.0.1"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{self.folder}/network"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
base_runtime_spec = "{self.folder}/container.json"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"""

    def kubelet(self, lease_s: int) -> Json:
        """Its configuration."""
        ca, own = self.kube.keys / "ca.crt", self.kube.keys / "node"
        disk = ("nodefs.available", "imagefs.available", "nodefs.inodesFree", "imagefs.inodesFree")
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "readOnlyPort": 0,
            "healthzPort": 0,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(ca)},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": f"{own}.crt",
            "tlsPrivateKeyFile": f"{own}.key",
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "podLogsDir": str(self.folder / "logs"),
            "volumePluginDir": str(self.folder / "plugins"),
            "resolvConf": "",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "featureGates": {"KubeletInUserNamespace": True},  # forgives what a container lacks
            "oomScoreAdj": 0,
            "maxOpenFiles": 20000,
            # A full disk must not matter here, and a garbage-collected image would be lost.
            "localStorageCapacityIsolation": False,
            "evictionHard": {"memory.available": "50Mi", **dict.fromkeys(disk, "0%")},
            "imageGCHighThresholdPercent": 100,
            "nodeLeaseDurationSeconds": lease_s,
            "nodeStatusUpdateFrequency": "5s",
        }


# Not where it is here: a checkout below /tmp would be hidden by the /tmp that every pod gets.
VENV = "/host/venv"


def machine_image(archive: Path) -> str:
    """An image that is this machine's own /usr and Python (machine_mounts), and little else."""
    from tests.cluster import image

    links = {"usr": "host/usr", **{name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")}}
    cache = Path("/etc/ld.so.cache")
    files = {"etc/ld.so.cache": cache.read_bytes()} if cache.exists() else {}
    path = f"PATH={VENV}/bin:/usr/local/bin:/usr/bin:/bin"
    return image.write(archive, files, links, ("etc", "host", "tmp"), Env=[path])


def machine_mounts() -> list[Json]:
    """What every container of the node finds, read-only, besides its image: /usr, as /host/usr so
    that it hides no image's own, and the environment that runs this, with its interpreter."""
    interpreters = {sys.base_prefix, os.path.realpath(sys.base_prefix)}
    interpreters.add(str(Path(os.path.realpath(sys.executable)).parent.parent))
    places = {"/host/usr": "/usr", VENV: sys.prefix, **{path: path for path in interpreters}}
    return [
        {"destination": inside, "source": here, "type": "bind", "options": ["rbind", "ro"]}
        for inside, here in sorted(places.items())
        if not inside.startswith("/usr")
    ]


def run(*command: str) -> str:
    """What a command prints. Raises RuntimeError with that where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout.strip()}")
    return done.stdout


def import_command(socket: str, name: str, archive: str) -> list[str]:
    """Imports an archive; its image is called NAME@sha256:..., which needs no registry."""
    ctr = ["ctr", "--address", socket, "--namespace", "k8s.io"]
    return [*ctr, "images", "import", "--digests", "--base-name", name, archive]


def cgroup_roots() -> list[Path]:
    """Where hierarchies are mounted: one of version 2, many of version 1, or both kinds."""
    with open("/proc/self/mounts") as file:
        mounts = [line.split() for line in file]
    return [Path(mount[1]) for mount in mounts if mount[2] in ("cgroup", "cgroup2")]


def remove_cgroup(top: Path) -> None:
    for folder in sorted((path for path in (top, *top.rglob("*")) if path.is_dir()), reverse=True):
        for _ in range(100):  # busy for a moment after its last process
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                time.sleep(0.05)
                continue
            break


def main(folder: Path) -> None:
    """The first process of the node's namespaces: starts the others and reaps orphans."""
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    for number, place in enumerate(OVERLAID):
        upper, work = (folder / "overlays" / f"{kind}-{number}" for kind in ("upper", "work"))
        for path in (upper, work):
            path.mkdir(parents=True)
        layers = f"lowerdir={place},upperdir={upper},workdir={work}"
        run("mount", "-t", "overlay", "-o", layers, "none", place)
    for name, value in SYSCTLS.items():
        real, ours = Path("/proc/sys", name), folder / name.replace("/", ".")
        if real.exists():
            ours.write_text(f"{value}\n")
            run("mount", "--bind", str(ours), str(real))
    container = json.loads(run("ctr", "oci", "spec"))
    container["mounts"] += plan["mounts"]
    (folder / "container.json").write_text(json.dumps(container))

    def begin(name: str) -> int:
        with open(folder.parent / "logs" / f"{name}.log", "ab") as log:
            program = subprocess.Popen(plan[name], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return program.pid

    programs = {begin("containerd"): "containerd"}
    ready = ("ctr", "--address", plan["socket"], "version")
    while subprocess.run(ready, capture_output=True).returncode:
        time.sleep(0.05)
    for archive in plan["images"]:
        run(*import_command(plan["socket"], plan["name"], archive))
    programs[begin("kubelet")] = "kubelet"
    while True:
        pid, status = os.wait()
        if pid in programs:
            sys.exit(f"{programs[pid]} ended: {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
