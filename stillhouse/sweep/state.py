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

from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import STOPPED

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
