"""Choose which prompts each step uses.

By default a step takes consecutive places in the shuffled orders of the epochs: every prompt is
used once before any is used again. A cold start has prompts of its own; the steps after it use the
others. With kept_prompts below 1, a step draws from the best-ranked prompts only, without repeats
within a step. Some places of a step can go to prompts of another kind (other_prompts). Every choice
is a function of the seed and the step alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stillhouse.distill.encoded import Example, Joined
from stillhouse.distill.rollouts import counted_generator, permutation
from stillhouse.errors import ConfigError
from stillhouse.methods import value_at
from stillhouse.spec import TrainSpec


class Choice:
    """The prompts of a run, and those of each step."""

    def __init__(
        self,
        spec: TrainSpec,
        train: Sequence[Example],
        others: Sequence[Example] = (),
        ranking: Sequence[int] | None = None,
    ) -> None:
        """ranking: rows of `train`, best first; None if all are kept.

        Raises:
            ConfigError: the cold start leaves no prompt for the steps after it.
        """
        self.spec, self.examples = spec, Joined(train, others)
        self._train, self._others = len(train), len(others)
        t, cold = spec.training, spec.rescue.cold_prompts
        self._batch = (
            t.per_device_train_batch_size * t.gradient_accumulation_steps * t.num_processes
        )
        if cold >= len(train) and spec.cold_steps < t.max_steps:
            raise ConfigError(
                f"cold_prompts {cold}: data {spec.data.data_name} has {len(train)} rows to train"
                " on, and the steps after the cold start need some too"
            )
        ranked = range(len(train)) if ranking is None else ranking
        self._cold = range(min(cold, len(train)))
        self._pool = [row for row in ranked if row >= cold]

    def rows(self, step: int) -> list[int]:
        """Indices of `examples`, one per place in the step's batch of all processes."""
        seed, batch = self.spec.training.seed, self._batch
        places = range(step * batch, (step + 1) * batch)
        share = value_at(self.spec.rescue.kept_prompts, step / max(1, self.spec.training.max_steps))
        if step < self.spec.cold_steps:
            rows = _in_epochs(seed, places, self._cold)
        elif self.spec.rescue.kept_prompts == 1:
            rows = _in_epochs(seed, places, self._pool)
        else:
            kept = self._pool[: max(1, round(share * len(self._pool)))]
            rows = _drawn(seed, step, batch, kept)
        return self._mixed(places, rows)

    def _mixed(self, places: range, rows: list[int]) -> list[int]:
        """The rows, with prompts of another kind at evenly spread places."""
        share = self.spec.rescue.other_prompts
        if not share:
            return rows
        others = range(self._train, self._train + self._others)
        instead = _in_epochs(self.spec.training.seed, places, others)
        # share * i may fall short of an integer by a rounding error.
        is_other = [int(share * (i + 1) + 1e-9) > int(share * i + 1e-9) for i in range(len(rows))]
        return [b if other else a for a, b, other in zip(rows, instead, is_other, strict=True)]


def _in_epochs(seed: int, places: range, pool: Sequence[int]) -> list[int]:
    size = len(pool)
    epochs = range(places[0] // size, places[-1] // size + 1)
    orders = {epoch: permutation(seed, epoch, size) for epoch in epochs}
    return [pool[orders[place // size][place % size]] for place in places]


def _drawn(seed: int, step: int, count: int, pool: Sequence[int]) -> list[int]:
    """Rows of a pool that changes from step to step; repeats only if the pool is too small."""
    generator = counted_generator(seed, "kept", step, 0)
    found: list[int] = []
    while len(found) < count:
        order = torch.randperm(len(pool), generator=generator).tolist()
        found += [pool[i] for i in order[: count - len(found)]]
    return found
