"""Turn the end of a Job, and of each of its attempts, into the record that is kept.

Pure. A record says how a task ended and where its time went; it outlives the Job (`ledger`). What
is left of a failed attempt is kept on the Job, as long as the Job goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stillhouse.errors import AGAIN, DONE, STOPPED
from stillhouse.rundir import Json
from stillhouse.sweep.cluster.cache import NamespaceCache, is_told
from stillhouse.sweep.cluster.facts import keys_of
from stillhouse.sweep.cluster.ledger import score_of
from stillhouse.sweep.cluster.objects import ATTEMPTS, JobView, PodView
from stillhouse.sweep.cluster.objects import told_attempts as attempts
from stillhouse.sweep.cluster.reasons import End, by_age, end_of_pod
from stillhouse.sweep.cluster.refusals import SHORT, short
from stillhouse.sweep.state import Record

KEPT_ATTEMPTS = 5  # on a Job; its annotations may hold 256 KiB in all
SAVED = (DONE, AGAIN)  # codes of attempts whose time was not lost


@dataclass(frozen=True)
class Times:
    """Where the seconds between a Job's creation and its end went."""

    queued: float
    starting: float
    running: float
    lost: float

    def over(self, parts: int) -> Times:
        """One of so many equal parts of it."""
        times = (self.queued, self.starting, self.running, self.lost)
        return Times(*(time / parts for time in times))


def attempt(pod: PodView) -> Json:
    """What a failed attempt leaves behind: how it ended, and the time that it took."""
    end = end_of_pod(pod)
    left: Json = {"pod": pod.name, "code": end.code, "cause": short(end.cause)}
    if end.tail:
        left["tail"] = end.tail[-SHORT:]
    left |= {"done": ",".join(end.done)} if end.done else {}
    left |= {"failed": dict(end.failed)} if end.failed else {}
    return left | {"ran": round(_ran(pod), 1), "start": round(_start(pod), 1)}


def attempts_patch(job: JobView, pods: Sequence[PodView]) -> Json | None:
    """The patch that records failed pods on a live Job, before they are gone; None: none new."""
    told = attempts(job)
    known = {one["pod"] for one in told}
    new = [attempt(pod) for pod in by_age(pods) if _has_failed(pod) and pod.name not in known]
    if not new:
        return None
    kept = json.dumps([*told, *new][-KEPT_ATTEMPTS:], separators=(",", ":"))
    return {"metadata": {"annotations": {ATTEMPTS: kept}}}


def _has_failed(pod: PodView) -> bool:
    return pod.phase == "Failed" or pod.exit_code not in (None, 0)


def _ran(pod: PodView) -> float:
    return max(0.0, pod.finished - pod.started) if pod.started and pod.finished else 0.0


def _start(pod: PodView) -> float:
    return max(0.0, pod.started - pod.created) if pod.started else 0.0


def times_of(job: JobView, pods: Sequence[PodView], until: float) -> Times:
    """Where a Job's time went, up to its end or else to `until`.

    Lost is the time of attempts that failed and were followed by another. The time that was neither
    lost nor spent on starting or running counts as queued.
    """
    here = {pod.name: (end_of_pod(pod).code, _ran(pod), _start(pod)) for pod in _ended(pods)}
    told = {one["pod"]: (one["code"], one["ran"], one["start"]) for one in attempts(job)}
    each = list((told | here).values())
    end = job.ended or until
    lost = sum(ran for code, ran, _ in each[:-1] if code not in SAVED)
    running = sum(ran for code, ran, _ in each[:-1] if code in SAVED)
    running += each[-1][1] if each else 0.0
    starting = sum(start for _, _, start in each)
    if job.state == "complete" and not (each and each[-1][0] == DONE):
        # The pod that did it was gone before we looked: it had the rest of the time.
        lost += each[-1][1] if each and each[-1][0] not in SAVED else 0.0
        running -= each[-1][1] if each and each[-1][0] not in SAVED else 0.0
        running += max(0.0, end - (job.started or end) - lost - running - starting)
    return Times(max(0.0, end - job.created - lost - running - starting), starting, running, lost)


def _ended(pods: Sequence[PodView]) -> list[PodView]:
    return [pod for pod in by_age(pods) if pod.is_over]


def records_of(
    job: JobView, cache: NamespaceCache, now: float, end: End | None = None
) -> dict[str, Record]:
    """What the ledger is to say of a Job that ended; `end`: how, where it was not by itself.

    Only of what is not known to be done: an evaluation takes points along that are scored already.
    Nothing of what it left open, when one of its members ended it: that is scored by another.
    """
    if end is None and job.state == "failed":
        end = cache.how(job)
    keys = [key for key in keys_of(job) if not cache.is_done(key)]
    ends = dict.fromkeys(keys, end)
    if job.kind == "eval" and end is not None:
        members = cache.wanting(job)
        found = {what: end.of(what, members) for what in members}
        known = {what: one for what, one in found.items() if one or what in end.done}
        ends = {score_of(what, job.scores or ""): one for what, one in known.items()}
    if not ends:
        return {}
    times = times_of(job, cache.pods_of(job), now).over(len(ends))
    record = Record(
        "done",
        at=job.ended or now,
        devices=job.devices,
        gpu=job.gpu,
        **vars(times),
    )
    # Who comes later may find no pod to ask any more: what was said of this end is not said anew.
    return {
        key: _ended_so(record, one)
        for key, one in ends.items()
        if not is_told(cache.ledger.get(key), job)
    }


def _ended_so(record: Record, end: End | None) -> Record:
    """The record of a success, with how it ended instead; None: it was one."""
    if end is None:
        return record
    state = "stopped" if end.code == STOPPED else "failed"
    return replace(record, state=state, code=end.code, cause=end.cause, tail=end.tail)
