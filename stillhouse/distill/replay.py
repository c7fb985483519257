"""Keep the sequences of earlier steps in a buffer, and draw from it again.

An entry holds everything that one step wrote of one kind, all its rows, with the log-probabilities
the tokens were drawn with: a policy gradient on an old rollout needs those, and no later model can
reproduce them. The buffer is part of a checkpoint, so it consists of plain lists of numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stillhouse.distill.rollouts import Completions, counted_generator


@dataclass(frozen=True)
class Entry:
    """The sequences that a step wrote, of all processes, in the order of the step's rows."""

    step: int  # counted from 0
    writer: str  # "student" or "teacher"
    rows: list[int]  # of the data
    written: Completions


class Replay:
    """A first-in, first-out buffer of `size` entries."""

    def __init__(self, size: int) -> None:
        self.entries: deque[Entry] = deque(maxlen=size)

    def push(self, entries: Sequence[Entry]) -> None:
        """Keep what a step wrote; a step that is repeated after an interruption replaces itself."""
        again = {entry.step for entry in entries}
        kept = [entry for entry in self.entries if entry.step not in again]
        self.entries.clear()
        self.entries.extend([*kept, *entries])

    def draw(self, seed: int, step: int) -> Entry:
        """One entry, with weight 1 + (its step + 1) / (step + 1): the newest weigh nearly double.

        Source: `replay_buffer` of the cliff repository, which counts steps from 1.
        """
        weights = [1 + (entry.step + 1) / (step + 1) for entry in self.entries]
        generator = counted_generator(seed, "replay", step, 0)
        drawn = torch.multinomial(
            torch.tensor(weights, dtype=torch.float64), 1, generator=generator
        )
        return self.entries[int(drawn)]

    def state(self) -> list[dict[str, Any]]:
        """The buffer for a checkpoint, as JSON; floats are restored exactly."""
        return [asdict(entry) for entry in self.entries]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Take over what `state` returned."""
        self.entries.clear()
        self.entries.extend(
            Entry(**{**entry, "written": Completions(**entry["written"])}) for entry in state
        )
