"""Measure a whole on-policy step against TRL's GKDTrainer and DistillationTrainer.

    make parity       after the comparison of losses; prints Markdown, --write publishes it

The same pair, rows, batch and number of new tokens, lmbda 1 and beta 1: each step writes its
rollouts, scores them with the teacher, and updates the adapter. Processor time of one thread,
alternating in one process, so that a busy machine does not change the ratio. All sample at
temperature 1 and stop at the end of a text, so their rollouts are as long on average.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import (  # pyright: ignore[reportMissingImports]
    DistillationConfig,
    DistillationTrainer,
)
from trl.experimental.gkd import (  # pyright: ignore[reportMissingImports]
    GKDConfig,
    GKDTrainer,
)

from benchmarks.run import put
from stillhouse.compose import compose, from_command_line
from stillhouse.distill.run import Run
from stillhouse.distill.toy.problems import distinct, problems
from stillhouse.rundir import Runs
from stillhouse.spec import TrainSpec
from stillhouse.stop import StopFlag

WARM, BATCH = 2, 8
THEIRS = ("GKDTrainer", "DistillationTrainer")


class Setting(NamedTuple):
    """A pair, and how it is measured."""

    words: list[str]
    new_tokens: int
    rounds: int
    steps: int  # of a round, after WARM
    target: float  # times as fast as TRL's GKDTrainer


PAIRS = {
    "tiny, int4": Setting(["pair=tiny"], 64, 3, 8, 3.5),
    "smollm2, nf4": Setting(
        ["pair=smollm2_self", "quant=bnb_nf4", "lora_dropout=0"], 32, 1, 4, 2.0
    ),
}


def our_run(setting: Setting, place: Path, rows: Path) -> Run:
    """A run that is ready for its first step."""
    line = [
        *setting.words, "data=local", f"data_path={rows}", "held_out_rows=0", "method=gkd",
        "lmbda=1", "beta=1", f"per_device_train_batch_size={BATCH}",
        f"max_steps={WARM + setting.steps}",
        f"max_new_tokens={setting.new_tokens}", "learning_rate=1e-5", "lr_scheduler_type=constant",
        "warmup_ratio=0", "min_completion=1", "sanity_max_nll=9", "threads=1",
        f"runs={place / 'runs'}",
    ]  # fmt: skip
    spec = compose(from_command_line(line, TrainSpec), TrainSpec)
    return Run(spec, Runs(place / "runs").of(spec), StopFlag())


def ours(run: Run, steps: int) -> list[float]:
    """Processor seconds of each step."""
    spent: list[float] = []
    for step in range(WARM + steps):
        begun = time.process_time()
        run.loop.gradients(step)
        run.loop.update(step)
        spent.append(time.process_time() - begun)
    return spent[WARM:]


class Clock(TrainerCallback):  # type: ignore[misc]
    """Processor time at the beginning and the end of each step."""

    def __init__(self) -> None:
        self.spent: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.spent.append(time.process_time() - self.begun)


def theirs(kind: str, run: Run, setting: Setting, place: Path, rows: list[Any]) -> list[float]:
    """The same by TRL; it trains the student of `run`."""
    shared: dict[str, Any] = {
        "output_dir": str(place / kind), "beta": 1.0, "temperature": 1.0,
        "per_device_train_batch_size": BATCH, "max_steps": WARM + setting.steps,
        "learning_rate": 1e-5, "lr_scheduler_type": "constant", "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "logging_strategy": "no",
        "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    clock = Clock()
    given: dict[str, Any] = {
        "model": run.student, "teacher_model": run.prepared.teacher, "callbacks": [clock],
        "processing_class": run.tokenizer,
    }  # fmt: skip
    if kind == "GKDTrainer":
        args = GKDConfig(**shared, lmbda=1.0, max_new_tokens=setting.new_tokens)
        trainer = GKDTrainer(**given, args=args, train_dataset=Dataset.from_list(rows))
    else:
        args = DistillationConfig(**shared, max_completion_length=setting.new_tokens)
        prompts = Dataset.from_list([{"prompt": row["messages"][:1]} for row in rows])
        trainer = DistillationTrainer(**given, args=args, train_dataset=prompts)
    trainer.train()
    return clock.spent[WARM:]


def measured(setting: Setting) -> dict[str, list[float]]:
    """Processor seconds of each step, ours and by each trainer of TRL's."""
    conversations = [
        {
            "messages": [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": problem.worked},
            ]
        }
        for problem in distinct(problems({"word2": 1}, 0, "train"), 256)
    ]
    spent: dict[str, list[float]] = {name: [] for name in ("ours", *THEIRS)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in conversations))
        for number in range(setting.rounds):
            for name, found in spent.items():
                place = Path(folder) / f"{name}-{number}"
                run = our_run(setting, place, rows)
                if name == "ours":
                    found += ours(run, setting.steps)
                else:
                    found += theirs(name, run, setting, place, conversations)
    return spent


def main() -> None:
    torch.set_num_threads(1)
    names = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    chosen = [name for name in PAIRS if name.split(",")[0] in sys.argv[1:]] or list(PAIRS)
    lines = [
        f"{names}; lmbda 1, beta 1, {BATCH} rows a step, one thread. Median processor seconds of a"
        " step; rounds alternate in one process.\n",
        "| pair | new tokens | ours | GKDTrainer | times as fast | target | DistillationTrainer |"
        " times as fast |\n|---|---|---|---|---|---|---|---|",
    ]
    for name in chosen:
        setting = PAIRS[name]
        we, gkd, plain = map(statistics.median, measured(setting).values())
        lines.append(
            f"| {name} | {setting.new_tokens} | {we:.3f} | {gkd:.3f} | {gkd / we:.2f} |"
            f" {setting.target} | {plain:.3f} | {plain / we:.2f} |"
        )
    print("\n".join(lines))
    if "--write" in sys.argv:
        put("trl-steps", "\n".join(lines), "A whole on-policy step, against TRL's trainers")


if __name__ == "__main__":
    main()
