"""Derive the state of every point from the files on disk, and the next actions from the states.

`observe` and `baselines_of` read; `judge` and `actions` are pure. Nothing here knows where points
run: the only input is what a process left in its run directory.

    new       nobody ever started it          failed    exit code 42, 43, 44, or too many deaths
    waiting   may start, or start again       stopped   exit code 46: a watch rule ended it
    running   a live process holds its lock   drifted   begun, untrained, by other code than ours;
    done      trained, and every task that              or, trained or not, over other weights or
              was requested is scored                   rows than are here now
    unreadable   a file in its directory is torn or malformed: it is named, other points go on

A trained point whose scores were made of other weights, or by another lm-eval, waits to be scored
again: scoring is cheap, and the new score says what it replaced.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from stillhouse.errors import AGAIN, POISON, STOPPED, ContractError
from stillhouse.rundir import Json, RunDir, code_identity, read_score
from stillhouse.spec import SuiteSpec, score_key
from stillhouse.sweep.dependencies import Below, Beneath
from stillhouse.sweep.grid import Sweep
from stillhouse.sweep.registry import Roster, baseline_rows, roster_of

State = Literal[
    "new", "waiting", "running", "done", "failed", "stopped", "drifted", "unreadable"
]  # fmt: skip
STATES: tuple[State, ...] = (
    "done", "running", "waiting", "new", "drifted", "failed", "stopped", "unreadable",
)  # fmt: skip


@dataclass(frozen=True)
class Observation:
    """What is known about a point."""

    state: State
    cause: str | None = None  # why it is not done, where there is a reason
    step: int = 0  # completed optimizer steps, as status.json last said
    max_steps: int | None = None
    exit_code: int | None = None
    pid: int | None = None  # of the process that has it, while it is running
    is_trained: bool = False
    # When we saw that somebody stopped it, by our clock; None where it was so when we came.
    asked_to_stop: float | None = None
    stop_mark: float | None = None  # changes with each stop: a time, by the clock of who wrote it
    warnings: tuple[str, ...] = ()  # what its watch rules found, a line each
    # What it, or a score of it, rests on and is another here now; a sentence each.
    rests_on_other: tuple[str, ...] = ()

    @property
    def must_begin_anew(self) -> bool:
        """Whether what was trained here is of other weights or rows than are here now."""
        return self.state == "drifted" and bool(self.rests_on_other)


@dataclass(frozen=True)
class Found:
    """What lies in a run directory."""

    status: Json
    code: str | None  # digest of the code that began it; None: nobody did
    is_trained: bool = False
    unscored: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    is_locked: bool = False
    drift: tuple[str, ...] = ()  # what it rests on and is another here now


@dataclass(frozen=True)
class Baseline:
    """A row that no run trained, and whether it still has to be scored."""

    directory: Path
    label: str
    groups: frozenset[str]  # the groups whose evaluations can take it along
    is_scored: bool = False
    cause: str | None = None  # why it is given up
    rests_on_other: tuple[str, ...] = ()  # why scores that are there count no more


@dataclass(frozen=True)
class Action:
    """One thing to do next: prepare a group's pair, train a point, or score a pack of one group."""

    kind: Literal["prepare", "train", "eval"]
    group: str
    points: tuple[str, ...] = ()
    baselines: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Situation:
    """The input of `actions`."""

    groups: Mapping[str, str]  # point id -> group, in the order in which points start
    packs: Mapping[str, str]  # point id -> which points one evaluation may score together
    observations: Mapping[str, Observation]
    baselines: Sequence[Baseline]
    prepared: Mapping[str, bool]  # group -> whether its pair is there; missing: not tried yet
    live: Sequence[Action]
    since: float  # this loop does not restart a point that was asked to stop after this

    @property
    def spreads(self) -> bool:
        """Whether the rest of a group may be cut into new packs, to use idle slots."""
        return self.packs == self.groups


# ------------------------------------------------------------------------------- reading


def observe(roster: Roster) -> dict[str, Observation]:
    """The state of every point of a sweep, by its id."""
    there = set(os.listdir(roster.runs)) if roster.runs.is_dir() else set[str]()
    beneath = roster.beneath()
    return {
        row.id: look(roster.run(row.id), roster.suite, beneath)
        if row.directory in there
        else Observation("new")
        for row in roster.rows
    }


def look(run: RunDir, suite: SuiteSpec | None, beneath: Beneath) -> Observation:
    """The state of one point; `beneath`: what points rest on now."""
    try:
        return _look(run, suite, beneath)
    except ContractError as error:  # written by another version, torn, or edited
        return Observation("unreadable", str(error))


def _look(run: RunDir, suite: SuiteSpec | None, beneath: Beneath) -> Observation:
    record, status = run.record(), run.status()
    missing: dict[str, list[str]] = {}
    is_trained = run.is_trained()
    if is_trained or run.was_trained():
        missing = unscored(run.path, suite, beneath.under_run(run, record) if record else None)
        # One that was collected without its weights was trained; to be scored it would want them.
        is_trained = is_trained or not missing
    # The lock is only tried where somebody may hold it: trying it is holding it for an instant.
    may_run = status.get("phase") in ("starting", "training") or bool(status.get("scoring"))
    found = Found(
        status=status,
        code=record["code"]["digest"] if record else None,
        is_trained=is_trained,
        unscored=missing if is_trained else {},
        is_locked=may_run and run.is_locked(),
        drift=tuple(beneath.drift(run, record)) if record else (),
    )
    return judge(found, code_identity()["digest"] if record else "")


def unscored(directory: Path, suite: SuiteSpec | None, below: Below | None) -> dict[str, list[str]]:
    """The tasks of a suite that want a score here, each with why the one that is there is none.

    [] where there is none, or one that answers another question. `below`: what this row's scores
    rest on now; None: nobody knows. Raises ContractError for a file there that is no score.
    """
    missing: dict[str, list[str]] = {}
    for task in suite.tasks if suite else ():
        result = read_score(directory, task.task)
        if suite is None or result is None or result.get("key") != score_key(suite, task):
            missing[task.task] = []
        elif below is not None and (why := below.changes(result, task)):
            missing[task.task] = why
    return missing


def groups_of(sweep: Sweep) -> dict[str, str]:
    """Point id -> name of its group: points whose adapters one evaluation can score together."""
    names: dict[Any, str] = {}
    found: dict[str, str] = {}
    for point in sweep.points:
        spec = point.spec
        key = (spec.pair, spec.quant, spec.data)
        if key not in names:
            name = f"{spec.pair.pair_name}/{spec.quant.quant_type}"
            twins = sum(other.split("#")[0] == name for other in names.values())
            names[key] = f"{name}#{twins + 1}" if twins else name
        found[point.id] = names[key]
    return found


def fixed_packs(groups: Mapping[str, str], size: int) -> dict[str, str]:
    """Point id -> pack: each group in its order, cut into pieces of `size`.

    Whoever looks, whenever, finds the same packs: two drivers name the same evaluation.
    """
    seen: Counter[str] = Counter()
    found: dict[str, str] = {}
    for id_, group in groups.items():
        found[id_] = f"{group}/{seen[group] // size}"
        seen[group] += 1
    return found


def baselines_of(sweep: Sweep, groups: Mapping[str, str]) -> tuple[Baseline, ...]:
    """The rows of a sweep that no run trains, as they are on disk now."""
    found: list[Baseline] = []
    beneath = roster_of(sweep).beneath()
    for row in baseline_rows(sweep):
        of_it = frozenset(groups[id_] for id_ in row.points)
        try:
            status = RunDir(row.directory).status()
            missing = unscored(row.directory, sweep.suite, beneath.under_baseline(row.directory))
        except ContractError as error:
            found.append(Baseline(row.directory, row.label, of_it, cause=str(error)))
            continue
        found.append(
            Baseline(
                directory=row.directory,
                label=row.label,
                groups=of_it,
                is_scored=not missing,
                cause=status.get("eval_cause") if status.get("eval_gave_up") else None,
                rests_on_other=drifted_scores(missing),
            )
        )
    return tuple(found)


def drifted_scores(missing: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Of `unscored`, the scores that are there and count no more: a sentence for each reason."""
    tasks: dict[str, list[str]] = {}
    for task, why in missing.items():
        for reason in why:
            tasks.setdefault(reason, []).append(task)
    return tuple(
        f"its score{'s' if len(of) > 1 else ''} on {', '.join(of)} drifted: {reason}"
        for reason, of in tasks.items()
    )


# --------------------------------------------------------------------------------- judging


def judge(found: Found, code: str) -> Observation:
    """The state that follows from what lies in a run directory, for a launcher of this code."""
    status = found.status

    def observed(state: State, cause: str | None = None, **more: Any) -> Observation:
        return Observation(
            state,
            cause,
            step=cast("int", status.get("step") or 0),
            max_steps=status.get("max_steps"),
            exit_code=status.get("eval_exit_code" if found.is_trained else "exit_code"),
            is_trained=found.is_trained,
            warnings=tuple(cast("dict[str, str]", status.get("warnings") or {}).values()),
            **more,
        )

    if found.is_trained and not found.unscored and not found.drift:
        return observed("done")
    if found.is_locked:
        return observed("running", pid=status.get("pid"))
    if found.is_trained and not found.drift:
        return _judge_unscored(found, observed)
    if not status and found.code is None:
        return Observation("new")
    exit_code, cause = status.get("exit_code"), status.get("cause")
    if exit_code == STOPPED:
        return observed("stopped", cause)
    has_failed = status.get("phase") == "failed" and not found.is_trained
    if has_failed and (exit_code in POISON or status.get("gave_up")):
        return observed("failed", cause)
    if found.drift:
        return observed("drifted", "; ".join(found.drift), rests_on_other=found.drift)
    if found.code not in (None, code):
        return observed("drifted", f"begun by code {found.code}, this is {code}")
    if exit_code == AGAIN:
        return observed("waiting", cause, stop_mark=status.get("finished"))
    if status.get("phase") in ("starting", "training"):
        cause = "its process ended without a word"
    elif status.get("phase") == "done":
        cause = "its adapter is gone, or not whole"
    return observed("waiting", cause)


def _judge_unscored(found: Found, observed: Any) -> Observation:
    """A trained point without its scores. Its code does not matter: its training is over."""
    status = found.status
    cause = status.get("eval_cause")
    if status.get("eval_gave_up"):
        return observed("failed", cause)
    at = status.get("eval_finished") if status.get("eval_exit_code") == AGAIN else None
    drifted = drifted_scores(found.unscored)
    told = "; ".join(drifted) and f"{'; '.join(drifted)}; to be scored anew"
    return observed(
        "waiting",
        cause or told or f"trained, to be scored on {', '.join(found.unscored)}",
        stop_mark=at,
        rests_on_other=drifted,
    )


# --------------------------------------------------------------------------------- planning


def actions(now: Situation, slots: int, pack: int) -> list[Action]:
    """What to start now, at most as much as there are free slots.

    Full packs first; then training, group by group, each group's pair prepared before it (one at a
    time); then what is left to score of groups in which nothing is trained any more.
    """
    free = slots - len(now.live)
    if free <= 0:
        return []
    to_train, to_score = _idle(now)
    chosen: list[Action] = []
    for key, ids in to_score.items():
        whole = len(ids) // pack * pack
        chosen += _packs(now, ids[:whole], pack)
        to_score[key] = ids[whole:]
    chosen += _trainings(now, to_train, max(0, free - len(chosen)))
    coming = _coming(now, to_train)
    rest = {key: ids for key, ids in to_score.items() if ids and key not in coming}
    for ids in rest.values():
        # A pack is a maximum: where it may be cut anew, idle slots share the rest.
        share = max(1, (free - len(chosen)) // len(rest)) if now.spreads else 1
        chosen += _packs(now, ids, min(pack, -(-len(ids) // share)))
    waiting = {now.groups[id_] for id_, key in now.packs.items() if key in coming}
    waiting |= {now.groups[id_] for ids in to_score.values() for id_ in ids}
    return _with_baselines(now, chosen[:free], waiting)[:free]


def _idle(now: Situation) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Points that may start: those to train by group, and those to score by pack."""
    busy = {id_ for action in now.live for id_ in action.points}
    to_train: dict[str, list[str]] = {}
    to_score: dict[str, list[str]] = {}
    for id_, group in now.groups.items():
        seen = now.observations[id_]
        if id_ in busy or seen.state not in ("new", "waiting"):
            continue
        if seen.asked_to_stop is not None and seen.asked_to_stop >= now.since:
            continue  # somebody stopped it while we ran; starting it again would undo that
        if seen.is_trained:
            to_score.setdefault(now.packs[id_], []).append(id_)
        elif now.prepared.get(group) is not False:
            to_train.setdefault(group, []).append(id_)
    return to_train, to_score


def _trainings(now: Situation, to_train: Mapping[str, Sequence[str]], free: int) -> list[Action]:
    chosen: list[Action] = []
    is_preparing = any(action.kind == "prepare" for action in now.live)
    for group, ids in to_train.items():
        if group in now.prepared:
            chosen += [Action("train", group, (id_,)) for id_ in ids[: free - len(chosen)]]
        elif not is_preparing and len(chosen) < free:
            chosen.append(Action("prepare", group))
            is_preparing = True
    return chosen


def _coming(now: Situation, to_train: Mapping[str, Sequence[str]]) -> set[str]:
    """The packs in which some point may still become trained."""
    idle = (id_ for ids in to_train.values() for id_ in ids)
    elsewhere = (
        id_
        for id_, seen in now.observations.items()
        if seen.state == "running" and not seen.is_trained
    )
    here = (id_ for action in now.live if action.kind == "train" for id_ in action.points)
    return {now.packs[id_] for id_ in itertools.chain(idle, elsewhere, here)}


def _packs(now: Situation, ids: Sequence[str], size: int) -> list[Action]:
    return [
        Action("eval", now.groups[ids[start]], tuple(ids[start : start + size]))
        for start in range(0, len(ids), size)
    ]


def _with_baselines(now: Situation, chosen: list[Action], waiting: set[str]) -> list[Action]:
    """The actions, with each baseline that is not scored yet in one of them or in one of its own.

    `waiting`: groups that have or will have something else to score. Where there is nothing else, a
    point that is scored already takes a baseline along: evaluations load by adapter.
    """
    taken = {directory for action in now.live for directory in action.baselines}
    first: dict[str, str] = {}  # group -> the pack that takes its baselines along
    for id_, group in now.groups.items():
        first.setdefault(group, now.packs[id_])
    open_ = [b for b in now.baselines if not (b.is_scored or b.cause or b.directory in taken)]
    result: list[Action] = []
    for action in chosen:
        along: list[Path] = []
        is_first = action.kind == "eval" and now.packs[action.points[0]] == first[action.group]
        for baseline in list(open_):
            if is_first and action.group in baseline.groups:
                along.append(baseline.directory)
                open_.remove(baseline)
        result.append(Action(action.kind, action.group, action.points, tuple(along)))
    return result + _carried(now, [b for b in open_ if not waiting & b.groups])


def _carried(now: Situation, baselines: Iterable[Baseline]) -> list[Action]:
    """Evaluations of baselines with a point that is scored already: it costs a load, no more."""
    carriers: dict[str, str] = {}  # group -> a point of it that is done
    for id_, group in now.groups.items():
        if now.observations[id_].state == "done":
            carriers.setdefault(group, id_)
    together: dict[str, list[Path]] = {}
    for baseline in baselines:
        group = next((g for g in sorted(baseline.groups) if g in carriers), None)
        if group:
            together.setdefault(group, []).append(baseline.directory)
    return [
        Action("eval", group, (carriers[group],), tuple(directories))
        for group, directories in together.items()
    ]
