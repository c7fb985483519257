"""Write how a task of this machine ended into the run directories that it was about.

A run that ends by itself says so in its own status.json (`entrypoints`). This module writes what
the run cannot: that its process died, that exit code 0 left no results, that an evaluation could
not score it, and that there were more deaths than the site's `infra_retries` allow.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from stillhouse.errors import AGAIN, DONE, POISON, STOPPED, ContractError, Unwritable
from stillhouse.rundir import Json, RunDir, now, read_eval_note
from stillhouse.sweep.backend import Task
from stillhouse.sweep.dependencies import Beneath
from stillhouse.sweep.snapshot import unscored


@dataclass(frozen=True)
class Ending:
    """How a task's process ended."""

    code: int
    cause: str | None
    infra_retries: int
    is_stopping: bool  # the launcher asked for it
    pid: int | None = None  # of the process

    @property
    def is_nobodys_failure(self) -> bool:
        return self.code == AGAIN or (self.is_stopping and self.code not in (STOPPED, *POISON))

    def fields(self, failures: int, prefix: str = "") -> Json:
        """Fields of status.json for an end that is no success, after `failures` earlier deaths."""
        cause = self.cause or f"exit code {self.code}"
        said = {"exit_code": self.code, "cause": cause, "finished": now()}
        if self.code not in (STOPPED, *POISON) and not self.is_nobodys_failure:
            failures += 1
            said["infra_failures"] = failures
            if failures > self.infra_retries:
                said["gave_up"] = True
                said["cause"] = f"{cause} (given up after {failures} attempts)"
        if prefix and self.code in POISON:
            said["gave_up"] = True
        return {f"{prefix}{key}": value for key, value in said.items()}


def check_promise(task: Task) -> tuple[int, str | None]:
    """The exit code of a task that ended with 0: 1 where its results are missing."""
    if task.action.kind == "train" and not task.runs[0].is_trained():
        return 1, "it ended with exit code 0 and left no whole adapter"
    missing = [d.name for d in _without_scores(task)]
    if missing:
        return 1, f"it ended with exit code 0 and left no scores in {', '.join(missing)}"
    return DONE, None


def _without_scores(task: Task) -> list[Path]:
    """The directories of an evaluation that still want a score."""
    if task.suite_spec is None:
        return []
    directories = [*(run.path for run in task.runs), *task.action.baselines]
    place = task.suite_spec.place
    beneath = Beneath(Path(place.cache_dir), place.commits)
    found: list[Path] = []
    for directory in directories:
        with contextlib.suppress(ContractError):  # a torn file: whoever looks finds it unreadable
            if unscored(directory, task.suite_spec.suite, beneath.under(directory)):
                found.append(directory)
    return found


def write_ending(task: Task, ending: Ending) -> dict[Path, str]:
    """Write into the task's run directories how it ended, unless it succeeded.

    Returns the directories in which nothing can be written, each with why.
    """
    unwritable: dict[Path, str] = {}
    for directory, own in _to_blame(task, ending).items():
        try:
            _write(RunDir(directory), own, is_training=task.action.kind == "train")
        except ContractError:  # a torn status.json: whoever looks finds it unreadable
            continue
        except Unwritable as error:
            unwritable[directory] = f"{own.cause or f'exit code {own.code}'}; {error}"
    return unwritable


def _to_blame(task: Task, ending: Ending) -> dict[Path, Ending]:
    """The directories that are to say how a task ended, and how it ended for each."""
    if ending.code == DONE or task.action.kind == "prepare":
        return {}
    if task.action.kind == "train":
        return {task.runs[0].path: ending}
    # Those that lack a score and are to blame, or all that lack one if none is; without blame, a
    # row is scored by the next evaluation.
    ends = {directory: _own_ending(directory, ending) for directory in _without_scores(task)}
    is_for_all = not any(ends.values()) or ending.is_nobodys_failure
    return {d: own or ending for d, own in ends.items() if own or is_for_all}


def _write(run: RunDir, ending: Ending, is_training: bool) -> None:
    status = run.status()
    if not is_training:
        run.update_status(**ending.fields(status.get("eval_infra_failures", 0), "eval_"))
        return
    said = ending.fields(status.get("infra_failures", 0))
    is_final = ending.code in (STOPPED, *POISON) or "gave_up" in said
    run.update_status(phase="failed" if is_final else "waiting", **said)


def _own_ending(directory: Path, ending: Ending) -> Ending | None:
    """How it ended for one row, if the evaluation noted it: its own failure, or that it was at work
    when the process died."""
    error, begun = read_eval_note(directory, "error"), read_eval_note(directory, "begun")
    if error.get("pid") == ending.pid and "code" in error:
        return replace(ending, code=error["code"], cause=error.get("cause"))
    if begun and begun.get("pid") == ending.pid:
        return replace(ending, cause=f"{ending.cause}, while it was scored")
    return None


def forget_failures(run: RunDir) -> None:
    """Let a run, or a baseline's directory, start again; its checkpoints and scores stay."""
    afresh: Json = {"exit_code": None, "cause": None, "gave_up": False, "infra_failures": 0}
    afresh |= {f"eval_{key}": value for key, value in afresh.items()}
    if not run.is_trained():  # else it failed at being scored, and its training stays over
        afresh |= {"phase": "waiting", "cause": "retry was asked for"}
    run.update_status(attempts_without_progress=0, **afresh)
