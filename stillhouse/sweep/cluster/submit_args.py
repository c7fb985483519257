"""Parse a line of k8s/train.sh or k8s/eval.sh, or of a preflight, into the one Job it describes.

    k8s/train.sh NAME --lmbda 0 …           NAME means this configuration, and no other
    k8s/eval.sh LABEL --lora-paths dump/A   LABEL is only what people call the Job

Pure: no request is made to a cluster, so a dry run needs none. `sending` sends the Job.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse import flags
from stillhouse.compose import (
    GROUPS,
    Overrides,
    as_command_line,
    compose,
    from_command_line,
    parse_value,
)
from stillhouse.errors import ConfigError
from stillhouse.rundir import Json
from stillhouse.spec import NAME, EvalSpec, SiteSpec, TrainSpec
from stillhouse.sweep.cluster import pod_paths
from stillhouse.sweep.cluster.code_bundle import Bundle, bundle
from stillhouse.sweep.cluster.jobspec import (
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
DOORS: dict[Kind, str] = {
    "train": "k8s/train.sh",
    "eval": "k8s/eval.sh",
    "preflight": "stillhouse preflight",
}
DOES: dict[Kind, str] = {"train": "trains", "eval": "scores", "preflight": "looks at its pair in"}
# Places that a pod has of its own; on this machine they mean something else.
POD_PLACES = ("place.runs", "place.output_dir", "place.cache_dir")


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
        asked = [f"{step.processes} {site.gpu_resource}"] if site.gpu_resource else []
        asked += [f"{site.cpu * step.processes:g} cores"]
        asked += [
            f"{site.memory_gib * step.processes:g} GiB",
            f"at most {duration(site.deadline_s)}",
        ]
        asked += [f"queue {site.queue}"] if site.queue else []
        return [
            f"{self.name}: {DOES[self.kind]} {step.name}",
            f"  differs from the defaults by: {' '.join(self.differs) or 'nothing'}",
            f"  asks for: {', '.join(asked)}",
            f"  image {site.image}, code {self.code.key}",
        ]


def read(kind: Kind, name: str | None, words: Sequence[str], options: Sequence[str] = ()) -> Line:
    """The line of these words; `options` are those of the door in the pod.

    Raises:
        ConfigError: no name, a word that is no flag or has no such value; a place of this machine.
    """
    door = DOORS[kind]
    if name is None or name.startswith("-") or "=" in name:
        raise ConfigError(
            f"{door}: a name comes first: {door} NAME --knob VALUE …; got {name or 'nothing'}"
        )
    if re.fullmatch(NAME, name) is None:
        raise ConfigError(
            f"{door}: {name!r}: letters, digits, dot, dash and underscore make a name"
        )
    if kind == "preflight":
        line = _preflight(name, list(words), options)
    else:
        line = (_train if kind == "train" else _eval)(name, list(words))
    pod_paths.refuse([line.spec])
    return line


def _train(name: str, words: list[str]) -> Line:
    overrides = from_command_line(words, TrainSpec)
    _refuse_places(overrides, "k8s/train.sh")
    if overrides.values.get("place.name", name) != name:
        raise ConfigError(
            f"k8s/train.sh: two names, {name} and {overrides.values['place.name']}; give one"
        )
    sweep = load_sweep(None, [*words, f"name={name}", "suite=null"], Path(RUNS), CLUSTER)
    (point,) = sweep.points
    if point.name != name:
        raise ConfigError(f"k8s/train.sh: {name} cannot be a name; it means something else")
    step = dataclasses.replace(train_step(point, sweep, fetch=True), sweep=None)
    differs = _differs(overrides, TrainSpec, point.spec)
    return Line("train", name, step, sweep.site, differs, point.spec)


def _preflight(name: str, words: list[str], options: Sequence[str]) -> Line:
    asked = from_command_line(words, TrainSpec)
    _refuse_places(asked, DOORS["preflight"])
    site = site_of(Overrides(_part(asked.groups, True), _part(asked.values, True)))
    overrides = Overrides(_part(asked.groups, False), _part(asked.values, False))
    spec = compose(overrides, TrainSpec)
    step = preflight_step(name, overrides, options)
    return Line("preflight", name, step, site, _differs(overrides, TrainSpec, spec), spec)


@dataclass(frozen=True)
class _EvalLine(EvalSpec):
    """What a line of k8s/eval.sh may set: what eval.py may, and where it runs."""

    site: SiteSpec


def _eval(name: str, words: list[str]) -> Line:
    where = "command line"
    vocabulary = flags.Vocabulary(_EvalLine, GROUPS[EvalSpec] | {"site"})
    groups: dict[str, str] = {}
    values: dict[str, Any] = {}
    for setting in flags.parse(words, vocabulary, where):
        options = parse_value(setting, where)
        if len(options) != 1:
            raise ConfigError(
                f"{where}: {setting.key}={setting.text} is a sweep; one Job wants one"
            )
        if setting.is_group:
            groups[setting.key] = str(options[0])
        else:
            values[setting.key] = options[0]
    site = site_of(Overrides(_part(groups, True), _part(values, True)))
    overrides = Overrides(_part(groups, False), _part(values, False))
    _refuse_places(overrides, "k8s/eval.sh")
    spec = compose(overrides, EvalSpec)
    step = eval_line_step(name, overrides)
    return Line("eval", name, step, site, _differs(overrides, EvalSpec, spec), spec)


def _part(knobs: Mapping[str, Any], is_site: bool) -> dict[str, Any]:
    return {k: v for k, v in knobs.items() if (k.partition(".")[0] == "site") == is_site}


def _refuse_places(overrides: Overrides, door: str) -> None:
    for key in POD_PLACES:
        if key in overrides.values:
            raise ConfigError(
                f"{door}: {label(key)} is a place of this machine; in a pod, runs are in {RUNS}"
                " (site.runs_claim) and found by their NAME. Leave it out"
            )


def _differs(
    overrides: Overrides, spec_type: type[TrainSpec] | type[EvalSpec], spec: TrainSpec | EvalSpec
) -> tuple[str, ...]:
    """The words that change something, of those that were typed."""
    plain = _composed(Overrides({}, {}), spec_type)
    groups = {
        group: option
        for group, option in overrides.groups.items()
        if group != "site" and _composed(Overrides({group: option}, {}), spec_type) != plain
    }
    chosen = _composed(Overrides(overrides.groups, {}), spec_type)
    values: dict[str, Any] = {}
    for key, value in overrides.values.items():
        section, leaf = key.split(".")
        is_new = chosen is None or getattr(getattr(chosen, section), leaf) != getattr(
            getattr(spec, section), leaf
        )
        if is_new and section not in ("place", "site"):
            values[key] = value
    return tuple(as_command_line(Overrides(groups, values)))


def _composed(overrides: Overrides, spec_type: Any) -> TrainSpec | EvalSpec | None:
    """The spec, or None where the groups alone make none (data=local wants a path)."""
    try:
        return compose(overrides, spec_type)
    except ConfigError:
        return None
