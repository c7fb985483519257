"""Print the logs of pods, also of pods that are gone.

The first of these that exists: a pod's own log, through the API; the log.txt that `collect`
fetched; the last lines, which the ledger keeps of what failed.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stillhouse.errors import visible
from stillhouse.rundir import Json
from stillhouse.sweep.cluster.connect import ApiError, Cluster
from stillhouse.sweep.cluster.ledger import Ledger
from stillhouse.sweep.cluster.objects import JobView, PodView, job_view, pod_view, viewed
from stillhouse.sweep.cluster.reasons import by_age
from stillhouse.sweep.points import Point, Sweep
from stillhouse.sweep.show import SHOWN, TAIL_LINES
from stillhouse.sweep.state import FAILED, Observation
from stillhouse.text import say

UNPRINTED = ("new", "waiting")  # states in which a point without pods has printed nothing
FOLLOW_S = 2.0  # how often we look again whether a pod that is waited for has begun


@dataclass(frozen=True)
class Sources:
    """What is needed to find the logs of some points."""

    cluster: Cluster
    sweep: Sweep
    observations: Mapping[str, Observation]
    jobs: Mapping[str, Sequence[JobView]]  # by point's id: those about it
    others: Sequence[JobView]  # that prepare, score or drive
    ledger: Ledger


def show(sources: Sources, follows: bool) -> bool:
    """Print the log of one point, or the ends of those at work or failed.

    Returns:
        whether any was there, or it was said where one is.
    """
    points = sources.sweep.points
    if len(points) == 1:
        return _show_one(sources, points[0], follows)
    tails = {str(point): _tail(sources, point) for point in _of_interest(sources)}
    others = [job for job in sources.others if job.state != "complete"]
    tails |= {job.name: _tail_of(sources.cluster, job) for job in others[-SHOWN:]}
    found = {title: tail for title, tail in tails.items() if tail}
    for title, tail in found.items():
        say(f"==> {title} <==\n{tail}", flush=True)
    if follows:
        _say("-f follows one point: name it with --point")
    return bool(found)


def texts(sources: Sources) -> dict[str, str]:
    """The logs by point's id: whole where it is one point, else the ends."""
    points = sources.sweep.points
    if len(points) == 1:
        text = b"".join(_whole(sources, points[0])).decode(errors="replace")
        return {points[0].id: text} if text else {}
    found = {point.id: _tail(sources, point) for point in _of_interest(sources)}
    return {id_: text for id_, text in found.items() if text}


def _of_interest(sources: Sources) -> list[Point]:
    states = ("running", *FAILED)
    points = sources.sweep.points
    return [point for point in points if sources.observations[point.id].state in states][-SHOWN:]


def _show_one(sources: Sources, point: Point, follows: bool) -> bool:
    found = False
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # pieces end anywhere
    for piece in _followed(sources, point) if follows else _whole(sources, point):
        found = True
        text = decoder.decode(piece).replace("\r\n", "\n").replace("\r", "\n")
        sys.stdout.write(visible(text))
        sys.stdout.flush()
    return found or sources.observations[point.id].state not in UNPRINTED


def _whole(sources: Sources, point: Point) -> Iterator[bytes]:
    """All that a point printed, as far as it can be had without a pod."""
    job = _job(sources, point)
    for pod in reversed(_pods(sources.cluster, job.name)) if job else ():
        try:
            yield from sources.cluster.log(pod.name)
            return
        except ApiError as error:  # it has not begun, or its node forgot it
            _raise_unless_missing(error)
    here = sources.sweep.run(point.id).log_file
    if here.is_file():
        _say(f"(as collected: {here})")
        yield here.read_bytes()
        return
    if sources.observations[point.id].state in UNPRINTED:
        return
    record = sources.ledger.get(point.id)
    kept = "; these are its last lines" if record is not None and record.tail else ""
    if job is not None and job.kind != "train":  # pods that are about no one point
        file = f"sweeps/{job.sweep}.{job.name}.log" if job.sweep else f"sweeps/{job.name}.log"
        _say(f"its pod is gone, its log is {file} on the volume of runs{kept}")
    else:
        _say(f"its pod is gone, `stillhouse collect {sources.sweep.name}` fetches its log{kept}")
    if record is not None and record.tail:
        yield f"{record.tail}\n".encode()


def _followed(sources: Sources, point: Point) -> Iterator[bytes]:
    """What a point prints, attempt after attempt, until its Job ends."""
    job = _job(sources, point)
    if job is None or job.state != "live":
        yield from _whole(sources, point)
        return
    seen: set[str] = set()
    said = ""
    while True:
        live = sources.cluster.read("jobs", job.name)
        fresh = [p for p in _pods(sources.cluster, job.name) if p.uid not in seen and p.started]
        for pod in fresh:
            seen.add(pod.uid)
            yield from sources.cluster.log(pod.name, follow=True)
        if live is None or viewed(job_view, live).state != "live":
            return
        if not fresh:
            cause = sources.observations[point.id].cause
            if not seen and cause and cause != said:
                said = cause
                _say(f"waits: {cause}")
            sources.cluster.stop.wait(FOLLOW_S)


def _tail(sources: Sources, point: Point) -> str | None:
    """The last lines of a point's log: of a pod, or what the ledger kept of one that failed."""
    job = _job(sources, point)
    tail = _tail_of(sources.cluster, job) if job else None
    record = sources.ledger.get(point.id) if tail is None else None
    return record.tail if record else tail


def _tail_of(cluster: Cluster, job: JobView) -> str | None:
    for pod in reversed(_pods(cluster, job.name)):
        try:
            text = b"".join(cluster.log(pod.name, tail=TAIL_LINES))
        except ApiError as error:
            _raise_unless_missing(error)
        else:
            return text.decode(errors="replace").rstrip("\n")
    return None


def _job(sources: Sources, point: Point) -> JobView | None:
    """The most informative Job of a point: one that runs, else one that failed, else the last."""
    order = {"live": 2, "failed": 1, "complete": 0}
    jobs = sources.jobs[point.id]
    return max(jobs, key=lambda job: (order[job.state], job.created), default=None)


def pods(cluster: Cluster, job: str) -> Iterator[Json]:
    """The pods of a Job that are still there, as the API tells them."""
    for items, _ in cluster.pages("pods", f"batch.kubernetes.io/job-name={job}"):
        yield from items


def _pods(cluster: Cluster, job: str) -> list[PodView]:
    return by_age([viewed(pod_view, pod) for pod in pods(cluster, job)])


def _raise_unless_missing(error: ApiError) -> None:
    """A log that is not there yet, or not any more, is not there; anything else is an error."""
    if error.status not in (400, 404):
        raise error


def _say(text: str) -> None:
    say(text, file=sys.stderr, flush=True)
