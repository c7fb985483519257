"""This file is where sequences are written, and where randomness is counted instead of carried.

Every draw comes from a generator seeded by (seed, purpose, step, global row). So neither the number
of processes nor a resume changes a rollout, and any step can be replayed alone.
B rows, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from stillhouse.distill.decode import decode, obstacle
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
    """What was written, row by row; plain lists, for they go into checkpoints."""

    ids: list[list[int]]  # end-of-text included
    is_truncated: list[bool]  # reached max_new_tokens without end-of-text
    # Natural log of the probability of each token of ids[row][forced[row]:] under the very
    # distribution it was drawn from, temperature and forbidden end-of-text included. [] where none
    # was drawn: a row of a dataset, or a greedy one.
    log_probs: list[list[float]]
    forced: list[int]  # how many first tokens of a row somebody else wrote

    def __getitem__(self, part: slice) -> Completions:
        """Some of the rows."""
        return Completions(
            self.ids[part], self.is_truncated[part], self.log_probs[part], self.forced[part]
        )

    @classmethod
    def joined(cls, parts: Sequence[Completions]) -> Completions:
        """The rows of all parts, in order."""
        rows = ([v for p in parts for v in getattr(p, f.name)] for f in fields(cls))
        return cls(*rows)


class _Draw:
    """Picks each row's next token by the row's own uniform numbers; remembers its log-probability.

    To be called once per position, for all rows at once. The first call is for position forced[b]
    of row b's completion. Greedy: the likeliest token, and nothing to remember.
    """

    def __init__(
        self,
        uniform_BT: Tensor,
        forced: Sequence[int],
        rollout: RolloutSpec,
        eos_ids: Sequence[int],
        poll: Callable[[], None],
        greedy: bool = False,
    ) -> None:
        self.temperature, self.poll, self.greedy, self.step = rollout.temperature, poll, greedy, 0
        device = uniform_BT.device
        later = [F.pad(row_T[n:], (0, n)) for row_T, n in zip(uniform_BT, forced, strict=True)]
        self.uniform_TB1 = torch.stack(later, 1).unsqueeze(-1)
        endless = [max(0, rollout.min_new_tokens - n) for n in forced]  # steps that may not end
        step_T = torch.arange(max(endless), device=device)
        is_endless_TB = step_T.unsqueeze(1) < torch.tensor(endless, device=device)
        penalty_TB = torch.zeros_like(is_endless_TB, dtype=torch.float64)
        self.penalty_TB1 = penalty_TB.masked_fill_(is_endless_TB, -torch.inf).unsqueeze(-1)
        self.eos_BE = torch.tensor(list(eos_ids), device=device).expand(len(forced), -1)
        self.log_probs: list[Tensor] = []  # [B] each

    def __call__(self, logits_BV: Tensor) -> Tensor:
        self.poll()
        scores_BV = logits_BV.double()
        if self.step < len(self.penalty_TB1):
            penalty_BE = self.penalty_TB1[self.step].expand_as(self.eos_BE)
            scores_BV.scatter_add_(1, self.eos_BE, penalty_BE)
        uniform_B1 = self.uniform_TB1[self.step]
        self.step += 1
        if self.greedy:
            return scores_BV.argmax(-1)
        # Inverse of the cumulative distribution, in float64: 150,000 summands lose the tail.
        probability_BV = torch.softmax(scores_BV.div_(self.temperature), -1)
        cdf_BV = probability_BV.cumsum(-1)
        token_B1 = torch.searchsorted(cdf_BV, uniform_B1 * cdf_BV[:, -1:], right=True)
        # The number searched is below the last sum, so only NaN needs this.
        token_B1 = token_B1.clamp_max(logits_BV.shape[-1] - 1)
        self.log_probs.append(probability_BV.gather(1, token_B1).log().squeeze(1))
        return token_B1.squeeze(1)


class _OnlyToken(LogitsProcessor):
    """Leaves one token possible, the drawn one: greedy search then takes it."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        self.draw = draw

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return torch.full_like(scores, -torch.inf).scatter_(1, self.draw(scores)[:, None], 0.0)


def how(model: nn.Module) -> str:
    """A line for the log: what writes this model's rollouts, as it is now."""
    reason = obstacle(model)
    return "the fast decoder" if reason is None else f"transformers' generate ({reason})"


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
    prefixes: Sequence[Sequence[int]] | None = None,
    greedy: bool = False,
) -> Completions:
    """Completions of `prompts`, drawn from the model's own distribution at `rollout.temperature`.

    The model writes as in eval mode (dropout off), and its generation_config is not read.
    `prompt_length` pads the prompts (left) to a length that other processes use too. `poll` is
    called once per token and may raise.

    `prefixes` are the first tokens of the completions, one list per row. They count towards
    max_new_tokens and min_new_tokens, and position t is drawn by uniform_BT[:, t] behind them too.
    One that ends in end-of-text, or fills max_new_tokens, is the whole completion.

    `greedy` writes the likeliest tokens instead of drawn ones: no temperature, no uniform numbers.
    """
    begun = [list(p) for p in prefixes] if prefixes is not None else [[] for _ in prompts]
    assert max(map(len, begun)) <= rollout.max_new_tokens, "a prefix is longer than a completion"
    open_rows = [
        row
        for row, prefix in enumerate(begun)
        if len(prefix) < rollout.max_new_tokens and not (prefix and prefix[-1] in eos_ids)
    ]
    ids, log_probs = [*begun], [list[float]() for _ in begun]
    if open_rows:
        device = next(model.parameters()).device
        forced = [len(begun[row]) for row in open_rows]
        draw = _Draw(uniform_BT[open_rows].to(device), forced, rollout, eos_ids, poll, greedy)
        texts = [[*prompts[row], *begun[row]] for row in open_rows]
        length = (prompt_length or max(map(len, prompts))) + max(forced)
        ids_BP, mask_BP = (t.to(device) for t in pad_left(texts, length, pad_id))
        new = rollout.max_new_tokens - min(forced)
        if obstacle(model) is None:
            new_BC = decode(model, ids_BP, mask_BP, draw, eos_ids=eos_ids, max_new_tokens=new)
        else:
            new_BC = generate(
                model, ids_BP, mask_BP, draw, pad_id=pad_id, eos_ids=eos_ids, max_new_tokens=new
            )
        values_BC = [[]] * len(open_rows) if greedy else torch.stack(draw.log_probs, 1).tolist()
        for row, tokens, values in zip(open_rows, new_BC.tolist(), values_BC, strict=True):
            drawn = cut_after_eos(tokens[: rollout.max_new_tokens - len(begun[row])], eos_ids)
            ids[row], log_probs[row] = begun[row] + drawn, values[: len(drawn)]
    truncated = [row[-1] not in eos_ids for row in ids]
    return Completions(ids, truncated, log_probs, list(map(len, begun)))


def generate(
    model: Any,
    ids_BP: Int[Tensor, "B P"],
    mask_BP: Int[Tensor, "B P"],
    pick: Callable[[Tensor], Tensor],
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    max_new_tokens: int,
) -> Int[Tensor, "B C"]:
    """What decode() gives, by transformers' `generate`: for every model, and slower."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(eos_ids),
    )
    # generate() fills what `config` leaves at its default from the model's own; so that has none.
    habits, model.generation_config = model.generation_config, GenerationConfig()
    was_training = model.training
    model.eval()
    try:
        out_BT = model.generate(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            generation_config=config,
            logits_processor=LogitsProcessorList([_OnlyToken(pick)]),
        )
    finally:
        model.train(was_training)
        model.generation_config = habits
    return out_BT[:, ids_BP.shape[1] :]


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
