"""Test sweeps that wait in the real Kueue: for quota, for each other, or for Kueue itself."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import Json, until
from tests.cluster.desk import AWAY, SITE, Desk, end_of

pytestmark = pytest.mark.cluster


def command(ada: Desk, name: str, points: int, queue: str, *words: str) -> tuple[str, ...]:
    """The command that runs a sweep of so many points through a queue."""
    file = ada.sweep(
        name,
        f"base: {{pair: tiny, learning_rate: {len(name)}e-4}}",  # no two of these share a point
        f"seeds: {points}",
        "eval: {suite: tiny, pack: 4}",
    )
    return ("run", file, "site=kueue", f"queue={queue}", *words, *SITE, *AWAY)


def workloads(ada: Desk) -> list[Json]:
    path = f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{ada.space.name}/workloads"
    return ada.kube.call("GET", path)["items"]


def is_preempted(workload: Json) -> bool:
    conditions = workload.get("status", {}).get("conditions", ())
    return any(c["type"] == "Preempted" for c in conditions)


def check(ada: Desk, name: str, points: int) -> None:
    """All of a sweep is done, each Job was made once, and nobody counted a failure."""
    assert ada.status(name)["totals"]["done"] == points
    until("all was seen", lambda: {*map(end_of, ada.seen.jobs(sweep=name))} == {"Complete"})
    jobs = ada.seen.jobs(sweep=name)
    assert len([j for j in jobs if j["metadata"]["labels"]["stillhouse/kind"] == "train"]) == points
    assert ada.seen.made_twice() == []
    assert not any(job["status"].get("failed") for job in jobs)


def test_a_sweep_of_higher_priority_goes_first_and_costs_the_other_nothing(ada_queues: Desk):
    ada, kueue = ada_queues, ada_queues.kube.kueue
    kueue.queue("urgent-q", ada.space.name, {"nvidia.com/gpu": 4})
    kueue.priority("queue-urgent", 1000)
    trains = {"stillhouse/kind": "train"}
    slow = ada.kube.behave(namespace=ada.space.name, labels=trains, forever=True)
    first = ada.start(*command(ada, "usual", 12, "urgent-q"))

    def ready() -> int:
        return sum(job["status"].get("ready", 0) for job in ada.seen.jobs("train", sweep="usual"))

    until("as many run as may", lambda: ready() == 4)
    until("the others wait", lambda: ada.seen.count("train") == 12)

    def causes() -> list[str]:
        points = ada.status("usual")["points"]
        return [p["cause"] or "" for p in points if p["state"] == "waiting"]

    # Kueue comes to say so a moment after a Job is there.
    until(
        "they are told why",
        lambda: (
            len(told := causes()) == 8
            and all("queue urgent-q" in cause for cause in told)
            and any("insufficient unused quota" in cause for cause in told)
        ),
    )

    second = ada.start(*command(ada, "now", 4, "urgent-q", "queue_priority=queue-urgent"))
    until("it pushes the other out", lambda: any(map(is_preempted, workloads(ada))))
    again = "preempted, waits in queue urgent-q again"
    until("who was pushed out is told so", lambda: any(again in cause for cause in causes()))
    slow.close()
    ada.kube.look_again(ada.space.name)
    second.ends()
    first.ends()
    check(ada, "usual", 12)
    check(ada, "now", 4)
    assert ada.seen.most <= 4, "the quota"
    assert ada.seen.put_back, "whose pods ran and were put back into the queue"


def test_kueue_that_dies_and_comes_back_costs_time_and_no_point(ada_queues: Desk):
    ada, kueue = ada_queues, ada_queues.kube.kueue
    kueue.queue("mortal-q", ada.space.name, {"nvidia.com/gpu": 8})
    ada.kube.behave(namespace=ada.space.name, after_s=(0.2, 0.6))
    run = ada.start(*command(ada, "mortal", 40, "mortal-q"))
    until("some are complete", lambda: any(end_of(job) for job in ada.seen.jobs("train")))
    kueue.stop()
    try:
        until("nobody is let go any more", lambda: not ada.seen.at_work)
    finally:
        kueue.start()
    assert run.process.poll() is None
    run.ends()
    check(ada, "mortal", 40)


def test_a_queue_that_is_not_there_is_said_beforehand(ada_queues: Desk):
    said = ada_queues.say(*command(ada_queues, "early", 2, "no-such-queue"), code=42)
    assert "no-such-queue" in said and "k8s/localqueue.yaml" in said
    assert ada_queues.seen.count() == 0


def test_a_queue_that_vanishes_is_named_by_the_status(ada_queues: Desk):
    ada, kueue = ada_queues, ada_queues.kube.kueue
    kueue.queue("brief-q", ada.space.name, {"nvidia.com/gpu": 1})
    ada.kube.behave(namespace=ada.space.name, labels={"stillhouse/kind": "train"}, forever=True)
    run = ada.start(*command(ada, "brief", 3, "brief-q"))
    until("one runs", lambda: sum(j["status"].get("ready", 0) for j in ada.seen.jobs("train")) == 1)
    until("the others wait", lambda: ada.seen.count("train") == 3)
    ada.kube.kubectl("delete", "localqueue", "brief-q", "-n", ada.space.name)

    def is_said() -> bool:
        causes = [p["cause"] or "" for p in ada.status("brief")["points"]]
        return sum("queue brief-q cannot admit it" in cause for cause in causes) == 2

    assert until("the status says it", is_said)
    run.kill()
