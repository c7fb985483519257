"""Compute an objective's values, and their gradient, from the logits of a few positions.

Legend: n positions (a chunk, or a block of one), V the shared vocabulary, k likeliest tokens of one
side, K tokens listed for a support. Student p = softmax(z / T), teacher q, m a mixture of the two,
y a target. Functions whose names end in _ overwrite the logits they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.distill.diagnostics import Overlap, compare

# Numbers per buffer in the passes over a chunk on a CPU. A quarter of it is 6 % faster on two idle
# cores, but threads synchronize four times as often, and where they wait passively that costs 28 %;
# eight times as much exceeds the caches and costs a quarter. A GPU needs few large kernels instead.
BLOCK = 800_000
# The log of a probability of 0, as in masked vocabularies: finite, so that 0 times it is not NaN,
# and not so low that the tiny number added to each probability (below) would matter in a sum.
NEVER = -1e25
FOLD = 16  # folds of a vocabulary, to find its top k; 8 to 64 perform alike for k of 1 to 256


@dataclass(frozen=True)
class Jsd:
    """Generalized Jensen-Shannon divergence of student and teacher.

        m = beta * q + (1 - beta) * p;  JSD_beta = beta * KL(q || m) + (1 - beta) * KL(p || m)
        beta = 0: forward KL(q || p);  beta = 1: reverse KL(p || q)  (the limits of JSD there are 0)

    Source: Agarwal et al. 2024 (arXiv:2306.13649); beta as in TRL's `generalized_jsd_loss`.
    """

    beta: float

    def __post_init__(self) -> None:
        _refuse_beta(self.beta)


@dataclass(frozen=True)
class CrossEntropy:
    """-log p(y); the teacher is only compared with. Temperature 1 only; the caller shifts y."""


@dataclass(frozen=True)
class PolicyGradient:
    """Policy gradient on sampled tokens, each weighted by its importance ratio.

        A = clip(log q(y) - log p_sample(y), -clip, clip), a constant;  -A * p(y) / p_sample(y)

    `sampled_N` holds log p_sample(y), under the exact distribution that y was drawn from. On policy
    (p_sample = p, nothing clipped) the expected gradient over y is that of KL(p || q). Without a
    `cap` the ratio is unbounded: if it overflows, the gradient is not finite, whatever the weight.
    A capped ratio is a constant (truncated importance sampling): the token keeps its gradient.
    A fixed `advantage` takes the place of A, for a control that no teacher has a part in: on
    policy, its expected gradient is 0.
    Source: sampled-token form, Eq. 3 of arXiv:2604.13016, with tinker-cookbook's
    `importance_sampling` and the cliff seeds' clip.
    """

    sampled_N: Float[Tensor, " N"]
    clip: float
    cap: float | None = None
    advantage: float | None = None
    capped: list[Tensor] = field(default_factory=list[Tensor], compare=False)  # counts, by chunk

    def __post_init__(self) -> None:
        if not self.clip >= 0:
            raise ValueError(f"PolicyGradient: clip ({self.clip}) must lie at or above 0")


@dataclass(frozen=True)
class TopK:
    """JSD_beta of coarser distributions: each token of a support, and all others as one outcome.

    The support, per position: the k likeliest tokens of the student, of the teacher, those of
    either, or those of both. The last outcome has the mass of all other tokens, summed, so the
    value lies between 0 and the JSD_beta of all tokens; an empty support gives 0.
    Source: supports as in the code of arXiv:2604.13016 (`TOP_K_STRATEGY`), where both sides are
    renormalized on them (Eq. 5); the last outcome as TRL's `loss_add_tail`.
    """

    k: int
    support: Literal["student", "teacher", "union", "intersection"]
    beta: float

    def __post_init__(self) -> None:
        _refuse_beta(self.beta)
        if self.k < 1:
            raise ValueError(f"TopK: k ({self.k}) must be at least 1")


Objective = Jsd | CrossEntropy | PolicyGradient | TopK


def at_rows(objective: Objective, rows: slice) -> Objective:
    """The objective restricted to these positions."""
    if isinstance(objective, PolicyGradient):
        return replace(objective, sampled_N=objective.sampled_N[rows])
    return objective


class TokenStats(NamedTuple):
    """One number per position, in nats, detached; float32, or float64 where the hidden states are.

    A KL is infinite if its first side gives probability to a token to which the other gives 0.
    All but `nll` are of the distributions that the loss compares: at the loss temperature, on the
    shared vocabulary. `nll` is at temperature 1, so that runs can be compared. None is weighted.
    """

    loss: Float[Tensor, " N"]  # the objective's value, which is weighted and summed
    forward_kl: Float[Tensor, " N"]  # KL(teacher || student)
    reverse_kl: Float[Tensor, " N"]  # KL(student || teacher)
    jsd_half: Float[Tensor, " N"]  # JSD(1/2), at most ln 2
    nll: Float[Tensor, " N"]  # -log p(target)
    student_entropy: Float[Tensor, " N"]
    teacher_entropy: Float[Tensor, " N"]


Numbers = TypeVar("Numbers", TokenStats, Overlap)


def joined(parts: Sequence[Numbers]) -> Numbers:
    """The chunks concatenated."""
    return type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))


def evaluate_(
    objective: Objective,
    logits_nV: Float[Tensor, "n V"],
    teacher_nV: Float[Tensor, "n V"],
    targets_n: Int[Tensor, " n"],
    temperature: float,
    wants_gradient: bool,
    overlap_k: int | None = None,
) -> tuple[TokenStats, Overlap | None]:
    """The statistics of a chunk; its logits are overwritten, with d value / d logits if wanted.

    With `overlap_k`, also the overlap of that many likeliest tokens of each side.
    """
    n, V = logits_nV.shape
    size = n if logits_nV.is_cuda else min(n, max(1, BLOCK // V))
    # Top-k comes last and needs both sides' log-probabilities; other objectives overwrite them.
    buffers = 5 if isinstance(objective, TopK) else 4
    scratch_bufbV = logits_nV.new_empty(buffers, size, V)
    blocks = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    stats, overlaps = zip(
        *(
            _evaluate_block_(
                at_rows(objective, block), logits_nV[block], teacher_nV[block], targets_n[block],
                scratch_bufbV, temperature, wants_gradient, overlap_k,
            )
            for block in blocks
        ),
        strict=True,
    )  # fmt: skip
    return joined(stats), None if overlap_k is None else joined(overlaps)


def _evaluate_block_(
    objective: Objective,
    logits_nV: Tensor,
    teacher_nV: Tensor,
    targets_n: Tensor,
    scratch_bufbV: Tensor,
    temperature: float,
    wants_gradient: bool,
    overlap_k: int | None,
) -> tuple[TokenStats, Overlap | None]:
    """The same for a block of positions small enough that the passes below stay in cache."""
    log_p, log_q, p, q, *more = scratch_bufbV[:, : len(logits_nV)]
    nll, has_never = _distributions_(
        logits_nV, teacher_nV, targets_n, temperature, (log_p, log_q, p, q)
    )
    spare = logits_nV
    student_entropy, teacher_entropy = -_dot(p, log_p, spare), -_dot(q, log_q, spare)
    overlap = None
    if overlap_k is not None:  # before the passes below overwrite the logs
        student, teacher = (_largest(log, overlap_k) for log in (log_p, log_q))
        overlap = compare(log_p, log_q, student, teacher, student_entropy, teacher_entropy)
    log_p_y, log_q_y = _at(targets_n, log_p), _at(targets_n, log_q)
    if isinstance(objective, TopK):
        log_ratio = mixture = torch.sub(log_p, log_q, out=more[0])
    else:
        log_ratio, mixture = log_p.sub_(log_q), log_q
    forward_kl, reverse_kl = _kls(p, q, log_ratio, spare, has_never)
    keeps = log_ratio if isinstance(objective, Jsd) and objective.beta == 0.5 else spare
    half = _jsd(0.5, p, q, mixture, keeps, spare)

    scale = 1.0
    match objective:
        case Jsd():
            kls = forward_kl, reverse_kl
            loss, scale = _divergence_(
                objective.beta, kls, half, (p, q, log_ratio, mixture), logits_nV, wants_gradient
            )
        case CrossEntropy():
            loss = nll
            _towards_target_(logits_nV, p, targets_n, torch.ones_like(nll))
        case PolicyGradient():
            loss, push = _policy_gradient(objective, log_p_y, log_q_y)
            _towards_target_(logits_nV, p, targets_n, push)
        case TopK():
            loss = _top_k_(objective, log_p, log_q, logits_nV)
    scale /= temperature
    if wants_gradient and scale != 1:
        logits_nV.mul_(scale)
    stats = TokenStats(loss, forward_kl, reverse_kl, half[0], nll, student_entropy, teacher_entropy)
    return stats, overlap


def _distributions_(
    logits_nV: Tensor,
    teacher_nV: Tensor,
    targets_n: Tensor,
    temperature: float,
    into: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, bool]:
    """Write log p, log q, p and q [n, V] of student and teacher at `temperature` into buffers.

    Overwrites the logits. Returns the targets' negative log-likelihood [n] at temperature 1, and
    whether some probability may be 0: its log is NEVER then.
    """
    log_p, log_q, p, q = into
    torch.log_softmax(logits_nV, -1, out=log_p)
    nll = -_at(targets_n, log_p)
    teacher_nV = teacher_nV.to(log_p.dtype)
    if temperature != 1:
        torch.log_softmax(logits_nV.div_(temperature), -1, out=log_p)
        teacher_nV = teacher_nV / temperature
    torch.log_softmax(teacher_nV, -1, out=log_q)
    # Where p and q both underflow, p / m must not be 0 / 0. The smallest normal number changes no
    # probability above 1e-30 and adds less than 1e-30 to any sum.
    tiny = torch.finfo(p.dtype).tiny
    # Rare, and a check costs less than three passes; but on a GPU, a check is a synchronization.
    has_never = log_p.is_cuda or bool(torch.minimum(log_p.amin(), log_q.amin()) < NEVER)
    if has_never:
        log_p.clamp_(min=NEVER)
        log_q.clamp_(min=NEVER)
    torch.exp(log_p, out=p).add_(tiny)
    torch.exp(log_q, out=q).add_(tiny)
    return nll, has_never


def _divergence_(
    beta: float,
    kls: tuple[Tensor, Tensor],
    half: tuple[Tensor, Tensor],
    buffers: tuple[Tensor, Tensor, Tensor, Tensor],
    logits_nV: Tensor,
    wants_gradient: bool,
) -> tuple[Tensor, float]:
    """The β-JSD [n] and what its gradient, left in `logits_nV` where asked for, is to be scaled by.

    `kls`: KL(q || p), KL(p || q); `half`: what `_jsd` returns at β ½; `buffers`: p, q, log p -
    log q (at β ½: log p - log m) and the mixture's buffer, [n, V].
    """
    p, q, log_ratio, mixture = buffers
    if beta == 0:
        if wants_gradient:
            torch.sub(p, q, out=logits_nV)
        return kls[0], 1.0
    if beta == 1:
        loss, centre = kls[1], kls[1].clamp(max=-NEVER)
    elif beta == 0.5:
        loss, centre = half
    else:
        loss, centre = _jsd(beta, p, q, mixture, log_ratio, logits_nV)
    if wants_gradient:  # log_ratio is log p - log q at beta = 1, else log p - log m
        torch.mul(log_ratio.sub_(centre[:, None]), p, out=logits_nV)
    return loss, 1.0 if beta == 1 else 1 - beta


def _policy_gradient(
    objective: PolicyGradient, log_p_y: Tensor, log_q_y: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss [n] of the drawn tokens, and how strongly each is pushed towards, [n]."""
    sampled_n = objective.sampled_N.to(log_p_y.dtype)
    if objective.advantage is None:
        advantage = (log_q_y - sampled_n).clamp(-objective.clip, objective.clip)
    else:
        advantage = torch.full_like(sampled_n, objective.advantage)
    ratio = torch.exp(log_p_y - sampled_n)
    if objective.cap is not None:
        objective.capped.append((ratio > objective.cap).sum())
        ratio = ratio.clamp(max=objective.cap)
    push = advantage * ratio
    if objective.advantage is not None:
        return -push, push
    # For a token that the teacher never writes, the advantage is -clip, even if infinite.
    is_never = (log_q_y <= NEVER) & (ratio > 0)
    return torch.where(is_never, objective.clip * ratio, -push), push


def _kls(
    p: Tensor, q: Tensor, log_ratio: Tensor, spare: Tensor, has_never: bool
) -> tuple[Tensor, Tensor]:
    """KL(q || p) and KL(p || q), both [n], from log p - log q, which is NEVER where only p is 0."""
    forward, reverse = -_dot(q, log_ratio, spare), _dot(p, log_ratio, spare)
    if not has_never:
        return forward, reverse
    return (
        forward.masked_fill_(log_ratio.amin(-1) < NEVER / 2, torch.inf),
        reverse.masked_fill_(log_ratio.amax(-1) > -NEVER / 2, torch.inf),
    )


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


def _towards_target_(gradient_nV: Tensor, p_nV: Tensor, targets_n: Tensor, push_n: Tensor) -> None:
    """push * (p - [i = y]): a gradient step against it increases p(y)."""
    torch.mul(p_nV, push_n[:, None], out=gradient_nV)
    gradient_nV.scatter_add_(1, targets_n[:, None], -push_n[:, None])


def _top_k_(objective: TopK, log_p_nV: Tensor, log_q_nV: Tensor, gradient_nV: Tensor) -> Tensor:
    """Values [n]; writes their gradient at temperature 1 to `gradient_nV`. Overwrites the logs.

    All tokens outside the support are one outcome, whose logit is the logsumexp of their logits:
    its gradient is distributed over them by the softmax among them.
    """
    index_nK, counts_nK = _support(objective, log_p_nV, log_q_nV, gradient_nV)
    log_p, mass_n1 = _outcomes_(log_p_nV, index_nK, counts_nK, objective.k)
    log_q, _ = _outcomes_(log_q_nV, index_nK, counts_nK, objective.k)
    value_n, slope = _divergence(objective.beta, log_p, log_q)
    torch.mul(log_p_nV, slope[:, -1:] / mass_n1, out=gradient_nV)
    _write_(gradient_nV, index_nK, slope[:, :-1], counts_nK, objective.k)
    return value_n


def _support(
    objective: TopK, log_p_nV: Tensor, log_q_nV: Tensor, spare_nV: Tensor
) -> tuple[Int[Tensor, "n K"], Bool[Tensor, "n K"]]:
    """Token ids, and which of them count: a token that is listed twice counts once."""
    wanted = {"student": [log_p_nV], "teacher": [log_q_nV]}
    first_nk, *second = (
        _largest(log_nV, objective.k)
        for log_nV in wanted.get(objective.support, [log_p_nV, log_q_nV])
    )
    every_nk = torch.ones_like(first_nk, dtype=torch.bool)
    if not second:
        return first_nk, every_nk
    (second_nk,) = second
    both_nk = spare_nV.zero_().scatter_(1, first_nk, 1).gather(1, second_nk) > 0
    if objective.support == "intersection":
        return second_nk, both_nk
    return torch.cat([first_nk, second_nk], 1), torch.cat([every_nk, ~both_nk], 1)


def _largest(log_nV: Tensor, k: int) -> Int[Tensor, "n k"]:
    """The k largest of each row, in any order.

    A row folded FOLD times has columns of FOLD numbers; the k columns with the largest maxima hold
    all that is wanted, and maxima are cheap: a third of the time of torch.topk at V 49,152, k 16.
    """
    n, V = log_nV.shape
    if V % FOLD or 2 * k * FOLD > V:
        return log_nV.topk(k, sorted=False).indices
    folded = log_nV.view(n, FOLD, V // FOLD)
    column_nk = folded.amax(1).topk(k, sorted=False).indices
    few = folded.gather(2, column_nk[:, None, :].expand(-1, FOLD, -1)).view(n, FOLD * k)
    among_nk = few.topk(k, sorted=False).indices
    return among_nk // k * (V // FOLD) + column_nk.gather(1, among_nk % k)


def _outcomes_(
    log_nV: Tensor, index_nK: Tensor, counts_nK: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the outcomes, [n, K + 1], the last of all tokens outside the support.

    Summed relative to the largest, so that even a rest of 1e-100 is kept. `log_nV` becomes the
    summands, 0 in the support; their sum [n, 1] is also returned, 1 if there are none. An outcome
    that does not exist (a token that does not count, a rest without tokens) gets a log-probability
    that is the same finite number on both sides.
    """
    nothing = torch.finfo(log_nV.dtype).min
    of_tokens = log_nV.gather(1, index_nK).masked_fill_(~counts_nK, 0)
    _write_(log_nV, index_nK, torch.full_like(of_tokens, -torch.inf), counts_nK, k)
    largest_n1 = log_nV.amax(-1, keepdim=True).clamp_(min=nothing)
    mass_n1 = log_nV.sub_(largest_n1).exp_().sum(-1, keepdim=True)
    of_rest = (largest_n1 + mass_n1.log()).clamp_(min=nothing)
    # If the rest is the only outcome, its mass is exactly 1, without a rounding error.
    of_rest.masked_fill_(~counts_nK.any(-1, keepdim=True), 0)
    return torch.cat([of_tokens, of_rest], 1), mass_n1.clamp_(min=1)


def _write_(
    dense_nV: Tensor, index_nK: Tensor, values_nK: Tensor, counts_nK: Tensor, k: int
) -> None:
    """Write the values that count into the dense rows; one list of k tokens at a time, because
    within one list no token occurs twice."""
    for index, values, counts in zip(
        *(x.split(k, 1) for x in (index_nK, values_nK, counts_nK)), strict=True
    ):
        dense_nV.scatter_(1, index, torch.where(counts, values, dense_nV.gather(1, index)))


def _divergence(beta: float, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """JSD_beta over a few outcomes, [n], and its gradient with respect to their logits."""
    tiny = torch.finfo(log_p.dtype).tiny
    p, q = log_p.exp().add_(tiny), log_q.exp().add_(tiny)
    log_ratio = log_p - log_q
    forward, reverse = _kls(p, q, log_ratio, torch.empty_like(p), has_never=True)
    if beta == 0:
        return forward, p - q
    if beta == 1:
        value, centre = reverse, reverse.clamp(max=-NEVER)
    else:
        value, centre = _jsd(beta, p, q, torch.empty_like(p), log_ratio, torch.empty_like(p))
    share = 1 if beta == 1 else 1 - beta
    return value, share * p * (log_ratio - centre[:, None])


def _at(targets_n: Tensor, dense_nV: Tensor) -> Tensor:
    return dense_nV.gather(1, targets_n[:, None]).squeeze(1)


def _dot(a_nV: Tensor, b_nV: Tensor, spare_nV: Tensor) -> Tensor:
    """Dot product of each pair of rows, [n]; torch.sum adds pairwise, which float32 needs here."""
    return torch.mul(a_nV, b_nV, out=spare_nV).sum(-1)


def _refuse_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta ({beta}) must lie in [0, 1]")
