"""Runs and namespaces of an earlier version go on under this one.

`golden/earlier` was written by commit 654a82a: one run with its scores, the record of its sweep,
and a namespace in which one point of four is done, one failed, one is running and one waits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import stillhouse
from stillhouse import cli
from stillhouse.rundir import Json, RunDir
from stillhouse.sweep.cluster.connect import Cluster
from tests.builders.driving import World, drive, sweep_of
from tests.builders.lab import IMAGE
from tests.fakes.fake_api import FakeApi

EARLIER = Path(__file__).parent / "golden/earlier"
IDS = ["2c75e4984e", "c00eefd8a3", "9550c40ee9", "9194e1c82c"]  # done, failed, running, waiting
DONE, NEW = "tiny-gkd-e7632dd3d4", "14eef006b3"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EARLIER / "runs", "runs")
    return Path("runs")


def put(fake: FakeApi) -> None:
    """Every object of the namespace, with the uids that this server gives."""
    text = (EARLIER / "namespace.json").read_text()
    for job in json.loads(text)["jobs"]:
        made = fake.put("jobs", job)
        text = text.replace(job["metadata"]["uid"], made["metadata"]["uid"])
    objects: dict[str, list[Json]] = json.loads(text)
    for resource in ("persistentvolumeclaims", "serviceaccounts", "configmaps", "pods"):
        for one in objects[resource]:
            fake.put(resource, one)


def test_a_run_of_an_earlier_version_is_done(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "before", "--json"]) == 0
    points = {
        point["id"]: point["state"] for point in json.loads(capsys.readouterr().out)["points"]
    }
    assert points == {DONE[-10:]: "done", NEW: "new"}
    assert RunDir(runs / DONE).is_trained()


def test_the_table_of_an_earlier_sweep_is_the_same(runs: Path) -> None:
    frame = stillhouse.load("before")
    (row,) = frame[(frame.id == DONE[-10:]) & (frame.task == "tiny_mc")].to_dict("records")
    scores = json.loads((runs / DONE / "eval/tiny_mc.json").read_text())
    assert row["value"] == scores["value"]


def test_a_namespace_of_an_earlier_version_goes_on(fake: FakeApi, cluster: Cluster) -> None:
    put(fake)
    sweep = sweep_of(4, f"image={IMAGE}")
    assert [point.id for point in sweep.points] == IDS
    before = dict(fake.created("jobs"))
    with World(fake):
        assert drive(cluster, sweep, keep_s=0.0) == 1
    trained = {name for name in fake.created("jobs") if name.startswith("tiny-gkd")}
    assert {name: fake.created("jobs")[name] for name in trained} == before, "nothing is sent twice"
