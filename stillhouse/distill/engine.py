"""Choose how rollouts are generated, and run the token-by-token loop.

There are three ways; the engine takes the first that computes the trained function: the fused forms
of a float32 Llama (`decode.py`), a folded copy of the model (`folded.py`), or transformers'
`generate`. The log of a run says which one it is; if it is `generate`, also why.

Legend: B rows, b rows still being written, P prompt positions, C new positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from stillhouse.distill import decode, folded
from stillhouse.distill.decode import FusedLlama
from stillhouse.distill.folded import Folded
from stillhouse.memory import host_bytes

# (logits [b, V], which rows these are [b]) -> their next tokens [b]
Pick = Callable[[Tensor, Tensor], Tensor]

LEAVE = 8  # ended rows are removed when they are 1/LEAVE of a batch: this copies the cache
LOOK = 8  # on a GPU, check for end-of-text every LOOK tokens: each check is a synchronization


def free_bytes(device: torch.device) -> int:
    """How many bytes a new tensor could take on a device; in a container, its own limit counts."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return host_bytes()


class Engine:
    """Generates what the model would, with the weights it had at the last `refold`."""

    def __init__(self, model: nn.Module, free: Callable[[torch.device], int] = free_bytes) -> None:
        """`free`: returns how many bytes a copy may take on a device."""
        self.model, self.free = model, free
        self.copy: FusedLlama | Folded | None = None
        self.form: FusedLlama | Folded | None = None  # the copy in use; None: `generate` is used
        self.reason = ""  # why `generate` is used

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def refold(self) -> None:
        """Update to the model's current weights, adapters, and autocast precision."""
        wanted, why = FusedLlama, decode.obstacle(self.model)
        if why is not None:
            wanted, why = Folded, folded.obstacle(self.model)
        if why is None and type(self.copy) is not wanted:
            self.copy = None  # free the old copy before the new one is allocated
            copy = wanted(self.model)
            why = self._lacks(copy.bytes())
            self.copy = copy if why is None else None
        if why is None and self.copy is not None:
            why = self.copy.fold_()
        self.form, self.reason = (self.copy if why is None else None), why or ""

    def _lacks(self, wanted: int) -> str | None:
        free = self.free(self.device)
        if wanted <= free:
            return None
        return f"a folded copy takes {wanted / 1e9:.2g} GB and {max(free, 0) / 1e9:.2g} GB are free"

    def how(self) -> str:
        """A line for the log: what generates this model's rollouts now."""
        self.refold()
        if self.form is None:
            return f"transformers' generate ({self.reason})"
        if isinstance(self.form, FusedLlama):
            return "fused forms of a float32 Llama"
        return self.form.how()

    def tokens(
        self,
        ids_BP: Int[Tensor, "B P"],
        mask_BP: Int[Tensor, "B P"],
        pick: Pick,
        *,
        pad_id: int,
        eos_ids: Sequence[int],
        max_new_tokens: int,
    ) -> Int[Tensor, "B C"]:
        """What the model writes after prompts that end at the last position, as in eval mode.

        `pick` chooses the tokens of each next position. C is `max_new_tokens`, or less if every row
        ended earlier; the caller has to cut off what follows a row's end.
        """
        settings: Any = {"eos_ids": eos_ids, "max_new_tokens": max_new_tokens}
        if self.form is None:
            return generate(self.model, ids_BP, mask_BP, pick, pad_id=pad_id, **settings)
        with self.form.arithmetic():
            form = self.form
            begin = form.begin_rollout if isinstance(form, Folded) else form.begin
            return _loop(begin(mask_BP, max_new_tokens), ids_BP, pick, **settings)


def _loop(
    state: Any, ids_BP: Tensor, pick: Pick, *, eos_ids: Sequence[int], max_new_tokens: int
) -> Tensor:
    """Generate token by token. On a CPU, rows that have ended are removed from the batch; on a GPU,
    a step costs nearly the same for few rows as for many."""
    device = ids_BP.device
    is_gpu = device.type != "cpu"
    eos_E = torch.tensor(list(eos_ids), device=device)
    row_b = torch.arange(len(ids_BP), device=device)
    has_ended_b = torch.zeros_like(row_b, dtype=torch.bool)
    written_BC = ids_BP.new_zeros(len(ids_BP), max_new_tokens)
    input_bn = ids_BP
    for position in range(max_new_tokens):
        token_b = pick(state.next_logits(input_bn), row_b)
        written_BC[row_b, position] = token_b
        input_bn = token_b.unsqueeze(1)
        has_ended_b = has_ended_b | (input_bn == eos_E).any(1)
        if position + 1 == max_new_tokens or (is_gpu and (position + 1) % LOOK):
            continue
        ended = int(has_ended_b.sum())
        if ended == len(row_b):
            return written_BC[:, : position + 1]
        if not is_gpu and ended * LEAVE >= len(row_b):
            kept_b = (~has_ended_b).nonzero().squeeze(1)
            state.keep(kept_b)
            row_b, input_bn, has_ended_b = row_b[kept_b], input_bn[kept_b], has_ended_b[kept_b]
    return written_BC


def generate(
    model: Any,
    ids_BP: Int[Tensor, "B P"],
    mask_BP: Int[Tensor, "B P"],
    pick: Pick,
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    max_new_tokens: int,
) -> Int[Tensor, "B C"]:
    """The same as `Engine.tokens`, with transformers' `generate`: for any model, but slower."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(eos_ids),
    )
    # generate() fills defaults in `config` from the model's own config, so clear that one.
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


class _OnlyToken(LogitsProcessor):
    """Masks all tokens except the picked one, so that greedy search takes it."""

    def __init__(self, pick: Pick) -> None:
        self.pick = pick

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        token_B = self.pick(scores, torch.arange(len(scores), device=scores.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)
