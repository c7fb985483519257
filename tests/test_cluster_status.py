"""Test what `status` and `logs` say of points on a cluster, and how much they ask for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from stillhouse.cli import main
from stillhouse.rundir import Json
from stillhouse.sweep import registry
from stillhouse.sweep.cluster.connect import connect
from stillhouse.sweep.cluster.ledger import Ledger, Record, write_sweep
from stillhouse.sweep.grid import load_sweep
from tests.builders.lab import CLUSTER, GRID, SITE, grid, only, said, train
from tests.fakes.fake_api import FakeApi

POINTS = 1500  # of a large sweep

pytestmark = pytest.mark.usefixtures("furnished")


def test_status_knows_a_sweep_from_any_machine_and_by_any_of_its_words(
    fake: FakeApi, works: dict[str, int], say: Callable[..., str], tmp_path: Path
) -> None:
    say("run", *GRID, "name=mine", *CLUSTER, *SITE)
    sweep = grid(Path("runs"), "name=mine")
    os.chdir("/")  # another machine: nothing of it is here
    assert say("status", *CLUSTER).splitlines()[0] == f"{sweep.name}: 4 points: 4 done"
    point = sweep.points[2]
    for word in (point.name, point.id[:7], f"{point.slug}-{point.id}"):
        told = json.loads(say("status", str(word), *CLUSTER, "--json"))
        assert [one["id"] for one in told["points"]] == [point.id]
        assert told["totals"]["done"] == 1 and told["points"][0]["overrides"]["lmbda"] == 0.5
    error = say("status", "mone", *CLUSTER, code=42)
    assert 'no sweep, run or Job "mone"' in error
    assert json.loads(say("status", *CLUSTER, "--json"))["sweeps"][0]["totals"]["done"] == 4


def test_one_point_is_told_with_its_attempts_and_where_they_were(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("mine"))
    job = only(fake)
    fake.run_pod(job, node="gpu-7")
    fake.fail(job, exit_code=44, message=said(44, "OutOfMemory: 80 GB", "step 3\nstep 4"))
    out = say("status", "mine", *CLUSTER, code=1)
    for words in (f"job {job}: failed, ada's", "on gpu-7", "exit code 44: OutOfMemory", "| step 4"):
        assert words in out


def test_logs_come_from_the_pod_while_it_is_there_and_then_from_what_was_collected(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("mine"))
    job = only(fake)
    fake.logs[fake.run_pod(job)] = b"step 1\nstep 2\n"
    assert say("logs", "mine", *CLUSTER) == "step 1\nstep 2\n"
    fake.logs[fake.pods_of(job)[0]["metadata"]["name"]] = "10%\r20%\r\n\x1b[2Jé\n".encode()
    assert say("logs", "mine", *CLUSTER) == "10%\n20%\n\\x1b[2Jé\n"
    fake.logs[fake.pods_of(job)[0]["metadata"]["name"]] = b"step 1\nstep 2\n"
    assert json.loads(say("logs", "mine", *CLUSTER, "--json"))["logs"].popitem()[1] == (
        "step 1\nstep 2\n"
    )
    fake.complete(job)
    fake.remove("jobs", job)
    assert say("logs", "mine", *CLUSTER) == ""
    run = Path("runs") / job
    run.mkdir(parents=True)
    (run / "log.txt").write_text("step 1\nstep 2\nstep 3\n")
    assert say("logs", "mine", *CLUSTER) == "step 1\nstep 2\nstep 3\n"


def test_logs_follow_a_point_through_its_attempts(fake: FakeApi, say: Callable[..., str]) -> None:
    say(*train("mine"))
    job = only(fake)
    fake.logs[fake.run_pod(job)] = b"first attempt\n"
    words = [sys.executable, "-m", "stillhouse", "logs", "mine", "-f", *CLUSTER]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout and follower.stdout.readline() == "first attempt\n"
        fake.disrupt(job)
        fake.logs[fake.run_pod(job)] = b"second attempt\n"
        assert follower.stdout.readline() == "second attempt\n"
        fake.complete(job)
    assert follower.returncode == 0


def test_what_the_ledger_kept_of_a_log_is_shown_when_the_pod_is_gone(
    fake: FakeApi,
    works: dict[str, int],
    say: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep = grid()
    works.update({point.id: 43 for point in sweep.points})
    say("run", *GRID, *CLUSTER, *SITE, code=1)
    for job in fake.all("jobs", "stillhouse/kind=train"):
        fake.remove("jobs", job["metadata"]["name"])
    out = say("logs", sweep.name, *CLUSTER)
    assert out.count("==> ") == 4 and out.count("step 6\nstep 7") == 4
    created = len(fake.names("jobs"))
    capsys.readouterr()
    assert main(["logs", sweep.name, "--point", sweep.points[0].id, *CLUSTER]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("step 6\nstep 7\n")
    assert f"pod is gone, `stillhouse collect {sweep.name}` fetches its log" in shown.err
    assert len(fake.names("jobs")) == created, "no pod is started to read a log"


def test_status_says_what_was_spent_and_plan_what_the_rest_will_cost(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    sweep = grid()
    cluster = connect(None, None)
    record = Record("done", at=1e9, queued=7200, running=3600, devices=1)
    Ledger(cluster, "stillhouse-runs").write({sweep.points[0].id: record})
    write_sweep(cluster, registry.record_of(sweep))
    cluster.close()
    assert "queued" in say("status", sweep.name, *CLUSTER, "--cost")
    told = json.loads(say("status", sweep.name, *CLUSTER, "--cost", "--json"))
    assert "device_hours" in told["cost"]
    out = say("plan", *GRID, *CLUSTER, *SITE, "price_usd_per_hour=2")
    assert "GPU-hours" in out and "$" in out, "the first of that shape took an hour"


def test_a_status_of_thousands_of_points_is_one_screen_and_a_few_lists(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    pattern = yaml.safe_load(say(*train("pattern"), "--dry-run"))
    points = [f"{place:010x}" for place in range(POINTS)]
    for place, id_ in enumerate(points):
        fake.put("jobs", _like(pattern, id_, place))
    cluster = connect(None, None)
    write_sweep(cluster, _record(points))
    cluster.close()
    before = sum(fake.requests.values())
    out = say("status", "big", *CLUSTER, code=1)
    shown = out.splitlines()
    assert shown[0] == "big: 1500 points: 750 done, 650 waiting, 100 failed"
    assert len(shown) <= 40, "one screen"
    assert fake.requests["list", "jobs"] == 3, "pages of 500, once"
    assert sum(fake.requests.values()) - before < 15, "nothing is asked point by point"


def _like(pattern: Json, id_: str, place: int) -> Json:
    """A Job of a point: half of them done, 100 failed, the rest suspended."""
    job: Json = json.loads(json.dumps(pattern))
    meta = job["metadata"]
    job["metadata"] = {
        "name": f"tiny-gkd-{id_}",
        "labels": meta["labels"] | {"stillhouse/point": id_, "stillhouse/sweep": "big"},
        "annotations": meta["annotations"] | {"stillhouse/points": id_},
    }
    ended = {"status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    if place < POINTS // 2:
        job["status"] = {"conditions": [{"type": "Complete", **ended}]}
    elif place < POINTS // 2 + 100:
        reason = {"reason": "DeadlineExceeded", "message": "Job was active longer than specified"}
        job["status"] = {"conditions": [{"type": "Failed", **ended, **reason}]}
    else:
        job["spec"]["suspend"] = True
        job["status"] = {}
    return job


def _record(points: list[str]) -> Json:
    return {
        "format": 1, "name": "big", "suite": None, "baselines": [],
        "points": [
            {"id": id_, "slug": "tiny-gkd", "name": None,
             "overrides": {"lmbda": place % 10 / 10, "seed": place // 10}}
            for place, id_ in enumerate(points)
        ],
    }  # fmt: skip


def test_a_status_with_many_reasons_names_three_points_of_each(
    fake: FakeApi, works: dict[str, int], say: Callable[..., str]
) -> None:
    sweep = load_sweep(None, ["pair=tiny", "seeds=5", *SITE], Path("runs"), "cluster")
    works.update({point.id: 43 for point in sweep.points})
    say("run", "pair=tiny", "seeds=5", *CLUSTER, *SITE, code=1)
    out = say("status", sweep.name, *CLUSTER, code=1)
    (line,) = [line for line in out.splitlines() if line.startswith("  failed")]
    assert line.startswith("  failed   5: as it was told to [") and line.count("seed=") == 3
