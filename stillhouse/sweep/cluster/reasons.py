"""Translate Kubernetes conditions into reasons a person can act on.

They say why a point waits, and how it ended. Pure functions of views. Each sentence says what is
wrong and, where a person can fix it, how.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from stillhouse.errors import AGAIN, OUT_OF_MEMORY, POISON, TOO_LATE, UNKNOWN
from stillhouse.sweep.cluster.kueue import QueueView
from stillhouse.sweep.cluster.objects import (
    BEFORE,
    JobView,
    LastWords,
    Note,
    PodView,
    last_words,
    rows_told,
    told_attempts,
)
from stillhouse.sweep.cluster.refusals import demands, refused, short

DEFAULT_QUEUE = "default"  # the LocalQueue that takes Jobs without a queue (Kueue 0.17)
# What the Job controller waits before the second attempt, and at most before a later one.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 10, 600

_IMAGE = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull",
     "ImageInspectError", "RegistryUnavailable", "SignatureValidationFailed"}
)  # fmt: skip
_CONTAINER = frozenset({"CreateContainerError", "RunContainerError", "CreateContainerConfigError"})
_MOUNT = frozenset({"FailedMount", "FailedAttachVolume", "FailedMapVolume"})
_GONE = {
    "DeletionByTaintManager": "its node was lost",
    "DeletionByPodGC": "its node was lost",
    "EvictionByEvictionAPI": "it was evicted (a drain, say)",
    "PreemptionByScheduler": "a pod of higher priority took its place",
    "PreemptionByKubeScheduler": "a pod of higher priority took its place",
    "TerminationByKubelet": "its node ended it (short of memory or disk, or shutting down)",
}
_MEANS = {42: ", a mistake", 43: ", diverged", 44: ", out of memory", 46: ", stopped by a rule"}
_HELD_TOO_LONG = (
    "it took longer than its deadline (site.deadline_s): that passed while it was suspended, since"
    " only Kueue stops the clock, and a person who sets spec.suspend does not"
)
_POD_GONE = "its pod is gone, `stillhouse logs` has what it printed"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a Job does not run."""

    words: str
    cannot_start: bool = False  # waiting does not mend it: image, secret, volume, quota, settings


@dataclass(frozen=True, slots=True)
class End:
    """How a Job, or one pod of it, ended."""

    code: int
    cause: str
    tail: str | None = None  # the last lines that it printed
    # Of an evaluation: the points and baselines that it scored, and how it ended for others.
    done: tuple[str, ...] = ()
    failed: Mapping[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])

    def of(self, what: str, members: Sequence[str]) -> End | None:
        """How it ended for one of these members; None: it is scored, or others are to blame."""
        if what in self.done:
            return None
        if what in self.failed:
            return End(*self.failed[what], self.tail)
        return None if self.failed.keys() & {*members} else self


# ---------------------------------------------------------------------------------- waiting


def why_waiting(
    job: JobView,
    pods: Sequence[PodView],
    queued: QueueView | None = None,
    notes: Sequence[Note] = (),
) -> Reason:
    """Why a live Job has no running pod; `pods`, `queued` and `notes` are about this Job only."""
    if job.is_deleting:
        return Reason("its Job is being deleted")
    if job.is_suspended:
        return _why_suspended(job, queued)
    lost = next((p for p in reversed(by_age(pods)) if is_lost(p)), None)
    if lost is not None:
        return _why_lost(lost)
    pod = next((p for p in reversed(by_age(pods)) if not p.is_over and not p.is_deleting), None)
    if pod is not None:
        return _why_pending(job, pod, notes)
    note = _latest(notes, {"FailedCreate"})
    is_news = note is not None and all(pod.created <= note.at for pod in pods)
    if note is not None and is_news and job.active == 0:
        return Reason(*refused(note.message))
    return _why_between(job, pods)


def is_lost(pod: PodView) -> bool:
    """Whether a pod counts as running only because its node cannot say otherwise."""
    return pod.is_silent and pod.phase == "Running" and not pod.is_over


def why_orphan(pod: PodView) -> str:
    """Explain a pod whose Job is gone: a second one would write where it writes."""
    where = f", on node {pod.node} that does not answer" if is_lost(pod) else ""
    return (
        f"pod {pod.name} goes on{where}, its Job was deleted without it (--cascade=orphan): no"
        f" other is made beside it; it ends by itself, or by an administrator who deletes it"
    )


def _why_lost(pod: PodView) -> Reason:
    """With a podFailurePolicy a Job gets no new pod before the old one is gone, and a silent node's
    pods are gone when it comes back or its Node object is removed (Kubernetes 1.34)."""
    node = f"its node {pod.node}"
    if not pod.is_deleting:
        return Reason(
            f"{node} does not answer; where it stays silent, its pod is given up (after five"
            " minutes by default)"
        )
    return Reason(
        f"{node} was lost; a new pod comes when that node is back or is removed"
        f" (`kubectl delete node {pod.node}`, if it is gone for good)"
    )


def _why_between(job: JobView, pods: Sequence[PodView]) -> Reason:
    """Between two attempts the cluster waits, twice as long each time, also where an end costs no
    attempt (Kubernetes 1.34: 10 s, 20 s and so on, at most ten minutes)."""
    ended = {pod.name: end_of_pod(pod).cause for pod in by_age(pods) if pod.is_over}
    told = {one["pod"]: one["cause"] for one in told_attempts(job) if BEFORE not in one} | ended
    if not told:
        return Reason("its pod is being made")
    pause = min(FIRST_PAUSE_S * 2 ** (len(told) - 1), LONGEST_PAUSE_S)
    number = {1: "second", 2: "third"}.get(len(told), f"{len(told) + 1}th")
    return Reason(
        f"between two attempts (the cluster waits {pause} s before the {number}):"
        f" {list(told.values())[-1]}"
    )


def _why_suspended(job: JobView, queued: QueueView | None) -> Reason:
    if job.queue is None:
        return _why_held(job)
    found = _why_queued(job, queued)
    if job.queue == DEFAULT_QUEUE and job.asks and "queue" not in demands(job.asks):
        return replace(found, words=f"{found.words} (Kueue queued it, its site names no queue)")
    return found


def _why_queued(job: JobView, queued: QueueView | None) -> Reason:
    queue = f"queue {job.queue}"
    if queued is None:
        return Reason(f"{queue}: {_unseen(job)}")
    said = short(queued.message)
    after = f": {said}" if said else ""
    if queued.state == "deactivated":
        how = f" ({queued.reason})" if queued.reason else ""
        return Reason(
            f"deactivated{how}, {queue} never admits it again{after}; set spec.active of Workload"
            f" {queued.name} to true, or retry the point",
            cannot_start=True,
        )
    if queued.state == "inadmissible":
        words = f"{queue} cannot admit it{after} (kubectl get localqueues)"
        return Reason(words, cannot_start=True)
    if queued.state == "oversized":
        words = f"{queue} can never hold it{after}; ask for less, or set site.queue to another"
        return Reason(words, cannot_start=True)
    if queued.state == "checking":
        return Reason(f"{queue} has quota for it, waits for admission check {said}")
    if queued.state in ("reserved", "admitted"):
        return Reason(f"{queue} has admitted it")
    if queued.state in ("preempted", "evicted"):
        how = "preempted" if queued.state == "preempted" else f"evicted ({queued.reason})"
        return Reason(f"{how}, waits in {queue} again{after}")
    return Reason(f"waits in {queue}{after}")


def _why_held(job: JobView) -> Reason:
    words = "suspended by hand: set spec.suspend of its Job to false to let it go on"
    if job.started is not None:
        # Only Kueue resets the clock: past startTime + activeDeadlineSeconds it fails at once.
        words += (
            "; its deadline went on meanwhile (where it is past, raise spec.activeDeadlineSeconds"
            " first, or it fails at once)"
        )
    return Reason(words)


def _unseen(job: JobView) -> str:
    """Kueue writes down nothing about a Job that names a priority class it does not know."""
    why = "it was just sent, or Kueue does not run"
    if job.priorities:
        classes = " or ".join(job.priorities)
        why += f", or it has no class {classes} (site.queue_priority, site.priority_class)"
    return f"Kueue has not seen it yet: {why}"


def _why_pending(job: JobView, pod: PodView, notes: Sequence[Note]) -> Reason:
    if pod.unscheduled is not None:
        return _why_unscheduled(job, pod.unscheduled)
    said = short(pod.waiting_message)
    if pod.waiting in _IMAGE:
        return Reason(
            f"image not pulled: {_image_words(pod.waiting_message) or pod.waiting}; check"
            " site.image and whether the nodes may pull it",
            cannot_start=True,
        )
    if pod.waiting in _CONTAINER:
        return _why_no_container(pod.waiting or "", said)
    mount = _latest(notes, _MOUNT)
    if mount is not None:
        return _why_not_mounted(mount.message)
    sandbox = _latest(notes, {"FailedCreatePodSandBox"})
    if sandbox is not None:
        return Reason(f"node {pod.node} cannot start pods: {short(sandbox.message)}")
    return Reason(f"starting on node {pod.node}" if pod.node else "waits for the scheduler")


def _why_unscheduled(job: JobView, message: str) -> Reason:
    """The scheduler's sentence, without the nodes' own story of preemption."""
    said = message.split(" preemption:")[0].split(" no new claims")[0].rstrip(" .,")
    if "persistentvolumeclaim" in said.lower() or "persistent volumes to bind" in said:
        found = re.search(r'persistentvolumeclaim "([^"]+)" not found', said)
        if found:
            words = f'volume claim "{found[1]}" is missing: make it (k8s/storage.yaml)'
        else:
            words = f"volume claim not bound: {short(said)} (kubectl get pvc; k8s/storage.yaml)"
        return Reason(words, cannot_start=True)
    found = re.match(r"(\d+/\d+) nodes are available: (.*)", said, re.DOTALL)
    if found is None:
        return Reason(f"no node takes it: {short(said)}")
    why = found[2].replace("node(s) ", "").replace("Insufficient", "too few")
    lacking = re.findall(r"too few ([^\s,.]+(?:\.[^\s,.]+)*)", why)
    gpu = next((name for name in lacking if "/" in name), None)
    if gpu and job.devices:
        what = f"no node has {job.devices} free {gpu}"
    elif lacking:
        what = f"no node has enough free {lacking[0]}"
    elif "didn't match" in why:
        what = "no node has the labels that are asked (site.node_selector, site.gpu_product)"
    else:
        what = "no node takes it"
    return Reason(f"{what} ({found[1]} nodes: {short(why)})")


def _image_words(message: str) -> str:
    """The end of a chain of wrapped errors says most; what it is about is named before it."""
    image = re.search(r'image "([^"]+)"', message)
    last = re.split(r": (?=[^ ])", message.strip())[-1]
    name = image[1] if image else ""
    return short(last if name in last else f"{name}: {last}")


def _why_no_container(reason: str, said: str) -> Reason:
    found = re.search(r'(secret|configmap) "([^"]+)" not found', said)
    key = re.search(r"couldn't find key (\S+) in (Secret|ConfigMap) (?:\S+/)?(\S+)", said)
    if found and found[1] == "secret":
        words = (
            f'secret "{found[2]}" is missing: kubectl create secret generic {found[2]}'
            " --from-literal=token=…"
        )
    elif found:
        words = f'configmap "{found[2]}" is missing: `stillhouse run` sends it again'
    elif key:
        words = f'{key[2].lower()} "{key[3]}" has no key "{key[1]}": add it'
    else:
        words = f"its container cannot be made ({reason}): {said}"
    return Reason(words, cannot_start=True)


def _why_not_mounted(message: str) -> Reason:
    found = re.search(r'(secret|configmap) "([^"]+)" not found', message)
    if found:
        return _why_no_container("FailedMount", message)
    volume = re.search(r'volume "([^"]+)"', message)
    which = f'volume "{volume[1]}"' if volume else "a volume"
    return Reason(f"{which} not mounted: {short(message)} (kubectl get pvc)", cannot_start=True)


# ------------------------------------------------------------------------------------ ended


def scored_rows(job: JobView, pods: Sequence[PodView]) -> tuple[str, ...]:
    """What an evaluation's attempts scored, all of them together."""
    told = [rows_told(one)[0] for one in told_attempts(job)]
    seen = [end_of_pod(pod).done for pod in pods if pod.is_over]
    return tuple(dict.fromkeys(row for rows in (*told, *seen) for row in rows))


def how_it_failed(job: JobView, pods: Sequence[PodView]) -> End:
    """The end of a Job that failed, with what any attempt scored; its pods may be gone already."""
    return replace(_how_the_last_failed(job, pods), done=scored_rows(job, pods))


def _how_the_last_failed(job: JobView, pods: Sequence[PodView]) -> End:
    ended = [pod for pod in by_age(pods) if pod.is_over and pod.phase != "Succeeded"]
    # Where the pods are gone, what was noted of them on the Job is left.
    told = [
        End(one["code"], one["cause"], one.get("tail"), *rows_told(one))
        for one in told_attempts(job)
    ]
    ends = [end_of_pod(pod) for pod in ended] or told
    last = ends[-1] if ends else None
    if job.end_reason == "DeadlineExceeded":
        tail = last.tail if last else None
        if job.was_held:
            return End(TOO_LATE, _HELD_TOO_LONG, tail)
        return End(TOO_LATE, "it took longer than its deadline (site.deadline_s)", tail)
    if job.end_reason == "PodFailurePolicy":
        found = re.search(r"failed with exit code (\d+)", job.end_message or "")
        code = int(found[1]) if found else UNKNOWN
        mine = next((end for end in reversed(ends) if end.code == code), None)
        return mine or End(code, f"exit code {code}{_MEANS.get(code, '')}; {_POD_GONE}")
    if last is None:
        said = f": {short(job.end_message)}" if job.end_message else ""
        last = End(UNKNOWN, f"{job.end_reason or 'failed'}{said}")
    if job.end_reason != "BackoffLimitExceeded":
        return last
    count = max(job.failed, 1)
    attempts = f"given up after {count} attempt{'s' if count > 1 else ''}"
    failed = {
        what: (code, cause if code in POISON else f"{cause} ({attempts})")
        for what, (code, cause) in last.failed.items()
    }
    return replace(last, cause=f"{last.cause} ({attempts})", failed=failed)


def end_of_pod(pod: PodView) -> End:
    """How a pod ended, by its termination message where it left one."""
    words = last_words(pod.said) if pod.exit_code is not None else LastWords(None, None, None)
    if words.exit_code is not None:
        cause = words.cause or _signal(words.exit_code)
        return End(words.exit_code, cause, words.tail, words.done, words.failed)
    code = pod.exit_code if pod.exit_code is not None else UNKNOWN
    if is_killed_by_memory(pod):
        limit = "out of memory on the node: more than its limit (site.memory_gib, which holds"
        return End(OUT_OF_MEMORY, f"{limit} /dev/shm too)", words.tail)
    if pod.disrupted is not None:
        why = _GONE.get(pod.disrupted, f"it was ended from outside ({pod.disrupted})")
        return End(AGAIN if pod.exit_code is None else code, why, words.tail)
    if pod.end_reason in ("NodeLost", "NodeShutdown") or pod.phase == "Unknown":
        return End(code, "its node was lost", words.tail)
    if pod.exit_code is None:
        said = f": {short(pod.said)}" if pod.said else ""
        return End(code, f"{pod.end_reason or 'its pod failed'}{said}")
    return End(
        code, f"{_signal(code)}: {words.cause}" if words.cause else _signal(code), words.tail
    )


def is_killed_by_memory(pod: PodView) -> bool:
    """Whether the node ended all of a pod for its memory: it would end the same way again."""
    return pod.end_reason == "OOMKilled" and last_words(pod.said).exit_code is None


def _signal(code: int) -> str:
    names = {137: "killed (SIGKILL)", 139: "crashed (SIGSEGV)", 143: "ended (SIGTERM)"}
    return names.get(code, f"exit code {code}")


# ---------------------------------------------------------------------------------- helpers


def by_age(pods: Sequence[PodView]) -> list[PodView]:
    """The oldest first."""
    return sorted(pods, key=lambda pod: (pod.created, pod.started or 0.0, pod.name))


def _latest(notes: Sequence[Note], reasons: frozenset[str] | set[str]) -> Note | None:
    found = [note for note in notes if note.reason in reasons]
    return max(found, key=lambda note: note.at, default=None)
