"""Answer an evaluation with an engine: greedy or drawn texts, log-likelihoods of given choices.

Legend: B rows, b rows still being written, C new positions, V vocabulary, P positions of a
context, n positions of a continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from stillhouse.distill.engine import Engine
from stillhouse.distill.folded import computes_in
from stillhouse.distill.rollouts import pad_left, uniforms, write
from stillhouse.errors import Diverged
from stillhouse.spec import GAPS, RolloutSpec

CHECKED = 2  # rows of an evaluation whose tokens are checked against the model's own forward pass
SAMPLE_SEED = 1234  # of drawn answers: every model is asked with the same draws
BESIDE = 2  # tokens that may surround a stop string


@torch.no_grad()
def answers(
    engine: Engine,
    ids_BP: Int[Tensor, "B P"],
    mask_BP: Int[Tensor, "B P"],
    tokenizer: Any,
    stops: Sequence[str],
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    checked: bool = False,
) -> Int[Tensor, "B C"]:
    """The likeliest tokens after each prompt, up to end-of-text. After the token that completes a
    stop string, the next token is end-of-text.

    Raises:
        Diverged: `checked` is set, and the engine does not compute the model's own function.
    """
    pick = _Greedy(tokenizer, stops, eos_ids[0], len(ids_BP))
    settings: Any = {"pad_id": pad_id, "eos_ids": eos_ids, "max_new_tokens": max_new_tokens}
    new_BC = engine.tokens(ids_BP, mask_BP, pick, **settings)
    if checked and engine.form is not None:
        _check(engine, ids_BP, mask_BP, _has_ended(new_BC, eos_ids), new_BC, pick)
    return new_BC


def samples(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    max_new_tokens: int,
) -> Int[Tensor, "B C"]:
    """Tokens drawn at temperature 1 after each prompt. The draws depend on the prompt and its
    number alone, so another model is asked with the same ones."""
    draws_BT = torch.cat(
        [
            uniforms(SAMPLE_SEED, f"answer to {list(prompt)}", 0, [number], max_new_tokens)
            for prompt, number in zip(prompts, numbers, strict=True)
        ]
    )
    rollout = RolloutSpec(max_new_tokens, 0, 1.0, 1.0, len(prompts))
    written = write(
        engine, prompts, draws_BT, rollout, pad_id=pad_id, eos_ids=eos_ids, poll=lambda: None
    )
    width = max(map(len, written.ids))
    return torch.tensor([row + [pad_id] * (width - len(row)) for row in written.ids]).to(
        engine.device
    )


def ended(new_BC: Int[Tensor, "B C"], eos_ids: Sequence[int], pad_id: int) -> Int[Tensor, "B C"]:
    """The same tokens with `pad_id` from each row's end-of-text on: it is not part of an answer."""
    return new_BC.masked_fill(_has_ended(new_BC, eos_ids), pad_id)


def _has_ended(new_BC: Tensor, eos_ids: Sequence[int]) -> Tensor:
    return torch.isin(new_BC, new_BC.new_tensor(list(eos_ids))).cumsum(1) > 0


class _Greedy:
    """Picks the likeliest token; after a stop string, end-of-text."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], end: int, rows: int) -> None:
        self.tokenizer, self.end = tokenizer, end
        # Ids in `eos_ids` end a row anyway, and special tokens do not appear in decoded text.
        self.stops = [stop for stop in stops if stop not in tokenizer.all_special_tokens]
        longest = (len(tokenizer.encode(s, add_special_tokens=False)) for s in self.stops)
        self.tail = max(longest, default=0) + BESIDE
        self.written: list[list[int]] = [[] for _ in range(rows)]
        self.has_stopped = [False] * rows
        self.log_probs: list[list[float]] = [[] for _ in range(CHECKED)]

    def __call__(self, logits_bV: Tensor, row_b: Tensor) -> Tensor:
        token_b = logits_bV.argmax(-1)
        rows = row_b.tolist()
        for place, row in enumerate(rows):
            if row < CHECKED:
                log_prob = logits_bV[place].double().log_softmax(-1)[token_b[place]]
                self.log_probs[row].append(float(log_prob))
        if not self.stops:
            return token_b
        tokens = token_b.tolist()
        for place, row in enumerate(rows):
            if self.has_stopped[row]:
                tokens[place] = self.end
                continue
            self.written[row].append(tokens[place])
            text = self.tokenizer.decode(self.written[row][-self.tail :])
            self.has_stopped[row] = any(stop in text for stop in self.stops)
        return token_b.new_tensor(tokens)


def _check(
    engine: Engine, ids_BP: Tensor, mask_BP: Tensor, ended_BC: Tensor, new_BC: Tensor, pick: _Greedy
) -> None:
    """Compare the first rows' log-probabilities with the model's own."""
    model: Any = engine.model
    for row, drew in enumerate(pick.log_probs[: len(ids_BP)]):
        new = int((~ended_BC[row]).sum())
        if not new:
            continue
        prompt = ids_BP[row][mask_BP[row].bool()]
        ids_1T = torch.cat([prompt, new_BC[row, :new]]).unsqueeze(0)
        logits_nV = model(input_ids=ids_1T).logits[0, len(prompt) - 1 : -1].double()
        own_n = logits_nV.log_softmax(-1).gather(1, ids_1T[0, len(prompt) :, None]).squeeze(1)
        gap = float((own_n - own_n.new_tensor(drew[:new])).abs().mean())
        dtype = str(computes_in(getattr(engine.form, "causal_lm", model))).removeprefix("torch.")
        if not gap <= GAPS.get(dtype, GAPS["float32"]):
            raise Diverged(
                f"an answer's tokens have other log-probabilities than the model gives them, by"
                f" {gap:.3g} nats per token (allowed in {dtype}: {GAPS[dtype]:g}); written by"
                f" {engine.how()}"
            )


def joined(context_BP: Int[Tensor, "B P"], new_BC: Int[Tensor, "B C"]) -> Int[Tensor, "B T"]:
    """Prompts and what follows them, one after the other."""
    return torch.cat([context_BP, new_BC], 1)


@torch.inference_mode()
def log_likelihoods(
    engine: Engine, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], pad_id: int
) -> list[list[tuple[float, bool]]]:
    """For each continuation of each context: the sum of its tokens' log-probabilities, and whether
    greedy decoding would give exactly these tokens. Each context is processed only once."""
    assert engine.form is not None, "an engine with a copy; `generate` has no state to go on from"
    device = engine.device
    contexts = [context for context, _ in groups]
    padded = pad_left(contexts, max(map(len, contexts)), pad_id)
    ids_BP, mask_BP = (t.to(device) for t in padded)
    rows = [row for row, (_, choices) in enumerate(groups) for _ in choices]
    choices = [choice for _, of_context in groups for choice in of_context]
    room = max(map(len, choices)) - 1
    with engine.form.arithmetic():
        state = engine.form.begin(mask_BP, room)
        row_b = torch.tensor(rows, device=device)
        parts = [state.next_logits(ids_BP)[row_b].unsqueeze(1)]
        if room:
            state.keep(row_b)
            fed = [[*choice[:-1], *[pad_id] * (room + 1 - len(choice))] for choice in choices]
            parts.append(state.logits(torch.tensor(fed, device=device)))
    found = iter(_scored(parts, choices))
    return [[next(found) for _ in of_context] for _, of_context in groups]


def _scored(parts: Sequence[Tensor], choices: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """Scores, from the first tokens' logits [b, 1, V] and those of all later ones, [b, n, V]."""
    scores: list[tuple[float, bool]] = []
    for row, choice in enumerate(choices):
        log_likelihood, is_greedy = 0.0, True
        for logits_bnV, tokens in zip(parts, (choice[:1], choice[1:]), strict=False):
            logits_nV = logits_bnV[row, : len(tokens)].float()
            token_n = torch.tensor(list(tokens), dtype=torch.long, device=logits_nV.device)
            own_n = logits_nV.gather(1, token_n[:, None]).squeeze(1)
            log_likelihood += float((own_n - logits_nV.logsumexp(1)).sum())
            is_greedy = is_greedy and bool((logits_nV.argmax(-1) == token_n).all())
        scores.append((log_likelihood, is_greedy))
    return scores
