"""Define a backend: the place where points run and leave their state.

`Backend` is what the verbs ask, `Executor` the part of it that the loop gives tasks to.
`local.backend` and `local.workers` implement them with processes of this machine, `cluster.backend`
and `cluster.jobs` with Jobs, and with the ConfigMaps that outlive them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stillhouse.rundir import RunDir
from stillhouse.spec import EvalSpec
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Baseline, Sweep
from stillhouse.sweep.snapshot import Observations, Snapshot
from stillhouse.sweep.state import Observation


@runtime_checkable
class Backend(Protocol):
    """This machine, or one namespace of a cluster."""

    def names(self) -> list[str]:
        """The sweeps that were ever started there."""
        ...

    def find(self, word: str) -> Sweep:
        """What a word means: a sweep's name, a run's NAME, the first digits of an id.

        Raises:
            ConfigError: it means nothing there, or more than one run.
        """
        ...

    def pinned(self, sweep: Sweep, begins: bool = False) -> Sweep:
        """The sweep with open revisions at the commits that it first ran with there.

        `begins`: it is about to run, so what is not known yet is found out.
        """
        ...

    def look(self, sweep: Sweep, is_to_run: bool = False) -> Snapshot:
        """How its points stand.

        `is_to_run`: its baselines are looked at, too, and a point that other code than ours began
        and did not finish is drifted.
        """
        ...

    def describe(self, sweep: Sweep | None) -> list[str]:
        """Further lines for the status of its points; None: of all sweeps."""
        ...

    def show_logs(self, sweep: Sweep, observations: Observations, follows: bool) -> bool:
        """Print what points printed; whether there was anything."""
        ...

    def log_texts(self, sweep: Sweep, observations: Observations) -> dict[str, str]:
        """The same by the points' ids: whole of one point, of several the ends that matter."""
        ...

    def require(self, sweep: Sweep) -> None:
        """Check that everything the first of its points will need is there.

        Raises:
            ConfigError: something is not, and what to do about it.
        """
        ...

    def save(self, sweep: Sweep) -> None:
        """Write the sweep down as it is asked, and its points' names with it.

        Raises:
            StillhouseError: a name already means another configuration.
        """
        ...

    def adopt(self, sweep: Sweep, snapshot: Snapshot) -> list[str]:
        """Let drifted points continue under our code, or begin anew; a line for each that begins.

        What a point that begins anew left is kept.
        """
        ...

    def executor(self, sweep: Sweep, snapshot: Snapshot) -> AbstractContextManager[Executor]:
        """Run the sweep's tasks there; `snapshot`: the last look at it."""
        ...

    def forget(self, sweep: Sweep) -> int:
        """Forget how its points failed; of a whole sweep, also the failures that no point shows,
        whose number is returned."""
        ...

    def cancel(self, sweep: Sweep) -> list[str]:
        """Ask running points to checkpoint and stop; a line for each that was asked.

        A loop over the sweep ends, too, where all of it is meant.
        """
        ...


@dataclass(frozen=True)
class Task:
    """An action with all that it takes to carry it out."""

    action: Action
    arguments: tuple[Any, ...]  # of the function that its kind of action stands for
    runs: tuple[RunDir, ...]  # of its points
    suite_spec: EvalSpec | None  # of an evaluation
    log: Path  # what it prints is appended here


@dataclass(frozen=True)
class Finished:
    """How a task ended."""

    action: Action
    exit_code: int
    cause: str | None
    seconds: float


@runtime_checkable
class Executor(Protocol):
    """Runs the tasks of one sweep, and hears how its points stand meanwhile."""

    @property
    def has_fixed_packs(self) -> bool:
        """Whether other drivers may run the same sweep: then all must cut the same packs."""
        ...

    @property
    def connection_error(self) -> str:
        """Why requests get no answer just now; '' where they do."""
        ...

    def snapshot(self) -> Snapshot:
        """How the points and baselines stood when it began."""
        ...

    def look(self, id_: str) -> Observation:
        """The state of one point."""
        ...

    def changed(self) -> Iterable[str]:
        """Points that may have changed without any task of ours having ended."""
        ...

    def baselines(self) -> tuple[Baseline, ...]:
        """The rows that no run trains, and which of them are scored."""
        ...

    def is_cancelled(self) -> bool:
        """Whether somebody asked, since this was made, that the sweep's loop end."""
        ...

    def live(self) -> Sequence[Action]:
        """What is at work, or waits to be."""
        ...

    def waits(self) -> Mapping[Action, str]:
        """Why a live action does not run yet, where no point's state says it."""
        ...

    def start(self, task: Task) -> None:
        """Take a task on; returns at once."""
        ...

    def wait(self, timeout_s: float) -> list[Finished]:
        """The tasks that ended, as soon as one does; none when the time is over."""
        ...

    def stop(self) -> None:
        """Ask every task to save and end."""
        ...

    def kill(self) -> None:
        """End every task now."""
        ...
