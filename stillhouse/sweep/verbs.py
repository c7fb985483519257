"""This file is where the launcher's verbs do it: plan, run, status, logs, retry, cancel.

Each takes a `Call` and returns an exit code: 0 all asked for is so, 1 some points failed or
stopped, 85 interrupted. Mistakes are StillhouseErrors and become 42 at the door (`cli`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stillhouse.errors import AGAIN, DONE, ConfigError, nearest
from stillhouse.rundir import RunDir
from stillhouse.sweep import listing, roster
from stillhouse.sweep.drive import SOME_FAILED, Backend, Drive, adopt_code
from stillhouse.sweep.endings import forget_failures
from stillhouse.sweep.grid import Sweep, load_sweep
from stillhouse.sweep.logs import show
from stillhouse.sweep.plan import Observation, baselines_of, groups_of, observe
from stillhouse.sweep.roster import Roster, roster_of

DEFAULT_RUNS = Path("runs")
BACKENDS = ("local", "cluster")

Observations = Mapping[str, Observation]


@dataclass(frozen=True)
class Call:
    """What was typed behind a verb."""

    target: str | None = None
    words: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    backend: str = "local"
    runs: Path = DEFAULT_RUNS
    is_json: bool = False
    is_new_code: bool = False
    follows: bool = False
    shows_all: bool = False

    def __post_init__(self) -> None:
        if self.backend == "cluster":
            raise ConfigError("--backend cluster: not in this version; use --backend local")
        if self.backend not in BACKENDS:
            raise ConfigError(
                f"--backend {self.backend}: there is local.{nearest(self.backend, BACKENDS)}"
            )

    @property
    def is_file(self) -> bool:
        """Whether a sweep file, or a grid that was typed, is meant; else a name."""
        target = self.target
        return (target is None and bool(self.words)) or (
            target is not None and (target.endswith((".yaml", ".yml")) or Path(target).is_file())
        )

    def sweep(self) -> Sweep:
        return load_sweep(self.target, list(self.words), self.runs)

    def command(self, verb: str, target: str) -> str:
        """A command to tell the reader about, with the options that find these runs."""
        runs = "" if self.runs == DEFAULT_RUNS else f" --runs {self.runs}"
        return f"stillhouse {verb} {target}{runs}"


def find(call: Call) -> Roster:
    """The points that a verb which looks or mends is about."""
    if call.is_file:
        found = roster_of(call.sweep())
    elif call.target is None:
        known = ", ".join(roster.names(call.runs)) or "none yet"
        raise ConfigError(f"which sweep? A file, a sweep ({known}), a run's name or id")
    elif call.words:
        raise ConfigError(
            f"{' '.join(call.words)}: {call.target} names what was asked already; words change a"
            " sweep file, or are a grid by themselves"
        )
    else:
        found = roster.find(call.target, call.runs)
    return roster.narrowed(found, call.points)


def plan(call: Call) -> int:
    """Say how many points are in which state, by axis, and what the rest would cost."""
    sweep = call.sweep()
    rows = roster.narrowed(roster_of(sweep), call.points)
    observations = observe(rows)
    if call.is_json:
        return _print_json(rows, observations)
    print(listing.headline(rows, observations))
    if sweep.question:
        print(f"  {sweep.question}")
    costs = listing.costs_to_go(_only(sweep, rows), observations)
    _print(listing.by_axis(rows, observations, costs))
    _print(listing.estimate(sweep, costs))
    _print(listing.failures(rows, observations))
    drifted = _drifted(observations)
    if drifted:
        print(f"{_of_other_code(drifted)}; run them with --code=new")
    return DONE


def run(call: Call, backend_for: Callable[[Sweep, Roster], Backend] | None = None) -> int:
    """Train and score what is not done; `backend_for` makes what it runs on."""
    if not call.is_json:
        return _run(call, backend_for or _local)
    with contextlib.redirect_stdout(sys.stderr):  # one object is all that goes to stdout
        code = _run(call, backend_for or _local)
    rows = roster.narrowed(roster_of(call.sweep()), call.points)
    _print_json(rows, observe(rows))
    return code


def _run(call: Call, backend_for: Callable[[Sweep, Roster], Backend]) -> int:
    sweep = call.sweep()
    rows = roster.narrowed(roster_of(sweep), call.points)
    observations = observe(rows)
    drifted = _drifted(observations)
    if drifted and not call.is_new_code:
        print(
            f"{_of_other_code(drifted)}: nothing was started. The same command with --code=new goes"
            " on with them under the code at hand, and the report will say so"
        )
        return SOME_FAILED
    roster.write(sweep)
    if drifted:
        adopt_code(rows, observations)
        observations = observe(rows)
    if _is_nothing_left(sweep, observations):
        print("nothing left to do")
        return _summary(call, rows, observations, _given_up(rows))
    print(listing.headline(rows, observations))
    _print(listing.estimate(sweep, listing.costs_to_go(_only(sweep, rows), observations)))
    from stillhouse.sweep.progress import watcher  # rich, which looking does not need

    backend, started = backend_for(sweep, rows), time.monotonic()
    with watcher(rows) as watch:
        drive = Drive(sweep, backend, watch, rows)
        code = drive.run()
    print(f"after {listing.duration(time.monotonic() - started)}:")
    _summary(call, rows, drive.observations, drive.given_up())
    if code == AGAIN:
        print("stopped before the end; the same command goes on from here")
    return code


def _local(sweep: Sweep, rows: Roster) -> Backend:
    from stillhouse.sweep.backends.local import LocalBackend

    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "this environment only launches and reads: training here needs torch and its family"
            " (`uv sync`, or `pip install 'stillhouse[train,eval]'`)"
        )
    return LocalBackend(sweep, rows)


def _is_nothing_left(sweep: Sweep, observations: Observations) -> bool:
    states = {seen.state for seen in observations.values()}
    rows_left = any(not (b.is_scored or b.cause) for b in baselines_of(sweep, groups_of(sweep)))
    return not states & {"new", "waiting", "running"} and not (rows_left and "done" in states)


def _summary(
    call: Call, rows: Roster, observations: Observations, given_up: Mapping[str, str]
) -> int:
    """Say how a sweep stands and what to do about it; 1 where something failed."""
    has_failed = any(seen.state in listing.FAILED for seen in observations.values())
    print(listing.headline(rows, observations))
    _print(listing.failures(rows, observations))
    _print([f"failed: {what}: {cause}" for what, cause in given_up.items()])
    if has_failed:
        print(
            f"`{call.command('logs', rows.name)} --point ID` shows what a point printed;"
            f" `{call.command('retry', rows.name)}`, then run, tries again"
        )
    if any(seen.is_trained for seen in observations.values()):
        print(f"`{call.command('report', rows.name)}` shows the results")
    return SOME_FAILED if has_failed or given_up else DONE


def status(call: Call) -> int:
    """Say how a sweep, or without a target every sweep, stands."""
    if call.target is None and not call.words and not call.is_json:
        return _overview(call)
    rows = find(call)
    observations = observe(rows)
    if call.is_json:
        _print_json(rows, observations)
    else:
        print(listing.headline(rows, observations))
        if call.shows_all or len(rows.rows) == 1:
            _print(listing.every(rows, observations))
        else:
            _print(listing.unfinished(rows, observations, listing.SHOWN))
        _print([f"  failed   {what}: {cause}" for what, cause in _given_up(rows).items()])
    return _code(rows, observations)


def _overview(call: Call) -> int:
    names = roster.names(call.runs)
    if not names:
        print(f"no sweep was started below {call.runs}/ yet; `stillhouse run SWEEP.yaml` does")
    codes = [DONE]
    for name in names:
        rows = roster.find(name, call.runs)
        observations = observe(rows)
        print(listing.headline(rows, observations))
        codes.append(_code(rows, observations))
    return max(codes)


def logs(call: Call) -> int:
    """Show what points printed: one whole log, or the end of each that is at work or failed."""
    if not show(find(call), call.follows):
        print("nothing was printed yet", file=sys.stderr)
    return DONE


def retry(call: Call) -> int:
    """Let failed points start again, from their checkpoints; the next `run` does."""
    rows = find(call)
    observations = observe(rows)
    failed = [row for row in rows.rows if observations[row.id].state == "failed"]
    for row in failed:
        forget_failures(rows.run(row.id))
    given_up = [d for d in rows.baselines if RunDir(d).status().get("eval_gave_up")]
    for directory in given_up:
        forget_failures(RunDir(directory))
    if call.is_json:
        return _print_json(rows, observe(rows))
    if not failed and not given_up:
        print(f"{rows.name}: nothing to retry: no point of it failed")
        return DONE
    _print([f"  waiting  {row}" for row in failed])
    print(f"{len(failed) + len(given_up)} wait for the next `stillhouse run`")
    return DONE


def cancel(call: Call) -> int:
    """Ask what runs to save and end, and a `run` of the sweep that is under way to end with it."""
    rows = find(call)
    if not call.points and (call.is_file or call.target in roster.names(call.runs)):
        roster.cancel(call.runs, rows.name)  # before the points, so that nothing follows them
    observations = observe(rows)
    asked = [row for row in rows.rows if _ask_to_stop(row, observations[row.id])]
    if call.is_json:
        return _print_json(rows, observations)
    _print([f"  asked to save and stop: {row}" for row in asked])
    if not asked:
        print(f"{rows.name}: no point of it is running here")
    if any(seen.state != "done" for seen in observations.values()):
        print("`stillhouse run` goes on from there")
    return DONE


def _ask_to_stop(row: roster.Row, seen: Observation) -> bool:
    if seen.state != "running" or seen.pid is None:
        return False
    try:
        os.kill(seen.pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError) as error:
        print(f"  cannot stop {row}, process {seen.pid}: {error}", file=sys.stderr)
        return False
    return True


# ------------------------------------------------------------------------------------ helpers


def _code(rows: Roster, observations: Observations) -> int:
    has_failed = any(seen.state in listing.FAILED for seen in observations.values())
    return SOME_FAILED if has_failed or _given_up(rows) else DONE


def _given_up(rows: Roster) -> dict[str, str]:
    """The baselines that could not be scored, and why."""
    statuses = {directory.name: RunDir(directory).status() for directory in rows.baselines}
    return {
        f"baseline {name}": status["eval_cause"]
        for name, status in statuses.items()
        if status.get("eval_gave_up")
    }


def _drifted(observations: Observations) -> list[str]:
    return [id_ for id_, seen in observations.items() if seen.state == "drifted"]


def _of_other_code(ids: Sequence[str]) -> str:
    who = ", ".join(id_[:6] for id_ in ids[:3]) + (" …" if len(ids) > 3 else "")
    return f"{len(ids)} unfinished point(s) were begun by other code ({who})"


def _only(sweep: Sweep, rows: Roster) -> Sweep:
    """The sweep, narrowed to these points."""
    points = tuple(point for point in sweep.points if point.id in rows.by_id)
    return dataclasses.replace(sweep, points=points)


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)


def _print_json(rows: Roster, observations: Observations) -> int:
    print(json.dumps(listing.as_json(rows, observations)))
    return DONE
