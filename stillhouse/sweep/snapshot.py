"""Look at a sweep once: `Snapshot` is what was found, plain data that asks nobody anything.

`on_disk` looks at the run directories of this machine, `collected` at those that were fetched from
a cluster that cannot be reached; how a cluster is looked at is in `cluster.backend`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from stillhouse.errors import AGAIN, POISON, STOPPED, ContractError
from stillhouse.identity import score_key
from stillhouse.rundir import Json, RunDir, code_identity, now, read_score
from stillhouse.spec import SuiteSpec
from stillhouse.sweep.dependencies import Below, Beneath
from stillhouse.sweep.points import Baseline, Sweep
from stillhouse.sweep.state import Facts, Observation, Record, judge

Observations = Mapping[str, Observation]


@dataclass(frozen=True)
class Snapshot:
    """The points of a sweep, and all that counts beside them, at one moment."""

    observations: Observations  # by the points' ids
    baselines: tuple[Baseline, ...] = ()  # the rows that no run trains; of a look before a run
    # What no point shows, of preparing pairs and scoring baselines: what failed -> why.
    failures: Mapping[str, str] = field(default_factory=dict[str, str])
    prepared: Mapping[str, bool] = field(default_factory=dict[str, bool])  # groups, where known
    records: Mapping[str, Record] | None = None  # a cluster's ledger; None: this machine has none
    unreachable: str | None = None  # why the cluster could not be asked
    at: float = field(default_factory=now)  # seconds since the epoch

    @property
    def to_begin_anew(self) -> list[str]:
        """The points whose training rests on weights or rows that are others now."""
        return [id_ for id_, seen in self.observations.items() if seen.must_begin_anew]

    @property
    def of_other_code(self) -> list[str]:
        """The points that other code began, and ours would have to go on with."""
        seen_by_id = self.observations.items()
        return [i for i, s in seen_by_id if s.state == "drifted" and not s.must_begin_anew]

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to train or to score."""
        states = {seen.state for seen in self.observations.values()}
        rows_left = any(not (row.is_scored or row.cause) for row in self.baselines)
        is_open = states & {"new", "waiting", "running", "drifted"}
        return not is_open and not (rows_left and "done" in states)


def on_disk(sweep: Sweep, is_to_run: bool) -> Snapshot:
    """What the run directories of this machine say; of a sweep to be run, its baselines, too."""
    baselines = baselines_on_disk(sweep) if is_to_run else ()
    return Snapshot(observe(sweep), baselines, _failures(sweep))


def collected(sweep: Sweep, why: str) -> Snapshot:
    """What is known of a cluster that cannot be reached (`why`): the runs that were collected."""
    found = observe(sweep)
    for id_ in found:
        if not sweep.run(id_).collected_file.exists():
            found[id_] = Observation("new")
    return Snapshot(found, records={}, unreachable=why)


def _failures(sweep: Sweep) -> dict[str, str]:
    found: dict[str, str] = {}
    for directory in (baseline.directory for baseline in sweep.meant_baselines):
        try:
            status = RunDir(directory).status()
        except ContractError as error:
            found[f"baseline {directory.name}"] = str(error)
            continue
        if status.get("eval_gave_up"):
            found[f"baseline {directory.name}"] = status.get("eval_cause") or "no cause told"
    return found


# ------------------------------------------------------------------------- run directories


def observe(sweep: Sweep) -> dict[str, Observation]:
    """The state of every point of a sweep, by its id."""
    there = set(os.listdir(sweep.runs)) if sweep.runs.is_dir() else set[str]()
    beneath = sweep.beneath()
    return {
        point.id: look(sweep.run(point.id), sweep.suite, beneath)
        if point.directory in there
        else Observation("new")
        for point in sweep.points
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
    return observed(found, code_identity()["digest"] if record else "")


@dataclass(frozen=True)
class Found:
    """What lies in a run directory."""

    status: Json
    code: str | None  # digest of the code that began it; None: nobody did
    is_trained: bool = False
    unscored: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    is_locked: bool = False
    drift: tuple[str, ...] = ()  # what it rests on and is another here now


def observed(found: Found, code: str) -> Observation:
    """The state that follows from what lies in a run directory, for a launcher of this code."""
    status = found.status
    seen = judge(_facts_of_scores(found) if _is_to_score(found) else _facts_of_run(found, code))
    drifted = drifted_scores(found.unscored) if seen.state == "waiting" else ()
    return replace(
        seen,
        step=cast("int", status.get("step") or 0),
        max_steps=status.get("max_steps"),
        pid=status.get("pid") if seen.state == "running" else None,
        warnings=tuple(cast("dict[str, str]", status.get("warnings") or {}).values()),
        rests_on_other=seen.rests_on_other or drifted,
    )


def _is_to_score(found: Found) -> bool:
    """Whether only scores can be missing. Its code does not matter: its training is over."""
    return found.is_trained and not found.drift


def _facts_of_scores(found: Found) -> Facts:
    status = found.status
    cause: str | None = status.get("eval_cause")
    has_given_up = bool(status.get("eval_gave_up"))
    if not has_given_up:
        told = "; ".join(drifted_scores(found.unscored))
        told = told and f"{told}; to be scored anew"
        cause = cause or told or f"trained, to be scored on {', '.join(found.unscored)}"
    exit_code = status.get("eval_exit_code")
    return Facts(
        is_trained=True,
        is_done=not found.unscored,
        is_running=found.is_locked,
        is_begun=True,
        is_over=has_given_up,
        exit_code=exit_code,
        cause=None if found.is_locked else cause,
        stop_mark=status.get("eval_finished") if exit_code == AGAIN else None,
    )


def _facts_of_run(found: Found, code: str) -> Facts:
    status = found.status
    exit_code, phase = status.get("exit_code"), status.get("phase")
    has_failed = phase == "failed" and (exit_code in POISON or bool(status.get("gave_up")))
    is_over = exit_code == STOPPED or (has_failed and not found.is_trained)
    cause: str | None = status.get("cause")
    if not is_over and exit_code != AGAIN:
        if phase in ("starting", "training"):
            cause = "its process ended without a word"
        elif phase == "done":
            cause = "its adapter is gone, or not whole"
    is_other = found.code not in (None, code)
    return Facts(
        is_trained=found.is_trained,
        is_running=found.is_locked,
        is_begun=bool(status) or found.code is not None,
        is_over=is_over,
        exit_code=exit_code,
        cause=None if found.is_locked else cause,
        drift=found.drift,
        other_code=f"begun by code {found.code}, this is {code}" if is_other else None,
        stop_mark=status.get("finished") if exit_code == AGAIN else None,
    )


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


def baselines_on_disk(sweep: Sweep) -> tuple[Baseline, ...]:
    """The baselines of a sweep, as their directories are now."""
    beneath = sweep.beneath()
    return tuple(_looked_at(baseline, sweep.suite, beneath) for baseline in sweep.baselines)


def _looked_at(baseline: Baseline, suite: SuiteSpec | None, beneath: Beneath) -> Baseline:
    directory = baseline.directory
    try:
        status = RunDir(directory).status()
        missing = unscored(directory, suite, beneath.under_baseline(directory))
    except ContractError as error:
        return replace(baseline, cause=str(error))
    return replace(
        baseline,
        is_scored=not missing,
        cause=status.get("eval_cause") if status.get("eval_gave_up") else None,
        rests_on_other=drifted_scores(missing),
    )


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
