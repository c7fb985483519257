"""Compute the training objectives directly: all logits at once, differentiated by autograd."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from stillhouse.distill.head import Head
from stillhouse.distill.losses import distill_loss
from stillhouse.distill.objectives import (
    CrossEntropy,
    Jsd,
    Objective,
    PolicyGradient,
    TokenStats,
    TopK,
)

F64 = torch.float64


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def jsd(beta: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    if beta in (0, 1):
        return kl(log_p, log_q) if beta else kl(log_q, log_p)
    log_m = torch.logaddexp(log_q + log(beta), log_p + log(1 - beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def log_softmaxes(logits: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p and log q on the shared vocabulary, in the logits' precision."""
    V = min(logits.shape[1], teacher.shape[1])
    return (
        torch.log_softmax(logits[:, :V] / temperature, -1),
        torch.log_softmax(teacher[:, :V].to(logits.dtype) / temperature, -1),
    )


def dense_loss(
    logits: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """JSD_beta, forward KL, reverse KL and JSD(1/2) per position by the textbook, all at once."""
    log_p, log_q = log_softmaxes(logits, teacher, temperature)
    return tuple(jsd(b, log_p, log_q) for b in (beta, 0.0, 1.0, 0.5))  # type: ignore[return-value]


def dense_values(
    objective: Objective,
    logits: Tensor,
    teacher: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """The objective per position; what is a constant to it is detached."""
    log_p, log_q = log_softmaxes(logits, teacher, temperature)
    log_p_y, log_q_y = (x.gather(1, targets[:, None]).squeeze(1) for x in (log_p, log_q))
    match objective:
        case Jsd():
            return jsd(objective.beta, log_p, log_q)
        case CrossEntropy():
            return -log_p_y
        case PolicyGradient():
            sampled = objective.sampled_N.to(log_p.dtype)
            advantage = (log_q_y - sampled).clamp(-objective.clip, objective.clip).detach()
            return -advantage * (log_p_y - sampled).exp()
        case TopK():
            rows = zip(log_p, log_q, strict=True)
            return torch.stack([_top_k_of_row(objective, of_p, of_q) for of_p, of_q in rows])


def _top_k_of_row(objective: TopK, log_p: Tensor, log_q: Tensor) -> Tensor:
    """One position, by sets; a support that is everything leaves no other outcome."""
    # Of tokens that tie for the last place, as bfloat16's do, topk takes which it likes.
    student, teacher = (set(x.topk(objective.k).indices.tolist()) for x in (log_p, log_q))
    support = {
        "student": student,
        "teacher": teacher,
        "union": student | teacher,
        "intersection": student & teacher,
    }[objective.support]
    inside = sorted(support)
    outside = [i for i in range(len(log_p)) if i not in support]

    def outcomes(x: Tensor) -> Tensor:
        rest = [x[outside].logsumexp(0, keepdim=True)] if outside else []
        return torch.cat([x[inside], *rest])

    return jsd(objective.beta, outcomes(log_p), outcomes(log_q))


def on_logits(
    logits_NV: Tensor,
    teacher_NV: Tensor,
    targets_N: Tensor | None = None,
    *,
    objective: Objective,
    temperature: float = 1.0,
    weights_N: Tensor | None = None,
) -> tuple[Tensor, TokenStats, Tensor]:
    """Loss, statistics, d loss / d logits: with the identity as head, hidden states are logits."""
    hidden = logits_NV.clone().requires_grad_()
    if targets_N is None:
        targets_N = torch.zeros(len(hidden), dtype=torch.long)
    loss, stats = distill_loss(
        hidden,
        Head(torch.eye(hidden.shape[1], dtype=hidden.dtype)),
        lambda rows: teacher_NV[rows],
        targets_N,
        objective=objective,
        temperature=temperature,
        weights_N=weights_N,
    )
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), stats, hidden.grad


def some(N: int, H: int, V: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a head, teacher logits and targets; another seed for another shape."""
    g = torch.Generator().manual_seed(1000 * N + 10 * H + V)
    hidden, head, teacher = (
        torch.randn(*shape, generator=g, dtype=F64).to(dtype) for shape in ((N, H), (V, H), (N, V))
    )
    return hidden, head, 2 * teacher, torch.randint(V, (N,), generator=g)
