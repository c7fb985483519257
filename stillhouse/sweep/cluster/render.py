"""Render the Jobs that `run` would send for a sweep, without any cluster.

Nothing is known of what was done before, so these are all of its Jobs, in the order in which they
start: each group's pair, each point, each pack to score. The planner of `run` cuts the packs
(`plan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stillhouse.sweep.cluster.code_bundle import bundle
from stillhouse.sweep.cluster.jobspec import JobSpec, JobSpecs, refuse_collisions
from stillhouse.sweep.cluster.manifest import render, to_yaml
from stillhouse.sweep.plan import Action, Situation, actions
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.state import Observation


def every_step(sweep: Sweep) -> list[JobSpec]:
    """All that a sweep, or some points of it, takes.

    Raises:
        ConfigError: two of them would have one name.
    """
    groups, steps_of = sweep.groups, JobSpecs(sweep)
    steps = [
        *(steps_of.of(Action("prepare", group)) for group in dict.fromkeys(groups.values())),
        *(steps_of.of(Action("train", group, (id_,))) for id_, group in groups.items()),
        *(steps_of.of(action) for action in _evaluations(sweep)),
    ]
    refuse_collisions(steps)
    return steps


def prepares_of(sweep: Sweep) -> list[str]:
    """Names of the Jobs that prepare its pairs; sweeps of one pair share one."""
    steps, groups = JobSpecs(sweep), dict.fromkeys(sweep.groups.values())
    return [steps.of(Action("prepare", group)).name for group in groups]


def _evaluations(sweep: Sweep) -> Iterable[Action]:
    """The packs of a sweep whose points were all trained just now."""
    if sweep.suite is None:
        return ()
    trained = Observation("waiting", is_trained=True)
    now = Situation(
        groups=sweep.groups,
        packs={point.id: point.pack for point in sweep.points},
        observations=dict.fromkeys(sweep.groups, trained),
        baselines=sweep.baselines,
        prepared=dict.fromkeys(sweep.groups.values(), True),
        live=(),
        since=0.0,
    )
    return actions(now, len(sweep.points) + len(sweep.baselines), sweep.pack)


def manifests(sweep: Sweep) -> Iterator[str]:
    """What is sent, as YAML, one Job at a time."""
    code = bundle(sweep.suite).key
    for step in every_step(sweep):
        yield to_yaml(render(step, sweep.site, code))
