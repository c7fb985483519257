"""Run tasks as processes of this machine, forked from a server that has done the imports.

Importing torch and the libraries around it takes ten seconds; a fork of a process that has imported
them takes some milliseconds. The launcher itself never imports them, so it stays light and handles
its own Ctrl-C.

    launcher ── starts ──► server (imports, one thread) ── forks ──► worker ── its own session
        │                                                               │
        └─ pipe: when it closes, the launcher is dead, and a worker signals itself to save and stop

The launcher writes how a worker died into the run directory (`outcomes`), as the worker cannot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, cast

from filelock import Timeout

from stillhouse.errors import AGAIN, DONE, StillhouseError, Unwritable
from stillhouse.rundir import RunDir, code_identity, make_directory, now
from stillhouse.spec import EvalSpec, TrainSpec
from stillhouse.sweep.backend import Finished, Task
from stillhouse.sweep.local.outcomes import Ending, check_promise, write_ending
from stillhouse.sweep.local.teachers import Teachers
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Baseline, Sweep
from stillhouse.sweep.registry import cancel_mark, log_file
from stillhouse.sweep.snapshot import Snapshot, baselines_on_disk, look
from stillhouse.sweep.state import Observation

# Named, not imported: the launcher imports no torch, and `entrypoints` is a layer above this one.
WORK = {
    "prepare": "stillhouse.distill.pairs:prepare",
    "train": "stillhouse.entrypoints:train",
    "eval": "stillhouse.entrypoints:evaluate",
    "teacher": "stillhouse.distill.teacher_server:serve",
}
PRELOAD = ("stillhouse.distill", "torch", "transformers", "datasets")
# Importing bitsandbytes (peft does) opens a CUDA device, and a fork cannot share an open one.
PRELOAD_WITHOUT_CUDA = (
    *PRELOAD, "peft", "bitsandbytes", "accelerate", "peft.tuners.lora",
    "transformers.models.llama.modeling_llama", "lm_eval.models.huggingface",
    "stillhouse.distill.run", "stillhouse.evals.harness",
)  # fmt: skip
CUDA_DEVICE = Path("/dev/nvidiactl")
ELSEWHERE = "another process has this run now"
LOCK_WAIT_S = 5.0  # a look at a lock holds it for an instant; somebody at work holds it for long


class WorkerPool:
    """A pool of worker processes, one for each task it is given; one launcher has one server."""

    has_fixed_packs = False  # what is elsewhere holds its runs' locks; nobody scores them twice
    connection_error = ""

    def __init__(
        self,
        sweep: Sweep,
        first: Snapshot,
        work: Mapping[str, str] = WORK,
        preload: Sequence[str] | None = None,
    ) -> None:
        """`first`: the look at these points from which the loop begins."""
        self.sweep, self.first, self.work = sweep, first, work
        self.threads = max(1, _cores() // sweep.site.max_parallel)
        # id -> mark of a stop, and when we saw it
        self._stops: dict[str, tuple[float | None, float | None]] = {
            id_: (seen.stop_mark, None) for id_, seen in first.observations.items()
        }
        self._first_mark = cancel_mark(sweep.runs, sweep.name)
        self._beneath = sweep.beneath()
        self._elsewhere = {  # points that some other process has at work
            id_ for id_, seen in first.observations.items() if seen.state == "running"
        }
        self._context = multiprocessing.get_context("forkserver")
        self._workers: list[_Worker] = []
        self._queue: list[Task] = []  # asked for while the server still imports
        self._left_behind: list[ForkServerProcess] = []
        self._unwritable: dict[Path, str] = {}  # run directories that cannot say how they ended
        self._hopeless: list[Finished] = []  # tasks whose teacher will not answer
        self._teachers_words: list[connection.Connection] = []
        trained = {id_ for id_, seen in first.observations.items() if seen.is_trained}
        self.teachers = Teachers(sweep, self._fork_teacher, trained)
        self._is_stopping = False
        if preload is None:
            preload = PRELOAD if CUDA_DEVICE.exists() else PRELOAD_WITHOUT_CUDA
        self._context.set_forkserver_preload([*preload, "stillhouse.sweep.local.preload"])
        code_identity()  # the launcher's, too, is what it was now
        _start_server(log_file(sweep.runs, sweep.name), self.threads)
        # The first fork waits for the imports; this thread waits, so that we still hear Ctrl-C.
        self._warming = threading.Thread(target=self._warm, daemon=True)
        self._warming.start()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.teachers.end()

    def _warm(self) -> None:
        with contextlib.suppress(EOFError, OSError):  # a server that broke is said at the next fork
            process = self._context.Process(target=_nothing)
            process.start()
            process.join()

    # --------------------------------------------------------------- how the points stand

    def snapshot(self) -> Snapshot:
        """The look from which the loop begins."""
        return self.first

    def look(self, id_: str) -> Observation:
        """The state of one point, from its files."""
        if why := self._unwritable.get(self.sweep.run(id_).path):
            return Observation("unreadable", why)
        seen = self._in_order(id_, look(self.sweep.run(id_), self.sweep.suite, self._beneath))
        if seen.state == "running" and not any(id_ in action.points for action in self.live()):
            self._elsewhere.add(id_)
        else:
            self._elsewhere.discard(id_)
        return seen

    def _in_order(self, id_: str, seen: Observation) -> Observation:
        """What was seen, with when a stop came that was not there when we first looked.

        By our clock: that of whoever wrote it down may be another.
        """
        mark, at = self._stops[id_]
        if seen.stop_mark != mark:
            at = now()
            self._stops[id_] = seen.stop_mark, at
        return seen if seen.stop_mark is None else dataclasses.replace(seen, asked_to_stop=at)

    def changed(self) -> list[str]:
        """The points that others have at work."""
        return list(self._elsewhere)

    def baselines(self) -> tuple[Baseline, ...]:
        """The rows that no run trains, from their files."""
        why = self._unwritable
        return tuple(
            dataclasses.replace(row, cause=why.get(row.directory, row.cause))
            for row in baselines_on_disk(self.sweep)
        )

    def is_cancelled(self) -> bool:
        """Whether `stillhouse cancel` was called since this was made."""
        return cancel_mark(self.sweep.runs, self.sweep.name) != self._first_mark

    def live(self) -> list[Action]:
        """What is at work or waits for the server."""
        tasks = [*self._queue, *(worker.task for worker in self._workers)]
        return [task.action for task in tasks]

    def waits(self) -> dict[Action, str]:
        return {}  # what is live here is at work, or next

    # ----------------------------------------------------------------------------- at work

    def start(self, task: Task) -> None:
        """Take a task on; it is forked as soon as the server is warm."""
        self._queue.append(task)
        self._fork_queued()

    def _fork_queued(self) -> None:
        if self._warming.is_alive():
            return
        self.teachers.look()
        while self._queue:
            task = self._queue.pop(0)
            why = self.teachers.given_up(task.arguments[0]) if _trains(task) else None
            if why is None:
                self._workers.append(self._fork(task))
            else:
                ending = Ending(1, why, self.sweep.site.infra_retries, False)
                self._unwritable |= write_ending(task, ending)
                self._hopeless.append(Finished(task.action, 1, why, 0.0))

    def _fork_teacher(self, arguments: tuple[Any, ...]) -> ForkServerProcess:
        given = tuple(_with_threads(a, self.threads) for a in arguments)
        log = log_file(self.sweep.runs, self.sweep.name)
        receiver, sender = self._context.Pipe(duplex=False)
        self._teachers_words.append(receiver)  # kept, so that it can say them
        what = (self.work["teacher"], given, log, (), sender, dict[str, str]())
        process = self._context.Process(target=_work, args=what)
        process.start()
        return process

    def _fork(self, task: Task) -> _Worker:
        try:
            return self._forked(task)
        except (EOFError, ConnectionError):  # the server was just dying; there will be another
            pass
        try:
            return self._forked(task)
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(
                f"the server of the local backend died while it imported; see {task.log} and"
                " the sweep's log for what it printed"
            ) from error

    def _forked(self, task: Task) -> _Worker:
        receiver, sender = self._context.Pipe(duplex=False)
        arguments = tuple(_with_threads(a, self.threads) for a in task.arguments)
        locks = task.runs if task.action.kind == "eval" else ()
        env = self.teachers.environment(task.arguments[0]) if _trains(task) else {}
        process = self._context.Process(
            target=_work,
            args=(self.work[task.action.kind], arguments, task.log, locks, sender, env),
        )
        process.start()
        sender.close()
        return _Worker(task, process, receiver, time.perf_counter())

    def wait(self, timeout_s: float) -> list[Finished]:
        """The tasks that ended, as soon as one does; none when the time is over."""
        if self._warming.is_alive():
            self._warming.join(timeout_s)
        if self._is_stopping:
            never_forked = [Finished(t.action, AGAIN, "not begun", 0.0) for t in self._queue]
            self._queue.clear()
            if never_forked:
                return never_forked
        self._fork_queued()
        if self._hopeless:
            return [self._hopeless.pop() for _ in list(self._hopeless)]
        sentinels = [worker.process.sentinel for worker in self._workers]
        if not sentinels:  # what we wait for runs elsewhere
            time.sleep(timeout_s)
            return []
        connection.wait(sentinels, timeout_s)
        ended = [w for w in self._workers if w.process.exitcode is not None]
        if ended:  # who worked for a while may have made a pair, and somebody may have changed one
            self._beneath = self.sweep.beneath()
        self._workers = [w for w in self._workers if w not in ended]
        return [self._reap(worker) for worker in ended]

    def stop(self) -> None:
        """Ask every worker to save and end."""
        self._is_stopping = True
        for worker in self._workers:
            worker.process.terminate()

    def kill(self) -> None:
        """End every worker and what it started, now."""
        for worker in self._workers:
            assert worker.process.pid is not None
            with contextlib.suppress(ProcessLookupError):  # it has no session of its own yet
                os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.kill()
        self.teachers.end()

    def _reap(self, worker: _Worker) -> Finished:
        task, code, pid = worker.task, worker.process.exitcode, worker.process.pid
        assert code is not None
        cause = worker.last_words()
        if code == -signal.SIGTERM:  # before it could listen: it was asked to stop, and did
            code, cause = AGAIN, "asked to stop before it began"
        elif code < 0:
            cause = f"killed by {signal.Signals(-code).name}"
            code = 128 - code  # as a shell says it
        elif code == DONE:
            code, cause = check_promise(task)
            if _trains(task) and code == DONE:
                self.teachers.is_trained(task.arguments[0], task.action.points[0])
        if any(run.is_locked() for run in task.runs):
            # Another launcher's worker has it; or ours, which a server that died left behind: its
            # process object is kept, because the pipe it holds says that the launcher is alive.
            code, cause = AGAIN, ELSEWHERE
            self._left_behind.append(worker.process)
        else:
            worker.process.close()
        if cause != ELSEWHERE:
            retries = self.sweep.site.infra_retries
            ending = Ending(code, cause, retries, self._is_stopping, pid)
            self._unwritable |= write_ending(task, ending)
        seconds = time.perf_counter() - worker.started
        return Finished(task.action, code, cause, seconds)


@dataclasses.dataclass(frozen=True, eq=False)
class _Worker:
    task: Task
    process: ForkServerProcess
    receiver: connection.Connection
    started: float

    def last_words(self) -> str | None:
        with contextlib.closing(self.receiver), contextlib.suppress(EOFError):
            return self.receiver.recv() if self.receiver.poll() else None
        return None


def _trains(task: Task) -> bool:
    return task.action.kind == "train"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # what we may use, of what there is
    return os.cpu_count() or 1


def _with_threads(argument: Any, threads: int) -> Any:
    """A spec with its number of threads set: a CPU run is repeatable only with the same number."""
    if not isinstance(argument, TrainSpec | EvalSpec) or argument.place.threads:
        return argument
    place = dataclasses.replace(argument.place, threads=threads)
    return cast("Any", dataclasses.replace(argument, place=place))


def _start_server(log: Path, threads: int) -> None:
    """Start the server of this process, if it has none; what it prints goes to `log`."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # Threads that spin while they wait take the core from the point beside them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Read once, when the libraries are imported: nothing is downloaded behind anybody's back.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    make_directory(log.parent)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        ours = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in ours:
                os.dup2(file.fileno(), number)
            forkserver.ensure_running()
        finally:
            for number, kept in ours.items():
                os.dup2(kept, number)
                os.close(kept)


# ------------------------------------------------------------------------------- in a worker


def _nothing() -> None:
    pass


def _work(
    name: str,
    arguments: tuple[Any, ...],
    log: Path,
    locks: tuple[RunDir, ...],
    sender: connection.Connection,
    environment: Mapping[str, str],
) -> None:
    """Do one task in this process, and end it with the exit code that says how that went."""
    os.environ.update(environment)
    os.setsid()  # a terminal's Ctrl-C is for the launcher, which then asks us
    _print_into(log)
    threading.Thread(target=_stop_with_launcher, daemon=True).start()
    code, cause = _outcome(name, arguments, locks)
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(cause)
    raise SystemExit(code)


def _print_into(log: Path) -> None:
    make_directory(log.parent)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    cast("io.TextIOWrapper", sys.stdout).reconfigure(line_buffering=True)


def _stop_with_launcher() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _outcome(
    name: str, arguments: tuple[Any, ...], locks: tuple[RunDir, ...]
) -> tuple[int, str | None]:
    module, _, function = name.partition(":")
    try:
        with _held(locks):
            result = getattr(importlib.import_module(module), function)(*arguments)
        return (result if isinstance(result, int) else DONE), None
    except Timeout:
        return AGAIN, ELSEWHERE
    except StillhouseError as error:
        if isinstance(error.__cause__, Timeout):
            return AGAIN, ELSEWHERE
        cause = f"{type(error).__name__}: {error}"
        print(cause, file=sys.stderr)
        return error.exit_code, cause
    except BaseException as error:
        traceback.print_exc()
        return 1, traceback.format_exception_only(error)[-1].strip()


@contextlib.contextmanager
def _held(runs: tuple[RunDir, ...]) -> Generator[None, None, None]:
    """Hold these runs' locks and say so: nobody scores, or counts as idle, what is being scored."""
    with contextlib.ExitStack() as stack:
        for run in runs:
            with contextlib.suppress(Unwritable):  # the evaluation fails this row, and it alone
                stack.enter_context(run.lock().acquire(timeout=LOCK_WAIT_S, blocking=True))
                run.update_status(scoring=True, pid=os.getpid())
                stack.callback(run.update_status, scoring=False)
        yield
