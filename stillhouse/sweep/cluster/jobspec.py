"""Describe one task for a cluster by its content: its name, its hash and its command line.

A step is pure content: what is to be done (`words`, as the command line of the entry point that the
pod runs), and what follows from that alone (`name`, `hash`). Two launchers that request the same
task make the same step, so the second is told that its Job exists. Nothing here knows Kubernetes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from stillhouse.compose import (
    OWN_PAIR,
    Overrides,
    as_command_line,
    compose,
    from_command_line,
    options_of,
)
from stillhouse.errors import ConfigError
from stillhouse.identity import (
    as_before,
    baseline_key,
    digest,
    eval_digest,
    suite_content,
    suite_key,
    to_plain,
    versioned,
)
from stillhouse.rundir import RunDir, Runs, directory_name
from stillhouse.spec import (
    ID_DIGITS,
    MAX_NAME,
    DataSpec,
    EvalSpec,
    PairSpec,
    QuantSpec,
    SuiteSpec,
    TrainSpec,
)
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Point, Sweep
from stillhouse.tasks import IN_BUNDLE

Kind = Literal["prepare", "train", "eval", "preflight", "drive", "collect", "push"]

RUNS, CACHE, SWEEP = "/runs", "/cache", "/sweep"  # where a pod finds its volumes
PLACES = (f"runs={RUNS}", f"cache_dir={CACHE}")
BASELINES = ("teacher", "student", "ptq")
COLLECT_S = 900  # how long a collector waits for the next request before it ends


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """One future Job: what it does, and which points it is about."""

    kind: Kind
    name: str  # a DNS label of at most 52 characters: <slug>-<the hash's first ten digits>
    hash: str  # sha256 in hex of what the step is about
    words: tuple[str, ...]  # command line of the entry point in the pod
    processes: int  # devices asked for
    points: tuple[str, ...]  # ids it is about
    baselines: tuple[str, ...] = ()  # names of the baseline directories that an evaluation scores
    sweep: str | None = None
    names: tuple[str, ...] = ()  # what people call it
    tags: tuple[str, ...] = ()
    scores: str | None = None  # of an evaluation: the suite's key, under which scores are kept
    log: str = ""  # file below /runs to which the pod's output is appended
    fetch: bool = False  # may download and prepare first: the one Job of k8s/train.sh
    sweep_file: str | None = None  # of a driver: the ConfigMap that holds the sweep's file

    @property
    def id(self) -> str:
        """The ten digits at the end of its name."""
        return self.hash[:ID_DIGITS]


def train_step(point: Point, sweep: Sweep, fetch: bool = False) -> JobSpec:
    """Train one point."""
    name = directory_name(point.slug, point.id)
    return JobSpec(
        kind="train",
        name=name,
        hash=digest(versioned(point.spec)),
        words=(*point.words, *_of_sweep(point.spec, sweep, not fetch), *PLACES),
        processes=point.spec.training.num_processes,
        points=(point.id,),
        sweep=sweep.name,
        names=(point.name,) if point.name else (),
        tags=point.tags,
        log=str(RunDir(Path(name)).log_file),
        fetch=fetch,
    )


def _of_sweep(spec: TrainSpec, sweep: Sweep, is_grouped: bool) -> list[str]:
    """What a point is told of its sweep: commits, and a group where its runs are tracked."""
    is_grouped = is_grouped and spec.tracking.tracker != "none"
    new = {"place.sweep": sweep.name} if is_grouped else {}
    given = dict(spec.place.commits) == dict(sweep.commits)
    return [*as_command_line(Overrides({}, new)), *(() if given else pinning(sweep))]


def pinning(sweep: Sweep) -> list[str]:
    """The words by which a pod takes the same commits as all others of the sweep."""
    new = {"place.commits": {**sweep.commits}} if sweep.commits else {}
    return as_command_line(Overrides({}, new))


def prepare_step(point: Point, suite: SuiteSpec | None, sweep: Sweep) -> JobSpec:
    """Put into the cache what the points of one group need: pair, prompts, and tasks to score.

    `point`: any of the group. `suite`: None where nothing is scored.
    """
    spec = point.spec
    subject = _subject(spec.pair, spec.quant, spec.data, _in_pod(suite))
    words = (*subject, *pinning(sweep), *PLACES, "--fetch")
    plain = to_plain(spec)
    parts = [as_before(name, plain[name]) for name in ("pair", "quant", "data")]
    # What was prepared of one commit is not there of another.
    commits = [dict(sorted(sweep.commits.items()))] if sweep.commits else []
    content = digest(["prepare", *parts, suite and suite_content(suite), *commits])
    name = _name(f"prepare-{spec.pair.pair_name}", content)
    return JobSpec(
        kind="prepare",
        name=name,
        hash=content,
        words=words if suite else (*words, "--no-scores"),
        processes=0,
        points=(),
        sweep=sweep.name,
        log=_log(sweep.name, name),
    )


def eval_step(points: Sequence[Point], baselines: Sequence[str], sweep: Sweep) -> JobSpec:
    """Score some points of one group, and the baselines whose directories are named."""
    first, suite = points[0].spec, sweep.suite
    assert suite is not None, "a sweep that scores nothing asks for no evaluation"
    same = {(p.spec.pair, p.spec.quant, p.spec.data) for p in points}
    assert same == {(first.pair, first.quant, first.data)}, "one evaluation, one group"
    labels = {name.rpartition("-")[0] for name in baselines}
    directories = [f"{RUNS}/{directory_name(p.slug, p.id)}" for p in points]
    asked = {f"evaluation.eval_{label}": label in labels for label in BASELINES}
    values: dict[str, Any] = {"evaluation.lora_paths": directories, **asked}
    if first.place.threads is not None:
        values["place.threads"] = first.place.threads
    words = _subject(first.pair, first.quant, first.data, _in_pod(suite))
    spec = _composed(words)
    evaluation = dataclasses.replace(
        spec.evaluation,
        lora_paths=tuple(directories),
        eval_teacher="teacher" in labels,
        eval_student="student" in labels,
        eval_ptq="ptq" in labels,
    )
    step = _eval_step(
        dataclasses.replace(spec, evaluation=evaluation),
        (*words, *as_command_line(Overrides({}, values)), *pinning(sweep)),
        sweep.name,
    )
    return dataclasses.replace(
        step, points=tuple(point.id for point in points), baselines=tuple(baselines)
    )


def eval_line_step(name: str, overrides: Overrides) -> JobSpec:
    """Score what a line of k8s/eval.sh asks for; `name` is what people call it, and no more.

    `dump/NAME` stays as it was typed: what it means, the pod finds out on the volume.
    """
    kept = {
        key: value
        for key, value in overrides.values.items()
        if not key.startswith("place.") or key == "place.threads"
    }
    overrides = Overrides(overrides.groups, kept)
    spec = compose(overrides, EvalSpec)
    if spec.suite.include_path is not None:
        kept |= {"suite.include_path": IN_BUNDLE, "suite.tasks": _tasks(spec.suite)}
        overrides = Overrides(overrides.groups, kept)
    step = _eval_step(spec, tuple(as_command_line(overrides)), None)
    evaluation, quant = spec.evaluation, spec.quant
    asked = {
        "teacher": evaluation.eval_teacher,
        "student": evaluation.eval_student,
        "ptq": evaluation.eval_ptq and quant.quant_type != "none",
    }
    baselines = (
        directory_name(label, baseline_key(label, spec.pair, quant, spec.data))
        for label, is_asked in asked.items()
        if is_asked
    )
    return dataclasses.replace(step, names=(name,), baselines=tuple(baselines))


def preflight_step(name: str, overrides: Overrides, options: Sequence[str]) -> JobSpec:
    """Look at a pair before it is trained; `name` is what people call it, and no more.

    `options`: the entry point's own, as `--prompts=64`.
    """
    kept = {key: value for key, value in overrides.values.items() if not key.startswith("place.")}
    overrides = Overrides(overrides.groups, kept)
    spec = compose(overrides, TrainSpec)
    content = digest(["preflight", versioned(spec), [*options]])
    named = _name(f"preflight-{spec.pair.pair_name}", content)
    return JobSpec(
        kind="preflight",
        name=named,
        hash=content,
        words=(*as_command_line(overrides), *PLACES, *options),
        processes=1,
        points=(),
        names=(name,),
        log=_log(None, named),
        fetch=True,
    )


def _eval_step(spec: EvalSpec, words: Sequence[str], sweep: str | None) -> JobSpec:
    content = eval_digest(spec)
    name = _name(f"eval-{spec.pair.pair_name}-{spec.quant.quant_type}", content)
    return JobSpec(
        kind="eval",
        name=name,
        hash=content,
        words=(*words, *PLACES),
        processes=1,
        points=(),
        sweep=sweep,
        scores=suite_key(spec.suite),
        log=_log(sweep, name),
    )


class JobSpecs:
    """Maps the actions of one sweep to steps."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.first = {point.group: point for point in reversed(sweep.points)}

    def of(self, action: Action) -> JobSpec:
        """The step that an action stands for."""
        if action.kind == "prepare":
            return prepare_step(self.first[action.group], self.sweep.suite, self.sweep)
        points = [self.sweep.by_id[id_] for id_ in action.points]
        if action.kind == "train":
            return train_step(points[0], self.sweep)
        return eval_step(points, [directory.name for directory in action.baselines], self.sweep)


def drive_step(sweep: Sweep, file: bytes | None, options: Sequence[str] = ()) -> JobSpec:
    """Drive a sweep from inside the cluster: the same `run`, of the same words.

    `file`: content of the sweep's file, None for a grid that was typed. `options`: the launcher's
    own that were typed besides (`--point=x`).

    Raises:
        ConfigError: the file's name cannot be one in the pod.
    """
    target: tuple[str, ...] = ()
    if file is not None:
        base = Path(cast("str", sweep.file)).name
        if not re.fullmatch(r"[-._a-zA-Z0-9]{1,200}", base):
            raise ConfigError(
                f"{sweep.file}: letters, digits, dot, dash and underscore make the name of a file"
                " that is taken along; rename it"
            )
        target = (f"{SWEEP}/{base}",)
    is_own = sweep.suite is not None and sweep.suite.include_path is not None
    tasks = (f"include_path={IN_BUNDLE}",) if is_own else ()
    # Inside, the user is the pod's and there is no kubeconfig: whose Jobs these are is said here.
    here = {"site.owner": sweep.site.owner, "site.kube_context": None, "site.namespace": None}
    words = (
        "run", *target, *sweep.words, *options, "--backend=cluster", *PLACES, *tasks,
        *as_command_line(Overrides({}, here)),
    )  # fmt: skip
    content = digest(["drive", words, hashlib.sha256(file or b"").hexdigest()])
    name = _name(f"drive-{sweep.name}", content)
    return JobSpec(
        kind="drive",
        name=name,
        hash=content,
        words=words,
        processes=0,
        points=(),
        sweep=sweep.name,
        log=_log(sweep.name, name),
        sweep_file=f"stillhouse-{name}" if target else None,
    )


def collect_step(sweep: str, key: str, seconds: int = COLLECT_S) -> JobSpec:
    """Mount the volume of runs, for a launcher that fetches results.

    `key` distinguishes two collectors of one sweep; it ends after `seconds` without a request.
    """
    content = digest(["collect", sweep, key])
    name = _name(f"collect-{sweep}", content)
    return JobSpec("collect", name, content, (str(seconds),), 0, (), sweep=sweep)


def push_step(name: str, key: str, seconds: int = COLLECT_S) -> JobSpec:
    """Mount the cache volume, for a push; `key` and `seconds` as for a collector."""
    content = digest(["push", name, key])
    return JobSpec("push", _name(f"push-{name}", content), content, (str(seconds),), 0, ())


def refuse_collisions(steps: Iterable[JobSpec]) -> None:
    """Refuse two different steps of one name, which only shortening can bring about.

    Raises:
        ConfigError: there are two; both are named.
    """
    seen: dict[str, JobSpec] = {}
    for step in steps:
        other = seen.setdefault(step.name, step)
        if other.hash != step.hash:
            raise ConfigError(
                f"two Jobs would be named {step.name}: {' '.join(other.words)}; and"
                f" {' '.join(step.words)}. Change a knob of one of them, or run them one by one"
            )


def _name(readable: str, content: str) -> str:
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in readable.lower())
    return f"{label[: MAX_NAME - ID_DIGITS - 1].strip('-')}-{content[:ID_DIGITS]}"


def _log(sweep: str | None, name: str) -> str:
    """One file per Job: no two pods append to one over a network."""
    return str(Runs(Path()).sweep_log(f"{sweep}.{name}" if sweep else name))


def _in_pod(suite: SuiteSpec | None) -> SuiteSpec | None:
    """The suite, its own tasks where a pod finds their files."""
    if suite is None or suite.include_path is None:
        return suite
    return dataclasses.replace(suite, include_path=IN_BUNDLE)


def _tasks(suite: SuiteSpec) -> list[Any]:
    """A suite's tasks in full, as words say them."""
    return suite_content(suite)["tasks"]


@functools.lru_cache(maxsize=256)
def _subject(
    pair: PairSpec, quant: QuantSpec, data: DataSpec, suite: SuiteSpec | None
) -> tuple[str, ...]:
    """Words that compose to exactly this pair, quantizer, data and suite.

    Raises:
        ConfigError: a value that no word can say.
    """
    wanted: dict[str, Any] = {"pair": pair, "quant": quant, "data": data}
    if suite is not None:
        wanted["suite"] = suite
    options = {"pair": pair.pair_name, "quant": quant.quant_type, "data": data.data_name}
    options |= {"suite": suite.suite_name} if suite else {}
    groups = {group: name for group, name in options.items() if name in options_of(group)}
    groups.setdefault("pair", OWN_PAIR)
    # Neither has a value of its own there, so without one it does not compose.
    values: dict[str, Any] = {}
    if data.data_source == "local":
        values["data.data_path"] = data.data_path
    if groups["pair"] == OWN_PAIR:
        values |= {"pair.student": pair.student, "pair.teacher": pair.teacher}
    if suite is not None and suite.include_path is not None:
        values |= {"suite.include_path": suite.include_path, "suite.tasks": _tasks(suite)}
    plain = compose(Overrides(groups, values), EvalSpec)
    for section, want in wanted.items():
        for field in dataclasses.fields(want):
            value = getattr(want, field.name)
            if getattr(getattr(plain, section), field.name) != value:
                if suite is not None and field.name == "tasks":
                    value = _tasks(suite)
                values[f"{section}.{field.name}"] = value
    words = tuple(as_command_line(Overrides(groups, values)))
    try:
        composed = _composed(words)
        unsaid = [name for name, want in wanted.items() if getattr(composed, name) != want]
    except ConfigError:  # a text that the grammar of words cannot quote
        unsaid = [key.partition(".")[0] for key in values]
    if unsaid:
        raise ConfigError(
            f"no command line says this {unsaid[0]} ({' '.join(words)}); write it as a file of"
            f" conf/{unsaid[0]} and choose that"
        )
    return words


@functools.lru_cache(maxsize=256)
def _composed(words: tuple[str, ...]) -> EvalSpec:
    return compose(from_command_line(list(words), EvalSpec), EvalSpec)
