"""Check how an API server behaves, with the same checks for the fake server and a real one.

Each check gets a `Cluster` on an empty namespace. The checks in `ALL` need nothing else. The others
need someone who runs pods or removes rights; the fake and a real cluster each do that differently.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from stillhouse.sweep.cluster.connect import ApiError, Cluster, Gone, Watched

Json = dict[str, Any]

SECURE: Json = {
    "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True,
    "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
POISON: Json = {
    "rules": [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42, 43]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
}


def job(name: str, pod: Json | None = None, labels: Json | None = None, **spec: Any) -> Json:
    """A Job that even a *restricted* namespace runs; suspended unless it says otherwise."""
    main = {"name": "main", "image": "localhost/none:1", "command": ["true"]}
    plain = {"restartPolicy": "Never", "containers": [{**main, "securityContext": SECURE}]}
    template = {"metadata": {"labels": labels or {}}, "spec": {**plain, **(pod or {})}}
    meta = {"name": name, **({"labels": labels} if labels else {})}
    return {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": meta,
        "spec": {"suspend": True, "backoffLimit": 0, "template": template, **spec},
    }  # fmt: skip


def config_map(name: str, labels: Json | None = None, **data: str) -> Json:
    return {"kind": "ConfigMap", "metadata": {"name": name, "labels": labels or {}}, "data": data}


def listed(cluster: Cluster, resource: str, selector: str = "", **how: Any) -> list[str]:
    pages = cluster.pages(resource, selector, **how)
    return [obj["metadata"]["name"] for items, _ in pages for obj in items]


def version_of(cluster: Cluster, resource: str) -> str:
    return [version for _, version in cluster.pages(resource)][-1]


# Writing.


def a_created_job_is_filled_in_and_its_name_is_taken(cluster: Cluster) -> None:
    body: Json = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "one", "annotations": {"number": "5e-06"}},
        "spec": {
            "suspend": True,
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [{"name": "main", "image": "none:1"}],
                }
            },
        },
    }
    made = cluster.create("jobs", body)
    meta, spec = made["metadata"], made["spec"]
    assert meta["annotations"] == {"number": "5e-06"}
    assert (spec["backoffLimit"], spec["completions"], spec["parallelism"]) == (6, 1, 1)
    assert (meta["generation"], spec["podReplacementPolicy"]) == (1, "TerminatingOrFailed")
    assert spec["template"]["metadata"]["labels"]["batch.kubernetes.io/job-name"] == "one"
    assert spec["selector"]["matchLabels"] == {"batch.kubernetes.io/controller-uid": meta["uid"]}
    assert set(spec["template"]["spec"]["containers"][0]) >= {"imagePullPolicy", "resources"}
    with pytest.raises(ApiError) as no:
        cluster.create("jobs", body)
    assert (no.value.status, no.value.reason) == (409, "AlreadyExists")
    assert no.value.message == 'jobs.batch "one" already exists'
    assert (cluster.read("jobs", "one") or {})["metadata"]["uid"] == meta["uid"]
    assert cluster.read("jobs", "other") is None


REFUSED: dict[str, tuple[str, Json, int, str]] = {
    "a name of 64": (
        "jobs", job("a" * 64), 422,
        f'spec.template.labels: Invalid value: "{"a" * 64}": must be no more than 63 characters',
    ),
    "a capital": ("jobs", job("Bad"), 422, "a lowercase RFC 1123 subdomain must consist of"),
    "a long label": ("jobs", job("j", labels={"a": "b" * 64}), 422, "must be no more than 63"),
    "a label with +": ("jobs", job("j", labels={"a": "+5e-6"}), 422, "a valid label must be an"),
    "no containers": (
        "jobs", job("j", {"containers": []}), 422,
        'Job.batch "j" is invalid: spec.template.spec.containers: Required value',
    ),
    "no image": (
        "jobs", job("j", {"containers": [{"name": "main"}]}), 422,
        "spec.template.spec.containers[0].image: Required value",
    ),
    "always again": (
        "jobs", job("j", {"restartPolicy": "Always"}), 422, 'valid values: "OnFailure", "Never"'
    ),
    "a policy and a restart": (
        "jobs", job("j", {"restartPolicy": "OnFailure"}, podFailurePolicy=POISON), 422,
        'spec.template.spec.restartPolicy: Invalid value: "OnFailure": only "Never" is supported'
        " when podFailurePolicy is specified",
    ),
    "a policy and a replacement": (
        "jobs",
        job("j", podFailurePolicy=POISON, podReplacementPolicy="TerminatingOrFailed"), 422,
        'spec.podReplacementPolicy: Unsupported value: "TerminatingOrFailed": supported values:',
    ),
    "exit code 0": (
        "jobs",
        job("j", podFailurePolicy={
            "rules": [{"action": "Ignore", "onExitCodes": {"operator": "In", "values": [0]}}]
        }),
        422,
        "rules[0].onExitCodes.values[0]: Invalid value: 0: must not be 0 for the In operator",
    ),
    "a key with a slash": (
        "configmaps", {"metadata": {"name": "c"}, "data": {"a/b": "c"}}, 422,
        "a valid config key must consist of",
    ),
    "more than 1 MiB": (
        "configmaps", config_map("c", a="b" * 1_048_577), 422, "may not be more than 1048576 bytes"
    ),
    "no base64": (
        "configmaps", {"metadata": {"name": "c"}, "binaryData": {"a": "*"}}, 400, "illegal base64"
    ),
    "no name": (
        "configmaps", {"metadata": {}}, 422, "Required value: name or generateName is required"
    ),
    "another kind": (
        "jobs", {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}, 400,
        "cannot be handled as a Job",
    ),
    "another namespace": (
        "configmaps", {"metadata": {"name": "c", "namespace": "elsewhere"}}, 400,
        "the namespace of the provided object does not match the namespace sent on the request",
    ),
}  # fmt: skip


def what_cannot_be_is_refused_in_the_same_words(cluster: Cluster) -> None:
    for what, (resource, body, status, words) in REFUSED.items():
        with pytest.raises(ApiError) as no:
            cluster.create(resource, body)
        assert no.value.status == status, f"{what}: {no.value}"
        assert words in no.value.message, f"{what}: {no.value}"
        assert no.value.reason == {422: "Invalid", 400: "BadRequest"}[status], what
    assert listed(cluster, "jobs") == []


def a_dry_run_answers_and_keeps_nothing(cluster: Cluster) -> None:
    answer = cluster.create("jobs", job("dry"), dry_run=True)
    assert answer["spec"]["completions"] == 1
    assert cluster.read("jobs", "dry") is None
    cluster.create("jobs", job("dry"))
    with pytest.raises(ApiError, match="AlreadyExists"):
        cluster.create("jobs", job("dry"), dry_run=True)


def an_immutable_config_map_stays_as_it_is(cluster: Cluster) -> None:
    code = base64.b64encode(bytes(range(256))).decode()
    body = {**config_map("code", a="b"), "immutable": True, "binaryData": {"code.tar.gz": code}}
    cluster.create("configmaps", body)
    for change in ({"data": {"a": "c"}}, {"immutable": False}, {"binaryData": None}):
        with pytest.raises(ApiError) as no:
            cluster.patch("configmaps", "code", change)
        said = "Forbidden: field is immutable when `immutable` is set"
        assert no.value.status == 422 and said in no.value.message
    cluster.patch("configmaps", "code", {"metadata": {"annotations": {"last-used": "1"}}})
    kept = cluster.read("configmaps", "code") or {}
    assert base64.b64decode(kept["binaryData"]["code.tar.gz"]) == bytes(range(256))


def a_job_cannot_become_another(cluster: Cluster) -> None:
    cluster.create("jobs", job("fixed"))
    container = {"name": "main", "image": "localhost/other:1"}
    for change, field in (
        ({"template": {"spec": {"containers": [container]}}}, "spec.template"),
        ({"completions": 3}, "spec.completions: Invalid value: 3: field is immutable"),
    ):
        with pytest.raises(ApiError) as no:
            cluster.patch("jobs", "fixed", {"spec": change})
        assert no.value.status == 422 and field in no.value.message
    placed = {"template": {"spec": {"nodeSelector": {"a": "b"}}}}
    moved = cluster.patch("jobs", "fixed", {"spec": placed}) or {}
    assert moved["spec"]["template"]["spec"]["nodeSelector"] == {"a": "b"}
    more = {"activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 5}
    changed = cluster.patch("jobs", "fixed", {"spec": more}) or {}
    assert changed["metadata"]["generation"] == 3


def a_merge_patch_adds_and_takes_away(cluster: Cluster) -> None:
    first = cluster.create("configmaps", config_map("ledger", a="1", b="2"))
    second = cluster.patch("configmaps", "ledger", {"data": {"b": None, "c": "3"}}) or {}
    assert second["data"] == {"a": "1", "c": "3"}
    same = cluster.patch("configmaps", "ledger", {"data": {"c": "3"}}) or {}
    version = second["metadata"]["resourceVersion"]
    assert same["metadata"]["resourceVersion"] == version != first["metadata"]["resourceVersion"]
    assert cluster.patch("configmaps", "missing", {"data": {}}) is None
    old = {"metadata": {"resourceVersion": first["metadata"]["resourceVersion"]}}
    with pytest.raises(ApiError, match="the object has been modified") as no:
        cluster.patch("configmaps", "ledger", {**old, "data": {"c": "4"}})
    assert (no.value.status, no.value.reason) == (409, "Conflict")


def a_replacement_needs_the_version_it_replaces(cluster: Cluster) -> None:
    first = cluster.create("configmaps", config_map("ledger", a="1"))
    second = cluster.replace("configmaps", "ledger", {**first, "data": {"a": "2"}})
    assert second["data"] == {"a": "2"}
    with pytest.raises(ApiError, match="409 Conflict: Operation cannot be fulfilled"):
        cluster.replace("configmaps", "ledger", {**first, "data": {"a": "3"}})
    with pytest.raises(ApiError, match="404 NotFound"):
        cluster.replace("configmaps", "other", {**first, "metadata": {"name": "other"}})


def a_deletion_may_name_the_uid_it_means(cluster: Cluster) -> None:
    first = cluster.create("jobs", job("again"))["metadata"]["uid"]
    assert not cluster.delete("jobs", "again", uid="00000000-0000-4000-8000-000000000000")
    assert cluster.delete("jobs", "again", uid=first)
    assert not cluster.delete("jobs", "again", uid=first)
    second = cluster.create("jobs", job("again"))["metadata"]["uid"]
    assert second != first
    assert not cluster.delete("jobs", "again", uid=first)
    assert (cluster.read("jobs", "again") or {})["metadata"]["uid"] == second
    assert cluster.delete("jobs", "again")


def what_is_owned_goes_with_its_owner(cluster: Cluster) -> None:
    for is_first in (False, True):
        owner = cluster.create("jobs", job("owner"))["metadata"]
        reference = {"apiVersion": "batch/v1", "kind": "Job", "blockOwnerDeletion": True}
        owned = config_map("owned", a="b")
        owned["metadata"]["ownerReferences"] = [
            {**reference, "name": owner["name"], "uid": owner["uid"]}
        ]
        cluster.create("configmaps", owned)
        version = version_of(cluster, "configmaps")
        assert cluster.delete("jobs", "owner", foreground=is_first)
        if not is_first:
            assert cluster.read("jobs", "owner") is None
        gone = watched_until(cluster, "configmaps", version, lambda w: w.kind == "DELETED")
        assert gone[-1].object["metadata"]["name"] == "owned"
        if is_first:
            last = cluster.read("jobs", "owner")
            assert last is None or "deletionTimestamp" in last["metadata"]
            version = owner["resourceVersion"]
            watched_until(cluster, "jobs", version, lambda w: w.kind == "DELETED")


# Reading.


def pages_are_one_consistent_list(cluster: Cluster) -> None:
    for number in range(7):
        cluster.create("configmaps", config_map(f"c-{number}", {"set": "seven"}, n=f"{number}"))
    pages = cluster.pages("configmaps", "set=seven", limit=3)
    first, version = next(pages)
    cluster.create("configmaps", config_map("c-5-b", {"set": "seven"}))
    cluster.delete("configmaps", "c-6")
    rest = list(pages)
    assert [len(items) for items, _ in rest] == [3, 1]
    assert {v for _, v in rest} == {version}
    names = [obj["metadata"]["name"] for items in (first, *(i for i, _ in rest)) for obj in items]
    assert names == [f"c-{number}" for number in range(7)]
    assert [obj["data"]["n"] for obj in first] == ["0", "1", "2"]
    assert "c-5-b" in listed(cluster, "configmaps", "set=seven", limit=3)


def selectors_select(cluster: Cluster) -> None:
    for name, labels in {"a": {"x": "1"}, "b": {"x": "2", "y": "z"}, "c": {"y": "w"}}.items():
        cluster.create("configmaps", config_map(name, {**labels, "of": "this"}))
    for selector, names in {
        "of=this": "abc", "x=1": "a", "x==1": "a", "x!=1,of": "bc", "x in (1, 2)": "ab",
        "x notin (1),of=this": "bc", "y": "bc", "!y,of": "a", "x=1,y": "",
        "x in (1,2),y in (z,w)": "b", "x=": "",
    }.items():  # fmt: skip
        assert "".join(listed(cluster, "configmaps", selector)) == names, selector
    assert listed(cluster, "configmaps", fields="metadata.name=b") == ["b"]
    with pytest.raises(ApiError, match="400 BadRequest: .*unable to parse requirement"):
        listed(cluster, "configmaps", "a b c")
    with pytest.raises(ApiError, match='"spec.x" is not a known field selector: only "metadata.na'):
        listed(cluster, "configmaps", fields="spec.x=1")
    with pytest.raises(ApiError, match='field label "spec.x" not supported for Job'):
        listed(cluster, "jobs", fields="spec.x=1")


def metadata_alone_can_be_listed(cluster: Cluster) -> None:
    cluster.create("jobs", job("light", labels={"of": "this"}))
    [(items, version)] = cluster.pages("jobs", "of=this", metadata_only=True)
    assert items[0]["kind"] == "PartialObjectMetadata" and "spec" not in items[0]
    assert items[0]["metadata"]["name"] == "light" and version.isdigit()
    assert list(cluster.pages("jobs", "of=that", metadata_only=True))[0][0] == []


def watched_until(
    cluster: Cluster, resource: str, version: str, is_last: Callable[[Watched], bool],
    selector: str = "",
) -> list[Watched]:  # fmt: skip
    """Everything a watch says up to a certain word (30 seconds at most)."""
    heard: list[Watched] = []
    for watched in cluster.watch(resource, selector, version, 30):
        heard.append(watched)
        if is_last(watched):
            return heard
    raise AssertionError(f"the watch ended after {[w.kind for w in heard]}")


def a_watch_tells_what_changed_since_the_list(cluster: Cluster) -> None:
    cluster.create("configmaps", config_map("old", {"of": "this"}))
    version = version_of(cluster, "configmaps")
    cluster.create("configmaps", config_map("new", {"of": "this"}, a="1"))
    cluster.create("configmaps", config_map("another", {"of": "that"}))
    cluster.patch("configmaps", "new", {"data": {"a": "2"}})
    cluster.patch("configmaps", "new", {"data": {"a": "2"}})  # changes nothing
    cluster.patch("configmaps", "another", {"metadata": {"labels": {"of": "this"}}})
    cluster.patch("configmaps", "old", {"metadata": {"labels": {"of": "that"}}})
    cluster.delete("configmaps", "new")

    def is_end(watched: Watched) -> bool:
        return watched.kind == "DELETED" and watched.object["metadata"]["name"] == "new"

    heard = watched_until(cluster, "configmaps", version, is_end, "of=this")
    told = [(w.kind, w.object["metadata"]["name"]) for w in heard if w.kind != "BOOKMARK"]
    assert told == [
        ("ADDED", "new"), ("MODIFIED", "new"), ("ADDED", "another"), ("DELETED", "old"),
        ("DELETED", "new"),
    ]  # fmt: skip
    versions = [int(w.object["metadata"]["resourceVersion"]) for w in heard]
    assert versions == sorted(versions) and versions[0] > int(version)
    goes_on = watched_until(cluster, "configmaps", f"{versions[-2]}", is_end, "of=this")
    assert len([w for w in goes_on if w.kind != "BOOKMARK"]) == 1
    rest = cluster.watch("configmaps", "of=this", f"{versions[-1]}", 1)
    assert {w.kind for w in rest} <= {"BOOKMARK"}


def a_namespace_that_is_not_there_is_said(cluster: Cluster) -> None:
    cluster.namespace = "nowhere-at-all"
    with pytest.raises(ApiError) as no:
        cluster.create("jobs", job("lost"))
    assert (no.value.status, no.value.reason) == (404, "NotFound")
    assert no.value.message == 'namespaces "nowhere-at-all" not found'
    assert listed(cluster, "jobs") == []
    assert cluster.read("namespaces", "nowhere-at-all") is None


def an_admin_may_everything(cluster: Cluster) -> None:
    assert cluster.may("create", "jobs", "batch")
    assert cluster.may("get", "pods", sub="log")


ALL = [
    a_created_job_is_filled_in_and_its_name_is_taken,
    what_cannot_be_is_refused_in_the_same_words,
    a_dry_run_answers_and_keeps_nothing,
    an_immutable_config_map_stays_as_it_is,
    a_job_cannot_become_another,
    a_merge_patch_adds_and_takes_away,
    a_replacement_needs_the_version_it_replaces,
    a_deletion_may_name_the_uid_it_means,
    what_is_owned_goes_with_its_owner,
    pages_are_one_consistent_list,
    selectors_select,
    metadata_alone_can_be_listed,
    a_watch_tells_what_changed_since_the_list,
    a_namespace_that_is_not_there_is_said,
    an_admin_may_everything,
]


# What needs a hand.


def who_lacks_a_right_is_told_which(nobody: Cluster) -> None:
    """`nobody` may list no Jobs, create none, and read no pod's log."""
    assert not nobody.may("create", "jobs", "batch")
    assert not nobody.may("get", "pods", sub="log")
    for ask, words in (
        (lambda: list(nobody.pages("jobs")), 'cannot list resource "jobs" in API group "batch"'),
        (lambda: nobody.create("jobs", job("j")), 'cannot create resource "jobs" in API group'),
        (lambda: list(nobody.log("p")), 'cannot get resource "pods/log" in API group ""'),
    ):
        with pytest.raises(ApiError) as no:
            ask()
        assert (no.value.status, no.value.reason) == (403, "Forbidden")
        assert f'User "{nobody.user}" {words}' in no.value.message
        assert f'in the namespace "{nobody.namespace}"' in no.value.message


def beyond_the_quota_is_forbidden(cluster: Cluster) -> None:
    """The namespace has room for one Job."""
    cluster.create("jobs", job("first"))
    with pytest.raises(ApiError) as no:
        cluster.create("jobs", job("second"))
    assert (no.value.status, no.value.reason) == (403, "Forbidden")
    assert 'jobs.batch "second" is forbidden: exceeded quota: ' in no.value.message
    used = "requested: count/jobs.batch=1, used: count/jobs.batch=1, limited: count/jobs.batch=1"
    assert used in no.value.message
    with pytest.raises(ApiError, match="exceeded quota"):  # looked at before the name is
        cluster.create("jobs", job("first"))


def a_watch_of_forgotten_history_is_gone(cluster: Cluster, forget: Callable[[], None]) -> None:
    """`forget` makes the server lose its history up to now."""
    cluster.create("configmaps", config_map("first"))
    version = version_of(cluster, "configmaps")
    cluster.create("configmaps", config_map("second"))
    forget()
    with pytest.raises(Gone) as no:
        list(cluster.watch("configmaps", "", version, 5))
    assert (no.value.status, no.value.reason) == (410, "Expired")
    assert "second" in listed(cluster, "configmaps")


HOW = "how"  # the label that says how a pod is to end
WITH_POLICY: Json = {"suspend": False, "podFailurePolicy": POISON}
GPUS: Json = {
    "containers": [{
        "name": "main", "image": "localhost/none:1", "securityContext": SECURE,
        "resources": {"limits": {"nvidia.com/gpu": "100"}},
    }]
}  # fmt: skip
JOBS = {
    "late": job("late", suspend=False, activeDeadlineSeconds=1),
    "asleep": job("asleep"),
    "no-room": job("no-room", GPUS, **WITH_POLICY),
} | {
    how: job(how, **WITH_POLICY)
    for how in ("complete", "poison", "spent", "out-of-memory", "no-image", "running", "evicted",
                "put-to-sleep")
}  # fmt: skip
for _how, _job in JOBS.items():
    _job["spec"]["template"]["metadata"]["labels"][HOW] = _how
    _job["metadata"]["labels"] = {HOW: _how}


def failed(reason: str, message: str) -> list[tuple[str, str, str, str]]:
    return [(type_, "True", reason, message) for type_ in ("FailureTarget", "Failed")]


REACHED = "Reached expected number of succeeded pods"
ENDED = {"ready": 0, "terminating": 0}
ALIVE = {"active": 1, "terminating": 0}
NOW = {"startedAt": 0, "finishedAt": 0}
SLEEPS = [("Suspended", "True", "JobSuspended", "Job suspended")]
# How a Job stands -> its conditions, its counts, and its pods': (phase, state, scheduled or not).
STANDS: dict[str, tuple[list[Any], Json, list[Any]]] = {
    "complete": (
        [(t, "True", "CompletionsReached", REACHED) for t in ("SuccessCriteriaMet", "Complete")],
        {**ENDED, "succeeded": 1},
        [("Succeeded", {"exitCode": 0, "reason": "Completed", "message": "done", **NOW}, None)],
    ),
    "poison": (
        failed(
            "PodFailurePolicy",
            "Container main for pod NAMESPACE/POD failed with exit code 42 matching FailJob rule at"
            " index 0",
        ),
        {**ENDED, "failed": 1},
        [("Failed", {"exitCode": 42, "reason": "Error", "message": "bad", **NOW}, None)],
    ),
    "spent": (
        failed("BackoffLimitExceeded", "Job has reached the specified backoff limit"),
        {**ENDED, "failed": 1},
        [("Failed", {"exitCode": 1, "reason": "Error", **NOW}, None)],
    ),
    "out-of-memory": (
        failed("BackoffLimitExceeded", "Job has reached the specified backoff limit"),
        {**ENDED, "failed": 1},
        [("Failed", {"exitCode": 137, "reason": "OOMKilled", **NOW}, None)],
    ),
    "late": (
        failed("DeadlineExceeded", "Job was active longer than specified deadline"),
        {**ENDED, "failed": 1},
        [],
    ),
    "asleep": (SLEEPS, ENDED, []),
    "put-to-sleep": (SLEEPS, ENDED, []),
    "running": ([], {**ALIVE, "ready": 1}, [("Running", {"startedAt": 0}, None)]),
    "no-room": ([], {**ALIVE, "ready": 0}, [("Pending", None, "Unschedulable")]),
    "no-image": (
        [],
        {**ALIVE, "ready": 0},
        [("Pending", {"reason": "ImagePullBackOff", "message": "Back-off"}, None)],
    ),
    "evicted": ([], ENDED, []),
}


def a_job_comes_to_stand(cluster: Cluster, how: str, act: Callable[[str], None]) -> None:
    """A Job's and its pods' status are as STANDS has it, once `act` did what has to be done."""
    cluster.create("jobs", JOBS[how])
    act(how)
    ends = time.monotonic() + 60
    while (found := _standing(cluster, how)) != STANDS[how] and time.monotonic() < ends:
        time.sleep(0.05)
    assert found == STANDS[how]
    for pod in _of(cluster, "pods", how):
        labels, [owner] = pod["metadata"]["labels"], pod["metadata"]["ownerReferences"]
        uid = owner["uid"]
        assert owner == {
            "apiVersion": "batch/v1", "kind": "Job", "name": how, "uid": uid, "controller": True,
            "blockOwnerDeletion": True,
        }  # fmt: skip
        assert labels == {
            HOW: how, "job-name": how, "batch.kubernetes.io/job-name": how, "controller-uid": uid,
            "batch.kubernetes.io/controller-uid": uid,
        }  # fmt: skip
    is_complete = "completionTime" in _of(cluster, "jobs", how)[0]["status"]
    assert is_complete is (how == "complete")


def _of(cluster: Cluster, resource: str, how: str) -> list[Json]:
    return [obj for items, _ in cluster.pages(resource, f"{HOW}={how}") for obj in items]


def _standing(cluster: Cluster, how: str) -> tuple[list[Any], Json, list[Any]]:
    [job], pods = _of(cluster, "jobs", how), _of(cluster, "pods", how)
    status, name = job["status"], pods[0]["metadata"]["name"] if pods else ""
    where = f"{cluster.namespace}/{name}"
    conditions = [
        (c["type"], c["status"], c["reason"], c["message"].replace(where, "NAMESPACE/POD"))
        for c in status.get("conditions", [])
    ]
    counts = {key: value for key, value in status.items() if isinstance(value, int)}
    return conditions, counts, [_standing_of_pod(pod["status"]) for pod in pods]


def _standing_of_pod(status: Json) -> tuple[str, Json | None, str | None]:
    states = [next(iter(c["state"].values())) for c in status.get("containerStatuses", [])]
    state = {k: 0 if k.endswith("At") else v for k, v in states[0].items()} if states else None
    scheduled = [c for c in status.get("conditions", []) if c["type"] == "PodScheduled"]
    return status["phase"], state, scheduled[0].get("reason") if scheduled else "not looked at"


BY = "Preempted to accommodate a workload (UID, JobUID) due to prioritization in the ClusterQueue"
BY = f"{BY}; preemptor path: /stands; preemptee path: /stands"
LACKS = "insufficient unused quota for nvidia.com/gpu in flavor stands, 1 more needed"
LACKS = f"couldn't assign flavors to pod set main: {LACKS}"
ADMITTED = [
    ("QuotaReserved", "True", "QuotaReserved", "Quota reserved in ClusterQueue stands"),
    ("Admitted", "True", "Admitted", "The workload is admitted"),
]
# How a Workload of the queue "stands" stands -> its conditions.
WORKLOADS = {
    "pending": [("QuotaReserved", "False", "Pending", LACKS)],
    "inadmissible": [
        ("QuotaReserved", "False", "Inadmissible", "LocalQueue nowhere doesn't exist")
    ],
    "admitted": ADMITTED,
    "preempted": [
        ("QuotaReserved", "False", "Pending", LACKS),
        ("Evicted", "True", "Preempted", BY),
        ("Admitted", "False", "NoReservation", "The workload has no reservation"),
        ("Preempted", "True", "InClusterQueue", BY),
        ("Requeued", "True", "Preempted", BY),
    ],
    "finished": [*ADMITTED, ("Finished", "True", "Succeeded", REACHED)],
}

# The same where Kueue tells by the reason what it waits for: by default from 0.20.
NOT_ADMITTED = ("Admitted", "False", "NoReservation", "The workload has no reservation")
NEXT_WORKLOADS = {
    "pending": [("QuotaReserved", "False", "WaitingForQuota", LACKS), NOT_ADMITTED],
    "inadmissible": [
        ("QuotaReserved", "False", "Misconfigured", "LocalQueue nowhere doesn't exist"),
        NOT_ADMITTED,
    ],
    "preempted": [
        ("QuotaReserved", "False", "WaitingForQuota", LACKS),
        *WORKLOADS["preempted"][1:],
    ],
}


def workload_of(cluster: Cluster, name: str) -> list[tuple[str, str, str, str]]:
    """The conditions of the Workload that belongs to a Job; none, no Workload."""
    uid = (cluster.read("jobs", name) or {})["metadata"]["uid"]
    pages = cluster.pages("workloads", f"kueue.x-k8s.io/job-uid={uid}")
    for found in (obj for items, _ in pages for obj in items):
        [owner] = found["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", name, uid)
        return [
            (c["type"], c["status"], c["reason"], re.sub(r"UID: [-0-9a-f]+", "UID", c["message"]))
            for c in found.get("status", {}).get("conditions", [])
            if c["type"] != "PodsReady"  # since 0.18, and nobody here reads it
        ]
    return []
