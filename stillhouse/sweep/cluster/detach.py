"""Run the loop over a sweep inside the cluster: the same `run`, in a Job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillhouse.errors import ConfigError
from stillhouse.sweep.cluster.cache import NamespaceCache
from stillhouse.sweep.cluster.code_bundle import bundle, sweep_file
from stillhouse.sweep.cluster.connect import Cluster
from stillhouse.sweep.cluster.create import JobCreator
from stillhouse.sweep.cluster.describe import how_to_follow
from stillhouse.sweep.cluster.jobspec import drive_step
from stillhouse.sweep.cluster.ownership import have_config_map, refuse_drift
from stillhouse.sweep.cluster.refusals import why_not_made
from stillhouse.sweep.points import Sweep


def detach(
    cluster: Cluster, cache: NamespaceCache, sweep: Sweep, options: Sequence[str]
) -> list[str]:
    """Send the driver of a sweep, or find the one that is at work; what there is to say about it.

    Raises:
        ConfigError: the sweep's file cannot travel, something else has a name that is needed, or
            there is no room for a Job.
        ContractError: the Job there is about something else.
    """
    content = Path(sweep.file).read_bytes() if sweep.file else None
    step = drive_step(sweep, content, options)
    there = cache.job(step.name)
    if there is not None:
        refuse_drift(there, step)
    said = "is at work already"
    if there is None or there.state != "live" or there.is_deleting:
        creator = JobCreator(sweep.site, cluster, cache.ledger, bundle(sweep.suite))
        creator.send_code()
        if content is not None and step.sweep_file is not None and sweep.file is not None:
            file = sweep_file(step.sweep_file, sweep.name, Path(sweep.file).name, content)
            have_config_map(cluster, file)
        order = creator.order(step)
        made = creator.make(order)
        if made.blocked_by is not None:
            raise ConfigError(f"driver {step.name}: {why_not_made(made.blocked_by)}; run it again")
        for job in order.replaced.values():
            said = f"sent again (the last one ended: {job.state})"
        if made.is_new and not order.replaced:
            said = "sent"
    return [
        f"driver {step.name}: {said}; this machine is not needed any more",
        *how_to_follow(step.name, sweep.name, sweep.site),
    ]
