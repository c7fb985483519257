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
from stillhouse.sweep.grid import Sweep
from stillhouse.sweep.plan import Action, Baseline, Situation, actions, fixed_packs, groups_of
from stillhouse.sweep.registry import Roster, baseline_rows
from stillhouse.sweep.state import Observation


def every_step(sweep: Sweep, only: Roster) -> list[JobSpec]:
    """All that a sweep, or some points of it, takes.

    Raises:
        ConfigError: two of them would have one name.
    """
    everywhere, steps_of = groups_of(sweep), JobSpecs(sweep)
    groups = {id_: group for id_, group in everywhere.items() if id_ in only.by_id}
    steps = [
        *(steps_of.of(Action("prepare", group)) for group in dict.fromkeys(groups.values())),
        *(steps_of.of(Action("train", group, (id_,))) for id_, group in groups.items()),
        *(steps_of.of(action) for action in _evaluations(sweep, everywhere, groups)),
    ]
    refuse_collisions(steps)
    return steps


def prepares_of(sweep: Sweep) -> list[str]:
    """Names of the Jobs that prepare its pairs; sweeps of one pair share one."""
    steps, groups = JobSpecs(sweep), dict.fromkeys(groups_of(sweep).values())
    return [steps.of(Action("prepare", group)).name for group in groups]


def _evaluations(
    sweep: Sweep, everywhere: dict[str, str], groups: dict[str, str]
) -> Iterable[Action]:
    """The packs of a sweep whose points were all trained just now."""
    if sweep.suite is None:
        return ()
    packs = fixed_packs(everywhere, sweep.pack)
    baselines = [
        Baseline(row.directory, row.label, frozenset(everywhere[id_] for id_ in row.points))
        for row in baseline_rows(sweep)
    ]
    trained = Observation("waiting", is_trained=True)
    now = Situation(
        groups=groups,
        packs={id_: packs[id_] for id_ in groups},
        observations=dict.fromkeys(groups, trained),
        baselines=baselines,
        prepared=dict.fromkeys(groups.values(), True),
        live=(),
        since=0.0,
    )
    return actions(now, len(groups) + len(baselines), sweep.pack)


def manifests(sweep: Sweep, only: Roster) -> Iterator[str]:
    """What is sent, as YAML, one Job at a time."""
    code = bundle(sweep.suite).key
    for step in every_step(sweep, only):
        yield to_yaml(render(step, sweep.site, code))
