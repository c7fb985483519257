"""This file is where sequences are written, and where randomness is counted instead of carried.

Every draw comes from a generator seeded by (seed, purpose, step, global row). So neither the number
of processes nor a resume changes a rollout, and any step can be replayed alone.
B rows, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from stillhouse.spec import RolloutSpec


def counted_generator(seed: int, purpose: str, step: int, row: int) -> torch.Generator:
    """The generator of one draw; the same four words give the same numbers on every machine."""
    words = f"{seed}/{purpose}/{step}/{row}".encode()
    number = int.from_bytes(hashlib.sha256(words).digest()[:7], "big")
    return torch.Generator().manual_seed(number)


def uniforms(
    seed: int, purpose: str, step: int, rows: Sequence[int], length: int
) -> Float[Tensor, "B T"]:
    """One uniform number in [0, 1) per row and position, float64, independent of the other rows."""
    draws = [
        torch.rand(
            length, generator=counted_generator(seed, purpose, step, row), dtype=torch.float64
        )
        for row in rows
    ]
    return torch.stack(draws)


def permutation(seed: int, epoch: int, length: int) -> list[int]:
    """The order of the data in one epoch."""
    return torch.randperm(length, generator=counted_generator(seed, "order", epoch, 0)).tolist()


@dataclass(frozen=True)
class Completions:
    """What was written: one list of token ids per row, its end-of-text included."""

    ids: list[list[int]]
    truncated: int  # rows that reached max_new_tokens without end-of-text


class _CountedDraw(LogitsProcessor):
    """Leaves one token possible: the one that the row's own uniform number picks."""

    def __init__(
        self, uniform_BT: Tensor, prompt_length: int, temperature: float, poll: Callable[[], None]
    ) -> None:
        self.uniform_BT, self.prompt_length = uniform_BT, prompt_length
        self.temperature, self.poll = temperature, poll

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.poll()
        position = input_ids.shape[1] - self.prompt_length
        # Inverse of the cumulative distribution, in float64: 150,000 summands lose the tail.
        cdf_BV = torch.softmax(scores.double() / self.temperature, -1).cumsum(-1)
        threshold_B1 = self.uniform_BT[:, position : position + 1] * cdf_BV[:, -1:]
        token_B1 = torch.searchsorted(cdf_BV, threshold_B1, right=True)
        token_B1 = token_B1.clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


@torch.no_grad()
def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniform_BT: Float[Tensor, "B T"],
    rollout: RolloutSpec,
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    poll: Callable[[], None],
    prompt_length: int | None = None,
) -> Completions:
    """Completions of `prompts`, drawn from the model's own distribution at `rollout.temperature`.

    The model is in eval mode while it writes (dropout off), and its generation_config is not read.
    `prompt_length` pads the prompts (left) to a length that other processes use too. `poll` is
    called once per token and may raise.
    """
    device = next(model.parameters()).device
    length = prompt_length or max(map(len, prompts))
    ids_BP, mask_BP = pad_left(prompts, length, pad_id)
    config = GenerationConfig(
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        do_sample=False,  # _CountedDraw draws; greedy search then takes the only token left
        num_beams=1,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(eos_ids),
    )
    draw = _CountedDraw(uniform_BT.to(device), length, rollout.temperature, poll)
    # generate() fills what `config` leaves at its default from the model's own; so that has none.
    habits, model.generation_config = model.generation_config, GenerationConfig()
    was_training = model.training
    model.eval()
    try:
        out_BT = model.generate(
            input_ids=ids_BP.to(device),
            attention_mask=mask_BP.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
        )
    finally:
        model.train(was_training)
        model.generation_config = habits
    rows = [cut_after_eos(row, eos_ids) for row in out_BT[:, length:].tolist()]
    truncated = sum(row[-1] not in eos_ids for row in rows)
    return Completions(rows, truncated)


def cut_after_eos(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The row up to its first end-of-text, which is kept; what follows is padding.

    By position, not by value: where pad and end-of-text are one id, a mask by value would drop the
    end and the student would never learn to stop.
    """
    for index, token in enumerate(row):
        if token in eos_ids:
            return row[: index + 1]
    return row


def pad_left(
    sequences: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Token ids and mask of shape [B, length], every sequence ending at the last position."""
    ids = [[pad_id] * (length - len(s)) + list(s) for s in sequences]
    mask = [[0] * (length - len(s)) + [1] * len(s) for s in sequences]
    return torch.tensor(ids), torch.tensor(mask)
