"""Render a step as a Kubernetes Job: the object that is sent as JSON and shown as YAML.

    k8s/job.yaml + JobSpec + SiteSpec + the code bundle's key -> dict

Pure. The template `k8s/job.yaml` holds what is the same in every Job; this module adds only what
follows from step and site.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, cast

from stillhouse.compose import as_json, k8s_dir
from stillhouse.errors import SOME_FAILED, ConfigError
from stillhouse.identity import to_plain
from stillhouse.rundir import Json
from stillhouse.spec import EvalSpec, SiteSpec
from stillhouse.sweep.cluster import secrets
from stillhouse.sweep.cluster.jobspec import RUNS, SWEEP, JobSpec, Kind

SELECTOR = "app.kubernetes.io/part-of=stillhouse"  # everything that is ours
OUR_LABELS = {f"app.kubernetes.io/{key}": "stillhouse" for key in ("name", "part-of", "managed-by")}
MAX_LABEL = 63
MAX_ARGUMENT = 131_071  # bytes; Linux's MAX_ARG_STRLEN without the zero at its end
HASH_DIGITS = 40  # of the content's sha256 in a label
CODE_DIGITS = 16  # of the code's, as code_identity has it
LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
JOB_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?")
PINNED = re.compile(r"[^@\s]+@sha256:([0-9a-f]{64})")
PLAIN = re.compile(r"(?:--)?[A-Za-z/][A-Za-z0-9_./=@-]+")  # text that YAML needs no quotes for
WIDE = 1_000_000  # columns: no text is folded
GPU_PRODUCT = "nvidia.com/gpu.product"
# A driver that waits for quota drives not.
QUEUED: tuple[Kind, ...] = ("prepare", "train", "eval", "preflight")
WORKERS = QUEUED
# Who may download or track online; k8s/network.yaml lets these kinds out, and no others.
ONLINE: tuple[Kind, ...] = ("prepare", "train", "preflight")
# Volumes of k8s/job.yaml that each kind keeps; the code is mounted by all.
VOLUMES: dict[Kind, tuple[str, ...]] = {
    "prepare": ("runs", "cache", "tmp", "home", "shm"),
    "train": ("runs", "cache", "tmp", "home", "shm"),
    "eval": ("runs", "cache", "tmp", "home", "shm"),
    "preflight": ("runs", "cache", "tmp", "home", "shm"),
    "drive": ("runs", "tmp", "home"),
    "collect": ("runs", "tmp", "home"),
    "push": ("cache", "tmp", "home"),
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# The launcher's own pods: some tens of MB for a sweep, and mostly waiting.
LAUNCHER_CPU, LAUNCHER_MEMORY_GIB = 0.25, 1.0
DRIVE_DEADLINE_S = 60 * 86_400  # a sweep lasts as long as its queue
COLLECT_DEADLINE_S = 6 * 3_600
PUSH_DEADLINE_S = 24 * 3_600  # a laptop's line is slow


@functools.cache
def _pattern() -> str:
    import yaml

    return json.dumps(yaml.safe_load((k8s_dir() / "job.yaml").read_text(encoding="utf-8")))


def render(step: JobSpec, site: SiteSpec, code: str) -> Json:
    """The Job of a step at a site, running the code whose bundle has this key.

    Raises:
        ConfigError: something that no manifest may hold (a secret), or no label, name or argument
            can.
    """
    refuse_unsendable([step], site)
    job: Json = json.loads(_pattern())
    labels = _labels(step, site, code)
    if not JOB_NAME.fullmatch(step.name):
        raise ConfigError(
            f'"{step.name}" cannot name a Job: lower-case letters, digits and dashes, at most 52'
        )
    queue = _queue(step, site)
    meta: Json = {"name": step.name}
    if site.namespace is not None:
        meta["namespace"] = site.namespace
    job["metadata"] = meta | {"labels": labels | queue, "annotations": _annotations(step, site)}
    spec = job["spec"]
    if queue:
        job["spec"] = spec = {"suspend": True} | spec  # the queue decides when it begins
    spec["backoffLimit"] = site.infra_retries
    spec["activeDeadlineSeconds"] = {
        "drive": DRIVE_DEADLINE_S,
        "collect": COLLECT_DEADLINE_S,
        "push": PUSH_DEADLINE_S,
    }.get(step.kind, site.deadline_s)
    if step.kind == "drive":
        never = spec["podFailurePolicy"]["rules"][-1]["onExitCodes"]["values"]
        never.insert(0, SOME_FAILED)  # it did all it could: its points failed, not it
    spec["template"]["metadata"] = {"labels": labels}
    annotations = _pod_annotations(step, site)
    if annotations:
        spec["template"]["metadata"]["annotations"] = annotations
    spec["template"]["spec"] = _pod(spec["template"]["spec"], step, site, code)
    return job


def config_map(name: str, labels: Mapping[str, str], **content: Any) -> Json:
    """A ConfigMap of ours; `content`: data, binaryData, immutable."""
    meta = {"name": name, "labels": {**OUR_LABELS, **labels}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, **content}


def to_yaml(job: Json) -> str:
    """A manifest for people and for `kubectl apply -f -`: YAML of the object that is sent."""
    import yaml

    return yaml.dump(job, Dumper=_dumper(), sort_keys=False, width=WIDE)


@functools.cache
def _dumper() -> Any:
    """A YAML writer that quotes all but words: Go reads 1e3 as a number, PyYAML as text."""
    import yaml

    class Dumper(yaml.CSafeDumper):
        pass

    def text(dumper: Any, value: str) -> Any:
        style = None if PLAIN.fullmatch(value) else "|" if "\n" in value else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)

    Dumper.add_representer(str, text)
    return Dumper


def image_problem(site: SiteSpec) -> str | None:
    """Why this site's image cannot be sent to a cluster; None where it can."""
    pinned = PINNED.fullmatch(site.image)
    where = f"site {site.site_name}: image {site.image}"
    cure = "`make image IMAGE=NAME` builds one, pushes it and prints the line for conf/site"
    if pinned is None:
        return f"{where}: not pinned by a digest (NAME@sha256:...), so pods could differ; {cure}"
    if set(pinned[1]) == {"0"}:
        return f"{where}: a digest of zeros is nobody's image; {cure}"
    return None


def label_value(text: str) -> str:
    """What a label can hold of a text: the text, or a legal part of it and eight hex digits."""
    if LABEL.fullmatch(text):
        return text
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[: MAX_LABEL - 9].strip("._-")
    return f"{kept}-{mark}" if kept else mark


def refuse_unsendable(steps: Iterable[JobSpec], site: SiteSpec) -> None:
    """Refuse what cannot be, or must not be, in a manifest, before any of these steps is sent.

    Raises:
        ConfigError: a secret in a word, a setting, a tag, a name or the site (the message has no
            value); a configuration that no container could be started with.
    """
    where = f"site {site.site_name}"
    secrets.refuse_values(site.pod_env, f"{where}: pod_env")
    secrets.refuse_values(site.node_selector, f"{where}: node_selector")
    secrets.refuse_values(site.pod_annotations, f"{where}: pod_annotations")
    secrets.refuse_values({"image": site.image, "owner": site.owner}, where)
    named = {
        "wandb_secret": site.wandb_secret,
        "hf_secret": site.hf_secret,
        "pull_secret": site.pull_secret,
    }
    secrets.refuse_values({key: name for key, name in named.items() if name}, where)
    for step in steps:
        secrets.refuse_words((*step.words, *step.typed), "the command line")
        if step.spec is not None:
            configuration = as_json(step.spec)
            secrets.refuse_key(configuration, f"the configuration of {step.name}")
            if (size := len(configuration.encode())) > MAX_ARGUMENT:
                raise _too_long(step.name, size, to_plain(step.spec))
            if isinstance(step.spec, EvalSpec):  # of a sweep's file: no word has them
                plain = to_plain(step.spec)
                for name, value in (plain["suite"] | plain["evaluation"]).items():
                    text = value if isinstance(value, str) else json.dumps(value)
                    secrets.refuse(text, name, f"the configuration of {step.name}: {name}")
        secrets.refuse_texts(step.tags, "tags")
        secrets.refuse_texts((*step.names, step.sweep or ""), "names")


def _too_long(name: str, size: int, plain: Json) -> ConfigError:
    sizes = {
        leaf: len(json.dumps(value, ensure_ascii=False).encode())
        for leaves in plain.values()
        for leaf, value in leaves.items()
    }
    longest = max(sizes, key=lambda leaf: sizes[leaf])
    cure = f"shorten {longest}"
    if longest == "lora_paths":
        cure = "score fewer at once: lower pack, or name a directory above them"
    return ConfigError(
        f"{name}: its configuration takes {size:,} bytes, {longest} {sizes[longest]:,} of"
        f" them, and Linux starts no program with over {MAX_ARGUMENT:,} in one argument; {cure}"
    )


# ------------------------------------------------------------------------------- of a step


def _labels(step: JobSpec, site: SiteSpec, code: str) -> Json:
    labels = OUR_LABELS | {
        "app.kubernetes.io/component": step.kind,
        "stillhouse/kind": step.kind,
        "stillhouse/owner": label_value(site.owner),
    }
    if step.sweep is not None:
        labels["stillhouse/sweep"] = label_value(step.sweep)
    if step.kind == "train":
        labels["stillhouse/point"] = step.id
    labels["stillhouse/hash"] = step.hash[:HASH_DIGITS]
    labels["stillhouse/code"] = code[:CODE_DIGITS]
    return labels


def _queue(step: JobSpec, site: SiteSpec) -> Json:
    """Kueue's labels, of the Job alone."""
    if site.queue is None or step.kind not in QUEUED:
        return {}
    names = {"queue-name": site.queue, "priority-class": site.queue_priority}
    for knob, name in zip(("queue", "queue_priority"), names.values(), strict=True):
        if name is not None and (not name or not LABEL.fullmatch(name)):
            raise ConfigError(
                f"site {site.site_name}: {knob} = {name!r} is no name of a Kubernetes object"
            )
    return {f"kueue.x-k8s.io/{key}": name for key, name in names.items() if name is not None}


def asked(kind: str, processes: int, site: SiteSpec) -> str:
    """What of a site decides whether and where such a Job may start, in words: `queue=lab …`.

    Jobs of one name may be sent from two sites: this tells them apart (`objects.ASKS`).
    """
    knobs = ["image", "pull_secret", "priority_class", "node_selector", "tolerations"]
    knobs += ["runs_claim", "cache_claim"]
    knobs += ["driver_account" if kind == "drive" else "service_account"]
    knobs += ["queue", "queue_priority"] if kind in QUEUED and site.queue is not None else []
    knobs += ["cpu", "memory_gib", "shm_gib", "hf_secret"] if kind in WORKERS else []
    knobs += ["wandb_secret"] if kind == "train" else []
    knobs += ["gpu_resource", "gpu_product", "runtime_class"] if processes else []
    values = {knob: getattr(site, knob) for knob in knobs}
    said = sorted((knob, value) for knob, value in values.items() if value not in (None, (), {}))
    return shlex.join(
        f"{knob}={value if isinstance(value, str) else json.dumps(value)}" for knob, value in said
    )


def _annotations(step: JobSpec, site: SiteSpec) -> Json:
    told = {
        "words": shlex.join(step.typed if step.spec else step.words),
        "points": ",".join(step.points),
        "baselines": ",".join(step.baselines),
        "scores": step.scores or "",
        "names": shlex.join(step.names),
        "tags": shlex.join(step.tags),
        "devices": str(step.processes),
        "gpu-product": site.gpu_product or "" if step.processes else "",
        "asks": asked(step.kind, step.processes, site),
    }
    return {f"stillhouse/{key}": text for key, text in told.items() if text}


# --------------------------------------------------------------------------------- of its pod


def _pod_annotations(step: JobSpec, site: SiteSpec) -> dict[str, str]:
    for name in site.pod_annotations:
        if name.startswith("stillhouse/"):
            raise ConfigError(
                f"site {site.site_name}: pod_annotations: {name} is ours; a site may set any other"
            )
    return site.pod_annotations | (
        {"stillhouse/points": ",".join(step.points)} if step.points else {}
    )


def _pod(pod: Json, step: JobSpec, site: SiteSpec, code: str) -> Json:
    pod["terminationGracePeriodSeconds"] = site.grace_s
    drives = step.kind == "drive"
    pod["serviceAccountName"] = site.driver_account if drives else site.service_account
    pod["automountServiceAccountToken"] = drives
    gpus = step.processes if site.gpu_resource else 0
    selector = dict(site.node_selector)
    if gpus and site.gpu_product:
        selector[GPU_PRODUCT] = site.gpu_product
    # Where it may run comes before what runs; the pattern's order is kept otherwise.
    containers, volumes = pod.pop("containers"), pod.pop("volumes")
    if selector:
        pod["nodeSelector"] = selector
    if site.tolerations:
        pod["tolerations"] = list(site.tolerations)
    if site.priority_class is not None:
        pod["priorityClassName"] = site.priority_class
    if gpus and site.runtime_class is not None:
        pod["runtimeClassName"] = site.runtime_class
    if site.pull_secret is not None:
        pod["imagePullSecrets"] = [{"name": site.pull_secret}]
    main = containers[0]
    main["image"] = site.image
    main["command"] = ["python", "/bundle/pod.py"]
    main["args"] = _args(step, site, code)
    main["env"] = _env(main["env"], step, site, gpus)
    main["resources"] = _resources(step, site, gpus)
    kept = VOLUMES[step.kind]
    main["volumeMounts"] = [m for m in main["volumeMounts"] if m["name"] in kept]
    if step.kind == "collect":
        main["volumeMounts"][0] |= {"readOnly": True}
    pod["containers"] = containers
    pod["volumes"] = [_sized(v, site) for v in volumes if v["name"] in kept]
    for name, source in _config_maps(step, code).items():
        main["volumeMounts"].append({"name": name, "mountPath": f"/{name}", "readOnly": True})
        pod["volumes"].append({"name": name, "configMap": source})
    return pod


def _args(step: JobSpec, site: SiteSpec, code: str) -> list[str]:
    options = [f"--code={code[:CODE_DIGITS]}", f"--id={step.id}"]
    if step.log:
        options.append(f"--log={RUNS}/{step.log}")
    if step.processes:
        options.append(f"--processes={step.processes}")
    if step.processes > 1:
        options.append(f"--grace={site.grace_s}")
    spec = ("--spec", as_json(step.spec)) if step.spec else ()
    # A kubelet fills in $(NAME) from the container's environment; to it, $$ is a $.
    return [*options, step.kind, "--", *(w.replace("$", "$$") for w in (*step.words, *spec))]


def _env(pattern: list[Json], step: JobSpec, site: SiteSpec, gpus: int) -> list[Json]:
    entries = {entry["name"]: entry for entry in pattern}
    goes_online = step.fetch or step.kind == "prepare"
    assert step.kind in ONLINE or not goes_online, "k8s/network.yaml keeps this kind at home"
    values = {"OMP_NUM_THREADS": str(_threads(step, site)), "STILLHOUSE_IMAGE": site.image}
    values |= {} if goes_online else OFFLINE
    values |= {"STILLHOUSE_GPUS": str(gpus)} if gpus else {}
    if not step.fetch:
        del entries["STILLHOUSE_FETCH"]
    if step.kind in WORKERS:
        values |= site.pod_env
    for name in site.pod_env:
        if name.startswith("STILLHOUSE_") or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(
                f"site {site.site_name}: pod_env.{name}: not a name that a site may set"
            )
    for name, value in values.items():
        entries[name] = {"name": name, "value": value}
    keys: dict[str, str | None] = {
        "HF_TOKEN": site.hf_secret if goes_online else None,
        "WANDB_API_KEY": site.wandb_secret if step.kind == "train" else None,
    }
    for name, secret in keys.items():
        if secret is not None:
            entries[name] = {"name": name, "valueFrom": _secret(secret)}
    return list(entries.values())


def _secret(name: str) -> Json:
    # Not optional: without it a run would go on untracked, or fail at its first download.
    return {"secretKeyRef": {"name": name, "key": "token", "optional": False}}


def _threads(step: JobSpec, site: SiteSpec) -> int:
    return max(1, math.floor(site.cpu)) if step.kind in WORKERS else 1


def _resources(step: JobSpec, site: SiteSpec, gpus: int) -> Json:
    if step.kind not in WORKERS:
        cpu, memory = LAUNCHER_CPU, LAUNCHER_MEMORY_GIB
    else:
        each = max(1, step.processes)
        cpu, memory = site.cpu * each, site.memory_gib * each
        if site.shm_gib >= memory:
            raise ConfigError(
                f"site {site.site_name}: shm_gib {site.shm_gib:g} counts in the memory of a pod,"
                f" {memory:g} GiB here, and must be below it"
            )
    limits: Json = {"memory": _gib(memory)}
    if gpus:
        limits[cast("str", site.gpu_resource)] = str(gpus)
    cores = f"{cpu:g}" if float(cpu).is_integer() else f"{math.ceil(cpu * 1000)}m"
    return {"requests": {"cpu": cores}, "limits": limits}


def _gib(size: float) -> str:
    return f"{int(size)}Gi" if float(size).is_integer() else f"{math.ceil(size * 1024)}Mi"


def _sized(volume: Json, site: SiteSpec) -> Json:
    claims = {"runs": site.runs_claim, "cache": site.cache_claim}
    if volume["name"] in claims:
        volume["persistentVolumeClaim"] = {"claimName": claims[volume["name"]]}
    if volume["name"] == "shm":
        volume["emptyDir"]["sizeLimit"] = _gib(site.shm_gib)
    return volume


def _config_maps(step: JobSpec, code: str) -> dict[str, Json]:
    """ConfigMaps by the name under which the pod sees them: code, names of runs, a sweep's file."""
    maps: dict[str, Json] = {"bundle": {"name": f"stillhouse-code-{code}"}}
    if step.kind == "eval":
        maps["names"] = {"name": "stillhouse-names", "optional": True}  # nobody may have named one
    if step.sweep_file is not None:
        maps[SWEEP.strip("/")] = {"name": step.sweep_file}
    return maps
