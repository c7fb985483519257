"""Pair arms with their references by seed, and judge each comparison.

Comparisons that are read together form a family, and their p values are adjusted together (Holm).
Settings of other axes are not replications, so n remains the number of seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.errors import ConfigError, nearest
from stillhouse.results.provenance import Frame
from stillhouse.results.stats import (
    NAN,
    Estimate,
    Paired,
    Verdict,
    compare,
    crossed,
    holm,
    verdict,
)  # fmt: skip
from stillhouse.results.table import (
    arm_name,
    correct_by_document,
    format_value,
    is_set,
    points_of,
)  # fmt: skip
from stillhouse.rundir import read_json

# One arm in one setting: the score of each seed, and the file that has it by document.
Cell = dict[Any, tuple[float, str | None]]
Documents = dict[str, dict[int, float]]  # file -> document -> 1.0 or 0.0
# Arm, reference, setting, and the cells over which both are averaged.
Planned = list[tuple[str, str, str, list[tuple[Cell, Cell]]]]


@dataclass(frozen=True)
class Comparison:
    """One arm against one reference on one metric."""

    arm: str
    reference: str
    setting: str  # of the other axes; "" if there is only one, or if all are averaged
    arm_mean: float  # over the seeds that both have
    reference_mean: float
    paired: Paired
    p: float  # adjusted within its family
    crossed: Estimate | None  # over other seeds and other documents, where each is known
    verdict: Verdict


@dataclass(frozen=True)
class Design:
    """How the points of a sweep allow its comparison."""

    by: str
    baseline: str  # as `format_value` writes it
    others: list[str]  # the axes that make a setting
    averages: bool  # over settings; otherwise values are compared within each setting


def design(frame: Frame) -> Design | None:
    """The design of the sweep's comparison; None if the sweep compares nothing.

    Settings are averaged if every compared value occurs in each of them. They are not if some
    values have other settings than others, because the average would compare those too; nor over an
    axis that determines another one, as losses with a rate each: that sets families apart.

    Raises:
        ConfigError: it compares by something that none of its points sets.
    """
    compared = frame.attrs["sweep"]["compare"]
    if compared is None:
        return None
    by, fields = compared["by"], frame.attrs["fields"]
    if by not in fields:
        known = ", ".join(fields)
        raise ConfigError(f"compare.by: no point sets {by} ({known}).{nearest(by, fields)}")
    others = other_axes(frame, by)
    rows = points_of(frame).dropna(subset=by).to_dict("records")
    cells = {(format_value(row[by]), setting_of(row, others)) for row in rows}
    values, settings = map(set, zip(*cells, strict=True))
    is_complete = len(cells) == len(values) * len(settings)
    is_one_family = not {*others} & {*frame.attrs["follows"].values()}
    return Design(by, format_value(compared["baseline"]), others, is_complete and is_one_family)


def other_axes(frame: Frame, *apart: str) -> list[str]:
    """The overrides besides `apart` that vary from point to point and follow from no other."""
    points, follows = points_of(frame), frame.attrs["follows"]
    free = [x for x in frame.attrs["fields"] if x not in apart and x not in follows]
    return [field for field in free if points[field].nunique(dropna=False) > 1]


def setting_of(row: Mapping[str, Any], axes: list[str]) -> str:
    """Where a point stands on these axes, as text; "" where there are none."""
    return arm_name({axis: row[axis] for axis in axes if is_set(row[axis])}) if axes else ""


def compare_by_axis(
    rows: Iterable[Mapping[str, Any]], made: Design, higher: bool, documents: Documents
) -> tuple[list[Comparison], list[Comparison]]:
    """Compare each value of the compared axis with the baseline: (main, within each setting).

    rows: points with their `value` and the `file` that has it by document.
    If the design averages, the main comparisons are of means over settings, and the second list has
    those within each setting. Otherwise the main ones are within each setting, in one family.
    """
    cells: dict[str, dict[str, Cell]] = {}
    for row in rows:
        arms = cells.setdefault(setting_of(row, made.others), {})
        arms.setdefault(format_value(row[made.by]), {})[row["seed"]] = cell_entry(row)
    within: Planned = []
    averaged: dict[str, list[tuple[Cell, Cell]]] = {}
    baseline = f"{made.by} = {made.baseline}"
    for setting, arms in cells.items():
        reference = arms.pop(made.baseline, None)
        for value, cell in arms.items():
            pairs = averaged.setdefault(f"{made.by} = {value}", [])
            if reference is not None:
                pairs.append((cell, reference))
                within.append((f"{made.by} = {value}", baseline, setting, [(cell, reference)]))
    if not made.averages:
        return compare_family(within, higher, documents), []
    main: Planned = [(arm, baseline, "", pairs) for arm, pairs in averaged.items()]
    several = [planned for planned in within if len(averaged[planned[0]]) > 1]
    return compare_family(main, higher, documents), compare_family(several, higher, documents)


def cell_entry(row: Mapping[str, Any]) -> tuple[float, str | None]:
    """A row's part of a cell: its value, and the file that has it by document, if one does."""
    return row["value"], row["file"] if is_set(row["file"]) else None


def compare_family(planned: Planned, higher: bool, documents: Documents) -> list[Comparison]:
    """Comparisons that are read together, with p values adjusted together."""
    measured = [_measure(cells, documents, len(planned)) for _, _, _, cells in planned]
    adjusted = holm([paired.p for _, _, paired, _ in measured])
    return [
        Comparison(
            arm, reference, setting, arm_mean, reference_mean, paired, p, both,
            verdict(paired, p, higher, both),
        )
        for (arm, reference, setting, _), (arm_mean, reference_mean, paired, both), p
        in zip(planned, measured, adjusted, strict=True)
    ]  # fmt: skip


def _measure(
    cells: list[tuple[Cell, Cell]], documents: Documents, of: int
) -> tuple[float, float, Paired, Estimate | None]:
    """Both means, the paired comparison and the crossed one, each seed averaged over the cells."""
    arm, reference = (_seed_means([pair[side] for pair in cells]) for side in (0, 1))
    shared = [seed for seed in arm if seed in reference]
    means = [
        float(np.mean([side[s] for s in shared])) if shared else NAN for side in (arm, reference)
    ]
    paired = compare(arm, reference, of)
    return means[0], means[1], paired, _crossed(cells, shared, documents)


def _seed_means(cells: list[Cell]) -> dict[Any, float]:
    """The mean over cells by seed, of the seeds that every cell has."""
    shared = [seed for seed in (cells[0] if cells else ()) if all(seed in cell for cell in cells)]
    return {s: sum(cell[s][0] for cell in cells) / len(cells) for s in sorted(shared)}


def _crossed(
    cells: list[tuple[Cell, Cell]], seeds: list[Any], documents: Documents
) -> Estimate | None:
    """The difference over other documents too; None unless all scored the same documents."""
    files = [[(str(a[s][1]), str(r[s][1])) for a, r in cells] for s in seeds]
    used = {file for row in files for pair in row for file in pair}
    if len(seeds) < 2 or "None" in used:
        return None
    for file in used - documents.keys():
        score = read_json(Path(file)) or {"samples": []}
        documents[file] = correct_by_document(score) or {}
    known = [documents[file] for file in used]
    if any(values.keys() != known[0].keys() for values in known) or not known[0]:
        return None
    correct_D = {file: np.array([documents[file][d] for d in sorted(known[0])]) for file in used}
    return crossed(
        np.array([np.mean([correct_D[a] - correct_D[r] for a, r in row], axis=0) for row in files])
    )
