"""Measure what a teacher costs behind one server, and in each point.

Four points at once, of the tiny pair and of pairs of drawn weights whose teacher is many times its
student. Processor seconds, which others on the machine do not lengthen, and the peak of the sum of
PSS, each of all processes of `stillhouse run`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

LOOK_S = 0.2  # between two looks at the processes
TIME_LIMIT, MEMORY_LIMIT = 1.15, 0.65
STEPS, STEPS_OF_DRAWN = 30, 4
BASE = ["do_eval=false", "overlap_steps=0", "sanity_max_nll=99"]
AT_ONCE = ["lmbda=0.5", "seed=1,2,3,4", "max_parallel=4"]


@dataclass(frozen=True)
class Measured:
    """What a `stillhouse run` took, with all its processes."""

    processor_s: float
    pss_gib: float


def run(root: Path, name: str, words: list[str]) -> Measured:
    """`stillhouse run` of these words, without scores."""
    runs, log, sweep = root / name, root / f"{name}.log", root / "teachers.yaml"
    sweep.write_text("question: What does a teacher cost?\n")
    line = [sys.executable, "-m", "stillhouse", "run", str(sweep), *words, *BASE, f"--runs={runs}"]
    here = {"PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    spent: dict[int, float] = {}
    peak = 0
    with log.open("wb") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file, env=os.environ | here)
        while process.poll() is None:
            peak = max(peak, _look(process.pid, spent))
            time.sleep(LOOK_S)
    if process.returncode:
        sys.exit(log.read_text()[-3000:])
    return Measured(sum(spent.values()), peak / 2**30)


def _look(pid: int, spent: dict[int, float]) -> int:
    """The sum of PSS of a process and all below it in bytes; notes each one's processor seconds."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            times = process.cpu_times()
            spent[process.pid] = times.user + times.system
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def drawn(root: Path, cache: Path, dtype: str) -> list[str]:
    """Words that name a pair of weights drawn and kept in `dtype` and computed in float32, with the
    tiny pair's tokenizer and rows."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    made = next(file.parent for file in sorted((cache / "pairs").glob("*/*/tokenizer.json")))
    tokenizer = AutoTokenizer.from_pretrained(made)
    for role, (hidden, layers) in {"student": (128, 4), "teacher": (1024, 10)}.items():
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
            num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
        model.save_pretrained(root / dtype / role)
        tokenizer.save_pretrained(root / dtype / role)
    rows = next(cache.glob("problems-*/train.jsonl"))
    words = [f"{role}={root / dtype / role}" for role in ("student", "teacher")]
    words += ["student_dtype=float32", "teacher_dtype=float32", "data=local", f"data_path={rows}"]
    return [*words, f"max_steps={STEPS_OF_DRAWN}", f"cache_dir={cache}"]


def row(what: str, one: float, each: float, limit: float, unit: str) -> str:
    """A line of the table."""
    return f"| {what} | {one / each:.2f} | {limit} | {one:.3g} / {each:.3g} {unit} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        cache = root / "cache"
        tiny = ["pair=tiny", "teacher_steps=8", "student_steps=8", f"cache_dir={cache}"]
        tiny = [*tiny, f"max_steps={STEPS}"]
        run(root, "warm", [*tiny, "lmbda=0", "max_steps=1", "max_parallel=1"])  # makes the pair
        print("| | ratio | limit | measured |\n|---|---|---|---|")
        pairs = {"the tiny pair": tiny}
        for dtype in ("float32", "bfloat16"):
            pairs[f"a drawn teacher of 140 M, kept in {dtype}"] = drawn(root, cache, dtype)
        for name, words in pairs.items():
            each = run(root, f"{name} in each", [*words, *AT_ONCE])
            one = run(root, f"{name} in one", [*words, *AT_ONCE, "teacher_at=server"])
            print(row(f"{name}, processor", one.processor_s, each.processor_s, TIME_LIMIT, "s"))
            print(row(f"{name}, peak PSS", one.pss_gib, each.pss_gib, MEMORY_LIMIT, "GiB"))


if __name__ == "__main__":
    main()
