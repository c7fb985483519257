"""This file is where a verb meets the place in which points run: this machine, or a cluster.

`Ground` is all that the verbs ask of such a place. `Here` is this machine: its answers are files
below `runs/`. `away.Away` is a cluster: its answers are Jobs and what is written down beside them.
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
    """Where the points of sweeps run and leave their traces."""

    @property
    def name(self) -> str:
        """Where it is, as words in a sentence."""
        ...

    @property
    def parting(self) -> str:
        """What a `run` says when it leaves before the end."""
        ...

    @property
    def again(self) -> str:
        """What starts there what waits, as the beginning of a sentence."""
        ...

    @property
    def has_files(self) -> bool:
        """Whether what runs there writes its steps where we can read them."""
        ...

    def homeward(self, name: str) -> str:
        """What has to be done before a report of this sweep, as the beginning of a sentence."""
        ...

    def trouble(self) -> str:
        """Why nobody there answers what is asked about a running sweep; '' where all is well."""
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

        `minds_code`: what other code than ours began, and is not done, is drifted.
        """
        ...

    def baselines(self, sweep: Sweep) -> tuple[Baseline, ...]:
        """The rows of a sweep that no run trains, and which of them are scored."""
        ...

    def given_up(self, rows: Roster) -> dict[str, str]:
        """What no point tells: the rows and pairs that cannot be had, and why."""
        ...

    def pinned(self, sweep: Sweep, begins: bool = False) -> Sweep:
        """The sweep with open revisions at the commits that it first ran with there.

        `begins`: it is about to run, so what is not known yet is found out.
        """
        ...

    def drifted_rows(self, sweep: Sweep) -> list[str]:
        """Which rows that no run trains have scores that count no more, and why."""
        ...

    def begin_anew(self, rows: Roster, ids: Sequence[str]) -> list[str]:
        """Put aside what these points left, so that they are new; where it is kept, a line each."""
        ...

    def remarks(self, rows: Roster | None) -> list[str]:
        """Whatever else somebody who asks for the status should know; None: of all sweeps."""
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
        """See that all is there that the first of these points will need.

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
        """Let what other code began go on under the code at hand."""
        ...

    def backend(self, sweep: Sweep, rows: Roster) -> AbstractContextManager[Backend]:
        """What carries the sweep's tasks out there, for as long as it is needed."""
        ...

    def forget(self, rows: Roster, is_whole: bool) -> int:
        """Forget how these points failed; if it `is_whole`, also what no point tells: how many."""
        ...

    def cancel(self, rows: Roster, is_whole: bool) -> list[str]:
        """Ask what runs to save and end; what was asked. `is_whole`: a loop over it ends, too."""
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
