"""Means over seeds with their uncertainty, paired comparisons, and verdicts.

The unit of replication is the seed: a score on 10,000 documents from one training run is one
observation of the method. Arms that share seeds are compared pair by pair, by a t interval on the n
differences, which speaks of other seeds *on these documents*.

Documents are shared by all seeds and arms, so they are a second, crossed source of variance. Where
the correctness of each document is known, `crossed` widens the interval to "other seeds and other
documents". It is a closed form, not a bootstrap over (seeds, documents): resampling three seeds
shows a third less variance than they have, and where seeds matter most its 95 % intervals covered
the truth 88 times in 100 in our simulation (this one 94; a test repeats it).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
POWER = 0.8
NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty; se, low, and high are NaN where n < 2."""

    mean: float
    se: float  # standard error of the mean
    n: int
    low: float  # 95 % t interval
    high: float


@dataclass(frozen=True)
class Paired:
    """An arm against a reference over the seeds both have."""

    difference: Estimate  # arm minus reference
    p: float  # two-sided paired t test; NaN where the differences have no variance
    detectable: float  # smallest true difference that is detected with a power of 80 %
    unpaired: int  # seeds that only one of the two has; they are left out


@dataclass(frozen=True)
class Verdict:
    """The conclusion that a comparison supports."""

    kind: Literal["better", "worse", "within noise", "no statement"]
    text: str


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard error and 95 % Student t interval of independent values."""
    n = len(values)
    if n == 0:
        return Estimate(NAN, NAN, 0, NAN, NAN)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, NAN, 1, NAN, NAN)
    if _all_equal(values):  # a sum of equal floats may be off by an ulp
        return Estimate(values[0], 0.0, n, values[0], values[0])
    se = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = t_quantile(n - 1) * se
    return Estimate(mean, se, n, mean - half, mean + half)


def binomial_se(share: float, n: int) -> float:
    """Standard error of a share of right answers over n documents: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / n) if n else NAN


def compare(
    arm: Mapping[Hashable, float], reference: Mapping[Hashable, float], of: int = 1
) -> Paired:
    """The paired comparison of two arms, each a value per seed; seeds of only one are counted.

    of: the number of comparisons in the family. p is not adjusted for it here (`holm` does that);
    the detectable difference is: at ALPHA / of, the strictest step of Holm's procedure.
    """
    shared = [seed for seed in arm if seed in reference]
    difference = estimate([arm[seed] - reference[seed] for seed in shared])
    unpaired = len(arm) + len(reference) - 2 * len(shared)
    if difference.n < 2:
        return Paired(difference, NAN, NAN, unpaired)
    if difference.se == 0:
        # Equal scores: no difference. Equal differences: no variance to test them against.
        return Paired(difference, 1.0 if difference.mean == 0 else NAN, 0.0, unpaired)
    from scipy.special import stdtr  # scipy.stats holds the same, and takes two seconds to import

    p = 2 * float(stdtr(difference.n - 1, -abs(difference.mean / difference.se)))
    sd = difference.se * math.sqrt(difference.n)
    smallest = detectable_difference(sd, difference.n, alpha=ALPHA / of)
    return Paired(difference, p, smallest, unpaired)


def detectable_difference(sd: float, n: int, power: float = POWER, alpha: float = ALPHA) -> float:
    """The true difference that a two-sided paired t test detects with this power.

    sd is the standard deviation of the n >= 2 differences, in the metric's unit, as is the answer.
    Source: power of the t test by the noncentral t distribution with n - 1 degrees of freedom.
    """
    from scipy.special import nctdtrinc

    # A significant difference of the wrong sign is rarer than 1 in 1,000 here and left out.
    noncentrality = nctdtrinc(n - 1, 1 - power, t_quantile(n - 1, alpha))
    return sd * float(noncentrality) / math.sqrt(n)


def crossed(difference_SD: np.ndarray[Any, np.dtype[np.float64]]) -> Estimate:
    """Mean difference over other seeds *and* other documents; n is the number of seeds.

    difference_SD: [S seeds, D documents], arm minus reference, the same documents for every seed.
    The variance of the grand mean of a crossed two-way layout is the sum of a seed, a document and
    a residual part, each from its mean square and none below zero, with Satterthwaite's degrees of
    freedom. se is never under that of the seeds alone, and the interval never inside theirs.
    NaN where S < 2 or D < 2.
    Source: random-effects two-way analysis of variance; Clark 1973, "The language-as-fixed-effect
    fallacy", for why both factors are random.
    """
    seeds, documents = difference_SD.shape
    mean = float(difference_SD.mean()) if difference_SD.size else NAN
    if seeds < 2 or documents < 2:
        return Estimate(mean, NAN, seeds, NAN, NAN)
    by_seed = difference_SD.mean(axis=1) - mean
    by_document = difference_SD.mean(axis=0) - mean
    residual_SD = difference_SD - mean - by_seed[:, None] - by_document[None, :]
    free = (seeds - 1, documents - 1, (seeds - 1) * (documents - 1))
    ms_seed = documents * float((by_seed**2).sum()) / free[0]
    ms_document = seeds * float((by_document**2).sum()) / free[1]
    ms_residual = float((residual_SD**2).sum()) / free[2]
    total = max(ms_seed, ms_residual) + max(ms_document, ms_residual) - ms_residual
    if total == 0:
        return Estimate(mean, 0.0, seeds, mean, mean)
    squares = zip((ms_seed, ms_document, ms_residual), free, strict=True)
    freedom = total**2 / sum(ms**2 / f for ms, f in squares)
    se = math.sqrt(total / (seeds * documents))
    seeds_alone = t_quantile(free[0]) * math.sqrt(ms_seed / (seeds * documents))
    half = max(t_quantile(freedom) * se, seeds_alone)
    return Estimate(mean, se, seeds, mean - half, mean + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for multiple comparisons (Holm 1979); NaN stays NaN and does not count."""
    adjusted = [NAN] * len(p_values)
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = highest
    return adjusted


def verdict(paired: Paired, p: float, higher_is_better: bool, both: Estimate | None) -> Verdict:
    """The verdict on a comparison.

    p: `paired.p`, adjusted by `holm` within its family. both: `crossed`, where documents are known;
    if its interval contains 0, "better" holds for these documents only.
    """
    d = paired.difference
    if d.n == 0:
        return Verdict("no statement", "no shared seed: no statement")
    if d.n == 1:
        return Verdict("no statement", "one seed: no statement")
    if math.isnan(p):
        text = f"the same difference in all {d.n} seeds, so no variance to test: no statement"
        return Verdict("no statement", text)
    if p >= ALPHA:
        return Verdict("within noise", "within noise")
    kind = "better" if (d.mean > 0) == higher_is_better else "worse"
    text = f"{kind} by {number(abs(d.mean))} ± {number(d.se)} (n = {d.n})"
    if both is not None and both.low <= 0 <= both.high:
        text += ", on these documents only"
    return Verdict(kind, text)


def number(value: float) -> str:
    """A score as text: three decimals below 10, two above, scientific where those show nothing."""
    if math.isnan(value):
        return "–"
    if value != 0 and not 5e-4 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _all_equal(values: Sequence[float]) -> bool:
    # Differences of equal scores can differ in the last bit (0.3 - 0.2 is not 0.4 - 0.3).
    spread = max(values) - min(values)
    return spread <= 1e-12 * max(1.0, *(abs(v) for v in values))


def t_quantile(freedom: float, alpha: float = ALPHA) -> float:
    """The value that Student's t exceeds, up or down, with probability alpha."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - alpha / 2))
