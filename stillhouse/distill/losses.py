"""This file is where hidden states become a loss, chunk by chunk, with no [B, T, V] tensor.

Legend: N positions (the completion tokens of a batch, flattened), n positions of one chunk,
H hidden width, V vocabulary. Student p = softmax(z / T), teacher q, m a mixture of the two.

A loss is one function of a chunk's logits: it returns a value per position and d value / d logits.
`_SumOverPositions` does the rest: head product, sum, chain to the hidden states. The gradient is
formed in the forward pass and only d loss / d hidden, [N, H], is kept. The head is frozen, so
nothing else is wanted, and a backward pass that formed the logits again would pay for them twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillhouse.errors import ContractError

# Positions per chunk. On a CPU, V 49,152, H 576, the head products of 16 positions at a time take
# twice as long as those of 128; beyond that, memory buys little.
CHUNK = 128
# Numbers per buffer in the passes over a chunk on a CPU. A quarter of it is 6 % faster on two idle
# cores, but threads meet four times as often, and where they wait passively that costs 28 %; eight
# times as much leaves the caches and costs a quarter. A GPU wants few large kernels instead.
BLOCK = 800_000


class TokenStats(NamedTuple):
    """One number per position, in nats, detached; float32, or float64 where the hidden states are.

    All but `nll` are of the distributions that the loss compares: at the loss temperature, on the
    shared vocabulary. `nll` is at temperature 1, so that runs can be compared. None is weighted.
    """

    loss: Float[Tensor, " N"]  # JSD(beta): the value that is weighted and summed
    forward_kl: Float[Tensor, " N"]  # KL(teacher || student)
    reverse_kl: Float[Tensor, " N"]  # KL(student || teacher)
    jsd_half: Float[Tensor, " N"]  # JSD(1/2), at most ln 2
    nll: Float[Tensor, " N"]  # -log p(target)
    student_entropy: Float[Tensor, " N"]
    teacher_entropy: Float[Tensor, " N"]


def distill_loss(
    hidden_NH: Float[Tensor, "N H"],
    head_VH: Float[Tensor, "V H"],
    teacher_logits: Callable[[slice], Tensor],
    targets_N: Int[Tensor, " N"],
    *,
    beta: float,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    weights_N: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, ""], TokenStats]:
    """Sum over positions of weight * JSD_beta(student, teacher) in nats, and the numbers to log.

        m = beta * q + (1 - beta) * p;  JSD_beta = beta * KL(q || m) + (1 - beta) * KL(p || m)
        beta = 0: forward KL(q || p);  beta = 1: reverse KL(p || q)  (the limits of JSD there are 0)

    Both sides' logits are divided by `temperature`: the gradient carries 1 / temperature, and there
    is no factor temperature². The caller divides by the global number of completion tokens. The sum
    is differentiable with respect to `hidden_NH` only, once; unwanted gradients are not formed.

    `teacher_logits(rows)` gives the logits [n, V_t] of those positions; it is called once per
    chunk, in order, without gradient, and what it returns is not written to. Where V_t is not V,
    the difference is padding: both are cut to the shorter. `hidden_NH` and `head_VH` share a dtype;
    the logits are their product in it, as the model itself would form them, and what follows is
    float32 (float64 for float64). NaN logits give a NaN loss. N = 0 gives 0, with a gradient path.

    Raises ContractError if a target lies outside the shared vocabulary; ValueError or TypeError for
    arguments that mean nothing.
    Source: Agarwal et al. 2024 (arXiv:2306.13649); beta as in TRL's `generalized_jsd_loss`.
    """
    _refuse_nonsense(hidden_NH, head_VH, beta, temperature, chunk)
    wants_gradient = hidden_NH.requires_grad and torch.is_grad_enabled()
    seen: list[TokenStats] = []

    def position_loss(rows: slice, logits_nV: Tensor) -> tuple[Tensor, Tensor | None]:
        teacher_nV = teacher_logits(rows)
        assert len(teacher_nV) == len(logits_nV), "teacher_logits(rows) owes a row per position"
        V = min(logits_nV.shape[1], teacher_nV.shape[1])
        if not seen:  # once: on a GPU, to look at the targets is to wait for them
            _refuse_targets_outside(targets_N, V)
        shared_nV = logits_nV[:, :V]
        stats = _divergence_(
            shared_nV, teacher_nV[:, :V], targets_N[rows], beta, temperature, wants_gradient
        )
        seen.append(stats)
        return stats.loss, shared_nV if wants_gradient else None

    loss = _SumOverPositions.apply(
        hidden_NH, head_VH, weights_N, chunk, wants_gradient, position_loss
    )
    if not seen:
        nothing = torch.empty(0, dtype=loss.dtype, device=loss.device)
        seen.append(TokenStats(*[nothing] * len(TokenStats._fields)))
    return loss, _joined(seen)


class _SumOverPositions(torch.autograd.Function):
    """Sum of weight * value over positions, from hidden states and a frozen head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        weights_N: Tensor | None,
        chunk: int,
        wants_gradient: bool,
        position_loss: Callable[[slice, Tensor], tuple[Tensor, Tensor | None]],
    ) -> Tensor:
        """`position_loss(rows, logits_nV)` may write over the logits; it returns values [n] and the
        gradient [n, V'] with respect to the first V' logits, None where it is not wanted."""
        product_cV = hidden_NH.new_empty(min(chunk, len(hidden_NH)), len(head_VH))
        logits_cV = product_cV.to(_work_dtype(hidden_NH))  # a second buffer if, say, bfloat16
        gradient_NH = torch.empty_like(hidden_NH) if wants_gradient else None
        loss = logits_cV.new_zeros(())
        for start in range(0, len(hidden_NH), chunk):
            rows = slice(start, min(start + chunk, len(hidden_NH)))
            product_nV, logits_nV = (b[: rows.stop - start] for b in (product_cV, logits_cV))
            # out= allocates nothing, and autocast leaves it alone: the dtype is the one promised.
            torch.mm(hidden_NH[rows], head_VH.T, out=product_nV)
            if logits_cV is not product_cV:
                logits_nV.copy_(product_nV)
            value_n, dz_nV = position_loss(rows, logits_nV)
            if weights_N is not None:
                value_n = value_n * weights_N[rows]
            loss += value_n.sum()
            if gradient_NH is None or dz_nV is None:
                continue
            if weights_N is not None:
                dz_nV.mul_(weights_N[rows, None])
            V = dz_nV.shape[1]
            if dz_nV.dtype != product_nV.dtype:
                dz_nV = product_nV[:, :V].copy_(dz_nV)
            torch.mm(dz_nV, head_VH[:V], out=gradient_NH[rows])
        if gradient_NH is not None:
            ctx.save_for_backward(gradient_NH)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * upstream, None, None, None, None, None


def _divergence_(
    logits_nV: Tensor,
    teacher_nV: Tensor,
    targets_n: Tensor,
    beta: float,
    temperature: float,
    wants_gradient: bool,
) -> TokenStats:
    """The statistics of a chunk; its logits become d JSD_beta / d logits, or are used up."""
    n, V = logits_nV.shape
    size = n if logits_nV.is_cuda else min(n, max(1, BLOCK // V))
    scratch_4bV = logits_nV.new_empty(4, size, V)
    blocks = zip(*(x.split(size) for x in (logits_nV, teacher_nV, targets_n)), strict=True)
    return _joined(
        [
            _divergence_of_block_(z_bV, t_bV, y_b, scratch_4bV, beta, temperature, wants_gradient)
            for z_bV, t_bV, y_b in blocks
        ]
    )


def _divergence_of_block_(
    logits_nV: Tensor,
    teacher_nV: Tensor,
    targets_n: Tensor,
    scratch_4bV: Tensor,
    beta: float,
    temperature: float,
    wants_gradient: bool,
) -> TokenStats:
    """As above, for so few positions that the passes below stay in cache."""
    log_p, log_q, p, q = scratch_4bV[:, : len(logits_nV)]
    torch.log_softmax(logits_nV, -1, out=log_p)
    nll = -log_p.gather(1, targets_n[:, None]).squeeze(1)
    teacher_nV = teacher_nV.to(log_p.dtype)
    if temperature != 1:
        torch.log_softmax(logits_nV.div_(temperature), -1, out=log_p)
        teacher_nV = teacher_nV / temperature
    torch.log_softmax(teacher_nV, -1, out=log_q)
    # Where p and q both underflow, p / m must not be 0 / 0. The smallest normal number changes no
    # probability above 1e-30 and adds less than 1e-30 to any sum.
    tiny = torch.finfo(p.dtype).tiny
    torch.exp(log_p, out=p).add_(tiny)
    torch.exp(log_q, out=q).add_(tiny)

    spare = logits_nV
    student_entropy, teacher_entropy = -_dot(p, log_p, spare), -_dot(q, log_q, spare)
    log_ratio, mixture = log_p.sub_(log_q), log_q  # log p - log q; log q is not needed again
    forward_kl, reverse_kl = -_dot(q, log_ratio, spare), _dot(p, log_ratio, spare)
    keeps = log_ratio if beta == 0.5 else spare
    jsd_half, centre = _jsd(0.5, p, q, mixture, keeps, spare)
    if beta == 0:
        loss = forward_kl
    elif beta == 1:
        loss = centre = reverse_kl
    elif beta == 0.5:
        loss = jsd_half
    else:
        loss, centre = _jsd(beta, p, q, mixture, log_ratio, spare)
    if wants_gradient:
        if beta == 0:
            torch.sub(p, q, out=logits_nV)
        else:  # log_ratio is log p - log q at beta = 1, log p - log m between the ends
            torch.mul(log_ratio.sub_(centre[:, None]), p, out=logits_nV)
        scale = (1 if beta in (0, 1) else 1 - beta) / temperature
        if scale != 1:
            logits_nV.mul_(scale)
    return TokenStats(loss, forward_kl, reverse_kl, jsd_half, nll, student_entropy, teacher_entropy)


def _jsd(
    beta: float, p: Tensor, q: Tensor, mixture: Tensor, log_ratio: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """JSD_beta and KL(p || m), both [n]; m is left in `mixture`, log p - log m in `log_ratio`.

    Quotients of probabilities, not differences of their logs: p / m is at most 1 / (1 - beta), so
    nothing overflows, and where p equals q it is exactly 1: loss and gradient are exactly 0 there.
    """
    torch.lerp(p, q, beta, out=mixture)  # exact at p = q, which beta * q + (1 - beta) * p is not
    of_teacher = _dot(q, torch.div(q, mixture, out=spare).log_(), spare)
    torch.div(p, mixture, out=log_ratio).log_()
    of_student = _dot(p, log_ratio, spare)
    return beta * of_teacher + (1 - beta) * of_student, of_student


def _dot(a_nV: Tensor, b_nV: Tensor, spare_nV: Tensor) -> Tensor:
    """Dot product of each pair of rows, [n]; torch.sum adds pairwise, which float32 needs here."""
    return torch.mul(a_nV, b_nV, out=spare_nV).sum(-1)


def _joined(parts: list[TokenStats]) -> TokenStats:
    return TokenStats(*map(torch.cat, zip(*parts, strict=True)))


def _work_dtype(hidden_NH: Tensor) -> torch.dtype:
    return torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32


def _refuse_nonsense(
    hidden_NH: Tensor, head_VH: Tensor, beta: float, temperature: float, chunk: int
) -> None:
    if not (0 <= beta <= 1 and temperature > 0 and chunk >= 1):
        raise ValueError(
            f"distill_loss: beta ({beta}) must lie in [0, 1], temperature ({temperature}) above 0, "
            f"chunk ({chunk}) at or above 1"
        )
    if hidden_NH.dtype != head_VH.dtype:
        raise TypeError(
            f"distill_loss: hidden states are {hidden_NH.dtype}, the head is {head_VH.dtype}; cast "
            "one of them, so that the precision of the logits is somebody's choice"
        )
    if head_VH.requires_grad:
        raise ValueError(
            "distill_loss: the head asks for a gradient and would get none; if it is frozen, pass "
            "head.detach()"
        )


def _refuse_targets_outside(targets_N: Tensor, vocabulary: int) -> None:
    low, high = int(targets_N.min()), int(targets_N.max())
    if low < 0 or high >= vocabulary:
        raise ContractError(
            f"target tokens run from {low} to {high}; student and teacher share 0 to "
            f"{vocabulary - 1}. Do the two have the same tokenizer?"
        )
