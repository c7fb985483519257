"""Find the facts that decide a point's state (`state`) in its Jobs and its ledger record. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.sweep.cluster.jobspec import JobSpec
from stillhouse.sweep.cluster.ledger import prepare_of, score_of
from stillhouse.sweep.cluster.objects import JobView, PodView
from stillhouse.sweep.cluster.reasons import End, Reason, is_lost, why_orphan
from stillhouse.sweep.state import FAILED, Facts, Observation, Record, judge

DELETED = "its Job was deleted"


@dataclass(frozen=True, slots=True)
class JobFacts:
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


def observed(known: JobFacts, code: str | None = None) -> Observation:
    """The state that follows; where a Job waits to run other code than `code`, it is drifted."""
    return judge(_facts(known, code))


def _facts(known: JobFacts, code: str | None) -> Facts:
    """What counts of it: done > at work or waiting in the cluster > failed there > the ledger."""
    job, record, is_trained = known.live, known.record, known.is_trained
    if known.is_done:
        return Facts(is_trained, is_done=True)
    if job is not None:
        waits = known.waits.words if known.waits else None
        is_other = code is not None and job.code != code and waits is not None
        differs = f"its Job waits with code {job.code}, this is {code}"
        return Facts(
            is_trained,
            is_running=waits is None,
            is_begun=True,
            cause=waits,
            unreadable=job.odd,
            other_code=differs if is_other and not job.is_deleting else None,
        )
    if known.orphan is not None:
        is_at_work = known.orphan.phase == "Running" and not is_lost(known.orphan)
        cause = why_orphan(known.orphan)
        return Facts(is_trained, is_running=is_at_work, is_begun=True, cause=cause)
    if known.failed is not None:
        end = known.failed
        return Facts(is_trained, is_over=True, exit_code=end.code, cause=end.cause)
    if record is not None and record.state == "unreadable":
        return Facts(is_trained, unreadable=record.cause or "unreadable")
    if record is not None and record.state in FAILED:
        return Facts(is_trained, is_over=True, exit_code=record.code, cause=record.cause)
    stopped = [at for at in (known.cancelled_at, known.deleted_at) if at is not None]
    if stopped or (record is not None and record.state == "cancelled"):
        cause = (record.cause or "cancelled") if record is not None else DELETED
        at = max(stopped, default=None)
        return Facts(is_trained, is_begun=True, cause=cause, asked_to_stop=at)
    cause = "trained, to be scored" if is_trained else None
    return Facts(is_trained, is_begun=is_trained, cause=cause)


def keys_of(job: JobView | JobSpec) -> tuple[str, ...]:
    """The ledger keys of the tasks that a Job carries out, or will."""
    if job.kind == "train":
        return job.points
    if job.kind == "eval" and job.scores is not None:
        return tuple(score_of(what, job.scores) for what in (*job.points, *job.baselines))
    if job.kind == "prepare":
        return (prepare_of(job.name.rpartition("-")[2]),)
    return ()
