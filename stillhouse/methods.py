"""This file is where a method becomes what one step does: a schedule of λ over the run.

The training loop executes one `StepPlan` per step and does not know which method made it, so two
methods differ in their YAML file only. No torch here: plans can be read and drawn on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.spec import Knots, MethodSpec


@dataclass(frozen=True)
class StepPlan:
    """What one optimiser step does."""

    lmbda: float  # probability that the step's sequences are the student's own rollouts
    off_policy_source: str  # "dataset" or "teacher": where they come from otherwise


def value_at(schedule: float | Knots, fraction: float) -> float:
    """The schedule's value at `fraction` of the run in [0, 1]; at a jump, the value after it."""
    if isinstance(schedule, int | float):
        return float(schedule)
    before = [knot for knot in schedule if knot[0] <= fraction]
    after = [knot for knot in schedule if knot[0] > fraction]
    if not before:
        return float(after[0][1])
    if not after:
        return float(before[-1][1])
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 + (y1 - y0) * (fraction - x0) / (x1 - x0)


def step_plan(method: MethodSpec, step: int, max_steps: int) -> StepPlan:
    """The plan of step `step`, counted from 0, of a run of `max_steps` steps."""
    return StepPlan(value_at(method.lmbda, step / max(1, max_steps)), method.off_policy_source)


def needs_dataset_completions(method: MethodSpec) -> bool:
    """Whether some step may read the dataset's completions."""
    return method.off_policy_source == "dataset" and method.lmbda != 1.0
