"""Test how a step and a site become the bytes of a Job."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kubernetes import client

from stillhouse.compose import from_command_line
from stillhouse.errors import ConfigError
from stillhouse.rundir import Json
from stillhouse.spec import EvalSpec, SiteSpec
from stillhouse.sweep.cluster.jobspec import (
    JobSpec,
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
    JOB_NAME,
    LABEL,
    image_problem,
    label_value,
    to_yaml,
)
from tests.builders.manifests import (
    PREFLIGHT,
    container,
    environment,
    rendered,
    tiny,
    typed,
    unscored,
)
from tests.builders.published import EVAL, TRAIN, flags_of, lines, name_of
from tests.manifest_checklist import check

GOLDEN = Path(__file__).parent / "golden"
TRAIN_SH = [line for line in lines(TRAIN) if line.startswith("k8s/train.sh")]
EVAL_SH = [line for line in lines(EVAL) if line.startswith("k8s/eval.sh")]
BIG = (
    "name=lmbda0_lr5e6 tags=[sweep,lr] lmbda=0 learning_rate=5e-6 quant=int4 owner=ada"
    " gpu_product=NVIDIA-H100-80GB-HBM3 wandb_secret=wandb-api-key hf_secret=hf-token"
)
LAB = (
    "pair=tiny name=first owner=ada site=kueue queue_priority=low priority_class=batch"
    " namespace=lab gpu_resource=null cpu=0.5 memory_gib=1.5 shm_gib=0.25"
)


KINDS = ("train", "train_8gpu", "prepare", "eval", "preflight", "drive", "collect", "push", "kueue")


@functools.cache
def golden_steps() -> dict[str, tuple[JobSpec, SiteSpec]]:
    point, sweep = tiny()
    big = typed(BIG)
    lab = typed(LAB)
    file = dataclasses.replace(sweep, file="sweeps/first.yaml", name="first", words=("lmbda=0,1",))
    baselines = ["teacher-0123456789", "ptq-9876543210"]
    scored = tuple(typed("pair=tiny owner=ada lmbda=0,1 threads=2").points)
    return {
        "train": (train_step(point, sweep), sweep.site),
        "train_8gpu": (train_step(big.points[0], big, fetch=True), big.site),
        "prepare": (prepare_step(point, sweep), sweep.site),
        "eval": (eval_step(scored, baselines, sweep), sweep.site),
        "preflight": (preflight_step("tiny", PREFLIGHT, ["--prompts=64"]), sweep.site),
        "drive": (drive_step(file, b"grid: {}\n", ["--point=a"]), sweep.site),
        "collect": (collect_step("first", "a laptop"), sweep.site),
        "push": (push_step("small", "a laptop"), sweep.site),
        "kueue": (train_step(lab.points[0], lab), lab.site),
    }


@pytest.mark.parametrize("name", KINDS)
def test_a_manifest_is_its_golden_file(name: str):
    step, site = golden_steps()[name]
    made, file = to_yaml(rendered(step, site)), GOLDEN / f"{name}.yaml"
    if "UPDATE_GOLDEN" in os.environ:
        file.write_text(made)
    assert made == file.read_text(), (
        f"{file} is not what is rendered now. If the change is wanted, look at it after"
        " UPDATE_GOLDEN=1 python -m pytest tests/test_cluster_manifest.py -k golden"
    )


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_job_has_everything_and_only_fields_that_kubernetes_knows(name: str):
    job = yaml.safe_load((GOLDEN / f"{name}.yaml").read_bytes())
    assert check(job) == []
    # The client's models drop a field that they do not know, and refuse a value of another type.
    parsed = client.V1Job.from_dict(job)
    assert parsed is not None
    assert json.loads(parsed.to_json()) == job


def test_rendering_twice_gives_the_same_object_and_changes_nothing():
    step, site = golden_steps()["eval"]
    first = rendered(step, site)
    other, its_site = golden_steps()["kueue"]
    rendered(other, its_site)
    assert rendered(step, site) == first


@pytest.fixture(scope="module")
def seeds() -> list[Json]:
    jobs: list[Json] = []
    for line in TRAIN_SH:
        sweep = typed(shlex.join([f"name={name_of(line)}", *flags_of(line)]))
        jobs.append(rendered(train_step(sweep.points[0], sweep, fetch=True), sweep.site))
    site = typed("pair=tiny").site
    for line in EVAL_SH:
        overrides = from_command_line(flags_of(line), EvalSpec)
        jobs.append(rendered(eval_line_step(name_of(line), overrides), site))
    return jobs


def test_all_27_lines_of_the_seeds_render_as_26_jobs(seeds: list[Json]):
    assert (len(TRAIN_SH), len(EVAL_SH)) == (24, 3)
    assert len({job["metadata"]["name"] for job in seeds}) == 26
    assert [job["metadata"]["name"] for job in seeds if check(job)] == []


def test_a_point_of_eight_processes_asks_for_eight_gpus_and_an_evaluation_for_one(seeds):
    limits = [container(job)["resources"]["limits"] for job in seeds]
    assert {limit["nvidia.com/gpu"] for limit in limits[:24]} == {"8"}
    assert {limit["memory"] for limit in limits[:24]} == {"384Gi"}
    assert {limit["nvidia.com/gpu"] for limit in limits[24:]} == {"1"}


def test_only_who_may_download_goes_online():
    point, sweep = tiny()
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    for step in (train_step(point, sweep), eval_step([point], [], sweep)):
        env = environment(rendered(step, sweep.site))
        assert offline.items() <= env.items()
        assert "STILLHOUSE_FETCH" not in env
    for step in (
        train_step(point, sweep, fetch=True),
        prepare_step(point, unscored(sweep)),
    ):
        assert not offline.keys() & environment(rendered(step, sweep.site)).keys()


def test_secrets_go_by_reference_to_those_who_use_them():
    point, sweep = tiny("wandb_secret=wandb-api-key hf_secret=hf-token")
    reference = {"name": "wandb-api-key", "key": "token", "optional": False}
    env = environment(rendered(train_step(point, sweep), sweep.site))
    assert env["WANDB_API_KEY"] == {"secretKeyRef": reference}
    assert "HF_TOKEN" not in env  # it works offline
    env = environment(rendered(prepare_step(point, unscored(sweep)), sweep.site))
    assert env["HF_TOKEN"]["secretKeyRef"]["name"] == "hf-token"
    assert "WANDB_API_KEY" not in env


def test_who_asks_for_no_gpu_gets_none_and_may_run_beside_any():
    point, sweep = tiny("gpu_product=NVIDIA-L4")
    pods = {
        kind: rendered(step, sweep.site)["spec"]["template"]["spec"]
        for kind, step in {
            "train": train_step(point, sweep),
            "prepare": prepare_step(point, unscored(sweep)),
            "drive": drive_step(sweep, None),
            "collect": collect_step("x", "y"),
        }.items()
    }
    asks = {
        k: "nvidia.com/gpu" in p["containers"][0]["resources"]["limits"] for k, p in pods.items()
    }
    assert asks == {"train": True, "prepare": False, "drive": False, "collect": False}
    selects = {kind: pod.get("nodeSelector") for kind, pod in pods.items()}
    product = {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert selects == {"train": product, "prepare": None, "drive": None, "collect": None}


def test_a_driver_and_a_collector_do_not_wait_in_the_queue():
    sweep = typed(LAB)
    point = sweep.points[0]
    queued = (train_step(point, sweep), eval_step([point], [], sweep))
    for step in (*queued, prepare_step(point, unscored(sweep))):
        job = rendered(step, sweep.site)
        assert job["spec"]["suspend"] is True
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "stillhouse"
        assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    for step in (drive_step(sweep, None), collect_step("x", "y"), push_step("x", "y")):
        job = rendered(step, sweep.site)
        assert "suspend" not in job["spec"]
        assert not [key for key in job["metadata"]["labels"] if "kueue" in key]


def test_a_collector_reads_and_a_driver_alone_has_a_token():
    point, sweep = tiny()
    mounts = container(rendered(collect_step("x", "y"), sweep.site))["volumeMounts"]
    assert {"name": "runs", "mountPath": "/runs", "readOnly": True} in mounts
    mounts = container(rendered(push_step("x", "y"), sweep.site))["volumeMounts"]
    assert {"name": "cache", "mountPath": "/cache"} in mounts
    assert "/runs" not in {mount["mountPath"] for mount in mounts}
    for step in (train_step(point, sweep), drive_step(sweep, None), collect_step("x", "y")):
        pod = rendered(step, sweep.site)["spec"]["template"]["spec"]
        drives = step.kind == "drive"
        assert pod["automountServiceAccountToken"] is drives
        assert pod["serviceAccountName"] == f"stillhouse-{'driver' if drives else 'worker'}"


def test_a_driver_whose_points_failed_is_not_run_again():
    _, sweep = tiny()
    last = rendered(drive_step(sweep, None), sweep.site)["spec"]["podFailurePolicy"]["rules"][-1]
    assert last["onExitCodes"]["values"] == [1, 42, 43, 44, 46]


@pytest.mark.parametrize(
    ("knob", "said"),
    [
        ("queue='no queue'", "queue = 'no queue'"),
        ("queue=q queue_priority=a/b", "queue_priority = 'a/b'"),
        ("shm_gib=48", "counts in the memory"),
        ("'pod_env={STILLHOUSE_ID: x}'", "pod_env.STILLHOUSE_ID"),
        ("'pod_env={no-name: x}'", "pod_env.no-name"),
    ],
)
def test_what_a_site_cannot_mean_is_refused(knob: str, said: str):
    point, sweep = tiny(knob)
    with pytest.raises(ConfigError, match=said):
        rendered(train_step(point, sweep), sweep.site)


def test_an_environment_of_the_site_is_the_workers_own():
    point, sweep = tiny("'pod_env={NCCL_DEBUG: INFO, HF_HOME: /cache/other}'")
    env = environment(rendered(train_step(point, sweep), sweep.site))
    assert (env["NCCL_DEBUG"], env["HF_HOME"]) == ("INFO", "/cache/other")
    env = environment(rendered(drive_step(sweep, None), sweep.site))
    assert "NCCL_DEBUG" not in env


def test_an_image_that_cannot_be_sent_says_why_and_what_to_do():
    site = typed("pair=tiny").site
    pinned = f"registry.example/stillhouse@sha256:{'a' * 64}"
    assert image_problem(dataclasses.replace(site, image=pinned)) is None
    zeros = image_problem(site) or ""
    assert "zeros" in zeros and "make image" in zeros
    for image in ("stillhouse", "stillhouse:latest", "stillhouse@sha256:abc"):
        assert "make image" in (image_problem(dataclasses.replace(site, image=image)) or "")


@given(st.text(max_size=200))
def test_every_text_has_a_label_value_and_different_texts_different_ones(text: str):
    value = label_value(text)
    assert LABEL.fullmatch(value)
    assert label_value(f"{text}!") != value
    assert label_value(value) == value


@given(st.text(max_size=200), st.text(max_size=40))
def test_whatever_a_sweep_is_called_its_jobs_have_legal_names(sweep: str, key: str):
    step = collect_step(sweep, key)
    assert JOB_NAME.fullmatch(step.name)
    assert step.name.rpartition("-")[2] == step.id


texts = st.one_of(
    st.text(),
    st.sampled_from(
        ["", "no", "Yes", "null", "~", "1e3", "0x1f", "1_000", "12:30:45", "2026-01-02", "-", "--"]
        + ["- a", "a: b", "#x", "a #b", "[a]", "{a}", "&a", "*a", "!a", "%a", "@a", "`a", "\ufeff"]
        + ["\x85", "\u2028", "\U0001f600", "\t", "a\nb", " a ", "'", '"', "\\", "<<", "=", "---"]
    ),
)
keys = texts.filter(lambda text: len(text) < 100)  # a key of YAML ends after 1,024 bytes
trees = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=12,
)


@given(st.dictionaries(keys, trees, min_size=1, max_size=5))
def test_yaml_reads_back_what_was_written(tree: Json):
    assert yaml.safe_load(to_yaml(tree)) == tree


@pytest.mark.parametrize("text", ["1234e56789", "1e3", "0x1f", "0o17", "1_000", "y", "N", "~"])
def test_text_that_another_parser_reads_as_a_number_or_a_truth_is_quoted(text: str):
    assert to_yaml({"id": text}) == f'id: "{text}"\n'


def test_defaults_of_the_sites_render():
    for name in ("cluster", "kueue", "spot"):
        sweep = typed(f"pair=tiny site={name}")
        assert check(rendered(train_step(sweep.points[0], sweep), sweep.site)) == []


def test_a_site_names_runtime_class_pull_secret_and_what_sidecars_read():
    words = "pair=tiny gpu_resource=nvidia.com/gpu runtime_class=nvidia pull_secret=regcred"
    sweep = typed(f"{words} 'pod_annotations={{sidecar.istio.io/inject: \"false\"}}'")
    step = train_step(sweep.points[0], sweep)
    template = rendered(step, sweep.site)["spec"]["template"]
    assert template["metadata"]["annotations"] == {
        "sidecar.istio.io/inject": "false",
        "stillhouse/points": sweep.points[0].id,
    }
    assert template["spec"]["runtimeClassName"] == "nvidia"
    assert template["spec"]["imagePullSecrets"] == [{"name": "regcred"}]
    (main,) = template["spec"]["containers"]
    assert {"name": "STILLHOUSE_GPUS", "value": "1"} in main["env"]
    # A pod without a GPU needs no runtime class; all pods need the image.
    prepare = rendered(prepare_step(sweep.points[0], unscored(sweep)), sweep.site)
    assert "runtimeClassName" not in prepare["spec"]["template"]["spec"]
    assert prepare["spec"]["template"]["spec"]["imagePullSecrets"] == [{"name": "regcred"}]


def test_a_site_cannot_set_an_annotation_of_ours():
    sweep = typed("pair=tiny 'pod_annotations={stillhouse/points: x}'")
    with pytest.raises(ConfigError, match="stillhouse/points is ours"):
        rendered(train_step(sweep.points[0], sweep), sweep.site)
