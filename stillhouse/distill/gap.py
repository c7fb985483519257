"""Check rollouts against the trained function, by the log-probabilities of their tokens.

Generation stores the log-probability that each token was drawn with. The loss computes the one that
the trained function gives it, under the same processed distribution (temperature, forbidden
end-of-text). Their difference d must be 0 up to rounding; if it is not, the run trains on rollouts
of another policy. Legend: N drawn tokens, n tokens of a chunk, V vocabulary, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.distill.rollouts import Completions
from stillhouse.errors import Diverged
from stillhouse.spec import TrainSpec, rollout_gap_bound

SUMS = 8  # numbers of a `Gap`, which add up over batches and processes


class Drawn:
    """Collects the log-probabilities of drawn tokens from the logits of each chunk."""

    def __init__(
        self, temperature: float, eos_ids: Sequence[int], is_endless_N: Bool[Tensor, " N"]
    ) -> None:
        """`is_endless_N`, on the CPU: the positions at which end-of-text was forbidden."""
        self.temperature, self.eos_ids, self.is_endless_N = temperature, [*eos_ids], is_endless_N
        self.log_probs: list[Tensor] = []

    def look(
        self,
        rows: slice,
        logits_nV: Float[Tensor, "n V"],
        target_n: Int[Tensor, " n"],
        is_whole: bool,
    ) -> Callable[[Float[Tensor, " n"]], None]:
        """Read what is needed from the logits before they are overwritten. The result then takes
        -log softmax of the targets, which suffices where the distribution was not processed.

        `is_whole`: whether that softmax is over the whole vocabulary.
        """
        z_n = logits_nV.gather(1, target_n[:, None]).squeeze(1) / self.temperature
        is_other_n = self.is_endless_N[rows]
        if self.temperature != 1 or not is_whole:
            is_other_n = torch.ones_like(is_other_n)
        other = is_other_n.nonzero().squeeze(1).to(logits_nV.device)
        if len(other):
            score_oV = logits_nV[other] / self.temperature
            is_endless_o = self.is_endless_N[rows][is_other_n].to(score_oV.device)
            ends = torch.tensor(self.eos_ids, device=score_oV.device)
            forbidden = torch.where(is_endless_o[:, None], -torch.inf, score_oV[:, ends])
            score_oV[:, ends] = forbidden
            processed_o = z_n[other] - score_oV.logsumexp(1)

        def add(nll_n: Tensor) -> None:
            log_prob_n = -nll_n.clone()
            if len(other):
                log_prob_n[other] = processed_o.to(log_prob_n.dtype)
            self.log_probs.append(log_prob_n.double())

        return add

    def seen_N(self) -> Float[Tensor, " N"]:
        """All log-probabilities so far, in order; float64."""
        return torch.cat(self.log_probs)


class Gap:
    """d = log p(trained) - log p(as drawn) of a step's tokens, in sums that add up."""

    def __init__(self) -> None:
        self.sums, self.largest = [0.0] * SUMS, 0.0

    def add(self, seen_N: Float[Tensor, " N"], written: Completions) -> None:
        """Add the tokens of these rows."""
        drawn_N = seen_N.new_tensor([value for row in written.log_probs for value in row])
        if not len(drawn_N):
            return
        d_N = seen_N - drawn_N
        lengths = [len(row) for row in written.log_probs if row]
        whole_S = torch.stack([part.sum() for part in d_N.split(lengths)])
        ratio_N, ratio_S = d_N.exp(), whole_S.exp()
        found = [
            torch.tensor(float(len(d_N))), d_N.abs().sum(), (ratio_N - 1 - d_N).sum(),
            ratio_N.sum(), ratio_N.square().sum(),
            torch.tensor(float(len(lengths))), ratio_S.sum(), ratio_S.square().sum(),
        ]  # fmt: skip
        self.sums = [a + float(b) for a, b in zip(self.sums, found, strict=True)]
        self.largest = max(self.largest, float(d_N.abs().max()))


def watched(
    logits: Callable[[slice], Tensor], drawn: Drawn, target_N: Int[Tensor, " N"]
) -> Callable[[slice], Tensor]:
    """The same function `logits`, which also passes each result to `drawn`."""

    def seen(rows: slice) -> Tensor:
        logits_nV, target_n = logits(rows), target_N[rows]
        score_nV = logits_nV.float()
        nll_n = score_nV.logsumexp(1) - score_nV.gather(1, target_n[:, None]).squeeze(1)
        drawn.look(rows, score_nV, target_n, is_whole=True)(nll_n)
        return logits_nV

    return seen


def numbers(sums: Sequence[float], largest: float) -> dict[str, float]:
    """The metrics that a step logs about its gap; none if nothing was drawn.

    gap_mean: mean |d|, nats per token. gap_k3: mean of r - 1 - log r with r = exp(d), an estimate
    of KL(as drawn || trained) that is never negative. ess: effective sample size as a share, per
    token and per sequence: 1 if all weights r are equal.
    """
    tokens, absolute, k3, ratios, squares, rows, of_rows, squares_of_rows = sums
    if not tokens:
        return {}
    return {
        "rollout/gap_mean": absolute / tokens,
        "rollout/gap_max": largest,
        "rollout/gap_k3": k3 / tokens,
        "rollout/ess": ratios**2 / (tokens * squares),
        "rollout/ess_sequence": of_rows**2 / (rows * squares_of_rows),
    }


def check(spec: TrainSpec, step: int, found: dict[str, float], wrote: str) -> None:
    """Refuse to train on rollouts of another policy.

    Raises:
        Diverged: the mean gap exceeds its bound, or is NaN; the message says where to look.
    """
    bound = rollout_gap_bound(spec)
    if not found or found["rollout/gap_mean"] <= bound:
        return
    told = ", ".join(f"{name.partition('/')[2]} {value:.3g}" for name, value in found.items())
    raise Diverged(
        f"step {step}: the {wrote}'s tokens were drawn from another distribution than the one that"
        f" is trained on them: mean |difference of log-probabilities|"
        f" {found['rollout/gap_mean']:.3g} nats per token, allowed {bound:g}"
        f" (max_rollout_gap); {told}. What writes is in the log (rollouts: ...)"
    )
