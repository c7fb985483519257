"""Reduce an API object (Job, pod, event) to a small frozen view of the fields in use.

A Job is some 8 KB of JSON, and a sweep has 10,000 of them: only these views are kept in memory. The
input is plain dicts, and no request is made. What is missing in an object is missing in its view.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from datetime import datetime
from sys import intern
from typing import Any, Literal, NotRequired, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from stillhouse.errors import ContractError
from stillhouse.rundir import Json

STILLHOUSE = "stillhouse/"  # what our own labels and annotations begin with
ATTEMPTS = "stillhouse/attempts"  # annotation of a Job: how its earlier pods failed
BEFORE = "before"  # of an attempt there: it was one of the Job that this one replaced
ASKS = "stillhouse/asks"  # annotation of a Job: what of its site decides where it may start
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
PART_OF, OURS = "app.kubernetes.io/part-of", "stillhouse"
MAIN = "main"  # name of the container that does the work

JobState = Literal["live", "complete", "failed"]
STRICT = ConfigDict(strict=True)  # a view has the types that it says, whatever an object has
_STATES: dict[str, JobState] = {"": "live", "Complete": "complete", "Failed": "failed"}


@dataclass(frozen=True, slots=True, config=STRICT)
class JobView:
    """The fields of a Job in use. Times are seconds since the epoch, by the server's clock."""

    name: str
    uid: str
    kind: str  # prepare train eval drive collect; "" where it is not ours
    hash: str  # 40 hex digits of the hash of its content
    code: str  # digest of the code that it runs
    owner: str
    sweep: str
    state: JobState
    is_suspended: bool
    was_held: bool  # it ended while suspended
    is_deleting: bool
    created: float
    started: float | None  # when it was last started or resumed
    ended: float | None
    active: int
    ready: int  # pods whose containers run
    failed: int  # pods that counted as failed
    points: tuple[str, ...]  # ids
    baselines: tuple[str, ...]  # names of directories below runs/baselines
    scores: str | None  # what an evaluation's results are keyed by
    names: tuple[str, ...]  # what people call it
    queue: str | None
    priorities: tuple[str, ...]  # classes that it names: Kueue's, and that of its pods
    devices: int
    gpu: str | None
    end_reason: str | None  # of the condition that ended it
    end_message: str | None
    attempts: str | None  # the annotation, as it is
    asks: str | None  # what its site asks of the cluster (`manifest.asked`), as it was sent
    odd: str | None = None  # which of its annotations somebody made something else of

    @property
    def is_running(self) -> bool:
        return self.state == "live" and self.ready > 0


def told_attempts(job: JobView) -> list[Json]:
    """What earlier attempts of a Job left behind, the oldest first (`job_outcomes.attempt`)."""
    return _attempts(job.attempts) or []


@with_config(ConfigDict(strict=True, extra="allow"))
class _Attempt(TypedDict):
    """The fields of a recorded attempt that we rely on."""

    pod: str
    code: int
    cause: str
    ran: float
    start: float
    tail: NotRequired[str]
    done: NotRequired[str]
    failed: NotRequired[dict[str, tuple[int, str]]]


_ATTEMPTS: Any = TypeAdapter(list[_Attempt])


def _attempts(text: str | None) -> list[Json] | None:
    """The annotation's content; None where it cannot be read."""
    try:
        return cast("list[Json]", _ATTEMPTS.validate_json(text)) if text else []
    except ValidationError:
        return None


@dataclass(frozen=True, slots=True, config=STRICT)
class PodView:
    """A pod of a Job of ours."""

    name: str
    uid: str
    job: str  # the Job's name
    job_uid: str
    phase: str  # Pending Running Succeeded Failed Unknown
    created: float
    node: str | None
    unscheduled: str | None  # why no node has it yet
    waiting: str | None  # why its container does not run yet: a reason, as ErrImagePull
    waiting_message: str
    started: float | None  # when its container began
    finished: float | None
    exit_code: int | None
    end_reason: str | None  # of the container, or else of the pod: OOMKilled, Evicted
    said: str  # the container's termination message, or else what the pod's status says
    disrupted: str | None  # reason of the condition DisruptionTarget: it was no fault of its own
    is_deleting: bool
    is_silent: bool  # its node stopped answering: the other fields may be old
    is_orphan: bool  # no Job owns it: it goes on, and nobody would replace it
    point: str | None  # the id that it trains

    @property
    def is_over(self) -> bool:
        return self.phase in ("Succeeded", "Failed") or self.exit_code is not None


@dataclass(frozen=True, slots=True, config=STRICT)
class Note:
    """A warning event: something the cluster said about a Job or a pod."""

    kind: str
    name: str
    uid: str
    reason: str
    message: str
    at: float


@dataclass(frozen=True, slots=True, config=STRICT)
class LastWords:
    """What a pod of ours leaves when it ends: its termination message."""

    exit_code: int | None  # None: they are not of `pod.py`, but the end of its log
    cause: str | None
    tail: str | None  # the last lines that it printed
    # Of an evaluation: the rows that it has scored, and why it could not score others.
    done: tuple[str, ...] = ()
    failed: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])


View = TypeVar("View")


def short_of(error: Exception) -> str:
    """What is wrong, in a line: of several things the first one."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    return f"{type(error).__name__}: {error}"


def viewed(view: Callable[[Json], View], item: Json) -> View:
    """What `view` makes of an object as the API tells it.

    Raises:
        ContractError: it has not the form that an object of its kind has.
    """
    try:
        return view(item)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        meta: Any = item.get("metadata")
        name = cast("Json", meta).get("name") if isinstance(meta, dict) else None
        said = short_of(error)
        what = {"job_view": "Job", "pod_view": "pod", "note": "event"}.get(view.__name__, "object")
        raise ContractError(
            f"{what} {name or '(without a name)'}: not of the form that one has ({said});"
            " look at it with `kubectl get -o yaml`"
        ) from error


def job_view(job: Json) -> JobView:
    """The facts of a Job."""
    meta, spec, status = job["metadata"], job.get("spec", {}), job.get("status", {})
    labels: Mapping[str, str] = meta.get("labels") or {}
    notes: Mapping[str, str] = meta.get("annotations") or {}
    told, odd = _told(notes)
    end = _end(status) or {}
    point = labels.get(STILLHOUSE + "point")
    return JobView(
        name=meta["name"],
        uid=meta["uid"],
        kind=intern(labels.get(STILLHOUSE + "kind", "")),
        hash=labels.get(STILLHOUSE + "hash", ""),
        code=intern(labels.get(STILLHOUSE + "code", "")),
        owner=intern(labels.get(STILLHOUSE + "owner", "")),
        sweep=intern(labels.get(STILLHOUSE + "sweep", "")),
        state=_STATES[end.get("type", "")],
        is_suspended=bool(spec.get("suspend")),
        was_held=conditions_of(status).get("Suspended", {}).get("status") == "True",
        is_deleting="deletionTimestamp" in meta,
        created=seconds(meta.get("creationTimestamp")) or 0.0,
        started=seconds(status.get("startTime")),
        ended=seconds(end.get("lastTransitionTime")),
        active=status.get("active") or 0,
        ready=status.get("ready") or 0,
        failed=status.get("failed") or 0,
        points=(intern(point),) if point else _comma(told["points"]),
        baselines=_comma(told["baselines"]),
        scores=_interned(told["scores"]),
        names=_words(told["names"]),
        queue=_interned(labels.get(QUEUE_LABEL)),
        priorities=tuple(map(intern, filter(None, _priorities(labels, spec)))),
        devices=int(told["devices"] or 0),
        gpu=_interned(notes.get(STILLHOUSE + "gpu-product")),
        end_reason=_interned(end.get("reason")),
        end_message=end.get("message"),
        asks=_interned(notes.get(ASKS)),
        attempts=told["attempts"],
        odd=_odd(meta["name"], odd),
    )


def _is_words(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True


_ID = r"[0-9a-f]{10,}"
_FORMS: dict[str, Callable[[str], object]] = {  # of our annotations, where they have one
    "points": re.compile(rf"{_ID}(,{_ID})*").fullmatch,
    "baselines": re.compile(rf"[a-z0-9-]+-{_ID}(,[a-z0-9-]+-{_ID})*").fullmatch,
    "scores": re.compile(r"[0-9a-f]+").fullmatch,
    "names": _is_words,
    "devices": re.compile(r"[0-9]{1,6}").fullmatch,
    "attempts": lambda text: _attempts(text) is not None,
}


def _told(notes: Mapping[str, str]) -> tuple[dict[str, str | None], list[str]]:
    """Our annotations of a Job; and the names of those that are not what we write."""
    said = {name: notes.get(STILLHOUSE + name) for name in _FORMS}
    odd = [name for name, text in said.items() if text and not _FORMS[name](text)]
    return said | dict.fromkeys(odd), odd


def _odd(job: str, names: Sequence[str]) -> str | None:
    if not names:
        return None
    which = " and ".join(f"{STILLHOUSE}{name}" for name in names)
    off = " ".join(f"{STILLHOUSE}{name}-" for name in names)
    return (
        f"Job {job}: annotation {which}: not what we write there; `kubectl annotate job {job}"
        f" {off}` takes it off"
    )


def _priorities(labels: Mapping[str, str], spec: Json) -> tuple[str | None, str | None]:
    pod: Json = spec.get("template", {}).get("spec") or {}
    return labels.get(PRIORITY_LABEL), pod.get("priorityClassName")


def _end(status: Json) -> Json | None:
    """The condition that ended a Job. (FailureTarget and SuccessCriteriaMet only foretell one.)"""
    for condition in status.get("conditions") or ():
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return cast("Json", condition)
    return None


def pod_view(pod: Json) -> PodView:
    """The facts of a pod."""
    meta, spec, status = pod["metadata"], pod.get("spec", {}), pod.get("status", {})
    labels: Mapping[str, str] = meta.get("labels") or {}
    conditions = conditions_of(status)
    scheduled, disruption = (
        conditions.get("PodScheduled", {}),
        conditions.get("DisruptionTarget", {}),
    )
    containers: list[Json] = [*(status.get("initContainerStatuses") or ())]
    containers += status.get("containerStatuses") or ()
    states: dict[str, dict[str, Json]] = {c["name"]: c.get("state") or {} for c in containers}
    waits = [state["waiting"] for state in states.values() if "waiting" in state]
    waiting: Json = waits[0] if waits else {}
    main = states.get(MAIN, {})
    ended, running = main.get("terminated", {}), main.get("running", {})
    return PodView(
        name=meta["name"],
        uid=meta["uid"],
        job=labels.get("batch.kubernetes.io/job-name") or labels.get("job-name", ""),
        job_uid=labels.get("batch.kubernetes.io/controller-uid")
        or labels.get("controller-uid", ""),
        phase=intern(status.get("phase", "Pending")),
        created=seconds(meta.get("creationTimestamp")) or 0.0,
        node=_interned(spec.get("nodeName")),
        unscheduled=scheduled.get("message") or scheduled.get("reason")
        if scheduled.get("status") == "False"
        else None,
        waiting=_interned(waiting.get("reason")),
        waiting_message=waiting.get("message", ""),
        started=seconds(ended.get("startedAt") or running.get("startedAt")),
        finished=seconds(ended.get("finishedAt")),
        exit_code=ended.get("exitCode"),
        end_reason=_interned(ended.get("reason") or status.get("reason")),
        said=ended.get("message") or status.get("message", ""),
        disrupted=disruption.get("reason") if disruption.get("status") == "True" else None,
        is_deleting="deletionTimestamp" in meta,
        is_silent=_is_silent(conditions),
        is_orphan=not any(owner.get("controller") for owner in meta.get("ownerReferences") or ()),
        point=_interned(labels.get(STILLHOUSE + "point")),
    )


def _is_silent(conditions: Mapping[str, Json]) -> bool:
    """Whether the node controller, and not the kubelet, said that a pod is not ready.

    It sets Ready alone: the kubelet would say ContainersReady with it.
    """
    ready, containers = (conditions.get(type_, {}) for type_ in ("Ready", "ContainersReady"))
    if ready.get("status") != "False" or ready.get("reason") == "ReadinessGatesNotReady":
        return False
    return ready.get("reason") == "NodeNotReady" or containers.get("status") == "True"


def conditions_of(status: Json) -> dict[str, Json]:
    """An object's conditions, by their type."""
    return {c["type"]: c for c in status.get("conditions") or ()}


def note(event: Json) -> Note:
    """What an event says."""
    about: Json = event.get("involvedObject") or {}
    series: Json = event.get("series") or {}
    last = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return Note(
        kind=about.get("kind", ""),
        name=about.get("name", ""),
        uid=about.get("uid", ""),
        reason=event.get("reason", ""),
        message=event.get("message", ""),
        at=seconds(last) or seconds(event["metadata"].get("creationTimestamp")) or 0.0,
    )


def notes(events: Iterable[Json]) -> Iterator[Note]:
    """What events say; one that has not the form of an event says nothing."""
    for event in events:
        with contextlib.suppress(ContractError):
            yield viewed(note, event)


def last_words(said: str) -> LastWords:
    """A termination message as our pods write it; or the end of a log, where they could not."""
    told = _told_in(said) if said.startswith("{") else None
    if told is None:
        lines = said.strip().splitlines()
        return LastWords(None, lines[-1].strip() if lines else None, said.strip() or None)
    return told


def _told_in(said: str) -> LastWords | None:
    """What our pods' JSON says; None where it is something else."""
    with contextlib.suppress(ValueError, TypeError, RecursionError, AttributeError):
        try:
            words: Any = json.loads(said)
        except json.JSONDecodeError:  # cut by whoever passed it on
            code = re.search(r'"exit_code": *(\d+)', said)
            cause = re.search(r'"cause": *("(?:[^"\\]|\\.)*")', said)
            if code is None or cause is None:
                return None
            words = {"exit_code": int(code[1]), "cause": json.loads(cause[1])}
        code, cause, tail = words.get("exit_code"), words.get("cause"), words.get("tail")
        return LastWords(code, cause, tail or None, *rows_told(words))
    return None


def rows_told(words: Json) -> tuple[tuple[str, ...], dict[str, tuple[int, str]]]:
    """The rows that an evaluation has scored, and those it could not, in a pod's words."""
    failed = {row: (code, cause) for row, (code, cause) in words.get("failed", {}).items()}
    return _comma(words.get("done")), failed


def seconds(time: str | None) -> float | None:
    """A time as the API writes it, in seconds since the epoch."""
    return datetime.fromisoformat(time).timestamp() if time else None


def _interned(text: str | None) -> str | None:
    return intern(text) if text else None


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(shlex.split(text)) if text else ()


def _comma(text: str | None) -> tuple[str, ...]:
    return tuple(map(intern, text.split(","))) if text else ()
