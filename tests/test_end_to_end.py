"""A whole sweep through the real doors: planned, trained, scored, reported, killed on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cheap import CACHE

import stillhouse
from stillhouse.rundir import Runs

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


class Launcher:
    """`stillhouse run` as a process, its output in a file."""

    def __init__(self, place: Path) -> None:
        (place / "small.yaml").write_text(SWEEP)
        self.runs, self.log = place / "runs", place / "log"
        target = [str(place / "small.yaml"), "--runs", str(self.runs)]
        self._line = [sys.executable, "-m", "stillhouse", "run", *target]

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1"}
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self._line, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def finish(self) -> str:
        code = self.start().wait(timeout=400)
        assert code == 0, self.log.read_text()
        return self.log.read_text()


def outcome(runs: Path) -> dict[str, object]:
    """Everything a sweep is asked for that must not depend on what befell it."""
    found: dict[str, object] = {}
    for run in Runs(runs).all():
        found[f"{run.id} adapter"] = (run.adapter / "adapter_model.safetensors").read_bytes()
        found[f"{run.id} metrics"] = [
            {k: v for k, v in m.items() if not k.startswith("time/")} for m in run.metrics()
        ]
    for file in sorted(runs.glob("**/eval/*.json")):
        score = json.loads(file.read_text())
        kept = {k: score[k] for k in ("value", "n", "samples", "key", "quant_type")}
        found[str(file.relative_to(runs))] = kept
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Launcher:
    launcher = Launcher(tmp_path_factory.mktemp("undisturbed"))
    launcher.finish()
    return launcher


def test_a_sweep_ends_in_a_table_with_its_noise(undisturbed, capsys):
    from stillhouse import cli

    assert cli.main(["report", "small", "--runs", str(undisturbed.runs)]) == 0
    said = capsys.readouterr().out
    for row in ("teacher", "student", "ptq_int4", "lmbda = 0", "lmbda = 1"):
        assert row in said
    assert "(n = 2)" in said
    frame = stillhouse.load("small", str(undisturbed.runs))
    assert len(frame[frame["kind"] == "point"]) == 8, "4 points on 2 tasks"
    page = undisturbed.runs / "reports" / "small" / "report.html"
    assert "Does a sweep survive everything?" in page.read_text()


def test_a_second_run_has_nothing_left_to_do_and_touches_nothing(undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.runs.glob("*/adapter/*")}
    assert "nothing left to do" in undisturbed.finish()
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.runs.glob("*/adapter/*")}


@pytest.mark.parametrize(("number", "seed"), [(signal.SIGKILL, 0), (signal.SIGINT, 1)])
def test_ended_at_random_moments_a_sweep_ends_as_if_undisturbed(
    tmp_path, undisturbed, number, seed
):
    rng = random.Random(seed)
    launcher = Launcher(tmp_path)
    for _ in range(3):
        process = launcher.start()
        before = steps(launcher.runs)
        until, end = before + rng.randrange(1, 12), time.monotonic() + 300
        while process.poll() is None and steps(launcher.runs) < until and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.random() * 2)
        process.send_signal(number)
        code = process.wait(timeout=120)
        assert code in (85, 0, -signal.SIGKILL), launcher.log.read_text()
    launcher.finish()
    assert outcome(launcher.runs) == outcome(undisturbed.runs)


def steps(runs: Path) -> int:
    """Steps in all metrics files, scores counted too."""
    lines = sum(len(f.read_bytes().splitlines()) for f in runs.glob("*/metrics.jsonl"))
    return lines + 2 * len(list(runs.glob("**/eval/*.json")))
