"""Answer the sweep's question: which comparisons are made, and what they say in words.

Three families of comparisons (see `comparisons`):
    main       each value of the `compare` axis against its baseline, averaged over other axes; or,
               if some value exists in some of their settings only, within each setting
    settings   the same within each setting, if the main ones are averages
    untrained  each arm against one untrained student of its pair: how much was learned at all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import ConfigError, nearest
from stillhouse.results.comparisons import (
    Comparison,
    Design,
    Documents,
    Planned,
    cell_entry,
    compare_by_axis,
    compare_family,
    design,
)  # fmt: skip
from stillhouse.results.provenance import Frame, same_sources
from stillhouse.results.stats import number
from stillhouse.results.table import is_unscored, points_of

VERDICTS = ("better", "worse", "within noise", "no statement")
# The share of a tiny gap says nothing, and looks good while a student gets worse.
LEAST_GAP = 0.1
LISTED = 4  # more comparisons than this are counted in the answer, not listed


@dataclass(frozen=True)
class Answer:
    """What the sweep says: the metric, the comparisons, and both in words."""

    task: str | None
    metric: str | None
    higher_is_better: bool
    main: list[Comparison]
    settings: list[Comparison]
    untrained: list[Comparison]
    # Untrained student -> lead of its teacher, where that is at least LEAST_GAP.
    gaps: dict[str, float]
    text: str  # the answer to the question
    context: str  # where the arms stand between the untrained student and the teacher


def answer(frame: Frame) -> Answer:
    """The comparisons that a frame (of `table.load`) allows, and what they say in words.

    Raises:
        ConfigError: the sweep compares by something that none of its points sets.
    """
    task, metric = _metric(frame, frame.attrs["sweep"]["compare"])
    scored = frame[(frame["task"] == task) & (frame["metric"] == metric) & frame["value"].notna()]
    if scored.empty:
        text = "There are no scores yet, so nothing can be said."
        return Answer(task, metric, True, [], [], [], {}, text, "")
    higher = bool(scored.iloc[0]["higher_is_better"])
    documents: Documents = {}
    main: list[Comparison] = []
    settings: list[Comparison] = []
    made = design(frame)
    if made is not None:
        rows = scored[(scored["kind"] == "point") & scored[made.by].notna()]
        main, settings = compare_by_axis(rows.to_dict("records"), made, higher, documents)
    untrained = _against_untrained(scored, higher, documents)
    text, context = _main_text(frame, scored, made, main), _context(scored, untrained)
    gaps = _gaps(scored) if higher else {}
    return Answer(task, metric, higher, main, settings, untrained, gaps, text, context)


def _metric(frame: Frame, compare: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    known = frame[["task", "metric"]].dropna().drop_duplicates()
    pairs: list[tuple[str, str]] = list(known.itertuples(index=False, name=None))
    if compare is None:
        return pairs[0] if pairs else (None, None)
    task, _, metric = compare["metric"].partition("/")
    if pairs and (task, metric) not in pairs:
        names = [f"{t}/{m}" for t, m in pairs]
        raise ConfigError(
            f"compare.metric: {compare['metric']} is not scored in this sweep"
            f" ({', '.join(names)}).{nearest(compare['metric'], names)}"
        )
    return task, metric


def _against_untrained(scored: Frame, higher: bool, documents: Documents) -> list[Comparison]:
    comparisons: list[Comparison] = []
    students = scored[scored["kind"].isin(["student", "ptq"])].to_dict("records")
    arms = [part for _, part in scored[scored["kind"] == "point"].groupby("arm", sort=False)]
    for student in students:
        planned: Planned = []
        keys = ["pair_key"] + (["quant_key"] if student["kind"] == "ptq" else [])
        for part in arms:
            first = part.iloc[0]
            # The same name with other weights is another student: `notes` says so.
            is_its_own = same_sources(student, first.to_dict(), "student", "tokenizer")
            if is_its_own and all(student[key] == first[key] for key in keys):
                cell = {row["seed"]: cell_entry(row) for row in part.to_dict("records")}
                # One measurement, not one per seed: it has no variance on these documents.
                constant = dict.fromkeys(cell, cell_entry(student))
                planned.append((first["arm"], student["arm"], "", [(cell, constant)]))
        comparisons += compare_family(planned, higher, documents)
    return comparisons


def _gaps(scored: Frame) -> dict[str, float]:
    """Teacher minus untrained student of its pair, where that is enough to divide by."""
    teachers = scored[scored["kind"] == "teacher"].set_index("pair_key")["value"].to_dict()
    students = scored[scored["kind"].isin(["student", "ptq"])].to_dict("records")
    gaps = {s["arm"]: teachers.get(s["pair_key"], s["value"]) - s["value"] for s in students}
    return {arm: float(gap) for arm, gap in gaps.items() if gap >= LEAST_GAP}


def _main_text(frame: Frame, scored: Frame, made: Design | None, main: list[Comparison]) -> str:
    first = scored.iloc[0]
    direction = "higher" if first["higher_is_better"] else "lower"
    name = f"{first['task']}/{first['metric']} ({direction} is better)"
    if made is None:
        text = f"On {name}: the sweep names no comparison, so its arms are not compared."
    elif not main:
        text = f"On {name}: nothing to compare with {made.by} = {made.baseline}."
    else:
        axes = " and ".join(made.others)
        how = f"averaged over {axes}, " if made.averages else f"within each {axes}, "
        text = f"On {name}, {how if axes else ''}{summary_text(main)}"
    points = len(points_of(frame))
    late = frame[(frame["kind"] == "point") & is_unscored(frame)]["id"].nunique()
    return f"So far {points - late} of {points} points are scored. {text}" if late else text


def summary_text(family: list[Comparison]) -> str:
    """What comparisons with one reference say, setting by setting, in a sentence."""
    settings = dict.fromkeys(c.setting for c in family)
    parts = [_setting_text(s, [c for c in family if c.setting == s]) for s in settings]
    return f"against {family[0].reference}: {'; '.join(parts)}."


def _setting_text(setting: str, part: list[Comparison]) -> str:
    where = f"at {setting}, " if setting else ""
    if len(part) <= LISTED:
        return where + "; ".join(_comparison_text(c) for c in part)
    arms = {
        kind: [c.arm.rpartition(" = ")[2] for c in part if c.verdict.kind == kind]
        for kind in VERDICTS
    }
    detectable = [c.paired.detectable for c in part if c.verdict.kind == "within noise"]
    ends = (min(detectable, default=0), max(detectable, default=0))
    sizes = " to ".join(dict.fromkeys(number(size) for size in ends if size > 0))
    power = {"within noise": f"; detectable at 80 % power: {sizes}" if sizes else ""}
    parts = [
        f"{len(some)} {kind} ({', '.join(some)}{power.get(kind, '')})"
        for kind, some in arms.items()
        if some
    ]
    return f"{where}of {len(part)} other values, {', '.join(parts)}"


def _comparison_text(c: Comparison) -> str:
    if c.verdict.kind in ("better", "worse"):
        return f"{c.arm} is {c.verdict.text}"
    means = f"{number(c.arm_mean)} against {number(c.reference_mean)}"
    if c.verdict.kind == "within noise":
        means += f", n = {c.paired.difference.n}"
        if c.paired.detectable > 0:
            means += f"; detectable at 80 % power: {number(c.paired.detectable)}"
        return f"{c.arm} is within noise ({means})"
    return f"{c.arm}, {c.verdict.text}" + (f" ({means})" if c.paired.difference.n else "")


def _context(scored: Frame, untrained: list[Comparison]) -> str:
    """Where the arms stand between the untrained student and the teacher."""
    sentences: list[str] = []
    students = list(dict.fromkeys(c.reference for c in untrained))
    if len(students) > LISTED:
        means = [c.reference_mean for c in untrained]
        ends = f"{number(min(means))} to {number(max(means))}"
        sentences = [f"Against {len(students)} untrained students ({ends}): {_counted(untrained)}."]
        students = []
    for student in students:
        family = [c for c in untrained if c.reference == student]
        value = number(family[0].reference_mean)
        sentences.append(f"Against {untrained_name(student)} ({value}): {_counted(family)}.")
    teachers = scored[scored["kind"] == "teacher"]
    values = teachers["value"]
    listed = ", ".join(f"{row.arm} {number(row.value)}" for row in teachers.itertuples())
    if len(teachers) > LISTED:
        listed = f"{len(teachers)} teachers {number(values.min())} to {number(values.max())}"
    return " ".join([*sentences, *([f"For comparison: {listed}."] if listed else [])])


def _counted(family: Sequence[Comparison]) -> str:
    kinds = [c.verdict.kind for c in family]
    counts = [f"{kinds.count(kind)} {kind}" for kind in VERDICTS if kind in kinds]
    if len(counts) > 1:
        return ", ".join(counts)
    return f"all {len(kinds)} arms {kinds[0]}" if kinds[1:] else f"the arm is {kinds[0]}"


def untrained_name(reference: str) -> str:
    """A reference in words: an arm, or the meaning of a baseline row."""
    quantizer = reference.removeprefix("ptq_")
    if quantizer != reference:
        return f"the untrained student in {quantizer}"
    return f"the untrained {reference}" if reference.startswith("student") else reference
