"""Run the loop over a sweep until nothing is left to do: observe, plan, act, wait.

The loop is not a source of truth: it reads the state of each point (`plan`), its executor knows how
a task runs, and its display shows progress to a person. Kill it at any moment, start it again, and
it continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stillhouse.compose import Overrides, compose
from stillhouse.errors import AGAIN, DONE, POISON, SOME_FAILED
from stillhouse.spec import EvalSpec
from stillhouse.sweep.backend import Executor, Finished, Task
from stillhouse.sweep.commits import placed
from stillhouse.sweep.plan import Action, Situation, actions
from stillhouse.sweep.points import Point, Sweep
from stillhouse.sweep.registry import log_file
from stillhouse.sweep.snapshot import Snapshot
from stillhouse.sweep.state import FAILED, Observation

TICK_S = 0.5  # how often the loop looks up while nothing ends


@dataclass(frozen=True)
class Picture:
    """A snapshot of a running sweep, for the display."""

    sweep: Sweep
    observations: Mapping[str, Observation]
    live: Sequence[Action]
    is_stopping: bool
    waits: Mapping[Action, str] = field(default_factory=dict[Action, str])  # `Executor.waits`
    connection_error: str = ""  # why requests get no answer; "" where they do


@runtime_checkable
class Display(Protocol):
    """The receiver of the loop's events: a progress display, or a test."""

    def started(self, action: Action) -> None: ...

    def finished(self, finished: Finished) -> None: ...

    def says(self, text: str) -> None: ...

    def sees(self, picture: Picture) -> None:
        """Called at every turn of the loop, at least once a second."""
        ...


class Interrupts:
    """A counter of requests to stop."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def counted(self) -> Generator[None, None, None]:
        """Count SIGINT and SIGTERM instead of ending by them."""

        def one_more(number: int, frame: Any) -> None:
            # Only a person presses twice: `make`, say, sends SIGTERM after the terminal's SIGINT.
            self.count = self.count + 1 if number == signal.SIGINT else max(self.count, 1)

        before = {s: signal.signal(s, one_more) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Driver:
    """One loop over a sweep, or over some of its points."""

    def __init__(self, sweep: Sweep, executor: Executor, display: Display) -> None:
        self.sweep, self.executor, self.display = sweep, executor, display
        self.groups = self.packs = sweep.groups
        if executor.has_fixed_packs:
            self.packs = {point.id: point.pack for point in sweep.points}
        first = executor.snapshot()
        self.since = first.at
        self.observations = {**first.observations}
        self.baselines = first.baselines
        self.prepared = {**first.prepared}
        self.failed_to_prepare: dict[str, int] = {}
        self.blocked: dict[str, str] = {}  # group -> why its pair cannot be had

    def run(self) -> int:
        """Go on until nothing is left to do or somebody asks to stop; the verb's exit code."""
        interrupts = Interrupts()
        with interrupts.counted():
            try:
                while not self._is_asked_to_stop(interrupts):
                    self._start_what_can()
                    if not self.executor.live() and not self._is_any_elsewhere():
                        return self._exit_code()
                    self._turn()
                    for id_ in self.executor.changed():
                        self._look(id_)
                return self._wind_down(interrupts)
            except BaseException:
                self.executor.stop()  # nobody would reap them, but they can still save
                raise

    def _is_asked_to_stop(self, interrupts: Interrupts) -> bool:
        if interrupts.count:
            return True
        if self.executor.is_cancelled():
            self.display.says("cancelled by `stillhouse cancel`")
            return True
        return False

    def _wind_down(self, interrupts: Interrupts) -> int:
        """Let what runs save and end; a second Ctrl-C does not let it."""
        self.executor.stop()
        if live := self.executor.live():
            self.display.says(
                f"stopping: {len(live)} at work save what they have (Ctrl-C again kills them)"
            )
        already = min(interrupts.count, 1)
        while self.executor.live():
            self._turn(is_stopping=True)
            if interrupts.count > max(already, 1):
                already = interrupts.count
                self.executor.kill()
        return AGAIN

    def _turn(self, is_stopping: bool = False) -> None:
        live = tuple(self.executor.live())
        waits, error = self.executor.waits(), self.executor.connection_error
        picture = Picture(self.sweep, self.observations, live, is_stopping, waits, error)
        self.display.sees(picture)
        for finished in self.executor.wait(TICK_S):
            self._finish(finished)

    def _start_what_can(self) -> None:
        while self._is_surprised_while_starting():
            pass

    def _is_surprised_while_starting(self) -> bool:
        """Start what is next; true where a point was not what it was: then what is left out is
        planned anew."""
        is_surprised = False
        situation = Situation(
            self.groups,
            self.packs,
            self.observations,
            self.baselines,
            self.prepared,
            self.executor.live(),
            self.since,
        )
        for action in actions(situation, self.sweep.site.max_parallel, self.sweep.pack):
            # Another `run`, or a person, may have been quicker since we looked.
            before = [self.observations[id_] for id_ in action.points]
            for id_ in action.points:
                self._look(id_)
            if [self.observations[id_] for id_ in action.points] != before:
                is_surprised = True
                continue
            self.executor.start(self._task(action))
            self.display.started(action)
        return is_surprised

    def _finish(self, finished: Finished) -> None:
        action = finished.action
        for id_ in action.points:
            self._look(id_)
        if action.kind == "prepare":
            self._learn_whether_prepared(finished)
        if action.baselines:
            self.baselines = self.executor.baselines()
        self.display.finished(finished)

    def _learn_whether_prepared(self, finished: Finished) -> None:
        """A pair that cannot be had is no point's failure: it is tried again by the next `run`."""
        group = finished.action.group
        if finished.exit_code == DONE:
            self.prepared[group] = True
        elif finished.exit_code != AGAIN:
            self.failed_to_prepare[group] = self.failed_to_prepare.get(group, 0) + 1
            many = self.failed_to_prepare[group] > self.sweep.site.infra_retries
            if many or finished.exit_code in POISON:
                self.prepared[group] = False
                self.blocked[group] = finished.cause or f"exit code {finished.exit_code}"

    def _look(self, id_: str) -> None:
        self.observations[id_] = self.executor.look(id_)

    def _is_any_elsewhere(self) -> bool:
        """Whether some other process has a point at work: waiting for it is all there is to do."""
        return any(seen.state == "running" for seen in self.observations.values())

    def _exit_code(self) -> int:
        states = {seen.state for seen in self.observations.values()}
        if self.failures() or states & {*FAILED, "drifted", "unreadable"}:
            return SOME_FAILED
        return DONE if states <= {"done"} else AGAIN

    def snapshot(self) -> Snapshot:
        """How the points and baselines stand."""
        return Snapshot(self.observations, self.baselines, self.failures(), self.prepared)

    def failures(self) -> dict[str, str]:
        """Failures that no run shows, of preparing pairs and scoring baselines, with causes."""
        pairs = {f"the pair of {group}": cause for group, cause in self.blocked.items()}
        return pairs | {f"baseline {b.directory.name}": b.cause for b in self.baselines if b.cause}

    # -------------------------------------------------------------- what an executor is given

    def _task(self, action: Action) -> Task:
        runs = tuple(self.sweep.run(id_) for id_ in action.points)
        log = log_file(self.sweep.runs, self.sweep.name)
        if action.kind == "train":
            spec = placed(self.sweep.by_id[action.points[0]].spec, self.sweep)
            return Task(action, (spec,), runs, None, runs[0].log_file)
        if action.kind == "eval":
            labels = {b.label for b in self.baselines if b.directory in action.baselines}
            point = self.sweep.by_id[action.points[0]]
            spec = eval_spec(self.sweep, point, labels, (str(run.path) for run in runs))
            return Task(action, (spec,), runs, spec, log)
        first = next(p for p in self.sweep.points if p.group == action.group).spec
        cache_dir = Path(first.place.cache_dir)
        subject = (first.pair, first.quant, cache_dir, {**self.sweep.commits})
        return Task(action, subject, (), None, log)


def eval_spec(
    sweep: Sweep, point: Point, labels: Collection[str], lora_paths: Iterable[str]
) -> EvalSpec:
    """The evaluation of some runs of a point's group, and of the baselines with these labels."""
    spec, defaults = point.spec, _eval_defaults()
    suite = sweep.suite or defaults.suite
    evaluation = dataclasses.replace(
        defaults.evaluation,
        lora_paths=tuple(lora_paths),
        eval_teacher="teacher" in labels,
        eval_student="student" in labels,
        eval_ptq="ptq" in labels,
    )
    place = dataclasses.replace(
        spec.place, name=None, output_dir=None, tags=(), commits={**sweep.commits}
    )
    return EvalSpec(spec.pair, spec.quant, spec.data, suite, evaluation, place)


@functools.cache
def _eval_defaults() -> EvalSpec:
    return compose(Overrides({}, {}), EvalSpec)
