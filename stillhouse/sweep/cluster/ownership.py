"""Create an object, or compare the one that is there under its name with it.

"It exists" is not "it is equal": somebody may have edited it, made it by hand or restored another.
An equal object is used. Any other is left alone, and the error names it, what differs and what to
do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from stillhouse.errors import ConfigError, ContractError
from stillhouse.rundir import Json
from stillhouse.sweep.cluster.connect import ApiError, Cluster
from stillhouse.sweep.cluster.jobspec import JobSpec
from stillhouse.sweep.cluster.manifest import HASH_DIGITS
from stillhouse.sweep.cluster.objects import OURS, PART_OF, JobView, job_view, viewed

KIND = "stillhouse/kind"
TRIES = 5  # where what was in the way is gone again each time we look
Problem = tuple[str, str]  # what is wrong, and what to do about it


def create(
    cluster: Cluster, resource: str, body: Json, still: Callable[[], bool] | None = None
) -> tuple[Json | None, bool]:
    """The object and whether it is new; None where its name was taken, and is free again by now.

    Raises:
        ApiError: as `Cluster.create`, but for a name that is taken.
    """
    try:
        return cluster.create(resource, body, still=still), True
    except ApiError as error:
        if error.status != 409:
            raise
    return cluster.read(resource, body["metadata"]["name"]), False


def create_or_read(cluster: Cluster, resource: str, body: Json) -> tuple[Json, bool]:
    """The object and whether it is new.

    Raises:
        ConfigError: somebody deletes it each time.
    """
    for _ in range(TRIES):
        there, is_new = create(cluster, resource, body)
        if there is not None:
            return there, is_new
    what = f"{body['kind']} {body['metadata']['name']}"
    raise ConfigError(f"{what} comes and goes: somebody deletes it; run again")


def have_config_map(cluster: Cluster, manifest: Json) -> None:
    """Make a ConfigMap that is named by its content, or find the one that is there.

    Raises:
        ConfigError: one of that name is there with another content.
    """
    there, _ = create_or_read(cluster, "configmaps", manifest)
    name = manifest["metadata"]["name"]
    for part in ("data", "binaryData"):
        is_, want = _mapping(there.get(part)), _mapping(manifest.get(part))
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


def ours(there: Json, step: JobSpec) -> JobView:
    """A Job that has the name of a step, if it is that step's.

    Raises:
        ConfigError: it is not ours.
        ContractError: it is about something else.
    """
    job = viewed(job_view, there)
    if _mapping(there["metadata"].get("labels")).get(PART_OF) != OURS or not job.hash:
        raise ConfigError(": ".join(stranger(job.name)))
    refuse_drift(job, step)
    return job


def refuse_drift(job: JobView, step: JobSpec) -> None:
    """Refuse a Job of ours that has the name of a step and is about something else.

    Raises:
        ContractError: it is.
    """
    problem = drift(job, step)
    if problem is not None:
        raise ContractError(": ".join(problem))


def stranger(name: str) -> Problem:
    """What to say of a Job with a name of ours that is not ours."""
    todo = f"kubectl describe job {name}; have it removed or renamed, then run again"
    return f"Job {name} is there and is not ours", todo


def drift(job: JobView, step: JobSpec) -> Problem | None:
    """How a Job of ours with the name of a step is not of its content; None where it is."""
    if (job.kind, job.hash) == (step.kind, step.hash[:HASH_DIGITS]):
        return None
    return (
        f"Job {job.name} is there with another content ({job.kind or 'no kind'}, hash"
        f" {job.hash[:12]}; this is {step.kind}, {step.hash[:12]}): drift",
        f"`kubectl delete job {job.name}`, then run again",
    )


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
