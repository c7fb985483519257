"""Read the state of a namespace from the API server: once, or once and then by watches.

`refresh` is one paged LIST of each kind of object; `follow` is that, and watches in threads. Both
store what they read in a `NamespaceCache`, which tells the state of points.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stillhouse.rundir import Json
from stillhouse.sweep.cluster.cache import NamespaceCache
from stillhouse.sweep.cluster.connect import ApiError, Cluster, Gone
from stillhouse.sweep.cluster.facts import keys_of
from stillhouse.sweep.cluster.kueue import OF_JOBS, QueueView, queue_view
from stillhouse.sweep.cluster.ledger import Ledger
from stillhouse.sweep.cluster.manifest import SELECTOR
from stillhouse.sweep.cluster.objects import JobView, Note, View, job_view, note, pod_view
from stillhouse.sweep.points import Point
from stillhouse.sweep.state import Observation

DICE = random.Random()  # not the process's own: its state is others' business
WATCH_S = 300.0  # a watch is asked for anew this often
NOTES_S = 20.0  # how often a follower reads the warning events, while something waits
QUEUE_S = 60.0  # how often it reads what Kueue says, while something is suspended
SOON_S = 5.0  # how soon after a Job was sent to a queue
UNSEEN_S = 15.0  # how often, while Kueue has said nothing of a Job
SHARE = 20  # and never more than a part of the time: of 10,000 Jobs one reading takes seconds
UNFINISHED = "status.phase!=Succeeded"  # pods that are worth a LIST


class Watcher:
    """Reads one namespace into a cache. `code`: given, waiting Jobs of other code are drifted."""

    def __init__(self, cluster: Cluster, claim: str, code: str | None = None) -> None:
        self.cluster = cluster
        self.ledger = Ledger(cluster, claim)
        self.cache = NamespaceCache(self.ledger, code)
        self._versions: dict[str, str] = {}  # of the last list of each kind of object
        self._closing = threading.Event()
        self._error: BaseException | None = None

    def look(self, id_: str, scores: str | None) -> Observation:
        """The state of one point; `scores`: the key of the suite that makes it done, if any."""
        return self.cache.look(id_, scores)

    def observe(self, ids: Iterable[str], scores: str | None) -> dict[str, Observation]:
        """The state of many points."""
        return {id_: self.cache.look(id_, scores) for id_ in ids}

    def observe_points(self, points: Sequence[Point], scores: str | None) -> dict[str, Observation]:
        """The state of points, and of those that stand for another Job than a point's."""
        ids = [point.id for point in points]
        found = self.observe(ids, scores)
        if any(seen.state in ("new", "failed", "waiting") for seen in found.values()):
            self.look_for_orphans()
            found = self.observe(ids, scores)
        for point in points:
            job = self.cache.job(point.directory)
            if job is not None and job.kind != "train":
                found[point.id] = self.cache.look_at(job)
        return found

    # ------------------------------------------------------------------------ one look around

    def refresh(self) -> None:
        """Read all of it anew: one paged LIST of each kind of object that is needed."""
        self._versions.clear()
        self._list_jobs()
        self.ledger.read()  # after the Jobs: what was one, and is not any more, stands there
        if any(self._needs_pods(job) for job in self.cache.jobs()):
            self._list_pods()
        if self.cache.queued():
            self.read_queue()
        if self.cache.waiting():
            self.read_notes()

    def _needs_pods(self, job: JobView) -> bool:
        if job.state == "failed":
            return any(self.ledger.get(key) is None for key in keys_of(job))
        return job.state == "live" and not job.is_suspended and not job.is_running

    def _list_jobs(self) -> None:
        found, self._versions["jobs"] = self._listed("jobs", job_view)
        self.cache.replace_jobs(found)

    def read_pods(self, job: JobView) -> None:
        """Read the pods of one Job: of one that failed, before their watch told us how."""
        of_it = f"{SELECTOR},batch.kubernetes.io/job-name={job.name}"
        with contextlib.suppress(Gone):  # there will be another look
            for items, _ in self.cluster.pages("pods", of_it):
                for item in items:
                    self.cache.learn("pods", item)

    def look_for_orphans(self) -> None:
        """Read the pods, where that was not needed so far: one may be at work without its Job."""
        if "pods" not in self._versions:
            self._list_pods()

    def _list_pods(self) -> None:
        found, self._versions["pods"] = self._listed("pods", pod_view, UNFINISHED)
        self.cache.replace_pods(found)

    def _listed(
        self, resource: str, view: Callable[[Json], View], fields: str = ""
    ) -> tuple[list[View], str]:
        """Views of all our objects, reduced page by page, and the list's version."""
        while True:
            found: list[View] = []
            seen = ""
            try:
                for items, version in self.cluster.pages(resource, SELECTOR, fields=fields):
                    views = (self.cache.viewed(view, item) for item in items)
                    found += [one for one in views if one is not None]
                    seen = version
                return found, seen
            except Gone:  # it took longer than the server remembers: begin again
                self._closing.wait(DICE.uniform(0, self.cluster.first_delay_s))

    def read_notes(self) -> None:
        """Read what the cluster warned about: events of Jobs that wait, and of their pods."""
        wanted = self.cache.notable()
        found: list[Note] = []
        with contextlib.suppress(Gone, ApiError):  # gone, or not ours to read: they only explain
            for items, _ in self.cluster.pages("events", fields="type=Warning"):
                views = (self.cache.viewed(note, item) for item in items)
                found += [said for said in views if said is not None and said.uid in wanted]
            self.cache.replace_notes(found)

    def read_queue(self) -> None:
        """Read what Kueue says of the Jobs that wait in its queues."""
        asked, found = {job.uid for job in self.cache.queued()}, list[QueueView]()
        try:
            if self.cluster.kueue() is not None:
                for items, _ in self.cluster.pages("workloads", OF_JOBS):
                    views = (self.cache.viewed(queue_view, item) for item in items)
                    found += [view for view in views if view]
            self.cache.may_read_queue = True
        except ApiError as error:  # not ours to read, or too slow: it only explains
            if error.status != 403:
                return
            self.cache.may_read_queue = False
        self.cache.replace_queue(found, asked)

    # ------------------------------------------------------------------------------ following

    def follow(self) -> None:
        """Read what was not read yet, and keep it up to date, in threads that end with `close`."""
        if "jobs" not in self._versions:
            self._list_jobs()
            self.ledger.read()  # after: what is no Job any more by now stands there
        if "pods" not in self._versions:
            self._list_pods()
        if self.cache.unasked():
            self.read_queue()
        self.cache.is_followed = True
        watches = (
            (self._watch, "jobs", self._list_jobs),
            (self._watch, "pods", self._list_pods),
            (self._read_on,),
        )
        for function, *arguments in watches:
            thread = threading.Thread(
                target=self._guarded, args=(function, *arguments), daemon=True
            )
            thread.start()

    def close(self) -> None:
        """End the threads of `follow`; what was seen stays as it is."""
        self._closing.set()
        self.cache.touch("")

    def _guarded(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except BaseException as error:  # for whoever waits: a thread has nobody to tell
            if not self._closing.is_set():
                self._error = error
            self.cache.touch("")

    def _watch(self, resource: str, read_anew: Callable[[], None]) -> None:
        """Keep one kind of object up to date: one watch after another, a LIST after a 410."""
        idle, version = 0, self._versions[resource]  # idle: watches in a row that said nothing
        while not self._closing.is_set():
            try:
                for seen in self.cluster.watch(resource, SELECTOR, version, WATCH_S):
                    idle, version = 0, seen.object["metadata"]["resourceVersion"]
                    if seen.kind != "BOOKMARK":
                        self.cache.learn(resource, seen.object, seen.kind == "DELETED")
                    if self._closing.is_set():
                        return
            except Gone:
                read_anew()
                version = self._versions[resource]
            longest = self.cluster.first_delay_s * 2 ** min(idle, 6)
            self._closing.wait(DICE.uniform(0, longest))  # not all drivers at once
            idle += 1

    def _read_on(self) -> None:
        """Read events and Workloads now and then: they are worth a LIST, but no watch."""
        noted = queued = time.monotonic()
        took = 0.0
        while not self._closing.wait(SOON_S):
            if time.monotonic() - noted >= NOTES_S and self.cache.waiting():
                self.read_notes()
                noted = time.monotonic()
            if self.cache.queued() and time.monotonic() - queued >= self._queue_s() + SHARE * took:
                began = time.monotonic()
                self.read_queue()
                queued = time.monotonic()
                took = queued - began

    def _queue_s(self) -> float:
        """How long to wait between two readings of what Kueue says."""
        if self.cache.unasked():
            return SOON_S
        return UNSEEN_S if self.cache.unseen() else QUEUE_S

    def wait(self, timeout_s: float) -> None:
        """Return as soon as something changed, or when the time is over.

        Raises:
            Exception: whatever ended a thread of `follow`.
        """
        if self._error is not None:
            raise self._error
        self.cache.wait(timeout_s)
        if self._error is not None:
            raise self._error
