"""Test the clusters that the other tests of this folder run on."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Json, Kubernetes, Refused, Space, until

pytestmark = pytest.mark.cluster

JOB: Json = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "", "namespace": "", "labels": {}},
    "spec": {
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "template": {
            "metadata": {"labels": {}},
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 5,
                "dnsPolicy": "Default",
                "nodeSelector": {"type": "fake"},
                "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}],
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 1000,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "main",
                        "image": "nowhere.invalid/none:1",
                        "imagePullPolicy": "IfNotPresent",
                        "resources": {"requests": {"cpu": "10m"}, "limits": {"nvidia.com/gpu": 1}},
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "readOnlyRootFilesystem": True,
                            "capabilities": {"drop": ["ALL"]},
                        },
                    }
                ],
            },
        },
    },
}


def job(space: Space, name: str, labels: Json | None = None, **spec: Any) -> Json:
    """A Job of one pod; `labels` are the Job's and the pod's."""
    made = copy.deepcopy(JOB)
    made["metadata"] = {"name": name, "namespace": space.name, "labels": labels or {}}
    made["spec"]["template"]["metadata"]["labels"] = {"job": name, **(labels or {})}
    made["spec"] |= spec
    return made


def real_job(kube: Kubernetes, space: Space, name: str, code: str, **spec: Any) -> Json:
    """A Job that runs Python code on the real node; /runs is the claim, /tmp may be written to."""
    made = job(space, name, **spec)
    pod = made["spec"]["template"]["spec"]
    pod["nodeSelector"] = {"type": "real"}
    claim = {"persistentVolumeClaim": {"claimName": "stillhouse-runs"}}
    pod["volumes"] = [{"name": "runs", **claim}, {"name": "tmp", "emptyDir": {}}]
    mounts = [{"name": name, "mountPath": f"/{name}"} for name in ("runs", "tmp")]
    running = {
        "image": kube.real_image(),
        "command": ["python", "-uc", code],
        "volumeMounts": mounts,
    }
    pod["containers"][0] |= running
    return made


def status(kube: Kubernetes, space: Space, name: str) -> Json:
    return kube.call("GET", f"/apis/batch/v1/namespaces/{space.name}/jobs/{name}")["status"]


def outcome(kube: Kubernetes, space: Space, name: str, timeout_s: float = 60) -> Json:
    """The Job's condition Complete or Failed."""

    def ended() -> list[Json]:
        conditions = status(kube, space, name).get("conditions", [])
        return [
            c for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"
        ]

    return until(f"{name} has ended", ended, timeout_s)[0]


def pods(kube: Kubernetes, space: Space, name: str) -> list[Json]:
    return kube.call("GET", f"/api/v1/namespaces/{space.name}/pods?labelSelector=job={name}")[
        "items"
    ]


def terminated(pod: Json) -> Json:
    return pod["status"]["containerStatuses"][0]["state"]["terminated"]


def test_a_job_on_a_fake_node_completes(kube: Kubernetes):
    space = kube.namespace("completes")
    kube.create(job(space, "fine"))
    assert outcome(kube, space, "fine")["type"] == "Complete"


def test_a_fake_pod_does_what_it_was_told(kube: Kubernetes):
    space = kube.namespace("told")
    said = '{"exit_code": 42, "cause": "no such \\"pair\\""}'
    kube.behave(namespace="told", forever=True)
    kube.behave(namespace="told", labels={"p": "poison"}, exit_code=42, message=said)
    kube.behave(namespace="told", labels={"p": "big"}, exit_code=137, reason="OOMKilled")
    kube.behave(namespace="told", labels={"p": "image"}, waiting=True, message="not found")
    names = ("poison", "big", "image", "long")
    kube.create(*(job(space, name, {"p": name}) for name in names))
    assert outcome(kube, space, "poison")["reason"] == "BackoffLimitExceeded"
    outcome(kube, space, "big")
    ends = [terminated(pods(kube, space, name)[0]) for name in ("poison", "big")]
    assert [(end["exitCode"], end["reason"]) for end in ends] == [(42, "Error"), (137, "OOMKilled")]
    assert ends[0]["message"] == said

    def reason() -> str:
        return pods(kube, space, "image")[0]["status"]["containerStatuses"][0]["state"]["waiting"][
            "reason"
        ]

    assert until("the image is not there", reason) == "ImagePullBackOff"
    until("the last one runs", lambda: pods(kube, space, "long")[0]["status"]["phase"] == "Running")


def test_a_fake_pod_that_is_suspended_ends_as_told_and_goes_on_later(kube: Kubernetes):
    space = kube.namespace("stopped")
    path = "/apis/batch/v1/namespaces/stopped/jobs/long"
    rules = [{"action": "Ignore", "onExitCodes": {"operator": "In", "values": [85]}}]
    with kube.behave(namespace="stopped", forever=True):
        kube.behave(namespace="stopped", stopped=True, exit_code=85)
        kube.create(job(space, "long", podFailurePolicy={"rules": rules}))
        until("it runs", lambda: status(kube, space, "long").get("ready"))
        kube.call("PATCH", path, {"spec": {"suspend": True}}, kind="merge-patch+json")
        until("its pod is gone", lambda: not pods(kube, space, "long"))
    kube.call("PATCH", path, {"spec": {"suspend": False}}, kind="merge-patch+json")
    assert outcome(kube, space, "long")["type"] == "Complete"
    assert not status(kube, space, "long").get("failed")


def test_a_share_of_fake_pods_fails(kube: Kubernetes):
    space = kube.namespace("share")
    kube.behave(namespace="share", share=0.5, exit_code=1, after_s=(0.0, 0.2))
    many = {"completions": 60, "parallelism": 60, "completionMode": "Indexed"}
    kube.create(job(space, "many", **many, backoffLimitPerIndex=0, backoffLimit=1000))
    outcome(kube, space, "many")
    assert 10 <= status(kube, space, "many")["failed"] <= 50  # of 60, a coin tossed for each


def test_restricted_refuses_a_pod_that_asks_for_more(kube: Kubernetes):
    space = kube.namespace("refuses")
    bad = job(space, "root")["spec"]["template"]
    bad |= {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"name": "root", "namespace": space.name},
    }
    bad["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(Refused, match="violates PodSecurity"):
        kube.create(bad)


def test_an_account_may_do_nothing_until_a_role_says_so(kube: Kubernetes):
    kube.namespace("account")
    config = f"--kubeconfig={kube.kubeconfig_for('account', 'stillhouse-driver')}"
    assert "forbidden" in kube.kubectl(config, "get", "jobs", check=False)
    asked = ("create", "rolebinding", "edit", "--clusterrole=edit", "-n", "account")
    kube.kubectl(*asked, "--serviceaccount=account:stillhouse-driver")
    assert "No resources found" in kube.kubectl(config, "get", "jobs", check=False)


def test_the_api_server_restarts_and_knows_what_it_knew(kube: Kubernetes):
    space = kube.namespace("restart")
    kube.behave(namespace="restart", after_s=1)
    kube.create(job(space, "on-the-way"))
    kube.stop_apiserver()
    with pytest.raises(OSError):
        kube.call("GET", "/version")
    kube.start_apiserver()
    assert outcome(kube, space, "on-the-way")["type"] == "Complete"


def test_programs_end_with_whoever_started_them(tmp_path: Path):
    code = """
import os, pathlib, signal, sys
from tests.cluster.processes import Processes
here = pathlib.Path(sys.argv[1])
ours = Processes(here, here)
ours.start("sleep", "sh", "-c", "echo it runs; exec sleep 1000")
ours.wait_for("sleep", (here / "sleep.log").read_text)
print(ours.running["sleep"].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", code, tmp_path]
    pid = int(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)
    gone = f"[ ! -e /proc/{pid} ] || grep -q '^State:.Z' /proc/{pid}/status"
    assert until(
        "it ended too", lambda: subprocess.run(["sh", "-c", gone]).returncode == 0, timeout_s=5
    )


def test_kueue_admits_what_its_quota_allows(kube_kueue: Kubernetes):
    space = kube_kueue.namespace("quota")
    kube_kueue.kueue.queue("quota", "quota", {"nvidia.com/gpu": 2})
    held = kube_kueue.behave(namespace="quota", forever=True)
    queued = {"kueue.x-k8s.io/queue-name": "quota"}
    for name in "abcd":
        kube_kueue.create(job(space, name, queued, suspend=True))

    def running() -> list[str]:
        return [name for name in "abcd" if status(kube_kueue, space, name).get("ready")]

    until("two run", lambda: len(running()) == 2)
    waiting = set("abcd") - set(running())
    assert [status(kube_kueue, space, name).get("active", 0) for name in waiting] == [0, 0]
    held.close()
    kube_kueue.look_again("quota")
    assert [outcome(kube_kueue, space, name)["type"] for name in "abcd"] == ["Complete"] * 4


def test_kueue_lets_higher_priority_push_out_lower(kube_kueue: Kubernetes):
    space = kube_kueue.namespace("priority")
    kube_kueue.kueue.queue("priority", "priority", {"nvidia.com/gpu": 1})
    kube_kueue.kueue.priority("urgent", 1000)
    queued = {"kueue.x-k8s.io/queue-name": "priority"}
    with kube_kueue.behave(namespace="priority", forever=True):
        kube_kueue.create(job(space, "low", queued, suspend=True))
        until("it runs", lambda: status(kube_kueue, space, "low").get("ready"))
    urgent = {**queued, "kueue.x-k8s.io/priority-class": "urgent"}
    kube_kueue.create(job(space, "high", urgent, suspend=True))
    assert outcome(kube_kueue, space, "high")["type"] == "Complete"
    assert outcome(kube_kueue, space, "low")["type"] == "Complete"
    assert not status(kube_kueue, space, "low").get("failed")


def test_no_job_gets_in_while_kueue_is_down(kube_kueue: Kubernetes):
    space = kube_kueue.namespace("down")
    kube_kueue.kueue.stop()
    with pytest.raises(Refused, match="failed calling webhook") as refused:
        kube_kueue.create(job(space, "early"))
    assert refused.value.status == 500
    kube_kueue.kueue.start()
    kube_kueue.create(job(space, "later"))
    assert outcome(kube_kueue, space, "later")["type"] == "Complete"


def test_a_real_pod_is_nobody_in_particular_and_has_torch(kube_real: Kubernetes):
    space = kube_real.namespace("torch")
    code = (
        "import os, torch; open('/runs/made', 'w').write(str(os.getuid()));"
        "print(torch.ones(2, 3).sum().item())"
    )
    kube_real.create(real_job(kube_real, space, "torch", code))
    assert outcome(kube_real, space, "torch")["type"] == "Complete"
    assert (space.runs / "made").read_text() == "1000"
    assert kube_real.kubectl("logs", "-n", "torch", "job/torch") == "6.0\n"


def test_a_real_pod_runs_out_of_memory(kube_real: Kubernetes):
    space = kube_real.namespace("memory")
    big = real_job(kube_real, space, "big", "bytearray(500 << 20)")
    big["spec"]["template"]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "64Mi"}}
    kube_real.create(big)
    assert outcome(kube_real, space, "big")["type"] == "Failed"
    end = terminated(pods(kube_real, space, "big")[0])
    assert (end["exitCode"], end["reason"]) == (137, "OOMKilled")


def test_a_real_node_is_lost_and_comes_back(kube_real: Kubernetes):
    space = kube_real.namespace("lost")
    code = (
        "import time; from pathlib import Path; before = Path('/runs/before');"
        "went_on = before.exists(); before.touch(); went_on or time.sleep(1000); print('went on')"
    )
    lost = {"type": "DisruptionTarget", "status": "True"}
    rules = [{"action": "Ignore", "onPodConditions": [lost]}]
    kube_real.create(real_job(kube_real, space, "long", code, podFailurePolicy={"rules": rules}))
    until("it runs", (space.runs / "before").exists)
    kube_real.kill_node()
    until("it is missed", lambda: kube_real.ready_nodes("type=real") == 0)
    until(
        "its pod is given up",
        lambda: pods(kube_real, space, "long")[0]["metadata"].get("deletionTimestamp"),
    )
    kube_real.start_node()
    assert outcome(kube_real, space, "long")["type"] == "Complete"
    assert kube_real.kubectl("logs", "-n", "lost", "job/long") == "went on\n"
