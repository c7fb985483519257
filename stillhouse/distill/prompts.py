"""This file is where rows of data become token ids, and rows that cannot be used are counted.

Every source is brought to one form, a conversation and perhaps the assistant's last answer. Which
rows are held out follows from the content of the files alone, so every run of a sweep holds out the
same ones. No torch here: the tokenizer is given.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillhouse.at_hand import (
    download_command,
    looks_like_hub_id,
    pinned,
    snapshot,
    split_files,
)
from stillhouse.distill.chat import Chat, Rendered, Skip
from stillhouse.distill.pairs import NO_COMMITS, PreparedPair
from stillhouse.distill.tables import Table, read_table
from stillhouse.errors import ConfigError, DataError
from stillhouse.spec import DataSpec

Row = dict[str, Any]
Turn = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One prompt, as ids, and what the dataset answers to it."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # ends in EOS unless max_length cut it; () if the row has none
    teacher_prompt_ids: tuple[int, ...]  # the same prompt, after the exemplars if there are any
    row: int  # of the source, counted from 0
    answer: str | None  # what a right completion ends in, where the source says so


@dataclass(frozen=True)
class PromptSet:
    """What a run trains on, what it watches its loss on, and what had to be left out."""

    train: list[Example]
    held_out: list[Example]
    skipped: dict[str, int]  # rows left out, by reason
    others: list[Example] = field(default_factory=list[Example])  # prompts of another kind

    def summary(self) -> str:
        """One line for a log."""
        line = f"{len(self.train):,} rows to train on, {len(self.held_out):,} held out"
        line += f", {len(self.others):,} of another kind" if self.others else ""
        if not self.skipped:
            return line
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
        return f"{line}, {sum(self.skipped.values()):,} left out: {reasons}"


@dataclass(frozen=True)
class _Draft:
    """A row in the one form that all sources are brought to."""

    turns: list[Turn]  # ends where the assistant has to speak
    plain: str  # the same prompt for a tokenizer without a chat template
    completion: str | None
    answer: str | None


def load_prompts(
    data: DataSpec,
    prepared: PreparedPair,
    tokenizer: Any,
    few_shot: int,
    commits: Mapping[str, str] = NO_COMMITS,
) -> PromptSet:
    """The rows of `data` as ids of `tokenizer`, in file order; the held-out ones apart.

    `commits`: what open revisions of the hub mean (`place.commits`).
    With few_shot > 0 the teacher reads the first `few_shot` training rows, solved, before each
    prompt; these rows are themselves not trained on.
    Raises DataError for a path that does not exist, a line that cannot be parsed, or when no row
    can be used; ConfigError where hub data is not on this machine.
    """
    encode = _Encoder(data, tokenizer)
    train, held_out, where = _tables(data, prepared, commits)
    skipped: Counter[str] = Counter()

    candidates = range(len(held_out)) if held_out is not train else _from_the_end(train)
    watched = _take(held_out, candidates, data.held_out_rows, encode, skipped)
    if len(watched) < data.held_out_rows:
        raise DataError(
            f"{where}: held_out_rows is {data.held_out_rows}, only {len(watched)} of"
            f" {len(held_out)} rows can be used{_reasons(skipped)}"
        )
    # Some data sets repeat a prompt: what is held out must not be trained on as another row.
    encode.refused = {example.prompt_ids for example in watched}

    apart = {example.row for example in watched} if held_out is train else set[int]()
    rest = (row for row in range(len(train)) if row not in apart)
    wanted = len(train) if data.max_rows is None else data.max_rows
    kept = _take(train, rest, wanted + few_shot, encode, skipped)
    if few_shot and len(kept) > few_shot:
        exemplars = [encode.exemplar(train[example.row], where) for example in kept[:few_shot]]
        watched = encode.for_teacher(held_out, watched, exemplars, skipped)
        kept = encode.for_teacher(train, kept[few_shot:], exemplars, skipped)
    elif few_shot:
        kept = []
    if not kept:
        raise DataError(
            f"{where}: none of its {len(train)} rows is left to train on, after {len(watched)} held"
            f" out and {few_shot} shown to the teacher{_reasons(skipped)}"
        )
    return PromptSet(kept, watched, dict(skipped))


def load_others(file: Path, data: DataSpec, tokenizer: Any) -> list[Example]:
    """The usable rows of a file of prompts that are of another kind than the data's.

    Raises DataError for a file that is not there, cannot be parsed, or holds no row to be used.
    """
    if not file.is_file():
        raise DataError(f"other_file: {file}: no such file")
    table, skipped = read_table([file]), Counter[str]()
    encode = _Encoder(replace(data, data_source="local", prompt_template=None), tokenizer)
    found = _take(table, range(len(table)), len(table), encode, skipped)
    if not found:
        raise DataError(f"other_file: {file}: no row can be used{_reasons(skipped)}")
    return found


def _from_the_end(table: Table) -> Iterable[int]:
    """Row numbers, backwards through a permutation that follows from the files' content alone."""
    order = list(range(len(table)))
    random.Random(table.digest).shuffle(order)
    return reversed(order)


def _take(
    table: Table, rows: Iterable[int], count: int, encode: _Encoder, skipped: Counter[str]
) -> list[Example]:
    """The first `count` usable rows; the ones passed over are counted."""
    found: list[Example] = []
    for row in rows:
        if len(found) == count:
            break
        try:
            found.append(encode(table[row], row))
        except Skip as reason:
            skipped[str(reason)] += 1
    return found


def _reasons(skipped: Counter[str]) -> str:
    return "".join(f", {count} {reason}" for reason, count in skipped.items())


# ---------------------------------------------------------------- sources


def _tables(
    data: DataSpec, prepared: PreparedPair, commits: Mapping[str, str]
) -> tuple[Table, Table, str]:
    """Training rows, held-out rows (the same table where they are drawn from it), and a name."""
    if data.data_source == "generated":
        if data.data_split != "train":
            raise ConfigError(
                f"data {data.data_name}: data_split is {data.data_split}; of the generated problems"
                " only train may be trained on"
            )
        train = prepared.data_dir / "train.jsonl"
        return read_table([train]), read_table([prepared.data_dir / "held_out.jsonl"]), str(train)
    root = rows_at_hand(data, commits)
    table = read_table(split_files(root, data.data_split))
    return table, table, data.data_path or str(root)


def rows_at_hand(data: DataSpec, commits: Mapping[str, str]) -> Path:
    """The file or directory of rows, of data that is not generated.

    Raises ConfigError where hub data is not on this machine, DataError where a path is not there.
    """
    if data.data_path is None:
        raise ConfigError(f"data {data.data_name}: data_path says where its rows are; it is null")
    local = Path(data.data_path).expanduser()
    if local.exists():
        return local
    if data.data_source == "local" or not looks_like_hub_id(data.data_path):
        raise DataError(f"data {data.data_name}: {data.data_path}: no such file or directory")
    revision = pinned(commits, data.data_path, None, "dataset")
    found = snapshot(data.data_path, revision, "dataset")
    if found is None:
        raise ConfigError(
            f"data {data.data_name}: {data.data_path} is not on this machine; get it with"
            f" {download_command(data.data_path, revision, 'dataset')}"
        )
    return found


def _question(row: Row, data: DataSpec) -> _Draft:
    """GSM8K's form: a question, and an answer whose number follows ####."""
    question, solution = _text(row, "question"), _text(row, "answer")
    prompt = _asked(question, data)
    number = solution.rpartition("####")[2].strip().replace(",", "") if "####" in solution else None
    return _Draft([_user(prompt)], prompt + "\n", solution, number)


def _conversation(row: Row, data: DataSpec) -> _Draft:
    """Messages: the last assistant turn is the completion, all before it the prompt."""
    messages = row["messages"]
    if not isinstance(messages, list) or not all(_is_turn(m) for m in messages):
        raise Skip("messages that are no turns")
    turns: list[Turn] = [{"role": m["role"], "content": m["content"]} for m in messages]
    if not turns or not all(turn["content"].strip() for turn in turns):
        raise Skip("empty")
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise Skip("no assistant turn")
    if last == 0:
        raise Skip("no prompt")
    turns[last - 1]["content"] = _asked(turns[last - 1]["content"], data)
    plain = "\n".join(turn["content"] for turn in turns[:last]) + "\n"
    return _Draft(turns[:last], plain, turns[last]["content"], _answer(row))


def _prompt(row: Row, data: DataSpec) -> _Draft:
    """A prompt, and a completion if there is one."""
    if "messages" in row:
        return _conversation(row, data)
    if "prompt" not in row:
        raise Skip("no prompt or messages field")
    completion = None if row.get("completion") is None else _text(row, "completion")
    prompt = _asked(_text(row, "prompt"), data)
    return _Draft([_user(prompt)], prompt, completion, _answer(row))


_READERS: dict[str, Callable[[Row, DataSpec], _Draft]] = {
    "generated": _prompt,
    "gsm8k": _question,
    "tulu3": _prompt,
    "local": _prompt,
}


def _asked(question: str, data: DataSpec) -> str:
    """The question in the template that models are to be asked with."""
    return (data.prompt_template or "{question}").replace("{question}", question)


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if value is None:
        raise Skip(f"no {field} field")
    if not isinstance(value, str):
        raise Skip(f"{field} that is no text")
    if not value.strip():
        raise Skip("empty")
    return value


def _answer(row: Row) -> str | None:
    value = row.get("answer")
    return str(value) if isinstance(value, str | int) else None


def _is_turn(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )


def _user(text: str) -> Turn:
    return {"role": "user", "content": text}


# ---------------------------------------------------------------- ids


class _Encoder:
    """Rows to ids, with one tokenizer and one set of limits."""

    def __init__(self, data: DataSpec, tokenizer: Any) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._chat = Chat(tokenizer, data)
        self._read = _READERS[data.data_source]
        self.refused: set[tuple[int, ...]] = set()  # prompts that are held out

    def __call__(self, row: Row, number: int) -> Example:
        draft = self._read(row, self._data)
        prompt_ids, completion_ids = self._ids(draft, [])
        room = self._data.max_length - len(prompt_ids)
        if room <= 0:
            raise Skip("prompt too long")
        if room < self._data.min_completion:
            raise Skip("no room for a completion")
        if prompt_ids in self.refused:
            raise Skip("same prompt as a held-out row")
        return Example(prompt_ids, completion_ids[:room], prompt_ids, number, draft.answer)

    def exemplar(self, row: Row, where: str) -> _Draft:
        """A solved row for the teacher to read first."""
        draft = self._read(row, self._data)
        if draft.completion is None:
            raise DataError(
                f"{where}: teacher_few_shot needs rows with a completion, its first rows have none"
            )
        return draft

    def for_teacher(
        self,
        table: Table,
        examples: list[Example],
        exemplars: list[_Draft],
        skipped: Counter[str],
    ) -> list[Example]:
        """The examples with the exemplars before the teacher's prompt; too long ones counted."""
        kept: list[Example] = []
        for example in examples:
            draft = self._read(table[example.row], self._data)
            ids, _ = self._ids(replace(draft, completion=None), exemplars)
            room = max(len(example.completion_ids), self._data.min_completion)
            # A tokenizer that knows no limit says 10^30.
            if len(ids) + room > self._tokenizer.model_max_length:
                skipped["few-shot prompt too long for the teacher"] += 1
            else:
                kept.append(replace(example, teacher_prompt_ids=ids))
        return kept

    def _ids(self, draft: _Draft, exemplars: list[_Draft]) -> tuple[tuple[int, ...], ...]:
        (encoded,) = self._chat.encode([self._text(draft, exemplars)])
        return tuple(map(tuple, encoded))

    def _text(self, draft: _Draft, exemplars: list[_Draft]) -> Rendered:
        if not self._chat.has_template:
            solved = "".join(f"{e.plain}{e.completion}\n\n" for e in exemplars)
            return self._chat.plain(solved + draft.plain, draft.completion)
        # A system turn must come first, and there can be one: the row's own.
        system = [turn for turn in draft.turns[:1] if turn["role"] == "system"]
        turns = [*system]
        for exemplar in exemplars:
            turns += [turn for turn in exemplar.turns if turn["role"] != "system"]
            turns.append({"role": "assistant", "content": exemplar.completion or ""})
        turns += draft.turns[len(system) :]
        return self._chat.render(turns, draft.completion)
