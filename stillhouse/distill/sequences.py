"""Assemble the batches of a step: rollouts, the teacher's answers, the data's, or replayed ones.

The run passes in the functions that write sequences, by name: "student", "teacher", or "dataset".
The result is one batch per kind of data, with its weight in the step's loss. The loop trains on it
and does not need to know which method asked for it.

Processes: `num_processes` is the number of shares of a step's batch; the processes that actually
run take equal numbers of shares. So one GPU can repeat, more slowly, what eight did.
"""

from __future__ import annotations

import zlib
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from accelerate import Accelerator
from accelerate.utils import gather_object

from stillhouse.distill.curriculum import Choice
from stillhouse.distill.encoded import Example
from stillhouse.distill.replay import Entry, Replay
from stillhouse.distill.rollouts import Completions, uniforms
from stillhouse.methods import StepPlan
from stillhouse.spec import TrainSpec

# The step number that seeds a cold start's answers: beyond those of any run, and the same for all
# steps, so that a prompt's answer does not depend on the step.
COLD = 10**9 + 10


@runtime_checkable
class Writer(Protocol):
    """Writes one completion per example."""

    def __call__(
        self,
        examples: Sequence[Example],
        step: int,
        rows: Sequence[int],  # places in the step's batch, which seed each row's random numbers
        *,
        tokens: int | None = None,  # at most this many; None: the limit of a rollout
        prefixes: Sequence[Sequence[int]] | None = None,  # the first tokens of the completions
        greedy: bool = False,  # the likeliest tokens, not drawn ones
    ) -> Completions: ...


@dataclass(frozen=True)
class Share:
    """The sequences of one of `num_processes` shares of a batch."""

    index: int
    examples: list[Example]
    written: Completions


@dataclass(frozen=True)
class Batch:
    """This process's shares of the sequences of one kind that a step trains on."""

    writer: str  # "student", "teacher" or "dataset"
    weight: float  # weight of its mean loss in the step's loss
    step: int  # the step in which they were written
    prompt_length: int  # padded, so that a row's rounding does not depend on other rows
    shares: list[Share]

    @property
    def is_on_policy(self) -> bool:
        """Whether these are the student's own rollouts, old ones included."""
        return self.writer == "student"

    @property
    def trained_tokens(self) -> int:
        """Tokens of these shares that the loss counts: all except the forced ones."""
        return sum(
            len(ids) - forced
            for share in self.shares
            for ids, forced in zip(share.written.ids, share.written.forced, strict=True)
        )


def compression(ids: Sequence[int]) -> float:
    """How many times smaller zlib makes the token ids, four bytes each."""
    plain = array("I", ids).tobytes()
    return len(plain) / len(zlib.compress(plain)) if plain else 1.0


class Sequences:
    """The batches of each step."""

    def __init__(
        self,
        spec: TrainSpec,
        accelerator: Accelerator,
        choice: Choice,
        writers: Mapping[str, Writer],
    ) -> None:
        self.spec, self.accelerator = spec, accelerator
        self.choice, self.writers = choice, dict(writers)
        # For the cold start: the teacher's answers by row, and the first step that used each row,
        # known for all steps before `looked_at`.
        self.cold: dict[int, Completions] = {}
        self.asked_in: dict[int, int] = {}
        self.looked_at = 0
        self.replay = Replay(spec.method.replay_size)
        t = spec.training
        self.per_share = t.per_device_train_batch_size * t.gradient_accumulation_steps
        mine = t.num_processes // accelerator.num_processes
        first = accelerator.process_index * mine
        self.mine = range(first, first + mine)  # shares of this process
        # What this process generated in the current step, trained on or not: tokens by writer, and
        # rows; for rollouts, their number, and sums of their lengths and compression ratios.
        self.wrote: dict[str, float] = defaultdict(float)

    def happens(self, what: str, step: int, probability: float) -> bool:
        """A random decision of a step, the same in all processes."""
        return uniforms(self.spec.training.seed, what, step, [0], 1).item() < probability

    def batches(self, step: int, plan: StepPlan) -> list[Batch]:
        """The batches of step `step`, by its plan: one, or two that are mixed by weight.

        Raises:
            Interrupted: asked to stop during generation; nothing of this step is kept.
        """
        self.wrote.clear()
        if plan.replay_size:
            return [self._replayed(step, plan)]
        if plan.lmbda_as == "weight":
            shares = {"student": plan.lmbda, plan.off_policy_source: 1 - plan.lmbda}
        else:
            on_policy = self.happens("coin", step, plan.lmbda)
            shares = {"student" if on_policy else plan.off_policy_source: 1.0}
        return [self._write(who, step, plan, weight) for who, weight in shares.items() if weight]

    def _write(self, who: str, step: int, plan: StepPlan, weight: float = 1.0) -> Batch:
        """New sequences of one kind: all shares of this process at once."""
        rows, pool = self.choice.rows(step), self.choice.examples
        places = range(self.mine.start * self.per_share, self.mine.stop * self.per_share)
        examples = [pool[rows[place]] for place in places]
        seeds = None
        if who == "student" and plan.seed_tokens:
            forced = self.writers["teacher"](examples, step, places, tokens=plan.seed_tokens)
            seeds = forced.ids
            self.wrote["teacher"] += sum(map(len, seeds))
        shorter = who == "student" and plan.rollout_tokens < self.spec.rollout.max_new_tokens
        tokens = plan.rollout_tokens if shorter else None
        if plan.is_cold:
            written = self._cold_answers(step, [rows[place] for place in places])
        else:
            written = self.writers[who](examples, step, places, tokens=tokens, prefixes=seeds)
            self._count(who, written)
        if who == "student":
            self.wrote["rollouts"] += len(written.ids)
            self.wrote["length"] += sum(map(len, written.ids))
            self.wrote["room"] += len(written.ids) * plan.rollout_tokens
            self.wrote["compression"] += sum(map(compression, written.ids))
        length = max(len(pool[row].prompt_ids) for row in rows)
        shares = [
            Share(index, examples[part], written[part])
            for number, index in enumerate(self.mine)
            for part in [slice(number * self.per_share, (number + 1) * self.per_share)]
        ]
        return Batch(who, weight, step, length, shares)

    def _count(self, who: str, written: Completions) -> None:
        if who != "dataset":
            self.wrote[who] += sum(map(len, written.ids)) - sum(written.forced)
            self.wrote["truncated"] += sum(written.is_truncated)
            self.wrote["rows"] += len(written.ids)

    def _cold_answers(self, step: int, rows: Sequence[int]) -> Completions:
        """The teacher's answer to each of these prompts: one per prompt, for all steps.

        Counted in the first step that uses a prompt, also if a resumed run has to write it
        again.
        """
        new = [row for row in dict.fromkeys(rows) if row not in self.cold]
        if new:
            examples = [self.choice.examples[row] for row in new]
            written = self.writers["teacher"](examples, COLD, new)
            self.cold |= {row: written[i : i + 1] for i, row in enumerate(new)}
        for earlier in range(self.looked_at, step + 1):
            for row in self.choice.rows(earlier):
                self.asked_in.setdefault(row, earlier)
        self.looked_at = max(self.looked_at, step + 1)
        first = [self.cold[row] for row in dict.fromkeys(rows) if self.asked_in[row] == step]
        if first:
            self._count("teacher", Completions.joined(first))
        return Completions.joined([self.cold[row] for row in rows])

    def _replayed(self, step: int, plan: StepPlan) -> Batch:
        """Generate sequences, add them to the buffer, and draw a batch from the buffer."""
        new = [self._write("student", step, plan)]
        if self.happens("injection", step, plan.replay_injection):
            new.append(self._write("teacher", step, plan))
        self.replay.push([self._entry(batch) for batch in new])
        drawn = self.replay.draw(self.spec.training.seed, step)
        examples = [self.choice.examples[row] for row in drawn.rows]
        shares = [
            Share(index, examples[part], drawn.written[part])
            for index in self.mine
            for part in [slice(index * self.per_share, (index + 1) * self.per_share)]
        ]
        length = max(len(example.prompt_ids) for example in examples)
        return Batch(drawn.writer, 1.0, drawn.step, length, shares)

    def _entry(self, batch: Batch) -> Entry:
        """The batch of all processes: each process keeps the same complete buffer."""
        written = [share.written for share in batch.shares]
        if self.accelerator.num_processes > 1:
            written = gather_object(written)
        return Entry(
            batch.step, batch.writer, self.choice.rows(batch.step), Completions.joined(written)
        )
