"""Convert rows to token ids, a thousand rows at a time, and count the rows that cannot be used.

The result is cached (`encoded`) under a key of all that it depends on: rows, tokenizer, template,
and limits.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.distill.cache import Say, made_once
from stillhouse.distill.chat import Chat, Rendered
from stillhouse.distill.encoded import Draft, packed, write_examples
from stillhouse.distill.formats import UNDERSTOOD, Conversation, Row, Skip, Turn, read
from stillhouse.distill.tables import Table
from stillhouse.errors import DataError
from stillhouse.identity import digest
from stillhouse.rundir import Json, file_digest
from stillhouse.spec import DataSpec, PairSpec, template_fields

VERSION = 1  # increment it whenever the same rows would give other ids
BATCH = 1000  # rows that are tokenized together
PROGRESS_S = 5.0  # between two progress lines
# Libraries whose version may change the ids of a row.
LIBRARIES = ("jinja2", "tokenizers", "transformers")

Parts = dict[str, list[Draft]]  # what is kept, by name


@dataclass(frozen=True)
class Context:
    """What only the teacher reads: exemplars, and a template over each row in place of its
    question."""

    few_shot: int = 0
    template: str | None = None

    @classmethod
    def of(cls, pair: PairSpec) -> Context:
        """The context of a pair's teacher."""
        return cls(pair.teacher_few_shot, pair.teacher_prompt)

    @property
    def content(self) -> list[Any]:
        """What decides the teacher's prompts, besides the rows."""
        return [self.few_shot, *([] if self.template is None else [self.template])]

    def applied(self, row: Row, conversation: Conversation) -> Conversation:
        """The conversation with its (last) question as the teacher reads it.

        Raises:
            KeyError: the row has no text or number for a field of the template.
        """
        if self.template is None:
            return conversation
        turns = [*conversation.turns]
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
        question = turns[last]["content"]
        known: Row = {**row, "question": question}
        if conversation.completion is not None:
            known["completion"] = conversation.completion["content"]
        for name in template_fields(self.template):
            value = known.get(name)  # of a table, a missing number is nan
            if not isinstance(value, str | int | float) or value != value:
                raise KeyError(name)
        told = self.template.format_map(known)
        turns[last] = turns[last] | {"content": told}
        before, _, after = conversation.plain.rpartition(question)
        return replace(conversation, turns=turns, plain=before + told + after)


class Encoder:
    """Converts rows to ids, with one tokenizer and one set of limits."""

    def __init__(self, data: DataSpec, chat: Chat) -> None:
        self._data, self._chat = data, chat
        self._skipped: Counter[str] = Counter()
        self._seen: dict[str, str] = {}
        self._refused: set[bytes] = set()  # prompts that are held out

    def once(self, content: Any, cache_dir: Path, choose: Callable[[], Parts]) -> tuple[Path, Json]:
        """The directory of the rows from `choose`, now or in an earlier process, and their facts.

        content: what the rows depend on, besides tokenizer, template, and limits.
        """
        limits = [self._data.data_source, self._data.prompt_template, self._data.max_length]
        limits += [self._data.min_completion, self._data.max_rows, self._data.held_out_rows]
        read_by = [_identity(self._chat.tokenizer), self._chat.fingerprint()]
        home = cache_dir / "rows" / digest([VERSION, content, limits, *read_by])[:16]

        def make(into: Path) -> Json:
            parts = choose()
            largest = [write_examples(into, name, drafts) for name, drafts in parts.items()]
            return {
                "rows": {name: len(drafts) for name, drafts in parts.items()},
                "largest_token_id": max(largest),
                "skipped": dict(self._skipped),
                "seen": self._seen,
            }

        return home, made_once(home, self._say, make)

    def _say(self, line: str) -> None:
        print(f"data {self._data.data_name}: {line}", flush=True)

    # ------------------------------------------------------------ which rows

    def chosen(
        self, train: Table, held_out: Table, where: str, context: Context
    ) -> tuple[list[Draft], list[Draft]]:
        """Rows to train on, and held-out ones."""
        data, few_shot = self._data, context.few_shot
        candidates = range(len(held_out)) if held_out is not train else _from_the_end(train)
        watched = self.take(held_out, candidates, data.held_out_rows)
        if len(watched) < data.held_out_rows:
            raise DataError(
                f"{where}: held_out_rows is {data.held_out_rows}, only {len(watched)} of"
                f" {len(held_out)} rows can be used{self.left_out()}"
            )
        # Some data sets repeat a prompt: no held-out prompt may be trained on as another row.
        self._refused = {draft.prompt.tobytes() for draft in watched}
        apart = {draft.row for draft in watched} if held_out is train else set[int]()
        rest = [row for row in range(len(train)) if row not in apart]
        wanted = len(train) if data.max_rows is None else data.max_rows
        kept = self.take(train, rest, wanted + few_shot)
        shown, kept = kept[:few_shot], kept[few_shot:]
        if kept and context != Context():
            exemplars = self._exemplars(train, shown, where)
            watched = self._for_teacher(held_out, watched, exemplars, context, where)
            kept = self._for_teacher(train, kept, exemplars, context, where)
        if not kept:
            raise DataError(
                f"{where}: none of its {len(train)} rows is left to train on, after {len(watched)}"
                f" held out and {few_shot} shown to the teacher{self.left_out()}"
            )
        return kept, watched

    def take(self, table: Table, rows: Sequence[int], count: int) -> list[Draft]:
        """The first `count` usable rows; the ones passed over are counted."""
        found: list[Draft] = []
        coming, progress = iter(rows), _Progress(self._say, min(count, len(rows)))
        # Never more than requested: rows after the last one are not read.
        while batch := list(islice(coming, min(BATCH, count - len(found)))):
            found += self._drafts(table, batch)
            progress.at(len(found))
        return found

    def left_out(self) -> str:
        """What was left out and which formats are supported, for the end of an error message."""
        why = reasons(self._skipped, self._seen)
        return f", {why}; understood are {UNDERSTOOD}" if why else ""

    def _leave_out(self, row: int, skip: Skip) -> None:
        self._skipped[skip.reason] += 1
        self._seen.setdefault(skip.reason, f"row {row}" + (f": {skip.seen}" if skip.seen else ""))

    # ------------------------------------------------------------ rows to ids

    def _drafts(self, table: Table, numbers: Sequence[int]) -> list[Draft]:
        """Those of these rows that can be used."""
        known: list[tuple[int, str | None]] = []
        texts: list[Rendered] = []
        for number, row in zip(numbers, table.at(numbers), strict=True):
            try:
                conversation = read(row, self._data)
                texts.append(self._text(conversation, conversation.completion))
            except Skip as skip:
                self._leave_out(number, skip)
            else:
                known.append((number, conversation.answer))
        found: list[Draft] = []
        for (number, answer), ids in zip(known, self._chat.encode(texts), strict=True):
            prompt, completion = map(packed, ids)
            room = self._data.max_length - len(prompt)
            if (reason := self._unfit(prompt, room)) is not None:
                self._leave_out(number, Skip(reason, f"its prompt has {len(prompt)} tokens"))
            else:
                found.append(Draft(prompt, completion[:room], number, answer))
        return found

    def _unfit(self, prompt: np.ndarray, room: int) -> str | None:
        if room <= 0:
            return "prompt too long"
        if room < self._data.min_completion:
            return "no room for a completion"
        return "same prompt as a held-out row" if prompt.tobytes() in self._refused else None

    def _exemplars(self, table: Table, drafts: Sequence[Draft], where: str) -> list[Conversation]:
        """Rows with answers, as few-shot examples for the teacher."""
        found = [read(row, self._data) for row in table.at([draft.row for draft in drafts])]
        if any(exemplar.completion is None for exemplar in found):
            raise DataError(
                f"{where}: teacher_few_shot needs rows with a completion, its first rows have none"
            )
        return found

    def _for_teacher(
        self,
        table: Table,
        drafts: list[Draft],
        exemplars: list[Conversation],
        context: Context,
        where: str,
    ) -> list[Draft]:
        """The drafts with the teacher's own prompts; counts those that are too long.

        Raises DataError: a row lacks a field of the template.
        """
        kept: list[Draft] = []
        progress = _Progress(self._say, len(drafts))
        for first in range(0, len(drafts), BATCH):
            batch = drafts[first : first + BATCH]
            texts: list[Rendered] = []
            written: list[Draft] = []
            for draft, row in zip(batch, table.at([d.row for d in batch]), strict=True):
                try:
                    taught = context.applied(row, read(row, self._data))
                    texts.append(self._text(taught, None, exemplars))
                except Skip as skip:
                    self._leave_out(draft.row, skip)
                except KeyError as error:
                    more = [str(name) for name in row if name not in ("question", "completion")]
                    raise DataError(
                        f"{where}: row {draft.row} has no text for {{{error.args[0]}}} of"
                        " teacher_prompt. Its fields are question, completion where it has an"
                        f" answer, and what else the row has: {', '.join(more)}"
                    ) from error
                else:
                    written.append(draft)
            for draft, (ids, _) in zip(written, self._chat.encode(texts), strict=True):
                room = max(len(draft.completion), self._data.min_completion)
                # A tokenizer without a limit reports 10^30.
                if len(ids) + room > self._chat.tokenizer.model_max_length:
                    kind = "few-shot " if exemplars else ""
                    reason = f"{kind}prompt too long for the teacher"
                    self._leave_out(draft.row, Skip(reason, f"it has {len(ids)} tokens"))
                else:
                    kept.append(replace(draft, teacher=packed(ids)))
            progress.at(first + len(batch))
        return kept

    def _text(
        self,
        conversation: Conversation,
        completion: Turn | None,
        exemplars: Sequence[Conversation] = (),
    ) -> Rendered:
        """Raises Skip: turns that cannot be written with this tokenizer."""
        if not self._chat.has_template:
            return self._plain(conversation, completion, exemplars)
        # A system turn must come first, and there can be one: the row's own.
        system = [turn for turn in conversation.turns[:1] if turn["role"] == "system"]
        turns = [*system]
        for exemplar in exemplars:
            turns += [turn for turn in exemplar.turns if turn["role"] != "system"]
            turns += [exemplar.completion] if exemplar.completion else []
        turns += conversation.turns[len(system) :]
        return self._chat.render(turns, completion, conversation.tools)

    def _plain(
        self,
        conversation: Conversation,
        completion: Turn | None,
        exemplars: Sequence[Conversation],
    ) -> Rendered:
        every = [*conversation.turns, completion or {}]
        if conversation.tools or any("tool_calls" in turn for turn in every):
            raise Skip("tools, and the tokenizer has no chat template to write them")
        solved = "".join(f"{e.plain}{(e.completion or {})['content']}\n\n" for e in exemplars)
        answer = None if completion is None else completion["content"]
        return self._chat.plain(solved + conversation.plain, answer)


class _Progress:
    """Logs a line every few seconds: rows done, rows per second, seconds left."""

    def __init__(self, say: Say, total: int) -> None:
        self._say, self._total = say, total
        self._start = self._told = time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if done and now - self._told >= PROGRESS_S:
            rate = done / (now - self._start)
            left = (self._total - done) / rate
            done_of = f"{done:,} of {self._total:,} rows encoded"
            self._say(f"{done_of}, {rate:,.0f} a second, {left:,.0f} s left")
            self._told = now


def reasons(skipped: dict[str, int], seen: dict[str, str]) -> str:
    return ", ".join(f"{count:,} {reason} ({seen[reason]})" for reason, count in skipped.items())


def _identity(tokenizer: Any) -> Json:
    """What decides the ids that a tokenizer gives to a text, by content."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = hashlib.sha256(backend.to_str().encode()).hexdigest()
    else:  # written in Python: its saved files define it
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            model = digest({f.name: file_digest(f) for f in Path(folder).iterdir()})
    return {
        "class": type(tokenizer).__name__,
        "model": model,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "most": tokenizer.model_max_length,
        "versions": [version(library) for library in LIBRARIES],
    }


def _from_the_end(table: Table) -> Sequence[int]:
    """Row numbers, backwards through a permutation that depends only on the files' content."""
    order = list(range(len(table)))
    random.Random(table.digest).shuffle(order)
    return order[::-1]
