"""Record which weights, data, and machines each row of a table depends on, and report mixtures.

Weights, tokenizers, and data rows are known by digest or commit; processors round differently.
Two versions under one name may explain a whole difference, so they are reported with counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from stillhouse.identity import digest
from stillhouse.rundir import Json

Frame = Any  # a pandas DataFrame, whose columns no type checker can follow
SOURCES = {  # key in a record -> text
    "student": "student weights",
    "teacher": "teacher weights",
    "tokenizer": "tokenizer",
    "data": "data",
    "other_prompts": "other prompts",
}
MACHINE = ("processor", "cpu_capability", "gpu", "threads")
# The fields that name each source, so that two contents of one name are told from two names.
# A generated student without steps is its teacher, so both keys include the teacher's steps.
_NAMED_BY = {
    "student": ("pair_source", "student", "student_revision", "pair_seed", "student_steps"),
    "teacher": ("pair_source", "teacher", "teacher_revision", "pair_seed"),
}


def run_columns(record: Json) -> Json:
    """What a run depended on and was computed with, as columns of a table."""
    data, rescue = record["spec"]["data"], record["spec"].get("rescue", {})
    columns = pair_columns(record["spec"]["pair"])
    data_key = _key([data[k] for k in ("data_source", "data_path", "data_split")])
    columns["data_key"] = _key([data_key, columns["teacher_key"]])
    columns["other_prompts_key"] = _key([columns["data_key"], rescue.get("other_file")])
    columns |= _source_columns("source", record.get("sources") or {})
    return columns | {name: record[name] for name in MACHINE if name in record}


def pair_columns(pair: Json) -> Json:
    """Keys of a pair's models: rows with equal keys should depend on the same weights."""
    keys = {
        f"{role}_key": _key([pair.get(k) for k in (*names, "teacher_steps")])
        for role, names in _NAMED_BY.items()
    }
    return keys | {"tokenizer_key": keys["student_key"]}


def score_columns(score: Json) -> Json:
    """What a score depended on and was computed with, as columns of a table."""
    machine: Json = score.get("machine") or {}
    columns = _source_columns("scored", score.get("sources") or {})
    return columns | {f"eval_{k}": v for k, v in machine.items() if k in MACHINE}


def _source_columns(prefix: str, sources: Json) -> Json:
    pinned = ((name, entry.get("commit") or entry.get("digest")) for name, entry in sources.items())
    return {f"{prefix}_{name}": text.removeprefix("sampled-")[:10] for name, text in pinned if text}


def _key(content: Any) -> str:
    return digest(content)[:10]


def mixtures(frame: Frame) -> list[str]:
    """A note for each name whose rows depend on two or more versions."""
    notes: list[str] = []
    for source, text in SOURCES.items():
        for suffix, counts in _contents(frame, source):
            notes += mixture(f"{text}{suffix}", counts.elements())
    points = frame[frame["kind"] == "point"].drop_duplicates("id")
    notes += mixture("device in training", points["device"])
    for column in ("cpu_capability", "threads"):
        if column in frame:
            name = column.replace("_", " ").replace("cpu", "CPU")
            notes += mixture(f"{name} in training", points[points["device"].eq("cpu")][column])
    scored = frame[frame["value"].notna()]
    if "eval_cpu_capability" in frame:
        on_cpu = scored[scored["eval_gpu"].isna()] if "eval_gpu" in frame else scored
        for _, part in on_cpu.groupby("task"):
            notes += mixture("CPU capability in scoring", part["eval_cpu_capability"])
    if "eval_gpu" in frame:
        notes += mixture("GPU in scoring", scored["eval_gpu"])
    return list(dict.fromkeys(notes))


def _contents(frame: Frame, source: str) -> Iterator[tuple[str, Counter[str]]]:
    """Per name of a source: its suffix in text, and how many rows depend on which content."""
    key = f"{source}_key"
    columns = [name for name in (f"source_{source}", f"scored_{source}") if name in frame]
    if key not in frame or not columns:
        return
    names = frame[key].dropna().unique()
    for name in names:
        part = frame[frame[key] == name]
        rows = {
            (row["kind"], row["id"] if row["kind"] == "point" else row["arm"], row[column])
            for row in part.to_dict("records")
            for column in columns
            if isinstance(row[column], str)
        }
        pairs = part["pair_name"].dropna().unique()
        suffix = f" of {', '.join(pairs)}" if len(names) > 1 else ""
        yield suffix, Counter(content for _, _, content in rows)


def mixture(what: str, values: Iterable[Any]) -> list[str]:
    """The note, if there are two or more values; missing ones (None, NaN) do not count."""
    counts = Counter(value for value in values if value is not None and value == value)
    if len(counts) < 2:
        return []
    # A whole number in a column with gaps is a float there.
    known = [(f"{v:g}" if isinstance(v, float) else v, n) for v, n in counts.most_common()]
    shares = ", ".join(f"{n} with {value}" for value, n in known)
    return [f"Mixed {what}: {shares}. A difference between rows may come from that alone."]


def as_facts(frame: Frame) -> list[tuple[str, str]]:
    """What the rows depend on, as (name, content) for the page; "mixed" if there are several."""
    facts: list[tuple[str, str]] = []
    for source, text in SOURCES.items():
        for suffix, counts in _contents(frame, source):
            shares = [f"{c} ({n} rows)" if len(counts) > 1 else c for c, n in counts.most_common()]
            facts.append((f"{text}{suffix}", _listed(shares)))
    points = frame[frame["kind"] == "point"].drop_duplicates("id")
    for column, name in (("processor", "processor"), ("cpu_capability", "CPU capability")):
        facts.append((name, _listed(points[column].dropna().unique() if column in frame else ())))
    return [(name, value) for name, value in facts if value]


def _listed(values: Iterable[str]) -> str:
    known = [*values]
    return ("mixed: " if len(known) > 1 else "") + ", ".join(known)


def same_sources(row: Json, other: Json, *sources: str) -> bool:
    """Whether two rows depend on the same content of these sources, as far as both record it."""
    pairs = [(_content(row, source), _content(other, source)) for source in sources]
    return all(ours == theirs for ours, theirs in pairs if ours and theirs)


def _content(row: Json, source: str) -> str | None:
    known = (row.get(f"scored_{source}"), row.get(f"source_{source}"))
    return next((content for content in known if isinstance(content, str)), None)
