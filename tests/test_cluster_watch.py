"""Test how the cluster's objects become the state of each point, with the reason in plain words."""

from __future__ import annotations

import contextlib
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import CANNOT_START, TOO_LATE
from stillhouse.identity import suite_key
from stillhouse.sweep.cluster.cache import NamespaceCache
from stillhouse.sweep.cluster.code_bundle import bundle
from stillhouse.sweep.cluster.facts import JobFacts, observed
from stillhouse.sweep.cluster.job_outcomes import attempts, attempts_patch, records_of, times_of
from stillhouse.sweep.cluster.jobspec import JobSpec, eval_step, prepare_step, train_step
from stillhouse.sweep.cluster.ledger import Ledger, score_of
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.cluster.objects import job_view, last_words, pod_view
from stillhouse.sweep.cluster.reasons import End, Reason, how_it_failed
from stillhouse.sweep.cluster.refusals import quantity
from stillhouse.sweep.cluster.watch import Watcher
from stillhouse.sweep.state import Observation, Record
from tests.builders.driving import POISON, cluster_of, ids, sweep_of
from tests.fakes.fake_api import FakeApi

SWEEP = sweep_of()
POINT, OTHER, *_ = SWEEP.points
assert SWEEP.suite is not None
SCORES = suite_key(SWEEP.suite)
CODE = bundle().digest
TRAIN = train_step(POINT, SWEEP)
EVAL = eval_step([POINT, OTHER], ["teacher-0123456789"], SWEEP)
ALONE = eval_step([POINT], [], SWEEP)


class Lab:
    """A namespace, played by hand, and a NamespaceCache that is told all of it."""

    def __init__(self, fake: FakeApi, watcher: Watcher) -> None:
        self.fake, self.watcher, self.cache = fake, watcher, watcher.cache

    def send(self, step: JobSpec = TRAIN, **labels: str) -> str:
        job = render(step, SWEEP.site, bundle().key)
        job["metadata"]["labels"] |= labels
        self.fake.put("jobs", job)
        return step.name

    def look(self, id_: str = POINT.id) -> Observation:
        self.watcher.refresh()
        return self.watcher.look(id_, SCORES)

    def why(self, id_: str = POINT.id) -> Reason:
        self.watcher.refresh()
        (job,) = self.cache.jobs_about(id_)
        reason = self.cache.why(job)
        assert reason is not None
        assert self.watcher.look(id_, SCORES).cause == reason.words
        return reason


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with FakeApi() as fake, cluster_of(fake, tmp_path / "kubeconfig") as cluster:
        yield Lab(fake, Watcher(cluster, SWEEP.site.runs_claim, CODE))


# ------------------------------------------------------------------------------- the states


def test_a_point_that_nobody_sent_is_new(lab: Lab) -> None:
    assert lab.look().state == "new"


def test_a_job_waits_until_its_pod_runs(lab: Lab) -> None:
    name = lab.send()
    assert (lab.look().state, lab.look().cause) == ("waiting", "its pod is being made")
    lab.fake.run_pod(name)
    assert lab.look() == Observation("running")


def test_a_trained_point_is_done_when_an_evaluation_that_lists_it_is_complete(lab: Lab) -> None:
    lab.fake.complete(lab.send())
    seen = lab.look()
    assert (seen.state, seen.is_trained, seen.cause) == ("waiting", True, "trained, to be scored")
    assert lab.watcher.look(POINT.id, None).state == "done"
    lab.fake.complete(lab.send(EVAL))
    assert lab.look().state == "done"
    assert lab.look(OTHER.id).state == "done"  # nobody scores what was not trained
    assert lab.watcher.look(POINT.id, "another") == Observation(
        "waiting", "trained, to be scored", is_trained=True
    )


def test_what_the_ledger_says_outlives_the_job(lab: Lab) -> None:
    ledger = lab.watcher.ledger
    ledger.write({POINT.id: Record("done")})
    assert lab.look().is_trained
    ledger.write({score_of(POINT.id, SCORES): Record("done")})
    assert lab.look().state == "done"
    ledger.write({OTHER.id: Record("failed", 43, "Diverged: NaN")})
    seen = lab.look(OTHER.id)
    assert (seen.state, seen.exit_code, seen.cause) == ("failed", 43, "Diverged: NaN")
    ledger.write({OTHER.id: Record("stopped", 46, "a rule")})
    assert lab.look(OTHER.id).state == "stopped"
    ledger.write({OTHER.id: Record("cancelled")})
    seen = lab.look(OTHER.id)
    assert (seen.state, seen.cause) == ("waiting", "cancelled")


def test_a_live_job_counts_more_than_an_old_failure(lab: Lab) -> None:
    lab.watcher.ledger.write({POINT.id: Record("failed", 42, "no")})
    lab.fake.run_pod(lab.send())
    assert lab.look().state == "running"


def test_unfinished_jobs_of_other_code_have_drifted_unless_they_run(lab: Lab) -> None:
    name = lab.send(TRAIN, **{"stillhouse/code": "0" * 16})
    seen = lab.look()
    assert (seen.state, "0" * 16 in str(seen.cause)) == ("drifted", True)
    lab.fake.run_pod(name)
    assert lab.look().state == "running"
    lab.fake.complete(name)
    assert lab.look().is_trained


ROWS = {"failed": {POINT.id: [42, "ContractError: NaN"]}, "done": OTHER.id}


def test_an_evaluation_says_of_each_member_how_it_ended(lab: Lab) -> None:
    lab.watcher.ledger.write({id_: Record("done") for id_ in (POINT.id, OTHER.id)})
    lab.fake.fail(lab.send(EVAL), 42, json.dumps({"exit_code": 42, "cause": "no", **ROWS}))
    seen = lab.look()
    assert (seen.state, seen.exit_code, seen.cause) == ("failed", 42, "ContractError: NaN")
    assert lab.look(OTHER.id).state == "done"
    (teacher,) = EVAL.baselines
    seen = observed(lab.cache.facts(teacher, SCORES, is_baseline=True))
    assert seen.state == "waiting", "it said nothing of it, and one is to blame"
    (job,) = lab.cache.jobs_about(POINT.id)
    found = records_of(job, lab.cache, 0.0)
    assert {key.partition(".")[0]: record.state for key, record in found.items()} == {
        POINT.id: "failed",
        OTHER.id: "done",
    }


def test_an_evaluation_that_blames_nobody_failed_for_all_that_it_has_not_scored(lab: Lab) -> None:
    lab.watcher.ledger.write({id_: Record("done") for id_ in (POINT.id, OTHER.id)})
    said = {"exit_code": 44, "cause": "OutOfMemory: eval_batch_size", "done": OTHER.id}
    lab.fake.fail(lab.send(EVAL), 44, json.dumps(said))
    assert (lab.look().state, lab.look(OTHER.id).state) == ("failed", "done")


def test_what_an_earlier_pod_scored_is_done_whatever_the_last_one_said(lab: Lab) -> None:
    lab.watcher.ledger.write({id_: Record("done") for id_ in (POINT.id, OTHER.id)})
    name = lab.send(EVAL)
    lab.fake.fail(name, 1, json.dumps({"exit_code": 1, "cause": "no", "done": OTHER.id}), ends=None)
    lab.fake.fail(name, 137, reason="Error", ends="BackoffLimitExceeded")
    assert (lab.look().state, lab.look(OTHER.id).state) == ("failed", "done")


def test_what_a_pod_said_of_its_rows_is_kept_when_it_is_gone(lab: Lab) -> None:
    lab.watcher.ledger.write({id_: Record("done") for id_ in (POINT.id, OTHER.id)})
    name = lab.send(EVAL)
    words = json.dumps({"exit_code": 1, "cause": "no", **ROWS})
    pod = lab.fake.fail(name, 1, words, ends=None)
    lab.look()
    (job,) = lab.cache.jobs_about(POINT.id)
    patch = attempts_patch(job, lab.cache.pods_of(job))
    assert patch is not None
    lab.watcher.cluster.patch("jobs", name, patch)
    lab.fake.remove("pods", pod)
    lab.fake.fail(name, 42, ends="BackoffLimitExceeded")
    for gone in lab.fake.names("pods"):
        lab.fake.remove("pods", gone)
    with contextlib.closing(Watcher(lab.watcher.cluster, SWEEP.site.runs_claim, CODE)) as later:
        later.refresh()
        assert later.look(OTHER.id, SCORES).state == "done"


def test_a_baseline_is_judged_like_a_point_that_is_trained(lab: Lab) -> None:
    lab.fake.run_pod(lab.send(EVAL))
    lab.watcher.refresh()
    what = EVAL.baselines[0]
    assert observed(lab.cache.facts(what, SCORES, is_baseline=True)).state == "running"
    lab.fake.complete(EVAL.name)
    lab.watcher.refresh()
    assert observed(lab.cache.facts(what, SCORES, is_baseline=True)).state == "done"


def test_what_is_being_deleted_because_it_failed_is_failed(lab: Lab) -> None:
    lab.fake.pods_linger = True
    name = lab.send()
    lab.fake.run_pod(name)
    lab.watcher.ledger.write({POINT.id: Record("failed", 44, "out of memory")})
    lab.watcher.cluster.delete("jobs", name, foreground=True)
    assert lab.look().state == "failed"
    lab.watcher.ledger.write({POINT.id: None})
    assert lab.look() == Observation("waiting", "its Job is being deleted")


def test_somebody_who_stops_a_point_says_when() -> None:
    stopped = observed(JobFacts(record=Record("cancelled"), deleted_at=7.0, cancelled_at=6.0))
    assert (stopped.state, stopped.asked_to_stop) == ("waiting", 7.0)
    assert observed(JobFacts(deleted_at=7.0)).cause == "its Job was deleted"


# ------------------------------------------------------------------ why something waits

NODES = (
    "0/12 nodes are available: 3 Insufficient nvidia.com/gpu, 9 node(s) had untolerated taint"
    " {spot: }. preemption: 0/12 nodes are available: 12 No preemption victims found."
)
PULL = (
    'Back-off pulling image "lab/x@sha256:11": ErrImagePull: rpc error: code = NotFound desc ='
    " failed to pull and unpack: not found"
)
QUOTA = (
    'pods "x-" is forbidden: exceeded quota: team, requested: requests.nvidia.com/gpu={},'
    " used: requests.nvidia.com/gpu=4, limited: requests.nvidia.com/gpu=4"
)
FORBIDDEN = 'pods "x-" is forbidden: '
WAITS: list[tuple[str, str, str, bool]] = [
    ("Unschedulable", NODES, "no node has 1 free nvidia.com/gpu (0/12 nodes: 3 too few", False),
    ("Unschedulable", "0/2 nodes are available: 2 Insufficient memory.",
     "no node has enough free memory (0/2 nodes: 2 too few memory)", False),
    ("Unschedulable", "0/2 nodes are available: 2 node(s) didn't match Pod's node"
     " affinity/selector.", "no node has the labels that are asked", False),
    ("Unschedulable", 'persistentvolumeclaim "stillhouse-runs" not found',
     'volume claim "stillhouse-runs" is missing: make it', True),
    ("Unschedulable", "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims."
     " not found", "volume claim not bound", True),
    ("ImagePullBackOff", PULL, "image not pulled: lab/x@sha256:11: not found; check", True),
    ("ErrImageNeverPull", 'Container image "x" is not present with pull policy of Never',
     "image not pulled: Container image", True),
    ("InvalidImageName", "", "image not pulled: InvalidImageName", True),
    ("CreateContainerConfigError", 'secret "wandb" not found', 'secret "wandb" is missing', True),
    ("CreateContainerConfigError", "couldn't find key token in Secret lab/wandb",
     'secret "wandb" has no key "token"', True),
    ("CreateContainerConfigError", 'configmap "c" not found', 'configmap "c" is missing', True),
    ("RunContainerError", "no such file", "its container cannot be made (RunContainerError)", True),
    ("FailedMount", 'MountVolume.SetUp failed for volume "runs" : timed out', 'volume "runs" not',
     True),
    ("FailedMount", 'MountVolume.SetUp failed for volume "bundle" : configmap "code" not found',
     'configmap "code" is missing: `stillhouse run` sends it again', True),
    ("FailedCreate", QUOTA.format(8), "quota: exceeded quota: team, requested", True),
    ("FailedCreate", QUOTA.format(1), "quota: exceeded quota: team, requested", False),
    ("FailedCreate", FORBIDDEN + "no PriorityClass with name urgent was found",
     "no PriorityClass with name urgent was found: set site.priority_class", True),
    ("FailedCreate", FORBIDDEN + 'violates PodSecurity "restricted:latest": runAsNonRoot',
     "pod security: violates", True),
    ("FailedCreate", FORBIDDEN + "error looking up service account lab/w: serviceaccount"
     ' "w" not found', 'service account "w" is missing: apply k8s/access.yaml', True),
    ("FailedCreate", "Internal error occurred: failed calling webhook", "its pod is refused",
     False),
    ("ContainerCreating", "", "starting on node node-1", False),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "message", "words", "cannot_start"), WAITS)
def test_a_pod_that_does_not_start_says_why(
    lab: Lab, reason: str, message: str, words: str, cannot_start: bool
) -> None:
    lab.fake.pending(lab.send(), reason, message)
    said = lab.why()
    assert (words in said.words, said.cannot_start) == (True, cannot_start), said
    assert "\n" not in said.words and len(said.words) < 400


def test_a_suspended_job_says_what_its_queue_says(lab: Lab) -> None:
    site = {"kueue.x-k8s.io/queue-name": "lab"}
    name = lab.send(TRAIN, **site)
    lab.fake.suspend(name)
    assert "Kueue has not seen it yet" in lab.why().words
    lab.fake.workload(name)
    assert lab.why().words.startswith("waits in queue lab: couldn't assign flavors")
    lab.fake.workload(name, state="preempted")
    assert lab.why().words.startswith("preempted, waits in queue lab again: couldn't")
    lab.fake.workload(name, state="inadmissible")
    assert "cannot admit it: LocalQueue lab doesn't exist" in lab.why().words
    assert lab.why().cannot_start
    lab.fake.workload(name, state="admitted")
    assert lab.why().words == "queue lab has admitted it"
    assert not lab.why().cannot_start


def test_between_two_attempts_the_last_one_is_named(lab: Lab) -> None:
    lab.fake.fail(lab.send(), 1, json.dumps({"exit_code": 1, "cause": "OSError: disk"}), ends=None)
    assert lab.why().words == (
        "between two attempts (the cluster waits 10 s before the second): OSError: disk"
    )


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("2Gi", 2 * 2**30), ("3k", 3000), ("1e3", 1000), ("4", 4)]
)
def test_quantities_are_numbers(text: str, number: float) -> None:
    assert quantity(text) == number


# ------------------------------------------------------------------------- how things ended


def failed(lab: Lab, *how: Any, **more: Any) -> End:
    """The end of the point's Job, which is there already or is made."""
    name = TRAIN.name if lab.fake.get("jobs", TRAIN.name) else lab.send()
    lab.fake.fail(name, *how, **more)
    lab.watcher.refresh()
    job = lab.cache.job(name)
    assert job is not None
    return lab.cache.how(job)


def test_poison_speaks_in_its_own_words(lab: Lab) -> None:
    assert failed(lab, 42, POISON) == End(42, "ConfigError: no", "the last line")


def test_a_pod_that_is_gone_leaves_its_code_in_the_jobs_condition(lab: Lab) -> None:
    name = lab.send()
    pod = lab.fake.fail(name, 43, POISON)
    lab.fake.remove("pods", pod)
    seen = lab.look()
    assert (seen.state, seen.exit_code) == ("failed", 43)
    assert seen.cause and seen.cause.startswith("exit code 43, diverged; its pod is gone")


def test_where_all_pods_are_gone_what_they_left_on_the_job_speaks(lab: Lab) -> None:
    name = lab.send()
    crash = json.dumps({"exit_code": 1, "cause": "OSError: disk", "tail": "t"})
    pod = lab.fake.fail(name, 1, crash, ends="BackoffLimitExceeded")
    job = job_view(lab.fake.get("jobs", name) or {})
    patch = attempts_patch(job, [pod_view(lab.fake.get("pods", pod) or {})])
    assert patch is not None
    lab.watcher.cluster.patch("jobs", name, patch)
    lab.fake.remove("pods", pod)
    assert lab.look().cause == "OSError: disk (given up after 1 attempt)"


def test_giving_up_counts_the_attempts(lab: Lab) -> None:
    name = lab.send()
    for _ in range(3):
        lab.fake.fail(name, 137, ends=None)
    assert failed(lab, 137, ends="BackoffLimitExceeded").cause == (
        "killed (SIGKILL) (given up after 4 attempts)"
    )


def test_a_deadline_has_a_code_of_its_own(lab: Lab) -> None:
    assert failed(lab, 143, ends="DeadlineExceeded").code == TOO_LATE


def test_out_of_memory_is_one_thing_whoever_says_it(lab: Lab) -> None:
    # Where process 1 was killed too, the message is the end of its log.
    log = "step 1\nstep 2\n"
    end = failed(lab, 137, log, "OOMKilled", ends="BackoffLimitExceeded")
    assert (end.code, "site.memory_gib" in end.cause, end.tail) == (44, True, "step 1\nstep 2")


def test_our_own_words_count_more_than_the_nodes(lab: Lab) -> None:
    words = json.dumps({"exit_code": 44, "cause": "OutOfMemory: step 3"})
    assert failed(lab, 44, words, "OOMKilled") == End(44, "OutOfMemory: step 3")


def test_without_words_the_end_of_the_log_speaks(lab: Lab) -> None:
    end = failed(lab, 1, "Traceback\n  line 3\nOSError: disk full\n", ends="BackoffLimitExceeded")
    assert end.cause == "exit code 1: OSError: disk full (given up after 1 attempt)"
    assert end.tail == "Traceback\n  line 3\nOSError: disk full"


def test_a_lost_node_is_said(lab: Lab) -> None:
    name = lab.send()
    pod = pod_view(lab.fake.get("pods", lab.fake.run_pod(name)) or {})
    lost = replace(pod, phase="Failed", disrupted="DeletionByTaintManager")
    job = job_view(lab.fake.get("jobs", name) or {})
    assert how_it_failed(job, [lost]).cause == "its node was lost"


def test_a_termination_message_may_be_cut_or_no_json() -> None:
    assert last_words('{"exit_code": 42, "cause": "a \\"b\\"", "tail": "cut').cause == 'a "b"'
    assert last_words("plain words").cause == "plain words"
    assert last_words("").cause is None


# -------------------------------------------------------------------- what is kept of an end


def test_a_failed_attempt_is_kept_once_however_often_it_is_seen(lab: Lab) -> None:
    name = lab.send()
    for code in range(1, 8):
        lab.fake.fail(
            name, code, json.dumps({"exit_code": code, "cause": "c", "tail": "t"}), ends=None
        )
    pods = [pod_view(pod) for pod in lab.fake.pods_of(name)]
    patch = attempts_patch(job_view(lab.fake.get("jobs", name) or {}), pods)
    assert patch is not None
    lab.watcher.cluster.patch("jobs", name, patch)
    job = job_view(lab.fake.get("jobs", name) or {})
    assert [one["code"] for one in attempts(job)] == [3, 4, 5, 6, 7]
    assert attempts(job)[0]["tail"] == "t"
    again = attempts_patch(job, pods[2:])
    assert again is None


@pytest.fixture
def clock(lab: Lab) -> Callable[[int], None]:
    """Sets the server's clock, in seconds of one minute."""

    def at(second: int) -> None:
        lab.fake.store.now = lambda: f"2026-01-01T00:00:{second:02}Z"

    return at


def test_time_is_split_into_waiting_starting_running_and_lost(
    lab: Lab, clock: Callable[[int], None]
) -> None:
    clock(0)
    name = lab.send()
    clock(5)
    lab.fake.run_pod(name)
    clock(15)
    lab.fake.fail(name, 1, ends=None)  # 10 seconds lost
    clock(20)
    lab.fake.pending(name)
    clock(23)
    lab.fake.run_pod(name)  # 3 seconds starting
    clock(43)
    lab.fake.complete(name)  # 20 seconds running
    job = job_view(lab.fake.get("jobs", name) or {})
    times = times_of(job, [pod_view(pod) for pod in lab.fake.pods_of(name)], until=0.0)
    assert (times.starting, times.running, times.lost, times.queued) == (3, 20, 10, 10)


def test_a_pair_of_points_that_one_job_scored_shares_its_time(
    lab: Lab, clock: Callable[[int], None]
) -> None:
    clock(0)
    name = lab.send(EVAL)
    lab.fake.run_pod(name)
    clock(30)
    lab.fake.complete(name)
    lab.watcher.refresh()
    job = lab.cache.job(name)
    assert job is not None
    records = records_of(job, lab.cache, 0.0)
    assert set(records) == {score_of(w, SCORES) for w in (*EVAL.points, *EVAL.baselines)}
    assert {r.running for r in records.values()} == {10.0}
    assert {r.state for r in records.values()} == {"done"}
    lab.watcher.ledger.write({score_of(POINT.id, SCORES): Record("done")})
    assert len(records_of(job, lab.cache, 0.0)) == 2


def test_an_end_from_outside_is_recorded_as_it_is_told(lab: Lab) -> None:
    name = lab.send()
    lab.watcher.refresh()
    job = lab.cache.job(name)
    assert job is not None
    end = End(CANNOT_START, "cannot start: image not pulled")
    assert records_of(job, lab.cache, 5.0, end)[POINT.id].code == CANNOT_START


def test_an_end_that_was_told_is_not_told_anew_by_who_finds_no_pod(lab: Lab) -> None:
    name = lab.send()
    pod = lab.fake.fail(name, 43, POISON)
    lab.watcher.refresh()
    job = lab.cache.job(name)
    assert job is not None
    told = records_of(job, lab.cache, 0.0)
    lab.watcher.ledger.write(told)
    lab.fake.remove("pods", pod)
    later = Watcher(lab.watcher.cluster, "stillhouse-runs")
    later.refresh()
    assert records_of(job, later.cache, 0.0) == {}
    assert later.look(POINT.id, SCORES).cause == told[POINT.id].cause


# ------------------------------------------------------------------------ reading a cluster


def test_one_look_is_one_list_of_what_is_needed(lab: Lab) -> None:
    for step in (TRAIN, EVAL):
        lab.fake.complete(lab.send(step))
    before = dict(lab.fake.requests)
    lab.watcher.refresh()
    new = {key: n - before.get(key, 0) for key, n in lab.fake.requests.items()}
    assert {key for key, n in new.items() if n} == {("list", "jobs"), ("list", "configmaps")}


def test_what_may_not_be_read_only_costs_its_words(lab: Lab) -> None:
    lab.fake.deny("list", "events")
    lab.fake.pending(lab.send(), "FailedCreate", QUOTA.format(8))
    assert lab.look() == Observation("waiting", "its pod is being made")


def test_a_follower_is_told_what_happens(lab: Lab) -> None:
    lab.watcher.follow()
    name = lab.send()
    wait_for(lab, "waiting")
    lab.fake.run_pod(name)
    wait_for(lab, "running")
    lab.fake.complete(name)
    wait_for_trained(lab)
    assert lab.watcher.look(POINT.id, SCORES).is_trained
    lab.watcher.close()


def test_a_follower_survives_history_that_is_gone_and_a_server_that_goes_away(lab: Lab) -> None:
    lab.watcher.follow()
    name = lab.send()
    wait_for(lab, "waiting")
    lab.fake.away()
    lab.fake.run_pod(name)
    lab.fake.forget()
    lab.fake.back()
    wait_for(lab, "running")
    lab.fake.away()
    lab.fake.remove("jobs", name)
    lab.fake.forget()
    lab.fake.back()
    seen = wait_for(lab, "waiting")
    while seen.cause == "its pod is being made":  # the pods were listed before the Jobs
        lab.watcher.wait(10.0)
        assert lab.cache.touched(), "nothing happened in time"
        seen = wait_for(lab, "waiting")
    assert (seen.cause, seen.asked_to_stop is not None) == ("its Job was deleted", True)
    lab.watcher.close()


def test_what_ends_a_thread_is_told_to_who_waits(lab: Lab) -> None:
    lab.fake.deny("watch", "pods")
    lab.watcher.follow()
    with pytest.raises(Exception, match="cannot watch resource"):
        while True:
            lab.watcher.wait(10.0)
            lab.cache.touched()
    lab.watcher.close()


def wait_for(lab: Lab, state: str) -> Observation:
    while (seen := lab.watcher.look(POINT.id, SCORES)).state != state:
        lab.watcher.wait(10.0)
        assert lab.cache.touched(), "nothing happened in time"
    return seen


def wait_for_trained(lab: Lab) -> None:
    while not lab.watcher.look(POINT.id, SCORES).is_trained:
        lab.watcher.wait(10.0)
        assert lab.cache.touched(), "nothing happened in time"


def test_ten_thousand_jobs_take_little_memory(lab: Lab) -> None:
    lab.fake.complete(lab.send())
    text = json.dumps(lab.fake.get("jobs", TRAIN.name))
    cache = NamespaceCache(Ledger(lab.watcher.cluster, SWEEP.site.runs_claim))
    tracemalloc.start()
    for number in range(200):
        job = json.loads(text)
        id_ = f"{number:010x}"
        job["metadata"] |= {"name": f"tiny-gkd-{id_}", "uid": f"{number:036}"}
        job["metadata"]["labels"]["stillhouse/point"] = id_
        cache.learn("jobs", job)
    del job
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 200 * 4_000, f"{size / 200:.0f} bytes a Job"
    assert sys.getsizeof(cache.jobs()[0]) < 400


def test_a_pair_that_is_prepared_has_a_job_that_names_it() -> None:
    step = prepare_step(POINT, SWEEP)
    assert step.name.rpartition("-")[2] == step.id
    assert ids(SWEEP)[0] == POINT.id
