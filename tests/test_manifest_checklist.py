"""Test that k8s/job.yaml is a whole Job, and that the checklist misses each line of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from stillhouse.compose import compose, from_command_line
from stillhouse.identity import point_id
from stillhouse.rundir import Json
from stillhouse.spec import TrainSpec
from stillhouse.sweep.cluster.jobspec import (
    train_step,
)
from tests.builders.manifests import (
    PATTERN,
    container,
    rendered,
    typed,
)
from tests.manifest_checklist import check


def test_the_pattern_is_the_job_of_its_own_words():
    sweep = typed("pair=tiny owner=nobody tolerations=[] gpu_resource=null")
    step = dataclasses.replace(train_step(sweep.points[0], sweep, fetch=True), sweep=None)
    job = rendered(step, sweep.site)
    for meta in (job["metadata"], job["spec"]["template"]["metadata"]):
        del meta["labels"]["stillhouse/code"]
    del job["metadata"]["annotations"]["stillhouse/asks"]  # who edits a file sends it from no site
    main = container(job)
    assert main["args"].pop(0).startswith("--code=")
    main["args"][-2:] = step.typed  # a person types words, and they mean the same
    assert point_id(compose(from_command_line([*step.typed], TrainSpec), TrainSpec)) == step.id
    assert main["command"] == ["python", "/bundle/pod.py"]
    main["command"] = ["python", "-m", "stillhouse.pod"]  # by itself it runs the image's code
    assert main["volumeMounts"].pop()["name"] == "bundle"
    assert job["spec"]["template"]["spec"]["volumes"].pop()["name"] == "bundle"
    assert job == yaml.safe_load(PATTERN)


def test_the_pattern_has_everything():
    assert check(yaml.safe_load(PATTERN)) == []


def nodes(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each entry of mappings and lists is, at any depth."""
    entries = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in entries:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from nodes(value, (*at, key))


def test_no_entry_of_the_pattern_can_be_taken_out_unnoticed():
    paths = list(nodes(yaml.safe_load(PATTERN)))
    assert len(paths) > 150
    for path in paths:
        node = job = yaml.safe_load(PATTERN)
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]
        assert check(job), f"{path} may be taken out without harm, so it should not be there"


def test_no_line_of_the_pattern_can_be_taken_out_unnoticed():
    whole = PATTERN.splitlines()
    said = [i for i, line in enumerate(whole) if line.strip() and not line.strip().startswith("#")]
    assert len(said) > 100
    for number in said:
        try:
            job = yaml.safe_load("\n".join(whole[:number] + whole[number + 1 :]))
        except yaml.YAMLError:
            continue
        assert check(job), f"line {number + 1} may be taken out without harm: {whole[number]}"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["spec", "podReplacementPolicy"], "TerminatingOrFailed", "podReplacementPolicy"),
        (["spec", "backoffLimit"], 2147483647, "backoffLimit"),
        (["spec", "suspend"], True, "suspend exactly where a queue is named"),
        (["spec", "template", "spec", "hostNetwork"], True, "restricted"),
        (["spec", "template", "spec", "automountServiceAccountToken"], True, "token"),
        (["metadata", "name"], "tiny-gkd", "ends in the hash"),
        (["metadata", "labels", "stillhouse/learning-rate"], "5e-06 ", "label values"),
        (["metadata", "annotations", "stillhouse/words"], "pair=other", "stillhouse/words"),
    ],
)
def test_the_checklist_says_what_is_wrong_and_why(path: list[str], value: Any, said: str):
    job = yaml.safe_load(PATTERN)
    node = job
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert any(said in line and ": " in line for line in check(job))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": "stillhouse:latest"}, "pinned by digest"),
        ({"command": ["sh", "-c", "python -m stillhouse.pod"]}, "swallows SIGTERM"),
        ({"resources": {"requests": {"cpu": "4"}, "limits": {"memory": "8Gi"}}}, "/dev/shm"),
        (
            {"resources": {"requests": {"cpu": "4"}, "limits": {"memory": "48Gi", "a/gpu": 8}}},
            "GPUs",
        ),
        ({"env": [{"name": "WANDB_API_KEY", "value": "a" * 40}]}, "secrets by reference"),
    ],
)
def test_the_checklist_looks_into_the_container(change: Json, said: str):
    job = yaml.safe_load(PATTERN)
    container(job).update(change)
    assert any(said in line for line in check(job))
