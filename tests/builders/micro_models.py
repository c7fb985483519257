"""Provide a pair of random micro models, runs of it with adapters, and evaluations of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from stillhouse.compose import compose, from_command_line
from stillhouse.distill import models
from stillhouse.distill.toy import tiny
from stillhouse.errors import Interrupted
from stillhouse.evals import find, harness
from stillhouse.evals.suite import Stop
from stillhouse.rundir import RunDir, Runs, new_record, write_json
from stillhouse.spec import EvalSpec, SuiteSpec, TaskSpec, TrainSpec

LIMIT = 8
GEN = TaskSpec("tiny_gen", "exact_match", None, True)
MC = TaskSpec("tiny_mc", "acc", None, True)
DATA = compose(from_command_line(["pair=tiny"], EvalSpec), EvalSpec).data
ADAPTERS_ONLY = ["eval_teacher=false", "eval_student=false", "eval_ptq=false"]


class Never:
    """Nobody asks to stop."""

    def check(self) -> None: ...


class After:
    """Asks to stop at the n-th poll."""

    def __init__(self, polls: int) -> None:
        self.left = polls

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted("asked to stop")


def suite(*tasks: TaskSpec, chat: bool = True, limit: int | None = LIMIT) -> SuiteSpec:
    return SuiteSpec("test", tasks or (GEN, MC), chat, limit, 16)


def llama(
    vocabulary: int, hidden: int = 32, seed: int = 0, positions: int = 256, **more: Any
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
        **more,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig()  # as models.load_base leaves it
    return model


def pair_words(models_dir: Path) -> list[str]:
    return [
        "pair=tiny",
        "pair_source=hub",
        f"student={models_dir / 'student'}",
        f"teacher={models_dir / 'teacher'}",
        f"cache_dir={models_dir / 'cache'}",
        "threads=1",
    ]


def eval_spec(models_dir: Path, runs: Path, *words: str) -> EvalSpec:
    line = [*pair_words(models_dir), "suite=tiny", f"limit={LIMIT}", "max_gen_toks=12"]
    line += [f"runs={runs}", "quant=int4", *words]
    return compose(from_command_line(line, EvalSpec), EvalSpec)


def train_spec(models_dir: Path, runs: Path, *words: str) -> TrainSpec:
    line = [*pair_words(models_dir), f"runs={runs}", "quant=int4", *words]
    return compose(from_command_line(line, TrainSpec), TrainSpec)


def trained_run(models_dir: Path, runs: Path, *words: str, size: float = 0.3) -> RunDir:
    """A run with an adapter that moves every layer by weights of that size."""
    spec = train_spec(models_dir, runs, *words)
    run, prepared = Runs(runs).of(spec), models.prepare(spec.pair, spec.quant, models_dir / "cache")
    base = models.load_base(
        prepared.student, prepared.student_revision, "float32", spec.quant, torch.device("cpu")
    )
    student = models.new_student(base, spec.lora, 0)
    generator = torch.Generator().manual_seed(spec.training.seed)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(size * torch.randn(weight.shape, generator=generator))
    write_json(run.spec_file, new_record(spec, {}))
    models.save_adapter(student, spec, prepared, run.adapter)
    if spec.place.name:
        Runs(runs).link_name(spec.place.name, run)
    return run


def data_dir(models_dir: Path, runs: Path) -> Path:
    spec = eval_spec(models_dir, runs)
    return models.prepare(spec.pair, spec.quant, models_dir / "cache").data_dir


def scores_below(root: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(root.rglob("eval/*.json"))
    return {str(f.relative_to(root)): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


def write_pair(models_dir: Path) -> None:
    """Two random micro models, below `student` and `teacher`."""
    text = tiny.tokenizer()
    for seed, role in enumerate(("student", "teacher")):
        llama(len(text), seed=seed).save_pretrained(models_dir / role)
        text.save_pretrained(models_dir / role)


def run_suite(spec: EvalSpec, stop: Stop | None = None) -> int:
    """Score what an evaluation asks for, as its entrypoint does."""
    adapters = find.adapters(spec, Runs(Path(spec.place.runs)))
    return harness.run_suite(spec, adapters, stop or Never())
