"""Start a short-lived pod that mounts a volume, to copy files out of it or into it by `exec`.

The pod belongs to a Job that waits and takes no device. The Job is deleted after the last request,
and ends by itself where nobody could delete it (`steps.COLLECT_S`).
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from stillhouse.errors import MISTAKE, ConfigError, Interrupted
from stillhouse.rundir import Json
from stillhouse.spec import SiteSpec
from stillhouse.sweep.cluster.code_bundle import bundle
from stillhouse.sweep.cluster.connect import ApiError, Cluster, CommandFailed, Gone
from stillhouse.sweep.cluster.jobspec import RUNS, JobSpec, collect_step
from stillhouse.sweep.cluster.kueue import OF_JOBS, QueueView, queue_view
from stillhouse.sweep.cluster.manifest import image_problem, render
from stillhouse.sweep.cluster.objects import (
    JobView,
    Note,
    PodView,
    job_view,
    notes,
    pod_view,
    viewed,
)
from stillhouse.sweep.cluster.ownership import create_or_read, have_config_map
from stillhouse.sweep.cluster.reasons import by_age, how_it_failed, why_waiting
from stillhouse.transfer import pack, receive

TRIES = 4  # of one request in a row
HOPELESS_S = 30.0  # what waiting does not mend may be a kubelet's first try, and pass
MOST_ANSWER = 64 << 20  # bytes of what a pod says about files that are brought to it
LOOK_S = 5.0  # how often a pod that does not start is looked at, without news of it

Say = Callable[[str], None]


class VolumePod:
    """A Job whose pod mounts a volume, for the duration of a `with` block.

    `about`: what it is for, a sweep's name for example; `step`: says which volume that is.
    """

    def __init__(
        self,
        cluster: Cluster,
        site: SiteSpec,
        about: str,
        say: Say,
        step: Callable[[str, str], JobSpec] = collect_step,
    ) -> None:
        self.cluster, self.site, self.about, self.say = cluster, site, about, say
        self._step = step
        self._name = ""  # of the Job; '' while there is none
        self._count = 0

    def __enter__(self) -> VolumePod:
        problem = image_problem(self.site)
        if problem:
            raise ConfigError(problem)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                "asked to stop; what has come stays, the same command goes on"
            ) from error
        if isinstance(error, ApiError) and error.status == 403:
            raise ConfigError(
                f"{error.message}. The Roles stillhouse-launcher and stillhouse-collector of"
                " k8s/access.yaml allow it: have them bound to you"
            ) from error

    def ask(self, request: Json, stage: Path) -> Json:
        """Fetch what a request names into the empty directory `stage`; the manifest of it."""
        command = ["python", "/bundle/pod.py", "send", "--", pack({"runs": RUNS, **request})]
        for turn in range(1, TRIES + 1):
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
            try:
                return receive(self.cluster.exec(self._pod(), command), stage, request)
            except (ValueError, ApiError) as error:
                if isinstance(error, ApiError) and error.status == 403:
                    raise
                if turn == TRIES:
                    raise Interrupted(
                        f"{TRIES} times in a row nothing whole came ({error}); what came before"
                        " stays, the same command goes on"
                    ) from error
                self.say(f"sending broke, asked again: {error}")
                self.cluster.stop.wait(self.cluster.first_delay_s * 4**turn)
        raise AssertionError("the last turn returns or raises")

    def tell(self, request: Json, stdin: Iterable[bytes]) -> Json:
        """What the pod answers to a request of `intake` and what it reads. Never tried twice.

        Raises:
            ConfigError: it refuses, in its own words.
            ValueError, ApiError: its answer, or the connection to it, broke.
        """
        command = ["python", "/bundle/pod.py", "take", "--", pack(request)]
        said = bytearray()
        try:
            for piece in self.cluster.exec(self._pod(), command, stdin):
                said += piece
                if len(said) > MOST_ANSWER:
                    raise ValueError(f"the pod answers with more than {MOST_ANSWER >> 20} MiB")
        except CommandFailed as error:
            if error.exit_code != MISTAKE:
                raise
            raise ConfigError(error.message.removeprefix("ConfigError: ")) from error
        return json.loads(said)

    def _pod(self) -> str:
        """The name of a pod that runs; waits for it.

        Raises:
            ConfigError: it cannot start, in the cluster's words made plain.
        """
        said, began, hopeful = "", time.monotonic(), time.monotonic()
        while True:
            job = viewed(job_view, self._found_job())
            pods, version = self._pods()
            running = [p for p in pods if p.started and not p.is_over and not p.is_deleting]
            if running:
                return running[-1].name
            if job.state == "complete":  # nobody asked for too long: this machine slept, say
                self._remove()
                continue
            if job.state == "failed":
                cause = how_it_failed(job, pods).cause
                raise ConfigError(f"the pod that was to have the volume ended: {cause}")
            reason = why_waiting(job, pods, self._queued(job), self._notes(pods))
            now = time.monotonic()
            hopeful = hopeful if reason.cannot_start else now
            left = min(began + self.site.patience_s, hopeful + HOPELESS_S) - now
            if left <= 0:
                raise ConfigError(
                    f"the pod that is to have the volume does not start: {reason.words}"
                )
            if reason.words != said:
                said = reason.words
                self.say(f"waiting for a pod that has the volume: {said}")
            # Any news of a pod will do: the next turn reads what it is.
            next(self.cluster.watch("pods", self._selector, version, min(LOOK_S, left)), None)

    def _found_job(self) -> Json:
        """The Job as it is now; a new one where there is none."""
        job = self.cluster.read("jobs", self._name) if self._name else None
        if job is not None and "deletionTimestamp" not in job["metadata"]:
            return job
        self._count += 1
        if self._count > TRIES:
            raise Interrupted(f"its Job {self._name} was deleted again and again; run it again")
        code = bundle()
        have_config_map(self.cluster, code.manifest)
        step = self._step(self.about, secrets.token_hex(16))
        self._name = step.name
        create_or_read(self.cluster, "jobs", render(step, self.site, code.key))
        return self._found_job()

    @property
    def _selector(self) -> str:
        return f"batch.kubernetes.io/job-name={self._name}"

    def _pods(self) -> tuple[list[PodView], str]:
        """The pods of the Job, oldest first, and the resourceVersion of that list."""
        found: list[PodView] = []
        version = ""
        for items, at in self.cluster.pages("pods", self._selector):
            found += [viewed(pod_view, item) for item in items]
            version = at
        return by_age(found), version

    def _queued(self, job: JobView) -> QueueView | None:
        """What Kueue says of the Job: it may take one that names no queue (LocalQueue default)."""
        if not (job.is_suspended and job.queue):
            return None
        with contextlib.suppress(Gone, ApiError):  # not ours to read: it only explains
            if self.cluster.kueue() is not None:
                pages = self.cluster.pages("workloads", f"{OF_JOBS}={job.uid}")
                views = [queue_view(item) for items, _ in pages for item in items]
                return next((view for view in views if view is not None), None)
        return None

    def _notes(self, pods: Sequence[PodView]) -> list[Note]:
        """What the cluster said of the Job and its pods."""
        names = {self._name, *(pod.name for pod in pods)}
        pages = self.cluster.pages("events", fields="type=Warning")
        said = (said for items, _ in pages for said in notes(items))
        return [one for one in said if one.name in names]

    def _remove(self) -> None:
        if self._name:
            self.cluster.delete("jobs", self._name)
            self._name = ""
