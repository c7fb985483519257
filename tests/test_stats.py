"""Test the numbers in stats.py against hand computation, tables and invariants."""

# pandas annotates its results as unions of everything it could return.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.results.stats import (
    Estimate,
    binomial_se,
    compare,
    crossed,
    detectable_difference,
    estimate,
    holm,
    number,
    verdict,
)

scores = st.lists(st.floats(-100, 100).map(lambda v: round(v, 4)), min_size=2, max_size=8)


def test_an_estimate_is_mean_standard_error_and_t_interval_by_hand() -> None:
    e = estimate([1.0, 2.0, 3.0])
    assert (e.mean, e.n) == (2.0, 3)
    assert e.se == pytest.approx(1 / math.sqrt(3))
    # t(0.975, 2) = 4.302653 by the table.
    assert e.high - e.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert e.mean - e.low == pytest.approx(e.high - e.mean)


def test_one_value_has_no_noise_to_show_and_none_has_no_mean() -> None:
    one = estimate([0.5])
    assert (one.mean, one.n) == (0.5, 1)
    assert math.isnan(one.se) and math.isnan(one.low) and math.isnan(one.high)
    assert estimate([]).n == 0 and math.isnan(estimate([]).mean)


def test_equal_values_have_an_interval_of_one_point() -> None:
    assert estimate([0.1, 0.1, 0.1]) == Estimate(0.1, 0.0, 3, 0.1, 0.1)


@given(scores, st.floats(-50, 50), st.floats(0.1, 10))
def test_shifting_and_scaling_values_shifts_and_scales_the_interval(
    values: list[float], shift: float, scale: float
) -> None:
    plain, moved = estimate(values), estimate([scale * v + shift for v in values])
    for ours, theirs in (
        (plain.mean, moved.mean),
        (plain.low, moved.low),
        (plain.high, moved.high),
    ):
        assert theirs == pytest.approx(scale * ours + shift, abs=1e-6)
    assert moved.se == pytest.approx(scale * plain.se, abs=1e-8)
    assert plain.low <= plain.mean <= plain.high


def test_a_binomial_error_is_largest_at_one_half() -> None:
    assert binomial_se(0.5, 100) == pytest.approx(0.05)
    assert binomial_se(0.9, 100) == pytest.approx(0.03)
    assert binomial_se(1.0, 100) == 0
    assert math.isnan(binomial_se(0.5, 0))


def test_a_paired_comparison_by_hand() -> None:
    # Differences 1, 2, 3, whatever the seeds have in common: t = 2 / (1 / sqrt 3) = 3.4641.
    paired = compare({0: 11.0, 1: 102.0, 2: 53.0}, {0: 10.0, 1: 100.0, 2: 50.0})
    assert paired.difference.mean == pytest.approx(2.0)
    assert paired.difference.se == pytest.approx(1 / math.sqrt(3))
    # With 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2), so here 1 - sqrt(12 / 14).
    assert paired.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired.unpaired == 0


def test_only_shared_seeds_are_compared_and_the_others_are_counted() -> None:
    paired = compare({0: 1.0, 1: 2.0, 2: 9.0}, {1: 1.0, 0: 0.5, 3: 4.0})
    assert paired.difference.n == 2
    assert paired.difference.mean == pytest.approx(0.75)
    assert paired.unpaired == 2
    assert compare({0: 1.0}, {1: 1.0}).difference.n == 0


@given(scores, st.randoms(use_true_random=False))
def test_swapping_the_arms_turns_the_sign_and_keeps_the_rest(values: list[float], random) -> None:
    arm = dict(enumerate(values))
    reference = dict(enumerate(random.sample(values, len(values))))
    one, other = compare(arm, reference), compare(reference, arm)
    assert one.difference.mean == pytest.approx(-other.difference.mean)
    assert one.difference.low == pytest.approx(-other.difference.high)
    assert one.p == pytest.approx(other.p, nan_ok=True)
    assert math.isnan(one.p) or 0 <= one.p <= 1


@given(scores, st.floats(-10, 10))
def test_p_is_below_5_percent_exactly_when_the_interval_leaves_out_zero(
    values: list[float], shift: float
) -> None:
    paired = compare(dict(enumerate(values)), dict.fromkeys(range(len(values)), shift))
    d = paired.difference
    if not math.isnan(paired.p) and abs(paired.p - 0.05) > 1e-9:
        assert (paired.p < 0.05) == (d.low > 0 or d.high < 0)


def test_seeds_that_all_agree_show_no_difference_or_no_noise_to_judge_one_by() -> None:
    same = compare({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    assert same.p == 1.0
    assert verdict(same, same.p, True, None).kind == "within noise"
    # 0.3 - 0.2 and 0.4 - 0.3 differ in their last bit, which is not noise of training.
    constant = compare({0: 0.3, 1: 0.4}, {0: 0.2, 1: 0.3})
    assert math.isnan(constant.p)
    assert verdict(constant, constant.p, True, None).kind == "no statement"


@pytest.mark.parametrize(("n", "effect"), [(10, 0.9960), (34, 0.4950), (5, 1.6820)])
def test_the_detectable_difference_is_that_of_power_tables(n: int, effect: float) -> None:
    # 34 pairs for d = 0.5 and 10 for d = 1 are the textbook sample sizes at 80 % power.
    assert detectable_difference(1.0, n) == pytest.approx(effect, abs=5e-4)
    assert detectable_difference(0.02, n) == pytest.approx(0.02 * effect, abs=1e-4)


def test_a_detectable_difference_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    effect = detectable_difference(1.0, 3)
    found = [
        compare(
            dict(enumerate((effect + rng.normal(size=3)).tolist())), dict.fromkeys(range(3), 0.0)
        ).p
        for _ in range(2000)
    ]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.8, abs=0.03)


def test_holm_multiplies_the_smallest_p_by_the_number_of_comparisons() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_comparison_without_p_does_not_count_for_holm() -> None:
    adjusted = holm([0.01, float("nan"), 0.04])
    assert adjusted[0] == pytest.approx(0.02) and adjusted[2] == pytest.approx(0.04)
    assert math.isnan(adjusted[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_a_p_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert all(adjusted[i] <= adjusted[j] for i, j in zip(order, order[1:], strict=False))
    # Which comparison stands where makes no difference.
    assert sorted(adjusted) == pytest.approx(sorted(holm(p_values[::-1])))


def test_crossed_noise_by_hand() -> None:
    # Rows are seeds. Grand mean 3, seed means 2 and 4, document means 2 and 4, no residual.
    e = crossed(np.array([[1.0, 3.0], [3.0, 5.0]]))
    # Mean squares 4, 4 and 0: variance of the mean (4 + 4 - 0) / 4 = 2.
    assert (e.mean, e.n) == (3.0, 2)
    assert e.se == pytest.approx(math.sqrt(2))
    # Satterthwaite: 8^2 / (4^2 / 1 + 4^2 / 1) = 2 degrees of freedom give 4.303 * 1.414 = 6.085;
    # the seeds alone, with 1 degree, give 12.706 * 1 and win.
    assert e.high - e.mean == pytest.approx(12.7062, rel=1e-4)


@given(st.integers(2, 5), st.integers(2, 30), st.integers(0, 10_000))
def test_crossed_noise_is_never_less_than_that_of_the_seeds_alone(
    seeds: int, documents: int, draw: int
) -> None:
    difference_SD = np.random.default_rng(draw).integers(-1, 2, (seeds, documents)).astype(float)
    both, alone = crossed(difference_SD), estimate(difference_SD.mean(axis=1).tolist())
    assert both.mean == pytest.approx(alone.mean, abs=1e-12)
    assert both.se >= alone.se - 1e-9
    assert both.low <= alone.low + 1e-9 and both.high >= alone.high - 1e-9


def test_crossed_noise_needs_two_seeds_and_two_documents() -> None:
    assert math.isnan(crossed(np.ones((1, 50))).se)
    assert math.isnan(crossed(np.ones((3, 1))).se)
    assert crossed(np.ones((3, 4))) == Estimate(1.0, 0.0, 3, 1.0, 1.0)


@pytest.mark.parametrize("seed_noise", [0.0, 0.1])
def test_crossed_intervals_hold_the_truth_where_seeds_alone_or_a_bootstrap_do_not(
    seed_noise: float,
) -> None:
    rng = np.random.default_rng(1)
    held = {"crossed": 0, "seeds alone": 0, "bootstrap": 0}
    rounds, seeds, documents, truth = 400, 3, 100, 0.1
    for _ in range(rounds):
        difference_SD = truth + seed_noise * rng.normal(size=(seeds, 1))
        difference_SD = difference_SD + 0.3 * rng.normal(size=(1, documents))
        difference_SD = difference_SD + 0.3 * rng.normal(size=(seeds, documents))
        both = crossed(difference_SD)
        alone = estimate(difference_SD.mean(axis=1).tolist())
        rows, columns = (
            rng.integers(seeds, size=(200, seeds)),
            rng.integers(documents, size=(200, documents)),
        )
        means = difference_SD[rows[:, :, None], columns[:, None, :]].mean(axis=(1, 2))
        low, high = np.quantile(means, [0.025, 0.975])
        held["crossed"] += both.low <= truth <= both.high
        held["seeds alone"] += alone.low <= truth <= alone.high
        held["bootstrap"] += low <= truth <= high
    assert held["crossed"] / rounds > 0.925
    if seed_noise:
        assert held["bootstrap"] / rounds < 0.91
    else:
        assert held["seeds alone"] / rounds < 0.91


def paired(differences: list[float]):
    return compare(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))


def test_verdicts_say_better_worse_or_nothing() -> None:
    clear = paired([0.10, 0.12, 0.11])
    assert verdict(clear, clear.p, True, None).text == "better by 0.110 ± 0.006 (n = 3)"
    # Lower perplexity is better, so the same difference is the other verdict.
    assert verdict(clear, clear.p, False, None).text == "worse by 0.110 ± 0.006 (n = 3)"
    noisy = paired([0.3, -0.2, 0.1])
    assert verdict(noisy, noisy.p, True, None).text == "within noise"
    # The same three seeds say less when they are one of many comparisons.
    assert verdict(clear, 0.06, True, None).kind == "within noise"
    assert verdict(paired([0.1]), float("nan"), True, None).text == "one seed: no statement"
    assert verdict(paired([]), float("nan"), True, None).kind == "no statement"


def test_a_verdict_says_when_it_holds_on_these_documents_only() -> None:
    clear = paired([0.10, 0.12, 0.11])
    wide = Estimate(0.11, 0.2, 3, -0.3, 0.5)
    narrow = Estimate(0.11, 0.02, 3, 0.05, 0.2)
    assert "these documents" in verdict(clear, clear.p, True, wide).text
    assert "these documents" not in verdict(clear, clear.p, True, narrow).text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5123, "0.512"), (0.0, "0.000"), (10.404, "10.40"), (2e-5, "2.0e-05"), (float("nan"), "–")],
)
def test_scores_are_written_with_the_digits_they_deserve(value: float, text: str) -> None:
    assert number(value) == text
