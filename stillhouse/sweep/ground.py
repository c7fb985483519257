"""Define what verbs need of the place where points run, and implement it for this machine.

`Ground` is the protocol. `Here` implements it for this machine, from files below `runs/`.
`away.Away` implements it for a cluster, from Jobs and from the ConfigMaps that outlive them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, runtime_checkable

from stillhouse.at_hand import require_torch
from stillhouse.errors import ContractError
from stillhouse.rundir import RunDir
from stillhouse.sweep import commits, cost, listing, logs, roster, spent
from stillhouse.sweep.drive import Backend, adopt_code
from stillhouse.sweep.endings import forget_failures
from stillhouse.sweep.grid import Sweep
from stillhouse.sweep.plan import Baseline, Observation, baselines_of, groups_of, observe
from stillhouse.sweep.roster import Roster
from stillhouse.words import say

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

    def spent(self, rows: Roster) -> spent.Spent:
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


class Here:
    """This machine, and the runs below one directory of it."""

    name = "here"
    parting = "stopped before the end; the same command goes on from here"
    again = "`stillhouse run`"
    has_files = True

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def homeward(self, name: str) -> str:
        return ""

    def trouble(self) -> str:
        return ""

    def names(self) -> list[str]:
        return roster.names(self.runs)

    def find(self, word: str) -> Roster:
        return roster.find(word, self.runs)

    def observe(self, rows: Roster, minds_code: bool = False) -> dict[str, Observation]:
        return observe(rows)  # what lies on disk says whose code it is, to whoever looks

    def baselines(self, sweep: Sweep) -> tuple[Baseline, ...]:
        return baselines_of(sweep, groups_of(sweep))

    def given_up(self, rows: Roster) -> dict[str, str]:
        found: dict[str, str] = {}
        for directory in rows.baselines:
            try:
                status = RunDir(directory).status()
            except ContractError as error:
                found[f"baseline {directory.name}"] = str(error)
                continue
            if status.get("eval_gave_up"):
                found[f"baseline {directory.name}"] = status.get("eval_cause") or "no cause told"
        return found

    def pinned(self, sweep: Sweep, begins: bool = False) -> Sweep:
        # What lies here is what a run would take, so a plan says what it would say.
        return commits.pinned(sweep, roster.recorded_commits(self.runs, sweep.name), commits.here)

    def drifted_rows(self, sweep: Sweep) -> list[str]:
        return [
            f"baseline {one.directory.name}: {'; '.join(one.rests_on_other)}; to be scored anew"
            for one in self.baselines(sweep)
            if one.rests_on_other
        ]

    def begin_anew(self, rows: Roster, ids: Sequence[str]) -> list[str]:
        said: list[str] = []
        for id_ in ids:
            run = rows.run(id_)
            with run.lock():
                said.append(f"{rows.by_id[id_]} begins anew; before: {run.set_aside()}")
        return said

    def remarks(self, rows: Roster | None) -> list[str]:
        return []

    def costs(self, sweep: Sweep, observations: Observations) -> dict[str, cost.Cost]:
        left = listing.still_to_train(sweep, observations)
        return cost.estimate(left, self.runs) if left else {}

    def forecast(self, sweep: Sweep, costs: Mapping[str, cost.Cost]) -> list[str]:
        return listing.estimate(sweep, costs)

    def spent(self, rows: Roster) -> spent.Spent:
        return spent.spent(rows, {})

    def show_logs(self, rows: Roster, follows: bool) -> bool:
        return logs.show(rows, follows)

    def log_texts(self, rows: Roster) -> dict[str, str]:
        return logs.texts(rows)

    def require(self, sweep: Sweep, rows: Roster) -> None:
        require_torch()

    def write(self, sweep: Sweep) -> None:
        roster.write(sweep)

    def adopt_code(self, rows: Roster, observations: Observations) -> None:
        adopt_code(rows, observations)

    def backend(self, sweep: Sweep, rows: Roster) -> AbstractContextManager[Backend]:
        from stillhouse.sweep.backends.local import LocalBackend

        return nullcontext(LocalBackend(sweep, rows))

    def forget(self, rows: Roster, is_whole: bool) -> int:
        for row in rows.rows:
            forget_failures(rows.run(row.id))
        if not is_whole:
            return 0
        given_up = [d for d in rows.baselines if _has_given_up(RunDir(d))]
        for directory in given_up:
            forget_failures(RunDir(directory))
        return len(given_up)

    def cancel(self, rows: Roster, is_whole: bool) -> list[str]:
        if is_whole:
            roster.cancel(self.runs, rows.name)  # before the points, so that nothing follows them
        observations = observe(rows)
        asked = [row for row in rows.rows if _ask_to_stop(row, observations[row.id])]
        return [f"asked to save and stop: {row}" for row in asked]


def _has_given_up(run: RunDir) -> bool:
    with contextlib.suppress(ContractError):  # `status` names it, and nobody can take it back
        return bool(run.status().get("eval_gave_up"))
    return False


def _ask_to_stop(row: roster.Row, seen: Observation) -> bool:
    if seen.state != "running" or seen.pid is None:
        return False
    try:
        os.kill(seen.pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError) as error:
        say(f"  cannot stop {row}, process {seen.pid}: {error}", file=sys.stderr)
        return False
    return True
