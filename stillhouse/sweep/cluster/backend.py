"""Implement the backend of a cluster: its Jobs, its pods and its ledger.

A look is one LIST of each kind of object, kept until a command from here changes something. All
that is known of a sweep is in the cluster, so any machine with a kubeconfig can show its state and
retry or cancel it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from stillhouse.errors import AGAIN, ConfigError
from stillhouse.identity import suite_key
from stillhouse.rundir import Json, Runs, code_identity, now
from stillhouse.spec import SiteSpec
from stillhouse.sweep import commits, registry, show
from stillhouse.sweep.backend import Executor
from stillhouse.sweep.cluster import collect, doctor, find, pod_logs, secrets, submit
from stillhouse.sweep.cluster.cache import NamespaceCache, baselines_seen, keys_of
from stillhouse.sweep.cluster.code_bundle import bundle
from stillhouse.sweep.cluster.connect import Cluster, connect
from stillhouse.sweep.cluster.describe import job_details, said_of_others
from stillhouse.sweep.cluster.facts import observed
from stillhouse.sweep.cluster.find import Names
from stillhouse.sweep.cluster.jobspec import JobSpecs
from stillhouse.sweep.cluster.ledger import (
    Ledger,
    cancel_sweep,
    read_sweep,
    score_of,
    sweeps,
    write_sweep,
)
from stillhouse.sweep.cluster.manifest import label_value, refuse_unsendable, render
from stillhouse.sweep.cluster.objects import JobView
from stillhouse.sweep.cluster.watch import Watcher
from stillhouse.sweep.points import Point, Sweep, point_of
from stillhouse.sweep.site import away_words
from stillhouse.sweep.snapshot import Observations, Snapshot
from stillhouse.sweep.state import FAILED, Observation, Record

DRIVER, COLLECTOR = "stillhouse-driver", "stillhouse-collector"  # Roles of k8s/access.yaml


class ClusterBackend:
    """One namespace of a cluster, and the volume of runs that it works on."""

    def __init__(self, site: SiteSpec, runs: Path) -> None:
        self.site, self.runs = site, runs
        self.cluster: Cluster = connect(site.kube_context, site.namespace)

    @functools.cached_property
    def watcher(self) -> Watcher:
        """The namespace as it was read once; cached."""
        found = Watcher(self.cluster, self.site.runs_claim)
        found.refresh()
        return found

    @property
    def cache(self) -> NamespaceCache:
        return self.watcher.cache

    def look_again(self) -> None:
        """Drop the cached state: something was changed."""
        self.__dict__.pop("watcher", None)

    def names(self) -> list[str]:
        return [mark.name for mark in sweeps(self.cluster)]

    def find(self, word: str) -> Sweep:
        return find.find(self.cluster, word, self.runs, away_words(self.site))

    # -------------------------------------------------------------------------------- looking

    def look(self, sweep: Sweep, is_to_run: bool = False) -> Snapshot:
        self.cache.code = code_identity()["digest"] if is_to_run else None
        observations = self._observe(sweep)
        baselines = baselines_seen(self.cache, sweep) if is_to_run else ()
        records = self.watcher.ledger.records()
        return Snapshot(observations, baselines, self._failures(sweep), records=records)

    def _observe(self, sweep: Sweep) -> dict[str, Observation]:
        scores = suite_key(sweep.suite) if sweep.suite else None
        return self.watcher.observe_points(sweep.points, scores)

    def pinned(self, sweep: Sweep, begins: bool = False) -> Sweep:
        # Which commit a volume holds, nobody here sees: pods are told one, and fetch that.
        record = read_sweep(self.cluster, sweep.name) or {}
        find = commits.of_hub if begins else commits.unasked
        return commits.pinned(sweep, record.get("commits") or {}, find)

    def _failures(self, sweep: Sweep) -> dict[str, str]:
        found: dict[str, str] = {}
        scores = suite_key(sweep.suite) if sweep.suite else None
        for name in (row.directory.name for row in sweep.meant_baselines if scores):
            seen = observed(self.cache.facts(name, scores, is_baseline=True))
            if seen.state in FAILED:
                found[f"baseline {name}"] = seen.cause or f"exit code {seen.exit_code}"
        for job in self._preparing(sweep):
            if job.state == "failed":
                (key,) = keys_of(job)
                record = self.watcher.ledger.get(key)
                cause = record.cause if record else self.cache.how(job).cause
                found[f"preparing ({job.name})"] = cause or "nobody said why"
        return found

    def _preparing(self, sweep: Sweep) -> list[JobView]:
        return [job for job in self._jobs_of(sweep) if job.kind == "prepare"]

    def _jobs_for(self, sweep: Sweep) -> list[JobView]:
        """The Jobs that this sweep waits for, also where another sweep of the same pair sent it."""
        record = read_sweep(self.cluster, sweep.name) or {}
        prepares: Any = record.get("prepares")
        known = cast("list[Any]", prepares) if isinstance(prepares, list) else []
        names = {*map(str, known)}
        mine = {job.name: job for job in self._jobs_of(sweep)}
        return [job for job in self.cache.jobs() if job.name in mine or job.name in names]

    def _jobs_of(self, sweep: Sweep) -> list[JobView]:
        """The Jobs that were made for this sweep."""
        label = label_value(sweep.name)
        return [job for job in self.cache.jobs() if job.sweep == label]

    def _jobs_about(self, point: Point) -> list[JobView]:
        """The Jobs about a point; or the Job that it stands for."""
        job = self.cache.job(point.directory)
        others = self.cache.jobs_about(point.id)
        return others if job is None or job in others else [job, *others]

    def describe(self, sweep: Sweep | None) -> list[str]:
        if sweep is None:
            others = [job for job in self.cache.jobs() if job.kind in ("collect", "push")]
            said = said_of_others(others, self.cache)
            return [*self._said_of_lines(), *said, *self._odd()]
        lines = said_of_others(self._jobs_for(sweep), self.cache) + self._odd()
        if len(sweep.points) != 1:
            return lines
        (point,) = sweep.points
        scores = [score_of(point.id, suite_key(sweep.suite))] if sweep.suite else []
        records = {key: self.watcher.ledger.get(key) for key in (point.id, *scores)}
        jobs = self._jobs_about(point)
        for job in jobs:  # a look at a sweep reads the pods only where it needs them
            for pod in pod_logs.pods(self.cluster, job.name):
                self.cache.learn("pods", pod)
        return [*job_details(jobs, self.cache, records), *self._odd()]

    def _odd(self) -> list[str]:
        """What stands there and is not what we make of its kind."""
        return [*self.watcher.ledger.notes(), *sorted(self.cache.odd)]

    def _said_of_lines(self) -> list[str]:
        """Jobs that belong to no sweep: lines of k8s/train.sh and k8s/eval.sh, and preflights."""
        single = [
            job
            for job in self.cache.jobs()
            if not job.sweep and job.kind in ("train", "eval", "preflight")
        ]
        if not single:
            return []
        points = tuple(point_of(job.name, next(iter(job.names), None)) for job in single)
        lines = Sweep("single Jobs", self.runs, points)
        observations = self._observe(lines)
        return [show.headline(lines, observations), *show.reasons(lines, observations)]

    def show_logs(self, sweep: Sweep, observations: Observations, follows: bool) -> bool:
        return pod_logs.show(self._sources(sweep, observations), follows)

    def log_texts(self, sweep: Sweep, observations: Observations) -> dict[str, str]:
        return pod_logs.texts(self._sources(sweep, observations))

    def _sources(self, sweep: Sweep, observations: Observations) -> pod_logs.Sources:
        return pod_logs.Sources(
            self.cluster,
            sweep,
            observations,
            {point.id: self._jobs_about(point) for point in sweep.points},
            [job for job in self._jobs_of(sweep) if job.kind in ("prepare", "eval", "drive")],
            self.watcher.ledger,
        )

    def examine(self) -> list[doctor.Finding]:
        """All that launchers, drivers and collectors need of the namespace, each said once."""
        found: dict[tuple[bool, str], doctor.Finding] = {}
        for role in (doctor.LAUNCHER, DRIVER, COLLECTOR):
            for one in doctor.findings(self.cluster, self.site, role):
                found.setdefault((one.ok, one.what.partition(" (Role")[0]), one)
        return [*found.values(), *doctor.default_queue(self.cluster)]

    # ---------------------------------------------------------------------------------- doing

    def require(self, sweep: Sweep, is_detached: bool = False) -> None:
        # What a pod's account may do is asked in the pod; who sends one needs as much.
        is_driver = is_detached or "STILLHOUSE_IN_POD" in os.environ
        role = DRIVER if is_driver else doctor.LAUNCHER
        steps = JobSpecs(sweep).all()
        refuse_unsendable(steps, sweep.site)
        for step in {step.kind: step for step in steps}.values():
            render(
                step, sweep.site, bundle(sweep.suite).key
            )  # any says what is wrong with the site
        doctor.refuse(
            [
                *doctor.findings(self.cluster, sweep.site, role),
                *doctor.job_findings(self.cluster, self.cache.jobs(), steps, sweep.site.owner),
            ]
        )

    def save(self, sweep: Sweep) -> None:
        # Also where nothing is left to send: this, too, is read by everybody in the namespace.
        secrets.refuse_words(sweep.words, "the command line")
        told = {text for point in sweep.points for text in (*point.tags, point.name or "")}
        secrets.refuse_texts([*told, sweep.name, sweep.question or ""], "the sweep")
        where = f"namespace {self.cluster.namespace}"
        registry.refuse_another_sweep(read_sweep(self.cluster, sweep.name), sweep, where)
        record: Json = registry.record_of(sweep) | {"prepares": [*JobSpecs(sweep).prepares()]}
        named = {row["name"]: f"{row['slug']}-{row['id']}" for row in record["points"]}
        named = {name: directory for name, directory in named.items() if name}
        if named:
            Names(self.cluster).claim_all(named)
        write_sweep(self.cluster, record)
        registry.write_record(self.runs, record)

    def adopt(self, sweep: Sweep, snapshot: Snapshot) -> list[str]:
        # What lies on the volume, its pods put aside (place.sources).
        drifted = [sweep.by_id[id_] for id_ in snapshot.of_other_code]
        jobs = [job for point in drifted for job in self._jobs_about(point)]
        jobs = [job for job in jobs if job.state == "live"]
        refuse_others(jobs, self.site.owner)
        delete_jobs(self.cluster, jobs)  # none runs: the loop makes them anew, with our code
        self.look_again()
        return []

    @contextlib.contextmanager
    def executor(self, sweep: Sweep, snapshot: Snapshot) -> Generator[Executor, None, None]:
        """Goes on from the last look, without listing the namespace again.

        The connection ends with it, and with that whatever still waits for an answer.
        """
        from stillhouse.sweep.cluster.jobs import JobExecutor

        with (
            contextlib.closing(self.cluster),
            contextlib.closing(JobExecutor(sweep, self.watcher)) as executor,
        ):
            yield executor

    def detach(self, sweep: Sweep, options: Sequence[str]) -> list[str]:
        before = [job for job in self._jobs_of(sweep) if job.kind == "drive"]
        said = submit.detach(self.cluster, self.cache, sweep, options)
        # One that was there already may wait, and for what is better said now.
        waits = [job for job in before if job.state == "live" and job.name in said[0]]
        return [*said, *said_of_others(waits, self.cache)]

    def forget(self, sweep: Sweep) -> int:
        scores = suite_key(sweep.suite) if sweep.suite else None
        jobs = [job for point in sweep.points for job in self._jobs_about(point)]
        keys = [key for point in sweep.points for key in _keys(point.id, scores)]
        count = 0
        if sweep.is_whole:
            failures = self._failures(sweep)
            names = [row.directory.name for row in sweep.baselines]
            failed = [name for name in names if f"baseline {name}" in failures]
            preparing = [job for job in self._preparing(sweep) if job.state == "failed"]
            jobs += [job for name in failed for job in self.cache.jobs_about(name)] + preparing
            keys += [key for name in failed for key in _keys(name, scores)[1:]]
            keys += [key for job in preparing for key in keys_of(job)]
            count = len(failed) + len(preparing)
        jobs = [job for job in {job.name: job for job in jobs}.values() if job.state == "failed"]
        refuse_others(jobs, self.site.owner)
        forget_failures(self.cluster, self.watcher.ledger, jobs, keys)
        self.look_again()
        return count

    def cancel(self, sweep: Sweep) -> list[str]:
        stopped: dict[str, JobView] = {}
        jobs = self._to_cancel(sweep, stopped)
        refuse_others(jobs, self.site.owner)
        if sweep.is_whole:
            cancel_sweep(self.cluster, sweep.name)  # before the Jobs, so that nothing follows them
        while jobs:
            stop_jobs(self.cluster, self.watcher.ledger, jobs, self.site.owner)
            stopped |= {job.uid: job for job in jobs}
            self.look_again()  # a driver that had not heard of it may just have sent another
            jobs = self._to_cancel(sweep, stopped)
        names = {point.directory: str(point) for point in sweep.points}
        said = [
            f"asked to save and stop: {names.get(job.name, job.name)}" for job in stopped.values()
        ]
        more = len(said) - show.SHOWN
        return said[: show.SHOWN] + ([f"and {more} more"] if more > 0 else [])

    def _to_cancel(self, sweep: Sweep, stopped: Mapping[str, JobView]) -> list[JobView]:
        """The live Jobs of these points, and of a whole sweep also those that no point has."""
        jobs = [job for point in sweep.points for job in self._jobs_about(point)]
        others = self._jobs_of(sweep) if sweep.is_whole else []
        jobs += [job for job in others if job.kind != "collect"]
        live = {job.name: job for job in jobs if job.state == "live" and not job.is_deleting}
        return [job for job in live.values() if job.uid not in stopped]

    def collect(
        self, sweep: Sweep, adapters: bool, say: Callable[[str], None]
    ) -> collect.Collected:
        """Fetch what is not here yet of these points, and write their sweep down here.

        Raises:
            ConfigError, Interrupted: as `collect.collect`.
        """
        found = collect.collect(self.cluster, self.site, sweep, self.runs, adapters, say)
        record = read_sweep(self.cluster, sweep.name)
        if record is not None and not Runs(self.runs).sweep_file(sweep.name).exists():
            registry.write_record(self.runs, record)
        return found


def _keys(what: str, scores: str | None) -> list[str]:
    return [what, *([score_of(what, scores)] if scores else [])]


# --------------------------------------------------------------------------------------- deleting


AT_ONCE = 16  # requests


def refuse_others(jobs: Iterable[JobView], owner: str) -> None:
    """Refuse Jobs whose label names another owner.

    Raises:
        ConfigError: some of these Jobs are another's.
    """
    others = [job for job in jobs if job.owner != label_value(owner)]
    if others:
        whose = others[0].owner
        raise ConfigError(
            f"{len(others)} of these Jobs are {whose}'s (label stillhouse/owner), you are {owner}:"
            f" {others[0].name} …; nothing was done. Say owner={whose} if they are yours to handle"
        )


def forget_failures(
    cluster: Cluster, ledger: Ledger, jobs: Sequence[JobView], keys: Iterable[str]
) -> None:
    """Let what failed start again: delete these Jobs, and the failures in these ledger keys."""
    # First: as long as they are there, a driver writes down how they ended.
    delete_jobs(cluster, jobs)
    records = {key: ledger.get(key) for key in keys}
    again = ("failed", "alone", "unreadable")
    ledger.write({key: None for key, record in records.items() if record and record.state in again})


def stop_jobs(cluster: Cluster, ledger: Ledger, jobs: Sequence[JobView], owner: str) -> None:
    """Ask running Jobs to checkpoint and stop; the ledger first records that it was requested."""
    mark = Record("cancelled", AGAIN, f"cancelled by {owner}", at=now())
    ledger.write({key: mark for job in jobs for key in keys_of(job)})
    delete_jobs(cluster, jobs)


def delete_jobs(cluster: Cluster, jobs: Iterable[JobView]) -> None:
    """Delete Jobs; one whose pod still saves is there until it has."""

    def one(job: JobView) -> bool:
        return cluster.delete("jobs", job.name, job.uid, foreground=job.state == "live")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, jobs))
