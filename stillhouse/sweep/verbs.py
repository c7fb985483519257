"""Implement the verbs: plan, run, status, logs, retry, cancel, collect, doctor.

Each takes a `Call` and returns an exit code: 0 success, 1 some points failed or stopped, 42 a file
is unreadable or something is missing, 85 interrupted. Mistakes are StillhouseErrors, which `cli`
turns into exit code 42. A verb reaches the points through its `Ground`, which hides whether they
are on this machine or in a cluster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext

from stillhouse import compatibility, rollout_memory
from stillhouse.errors import AGAIN, DONE, MISTAKE, ConfigError, ContractError
from stillhouse.rundir import Json
from stillhouse.sweep import commits, registry, show
from stillhouse.sweep.backend import Ground
from stillhouse.sweep.call import Call
from stillhouse.sweep.cluster.push_plan import push
from stillhouse.sweep.driver import SOME_FAILED, Backend, Driver
from stillhouse.sweep.filters import Condition, check_cause, is_caused_by
from stillhouse.sweep.grid import Point, Sweep
from stillhouse.sweep.offline_plan import Unasked
from stillhouse.sweep.plan import STATES, Observation
from stillhouse.sweep.preflight_lines import verdict_lines, verdicts
from stillhouse.sweep.registry import Roster, roster_of
from stillhouse.sweep.site import CLUSTER
from stillhouse.text import duration, say

__all__ = [
    "Call",
    "cancel",
    "collect",
    "doctor",
    "logs",
    "plan",
    "push",
    "retry",
    "run",
    "status",
]

Observations = Mapping[str, Observation]
WAYS_OUT = (
    "restore what changed, or run the same command with --sources=new: these points begin anew, and"
    " what they left is kept beside them, in runs/.before"
)


def plan(call: Call) -> int:
    """Print the states of the points by axis, how they train and what that would cost."""
    sweep = call.asked()
    ground = call.view
    sweep = ground.pinned(sweep)
    rows = registry.narrowed(roster_of(sweep), call.points)
    observations = ground.observe(rows, minds_code=True)
    points = _only(sweep, rows).points
    _check_fit(sweep, points, observations)
    if call.is_json:
        more = {
            "methods": show.methods(points),
            "preflight": verdicts(_only(sweep, rows), call.runs),
            "unasked": ground.why if isinstance(ground, Unasked) else None,
        }
        return _print_json(show.as_json(rows, observations) | more)
    _print(ground.remarks(None) if isinstance(ground, Unasked) else ())
    say(show.headline(rows, observations))
    if sweep.question:
        say(f"  {sweep.question}")
    costs = ground.costs(_only(sweep, rows), observations)
    _print(show.by_axis(rows, observations, costs))
    _print(show.method_lines(points))
    _print(rollout_memory.lines(point.spec for point in points))
    _print(verdict_lines(verdicts(_only(sweep, rows), call.runs)))
    _print(ground.forecast(_only(sweep, rows), costs))
    _print(show.failures(rows, observations))
    _print(show.drifted(rows, observations))
    _print([*ground.drifted_rows(sweep), *commits.remarks(sweep)])
    if any(seen.must_begin_anew for seen in observations.values()):
        say(f"run: {WAYS_OUT}")
    drifted = _drifted(observations)
    if drifted:
        say(f"{_of_other_code(drifted)}; run them with --code=new")
    return DONE


def _dry_run(call: Call) -> int:
    """Print every Job that `run` would send to a cluster, without any request to one."""
    if call.backend != CLUSTER or call.is_detached:
        raise ConfigError(
            "stillhouse run: --dry-run prints the Jobs of a sweep: with --backend cluster, without"
            " --detach. `stillhouse plan` shows what is left to do on this machine"
        )
    from stillhouse.sweep.cluster.manifest import image_problem
    from stillhouse.sweep.cluster.render import manifests

    sweep = call.asked()
    recorded = registry.recorded_commits(call.runs, sweep.name)
    sweep = commits.pinned(sweep, recorded, commits.unasked)
    rows = registry.narrowed(roster_of(sweep), call.points)
    problem = image_problem(sweep.site)
    if problem:
        say(f"not to be sent as it is: {problem}", file=sys.stderr)
    for name in commits.unknown(sweep):
        say(f"{name}: `run` asks the hub for its commit, and tells every Job", file=sys.stderr)
    if call.is_json:
        said = show.as_json(rows, {row.id: Observation("new") for row in rows.rows})
        texts = [manifest.decode() for manifest in manifests(sweep, rows)]
        return _print_json(said | {"manifests": texts})
    for place, manifest in enumerate(manifests(sweep, rows)):
        sys.stdout.write(("---\n" if place else "") + manifest.decode())
    return DONE


def run(call: Call, backend_for: Callable[[Sweep, Roster], Backend] | None = None) -> int:
    """Train and score what is not done; `backend_for` makes what it runs on."""
    if call.is_dry_run:
        return _dry_run(call)
    if not call.is_json:
        return _run(call, backend_for)
    with contextlib.redirect_stdout(sys.stderr):  # one object is all that goes to stdout
        code = _run(call, backend_for)
    rows = registry.narrowed(roster_of(call.ground.pinned(call.sweep())), call.points)
    _print_json(show.as_json(rows, call.ground.observe(rows)))
    return code


def _run(call: Call, backend_for: Callable[[Sweep, Roster], Backend] | None) -> int:
    sweep = call.asked()
    ground = call.ground
    sweep = ground.pinned(sweep, begins=True)
    rows = registry.narrowed(roster_of(sweep), call.points)
    observations = ground.observe(rows, minds_code=True)
    anew = [id_ for id_, seen in observations.items() if seen.must_begin_anew]
    if anew and sweep.points[0].spec.place.sources != "new":
        return _refuse(rows, observations)
    drifted = _drifted(observations)
    if drifted and not call.is_new_code:
        say(
            f"{_of_other_code(drifted)}: nothing was started. The same command with --code=new goes"
            " on with them under the code at hand, and the report will say so"
        )
        return SOME_FAILED
    _check_fit(sweep, _only(sweep, rows).points, observations)
    is_idle = _is_nothing_left(ground, sweep, observations)
    if not is_idle and call.is_detached:
        call.away.require(sweep, rows, is_detached=True)
    elif not is_idle:
        ground.require(sweep, rows)
    ground.write(sweep)
    _print([*ground.drifted_rows(sweep), *commits.remarks(sweep)])
    _print(
        f"{name}: nobody here knows its commit; each point uses what its pod finds, and records it"
        for name in commits.unknown(sweep)
        if call.backend == CLUSTER
    )
    if drifted or anew:
        ground.adopt_code(rows, observations)
        _print(ground.begin_anew(rows, anew) if anew else [])
        observations = ground.observe(rows, minds_code=True)
    if is_idle:
        say("nothing left to do")
        return _summary(call, rows, observations, ground.given_up(rows))
    say(show.headline(rows, observations))
    only = _only(sweep, rows)
    _print(ground.forecast(only, ground.costs(only, observations)))
    if call.is_detached:
        _print(call.away.detach(sweep, _options(call)))
        return DONE
    from stillhouse.sweep.progress import display  # rich, which looking does not need

    started = time.monotonic()
    at_work = nullcontext(backend_for(sweep, rows)) if backend_for else ground.backend(sweep, rows)
    with at_work as backend, display(rows, ground.has_files, ground.trouble) as watch:
        drive = Driver(sweep, backend, watch, rows)
        code = drive.run()
    say(f"after {duration(time.monotonic() - started)}:")
    _summary(call, rows, drive.observations, drive.given_up())
    if code == AGAIN:
        say(ground.parting)
    return code


def _refuse(rows: Roster, observations: Observations) -> int:
    """Print which points depend on something that changed, and both ways out; 42."""
    lines = [*show.drifted(rows, observations), f"nothing was started: {WAYS_OUT}"]
    say("ContractError: " + "\n".join(lines), file=sys.stderr)
    return MISTAKE


def _options(call: Call) -> list[str]:
    """What was typed besides target and words, for whoever repeats the command."""
    points = [f"--point={point}" for point in call.points]
    return points + (["--code=new"] if call.is_new_code else [])


def _is_nothing_left(ground: Ground, sweep: Sweep, observations: Observations) -> bool:
    states = {seen.state for seen in observations.values()}
    rows_left = any(not (b.is_scored or b.cause) for b in ground.baselines(sweep))
    is_open = states & {"new", "waiting", "running", "drifted"}
    return not is_open and not (rows_left and "done" in states)


def _summary(
    call: Call, rows: Roster, observations: Observations, given_up: Mapping[str, str]
) -> int:
    """Say how a sweep stands and what to do about it; 1 where something failed."""
    has_failed = any(seen.state in show.FAILED for seen in observations.values())
    say(show.headline(rows, observations))
    _print(show.failures(rows, observations))
    _print([f"failed: {what}: {cause}" for what, cause in given_up.items()])
    if has_failed:
        say(
            f"`{call.command('logs', rows.name)} --point ID` shows what a point printed;"
            f" `{call.command('retry', rows.name)}`, then run, tries again"
        )
    if any(seen.is_trained for seen in observations.values()):
        say(f"{call.ground.homeward(rows.name)}`stillhouse report {rows.name}` shows the results")
    return _code(observations, given_up)


def status(call: Call) -> int:
    """Print the state of a sweep, or without a target of every sweep."""
    if call.is_about_all:
        return _overview(call)
    ground, rows = call.ground, call.find()
    observations = ground.observe(rows)
    given_up = ground.given_up(rows)
    code = _code(observations, given_up)
    if call.is_json:
        said = show.as_json(rows, observations)
        cost = {"cost": ground.spent(rows).as_json()} if call.shows_cost else {}
        _print_json(said | cost | {"remarks": [line.strip() for line in ground.remarks(rows)]})
        return code
    say(show.headline(rows, observations))
    if call.shows_all or len(rows.rows) == 1:
        _print(show.every(rows, observations))
    else:
        if len(rows.rows) > show.MANY:
            _print(show.by_axis(rows, observations, {}, show.FEW))
        _print(show.reasons(rows, observations))
    _print([f"  failed   {what}: {cause}" for what, cause in given_up.items()])
    _print(ground.remarks(rows))
    if call.shows_cost:
        _print(ground.spent(rows).lines())
    return code


def _overview(call: Call) -> int:
    ground = call.ground
    names = ground.names()
    codes, said, unreadable = [DONE], list[Json](), dict[str, str]()
    for name in names:
        try:
            rows = ground.find(name)
        except ContractError as error:  # one bad record is one line
            unreadable[name] = str(error)
            continue
        observations = ground.observe(rows)
        said.append(show.as_json(rows, observations) | {"points": []})
        codes.append(_code(observations, ground.given_up(rows)))
        if not call.is_json:
            say(show.headline(rows, observations))
            _print(_unreadable_lines(rows, observations))
    codes += [MISTAKE] * bool(unreadable)
    if not call.is_json:
        _print([f"{name}: unreadable: {why}" for name, why in unreadable.items()])
    if call.is_json:
        totals = {state: sum(one["totals"][state] for one in said) for state in STATES}
        whole: Json = {"sweep": None, "totals": totals, "points": [], "sweeps": said}
        _print_json(whole | {"unreadable": unreadable, "remarks": ground.remarks(None)})
    elif not names:
        say(f"no sweep was started {ground.name} yet; `stillhouse run SWEEP.yaml` does")
    if not call.is_json:
        _print(ground.remarks(None))
    return max(codes)


def logs(call: Call) -> int:
    """Show logs: one point's whole log, or the end of each point that runs or failed."""
    ground, rows = call.ground, call.find()
    if call.is_json:
        with contextlib.redirect_stdout(sys.stderr):
            texts = ground.log_texts(rows)
        return _print_json(show.as_json(rows, ground.observe(rows)) | {"logs": texts})
    if not ground.show_logs(rows, call.follows):
        is_done = all(seen.state == "done" for seen in ground.observe(rows).values())
        one = "all is done; with --point P you see what one point printed"
        say(one if is_done else "nothing was printed yet", file=sys.stderr)
    return DONE


def retry(call: Call) -> int:
    """Let failed points start again, from their checkpoints; the next `run` does."""
    condition = Condition(call.where) if call.where is not None else None
    cause = check_cause(call.cause) if call.cause is not None else None
    ground, rows = call.ground, call.find()
    observations = ground.observe(rows)
    failed = [row for row in rows.rows if observations[row.id].state == "failed"]
    if condition is not None:
        failed = [row for row in failed if condition.holds(call.knobs(row))]
    if cause is not None:
        failed = [row for row in failed if is_caused_by(observations[row.id], cause)]
    is_whole = condition is None and cause is None and not call.points
    given_up = ground.forget(dataclasses.replace(rows, rows=tuple(failed)), is_whole)
    if call.is_json:
        return _print_json(show.as_json(rows, ground.observe(rows)))
    if not failed and not given_up:
        which = "" if condition is None and cause is None else " that is meant"
        say(f"{rows.name}: nothing to retry: no point of it{which} failed")
        return DONE
    shown = [f"  waiting  {row}" for row in failed[: show.SHOWN]]
    more = len(failed) - show.SHOWN
    _print([*shown, *([f"  and {more} more"] if more > 0 else [])])
    say(f"{len(failed) + given_up} wait: {ground.again} starts them")
    return DONE


def cancel(call: Call) -> int:
    """Ask running points to checkpoint and stop, and a `run` that is under way to end."""
    ground, rows = call.ground, call.find()
    is_whole = not call.points and (call.is_file or call.target == rows.name)
    asked = ground.cancel(rows, is_whole)
    observations = ground.observe(rows)
    if call.is_json:
        return _print_json(show.as_json(rows, observations))
    _print([f"  {line}" for line in asked])
    if not asked:
        say(f"{rows.name}: no point of it is running {ground.name}")
    if any(seen.state != "done" for seen in observations.values()):
        say(f"{ground.again} goes on from there")
    return DONE


def collect(call: Call) -> int:
    """Fetch the results of a sweep from a cluster's volume."""
    away, rows = call.away, call.find()
    tell: Callable[[str], None] = lambda text: say(text, file=sys.stderr, flush=True)  # noqa: E731
    collected = away.collect(rows, call.adapters, tell)
    observations = away.observe(rows)
    trained = {rows.by_id[id_].directory for id_, seen in observations.items() if seen.is_trained}
    is_short = bool(collected.kept) or bool(trained & {*collected.missing})
    if call.is_json:
        said = show.as_json(rows, observations)
        _print_json(said | {"collected": collected.as_json()})
    else:
        _print(collected.lines(rows))
        say(f"`stillhouse report {rows.name}` shows the results")
    return SOME_FAILED if is_short else DONE


def doctor(call: Call) -> int:
    """Check a namespace against all that a sweep needs; 42 where something is missing."""
    found = call.away.examine()
    is_fine = all(finding.ok for finding in found)
    if call.is_json:
        said = [dataclasses.asdict(finding) for finding in found]
        _print_json({"is_fine": is_fine, "findings": said})
    else:
        _print([f"{'ok     ' if finding.ok else 'missing'}  {finding}" for finding in found])
    return DONE if is_fine else MISTAKE


# ------------------------------------------------------------------------------------ helpers


def _unreadable_lines(rows: Roster, observations: Observations) -> list[str]:
    odd = [row for row in rows.rows if observations[row.id].state == show.UNREADABLE]
    return show.failures(dataclasses.replace(rows, rows=tuple(odd)), observations)


def _code(observations: Observations, given_up: Mapping[str, str]) -> int:
    """42 where a person has to repair a file, 1 where something failed, 0 otherwise."""
    if any(seen.state == show.UNREADABLE for seen in observations.values()):
        return MISTAKE
    has_failed = any(seen.state in show.FAILED for seen in observations.values())
    return SOME_FAILED if has_failed or given_up else DONE


def _drifted(observations: Observations) -> list[str]:
    """The points that other code began, and ours would have to go on with."""
    seen_by_id = observations.items()
    return [i for i, seen in seen_by_id if seen.state == "drifted" and not seen.must_begin_anew]


def _of_other_code(ids: Sequence[str]) -> str:
    who = ", ".join(id_[:6] for id_ in ids[:3]) + (" …" if len(ids) > 3 else "")
    return f"{len(ids)} unfinished point(s) were begun by other code ({who})"


def _only(sweep: Sweep, rows: Roster) -> Sweep:
    """The sweep, narrowed to these points."""
    points = tuple(point for point in sweep.points if point.id in rows.by_id)
    return dataclasses.replace(sweep, points=points)


def _check_fit(sweep: Sweep, points: Sequence[Point], observations: Observations) -> None:
    """Refuse models on this machine that the points still to be trained cannot be trained with."""
    left = (point.spec for point in points if not observations[point.id].is_trained)
    compatibility.check(commits.placed(spec, sweep) if sweep.commits else spec for spec in left)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def _print_json(said: Json) -> int:
    print(json.dumps(said))
    return DONE
