"""Delete Jobs of a cluster: failed ones to be tried again, live ones so that they save and stop.

Only Jobs as they were seen (by uid) are deleted, and only one's own: a label names the owner.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from stillhouse.errors import AGAIN, ConfigError
from stillhouse.rundir import now
from stillhouse.sweep.cluster.cache import keys_of
from stillhouse.sweep.cluster.connect import Cluster
from stillhouse.sweep.cluster.ledger import Ledger
from stillhouse.sweep.cluster.manifest import label_value
from stillhouse.sweep.cluster.objects import JobView
from stillhouse.sweep.outcome import Record

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
    delete(cluster, jobs)  # first: as long as they are there, a driver writes down how they ended
    records = {key: ledger.get(key) for key in keys}
    again = ("failed", "alone", "unreadable")
    ledger.write({key: None for key, record in records.items() if record and record.state in again})


def stop(cluster: Cluster, ledger: Ledger, jobs: Sequence[JobView], owner: str) -> None:
    """Ask running Jobs to checkpoint and stop; the ledger first records that it was requested."""
    mark = Record("cancelled", AGAIN, f"cancelled by {owner}", at=now())
    ledger.write({key: mark for job in jobs for key in keys_of(job)})
    delete(cluster, jobs)


def delete(cluster: Cluster, jobs: Iterable[JobView]) -> None:
    """Delete Jobs; one whose pod still saves is there until it has."""

    def one(job: JobView) -> bool:
        return cluster.delete("jobs", job.name, job.uid, foreground=job.state == "live")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, jobs))
