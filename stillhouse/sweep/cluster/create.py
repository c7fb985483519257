"""Create each Job once, however many drivers want it and whenever they die.

    does the ledger record its end? ─ yes ─► nothing is created
      no ─► create ─ 409: it exists ─► that Job is taken over

A Job's name follows from its content, so a second create is refused while the Job exists. The Job
stays at least KEEP_S after its end is in the ledger (`jobs`), and a driver creates one only if it
has read the ledger in the last LOOK_VALID_S. So a driver that would create the Job again has either
read of its end, or finds the Job.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from stillhouse.identity import suite_key
from stillhouse.rundir import Json
from stillhouse.spec import SiteSpec
from stillhouse.sweep.cluster.code_bundle import Bundle
from stillhouse.sweep.cluster.connect import ApiError, Cluster
from stillhouse.sweep.cluster.jobspec import JobSpec, JobSpecs
from stillhouse.sweep.cluster.ledger import Ledger
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.cluster.objects import JobView
from stillhouse.sweep.cluster.ownership import create, have_config_map, ours
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.state import Record

LOOK_VALID_S = 5.0
KEEP_S = 15.0


@dataclass(frozen=True)
class Made:
    """The result of an attempt to create a Job."""

    job: Json | None = None  # ours, as it is there; None: there is none
    is_new: bool = False
    blocked_by: str | None = None  # why there is none yet: it is to be tried again later

    @property
    def uid(self) -> str | None:
        return self.job["metadata"]["uid"] if self.job is not None else None


@dataclass(eq=False)
class Order:
    """A Job to be made."""

    step: JobSpec
    keys: tuple[str, ...]  # of its tasks in the ledger
    seen: tuple[Record | None, ...]  # what the ledger said when it was decided
    replaced: dict[str, JobView] = field(default_factory=dict[str, JobView])  # by their uids


@dataclass(eq=False)
class Work:
    """An action, and the Job that does it."""

    action: Action
    name: str  # of the Job
    keys: tuple[str, ...]  # its keys in the ledger
    order: Order | None = None  # None: the Job was found, or is made
    uid: str | None = None  # None: no Job yet
    making: Future[Made] | None = None
    replaced: Mapping[str, JobView] = field(
        default_factory=dict[str, JobView]
    )  # it takes their place
    again_at: float = 0.0  # when to try again, where it could not be made


class JobCreator:
    """Makes Jobs at a site. `make` may be called from several threads."""

    def __init__(self, site: SiteSpec, cluster: Cluster, ledger: Ledger, code: Bundle) -> None:
        self.site, self.cluster, self.ledger, self.code = site, cluster, ledger, code
        self.look_valid_s = LOOK_VALID_S
        self._is_code_there = False

    def order(self, step: JobSpec, keys: tuple[str, ...] = ()) -> Order:
        """What is to be made for a step, as things stand; `keys`: of what makes it needless."""
        return Order(step, keys, tuple(map(self.ledger.get, keys)))

    def send_code(self) -> None:
        """Send the code, once, before the first Job that needs it.

        Raises:
            ConfigError: something else has its name.
        """
        if self._is_code_there:
            return
        have_config_map(self.cluster, self.code.manifest)
        self._is_code_there = True

    def make(self, order: Order) -> Made:
        """Make a Job if its end is not known by now, or take over the one that is there.

        Raises:
            ConfigError: a Job of that name is not ours.
            ContractError: it is about something else.
            ApiError: the cluster refuses it.
        """
        body = render(order.step, self.site, self.code.key)
        within_s = self.look_valid_s
        while self._is_wanted(order, within_s):
            within_s = 0.0  # from the second time on
            made = self._create(order, body)
            if made is None:
                continue
            if made.job is None or made.is_new:
                return made
            job = ours(made.job, order.step)
            if job.is_deleting:
                return Made(made.job, blocked_by=f"Job {job.name} is still being deleted")
            if not _is_to_be_replaced(job, order):
                return made
            order.replaced[job.uid] = job
            self.cluster.delete("jobs", job.name, job.uid)
        return Made()

    def _create(self, order: Order, body: Json) -> Made | None:
        """The Job that was made, or that has the name; None where its name is free again."""
        try:
            # However long an attempt took: before the next one the ledger is read again.
            job, is_new = create(
                self.cluster, "jobs", body, lambda: self._is_wanted(order, self.look_valid_s)
            )
        except ApiError as error:
            if error.status == 0:
                return Made()  # it is not wanted any more
            if error.status != 403 or "exceeded quota" not in error.message:
                raise
            # A full quota is said before it is seen that the name is taken.
            job = self.cluster.read("jobs", order.step.name)
            return Made(job, blocked_by=error.message if job is None else None)
        return Made(job, is_new) if job is not None else None

    def _is_wanted(self, order: Order, within_s: float) -> bool:
        """Whether a task is still to be done, and the ledger says what it said when we decided."""
        self.ledger.refresh(order.keys, within_s)
        now = tuple(map(self.ledger.get, order.keys))
        is_done = bool(now) and all(r is not None and r.state == "done" for r in now)
        return now == order.seen and not is_done


def _is_to_be_replaced(job: JobView, order: Order) -> bool:
    """Whether a Job that ended makes way: a pair is prepared again, a sweep is driven on."""
    if job.kind == "drive":
        return job.state != "live"
    # And so does what an earlier version called alone.
    is_again = job.kind == "prepare" or any(r and r.state == "alone" for r in order.seen)
    return is_again and job.state == "failed"


class JobOwner:
    """Maps Jobs, whoever created them, to actions for the points of a sweep."""

    def __init__(self, sweep: Sweep, steps: JobSpecs) -> None:
        self.groups = sweep.groups
        self.scores = suite_key(sweep.suite) if sweep.suite else None
        self.prepares = steps.prepares()
        self.baselines = {row.directory.name: row for row in sweep.baselines}

    def action(self, job: JobView) -> Action | None:
        """What a Job does for our points; None where it does nothing for them."""
        if job.kind == "prepare":
            group = self.prepares.get(job.name)
            return Action("prepare", group) if group else None
        points = tuple(id_ for id_ in job.points if id_ in self.groups)
        if job.kind == "train":
            return Action("train", self.groups[points[0]], points) if points else None
        if job.kind != "eval" or job.scores != self.scores:
            return None
        rows = [self.baselines[name] for name in job.baselines if name in self.baselines]
        if not points and not rows:
            return None
        group = self.groups[points[0]] if points else min(rows[0].groups)
        return Action("eval", group, points, tuple(row.directory for row in rows))
