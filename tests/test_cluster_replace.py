"""Test that a Job waiting in vain is recreated once, or says why not, and never waits silently."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import CANNOT_START
from stillhouse.sweep.backend import Finished, Task
from stillhouse.sweep.cluster.code_bundle import bundle
from stillhouse.sweep.cluster.connect import Cluster
from stillhouse.sweep.cluster.jobs import JobExecutor
from stillhouse.sweep.cluster.jobspec import JobSpecs
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Sweep
from tests.builders.driving import (
    EVICTED,
    World,
    backend_of,
    cluster_of,
    drive,
    ids,
    sweep_of,
    until,
    until_told,
)
from tests.fakes.fake_api import FakeApi

SWEEP = sweep_of()
IDS = ids(SWEEP)
GROUP = "tiny/int4"
TRAIN, PREPARE = Action("train", GROUP, (IDS[0],)), Action("prepare", GROUP)
NAME = JobSpecs(SWEEP).of(TRAIN).name
QUEUED = sweep_of(4, "queue=lab", "queue_priority=high")


def task(action: Action) -> Task:
    return Task(action, (), (), None, Path("log"))


def put(fake: FakeApi, action: Action, sweep: Sweep = SWEEP) -> str:
    """The Job of an action, as another launcher sent it."""
    step = JobSpecs(sweep).of(action)
    fake.put("jobs", render(step, sweep.site, bundle().key))
    return step.name


def uid(fake: FakeApi, name: str) -> str:
    return (fake.get("jobs", name) or {})["metadata"]["uid"]


def waits(backend: JobExecutor, action: Action, words: str) -> str:
    """Why an action waits, once that has these words."""
    until_told(backend, lambda: words in backend.waits().get(action, ""))
    return backend.waits()[action]


def renewed(fake: FakeApi, backend: JobExecutor, name: str, before: str) -> None:
    """Wait until another Job has this one's name, and is followed."""
    until_told(backend, lambda: fake.get("jobs", name) and uid(fake, name) != before)
    until_told(backend, lambda: follows(backend, name) == uid(fake, name))


def follows(backend: JobExecutor, name: str) -> str | None:
    """The uid of the Job that a backend follows under a name."""
    work = backend._live.get(name)
    return work.uid if work is not None else None


def ended(backend: JobExecutor) -> Finished:
    found: list[Finished] = []
    until(lambda: found.extend(backend.wait(0.05)) or found)
    return found[0]


# ----------------------------------------------------------------- every Job has its reason


def test_a_pair_and_scores_that_wait_say_for_what(fake: FakeApi, cluster: Cluster) -> None:
    pack = Action("eval", GROUP, (IDS[0], IDS[1]))
    prepare, scores = put(fake, PREPARE), put(fake, pack)
    fake.pending(prepare, "ImagePullBackOff", "not found")
    fake.pending(scores)
    put(fake, TRAIN)  # its point says it
    with backend_of(cluster, SWEEP) as backend:
        assert "image not pulled: not found" in waits(backend, PREPARE, "image")
        assert "no node has 1 free nvidia.com/gpu" in waits(backend, pack, "no node")
        assert backend.waits().keys() == {PREPARE, pack}
        fake.run_pod(prepare)
        until_told(backend, lambda: PREPARE not in backend.waits())


def test_a_quota_of_jobs_is_named_by_whoever_waits_for_it(fake: FakeApi, cluster: Cluster) -> None:
    fake.quota("jobs", 0)
    with backend_of(cluster, SWEEP, blocked_s=0.01) as backend:
        backend.start(task(PREPARE))
        said = waits(backend, PREPARE, "quota")
        assert said.startswith("quota: exceeded quota: lab, requested: count/jobs.batch=1"), said
        assert said.endswith("until others are deleted (those that ended count too)")
        fake.quota("jobs", None)
        until_told(backend, lambda: fake.names("jobs"))
        until_told(backend, lambda: "quota" not in backend.waits().get(PREPARE, ""))


def test_what_its_queue_gives_up_on_gives_its_place_back_and_a_retry_takes_it_back(
    fake: FakeApi, cluster: Cluster
) -> None:
    sweep = sweep_of(4, "queue=lab", "patience_s=1")
    states = {"deactivated": "deactivated", "oversized": "can never hold", "inadmissible": "cannot"}
    for state, words in states.items():
        action = Action("train", GROUP, (ids(sweep)[0],))
        name = put(fake, action, sweep)
        fake.workload(name, state=state)
        with backend_of(cluster, sweep) as backend:
            until_told(backend, lambda: backend.live())
            end = ended(backend)
            assert end.exit_code == CANNOT_START and words in str(end.cause), state
            until_told(backend, lambda: not fake.get("jobs", name))  # noqa: B023
            assert backend.live() == [] and backend.look(action.points[0]).state == "failed"
            backend.ledger.write({action.points[0]: None})  # what `retry` does


def test_a_queue_that_changes_its_mind_is_noticed_while_a_driver_waits(
    fake: FakeApi, cluster: Cluster
) -> None:
    name = put(fake, TRAIN, QUEUED)
    fake.workload(name)
    with backend_of(cluster, QUEUED) as backend:
        assert str(backend.look(IDS[0]).cause).startswith("waits in queue lab: couldn't assign")
        backend.changed()
        fake.workload(name, state="deactivated")
        backend.watcher.read_queue()
        backend.wait(0.01)
        assert backend.changed() == {IDS[0]}
        assert str(backend.look(IDS[0]).cause).startswith("deactivated, queue lab never admits it")
        fake.remove("workloads", fake.names("workloads")[0])
        backend.watcher.read_queue()
        assert "Kueue has not seen it yet" in str(backend.look(IDS[0]).cause)


def test_nobody_says_that_kueue_is_silent_before_it_was_asked(
    fake: FakeApi, cluster: Cluster
) -> None:
    with backend_of(cluster, QUEUED) as backend:
        backend.start(task(TRAIN))
        until_told(backend, lambda: backend.look(IDS[0]).cause)
        assert backend.look(IDS[0]).cause == "just sent to queue lab"
        backend.watcher.read_queue()
        assert "or it has no class high" in str(backend.look(IDS[0]).cause)
        fake.deny("list", "workloads")
        backend.watcher.read_queue()
        assert "not ours to read" in str(backend.look(IDS[0]).cause)


# -------------------------------------------------------------------- sent from another site


@pytest.mark.parametrize("action", [PREPARE, TRAIN])
@pytest.mark.parametrize(
    "words", [("queue=lab", "queue_priority=hihg"), ("queue=other",), ("cpu=1",), ("queue=null",)]
)
def test_a_job_of_another_site_that_did_not_start_is_made_anew(
    fake: FakeApi, cluster: Cluster, action: Action, words: tuple[str, ...]
) -> None:
    name = put(fake, action, sweep_of(4, *words))
    before = uid(fake, name)
    with backend_of(cluster, QUEUED, blocked_s=0.01) as backend:
        renewed(fake, backend, name, before)
        labels = (fake.get("jobs", name) or {})["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/priority-class"] == "high"
        assert backend.live() == [action]
    assert fake.deleted("jobs")[name] == fake.created("jobs")[name] == 1


def test_a_job_of_another_site_that_runs_is_left_to_run(fake: FakeApi, cluster: Cluster) -> None:
    name = put(fake, TRAIN, sweep_of(4, "cpu=1"))
    fake.run_pod(name)
    with backend_of(cluster, SWEEP) as backend:
        until_told(backend, lambda: backend.look(IDS[0]).state == "running")
        fake.complete(name)
        assert ended(backend).exit_code == 0
    assert not fake.created("jobs")[name]


def test_what_a_second_launcher_sends_while_we_are_there_is_named_and_left(
    fake: FakeApi, cluster: Cluster
) -> None:
    with backend_of(cluster, SWEEP) as backend:
        name = put(fake, PREPARE, sweep_of(4, "cpu=1"))
        said = waits(backend, PREPARE, "another site")
        assert said.endswith("(it was sent from another site: cpu is 1.0 there and 4.0 here)"), said
        assert not fake.deleted("jobs")[name]


def test_jobs_of_this_site_and_of_versions_that_did_not_say_are_left(
    fake: FakeApi, cluster: Cluster
) -> None:
    name = put(fake, TRAIN)
    old = render(JobSpecs(SWEEP).of(PREPARE), sweep_of(4, "cpu=1").site, bundle().key)
    del old["metadata"]["annotations"]["stillhouse/asks"]
    fake.put("jobs", old)
    with backend_of(cluster, SWEEP) as backend:
        until_told(backend, lambda: len(backend.live()) == 2)
        backend.wait(0.05)
    assert not fake.deleted("jobs") and name in fake.names("jobs")


# ------------------------------------------------------------------------------ growing pauses


def test_after_the_second_end_that_cost_nothing_the_job_is_made_anew_once(
    fake: FakeApi, cluster: Cluster
) -> None:
    name = put(fake, TRAIN)
    before = uid(fake, name)
    with backend_of(cluster, SWEEP, blocked_s=0.01) as backend:
        fake.fail(name, 85, EVICTED, ends="Ignore")
        until_told(backend, lambda: "between two" in str(backend.look(IDS[0]).cause))
        assert "waits 10 s before the second" in str(backend.look(IDS[0]).cause)
        fake.disrupt(name, exit_code=85, message=EVICTED)
        renewed(fake, backend, name, before)
        assert backend.live() == [TRAIN]

        def told() -> list[dict[str, Any]]:
            notes = (fake.get("jobs", name) or {})["metadata"]["annotations"]
            return json.loads(notes.get("stillhouse/attempts", "[]"))

        until_told(backend, told)
        assert [one["before"] for one in told()] == [True, True], "what they cost is not forgotten"
        fake.fail(name, 85, EVICTED, ends="Ignore")
        until_told(backend, lambda: len(told()) == 3)
        assert "waits 10 s before the second" in str(backend.look(IDS[0]).cause)
        second = uid(fake, name)
        fake.disrupt(name)
        until_told(backend, lambda: "the third" in str(backend.look(IDS[0]).cause))
        assert uid(fake, name) == second, "once: pods count their attempts by Job"
        fake.complete(name)
        assert ended(backend).exit_code == 0
    assert fake.created("jobs")[name] == fake.deleted("jobs")[name] == 1


def test_a_job_that_lost_an_attempt_or_has_a_place_in_a_queue_waits_out_its_pause(
    fake: FakeApi, cluster: Cluster
) -> None:
    name = put(fake, TRAIN)
    fake.fail(name, 1, ends=None)
    fake.disrupt(name)
    fake.disrupt(name)
    queued = put(fake, Action("train", GROUP, (IDS[1],)), QUEUED)
    fake.resume(queued)
    for _ in range(3):
        fake.fail(queued, 85, EVICTED, ends="Ignore")
    with backend_of(cluster, QUEUED) as backend:
        backend._there_before.clear()
        until_told(backend, lambda: len(backend.live()) == 2)
        backend.wait(0.05)
        assert "waits 40 s before the 4th" in str(backend.look(IDS[1]).cause)
    assert not fake.deleted("jobs")


def test_two_drivers_make_a_slow_job_anew_together_once(
    fake: FakeApi, cluster: Cluster, tmp_path: Path
) -> None:
    name = put(fake, TRAIN)
    before = uid(fake, name)
    with (
        cluster_of(fake, tmp_path / "other") as second,
        backend_of(cluster, SWEEP, blocked_s=0.01) as one,
        backend_of(second, SWEEP, blocked_s=0.01) as two,
    ):
        for _ in range(2):
            fake.fail(name, 85, EVICTED, ends="Ignore")
        for backend in (one, two):
            renewed(fake, backend, name, before)
        fake.complete(name)
        assert (ended(one).exit_code, ended(two).exit_code) == (0, 0)
    assert fake.created("jobs")[name] == fake.deleted("jobs")[name] == 1


# --------------------------------------------------------------------- pods without their Job


def orphaned(fake: FakeApi, name: str) -> str:
    """The pod of a Job that somebody deleted without it."""
    pod = fake.run_pod(name)
    fake.let_go(name)
    return pod


@pytest.mark.parametrize("is_seen", [True, False], ids=["before our eyes", "before we came"])
def test_no_second_job_is_made_beside_a_pod_that_goes_on_without_its_job(
    fake: FakeApi, cluster: Cluster, is_seen: bool
) -> None:
    name = put(fake, TRAIN)
    pod = "" if is_seen else orphaned(fake, name)
    with backend_of(cluster, SWEEP, blocked_s=0.01) as backend:
        pod = pod or orphaned(fake, name)
        until_told(backend, lambda: pod in str(backend.look(IDS[0]).cause))
        seen = backend.look(IDS[0])
        assert seen.state == "running" and f"pod {pod} goes on" in str(seen.cause)
        backend.start(task(TRAIN))
        assert f"pod {pod} goes on" in waits(backend, TRAIN, pod)
        backend.changed()
        fake.remove("pods", pod)
        until_told(backend, lambda: fake.created("jobs")[name] == 1)
        assert IDS[0] in backend.changed()


def test_a_sweep_with_an_orphan_goes_on_when_that_has_ended(
    fake: FakeApi, cluster: Cluster
) -> None:
    pod = orphaned(fake, put(fake, TRAIN))
    with World(fake):
        gone = threading.Timer(0.5, lambda: fake.remove("pods", pod))
        gone.start()
        assert drive(cluster, SWEEP, blocked_s=0.01) == 0
        gone.join()
    assert fake.created("jobs")[NAME] == 1
