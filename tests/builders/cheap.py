"""Provide a point that trains in about a second, and processes that train it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillhouse import entrypoints
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


def cache_with_pairs(place: Path) -> Path:
    """A cache that is empty but for the generated pairs, which are made once per checkout."""
    place.mkdir()
    (CACHE / "pairs").mkdir(parents=True, exist_ok=True)
    (place / "pairs").symlink_to((CACHE / "pairs").resolve())
    return place


def teacher_of(run: Any) -> Any:
    """The model of a run's teacher, which is in this process."""
    return run.roles.teacher.model


# Forked from a server that has torch loaded: a real process in milliseconds instead of seconds.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["stillhouse.distill.run"])


def forked(work: Callable[..., object], *args: object) -> Any:
    """A process that has torch loaded and does this work."""
    process = _processes.Process(target=work, args=args)
    process.start()
    return process


class Training:
    """`train.py WORDS…` as a process of its own, with its output in a file."""

    def __init__(self, line: list[str], log: Path) -> None:
        self.log = log
        self.process = forked(_train, line, str(log))

    def wait_until(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Return when the condition holds; fail if the process ends before, or never gets there."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive() or condition(), self.log.read_text()
            assert time.monotonic() < end, f"it never came: {self.log.read_text()}"
            time.sleep(0.005)

    def send(self, number: int) -> None:
        pid = self.process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):  # it ended by itself a moment ago
            os.kill(pid, number)

    def ended(self, seconds: float = 240) -> int:
        """The exit code, negative for a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode


def _train(line: list[str], log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.exit(entrypoints.train_main(line))
