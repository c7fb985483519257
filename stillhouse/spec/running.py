"""Declare what is measured and watched on the way, and where a point runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from stillhouse.spec.values import STRICT, Bins, Count, Name, Natural, NonNegative, Number, Positive


@dataclass(frozen=True, config=STRICT)
class MonitorSpec:
    """What is measured on the way; none of it changes what is trained."""

    do_eval: bool  # loss on held-out rows
    eval_steps: Count
    eval_answers: Literal["dataset", "teacher"]  # whose answers to them; a teacher writes its own
    score_steps: Natural  # train/score needs a teacher sample, so every N steps; 0: never
    accuracy_steps: Natural  # held-out questions answered, every N steps; 0: never
    overlap_steps: Natural  # how student and teacher overlap on rollouts, every N steps; 0: never
    overlap_k: Count  # likeliest tokens of a side that are compared
    overlap_bins: Bins  # also by how many tokens of the answer stand before


@dataclass(frozen=True, config=STRICT)
class WatchRule:
    """A condition on a metric's mean over the last `window` steps, and what it leads to."""

    metric: str  # as in metrics.jsonl
    # above, below: the mean against `limit`. gains_less: from the window's first half to its second
    # it rises by less than `limit`. above_lowest: it is `limit` times the lowest mean of a window
    # before this one.
    condition: Literal["above", "below", "gains_less", "above_lowest"]
    limit: Annotated[float, Number]
    window: Count  # steps
    unless_above: Annotated[float, Number] | None  # a mean above it is well, whatever it does
    action: Literal["warn", "stop"]  # stop: exit code 46, state saved, never retried
    optional: bool  # left out where the metric is not logged, or the run is shorter than the window

    @model_validator(mode="after")
    def _halves(self) -> WatchRule:
        if self.condition == "gains_less" and self.window < 2:
            raise ValueError("gains_less compares the halves of its window: 2 or more steps")
        return self


@dataclass(frozen=True, config=STRICT)
class WatchSpec:
    """The rules that are applied while a point trains."""

    watch_rules: dict[Name, WatchRule]
    stop_on: tuple[str, ...]  # names of rules that stop the run, whatever action they name

    @model_validator(mode="after")
    def _names(self) -> WatchSpec:
        for name in self.stop_on:
            if name not in self.watch_rules:
                there = ", ".join(self.watch_rules) or "none"
                raise ValueError(f"stop_on: no watch rule {name}; there is {there}")
        return self


@dataclass(frozen=True, config=STRICT)
class TrackingSpec:
    """Weights & Biases, when asked. metrics.jsonl is always written."""

    tracker: Literal["none", "wandb"]
    wandb_project: str
    wandb_mode: Literal["offline", "online"]


@dataclass(frozen=True, config=STRICT)
class PlaceSpec:
    """Directories and names; they are no part of a point's identity."""

    runs: str  # directory of run directories
    cache_dir: str  # prepared pairs
    name: Name | None  # an alias of the run; its identity is its content
    output_dir: str | None  # this path shall lead to the run
    tags: tuple[str, ...]
    threads: Count | None  # of torch; null: what torch chooses
    # [datasets/]OWNER/NAME[@BRANCH] of the hub -> the commit that is meant by it, wherever that
    # branch has moved to: one for all points of a sweep.
    commits: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{40}$")]]
    # new: a run whose weights, tokenizer or rows have changed since is put aside, and begins anew.
    sources: Literal["same", "new"]
    sweep: str | None  # whose point it is here: Weights & Biases groups runs by it


@dataclass(frozen=True, config=STRICT)
class SiteSpec:
    """Where points run, and how many at once. From `owner` on, only a cluster asks."""

    site_name: str
    max_parallel: Count  # processes at once; on a cluster, Jobs that are not finished
    infra_retries: Natural  # attempts after the first that an infrastructure failure may cost
    price_usd_per_hour: NonNegative | None  # of one device-hour here; null: not known
    owner: str  # whose Jobs these are: others' are left alone
    kube_context: str | None  # of the kubeconfig; null: its current one
    namespace: str | None  # null: the context's
    image: str  # NAME@sha256:DIGEST, so that every pod of a sweep runs the same one
    service_account: str  # of workers, who never see its token
    driver_account: str  # of a detached driver, who needs it
    runs_claim: str  # PersistentVolumeClaims, k8s/storage.yaml
    cache_claim: str
    queue: str | None  # Kueue's LocalQueue: Jobs are born suspended, and it decides
    queue_priority: str | None  # Kueue's WorkloadPriorityClass
    priority_class: str | None  # PriorityClass of pods
    gpu_resource: str | None  # null: none is asked for
    gpu_product: str | None  # node label nvidia.com/gpu.product, and the key in k8s/prices.yaml
    node_selector: dict[str, str]
    tolerations: tuple[dict[str, Any], ...]
    cpu: Positive  # cores per process
    memory_gib: Positive  # per process
    shm_gib: Positive  # /dev/shm of a pod; counts in its memory
    deadline_s: Count  # of a Job, from its start; begins anew after a suspension by Kueue
    grace_s: Count  # between SIGTERM and SIGKILL: a save must fit
    patience_s: (
        Count  # a Job that cannot start (image, secret, volume, quota) keeps its slot so long
    )
    wandb_secret: str | None  # names of Secrets with a key "token"; their content is never ours
    hf_secret: str | None
    pod_env: dict[str, str]
    runtime_class: str | None  # runtimeClassName of pods that ask for GPUs (k3s, RKE2: nvidia)
    pull_secret: str | None  # name of a Secret with which nodes pull the image
    pod_annotations: dict[str, str]  # of pods: what sidecar injectors and the like read
