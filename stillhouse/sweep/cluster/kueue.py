"""Reduce Kueue's Workload to what it says of its Job: its state in the queue, and why it waits.

Pure, no requests. Reads the vocabulary of Kueue 0.17 to 0.19 and that of 0.20 (gate
UnadmittedWorkloadsObservability), which tells by the reason of QuotaReserved what only its message
told before.
"""

from __future__ import annotations

from collections.abc import Mapping
from sys import intern
from typing import Literal

from pydantic.dataclasses import dataclass

from stillhouse.rundir import Json
from stillhouse.sweep.cluster.objects import STRICT, conditions_of

OF_JOBS = "kueue.x-k8s.io/job-uid"  # label of a Job's Workload: its uid

QueueState = Literal[
    "pending",  # waits for its turn, or for quota that others hold
    "preempted",  # the same, after it had to give its place to a workload that goes first
    "evicted",  # the same, after something else took its place
    "checking",  # has quota, and an admission check has not said yes
    "reserved",
    "admitted",
    "inadmissible",  # its queue is missing or stopped
    "oversized",  # no quota of its queue can ever hold it
    "deactivated",  # Kueue has given up on it, or a person switched it off
]

# Reasons of QuotaReserved=False.
_INADMISSIBLE = frozenset({"Inadmissible", "Misconfigured", "Suspended"})
_OVERSIZED = frozenset({"ExceedsMaxQuota", "NoMatchingFlavor"})
# Until 0.20 the reason is Pending whatever it waits for. A message has one part per flavor that was
# tried: where any of them is only full at present, quota may become free.
_NEVER = (
    "> maximum capacity",
    "unavailable in ClusterQueue",
    "doesn't match node affinity",
    "doesn't match ClusterQueue selector",
    "resources validation failed",
)
_FULL = ("insufficient unused quota", "more needed")
_RESTARTED = frozenset({"LocalQueueRestarted", "ClusterQueueRestarted"})


@dataclass(frozen=True, slots=True, config=STRICT)
class QueueView:
    """What Kueue says of a Job: its Workload."""

    name: str
    job_uid: str
    state: QueueState
    reason: str  # why it lost its place or is off, in Kueue's word; "" where it did not
    message: str  # why it is not at work now


def queue_view(workload: Json) -> QueueView | None:
    """What a Workload says, or None where it belongs to no Job."""
    meta = workload["metadata"]
    owners = meta.get("ownerReferences") or ()
    uid = next((owner["uid"] for owner in owners if owner.get("kind") == "Job"), None)
    if uid is None:
        return None
    state, reason, message = _told(workload)
    return QueueView(meta["name"], uid, state, intern(reason), message)


def _told(workload: Json) -> tuple[QueueState, str, str]:
    status: Json = workload.get("status") or {}
    conditions = conditions_of(status)
    quota, evicted = (conditions.get(type_, {}) for type_ in ("QuotaReserved", "Evicted"))
    now = quota.get("message") or ""
    spec: Json = workload.get("spec") or {}
    if spec.get("active") is False:
        # An Evicted of before stays as it was: only one that says so is of this.
        reason = evicted.get("reason") or ""
        said = evicted if reason.startswith("Deactivated") else {}
        why = reason if said and reason != "Deactivated" else ""  # else a person did it
        return "deactivated", why, said.get("message") or now
    if _holds(conditions, "Admitted"):
        return "admitted", "", now
    if _holds(conditions, "QuotaReserved"):
        checks = [c for c in status.get("admissionChecks") or () if c.get("state") != "Ready"]
        if not checks:
            return "reserved", "", now
        told = (f"{c['name']} ({': '.join(filter(None, _words(c)))})" for c in checks)
        return "checking", "", ", ".join(told)
    why = quota.get("reason") or ""
    if why in _INADMISSIBLE:
        return "inadmissible", "", now
    if why in _OVERSIZED or (_has(now, _NEVER) and not _has(now, _FULL)):
        return "oversized", "", now
    # Evicted stays True until the next admission, also where the cause is over.
    requeued = conditions.get("Requeued", {})
    if _holds(conditions, "Evicted") and requeued.get("reason") not in _RESTARTED:
        preempted = conditions["Preempted"] if _holds(conditions, "Preempted") else None
        how = "evicted" if preempted is None else "preempted"
        return how, evicted.get("reason") or "", now or (preempted or evicted).get("message") or ""
    return "pending", "", now


def _words(check: Json) -> tuple[str, str]:
    return check.get("state") or "", check.get("message") or ""


def _has(message: str, parts: tuple[str, ...]) -> bool:
    return any(part in message for part in parts)


def _holds(conditions: Mapping[str, Json], type_: str) -> bool:
    return conditions.get(type_, {}).get("status") == "True"
