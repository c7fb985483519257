"""Derive the state of a point on a cluster from its Jobs and its ledger record.

Pure. The first that applies: done > at work or waiting in the cluster > failed there > what the
ledger says > new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stillhouse.errors import STOPPED
from stillhouse.sweep.cluster.ledger import prepare_of, score_of
from stillhouse.sweep.cluster.objects import JobView, PodView
from stillhouse.sweep.cluster.reasons import End, Reason, is_lost, why_orphan
from stillhouse.sweep.outcome import Record
from stillhouse.sweep.plan import Observation, State

DELETED = "its Job was deleted"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about one point, or one baseline."""

    is_trained: bool = False
    is_done: bool = False
    live: JobView | None = None  # the unfinished Job that is about it
    orphan: PodView | None = None  # a pod that trains it and whose Job somebody deleted
    waits: Reason | None = None  # why that Job does not run; None: it does
    failed: End | None = None  # how its Job failed, where the ledger does not say it yet
    record: Record | None = None  # the ledger on what it still lacks: training, or scores
    deleted_at: float | None = None  # when we saw its unfinished Job vanish
    cancelled_at: float | None = None  # when we saw the ledger say so


def judge(facts: Facts, code: str | None = None) -> Observation:
    """The state that follows; where a Job waits to run other code than `code`, it is drifted."""
    state, cause, more = _judged(facts, code)
    return Observation(state, cause, is_trained=facts.is_trained, **more)


def _judged(facts: Facts, code: str | None) -> tuple[State, str | None, dict[str, Any]]:
    job, record = facts.live, facts.record
    if facts.is_done:
        return "done", None, {}
    if job is not None and job.odd is not None:
        return "unreadable", job.odd, {}
    if job is not None:
        if facts.waits is None:
            return "running", None, {}
        if code is not None and job.code != code and not job.is_deleting:
            return "drifted", f"its Job waits with code {job.code}, this is {code}", {}
        return "waiting", facts.waits.words, {}
    if facts.orphan is not None:
        is_at_work = facts.orphan.phase == "Running" and not is_lost(facts.orphan)
        return "running" if is_at_work else "waiting", why_orphan(facts.orphan), {}
    if facts.failed is not None:
        return _ended(facts.failed.code, facts.failed.cause)
    if record is not None and record.state == "unreadable":
        return "unreadable", record.cause, {}
    if record is not None and record.state in ("failed", "stopped"):
        return _ended(record.code, record.cause)
    stopped = [at for at in (facts.cancelled_at, facts.deleted_at) if at is not None]
    if stopped or (record is not None and record.state == "cancelled"):
        cause = (record.cause or "cancelled") if record is not None else DELETED
        return "waiting", cause, {"asked_to_stop": max(stopped, default=None)}
    return ("waiting", "trained, to be scored", {}) if facts.is_trained else ("new", None, {})


def _ended(code: int, cause: str | None) -> tuple[State, str | None, dict[str, Any]]:
    return "stopped" if code == STOPPED else "failed", cause, {"exit_code": code}


def keys_of(job: JobView) -> tuple[str, ...]:
    """The ledger keys of the tasks that a Job carries out."""
    if job.kind == "train":
        return job.points
    if job.kind == "eval" and job.scores is not None:
        return tuple(score_of(what, job.scores) for what in (*job.points, *job.baselines))
    if job.kind == "prepare":
        return (prepare_of(job.name.rpartition("-")[2]),)
    return ()
