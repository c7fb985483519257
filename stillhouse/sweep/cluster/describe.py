"""Format the details of a point's Jobs and pods, and of Jobs such as the drivers of a sweep."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from stillhouse.rundir import Json
from stillhouse.spec import SiteSpec
from stillhouse.sweep.cluster.cache import NamespaceCache
from stillhouse.sweep.cluster.job_outcomes import attempts
from stillhouse.sweep.cluster.objects import JobView, PodView
from stillhouse.sweep.cluster.reasons import by_age, end_of_pod
from stillhouse.sweep.site import away_words
from stillhouse.sweep.state import Record
from stillhouse.text import duration

CALLED = {
    "drive": "driver",
    "prepare": "preparing",
    "eval": "scoring",
    "collect": "collector",
    "push": "push",
}  # kinds of Jobs that no point's state tells of


def job_details(
    jobs: Sequence[JobView], cache: NamespaceCache, records: Mapping[str, Record | None]
) -> list[str]:
    """Jobs and pods of one point, and what the ledger kept of it."""
    lines: list[str] = []
    for job in sorted(jobs, key=lambda job: job.created):
        pods = by_age(cache.pods_of(job))
        here = {pod.name for pod in pods}
        lines.append(f"  job {job.name}: {_of_job(job)}")
        lines += [f"    {_of_attempt(one)}" for one in attempts(job) if one["pod"] not in here]
        for pod in pods:
            lines.append(f"    pod {pod.name}: {_of_pod(pod)}")
            tail = end_of_pod(pod).tail if pod.is_over else None
            lines += [f"      | {line}" for line in (tail or "").splitlines()]
    for key, record in records.items():
        if record is not None:
            lines.append(f"  ledger {key}: {_of_record(record)}")
            lines += [f"    | {line}" for line in (record.tail or "").splitlines()]
    return lines


def said_of_others(jobs: Sequence[JobView], cache: NamespaceCache) -> list[str]:
    """Jobs that no point's state shows: drivers, and others that have not ended."""
    lines: list[str] = []
    for job in sorted(jobs, key=lambda job: job.created):
        if job.kind not in CALLED or (job.state != "live" and job.kind != "drive"):
            continue
        if job.kind == "eval" and {*job.points} & {*cache.wanting(job)}:
            continue  # those points say it
        reason = cache.why(job) if job.state == "live" else None
        how = f"waits: {reason.words}" if reason else _since("runs", job.started)
        if job.state != "live":
            how = f"ended ({job.state}){_at(job.ended)}"
        lines.append(f"  {CALLED[job.kind]} {job.name}: {how}")
    return lines


def how_to_follow(job: str, target: str, site: SiteSpec, is_collected: bool = False) -> list[str]:
    """Commands for a Job that was sent; `target`: what it is about, a run's or a sweep's name."""
    there = away_words(site)
    return [
        f"  follow  stillhouse logs {job} -f {there}",
        f"  read    stillhouse status {target} {there}",
        *([f"          stillhouse collect {target} {there}"] if is_collected else []),
        f"  cancel  stillhouse cancel {target} {there}",
    ]


def _of_job(job: JobView) -> str:
    said = [job.state if not job.is_suspended else "suspended", f"{job.owner}'s"]
    said += [f"code {job.code}"] if job.code else []
    said += [f"{job.devices} device{'s' if job.devices > 1 else ''}"] if job.devices else []
    said += [f"created{_at(job.created)}"]
    said += [f"started{_at(job.started)}"] if job.started else []
    said += [f"ended{_at(job.ended)}"] if job.ended else []
    return ", ".join(said)


def _of_attempt(one: Json) -> str:
    """An attempt that failed, whose pod may be gone, as the loop wrote it onto the Job."""
    return f"attempt {one['pod']}: exit code {one['code']}: {one['cause']}"


def _of_pod(pod: PodView) -> str:
    said = [pod.phase.lower()]
    said += [f"on {pod.node}"] if pod.node else []
    said += [f"began{_at(pod.started)}"] if pod.started else []
    if pod.is_over and pod.phase != "Succeeded":
        end = end_of_pod(pod)
        said.append(f"exit code {end.code}: {end.cause}")
    return ", ".join(said)


def _of_record(record: Record) -> str:
    times = {
        "queued": record.queued,
        "starting": record.starting,
        "running": record.running,
        "lost": record.lost,
    }
    spent = [f"{what} {duration(seconds)}" for what, seconds in times.items() if seconds]
    said = f"{record.state}{_at(record.at)}"
    return ", ".join([said, *([f"exit code {record.code}"] if record.code else []), *spent])


def _at(seconds: float | None) -> str:
    return time.strftime(" %Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _since(doing: str, seconds: float | None) -> str:
    return f"{doing} for {duration(max(0.0, time.time() - seconds))}" if seconds else doing
