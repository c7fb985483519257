"""Decide which Job is better replaced by a new one than waited for.

Pure. Between two attempts Kubernetes waits 10 s, then 20, 40 and so on up to ten minutes, also
where an attempt cost nothing (evicted, or asked to stop and saved). A new Job begins with 10 s
again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from stillhouse.errors import AGAIN
from stillhouse.rundir import Json
from stillhouse.spec import SiteSpec
from stillhouse.sweep.cluster.job_outcomes import attempts_patch
from stillhouse.sweep.cluster.manifest import asked, label_value
from stillhouse.sweep.cluster.objects import (
    ATTEMPTS,
    BEFORE,
    JobView,
    PodView,
    last_words,
    told_attempts,
)
from stillhouse.sweep.cluster.reasons import by_age
from stillhouse.sweep.cluster.refusals import differing

SLOW = 2  # attempts after which the pause is longer than that before a new Job's second


def is_better_made_anew(
    job: JobView, pods: Sequence[PodView], site: SiteSpec, was_there: bool
) -> bool:
    """Whether a new Job would start where this one waits; one of which a pod works is left.

    `was_there`: before this launcher came. What another sends later is left, too: two launchers do
    not take turns.
    """
    if job.is_deleting or job.ready or job.failed or job.owner != label_value(site.owner):
        return False
    if was_there and of_other_site(job, site):
        return _has_no_work(job, pods)
    return _is_slowed_down(job, pods)


def of_other_site(job: JobView, site: SiteSpec) -> str:
    """How the site that a Job was sent from differs from this one; '' where it does not."""
    if job.asks is None:
        return ""
    ours = asked(job.kind, job.devices, site)
    return "" if job.asks == ours else differing(job.asks, ours)


def _has_no_work(job: JobView, pods: Sequence[PodView]) -> bool:
    """Whether all that is there of a Job is a pod that did not start yet, or nothing."""
    is_known = len(pods) >= job.active  # a pod that we were not told of yet may be at work
    return is_known and all(pod.phase == "Pending" and not pod.is_deleting for pod in pods)


def _is_slowed_down(job: JobView, pods: Sequence[PodView]) -> bool:
    """Whether a Job that lost nothing but pods, and no attempt, waits longer than a new one would.

    One that has failed is not: a new Job would count its attempts from 0. One that was made anew is
    not: pods count how many of one Job in a row came to no step, and have to come to an end. One of
    a queue is not: it would lose its place there.
    """
    if job.queue is not None or job.is_suspended or job.active:
        return False
    over = [pod for pod in by_age(pods) if pod.is_over]
    if not over or len(over) < len(pods):
        return False
    told = told_attempts(job)
    if any(BEFORE in one for one in told):
        return False
    names = {pod.name for pod in over} | {one["pod"] for one in told}
    return len(names) >= SLOW and _costs_nothing(over[-1])


def _costs_nothing(pod: PodView) -> bool:
    """Whether the rules of k8s/job.yaml ignore how a pod ended."""
    code = last_words(pod.said).exit_code or pod.exit_code
    return pod.disrupted is not None or code == AGAIN


def carried_attempts(job: JobView, pods: Sequence[PodView]) -> str | None:
    """What the Job that is made in its place is to tell of its attempts; None: there were none."""
    patch = attempts_patch(job, pods)
    told = patch["metadata"]["annotations"][ATTEMPTS] if patch is not None else job.attempts
    if told is None:
        return None
    attempts: list[Json] = [{**one, BEFORE: True} for one in json.loads(told)]
    return json.dumps(attempts, separators=(",", ":"))
