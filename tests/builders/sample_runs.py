"""Write a small finished sweep to disk, with random numbers.

Every file is where `rundir` says and looks as train.py, eval.py and `stillhouse run` write it. The
numbers follow from the arguments: each arm has an ability, all arms of a seed share that seed's
random offset, and documents keep their difficulty, so that paired comparisons find something.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from stillhouse.compose import Overrides, compose, options_of, resolve
from stillhouse.identity import baseline_key, chat_settings, score_key, to_plain
from stillhouse.methods import value_at
from stillhouse.rundir import RunDir, Runs, eval_file, new_record, write_atomic, write_json
from stillhouse.spec import REQUANTISED, SuiteSpec, TaskSpec, TrainSpec

SUITE = SuiteSpec(
    suite_name="tiny",
    tasks=(TaskSpec("tiny_gen", "exact_match", None, True), TaskSpec("tiny_mc", "acc", None, True)),
    apply_chat_template=True,
    limit=None,
    max_gen_toks=44,
)
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0"}
DOCUMENTS = 200
EPOCH = 1_790_000_000.0

# What an arm's overrides are worth on the logit scale, seed apart.
Ability = Callable[[Mapping[str, Any]], float]


def by_lmbda(overrides: Mapping[str, Any]) -> float:
    """The more on-policy, the better, with little left to gain after 0.5."""
    return -0.2 + 1.4 * math.sqrt(float(overrides.get("lmbda", 1.0)))


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sweep to write: axes, seeds and what happened to its points."""

    name: str = "sample"
    axes: Mapping[str, Sequence[Any]] = dataclasses.field(
        default_factory=lambda: {"lmbda": [0, 0.5, 1]}
    )
    seeds: int = 3
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ability: Ability = by_lmbda
    question: str | None = "Does training on the student's own answers help?"
    compare: Mapping[str, Any] | None = dataclasses.field(
        default_factory=lambda: {"by": "lmbda", "metric": "tiny_gen/exact_match", "baseline": 0}
    )
    suite: SuiteSpec = SUITE
    steps: int = 60
    baselines: Sequence[str] = ("teacher", "student", "ptq")
    unstarted: Sequence[int] = ()  # indices into the list of points
    failed: Mapping[int, str] = dataclasses.field(default_factory=dict)  # index -> cause
    other_code: Sequence[int] = ()
    price: float | None = None
    seed_tokens: Callable[[int], int] = lambda step: 0
    scores: bool = False  # train/score logged
    overlaps: bool = False  # overlap/* logged at every tenth step that has rollouts
    gaps: bool = False  # rollout/gap_* and rollout/ess logged at every step that has rollouts


def write_sample(root: Path, sample: Sample | None = None) -> list[RunDir]:
    """Write the sweep below `root`; returns its run directories in the order of its points."""
    sample = sample or Sample()
    runs = Runs(root)
    made: list[RunDir] = []
    points: list[dict[str, Any]] = []
    for index, overrides in enumerate(_grid(sample)):
        spec = compose(_overrides(sample, overrides), TrainSpec, sample.name)
        run = runs.of(spec)
        made.append(run)
        slug, _, point = run.path.name.rpartition("-")
        points.append(
            {"id": point, "slug": slug, "name": None, "tags": [], "overrides": dict(overrides)}
        )
        if index not in sample.unstarted:
            _write_run(sample, index, overrides, spec, run)
    write_json(runs.sweep_file(sample.name), _sweep_json(sample, points, runs, spec))
    return made


def _grid(sample: Sample) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = [{}]
    for leaf, values in sample.axes.items():
        cells = [cell | {leaf: value} for cell in cells for value in values]
    return [cell | {"seed": seed} for cell in cells for seed in range(sample.seeds)]


def _overrides(sample: Sample, point: Mapping[str, Any]) -> Overrides:
    asked: dict[str, Any] = {"pair": "tiny", "max_steps": sample.steps, **sample.base, **point}
    whole = Overrides({}, {})
    for key, value in asked.items():
        whole = resolve(key, value, TrainSpec, "sample").over(whole)
    return whole


def _write_run(
    sample: Sample, index: int, overrides: Mapping[str, Any], spec: TrainSpec, run: RunDir
) -> None:
    record = new_record(spec, VERSIONS)
    record["code"] = {"digest": "c0ffee0123456789", "revision": "1f2e3d4c5b", "dirty": False}
    record["coverage"] = {"quantised_share": 1.0, "adapted_share": 0.9375}
    if index in sample.other_code:
        record["code"]["digest"] = "0ddc0de012345678"
    write_json(run.spec_file, record)
    fails = sample.failed.get(index)
    steps = spec.training.max_steps if fails is None else spec.training.max_steps // 2
    run.update_status(
        phase="done" if fails is None else "failed",
        attempt=1,
        attempts_without_progress=0,
        started=EPOCH,
        finished=EPOCH + 20,
        exit_code=0 if fails is None else 43,
        cause=fails,
        step=steps,
        max_steps=spec.training.max_steps,
        pid=1,
    )
    lines = _metrics(sample, index, overrides, spec, steps)
    write_atomic(run.metrics_file, "".join(json.dumps(line) + "\n" for line in lines).encode())
    if fails is None:
        weights = b"weights"
        write_atomic(run.adapter / "adapter_model.safetensors", weights)
        files = {"adapter_model.safetensors": {"size": len(weights), "sha256": "0"}}
        write_json(run.adapter / "stillhouse.json", {"format": 1, "id": run.id, "files": files})
        write_json(run.cost_file, _cost(sample, index, steps))
        luck = np.random.default_rng((1, overrides["seed"])).normal() * 0.2
        own = np.random.default_rng((2, index)).normal() * 0.05
        arm = {key: value for key, value in overrides.items() if key != "seed"}
        _write_scores(sample, run.path, sample.ability(arm) + luck + own, index, spec)


def _metrics(
    sample: Sample, index: int, overrides: Mapping[str, Any], spec: TrainSpec, steps: int
) -> list[dict[str, Any]]:
    rng = np.random.default_rng((3, index))
    rise = 1 / (1 + math.exp(-sample.ability(overrides)))
    lines: list[dict[str, Any]] = []
    for step in range(steps):
        fraction = step / spec.training.max_steps
        on_policy = bool(rng.random() < value_at(spec.method.lmbda, fraction))
        kl = (0.9 - 0.5 * rise) * math.exp(-4 * fraction) + 0.12 + 0.02 * rng.normal()
        line: dict[str, Any] = {
            "step": step,
            "train/loss": max(0.01, kl if on_policy else 0.8 * kl),
            "train/reverse_kl": max(0.01, kl),
            "train/forward_kl": max(0.01, 1.1 * kl),
            "train/student_entropy": 1.2 - 0.6 * fraction + 0.03 * rng.normal(),
            "train/teacher_entropy": 0.5 + 0.02 * rng.normal(),
            "train/phase": float(on_policy),
            "train/seed_tokens": sample.seed_tokens(step),
            "tokens/completion": 640,
            "time/step": 0.2,
        }
        if sample.scores and step % 5 == 0:
            fell = on_policy and isinstance(spec.method.lmbda, tuple) and fraction >= 0.5
            score = rise * (0.4 + fraction) * (0.3 if fell else 1.0) + 0.03 * rng.normal()
            line["train/score"] = min(1.0, max(0.0, score))
        if sample.gaps and on_policy:
            gap = 2e-6 * (1 + fraction)
            line |= {"rollout/gap_mean": gap, "rollout/gap_max": 9 * gap, "rollout/ess": 1 - gap}
        if sample.overlaps and on_policy and step % 10 == 0:
            noise = 0.01 * rng.normal()
            line |= {
                "overlap/ratio": 0.6 + 0.3 * fraction + noise,
                "overlap/ratio/0-7": 0.65 + 0.3 * fraction + noise,
                "overlap/ratio/8-": 0.5 + 0.3 * fraction + noise,
                "overlap/advantage": -0.1 + 0.08 * fraction + noise / 10,
                "overlap/advantage/0-7": -0.05 + 0.04 * fraction + noise / 10,
                "overlap/advantage/8-": -0.15 + 0.12 * fraction + noise / 10,
                "overlap/entropy_gap": 0.2 - 0.1 * fraction + noise,
                "overlap/mass_student": 0.98 + noise / 10,
                "overlap/mass_teacher": 0.97 + noise / 10,
                "overlap/positions": 640.0,
                "overlap/empty": 16.0,
            }
        lines.append(line)
    return lines


def _cost(sample: Sample, index: int, steps: int) -> dict[str, Any]:
    seconds = {"load": 0.4, "rollout": 0.09 * steps, "teacher": 0.02 * steps, "train": 0.05 * steps}
    seconds |= {"eval": 0.0, "save": 0.2}
    seconds["total"] = sum(seconds.values()) + 0.01 * index
    tokens = {"prompt": 900, "completion": 640, "rollout": 600, "teacher": 0}
    return {
        "seconds": seconds,
        "tokens": {kind: n * steps for kind, n in tokens.items()},
        "device": "cpu",
        "devices": 1,
        "threads": 1,
        "price_usd_per_hour": sample.price,
    }


def _write_scores(
    sample: Sample, directory: Path, ability: float, draw: int, spec: TrainSpec
) -> None:
    for place, task in enumerate(sample.suite.tasks):
        hardness = np.random.default_rng((4, place)).normal(size=DOCUMENTS) * 1.5
        right = np.random.default_rng((5, place, draw)).random(DOCUMENTS)
        values = (right < 1 / (1 + np.exp(hardness - ability))).astype(float)
        share = float(values.mean())
        result = {
            "format": 1,
            "task": task.task,
            "metric": task.metric,
            "value": share,
            "higher_is_better": task.higher_is_better,
            "n": DOCUMENTS,
            "key": score_key(sample.suite, task),
            "metrics": {task.metric: share},
            "samples": [{"doc": doc, "value": float(v)} for doc, v in enumerate(values)],
            "adapter_digest": None,
            "quant_type": spec.quant.quant_type,
            "versions": {"lm_eval": "0.4.13", **VERSIONS, "task_version": 1},
            "seconds": 1.5,
            "finished": EPOCH + 30,
        }
        write_json(eval_file(directory, task.task), result)


def _sweep_json(
    sample: Sample, points: list[dict[str, Any]], runs: Runs, spec: TrainSpec
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for place, label in enumerate(sample.baselines):
        key = baseline_key(label, spec.pair, spec.quant, spec.data)
        directory = runs.baseline(label, key)
        quant = to_plain(spec)["quant"] if label == "ptq" else None
        entry = {"format": 1, "label": label, "pair": to_plain(spec)["pair"], "quant": quant}
        chat = chat_settings(to_plain(spec)["data"])
        entry |= {} if chat == chat_settings({}) else {"chat": chat}
        write_json(directory / "baseline.json", entry)
        ability = {"teacher": 2.5, "student": -1.1, "ptq": -1.3}[label]
        _write_scores(sample, directory, ability, 10_000 + place, spec)
        rows.append(
            {
                "label": label,
                "pair_name": spec.pair.pair_name,
                "quant_type": spec.quant.quant_type if label == "ptq" else None,
                "directory": directory.name,
            }
        )
    return {
        "format": 1,
        "name": sample.name,
        "file": f"sweeps/{sample.name}.yaml",
        "question": sample.question,
        "compare": sample.compare,
        "axes": {leaf: list(values) for leaf, values in sample.axes.items()},
        "suite": TypeAdapter(SuiteSpec).dump_python(sample.suite, mode="json"),
        "pack": 8,
        "points": points,
        "baselines": rows,
        "created": EPOCH,
    }


def cliff(name: str = "cliff") -> Sample:
    """Methods with and without an off-policy phase; the score falls where a switch comes."""
    worth = {"on_policy_gkd": 1.2, "hybrid": -0.8, "off_policy": 0.1, "reverse_curriculum": 0.3}
    assert set(worth) <= set(options_of("method"))
    return Sample(
        name=name,
        axes={"method": list(worth)},
        ability=lambda overrides: worth[overrides["method"]],
        question="Does a switch from off-policy to on-policy training hurt?",
        compare={"by": "method", "metric": "tiny_gen/exact_match", "baseline": "on_policy_gkd"},
        scores=True,
        price=0.75,
    )


CAUSE = "Diverged: loss 312.4 at step 30 is above <100> nats per token"
GRID = Sample(
    name="grid",
    axes={"lmbda": [0, 1], "beta": [0, 1]},
    base={"weight_decay": 0.01},
    unstarted=(5,),
    failed={7: "Diverged: loss 312.4 at step 30"},
    other_code=(0, 1),
)
METHODS = dataclasses.replace(
    cliff("methods"), base={"weight_decay": 0.04}, failed={5: CAUSE}, unstarted=(11,)
)
OVERLAP = Sample(
    name="overlap", overlaps=True, axes={"lmbda": [0, 1]}, base={"weight_decay": 0.02}, price=0.5
)
REQUANTIZED = Sample(  # each adapter scored twice
    name="requantized",
    axes={"lmbda": [0, 1]},
    base={"weight_decay": 0.03},
    suite=dataclasses.replace(
        SUITE, tasks=(SUITE.tasks[0], TaskSpec(f"tiny_gen{REQUANTISED}", "exact_match", None, True))
    ),
)
SAMPLES = (Sample(), GRID, METHODS, OVERLAP, REQUANTIZED)
