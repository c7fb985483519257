"""This file is where a sweep's question gets its answer: what is compared, and what may be said.

Three families of comparisons, each paired by seed and each with its own Holm adjustment:
    main       each value of the `compare` axis against its baseline, averaged over other axes
    settings   the same within each setting of the other axes, where there are several
    untrained  each arm against one untrained student of its pair: how much was learnt at all
Other axes are averaged seed by seed: their settings are no replications, so n stays that of seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.errors import ConfigError, nearest
from stillhouse.results.stats import (
    Estimate,
    Paired,
    Verdict,
    compare,
    crossed,
    holm,
    number,
    verdict,
)
from stillhouse.results.table import (
    Frame,
    is_set,
    is_unscored,
    label,
    points_of,
    right_answers,
    spell,
)
from stillhouse.rundir import read_json

KINDS_OF_VERDICT = ("better", "worse", "within noise", "no statement")
SPELT_OUT = 4  # more comparisons than this are counted in the answer, not told one by one

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
    setting: str  # of the other axes; "" where there is one only
    arm_mean: float  # over the seeds both have
    reference_mean: float
    paired: Paired
    p: float  # adjusted for its family
    both: Estimate | None  # with the noise of documents too, where each is known
    verdict: Verdict


@dataclass(frozen=True)
class Answer:
    """What the sweep says: the metric, the comparisons, and both in words."""

    task: str | None
    metric: str | None
    higher_is_better: bool
    main: list[Comparison]
    settings: list[Comparison]
    untrained: list[Comparison]
    text: str  # the answer to the question
    context: str  # where the arms stand between the untrained student and the teacher


def answer(frame: Frame) -> Answer:
    """The comparisons that a frame (of `table.load`) allows, and what they say in words.

    Raises:
        ConfigError: the sweep compares by something that none of its points sets.
    """
    asked = frame.attrs["sweep"]["compare"]
    task, metric = _metric(frame, asked)
    scored = frame[(frame["task"] == task) & (frame["metric"] == metric) & frame["value"].notna()]
    if scored.empty:
        text = "No score is here yet, so nothing can be said."
        return Answer(task, metric, True, [], [], [], text, "")
    higher = bool(scored.iloc[0]["higher_is_better"])
    documents: Documents = {}
    main: list[Comparison] = []
    settings: list[Comparison] = []
    if asked is not None:
        main, settings = _by_axis(scored, asked["by"], asked["baseline"], higher, documents)
    untrained = _against_untrained(scored, higher, documents)
    text = _answered(frame, scored, asked, main, higher)
    context = _learnt(scored, untrained)
    return Answer(task, metric, higher, main, settings, untrained, text, context)


def _metric(frame: Frame, asked: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    known = frame[["task", "metric"]].dropna().drop_duplicates()
    pairs = list(known.itertuples(index=False, name=None))
    if asked is None:
        return pairs[0] if pairs else (None, None)
    task, _, metric = asked["metric"].partition("/")
    if pairs and (task, metric) not in pairs:
        names = [f"{t}/{m}" for t, m in pairs]
        raise ConfigError(
            f"compare.metric: {asked['metric']} is not scored in this sweep"
            f" ({', '.join(names)}).{nearest(asked['metric'], names)}"
        )
    return task, metric


def _by_axis(
    scored: Frame, by: str, baseline: Any, higher: bool, documents: Documents
) -> tuple[list[Comparison], list[Comparison]]:
    leaves: list[str] = scored.attrs["leaves"]
    if by not in leaves:
        known = ", ".join(leaves)
        raise ConfigError(f"compare.by: no point sets {by} ({known}).{nearest(by, leaves)}")
    others = [leaf for leaf in leaves if leaf != by]
    cells: dict[str, dict[str, Cell]] = {}
    for row in scored[(scored["kind"] == "point") & scored[by].notna()].to_dict("records"):
        set_here = {leaf: row[leaf] for leaf in others if is_set(row[leaf])}
        setting = label(set_here) if others else ""
        cell = cells.setdefault(spell(row[by]), {}).setdefault(setting, {})
        cell[row["seed"]] = (row["value"], row["file"])
    references = cells.pop(spell(baseline), {})
    main: Asked = []
    within: Asked = []
    for level, settings in cells.items():
        shared = [s for s in settings if s in references]
        names = (f"{by} = {level}", f"{by} = {spell(baseline)}")
        main.append((*names, "", [(settings[s], references[s]) for s in shared]))
        if len(shared) > 1:
            within += [(*names, s, [(settings[s], references[s])]) for s in shared]
    return _family(main, higher, documents), _family(within, higher, documents)


def _against_untrained(scored: Frame, higher: bool, documents: Documents) -> list[Comparison]:
    found: list[Comparison] = []
    students = scored[scored["kind"].isin(["student", "ptq"])].to_dict("records")
    arms = [part for _, part in scored[scored["kind"] == "point"].groupby("arm", sort=False)]
    for student in students:
        asked: Asked = []
        for part in arms:
            first = part.iloc[0]
            keys = ["pair_key"] + (["quant_key"] if student["kind"] == "ptq" else [])
            if all(student[key] == first[key] for key in keys):
                cell = {row["seed"]: (row["value"], row["file"]) for row in part.to_dict("records")}
                # One measurement, not one per seed: on these documents it has no noise of its own.
                constant = {seed: (student["value"], student["file"]) for seed in cell}
                asked.append((first["arm"], student["arm"], "", [(cell, constant)]))
        found += _family(asked, higher, documents)
    return found


def _family(asked: Asked, higher: bool, documents: Documents) -> list[Comparison]:
    """Comparisons that are read together: their p values are adjusted together."""
    measured = [_measure(cells, documents) for _, _, _, cells in asked]
    adjusted = holm([paired.p for _, _, paired, _ in measured])
    found: list[Comparison] = []
    for (arm, reference, setting, _), numbers, p in zip(asked, measured, adjusted, strict=True):
        arm_mean, reference_mean, paired, both = numbers
        said = verdict(paired, p, higher, both)
        names = (arm, reference, setting)
        found.append(Comparison(*names, arm_mean, reference_mean, paired, p, both, said))
    return found


def _measure(
    cells: list[tuple[Cell, Cell]], documents: Documents
) -> tuple[float, float, Paired, Estimate | None]:
    """Both means, the paired comparison and the crossed one, each seed averaged over the cells."""
    everywhere = [{*arm} for arm, _ in cells], [{*reference} for _, reference in cells]
    ours, theirs = (set.intersection(*seeds) if seeds else set() for seeds in everywhere)
    arm = {seed: sum(a[seed][0] for a, _ in cells) / len(cells) for seed in sorted(ours)}
    reference = {seed: sum(r[seed][0] for _, r in cells) / len(cells) for seed in sorted(theirs)}
    paired = compare(arm, reference)
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


def _answered(
    frame: Frame,
    scored: Frame,
    asked: Mapping[str, Any] | None,
    main: list[Comparison],
    higher: bool,
) -> str:
    said: list[str] = []
    points = points_of(frame)
    late = set(frame[(frame["kind"] == "point") & is_unscored(frame)]["id"])
    if late:
        said.append(f"So far, with {len(points) - len(late)} of {len(points)} points scored:")
    on = "on" if late else "On"
    direction = "higher" if higher else "lower"
    name = f"{scored.iloc[0]['task']}/{scored.iloc[0]['metric']} ({direction} is better)"
    if asked is None:
        said.append(
            f"{on} {name}: the sweep names no comparison, so none is made between its arms."
        )
    elif not main:
        reference = f"{asked['by']} = {spell(asked['baseline'])}"
        said.append(f"{on} {name}: nothing to compare with {reference}.")
    else:
        others = [leaf for leaf in frame.attrs["leaves"] if leaf != asked["by"]]
        over = f", averaged over {' and '.join(others)}," if others else ","
        said.append(f"{on} {name}{over} {_told(main)}")
    return " ".join(said)


def _told(family: list[Comparison]) -> str:
    lead = f"against {family[0].reference}: "
    if len(family) <= SPELT_OUT:
        return f"{lead}{'; '.join(_one(c) for c in family)}."
    arms = {
        kind: [c.arm.rpartition(" = ")[2] for c in family if c.verdict.kind == kind]
        for kind in KINDS_OF_VERDICT
    }
    parts = [f"{len(some)} {kind} ({', '.join(some)})" for kind, some in arms.items() if some]
    return f"{lead}of {len(family)} other values, {'; '.join(parts)}."


def _one(c: Comparison) -> str:
    if c.verdict.kind in ("better", "worse"):
        return f"{c.arm} is {c.verdict.text}"
    seen = f"{number(c.arm_mean)} against {number(c.reference_mean)}"
    if c.verdict.kind == "within noise":
        seen += f", n = {c.paired.difference.n}"
        if c.paired.detectable > 0:
            seen += f"; a difference of {number(c.paired.detectable)} would be found 4 times in 5"
        return f"{c.arm} is within noise ({seen})"
    return f"{c.arm}, {c.verdict.text}" + (f" ({seen})" if c.paired.difference.n else "")


def _learnt(scored: Frame, untrained: list[Comparison]) -> str:
    """Where the arms stand between the untrained student and the teacher."""
    said: list[str] = []
    for student in dict.fromkeys(c.reference for c in untrained):
        family = [c for c in untrained if c.reference == student]
        kinds = [c.verdict.kind for c in family]
        counts = [f"{kinds.count(kind)} {kind}" for kind in KINDS_OF_VERDICT if kind in kinds]
        told = ", ".join(counts)
        if len(counts) == 1:
            told = f"all {len(kinds)} arms {kinds[0]}" if kinds[1:] else f"the arm is {kinds[0]}"
        value = number(family[0].reference_mean)
        said.append(f"Against {untrained_name(student)} ({value}): {told}.")
    teachers = scored[scored["kind"] == "teacher"]
    told = ", ".join(f"{row.arm} {number(row.value)}" for row in teachers.itertuples())
    return " ".join([*said, *([f"For comparison: {told}."] if told else [])])


def untrained_name(reference: str) -> str:
    """A baseline row's name in words."""
    quantiser = reference.removeprefix("ptq_")
    if quantiser != reference:
        return f"the untrained student in {quantiser}"
    return f"the untrained {reference}"
