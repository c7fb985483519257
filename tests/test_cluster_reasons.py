"""Test that the guide's table of messages and the launcher's messages match in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from test_cluster_kueue import BY, LATER, NEVER, job, pod, why
from test_cluster_watch import WAITS

from stillhouse.sweep.cluster.cache import NOT_READ
from stillhouse.sweep.cluster.facts import DELETED
from stillhouse.sweep.cluster.objects import Note, job_view
from stillhouse.sweep.cluster.reasons import how_it_failed, why_orphan, why_waiting
from stillhouse.sweep.cluster.refusals import why_not_made

GUIDE = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text()
SILENT = ("Ready", "False", None), ("ContainersReady", "True", None)
GIVEN_UP = ("DisruptionTarget", "True", "DeletionByTaintManager")
PULLED = 'pods "x-" is forbidden: '
REFUSED = [
    message for reason, message, *_ in WAITS if reason == "FailedCreate"
] + [
    PULLED + "failed quota: team: must specify limits.cpu",
    PULLED + "maximum memory usage per Container is 1Gi, but limit is 48Gi",
    'Pod "x" is invalid: spec.containers[0].resources.requests: Invalid value: "4": must be less'
    " than or equal to cpu limit of 500m",
    'admission webhook "policy.example" denied the request: no',
]  # fmt: skip
# What these say comes from the pod, or is put together where a person's act is written down.
TOLD = [
    DELETED, "cancelled by ada", "its Job is made anew", "Job x is still being deleted",
    "cannot start: image not pulled", "just sent to queue lab", f"queue lab: {NOT_READ}",
    "waits in queue lab (it was sent from another site: cpu is 1 there and 4 here)",
    "OutOfMemory: the device's memory is full: micro_batch=2", "Diverged: step 3: the loss is NaN",
    "NoProgress: 3 pods in a row ended before they completed a step",
]  # fmt: skip


def rows() -> dict[str, list[re.Pattern[str]]]:
    """The table's first column, and what each row of it looks like when it is said."""
    table = GUIDE.split("| what `status` and `run` say |")[1].split("\n\n")[0]
    found = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", table, re.M)
    return {
        row: [
            re.compile(".*".join(map(re.escape, re.split(r" ?… ?", one))), re.DOTALL)
            for one in row.split("; or ")
        ]
        for row in found
    }


def event(message: str, reason: str = "FailedCreate") -> list[Note]:
    return [Note("Job", "j", "u", reason, f"Error creating: {message}", 9e9)]


def waiting(reason: str, message: str) -> Any:
    """A pod that waits, as the node or the scheduler says it."""
    if reason == "Unschedulable":
        return replace(pod(), phase="Pending", node=None, unscheduled=message)
    return replace(pod(), phase="Pending", waiting=reason, waiting_message=message)


def said_while_it_waits() -> Iterator[str]:
    awake, asleep = job(suspend=False), job()
    for reason, message, *_ in WAITS:
        if reason != "FailedCreate":
            notes = event(message, reason) if reason.startswith("Failed") else []
            yield why_waiting(awake, [waiting(reason, message)], notes=notes).words
    for message in REFUSED:
        yield why_waiting(awake, [], notes=event(message)).words
    sandbox = event("no runtime for handler nvidia", "FailedCreatePodSandBox")
    taints = "0/2 nodes are available: 2 node(s) had untolerated taint {spot: }."
    yield from (
        why_waiting(awake, []).words,
        why_waiting(awake, [waiting("Unschedulable", taints)]).words,
        why_waiting(awake, [replace(pod(), phase="Pending", node=None)]).words,
        why_waiting(awake, [waiting("", "")], notes=sandbox).words,
        why_waiting(awake, [pod(*SILENT)]).words,
        why_waiting(awake, [pod(*SILENT, GIVEN_UP, deletionTimestamp="x")]).words,
        why_waiting(replace(awake, is_deleting=True), []).words,
        why_waiting(awake, [ended(disrupted="EvictionByEvictionAPI")]).words,
        why_waiting(replace(asleep, queue=None), []).words,
        why_waiting(asleep, []).words,
        why_orphan(pod()),
        why_not_made('jobs.batch "j" is forbidden: exceeded quota: team, requested:'
                     " count/jobs.batch=1, used: count/jobs.batch=9, limited: count/jobs.batch=9"),
        why_waiting(replace(asleep, queue="default", asks="cpu=1"), []).words,
    )  # fmt: skip
    pending = ("QuotaReserved", "False", "Pending", LATER)
    yield from (
        one.words
        for one in (
            why(pending),
            why(("QuotaReserved", "False", "Pending", NEVER)),
            why(("QuotaReserved", "False", "Suspended", "LocalQueue lab is inactive")),
            why(("QuotaReserved", "False", "Pending", ""), active=False),
            why(("QuotaReserved", "True", "", ""), checks=[{"name": "budget", "state": "Pending"}]),
            why(("QuotaReserved", "True", "", "")),
            why(("Evicted", "True", "Preempted", BY), ("Preempted", "True", "InClusterQueue", BY)),
            why(("Evicted", "True", "PodsReadyTimeout", "Exceeded the timeout"), pending),
        )
    )


def ended(**more: Any) -> Any:
    return replace(pod(), phase="Failed", exit_code=143, finished=1.0, **more)


def said_of_ends() -> Iterator[str]:
    def end(reason: str, conditions: Any = (), **more: Any) -> str:
        failed = {"type": "Failed", "status": "True", "reason": reason}
        meta = {"name": "j", "uid": "u"}
        status = {"conditions": [failed, *conditions], "failed": 4}
        view = job_view({"metadata": meta, "spec": {}, "status": status})
        return how_it_failed(view, [ended(**more)]).cause

    yield end("BackoffLimitExceeded")
    yield end("DeadlineExceeded")
    held = end("DeadlineExceeded", [{"type": "Suspended", "status": "True"}])
    assert "that passed while it was suspended, since only Kueue stops the clock" in held
    yield held
    yield end("BackoffLimitExceeded", end_reason="OOMKilled").removesuffix("(given up after 4)")
    for reason in (
        "DeletionByPodGC", "PreemptionByScheduler", "TerminationByKubelet", "EvictionByEvictionAPI",
    ):  # fmt: skip
        yield end("", disrupted=reason)


SAID = [*said_while_it_waits(), *said_of_ends(), *TOLD]


def test_everything_that_is_said_is_explained() -> None:
    patterns = [pattern for several in rows().values() for pattern in several]
    assert len(rows()) > 30
    for words in SAID:
        assert any(pattern.match(words) for pattern in patterns), words


def test_every_row_and_each_of_its_variants_is_said() -> None:
    for row, patterns in rows().items():
        for pattern in patterns:
            assert any(pattern.match(words) for words in SAID), (row, pattern.pattern)
