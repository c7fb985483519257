"""This file is where tests get a point that trains in a second: a tiny pair hardly trained at all."""

from __future__ import annotations

from pathlib import Path

from stillhouse.compose import compose, from_command_line
from stillhouse.spec import TrainSpec

CACHE = Path(".cache/tests")  # the cheap pair is made once per checkout
WORDS = [
    "pair=tiny",
    "teacher_steps=8",
    "student_steps=8",
    "per_device_train_batch_size=4",
    "max_new_tokens=6",
    "max_steps=6",
    "save_steps=2",
    "seed=1",
    "sanity_max_nll=9",
    "threads=1",
    f"cache_dir={CACHE}",
]


def words(runs: Path, *more: str) -> list[str]:
    """The command line of a cheap point; later words win."""
    return [*WORDS, f"runs={runs}", *more]


def cheap(runs: Path, *more: str) -> TrainSpec:
    """A cheap point's spec."""
    return compose(from_command_line(words(runs, *more), TrainSpec), TrainSpec)
