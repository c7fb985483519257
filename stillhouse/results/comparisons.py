"""This file is where arms are paired with what they are compared with, and the pairs judged.

Every comparison is paired by seed. Those that are read together are a family: their p values are
adjusted together (Holm). Settings of other axes are no replications, so n stays that of seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.errors import ConfigError, nearest
from stillhouse.results.stats import Estimate, Paired, Verdict, compare, crossed, holm, verdict
from stillhouse.results.table import Frame, is_set, label, points_of, right_answers, spell
from stillhouse.rundir import read_json

# One arm in one setting: what each seed scored, and the file that knows it by document.
Cell = dict[Any, tuple[float, str | None]]
Documents = dict[str, dict[int, float]]
# Arm, reference, setting, and the cells over which both are averaged.
Asked = list[tuple[str, str, str, list[tuple[Cell, Cell]]]]


@dataclass(frozen=True)
class Comparison:
    """One arm against one reference on one metric."""

    arm: str
    reference: str
    setting: str  # of the other axes; "" where there is one only, or all are averaged
    arm_mean: float  # over the seeds both have
    reference_mean: float
    paired: Paired
    p: float  # adjusted for its family
    both: Estimate | None  # with the noise of documents too, where each is known
    verdict: Verdict


@dataclass(frozen=True)
class Design:
    """How the points of a sweep let its question be asked."""

    by: str
    baseline: str  # as `spell` writes it
    others: list[str]  # the axes that make a setting
    averages: bool  # whether a value is judged by its mean over settings, or within each of them

    def setting(self, row: Mapping[str, Any]) -> str:
        """The setting of a point, in words; "" where no axis makes one."""
        return setting_of(row, self.others)


def design(frame: Frame) -> Design | None:
    """How the sweep's points answer what it compares; None where it compares nothing.

    Settings are averaged where every compared value is asked for in each of them. Not where some
    have other settings than others, as the average would compare those too; and not over an axis
    that brings its own value of another one, as losses with a rate each: it sets families apart.

    Raises:
        ConfigError: it compares by something that none of its points sets.
    """
    asked = frame.attrs["sweep"]["compare"]
    if asked is None:
        return None
    by, leaves = asked["by"], frame.attrs["leaves"]
    if by not in leaves:
        known = ", ".join(leaves)
        raise ConfigError(f"compare.by: no point sets {by} ({known}).{nearest(by, leaves)}")
    others = other_axes(frame, by)
    rows = points_of(frame).dropna(subset=by).to_dict("records")
    cells = {(spell(row[by]), setting_of(row, others)) for row in rows}
    values, settings = map(set, zip(*cells, strict=True))
    is_complete = len(cells) == len(values) * len(settings)
    is_one_family = not {*others} & {*frame.attrs["follows"].values()}
    return Design(by, spell(asked["baseline"]), others, is_complete and is_one_family)


def other_axes(frame: Frame, *apart: str) -> list[str]:
    """The overrides beside `apart` that vary from point to point and follow from no other."""
    points, follows = points_of(frame), frame.attrs["follows"]
    free = [x for x in frame.attrs["leaves"] if x not in apart and x not in follows]
    return [leaf for leaf in free if points[leaf].nunique(dropna=False) > 1]


def setting_of(row: Mapping[str, Any], axes: list[str]) -> str:
    """Where a point stands on these axes, in words; "" where there are none."""
    return label({axis: row[axis] for axis in axes if is_set(row[axis])}) if axes else ""


def along(
    rows: Iterable[Mapping[str, Any]], made: Design, higher: bool, documents: Documents
) -> tuple[list[Comparison], list[Comparison]]:
    """Each value of the compared axis against its baseline: the answer, and what lies behind it.

    rows: points with their `value` and the `file` that knows it by document.
    Where the design averages, the answer is of the means over settings, and the comparisons within
    each setting lie behind it. Where it does not, these are the answer, all in one family.
    """
    cells: dict[str, dict[str, Cell]] = {}
    for row in rows:
        cell = cells.setdefault(made.setting(row), {}).setdefault(spell(row[made.by]), {})
        cell[row["seed"]] = entry(row)
    within: Asked = []
    averaged: dict[str, list[tuple[Cell, Cell]]] = {}
    baseline = f"{made.by} = {made.baseline}"
    for setting, arms in cells.items():
        reference = arms.pop(made.baseline, None)
        for value, cell in arms.items():
            arm = averaged.setdefault(f"{made.by} = {value}", [])
            if reference is not None:
                arm.append((cell, reference))
                within.append((f"{made.by} = {value}", baseline, setting, [(cell, reference)]))
    if not made.averages:
        return family(within, higher, documents), []
    main: Asked = [(arm, baseline, "", pairs) for arm, pairs in averaged.items()]
    several = [asked for asked in within if len(averaged[asked[0]]) > 1]
    return family(main, higher, documents), family(several, higher, documents)


def entry(row: Mapping[str, Any]) -> tuple[float, str | None]:
    """A row's part of a cell: its value, and the file that knows it by document, if one does."""
    return row["value"], row["file"] if is_set(row["file"]) else None


def family(asked: Asked, higher: bool, documents: Documents) -> list[Comparison]:
    """Comparisons that are read together: their p values are adjusted together."""
    measured = [_measure(cells, documents, len(asked)) for _, _, _, cells in asked]
    adjusted = holm([paired.p for _, _, paired, _ in measured])
    found: list[Comparison] = []
    for (arm, reference, setting, _), numbers, p in zip(asked, measured, adjusted, strict=True):
        arm_mean, reference_mean, paired, both = numbers
        said = verdict(paired, p, higher, both)
        names = (arm, reference, setting)
        found.append(Comparison(*names, arm_mean, reference_mean, paired, p, both, said))
    return found


def _measure(
    cells: list[tuple[Cell, Cell]], documents: Documents, of: int
) -> tuple[float, float, Paired, Estimate | None]:
    """Both means, the paired comparison and the crossed one, each seed averaged over the cells."""
    everywhere = [{*arm} for arm, _ in cells], [{*reference} for _, reference in cells]
    ours, theirs = (set.intersection(*seeds) if seeds else set() for seeds in everywhere)
    arm = {seed: sum(a[seed][0] for a, _ in cells) / len(cells) for seed in sorted(ours)}
    reference = {seed: sum(r[seed][0] for _, r in cells) / len(cells) for seed in sorted(theirs)}
    paired = compare(arm, reference, of)
    shared = sorted(ours & theirs)
    means = [
        float(np.mean([side[s] for s in shared])) if shared else float("nan")
        for side in (arm, reference)
    ]
    return means[0], means[1], paired, _both_noises(cells, shared, documents)


def _both_noises(
    cells: list[tuple[Cell, Cell]], seeds: list[Any], documents: Documents
) -> Estimate | None:
    """The difference with the noise of documents too; None unless all scored the same documents."""
    files = [[(a[s][1], r[s][1]) for a, r in cells] for s in seeds]
    if len(seeds) < 2 or any(file is None for row in files for pair in row for file in pair):
        return None
    for file in {str(file) for row in files for pair in row for file in pair} - documents.keys():
        documents[file] = right_answers(read_json(Path(file)) or {"samples": []}) or {}
    used = [documents[str(file)] for row in files for pair in row for file in pair]
    if any(values.keys() != used[0].keys() for values in used) or not used[0]:
        return None
    order = sorted(used[0])

    def answers(file: str | None) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([documents[str(file)][doc] for doc in order])

    return crossed(
        np.array([np.mean([answers(a) - answers(r) for a, r in row], axis=0) for row in files])
    )
