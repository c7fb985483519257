"""Translate a method into a plan for each step, by evaluating its schedules at that step.

The training loop executes one `StepPlan` per step and does not know which method made it, so two
methods differ only in their YAML files. Torch is not imported: plans can be read and drawn on a
laptop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stillhouse.spec import Knots, TrainSpec
from stillhouse.text import number_of

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 20  # characters of a drawn schedule
ENDS = 7  # of its first and last value: 0 → 0.5


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step does."""

    is_cold: bool  # of the cold start: the teacher's answers to prompts reserved for it
    lmbda: float  # share of on-policy data, in [0, 1]
    lmbda_as: str  # "coin": one kind of data, by chance; "weight": both, their losses mixed
    off_policy_source: str  # "dataset" or "teacher": what is not a rollout
    on_loss: str  # "jsd", "pg" or "topk"
    off_loss: str  # "jsd" or "ce"
    seed_tokens: int  # of a rollout, that the teacher writes
    anchor_weight: float  # of KL(student || student at its start)
    advantage_clip: float  # of pg, in nats
    replay_size: int  # steps whose sequences are kept; 0: none
    replay_injection: float  # probability that teacher sequences are kept too
    rollout_tokens: int  # that a rollout may have


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


def step_plan(spec: TrainSpec, step: int) -> StepPlan:
    """The plan of step `step`, counted from 0."""
    method, loss = spec.method, spec.loss
    fraction, most = step / max(1, spec.training.max_steps), spec.rollout.max_new_tokens
    if step < spec.cold_steps:
        method = replace(
            method, lmbda=0.0, lmbda_as="coin", off_policy_source="teacher", seed_tokens=0.0,
            replay_size=0, replay_injection=0.0,
        )  # fmt: skip
    return StepPlan(
        is_cold=step < spec.cold_steps,
        lmbda=value_at(method.lmbda, fraction),
        lmbda_as=method.lmbda_as,
        off_policy_source=method.off_policy_source,
        on_loss=loss.on_loss,
        off_loss=loss.off_loss,
        # 20 (1 - 2 x) may come out as 7.999999 where 8 is meant.
        seed_tokens=int(value_at(method.seed_tokens, fraction) + 1e-9),
        anchor_weight=value_at(method.anchor_weight, fraction),
        advantage_clip=value_at(loss.advantage_clip, fraction),
        replay_size=method.replay_size,
        replay_injection=method.replay_injection,
        rollout_tokens=max(1, round(value_at(spec.rollout.horizon, fraction) * most)),
    )


def first_answered_step(spec: TrainSpec) -> int | None:
    """The first step that may learn the dataset's own answers; None: prompts alone are enough."""
    if spec.method.off_policy_source != "dataset" or spec.method.lmbda == 1:
        return None
    steps = range(spec.cold_steps, spec.training.max_steps)
    return next((step for step in steps if step_plan(spec, step).lmbda < 1), None)


def drawn(spec: TrainSpec) -> str:
    """The method as one line of text: λ over the run, then what is learnt from, and how."""
    method, loss, most = spec.method, spec.loss, spec.rollout.max_new_tokens
    learnt: list[str] = []
    if method.lmbda != 0:
        clip = f" (clip {_ends(loss.advantage_clip)})" if loss.on_loss == "pg" else ""
        if loss.fixed_advantage is not None:
            clip = f" (advantage {loss.fixed_advantage:g})"
        learnt.append(f"{loss.on_loss} on rollouts{clip}")
    if method.lmbda != 1 or method.replay_injection:
        learnt.append(f"{loss.off_loss} on {method.off_policy_source} sequences")
    parts = [", ".join(learnt)]
    if method.lmbda_as == "weight":
        parts.append("both in each step, λ their weight")
    if method.seed_tokens != 0:
        parts.append(f"seed tokens {_bars(method.seed_tokens, 0)} {_ends(method.seed_tokens)}")
    parts += _rescued(spec)
    if spec.rollout.horizon != 1:
        ends = _ends(spec.rollout.horizon)
        parts.append(f"horizon {_bars(spec.rollout.horizon, 1)} {ends} of {most} tokens")
    if loss.position_weights != 1:
        bars = _bars(loss.position_weights, 1)
        parts.append(f"weights along an answer {bars} {_ends(loss.position_weights)}")
    if method.replay_size:
        rate = f"teacher sequences in {method.replay_injection:g} of them"
        parts.append(f"drawn from a buffer of {method.replay_size} steps, {rate}")
    if loss.ema_decay is not None:
        average = f"the student's average (decay {loss.ema_decay:g})"
        parts.append(f"teacher: {average if loss.ema_decay else 'the student as it is'}")
    if method.anchor_weight != 0:
        parts.append(f"anchor {_ends(method.anchor_weight)}")
    parts.append(number_of(spec.training.max_steps, "step"))
    return f"λ {_bars(method.lmbda, 1)} {_ends(method.lmbda):<{ENDS}}  {'; '.join(parts)}"


def _rescued(spec: TrainSpec) -> list[str]:
    """What helps besides the method."""
    rescue, said = spec.rescue, list[str]()
    if rescue.cold_start:
        said.append(
            f"first {number_of(spec.cold_steps, 'step')} on the teacher's answers to"
            f" {number_of(rescue.cold_prompts, 'prompt')}"
        )
    if rescue.kept_prompts != 1:
        bars, ends = _bars(rescue.kept_prompts, 1), _ends(rescue.kept_prompts)
        said.append(f"prompts kept {bars} {ends} (by {rescue.kept_by})")
    if rescue.other_prompts:
        said.append(f"{rescue.other_prompts:.0%} other prompts")
    return said


def _bars(schedule: float | Knots, top: float) -> str:
    """The schedule as a row of bars, as high as it stands in the middle of each piece of the run.

    A full bar is `top`, or the highest of them if that is more.
    """
    values = [value_at(schedule, (i + 0.5) / WIDTH) for i in range(WIDTH)]
    full = max(top, *values)
    return "".join(BARS[round(value / full * (len(BARS) - 1))] for value in values)


def _ends(schedule: float | Knots) -> str:
    """`0.7`, or `0 → 1`."""
    start, end = value_at(schedule, 0), value_at(schedule, 1)
    return f"{start:g} → {end:g}" if isinstance(schedule, tuple) else f"{start:g}"
