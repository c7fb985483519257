"""This file is where a run or an evaluation begins and ends: train.py, eval.py, a worker.

Everything that can be said without torch is said first: a run that finds itself done exits 0 before
the heavy imports. What ends a run is written into its status.json, so that nothing dies unseen.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

from filelock import Timeout

from stillhouse.compose import compose, from_command_line, help_text
from stillhouse.errors import (
    AGAIN,
    ContractError,
    Diverged,
    StillhouseError,
    exit_code_of,
)
from stillhouse.rundir import Runs, link_path, now
from stillhouse.spec import EvalSpec, TrainSpec
from stillhouse.stop import StopFlag

# Attempts in a row that may end without one completed step more than before (then exit 43).
ATTEMPTS_WITHOUT_PROGRESS = 3


def train_main(argv: list[str]) -> int:
    """The exit code of `train.py` with these words."""
    if {"--help", "-h"} & {*argv}:
        print(help_text("train.py", TrainSpec))
        return 0
    return exit_code_of(lambda: train(compose(from_command_line(argv, TrainSpec), TrainSpec)))


def eval_main(argv: list[str]) -> int:
    """The exit code of `eval.py` with these words."""
    if {"--help", "-h"} & {*argv}:
        print(help_text("eval.py", EvalSpec))
        return 0
    return exit_code_of(lambda: evaluate(compose(from_command_line(argv, EvalSpec), EvalSpec)))


def train(spec: TrainSpec) -> int:
    """Train one point to its end, or go on with it; 0 when its adapter is there.

    Under `accelerate launch` only rank 0 touches the run's files; the others follow.
    """
    rank = int(os.environ.get("RANK", "0"))
    runs = Runs(Path(spec.place.runs))
    run = runs.of(spec)
    run.record()  # refuses a directory of another version or content before anything is written
    if rank == 0:
        if spec.place.name:
            runs.link_name(spec.place.name, run)
        if spec.place.output_dir:
            link_path(Path(spec.place.output_dir), run)
    if run.is_trained():
        if rank == 0:
            print(f"{run.path}: done already; nothing to do", flush=True)
        return 0
    if rank != 0:
        from stillhouse.distill.run import train_run

        return train_run(spec, run, _stop())
    try:
        with run.lock():
            # Whoever held it while we waited may have finished the run.
            return 0 if run.is_trained() else _attempt(spec, run)
    except Timeout as error:
        raise ContractError(f"{run.path}: another process trains this run now") from error


def _stop() -> StopFlag:
    stop = StopFlag()
    stop.install()
    return stop


def _attempt(spec: TrainSpec, run: Any) -> int:
    before = run.status()
    idle = before.get("attempts_without_progress", 0)
    if idle >= ATTEMPTS_WITHOUT_PROGRESS:
        raise Diverged(
            f"{run.path}: {idle} attempts in a row ended before they completed a step"
            f" (last cause: {before.get('cause')}); see {run.log_file}, then `stillhouse retry` it"
        )
    run.update_status(
        phase="starting",
        attempt=before.get("attempt", 0) + 1,
        # Counted before the attempt, taken back by its first new step: a kill cannot hide it.
        attempts_without_progress=idle + 1,
        started=now(),
        finished=None,
        exit_code=None,
        cause=None,
        pid=os.getpid(),
    )
    stop = _stop()
    try:
        from stillhouse.distill.run import train_run

        code = train_run(spec, run, stop)
    except StillhouseError as error:
        cause = f"{type(error).__name__}: {error}"
        if error.exit_code == AGAIN:  # being asked to stop is nobody's failure
            run.update_status(attempts_without_progress=idle)
        run.update_status(
            phase="waiting" if error.exit_code == AGAIN else "failed",
            finished=now(),
            exit_code=error.exit_code,
            cause=cause,
        )
        raise
    except BaseException as error:
        last = traceback.format_exception_only(error)[-1].strip()
        run.update_status(phase="failed", finished=now(), exit_code=1, cause=last)
        raise
    run.update_status(phase="done", finished=now(), exit_code=code, attempts_without_progress=0)
    return code


def evaluate(spec: EvalSpec) -> int:
    """Score what the spec asks for and print the table; finished scores are not computed again."""
    stop = _stop()  # before the imports: they take ten seconds in which somebody may ask
    from stillhouse.evals.harness import run_suite

    return run_suite(spec, stop)
