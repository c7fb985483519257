"""Test that an existing object under one of our names is compared with what we would create."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli import main
from stillhouse.errors import ConfigError, ContractError
from stillhouse.rundir import Json
from stillhouse.sweep.cluster.code_bundle import bundle
from stillhouse.sweep.cluster.create import JobCreator
from stillhouse.sweep.cluster.find import Names
from stillhouse.sweep.cluster.jobspec import collect_step
from stillhouse.sweep.cluster.ledger import Ledger, sweeps, write_sweep
from stillhouse.sweep.cluster.ownership import have_config_map
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.registry import record_of
from stillhouse.sweep.state import Record
from tests.builders.driving import cluster_of, sweep_of
from tests.builders.lab import SITE
from tests.fakes.fake_api import FakeApi

CLUSTER = ("--backend", "cluster")
GRID = ("run", "pair=tiny", "lmbda=0", "seeds=1", *SITE, *CLUSTER)
CLAIM = "stillhouse-runs"
Said = Callable[..., tuple[int, str]]


pytestmark = pytest.mark.usefixtures("furnished")


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def said(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main([*words])
        return code, "".join(capsys.readouterr())

    return said


def config_map(name: str, data: dict[str, str] | None = None, **labels: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": labels},
        "data": data or {},
    }


def edited(manifest: Json, part: str, key: str, value: str | None) -> Json:
    other = copy.deepcopy(manifest)
    if value is None:
        del other[part][key]
    else:
        other[part][key] = value
    return other


def test_a_code_configmap_of_that_name_is_taken_only_if_it_holds_that_code(
    fake: FakeApi, tmp_path: Path
) -> None:
    manifest = bundle().manifest
    name = manifest["metadata"]["name"]
    odd = [
        ("data", "pod.py", "print('mine')", "has another pod.py"),
        ("binaryData", "code.tar.gz", "bWluZQ==", "has another code.tar.gz"),
        ("binaryData", "code.tar.gz", None, "lacks code.tar.gz"),
        ("data", "more.py", "x", "also has more.py"),
    ]
    with cluster_of(fake, tmp_path / "own") as cluster:
        have_config_map(cluster, manifest)
        have_config_map(cluster, manifest)  # equal: that is it
        for part, key, value, how in odd:
            fake.remove("configmaps", name)
            fake.put("configmaps", edited(manifest, part, key, value))
            with pytest.raises(ConfigError, match=f"ConfigMap {name} is there and {how}") as no:
                have_config_map(cluster, manifest)
            assert f"kubectl delete configmap {name}" in str(no.value)


def test_no_door_sends_a_job_to_run_another_code_than_its_own(
    fake: FakeApi, said: Said, tmp_path: Path
) -> None:
    sweep = load_sweep(None, ["pair=tiny", "lmbda=0", "seeds=1"], tmp_path, site="cluster")
    manifest = bundle(sweep.suite).manifest
    fake.put("configmaps", edited(manifest, "data", "pod.py", "print('mine')"))
    code, text = said(*GRID, "--detach")
    assert code == 42 and "has another pod.py" in text and not fake.names("jobs")
    line = said("train", "mine", "--pair", "tiny", *SITE)
    assert line[0] == 42 and "has another pod.py" in line[1] and not fake.names("jobs")
    code, text = said(*GRID)
    assert code == 42 and "has another pod.py" in text and not fake.names("jobs")


def test_a_driver_job_that_is_not_ours_is_left_alone(fake: FakeApi, said: Said) -> None:
    assert said(*GRID, "--detach")[0] == 0
    (job,) = fake.all("jobs", "stillhouse/kind=drive")
    name = job["metadata"]["name"]
    for labels in ({"app": "theirs"}, {**job["metadata"]["labels"], "stillhouse/hash": "0" * 40}):
        fake.remove("jobs", name)
        meta = {"name": name, "labels": labels}
        other = fake.put("jobs", {key: job[key] for key in ("apiVersion", "kind", "spec")}
                         | {"metadata": meta})  # fmt: skip
        code, text = said(*GRID, "--detach")
        assert code == 42 and f"Job {name} is there" in text and "kubectl" in text, text
        there = fake.get("jobs", name)
        assert there is not None and there["metadata"]["uid"] == other["metadata"]["uid"]


def test_a_job_that_was_made_by_somebody_quicker_is_compared(fake: FakeApi, tmp_path: Path) -> None:
    sweep = load_sweep(None, ["pair=tiny", "seeds=1", *SITE], tmp_path, site="cluster")
    step = collect_step("s", "one")
    with cluster_of(fake, tmp_path / "own") as cluster:
        creator = JobCreator(sweep.site, cluster, Ledger(cluster, CLAIM), bundle())
        first, second = (creator.make(creator.order(step)) for _ in range(2))
        assert (first.is_new, second.is_new) == (True, False) and first.uid == second.uid
        job: Any = fake.get("jobs", step.name)
        fake.remove("jobs", step.name)
        job["metadata"] = {"name": step.name, "labels": job["metadata"]["labels"]
                           | {"stillhouse/kind": "push"}}  # fmt: skip
        fake.put("jobs", {key: job[key] for key in ("apiVersion", "kind", "metadata", "spec")})
        with pytest.raises(
            ContractError, match=r"another content \(push, hash .*; this is collect"
        ):
            creator.make(creator.order(step))


def test_a_configmap_with_a_name_of_ours_and_not_our_labels_is_never_written_to(
    fake: FakeApi, tmp_path: Path
) -> None:
    record = record_of(sweep_of())
    with cluster_of(fake, tmp_path / "own") as cluster:
        ledger = Ledger(cluster, CLAIM)
        for name, write, labels in (
            (f"stillhouse-done-{CLAIM}-a", lambda: ledger.write({"a" * 10: Record("done")}),
             "app.kubernetes.io/part-of=stillhouse stillhouse/kind=ledger"),
            ("stillhouse-names", lambda: Names(cluster).claim("mine", "tiny-gkd-0123456789"),
             "app.kubernetes.io/part-of=stillhouse"),
            ("stillhouse-sweep-s", lambda: write_sweep(cluster, record),
             "app.kubernetes.io/part-of=stillhouse stillhouse/kind=sweep"),
        ):  # fmt: skip
            fake.put("configmaps", config_map(name, {"theirs": "x"}))
            with pytest.raises(ConfigError, match=f"kubectl label configmap {name} {labels}`"):
                write()
            there = fake.get("configmaps", name)
            assert there is not None and there["data"] == {"theirs": "x"}
            fake.remove("configmaps", name)
            write()


def test_a_copy_of_a_sweeps_record_is_no_second_sweep_and_cancels_nothing(
    fake: FakeApi, tmp_path: Path
) -> None:
    with cluster_of(fake, tmp_path / "own") as cluster:
        write_sweep(cluster, record_of(sweep_of()))
        item: Any = copy.deepcopy(fake.get("configmaps", "stillhouse-sweep-s"))
        notes = item["metadata"]["annotations"] | {"stillhouse/cancelled": "1.000"}
        labels = item["metadata"]["labels"]
        item["metadata"] = {"name": "a-copy", "labels": labels, "annotations": notes}
        fake.put("configmaps", item)
        assert [(mark.name, mark.cancelled) for mark in sweeps(cluster)] == [("s", None)]


def test_a_back_up_of_the_ledger_is_named_and_an_odd_record_loses_nothing(
    fake: FakeApi, said: Said, tmp_path: Path
) -> None:
    sweep = sweep_of()
    first, second, *_ = (point.id for point in sweep.points)
    with cluster_of(fake, tmp_path / "own") as cluster:
        write_sweep(cluster, record_of(sweep))
        Ledger(cluster, CLAIM).write(dict.fromkeys((first, second), Record("done", at=1.0)))
    shard = f"stillhouse-done-{CLAIM}-{first[0]}"
    copied: Any = copy.deepcopy(fake.get("configmaps", shard))
    copied["metadata"] = {"name": "before-upgrade", "labels": copied["metadata"]["labels"]}
    fake.put("configmaps", copied | {"data": {first: '{"state":"failed","code":43,"at":1}'}})
    real: Any = copy.deepcopy(fake.get("configmaps", shard))
    real["metadata"] = {key: real["metadata"][key] for key in ("name", "labels")}
    fake.put("configmaps", real | {"data": real["data"] | {"Zz": "x"}})
    code, text = said("status", "s", *CLUSTER)
    assert code == 0 and "2 waiting" in text, "trained, to be scored"
    wanted = ("ConfigMap before-upgrade has the labels of the ledger and not its name",
              f"ConfigMap {shard}: Zz is no key of the ledger")  # fmt: skip
    told = json.loads(said("status", "s", *CLUSTER, "--json")[1])
    every = json.loads(said("status", *CLUSTER, "--json")[1])
    for line in wanted:
        assert line in text
        assert line in said("status", *CLUSTER)[1]
        assert any(line in remark for remark in told["remarks"])
        assert any(line in remark for remark in every["remarks"])
    fake.put("configmaps", real | {"data": real["data"] | {first: "done"}})
    code, text = said("status", "s", *CLUSTER)
    assert code == 42 and "1 unreadable" in text and f"ConfigMap {shard}, key {first}" in text
