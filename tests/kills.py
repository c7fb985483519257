"""Kill `stillhouse run` at random moments, and compare the results with an undisturbed sweep.

    python -m tests.kills 200            two hundred kills, of as many sweeps as that takes
    python -m tests.kills 200 --seed 1   at other moments

Two launchers at once drive one sweep of four points; `retry`, `cancel` and `status` run in between.
Adapter files, metrics and scores must equal those of an undisturbed sweep to the bit. `make test`
does a few kills.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil

from stillhouse.rundir import Runs
from tests.builders.cheap import CACHE

SWEEP = f"""
question: Does a sweep survive everything?
base:
  pair: tiny
  teacher_steps: 8
  student_steps: 8
  per_device_train_batch_size: 4
  max_new_tokens: 6
  max_steps: 10
  save_steps: 3
  sanity_max_nll: 9
  cache_dir: {CACHE.absolute()}
grid: {{lmbda: [0, 1]}}
seeds: 2
compare: {{by: lmbda, metric: tiny_mc/acc, baseline: 0}}
eval: {{suite: tiny, limit: 8, pack: 3}}
"""
LAUNCHERS = 2
BESIDE = ("retry", "cancel", "status")
# What a verb may end with: never 42, 43 or a traceback's 1, which its words would show.
CODES = {
    "run": {0, 1, 85, -signal.SIGKILL},
    "status": {0, 1},
    "retry": {0},
    "cancel": {0},
}
PATIENCE_S = 900  # on a machine that does other things; what hangs is found after it
EARLY = 0.5  # share of the moments that are counted in seconds, and so before the first step
INTERRUPTED, WITH_ALL = 0.15, 0.35  # shares of Ctrl-C, and of kills of all that a launcher started
UNLIKE = ("seconds", "finished")  # of a score: when, and how long


class Place:
    """A directory with a sweep in it, and the processes that were started on that."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.runs = path, path / "runs"
        self.file = path / "small.yaml"
        self.file.write_text(SWEEP)
        self.started: list[tuple[str, subprocess.Popen[bytes], Path]] = []

    def start(self, verb: str) -> subprocess.Popen[bytes]:
        """`stillhouse VERB` on the sweep as a process, its output in a file."""
        log = self.path / f"{len(self.started):03} {verb}.log"
        target = str(self.file) if verb == "run" else self.file.stem
        line = [sys.executable, "-m", "stillhouse", verb, target, "--runs", str(self.runs)]
        here = {"PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("wb") as file:
            process = subprocess.Popen(
                line, stdout=file, stderr=subprocess.STDOUT, env=os.environ | here
            )
        self.started.append((verb, process, log))
        return process

    def finish(self, verb: str = "run") -> str:
        """What the verb says, once it ended with 0."""
        code = self.start(verb).wait(timeout=PATIENCE_S)
        said = self.started[-1][2].read_text()
        assert code == 0, f"{verb} ends with {code}: {said}"
        return said

    def check(self) -> None:
        """Wait for all processes; each must end with an allowed exit code and no traceback."""
        for verb, process, log in self.started:
            code, said = process.wait(timeout=PATIENCE_S), log.read_text()
            is_fine = code in CODES[verb] and "Traceback" not in said
            assert is_fine, f"{verb} ({log}) ends with {code}: {said}"

    def steps(self) -> int:
        """Steps in all metrics files, scores counted too."""
        lines = sum(len(f.read_bytes().splitlines()) for f in self.runs.glob("*/metrics.jsonl"))
        return lines + 2 * len(self.scores())

    def scores(self) -> list[Path]:
        # Not by "**": checkpoints come and go below, and a folder that is gone ends such a walk.
        return sorted([*self.runs.glob("*/eval/*.json"), *self.runs.glob("*/*/eval/*.json")])

    def outcome(self) -> dict[str, object]:
        """All results of a sweep that must not depend on interruptions."""
        found: dict[str, object] = {}
        for run in Runs(self.runs).all():
            for file in sorted(run.adapter.iterdir()):
                found[f"{run.path.name}/adapter/{file.name}"] = file.read_bytes()
            found[f"{run.path.name}/metrics.jsonl"] = [
                {k: v for k, v in m.items() if not k.startswith("time/")} for m in run.metrics()
            ]
        for file in self.scores():
            score = json.loads(file.read_text())
            kept = {key: value for key, value in score.items() if key not in UNLIKE}
            found[str(file.relative_to(self.runs))] = kept
        return found

    @contextlib.contextmanager
    def ended(self) -> Generator[None, None, None]:
        """Kill all processes that were started here when the block ends."""
        try:
            yield
        finally:
            for _, process, _ in self.started:
                if process.poll() is None:
                    _kill(process, with_all=True)
                    process.wait(timeout=PATIENCE_S)


def disturb(place: Place, kills: int, rng: random.Random) -> int:
    """Kill launchers at random until the sweep is done, `kills` times at most; how often that was.

    Then the sweep is finished, and every process has ended as it may.
    """
    killed = 0
    with place.ended():
        launchers = [place.start("run") for _ in range(LAUNCHERS)]
        while killed < kills and not all(launcher.poll() == 0 for launcher in launchers):
            _let_pass(place, launchers, rng)
            killed += _strike(rng.choice(launchers), rng)
            if (place.runs / "sweeps" / "small.json").exists():  # else nobody knows its name
                place.start(rng.choice(BESIDE))
            launchers = [
                place.start("run") if launcher.poll() else launcher for launcher in launchers
            ]
        for launcher in launchers:
            launcher.wait(timeout=PATIENCE_S)
        place.finish("retry")
        place.finish()
        place.check()
    return killed


def _let_pass(place: Place, launchers: list[subprocess.Popen[bytes]], rng: random.Random) -> None:
    """Wait for some time or for some training steps, so that kills reach each phase."""
    if rng.random() < EARLY:
        return time.sleep(rng.uniform(0, 4))
    goal, end = place.steps() + rng.randrange(1, 7), time.monotonic() + PATIENCE_S
    while place.steps() < goal and any(launcher.poll() is None for launcher in launchers):
        assert time.monotonic() < end, f"nothing moves in {place.path}"
        time.sleep(0.01)
    time.sleep(rng.random() / 2)


def _strike(launcher: subprocess.Popen[bytes], rng: random.Random) -> int:
    """End a launcher in one of three ways; 1 where it was killed, 0 where it was not."""
    way = rng.random()
    if launcher.poll() is not None:
        return 0
    if way < INTERRUPTED and psutil.Process(launcher.pid).children():
        launcher.send_signal(signal.SIGINT)  # it has begun: before, Python itself would answer
        launcher.wait(timeout=PATIENCE_S)
        return 0
    _kill(launcher, with_all=way < INTERRUPTED + WITH_ALL)
    return int(launcher.wait(timeout=PATIENCE_S) == -signal.SIGKILL)


def _kill(launcher: subprocess.Popen[bytes], with_all: bool) -> None:
    """SIGKILL; `with_all`: to its server and workers too, as when a machine goes down."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(launcher.pid).children(recursive=True) if with_all else []
    launcher.kill()
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    """Each value in which two outcomes differ, with its place; [] where they are equal."""
    if isinstance(expected, list) and isinstance(found, list):
        expected, found = dict(enumerate(expected)), dict(enumerate(found))
    if isinstance(expected, dict) and isinstance(found, dict):
        none = "(nothing)"
        keys = [*expected, *(key for key in found if key not in expected)]
        pairs = [(key, expected.get(key, none), found.get(key, none)) for key in keys]
        return [line for k, a, b in pairs for line in differences(a, b, f"{where} {k}".strip())]
    return [] if expected == found else [f"{where}: {str(expected)[:200]} != {str(found)[:200]}"]


def main(argv: list[str]) -> int:
    """0 if every sweep gave the same results as the undisturbed one."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills")
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    quiet = Place(folder / "quiet")
    with quiet.ended():
        quiet.finish()
    expected, rng = quiet.outcome(), random.Random(options.seed)
    killed = sweeps = 0
    while killed < options.kills:
        place = Place(folder / f"sweep-{sweeps}")
        now = disturb(place, options.kills - killed, rng)
        found = place.outcome()
        if unlike := differences(expected, found):
            print(f"{place.path} differs from {quiet.path}:", *unlike, sep="\n  ")
            return 1
        killed, sweeps = killed + now, sweeps + 1
        begun = len(place.started)
        print(f"sweep {sweeps}: {now} kills, {begun} processes begun, equal; {killed}", flush=True)
        shutil.rmtree(place.path)
    shutil.rmtree(folder)
    print(f"{killed} kills, {sweeps} sweeps: {len(expected)} files each, equal to the bit")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
