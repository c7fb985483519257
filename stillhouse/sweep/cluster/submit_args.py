"""Parse a line of k8s/train.sh or k8s/eval.sh, or of a preflight, into the one Job it describes.

    k8s/train.sh NAME --lmbda 0 …           NAME means this configuration, and no other
    k8s/eval.sh LABEL --lora-paths dump/A   LABEL is only what people call the Job

Pure: no request is made to a cluster, so a dry run needs none. `submit` sends the Job.
"""

from __future__ import annotations

import dataclasses
import functools
import os.path
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from stillhouse.compose import Overrides, as_command_line, compose, from_command_line
from stillhouse.errors import ConfigError
from stillhouse.local_models import SUFFIXES
from stillhouse.rundir import Json
from stillhouse.scores import check_rows
from stillhouse.spec import NAME, EvalJobSpec, EvalSpec, SiteSpec, TrainSpec
from stillhouse.sweep.cluster.code_bundle import Bundle, bundle
from stillhouse.sweep.cluster.jobspec import (
    CACHE,
    RUNS,
    JobSpec,
    eval_line_step,
    preflight_step,
    train_step,
)
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.site import CLUSTER, site_of
from stillhouse.sweep.sweep_file import label
from stillhouse.text import duration

Kind = Literal["train", "eval", "preflight"]
COMMANDS: dict[Kind, str] = {
    "train": "k8s/train.sh",
    "eval": "k8s/eval.sh",
    "preflight": "stillhouse preflight",
}
DOES: dict[Kind, str] = {"train": "trains", "eval": "scores", "preflight": "looks at its pair in"}
# Places that a pod has of its own; on this machine they mean something else.
POD_PLACES = {"place.runs", "place.output_dir", "place.cache_dir"}


@dataclass(frozen=True)
class Line:
    """A parsed line, and the step that it describes."""

    kind: Kind
    name: str
    step: JobSpec
    site: SiteSpec
    differs: tuple[str, ...]  # from the defaults, as words
    spec: TrainSpec | EvalSpec

    @property
    def code(self) -> Bundle:
        """What the pod runs, with the tasks of its suite that are the user's own."""
        return bundle(self.spec.suite if isinstance(self.spec, EvalSpec) else None)

    @functools.cached_property
    def manifest(self) -> Json:
        """The Job as it is sent.

        Raises:
            ConfigError: it holds what no manifest may, or cannot.
        """
        return render(self.step, self.site, self.code.key)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The runs that an evaluation names."""
        return self.spec.evaluation.lora_paths if isinstance(self.spec, EvalSpec) else ()

    def about(self) -> list[str]:
        """What is to be submitted, in a few lines."""
        site, step = self.site, self.step
        asks = [f"{step.processes} {site.gpu_resource}"] if site.gpu_resource else []
        asks += [f"{site.cpu * step.processes:g} cores"]
        asks += [
            f"{site.memory_gib * step.processes:g} GiB",
            f"at most {duration(site.deadline_s)}",
        ]
        asks += [f"queue {site.queue}"] if site.queue else []
        return [
            f"{self.name}: {DOES[self.kind]} {step.name}",
            f"  differs from the defaults by: {' '.join(self.differs) or 'nothing'}",
            f"  asks for: {', '.join(asks)}",
            f"  image {site.image}, code {self.code.key}",
        ]


def read(kind: Kind, name: str | None, words: Sequence[str], options: Sequence[str] = ()) -> Line:
    """The line of these words; `options` are those of the command in the pod.

    Raises:
        ConfigError: no name, a word that is no flag or has no such value; a place of this machine.
    """
    command = COMMANDS[kind]
    first = "LABEL" if kind == "eval" else "NAME"
    if name is None or name.startswith("-") or "=" in name:
        raise ConfigError(
            f"{command}: a name comes first: {command} {first} --knob VALUE …; got"
            f" {name or 'nothing'}"
        )
    if re.fullmatch(NAME, name) is None:
        raise ConfigError(
            f"{command}: {name!r}: letters, digits, dot, dash and underscore make a name"
        )
    given = from_command_line([*words], EvalJobSpec if kind == "eval" else TrainSpec)
    for key in POD_PLACES & given.values.keys():
        raise ConfigError(
            f"{command}: {label(key)} is a place of this machine; in a pod, runs are in {RUNS}"
            " (site.runs_claim) and found by their NAME. Leave it out"
        )
    site, overrides = site_of(_part(given, is_site=True)), _part(given, is_site=False)
    if kind == "train":
        spec, step = _train(name, words, given)
    elif kind == "eval":
        spec, step = compose(overrides, EvalSpec), eval_line_step(name, overrides)
        check_rows(spec.suite, command)
    else:
        spec = compose(overrides, TrainSpec)
        step = preflight_step(name, overrides, options)
    refuse_paths([spec])
    return Line(kind, name, step, site, _differs(overrides, type(spec)), spec)


def _train(name: str, words: Sequence[str], given: Overrides) -> tuple[TrainSpec, JobSpec]:
    """The only point of a sweep that scores nothing, and its Job, which belongs to no sweep."""
    if given.values.get("place.name", name) != name:
        raise ConfigError(
            f"k8s/train.sh: two names, {name} and {given.values['place.name']}; give one"
        )
    sweep = load_sweep(None, [*words, f"name={name}", "suite=null"], Path(RUNS), CLUSTER)
    (point,) = sweep.points
    if point.name != name:
        raise ConfigError(f"k8s/train.sh: {name} cannot be a name; it means something else")
    step = train_step(point, sweep, fetch=True)
    return point.spec, dataclasses.replace(step, sweep=None)


def _part(given: Overrides, is_site: bool) -> Overrides:
    """What is asked of the site, or of all else."""

    def kept(knobs: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in knobs.items() if (k.partition(".")[0] == "site") == is_site}

    return Overrides(kept(given.groups), kept(given.values))


def _differs(overrides: Overrides, spec_type: type[TrainSpec] | type[EvalSpec]) -> tuple[str, ...]:
    """The words that change something, of those that were typed: without any, it is another."""
    groups = dict(overrides.groups)
    values = {k: v for k, v in overrides.values.items() if not k.startswith("place.")}
    whole = _composed(groups, values, spec_type)
    for part in (values, groups):
        for key in [*part]:
            value = part.pop(key)
            if _composed(groups, values, spec_type) != whole:
                part[key] = value
    return tuple(as_command_line(Overrides(groups, values)))


def _composed(groups: Mapping[str, str], values: Mapping[str, Any], spec_type: Any) -> Any:
    """The spec, or None where these make none (data=local wants a path)."""
    try:
        return compose(Overrides(groups, values), spec_type)
    except ConfigError:
        return None


# ------------------------------------------------------------------------------------------ paths


MOUNTS = (RUNS, CACHE)


def refuse_paths(specs: Iterable[TrainSpec | EvalSpec]) -> None:
    """Refuse weights and rows that lie where no pod would find them, and a teacher that no pod has.

    Raises:
        ConfigError: one of them does; the message says which, and how a pod gets it.
    """
    seen: set[tuple[str, str]] = set()
    for spec in specs:
        if isinstance(spec, TrainSpec) and spec.scoring.teacher_at == "server":
            raise ConfigError(
                "teacher_at server: a teacher is served to points of this machine only; on a"
                " cluster, take process or cache"
            )
        for knob, name in _named(spec):
            if (knob, name) in seen:
                continue
            seen.add((knob, name))
            # What is always a path has no form of a hub id.
            if (knob == "other_file" or is_path(name)) and not is_mounted(name):
                raise ConfigError(_why(knob, name))


def is_path(name: str) -> bool:
    """Whether a name is of a place, here or in a pod, and not of a repository on the hub."""
    is_written_so = name.startswith(("/", "~", ".")) or name.count("/") > 1
    return is_written_so or name.endswith(SUFFIXES) or Path(name).exists()


def is_mounted(path: str) -> bool:
    """Whether a path is below one of the volumes that every pod has."""
    parts = PurePosixPath(os.path.normpath(path)).parts
    return any(PurePosixPath(mount).parts == parts[:2] and len(parts) > 2 for mount in MOUNTS)


def _named(spec: TrainSpec | EvalSpec) -> Iterator[tuple[str, str]]:
    """Every name of weights or rows, with its knob."""
    if spec.pair.pair_source == "hub":
        yield "student", spec.pair.student
        yield "teacher", spec.pair.teacher
    is_named = spec.data.data_source not in ("generated", "packaged")
    if is_named and spec.data.data_path is not None:
        yield "data_path", spec.data.data_path
    if isinstance(spec, TrainSpec):
        if spec.rescue.other_file is not None:
            yield "other_file", spec.rescue.other_file
        return
    for adapter in spec.evaluation.lora_paths:
        if adapter.startswith(("/", "~", ".")):  # NAME and dump/NAME are runs, found on the volume
            yield "lora_paths", adapter


def _why(knob: str, name: str) -> str:
    return (
        f"{knob}={name}: no pod has this path; of paths, a pod sees what is below"
        f" {' and '.join(MOUNTS)}. `stillhouse push {shlex.quote(name)}` puts it on the cache"
        " volume and prints what to say instead. What is on the hub is said as OWNER/NAME"
        " (hf_secret, where it is private)"
    )
