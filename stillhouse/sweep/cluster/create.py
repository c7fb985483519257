"""Create each Job once, however many drivers want it and whenever they die.

    does the ledger record its end? ─ yes ─► nothing is created
      no ─► create ─ 409: it exists ─► that Job is taken over

A Job's name follows from its content, so a second create is refused while the Job exists. The Job
stays at least KEEP_S after its end is in the ledger (`jobs`), and a driver creates one only if it
has read the ledger in the last LOOK_VALID_S. So a driver that would create the Job again has either
read of its end, or finds the Job.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from stillhouse.rundir import Json
from stillhouse.spec import suite_key
from stillhouse.sweep.cluster.code_bundle import Bundle
from stillhouse.sweep.cluster.connect import ApiError, Cluster
from stillhouse.sweep.cluster.jobspec import JobSpec, JobSpecs
from stillhouse.sweep.cluster.ledger import Ledger, prepare_of, score_of
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.cluster.objects import JobView
from stillhouse.sweep.cluster.ownership import have_config_map, ours
from stillhouse.sweep.grid import Sweep
from stillhouse.sweep.outcome import Record
from stillhouse.sweep.plan import Action, groups_of
from stillhouse.sweep.registry import Roster, baseline_rows

LOOK_VALID_S = 5.0
KEEP_S = 15.0


@dataclass(frozen=True)
class Made:
    """The result of an attempt to create a Job."""

    uid: str | None = None  # None: there is none of ours
    blocked_by: str | None = None  # why there is none yet: it is to be tried again later


@dataclass(eq=False)
class Work:
    """An action, and the Job that does it."""

    action: Action
    name: str  # of the Job
    keys: tuple[str, ...]  # its keys in the ledger
    seen: tuple[Record | None, ...] = ()  # what the ledger said when it was decided
    step: JobSpec | None = None  # None: the Job was found, not made
    uid: str | None = None  # None: no Job yet
    making: Future[Made] | None = None
    replaced: set[str] = field(default_factory=set[str])  # uids of Jobs that were in its place
    again_at: float = 0.0  # when to try again, where it could not be made


class JobCreator:
    """Makes the Jobs of one sweep. `make` may be called from several threads."""

    def __init__(self, sweep: Sweep, cluster: Cluster, ledger: Ledger, code: Bundle) -> None:
        self.sweep, self.cluster, self.ledger, self.code = sweep, cluster, ledger, code
        self.steps = JobSpecs(sweep)
        self.look_valid_s = LOOK_VALID_S
        self._is_code_there = False

    def work(self, action: Action) -> Work:
        """What is to be made for an action, as things stand."""
        step = self.steps.of(action)
        keys = _keys(action, step)
        return Work(action, step.name, keys, tuple(map(self.ledger.get, keys)), step)

    def send_code(self) -> None:
        """Send the code, once, before the first Job that needs it.

        Raises:
            ConfigError: something else has its name.
        """
        if self._is_code_there:
            return
        have_config_map(self.cluster, self.code.manifest)
        self._is_code_there = True

    def make(self, work: Work) -> Made:
        """Make a Job if its end is not known by now, or take over the one that is there.

        Raises:
            ConfigError: a Job of that name is not ours.
            ContractError: it is about something else.
            ApiError: the cluster refuses it.
        """
        step = work.step or self.steps.of(work.action)
        body = render(step, self.sweep.site, self.code.key)
        within_s = self.look_valid_s
        while self._is_wanted(work, within_s):
            made = self._create(work, body)
            if isinstance(made, Made):
                return made
            there = self.cluster.read("jobs", work.name)
            if there is None and made.status == 403:
                return Made(blocked_by=made.message)  # a quota is full; others may leave room
            if there is not None:
                job = ours(there, step)
                if job.is_deleting:
                    return Made(blocked_by=f"Job {job.name} is still being deleted")
                # A pair is tried again when asked, and so is what an earlier version called alone.
                is_again = job.kind == "prepare" or any(r and r.state == "alone" for r in work.seen)
                if not is_again or job.state != "failed":
                    return Made(job.uid)
                work.replaced.add(job.uid)
                self.cluster.delete("jobs", job.name, job.uid)
            within_s = 0.0
        return Made()

    def _create(self, work: Work, body: Json) -> Made | ApiError:
        """The Job that was made; or why not: its name is taken (409), a quota is full (403)."""
        try:
            # However long an attempt took: before the next one the ledger is read again.
            job = self.cluster.create(
                "jobs", body, still=lambda: self._is_wanted(work, self.look_valid_s)
            )
        except ApiError as error:
            if error.status == 0:
                return Made()  # it is not wanted any more
            # A full quota is said before it is seen that the name is taken.
            if error.status == 409 or (error.status == 403 and "exceeded quota" in error.message):
                return error
            raise
        return Made(job["metadata"]["uid"])

    def _is_wanted(self, work: Work, within_s: float) -> bool:
        """Whether a task is still to be done, and the ledger says what it said when we decided."""
        self.ledger.refresh(work.keys, within_s)
        now = tuple(map(self.ledger.get, work.keys))
        return now == work.seen and not all(r is not None and r.state == "done" for r in now)


class JobOwner:
    """Maps Jobs, whoever created them, to actions for the points of a roster."""

    def __init__(self, sweep: Sweep, rows: Roster, steps: JobSpecs) -> None:
        self.rows, self.groups = rows, groups_of(sweep)
        self.scores = suite_key(sweep.suite) if sweep.suite else None
        groups = dict.fromkeys(self.groups[id_] for id_ in rows.by_id)
        self.prepares = {steps.of(Action("prepare", group)).name: group for group in groups}
        self.baselines = {row.directory.name: row for row in baseline_rows(sweep)}

    def action(self, job: JobView) -> Action | None:
        """What a Job does for our points; None where it does nothing for them."""
        if job.kind == "prepare":
            group = self.prepares.get(job.name)
            return Action("prepare", group) if group else None
        points = tuple(id_ for id_ in job.points if id_ in self.rows.by_id)
        if job.kind == "train":
            return Action("train", self.groups[points[0]], points) if points else None
        if job.kind != "eval" or job.scores != self.scores:
            return None
        rows = [self.baselines[name] for name in job.baselines if name in self.baselines]
        if not points and not rows:
            return None
        group = self.groups[points[0] if points else rows[0].points[0]]
        return Action("eval", group, points, tuple(row.directory for row in rows))


def _keys(action: Action, step: JobSpec) -> tuple[str, ...]:
    if action.kind == "train":
        return action.points
    if action.kind == "prepare":
        return (prepare_of(step.id),)
    assert step.scores is not None
    return tuple(score_of(what, step.scores) for what in (*step.points, *step.baselines))
