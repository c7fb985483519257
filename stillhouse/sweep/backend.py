"""Define what verbs need of the place where points run.

`Ground` is the protocol. `local.backend.Here` implements it for this machine, from the files below
`runs/`; `cluster.backend.Away` for a cluster, from Jobs and from the ConfigMaps that outlive them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from stillhouse.sweep import cost, spending
from stillhouse.sweep.driver import Backend
from stillhouse.sweep.grid import Sweep
from stillhouse.sweep.plan import Baseline, Observation
from stillhouse.sweep.registry import Roster

Observations = Mapping[str, Observation]


@runtime_checkable
class Ground(Protocol):
    """The place where points run and leave their state: this machine or a cluster."""

    @property
    def name(self) -> str:
        """Where it is, as words in a sentence."""
        ...

    @property
    def parting(self) -> str:
        """The message of a `run` that leaves before the end."""
        ...

    @property
    def again(self) -> str:
        """The command that starts waiting points there, as the beginning of a sentence."""
        ...

    @property
    def has_files(self) -> bool:
        """Whether runs there write their steps to files that this machine can read."""
        ...

    def homeward(self, name: str) -> str:
        """What to do before a report of this sweep (collect), as the beginning of a sentence."""
        ...

    def trouble(self) -> str:
        """Why requests about a running sweep get no answer; '' where they do."""
        ...

    # ------------------------------------------------------------------- looking

    def names(self) -> list[str]:
        """The sweeps that were ever started there."""
        ...

    def find(self, word: str) -> Roster:
        """What a word means: a sweep's name, a run's NAME, the first digits of an id.

        Raises:
            ConfigError: it means nothing there, or more than one run.
        """
        ...

    def observe(self, rows: Roster, minds_code: bool = False) -> dict[str, Observation]:
        """The state of every point, by its id.

        `minds_code`: a point that other code than ours began, and that is not done, is drifted.
        """
        ...

    def baselines(self, sweep: Sweep) -> tuple[Baseline, ...]:
        """The rows of a sweep that no run trains, and which of them are scored."""
        ...

    def given_up(self, rows: Roster) -> dict[str, str]:
        """Failures that no point shows, of preparing pairs and scoring baselines, with causes."""
        ...

    def pinned(self, sweep: Sweep, begins: bool = False) -> Sweep:
        """The sweep with open revisions at the commits that it first ran with there.

        `begins`: it is about to run, so what is not known yet is found out.
        """
        ...

    def drifted_rows(self, sweep: Sweep) -> list[str]:
        """Which rows that no run trains have scores that are no longer valid, and why."""
        ...

    def begin_anew(self, rows: Roster, ids: Sequence[str]) -> list[str]:
        """Put aside what these points left, so that they are new; where it is kept, a line each."""
        ...

    def remarks(self, rows: Roster | None) -> list[str]:
        """Further lines for the status of these points; None: of all sweeps."""
        ...

    def costs(self, sweep: Sweep, observations: Observations) -> dict[str, cost.Cost]:
        """What each point that is still to be trained would take, by its id."""
        ...

    def forecast(self, sweep: Sweep, costs: Mapping[str, cost.Cost]) -> list[str]:
        """Time and price of what is still to be trained, in lines."""
        ...

    def spent(self, rows: Roster) -> spending.Spent:
        """What these points cost so far, and on what it was spent."""
        ...

    def show_logs(self, rows: Roster, follows: bool) -> bool:
        """Print what points printed; whether there was anything."""
        ...

    def log_texts(self, rows: Roster) -> dict[str, str]:
        """The same by the points' ids: whole of one point, of several the ends that matter."""
        ...

    # --------------------------------------------------------------------- doing

    def require(self, sweep: Sweep, rows: Roster) -> None:
        """Check that everything the first of these points will need is there.

        Raises:
            ConfigError: something is not, and what to do about it.
        """
        ...

    def write(self, sweep: Sweep) -> None:
        """Write the sweep down as it is asked, and its points' names with it.

        Raises:
            StillhouseError: a name already means another configuration.
        """
        ...

    def adopt_code(self, rows: Roster, observations: Observations) -> None:
        """Let points that other code began continue under the present code."""
        ...

    def backend(self, sweep: Sweep, rows: Roster) -> AbstractContextManager[Backend]:
        """The backend that runs the sweep's tasks there, as a context manager."""
        ...

    def forget(self, rows: Roster, is_whole: bool) -> int:
        """Forget how these points failed.

        `is_whole`: forget those of `given_up`, too; the number of these is returned.
        """
        ...

    def cancel(self, rows: Roster, is_whole: bool) -> list[str]:
        """Ask running points to checkpoint and stop; a line for each that was asked.

        `is_whole`: a loop over the sweep ends, too.
        """
        ...
