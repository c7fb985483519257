"""Run the loop over a sweep inside the cluster: the same `run`, in a Job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillhouse.sweep.cluster.code_bundle import bundle, sweep_file
from stillhouse.sweep.cluster.connect import Cluster
from stillhouse.sweep.cluster.jobspec import drive_step
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.cluster.ownership import have_config_map, have_job, ours
from stillhouse.sweep.grid import Sweep
from stillhouse.sweep.site import away_words


def detach(cluster: Cluster, sweep: Sweep, options: Sequence[str]) -> list[str]:
    """Send the driver of a sweep, or find the one that is at work; what there is to say about it.

    Raises:
        ConfigError: the sweep's file cannot travel, or something else has a name that is needed.
        ContractError: the Job there is about something else.
    """
    content = Path(sweep.file).read_bytes() if sweep.file else None
    step = drive_step(sweep, content, options)
    there = cluster.read("jobs", step.name)
    said = "sent"
    if there is not None:
        job = ours(there, step)
        if job.state == "live" and not job.is_deleting:
            return _how_to_follow(sweep, step.name, f"driver {step.name} is at work already")
        cluster.delete("jobs", job.name, job.uid)  # it came to its end; there is more to do now
        said = f"sent again (the last one ended: {job.state})"
    code = bundle(sweep.suite)
    have_config_map(cluster, code.manifest)
    if content is not None and step.sweep_file is not None and sweep.file is not None:
        file = sweep_file(step.sweep_file, sweep.name, Path(sweep.file).name, content)
        have_config_map(cluster, file)
    have_job(cluster, step, render(step, sweep.site, code.key))
    return _how_to_follow(sweep, step.name, f"driver {step.name}: {said}")


def _how_to_follow(sweep: Sweep, driver: str, said: str) -> list[str]:
    there = away_words(sweep.site)
    return [
        f"{said}; this machine is not needed any more",
        f"  follow  stillhouse logs {driver} -f {there}",
        f"  read    stillhouse status {sweep.name} {there}",
        f"  cancel  stillhouse cancel {sweep.name} {there}",
    ]
