"""Test that a namespace is checked before the first Job, and each gap is named with its remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import ConfigError
from stillhouse.sweep.cluster import doctor
from stillhouse.sweep.cluster.code_bundle import bundle
from stillhouse.sweep.cluster.connect import Cluster
from stillhouse.sweep.cluster.doctor import Finding, findings, job_findings, refuse, rules
from stillhouse.sweep.cluster.jobspec import train_step
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.cluster.watch import Watcher
from tests.builders.driving import cluster_of, sweep_of
from tests.fakes.fake_api import FakeApi

SWEEP = sweep_of()
SITE = SWEEP.site
STEP = train_step(SWEEP.points[0], SWEEP)


@pytest.fixture
def fake() -> Iterator[FakeApi]:
    with FakeApi() as server:
        for claim in (SITE.runs_claim, SITE.cache_claim):
            put_claim(server, claim, "Bound")
        for account in (SITE.service_account, SITE.driver_account):
            server.put("serviceaccounts", {"metadata": {"name": account}})
        yield server


def put_claim(fake: FakeApi, name: str, phase: str) -> None:
    claim = {"metadata": {"name": name}, "spec": {}, "status": {"phase": phase}}
    fake.put("persistentvolumeclaims", claim)


def said(cluster: Cluster, **site: Any) -> str:
    """The error that a sweep at a site gets."""
    with pytest.raises(ConfigError) as error:
        refuse(findings(cluster, dataclasses.replace(SITE, **site)))
    return str(error.value)


def test_a_namespace_that_has_all_is_all_right(cluster: Cluster) -> None:
    refuse(findings(cluster, SITE))
    refuse(findings(cluster, SITE, role="stillhouse-driver"))
    assert all(finding.ok for finding in findings(cluster, SITE))


@pytest.mark.parametrize("rule", [r for r in rules(doctor.LAUNCHER) if not r.group.count("kueue")])
def test_each_right_that_is_missing_is_named_with_its_role(
    fake: FakeApi, cluster: Cluster, rule: Any
) -> None:
    fake.deny(rule.verb, rule.resource, rule.sub or "")
    text = said(cluster)
    assert f"ada lacks the right to {rule}" in text
    assert "have the Role stillhouse-launcher of k8s/access.yaml applied" in text


def test_a_namespace_that_is_not_there_is_all_that_is_said(fake: FakeApi, tmp_path: Path) -> None:
    with cluster_of(fake, tmp_path / "other", namespace="nowhere") as cluster:
        text = said(cluster)
    assert text.startswith('namespace "nowhere" does not exist on http')
    assert "\n" not in text


@pytest.mark.parametrize("claim", ["stillhouse-runs", "stillhouse-cache"])
def test_a_volume_claim_that_is_missing_or_cannot_be_bound(
    fake: FakeApi, cluster: Cluster, claim: str
) -> None:
    put_claim(fake, claim, "Pending")
    refuse(findings(cluster, SITE))  # some are bound only when a pod wants them
    uid = (fake.get("persistentvolumeclaims", claim) or {})["metadata"]["uid"]
    event = {
        "metadata": {"name": "e"},
        "involvedObject": {"kind": "PersistentVolumeClaim", "name": claim, "uid": uid},
        "reason": "FailedBinding",
        "message": "no persistent volumes available for this claim",
    }
    fake.put("events", event)
    assert f"volume claim {claim} is Pending (no persistent volumes available" in said(cluster)
    fake.remove("persistentvolumeclaims", claim)
    assert f'volume claim "{claim}" does not exist: apply k8s/storage.yaml' in said(cluster)


def test_a_service_account_that_is_missing(fake: FakeApi, cluster: Cluster) -> None:
    fake.remove("serviceaccounts", SITE.driver_account)
    refuse(findings(cluster, SITE))
    with pytest.raises(ConfigError, match="stillhouse-driver"):
        refuse(findings(cluster, SITE, role="stillhouse-driver"))
    fake.remove("serviceaccounts", SITE.service_account)
    assert 'service account "stillhouse-worker" does not exist: apply k8s/access' in said(cluster)


def test_a_queue_that_is_missing_idle_or_without_kueue(fake: FakeApi, cluster: Cluster) -> None:
    assert 'LocalQueue "lab" does not exist: there is none' in said(cluster, queue="lab")
    active: dict[str, Any] = {"type": "Active", "status": "False", "message": "it is stopped"}
    queue: dict[str, Any] = {"metadata": {"name": "lab"}, "status": {"conditions": [active]}}
    fake.put("localqueues", queue)
    assert "LocalQueue lab is not active (it is stopped)" in said(cluster, queue="lab")
    assert "there is lab; say queue=NAME" in said(cluster, queue="lap")
    active["status"] = "True"
    fake.put("localqueues", queue)
    refuse(findings(cluster, dataclasses.replace(SITE, queue="lab")))


def test_a_queue_where_kueue_is_not_installed(fake: FakeApi, cluster: Cluster) -> None:
    fake.kueue = False
    assert "Kueue is not installed there: say queue=null" in said(cluster, queue="lab")


def test_an_image_that_nobody_made(cluster: Cluster) -> None:
    assert "make image" in said(cluster, image=f"stillhouse@sha256:{'0' * 64}")


def test_the_first_few_mistakes_are_said_and_the_rest_counted() -> None:
    wrong = [Finding(False, f"thing {number}", "mend it") for number in range(5)]
    with pytest.raises(ConfigError) as error:
        refuse([Finding(True, "fine"), *wrong])
    assert str(error.value).splitlines() == [
        "thing 0: mend it", "thing 1: mend it", "thing 2: mend it",
        "(and 2 more: `stillhouse doctor`)",
    ]  # fmt: skip


# --------------------------------------------------------------------------- Jobs in the way


def about_jobs(cluster: Cluster, owner: str = SITE.owner) -> str:
    watcher = Watcher(cluster, SITE.runs_claim)
    watcher.refresh()
    return "\n".join(map(str, job_findings(cluster, watcher.cache.jobs(), [STEP], owner)))


def test_a_job_of_ours_is_not_in_the_way(fake: FakeApi, cluster: Cluster) -> None:
    fake.put("jobs", render(STEP, SITE, bundle().key))
    assert about_jobs(cluster) == ""


def test_a_job_of_that_name_that_is_not_ours(fake: FakeApi, cluster: Cluster) -> None:
    job = render(STEP, SITE, bundle().key)
    fake.put("jobs", job | {"metadata": {"name": STEP.name, "labels": {"app": "x"}}})
    assert f"Job {STEP.name} is there and is not ours" in about_jobs(cluster)


def test_a_job_that_another_person_owns(fake: FakeApi, cluster: Cluster) -> None:
    fake.put("jobs", render(STEP, SITE, bundle().key))
    text = about_jobs(cluster, owner="bob")
    assert f"Job {STEP.name} is {SITE.owner}'s (label stillhouse/owner), you are bob" in text
    fake.complete(STEP.name)
    assert about_jobs(cluster, owner="bob") == ""  # what is done is done, whoever sent it


def test_a_job_of_that_name_with_another_content(fake: FakeApi, cluster: Cluster) -> None:
    job = render(STEP, SITE, bundle().key)
    job["metadata"]["labels"]["stillhouse/hash"] = "0" * 40
    fake.put("jobs", job)
    assert "another content (train, hash 000000000000; " in about_jobs(cluster)
