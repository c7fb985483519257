"""Define what the fake API server knows of each kind of object.

This covers which resources exist, which defaults the server fills in, what it refuses, and how
selectors and merge patches work. Only a few of a real server's rules are here, each worded as a
1.34 server words it. `api_behaviour.py` checks both servers against them.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
Cause = tuple[str, str, str]  # reason, field, message

SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
CONFIG_KEY = re.compile(r"[-._a-zA-Z0-9]+")
MIB = 1 << 20


@dataclass(frozen=True)
class Resource:
    name: str
    kind: str
    group: str
    version: str
    is_namespaced: bool = True
    has_status: bool = False
    fields: tuple[str, ...] = ()  # field selectors besides a name and a namespace

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full(self) -> str:
        """As messages write it: "jobs.batch"."""
        return f"{self.name}.{self.group}" if self.group else self.name

    @property
    def kind_full(self) -> str:
        return f"{self.kind}.{self.group}" if self.group else self.kind


KUEUE = "kueue.x-k8s.io"
INVOLVED = tuple(f"involvedObject.{part}" for part in ("kind", "name", "uid", "namespace"))
RESOURCES = {
    resource.name: resource
    for resource in (
        Resource("jobs", "Job", "batch", "v1", has_status=True, fields=("status.successful",)),
        Resource(
            "pods", "Pod", "", "v1", has_status=True, fields=("spec.nodeName", "status.phase")
        ),
        Resource("configmaps", "ConfigMap", "", "v1"),
        Resource("secrets", "Secret", "", "v1", fields=("type",)),
        Resource("events", "Event", "", "v1", fields=("type", "reason", *INVOLVED)),
        Resource("persistentvolumeclaims", "PersistentVolumeClaim", "", "v1", has_status=True),
        Resource("serviceaccounts", "ServiceAccount", "", "v1"),
        Resource("resourcequotas", "ResourceQuota", "", "v1", has_status=True),
        Resource("namespaces", "Namespace", "", "v1", is_namespaced=False, has_status=True),
        Resource("workloads", "Workload", KUEUE, "v1beta2", has_status=True),
        Resource("localqueues", "LocalQueue", KUEUE, "v1beta2", has_status=True),
    )
}


class Refused(Exception):
    """The server's refusal, as its Status object states it."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.details = code, reason, message, details


def invalid(resource: Resource, name: str, causes: list[Cause]) -> Refused:
    """422, as one sentence and as a list."""
    words = [f"{field}: {message}" for _, field, message in causes]
    said = words[0] if len(words) == 1 else f"[{', '.join(words)}]"
    details = {
        "name": name, "group": resource.group, "kind": resource.kind,
        "causes": [{"reason": r, "message": m, "field": f} for r, f, m in causes],
    }  # fmt: skip
    return Refused(422, "Invalid", f'{resource.kind_full} "{name}" is invalid: {said}', **details)


# What a server fills in.


def fill_in(resource: Resource, obj: Json) -> None:
    """Add a kind's defaults to a new object, in place; it has its uid already."""
    if resource.name == "jobs":
        _fill_in_job(obj)
    elif resource.name == "namespaces":
        name = obj["metadata"]["name"]
        obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = name
        obj.setdefault("status", {"phase": "Active"})
    elif resource.has_status and resource.group != KUEUE:  # a custom resource has none at first
        obj.setdefault("status", {})


def job_labels(job: Json) -> Json:
    """The labels by which a Job knows its pods."""
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    batch = {"batch.kubernetes.io/controller-uid": uid, "batch.kubernetes.io/job-name": name}
    return {**batch, "controller-uid": uid, "job-name": name}


def _fill_in_job(job: Json) -> None:
    spec = job.setdefault("spec", {})
    has_policy = "podFailurePolicy" in spec
    defaults = {
        "backoffLimit": 6, "completionMode": "NonIndexed", "completions": 1, "parallelism": 1,
        "manualSelector": False, "suspend": False,
        "podReplacementPolicy": "Failed" if has_policy else "TerminatingOrFailed",
    }  # fmt: skip
    for key, value in defaults.items():
        spec.setdefault(key, value)
    own = job_labels(job)
    uid = "batch.kubernetes.io/controller-uid"
    spec["selector"] = {"matchLabels": {uid: own[uid]}}
    template = spec.setdefault("template", {})
    labels = template.setdefault("metadata", {}).setdefault("labels", {})
    labels.update(own)
    if not job["metadata"].get("labels"):  # a Job without labels takes its template's
        job["metadata"]["labels"] = dict(labels)
    pod = template.setdefault("spec", {})
    for key, value in {
        "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler", "securityContext": {},
        "terminationGracePeriodSeconds": 30,
    }.items():  # fmt: skip
        pod.setdefault(key, value)
    for container in [*pod.get("containers", []), *pod.get("initContainers", [])]:
        container.setdefault("resources", {})
        container.setdefault("imagePullPolicy", "IfNotPresent")
        container.setdefault("terminationMessagePath", "/dev/termination-log")
        container.setdefault("terminationMessagePolicy", "File")
    job["status"] = {}


# What a server refuses.


def mistakes(resource: Resource, obj: Json) -> list[Cause]:
    """What is wrong with an object by itself."""
    meta = obj["metadata"]
    name = meta["name"]
    found: list[Cause] = []
    if not SUBDOMAIN.fullmatch(name) or len(name) > 253:
        said = (
            f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case'
            " alphanumeric characters, '-' or '.', and must start and end with an alphanumeric"
            " character (e.g. 'example.com', regex used for validation is"
            f" '{SUBDOMAIN.pattern}')"
        )
        found.append(("FieldValueInvalid", "metadata.name", said))
    found += _label_mistakes(meta.get("labels") or {}, "metadata.labels")
    size = sum(len(k) + len(v) for k, v in (meta.get("annotations") or {}).items())
    if size > 256 * 1024:
        said = "Too long: may not be more than 262144 bytes"
        found.append(("FieldValueTooLong", "metadata.annotations", said))
    kinds: dict[str, Callable[[Json], list[Cause]]] = {
        "jobs": _job_mistakes, "configmaps": _config_map_mistakes
    }  # fmt: skip
    return found + (kinds[resource.name](obj) if resource.name in kinds else [])


def _label_mistakes(labels: Json, field: str) -> list[Cause]:
    found: list[Cause] = []
    for value in labels.values():
        if len(value) > 63:
            said = f'Invalid value: "{value}": must be no more than 63 characters'
            found.append(("FieldValueInvalid", field, said))
        elif not LABEL_VALUE.fullmatch(value):
            said = f'Invalid value: "{value}": a valid label must be an empty string or consist of'
            said += " alphanumeric characters, '-', '_' or '.', and must start and end with an"
            said += " alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex"
            said += f" used for validation is '{LABEL_VALUE.pattern}')"
            found.append(("FieldValueInvalid", field, said))
    return found


def _job_mistakes(job: Json) -> list[Cause]:
    spec = job["spec"]
    found = _label_mistakes(spec["template"]["metadata"]["labels"], "spec.template.labels")
    has_policy = "podFailurePolicy" in spec
    if has_policy and spec["podReplacementPolicy"] != "Failed":
        said = f'Unsupported value: "{spec["podReplacementPolicy"]}": supported values: "Failed"'
        found.append(("FieldValueNotSupported", "spec.podReplacementPolicy", said))
    pod = spec["template"]["spec"]
    field = "spec.template.spec.containers"
    if not pod.get("containers"):
        found.append(("FieldValueRequired", field, "Required value"))
    for number, container in enumerate(pod.get("containers", [])):
        if not container.get("image"):
            found.append(("FieldValueRequired", f"{field}[{number}].image", "Required value"))
    policy, field = pod.get("restartPolicy"), "spec.template.spec.restartPolicy"
    if policy not in ("OnFailure", "Never"):
        said = 'Required value: valid values: "OnFailure", "Never"'
        found.append(("FieldValueRequired", field, said))
    elif has_policy and policy != "Never":
        said = 'Invalid value: "OnFailure": only "Never" is supported when podFailurePolicy is'
        found.append(("FieldValueInvalid", field, f"{said} specified"))
    rules = spec["podFailurePolicy"].get("rules", []) if has_policy else []
    for number, rule in enumerate(rules):
        found += _rule_mistakes(rule, f"spec.podFailurePolicy.rules[{number}]")
    return found


def _rule_mistakes(rule: Json, field: str) -> list[Cause]:
    found: list[Cause] = []
    codes = rule.get("onExitCodes")
    if codes is None and not rule.get("onPodConditions"):
        said = "Invalid value: specifying one of OnExitCodes and OnPodConditions is required"
        found.append(("FieldValueInvalid", field, said))
    values = (codes or {}).get("values", [])
    if codes and codes.get("operator") == "In" and 0 in values:
        where = f"{field}.onExitCodes.values[{values.index(0)}]"
        said = "Invalid value: 0: must not be 0 for the In operator"
        found.append(("FieldValueInvalid", where, said))
    if values != sorted(values):
        said = f"Invalid value: {json.dumps(values)}: must be ordered"
        found.append(("FieldValueInvalid", f"{field}.onExitCodes.values", said))
    return found


def _config_map_mistakes(obj: Json) -> list[Cause]:
    found: list[Cause] = []
    size = 0
    for part in ("data", "binaryData"):
        for key, value in (obj.get(part) or {}).items():
            if not CONFIG_KEY.fullmatch(key):
                said = (
                    f'Invalid value: "{key}": a valid config key must consist of alphanumeric'
                    " characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name',"
                    f" regex used for validation is '{CONFIG_KEY.pattern}')"
                )
                found.append(("FieldValueInvalid", f"{part}[{key}]", said))
            size += len(value if part == "data" else _decoded(value))
    if size > MIB:
        said = f"Too long: may not be more than {MIB} bytes"
        found.append(("FieldValueTooLong", "[]", said))
    return found


def _decoded(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        said = 'ConfigMap in version "v1" cannot be handled as a ConfigMap: illegal base64 data'
        raise Refused(400, "BadRequest", f"{said} at input byte 0") from error


def forbidden_changes(resource: Resource, old: Json, new: Json) -> list[Cause]:
    """What an update may not change."""
    if resource.name == "configmaps" and old.get("immutable"):
        said = "Forbidden: field is immutable when `immutable` is set"
        parts = [part for part in ("data", "binaryData") if old.get(part) != new.get(part)]
        if not new.get("immutable"):
            parts.append("immutable")
        return [("FieldValueForbidden", part, said) for part in parts]
    if resource.name != "jobs":
        return []
    fixed = ["completions", "completionMode", "selector", "podFailurePolicy", "template"]
    before, after = old["spec"], new["spec"]
    if before["suspend"] and not old.get("status", {}).get("startTime"):
        # A Job that never ran may still be told where to run: that is how queues place it.
        before, after = _without_placement(before), _without_placement(after)
    return [
        (
            "FieldValueInvalid",
            f"spec.{key}",
            f"Invalid value: {json.dumps(after.get(key))}: field is immutable",
        )
        for key in fixed
        if before.get(key) != after.get(key)
    ]


def _without_placement(spec: Json) -> Json:
    plain = json.loads(json.dumps(spec))
    for key in ("nodeSelector", "tolerations", "affinity", "schedulingGates"):
        plain["template"]["spec"].pop(key, None)
    plain["template"]["metadata"].pop("annotations", None)
    plain["template"]["metadata"].pop("labels", None)
    return plain


# Selectors and patches.


def merged(target: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386) laid over `target`; neither is changed."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def label_selector(text: str) -> Callable[[Json], bool]:
    """Whether an object's labels are meant; Refused(400) for what is no selector."""
    tests: list[Callable[[Json], bool]] = [
        _requirement(part.strip()) for part in re.split(r",(?![^(]*\))", text) if part.strip()
    ]
    return lambda obj: all(test(obj["metadata"].get("labels") or {}) for test in tests)


def _requirement(part: str) -> Callable[[Json], bool]:
    if match := re.fullmatch(r"(\S+)\s+(in|notin)\s+\((.*)\)", part):
        key, word, values = match[1], match[2], {v.strip() for v in match[3].split(",")}
        if word == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if match := re.fullmatch(r"([^!=\s]+)\s*(==?|!=)\s*([^!=\s]*)", part):
        key, word, value = match[1], match[2], match[3]
        if word == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if match := re.fullmatch(r"(!?)\s*([^!=\s()]+)", part):
        key, is_absent = match[2], bool(match[1])
        return lambda labels: (key in labels) is not is_absent
    words = part.split()
    said = f"unable to parse requirement: found '{words[1] if len(words) > 1 else part}',"
    raise Refused(400, "BadRequest", f"{said} expected: in, notin, =, ==, !=, gt, lt")


def field_selector(resource: Resource, text: str) -> Callable[[Json], bool]:
    """The same over the few fields that a kind can be asked by."""
    tests: list[tuple[list[str], bool, str]] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([\w.]+?)\s*(==?|!=)\s*(.*)", part)
        if match is None:
            raise Refused(400, "BadRequest", f'invalid field selector: "{part}"')
        if match[1] not in ("metadata.name", "metadata.namespace", *resource.fields):
            said = f'field label "{match[1]}" not supported for {resource.kind}'
            if not resource.fields:
                said = f'"{match[1]}" is not a known field selector: only "metadata.name",'
                said += ' "metadata.namespace"'
            raise Refused(400, "BadRequest", said)
        tests.append((match[1].split("."), match[2] == "!=", match[3]))
    return lambda obj: all((_at(obj, path) == value) is not no for path, no, value in tests)


def _at(obj: Any, path: Iterable[str]) -> str:
    for key in path:
        obj = obj.get(key, "") if isinstance(obj, dict) else ""
    return str(obj)
