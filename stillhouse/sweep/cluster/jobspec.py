"""Describe one task for a cluster by its content: its name, its hash, its words and its spec.

A step is pure content: what is to be done (`words` and `spec`, for the entry point that the pod
runs), and what follows from that alone (`name`, `hash`). Two launchers that request the same task
make the same step, so the second is told that its Job exists. Nothing here knows Kubernetes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, cast

from stillhouse.compose import (
    Overrides,
    Spec,
    as_command_line,
    compose,
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
    EvalSpec,
    TrainSpec,
)
from stillhouse.sweep.commits import placed
from stillhouse.sweep.driver import eval_spec
from stillhouse.sweep.plan import Action, Situation, actions
from stillhouse.sweep.points import Point, Sweep
from stillhouse.sweep.state import Observation
from stillhouse.tasks import IN_BUNDLE
from stillhouse.text import shell_line

Kind = Literal["prepare", "train", "eval", "preflight", "drive", "collect", "push"]

RUNS, CACHE, SWEEP = "/runs", "/cache", "/sweep"  # where a pod finds its volumes
PLACES = (f"runs={RUNS}", f"cache_dir={CACHE}")
COLLECT_S = 900  # how long a collector waits for the next request before it ends


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """One future Job: what it does, and which points it is about."""

    kind: Kind
    name: str  # a DNS label of at most 52 characters: <slug>-<the hash's first ten digits>
    hash: str  # sha256 in hex of what the step is about
    words: tuple[str, ...]  # arguments of the entry point in the pod, before the spec
    processes: int  # devices asked for
    points: tuple[str, ...]  # ids it is about
    spec: TrainSpec | EvalSpec | None = None  # what the entry point works on, as it is in the pod
    typed: tuple[str, ...] = ()  # words that compose to the spec, where somebody has typed some
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
    name, place = point.directory, placed(point.spec, sweep).place
    if fetch or point.spec.tracking.tracker == "none":  # else its runs are a group there
        place = dataclasses.replace(place, sweep=point.spec.place.sweep)
    return JobSpec(
        kind="train",
        name=name,
        hash=digest(versioned(point.spec)),
        words=(),
        processes=point.spec.training.num_processes,
        points=(point.id,),
        spec=_in_pod(dataclasses.replace(point.spec, place=place)),
        typed=(*point.words, *PLACES),
        sweep=sweep.name,
        names=(point.name,) if point.name else (),
        tags=point.tags,
        log=str(RunDir(Path(name)).log_file),
        fetch=fetch,
    )


def prepare_step(point: Point, sweep: Sweep) -> JobSpec:
    """Put into the cache what the points of one group need: pair, prompts, and tasks to score.

    `point`: any of the group.
    """
    plain, suite = to_plain(point.spec), sweep.suite
    parts = [as_before(name, plain[name]) for name in ("pair", "quant", "data")]
    # What was prepared of one commit is not there of another.
    commits = [dict(sorted(sweep.commits.items()))] if sweep.commits else []
    content = digest(["prepare", *parts, suite and suite_content(suite), *commits])
    name = _name(f"prepare-{point.spec.pair.pair_name}", content)
    return JobSpec(
        kind="prepare",
        name=name,
        hash=content,
        words=("--fetch",) if suite else ("--fetch", "--no-scores"),
        spec=_in_pod(eval_spec(sweep, point, (), ())),
        processes=0,
        points=(),
        sweep=sweep.name,
        log=_log(sweep.name, name),
    )


def eval_step(points: Sequence[Point], baselines: Sequence[str], sweep: Sweep) -> JobSpec:
    """Score some points of one group, and the baselines whose directories are named."""
    assert len({point.group for point in points}) == 1, "one evaluation, one group"
    labels = {name.rpartition("-")[0] for name in baselines}
    spec = eval_spec(sweep, points[0], labels, (f"{RUNS}/{point.directory}" for point in points))
    return dataclasses.replace(
        _eval_step(spec, sweep.name),
        points=tuple(point.id for point in points),
        baselines=tuple(baselines),
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
    step = _eval_step(spec, None)
    evaluation, quant = spec.evaluation, spec.quant
    rows = {
        "teacher": evaluation.eval_teacher,
        "student": evaluation.eval_student,
        "ptq": evaluation.eval_ptq and quant.quant_type != "none",
    }
    baselines = (
        directory_name(label, baseline_key(label, spec.pair, quant, spec.data))
        for label, is_wanted in rows.items()
        if is_wanted
    )
    typed = (*as_command_line(overrides), *PLACES)
    return dataclasses.replace(step, names=(name,), baselines=tuple(baselines), typed=typed)


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
        words=tuple(options),
        processes=1,
        points=(),
        spec=_in_pod(spec),
        typed=(*as_command_line(overrides), *PLACES, *options),
        names=(name,),
        log=_log(None, named),
        fetch=True,
    )


def _eval_step(spec: EvalSpec, sweep: str | None) -> JobSpec:
    content = eval_digest(spec)
    name = _name(f"eval-{spec.pair.pair_name}-{spec.quant.quant_type}", content)
    return JobSpec(
        kind="eval",
        name=name,
        hash=content,
        words=(),
        processes=1,
        points=(),
        spec=_in_pod(spec),
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
            return prepare_step(self.first[action.group], self.sweep)
        points = [self.sweep.by_id[id_] for id_ in action.points]
        if action.kind == "train":
            return train_step(points[0], self.sweep)
        return eval_step(points, [directory.name for directory in action.baselines], self.sweep)

    def prepares(self) -> dict[str, str]:
        """Name of a Job that prepares a pair -> its group; sweeps of one pair share one."""
        groups = dict.fromkeys(self.sweep.groups.values())
        return {self.of(Action("prepare", group)).name: group for group in groups}

    def all(self) -> list[JobSpec]:
        """All that the sweep takes where nothing is done, in the order in which it starts.

        Raises:
            ConfigError: two of them would have one name.
        """
        groups = self.sweep.groups
        found = [
            *(self.of(Action("prepare", group)) for group in dict.fromkeys(groups.values())),
            *(self.of(Action("train", group, (id_,))) for id_, group in groups.items()),
            *(self.of(action) for action in self._evaluations()),
        ]
        refuse_collisions(found)
        return found

    def _evaluations(self) -> Sequence[Action]:
        """The packs of the sweep when its points were all trained just now."""
        sweep = self.sweep
        if sweep.suite is None:
            return ()
        now = Situation(
            groups=sweep.groups,
            packs={point.id: point.pack for point in sweep.points},
            observations=dict.fromkeys(sweep.groups, Observation("waiting", is_trained=True)),
            baselines=sweep.baselines,
            prepared=dict.fromkeys(sweep.groups.values(), True),
            live=(),
            since=0.0,
        )
        return actions(now, len(sweep.points) + len(sweep.baselines), sweep.pack)


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
                f"two Jobs would be named {step.name}: {_about(other)}; and {_about(step)}. Change"
                " a knob of one of them, or run them one by one"
            )


def _about(step: JobSpec) -> str:
    """What a step does, in the words that were typed, or of what it is."""
    if step.typed:
        return shell_line(step.typed)
    what = [*step.points, *step.baselines] or [step.hash]
    return f"{step.kind} of {', '.join(what)}"


def _name(readable: str, content: str) -> str:
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in readable.lower())
    return f"{label[: MAX_NAME - ID_DIGITS - 1].strip('-')}-{content[:ID_DIGITS]}"


def _log(sweep: str | None, name: str) -> str:
    """One file per Job: no two pods append to one over a network."""
    return str(Runs(Path()).sweep_log(f"{sweep}.{name}" if sweep else name))


def _in_pod(spec: Spec) -> Spec:
    """A spec whose places are a pod's: its volumes, and the code's directory of own tasks."""
    place = dataclasses.replace(spec.place, runs=RUNS, cache_dir=CACHE)
    moved = dataclasses.replace(spec, place=place)
    if isinstance(moved, EvalSpec) and moved.suite.include_path is not None:
        suite = dataclasses.replace(moved.suite, include_path=IN_BUNDLE)
        moved = dataclasses.replace(moved, suite=suite)
    return moved
