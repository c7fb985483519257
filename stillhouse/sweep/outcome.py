"""Record how a task ended, in a form that fits into one value of a ConfigMap."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from stillhouse.rundir import Json

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
