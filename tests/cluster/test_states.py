"""Test each state in which Kueue or Kubernetes can hold a Job, and the text a user reads for it.

Every test creates the state on a real control plane. docs/cluster.md says what the text should be;
tests/test_cluster_guide.py checks that page against the code.
"""

from __future__ import annotations

import json
import time

import pytest

from stillhouse.sweep.cluster.objects import seconds
from tests.cluster.api import PATHS
from tests.cluster.cluster import Json, Kubernetes, until
from tests.cluster.desk import AWAY, SITE, Desk, end_of

pytestmark = pytest.mark.cluster

GPU = "nvidia.com/gpu"
KUEUE = "/apis/kueue.x-k8s.io/v1beta2"
SAVED = json.dumps({"exit_code": 85, "cause": "Interrupted: state saved", "tail": ""})
WITHIN_S = 60  # docs/cluster.md: what cannot start is named within a minute


def send(ada: Desk, name: str, queue: str | None, *words: str) -> None:
    """One point, one Job, without a sweep file."""
    queued = ("site=kueue", f"queue={queue}") if queue else ()
    ada.say("train", name, "--pair", "tiny", *queued, *SITE, *words)


def point(ada: Desk, name: str) -> Json:
    """How it stands."""
    said = ada.start("status", name, *AWAY, "--json")
    said.process.wait(60)
    (found,) = json.loads(said.said)["points"]
    return found


def told(ada: Desk, name: str, *parts: str, state: str = "waiting") -> str:
    """The cause, once it has all these parts."""

    def cause() -> str:
        found = point(ada, name)
        words = found["cause"] or ""
        return words if found["state"] == state and all(part in words for part in parts) else ""

    return until(f"{name} is {state}: {' ... '.join(parts)}", cause, WITHIN_S)


def change(ada: Desk, kind: str, name: str, spec: Json) -> None:
    """Another `spec` of an object, by an administrator."""
    words = ("patch", kind, name, "-n", ada.space.name, "--type=merge", "-p")
    ada.kube.kubectl(*words, json.dumps({"spec": spec}))


def workload_of(ada: Desk, job: Json) -> str:
    """The name of a Job's Workload, once Kueue has seen the Job."""
    path = f"{KUEUE}/namespaces/{ada.space.name}/workloads"
    path += f"?labelSelector=kueue.x-k8s.io/job-uid={job['metadata']['uid']}"

    def name() -> str:
        items = ada.kube.call("GET", path)["items"]
        return items[0]["metadata"]["name"] if items else ""

    return until("Kueue has seen it", name)


def only(ada: Desk, kind: str = "train") -> Json:
    """The one Job of a kind, once it is there."""
    until("its Job is made", lambda: ada.seen.jobs(kind))
    (job,) = ada.seen.jobs(kind)
    return job


def is_ready(job: Json) -> bool:
    return bool(job.get("status", {}).get("ready"))


def go_on(ada: Desk) -> None:
    """Fake pods look again at what they are to do."""
    ada.kube.look_again(ada.space.name)


# -------------------------------------------------------------------------------- with Kueue


def test_a_deactivated_point_gives_its_slot_back_and_a_retry_takes_it_up(ada_queues: Desk):
    ada = ada_queues
    ada.kube.kueue.queue("slot-q", ada.space.name, {GPU: 1})
    grid = "grid: {lmbda: [0, 0.5, 1]}"
    file = ada.sweep("slot", "base: {pair: tiny}", grid, "site: {max_parallel: 2, patience_s: 20}")
    line = ("run", file, "site=kueue", "queue=slot-q", *SITE, *AWAY)
    trains = {"stillhouse/kind": "train"}
    with ada.kube.behave(namespace=ada.space.name, labels=trains, forever=True):
        run = ada.start(*line)
        until("one of two runs", lambda: [*map(is_ready, ada.seen.jobs("train"))].count(True) == 1)
        until("the other is there", lambda: ada.seen.count("train") == 2)
        (waits,) = (job for job in ada.seen.jobs("train") if not is_ready(job))
        name = workload_of(ada, waits)
        change(ada, "workload", name, {"active": False})
        until("its slot is another's", lambda: ada.seen.count("train") == 3, 120)
    go_on(ada)
    assert "deactivated, queue slot-q never admits it again" in run.ends(code=1)
    states = sorted(p["state"] for p in ada.status("slot", code=1)["points"])
    assert states == ["done", "done", "failed"]
    (failed,) = (p for p in ada.status("slot", code=1)["points"] if p["state"] == "failed")
    assert "cannot start: deactivated" in failed["cause"] and name in failed["cause"]
    assert "1 wait" in ada.say("retry", "slot", "--cause", "cannot-start", *AWAY)
    ada.say(*line)
    assert ada.status("slot")["totals"]["done"] == 3


def test_a_stopped_queue_is_why_whatever_ended_the_turn_before(ada_queues: Desk):
    ada = ada_queues
    ada.kube.kueue.queue("hold-q", ada.space.name, {GPU: 1})
    with ada.kube.behave(namespace=ada.space.name, forever=True):
        send(ada, "first", "hold-q", "lmbda=0")
        until("it runs", lambda: is_ready(only(ada)))
        send(ada, "second", "hold-q", "lmbda=1")
        told(ada, "second", "waits in queue hold-q", "insufficient unused quota")
        change(ada, "localqueue", "hold-q", {"stopPolicy": "HoldAndDrain"})
        for name in ("first", "second"):
            told(ada, name, "queue hold-q cannot admit it", "is inactive", "get localqueues")
        change(ada, "localqueue", "hold-q", {"stopPolicy": "None"})
        until("one runs again", lambda: any(map(is_ready, ada.seen.jobs("train"))))
        (waits,) = (name for name in ("first", "second") if point(ada, name)["state"] == "waiting")
        assert "stopped" not in told(ada, waits, "waits in queue hold-q", "quota")


def test_a_quota_that_can_never_hold_it_is_named_as_that(ada_queues: Desk):
    ada = ada_queues
    ada.kube.kueue.queue("zero-q", ada.space.name, {GPU: 0})
    send(ada, "zero", "zero-q")
    assert told(ada, "zero", "queue zero-q can never hold it", "maximum capacity")


def test_a_flavor_of_other_nodes_is_named_as_that(ada_queues: Desk):
    ada = ada_queues
    labels = {"nvidia.com/gpu.product": "NVIDIA-L4"}
    ada.kube.kueue.queue("l4-q", ada.space.name, {GPU: 8}, node_labels=labels)
    send(ada, "flavor", "l4-q", "gpu_product=NVIDIA-H100-80GB-HBM3")
    assert told(ada, "flavor", "queue l4-q can never hold it", "doesn't match node affinity")


def test_an_admission_check_that_says_nothing_is_named(ada_queues: Desk):
    ada = ada_queues
    check = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "AdmissionCheck"}
    spec = {"controllerName": "example.com/nobody"}
    made = json.dumps({**check, "metadata": {"name": "budget"}, "spec": spec})
    ada.kube.kubectl("apply", "-f", "-", input=made)
    ready = {"type": "Active", "status": "True", "reason": "Active", "message": "",
             "lastTransitionTime": "2026-01-01T00:00:00Z"}  # fmt: skip
    ada.kube.kubectl(
        "patch", "admissioncheck", "budget", "--subresource=status", "--type=merge", "-p",
        json.dumps({"status": {"conditions": [ready]}}),
    )  # fmt: skip
    ada.kube.kueue.queue("check-q", ada.space.name, {GPU: 8})
    checks = {"admissionChecksStrategy": {"admissionChecks": [{"name": "budget"}]}}
    change(ada, "clusterqueue", "check-q", checks)
    send(ada, "checked", "check-q")
    assert told(ada, "checked", "queue check-q has quota for it, waits for admission check budget")


def test_a_priority_that_kueue_does_not_know_is_named_as_what_it_may_be(ada_queues: Desk):
    ada = ada_queues
    ada.kube.kueue.queue("class-q", ada.space.name, {GPU: 8})
    send(ada, "class", "class-q", "queue_priority=nobodys")
    assert told(ada, "class", "Kueue has not seen it yet", "nobodys", "site.queue_priority")


def test_a_queue_named_default_takes_jobs_that_name_none_and_doctor_says_so(ada_queues: Desk):
    ada = ada_queues
    ada.kube.kueue.queue("default", ada.space.name, {GPU: 0})
    assert "default" in ada.say("doctor", *SITE)
    send(ada, "unlabelled", None)
    assert told(ada, "unlabelled", "queue default can never hold it")


# ------------------------------------------------------------------------------ without Kueue


def test_a_prepare_job_that_waits_is_explained_by_run_and_by_status(ada: Desk):
    file = ada.sweep("pull", "base: {pair: tiny}", "grid: {lmbda: [0, 1]}")
    prepares = {"stillhouse/kind": "prepare"}
    said = "manifest unknown"
    here = ada.space.name
    with ada.kube.behave(namespace=here, labels=prepares, waiting=True, message=said):
        run = ada.start("run", file, *SITE, *AWAY)
        until("run says it", lambda: "image not pulled" in run.said, WITHIN_S)
        assert "image not pulled" in ada.say("status", "pull", *AWAY)
        run.kill()


def test_a_quota_of_jobs_that_is_full_is_named(ada: Desk):
    ada.kube.kubectl("create", "quota", "few", "--hard=count/jobs.batch=0", "-n", ada.space.name)
    quota = f"/api/v1/namespaces/{ada.space.name}/resourcequotas/few"
    until("it is counted", lambda: "used" in ada.kube.call("GET", quota).get("status", {}))
    file = ada.sweep("full", "base: {pair: tiny}")
    run = ada.start("run", file, *SITE, *AWAY)
    until("run says it", lambda: "count/jobs.batch" in run.said and "few" in run.said, WITHIN_S)
    run.kill()
    assert ada.seen.count() == 0


def test_a_limit_range_is_named(ada: Desk):
    limits = {"limits": [{"type": "Container", "max": {"memory": "1Gi"}}]}
    meta = {"name": "small", "namespace": ada.space.name}
    kind = {"apiVersion": "v1", "kind": "LimitRange", "metadata": meta, "spec": limits}
    ada.kube.kubectl("apply", "-f", "-", input=json.dumps(kind))
    send(ada, "limited", None)
    assert told(ada, "limited", "quota or limit range", "maximum memory usage per Container is 1Gi")


def test_a_job_held_past_its_deadline_fails_at_once_when_it_is_let_go_on(ada: Desk):
    with ada.kube.behave(namespace=ada.space.name, forever=True):
        send(ada, "held", None, "deadline_s=20")
        until("it runs", lambda: is_ready(only(ada)))
        name = only(ada)["metadata"]["name"]
        change(ada, "job", name, {"suspend": True})
        told(ada, "held", "suspended by hand", "spec.activeDeadlineSeconds")
        started = seconds(only(ada)["status"]["startTime"]) or 0.0
        until("its deadline is past", lambda: time.time() > started + 21, 60)
        change(ada, "job", name, {"suspend": False})
        assert told(ada, "held", "longer than its deadline", state="failed")


def test_ends_that_cost_no_attempt_get_a_new_job_before_the_pauses_grow(ada: Desk):
    file = ada.sweep("saves", "base: {pair: tiny}", "grid: {lmbda: [1]}")
    trains = {"stillhouse/kind": "train"}
    here = ada.space.name
    with ada.kube.behave(namespace=here, labels=trains, exit_code=85, message=SAVED):
        run = ada.start("run", file, *SITE, *AWAY)
        until("its Job is made anew", lambda: ada.seen.count("train") == 2, 120)
    run.ends()
    assert ada.status("saves")["totals"]["done"] == 1
    assert len(ada.seen.made_twice()) == 1
    assert end_of(ada.seen.jobs("train")[-1]) == "Complete"


def test_a_pod_without_its_job_holds_back_a_second_one_for_its_run(ada: Desk):
    file = ada.sweep("orphan", "base: {pair: tiny}", "grid: {lmbda: [1]}")
    trains = {"stillhouse/kind": "train"}
    with ada.kube.behave(namespace=ada.space.name, labels=trains, forever=True):
        run = ada.start("run", file, *SITE, *AWAY)
        until("it runs", lambda: ada.seen.jobs("train") and is_ready(only(ada)))
        run.kill()
        name = only(ada)["metadata"]["name"]
        ada.kube.kubectl("delete", "job", name, "-n", ada.space.name, "--cascade=orphan")
        again = ada.start("run", file, *SITE, *AWAY)
        until("it is named", lambda: "its Job was deleted without it" in again.said, WITHIN_S)
        assert ada.seen.count("train") == 1
    go_on(ada)
    again.ends()


def test_a_namespace_that_is_being_deleted_is_named_as_that(ada: Desk, kube: Kubernetes):
    meta = {"name": "held", "namespace": ada.space.name, "finalizers": ["example.com/hold"]}
    held = {"kind": "ConfigMap", "metadata": meta}
    kube.create(held)
    try:
        kube.call("DELETE", f"{PATHS['Namespace']}/{ada.space.name}")
        file = ada.sweep("gone", "base: {pair: tiny}")
        said = lambda: ada.say("run", file, *SITE, *AWAY, code=42)  # noqa: E731
        assert until("run names it", lambda: "is being deleted" in said(), WITHIN_S)
    finally:
        change_meta = json.dumps({"metadata": {"finalizers": None}})
        words = ("patch", "configmap", "held", "-n", ada.space.name, "--type=merge", "-p")
        kube.kubectl(*words, change_meta)
