"""Test the losses other than β-JSD against hand-computed numbers and dense autograd."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import log

import pytest
import torch
from dense import F64, dense_values, on_logits, some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.distill import objectives
from stillhouse.distill.diagnostics import Summary
from stillhouse.distill.head import Head
from stillhouse.distill.losses import distill_loss
from stillhouse.distill.objectives import (
    CrossEntropy,
    Jsd,
    Objective,
    PolicyGradient,
    TopK,
    evaluate_,
)
from stillhouse.errors import ContractError

SUPPORTS = ["student", "teacher", "union", "intersection"]
BETAS = [0.0, 0.3, 0.5, 1.0]
ALL = ["ce", "pg", *(f"topk {s} {b}" for s, b in product(SUPPORTS, BETAS))]


def objective_of(name: str, N: int, k: int = 3, clip: float = 2.0) -> Objective:
    """An objective for N positions; policy gradient's samples are from somebody else."""
    if name == "ce":
        return CrossEntropy()
    if name == "pg":
        return PolicyGradient(torch.linspace(-4, -0.1, N, dtype=F64), clip)
    _, support, beta = name.split()
    return TopK(k, support, float(beta))  # type: ignore[arg-type]


def a_temperature(name: str) -> float:
    return 1.0 if name == "ce" else 1.7


# One position, three tokens: p = (1/2, 1/4, 1/4), q = (1/8, 3/4, 1/8).
P = torch.tensor([[1 / 2, 1 / 4, 1 / 4]], dtype=F64)
Q = torch.tensor([[1 / 8, 3 / 4, 1 / 8]], dtype=F64)


def test_cross_entropy_of_three_tokens_by_hand() -> None:
    target = torch.tensor([2])
    loss, stats, dz = on_logits(P.log() + 7, Q.log(), target, objective=CrossEntropy())
    assert loss.item() == pytest.approx(log(4), rel=1e-12)  # -log p(2)
    assert dz[0].tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4 - 1], rel=1e-12)
    assert torch.equal(stats.loss, stats.nll)


def test_cross_entropy_wants_the_next_token_and_dearly_pays_for_the_current_one() -> None:
    tokens = torch.tensor([3, 1, 4, 0, 5, 2, 6])
    inputs, targets = tokens[:-1], tokens[1:]
    knows_the_next = 20.0 * torch.eye(7)[targets]
    shifted, _, dz = on_logits(knows_the_next, torch.zeros(6, 7), targets, objective=CrossEntropy())
    assert shifted < 1e-6
    assert dz.abs().max() < 1e-6
    # What the cliff seeds' code trained: the target is the token that was just read.
    unshifted, _, dz = on_logits(
        knows_the_next, torch.zeros(6, 7), inputs, objective=CrossEntropy()
    )
    assert unshifted > 6 * 19
    assert dz.abs().max() > 0.99


@pytest.mark.parametrize(
    ("target", "clip", "advantage"),
    [
        # Drawn with probability 1/5 where the teacher has 1/8, 3/4, 1/8.
        (0, 2.0, log(5 / 8)),
        (1, 2.0, log(15 / 4)),
        (1, 1.0, 1.0),
        (0, 0.25, -0.25),
        (1, 0.0, 0.0),
        (1, float("inf"), log(15 / 4)),
    ],
)
def test_policy_gradient_of_three_tokens_by_hand(
    target: int, clip: float, advantage: float
) -> None:
    objective = PolicyGradient(torch.tensor([log(1 / 5)], dtype=F64), clip)
    loss, _, dz = on_logits(P.log() - 2, Q.log(), torch.tensor([target]), objective=objective)
    ratio = [5 / 2, 5 / 4, 5 / 4][target]  # p(y) / (1/5)
    towards = [[1 / 2, -1 / 4, -1 / 4], [-1 / 2, 3 / 4, -1 / 4]][target]  # [i = y] - p
    assert loss.item() == pytest.approx(-advantage * ratio, rel=1e-12)
    assert dz[0].tolist() == pytest.approx([-advantage * ratio * t for t in towards], rel=1e-12)


def test_a_fixed_advantage_takes_the_teachers_place_by_hand() -> None:
    objective = PolicyGradient(torch.tensor([log(1 / 5)] * 3, dtype=F64), 0.0, advantage=-0.5)
    for teacher in (Q.log(), torch.tensor([[0.0, -torch.inf, -torch.inf]], dtype=F64)):
        every = (P.log().repeat(3, 1), teacher.repeat(3, 1), torch.arange(3))
        loss, stats, dz = on_logits(*every, objective=objective)
        ratio = torch.tensor([5 / 2, 5 / 4, 5 / 4], dtype=F64)  # p(y) / (1/5)
        torch.testing.assert_close(stats.loss, 0.5 * ratio)
        torch.testing.assert_close(dz, 0.5 * ratio[:, None] * (torch.eye(3, dtype=F64) - P))
    # Drawn by p itself, each token as often as that: what is pushed down comes back elsewhere.
    torch.testing.assert_close((dz / 5).sum(0), torch.zeros(3, dtype=F64), rtol=0, atol=1e-15)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    V=st.integers(2, 9),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
)
def test_on_policy_the_expected_policy_gradient_is_that_of_the_reverse_kl(
    V: int, seed: int, scale: float, temperature: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    z, t = (scale * torch.randn(1, V, generator=g, dtype=F64) for _ in range(2))
    reverse, _, want = on_logits(z, t, objective=Jsd(1.0), temperature=temperature)
    # One position per token that could have been drawn, weighted with how often it is.
    log_p = torch.log_softmax(z[0] / temperature, -1)
    expected, _, dz = on_logits(
        z.repeat(V, 1), t.repeat(V, 1), torch.arange(V),
        objective=PolicyGradient(log_p, clip=1e9), temperature=temperature, weights_N=log_p.exp(),
    )  # fmt: skip
    torch.testing.assert_close(dz.sum(0, keepdim=True), want, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(expected, reverse)


def test_a_ratio_that_overflows_is_not_hidden() -> None:
    objective = PolicyGradient(torch.tensor([-1.0, -200.0, -1.0]), clip=2.0)
    logits, teacher = torch.zeros(3, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(3, 1)
    loss, stats, dz = on_logits(logits, teacher, objective=objective)
    assert not loss.isfinite()
    assert stats.loss.isfinite().tolist() == [True, False, True]
    assert dz.isfinite().all(-1).tolist() == [True, False, True]


# Five tokens, k = 2. The student puts 0 and 1 first, the teacher 2 and 1.
P5 = torch.tensor([[8, 4, 2, 1, 1]], dtype=F64) / 16
Q5 = torch.tensor([[1, 5, 8, 1, 1]], dtype=F64) / 16
# Outcomes in sixteenths: those of the support, and the others together.
OUTCOMES: dict[str, tuple[list[int], list[int], list[int]]] = {
    "student": ([0, 1], [8, 4, 4], [1, 5, 10]),
    "teacher": ([1, 2], [4, 2, 10], [5, 8, 3]),
    "union": ([0, 1, 2], [8, 4, 2, 2], [1, 5, 8, 2]),
    "intersection": ([1], [4, 12], [5, 11]),
}


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_top_k_of_five_tokens_by_the_table_of_gradients(support: str, beta: float) -> None:
    inside, p, q = OUTCOMES[support]
    # m in 64ths: a quarter of q and three quarters of p
    m = [1 * b + 3 * a for a, b in zip(p, q, strict=True)]
    forward = sum(b / 16 * log(b / a) for a, b in zip(p, q, strict=True))
    reverse = sum(a / 16 * log(a / b) for a, b in zip(p, q, strict=True))
    of_p = sum(a / 16 * log(4 * a / c) for a, c in zip(p, m, strict=True))
    of_q = sum(b / 16 * log(4 * b / c) for b, c in zip(q, m, strict=True))
    value = {0.0: forward, 1.0: reverse, 0.25: of_q / 4 + of_p * 3 / 4}[beta]

    def slope(token: int) -> float:
        p_i, q_i = P5[0, token].item(), Q5[0, token].item()
        j = inside.index(token) if token in inside else -1
        if beta == 0:
            return p_i - q_i if token in inside else p_i * (1 - q[-1] / p[-1])
        if beta == 1:
            return p_i * (log(p[j] / q[j]) - reverse)
        return 3 / 4 * p_i * (log(4 * p[j] / m[j]) - of_p)

    objective = TopK(2, support, beta)  # type: ignore[arg-type]
    loss, _, dz = on_logits(P5.log() + 1, Q5.log(), objective=objective)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert dz[0].tolist() == pytest.approx([slope(i) for i in range(5)], rel=1e-11, abs=1e-15)


def test_top_k_with_the_students_support_in_plain_numbers() -> None:
    # p = (1/2, 1/4 | 1/4), q = (1/16, 5/16 | 5/8)
    forward, _, dz = on_logits(P5.log(), Q5.log(), objective=TopK(2, "student", 0.0))
    by_hand = log(1 / 8) / 16 + log(5 / 4) * 5 / 16 + log(5 / 2) * 5 / 8
    assert forward.item() == pytest.approx(by_hand, rel=1e-12)
    # In the support p - q; the others share -3/8 as they share p: 2 to 1 to 1.
    assert dz[0].tolist() == pytest.approx([7 / 16, -1 / 16, -3 / 16, -3 / 32, -3 / 32])
    reverse, _, _ = on_logits(P5.log(), Q5.log(), objective=TopK(2, "student", 1.0))
    by_hand = log(8) / 2 + log(4 / 5) / 4 + log(2 / 5) / 4
    assert reverse.item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_an_empty_intersection_has_nothing_to_learn_from(beta: float) -> None:
    logits, _, teacher, _ = some(5, 1000, 1000, torch.float32)
    logits[:, :4] += 20
    teacher[:, 4:8] += 20
    objective = TopK(4, "intersection", beta)
    loss, stats, dz = on_logits(logits, teacher, objective=objective)
    assert loss.item() == 0 and not stats.loss.any()
    assert not torch.count_nonzero(dz)
    assert stats.jsd_half.min() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("beta", [*BETAS, 1e-6, 1 - 1e-6])
def test_top_k_of_a_teacher_that_is_the_student_is_exactly_zero(
    support: str, beta: float, dtype: torch.dtype
) -> None:
    hidden, head, _, targets = some(9, 8, 1000, dtype)
    hidden = (5 * hidden).requires_grad_()
    teacher = (hidden @ head.T).detach()
    objective = TopK(16, support, beta)  # type: ignore[arg-type]
    loss, stats = distill_loss(
        hidden, Head(head), lambda rows: teacher[rows], targets, objective=objective
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 0 and not stats.loss.any()
    assert not torch.count_nonzero(gradient)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_top_of_everything_is_the_whole_divergence(
    support: str, beta: float, dtype: torch.dtype
) -> None:
    logits, _, teacher, targets = some(6, 11, 11, dtype)
    whole = on_logits(logits, teacher, targets, objective=Jsd(beta), temperature=0.8)
    objective = TopK(11, support, beta)  # type: ignore[arg-type]
    top = on_logits(logits, teacher, targets, objective=objective, temperature=0.8)
    torch.testing.assert_close(top[0], whole[0])
    torch.testing.assert_close(top[1].loss, whole[1].loss)
    torch.testing.assert_close(top[2], whole[2])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    beta=st.one_of(st.sampled_from(BETAS), st.floats(1e-3, 0.999)),
    V=st.integers(2, 30),
    k=st.integers(1, 30),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_a_finer_support_sees_more_and_none_sees_more_than_all_tokens(
    beta: float, V: int, k: int, seed: int, scale: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    z, t = (scale * torch.randn(4, V, generator=g, dtype=F64) for _ in range(2))
    k = min(k, V)

    def values(objective: Objective) -> Tensor:
        return on_logits(z, t, objective=objective)[1].loss

    student, teacher, union, intersection = (
        values(TopK(k, support, beta))  # type: ignore[arg-type]
        for support in SUPPORTS
    )
    slack = 1e-12 * (1 + scale)
    assert intersection.min() >= -slack
    for coarser, finer in (
        (intersection, student), (intersection, teacher), (student, union), (teacher, union),
        (union, values(Jsd(beta))),
    ):  # fmt: skip
        assert (coarser <= finer + slack).all()


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("beta", BETAS)
def test_a_rest_that_underflows_leaves_top_k_exact(support: str, beta: float) -> None:
    # In the first row both rests underflow; in the others one side's does.
    logits = torch.tensor(
        [[0.0, -1.0, -200.0, -210.0], [0.0, -1.0, -300.0, -301.0], [0.0, -1.0, -2.0, -1.5]]
    )
    teacher = torch.tensor(
        [[-1.0, 0.0, -250.0, -190.0], [-1.0, 0.0, -1.5, -2.0], [-1.0, 0.0, -400.0, -300.0]]
    )
    objective = TopK(2, support, beta)  # type: ignore[arg-type]
    loss, stats, dz = on_logits(logits, teacher, objective=objective)
    exact = logits.double().requires_grad_()
    values = dense_values(objective, exact, teacher, torch.zeros(3, dtype=torch.long))
    (want,) = torch.autograd.grad(values.sum(), exact)
    torch.testing.assert_close(stats.loss.double(), values.detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(dz.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("V", "k"), [(320, 1), (320, 10), (321, 10), (320, 11), (4096, 100)])
@pytest.mark.parametrize("name", ["topk union 0.0", "topk student 1.0", "topk intersection 0.5"])
def test_the_top_of_a_long_row_is_found_however_it_is_looked_for(V: int, k: int, name: str) -> None:
    _, _, teacher, targets = some(7, 3, V)
    logits = some(7, 2, V)[2]
    objective = objective_of(name, 7, k)
    _, stats, _ = on_logits(logits, teacher, objective=objective)
    torch.testing.assert_close(stats.loss, dense_values(objective, logits, teacher, targets))


def test_more_tokens_than_the_two_share_are_refused() -> None:
    hidden, head, teacher, _ = some(3, 4, 12)
    targets = torch.zeros(3, dtype=torch.long)

    def of(k: int) -> None:
        objective = TopK(k, "student", 0.5)
        distill_loss(
            hidden, Head(head), lambda rows: teacher[rows, :10], targets, objective=objective
        )

    of(10)
    with pytest.raises(ContractError, match="top 11 .* 10"):
        of(11)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(ALL),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    N=st.integers(1, 9),
    V=st.integers(2, 40),
    extra=st.integers(-1, 3),
    k=st.integers(1, 40),
    clip=st.sampled_from([0.5, 5.0]),
    scale=st.sampled_from([0.01, 1.0, 10.0, 300.0]),
    chunk=st.integers(1, 10),
)
def test_float32_equals_dense_autograd_in_float64(
    name: str, temperature: float, N: int, V: int, extra: int, k: int, clip: float,
    scale: float, chunk: int,
) -> None:  # fmt: skip
    hidden, head, _, targets = some(N, 3, V, torch.float32)
    teacher = scale * some(N, 2, max(V + extra, 1), torch.float32)[2]
    shared = min(V, teacher.shape[1])
    targets = targets % shared
    objective = objective_of(name, N, min(k, shared), clip)
    temperature = 1.0 if name == "ce" else temperature
    hidden = (scale * hidden).requires_grad_()
    weights = torch.linspace(-0.5, 1.5, N)
    loss, stats = distill_loss(
        hidden, Head(head), lambda rows: teacher[rows], targets,
        objective=objective, temperature=temperature, chunk=chunk, weights_N=weights,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, hidden)

    # float32 logits are the input here: the reference starts from their exact values.
    logits = (hidden.detach() @ head.T).double().requires_grad_()
    values = dense_values(objective, logits, teacher, targets, temperature)
    (values * weights).sum().backward()
    assert logits.grad is not None
    rough = 2e-6 * (1 + scale) * (30 if name == "pg" else 1)  # a ratio has the error of its log
    torch.testing.assert_close(stats.loss.double(), values.detach(), rtol=rough, atol=rough)
    total = (weights * stats.loss).sum().item()
    assert loss.item() == pytest.approx(total, rel=1e-5, abs=1e-6)
    want = logits.grad @ head.double()
    torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=rough)


@pytest.mark.parametrize("name", ALL)
def test_gradient_agrees_with_finite_differences(name: str) -> None:
    hidden, head, teacher, targets = some(3, 2, 7)
    weights = torch.tensor([1.0, 2.0, -0.5], dtype=F64)

    def loss(hidden: Tensor) -> Tensor:
        return distill_loss(
            hidden, Head(head), lambda rows: teacher[rows], targets,
            objective=objective_of(name, 3), temperature=a_temperature(name), chunk=2,
            weights_N=weights,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(),))


@pytest.mark.parametrize("name", ALL)
def test_the_chunk_and_the_block_do_not_change_the_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, teacher, targets = some(13, 4, 11)
    hidden.requires_grad_()

    def everything(chunk: int) -> list[Tensor]:
        loss, stats = distill_loss(
            hidden, Head(head), lambda rows: teacher[rows], targets,
            objective=objective_of(name, 13), temperature=a_temperature(name), chunk=chunk,
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, hidden), *stats]

    whole = everything(13)
    for chunk, block in ((1, 10**6), (5, 10**6), (100, 10**6), (13, 1), (5, 25), (6, 33)):
        monkeypatch.setattr(objectives, "BLOCK", block)
        for got, want in zip(everything(chunk), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_the_other_statistics_are_those_of_jsd(name: str) -> None:
    logits, _, teacher, targets = some(6, 11, 11, torch.float32)
    T = a_temperature(name)
    _, want, _ = on_logits(logits, teacher, targets, objective=Jsd(0.5), temperature=T)
    _, got, _ = on_logits(logits, teacher, targets, objective=objective_of(name, 6), temperature=T)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))
    assert not got.loss.requires_grad


@pytest.mark.parametrize("name", ALL)
def test_a_position_of_weight_zero_is_masked(name: str) -> None:
    logits, _, teacher, targets = some(4, 9, 9)
    T = a_temperature(name)
    weights = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=F64)
    objective = objective_of(name, 4)
    loss, stats, dz = on_logits(
        logits, teacher, targets, objective=objective, temperature=T, weights_N=weights
    )
    _, plain, plain_dz = on_logits(logits, teacher, targets, objective=objective, temperature=T)
    assert torch.equal(stats.loss, plain.loss)
    torch.testing.assert_close(loss, plain.loss[1] + plain.loss[3])
    assert not dz[[0, 2]].any()
    assert torch.equal(dz[[1, 3]], plain_dz[[1, 3]])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_logit_that_is_not_finite_is_not_hidden(name: str, poison: float, side: str) -> None:
    logits, _, teacher, _ = some(3, 4, 4, torch.float32)
    (logits if side == "student" else teacher)[1, 2] = poison
    _, stats, dz = on_logits(logits, teacher, objective=objective_of(name, 3, k=2))
    reads_it = not (name == "ce" and side == "teacher")
    assert stats.loss.isfinite().tolist() == [True, not reads_it, True]
    assert dz[1].isfinite().all() == (not reads_it)
    assert not stats.jsd_half[1].isfinite()


def _anything(rows: slice) -> Tensor:
    raise AssertionError("nobody is to be asked")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Jsd(1.1), "beta"),
        (lambda: Jsd(float("nan")), "beta"),
        (lambda: TopK(4, "union", -0.1), "beta"),
        (lambda: TopK(0, "union", 0.5), "k "),
        (lambda: PolicyGradient(torch.zeros(3), -1.0), "clip"),
        (lambda: PolicyGradient(torch.zeros(3), float("nan")), "clip"),
    ],
)
def test_an_objective_that_means_nothing_is_refused(
    make: Callable[[], Objective], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("objective", "temperature", "words"),
    [
        (CrossEntropy(), 0.7, "temperature 1"),
        (PolicyGradient(torch.zeros(2), 2.0), 1.0, "2 .* 3"),
        (PolicyGradient(torch.zeros(4), 2.0), 1.0, "4 .* 3"),
    ],
)
def test_an_objective_that_does_not_fit_is_refused_before_the_teacher_is_asked(
    objective: Objective, temperature: float, words: str
) -> None:
    hidden, head, _, targets = some(3, 4, 5)
    with pytest.raises(ValueError, match=words):
        distill_loss(
            hidden, Head(head), _anything, targets, objective=objective, temperature=temperature
        )


@pytest.mark.parametrize("never", [-torch.inf, torch.finfo(torch.float32).min])
def test_what_a_teacher_never_gives_makes_no_objective_nan_or_negative(never: float) -> None:
    g = torch.Generator().manual_seed(0)
    z, q = torch.randn(4, 64, generator=g), torch.randn(4, 64, generator=g)
    q[:, 40:] = never
    z[:, 50:] = never
    targets = torch.tensor([1, 45, 5, 49])  # 45 and 49: the student gives them, the teacher never
    for support, beta in product(SUPPORTS, (0.0, 0.5, 1.0)):
        dz = z.clone()
        stats, _ = evaluate_(
            objective_of(f"topk {support} {beta}", 4, k=30), dz, q, targets, 1.0, True
        )
        assert not dz.isnan().any() and (stats.loss >= 0).all()
        # Of the student's 30 tokens the teacher never gives some. What is outside is one outcome,
        # which it does give.
        assert bool(stats.loss.isinf().any()) == (beta == 1 and support in ("student", "union"))
    for clip in (2.0, torch.inf):
        dz = z.clone()
        objective = PolicyGradient(torch.full((4,), -4.0), clip)
        stats, _ = evaluate_(objective, dz, q, targets, 1.0, True)
        ratio = torch.exp(z.log_softmax(-1).gather(1, targets[:, None])[:, 0] + 4)
        assert stats.loss[[1, 3]].tolist() == pytest.approx((clip * ratio[[1, 3]]).tolist())
        assert not dz.isnan().any()


def test_what_a_teacher_never_gives_leaves_a_mean_of_other_places_alone() -> None:
    z, q = torch.zeros(2, 8), torch.zeros(2, 8)
    q[0, 3:] = -torch.inf
    summary = Summary(6, [(0, 1), (1, None)])
    hidden, head = z, Head(torch.eye(8))
    distill_loss(
        hidden, head, lambda rows: q[rows], torch.zeros(2, dtype=torch.long),
        objective=Jsd(0.0), summary=summary, places_N=torch.tensor([0, 5]),
    )  # fmt: skip
    found = summary.metrics(summary.numbers())
    assert not any(number != number for number in found.values())
    assert found["overlap/advantage_shared/0-0"] == -torch.inf
    assert found["overlap/advantage_shared/1-"] == 0
