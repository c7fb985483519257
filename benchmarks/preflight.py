"""Measure the time of a preflight against that of a training run of its pair.

    python benchmarks/preflight.py       prints a Markdown table, in about a minute

Both load their own models, as two commands would. The run has RUN_STEPS steps and is extrapolated
to 200 steps, which cost the same each.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stillhouse.compose import compose, from_command_line
from stillhouse.distill.preflight import preflight
from stillhouse.distill.run import train_run
from stillhouse.entrypoints import PROMPTS
from stillhouse.rundir import RunDir
from stillhouse.spec import TrainSpec
from stillhouse.stop import StopFlag

PAIRS = {"tiny": ["pair=tiny", "quant=int4"], "tiny_self": ["pair=tiny_self"]}
RUN_STEPS, WHOLE = 50, 200
LIMIT = 0.1  # of a run of WHOLE steps
THREADS = 1  # as the workers of a sweep have on this many cores


def seconds(work: Callable[[], Any]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin


def row(name: str, words: list[str]) -> tuple[str, bool]:
    """A line of the table, and whether it keeps to the limit."""
    line = [*words, f"max_steps={RUN_STEPS}", f"save_steps={RUN_STEPS}", f"threads={THREADS}"]
    spec = compose(from_command_line(line, TrainSpec), TrainSpec)
    preflight(spec, 4, None, StopFlag())  # prepares the pair, and loads what libraries load once
    looking = seconds(lambda: preflight(spec, PROMPTS, None, StopFlag()))
    with tempfile.TemporaryDirectory() as home:
        run = RunDir(Path(home) / "run")
        total = seconds(lambda: train_run(spec, run, StopFlag()))
        steps = sum(metrics["time/step"] for metrics in run.metrics())
    whole = total + steps * (WHOLE / RUN_STEPS - 1)
    line_ = f"| {name} | {looking:.1f} | {whole:.1f} | {looking / whole:.3f} | {LIMIT} |"
    return line_, looking / whole <= LIMIT


def main() -> None:
    lines, kept = zip(*(row(name, words) for name, words in PAIRS.items()), strict=True)
    print(
        f"{PROMPTS} prompts, {THREADS} thread, torch {torch.__version__}, load average"
        f" {os.getloadavg()[0]:.1f} at the end. The run: {RUN_STEPS} steps measured, {WHOLE}"
        " meant.\n"
    )
    print("| pair | preflight, s | run, s | share | limit |")
    print("|---|---|---|---|---|")
    print("\n".join(lines))
    if not all(kept):
        sys.exit("a preflight costs too much")


if __name__ == "__main__":
    main()
