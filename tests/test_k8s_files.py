"""Test the files of k8s/ that an administrator applies: rights, volumes, network, image, prices."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from typing import get_args

import pytest
import yaml
from kubernetes import client

from stillhouse.compose import Overrides, k8s_dir
from stillhouse.rundir import Json
from stillhouse.sweep.cluster.doctor import Rule, rules
from stillhouse.sweep.cluster.jobspec import (
    Kind,
    collect_step,
    drive_step,
    eval_line_step,
    eval_step,
    preflight_step,
    prepare_step,
    push_step,
    train_step,
)
from stillhouse.sweep.cluster.manifest import (
    LABEL,
    ONLINE,
    SELECTOR,
)
from tests.builders.manifests import (
    PATTERN,
    PREFLIGHT,
    environment,
    rendered,
    tiny,
    typed,
)


def documents(file: str) -> list[Json]:
    return list(yaml.safe_load_all((k8s_dir() / file).read_text()))


def test_the_rights_are_read_from_the_file_that_is_applied():
    assert Rule("stillhouse-launcher", "batch", "jobs", None, "create") in rules()
    assert Rule("stillhouse-launcher", "", "pods", "log", "get") in rules("stillhouse-launcher")
    assert str(rules("stillhouse-collector")[0]) == "get pods/exec (Role stillhouse-collector)"
    assert {rule.role for rule in rules()} == {
        "stillhouse-launcher",
        "stillhouse-collector",
        "stillhouse-driver",
    }


def test_nobody_may_read_secrets_and_a_worker_may_do_nothing():
    everything = [(rule.resource, rule.verb) for rule in rules()]
    assert not [pair for pair in everything if pair[0] == "secrets" or "*" in pair]
    bound = [
        subject["name"]
        for document in documents("access.yaml")
        for subject in document.get("subjects", [])
    ]
    assert "stillhouse-worker" not in bound
    assert "stillhouse-driver" in bound


def test_a_launcher_may_delete_what_people_are_told_to_delete_and_no_more():
    root = k8s_dir().parent
    texts = [*root.glob("docs/*.md"), *root.glob("k8s/*"), *root.glob("stillhouse/**/*.py")]
    commands = [re.findall(r"kubectl delete ([a-z,]+)", file.read_text()) for file in texts]
    told = {
        f"{kind.rstrip('s')}s" for kinds in itertools.chain(*commands) for kind in kinds.split(",")
    }
    may = {rule.resource for rule in rules("stillhouse-launcher") if rule.verb == "delete"}
    assert may == told - {"nodes"} == {"jobs", "configmaps"}
    assert (
        "a Node that is gone for good is deleted by whoever runs the cluster"
        in (k8s_dir() / "access.yaml").read_text()
    )
    drives = {rule.resource for rule in rules("stillhouse-driver") if rule.verb == "delete"}
    assert drives == {"jobs"}, "a driver starts nothing over"


def test_a_driver_may_do_nothing_that_a_launcher_may_not():
    launcher, driver = rules("stillhouse-launcher"), rules("stillhouse-driver")
    own = {dataclasses.replace(rule, role="") for rule in driver}
    assert own <= {dataclasses.replace(rule, role="") for rule in launcher}


def test_accounts_claims_and_queue_are_those_that_the_sites_name():
    accounts = {d["metadata"]["name"] for d in documents("access.yaml") if d["kind"][0] == "S"}
    claims = {d["metadata"]["name"] for d in documents("storage.yaml")}
    (queue,) = documents("localqueue.yaml")
    site = typed("pair=tiny site=kueue").site
    assert accounts == {site.service_account, site.driver_account}
    assert claims == {site.runs_claim, site.cache_claim}
    assert queue["metadata"]["name"] == site.queue


def test_the_kinds_of_jobs_that_go_online_are_those_that_the_network_lets_out():
    """By what each rendered pod holds: no word to stay offline, or a tracker's key."""
    point, sweep = tiny("suite=tiny wandb_secret=wandb hf_secret=hf")
    file = dataclasses.replace(sweep, file="sweeps/first.yaml")
    line = dataclasses.replace(train_step(point, sweep, fetch=True), sweep=None)
    steps = [
        train_step(point, sweep), line, prepare_step(point, sweep),
        eval_step([point], ["teacher-0123456789"], sweep), eval_line_step("x", Overrides({}, {})),
        preflight_step("tiny", PREFLIGHT, []), drive_step(file, b"grid: {}\n"),
        collect_step("first", "a laptop"), push_step("small", "a laptop"),
    ]  # fmt: skip
    assert {step.kind for step in steps} == set(get_args(Kind))
    online: set[str] = set()
    for step in steps:
        env = environment(rendered(step, sweep.site))
        if "HF_HUB_OFFLINE" not in env or "WANDB_API_KEY" in env:
            online.add(step.kind)
        assert ("HF_TOKEN" in env) <= ("HF_HUB_OFFLINE" not in env), step.kind
    (https,) = (d for d in documents("network.yaml") if d["metadata"]["name"] == "stillhouse-https")
    (let_out,) = https["spec"]["podSelector"]["matchExpressions"]
    assert online == set(ONLINE) == set(let_out["values"])


def test_the_network_is_closed_for_our_pods_alone_and_open_for_whom_it_must():
    policies = {d["metadata"]["name"]: d["spec"] for d in documents("network.yaml")}
    key, _, value = SELECTOR.partition("=")
    for spec in policies.values():
        assert spec["podSelector"]["matchLabels"][key] == value
    closed = policies["stillhouse-default-deny"]
    assert closed["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in closed and "ingress" not in closed
    (online,) = policies["stillhouse-https"]["podSelector"]["matchExpressions"]
    assert online["values"] == list(ONLINE)
    names = policies["stillhouse-names"]["egress"]
    assert all(rule["to"] for rule in names)  # no lookup at somebody else's server


@pytest.mark.parametrize(
    ("file", "model"),
    [("storage.yaml", client.V1PersistentVolumeClaim), ("network.yaml", client.V1NetworkPolicy)],
)
def test_the_files_of_the_clusters_side_have_only_fields_that_kubernetes_knows(file: str, model):
    for document in documents(file):
        assert json.loads(model.from_dict(copy.deepcopy(document)).to_json()) == document


def test_access_has_only_fields_that_kubernetes_knows():
    models = {
        "ServiceAccount": client.V1ServiceAccount,
        "Role": client.V1Role,
        "RoleBinding": client.V1RoleBinding,
    }
    for document in documents("access.yaml"):
        parsed = models[document["kind"]].from_dict(copy.deepcopy(document))
        assert parsed is not None
        assert json.loads(parsed.to_json()) == document


def test_every_price_says_where_and_when_it_was_found():
    (prices,) = documents("prices.yaml")
    for product, price in prices.items():
        assert LABEL.fullmatch(product)
        assert set(price) == {"usd_per_hour", "source", "date"}
        assert 0 < price["usd_per_hour"] < 100
        assert len(price["date"]) == len("2026-01-21") and price["source"]


def test_the_image_is_pinned_and_has_no_compiler_and_no_root():
    whole = (k8s_dir() / "Dockerfile").read_text()
    before, uv, packages, _, final = whole.split("\nFROM ")
    assert "@sha256:" in before
    assert uv.startswith("${BASE} AS uv\n") and final.startswith("${BASE}\n")
    assert "lock.py restore" in packages and "sync --frozen" in packages
    assert "apt-get" not in whole
    assert "INDEX" not in final and "USER 1000:1000" in final
    user = yaml.safe_load(PATTERN)["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"--uid {user} " in final
