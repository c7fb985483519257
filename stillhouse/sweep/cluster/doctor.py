"""Check a namespace for all that a sweep needs, before the first Job is sent.

What the launcher's Role cannot read (secrets, priority classes, nodes) is not checked: the cluster
reports it when it affects a Job, and `status` passes that on (`reasons`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from stillhouse.compose import k8s_dir
from stillhouse.errors import ConfigError
from stillhouse.rundir import Json
from stillhouse.spec import SiteSpec
from stillhouse.sweep.cluster.connect import ApiError, Cluster
from stillhouse.sweep.cluster.jobspec import JobSpec
from stillhouse.sweep.cluster.manifest import image_problem, label_value
from stillhouse.sweep.cluster.objects import JobView, notes
from stillhouse.sweep.cluster.ownership import drift, stranger
from stillhouse.sweep.cluster.reasons import DEFAULT_QUEUE
from stillhouse.sweep.cluster.refusals import short

LAUNCHER = "stillhouse-launcher"
OTHERS = "app.kubernetes.io/part-of!=stillhouse"
AT_ONCE = 8
SHOWN = 3  # mistakes that one error names
KUEUE = "kueue.x-k8s.io"
UNBOUND = ("FailedBinding", "ProvisioningFailed")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    ok: bool
    what: str
    remedy: str = ""  # what to do about it, where it is not ok

    def __str__(self) -> str:
        return self.what if self.ok else f"{self.what}: {self.remedy}"


def findings(cluster: Cluster, site: SiteSpec, role: str = LAUNCHER) -> list[Finding]:
    """Check all that a sweep at this site needs of its namespace, each thing once."""
    where = _namespace(cluster)
    if not where.ok:
        return [_image(site), where]
    rights = list(_rights(cluster, site, role))
    found = [_image(site), where, *rights]
    if all(right.ok for right in rights):  # else the first refused request says it again
        found += [_claim(cluster, claim) for claim in (site.runs_claim, site.cache_claim)]
        found.append(_account(cluster, site.service_account))
        if role != LAUNCHER:
            found.append(_account(cluster, site.driver_account))
        if site.queue is not None:
            found.append(_queue(cluster, site.queue))
    return found


def refuse(found: Iterable[Finding]) -> None:
    """Raise the first few that are not ok.

    Raises:
        ConfigError: there are any.
    """
    wrong = [finding for finding in found if not finding.ok]
    if wrong:
        more = f"\n(and {len(wrong) - SHOWN} more: `stillhouse doctor`)"
        said = "\n".join(map(str, wrong[:SHOWN]))
        raise ConfigError(said + (more if len(wrong) > SHOWN else ""))


def job_findings(
    cluster: Cluster, jobs: Sequence[JobView], steps: Iterable[JobSpec], owner: str
) -> list[Finding]:
    """Whether the Jobs of these names are ours to handle; `jobs`: all of ours that are there.

    One LIST of names and labels more: of the Jobs that are nobody's we know.
    """
    wanted = {step.name: step for step in steps}
    found: list[Finding] = []
    for items, _ in cluster.pages("jobs", OTHERS, metadata_only=True):
        for name in (item["metadata"]["name"] for item in items):
            if name in wanted:
                found.append(Finding(False, *stranger(name)))
    mine = label_value(owner)
    for job in (job for job in jobs if job.name in wanted):
        if (problem := drift(job, wanted[job.name])) is not None:
            found.append(Finding(False, *problem))
        elif job.owner != mine and job.state != "complete":
            said = f"Job {job.name} is {job.owner}'s (label stillhouse/owner), you are {owner}"
            todo = f"say owner={job.owner} if it is yours to handle, else wait until it is done"
            found.append(Finding(False, said, todo))
    return found


def _image(site: SiteSpec) -> Finding:
    problem = image_problem(site)
    if problem is None:
        return Finding(True, f"image {site.image}")
    what, _, remedy = problem.partition("; ")
    return Finding(False, what, remedy or "run `make image` and put what it prints into the site")


def _namespace(cluster: Cluster) -> Finding:
    name = cluster.namespace
    try:
        there = cluster.read("namespaces", name)
    except ApiError as error:
        if error.status != 403:
            raise
        return Finding(True, f"namespace {name} (not ours to look at)")
    state: Json = (there or {}).get("status") or {}
    if state.get("phase") == "Terminating":
        todo = "wait until it is gone and have it made again, or say namespace=NAME"
        return Finding(False, f'namespace "{name}" is being deleted', todo)
    if there is not None:
        return Finding(True, f"namespace {name}")
    todo = "make it (kubectl create namespace …) or say namespace=NAME; kubectl get namespaces"
    return Finding(False, f'namespace "{name}" does not exist on {cluster.server}', todo)


def _rights(cluster: Cluster, site: SiteSpec, role: str) -> Iterator[Finding]:
    """One finding for each right of a Role of k8s/access.yaml."""
    wanted = [rule for rule in rules(role) if site.queue is not None or KUEUE not in rule.group]

    def may(rule: Rule) -> bool:
        return cluster.may(rule.verb, rule.resource, rule.group, rule.sub)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        allowed = list(pool.map(may, wanted))
    if wanted and not any(allowed):
        # Of a namespace that is being deleted, the rights go first.
        what = f"{cluster.user} has no right at all in namespace {cluster.namespace}"
        todo = (
            f"have the Role {role} of k8s/access.yaml applied and bound to you; or the namespace is"
            f" being deleted (kubectl get namespace {cluster.namespace})"
        )
        yield Finding(False, what, todo)
        return
    for rule, is_allowed in zip(wanted, allowed, strict=True):
        todo = f"have the Role {rule.role} of k8s/access.yaml applied and bound to you"
        what = f"right to {rule}" if is_allowed else f"{cluster.user} lacks the right to {rule}"
        yield Finding(is_allowed, what, "" if is_allowed else todo)


def _claim(cluster: Cluster, name: str) -> Finding:
    there = cluster.read("persistentvolumeclaims", name)
    if there is None:
        todo = "apply k8s/storage.yaml, or say runs_claim=/cache_claim= of the site"
        return Finding(False, f'volume claim "{name}" does not exist', todo)
    status: Json = there.get("status", {})
    phase = status.get("phase", "Pending")
    if phase == "Bound":
        return Finding(True, f"volume claim {name}")
    why = _why_unbound(cluster, there)
    if phase == "Pending" and why is None:
        return Finding(True, f"volume claim {name} (to be bound when the first pod wants it)")
    todo = f"kubectl describe pvc {name}; k8s/storage.yaml explains the kinds of volume"
    return Finding(False, f"volume claim {name} is {phase}{f' ({why})' if why else ''}", todo)


def _why_unbound(cluster: Cluster, claim: Json) -> str | None:
    meta = claim["metadata"]
    fields = f"involvedObject.kind=PersistentVolumeClaim,involvedObject.name={meta['name']}"
    pages = cluster.pages("events", fields=fields)
    said = [one for items, _ in pages for one in notes(items)]
    told = [one for one in said if one.reason in UNBOUND and one.uid == meta["uid"]]
    return short(max(told, key=lambda one: one.at).message) if told else None


def _account(cluster: Cluster, name: str) -> Finding:
    if cluster.read("serviceaccounts", name) is not None:
        return Finding(True, f"service account {name}")
    return Finding(False, f'service account "{name}" does not exist', "apply k8s/access.yaml")


def default_queue(cluster: Cluster) -> list[Finding]:
    """Kueue 0.17 and later put a Job that names no queue into this one, where there is one."""
    try:
        if cluster.kueue() is None or cluster.read("localqueues", DEFAULT_QUEUE) is None:
            return []
    except ApiError as error:
        if error.status != 403:
            raise
        return []  # asked for only where the site names a queue
    said = (
        f"LocalQueue {DEFAULT_QUEUE}: Kueue also queues Jobs here that name no queue: those of"
        " collect and of a detached driver, and with site.queue null all others"
    )
    return [Finding(True, said)]


def _queue(cluster: Cluster, name: str) -> Finding:
    if cluster.kueue() is None:
        todo = "Kueue is not installed there: say queue=null, and a window (max_parallel) does it"
        return Finding(False, f'queue "{name}" is asked for', todo)
    there = cluster.read("localqueues", name)
    if there is None:
        pages = cluster.pages("localqueues", metadata_only=True)
        known = ", ".join(item["metadata"]["name"] for items, _ in pages for item in items)
        todo = f"there is {known or 'none'}; say queue=NAME, or apply k8s/localqueue.yaml"
        return Finding(False, f'LocalQueue "{name}" does not exist', todo)
    status: Json = there.get("status", {})
    conditions: list[Json] = status.get("conditions", [])
    idle = [c for c in conditions if c["type"] == "Active" and c["status"] == "False"]
    if idle:
        todo = f"kubectl describe localqueue {name}; ask whoever runs Kueue there"
        why = short(idle[0].get("message"))
        return Finding(False, f"LocalQueue {name} is not active ({why})", todo)
    return Finding(True, f"LocalQueue {name}")


# ----------------------------------------------------------------------------------------- rights


@dataclass(frozen=True)
class Rule:
    """One right: a verb on a resource, and the Role that gives it."""

    role: str
    group: str  # "" is Kubernetes' core
    resource: str
    sub: str | None  # of pods/log: log
    verb: str

    def __str__(self) -> str:
        """As a person would ask an administrator for it."""
        what = f"{self.resource}/{self.sub}" if self.sub else self.resource
        return f"{self.verb} {what}{'.' * bool(self.group)}{self.group} (Role {self.role})"


@functools.cache
def _rules() -> tuple[Rule, ...]:
    import yaml

    found: list[Rule] = []
    text = (k8s_dir() / "access.yaml").read_text(encoding="utf-8")
    for document in cast("list[Json]", list(yaml.safe_load_all(text))):
        for rule in document.get("rules") or ():
            found += _unfolded(document["metadata"]["name"], rule)
    return tuple(found)


def _unfolded(role: str, rule: Json) -> list[Rule]:
    parts = [cast("str", name).partition("/") for name in rule["resources"]]
    groups, verbs = cast("list[Any]", rule["apiGroups"]), cast("list[Any]", rule["verbs"])
    return [
        Rule(role, group, resource, sub or None, verb)
        for group in groups
        for resource, _, sub in parts
        for verb in verbs
    ]


def rules(role: str | None = None) -> list[Rule]:
    """The rights that `k8s/access.yaml` gives: of one Role, or of all."""
    return [rule for rule in _rules() if role in (None, rule.role)]
