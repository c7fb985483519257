"""Compare an existing object with the one that we would create under its name.

"It exists" is not "it is equal": somebody may have edited it, made it by hand or restored another.
An equal object is used. Any other is left alone, and the error names it, what differs and what to
do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from stillhouse.errors import ConfigError, ContractError
from stillhouse.rundir import Json
from stillhouse.sweep.cluster.connect import ApiError, Cluster
from stillhouse.sweep.cluster.jobspec import JobSpec
from stillhouse.sweep.cluster.manifest import HASH_DIGITS
from stillhouse.sweep.cluster.objects import OURS, PART_OF, JobView, job_view, viewed

KIND = "stillhouse/kind"
TRIES = 5  # where what was in the way is gone again each time we look


def have_config_map(cluster: Cluster, manifest: Json) -> None:
    """Make a ConfigMap that is named by its content, or find the one that is there.

    Raises:
        ConfigError: one of that name is there with another content.
    """
    name: str = manifest["metadata"]["name"]
    for _ in range(TRIES):
        try:
            cluster.create("configmaps", manifest)
            return
        except ApiError as error:
            if error.status != 409:
                raise
        there = cluster.read("configmaps", name)
        if there is not None:
            _refuse_other(there, manifest)
            return
    raise ConfigError(f"ConfigMap {name} comes and goes: somebody deletes it; run again")


def _refuse_other(there: Json, wanted: Json) -> None:
    name = wanted["metadata"]["name"]
    for part in ("data", "binaryData"):
        is_, want = _mapping(there.get(part)), _mapping(wanted.get(part))
        for key in sorted(is_.keys() | want.keys()):
            if is_.get(key) == want.get(key):
                continue
            how = "lacks" if key not in is_ else "also has" if key not in want else "has another"
            raise ConfigError(
                f"ConfigMap {name} is there and {how} {key}: somebody made or edited it, and its"
                f" name says what is to be in it. `kubectl delete configmap {name}` where it is not"
                " somebody else's, then run again"
            )


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def have_job(cluster: Cluster, step: JobSpec, body: Json) -> bool:
    """Make a step's Job of its manifest, or find the one that is there; whether it was made.

    Raises:
        ConfigError, ContractError: as `ours`.
    """
    for _ in range(TRIES):
        try:
            cluster.create("jobs", body)
            return True
        except ApiError as error:
            if error.status != 409:
                raise
        there = cluster.read("jobs", step.name)
        if there is not None:
            ours(there, step)
            return False
    raise ConfigError(f"Job {step.name} comes and goes: somebody deletes it; run again")


def ours(there: Json, step: JobSpec) -> JobView:
    """A Job that has the name of a step, if it is that step's.

    Raises:
        ConfigError: it is not ours.
        ContractError: it is about something else.
    """
    labels = _mapping(there["metadata"].get("labels"))
    job = viewed(job_view, there)
    if labels.get(PART_OF) != OURS or not job.hash:
        raise ConfigError(
            f"Job {job.name} is there and is not ours; delete or rename it"
            f" (kubectl describe job {job.name}), then run again"
        )
    if job.hash != step.hash[:HASH_DIGITS] or job.kind != step.kind:
        raise ContractError(
            f"Job {job.name} is there with another content ({job.kind or 'no kind'}, hash"
            f" {job.hash[:12]}; this is {step.kind}, {step.hash[:12]}): drift."
            f" `kubectl delete job {job.name}`, then run again"
        )
    return job


def refuse_stranger(there: Json | None, kind: str | None) -> None:
    """Refuse a ConfigMap that has the name of one that we write, but not our labels.

    `kind`: what its label says; None: it has no such label.

    Raises:
        ConfigError: it has not our labels.
    """
    if there is None:
        return
    labels = _mapping(there["metadata"].get("labels"))
    if labels.get(PART_OF) == OURS and labels.get(KIND) == kind:
        return
    name, wanted = there["metadata"]["name"], f"{PART_OF}={OURS}" + (f" {KIND}={kind}" * bool(kind))
    raise ConfigError(
        f"ConfigMap {name} is there without the labels of ours ({wanted}), so it is not written to:"
        f" `kubectl label configmap {name} {wanted}` where it is ours, else have it deleted or"
        " renamed; then run again"
    )
