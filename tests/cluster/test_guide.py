"""Follow docs/cluster.md command by command, as a newcomer would.

The node is real, and so is everything the commands do. Two things are replaced: the image that
`make image` would print is the node's own, and the sweeps are cut down to a minute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.api import PATHS
from tests.cluster.cluster import Kubernetes, until
from tests.cluster.desk import ROOT
from tests.test_cluster_guide import commands

pytestmark = pytest.mark.cluster

GUIDE = (ROOT / "docs" / "cluster.md").read_text()
FIRST, EVERY_DAY = GUIDE.split("## Every day")
NAMESPACE = "stillhouse"  # the guide's
VOLUMES = {"runs": "100Gi", "cache": "200Gi"}  # what k8s/storage.yaml asks for
CHEAP = {
    "pair": "tiny",
    "teacher_steps": 8,
    "student_steps": 8,
    "per_device_train_batch_size": 4,
    "max_new_tokens": 6,
    "max_steps": 6,
    "sanity_max_nll": 9,
}


class Newcomer:
    """Somebody with a checkout, kubectl and a login, who types what the guide says."""

    def __init__(self, kube: Kubernetes, folder: Path) -> None:
        self.kube, self.checkout = kube, folder / "checkout"
        for name in ("stillhouse", "conf", "k8s", "sweeps", "train.py", "eval.py"):
            put = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            self.checkout.mkdir(exist_ok=True)
            put(ROOT / name, self.checkout / name)
        login = kube.write_kubeconfig(folder / "config", "me", kube.certificate("admin"))
        programs = f"{Path(sys.executable).parent}:{kube.binaries}:{os.environ['PATH']}"
        ours = {"PATH": programs, "KUBECONFIG": str(login), "PYTHONPATH": str(self.checkout)}
        self.environment = {**os.environ, **ours, "USER": "me", "HOME": str(folder)}

    def bring_own(self) -> None:
        """Make the directory and the rows that the guide pushes."""
        model = self.checkout / "models" / "small"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        (self.checkout / "rows.jsonl").write_text('{"prompt": "How much is 2+3?"}\n')

    def type(self, line: str) -> str:
        """What a line of the guide prints; it is to succeed."""
        if line.startswith("make image"):
            return self.put_image()
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.checkout,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{line} ended with {done.returncode}:\n{done.stdout}"
        if line.startswith("kubectl create namespace"):
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            path = f"{PATHS['Namespace']}/{NAMESPACE}"
            self.kube.call("PATCH", path, {"metadata": {"labels": labels}}, "merge-patch+json")
        return done.stdout

    def put_image(self) -> str:
        """Do with the node's own image what the guide says about the one that it has built."""
        site = self.checkout / "conf" / "site" / "cluster.yaml"
        lines = site.read_text().splitlines()
        (nth,) = [n for n, line in enumerate(lines) if line.startswith("image:")]
        lines[nth] = f"image: {self.kube.real_image()}"
        site.write_text("\n".join(lines) + "\n")
        return lines[nth]

    def cut_down(self, sweep: str, **more: object) -> None:
        """Make a sweep small enough for a test; its question and its axes stay."""
        file = self.checkout / "sweeps" / f"{sweep}.yaml"
        asked = yaml.safe_load(file.read_text())
        asked["base"] |= CHEAP
        asked |= {"seeds": 1, "eval": {"suite": "tiny", "limit": 4, "pack": 15}, **more}
        file.write_text(yaml.safe_dump(asked))


@pytest.fixture
def newcomer(kube_real: Kubernetes, tmp_path: Path) -> Iterator[Newcomer]:
    """With the kind of storage that the guide's cluster has: two volumes that wait for claims."""
    for name, size in VOLUMES.items():
        folder = kube_real.work / "volumes" / NAMESPACE / name
        folder.mkdir(parents=True)
        folder.chmod(0o777)  # as an export that belongs to the pods' user
        claim = {"namespace": NAMESPACE, "name": f"stillhouse-{name}"}
        spec = {
            "capacity": {"storage": size},
            "accessModes": ["ReadWriteMany"],
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", **claim},
            "hostPath": {"path": str(folder)},
        }
        volume = {"kind": "PersistentVolume", "metadata": {"name": f"guide-{name}"}, "spec": spec}
        kube_real.create(volume)
    yield Newcomer(kube_real, tmp_path)
    kube_real.call("DELETE", f"{PATHS['Namespace']}/{NAMESPACE}")


def test_the_guide_leads_a_newcomer_to_a_first_result_and_through_every_day(newcomer: Newcomer):
    newcomer.bring_own()
    newcomer.cut_down("quickstart", compare={"by": "lmbda", "metric": "tiny_mc/acc", "baseline": 0})
    newcomer.cut_down("lmbda_beta", compare={"by": "lmbda", "metric": "tiny_mc/acc", "baseline": 0})
    said = {line: newcomer.type(line) for line in commands(FIRST)}
    (status,) = [out for line, out in said.items() if line.startswith("stillhouse status")]
    assert status.splitlines()[0] == "quickstart: 3 points: 3 done"
    report = list(said.values())[-1]
    assert "| lmbda = 0.5 |" in report and "tiny_mc/acc" in report
    assert (newcomer.checkout / "runs" / "reports" / "quickstart" / "report.html").is_file()

    said = {line: newcomer.type(line) for line in commands(EVERY_DAY)}
    (logs,) = [out for line, out in said.items() if line.startswith("stillhouse logs")]
    assert "all is done; with --point P" in logs
    (cost,) = [out for line, out in said.items() if line.endswith("--cost")]
    assert "running" in cost and "device-hours" in cost
    adapters = newcomer.checkout.glob("runs/*/adapter/adapter_model.safetensors")
    assert len(list(adapters)) == 3

    # The grid that was left in the cluster wants GPUs with more memory than this node has at all.
    def why() -> str:
        out = newcomer.type("stillhouse status lmbda_beta --backend cluster")
        return out if "no node" in out else ""

    until("its status says why it waits", why)
    assert "asked to save" in newcomer.type("stillhouse cancel lmbda_beta --backend cluster")
