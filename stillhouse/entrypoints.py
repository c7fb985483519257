"""Implement the entry points that start and end a run: train.py, eval.py, a worker, a pod.

Everything that can be checked without torch is checked first: a run that is already done exits with
0 before the heavy imports. The cause that ends a run is written to its status.json, so that no run
ends without a record.

In a pod (pod.py), `--spec JSON` stands in place of words, and environment variables say more.
STILLHOUSE_IN_POD: this is a pod. STILLHOUSE_ID and STILLHOUSE_CODE: the configuration and the code
that it was made for. STILLHOUSE_EXIT_FILE: the file to which each process appends how it ended, and
an evaluation what became of its rows. STILLHOUSE_FETCH: training, or a preflight, may download what
it needs before it begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from filelock import Timeout

from stillhouse import compatibility, packaged_prompts, preflight_rules
from stillhouse.compose import data_file, from_arguments, help_text
from stillhouse.errors import (
    AGAIN,
    DONE,
    STOPPED,
    ConfigError,
    ContractError,
    Interrupted,
    NoProgress,
    StillhouseError,
    exit_code_of,
)
from stillhouse.files import check_directory
from stillhouse.identity import eval_id, point_id
from stillhouse.local_models import require_libraries
from stillhouse.pod import tell
from stillhouse.rundir import (
    Json,
    Runs,
    code_identity,
    link_path,
    make_directory,
    now,
    sweep_leftovers,
    version,
    write_json,
)
from stillhouse.sources import differences, drift, refusal, sources_of
from stillhouse.spec import EvalSpec, TrainSpec
from stillhouse.stop import StopFlag

PROMPTS = 64  # that a preflight asks, if not told otherwise
# How many pods of one Job in a row may end without completing a new step. Evictions and exit code
# 85 do not count as attempts of a Job; beyond this number one is counted, so that the site's
# retries limit them too.
ATTEMPTS_WITHOUT_PROGRESS = 3


def train_main(argv: list[str]) -> int:
    """The exit code of `train.py` with these words."""
    if _is_answered(argv, "train.py", TrainSpec):
        return 0

    def work() -> int:
        spec = from_arguments(argv, TrainSpec)
        _check_made_for(point_id(spec))
        if os.environ.get("STILLHOUSE_FETCH"):
            _fetch(spec)
        return train(spec)

    return _reported(work)


def eval_main(argv: list[str]) -> int:
    """The exit code of `eval.py` with these words."""
    if _is_answered(argv, "eval.py", EvalSpec):
        return 0

    def work() -> int:
        spec = from_arguments(argv, EvalSpec)
        _check_made_for(eval_id(spec))
        return evaluate(spec, is_typed=not _is_in_pod())

    return _reported(work)


def _is_answered(argv: list[str], script: str, spec_type: type[TrainSpec | EvalSpec]) -> bool:
    """Print the help, or the version, where that is what is asked."""
    if asks_help := bool({"--help", "-h"} & {*argv}):
        print(help_text(script, spec_type))
    elif "--version" in argv:
        print(version())
    return asks_help or "--version" in argv


def prepare_main(argv: list[str]) -> int:
    """The exit code of `stillhouse prepare` with these words: eval.py's, --fetch, --no-scores."""
    options = {"--fetch", "--no-scores"}
    words = [word for word in argv if word not in options]

    def work() -> int:
        spec = from_arguments(words, EvalSpec)
        _check_made_for(None)
        return prepare(spec, fetches="--fetch" in argv, scores="--no-scores" not in argv)

    return _reported(work)


def preflight_main(argv: list[str]) -> int:
    """The exit code of `stillhouse preflight` with these words: 0 likely, 3 unlikely, 4 unsure."""
    parser = argparse.ArgumentParser("stillhouse preflight", add_help=False, allow_abbrev=False)
    parser.add_argument("--prompts", type=_count, default=PROMPTS)
    parser.add_argument("--pilot", type=_count, default=None)
    parser.add_argument(
        "--prefixes", type=lambda words: tuple(map(_count, words.split(","))), default=()
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--backend", choices=["local", "cluster"], default="local")
    parser.add_argument("--dry-run", action="store_true")

    def work() -> int:
        options, words = _parsed(parser, argv)
        spec = from_arguments(words, TrainSpec)
        if options.backend == "cluster":
            from stillhouse.sweep.cluster.submit import send

            asked = [f"--prompts={options.prompts}"]
            asked += [f"--pilot={options.pilot}"] if options.pilot else []
            behind = ",".join(map(str, options.prefixes))
            asked += [f"--prefixes={behind}"] if behind else []
            line = [spec.pair.pair_name, *words]
            return send("preflight", line, options.dry_run, options.json, asked)
        if options.dry_run:
            raise ConfigError("stillhouse preflight: --dry-run prints a Job: --backend cluster")
        _check_made_for(None)
        if os.environ.get("STILLHOUSE_FETCH"):
            _fetch(spec)
        found = look(spec, options.prompts, options.pilot, options.prefixes)
        print(
            json.dumps(found, indent=1) if options.json else preflight_rules.as_text(found),
            flush=True,
        )
        # In a pod a verdict is what the Job was for, whatever it is: nothing to be retried.
        return DONE if _is_in_pod() else preflight_rules.EXIT_CODES[found["verdict"]]

    return _reported(work)


def teacher_main(argv: list[str]) -> int:
    """The exit code of `stillhouse teacher` with these words: it serves until told to stop."""

    def work() -> int:
        spec = from_arguments(["teacher_at=server", *argv], TrainSpec)
        _look_first(spec)
        _say_what_takes_long()
        from stillhouse.distill.teacher_server import serve_at_url

        return serve_at_url(spec)

    return _reported(work)


def _count(word: str) -> int:
    if not word.isascii() or not word.isdigit() or int(word) < 2:
        raise argparse.ArgumentTypeError(f"{word}: a whole number of 2 or more is wanted")
    return int(word)


def _parsed(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{parser.prog}: {message}; `{parser.prog} --help` shows what there is")

    parser.error = refuse
    return parser.parse_known_args(argv)


def look(spec: TrainSpec, prompts: int, pilot: int | None, prefixes: tuple[int, ...] = ()) -> Json:
    """Measure a pair before it is trained; the result is kept below runs/ and returned.

    What the same code has measured in the same way, of the same weights and rows, is not measured
    again.
    """
    rules = preflight_rules.rules_of(data_file("preflight"), "conf/preflight.yaml")
    cache_dir = Path(spec.place.cache_dir)
    runs = _runs_of(spec)
    file = runs.verdict_file(spec.pair.pair_name, preflight_rules.key_of(spec))
    how = {"prompts": prompts, "pilot": pilot, "code": code_identity()["digest"]}
    how |= {"prefixes": list(prefixes)} if prefixes else {}
    before = runs.verdict(spec.pair.pair_name, preflight_rules.key_of(spec))
    is_known = before is not None and before.get("measured") == how and "sources" in before
    if before and is_known and not differences(before["sources"], sources_of(spec, cache_dir)):
        found: Json = {key: before[key] for key in ("numbers", "facts", "sources", "created")}
    else:
        _look_first(spec)
        make_directory(runs.root, "--runs")
        stop = _stop()
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the answer's
            _say_what_takes_long()
            from stillhouse.distill.preflight import preflight

            found = preflight(spec, prompts, pilot, stop, prefixes) | {"created": now()}
    whole = preflight_rules.judged(rules, spec, found) | found | {"measured": how}
    sweep_leftovers(file.parent)
    write_json(file, whole)
    return whole


def _reported(work: Callable[[], int]) -> int:
    """The exit code of `work`; reported to pod.py with the cause, as torchrun hides both."""

    def told() -> int:
        try:
            code = work()
        except StillhouseError as error:
            tell(code=error.exit_code, rank=_rank(), cause=f"{type(error).__name__}: {error}")
            raise
        except Exception as error:
            last = traceback.format_exception_only(error)[-1].strip()
            tell(code=1, rank=_rank(), cause=last)
            raise
        tell(code=code, rank=_rank(), cause=None)
        return code

    return exit_code_of(told)


def _check_made_for(found: str | None) -> None:
    """Raises ConfigError in a pod that was made for other code, or another configuration."""
    code, id_ = os.environ.get("STILLHOUSE_CODE"), os.environ.get("STILLHOUSE_ID")
    if code and code != code_identity()["digest"]:
        raise ConfigError(
            f"this pod was made for code {code}, here is {code_identity()['digest']}: another"
            " image or bundle; submit it again"
        )
    if id_ and found and id_ != found:
        raise ConfigError(
            f"this pod was made for {id_}, its words mean {found} here: conf/ or the code differs"
            " from the launcher's; submit it again"
        )


def _runs_of(spec: TrainSpec | EvalSpec) -> Runs:
    """The directory of runs; raises ConfigError where none can be."""
    check_directory(Path(spec.place.runs), "--runs")
    return Runs(Path(spec.place.runs))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _is_in_pod() -> bool:
    return bool(os.environ.get("STILLHOUSE_IN_POD"))


def _fetch(spec: TrainSpec) -> None:
    from stillhouse.distill.hub import fetch, stay_offline

    if spec.place.sources == "new" or not _runs_of(spec).of(spec).is_trained():
        fetch(spec.pair, spec.data, Path(spec.place.cache_dir), spec.place.commits)
    stay_offline()


def train(spec: TrainSpec) -> int:
    """Train one point to its end, or go on with it; 0 when its adapter is there.

    Under `accelerate launch` only rank 0 touches the run's files; the others follow.

    Raises:
        ContractError: what lies there rests on other weights or rows than are here now.
    """
    rank = _rank()
    runs = _runs_of(spec)
    run = runs.of(spec)
    # Refuses a directory of another version or content before anything is written.
    found = drift(run, spec, sources_of(spec, Path(spec.place.cache_dir)))
    if found and spec.place.sources != "new":
        raise ContractError(refusal(run, found))
    is_done = run.is_trained() and not found
    if not is_done:
        _look_first(spec)
        make_directory(runs.root, "--runs")
    if rank == 0:
        if spec.place.name:
            runs.link_name(spec.place.name, run)
        if spec.place.output_dir:
            link_path(Path(spec.place.output_dir), run.path)
    if is_done:
        if rank == 0:
            print(f"{run.path}: done already; nothing to do", flush=True)
        return 0
    _say_what_takes_long()
    if rank != 0:
        from stillhouse.distill.run import train_run

        return train_run(spec, run, _stop())
    try:
        with run.lock():
            # The process that held the lock may have started the run over, or finished it.
            if found and drift(run, spec, sources_of(spec, Path(spec.place.cache_dir))):
                print(f"{'; '.join(found)}: {run.path} begins anew", flush=True)
                print(f"what lay there is kept in {run.set_aside()}", flush=True)
            return 0 if run.is_trained() else _attempt(spec, run)
    except Timeout as error:
        said = f"{run.path}: another process trains this run now"
        # On a volume its node may be lost, and then the lock will be released some day.
        raise (Interrupted if _is_in_pod() else ContractError)(said) from error


def _look_first(spec: TrainSpec | EvalSpec) -> None:
    """Report what is missing before anything slow is loaded, or anything is written.

    Raises:
        ConfigError: libraries, weights or a data set that are not here. DataError: no such rows.
        ContractError: files of a model that do not fit one another.
    """
    require_libraries([spec])
    from stillhouse.distill import pairs, prompts

    pairs.require(spec.pair, Path(spec.place.cache_dir), spec.place.commits)
    compatibility.check([spec])
    if isinstance(spec, TrainSpec) and spec.data.data_source != "generated":
        prompts.rows_at_hand(spec.data, Path(spec.place.cache_dir), spec.place.commits)


def _say_what_takes_long() -> None:
    if "torch" not in sys.modules and _rank() == 0:
        print("loading torch …", flush=True)


def _stop() -> StopFlag:
    stop = StopFlag()
    stop.install()
    return stop


def _attempt(spec: TrainSpec, run: Any) -> int:
    before = run.status()
    job = os.environ.get("STILLHOUSE_JOB")  # uid of the pod's Job; a new Job is a new request
    idle = before.get("attempts_without_progress", 0) if before.get("job") == job else 0
    if _is_in_pod() and idle >= ATTEMPTS_WITHOUT_PROGRESS:
        last = before.get("cause") or "ended without a word"
        said = (
            f"{idle} pods in a row ended before they completed a step (the last one: {last}); this"
            f" one is charged to site.infra_retries; see {run.log_file}"
        )
        run.update_status(
            phase="waiting", exit_code=NoProgress.exit_code, cause=said, finished=now(),
            attempts_without_progress=0,
        )  # fmt: skip
        raise NoProgress(said)
    stop = _stop()
    for place in (run.path, run.checkpoints, run.path / "eval"):
        sweep_leftovers(place)
    run.update_status(
        phase="starting",
        attempt=before.get("attempt", 0) + 1,
        job=job,
        # Counted before the attempt and reset by its first new step, so that a kill cannot hide it.
        attempts_without_progress=idle + 1,
        started=now(),
        finished=None,
        exit_code=None,
        cause=None,
        # This attempt's rules find these again, in the logged metrics.
        stopped_by=None,
        warnings=None,
        pid=os.getpid(),
    )
    try:
        from stillhouse.distill.run import train_run

        code = train_run(spec, run, stop)
    except StillhouseError as error:
        cause = f"{type(error).__name__}: {error}"
        if error.exit_code == STOPPED or (error.exit_code == AGAIN and not _is_in_pod()):
            # A rule's stop and a user's Ctrl-C are not failures. But a cluster that stops a run
            # before it completes a step would do so forever, at the cost of other users.
            after = run.status().get("attempts_without_progress", 0)
            run.update_status(attempts_without_progress=min(idle, after))
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


def evaluate(spec: EvalSpec, is_typed: bool = False) -> int:
    """Score what the spec asks for and print the table; finished scores are not computed again."""
    from stillhouse.evals import find

    runs = _runs_of(spec)
    adapters = find.adapters(spec, runs)
    # Who typed it is told at once; a launcher wants the baselines scored all the same.
    if is_typed and adapters.gone and not adapters.found:
        raise ConfigError("; ".join(adapters.gone.values()))
    _look_first(spec)
    make_directory(runs.root, "--runs")
    stop = _stop()  # before the imports: they take ten seconds, in which a stop may be requested
    _say_what_takes_long()
    if spec.data.data_source == "packaged":
        said = packaged_prompts.overlap(spec.data.data_path, spec.suite, Path(spec.place.cache_dir))
        print(f"data {spec.data.data_name}: {said}", flush=True)
    from stillhouse.evals.harness import run_suite

    return run_suite(spec, adapters, stop)


def prepare(spec: EvalSpec, fetches: bool, scores: bool) -> int:
    """Make, find or (if `fetches`) download what training and scoring need; 0.

    Raises:
        ConfigError: what is needed is not here, and cannot be downloaded.
        ConnectionError: the hub cannot be reached; try again.
    """
    compatibility.check([spec])
    cache_dir = Path(spec.place.cache_dir)
    make_directory(cache_dir, "--cache-dir")
    from stillhouse.distill import hub, pairs, prompts
    from stillhouse.distill.loading import tokenizer

    if fetches:
        hub.fetch(spec.pair, spec.data, cache_dir, spec.place.commits)
        compatibility.check([spec])
    prepared = pairs.prepare(spec.pair, spec.quant, cache_dir, spec.place.commits)
    prompts.encode_rows(spec, prepared, tokenizer(prepared.student, prepared.student_revision))
    if scores:
        from stillhouse.evals.harness import load_suite

        packaged_prompts.check_apart(vars(spec.data), spec.suite, "stillhouse prepare")
        load_suite(spec.suite, prepared.data_dir, cache_dir, fetches)
    return DONE
