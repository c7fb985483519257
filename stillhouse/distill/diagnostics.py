"""Compare the likeliest tokens of student and teacher at each position of the student's rollouts.

A position is a token of a rollout that the loss counts. At each, the k likeliest tokens of the
student, S^p, are compared with the k likeliest of the teacher, S^q: how many they share, how much
probability each model gives to those, and in which direction the teacher would push each group. The
loss calls `compare` on each chunk while it holds both distributions, and keeps ten numbers per
position.

Source: arXiv:2604.13016, Eq. 6 to 8, and Eq. 9 and 10 of its appendix B. Legend: N positions,
n positions of a chunk, V the shared vocabulary, k tokens of each side, p student, q teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Bins = Sequence[tuple[int, int | None]]  # [first, end) of each; the last has no end


class Overlap(NamedTuple):
    """One number per position, detached; a mean over no tokens at all is NaN.

    Of the distributions that the loss compares: at its temperature, on the shared vocabulary.
    """

    ratio: Float[Tensor, " N"]  # Eq. 6: share of S^p that lies in S^q, in [0, 1]
    # Eq. 7: mean over the shared tokens of p'(v) (log q'(v) - log p'(v)), in nats, where ' means
    # renormalized on them; at most 0, and 0 where the two agree. NaN: no token is shared.
    advantage: Float[Tensor, " N"]
    entropy_gap: Float[Tensor, " N"]  # Eq. 8: |H(q) - H(p)|, in nats, over all tokens
    mass_student: Float[Tensor, " N"]  # Eq. 9: what p gives the shared tokens, not renormalized
    mass_teacher: Float[Tensor, " N"]  # Eq. 10: what q gives them
    # Mean of p(v) (log q(v) - log p(v)), in nats, nothing renormalized, over the tokens of S^p and
    # S^q, of S^p alone, of S^q alone: where the reward of the whole vocabulary comes from.
    advantage_shared: Float[Tensor, " N"]
    advantage_student_only: Float[Tensor, " N"]
    advantage_teacher_only: Float[Tensor, " N"]
    student_entropy: Float[Tensor, " N"]  # in nats
    teacher_entropy: Float[Tensor, " N"]


def compare(
    log_p_nV: Float[Tensor, "n V"],
    log_q_nV: Float[Tensor, "n V"],
    student_nk: Int[Tensor, "n k"],
    teacher_nk: Int[Tensor, "n k"],
    student_entropy_n: Float[Tensor, " n"],
    teacher_entropy_n: Float[Tensor, " n"],
) -> Overlap:
    """The numbers of a chunk, from log-probabilities and each side's k likeliest tokens."""
    same_nkk = student_nk[:, :, None] == teacher_nk[:, None, :]
    shared_nk, known_nk = same_nkk.any(2), same_nkk.any(1)  # of the student's; of the teacher's
    log_p_nk, log_q_nk = log_p_nV.gather(1, student_nk), log_q_nV.gather(1, student_nk)
    log_mass_p_n1, log_mass_q_n1 = (
        log_nk.masked_fill(~shared_nk, -torch.inf).logsumexp(1, keepdim=True)
        for log_nk in (log_p_nk, log_q_nk)
    )
    return Overlap(
        ratio=shared_nk.to(log_p_nV.dtype).mean(1),
        advantage=_mean(_reward(log_p_nk - log_mass_p_n1, log_q_nk - log_mass_q_n1), shared_nk),
        entropy_gap=(teacher_entropy_n - student_entropy_n).abs(),
        mass_student=log_mass_p_n1.exp().squeeze(1),
        mass_teacher=log_mass_q_n1.exp().squeeze(1),
        advantage_shared=_mean(_reward(log_p_nk, log_q_nk), shared_nk),
        advantage_student_only=_mean(_reward(log_p_nk, log_q_nk), ~shared_nk),
        advantage_teacher_only=_mean(
            _reward(log_p_nV.gather(1, teacher_nk), log_q_nV.gather(1, teacher_nk)), ~known_nk
        ),
        student_entropy=student_entropy_n,
        teacher_entropy=teacher_entropy_n,
    )


class Summary:
    """Means over all positions and by position in the answer, as sums that processes can add up."""

    def __init__(self, k: int, bins: Bins) -> None:
        """`k` tokens of each side are compared; a position counts in the bin of its place."""
        self.k, self.bins = k, bins
        # For each number: sum and count, first over all positions, then per bin.
        self.sums = torch.zeros(len(Overlap._fields), 1 + len(bins), 2, dtype=torch.float64)

    def add(self, found: Overlap, places_N: Int[Tensor, " N"]) -> None:
        """Add these positions; `places_N` is how many tokens of the answer precede each."""
        values_fN = torch.stack(found).double()
        counts_fN, infinite_fN = ~values_fN.isnan(), values_fN.isinf()
        inside = [torch.ones_like(places_N, dtype=torch.bool)]
        for first, end in self.bins:
            inside.append((places_N >= first) & (places_N < (end or torch.inf)))
        inside_Nb = torch.stack(inside, 1).double()
        self.sums = self.sums.to(values_fN.device)
        self.sums[:, :, 0] += values_fN.masked_fill(~counts_fN | infinite_fN, 0) @ inside_Nb
        # Infinities are added to their own bins only: in a product, 0 times infinity would be NaN.
        signs_fb = (values_fN.sign() * infinite_fN) @ inside_Nb
        self.sums[:, :, 0] += (signs_fb * torch.inf).masked_fill_(signs_fb == 0, 0)
        self.sums[:, :, 1] += counts_fN.double() @ inside_Nb

    def numbers(self) -> list[float]:
        """The sums as a list, to be added up over processes, for `metrics`."""
        return self.sums.flatten().tolist()

    def metrics(self, numbers: Sequence[float]) -> dict[str, float]:
        """Means by name: `overlap/ratio`, and `overlap/ratio/0-7` for a bin; means over no position
        are left out. `overlap/empty` counts the positions without a shared token."""
        sums = torch.tensor(numbers, dtype=torch.float64).view(self.sums.shape)
        where = ["", *(f"/{label(first, end)}" for first, end in self.bins)]
        named: dict[str, float] = {}
        for name, row in zip(Overlap._fields, sums.tolist(), strict=True):
            for place, (total, count) in zip(where, row, strict=True):
                if count:
                    named[f"overlap/{name}{place}"] = total / count
        counts = dict(zip(Overlap._fields, sums[:, 0, 1].tolist(), strict=True))
        if counts["ratio"]:
            named["overlap/positions"] = counts["ratio"]
            named["overlap/empty"] = counts["ratio"] - counts["advantage"]
        return named


def label(first: int, end: int | None) -> str:
    """A bin's name: 0-7, or 24- for all that follows."""
    return f"{first}-{'' if end is None else end - 1}"


def _reward(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log q - log p): how a step of reverse KL would move a token, and how much it counts.

    Minus infinity for a token that q never gives; its log is a large negative number here
    (`objectives.NEVER`).
    """
    log_ratio = log_q - log_p
    return (log_p.exp() * log_ratio).masked_fill_(log_ratio < -1e20, -torch.inf)


def _mean(values_nk: Tensor, counts_nk: Tensor) -> Tensor:
    return values_nk.masked_fill(~counts_nk, 0).sum(1) / counts_nk.sum(1)
