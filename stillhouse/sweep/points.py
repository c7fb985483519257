"""Define a sweep as data: its points, and the baselines that stand beside them in its table.

A sweep that was read from its file (`grid`) knows the specs of its points. One that was found by
its record (`registry`) lacks them, and with them all that only a run of it needs.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillhouse.identity import baseline_key
from stillhouse.rundir import RunDir, Runs, directory_name
from stillhouse.spec import SiteSpec, SuiteSpec, TrainSpec
from stillhouse.sweep.dependencies import Beneath
from stillhouse.sweep.sweep_file import Compare, text


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its identity, and what distinguishes it from others."""

    id: str
    slug: str
    name: str | None = None  # only where somebody gave one
    # Each axis of the sweep, and "seed": leaf (or group) -> value.
    overrides: dict[str, Any] = field(default_factory=dict[str, Any])
    tags: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  # what composes to the spec elsewhere, where it runs left out
    resolved: TrainSpec | None = None  # its whole spec; None: read from a record
    group: str = ""  # the points whose adapters one evaluation can score together
    pack: str = ""  # those of a group that one evaluation scores, whoever cuts it

    @property
    def spec(self) -> TrainSpec:
        assert self.resolved is not None, "a record of a sweep holds no specs"
        return self.resolved

    @property
    def directory(self) -> str:
        return directory_name(self.slug, self.id)

    def __str__(self) -> str:
        """Its name, or the values that it sets, and the id's first digits."""
        words = self.name or " ".join(f"{k}={text(v)}" for k, v in self.overrides.items())
        return f"{words or self.slug} ({self.id[:6]})"


def point_of(directory: str, name: str | None = None) -> Point:
    """A point, or any Job, of which only its directory's, or its own, name is known."""
    slug, _, id_ = directory.rpartition("-")
    return Point(id_, slug, name)


@dataclass(frozen=True)
class Baseline:
    """A row that no run trains: teacher, student or ptq, of one pair and quantizer."""

    directory: Path
    label: str
    groups: frozenset[str] = frozenset()  # of its points, whose evaluations can take it along
    pair_name: str = ""
    quant_type: str | None = None  # of ptq only: the others do not depend on it
    # As a look finds it:
    is_scored: bool = False
    cause: str | None = None  # why it is given up
    rests_on_other: tuple[str, ...] = ()  # why scores that are there count no more


@dataclass(frozen=True)
class Sweep:
    """A question, and the points that answer it."""

    name: str
    runs: Path
    points: tuple[Point, ...]
    suite: SuiteSpec | None = None  # None: points are trained and not scored
    baselines: tuple[Baseline, ...] = ()
    # The cache with the models and data of its points; None: not known.
    cache_dir: Path | None = None
    # Open revisions of the hub -> the commit that all of its points use (`commits`).
    commits: Mapping[str, str] = field(default_factory=dict[str, str])
    # Not whole: some of its points are meant, and nothing that no point shows.
    is_whole: bool = True
    # Of a sweep that was read from its file:
    file: str | None = None
    question: str | None = None
    # What varies, seeds apart: leaf (or group) -> values.
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    pack: int = 1  # adapters per evaluation
    compare: Compare | None = None
    words: tuple[str, ...] = ()  # of the command line, as typed: what repeats it

    @property
    def site(self) -> SiteSpec:
        return self.points[0].spec.site

    @functools.cached_property
    def by_id(self) -> dict[str, Point]:
        return {point.id: point for point in self.points}

    @functools.cached_property
    def groups(self) -> dict[str, str]:
        """Point id -> group, in the order in which points start."""
        return {point.id: point.group for point in self.points}

    @property
    def meant_baselines(self) -> tuple[Baseline, ...]:
        """Its baselines, where all of it is meant."""
        return self.baselines if self.is_whole else ()

    def only(self, ids: Collection[str]) -> Sweep:
        """The sweep with these of its points alone."""
        points = tuple(point for point in self.points if point.id in ids)
        return replace(self, points=points, is_whole=False)

    def run(self, id_: str) -> RunDir:
        return RunDir(self.runs / self.by_id[id_].directory)

    def beneath(self) -> Beneath:
        """What its points depend on now, for one look."""
        return Beneath(self.cache_dir, self.commits)


def grouped(points: Sequence[Point], size: int) -> tuple[Point, ...]:
    """The points of a whole sweep with their groups, and packs of at most `size` in them."""
    names: dict[Any, str] = {}
    groups: dict[str, str] = {}
    for point in points:
        spec = point.spec
        key = (spec.pair, spec.quant, spec.data)
        if key not in names:
            name = f"{spec.pair.pair_name}/{spec.quant.quant_type}"
            twins = sum(other.split("#")[0] == name for other in names.values())
            names[key] = f"{name}#{twins + 1}" if twins else name
        groups[point.id] = names[key]
    packs = fixed_packs(groups, size)
    return tuple(replace(p, group=groups[p.id], pack=packs[p.id]) for p in points)


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


def baselines_of(
    points: Iterable[Point], labels: Iterable[str], runs: Path
) -> tuple[Baseline, ...]:
    """The rows with these labels ("teacher", "student", "ptq") that stand beside some points."""
    firsts: dict[str, TrainSpec] = {}
    for point in points:
        firsts.setdefault(point.group, point.spec)
    found: dict[Path, Baseline] = {}
    for group, spec in firsts.items():
        for label in labels:
            is_ptq = label == "ptq"
            if is_ptq and spec.quant.quant_type == "none":
                continue  # it would be the student
            directory = Runs(runs).baseline(
                label, baseline_key(label, spec.pair, spec.quant, spec.data)
            )
            before = found[directory].groups if directory in found else frozenset[str]()
            stored = spec.quant.quant_type if is_ptq else None
            found[directory] = Baseline(
                directory, label, before | {group}, spec.pair.pair_name, stored
            )
    return tuple(found.values())
