"""This file is where rows that are token ids lie on disk, and are read one at a time.

    <folder>/NAME.prompt.npy         ids of all prompts, one after another; NAME is "train", …
    <folder>/NAME.prompt_ends.npy    where each of them ends
    <folder>/NAME.completion….npy    the same of the completions
    <folder>/NAME.teacher….npy       and of the teacher's prompts, where they are other ones
    <folder>/NAME.rows.npy           which row of the source each was
    <folder>/NAME.answers.json       what a right completion ends in, or null

A million rows are gigabytes of ids: they are mapped, not read, and an `Example` is made of them
when it is asked for.
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
    """One prompt, as ids, and what the dataset answers to it."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # ends in EOS unless max_length cut it; () if the row has none
    teacher_prompt_ids: tuple[int, ...]  # the same prompt, after the exemplars if there are any
    row: int  # of the source, counted from 0
    answer: str | None  # what a right completion ends in, where the source says so


@dataclass
class Draft:
    """An example on its way to the disk; its ids in four bytes each."""

    prompt: np.ndarray
    completion: np.ndarray
    row: int
    answer: str | None
    teacher: np.ndarray | None = None  # None: the teacher reads the same prompt


def packed(ids: Sequence[int]) -> np.ndarray:
    """Ids [N] as a draft has them."""
    return np.array(ids, dtype=np.int32)


class Examples(Sequence[Example]):
    """Examples that lie on disk."""

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
        """-1 where there is none."""
        return max(part.largest() for part in (self._prompt, self._completion, self._teacher))

    def unanswered(self) -> list[int]:
        """The rows of the source, of those that are here, that have no completion."""
        return self._rows[self._completion.lengths() == 0].tolist()


class Joined(Sequence[Example]):
    """Examples of several places as one sequence."""

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
    """Puts them there; the largest token id among them, -1 where there is none."""
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
    """Sequences of ids, one after another in one array."""

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
