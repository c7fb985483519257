"""Store tokenized rows on disk as memory-mapped arrays, and read them one at a time.

    <folder>/NAME.prompt.npy         ids of all prompts, concatenated; NAME is "train", …
    <folder>/NAME.prompt_ends.npy    where each of them ends
    <folder>/NAME.completion….npy    the same for the completions
    <folder>/NAME.teacher….npy       the same for the teacher's prompts, if they differ
    <folder>/NAME.rows.npy           the row number of each in the source
    <folder>/NAME.answers.json       what a correct completion ends in, or null

A million rows are gigabytes of ids, so they are mapped, not loaded; an `Example` is created from
them on access.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.rundir import write_atomic


@dataclass(frozen=True)
class Example:
    """One prompt, as ids, and the dataset's answer to it."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # ends in EOS unless max_length cut it; () if the row has none
    teacher_prompt_ids: tuple[int, ...]  # the same prompt, after the exemplars if there are any
    row: int  # of the source, counted from 0
    answer: str | None  # what a correct completion ends in, if the source says so


@dataclass
class Draft:
    """An example before it is written to disk; its ids take four bytes each."""

    prompt: np.ndarray
    completion: np.ndarray
    row: int
    answer: str | None
    teacher: np.ndarray | None = None  # None: the teacher reads the same prompt


def packed(ids: Sequence[int]) -> np.ndarray:
    """Ids [N] as a Draft stores them."""
    return np.array(ids, dtype=np.int32)


class Examples(Sequence[Example]):
    """A sequence of examples on disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self._prompt = _Ragged(folder, f"{name}.prompt")
        self._completion = _Ragged(folder, f"{name}.completion")
        has_own = (folder / f"{name}.teacher.npy").exists()
        self._teacher = _Ragged(folder, f"{name}.teacher") if has_own else self._prompt
        self._rows = np.load(folder / f"{name}.rows.npy", mmap_mode="r")
        self._answers: list[str | None] = json.loads((folder / f"{name}.answers.json").read_bytes())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        prompt = self._prompt[place]
        teacher = prompt if self._teacher is self._prompt else self._teacher[place]
        row, answer = int(self._rows[place]), self._answers[place]
        return Example(prompt, self._completion[place], teacher, row, answer)

    def largest_token_id(self) -> int:
        """The largest id; -1 if there is none."""
        return max(part.largest() for part in (self._prompt, self._completion, self._teacher))

    def unanswered(self) -> list[int]:
        """The source row numbers of the examples without a completion."""
        return self._rows[self._completion.lengths() == 0].tolist()


class Joined(Sequence[Example]):
    """Several sequences of examples as one."""

    def __init__(self, *parts: Sequence[Example]) -> None:
        self._parts, self._ends = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        part = bisect_right(self._ends, place)
        return self._parts[part][place - (self._ends[part - 1] if part else 0)]


def write_examples(folder: Path, name: str, drafts: Sequence[Draft]) -> int:
    """Write the examples to disk; return the largest token id, -1 if there is none."""
    columns = {"prompt": [d.prompt for d in drafts], "completion": [d.completion for d in drafts]}
    teachers = [d.teacher for d in drafts if d.teacher is not None]
    if teachers:
        columns["teacher"] = teachers
    largest = -1
    for column, sequences in columns.items():
        ids_N = np.concatenate([packed([]), *sequences])
        ends = np.fromiter(accumulate(map(len, sequences)), np.int64, len(sequences))
        np.save(folder / f"{name}.{column}.npy", ids_N)
        np.save(folder / f"{name}.{column}_ends.npy", ends)
        largest = max(largest, int(ids_N.max(initial=-1)))
    rows = np.fromiter((d.row for d in drafts), np.int64, len(drafts))
    np.save(folder / f"{name}.rows.npy", rows)
    answers = json.dumps([d.answer for d in drafts])
    write_atomic(folder / f"{name}.answers.json", answers.encode())
    return largest


class _Ragged:
    """Sequences of ids, concatenated in one array."""

    def __init__(self, folder: Path, name: str) -> None:
        self._ids = np.load(folder / f"{name}.npy", mmap_mode="r")
        self._ends = np.load(folder / f"{name}_ends.npy", mmap_mode="r")

    def __getitem__(self, place: int) -> tuple[int, ...]:
        start = int(self._ends[place - 1]) if place else 0
        return tuple(self._ids[start : int(self._ends[place])].tolist())

    def largest(self) -> int:
        return int(self._ids.max(initial=-1))

    def lengths(self) -> np.ndarray:
        return np.diff(self._ends, prepend=0)
