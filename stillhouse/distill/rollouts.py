"""Generate completions, with random numbers that depend only on seed, purpose, step, and row.

Every draw comes from a generator seeded by (seed, purpose, step, global row). So neither the number
of processes nor a resume changes a rollout, and any step can be replayed alone.
Legend: B rows, b rows still being written, P prompt positions, T positions, V vocabulary,
E end-of-text ids.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.distill.engine import Engine
from stillhouse.errors import OutOfMemory
from stillhouse.spec import RolloutSpec


def counted_generator(seed: int, purpose: str, step: int, row: int) -> torch.Generator:
    """The generator of one draw; the same four arguments give the same numbers on every machine."""
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
    """Generated sequences, row by row; plain lists, because they are stored in checkpoints."""

    ids: list[list[int]]  # end-of-text included
    is_truncated: list[bool]  # reached max_new_tokens without end-of-text
    # Natural log of the probability of each token of ids[row][forced[row]:] under the exact
    # distribution it was drawn from, including temperature and forbidden end-of-text. [] if none
    # was drawn: a row of a dataset, or a greedy one.
    log_probs: list[list[float]]
    forced: list[int]  # how many first tokens of a row were given, not drawn

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

    Call it once per position, with all rows that are still being written. The first call is for
    position forced[b] of row b's completion. Greedy: takes the likeliest token, stores nothing.
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
        endless = [max(0, rollout.min_new_tokens - n) for n in forced]  # steps without an end
        step_T = torch.arange(max(endless), device=device)
        is_endless_TB = step_T.unsqueeze(1) < torch.tensor(endless, device=device)
        penalty_TB = torch.zeros_like(is_endless_TB, dtype=torch.float64)
        self.penalty_TB1 = penalty_TB.masked_fill_(is_endless_TB, -torch.inf).unsqueeze(-1)
        self.eos_E = torch.tensor(list(eos_ids), device=device)
        self.log_probs_BT = torch.zeros_like(uniform_BT)  # of row b's steps, [b, step]

    def __call__(self, logits_bV: Tensor, row_b: Tensor) -> Tensor:
        self.poll()
        step, self.step = self.step, self.step + 1
        scores_bV = logits_bV.double()
        if step < len(self.penalty_TB1):
            eos_bE = self.eos_E.expand(len(row_b), -1)
            penalty_bE = self.penalty_TB1[step][row_b].expand_as(eos_bE)
            scores_bV.scatter_add_(1, eos_bE, penalty_bE)
        if self.greedy:
            return scores_bV.argmax(-1)
        # Inverse of the cumulative distribution, in float64: 150,000 summands lose the tail.
        probability_bV = torch.softmax(scores_bV.div_(self.temperature), -1)
        cdf_bV = probability_bV.cumsum(-1)
        uniform_b1 = self.uniform_TB1[step][row_b]
        token_b1 = torch.searchsorted(cdf_bV, uniform_b1 * cdf_bV[:, -1:], right=True)
        # The searched number is below the last sum, so only NaN needs this.
        token_b1 = token_b1.clamp_max(logits_bV.shape[-1] - 1)
        log_prob_b1 = probability_bV.gather(1, token_b1).log()
        self.log_probs_BT[row_b, step] = log_prob_b1.squeeze(1)
        return token_b1.squeeze(1)


@torch.no_grad()
def write(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    uniform_BT: Float[Tensor, "B T"],
    rollout: RolloutSpec,
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    poll: Callable[[], None],
    prefixes: Sequence[Sequence[int]] | None = None,
    greedy: bool = False,
    most_rows: int | None = None,
) -> Completions:
    """Completions of `prompts`, drawn from a model's own distribution at `rollout.temperature`.

    The model is the engine's, in its current state, in eval mode (no dropout); its
    generation_config is ignored. All rows are written at once, or `most_rows` at a time, grouped by
    length. `poll` is called once per token and may raise.

    `prefixes` are the first tokens of the completions, one list per row. They count toward
    max_new_tokens and min_new_tokens; position t is drawn with uniform_BT[:, t] after them, too.
    A prefix that ends in end-of-text, or fills max_new_tokens, is the whole completion.

    `greedy` takes the likeliest tokens instead: no temperature, no uniform numbers.
    """
    begun = [list(p) for p in prefixes] if prefixes is not None else [[] for _ in prompts]
    assert max(map(len, begun)) <= rollout.max_new_tokens, "a prefix is longer than a completion"
    open_rows = [
        row
        for row, prefix in enumerate(begun)
        if len(prefix) < rollout.max_new_tokens and not (prefix and prefix[-1] in eos_ids)
    ]
    texts = [[*prompt, *prefix] for prompt, prefix in zip(prompts, begun, strict=True)]
    open_rows.sort(key=lambda row: len(texts[row]))
    ids, log_probs = [*begun], [list[float]() for _ in begun]
    if open_rows:
        engine.refold()
    size = most_rows or max(1, len(open_rows))
    for rows in [open_rows[first : first + size] for first in range(0, len(open_rows), size)]:
        forced = [len(begun[row]) for row in rows]
        draws_BT = uniform_BT[rows].to(engine.device)
        draw = _Draw(draws_BT, forced, rollout, eos_ids, poll, greedy)
        length = max(len(texts[row]) for row in rows)
        padded = pad_left([texts[row] for row in rows], length, pad_id)
        ids_BP, mask_BP = (t.to(engine.device) for t in padded)
        with _told_of_memory(len(rows)):
            new_BC = engine.tokens(
                ids_BP, mask_BP, draw, pad_id=pad_id, eos_ids=eos_ids,
                max_new_tokens=rollout.max_new_tokens - min(forced),
            )  # fmt: skip
        values_BT = draw.log_probs_BT.tolist()
        for row, tokens, values in zip(rows, new_BC.tolist(), values_BT, strict=True):
            drawn = cut_after_eos(tokens[: rollout.max_new_tokens - len(begun[row])], eos_ids)
            ids[row] = begun[row] + drawn
            log_probs[row] = [] if greedy else values[: len(drawn)]
    truncated = [row[-1] not in eos_ids for row in ids]
    return Completions(ids, truncated, log_probs, list(map(len, begun)))


@contextlib.contextmanager
def _told_of_memory(rows: int) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # torch's CPU allocator has no class of its own.
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        fewer = "" if rows == 1 else f"; rollout_rows={rows // 2} writes fewer"
        raise OutOfMemory(
            f"the device's memory cannot hold {rows} rows that are written at once{fewer}"
        ) from error


def cut_after_eos(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The row up to its first end-of-text, which is kept; what follows is padding.

    By position, not by value: if pad and end-of-text are the same id, a mask by value would drop
    the end, and the student would never learn to stop.
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
