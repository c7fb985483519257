"""Test the sweep loop over Jobs: each is created once until it ends, whatever drivers do."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import AGAIN, CANNOT_START, ConfigError, ContractError, Interrupted
from stillhouse.identity import suite_key
from stillhouse.sweep import driver as loop
from stillhouse.sweep.backend import Finished, Task
from stillhouse.sweep.cluster.backend import forget_failures
from stillhouse.sweep.cluster.code_bundle import bundle
from stillhouse.sweep.cluster.connect import Cluster
from stillhouse.sweep.cluster.jobs import JobExecutor
from stillhouse.sweep.cluster.jobspec import JobSpec, JobSpecs
from stillhouse.sweep.cluster.ledger import Ledger, cancel_sweep, score_of
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.cluster.objects import job_view
from stillhouse.sweep.driver import Driver
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.progress import Lines
from stillhouse.sweep.state import Record, record_of
from tests.builders.driving import (
    POISON,
    World,
    backend_of,
    cluster_of,
    drive,
    ids,
    is_over,
    start_driver,
    sweep_of,
    until,
    until_told,
)
from tests.fakes.fake_api import FakeApi
from tests.fakes.faults import Faults, Kind

SWEEP = sweep_of()
IDS = ids(SWEEP)
GROUP = "tiny/int4"
assert SWEEP.suite is not None
SCORES = suite_key(SWEEP.suite)
RATES: dict[Kind, float] = {
    "drop_before": 0.05, "drop_after": 0.05, "busy": 0.05, "error": 0.05, "slow": 0.02,
    "twice": 0.05, "cut": 0.05,
}  # fmt: skip


@pytest.fixture
def backend(cluster: Cluster) -> Iterator[JobExecutor]:
    with backend_of(cluster, SWEEP) as one:
        yield one


def step_of(action: Action, sweep: Sweep = SWEEP) -> JobSpec:
    return JobSpecs(sweep).of(action)


TRAIN = Action("train", GROUP, (IDS[0],))
NAME = step_of(TRAIN).name


def task(action: Action = TRAIN) -> Task:
    return Task(action, (), (), None, Path("log"))


def put(fake: FakeApi, action: Action = TRAIN, **labels: str) -> str:
    """The Job of an action, as another driver left it."""
    step = step_of(action)
    job = render(step, SWEEP.site, bundle().key)
    job["metadata"]["labels"] |= labels
    fake.put("jobs", job)
    return step.name


def states(cluster: Cluster, sweep: Sweep = SWEEP) -> list[str]:
    with backend_of(cluster, sweep) as backend:
        seen = backend.snapshot().observations
    return [seen[id_].state for id_ in ids(sweep)]


def trained(cluster: Cluster) -> None:
    """All points are, before a driver looks: so it is known which of them share a pack."""
    Ledger(cluster, SWEEP.site.runs_claim).write({id_: Record("done") for id_ in IDS})


def records(fake: FakeApi) -> dict[str, Record]:
    """What the ledger says, by its keys."""
    found = fake.all("configmaps", "stillhouse/kind=ledger")
    return {key: record_of(said) for item in found for key, said in item.get("data", {}).items()}


def finished(backend: JobExecutor) -> Finished:
    """The next task that ends."""
    found: list[Finished] = []
    until(lambda: found.extend(backend.wait(0.05)) or found)
    (one,) = found
    return one


def made(fake: FakeApi, backend: JobExecutor, name: str = NAME) -> None:
    """Wait until a Job is there and the backend knows."""
    until_told(backend, lambda: backend.cache.job(name))


# --------------------------------------------------------------------------- from start to end


def test_each_task_is_one_job_and_its_end_is_kept(fake: FakeApi, cluster: Cluster) -> None:
    with World(fake) as world:
        assert drive(cluster, SWEEP) == 0
    jobs = fake.created("jobs")
    assert len(jobs) == 1 + 4 + 2 and set(jobs.values()) == {1}
    assert world.ended == jobs
    done = {key for key, record in records(fake).items() if record.state == "done"}
    assert SWEEP.suite is not None
    scores = suite_key(SWEEP.suite)
    assert done >= {*IDS, *(score_of(id_, scores) for id_ in IDS)}
    assert len(done) == 1 + 4 + 4 + 3
    assert fake.created("configmaps")[f"stillhouse-code-{bundle().key}"] == 1


def test_what_is_sent_is_what_is_rendered(fake: FakeApi, backend: JobExecutor) -> None:
    backend.start(task())
    made(fake, backend)
    job, rendered = fake.get("jobs", NAME), render(step_of(TRAIN), SWEEP.site, bundle().key)
    assert job is not None
    assert job["metadata"]["labels"].items() >= rendered["metadata"]["labels"].items()
    assert job["metadata"]["annotations"] == rendered["metadata"]["annotations"]
    sent, meant = (one["spec"]["template"]["spec"]["containers"][0] for one in (job, rendered))
    assert sent["args"] == meant["args"]


def test_a_second_run_sends_nothing_also_when_the_jobs_are_gone(
    fake: FakeApi, cluster: Cluster
) -> None:
    with World(fake):
        assert drive(cluster, SWEEP, keep_s=0.0) == 0
        assert drive(cluster, SWEEP) == 0
    for name in fake.names("jobs"):
        fake.remove("jobs", name)
    before = fake.created("jobs")
    assert drive(cluster, SWEEP) == 0
    assert fake.created("jobs") == before


def test_poison_is_not_tried_twice_and_what_infrastructure_broke_is_the_clusters_affair(
    fake: FakeApi, cluster: Cluster
) -> None:
    script = {IDS[0]: ("poison",), IDS[1]: ("crash", "evicted", "crash"), IDS[2]: ("give-up",)}
    with World(fake, script):
        assert drive(cluster, SWEEP) == 1
        assert drive(cluster, SWEEP) == 1
    assert set(fake.created("jobs").values()) == {1}
    assert states(cluster) == ["failed", "done", "failed", "done"]
    record = records(fake)[IDS[0]]
    assert (record.code, record.cause, record.tail) == (42, "ConfigError: no", "the last line")
    assert records(fake)[IDS[2]].cause == "exit code 1 (given up after 1 attempt)"
    assert step_of(Action("train", GROUP, (IDS[0],))).name in fake.names("jobs")


def test_a_broken_adapter_does_not_take_its_pack_with_it(fake: FakeApi, cluster: Cluster) -> None:
    pack = step_of(Action("eval", GROUP, (IDS[2], IDS[3]))).name
    trained(cluster)
    with World(fake, {pack: ("rows",)}):
        assert drive(cluster, SWEEP) == 1
        assert states(cluster) == ["done", "done", "failed", "done"]
        assert set(fake.created("jobs").values()) == {1}
        record = records(fake)[score_of(IDS[2], SCORES)]
        assert (record.code, record.cause) == (42, "ContractError: NaN")
        ledger = Ledger(cluster, SWEEP.site.runs_claim)
        ledger.read()
        forget_failures(
            cluster, ledger, [job_view(fake.get("jobs", pack) or {})], [score_of(IDS[2], SCORES)]
        )
        assert drive(cluster, SWEEP) == 0
    again = step_of(Action("eval", GROUP, (IDS[2],))).name
    assert fake.created("jobs")[again] == 1 and fake.created("jobs")[pack] == 1


def test_who_killed_a_pod_is_blamed_and_the_others_are_scored_by_another(
    fake: FakeApi, cluster: Cluster
) -> None:
    pack = step_of(Action("eval", GROUP, (IDS[2], IDS[3]))).name
    trained(cluster)
    with World(fake, {pack: ("crash", "death")}):
        assert drive(cluster, SWEEP) == 1
    assert states(cluster) == ["done", "done", "failed", "done"]
    record = records(fake)[score_of(IDS[2], SCORES)]
    cause = "killed by SIGKILL, while it was scored (given up after 2 attempts)"
    assert (record.code, record.cause) == (137, cause)
    assert fake.created("jobs")[step_of(Action("eval", GROUP, (IDS[3],))).name] == 1


def test_what_an_earlier_version_wanted_to_score_alone_is_scored_in_its_pack(
    fake: FakeApi, cluster: Cluster
) -> None:
    """Its failed Job has the name of the one to be made, and goes."""
    pack = Action("eval", GROUP, (IDS[2], IDS[3]))
    name = put(fake, pack)
    fake.fail(name, 42, POISON)
    ended = job_view(fake.get("jobs", name) or {}).ended
    ledger = Ledger(cluster, SWEEP.site.runs_claim)
    alone = Record("alone", 42, "ConfigError: no", at=ended or 0.0)
    ledger.write({score_of(id_, SCORES): alone for id_ in (IDS[2], IDS[3])})
    trained(cluster)
    assert states(cluster) == ["waiting"] * 4
    with World(fake):
        assert drive(cluster, SWEEP) == 0
    assert states(cluster) == ["done"] * 4
    assert fake.created("jobs")[name] == 1, "beside the one that was put there"


def test_a_pair_that_cannot_be_had_fails_no_point_and_is_tried_by_the_next_run(
    fake: FakeApi, cluster: Cluster
) -> None:
    with World(fake, {"prepare": ("poison",)}):
        with backend_of(cluster, SWEEP) as backend:
            one = Driver(SWEEP, backend, Lines(SWEEP, [].append))
            assert one.run() == 1
        assert one.failures() == {f"the pair of {GROUP}": "ConfigError: no"}
        assert states(cluster) == ["new"] * 4
        assert drive(cluster, SWEEP) == 0
    assert fake.created("jobs")[step_of(Action("prepare", GROUP)).name] == 2


# ------------------------------------------------------------------- killed at any moment

KILLS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(1, 40), st.booleans()), min_size=6, max_size=6
)
FATES = st.sampled_from([(), ("crash",), ("evicted", "crash"), ("poison",), ("crash", "give-up")])


@pytest.mark.parametrize("sweeps", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_drivers_that_are_killed_six_times_a_sweep_make_every_job_once(
    tmp_path_factory: pytest.TempPathFactory, sweeps: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "kubeconfig"
    tried = 0

    @settings(max_examples=sweeps, deadline=None, derandomize=True, database=None)
    @given(KILLS, st.tuples(FATES, FATES, FATES, FATES))
    def one(kills: list[tuple[int, int, bool]], fates: tuple[tuple[str, ...], ...]) -> None:
        nonlocal tried
        make_every_job_once(path, kills, fates)
        tried += 1

    one()
    assert tried == sweeps


def make_every_job_once(
    path: Path, kills: list[tuple[int, int, bool]], fates: tuple[tuple[str, ...], ...]
) -> None:
    """Drive a sweep whose drivers are killed, and whose Jobs meet these fates, to its end."""
    with FakeApi() as fake, World(fake, dict(zip(IDS, fates, strict=True))) as world:
        for seed, write, is_done in kills:
            with contextlib.suppress(Interrupted):
                drive_badly(fake, path, seed, write, is_done)
            check_nothing_is_lost(fake)
        with cluster_of(fake, path) as cluster:
            code = drive(cluster, SWEEP, keep_s=0.0)
        failed = [bool(set(fate) & {"poison", "give-up"}) for fate in fates]
        assert code == any(failed)
        ends = [records(fake)[id_].state for id_ in IDS]
        assert ends == ["failed" if has else "done" for has in failed]
        assert set(fake.created("jobs").values()) == {1}
        assert world.ended == fake.created("jobs")


def drive_badly(fake: FakeApi, path: Path, seed: int, write: int, is_done: bool) -> int:
    """A driver behind a bad connection, killed at a write that is, or is not, done."""
    door = fake.door(Faults(seed, slow_s=0.002))
    with cluster_of(door, path) as cluster:
        door.faults.rates = RATES
        door.faults.kill_at, door.faults.kill_after = 1 + write, is_done
        door.faults.on_kill = cluster.stop.set
        write_s = 0.05 if seed % 2 else 0.0  # as a large sweep does, or a small one
        return drive(cluster, SWEEP, keep_s=0.0, write_s=write_s)


def check_nothing_is_lost(fake: FakeApi) -> None:
    """Whatever was deleted stands in the ledger."""
    done = {key for key, record in records(fake).items() if record.state == "done"}
    for name in fake.deleted("jobs"):
        id_ = name.rpartition("-")[2]
        key = f"prepare.{id_}" if name.startswith("prepare") else id_
        assert key in done or name.startswith("eval"), f"{name} is gone and nobody wrote it down"


@pytest.fixture
def without_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main thread may listen to signals; these drivers are threads."""
    monkeypatch.setattr(loop.Interrupts, "counted", lambda self: contextlib.nullcontext())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("without_signals")
def test_drivers_that_run_at_once_behind_bad_connections_make_every_job_once(
    fake: FakeApi, tmp_path: Path, seed: int
) -> None:
    codes: list[int] = []
    sweep = sweep_of(8)

    def one(number: int) -> None:
        door = fake.door(Faults(10 * seed + number, slow_s=0.002))
        with cluster_of(door, tmp_path / f"kubeconfig-{number}") as cluster:
            door.faults.rates = RATES
            codes.append(drive(cluster, sweep))

    with World(fake, {IDS[1]: ("crash",), IDS[2]: ("evicted",)}) as world:
        drivers = [threading.Thread(target=one, args=(number,)) for number in range(3)]
        for driver in drivers:
            driver.start()
        for driver in drivers:
            driver.join()
    assert codes == [0, 0, 0]
    assert set(fake.created("jobs").values()) == {1}
    assert world.ended == fake.created("jobs")


def test_processes_that_are_killed_leave_nothing_undone(fake: FakeApi, tmp_path: Path) -> None:
    path = fake.kubeconfig(tmp_path / "kubeconfig")
    world = World(fake)  # stepped by hand: a driver is killed between two things that happen
    for count in (1, 3, 5):
        driver = start_driver(path, 4)
        until(lambda: world.step() or sum(fake.created("jobs").values()) >= count)  # noqa: B023
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    driver = start_driver(path, 4)
    until(lambda: world.step() or driver.poll() is not None)
    assert driver.returncode == 0
    assert len(fake.created("jobs")) == 7 and set(fake.created("jobs").values()) == {1}
    assert world.ended == fake.created("jobs")


# -------------------------------------------------------------------------- making a Job once


def test_a_job_that_is_there_is_taken_over(fake: FakeApi, backend: JobExecutor) -> None:
    name = put(fake)
    backend.start(task())
    fake.complete(name)
    ended = finished(backend)
    assert (ended.action, ended.exit_code, ended.cause) == (TRAIN, 0, None)
    assert fake.created("jobs")[name] == 0


def test_jobs_of_others_are_live_from_the_start(fake: FakeApi, cluster: Cluster) -> None:
    pack = Action("eval", GROUP, (IDS[0], IDS[1]))
    put(fake)
    put(fake, pack)
    prepare = put(fake, Action("prepare", GROUP))
    with backend_of(cluster, SWEEP) as backend:
        assert set(backend.live()) == {TRAIN, pack, Action("prepare", GROUP)}
        fake.complete(prepare)
        assert finished(backend).action.kind == "prepare"
        assert backend.snapshot().prepared == {GROUP: True}


def test_who_comes_late_reads_of_the_end_before_making_a_job_again(
    fake: FakeApi, cluster: Cluster, tmp_path: Path
) -> None:
    door = fake.door(Faults())
    with cluster_of(door, tmp_path / "late") as late, backend_of(late, SWEEP) as backend:
        away: list[Kind] = ["unavailable"] * 1000
        door.faults.script("GET", "watch=1", *away)
        backend.creator.look_valid_s = 0.0
        # Meanwhile another driver sees the point through, and deletes its Job.
        Ledger(cluster, SWEEP.site.runs_claim).write({IDS[0]: Record("done")})
        assert backend.look(IDS[0]).state == "new"
        backend.start(task())
        assert finished(backend) == Finished(TRAIN, 0, None, 0.0)
    assert fake.created("jobs")[NAME] == 0


def test_who_changed_the_ledger_since_we_decided_is_heeded(
    cluster: Cluster, backend: JobExecutor
) -> None:
    backend.creator.look_valid_s = 0.0
    Ledger(cluster, SWEEP.site.runs_claim).write({IDS[0]: Record("cancelled")})
    backend.start(task())
    end = finished(backend)
    assert (end.exit_code, end.cause) == (AGAIN, "another driver was quicker")
    seen = backend.look(IDS[0])
    assert seen.state == "waiting" and seen.asked_to_stop is not None


@pytest.mark.parametrize("fault", ["drop_after", "twice"])
def test_a_create_whose_answer_is_lost_is_one_job(
    fake: FakeApi, cluster: Cluster, fault: Any
) -> None:
    fake.faults.script("POST", "/jobs", *[fault] * 7)
    with World(fake):
        assert drive(cluster, SWEEP) == 0
    assert len(fake.created("jobs")) == 7 and set(fake.created("jobs").values()) == {1}


def test_a_job_of_that_name_that_is_not_ours_is_an_error(
    fake: FakeApi, backend: JobExecutor
) -> None:
    job = render(step_of(TRAIN), SWEEP.site, bundle().key)
    fake.put("jobs", job | {"metadata": {"name": NAME, "labels": {"app": "other"}}})
    backend.start(task())
    with pytest.raises(ConfigError, match=f"Job {NAME} is there and is not ours"):
        finished(backend)


def test_a_job_of_that_name_with_another_content_is_drift(
    fake: FakeApi, backend: JobExecutor
) -> None:
    put(fake, TRAIN, **{"stillhouse/hash": "0" * 40})
    backend.start(task())
    with pytest.raises(ContractError, match="another content .* drift"):
        finished(backend)


def test_a_job_that_is_still_being_deleted_is_waited_for(fake: FakeApi, cluster: Cluster) -> None:
    fake.pods_linger = True
    name = put(fake)
    fake.run_pod(name)
    cluster.delete("jobs", name, foreground=True)
    with backend_of(cluster, SWEEP) as backend:
        backend.blocked_s = 0.01
        assert backend.live() == []
        assert backend.look(IDS[0]).cause == "its Job is being deleted"
        backend.start(task())
        until_told(backend, lambda: backend.creator.cluster.requests > 30)
        assert fake.created("jobs")[name] == 0
        fake.end_pods(name)
        until_told(backend, lambda: fake.created("jobs")[name])
        assert backend.live() == [TRAIN]


def test_a_quota_of_jobs_is_waited_for(fake: FakeApi, backend: JobExecutor) -> None:
    fake.quota("jobs", 0)
    backend.blocked_s = 0.01
    backend.start(task())
    until_told(backend, lambda: fake.requests["create", "jobs"] > 2)
    assert (backend.live(), fake.names("jobs")) == ([TRAIN], [])
    fake.quota("jobs", None)
    made(fake, backend)


def test_a_full_quota_does_not_hide_a_job_that_is_there(
    fake: FakeApi, backend: JobExecutor
) -> None:
    name = put(fake)
    fake.quota("jobs", 0)
    backend.start(task())
    fake.complete(name)
    assert finished(backend).exit_code == 0


def test_a_create_that_waits_out_an_outage_revives_nothing(
    fake: FakeApi, cluster: Cluster, backend: JobExecutor
) -> None:
    backend.creator.look_valid_s = 0.0
    other = Ledger(cluster, SWEEP.site.runs_claim)
    down: list[Kind] = ["unavailable"] * 20
    fake.faults.script("POST", "/jobs", *down)
    backend.start(task())
    until(lambda: fake.faults.struck["unavailable"])
    other.write({IDS[0]: Record("done")})  # another driver saw it through meanwhile
    assert finished(backend).exit_code == 0
    assert not fake.created("jobs")


# --------------------------------------------------------------------------- what is kept


def test_nothing_is_deleted_while_the_ledger_cannot_be_written(
    fake: FakeApi, cluster: Cluster
) -> None:
    with backend_of(cluster, SWEEP, keep_s=0.0) as backend:
        backend.start(task())
        made(fake, backend)
        cluster.longest_delay_s = 0.001
        down: list[Kind] = ["unavailable"] * 50
        fake.faults.script("POST", "/configmaps", *down)  # the first write makes it
        fake.complete(NAME)
        assert finished(backend).exit_code == 0
        assert fake.faults.struck["unavailable"] == 50
        until_told(backend, lambda: fake.deleted("jobs")[NAME])
    assert records(fake)[IDS[0]].state == "done"


def test_ends_of_a_large_sweep_are_gathered_and_written_when_a_driver_leaves(
    fake: FakeApi, cluster: Cluster
) -> None:
    with backend_of(cluster, SWEEP, keep_s=0.0) as backend:
        backend.write_s = 99.0
        backend.start(task())
        made(fake, backend)
        fake.complete(NAME)
        assert finished(backend).exit_code == 0
        assert (records(fake), fake.names("jobs")) == ({}, [NAME])
        assert backend.look(IDS[0]).is_trained
    assert records(fake)[IDS[0]].state == "done"


def test_a_job_stays_a_while_after_its_end_was_written(fake: FakeApi, cluster: Cluster) -> None:
    with World(fake):
        assert drive(cluster, SWEEP) == 0
    assert not fake.deleted("jobs")
    assert {job["spec"]["ttlSecondsAfterFinished"] for job in fake.all("jobs")} == {300}


def test_a_failed_attempt_leaves_its_cause_on_the_job(fake: FakeApi, backend: JobExecutor) -> None:
    backend.start(task())
    made(fake, backend)
    crash = {"exit_code": 1, "cause": "OSError: disk", "tail": "last line"}
    pod = fake.fail(NAME, 1, json.dumps(crash), ends=None)

    def told() -> list[dict[str, Any]]:
        job = fake.get("jobs", NAME) or {}
        return json.loads(job["metadata"]["annotations"].get("stillhouse/attempts", "[]"))

    until_told(backend, told)
    (one,) = told()
    assert (one["pod"], one["code"], one["cause"]) == (pod, 1, "OSError: disk")
    fake.remove("pods", pod)
    fake.disrupt(NAME)
    until_told(backend, lambda: len(told()) == 2)
    assert told()[1]["cause"] == "it was evicted (a drain, say)"


def test_what_the_node_killed_for_its_memory_is_not_tried_again(
    fake: FakeApi, cluster: Cluster, backend: JobExecutor
) -> None:
    backend.start(task())
    made(fake, backend)
    fake.fail(NAME, 137, reason="OOMKilled", ends=None)
    assert finished(backend).exit_code == 44
    until_told(backend, lambda: fake.deleted("jobs")[NAME])
    assert backend.look(IDS[0]).state == "failed"
    assert records(fake)[IDS[0]].code == 44


def test_an_evaluation_of_several_goes_on_when_one_of_them_takes_too_much_memory(
    fake: FakeApi, cluster: Cluster
) -> None:
    """Its next pod knows by a note on the volume which one it was, and says so in the end."""
    pack = Action("eval", GROUP, (IDS[0], IDS[1]))
    name = step_of(pack).name
    Ledger(cluster, SWEEP.site.runs_claim).write({id_: Record("done") for id_ in IDS})
    with backend_of(cluster, SWEEP) as backend:
        backend.start(task(pack))
        made(fake, backend, name)
        fake.fail(name, 137, reason="OOMKilled", ends=None)
        until_told(backend, lambda: "stillhouse/attempts" in notes(fake, name))
        assert fake.deleted("jobs")[name] == 0 and backend.live() == [pack]
        said = {"exit_code": 42, "cause": "no", "done": IDS[1], "failed": {IDS[0]: [42, "died"]}}
        fake.fail(name, 42, json.dumps(said))
        assert finished(backend).exit_code == 42
        assert [backend.look(id_).state for id_ in IDS[:2]] == ["failed", "done"]


def notes(fake: FakeApi, name: str) -> dict[str, str]:
    return (fake.get("jobs", name) or {})["metadata"]["annotations"]


def test_what_cannot_start_holds_its_slot_for_a_while_only(fake: FakeApi, cluster: Cluster) -> None:
    with backend_of(cluster, sweep_of(4, "patience_s=1")) as backend:
        backend.start(task())
        made(fake, backend)
        fake.pending(NAME, "ImagePullBackOff", "not found")
        until_told(backend, lambda: "image" in str(backend.look(IDS[0]).cause))
        assert backend.live() == [TRAIN]
        end = finished(backend)
        assert end.exit_code == CANNOT_START
        assert str(end.cause).startswith("cannot start: image not pulled: not found")
        until_told(backend, lambda: fake.deleted("jobs")[NAME])
        assert backend.live() == []
        assert backend.look(IDS[0]).state == "failed"


def test_a_job_that_waits_for_room_waits_as_long_as_it_takes(
    fake: FakeApi, cluster: Cluster
) -> None:
    with backend_of(cluster, sweep_of(4, "patience_s=1")) as backend:
        backend.start(task())
        made(fake, backend)
        fake.pending(NAME)
        until_told(backend, lambda: "free nvidia" in str(backend.look(IDS[0]).cause))
        patience_is_over = time.monotonic() + 1.2
        until_told(backend, lambda: time.monotonic() > patience_is_over)
        assert backend.live() == [TRAIN]


# ---------------------------------------------------------------------- people who interfere


def test_a_job_that_somebody_deletes_is_not_made_again_by_this_run(
    fake: FakeApi, cluster: Cluster
) -> None:
    with backend_of(cluster, SWEEP) as backend:
        backend.start(task())
        made(fake, backend)
        fake.remove("jobs", NAME)
        end = finished(backend)
        assert (end.exit_code, end.cause) == (AGAIN, "its Job was deleted")
        with World(fake):
            one = Driver(SWEEP, backend, Lines(SWEEP, [].append))
            one.since = 0.0
            assert one.run() == AGAIN
    assert fake.created("jobs")[NAME] == 1
    with World(fake):
        assert drive(cluster, SWEEP) == 0
    assert fake.created("jobs")[NAME] == 2


def test_a_cancelled_sweep_ends_every_driver_before_it_refills(
    fake: FakeApi, cluster: Cluster, backend: JobExecutor
) -> None:
    backend.start(task())
    made(fake, backend)
    assert not backend.is_cancelled()
    cancel_sweep(cluster, SWEEP.name)
    fake.remove("jobs", NAME)
    finished(backend)
    assert backend.is_cancelled()


def test_what_was_cancelled_before_does_not_end_a_new_driver(
    fake: FakeApi, cluster: Cluster
) -> None:
    with backend_of(cluster, SWEEP):
        cancel_sweep(cluster, SWEEP.name)
    with backend_of(cluster, SWEEP) as backend:
        assert not backend.is_cancelled()


def test_a_point_that_somebody_wants_to_be_tried_again_is_noticed(
    fake: FakeApi, cluster: Cluster
) -> None:
    name = put(fake)
    fake.fail(name, 42, POISON)
    with backend_of(cluster, SWEEP) as backend:
        assert backend.look(IDS[0]).state == "failed"
        backend.retry_s = 0.0
        cluster.delete("jobs", name)
        Ledger(cluster, SWEEP.site.runs_claim).write({IDS[0]: None})
        until_told(backend, lambda: backend.look(IDS[0]).state == "new")
        assert IDS[0] in backend.changed()


def test_a_driver_that_is_told_to_leave_leaves_the_jobs(fake: FakeApi, cluster: Cluster) -> None:
    with backend_of(cluster, SWEEP) as backend:
        backend.start(task())
        made(fake, backend)
        backend.stop()
        assert (backend.live(), backend.wait(9.0)) == ([], [])
    assert not any(is_over(job) for job in fake.all("jobs"))
    assert fake.names("jobs") == [NAME]


def test_what_another_driver_saw_to_the_end_is_taken_from_the_ledger(
    fake: FakeApi, cluster: Cluster
) -> None:
    name = put(fake)
    with backend_of(cluster, SWEEP) as backend:
        Ledger(cluster, SWEEP.site.runs_claim).write({IDS[0]: Record("failed", 44, "memory")})
        fake.remove("jobs", name)
        assert finished(backend) == Finished(TRAIN, 44, "memory", 0.0)
        assert backend.look(IDS[0]).state == "failed"


def test_the_requests_of_a_sweep_are_few(fake: FakeApi, cluster: Cluster) -> None:
    with World(fake):
        drive(cluster, SWEEP)
    asked: Counter[tuple[str, str]] = fake.requests
    assert asked["list", "jobs"] == asked["list", "pods"] == 1
    assert asked["create", "jobs"] == 7
    assert asked["get", "jobs"] == asked["get", "pods"] == 0
