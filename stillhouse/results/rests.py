"""This file is where rows of a table say what they rest on, and where that was mixed.

Weights, tokenizers and rows of data are known by digest or commit; processors round as they do.
Two of them under one name, in one table, may be all of a difference: it is said with its counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stillhouse.rundir import Json
from stillhouse.spec import digest

if TYPE_CHECKING:
    from stillhouse.results.table import Frame

SOURCES = {  # of a record -> as a person calls it
    "student": "student weights",
    "teacher": "teacher weights",
    "tokenizer": "tokenizer",
    "data": "data",
    "other_prompts": "other prompts",
}
MACHINE = ("processor", "cpu_capability", "gpu", "threads")
# What names each source, so that two contents of one name are told from two names.
_NAMED_BY = {
    "student": ("pair_source", "student", "student_revision", "pair_seed", "student_steps"),
    "teacher": ("pair_source", "teacher", "teacher_revision", "pair_seed"),
}
_TEACHES = ("teacher_steps",)  # a generated student without steps is its teacher


def of_run(record: Json) -> Json:
    """What a run rested on and computed with, as columns of a table."""
    data, rescue = record["spec"]["data"], record["spec"].get("rescue", {})
    facts = of_pair(record["spec"]["pair"])
    facts["data_key"] = _key([data[k] for k in ("data_source", "data_path", "data_split")])
    facts["data_key"] = _key([facts["data_key"], facts["teacher_key"]])
    facts["other_prompts_key"] = _key([facts["data_key"], rescue.get("other_file")])
    facts |= _sources("source", record.get("sources") or {})
    return facts | {name: record[name] for name in MACHINE if name in record}


def of_pair(pair: Json) -> Json:
    """What names a pair's models: rows that are equal in it should rest on the same weights."""
    keys = {
        role: _key([pair.get(k) for k in (*names, *_TEACHES)]) for role, names in _NAMED_BY.items()
    }
    return {f"{role}_key": key for role, key in keys.items()} | {"tokenizer_key": keys["student"]}


def of_score(score: Json) -> Json:
    """What a score rested on and was computed with, as columns of a table."""
    machine = {f"eval_{k}": v for k, v in (score.get("machine") or {}).items() if k in MACHINE}
    return _sources("scored", score.get("sources") or {}) | machine


def _sources(prefix: str, sources: Json) -> Json:
    pinned = ((name, entry.get("commit") or entry.get("digest")) for name, entry in sources.items())
    return {f"{prefix}_{name}": text.removeprefix("sampled-")[:10] for name, text in pinned if text}


def _key(content: Any) -> str:
    return digest(content)[:10]


def mixed(frame: Frame) -> list[str]:
    """A sentence for each thing of one name that rows of a table rest on in two versions."""
    said: list[str] = []
    for source, words in SOURCES.items():
        for what, counts in _contents(frame, source):
            said += mixed_counts(f"{words}{what}", counts)
    points = frame[frame["kind"] == "point"].drop_duplicates("id")
    said += mixed_counts("device in training", Counter(points["device"].dropna()))
    on_cpu = points[points["device"].eq("cpu")]
    for column in ("cpu_capability", "threads"):
        if column in frame:
            what = f"{column.replace('_', ' ').replace('cpu', 'CPU')} in training"
            said += mixed_counts(what, Counter(on_cpu[column].dropna()))
    if "eval_cpu_capability" in frame:
        scored = frame[frame["value"].notna()]
        without = scored[scored["eval_gpu"].isna()] if "eval_gpu" in frame else scored
        for _, part in without.groupby("task"):
            counts = Counter(part["eval_cpu_capability"].dropna())
            said += mixed_counts("CPU capability in scoring", counts)
        if "eval_gpu" in frame:
            said += mixed_counts("GPU in scoring", Counter(scored["eval_gpu"].dropna()))
    return list(dict.fromkeys(said))


def _contents(frame: Frame, source: str) -> Iterator[tuple[str, Counter[str]]]:
    """Per name of a source, how many rows rest on which content of it; what names it, in words."""
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
        what = f" of {', '.join(pairs)}" if len(names) > 1 else ""
        yield what, Counter(content for _, _, content in rows)


def mixed_counts(what: str, counts: Counter[Any]) -> list[str]:
    """The sentence, where there is more than one."""
    if len(counts) < 2:
        return []
    # A whole number in a column with gaps is a float there.
    values = [(f"{v:g}" if isinstance(v, float) else v, n) for v, n in counts.most_common()]
    shares = ", ".join(f"{n} with {value}" for value, n in values)
    return [f"Mixed {what}: {shares}. A difference between rows may come from that alone."]


def told(frame: Frame) -> list[tuple[str, str]]:
    """What the rows rest on, as facts of a page: each content and how many rows rest on it."""
    facts: list[tuple[str, str]] = []
    for source, words in SOURCES.items():
        for what, counts in _contents(frame, source):
            several = len(counts) > 1
            shares = [f"{c} ({n} rows)" if several else c for c, n in counts.most_common()]
            if shares:
                facts.append((f"{words}{what}", ("mixed: " if several else "") + ", ".join(shares)))
    points = frame[frame["kind"] == "point"].drop_duplicates("id")
    for column, name in (("processor", "processor"), ("cpu_capability", "CPU capability")):
        values = points[column].dropna().unique() if column in frame else ()
        if len(values):
            facts.append((name, ("mixed: " if len(values) > 1 else "") + ", ".join(values)))
    return facts


def is_same(row: Json, other: Json, *sources: str) -> bool:
    """Whether two rows rest on the same content of these sources, as far as both say so."""
    for source in sources:
        ours, theirs = (_content(one, source) for one in (row, other))
        if ours and theirs and ours != theirs:
            return False
    return True


def _content(row: Json, source: str) -> str | None:
    known = (row.get(f"scored_{source}"), row.get(f"source_{source}"))
    return next((content for content in known if isinstance(content, str)), None)
