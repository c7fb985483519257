"""Write a finished copy of the distribution-cliff sweep to disk, with random numbers.

It is a `sample_runs` sweep over loss and method, changed to look like that of sweeps/cliff.yaml:
each loss family has a control in that family only, the learning rate follows from the loss, one
method has twice the steps, held-out accuracy is measured during training, and token counts differ
by method.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.methods import value_at
from stillhouse.rundir import RunDir, Runs, read_json, write_atomic, write_json
from tests.builders.sample_runs import Sample, write_sample

METHODS = (
    "on_policy_gkd",
    "extended_on_policy",
    "hybrid",
    "hybrid_gradual",
    "teacher_seeded",
    "mixture",
    "replay_buffer",
    "kl_anchored",
    "reverse_curriculum",
    "cold_start",
    "off_policy",
    "sft",
)
SKIPPED = (("ce_pg", "off_policy"), ("jsd", "sft"))
RATES = {"ce_pg": 1e-3, "jsd": 5e-3}
STEPS = 100
EVERY = 20


@dataclasses.dataclass(frozen=True)
class Cliff:
    """What happens to the arms; an arm is named by (loss, method)."""

    name: str = "cliff"
    methods: Sequence[str] = METHODS
    seeds: int = 8
    collapsed: Sequence[tuple[str, str]] = (
        ("ce_pg", "hybrid"),
    )  # 0 after half the run, and so left
    dipped: Sequence[tuple[str, str]] = (("ce_pg", "reverse_curriculum"),)  # loses 0.4 in the end


SMALL = Cliff(
    methods=("on_policy_gkd", "extended_on_policy", "hybrid", "reverse_curriculum")
    + ("teacher_seeded", "off_policy", "sft"),
    seeds=4,
)


def write_cliff(root: Path, cliff: Cliff | None = None) -> list[RunDir]:
    """Write the sweep below `root`; its run directories in the order of its points."""
    cliff = cliff or Cliff()
    sample = Sample(
        name=cliff.name,
        axes={"loss": ["ce_pg", "jsd"], "method": list(cliff.methods)},
        seeds=cliff.seeds,
        base={"quant": "none"},
        ability=lambda arm: -3.0 if (arm["loss"], arm["method"]) in cliff.collapsed else 0.8,
        question="Does any off-policy phase make a student with a larger teacher collapse?",
        compare={"by": "method", "metric": "tiny_gen/exact_match", "baseline": "on_policy_gkd"},
        baselines=("teacher", "student"),
        steps=STEPS,
    )
    runs = write_sample(root, sample)
    path = Runs(root).sweep_file(cliff.name)
    sweep = read_json(path)
    assert sweep is not None
    kept: list[dict[str, Any]] = []
    made: list[RunDir] = []
    for index, (point, run) in enumerate(zip(sweep["points"], runs, strict=True)):
        loss, method, seed = (point["overrides"][key] for key in ("loss", "method", "seed"))
        if (loss, method) in SKIPPED:
            continue
        rate = {"learning_rate": RATES[loss], "seed": seed}
        kept.append(point | {"overrides": {"loss": loss, "method": method, **rate}})
        made.append(run)
        _write_metrics(cliff, run, loss, method, seed, index)
    axes = sweep["axes"] | {"learning_rate": list(RATES.values())}
    write_json(path, sweep | {"points": kept, "axes": axes})
    return made


def _write_metrics(
    cliff: Cliff, run: RunDir, loss: str, method: str, seed: int, index: int
) -> None:
    record = run.record()
    assert record is not None
    spec = record["spec"]
    steps = STEPS * (2 if method == "extended_on_policy" else 1)
    luck = 0.05 * np.random.default_rng((7, seed)).normal()
    rng = np.random.default_rng((8, index))
    lines = run.metrics()
    lines += [dict(lines[-1]) for _ in range(steps - len(lines))]
    for step, line in enumerate(lines):
        share = value_at(knots(spec["method"]["lmbda"]), step / steps)
        line["step"] = step
        line |= {"tokens/prompt": 900, "tokens/completion": 700}
        line |= {"tokens/rollout": 800 * share, "tokens/teacher": 700 * (1 - share)}
        if method == "teacher_seeded":
            seeds = int(value_at(knots(spec["method"]["seed_tokens"]), step / steps))
            line |= {"train/seed_tokens": seeds, "tokens/teacher": 700}
        if (step + 1) % EVERY == 0:
            accuracy = 0.75 - 0.6 * math.exp(-(step + 1) / 30) + luck + 0.03 * rng.normal()
            arm = (loss, method)
            if arm in cliff.collapsed and step + 1 > STEPS / 2:
                accuracy = 0.02 + 0.01 * rng.normal()
            if arm in cliff.dipped and step + 1 == steps:
                accuracy -= 0.4
            line["eval/accuracy"] = min(1.0, max(0.0, accuracy))
    run.update_status(step=steps, max_steps=steps)
    write_atomic(run.metrics_file, "".join(json.dumps(line) + "\n" for line in lines).encode())


def knots(plain: Any) -> Any:
    """A schedule as `methods` reads it, of one that was written as JSON."""
    return tuple((at, value) for at, value in plain) if isinstance(plain, list) else plain
