"""Stand in for the real work of a sweep with quick functions that leave the same files.

`<runs>/behaviour.json` says how a point misbehaves, by its id or "*":
{"steps": 5, "step_s": 0.01, "kill": "SIGKILL", "times": 1, "exit": "diverged", "deaf": true}.
`<runs>/begun.txt` lists every attempt that was started, one per line; a pack is listed as the ids
of its points.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from filelock import Timeout

from stillhouse.errors import (
    ConfigError,
    ContractError,
    Diverged,
    Interrupted,
    OutOfMemory,
    StillhouseError,
)
from stillhouse.evals.isolate import Isolation
from stillhouse.identity import baseline_key, score_key
from stillhouse.rundir import (
    RunDir,
    Runs,
    eval_file,
    make_directory,
    new_record,
    now,
    read_json,
    write_json,
)
from stillhouse.sources import sources_of
from stillhouse.spec import EvalSpec, PairSpec, QuantSpec, TrainSpec
from stillhouse.stop import StopFlag
from stillhouse.sweep.local.workers import WorkerPool
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.snapshot import Snapshot, on_disk
from stillhouse.sweep.verbs import Call, run

WORK = {
    "prepare": "tests.fakes.behaving:prepare",
    "train": "tests.fakes.behaving:train",
    "eval": "tests.fakes.behaving:evaluate",
    "teacher": "tests.fakes.behaving:serve",
}
PRELOAD = ("pytest", "hypothesis", "tests.fakes.behaving")
ENDS = {
    "diverged": Diverged, "memory": OutOfMemory, "config": ConfigError, "crash": RuntimeError,
    "contract": ContractError,
}  # fmt: skip


def executor_for(sweep: Sweep, first: Snapshot | None = None) -> WorkerPool:
    """The real workers, with the work of this module."""
    return WorkerPool(sweep, first or on_disk(sweep, is_to_run=True), WORK, PRELOAD)


def launch(runs: str, *words: str) -> None:
    """`stillhouse run WORDS` as a process of its own: what a test interrupts and kills."""
    code = run(Call(words=words, runs=Path(runs)), executor_for)
    print("heavy modules:", sorted({"torch", "transformers", "pandas"} & set(sys.modules)))
    sys.exit(code)


def start_launcher(runs: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start `launch` in a process; its output goes to `<runs>/launcher.out`."""
    program = f"from tests.fakes import behaving; behaving.launch({str(runs)!r}, *{words!r})"
    with (runs / "launcher.out").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-c", program], cwd=Path(__file__).parents[2], stdout=out, stderr=out
        )


def parent_of(pid: int) -> int:
    words = ["ps", "-o", "ppid=", "-p", str(pid)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def at_work(runs: Path, count: int) -> list[RunDir]:
    """The runs under way, as soon as there are `count` that completed two steps."""

    def found() -> list[RunDir]:
        all_ = [RunDir(file.parent) for file in runs.glob("*/metrics.jsonl")]
        return [run for run in all_ if len(run.metrics()) > 1 and run.status()["step"] > 1]

    until(lambda: len(found()) >= count)
    return found()


def misbehave(runs: Path, who: str = "*", **how: Any) -> None:
    """Set how a point (or every point) behaves from now on."""
    file = runs / "behaviour.json"
    write_json(file, (read_json(file) or {}) | {who: how})


def begun(runs: Path, kind: str) -> list[str]:
    """The attempts of one kind that were started so far, in order."""
    file = runs / "begun.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.partition(" ")[2] for line in lines if line.startswith(kind)]


def _begin(runs: Path, kind: str, what: str) -> None:
    with (runs / "begun.txt").open("a") as file:
        file.write(f"{kind} {what}\n")


def _behaviour(runs: Path, id_: str) -> dict[str, Any]:
    said = read_json(runs / "behaviour.json") or {}
    return {"steps": 3, "step_s": 0.0, **said.get("*", {}), **said.get(id_, {})}


def prepare(pair: PairSpec, quant: QuantSpec, cache_dir: Path, commits: dict[str, str]) -> object:
    _begin(cache_dir, "prepare", f"{pair.pair_name}/{quant.quant_type}")
    if (cache_dir / "no-weights").exists():
        raise ConfigError("pair tiny: its weights are not at hand; fetch them")
    return object()


def train(spec: TrainSpec) -> int:
    runs = Path(spec.place.runs)
    run = Runs(runs).of(spec)
    run.record()
    if run.is_trained():
        return 0
    try:
        with run.lock():
            return 0 if run.is_trained() else _attempt(spec, run, _behaviour(runs, run.id))
    except Timeout as error:
        raise ContractError("another process trains this run now") from error


def _attempt(spec: TrainSpec, run: RunDir, how: dict[str, Any]) -> int:
    _begin(run.path.parent, "train", run.id)
    attempt = run.status().get("attempt", 0) + 1
    run.update_status(
        phase="starting", attempt=attempt, started=now(), finished=None, exit_code=None,
        cause=None, pid=os.getpid(),
    )  # fmt: skip
    stop = StopFlag()
    stop.install()
    if how.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if run.record() is None:
        here = {"sources": sources_of(spec, Path(spec.place.cache_dir))}
        record = new_record(spec, {}) | here | {"threads": spec.place.threads}
        write_json(run.spec_file, record)
    run.update_status(phase="training", max_steps=how["steps"])
    print(f"training {run.id} with {spec.place.threads} threads", flush=True)
    try:
        for step in range(len(run.metrics()), how["steps"]):
            stop.check()
            if spec.scoring.teacher_at == "server":
                ask_teacher()
            time.sleep(how["step_s"])
            with run.metrics_file.open("a") as file:
                file.write(json.dumps({"step": step, "train/loss": 1.0}) + "\n")
            run.update_status(step=step + 1)
            if step >= 1 and attempt <= how.get("times", 1):
                _misbehave_now(how)
    except StillhouseError as error:
        phase = "waiting" if isinstance(error, Interrupted) else "failed"
        cause = f"{type(error).__name__}: {error}"
        run.update_status(phase=phase, finished=now(), exit_code=error.exit_code, cause=cause)
        raise
    (run.adapter).mkdir(exist_ok=True)
    (run.adapter / "adapter_model.safetensors").write_bytes(b"abc")
    files = {"adapter_model.safetensors": {"size": 3}}
    write_json(run.adapter / "stillhouse.json", {"id": run.id, "files": files})
    run.update_status(phase="done", finished=now(), exit_code=0)
    return 0


def _misbehave_now(how: dict[str, Any]) -> None:
    if "kill" in how:
        os.kill(os.getpid(), getattr(signal, how["kill"]))
    if "exit" in how:
        raise ENDS[how["exit"]]("as it was told to")


def serve(spec: TrainSpec, listening: socket.socket, token: str) -> int:
    """Say its token to whoever asks; the first one may be killed after some answers."""
    runs = Path(spec.place.runs)
    _begin(runs, "teacher", str(os.getpid()))
    answers = _behaviour(runs, "teacher").get("answers")
    while True:
        with listening.accept()[0] as asked:
            asked.sendall(token.encode())
        if answers and len(begun(runs, "teacher")) == 1 and (answers := answers - 1) == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def ask_teacher() -> None:
    """Wait for an answer of the teacher's server, whose address a worker is given."""
    host, _, port = os.environ["STILLHOUSE_TEACHER_URL"].rpartition("/")[2].partition(":")
    with socket.create_connection((host, int(port)), timeout=240) as connection:
        assert connection.recv(100).decode() == os.environ["STILLHOUSE_TEACHER_TOKEN"]


def evaluate(spec: EvalSpec) -> int:
    runs = Path(spec.place.runs)
    directories = [Path(path) for path in spec.evaluation.lora_paths]
    ids = [RunDir(directory).id for directory in directories]
    flags = {
        "teacher": spec.evaluation.eval_teacher,
        "student": spec.evaluation.eval_student,
        "ptq": spec.evaluation.eval_ptq,
    }
    labels = [label for label, is_asked in flags.items() if is_asked]
    _begin(runs, "eval", ",".join([*ids, *labels]))
    stop = StopFlag()
    stop.install()
    for label in labels:
        key = baseline_key(label, spec.pair, spec.quant)
        directories.append(Runs(runs).baseline(label, key))
    isolation = Isolation()
    rows = list(zip([*ids, *labels], directories, strict=True))
    for name, directory in sorted(rows, key=lambda row: isolation.is_suspect(row[1])):
        isolation.forget(directory)
        with isolation.guard(directory):
            make_directory(directory)
        if directory in isolation.failed:
            continue
        how = _behaviour(runs, name)
        with isolation.scoring(directory):
            time.sleep(how.get("eval_s", 0))
            stop.check()
            if how.get("eval_fails"):
                raise ENDS[how["eval_fails"]](f"{name} cannot be scored")
            if "eval_kill" in how:
                os.kill(os.getpid(), getattr(signal, how["eval_kill"]))
            if not how.get("eval_forgets"):
                _score(spec, directory)
            if how.get("eval_tears"):
                eval_file(directory, spec.suite.tasks[0].task).write_text("{")
    isolation.check()
    return 0


def _score(spec: EvalSpec, directory: Path) -> None:
    for task in spec.suite.tasks:
        key = score_key(spec.suite, task)
        write_json(eval_file(directory, task.task), {"format": 1, "key": key, "value": 0.5})


def until(condition: Any, timeout_s: float = 40.0) -> None:
    """Wait until something is so; a test that waits for longer has failed."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def words(runs: Path, *more: str, points: int = 2, parallel: int = 2) -> tuple[str, ...]:
    """A typed grid of `points` points of the tiny pair."""
    lmbdas = ",".join(str(i / 8) for i in range(points))
    return ("pair=tiny", f"lmbda={lmbdas}", f"max_parallel={parallel}", f"cache_dir={runs}", *more)
