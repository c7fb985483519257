"""Cache the Jobs, pods and ledger of a namespace, and derive from them the state of points.

A `NamespaceCache` takes in what the API reports (`watch` makes the requests) and answers what is
known of a point in a few lookups; it makes no request.

    jobs, pods, workloads, events ──► views ──► NamespaceCache ──► JobFacts ──► Observation
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stillhouse.errors import ContractError
from stillhouse.identity import suite_key
from stillhouse.rundir import Json
from stillhouse.sweep.cluster.facts import JobFacts, keys_of, observed
from stillhouse.sweep.cluster.kueue import QueueView
from stillhouse.sweep.cluster.ledger import Ledger, score_of
from stillhouse.sweep.cluster.objects import (
    JobView,
    Note,
    PodView,
    View,
    job_view,
    note,
    pod_view,
    viewed,
)
from stillhouse.sweep.cluster.reasons import End, Reason, how_it_failed, is_lost, why_waiting
from stillhouse.sweep.points import Baseline, Sweep
from stillhouse.sweep.state import FAILED, Observation, Record

VIEWS: dict[str, Callable[[Json], Any]] = {
    "jobs": job_view, "pods": pod_view, "events": note,
}  # fmt: skip
KEPT_PODS = 8  # ended pods of one Job that stay known
NOT_READ = "what Kueue says of it is not ours to read (Role of k8s/access.yaml: list workloads)"
ENDED = ("failed", "stopped")  # what the ledger says of what is not tried again by itself


# ----------------------------------------------------------------------------- the picture


class NamespaceCache:
    """A cache of our objects in one namespace, and its ledger. Safe to use from any thread."""

    def __init__(self, ledger: Ledger, code: str | None = None) -> None:
        self.ledger, self.code = ledger, code
        self.lock = threading.RLock()
        self.news = threading.Condition(self.lock)
        self.is_followed = False  # whether what vanishes is told at once
        self.odd: set[str] = set()  # a sentence on each malformed object
        self._jobs: dict[str, JobView] = {}
        self._pods: dict[str, dict[str, PodView]] = {}  # uid of the Job -> uid -> pod
        self._orphans: dict[str, PodView] = {}  # uid -> a pod that goes on without its Job
        self._queued: dict[str, QueueView] = {}  # uid of the Job -> its Workload
        self._asked: set[str] = set()  # uids of the Jobs whose Workloads we looked for
        self.may_read_queue = True
        self._notes: dict[str, list[Note]] = {}  # uid -> what was said about it
        self._about: dict[str, set[str]] = {}  # id, or baseline's directory -> names of Jobs
        self._deleted: dict[str, float] = {}  # key of the ledger -> when its Job vanished
        self._gone: dict[str, JobView] = {}  # uid -> a Job that is no more, as it was
        self._condemned: set[str] = set()  # uids of Jobs that will be deleted because they failed
        self._leaving: set[str] = set()  # uids of Jobs that were being deleted when we came
        self._touched: dict[str, tuple[str, ...]] = {}  # name of a Job -> the points it is about

    # ------------------------------------------------------------------------------- looking

    def look(self, id_: str, scores: str | None) -> Observation:
        """The state of one point; `scores`: the key of the suite that makes it done, if any."""
        with self.lock:
            return observed(self.facts(id_, scores), self.code)

    def look_at(self, job: JobView) -> Observation:
        """The state of a Job by itself: a line of k8s/eval.sh, a preflight, a driver."""
        with self.lock:
            is_live = job.state == "live"
            known = JobFacts(
                is_done=job.state == "complete",
                live=job if is_live else None,
                waits=self.why(job) if is_live else None,
                failed=self.how(job) if job.state == "failed" else None,
            )
            return observed(known)

    def facts(self, what: str, scores: str | None, is_baseline: bool = False) -> JobFacts:
        """What is known of a point (by id) or a baseline (by its directory's name)."""
        with self.lock:
            jobs = [self._jobs[name] for name in self._about.get(what, ())]
            evals = [job for job in jobs if scores and _scores(job, scores)]
            is_scored = scores is not None and self._is_scored(what, scores, evals)
            train = next((job for job in jobs if job.kind == "train"), None)
            is_trained = is_baseline or is_scored or self._is_trained(what, train)
            is_done = is_scored or (is_trained and scores is None)
            if is_done:
                return JobFacts(is_trained=True, is_done=True)
            if is_trained:
                assert scores is not None
                return self._open_facts(what, score_of(what, scores), evals, is_trained=True)
            return self._open_facts(what, what, [train] if train else [], is_trained=False)

    def _is_trained(self, id_: str, train: JobView | None) -> bool:
        return self.is_done(id_) or (train is not None and train.state == "complete")

    def _is_scored(self, what: str, scores: str, evals: list[JobView]) -> bool:
        key = score_of(what, scores)
        return self.is_done(key) or any(
            job.state == "complete" or (job.state == "failed" and what in self.how(job).done)
            for job in evals
        )

    def _open_facts(self, what: str, key: str, jobs: list[JobView], is_trained: bool) -> JobFacts:
        """Facts about what is not done: its training, or its scores."""
        record = self.ledger.get(key)
        is_over = record is not None and record.state in ENDED
        jobs = [job for job in jobs if job.uid not in self._condemned]
        live = max(
            # One that is being deleted because it failed is not at work any more.
            (job for job in jobs if job.state == "live" and not (job.is_deleting and is_over)),
            key=lambda job: (job.is_running, job.created, job.name),
            default=None,
        )
        failed = None
        for job in sorted((j for j in jobs if j.state == "failed"), key=lambda j: j.ended or 0.0):
            if record is None or (record.state == "alone" and not is_told(record, job)):
                failed = failed or self.how(job).of(what, self.wanting(job))
        orphans = self._orphans.values()
        return JobFacts(
            is_trained=is_trained,
            live=live,
            orphan=next((pod for pod in orphans if pod.point == key and not is_trained), None),
            waits=self.why(live) if live else None,
            failed=failed,
            record=record,
            deleted_at=self._deleted.get(key),
            cancelled_at=self.ledger.cancelled_at(key),
        )

    def wanting(self, job: JobView) -> list[str]:
        """The members of an evaluation that nobody else scored: ids, and baselines' directories."""
        with self.lock:
            scores = job.scores or ""
            found: list[str] = []
            for what in (*job.points, *job.baselines):
                evals = [other for other in self.jobs_about(what) if _scores(other, scores)]
                others = [other for other in evals if other.uid != job.uid]
                if not self._is_scored(what, scores, others):
                    found.append(what)
            return found

    def is_done(self, key: str) -> bool:
        """Whether the ledger says so."""
        record = self.ledger.get(key)
        return record is not None and record.state == "done"

    def why(self, job: JobView) -> Reason | None:
        """Why a live Job does not run; None where it does."""
        with self.lock:
            pods = self.pods_of(job)
            if not job.is_deleting and not job.is_suspended:
                running = [pod for pod in pods if pod.phase == "Running" and not pod.is_over]
                is_at_work = any(not is_lost(pod) for pod in running)
                if is_at_work or (job.is_running and all(pod.is_over for pod in pods)):
                    return None
            queued = self._queued.get(job.uid)
            if job.is_suspended and job.queue and queued is None and not job.is_deleting:
                if not self.may_read_queue:
                    return Reason(f"queue {job.queue}: {NOT_READ}")
                if job.uid not in self._asked:
                    return Reason(f"just sent to queue {job.queue}")
            notes = [*self._notes.get(job.uid, ())]
            for pod in pods:
                notes += self._notes.get(pod.uid, ())
            return why_waiting(job, pods, queued, notes)

    def how(self, job: JobView) -> End:
        """How a Job failed."""
        return how_it_failed(job, self.pods_of(job))

    def job(self, name: str) -> JobView | None:
        return self._jobs.get(name)

    def jobs(self) -> list[JobView]:
        """Every Job of ours in the namespace."""
        with self.lock:
            return list(self._jobs.values())

    def jobs_about(self, what: str) -> list[JobView]:
        """The Jobs about a point (by id) or a baseline (by its directory's name)."""
        with self.lock:
            return [self._jobs[name] for name in sorted(self._about.get(what, ()))]

    def pods_of(self, job: JobView) -> list[PodView]:
        with self.lock:
            return list(self._pods.get(job.uid, {}).values())

    def orphan(self, name: str) -> PodView | None:
        """A pod that goes on although its Job, of this name, was deleted: it still writes."""
        with self.lock:
            return next((pod for pod in self._orphans.values() if pod.job == name), None)

    def gone(self, uid: str) -> JobView | None:
        """A Job that we saw and that is no more, as it last was."""
        return self._gone.get(uid)

    # ------------------------------------------------------------------------------ learning

    def learn(self, resource: str, item: Json, is_deleted: bool = False) -> None:
        """Take in one Job, pod or event as the API tells it."""
        with self.news:
            seen = self.viewed(VIEWS[resource], item)
            if isinstance(seen, JobView):
                self._learn_job(seen, is_deleted)
            elif isinstance(seen, PodView):
                self._learn_pod(seen, is_deleted)
            elif isinstance(seen, Note):
                self._learn_note(seen)
            self.news.notify_all()

    def viewed(self, view: Callable[[Json], View], item: Json) -> View | None:
        """The view of an object; None, and a sentence in `odd`, where it is malformed."""
        try:
            return viewed(view, item)
        except ContractError as error:
            self.odd.add(str(error))
            return None

    def touch(self, name: str) -> None:
        """Wake whoever waits for news, about a Job."""
        with self.news:
            self._touch(name)
            self.news.notify_all()

    def _touch(self, name: str, point: str | None = None) -> None:
        job = self._jobs.get(name)
        others = (point,) if point else ()
        self._touched[name] = job.points if job else self._touched.get(name, ()) or others

    def wait(self, timeout_s: float) -> None:
        """Return as soon as something changed, or when the time is over."""
        with self.news:
            self.news.wait_for(lambda: self._touched, timeout_s)

    def touched(self) -> dict[str, tuple[str, ...]]:
        """Jobs about which something changed since this was last called, and their points."""
        with self.lock:
            names, self._touched = self._touched, {}
            return names

    def condemn(self, job: JobView) -> None:
        """Ignore a live Job from now on: it is about to be deleted, and its end is recorded."""
        with self.lock:
            self._condemned.add(job.uid)

    def _learn_job(self, job: JobView, is_deleted: bool = False) -> None:
        before = self._jobs.get(job.name)
        if before == job and not is_deleted:
            return
        self._touched[job.name] = job.points
        if before is not None and (is_deleted or before.uid != job.uid):
            self._forget(job if before.uid == job.uid else before)
        if is_deleted:
            self._gone.setdefault(job.uid, job)
            return
        if before is None and job.is_deleting:
            self._leaving.add(job.uid)
        self._jobs[job.name] = job
        for what in (*job.points, *job.baselines):
            self._about.setdefault(what, set()).add(job.name)
        for key in keys_of(job):
            self._deleted.pop(key, None)

    def _forget(self, last: JobView) -> None:
        """A Job is no more; `last` is how it last was."""
        before = self._jobs.pop(last.name)
        self._gone[last.uid] = last
        for known in (self._pods, self._queued, self._notes):
            known.pop(last.uid, None)
        self._asked.discard(last.uid)
        for what in (*before.points, *before.baselines):
            self._about[what].discard(last.name)
        if last.state == "live" and self.is_followed and last.uid not in self._leaving:
            for key in keys_of(last):
                record = self.ledger.get(key)
                if record is None or record.state == "cancelled":  # else it is known how it ended
                    self._deleted[key] = time.time()

    def _learn_pod(self, pod: PodView, is_deleted: bool = False) -> None:
        if pod.is_orphan or pod.uid in self._orphans:
            self._learn_orphan(pod, is_deleted)
            return
        if pod.job_uid in self._gone:
            return
        pods = self._pods.setdefault(pod.job_uid, {})
        if pods.get(pod.uid) == pod and not is_deleted:
            return
        self._touch(pod.job)
        if is_deleted and not (pod.is_over and pod.phase != "Succeeded"):
            pods.pop(pod.uid, None)
            return
        pods[pod.uid] = pod  # one that failed stays known when it is gone: it says why
        dead = [uid for uid, other in pods.items() if other.is_over]
        for uid in dead[:-KEPT_PODS]:
            del pods[uid]

    def _learn_orphan(self, pod: PodView, is_deleted: bool) -> None:
        if is_deleted or pod.is_over or not pod.is_orphan:
            before = self._orphans.pop(pod.uid, None)
        else:
            before, self._orphans[pod.uid] = self._orphans.get(pod.uid), pod
            self._pods.get(pod.job_uid, {}).pop(pod.uid, None)
        if before != self._orphans.get(pod.uid):
            self._touch(pod.job, pod.point)

    def replace_jobs(self, jobs: Sequence[JobView]) -> None:
        """Take in a whole list of them: what is not in it is gone."""
        with self.news:
            there = {job.name for job in jobs}
            for job in [job for name, job in self._jobs.items() if name not in there]:
                self._touch(job.name)
                self._forget(job)
            for job in jobs:
                self._learn_job(job)
            self.news.notify_all()

    def replace_pods(self, pods: Sequence[PodView]) -> None:
        """Take in a whole list of those that did not succeed: others that did not end are gone."""
        with self.news:
            there = {pod.uid for pod in pods}
            for known in self._pods.values():
                for uid in [u for u, pod in known.items() if u not in there and not pod.is_over]:
                    self._touch(known.pop(uid).job)
            for pod in [pod for uid, pod in self._orphans.items() if uid not in there]:
                self._learn_orphan(pod, is_deleted=True)
            for pod in pods:
                self._learn_pod(pod)
            self.news.notify_all()

    def replace_notes(self, notes: Iterable[Note]) -> None:
        """Take in what the cluster warned about just now."""
        with self.news:
            self._notes.clear()
            for said in sorted(notes, key=lambda said: said.at):
                self._learn_note(said)
            for job in self.waiting():
                self._touch(job.name)
            self.news.notify_all()

    def replace_queue(self, queued: Iterable[QueueView], asked: Iterable[str]) -> None:
        """Take in all that Kueue says of Jobs; `asked`: uids of those that were there before."""
        with self.news:
            before, self._queued = self._queued, {view.job_uid: view for view in queued}
            self._asked |= {uid for uid in asked if uid not in self._gone}
            for job in self.queued():
                if before.get(job.uid) != self._queued.get(job.uid):
                    self._touch(job.name)
            self.news.notify_all()

    def waiting(self) -> list[JobView]:
        """Jobs that should have a running pod and have none."""
        live = (job for job in self.jobs() if job.state == "live")
        return [job for job in live if not job.is_suspended and not job.is_running]

    def queued(self) -> list[JobView]:
        """Jobs that wait in a queue."""
        live = (job for job in self.jobs() if job.state == "live")
        return [job for job in live if job.is_suspended and job.queue]

    def unseen(self) -> list[JobView]:
        """Jobs that wait in a queue, and of which Kueue has said nothing that we read."""
        with self.lock:
            return [job for job in self.queued() if job.uid not in self._queued]

    def unasked(self) -> list[JobView]:
        """Jobs that wait in a queue, and whose Workloads nobody looked for yet."""
        with self.lock:
            return [job for job in self.queued() if job.uid not in self._asked]

    def notable(self) -> set[str]:
        """uids of the Jobs that should run and do not, and of their pods."""
        with self.lock:
            uids = {job.uid for job in self.waiting()}
            return uids | {uid for job_uid in uids for uid in self._pods.get(job_uid, ())}

    def _learn_note(self, said: Note) -> None:
        about = self._notes.setdefault(said.uid, [])
        about[:] = [other for other in about if other.reason != said.reason] + [said]


def is_told(record: Record | None, job: JobView) -> bool:
    """Whether a record says how this Job ended."""
    return record is not None and record.state in (*ENDED, "alone") and record.at == job.ended


def _scores(job: JobView, scores: str) -> bool:
    return job.kind == "eval" and job.scores == scores


def baselines_seen(cache: NamespaceCache, sweep: Sweep) -> tuple[Baseline, ...]:
    """The baselines of a sweep, and how they stand."""
    found: list[Baseline] = []
    for row in sweep.baselines if sweep.suite else ():
        assert sweep.suite is not None
        facts = cache.facts(row.directory.name, suite_key(sweep.suite), is_baseline=True)
        seen = observed(facts)
        cause = (seen.cause or f"exit code {seen.exit_code}") if seen.state in FAILED else None
        found.append(dataclasses.replace(row, is_scored=seen.state == "done", cause=cause))
    return tuple(found)
