"""Run commands as ada, a user in Group stillhouse who does not administer the cluster.

    with at_desk(kube, "lines", tmp_path) as ada:
        print(ada.say("run", "sweep.yaml", "--backend", "cluster"))
        assert ada.seen.count("train") == 4

An administrator created her namespace and applied k8s/access.yaml to it; she has no other rights.
`Seen` records every Job ever created there with the administrator's own watch, independent of what
a launcher reports.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tests.cluster import keys
from tests.cluster.api import PATHS
from tests.cluster.cluster import Json, Kubernetes, Space, until

ROOT = Path(__file__).parent.parent.parent
IMAGE = "lab.example/stillhouse@sha256:" + "a1" * 32  # nobody pulls it: the nodes are fake
SITE = (f"image={IMAGE}", "cpu=1", "memory_gib=4", "shm_gib=1")
AWAY = ("--backend", "cluster")


class Seen:
    """Every Job that ever existed in a namespace, from a watch that resumes where it was cut."""

    def __init__(self, kube: Kubernetes, namespace: str) -> None:
        self.kube, self.path = kube, PATHS["Job"].format(namespace)
        self.last: dict[str, Json] = {}  # uid -> the Job as it last was, without its template
        self.most = 0  # Jobs let go and not finished, at the worst moment
        self.put_back: set[str] = set()  # uids of Jobs that were let go and suspended again
        self.error: BaseException | None = None
        self.at_work: set[str] = set()  # uids of Jobs that were let go and are not finished
        self._list()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def jobs(self, kind: str = "", **labels: str) -> list[Json]:
        """All Jobs that ever existed, of a kind, with these stillhouse/ labels, oldest first."""
        wanted = {f"stillhouse/{key}": value for key, value in labels.items()}
        wanted |= {"stillhouse/kind": kind} if kind else {}
        found = [
            job for job in list(self.last.values()) if wanted.items() <= labels_of(job).items()
        ]
        return sorted(found, key=lambda job: job["metadata"]["creationTimestamp"])

    def count(self, kind: str = "", **labels: str) -> int:
        """How many Jobs of a kind were ever created."""
        return len(self.jobs(kind, **labels))

    def made_twice(self) -> list[str]:
        """Names under which more than one Job was ever created."""
        names = [job["metadata"]["name"] for job in self.jobs()]
        return sorted({name for name in names if names.count(name) > 1})

    def close(self) -> None:
        self._stop.set()
        self._thread.join(15)
        if self.error is not None:
            raise self.error

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self._watch()
            except (OSError, ValueError, HTTPException):  # no server, or a line that was cut
                self._stop.wait(0.05)
            except BaseException as error:
                self.error = error
                return

    def _list(self) -> None:
        """List the Jobs before a watch starts or restarts: a restarted server lost its history."""
        found = self.kube.call("GET", self.path)
        for job in found["items"]:
            self._take(job, is_gone=False)
        self._version = found["metadata"]["resourceVersion"]

    def _watch(self) -> None:
        query = (
            f"?watch=1&allowWatchBookmarks=true&timeoutSeconds=2&resourceVersion={self._version}"
        )
        with self.kube.api.opener.open(self.kube.url + self.path + query, timeout=10) as lines:
            for line in lines:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return self._list()
                job = event["object"]
                self._version = job["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    self._take(job, event["type"] == "DELETED")

    def _take(self, job: Json, is_gone: bool) -> None:
        uid = job["metadata"]["uid"]
        job["metadata"].pop("managedFields", None)  # most of a Job, and nobody asks for it here
        job["spec"].pop("template", None)
        self.last[uid] = job
        if uid in self.at_work and job["spec"].get("suspend") and not is_gone:
            self.put_back.add(uid)
        is_at_work = not (is_gone or job["spec"].get("suspend") or end_of(job))
        (self.at_work.add if is_at_work else self.at_work.discard)(uid)
        self.most = max(self.most, len(self.at_work))


def labels_of(job: Json) -> Mapping[str, str]:
    return job["metadata"].get("labels") or {}


def end_of(job: Json) -> str | None:
    """Complete, Failed, or None."""
    conditions = job.get("status", {}).get("conditions") or ()
    ends = [c["type"] for c in conditions if c["status"] == "True"]
    return next((end for end in ends if end in ("Complete", "Failed")), None)


@dataclass(frozen=True)
class Typed:
    """A command that ada typed, running or finished."""

    words: tuple[str, ...]
    process: subprocess.Popen[bytes]
    out: Path

    @property
    def said(self) -> str:
        """What it printed so far."""
        return self.out.read_text(errors="replace")

    def ends(self, code: int = 0, timeout_s: float = 240) -> str:
        """Its whole output; fails unless it ends with this exit code."""
        try:
            ended = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            ended = f"nothing in {timeout_s:g} s"
        assert ended == code, f"{self} ended with {ended}:\n{self.said}"
        return self.said

    def kill(self) -> int:
        """Kill it with SIGKILL if it still runs; returns its exit code."""
        self.process.kill()
        return self.process.wait()

    def __str__(self) -> str:
        return f"stillhouse {' '.join(self.words)}"


class Desk:
    """A namespace in which ada works: the commands she types, and their results."""

    def __init__(self, kube: Kubernetes, space: Space, folder: Path) -> None:
        self.kube, self.space, self.folder = kube, space, folder
        self.seen = Seen(kube, space.name)
        self.kubeconfig = kubeconfig_of_ada(kube, space.name)
        self.typed: list[Typed] = []

    def env(self, kubeconfig: Path | None = None) -> dict[str, str]:
        """Her environment; `kubeconfig` replaces her way to reach the cluster."""
        return {**os.environ, "USER": "ada", "KUBECONFIG": str(kubeconfig or self.kubeconfig)}

    def start(self, *words: str, kubeconfig: Path | None = None) -> Typed:
        """Start `stillhouse WORDS` as a process; `close` kills it if it still runs."""
        said = self.folder / f"{len(self.typed)}.said"
        with open(said, "wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "stillhouse", *words],
                cwd=self.folder,
                env=self.env(kubeconfig),
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.typed.append(Typed(words, process, said))
        return self.typed[-1]

    def say(self, *words: str, code: int = 0) -> str:
        """The output of `stillhouse WORDS`; fails unless it ends with this exit code."""
        return self.start(*words).ends(code)

    def status(self, target: str, code: int = 0) -> Json:
        """`status --json` of a sweep: how its points stand."""
        out = self.say("status", target, *AWAY, "--json", code=code)
        return json.loads(out)

    def sweep(self, name: str, *lines: str) -> str:
        """Write a sweep file of these lines of YAML into her folder; returns its name there."""
        (self.folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
        return f"{name}.yaml"

    def versions(self) -> dict[tuple[str, str], str]:
        """The version of every Job and ConfigMap of the namespace: the same if none was written."""
        found: dict[tuple[str, str], str] = {}
        for kind in ("Job", "ConfigMap"):
            for item in self.kube.call("GET", PATHS[kind].format(self.space.name))["items"]:
                found[kind, item["metadata"]["name"]] = item["metadata"]["resourceVersion"]
        return found

    def delete_jobs(self) -> None:
        """Delete all Jobs, as their time to live would."""
        self.kube.kubectl("delete", "jobs", "--all", "-n", self.space.name, "--wait=false")
        path = PATHS["Job"].format(self.space.name)
        until("the Jobs are gone", lambda: not self.kube.call("GET", path)["items"])

    def close(self) -> None:
        for typed in self.typed:
            typed.kill()
        with contextlib.ExitStack() as stack:
            stack.callback(self.seen.close)
            # Pods that still run there would take the nodes' capacity from other tests.
            self.kube.call("DELETE", f"{PATHS['Namespace']}/{self.space.name}")


@contextlib.contextmanager
def at_desk(kube: Kubernetes, namespace: str, folder: Path) -> Generator[Desk, None, None]:
    """A namespace with k8s/access.yaml applied, and a `Desk` for ada in it."""
    space = kube.namespace(namespace, accounts=False)
    access = (ROOT / "k8s" / "access.yaml").read_text()
    assert access.count("    namespace: stillhouse\n") == 1
    here = access.replace("    namespace: stillhouse\n", f"    namespace: {namespace}\n")
    kube.kubectl("apply", "-n", namespace, "-f", "-", input=here)
    with contextlib.closing(Desk(kube, space, folder)) as desk:
        yield desk


def kubeconfig_of_ada(kube: Kubernetes, namespace: str) -> Path:
    """A kubeconfig of hers, by a certificate, in this namespace."""
    if not (kube.keys / "ada.crt").exists():
        keys.certificate(kube.keys, "ada", "/O=stillhouse/CN=ada")
    path = kube.work / f"{namespace}-ada.kubeconfig"
    return kube.write_kubeconfig(path, "ada", kube.certificate("ada"), namespace)
