"""Test the local backend with real worker processes: crashes, kills, output, and cleanup."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.rundir import RunDir
from stillhouse.sweep.backend import Finished, Task
from stillhouse.sweep.driver import Driver
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.local.teachers import Teachers
from stillhouse.sweep.local.workers import WorkerPool
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.progress import Lines
from stillhouse.sweep.snapshot import observe
from tests.fakes import behaving
from tests.kills import PATIENCE_S


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return load_sweep(None, [*behaving.words(tmp_path)], tmp_path)


@pytest.fixture
def backend(sweep: Sweep) -> Iterator[WorkerPool]:
    backend = behaving.executor_for(sweep)
    yield backend
    backend.kill()


def the_task(sweep: Sweep, backend: WorkerPool, action: Action) -> Task:
    drive = Driver(sweep, backend, Lines(sweep, [].append))
    return drive._task(action)


def train(sweep: Sweep, backend: WorkerPool, place: int = 0) -> RunDir:
    """Start training of one point; its run directory."""
    action = Action("train", "tiny/int4", (sweep.points[place].id,))
    task = the_task(sweep, backend, action)
    backend.start(task)
    return task.runs[0]


def wait(backend: WorkerPool) -> Finished:
    found: list[Finished] = []
    behaving.until(lambda: found.extend(backend.wait(0.1)) or found)
    return found[0]


def state(sweep: Sweep, run: RunDir) -> tuple[str, str | None]:
    seen = observe(sweep)[run.id]
    return seen.state, seen.cause


def test_a_worker_that_ends_well_leaves_its_words_in_the_runs_log(
    sweep: Sweep, backend: WorkerPool
) -> None:
    run = train(sweep, backend)
    finished = wait(backend)
    assert (finished.exit_code, finished.cause) == (0, None)
    assert run.is_trained()
    assert "training" in run.log_file.read_text()


def test_every_point_is_told_its_threads(sweep: Sweep, backend: WorkerPool) -> None:
    run = train(sweep, backend)
    wait(backend)
    record = run.record()
    assert record is not None
    assert record["threads"] == backend.threads >= 1
    assert backend.threads == max(1, len(os.sched_getaffinity(0)) // sweep.site.max_parallel)


@pytest.mark.parametrize(
    ("end", "exit_code", "cause", "phase"),
    [
        ("config", 42, "ConfigError: as it was told to", "failed"),
        ("diverged", 43, "Diverged: as it was told to", "failed"),
        ("memory", 44, "OutOfMemory: as it was told to", "failed"),
        ("crash", 1, "RuntimeError: as it was told to", "waiting"),
    ],
)
def test_how_a_worker_ended_is_its_exit_code_and_last_words(
    sweep: Sweep, backend: WorkerPool, end: str, exit_code: int, cause: str, phase: str
) -> None:
    behaving.misbehave(sweep.runs, exit=end)
    run = train(sweep, backend)
    finished = wait(backend)
    assert (finished.exit_code, finished.cause) == (exit_code, cause)
    assert state(sweep, run) == (phase, cause)
    assert cause in run.log_file.read_text()


def test_a_death_by_signal_is_written_down_by_the_launcher(
    sweep: Sweep, backend: WorkerPool
) -> None:
    behaving.misbehave(sweep.runs, kill="SIGKILL")
    run = train(sweep, backend)
    assert wait(backend).exit_code == 128 + signal.SIGKILL
    assert state(sweep, run) == ("waiting", "killed by SIGKILL")
    assert run.status()["infra_failures"] == 1


def test_a_worker_that_promises_success_and_leaves_no_score_has_failed(
    sweep: Sweep, backend: WorkerPool
) -> None:
    run = train(sweep, backend)
    wait(backend)
    behaving.misbehave(sweep.runs, run.id, eval_forgets=True)
    backend.start(the_task(sweep, backend, Action("eval", "tiny/int4", (run.id,))))
    finished = wait(backend)
    assert finished.exit_code == 1
    assert finished.cause == f"it ended with exit code 0 and left no scores in {run.path.name}"
    assert run.status()["eval_infra_failures"] == 1


def test_a_torn_score_is_one_unreadable_row_and_the_others_are_scored(
    sweep: Sweep, backend: WorkerPool
) -> None:
    one, other = (sweep.run(point.id) for point in sweep.points[:2])
    for place in range(2):
        train(sweep, backend, place)
        wait(backend)
    behaving.misbehave(sweep.runs, other.id, eval_forgets=True)
    behaving.misbehave(sweep.runs, one.id, eval_tears=True)
    backend.start(the_task(sweep, backend, Action("eval", "tiny/int4", (one.id, other.id))))
    finished = wait(backend)
    assert finished.cause == f"it ended with exit code 0 and left no scores in {other.path.name}"
    assert backend.look(one.id).state == "unreadable"
    assert backend.look(other.id).state == "waiting"


def test_a_run_directory_that_takes_no_files_is_one_unreadable_row(
    sweep: Sweep, backend: WorkerPool
) -> None:
    """/proc/self is a directory in which nobody can make a file, root included."""
    run = sweep.run(sweep.points[0].id)
    run.path.symlink_to("/proc/self")
    train(sweep, backend)
    assert wait(backend).exit_code != 0
    seen = backend.look(run.id)
    assert seen.state == "unreadable"
    assert f"{run.status_file}: cannot be written" in (seen.cause or "")


def test_a_run_that_is_at_work_elsewhere_is_left_alone(sweep: Sweep, backend: WorkerPool) -> None:
    run = RunDir(sweep.run(sweep.points[0].id).path)
    run.update_status(phase="training", pid=os.getpid())
    with run.lock():
        train(sweep, backend)
        finished = wait(backend)
        assert (finished.exit_code, finished.cause) == (85, "another process has this run now")
        assert state(sweep, run)[0] == "running"
    assert run.status() == {"phase": "training", "pid": os.getpid()}


def test_a_point_that_is_being_scored_is_running_and_knows_by_whom(
    sweep: Sweep, backend: WorkerPool
) -> None:
    run = train(sweep, backend)
    wait(backend)
    behaving.misbehave(sweep.runs, run.id, eval_s=0.3)
    backend.start(the_task(sweep, backend, Action("eval", "tiny/int4", (run.id,))))
    behaving.until(lambda: state(sweep, run)[0] == "running")
    seen = observe(sweep)[run.id]
    assert seen.pid is not None and os.getsid(seen.pid) == seen.pid != os.getsid(0)
    assert wait(backend).exit_code == 0
    assert state(sweep, run) == ("done", None)


def test_stop_lets_workers_save_and_kill_does_not(sweep: Sweep, backend: WorkerPool) -> None:
    behaving.misbehave(sweep.runs, steps=1000, step_s=0.02)
    deaf = sweep.points[1].id
    behaving.misbehave(sweep.runs, deaf, steps=1000, step_s=0.02, deaf=True)
    first, second = train(sweep, backend, 0), train(sweep, backend, 1)
    # It forks what waited for the server's imports when it is asked what ended.
    behaving.until(
        lambda: not backend.wait(0.05) and all(len(run.metrics()) > 1 for run in (first, second))
    )
    backend.stop()
    finished = wait(backend)
    assert (finished.action.points, finished.exit_code) == ((first.id,), 85)
    assert backend.wait(0.2) == []
    backend.kill()
    assert wait(backend).exit_code == 128 + signal.SIGKILL
    assert state(sweep, second) == ("waiting", "killed by SIGKILL")
    assert "infra_failures" not in second.status()


def test_workers_and_server_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    behaving.misbehave(tmp_path, steps=10_000, step_s=0.02)
    launcher = behaving.start_launcher(tmp_path, *behaving.words(tmp_path))
    runs = behaving.at_work(tmp_path, 2)
    workers: list[int] = [run.status()["pid"] for run in runs]
    server = behaving.parent_of(workers[0])
    assert server not in (launcher.pid, 1)
    launcher.kill()
    launcher.wait()
    behaving.until(lambda: not any(is_alive(pid) for pid in [*workers, server]))
    for run in runs:
        status: dict[str, Any] = run.status()
        assert (status["phase"], status["exit_code"]) == ("waiting", 85)


def test_points_share_one_teacher_that_starts_before_them_and_ends_with_them(
    tmp_path: Path,
) -> None:
    line = behaving.words(tmp_path, "teacher_at=server", points=3, parallel=1)
    launcher = behaving.start_launcher(tmp_path, *line)
    assert launcher.wait(PATIENCE_S) == 0, (tmp_path / "launcher.out").read_text()
    (teacher,) = behaving.begun(tmp_path, "teacher")
    assert len(behaving.begun(tmp_path, "train")) == 3 and not is_alive(int(teacher))


def test_a_teacher_that_is_killed_starts_again_at_its_address_and_no_point_fails(
    tmp_path: Path,
) -> None:
    behaving.misbehave(tmp_path, "teacher", answers=3)
    line = behaving.words(tmp_path, "teacher_at=server")
    launcher = behaving.start_launcher(tmp_path, *line)
    assert launcher.wait(PATIENCE_S) == 0, (tmp_path / "launcher.out").read_text()
    teachers = behaving.begun(tmp_path, "teacher")
    assert len(teachers) == 2 and not any(is_alive(int(pid)) for pid in teachers)
    runs = [RunDir(file.parent) for file in tmp_path.glob("*/metrics.jsonl")]
    assert [run.status()["attempt"] for run in runs] == [1, 1]


def test_a_teacher_that_dies_again_and_again_is_given_up_with_a_cause(tmp_path: Path) -> None:
    words = behaving.words(tmp_path, "teacher_at=server", "infra_retries=1", points=1)
    sweep = load_sweep(None, [*words], tmp_path)
    begun: list[Any] = []

    def fork(_: Any) -> Any:
        begun.append(subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]))
        begun[-1].wait()
        return SimpleNamespace(
            exitcode=7, terminate=begun[-1].terminate, join=begun[-1].wait, kill=begun[-1].kill
        )

    teachers, spec = Teachers(sweep, fork, set()), sweep.points[0].spec
    assert teachers.environment(spec)["STILLHOUSE_TEACHER_URL"].startswith("http://127.0.0.1:")
    for _ in range(4):
        teachers.look()
    assert len(begun) == 2 and "died 2 times" in (teachers.given_up(spec) or "")
    teachers.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_teacher_ends_with_a_launcher_that_is_killed_or_interrupted(
    tmp_path: Path, number: int
) -> None:
    behaving.misbehave(tmp_path, steps=10_000, step_s=0.02)
    line = behaving.words(tmp_path, "teacher_at=server")
    launcher = behaving.start_launcher(tmp_path, *line)
    behaving.at_work(tmp_path, 2)
    launcher.send_signal(number)
    launcher.wait(PATIENCE_S)
    (teacher,) = behaving.begun(tmp_path, "teacher")
    behaving.until(lambda: not is_alive(int(teacher)))
    assert not is_alive(int(teacher)), "no server is left behind"


def is_alive(pid: int) -> bool:
    """Whether a process is there and is no zombie that waits for somebody to look."""
    words = ["ps", "-o", "stat=", "-p", str(pid)]
    stat = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return bool(stat) and not stat.startswith("Z")


def test_what_the_server_prints_while_it_imports_goes_to_the_log(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text("import sys; print('noise', file=sys.stderr)\n")
    program = (
        "import sys; from pathlib import Path\n"
        "from stillhouse.sweep.local.workers import WorkerPool\n"
        "from stillhouse.sweep.grid import load_sweep\n"
        "from stillhouse.sweep.snapshot import on_disk\n"
        f"sweep = load_sweep(None, ['pair=tiny', 'lmbda=0,1'], Path({str(tmp_path)!r}))\n"
        "b = WorkerPool(sweep, on_disk(sweep, True), preload=['noisy'])\n"
        "b._warming.join()\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"
    assert "noise" not in done.stderr
    (log,) = (tmp_path / "sweeps").glob("*.log")
    assert log.read_text() == "noise\n"


def test_a_stop_counts_by_when_we_saw_it_whatever_the_clock_that_wrote_it_said(
    sweep: Sweep,
) -> None:
    """Machines that share the runs do not share a clock."""
    first, second = (sweep.run(point.id) for point in sweep.points[:2])
    ahead, behind = 9e12, 1.0
    for run in (first, second):
        run.path.mkdir(parents=True)
        run.update_status(phase="waiting", exit_code=85, finished=ahead)
    backend = behaving.executor_for(sweep)
    drive = Driver(sweep, backend, Lines(sweep, [].append))
    assert drive.observations[first.id].asked_to_stop is None, "it was so when we came"
    second.update_status(finished=behind)
    at = backend.look(second.id).asked_to_stop
    assert at is not None and at >= drive.since
    assert backend.look(second.id).asked_to_stop == at
    assert backend.look(first.id).asked_to_stop is None
    second.update_status(exit_code=None, phase="training", finished=None)
    assert backend.look(second.id).asked_to_stop is None
    backend.kill()
