"""This file is where a sweep's question gets its answer: what is compared, and what may be said.

Three families of comparisons (see `comparisons`):
    main       each value of the `compare` axis against its baseline, averaged over other axes; or,
               where some value exists in some of their settings only, within each setting
    settings   the same within each setting, where the main ones are averages
    untrained  each arm against one untrained student of its pair: how much was learnt at all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import ConfigError, nearest
from stillhouse.results.comparisons import (
    Asked,
    Comparison,
    Design,
    Documents,
    along,
    design,
    entry,
    family,
)
from stillhouse.results.rests import is_same
from stillhouse.results.stats import number
from stillhouse.results.table import Frame, is_unscored, points_of

KINDS_OF_VERDICT = ("better", "worse", "within noise", "no statement")
# A share of a gap that is hardly there says nothing, and reads well while a student gets worse.
LEAST_GAP = 0.1
SPELT_OUT = 4  # more comparisons than this are counted in the answer, not told one by one


@dataclass(frozen=True)
class Answer:
    """What the sweep says: the metric, the comparisons, and both in words."""

    task: str | None
    metric: str | None
    higher_is_better: bool
    main: list[Comparison]
    settings: list[Comparison]
    untrained: list[Comparison]
    # Of an untrained student, where its teacher is LEAST_GAP better: by how much.
    gaps: dict[str, float]
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
        return Answer(task, metric, True, [], [], [], {}, text, "")
    higher = bool(scored.iloc[0]["higher_is_better"])
    documents: Documents = {}
    main: list[Comparison] = []
    settings: list[Comparison] = []
    made = design(frame)
    if made is not None:
        rows = scored[(scored["kind"] == "point") & scored[made.by].notna()]
        main, settings = along(rows.to_dict("records"), made, higher, documents)
    untrained = _against_untrained(scored, higher, documents)
    text = _answered(frame, scored, made, main, higher)
    context = _learnt(scored, untrained)
    gaps = _gaps(scored) if higher else {}
    return Answer(task, metric, higher, main, settings, untrained, gaps, text, context)


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


def _against_untrained(scored: Frame, higher: bool, documents: Documents) -> list[Comparison]:
    found: list[Comparison] = []
    students = scored[scored["kind"].isin(["student", "ptq"])].to_dict("records")
    arms = [part for _, part in scored[scored["kind"] == "point"].groupby("arm", sort=False)]
    for student in students:
        asked: Asked = []
        for part in arms:
            first = part.iloc[0]
            keys = ["pair_key"] + (["quant_key"] if student["kind"] == "ptq" else [])
            # The same name over other weights is another student: `remarks` says so.
            is_its_own = is_same(student, first.to_dict(), "student", "tokenizer")
            if is_its_own and all(student[key] == first[key] for key in keys):
                cell = {row["seed"]: entry(row) for row in part.to_dict("records")}
                # One measurement, not one per seed: on these documents it has no noise of its own.
                constant = dict.fromkeys(cell, entry(student))
                asked.append((first["arm"], student["arm"], "", [(cell, constant)]))
        found += family(asked, higher, documents)
    return found


def _gaps(scored: Frame) -> dict[str, float]:
    """Teacher minus untrained student of its pair, where that is enough to be divided by."""
    teachers = scored[scored["kind"] == "teacher"].set_index("pair_key")["value"].to_dict()
    students = scored[scored["kind"].isin(["student", "ptq"])].to_dict("records")
    found = {s["arm"]: teachers.get(s["pair_key"], s["value"]) - s["value"] for s in students}
    return {arm: float(gap) for arm, gap in found.items() if gap >= LEAST_GAP}


def _answered(
    frame: Frame, scored: Frame, made: Design | None, main: list[Comparison], higher: bool
) -> str:
    said: list[str] = []
    points = points_of(frame)
    late = set(frame[(frame["kind"] == "point") & is_unscored(frame)]["id"])
    if late:
        said.append(f"So far, with {len(points) - len(late)} of {len(points)} points scored:")
    on = "on" if late else "On"
    direction = "higher" if higher else "lower"
    name = f"{scored.iloc[0]['task']}/{scored.iloc[0]['metric']} ({direction} is better)"
    if made is None:
        said.append(
            f"{on} {name}: the sweep names no comparison, so none is made between its arms."
        )
    elif not main:
        said.append(f"{on} {name}: nothing to compare with {made.by} = {made.baseline}.")
    else:
        axes = " and ".join(made.others)
        how = f"averaged over {axes}, " if made.averages else f"within each {axes}, "
        how = how if axes else ""
        said.append(f"{on} {name}, {how}{told(main)}")
    return " ".join(said)


def told(family: list[Comparison]) -> str:
    """What comparisons with one reference say, setting by setting, in a sentence."""
    settings = dict.fromkeys(c.setting for c in family)
    parts = [_at(s, [c for c in family if c.setting == s]) for s in settings]
    return f"against {family[0].reference}: {'; '.join(parts)}."


def _at(setting: str, part: list[Comparison]) -> str:
    where = f"at {setting}, " if setting else ""
    if len(part) <= SPELT_OUT:
        return where + "; ".join(_one(c) for c in part)
    arms = {
        kind: [c.arm.rpartition(" = ")[2] for c in part if c.verdict.kind == kind]
        for kind in KINDS_OF_VERDICT
    }
    unseen = [c.paired.detectable for c in part if c.verdict.kind == "within noise"]
    ends = [number(size) for size in (min(unseen, default=0), max(unseen, default=0)) if size > 0]
    sizes = " to ".join(dict.fromkeys(ends))
    found = f", where {sizes} would be found 4 times in 5" if ends else ""
    parts = [
        f"{len(some)} {kind} ({', '.join(some)}){found if kind == 'within noise' else ''}"
        for kind, some in arms.items()
        if some
    ]
    return f"{where}of {len(part)} other values, {'; '.join(parts)}"


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
    students = list(dict.fromkeys(c.reference for c in untrained))
    if len(students) > SPELT_OUT:
        means = [c.reference_mean for c in untrained]
        ends = f"{number(min(means))} to {number(max(means))}"
        said.append(f"Against {len(students)} untrained students ({ends}): {_counted(untrained)}.")
        students = []
    for student in students:
        family = [c for c in untrained if c.reference == student]
        value = number(family[0].reference_mean)
        said.append(f"Against {untrained_name(student)} ({value}): {_counted(family)}.")
    teachers = scored[scored["kind"] == "teacher"]
    told = ", ".join(f"{row.arm} {number(row.value)}" for row in teachers.itertuples())
    if len(teachers) > SPELT_OUT:
        values = teachers["value"]
        told = f"{len(teachers)} teachers {number(values.min())} to {number(values.max())}"
    return " ".join([*said, *([f"For comparison: {told}."] if told else [])])


def _counted(family: Sequence[Comparison]) -> str:
    kinds = [c.verdict.kind for c in family]
    counts = [f"{kinds.count(kind)} {kind}" for kind in KINDS_OF_VERDICT if kind in kinds]
    if len(counts) > 1:
        return ", ".join(counts)
    return f"all {len(kinds)} arms {kinds[0]}" if kinds[1:] else f"the arm is {kinds[0]}"


def untrained_name(reference: str) -> str:
    """What a comparison is with, in words: an arm, or a baseline row by its meaning."""
    quantiser = reference.removeprefix("ptq_")
    if quantiser != reference:
        return f"the untrained student in {quantiser}"
    return f"the untrained {reference}" if reference.startswith("student") else reference
