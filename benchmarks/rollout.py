"""Measure rollouts by our engine against transformers' `generate`.

    python benchmarks/rollout.py       prints a Markdown table, in less than a minute

It measures with one thread, as the workers of a sweep have on this many cores, and with two that
spin while they wait, as `train.py` alone has. (Two threads that sleep while they wait, PASSIVE,
make both ways two to three times slower in products this small; nobody has that: 2.3 times.)

The pair is the tiny one with random weights (the text that is written does not affect the time, and
no row may end early), the student over int4 with a LoRA adapter that is not zero. Folding the
weights, once per rollout, is part of the time.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from stillhouse.distill.engine import Engine, generate
from stillhouse.distill.models import load_base, new_student
from stillhouse.distill.rollouts import _Draw, pad_left, uniforms
from stillhouse.distill.toy import tiny
from stillhouse.distill.toy.problems import problems
from stillhouse.distill.toy.recipes import RECIPES
from stillhouse.spec import LoraSpec, QuantSpec, RolloutSpec

BATCH, NEW_TOKENS = 32, 32
THREADS = (1, 2)
PAIRS = 15  # alternating runs, after one that warms up and is compared
LIMIT = 2.5  # times as fast as generate, for the student
INT4 = QuantSpec(quant_type="int4", quant_group_size=32, double_quant=False)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraSpec(lora_r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS)
Way = Callable[[], Tensor]


def pair(directory: Path) -> dict[str, Any]:
    """The student and the teacher, never trained."""
    for side, recipe in RECIPES["tiny"].items():
        tiny.make(recipe, 0, 1, directory / side, lambda _: None)
    cpu = torch.device("cpu")
    student = new_student(
        load_base(str(directory / "student"), None, "float32", INT4, cpu), LORA, 0
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    teacher = load_base(str(directory / "teacher"), None, "float32", None, cpu)
    return {"student, int4 + LoRA": student.eval(), "teacher, dense": teacher}


def refolded(engine: Engine, *args: Any, **settings: Any) -> Tensor:
    """The tokens of an engine after refolding its current weights, which is part of a rollout."""
    engine.refold()
    return engine.tokens(*args, **settings)


def counted(model: Any, ids_BP: Tensor, mask_BP: Tensor) -> list[Way]:
    """Both ways, drawing by counted randomness; with no end-of-text, so that no row is short."""

    def draw() -> _Draw:
        rollout = RolloutSpec(NEW_TOKENS, NEW_TOKENS, 1.0, 1, BATCH)
        draws = uniforms(1, "student", 0, range(BATCH), NEW_TOKENS)
        return _Draw(draws, [0] * BATCH, rollout, [1], lambda: None)

    settings = {"pad_id": 0, "eos_ids": [1], "max_new_tokens": NEW_TOKENS}
    engine = Engine(model)
    return [
        lambda: refolded(engine, ids_BP, mask_BP, draw(), **settings),
        lambda: generate(model, ids_BP, mask_BP, draw(), **settings),
    ]


def greedy(model: Any, ids_BP: Tensor, mask_BP: Tensor) -> list[Way]:
    """The likeliest tokens by the engine, and by `generate` with nothing of ours in it."""
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    theirs = {"input_ids": ids_BP, "attention_mask": mask_BP, "generation_config": config}
    engine = Engine(model)
    return [
        lambda: refolded(
            engine, ids_BP, mask_BP, lambda logits_bV, row_b: logits_bV.argmax(-1),
            pad_id=0, eos_ids=[], max_new_tokens=NEW_TOKENS,
        ),
        lambda: model.generate(**theirs)[:, ids_BP.shape[1] :],
    ]  # fmt: skip


def timed(way: Way) -> tuple[float, Tensor]:
    begin = time.perf_counter()
    out_BC = way()
    return time.perf_counter() - begin, out_BC


def row(threads: int, name: str, model: Any, how: Callable[..., list[Way]]) -> tuple[str, bool]:
    """A line of the table, and whether it keeps to the limit."""
    torch.set_num_threads(threads)
    source = islice(problems({"word2": 1}, 1, "train"), BATCH)
    questions = [f"<|user|>{p.question}<|assistant|>" for p in source]
    prompts = tiny.tokenizer()(questions)["input_ids"]
    ids_BP, mask_BP = pad_left(prompts, max(map(len, prompts)), 0)
    ways = how(model, ids_BP, mask_BP)
    (_, ours), (_, theirs) = map(timed, ways)
    same = torch.equal(ours, theirs)
    pairs = [[timed(way)[0] for way in ways] for _ in range(PAIRS)]
    # Consecutive runs share the machine's other load, so the ratio is taken pair by pair.
    ratio = statistics.median(theirs_s / ours_s for ours_s, theirs_s in pairs)
    ours_ms, theirs_ms = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
    is_limited = name.startswith("student")
    line = (
        f"| {name} | {how.__name__} | {threads} | {ratio:.1f} | {LIMIT if is_limited else '–'}"
        f" | {ours_ms:.0f} / {theirs_ms:.0f} | {'same' if same else 'DIFFERENT'} |"
    )
    return line, same and (ratio >= LIMIT or not is_limited)


def table() -> None:
    with tempfile.TemporaryDirectory() as directory:
        models = pair(Path(directory))
    lines, kept = zip(
        *(
            row(threads, name, model, how)
            for threads in THREADS
            for name, model in models.items()
            for how in (counted, greedy)
        ),
        strict=True,
    )
    print(
        f"The tiny pair, {BATCH} prompts, {NEW_TOKENS} new tokens each, float32, torch"
        f" {torch.__version__}, load average"
        f" {os.getloadavg()[0]:.1f} at the end. Times as fast: median of {PAIRS} alternating pairs"
        " of rollouts, each generate's time over the engine's.\n"
    )
    print("| model | draw | threads | times as fast | at least | ms, ours / generate | tokens |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    if not all(kept):
        sys.exit("a rollout is too slow, or not what generate writes")


if __name__ == "__main__":
    table()
