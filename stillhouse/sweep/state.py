"""Decide the state of a point: what done, failed, stopped, drifted or unreadable means.

Pure. `snapshot` finds the facts in run directories, `cluster.facts` in Jobs and the ledger.

    new       nobody ever started it          failed    exit code 42, 43, 44, or too many deaths
    waiting   may start, or start again;      stopped   exit code 46: a watch rule ended it
              or its Job waits                drifted   begun, untrained, by other code than ours;
    running   a process or a pod has it                 or, trained or not, over other weights or
    done      trained, and every task that              rows than are here now
              was requested is scored         unreadable   what tells its state is torn or
                                                        malformed: it is named, others go on

A trained point whose scores were made of other weights, or by another lm-eval, waits to be scored
again: scoring is cheap, and the new score says what it replaced.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from stillhouse.errors import STOPPED
from stillhouse.rundir import Json

State = Literal[
    "new", "waiting", "running", "done", "failed", "stopped", "drifted", "unreadable"
]  # fmt: skip
STATES: tuple[State, ...] = (
    "done", "running", "waiting", "new", "drifted", "failed", "stopped", "unreadable",
)  # fmt: skip
FAILED: tuple[State, ...] = ("failed", "stopped")  # until `retry`


@dataclass(frozen=True)
class Observation:
    """What is known about a point."""

    state: State
    cause: str | None = None  # why it is not done, where there is a reason
    step: int = 0  # completed optimizer steps, as status.json last said
    max_steps: int | None = None
    exit_code: int | None = None
    pid: int | None = None  # of the process that has it, while it is running
    is_trained: bool = False
    # When we saw that somebody stopped it, by our clock; None where it was so when we came.
    asked_to_stop: float | None = None
    stop_mark: float | None = None  # changes with each stop: a time, by the clock of who wrote it
    warnings: tuple[str, ...] = ()  # what its watch rules found, a line each
    # What it, or a score of it, rests on and is another here now; a sentence each.
    rests_on_other: tuple[str, ...] = ()

    @property
    def must_begin_anew(self) -> bool:
        """Whether what was trained here is of other weights or rows than are here now."""
        return self.state == "drifted" and bool(self.rests_on_other)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a point or a baseline; once it is trained, of its scores."""

    is_trained: bool = False
    is_done: bool = False  # trained, and every task that was requested is scored
    is_running: bool = False  # a process or a pod has it
    is_begun: bool = False
    is_over: bool = False  # it ended, and is not tried again by itself
    exit_code: int | None = None  # of its last attempt
    cause: str | None = None  # why it is not done
    unreadable: str | None = None  # what is wrong with what tells its state
    drift: tuple[str, ...] = ()  # what it rests on and is another here now
    other_code: str | None = None  # by which code it was begun, where ours would go on with it
    asked_to_stop: float | None = None
    stop_mark: float | None = None


def judge(facts: Facts) -> Observation:
    """The state that follows, and why."""
    state = _state(facts)
    causes = {
        "done": None,
        "unreadable": facts.unreadable,
        "drifted": "; ".join(facts.drift) or facts.other_code,
    }
    return Observation(
        state,
        causes.get(state, facts.cause),
        exit_code=facts.exit_code,
        is_trained=facts.is_trained,
        asked_to_stop=facts.asked_to_stop if state == "waiting" else None,
        stop_mark=facts.stop_mark if state == "waiting" else None,
        rests_on_other=facts.drift if state == "drifted" else (),
    )


def _state(facts: Facts) -> State:
    """The first that applies."""
    if facts.is_done and not facts.drift:
        return "done"
    if facts.unreadable is not None:
        return "unreadable"
    if facts.is_running:
        return "running"
    if facts.is_over:
        return "stopped" if facts.exit_code == STOPPED else "failed"
    if facts.drift or facts.other_code is not None:
        return "drifted"
    return "waiting" if facts.is_begun else "new"


# ------------------------------------------------------------------------------- how a task ended


CAUSE, TAIL = 1500, 1000  # characters that a record keeps
RecordState = Literal["done", "failed", "stopped", "cancelled", "alone", "unreadable"]


@dataclass(frozen=True, slots=True)
class Record:
    """How a task ended. Times in seconds, `at` since the epoch."""

    # alone: an earlier version said so of each member of an evaluation that failed: not scored yet.
    # unreadable: somebody edited it; `cause` says what is wrong.
    state: RecordState
    code: int = 0
    cause: str | None = None
    tail: str | None = None  # the last lines that it printed
    at: float = 0.0
    queued: float = 0.0
    starting: float = 0.0
    running: float = 0.0
    lost: float = 0.0  # of attempts that did not end it
    devices: int = 0
    gpu: str | None = None

    def to_json(self) -> str:
        short: Json = {"state": self.state, "code": self.code, "at": round(self.at, 1)}
        times = {"q": self.queued, "s": self.starting, "r": self.running, "l": self.lost}
        short |= {key: round(value, 1) for key, value in times.items() if value}
        rest = {"cause": (self.cause or "")[:CAUSE], "tail": (self.tail or "")[-TAIL:]}
        rest |= {"n": self.devices, "gpu": self.gpu}
        short |= {key: value for key, value in rest.items() if value}
        return json.dumps(short, separators=(",", ":"))

    def bare(self) -> Record:
        """The same without words and times: what is left where room is short."""
        return Record(self.state, self.code, at=self.at)


@checked_dataclass(frozen=True, config=ConfigDict(extra="ignore", strict=True))
class _Written:
    """A record in the ledger's short words."""

    state: Literal["done", "failed", "stopped", "cancelled", "alone"]
    code: int
    at: float
    cause: str | None = None
    tail: str | None = None
    q: float = 0.0
    s: float = 0.0
    r: float = 0.0
    l: float = 0.0  # noqa: E741
    n: int = 0
    gpu: str | None = None

    def record(self) -> Record:
        return Record(
            state=self.state,
            code=self.code,
            cause=self.cause,
            tail=self.tail,
            at=self.at,
            queued=self.q,
            starting=self.s,
            running=self.r,
            lost=self.l,
            devices=self.n,
            gpu=self.gpu,
        )


_WRITTEN = TypeAdapter(_Written)


@functools.lru_cache(maxsize=50_000)
def record_of(text: str) -> Record:
    """A record as it was written; an unreadable one, where somebody made something else of it."""
    try:
        return _WRITTEN.validate_json(text).record()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        why = first["msg"][0].lower() + first["msg"][1:]
        return Record("unreadable", cause=f"{where}: {why}" if where else why)
