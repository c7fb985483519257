"""Test the entry points of training, evaluation and preparation, as a pod runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse import entrypoints
from stillhouse.compose import compose, from_command_line
from stillhouse.errors import POISON, Interrupted, NoProgress
from stillhouse.identity import eval_id, point_id, suite_key
from stillhouse.rundir import RunDir, Runs, code_identity
from stillhouse.spec import EvalSpec
from tests.builders.cheap import CACHE, cache_with_pairs, cheap, words

ROOT = Path(__file__).parent.parent
SHORT = ["max_steps=1", "lmbda=0"]


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    runs = tmp_path_factory.mktemp("trained")
    assert entrypoints.train(cheap(runs, *SHORT)) == 0
    return Runs(runs).of(cheap(runs, *SHORT))


@pytest.fixture
def exit_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STILLHOUSE_EXIT_FILE", str(tmp_path / "exit"))
    return tmp_path / "exit"


@pytest.fixture
def in_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_IN_POD", "1")


def told(exit_file: Path) -> list[Any]:
    return [json.loads(line) for line in exit_file.read_text().splitlines()]


# ---------------------------------------------------------------- what a pod is told


def test_a_door_tells_how_it_ended(
    exit_file: Path, trained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert entrypoints.train_main(words(trained.path.parent, *SHORT)) == 0
    assert entrypoints.train_main(["lmba=0"]) == 42
    # A directory where a file should be: what breaks without a name of ours is told, too.
    broken = trained.path.parent.parent / "broken"
    (broken / trained.path.name / "run.lock").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        entrypoints.train_main(words(broken, *SHORT))
    done, mistake, crash = told(exit_file)
    assert done == {"code": 0, "rank": 0, "cause": None}
    assert mistake["code"] == 42
    assert mistake["cause"] == 'ConfigError: command line: no knob "lmba". Did you mean "lmbda"?'
    assert (crash["code"], crash["rank"]) == (1, 0)
    assert crash["cause"].startswith("IsADirectoryError: ")


def test_a_pod_made_for_other_code_or_another_point_writes_nothing(
    tmp_path: Path, exit_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = words(tmp_path / "runs", *SHORT)
    for name, value in (("CODE", "0123456789abcdef"), ("ID", "0123456789")):
        monkeypatch.setenv(f"STILLHOUSE_{name}", value)
        assert entrypoints.train_main(line) == 42
        assert (
            f"this pod was made for {'code ' * (name == 'CODE')}{value}"
            in told(exit_file)[-1]["cause"]
        )
        monkeypatch.delenv(f"STILLHOUSE_{name}")
    assert not (tmp_path / "runs").exists()


def test_a_pod_made_for_this_very_point_goes_on(
    trained: RunDir, exit_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = trained.path.parent
    monkeypatch.setenv("STILLHOUSE_CODE", code_identity()["digest"])
    monkeypatch.setenv("STILLHOUSE_ID", point_id(cheap(runs, *SHORT)))
    assert entrypoints.train_main(words(runs, *SHORT)) == 0


def test_an_evaluation_knows_what_it_is_about() -> None:
    def asked(*more: str) -> EvalSpec:
        return compose(from_command_line(["pair=tiny", "suite=tiny", *more], EvalSpec), EvalSpec)

    one = asked("lora_paths=[/runs/a,/runs/b]")
    assert eval_id(one) == eval_id(asked("lora_paths=[/runs/a,/runs/b]", "name=x", "threads=1"))
    others = [asked("lora_paths=[/runs/a]"), asked("eval_teacher=false"), asked("pair_seed=3")]
    assert len({eval_id(spec) for spec in [one, *others]}) == 4
    renamed = asked("suite_name=mine")
    assert suite_key(renamed.suite) == suite_key(one.suite)
    assert suite_key(asked("limit=4").suite) != suite_key(one.suite)


# ---------------------------------------------------------------- before anything is loaded


def door(script: str, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A script of the checkout as somebody starts it in `place`, and which libraries it loaded."""
    program = (
        "import atexit, runpy, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'lm_eval', 'huggingface_hub'}\n"
        "atexit.register(lambda: print('loaded', sorted(heavy & {*sys.modules})))\n"
        f"sys.argv = {[script, *words]!r}\n"
        f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(place / "hf")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        (
            "train.py",
            [],
            "student Qwen/Qwen3-4B-Instruct-2507: its weights are not on this machine",
        ),
        ("train.py", ["name=a", "output_dir=out"], "`hf download Qwen/Qwen3-4B-Instruct-2507`"),
        ("train.py", ["student=here", "teacher=there"], "student here: no such directory"),
        ("train.py", ["pair=tiny", "data=local", "data_path=no.jsonl"], "no.jsonl: no such file"),
        ("train.py", ["pair=tiny", "data=gsm8k"], "openai/gsm8k is not on this machine"),
        ("eval.py", [], "its weights are not on this machine"),
        ("eval.py", ["pair=tiny", "lora_paths=[nowhere]"], "nowhere: no such directory"),
    ],
)
def test_what_is_not_here_is_said_before_anything_is_loaded_or_written(
    script: str, words: list[str], says: str, tmp_path: Path
) -> None:
    done = door(script, tmp_path, *words)
    assert (done.returncode, done.stdout) == (42, "loaded []\n")
    assert says in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_a_python_without_the_packages_is_told_which_one_has_them(tmp_path: Path) -> None:
    for script in ("train.py", "eval.py"):
        line = [sys.executable, "-S", "-E", str(ROOT / script)]  # -S: no site-packages
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 42
        assert "has no package" in done.stderr and "`uv run python`" in done.stderr
        assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- attempts


def stopped_before_its_first_step(run: RunDir) -> threading.Thread:
    """Send this process a SIGTERM as soon as the next attempt has begun."""
    attempt = run.status().get("attempt", 0) + 1

    def send() -> None:
        while run.status().get("attempt") != attempt:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def attempt(run: RunDir, *point: str) -> None:
    thread = stopped_before_its_first_step(run)
    with pytest.raises(Interrupted):
        entrypoints.train(cheap(run.path.parent, *point))
    thread.join()


def test_three_pods_stopped_before_a_step_cost_the_job_one_attempt(
    tmp_path: Path, in_pod: None
) -> None:
    """They cost none by themselves, so nothing else would ever end it."""
    point = ["lmbda=0", "max_steps=500"]
    run = Runs(tmp_path).of(cheap(tmp_path, *point))
    for number in (1, 2, 3):
        attempt(run, *point)
        assert run.status()["attempts_without_progress"] == number
        assert run.metrics() == []
    with pytest.raises(NoProgress, match="3 pods in a row ended before") as no:
        entrypoints.train(cheap(tmp_path, *point))
    assert no.value.exit_code == 1 and no.value.exit_code not in POISON
    status = run.status()
    assert (status["phase"], status["exit_code"], status["cause"]) == ("waiting", 1, str(no.value))
    assert "asked to stop" in status["cause"], "and that is why"
    attempt(run, *point)  # the Job's next pod tries again
    assert run.status()["attempts_without_progress"] == 1


def test_a_new_job_counts_its_attempts_anew(
    tmp_path: Path, in_pod: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stillhouse retry` makes another Job and cannot write on the volume."""
    monkeypatch.setenv("STILLHOUSE_JOB", "uid-1")
    run = Runs(tmp_path).of(cheap(tmp_path, *SHORT))
    run.path.mkdir()
    run.update_status(job="uid-1", attempts_without_progress=3)
    with pytest.raises(NoProgress, match=r"ended without a word\); .* site\.infra_retries"):
        entrypoints.train(cheap(tmp_path, *SHORT))
    run.update_status(attempts_without_progress=3)
    monkeypatch.setenv("STILLHOUSE_JOB", "uid-2")
    assert entrypoints.train(cheap(tmp_path, *SHORT)) == 0
    assert run.status()["job"] == "uid-2"


def test_a_step_of_progress_forgives_the_pods_before_it(tmp_path: Path, in_pod: None) -> None:
    run = Runs(tmp_path).of(cheap(tmp_path, *SHORT))
    attempt(run, *SHORT)
    attempt(run, *SHORT)
    assert entrypoints.train(cheap(tmp_path, *SHORT)) == 0
    assert run.status()["attempts_without_progress"] == 0


def test_on_a_laptop_ctrl_c_is_nobodys_failure(tmp_path: Path) -> None:
    point = ["lmbda=0", "max_steps=500"]
    run = Runs(tmp_path).of(cheap(tmp_path, *point))
    for _ in range(4):
        attempt(run, *point)
        assert run.status()["attempts_without_progress"] == 0


def test_a_run_that_another_pod_still_has_is_85_and_on_a_laptop_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod whose node is lost holds its lock until the volume's server forgets it."""
    line = words(tmp_path, *SHORT)
    with Runs(tmp_path).of(cheap(tmp_path, *SHORT)).lock():
        assert entrypoints.train_main(line) == 42
        monkeypatch.setenv("STILLHOUSE_IN_POD", "1")
        assert entrypoints.train_main(line) == 85


# ---------------------------------------------------------------- evaluations in a pod


def test_an_evaluation_of_a_run_that_is_not_trained_is_42_and_names_it(
    trained: RunDir, exit_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / trained.path.name
    shutil.copytree(trained.path, run, ignore=shutil.ignore_patterns("adapter"))
    line = [
        "pair=tiny", "teacher_steps=8", "student_steps=8", "suite=tiny", f"cache_dir={CACHE}",
        f"runs={tmp_path}", f"lora_paths=[{run}]",
    ]  # fmt: skip
    assert entrypoints.eval_main(line) == 42
    assert f"{run}: no adapter" in told(exit_file)[-1]["cause"]


def test_preparing_a_generated_pair_loads_it_and_its_tasks() -> None:
    line = ["pair=tiny", "teacher_steps=8", "student_steps=8", f"cache_dir={CACHE}"]
    assert entrypoints.prepare_main(["--no-scores", *line]) == 0
    assert entrypoints.prepare_main([*line, "suite=tiny"]) == 0
    assert entrypoints.prepare_main([*line, "suite=tiny", "data=local", "data_path=nowhere"]) == 42


def test_rows_that_a_prepare_encoded_are_those_that_a_point_trains_on(tmp_path: Path) -> None:
    file, cache = tmp_path / "prompts.jsonl", cache_with_pairs(tmp_path / "cache")
    asked = [[{"role": "user", "content": f"Find {n}+1."}] for n in range(8)]
    file.write_text("".join(json.dumps({"prompt": turns}) + "\n" for turns in asked))
    data = ["data=local", f"data_path={file}", "held_out_rows=2", "max_length=64"]
    data += [f"cache_dir={cache}"]
    pair = ["pair=tiny", "teacher_steps=8", "student_steps=8"]
    assert entrypoints.prepare_main(["--no-scores", *pair, *data]) == 0
    [made] = (cache / "rows").glob("*/made.json")
    assert json.loads(made.read_text())["facts"]["rows"] == {"train": 6, "held_out": 2}
    # Prompts alone: no step of these wants an answer of the data's.
    assert entrypoints.train_main(words(tmp_path / "runs", "max_steps=1", "lmbda=1", *data)) == 0
    assert [*(cache / "rows").glob("*/made.json")] == [made]
    answered = [*SHORT, "off_policy_source=dataset"]
    assert entrypoints.train_main(words(tmp_path / "runs", *answered, *data)) == 42
