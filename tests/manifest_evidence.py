"""Test whether a manifest has what each item of the checklist demands.

Each test is about the manifest alone, so nothing depends on how it was made. A test may raise where
a part is missing: `checklist` takes that for a no.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any, cast

from stillhouse.compose import compose, from_command_line, from_json
from stillhouse.errors import SOME_FAILED
from stillhouse.identity import eval_id, point_id
from stillhouse.rundir import Json
from stillhouse.spec import ID_DIGITS, EvalSpec, TrainSpec
from stillhouse.sweep.cluster import secrets
from stillhouse.sweep.cluster.jobspec import Kind
from stillhouse.sweep.cluster.manifest import (
    CODE_DIGITS,
    HASH_DIGITS,
    JOB_NAME,
    OFFLINE,
    VOLUMES,
    WORKERS,
)

ANNOTATIONS_BYTES = 262_144  # of one object; the API server refuses more
OURS = "app.kubernetes.io"
ON_ITS_OWN = ["python", "-m", "stillhouse.pod"]  # the image's code
BUNDLED = ["python", "/bundle/pod.py"]  # the launcher's
JOB_UID = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}}
NEVER_AGAIN = [42, 43, 44, 46]
MOUNTS = {  # volume -> where its pod finds it
    "runs": "/runs", "cache": "/cache", "tmp": "/tmp", "home": "/home", "shm": "/dev/shm",
    "bundle": "/bundle", "names": "/names", "sweep": "/sweep",
}  # fmt: skip
SOURCES = {
    "runs": "persistentVolumeClaim", "cache": "persistentVolumeClaim",
    "tmp": "emptyDir", "home": "emptyDir", "shm": "emptyDir",
    "bundle": "configMap", "names": "configMap", "sweep": "configMap",
}  # fmt: skip
BELOW = {  # a variable of the environment -> the volume it must lie on
    "HOME": "home",
    "XDG_CACHE_HOME": "home",
    "TORCHINDUCTOR_CACHE_DIR": "home",
    "TRITON_CACHE_DIR": "home",
    "STILLHOUSE_CACHE": "cache",
    "HF_HOME": "cache",
}


@dataclass(frozen=True)
class Job:
    """A manifest, with names for the parts that are tested."""

    whole: Json

    @property
    def labels(self) -> dict[str, str]:
        return self.whole["metadata"]["labels"]

    @property
    def kind(self) -> Kind:
        return cast("Kind", self.labels["stillhouse/kind"])

    @property
    def told(self) -> dict[str, str]:
        return self.whole["metadata"]["annotations"]

    @property
    def spec(self) -> Json:
        return self.whole["spec"]

    @property
    def pod(self) -> Json:
        return self.spec["template"]["spec"]

    @property
    def main(self) -> Json:
        (main,) = self.pod["containers"]
        return main

    @property
    def env(self) -> dict[str, str | None]:
        """Values by name; None where the value is from elsewhere."""
        return {entry["name"]: entry.get("value") for entry in self.main["env"]}

    @property
    def options(self) -> dict[str, str]:
        """The options of process 1, which stand before its kind."""
        told = self.main["args"]
        pairs = (word.removeprefix("--").partition("=") for word in told[: told.index(self.kind)])
        return {name: value for name, _, value in pairs}

    @property
    def words(self) -> list[str]:
        args = cast("list[str]", self.main["args"])
        return [word.replace("$$", "$") for word in args[args.index("--") + 1 :]]

    @property
    def asked(self) -> str | None:
        """The resolved spec, as JSON; None where the pod is given words."""
        return self.words[-1] if self.words[-2:-1] == ["--spec"] else None

    @property
    def volumes(self) -> dict[str, Json]:
        return {volume["name"]: volume for volume in self.pod["volumes"]}


# ---------------------------------------------------------------------------------- who it is


def is_named_by_content(job: Job) -> bool:
    name, content = job.whole["metadata"]["name"], job.labels["stillhouse/hash"]
    is_hash = re.fullmatch(rf"[0-9a-f]{{{HASH_DIGITS}}}", content) is not None
    return (
        JOB_NAME.fullmatch(name) is not None
        and is_hash
        and name.rpartition("-")[2] == content[:ID_DIGITS] == job.options["id"]
    )


def is_labelled(job: Job) -> bool:
    ours = {f"{OURS}/{key}": "stillhouse" for key in ("name", "part-of", "managed-by")}
    said = ours | {f"{OURS}/component": job.kind}
    has_all = all(job.labels[key] == value for key, value in said.items())
    return has_all and job.kind in VOLUMES and bool(job.labels["stillhouse/owner"])


def names_its_point(job: Job) -> bool:
    if job.kind != "train":
        return True
    point = job.labels["stillhouse/point"]
    return point == job.told["stillhouse/points"] == job.options["id"]


def names_its_code(job: Job) -> bool:
    if job.main["command"] == ON_ITS_OWN:
        return "code" not in job.options
    code = job.labels["stillhouse/code"]
    source = job.volumes["bundle"]["configMap"]["name"].removeprefix("stillhouse-code-")
    is_code = re.fullmatch(rf"[0-9a-f]{{{CODE_DIGITS}}}", code) is not None
    return is_code and code == job.options["code"] == source.partition("-")[0]


def labels_its_pods(job: Job) -> bool:
    meta = job.spec["template"]["metadata"]
    own = {key: v for key, v in job.labels.items() if not key.startswith("kueue.x-k8s.io/")}
    points = meta.get("annotations", {}).get("stillhouse/points")
    return meta["labels"] == own and points == job.told.get("stillhouse/points")


def says_its_words(job: Job) -> bool:
    told = shlex.split(job.told.get("stillhouse/words", ""))
    size = sum(len(key) + len(text.encode()) for key, text in job.told.items())
    if job.asked is not None:
        place = json.loads(job.asked)["place"]
        is_there = (place["runs"], place["cache_dir"]) == ("/runs", "/cache")
        return is_there and _is_of(job, told) and size < ANNOTATIONS_BYTES
    places = job.kind in ("collect", "push") or {"runs=/runs", "cache_dir=/cache"} <= {*told}
    return told == job.words and places and size < ANNOTATIONS_BYTES


def _is_of(job: Job, typed: list[str]) -> bool:
    """Whether the spec is of the id that its pod is told, and so are the words, where there are."""
    assert job.asked is not None
    own = job.options["id"]
    if job.kind == "train":
        spec = compose(from_command_line(typed, TrainSpec), TrainSpec)
        return point_id(from_json(job.asked, TrainSpec)) == own == point_id(spec)
    return job.kind != "eval" or eval_id(from_json(job.asked, EvalSpec)) == own


def counts_its_devices(job: Job) -> bool:
    devices = job.told["stillhouse/devices"]
    if job.options.get("processes", "0") != devices:
        return False
    asked = [str(n) for name, n in job.main["resources"]["limits"].items() if "/" in name]
    is_right = devices == "0" or (
        devices == "1" if job.kind in ("eval", "preflight") else job.kind == "train"
    )
    return is_right and asked in ([], [devices] if devices != "0" else [])


# --------------------------------------------------------------------------------- how it ends


def is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def knows_whose_fault_it_is(job: Job) -> bool:
    never = [SOME_FAILED, *NEVER_AGAIN] if job.kind == "drive" else NEVER_AGAIN
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    wanted: list[Json] = [{"action": "Ignore", "onPodConditions": [disrupted]}]
    for action, codes in (("Ignore", [85]), ("FailJob", never)):
        where = {"containerName": "main", "operator": "In", "values": codes}
        wanted.append({"action": action, "onExitCodes": where})
    return job.spec["podFailurePolicy"] == {"rules": wanted}


def is_suspended_for_a_queue(job: Job) -> bool:
    queue = job.labels.get("kueue.x-k8s.io/queue-name")
    return job.spec.get("suspend", False) is (queue is not None) and queue != ""


# -------------------------------------------------------------------------------- what it may


def has_the_right_identity(job: Job) -> bool:
    account = job.pod["serviceAccountName"]
    mounts = job.pod["automountServiceAccountToken"]
    return bool(account) and account != "default" and mounts is (job.kind == "drive")


def is_restricted(job: Job) -> bool:
    pod, main = job.pod["securityContext"], job.main["securityContext"]
    users = (pod["runAsUser"], pod["runAsGroup"], pod["fsGroup"])
    types = {key for volume in job.pod["volumes"] for key in volume if key != "name"}
    return (
        pod["runAsNonRoot"] is True
        and all(map(is_positive, users))
        and pod["seccompProfile"] == {"type": "RuntimeDefault"}
        and main["allowPrivilegeEscalation"] is False
        and main["capabilities"] == {"drop": ["ALL"]}
        and types <= {"persistentVolumeClaim", "emptyDir", "configMap"}
        and not {"hostNetwork", "hostPID", "hostIPC"} & {*job.pod}
    )


def holds_no_secret(job: Job) -> bool:
    is_clean = all(
        secrets.find(str(entry.get("value", "")), entry["name"]) is None
        for entry in job.main["env"]
        if "valueFrom" not in entry
    )
    taken = (entry["valueFrom"] for entry in job.main["env"] if "valueFrom" in entry)
    refs = (source["secretKeyRef"] for source in taken if source != JOB_UID)
    return (
        is_clean
        and all(ref["name"] and ref["key"] and ref["optional"] is False for ref in refs)
        and not any(secrets.find(word) for word in job.words)
    )


# ------------------------------------------------------------------------------- what it needs


def has_its_volumes(job: Job) -> bool:
    wanted = {*VOLUMES[job.kind]}
    if job.main["command"] == BUNDLED:
        wanted |= {"bundle", "names"} if job.kind == "eval" else {"bundle"}
    if job.kind == "drive" and any(word.startswith("/sweep/") for word in job.words):
        wanted.add("sweep")
    mounts = {mount["name"]: mount["mountPath"] for mount in job.main["volumeMounts"]}
    return (
        {*job.volumes} == {*mounts} == wanted
        and all(mounts[name] == MOUNTS[name] for name in wanted)
        and all(SOURCES[name] in job.volumes[name] for name in wanted)
    )


def has_its_claims(job: Job) -> bool:
    claims = {"runs", "cache"} & {*VOLUMES[job.kind]}
    return all(job.volumes[name]["persistentVolumeClaim"]["claimName"] for name in claims)


def has_shared_memory(job: Job) -> bool:
    if job.kind not in WORKERS:
        return True
    shm = job.volumes["shm"]["emptyDir"]
    limit = job.main["resources"]["limits"]["memory"]
    return shm["medium"] == "Memory" and bytes_of(shm["sizeLimit"]) < bytes_of(limit)


def has_a_share_of_the_disk(job: Job) -> bool:
    own = [job.volumes[name]["emptyDir"] for name in ("tmp", "home") if name in job.volumes]
    return all(bytes_of(volume["sizeLimit"]) > 0 for volume in own)


def bytes_of(quantity: str) -> int:
    """Bytes of 8Gi or 512Mi; raises where it is neither."""
    units = {"Mi": 2**20, "Gi": 2**30}
    return int(quantity[:-2]) * units[quantity[-2:]]


def has_writable_places(job: Job) -> bool:
    places = {name: MOUNTS[volume] for name, volume in BELOW.items()}
    is_there = all((job.env[name] or "").startswith(place) for name, place in places.items())
    return is_there and bool(job.env["USER"])


def knows_whether_to_download(job: Job) -> bool:
    is_offline = all(job.env.get(name) == value for name, value in OFFLINE.items())
    fetches = job.kind == "prepare" or job.env.get("STILLHOUSE_FETCH") == "1"
    return is_offline is not fetches and not (fetches and {*OFFLINE} & {*job.env})


def has_threads_of_its_own(job: Job) -> bool:
    cores = job.main["resources"]["requests"]["cpu"]
    asked = int(cores[:-1]) / 1000 if cores.endswith("m") else int(cores)
    return 1 <= int(job.env["OMP_NUM_THREADS"] or "") <= max(1, asked)
