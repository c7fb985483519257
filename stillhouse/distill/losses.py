"""Compute the loss from hidden states, chunk by chunk, without a [B, T, V] tensor.

Legend: N positions (the completion tokens of a batch, flattened), n positions of one chunk,
H hidden width, V vocabulary.

A loss is one function of a chunk's logits: it returns a value per position and d value / d logits
(`objectives.py`). `_SumOverPositions` does the rest: the head, the sum, and the chain rule to the
hidden states. It forms the gradient in the forward pass and keeps only d loss / d hidden, [N, H].
The head is frozen, so no other gradient is needed; a backward pass that formed the logits again
would compute them twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillhouse.distill.diagnostics import Summary
from stillhouse.distill.gap import Drawn
from stillhouse.distill.head import Head, work_dtype
from stillhouse.distill.objectives import (
    CrossEntropy,
    Objective,
    PolicyGradient,
    TokenStats,
    TopK,
    at_rows,
    evaluate_,
    joined,
)
from stillhouse.errors import ContractError

# Positions per chunk. On a CPU, V 49,152, H 576, head products with 16 positions at a time take
# twice as long as with 128; larger chunks need more memory and gain little.
CHUNK = 128


def distill_loss(
    hidden_NH: Float[Tensor, "N H"],
    head: Head,
    teacher_logits: Callable[[slice], Tensor],
    targets_N: Int[Tensor, " N"],
    *,
    objective: Objective,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    weights_N: Float[Tensor, " N"] | None = None,
    summary: Summary | None = None,
    places_N: Int[Tensor, " N"] | None = None,
    drawn: Drawn | None = None,
) -> tuple[Float[Tensor, ""], TokenStats]:
    """Sum over positions of weight * objective in nats, and the numbers to log.

    Both sides' logits are divided by `temperature`: the gradient carries 1 / temperature, and there
    is no factor temperature². The caller divides by the global number of completion tokens. The sum
    is differentiable with respect to `hidden_NH` only, once; unwanted gradients are not formed.

    `teacher_logits(rows)` gives the logits [n, V_t] of those positions; it is called once per
    chunk, in order, without gradient, and what it returns is not written to. Where V_t is not V,
    the difference is padding: both are cut to the shorter. `hidden_NH` and the head share a dtype;
    their product, including the bias, has that dtype, as in the model itself; everything after it,
    including a scale and a soft cap, is float32 (float64 for float64). A NaN that the objective
    reads makes the loss NaN. N = 0 gives 0, with a gradient path.

    A `summary` collects how student and teacher overlap at each position, and with `places_N` how
    many tokens of the answer precede it; these numbers are not weighted. `drawn` collects the
    student's log-probabilities of the targets, processed as they were drawn.

    Raises ContractError if a target or a top k lies outside the shared vocabulary; ValueError or
    TypeError for invalid arguments.
    """
    _refuse_nonsense(hidden_NH, head, temperature, chunk)
    _refuse_misfit(objective, len(targets_N), temperature)
    wants_gradient = hidden_NH.requires_grad and torch.is_grad_enabled()
    seen: list[TokenStats] = []

    def position_loss(rows: slice, logits_nV: Tensor) -> tuple[Tensor, Tensor | None]:
        teacher_nV = teacher_logits(rows)
        assert len(teacher_nV) == len(logits_nV), "teacher_logits(rows) owes a row per position"
        V = min(logits_nV.shape[1], teacher_nV.shape[1])
        if not seen:  # once: on a GPU, reading the targets is a synchronization
            _refuse_outside(targets_N, objective, summary, V)
        shared_nV = logits_nV[:, :V]
        add = None
        if drawn is not None:
            add = drawn.look(rows, logits_nV, targets_N[rows], logits_nV.shape[1] == V)
        stats, overlap = evaluate_(
            at_rows(objective, rows), shared_nV, teacher_nV[:, :V], targets_N[rows],
            temperature, wants_gradient, None if summary is None else summary.k,
        )  # fmt: skip
        seen.append(stats)
        if add is not None:
            add(stats.nll)
        if summary is not None and overlap is not None:
            assert places_N is not None, "a summary wants to know where the positions stand"
            summary.add(overlap, places_N[rows])
        return stats.loss, shared_nV if wants_gradient else None

    loss = _SumOverPositions.apply(hidden_NH, head, weights_N, chunk, wants_gradient, position_loss)
    if not seen:
        nothing = torch.empty(0, dtype=loss.dtype, device=loss.device)
        seen.append(TokenStats(*[nothing] * len(TokenStats._fields)))
    return loss, joined(seen)


class _SumOverPositions(torch.autograd.Function):
    """Sum of weight * value over positions, from hidden states and a frozen head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head: Head,
        weights_N: Tensor | None,
        chunk: int,
        wants_gradient: bool,
        position_loss: Callable[[slice, Tensor], tuple[Tensor, Tensor | None]],
    ) -> Tensor:
        """`position_loss(rows, logits_nV)` may write over the logits; it returns values [n] and the
        gradient [n, V'] with respect to the first V' logits, or None if it is not wanted."""
        product_cV = hidden_NH.new_empty(min(chunk, len(hidden_NH)), len(head.weight_VH))
        logits_cV = product_cV.to(work_dtype(hidden_NH))  # a second buffer if, say, bfloat16
        slope_cV = torch.empty_like(logits_cV) if head.cap and wants_gradient else None
        gradient_NH = torch.empty_like(hidden_NH) if wants_gradient else None
        loss = logits_cV.new_zeros(())
        for start in range(0, len(hidden_NH), chunk):
            rows = slice(start, min(start + chunk, len(hidden_NH)))
            product_nV, logits_nV = (b[: rows.stop - start] for b in (product_cV, logits_cV))
            # out= allocates nothing and is not affected by autocast: the dtype is as documented.
            head.product(hidden_NH[rows], out=product_nV)
            if logits_cV is not product_cV:
                logits_nV.copy_(product_nV)
            slope_nV = None if slope_cV is None else slope_cV[: rows.stop - start]
            head.bend_(logits_nV, slope_nV)
            value_n, dz_nV = position_loss(rows, logits_nV)
            if weights_N is not None:
                # A position with weight 0 does not count, even if its KL is infinite.
                value_n = torch.where(weights_N[rows] == 0, 0, value_n * weights_N[rows])
            loss += value_n.sum()
            if gradient_NH is None or dz_nV is None:
                continue
            if weights_N is not None:
                dz_nV.mul_(weights_N[rows, None])
            V = dz_nV.shape[1]
            if slope_nV is not None:
                dz_nV.mul_(slope_nV[:, :V])
            if dz_nV.dtype != product_nV.dtype:
                dz_nV = product_nV[:, :V].copy_(dz_nV)
            torch.mm(dz_nV, head.weight_VH[:V], out=gradient_NH[rows])
        if gradient_NH is not None:
            if head.scale != 1:
                gradient_NH.mul_(head.scale)
            ctx.save_for_backward(gradient_NH)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * upstream, None, None, None, None, None


def _refuse_nonsense(hidden_NH: Tensor, head: Head, temperature: float, chunk: int) -> None:
    if not (temperature > 0 and chunk >= 1):
        raise ValueError(
            f"distill_loss: temperature ({temperature}) must lie above 0, chunk ({chunk}) at or "
            "above 1"
        )
    weight_VH = head.weight_VH
    if hidden_NH.dtype != weight_VH.dtype:
        raise TypeError(
            f"distill_loss: hidden states are {hidden_NH.dtype}, the head is {weight_VH.dtype};"
            " cast one of them, so that the precision of the logits is somebody's choice"
        )
    if weight_VH.requires_grad or (head.bias_V is not None and head.bias_V.requires_grad):
        raise ValueError(
            "distill_loss: the head asks for a gradient and would get none; if it is frozen, pass"
            " it detached"
        )


def _refuse_misfit(objective: Objective, positions: int, temperature: float) -> None:
    if isinstance(objective, CrossEntropy) and temperature != 1:
        raise ValueError(
            "distill_loss: cross-entropy is of the student as it is, at temperature 1; got "
            f"{temperature}"
        )
    if isinstance(objective, PolicyGradient) and len(objective.sampled_N) != positions:
        raise ValueError(
            f"distill_loss: {len(objective.sampled_N)} log-probabilities of sampled tokens for "
            f"{positions} positions"
        )


def _refuse_outside(
    targets_N: Tensor, objective: Objective, summary: Summary | None, vocabulary: int
) -> None:
    low, high = int(targets_N.min()), int(targets_N.max())
    if low < 0 or high >= vocabulary:
        raise ContractError(
            f"target tokens run from {low} to {high}; student and teacher share 0 to "
            f"{vocabulary - 1}. Do the two have the same tokenizer?"
        )
    if isinstance(objective, TopK) and objective.k > vocabulary:
        raise ContractError(
            f"the top {objective.k} tokens of {vocabulary} are wanted, which student and teacher "
            "share; lower loss_top_k"
        )
    if summary is not None and summary.k > vocabulary:
        raise ContractError(
            f"the top {summary.k} tokens of {vocabulary} are to be compared, which student and"
            " teacher share; lower overlap_k"
        )
