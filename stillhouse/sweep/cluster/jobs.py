"""Run tasks as Kubernetes Jobs, and record how each ended before its Job is deleted.

    start ──► created once (`create`) ──► Job ──► it ends ──► ledger ──► (a while) ──► deleted

Any number of drivers do this at once, and each may die at any moment: they read all their state
from the cluster. The cluster retries what infrastructure broke, and stops what would fail again.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import AGAIN, CANNOT_START, DONE
from stillhouse.identity import suite_key
from stillhouse.rundir import Json
from stillhouse.sweep.backend import Finished, Task
from stillhouse.sweep.cluster.cache import ENDED, KEPT_PODS, baselines_seen
from stillhouse.sweep.cluster.code_bundle import bundle
from stillhouse.sweep.cluster.create import KEEP_S, JobCreator, JobOwner, Made, Order, Work
from stillhouse.sweep.cluster.facts import DELETED, keys_of
from stillhouse.sweep.cluster.job_outcomes import attempts_patch, records_of
from stillhouse.sweep.cluster.jobspec import JobSpecs
from stillhouse.sweep.cluster.ledger import prepare_of, score_of, sweeps
from stillhouse.sweep.cluster.objects import ATTEMPTS, JobView, PodView
from stillhouse.sweep.cluster.reasons import (
    End,
    by_age,
    end_of_pod,
    is_killed_by_memory,
    scored_rows,
    why_orphan,
)
from stillhouse.sweep.cluster.refusals import why_not_made
from stillhouse.sweep.cluster.replace import carried_attempts, is_better_made_anew, of_other_site
from stillhouse.sweep.cluster.watch import Watcher
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Baseline, Sweep
from stillhouse.sweep.snapshot import Snapshot
from stillhouse.sweep.state import Observation, Record

WRITERS = 16  # requests at once; more do not make an API server quicker
LEFT_S = 300  # what a driver leaves behind is deleted so long after its end, by the cluster
CANCEL_S = 10.0  # how often it is asked whether somebody cancelled the sweep
BLOCKED_S = 5.0  # how soon a Job is tried again whose name or quota is taken
RETRY_S = 20.0  # how often it is asked whether somebody wants what failed to be tried again
PACE_S = 0.5  # between two turns over a large sweep: each plans all of its points anew
WRITE_S = 5.0  # how long ends of a large sweep are gathered: each write rewrites a whole ConfigMap
LARGE = 200  # points
PARTING_S = 30.0  # for the last requests of a driver that ends
QUICKER = "another driver was quicker"


@dataclass(frozen=True)
class _Ended:
    """A Job that ended, or that is to be ended now."""

    job: JobView
    end: End | None  # None: complete
    is_to_go: bool  # delete it now: it would go on, or hold its slot for nothing


class JobExecutor:
    """The Jobs of one sweep's points. From one thread; `close` it in the end."""

    has_fixed_packs = True

    def __init__(self, sweep: Sweep, watcher: Watcher) -> None:
        """`watcher`: what it has listed of the namespace is not listed again."""
        self.sweep, self.site = sweep, sweep.site
        self.watcher, self.cluster = watcher, watcher.cluster
        self.scores = suite_key(sweep.suite) if sweep.suite else None
        self.code = bundle(sweep.suite)
        self.cache, self.ledger = watcher.cache, watcher.ledger
        self.cache.code = self.code.digest
        self.creator = JobCreator(self.site, self.cluster, self.ledger, self.code)
        self.steps = JobSpecs(sweep)
        self.keep_s, self.retry_s, self.blocked_s = KEEP_S, RETRY_S, BLOCKED_S
        self.write_s = WRITE_S if len(sweep.points) > LARGE else 0.0
        self.job_owner = JobOwner(sweep, self.steps)
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="jobs")
        self._live: dict[str, Work] = {}  # name of the Job -> what it does
        self._settled: set[str] = set()  # uids of Jobs whose ends are in the ledger
        self._stuck: dict[str, tuple[str, float]] = {}  # uid of a Job that cannot start -> since
        self._blocked: dict[str, str] = {}  # name of a Job -> why it is not made yet
        self._carried: dict[str, str] = {}  # name of a Job that is made anew -> its attempts
        self._told: dict[str, Json] = {}  # uid -> what was last written about its attempts
        self._unwritten: dict[str, Record] = {}  # ends that the ledger does not say yet
        self._ended: list[JobView] = []  # the Jobs that they are of: they stay until then
        self._written_at = 0.0
        self._to_delete: deque[tuple[float, JobView]] = deque()
        self._errands: list[Future[Any]] = []
        self._changed: set[str] = set()
        self._is_stopping = False
        self._first_mark = self._mark = self._cancel_mark()
        self._asked_at, self._must_ask = time.monotonic(), False
        self._turned_at, self._reread_at = 0.0, time.monotonic()
        self.watcher.follow()
        # Only these are made anew where another site sent them: two launchers do not take turns.
        self._there_before = {job.uid for job in self.cache.jobs() if job.state == "live"}
        self._turn()

    # --------------------------------------------------------------- how the points stand

    @property
    def connection_error(self) -> str:
        return self.cluster.trouble

    def snapshot(self) -> Snapshot:
        """How points, baselines and pairs stand, as the cluster last told us."""
        observations = {id_: self.look(id_) for id_ in self.sweep.by_id}
        return Snapshot(observations, self.baselines(), prepared=self._prepared())

    def look(self, id_: str) -> Observation:
        """The state of one point, as the cluster last told us."""
        return self.cache.look(id_, self.scores)

    def changed(self) -> set[str]:
        """The points about which we were told something since this was last asked."""
        changed, self._changed = self._changed, set()
        return changed

    def baselines(self) -> tuple[Baseline, ...]:
        """The rows that no run trains."""
        return baselines_seen(self.cache, self.sweep)

    def _prepared(self) -> dict[str, bool]:
        """The groups whose pair is in the cache. A Job that failed at it before is tried again."""
        found: dict[str, bool] = {}
        for name, group in self.job_owner.prepares.items():
            job = self.cache.job(name)
            is_complete = job is not None and job.state == "complete"
            if is_complete or self.cache.is_done(prepare_of(name.rpartition("-")[2])):
                found[group] = True
        return found

    def is_cancelled(self) -> bool:
        """Whether somebody cancelled the sweep since this was made."""
        if self._must_ask or time.monotonic() - self._asked_at >= CANCEL_S:
            self._mark, self._must_ask = self._cancel_mark(), False
            self._asked_at = time.monotonic()
        return self._mark != self._first_mark

    def _cancel_mark(self) -> str | None:
        return next((mark.cancelled for mark in sweeps(self.cluster, self.sweep.name)), None)

    def live(self) -> list[Action]:
        """What is at work or waits in the cluster, whoever sent it."""
        return [] if self._is_stopping else [work.action for work in self._live.values()]

    def waits(self) -> dict[Action, str]:
        """Why Jobs do not run, or are not created, where no point's state says it."""
        said = {work.action: self._why(work) for work in self._live.values()}
        return {action: why for action, why in said.items() if why is not None}

    def _why(self, work: Work) -> str | None:
        job = self.cache.job(work.name)
        if work.name in self._blocked:
            return self._blocked[work.name]
        if job is None or job.uid != work.uid or job.is_running:
            return None
        reason, other = self.cache.why(job), of_other_site(job, self.site)
        if reason is None or (job.kind == "train" and not other):
            return None  # it runs, or its point says it
        return f"{reason.words} (it was sent from another site: {other})" if other else reason.words

    # ----------------------------------------------------------------------------- starting

    def start(self, task: Task) -> None:
        """Have a Job made for a task; returns at once."""
        work = self._work(task.action)
        self._live[work.name] = work
        self.creator.send_code()
        self._submit(work)

    def _work(self, action: Action) -> Work:
        step = self.steps.of(action)
        keys = keys_of(step)
        order = self.creator.order(step, keys)
        return Work(action, step.name, keys, order, replaced=order.replaced)

    def _submit(self, work: Work) -> None:
        orphan = self.cache.orphan(work.name)
        if orphan is not None:
            self._block(work, why_orphan(orphan))
            return
        assert work.order is not None, "what has no Job yet was ordered here"
        work.making = self._pool.submit(self.creator.make, work.order)
        work.making.add_done_callback(lambda _: self.cache.touch(work.name))

    def _block(self, work: Work, why: str) -> None:
        """Make its Job later."""
        self._blocked[work.name] = why
        work.again_at = time.monotonic() + self.blocked_s

    # ------------------------------------------------------------------------------ waiting

    def wait(self, timeout_s: float) -> list[Finished]:
        """The tasks that ended, as soon as one does; none when the time is over."""
        if self._is_stopping:
            return []
        if len(self.sweep.points) > LARGE:
            time.sleep(max(0.0, self._turned_at + PACE_S - time.monotonic()))
        self.watcher.wait(timeout_s)
        return self._turn()

    def _turn(self) -> list[Finished]:
        """Process all news: record ends, delete what is due, and return the tasks that ended."""
        self._turned_at = time.monotonic()
        touched = self.cache.touched()
        self._changed |= {id_ for ids in touched.values() for id_ in ids} & self.sweep.by_id.keys()
        names = touched.keys() | {name for name, _ in self._stuck.values()}
        self._run_errands()
        self._reread_failures()
        finished = self._take_made()
        ended: list[_Ended] = []
        for name in names:
            ended += self._look_at(name, finished)
        self._try_again()
        for one in ended:
            self._keep(one)
            work = self._live.get(one.job.name)
            if work is not None and work.uid == one.job.uid:
                del self._live[one.job.name]
                code, cause = (one.end.code, one.end.cause) if one.end else (DONE, None)
                finished.append(Finished(work.action, code, cause, _took(one.job)))
        if time.monotonic() - self._written_at >= self.write_s:
            self._write()
        return finished

    def _take_made(self) -> list[Finished]:
        """What became of the Jobs that were being made."""
        finished: list[Finished] = []
        for work in [w for w in self._live.values() if w.making is not None]:
            if work.making is None or not work.making.done():
                continue
            made, work.making = work.making.result(), None
            if made.blocked_by is not None:
                self._block(work, why_not_made(made.blocked_by))
                continue
            self._blocked.pop(work.name, None)
            attempts = self._carried.pop(work.name, None)
            if made.uid is None:
                del self._live[work.name]
                finished.append(self._told_by_ledger(work, QUICKER))
            else:
                work.uid, work.order = made.uid, None
                if attempts is not None:
                    told: Json = {"metadata": {"annotations": {ATTEMPTS: attempts}}}
                    self._errands.append(
                        self._pool.submit(self.cluster.patch, "jobs", work.name, told)
                    )
        return finished

    def _try_again(self) -> None:
        """Have Jobs made that could not be made before."""
        for work in [w for w in self._live.values() if w.making is None and w.uid is None]:
            if work.again_at <= time.monotonic():
                self._submit(work)

    def _look_at(self, name: str, finished: list[Finished]) -> list[_Ended]:
        """Take in what is new about a Job; it, where it ended."""
        job, work = self.cache.job(name), self._live.get(name)
        if work is not None and work.making is not None:
            return []  # looked at again when it is made
        if job is None:
            return self._look_at_none(work, finished) if work is not None else []
        if work is not None and job.uid in work.replaced:
            return []  # we were not told yet that it went and another came in its place
        if work is not None and work.uid is None:
            work.again_at = 0.0  # what was in its way may be gone
            return []
        action = self.job_owner.action(job)
        if action is None or (work is None and job.uid in self._settled):
            return []
        if work is not None:
            work.uid = job.uid
        elif job.state == "live" and not job.is_deleting:
            self._live[name] = Work(action, name, keys_of(job), uid=job.uid)
        self._must_ask |= job.is_deleting
        if job.state == "live":
            return self._tend(job)
        return [self._by_itself(job)]

    def _by_itself(self, job: JobView) -> _Ended:
        """A Job that ended by itself."""
        if job.state == "complete":
            return _Ended(job, None, is_to_go=False)
        over = sum(pod.is_over for pod in self.cache.pods_of(job))
        if over < max(1, min(job.failed, KEPT_PODS)):
            self.watcher.read_pods(job)  # they are told us on another way, which may be slower
        return _Ended(job, self.cache.how(job), is_to_go=False)

    def _look_at_none(self, work: Work, finished: list[Finished]) -> list[_Ended]:
        """A Job of ours is not there: not yet, or no more."""
        if work.uid is None:
            work.again_at = 0.0  # what was in its way is gone
            return []
        last = self.cache.gone(work.uid)
        if last is None:
            return []  # made just now: we are told of it any moment
        self._must_ask = True
        if last.state != "live":
            return [self._by_itself(last)]
        self.ledger.refresh(work.keys, 0.0)
        del self._live[work.name]
        finished.append(self._told_by_ledger(work, DELETED))
        return []

    def _told_by_ledger(self, work: Work, otherwise: str) -> Finished:
        """How a task ended according to the ledger, where another driver recorded it."""
        records = [self.ledger.get(key) for key in work.keys]
        if all(record is not None and record.state == "done" for record in records):
            return Finished(work.action, DONE, None, 0.0)
        for record in records:
            if record is not None and record.state in ENDED:
                return Finished(work.action, record.code, record.cause, 0.0)
        return Finished(work.action, AGAIN, otherwise, 0.0)

    def _tend(self, job: JobView) -> list[_Ended]:
        """Record failed attempts of a live Job; return the Job, where it is to be ended."""
        pods = self.cache.pods_of(job)
        patch = attempts_patch(job, pods)
        if patch is not None and self._told.get(job.uid) != patch:
            self._told[job.uid] = patch
            self._errands.append(self._pool.submit(self.cluster.patch, "jobs", job.name, patch))
        was_there = job.uid in self._there_before
        if is_better_made_anew(job, pods, self.site, was_there):
            self._make_anew(job, pods)
            return []
        killed = next((pod for pod in reversed(by_age(pods)) if is_killed_by_memory(pod)), None)
        # One of several was at work when its pod was killed: the next pod knows which (`isolate`).
        if killed is not None and not job.is_deleting and len(self.cache.wanting(job)) < 2:
            return [_Ended(job, end_of_pod(killed), is_to_go=True)]
        reason = self.cache.why(job)
        if reason is None or not reason.cannot_start or job.is_deleting:
            self._stuck.pop(job.uid, None)
            return []
        _, since = self._stuck.setdefault(job.uid, (job.name, time.monotonic()))
        if time.monotonic() - since < self.site.patience_s:
            return []
        end = End(CANNOT_START, f"cannot start: {reason.words}", None, scored_rows(job, pods))
        return [_Ended(job, end, is_to_go=True)]

    # ------------------------------------------------------------------------------ made anew

    def _make_anew(self, job: JobView, pods: Sequence[PodView]) -> None:
        """Delete a Job, and have it made when it is gone: once, since only this uid is deleted."""
        action = self.job_owner.action(job)
        work = self._work(action) if action is not None else None
        if work is None or work.order is None or work.name != job.name:
            return  # it scores points of others, too
        self.creator.send_code()
        work.order.replaced[job.uid] = job
        self._blocked[job.name] = "its Job is made anew"
        self._live[job.name] = work
        if (carried := carried_attempts(job, pods)) is not None:
            self._carried[job.name] = carried
        work.making = self._pool.submit(self._made_anew, work.order, job)
        work.making.add_done_callback(lambda _: self.cache.touch(work.name))

    def _made_anew(self, order: Order, job: JobView) -> Made:
        self._deleted(job)
        return self.creator.make(order)  # first it is told that the name is not free yet

    # ------------------------------------------------------------------------------- keeping

    def _keep(self, one: _Ended) -> None:
        """Record how a Job ended; it is not deleted before that is written."""
        self._unwritten |= records_of(one.job, self.cache, time.time(), one.end)
        self._settled.add(one.job.uid)
        self._stuck.pop(one.job.uid, None)
        if one.is_to_go:
            self._write()
            self.cache.condemn(one.job)
            self._delete(one.job)
        elif one.end is None:
            self._ended.append(one.job)

    def _write(self) -> None:
        """Write how Jobs ended, and only then queue for deletion those that nobody needs."""
        if self._unwritten:
            self.ledger.write(self._unwritten)
        due = time.monotonic() + self.keep_s
        self._to_delete.extend((due, job) for job in self._ended)
        self._unwritten, self._ended, self._written_at = {}, [], time.monotonic()

    def _reread_failures(self) -> None:
        """See whether `stillhouse retry` took back that something failed: no Job tells us."""
        if time.monotonic() - self._reread_at < self.retry_s:
            return
        self._reread_at = time.monotonic()
        whats = [*self.sweep.by_id, *self.job_owner.baselines]
        keys = {*whats, *(score_of(what, self.scores) for what in whats if self.scores)}
        failed = [key for key in keys if _has_failed(self.ledger.get(key))]
        changed = self.ledger.refresh(failed, self.retry_s / 2)
        self._changed |= {key.partition(".")[0] for key in changed} & self.sweep.by_id.keys()

    def _run_errands(self) -> None:
        """Delete what is due; raise what went wrong with a request that nobody waited for."""
        while self._to_delete and self._to_delete[0][0] <= time.monotonic():
            self._delete(self._to_delete.popleft()[1])
        for errand in [errand for errand in self._errands if errand.done()]:
            self._errands.remove(errand)
            errand.result()

    def _delete(self, job: JobView) -> None:
        self._errands.append(self._pool.submit(self._deleted, job))

    def _deleted(self, job: JobView) -> None:
        # What runs stays until its pod is gone: no two pods write one run directory.
        is_live = job.state == "live"
        self.cluster.delete("jobs", job.name, job.uid, foreground=is_live)

    # -------------------------------------------------------------------------------- ending

    def stop(self) -> None:
        """Detach: Jobs continue without this driver, and no new ones are created."""
        self._is_stopping = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def kill(self) -> None:
        """The same: nothing of ours runs here."""
        self.stop()

    def close(self) -> None:
        """End all threads; what is done and still there, the cluster is asked to delete soon."""
        if not self._is_stopping:  # else whoever comes next does it
            writing = self._pool.submit(self._write)
            concurrent.futures.wait([writing], PARTING_S)
            for _, job in list(self._to_delete):
                soon: Json = {"spec": {"ttlSecondsAfterFinished": LEFT_S}}
                self._errands.append(self._pool.submit(self.cluster.patch, "jobs", job.name, soon))
            concurrent.futures.wait(self._errands, PARTING_S)
            self.stop()
        self.watcher.close()


def _has_failed(record: Record | None) -> bool:
    return record is not None and record.state in ENDED


def _took(job: JobView) -> float:
    return max(0.0, job.ended - job.started) if job.ended and job.started else 0.0
