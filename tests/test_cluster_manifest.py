"""Test how a step and a site become the bytes of a Job, and everything such a Job must have."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kubernetes import client

from stillhouse.compose import Overrides, compose, from_command_line, from_json, k8s_dir
from stillhouse.errors import ConfigError
from stillhouse.identity import eval_id, point_id, suite_key
from stillhouse.rundir import Json, directory_name
from stillhouse.spec import EvalSpec, SiteSpec, TrainSpec
from stillhouse.sweep.cluster import secrets
from stillhouse.sweep.cluster.doctor import Rule, rules
from stillhouse.sweep.cluster.jobspec import (
    JobSpec,
    JobSpecs,
    Kind,
    collect_step,
    drive_step,
    eval_line_step,
    eval_step,
    preflight_step,
    prepare_step,
    push_step,
    refuse_collisions,
    train_step,
)
from stillhouse.sweep.cluster.manifest import (
    JOB_NAME,
    LABEL,
    ONLINE,
    SELECTOR,
    image_problem,
    label_value,
    refuse_unsendable,
    render,
    to_yaml,
)
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Point, Sweep
from tests.builders.published import EVAL, TRAIN, flags_of, lines, name_of
from tests.manifest_checklist import check

GOLDEN = Path(__file__).parent / "golden"
CODE = "0123456789abcdef-01234567"
PATTERN = (k8s_dir() / "job.yaml").read_text()
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


def typed(line: str) -> Sweep:
    return load_sweep(None, shlex.split(line), Path("runs"), site="cluster")


def tiny(line: str = "") -> tuple[Point, Sweep]:
    sweep = typed(f"pair=tiny owner=ada {line}")
    return sweep.points[0], sweep


def rendered(step: JobSpec, site: SiteSpec) -> Json:
    return render(step, site, CODE)


def container(job: Json) -> Json:
    (main,) = job["spec"]["template"]["spec"]["containers"]
    return main


def unscored(sweep: Sweep) -> Sweep:
    return dataclasses.replace(sweep, suite=None)


def spec_in(job: Json) -> str:
    """The spec as its pod reads it."""
    *_, flag, text = container(job)["args"]
    assert flag == "--spec"
    return text.replace("$$", "$")


def environment(job: Json) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container(job)["env"]}


# ---- the pattern


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


# ---- golden files


PREFLIGHT = Overrides({"pair": "tiny"}, {"loss.beta": 0})
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


# ---- the seeds' lines


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


def test_the_spec_in_a_seeds_job_is_its_point_in_the_pod(seeds: list[Json]):
    for line, job in zip([*TRAIN_SH, *EVAL_SH], seeds, strict=True):
        args = container(job)["args"]
        text = spec_in(job)
        own = job["metadata"]["name"].rpartition("-")[2]
        assert f"--id={own}" in args
        if "train" in args:
            spec = from_json(text, TrainSpec)
            assert point_id(spec) == own
            assert (spec.place.name, spec.place.runs) == (name_of(line), "/runs")
        else:
            spec = from_json(text, EvalSpec)
            assert eval_id(spec) == own
            assert all(path.startswith("dump/") for path in spec.evaluation.lora_paths)
        assert spec.place.cache_dir == "/cache"


def test_a_point_of_eight_processes_asks_for_eight_gpus_and_an_evaluation_for_one(seeds):
    limits = [container(job)["resources"]["limits"] for job in seeds]
    assert {limit["nvidia.com/gpu"] for limit in limits[:24]} == {"8"}
    assert {limit["memory"] for limit in limits[:24]} == {"384Gi"}
    assert {limit["nvidia.com/gpu"] for limit in limits[24:]} == {"1"}


# ---- steps


def test_a_step_of_training_has_the_name_of_its_run_directory():
    point, sweep = tiny("lmbda=0.5 name=half tags=[a,b]")
    step = train_step(point, sweep)
    assert step.name == directory_name(point.slug, point.id)
    assert step.id == point.id
    assert step.log == f"{step.name}/log.txt"
    assert (step.names, step.tags) == (("half",), ("a", "b"))


@pytest.mark.parametrize(
    "line",
    [
        "pair=tiny",
        "pair=tiny quant=none student_steps=10",
        "quant=bnb_nf4 double_quant=false max_rows=10",
        "pair=smollm2_self data=gsm8k --prompt-template 'Say \"{question}\", please: now'",
        "pair=tiny data=local data_path=/data/rows.jsonl limit=5",
    ],
)
def test_the_spec_of_an_evaluation_has_pair_quantiser_data_and_suite(line: str):
    sweep = typed(f"{line} suite=tiny")
    first = sweep.points[0]
    step = eval_step([first], ["student-0123456789"], sweep)
    spec = from_json(spec_in(rendered(step, sweep.site)), EvalSpec)
    assert (spec.pair, spec.quant, spec.data) == (
        first.spec.pair,
        first.spec.quant,
        first.spec.data,
    )
    assert spec.suite == sweep.suite
    assert spec.evaluation.lora_paths == (f"/runs/{directory_name(first.slug, first.id)}",)
    told = (
        spec.evaluation.eval_teacher,
        spec.evaluation.eval_student,
        spec.evaluation.eval_ptq,
    )
    assert told == (False, True, False)
    assert eval_id(spec) == step.id
    assert step.scores == suite_key(spec.suite)


def test_a_text_that_no_word_can_say_reaches_the_pod_as_it_is():
    point, sweep = tiny()
    data = dataclasses.replace(point.spec.data, prompt_template="{question} ${price} $(HOME)\n'")
    odd = dataclasses.replace(point, resolved=dataclasses.replace(point.spec, data=data))
    for step in (eval_step([odd], [], sweep), prepare_step(odd, sweep)):
        assert from_json(spec_in(rendered(step, sweep.site)), EvalSpec).data == data
    trained = rendered(train_step(odd, sweep), sweep.site)
    assert from_json(spec_in(trained), TrainSpec).data == data


@pytest.mark.parametrize("text", ["", "[]", "{}", "{'pair': 1}", '{"pair": {"pair_name": 1}}'])
def test_what_is_no_spec_is_refused_by_what_is_wrong_with_it(text: str):
    with pytest.raises(ConfigError, match="--spec: "):
        from_json(text, TrainSpec)


def test_the_spec_of_a_preparation_has_the_suite_where_there_is_one():
    point, sweep = tiny()
    scored = prepare_step(point, sweep)
    trained = prepare_step(point, unscored(sweep))
    assert isinstance(scored.spec, EvalSpec) and scored.spec.suite == sweep.suite
    assert scored.words == ("--fetch",)
    assert trained.words == ("--fetch", "--no-scores")
    assert scored.name != trained.name


def test_points_of_one_group_are_prepared_once():
    sweep = typed("pair=tiny lmbda=0,1 seeds=2")
    assert len({prepare_step(point, sweep).name for point in sweep.points}) == 1


def test_the_label_of_an_eval_line_does_not_change_its_job():
    overrides = from_command_line(shlex.split("--pair tiny --lora-paths dump/a"), EvalSpec)
    one, two = eval_line_step("one", overrides), eval_line_step("two", overrides)
    assert (one.name, one.hash, one.spec) == (two.name, two.hash, two.spec)
    assert (one.names, two.names) == (("one",), ("two",))
    assert one.baselines and all(
        name.startswith(("teacher-", "student-", "ptq-")) for name in one.baselines
    )


def test_an_eval_line_leaves_out_where_things_lie_on_the_laptop():
    words = shlex.split("--pair tiny --lora-paths out/a --runs here --cache-dir there --name x")
    step = eval_line_step("x", from_command_line(words, EvalSpec))
    assert step.typed == ("pair=tiny", "lora_paths=[out/a]", "runs=/runs", "cache_dir=/cache")
    assert step.spec == compose(from_command_line([*step.typed], EvalSpec), EvalSpec)


def test_a_driver_repeats_what_was_typed_and_says_whose_jobs_these_are():
    _, sweep = tiny("kube_context=far namespace=lab")
    sweep = dataclasses.replace(sweep, file="sweeps/a_b.yaml", name="a_b", words=("lmbda=0,1",))
    step = drive_step(sweep, b"x", ["--code=new"])
    assert step.words[:4] == ("run", "/sweep/a_b.yaml", "lmbda=0,1", "--code=new")
    assert {"owner=ada", "kube_context=null", "namespace=null"} <= {*step.words}
    assert step.name.startswith("drive-a-b-")
    assert step.sweep_file is not None and len(step.sweep_file) <= 63
    assert drive_step(sweep, b"y", ["--code=new"]).name != step.name
    with pytest.raises(ConfigError, match="rename it"):
        drive_step(dataclasses.replace(sweep, file="sweeps/a b.yaml"), b"x")


def test_each_action_of_a_sweep_has_its_step():
    sweep = typed("pair=tiny lmbda=0,1")
    steps = JobSpecs(sweep)
    ids = tuple(point.id for point in sweep.points)
    group = "tiny/int4"
    assert steps.of(Action("prepare", group)).kind == "prepare"
    assert steps.of(Action("train", group, ids[:1])) == train_step(sweep.points[0], sweep)
    teacher = Path("runs/baselines/teacher-0123456789")
    scored = steps.of(Action("eval", group, ids, (teacher,)))
    assert scored == eval_step(sweep.points, [teacher.name], sweep)
    assert scored.points == ids


def test_two_steps_of_one_name_are_refused():
    point, sweep = tiny()
    step = train_step(point, sweep)
    refuse_collisions([step, step])
    with pytest.raises(ConfigError, match=step.name):
        refuse_collisions([step, dataclasses.replace(step, hash="0" * 64)])
    step = eval_step([point], [], sweep)
    other = dataclasses.replace(step, hash="0" * 64, points=("abc",))
    with pytest.raises(ConfigError, match=f": eval of {point.id}; and eval of abc. Change"):
        refuse_collisions([step, other])


def test_a_configuration_that_no_container_starts_with_is_refused_by_what_is_long():
    point, sweep = tiny()
    step = eval_step([point], [], sweep)
    assert isinstance(step.spec, EvalSpec)
    paths = tuple(f"/runs/{number:0100}" for number in range(1200))
    scored = dataclasses.replace(step.spec.evaluation, lora_paths=paths)
    long = dataclasses.replace(step, spec=dataclasses.replace(step.spec, evaluation=scored))
    with pytest.raises(ConfigError, match="lora_paths 1[0-9]{2},[0-9]{3} of them, .* lower pack"):
        refuse_unsendable([long], sweep.site)
    assert isinstance(point.spec, TrainSpec)
    pair = dataclasses.replace(point.spec.pair, teacher_prompt="{question}" + "é" * 66_000)
    long = dataclasses.replace(step, spec=dataclasses.replace(point.spec, pair=pair))
    with pytest.raises(ConfigError, match="131,071 in one argument; shorten teacher_prompt"):
        rendered(long, sweep.site)


def test_ranks_have_the_time_of_their_site_to_save():
    point, sweep = tiny("num_processes=2 per_device_train_batch_size=2 lmbda=0.5")
    step, args = train_step(point, sweep), {}
    for grace in (25, 600):
        job = render(step, dataclasses.replace(sweep.site, grace_s=grace), "0" * 64)
        args[grace] = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "--grace=25" in args[25] and "--grace=600" in args[600]


# ---- kinds and sites


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


# ---- names, labels, YAML


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


# ---- secrets

SECRETS = {
    "a Hugging Face token": "hf_" + "AbCdEfGh" * 4,
    "a W&B key": "0123456789abcdef0123456789abcdef01234567",
    "an API key": "sk-proj-abcdefgh01234567",
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "an AWS key": "AKIAIOSFODNN7EXAMPLE",
    "a Slack token": "xoxb-123456789012-abcdef",
    "a signed token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "a key in PEM": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "a password in a URL": "https://ada:lovelace@host/path",
}


@pytest.mark.parametrize(("kind", "value"), SECRETS.items())
def test_a_secret_is_refused_wherever_it_stands_and_never_shown(kind: str, value: str):
    point, sweep = tiny()
    step = train_step(point, sweep)
    with_env = dataclasses.replace(sweep.site, pod_env={"X": value})
    cases = [
        (dataclasses.replace(step, words=(*step.words, f"data_path={value}")), sweep.site),
        (dataclasses.replace(step, words=(*step.words, "--tags", value)), sweep.site),
        (dataclasses.replace(step, words=(value,)), sweep.site),
        (dataclasses.replace(step, tags=("a", value)), sweep.site),
        (dataclasses.replace(step, names=(value,)), sweep.site),
        (step, with_env),
        (step, dataclasses.replace(sweep.site, wandb_secret=value)),
    ]
    for case, site in cases:
        with pytest.raises(ConfigError) as refused:
            rendered(case, site)
        said = str(refused.value)
        assert kind in said and "wandb_secret" in said
        assert value not in said


@pytest.mark.parametrize(
    ("kind", "text"),
    [(secrets.BY_NAME, "password=" + "hunter"), ("a W&B key", SECRETS["a W&B key"])],
)
def test_a_secret_among_the_settings_of_an_evaluation_is_found_as_in_words(kind: str, text: str):
    point, sweep = tiny()
    step = eval_step([point], [], sweep)
    assert isinstance(step.spec, EvalSpec)
    suite = dataclasses.replace(step.spec.suite, include_path=f"/runs/{text}")
    spec = dataclasses.replace(step.spec, suite=suite)
    with pytest.raises(ConfigError, match=f"include_path looks like {kind}"):
        refuse_unsendable([dataclasses.replace(step, spec=spec)], sweep.site)


def test_a_secret_in_one_point_of_many_is_found_before_the_first_is_sent():
    sweep = typed(f"pair=tiny lmbda=0,0.5,1 tags=[{SECRETS['an AWS key']}]")
    with pytest.raises(ConfigError, match="an AWS key"):
        refuse_unsendable((train_step(point, sweep) for point in sweep.points), sweep.site)


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "DB_PASSWORD", "aws_secret_access_key"]
)
def test_a_name_that_says_it_is_a_secret_is_believed(name: str):
    point, sweep = tiny()
    site = dataclasses.replace(sweep.site, pod_env={name: "anything"})
    with pytest.raises(ConfigError, match=name):
        rendered(train_step(point, sweep), site)
    words = ["run", f"{name}=anything"]
    with pytest.raises(ConfigError) as refused:
        secrets.refuse_words(words, "command line")
    assert "anything" not in str(refused.value)


kinds = st.sampled_from(sorted(SECRETS.items()))
around = st.text(st.characters(blacklist_categories=["L", "N", "Cs"]), max_size=8)


@given(kinds, around, around)
def test_a_secret_is_found_whatever_stands_around_it(secret, before: str, after: str):
    if secret[0] == "a password in a URL":
        before = after = ""  # what stands around may make it another URL
    before = before.replace("_", "")
    assert secrets.find(f"{before}{secret[1]}{after}") is not None


@given(st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(), st.floats())
def test_no_id_digest_or_number_looks_like_a_secret(digest: str, whole: int, number: float):
    values = [digest, digest[:10], f"tiny-gkd-{digest[:10]}", f"name@sha256:{digest}", str(whole)]
    assert [secrets.find(value) for value in (*values, str(number))] == [None] * 6


def test_no_published_line_and_no_file_of_ours_looks_like_one():
    def is_refused(words: list[str]) -> bool:
        try:
            secrets.refuse_words(words, "a line")
        except ConfigError:
            return True
        return False

    ours = [line.split() for line in (*lines(TRAIN), *lines(EVAL))]
    ours.append(["max_new_tokens=128", "max_gen_toks=4", "wandb_secret=wandb"])
    ours.append([f"student_revision={'a' * 40}", "task-token-x=1"])
    ours.append(["--student-revision", "b" * 40, "--hf-secret", "hf-token"])
    assert [words for words in ours if is_refused(words)] == []
    assert is_refused(["--hf-secret", "hf_" + "a" * 34]), "one that is"


# ---- the cluster's side


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


def test_defaults_of_the_sites_render():
    for name in ("cluster", "kueue", "spot"):
        sweep = typed(f"pair=tiny site={name}")
        assert check(rendered(train_step(sweep.points[0], sweep), sweep.site)) == []


def test_overrides_that_name_nothing_make_a_step_of_the_defaults():
    step = eval_line_step("eval", Overrides({}, {}))
    assert step.typed == ("runs=/runs", "cache_dir=/cache")


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
