"""Show the progress of a sweep: a board that is redrawn in a terminal, or one line per event.

The board is redrawn twice a second and scrolls only for what went wrong. The lines have no control
codes, so that a log is a history.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stillhouse.errors import AGAIN, DONE, ContractError, visible
from stillhouse.rundir import RunDir
from stillhouse.sweep.backend import Finished
from stillhouse.sweep.driver import Picture
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.show import counted, fingerprint
from stillhouse.sweep.state import FAILED, Observation
from stillhouse.text import Pace, duration, say

TAIL_BYTES = 16_384  # of metrics.jsonl: more than a line, less than a page of disk reads
LIVE_ROWS = 12  # running tasks that the board lists; a laptop has fewer
BAR_WIDTH = 60
STEPS_S = 30.0  # between two lines on how far what trains is
LASTING_S = 20.0  # a reason to wait that lasts so long is worth a line
TROUBLE = "trouble"  # kind of reason: requests get no answer
DOING = {"prepare": "prepares", "train": "trains", "eval": "scores"}
DID = {"prepare": "prepared", "train": "trained", "eval": "scored"}


@dataclass(frozen=True)
class Steps:
    """How far a run under way is."""

    done: int
    of: int | None  # None: it did not say yet


def steps_of(run: RunDir) -> Steps:
    """Completed steps, as the last whole line of the run's metrics says, and how many there are."""
    end = None
    with contextlib.suppress(ContractError):  # the loop that looks at states says it
        end = run.status().get("max_steps")
    try:
        with run.metrics_file.open("rb") as file:
            file.seek(max(0, run.metrics_file.stat().st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")
        return Steps(int(json.loads(lines[-2])["step"]) + 1, end)
    except (OSError, IndexError, ValueError, KeyError):
        return Steps(0, end)  # nothing written yet, or being written just now


def about(action: Action, sweep: Sweep) -> str:
    """What an action is about, in a few words."""
    if action.kind == "train":
        return str(sweep.by_id[action.points[0]])
    if action.kind == "prepare":
        return f"the pair of {action.group}"
    points, rows = len(action.points), len(action.baselines)
    words = [str(sweep.by_id[action.points[0]]) if points == 1 else f"{points} points"]
    if rows:
        words.append(f"{rows} baseline{'s' if rows > 1 else ''}")
    return f"{' and '.join(words)} of {action.group}"


def states_now(picture: Picture, has_files: bool = True) -> Counter[str]:
    """Points by state; a live point here is running, and one that only lacks scores is "trained".

    In a cluster a Job that was sent may still wait, and its point's state says so.
    """
    live = {id_ for action in picture.live for id_ in action.points} if has_files else set[str]()

    def said(id_: str, seen: Observation) -> str:
        if id_ in live and seen.state != "done":
            return "running"
        return "trained" if seen.is_trained and seen.state == "waiting" else seen.state

    return Counter(said(id_, seen) for id_, seen in picture.observations.items())


class Lines:
    """One line per event."""

    def __init__(
        self,
        sweep: Sweep,
        write: Callable[[str], object],
        has_files: bool = True,
    ) -> None:
        self.sweep, self.write, self.has_files = sweep, write, has_files
        self.states: Counter[str] = Counter()
        self.since: dict[str, float] = {}  # a reason to wait -> when it was first seen
        self.told: set[str] = set()  # the reasons that were said
        self.paces: dict[str, Pace] = {}  # of the points that train
        self.counted = time.monotonic()  # when somebody was last told how far they are

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def says(self, text: str) -> None:
        self.write(f"{time.strftime('%H:%M:%S')} {text}")

    def started(self, action: Action) -> None:
        self.says(f"{DOING[action.kind]} {about(action, self.sweep)}")

    def finished(self, finished: Finished) -> None:
        self.says(how_it_ended(finished, self.sweep))

    def sees(self, picture: Picture) -> None:
        states = states_now(picture, self.has_files)
        if states["done"] != self.states["done"]:
            self.says(f"{picture.sweep.name}: {counted(states)}")
        self.states = states
        if not self.has_files:
            self._say_why(picture)
        elif time.monotonic() - self.counted >= STEPS_S:
            self.counted = time.monotonic()
            self._say_how_far(picture)

    def _say_how_far(self, picture: Picture) -> None:
        for action in picture.live:
            if action.kind == "train":
                at = steps_of(self.sweep.run(action.points[0]))
                pace = self.paces.setdefault(action.points[0], Pace())
                self.says(f"trains {about(action, self.sweep)}: {pace.told(at.done, at.of)}")

    def _say_why(self, picture: Picture) -> None:
        """Say once why points, or our requests, wait, where the reason lasts."""
        clock = time.monotonic()
        causes: dict[str, list[Observation]] = {}
        for seen in picture.observations.values():
            is_open = seen.state == "waiting" and not seen.is_trained
            if seen.cause and (is_open or seen.state == "running"):  # one that runs oddly says why
                causes.setdefault(f"{seen.state} {fingerprint(seen)}", []).append(seen)
        words: dict[str, str] = {}
        for kind, found in causes.items():
            does = "wait" if found[0].state == "waiting" else "run"
            words[kind] = f"{len(found)} {does}: {found[0].cause}"
        tasks: dict[str, list[Action]] = {}
        for action, why in picture.waits.items():
            kind = f"{action.kind} {fingerprint(Observation('waiting', why))}"
            tasks.setdefault(kind, []).append(action)
        for kind, actions in tasks.items():
            who = f"{len(actions)} Jobs wait"
            if len(actions) == 1:
                who = f"{DOING[actions[0].kind]} {about(actions[0], self.sweep)}, waits"
            words[kind] = f"{who}: {picture.waits[actions[0]]}"
        if picture.connection_error:
            words[TROUBLE] = f"requests are tried again: {picture.connection_error}"
        self.since = {kind: self.since.get(kind, clock) for kind in words}
        self.told &= words.keys()
        for kind in [kind for kind in words if kind not in self.told]:
            if clock - self.since[kind] >= LASTING_S:
                self.told.add(kind)
                self.says(words[kind])


def how_it_ended(finished: Finished, sweep: Sweep) -> str:
    """One line on a task that ended."""
    what = about(finished.action, sweep)
    if finished.exit_code == DONE:
        return f"{DID[finished.action.kind]} {what} in {duration(finished.seconds)}"
    if finished.exit_code == AGAIN:
        return f"stopped {what}: {finished.cause}"
    cause = finished.cause or "no words"
    return f"failed: {finished.action.kind} {what}: {cause} (exit code {finished.exit_code})"


class Board:
    """A few lines that stay where they are: one bar for the sweep, one row per task at work.

    `has_files`: whether the runs write files here, from which their steps are read; else their
    state shows how far they are.
    """

    def __init__(self, sweep: Sweep, console: Console, has_files: bool = True) -> None:
        self.sweep, self.console, self.has_files = sweep, console, has_files
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.began: dict[Action, float] = {}
        self.paces: dict[str, Pace] = {}  # of the points that train
        self.first: tuple[float, float] | None = None  # when training began, and points' worth then

    def __enter__(self) -> Board:
        self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def says(self, text: str) -> None:
        self.console.print(Text(visible(text)))

    def started(self, action: Action) -> None:
        self.began[action] = time.monotonic()

    def finished(self, finished: Finished) -> None:
        self.began.pop(finished.action, None)
        if finished.exit_code not in (DONE, AGAIN):
            self.says(how_it_ended(finished, self.sweep))

    def sees(self, picture: Picture) -> None:
        steps = {
            action.points[0]: steps_of(self.sweep.run(action.points[0]))
            for action in picture.live
            if action.kind == "train" and self.has_files
        }
        worth = sum(_worth(seen, steps.get(id_)) for id_, seen in picture.observations.items())
        clock = time.monotonic()
        if self.first is None and steps:
            self.first = (clock, worth)
        self.live.update(self._drawn(picture, steps, worth, clock), refresh=True)

    def _drawn(
        self, picture: Picture, steps: Mapping[str, Steps], worth: float, clock: float
    ) -> Group:
        total = len(picture.observations)
        states = states_now(picture, self.has_files)
        words = [f"{picture.sweep.name}: {counted(states)}"]
        if picture.connection_error:
            words.append(f"requests are tried again: {picture.connection_error}")
        elif picture.is_stopping:
            words.append("stopping")
        elif self.first and self.first[1] < worth < total:
            rate = (worth - self.first[1]) / (clock - self.first[0])
            left = max(10.0, (total - worth) / rate)
            words.append(f"about {duration(left)} of training left")
        bar = Table.grid()  # a bare bar would not end its line
        bar.add_row(ProgressBar(total, worth, width=min(BAR_WIDTH, self.console.width)))
        rows = Table.grid(padding=(0, 2))
        live = picture.live
        if not self.has_files:  # hundreds, of which some run: those first
            live = sorted(live, key=lambda action: _waits(action, picture) is not None)
        for action in live[:LIVE_ROWS]:
            said = [duration(clock - self.began[action])] if action in self.began else []
            if action.kind == "train" and self.has_files:
                at, pace = steps[action.points[0]], self.paces.setdefault(action.points[0], Pace())
                said.insert(0, pace.told(at.done, at.of, clock))
            elif why := _waits(action, picture):
                said.insert(0, why)
            cells = (f"  {DOING[action.kind]}", about(action, self.sweep), ", ".join(said))
            rows.add_row(*(Text(visible(cell)) for cell in cells))  # no markup in others' words
        more = len(picture.live) - LIVE_ROWS
        tail = [Text(f"  and {more} more")] if more > 0 else []
        return Group(Text(visible(", ".join(words))), bar, rows, *tail)


def _waits(action: Action, picture: Picture) -> str | None:
    """Why a task does not run, as its first point or its Job says; None where it does."""
    if action in picture.waits:
        return picture.waits[action]
    seen = picture.observations.get(action.points[0]) if action.points else None
    return seen.cause if seen is not None and seen.state == "waiting" else None


def _worth(seen: Observation, steps: Steps | None) -> float:
    """How much of a point's training is behind it, in [0, 1]."""
    if seen.is_trained or seen.state in FAILED:
        return 1.0
    at = steps or Steps(seen.step, seen.max_steps)
    return min(1.0, at.done / at.of) if at.of else 0.0


def display(sweep: Sweep, has_files: bool = True) -> Board | Lines:
    """A board where somebody looks at a terminal, lines where stdout is a file.

    `has_files`: whether runs write their steps where we can read them.
    """
    console = Console(highlight=False)
    if sys.stdout.isatty() and not console.is_dumb_terminal:
        return Board(sweep, console, has_files)
    return Lines(sweep, lambda text: say(text, flush=True), has_files)
