"""Test that Kueue's Workload becomes one state and one sentence, as 0.17 and 0.19 write it."""

from __future__ import annotations

from typing import Any

from stillhouse.rundir import Json
from stillhouse.sweep.cluster.kueue import queue_view
from stillhouse.sweep.cluster.objects import job_view, pod_view
from stillhouse.sweep.cluster.reasons import Reason, why_waiting

LATER = "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor a, 1"
LATER += " more needed"
NEVER = "couldn't assign flavors to pod set main: insufficient quota for nvidia.com/gpu in flavor a"
NEVER += ", request (4) > maximum capacity (2)"
BY = "Preempted to accommodate a workload (UID: 1) due to prioritization in the ClusterQueue"


def why(*conditions: tuple[str, str, str, str], active: bool = True, checks: Any = ()) -> Reason:
    """Why the Job of such a Workload waits."""
    told = [
        {"type": t, "status": s, "reason": r, "message": m, "lastTransitionTime": "2026-11-30"}
        for t, s, r, m in conditions
    ]
    owner = {"kind": "Job", "name": "j", "uid": "u"}
    view = queue_view(
        {
            "metadata": {"name": "job-j-1", "ownerReferences": [owner]},
            "spec": {"active": active},
            "status": {"conditions": told, "admissionChecks": [*checks]},
        }
    )
    return why_waiting(job(), [], view)


def job(suspend: bool = True, priority: str | None = None, **status: Any) -> Any:
    labels = {"kueue.x-k8s.io/queue-name": "lab"}
    labels |= {"kueue.x-k8s.io/priority-class": priority} if priority else {}
    return job_view(
        {
            "metadata": {"name": "j", "uid": "u", "labels": labels},
            "spec": {"suspend": suspend},
            "status": status,
        }
    )


def test_a_queue_that_is_missing_or_stopped_cannot_admit_by_either_vocabulary():
    missing, stopped = "LocalQueue lab doesn't exist", "LocalQueue lab is inactive"
    for reason in ("Inadmissible", "Misconfigured"):
        said = why(("QuotaReserved", "False", reason, missing))
        assert said == Reason(
            f"queue lab cannot admit it: {missing} (kubectl get localqueues)", cannot_start=True
        )
    said = why(("QuotaReserved", "False", "Suspended", stopped))
    assert "cannot admit it: LocalQueue lab is inactive" in said.words and said.cannot_start


def test_a_quota_that_can_never_hold_a_job_is_told_from_one_that_is_full():
    never = (
        ("Pending", NEVER),
        ("Pending", "resource nvidia.com/gpu unavailable in ClusterQueue"),
        ("Pending", "flavor lab doesn't match node affinity"),
        ("Pending", "Workload namespace doesn't match ClusterQueue selector"),
        ("Pending", "resources validation failed: requests must not exceed its limits"),
        ("ExceedsMaxQuota", NEVER),
        ("NoMatchingFlavor", "flavor lab doesn't match node affinity"),
    )
    for reason, message in never:
        said = why(("QuotaReserved", "False", reason, message))
        assert said.cannot_start and said.words.startswith("queue lab can never hold it: "), said
        assert "site.queue" in said.words
    for reason, message in (
        ("Pending", LATER),
        ("WaitingForQuota", LATER),
        ("Pending", f"{NEVER}, {LATER}"),  # one flavor is too small, another is only full
        ("PendingEvaluation", ""),
    ):
        said = why(("QuotaReserved", "False", reason, message))
        assert not said.cannot_start and said.words.startswith("waits in queue lab"), said


def test_a_deactivated_workload_never_starts_whatever_its_old_conditions_say():
    over = "The workload is deactivated due to exceeding the maximum number of re-queuing retries"
    limit = "DeactivatedDueToRequeuingLimitExceeded"
    said = why(
        ("QuotaReserved", "False", "Pending", over), ("Evicted", "True", limit, over), active=False
    )
    assert said.words.startswith(f"deactivated ({limit}), queue lab never admits it again: {over}")
    assert "set spec.active of Workload job-j-1 to true" in said.words and said.cannot_start
    # Switched off by hand after a preemption: the old Evicted stays, and is not why.
    said = why(
        ("QuotaReserved", "False", "Pending", "The workload is deactivated"),
        ("Evicted", "True", "Preempted", BY),
        ("Preempted", "True", "InClusterQueue", BY),
        active=False,
    )
    assert said.words.startswith("deactivated, queue lab never admits it again: The workload is")


def test_what_holds_a_job_now_wins_over_what_evicted_it_before():
    evicted = ("Evicted", "True", "LocalQueueStopped", "The LocalQueue is stopped")
    back = ("Requeued", "True", "LocalQueueRestarted", "The LocalQueue was restarted")
    pending = ("QuotaReserved", "False", "Pending", LATER)
    assert why(evicted, back, pending).words == f"waits in queue lab: {LATER}"
    preempted = ("Evicted", "True", "Preempted", BY), ("Preempted", "True", "InClusterQueue", BY)
    assert why(*preempted, pending).words == f"preempted, waits in queue lab again: {LATER}"
    gone = ("QuotaReserved", "False", "Inadmissible", "LocalQueue lab doesn't exist")
    assert "cannot admit it: LocalQueue lab doesn't exist" in why(*preempted, gone).words
    slow = ("Evicted", "True", "PodsReadyTimeout", "Exceeded the PodsReady timeout")
    assert (
        why(slow, pending).words == f"evicted (PodsReadyTimeout), waits in queue lab again: {LATER}"
    )


def test_a_pending_admission_check_is_named():
    reserved = ("QuotaReserved", "True", "QuotaReserved", "Quota reserved in ClusterQueue a")
    checks = (
        {"name": "budget", "state": "Pending", "message": ""},
        {"name": "x", "state": "Ready"},
    )
    said = why(reserved, checks=checks)
    assert said.words == "queue lab has quota for it, waits for admission check budget (Pending)"
    assert why(reserved).words == "queue lab has admitted it"


def test_a_job_that_kueue_is_silent_about_names_what_may_be_the_cause():
    assert "it was just sent, or Kueue does not run" in why_waiting(job(), []).words
    said = why_waiting(job(priority="hihg"), []).words
    assert "or it has no class hihg (site.queue_priority, site.priority_class)" in said


# ------------------------------------------------------------------------------- lost nodes


def pod(*conditions: tuple[str, str, str | None], **more: Any) -> Any:
    told = [{"type": t, "status": s, **({"reason": r} if r else {})} for t, s, r in conditions]
    meta: Json = {"name": "p", "uid": "p", "labels": {"batch.kubernetes.io/controller-uid": "u"}}
    spec, status = {"nodeName": "node-7"}, {"phase": "Running", "conditions": told}
    return pod_view({"metadata": meta | more, "spec": spec, "status": status})


def test_the_pod_of_a_lost_node_does_not_run_and_says_what_brings_it_back():
    silent = ("Ready", "False", None), ("ContainersReady", "True", None)
    said = why_waiting(job(suspend=False), [pod(*silent)]).words
    assert said.startswith("its node node-7 does not answer; where it stays silent")
    given_up = ("DisruptionTarget", "True", "DeletionByTaintManager")
    said = why_waiting(job(suspend=False), [pod(*silent, given_up, deletionTimestamp="x")]).words
    assert said.startswith("its node node-7 was lost; a new pod comes when that node is back")
    assert "kubectl delete node node-7" in said


def test_a_pod_whose_sidecar_or_gate_is_not_ready_is_not_on_a_lost_node():
    for conditions in (
        [("Ready", "False", "ContainersNotReady"), ("ContainersReady", "False", None)],
        [("Ready", "False", "ReadinessGatesNotReady"), ("ContainersReady", "True", None)],
        [("Ready", "True", None), ("ContainersReady", "True", None)],
        [],
    ):
        assert not pod(*conditions).is_silent


def test_the_pause_between_attempts_is_said_since_it_grows():
    def ended(name: str) -> Any:
        done = {"terminated": {"exitCode": 85, "finishedAt": "2026-11-30T00:00:00Z"}}
        meta = {"name": name, "uid": name, "creationTimestamp": f"2026-11-30T00:00:0{name}Z"}
        status = {"phase": "Failed", "containerStatuses": [{"name": "main", "state": done}]}
        return pod_view({"metadata": meta, "spec": {}, "status": status})

    said = why_waiting(job(suspend=False), [ended("1")]).words
    assert said.startswith("between two attempts (the cluster waits 10 s before the second): ")
    many = [ended(str(n)) for n in range(8)]
    said = why_waiting(job(suspend=False), many).words
    assert "(the cluster waits 600 s before the 9th)" in said


def test_a_job_that_a_person_holds_says_that_its_deadline_goes_on():
    held = {"metadata": {"name": "j", "uid": "u"}, "spec": {"suspend": True}}
    assert "deadline" not in why_waiting(job_view(held), []).words
    began = held | {"status": {"startTime": "2026-11-30T00:00:00Z"}}
    assert "raise spec.activeDeadlineSeconds first" in why_waiting(job_view(began), []).words
