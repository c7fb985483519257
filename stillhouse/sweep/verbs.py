"""Implement the verbs: plan, run, status, logs, retry, cancel, collect, doctor.

Each takes a `Call` and returns an exit code: 0 success, 1 some points failed or stopped, 42 a file
is unreadable or something is missing, 85 interrupted. Mistakes are StillhouseErrors, which `cli`
turns into exit code 42. A verb looks once at the points (`Snapshot`), through the `Backend` that
hides whether they are on this machine or in a cluster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

from stillhouse import compatibility, rollout_memory, teacher_placement
from stillhouse.errors import AGAIN, DONE, MISTAKE, SOME_FAILED, ConfigError, ContractError
from stillhouse.rundir import Json, make_directory
from stillhouse.sweep import commits, cost, registry, show, spending
from stillhouse.sweep.backend import Executor
from stillhouse.sweep.call import Call
from stillhouse.sweep.cluster.push import push
from stillhouse.sweep.driver import Driver
from stillhouse.sweep.filters import Condition, check_cause, is_caused_by, knobs_of
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.show import verdict_lines, verdicts
from stillhouse.sweep.snapshot import Observations, Snapshot, collected
from stillhouse.sweep.state import FAILED, STATES, Observation
from stillhouse.text import duration, number_of, say

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

ExecutorFor = Callable[[Sweep, Snapshot], AbstractContextManager[Executor]]
WAYS_OUT = (
    "restore what changed, or run the same command with --sources=new: these points begin anew, and"
    " what they left is kept beside them, in runs/.before"
)


def plan(call: Call) -> int:
    """Print the states of the points by axis, how they train and what that would cost."""
    sweep, snapshot = _planned(call)
    observations = snapshot.observations
    _check_fit(sweep, observations)
    if call.is_json:
        more = {
            "methods": show.methods(sweep.points),
            "preflight": verdicts(sweep, call.runs),
            "unasked": snapshot.unreachable,
        }
        return _print_json(show.as_json(sweep, observations) | more)
    _print(show.unreachable(snapshot.unreachable) if snapshot.unreachable else ())
    say(show.headline(sweep, observations))
    if sweep.question:
        say(f"  {sweep.question}")
    costs = _costs(call, sweep, snapshot)
    _print(show.by_axis(sweep, observations, costs))
    _print(show.method_lines(sweep.points))
    _print(rollout_memory.lines(point.spec for point in sweep.points))
    _print(teacher_placement.lines(point.spec for point in sweep.points))
    _print(verdict_lines(verdicts(sweep, call.runs)))
    _print(_forecast(call, sweep, costs))
    _print(show.failures(sweep, observations))
    _print(show.drifted(sweep, observations))
    _print([*show.drifted_baselines(snapshot.baselines), *commits.notes(sweep)])
    if snapshot.to_begin_anew:
        say(f"run: {WAYS_OUT}")
    if snapshot.of_other_code:
        say(f"{_begun_by_other_code(snapshot)}; run them with --code=new")
    return DONE


def _planned(call: Call) -> tuple[Sweep, Snapshot]:
    """The sweep, with the points that are meant, and a look at it; of a cluster also without it."""
    sweep = call.sweep_to_start()
    try:
        backend = call.backend
    except ConfigError as error:  # points, costs and prices are known all the same
        sweep = _pinned_unasked(call, sweep)
        return sweep, collected(sweep, str(error))
    sweep = registry.narrowed(backend.pinned(sweep), call.points)
    return sweep, backend.look(sweep, is_to_run=True)


def _pinned_unasked(call: Call, sweep: Sweep) -> Sweep:
    """The points that are meant, with the commits that this machine knows of."""
    recorded = registry.recorded_commits(call.runs, sweep.name)
    return registry.narrowed(commits.pinned(sweep, recorded, commits.unasked), call.points)


def _dry_run(call: Call) -> int:
    """Print every Job that `run` would send to a cluster, without any request to one."""
    if not call.is_cluster or call.is_detached:
        raise ConfigError(
            "stillhouse run: --dry-run prints the Jobs of a sweep: with --backend cluster, without"
            " --detach. `stillhouse plan` shows what is left to do on this machine"
        )
    from stillhouse.sweep.cluster.code_bundle import bundle
    from stillhouse.sweep.cluster.jobspec import JobSpecs
    from stillhouse.sweep.cluster.manifest import image_problem, render, to_yaml

    sweep = _pinned_unasked(call, call.sweep_to_start())
    problem = image_problem(sweep.site)
    if problem:
        say(f"not to be sent as it is: {problem}", file=sys.stderr)
    for name in commits.unknown(sweep):
        say(f"{name}: `run` asks the hub for its commit, and tells every Job", file=sys.stderr)
    code, steps = bundle(sweep.suite).key, JobSpecs(sweep).all()
    manifests = (to_yaml(render(step, sweep.site, code)) for step in steps)
    if call.is_json:
        said = show.as_json(sweep, dict.fromkeys(sweep.by_id, Observation("new")))
        return _print_json(said | {"manifests": [*manifests]})
    for place, manifest in enumerate(manifests):
        sys.stdout.write(("---\n" if place else "") + manifest)
    return DONE


def run(call: Call, executor_for: ExecutorFor | None = None) -> int:
    """Train and score what is not done.

    `executor_for`: makes what the tasks run on, of a sweep and the last look at it.
    """
    if call.is_dry_run:
        return _dry_run(call)
    if not call.is_json:
        return _run(call, executor_for)[0]
    with contextlib.redirect_stdout(sys.stderr):  # one object is all that goes to stdout
        code, sweep, snapshot = _run(call, executor_for)
    _print_json(show.as_json(sweep, snapshot.observations))
    return code


def _run(call: Call, executor_for: ExecutorFor | None) -> tuple[int, Sweep, Snapshot]:
    """The exit code, the points that were meant, and how they stood when it ended."""
    whole, backend = call.sweep_to_start(), call.backend
    whole = backend.pinned(whole, begins=True)
    sweep = registry.narrowed(whole, call.points)
    snapshot = backend.look(sweep, is_to_run=True)
    if snapshot.to_begin_anew and sweep.points[0].spec.place.sources != "new":
        return _refuse(sweep, snapshot.observations), sweep, snapshot
    if snapshot.of_other_code and not call.is_new_code:
        say(
            f"{_begun_by_other_code(snapshot)}: nothing was started. The same command with"
            " --code=new goes on with them under the code at hand, and the report will say so"
        )
        return SOME_FAILED, sweep, snapshot
    _check_fit(sweep, snapshot.observations)
    make_directory(call.runs, "--runs")
    is_idle = snapshot.is_settled
    if not is_idle and call.is_detached:
        call.cluster.require(sweep, is_detached=True)
    elif not is_idle:
        backend.require(sweep)
    backend.save(whole)
    _print([*show.drifted_baselines(snapshot.baselines), *commits.notes(whole)])
    _print(
        f"{name}: nobody here knows its commit; each point uses what its pod finds, and records it"
        for name in commits.unknown(whole)
        if call.is_cluster
    )
    if snapshot.of_other_code or snapshot.to_begin_anew:
        _print(backend.adopt(sweep, snapshot))
        snapshot = backend.look(sweep, is_to_run=True)
    if is_idle:
        say("nothing left to do")
        return _summary(call, sweep, snapshot), sweep, snapshot
    say(show.headline(sweep, snapshot.observations))
    _print(_forecast(call, sweep, _costs(call, sweep, snapshot)))
    if call.is_detached:
        _print(call.cluster.detach(sweep, _options(call)))
        return DONE, sweep, snapshot
    from stillhouse.sweep.progress import display  # rich, which looking does not need

    started = time.monotonic()
    with (
        (executor_for or backend.executor)(sweep, snapshot) as executor,
        display(sweep, has_files=not call.is_cluster) as watch,
    ):
        drive = Driver(sweep, executor, watch)
        code = drive.run()
    say(f"after {duration(time.monotonic() - started)}:")
    snapshot = drive.snapshot()
    _summary(call, sweep, snapshot)
    if code == AGAIN:
        say(show.PHRASES[call.backend_name].left)
    return code, sweep, snapshot


def _refuse(sweep: Sweep, observations: Observations) -> int:
    """Print which points depend on something that changed, and both ways out; 42."""
    lines = [*show.drifted(sweep, observations), f"nothing was started: {WAYS_OUT}"]
    say("ContractError: " + "\n".join(lines), file=sys.stderr)
    return MISTAKE


def _options(call: Call) -> list[str]:
    """What was typed besides target and words, for whoever repeats the command."""
    points = [f"--point={point}" for point in call.points]
    return points + (["--code=new"] if call.is_new_code else [])


def _costs(call: Call, sweep: Sweep, snapshot: Snapshot) -> dict[str, cost.Cost]:
    """What each point that is still to be trained would take, by its id."""
    left = show.still_to_train(sweep, snapshot.observations)
    records = snapshot.records
    jobs = None if records is None else cost.measured_jobs(sweep.points, records)
    return cost.estimate(left, call.runs, jobs) if left else {}


def _forecast(call: Call, sweep: Sweep, costs: Mapping[str, cost.Cost]) -> list[str]:
    """Time and price of what is still to be trained, in lines."""
    if call.is_cluster:
        return cost.estimate_lines(sweep.points, costs, sweep.site)
    return show.estimate(sweep, costs)


def _spent(call: Call, sweep: Sweep, snapshot: Snapshot) -> spending.Spent:
    """What these points cost so far, and on what it was spent."""
    return spending.spent(sweep, snapshot.records or {}, call.site if call.is_cluster else None)


def _summary(call: Call, sweep: Sweep, snapshot: Snapshot) -> int:
    """Say how a sweep stands and what to do about it; 1 where something failed."""
    observations = snapshot.observations
    failed = [seen for seen in observations.values() if seen.state in FAILED]
    say(show.headline(sweep, observations))
    _print(show.failures(sweep, observations))
    _print([f"failed: {what}: {cause}" for what, cause in snapshot.failures.items()])
    if failed:
        again = call.command("retry", sweep.name)
        say(show.ways_on(failed, f"{call.command('logs', sweep.name)} --point ID", again))
    if any(seen.is_trained for seen in observations.values()):
        first = f"`{call.command('collect', sweep.name)}`, then " if call.is_cluster else ""
        say(f"{first}`stillhouse report {sweep.name}` shows the results")
    return _code(snapshot)


def status(call: Call) -> int:
    """Print the state of a sweep, or without a target of every sweep."""
    if call.is_about_all:
        return _overview(call)
    backend, sweep = call.backend, call.find()
    snapshot = backend.look(sweep)
    observations, code = snapshot.observations, _code(snapshot)
    notes = backend.describe(sweep)
    spent = _spent(call, sweep, snapshot) if call.shows_cost else None
    if call.is_json:
        cost = {"cost": spent.as_json()} if spent else {}
        notes = [line.strip() for line in notes]
        _print_json(show.as_json(sweep, observations) | cost | {"remarks": notes})
        return code
    say(show.headline(sweep, observations))
    if call.shows_all or len(sweep.points) == 1:
        _print(show.every(sweep, observations))
    else:
        if len(sweep.points) > show.MANY:
            _print(show.by_axis(sweep, observations, {}, show.FEW))
        _print(show.reasons(sweep, observations))
    _print([f"  failed   {what}: {cause}" for what, cause in snapshot.failures.items()])
    _print(notes)
    _print(spent.lines() if spent else ())
    return code


def _overview(call: Call) -> int:
    backend = call.backend
    names = backend.names()
    codes, said, unreadable = [DONE], list[Json](), dict[str, str]()
    for name in names:
        try:
            sweep = backend.find(name)
        except ContractError as error:  # one bad record is one line
            unreadable[name] = str(error)
            continue
        snapshot = backend.look(sweep)
        said.append(show.as_json(sweep, snapshot.observations) | {"points": []})
        codes.append(_code(snapshot))
        if not call.is_json:
            say(show.headline(sweep, snapshot.observations))
            _print(_unreadable_lines(sweep, snapshot.observations))
    codes += [MISTAKE] * bool(unreadable)
    notes = backend.describe(None)
    if call.is_json:
        totals = {state: sum(one["totals"][state] for one in said) for state in STATES}
        whole: Json = {"sweep": None, "totals": totals, "points": [], "sweeps": said}
        _print_json(whole | {"unreadable": unreadable, "remarks": notes})
        return max(codes)
    _print([f"{name}: unreadable: {why}" for name, why in unreadable.items()])
    if not names:
        there = show.PHRASES[call.backend_name].there
        say(f"no sweep was started {there} yet; `stillhouse run SWEEP.yaml` does")
    _print(notes)
    return max(codes)


def logs(call: Call) -> int:
    """Show logs: one point's whole log, or the end of each point that runs or failed."""
    backend, sweep = call.backend, call.find()
    observations = backend.look(sweep).observations
    if call.is_json:
        with contextlib.redirect_stdout(sys.stderr):
            texts = backend.log_texts(sweep, observations)
        return _print_json(show.as_json(sweep, observations) | {"logs": texts})
    if not backend.show_logs(sweep, observations, call.follows):
        is_done = all(seen.state == "done" for seen in observations.values())
        one = "all is done; with --point P you see what one point printed"
        say(one if is_done else "nothing was printed yet", file=sys.stderr)
    return DONE


def retry(call: Call) -> int:
    """Let failed points start again, from their checkpoints; the next `run` does."""
    condition = Condition(call.where) if call.where is not None else None
    cause = check_cause(call.cause) if call.cause is not None else None
    backend, sweep = call.backend, call.find()
    observations = backend.look(sweep).observations
    failed = [point for point in sweep.points if observations[point.id].state == "failed"]
    if condition is not None:
        failed = [point for point in failed if condition.holds(knobs_of(point))]
    if cause is not None:
        failed = [point for point in failed if is_caused_by(observations[point.id], cause)]
    is_whole = sweep.is_whole and condition is None and cause is None
    meant = dataclasses.replace(sweep, points=tuple(failed), is_whole=is_whole)
    count = backend.forget(meant) + len(failed)
    if call.is_json:
        return _print_json(show.as_json(sweep, backend.look(sweep).observations))
    if not count:
        which = "" if condition is None and cause is None else " that is meant"
        say(f"{sweep.name}: nothing to retry: no point of it{which} failed")
        return DONE
    shown = [f"  waiting  {point}" for point in failed[: show.SHOWN]]
    more = len(failed) - show.SHOWN
    _print([*shown, *([f"  and {more} more"] if more > 0 else [])])
    say(f"{count} wait: {show.PHRASES[call.backend_name].again} starts them")
    return DONE


def cancel(call: Call) -> int:
    """Ask running points to checkpoint and stop, and a `run` that is under way to end."""
    backend, sweep = call.backend, call.find()
    stopping = backend.cancel(sweep)
    observations = backend.look(sweep).observations
    if call.is_json:
        return _print_json(show.as_json(sweep, observations))
    _print([f"  {line}" for line in stopping])
    phrases = show.PHRASES[call.backend_name]
    if not stopping:
        say(f"{sweep.name}: no point of it is running {phrases.there}")
    if any(seen.state != "done" for seen in observations.values()):
        say(f"{phrases.again} goes on from there")
    return DONE


def collect(call: Call) -> int:
    """Fetch the results of a sweep from a cluster's volume."""
    cluster, sweep = call.cluster, call.find()
    tell: Callable[[str], None] = lambda text: say(text, file=sys.stderr, flush=True)  # noqa: E731
    fetched = cluster.collect(sweep, call.adapters, tell)
    observations = cluster.look(sweep).observations
    trained = {sweep.by_id[id_].directory for id_, seen in observations.items() if seen.is_trained}
    is_short = bool(fetched.kept) or bool(trained & {*fetched.missing})
    if call.is_json:
        said = show.as_json(sweep, observations)
        _print_json(said | {"collected": fetched.as_json()})
    else:
        _print(fetched.lines(sweep))
        say(f"`stillhouse report {sweep.name}` shows the results")
    return SOME_FAILED if is_short else DONE


def doctor(call: Call) -> int:
    """Check a namespace against all that a sweep needs; 42 where something is missing."""
    found = call.cluster.examine()
    is_fine = all(finding.ok for finding in found)
    if call.is_json:
        said = [dataclasses.asdict(finding) for finding in found]
        _print_json({"is_fine": is_fine, "findings": said})
    else:
        _print([f"{'ok     ' if finding.ok else 'missing'}  {finding}" for finding in found])
    return DONE if is_fine else MISTAKE


# ------------------------------------------------------------------------------------ helpers


def _unreadable_lines(sweep: Sweep, observations: Observations) -> list[str]:
    odd = {id_ for id_ in sweep.by_id if observations[id_].state == "unreadable"}
    return show.failures(sweep.only(odd), observations)


def _code(snapshot: Snapshot) -> int:
    """42 where a person has to repair a file, 1 where something failed, 0 otherwise."""
    states = {seen.state for seen in snapshot.observations.values()}
    if "unreadable" in states:
        return MISTAKE
    return SOME_FAILED if snapshot.failures or states & {*FAILED} else DONE


def _begun_by_other_code(snapshot: Snapshot) -> str:
    ids = snapshot.of_other_code
    who = ", ".join(id_[:6] for id_ in ids[:3]) + (" …" if len(ids) > 3 else "")
    were = "was" if len(ids) == 1 else "were"
    return f"{number_of(len(ids), 'unfinished point')} {were} begun by other code ({who})"


def _check_fit(sweep: Sweep, observations: Observations) -> None:
    """Refuse models on this machine that the points still to be trained cannot be trained with."""
    left = (point.spec for point in sweep.points if not observations[point.id].is_trained)
    compatibility.check(commits.placed(spec, sweep) if sweep.commits else spec for spec in left)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def _print_json(said: Json) -> int:
    print(json.dumps(said))
    return DONE
