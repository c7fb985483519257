"""Let a test play the Job controller, scheduler, kubelet and Kueue by hand.

Nothing here happens or decides by itself. A test says that a pod ran, or how it ended; Jobs, pods,
Workloads and events then look as a 1.34 server with Kueue 0.17 leaves them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tests.fakes.fake_rules import RESOURCES, Json, job_labels, label_selector
from tests.fakes.fake_store import Store

NEVER_STARTED = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
WHY_FAILED = {
    "PodFailurePolicy": (
        "Container main for pod {ns}/{pod} failed with exit code {code} matching FailJob rule at"
        " index 0"
    ),
    "BackoffLimitExceeded": "Job has reached the specified backoff limit",
    "DeadlineExceeded": "Job was active longer than specified deadline",
}
Ends = str | None


class Hands:
    """Actions of a test on the objects of a namespace; `ns` is "lab" by default."""

    def __init__(self, store: Store) -> None:
        self.store = store

    # Any object.

    def put(self, resource: str, obj: Json, ns: str = "lab") -> Json:
        """Create or replace it, status included."""
        known, name = RESOURCES[resource], obj["metadata"]["name"]
        where = ns if known.is_namespaced else ""
        with self.store.changed:
            if self.store.get(resource, where, name) is None:
                self.store.create(known, where, obj)
            else:
                self.store.update(known, where, name, obj)
            if known.has_status and "status" in obj:
                self.store.update(known, where, name, {"status": obj["status"]}, "status")
            return self.store.need(resource, where, name).obj

    def get(self, resource: str, name: str, ns: str = "lab") -> Json | None:
        where = ns if RESOURCES[resource].is_namespaced else ""
        item = self.store.get(resource, where, name)
        return item.obj if item else None

    def all(self, resource: str, selector: str = "", ns: str = "lab") -> list[Json]:
        is_meant = label_selector(selector)
        with self.store.changed:
            return [item.obj for item in self.store.all(resource, ns) if is_meant(item.obj)]

    def names(self, resource: str, ns: str = "lab") -> list[str]:
        return [obj["metadata"]["name"] for obj in self.all(resource, ns=ns)]

    def remove(self, resource: str, name: str, ns: str = "lab") -> None:
        self.store.delete(RESOURCES[resource], ns, name, {})

    def namespace(self, name: str, **labels: str) -> None:
        self.put("namespaces", {"metadata": {"name": name, "labels": labels}})

    def quota(self, resource: str, limit: int | None, ns: str = "lab") -> None:
        """From now on allow at most `limit` of these objects (None: no limit)."""
        if limit is None:
            self.store.quotas.pop((ns, resource), None)
        else:
            self.store.quotas[ns, resource] = limit

    def forget(self) -> None:
        self.store.forget()

    # A Job's pods.

    def pods_of(self, job: str, ns: str = "lab") -> list[Json]:
        """Oldest first."""
        pods = self.all("pods", f"batch.kubernetes.io/job-name={job}", ns)
        return sorted(pods, key=lambda pod: pod["metadata"]["uid"])

    def run_pod(self, job: str, node: str = "node-1", ns: str = "lab") -> str:
        """Make a pod of the Job run, the waiting one if there is one; returns its name."""
        with self.store.changed:
            pod = self._live_pod(job, ns) or self._new_pod(job, ns)
            now, name = self.store.now(), pod["metadata"]["name"]
            self._set_spec("pods", name, ns, nodeName=node)
            running = {"state": {"running": {"startedAt": now}}, "ready": True, "started": True}
            self._set_pod(name, ns, "Running", running, self._started(now))
            self._set_job(job, ns, active=1, ready=1)
            return name

    def pending(
        self, job: str, reason: str = "Unschedulable", message: str = NEVER_STARTED,
        ns: str = "lab",
    ) -> str | None:  # fmt: skip
        """Keep a pod of the Job from starting; returns its name, or None for FailedCreate."""
        with self.store.changed:
            if reason == "FailedCreate":
                self._set_job(job, ns, active=0, ready=0)
                self.event("Job", job, reason, f"Error creating: {message}", ns=ns)
                return None
            pod = self._live_pod(job, ns) or self._new_pod(job, ns)
            name = pod["metadata"]["name"]
            self._set_job(job, ns, active=1, ready=0)
            if reason == "Unschedulable":
                condition = self._condition("PodScheduled", "False", reason, message, probe=None)
                self._set_status("pods", name, ns, {
                    "phase": "Pending", "qosClass": "Burstable", "conditions": [condition],
                })  # fmt: skip
                self.event("Pod", name, "FailedScheduling", message, ns=ns)
                return name
            self._set_spec("pods", name, ns, nodeName="node-1")
            waiting = {"reason": reason, "message": message}
            if reason in ("FailedMount", "FailedAttachVolume"):
                self.event("Pod", name, reason, message, ns=ns)
                waiting = {"reason": "ContainerCreating"}
            state = {"state": {"waiting": waiting}, "ready": False, "started": False}
            self._set_pod(name, ns, "Pending", state, self._started(None))
            return name

    @property
    def pods_linger(self) -> bool:
        """Whether a running pod that is deleted stays (being deleted) until `end_pods`."""
        return self.store.pods_linger

    @pods_linger.setter
    def pods_linger(self, stays: bool) -> None:
        self.store.pods_linger = stays

    def end_pods(self, job: str, exit_code: int = 85, message: str = "", ns: str = "lab") -> None:
        """End and remove the pods of a Job that are being deleted."""
        with self.store.changed:
            for pod in self.pods_of(job, ns):
                if "deletionTimestamp" in pod["metadata"]:
                    name = pod["metadata"]["name"]
                    self._end_pod(name, ns, exit_code, message, "Error")
                    self.store.vanish("pods", ns, name)

    def let_go(self, job: str, ns: str = "lab") -> None:
        """Delete the Job but not its pods (`--cascade=orphan`)."""
        with self.store.changed:
            pods = self.pods_of(job, ns)
            self.store.delete(RESOURCES["jobs"], ns, job, {"propagationPolicy": "Orphan"})
            for pod in pods:
                name = pod["metadata"]["name"]
                meta = {"metadata": {"ownerReferences": None}}
                self.store.patch(RESOURCES["pods"], ns, name, meta)

    # How a Job ends.

    def complete(self, job: str, message: str = "", ns: str = "lab") -> None:
        """Its pod ended with 0 (one runs first if none does), the Job is Complete."""
        with self.store.changed:
            pod = self._running(job, ns)
            self._end_pod(pod, ns, 0, message, "Completed")
            said = "Reached expected number of succeeded pods"
            now = self.store.now()
            self._set_job(
                job, ns, active=0, ready=0, succeeded=1, completionTime=now,
                conditions=self._both("SuccessCriteriaMet", "Complete", "CompletionsReached", said),
            )  # fmt: skip

    def fail(
        self, job: str, exit_code: int = 42, message: str = "", reason: str = "Error",
        ends: Ends = "PodFailurePolicy", ns: str = "lab",
    ) -> str:  # fmt: skip
        """Its pod ended with `exit_code`, termination message and container's reason; its name.

        `ends`: why the Job failed with it; None: it goes on and counts one failure; "Ignore": it
        goes on and counts none.
        """
        with self.store.changed:
            pod = self._running(job, ns)
            self._end_pod(pod, ns, exit_code, message, reason)
            status = self._need("jobs", job, ns)["status"]
            failed = status.get("failed", 0) + (ends != "Ignore")
            self._set_job(job, ns, active=0, ready=0, **({"failed": failed} if failed else {}))
            if ends in WHY_FAILED:
                said = WHY_FAILED[ends].format(ns=ns, pod=pod, code=exit_code)
                both = self._both("FailureTarget", "Failed", ends, said)
                self._set_job(job, ns, conditions=both)
                if ends == "DeadlineExceeded":
                    self.remove("pods", pod, ns)
            return pod

    def disrupt(
        self, job: str, reason: str = "EvictionByEvictionAPI", exit_code: int = 143,
        message: str = "", ns: str = "lab",
    ) -> str:  # fmt: skip
        """Its pod was evicted or preempted: DisruptionTarget, nothing counted, and the pod goes.

        Only a kubelet short of something (TerminationByKubelet) leaves the failed pod where it is.
        """
        with self.store.changed:
            pod = self._running(job, ns)
            target = self._condition("DisruptionTarget", "True", reason, "disrupted", probe=None)
            status = self._need("pods", pod, ns)["status"]
            conditions = [*status["conditions"], target]
            self._set_status("pods", pod, ns, {**status, "conditions": conditions})
            self._end_pod(pod, ns, exit_code, message, "Error")
            self._set_job(job, ns, active=0, ready=0)
            if reason != "TerminationByKubelet":
                self.remove("pods", pod, ns)
            return pod

    def suspend(self, job: str, ns: str = "lab") -> None:
        """Do what Kueue does to preempt: remove the pods, suspend the Job, count no failure."""
        with self.store.changed:
            self._set_spec("jobs", job, ns, suspend=True)
            for pod in self.pods_of(job, ns):
                self.remove("pods", pod["metadata"]["name"], ns)
            status = dict(self._need("jobs", job, ns)["status"])
            status.pop("startTime", None)
            asleep = self._condition("Suspended", "True", "JobSuspended", "Job suspended")
            status |= {"active": 0, "ready": 0, "terminating": 0, "conditions": [asleep]}
            self._set_status("jobs", job, ns, _plain_job(status))

    def resume(self, job: str, ns: str = "lab") -> None:
        """Do what Kueue does to admit a Job; call `run_pod` next."""
        with self.store.changed:
            self._set_spec("jobs", job, ns, suspend=False)
            awake = self._condition("Suspended", "False", "JobResumed", "Job resumed")
            self._set_job(job, ns, conditions=[awake], startTime=self.store.now())

    # Kueue, events.

    def workload(
        self, job: str, queue: str = "lab", state: str = "pending", message: str = "",
        ns: str = "lab",
    ) -> Json:  # fmt: skip
        """The Workload of a Job: pending, admitted, inadmissible, oversized, deactivated, checking,
        preempted or finished.

        `message` takes the place of what Kueue says about quota or preemption.
        """
        owner = self._need("jobs", job, ns)["metadata"]
        lacks = f"insufficient unused quota for nvidia.com/gpu in flavor {queue}, 1 more needed"
        lacks = f"couldn't assign flavors to pod set main: {lacks}"
        never = f"insufficient quota for nvidia.com/gpu in flavor {queue}, previously considered"
        never += " podsets requests (0) + current podset request (4) > maximum capacity (2)"
        never = f"couldn't assign flavors to pod set main: {never}"
        by = "Preempted to accommodate a workload (UID: 1, JobUID: 2) due to prioritization in the"
        by = message or f"{by} ClusterQueue; preemptor path: /{queue}; preemptee path: /{queue}"
        missing = f"LocalQueue {queue} doesn't exist"
        admitted = [
            ("QuotaReserved", "True", "QuotaReserved", f"Quota reserved in ClusterQueue {queue}"),
            ("Admitted", "True", "Admitted", "The workload is admitted"),
        ]
        done = ("Finished", "True", "Succeeded", "Reached expected number of succeeded pods")
        conditions = {
            "pending": [("QuotaReserved", "False", "Pending", message or lacks)],
            "oversized": [("QuotaReserved", "False", "Pending", never)],
            "deactivated": [
                ("QuotaReserved", "False", "Pending", "The workload is deactivated"),
                ("Evicted", "True", "Deactivated", "The workload is deactivated"),
            ],
            "checking": admitted[:1],
            "inadmissible": [("QuotaReserved", "False", "Inadmissible", message or missing)],
            "admitted": admitted,
            "preempted": [
                ("QuotaReserved", "False", "Pending", lacks),
                ("Evicted", "True", "Preempted", by),
                ("Admitted", "False", "NoReservation", "The workload has no reservation"),
                ("Preempted", "True", "InClusterQueue", by),
                ("Requeued", "True", "Preempted", by),
            ],
            "finished": [*admitted, done],
        }[state]
        status: Json = {"conditions": [self._condition(*c, probe=None) for c in conditions]}
        for condition in status["conditions"]:
            del condition["lastProbeTime"]
        if state == "checking":
            status["admissionChecks"] = [{"name": "budget", "state": "Pending", "message": ""}]
        if state in ("admitted", "finished"):
            assigned = {"name": "main", "count": 1, "flavors": {"nvidia.com/gpu": queue}}
            status["admission"] = {"clusterQueue": queue, "podSetAssignments": [assigned]}
        return self.put("workloads", {
            "metadata": {
                "name": f"job-{job}-{owner['uid'][3:8]}",
                "labels": {"kueue.x-k8s.io/job-uid": owner["uid"]},
                "ownerReferences": [_owner("batch/v1", "Job", owner)],
            },
            "spec": {
                "queueName": queue, "active": state != "deactivated",
                "podSets": [{"name": "main", "count": 1}],
            },
            "status": status,
        }, ns)  # fmt: skip

    def event(
        self, kind: str, name: str, reason: str, message: str, type: str = "Warning",
        ns: str = "lab",
    ) -> None:  # fmt: skip
        resource = {"Job": "jobs", "Pod": "pods", "Workload": "workloads"}[kind]
        of = self.get(resource, name, ns) or {"metadata": {}, "apiVersion": "v1"}
        now = self.store.now()
        known = RESOURCES["events"]
        self.store.create(known, ns, {
            "metadata": {"generateName": f"{name}."},
            "involvedObject": {
                "apiVersion": of["apiVersion"], "kind": kind, "name": name, "namespace": ns,
                "uid": of["metadata"].get("uid", ""),
            },
            "reason": reason, "message": message, "type": type, "count": 1, "eventTime": None,
            "firstTimestamp": now, "lastTimestamp": now, "reportingInstance": "",
            "reportingComponent": "kubelet", "source": {"component": "kubelet"},
        })  # fmt: skip

    # Inside.

    def _need(self, resource: str, name: str, ns: str) -> Json:
        return self.store.need(resource, ns, name).obj

    def _live_pod(self, job: str, ns: str) -> Json | None:
        live = [p for p in self.pods_of(job, ns) if p["status"]["phase"] in ("Pending", "Running")]
        return live[-1] if live else None

    def _running(self, job: str, ns: str) -> str:
        pod = self._live_pod(job, ns)
        if pod is None or pod["status"]["phase"] != "Running":
            return self.run_pod(job, ns=ns)
        return pod["metadata"]["name"]

    def _new_pod(self, job: str, ns: str) -> Json:
        owner = self._need("jobs", job, ns)
        assert not owner["spec"]["suspend"], f"the Job {job} is suspended: resume it first"
        template = json.loads(json.dumps(owner["spec"]["template"]))
        meta = template.get("metadata", {})
        name = f"{job}-{self.store.version + 1:05x}"
        self.put("pods", {
            "metadata": {
                **meta, "name": name, "generateName": f"{job}-",
                "labels": {**meta.get("labels", {}), **job_labels(owner)},
                "ownerReferences": [_owner("batch/v1", "Job", owner["metadata"])],
            },
            "spec": template["spec"],
            "status": {"phase": "Pending", "qosClass": "Burstable"},
        }, ns)  # fmt: skip
        if "startTime" not in owner["status"]:
            self._set_job(job, ns, startTime=self.store.now())
        return self._need("pods", name, ns)

    def _started(self, ready_since: str | None) -> list[Json]:
        """The conditions of a pod on a node."""
        ready = "True" if ready_since else "False"
        parts = (("Initialized", "True"), ("Ready", ready), ("ContainersReady", ready))
        return [
            {"type": type_, "status": status, "lastProbeTime": None,
             "lastTransitionTime": self.store.now()}
            for type_, status in (*parts, ("PodScheduled", "True"))
        ]  # fmt: skip

    def _set_pod(self, name: str, ns: str, phase: str, state: Json, conditions: list[Json]) -> None:
        pod = self._need("pods", name, ns)
        container = pod["spec"]["containers"][0]
        status = {
            "name": container["name"], "image": container["image"], "imageID": "",
            "lastState": {}, "restartCount": 0, **state,
        }  # fmt: skip
        self._set_status("pods", name, ns, {
            "phase": phase, "conditions": conditions, "containerStatuses": [status],
            "qosClass": "Burstable", "hostIP": "10.0.0.1", "podIP": "10.0.1.1",
            "startTime": pod["status"].get("startTime", self.store.now()),
        })  # fmt: skip

    def _end_pod(self, name: str, ns: str, code: int, message: str, reason: str) -> None:
        status = self._need("pods", name, ns)["status"]
        began = status["containerStatuses"][0]["state"]["running"]["startedAt"]
        ended: Json = {"exitCode": code, "reason": reason, "startedAt": began}
        ended["finishedAt"] = self.store.now()
        if message:
            ended["message"] = message
        state = {"state": {"terminated": ended}, "ready": False, "started": False}
        phase = "Failed" if code else "Succeeded"
        disrupted = [c for c in status["conditions"] if c["type"] == "DisruptionTarget"]
        self._set_pod(name, ns, phase, state, [*self._started(None), *disrupted])

    def _condition(
        self, type_: str, status: str, reason: str, message: str, probe: str | None = "now"
    ) -> Json:
        now = self.store.now()
        return {
            "type": type_, "status": status, "reason": reason, "message": message,
            "lastProbeTime": now if probe else None, "lastTransitionTime": now,
        }  # fmt: skip

    def _both(self, first: str, second: str, reason: str, message: str) -> list[Json]:
        return [self._condition(type_, "True", reason, message) for type_ in (first, second)]

    def _set_job(self, name: str, ns: str, conditions: Iterable[Json] = (), **fields: Any) -> None:
        """Change a Job's status; conditions replace those of their type."""
        status = {**self._need("jobs", name, ns)["status"], **fields}
        new = {condition["type"]: condition for condition in conditions}
        kept = [c for c in status.get("conditions", []) if c["type"] not in new]
        if kept or new:
            status["conditions"] = [*kept, *new.values()]
        status |= {"terminating": 0, "uncountedTerminatedPods": {}}
        self._set_status("jobs", name, ns, _plain_job(status))

    def _set_status(self, resource: str, name: str, ns: str, status: Json) -> None:
        self.store.update(RESOURCES[resource], ns, name, {"status": status}, "status")

    def _set_spec(self, resource: str, name: str, ns: str, **fields: Any) -> None:
        self.store.patch(RESOURCES[resource], ns, name, {"spec": fields})


def _plain_job(status: Json) -> Json:
    """A real status leaves `active` and counts out where they are 0."""
    return {k: v for k, v in status.items() if not (k in ("active", "failed") and v == 0)}


def _owner(api_version: str, kind: str, meta: Json) -> Json:
    return {
        "apiVersion": api_version, "kind": kind, "name": meta["name"], "uid": meta["uid"],
        "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip
