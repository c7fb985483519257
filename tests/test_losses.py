"""Test the distillation loss against hand-computed numbers and a dense computation."""

from __future__ import annotations

from math import log

import pytest
import torch
from dense import F64, dense_loss, dense_values, on_logits, some
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.distill import objectives
from stillhouse.distill.head import Head
from stillhouse.distill.losses import distill_loss
from stillhouse.distill.objectives import (
    CrossEntropy,
    Jsd,
    Objective,
    PolicyGradient,
    TokenStats,
    TopK,
    evaluate_,
)
from stillhouse.errors import ContractError

BETAS = [0.0, 0.1, 0.25, 0.5, 0.9, 1.0]


# One position, three tokens: p = (1/2, 1/4, 1/4), q = (1/8, 3/4, 1/8).
P = torch.tensor([[1 / 2, 1 / 4, 1 / 4]], dtype=F64)
Q = torch.tensor([[1 / 8, 3 / 4, 1 / 8]], dtype=F64)
# KL(q || p) = 1/8 ln(1/4) + 3/4 ln 3 + 1/8 ln(1/2);  KL(p || q) = 1/2 ln 4 + 1/4 ln(1/3) + 1/4 ln 2
FORWARD = 3 / 4 * log(3) - 3 / 8 * log(2)
REVERSE = 5 / 4 * log(2) - 1 / 4 * log(3)
# beta = 1/2: m = (5/16, 8/16, 3/16), so q/m = (2/5, 3/2, 2/3) and p/m = (8/5, 1/2, 4/3)
HALF_Q = 1 / 8 * log(2 / 5) + 3 / 4 * log(3 / 2) + 1 / 8 * log(2 / 3)
HALF_P = 1 / 2 * log(8 / 5) + 1 / 4 * log(1 / 2) + 1 / 4 * log(4 / 3)
# beta = 1/4: m = 1/4 q + 3/4 p = (13, 12, 7)/32, q/m = (4/13, 2, 4/7), p/m = (16/13, 2/3, 8/7)
QUARTER_Q = 1 / 8 * log(4 / 13) + 3 / 4 * log(2) + 1 / 8 * log(4 / 7)
QUARTER_P = 1 / 2 * log(16 / 13) + 1 / 4 * log(2 / 3) + 1 / 4 * log(8 / 7)


@pytest.mark.parametrize(
    ("beta", "value", "gradient"),
    [
        # forward KL: p - q
        (0.0, FORWARD, [3 / 8, -1 / 2, 1 / 8]),
        # reverse KL: p * (log p/q - KL(p || q))
        (
            1.0,
            REVERSE,
            [
                1 / 2 * (log(4) - REVERSE),
                1 / 4 * (log(1 / 3) - REVERSE),
                1 / 4 * (log(2) - REVERSE),
            ],
        ),
        # between: (1 - beta) * p * (log p/m - KL(p || m))
        (
            0.5,
            (HALF_Q + HALF_P) / 2,
            [
                1 / 4 * (log(8 / 5) - HALF_P),
                1 / 8 * (log(1 / 2) - HALF_P),
                1 / 8 * (log(4 / 3) - HALF_P),
            ],
        ),
        (
            0.25,
            1 / 4 * QUARTER_Q + 3 / 4 * QUARTER_P,
            [
                3 / 8 * (log(16 / 13) - QUARTER_P),
                3 / 16 * (log(2 / 3) - QUARTER_P),
                3 / 16 * (log(8 / 7) - QUARTER_P),
            ],
        ),
    ],
)
def test_three_tokens_by_hand(beta: float, value: float, gradient: list[float]) -> None:
    loss, stats, dz = on_logits(P.log() + 7, Q.log() - 3, objective=Jsd(beta))
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert stats.loss.tolist() == pytest.approx([value], rel=1e-12)
    assert dz[0].tolist() == pytest.approx(gradient, rel=1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_statistics_are_the_same_numbers_whatever_is_trained(beta: float) -> None:
    _, stats, _ = on_logits(P.log(), Q.log(), torch.tensor([2]), objective=Jsd(beta))
    assert stats.forward_kl.item() == pytest.approx(FORWARD)
    assert stats.reverse_kl.item() == pytest.approx(REVERSE)
    assert stats.jsd_half.item() == pytest.approx((HALF_Q + HALF_P) / 2)
    assert stats.nll.item() == pytest.approx(log(4))  # p(token 2) = 1/4
    # H(p) = 1/2 ln 2 + 2/4 ln 4;  H(q) = 2/8 ln 8 + 3/4 ln(4/3)
    assert stats.student_entropy.item() == pytest.approx(3 / 2 * log(2))
    assert stats.teacher_entropy.item() == pytest.approx(3 / 4 * log(2) + 3 / 4 * log(4 / 3))
    assert not any(field.requires_grad for field in stats)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_agrees_with_finite_differences(beta: float) -> None:
    hidden, head, teacher, targets = some(5, 4, 7)
    weights = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5], dtype=F64)

    def loss(hidden: Tensor) -> Tensor:
        return distill_loss(
            hidden, Head(head), lambda rows: teacher[rows], targets,
            objective=Jsd(beta), temperature=1.7, chunk=2, weights_N=weights,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(),))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    beta=st.one_of(st.sampled_from(BETAS), st.floats(1e-3, 0.999)),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    N=st.integers(1, 9),
    V=st.integers(2, 40),
    extra=st.integers(-1, 3),
    scale=st.sampled_from([0.01, 1.0, 10.0, 300.0]),
    chunk=st.integers(1, 10),
)
def test_float32_equals_a_dense_float64_computation(
    beta: float, temperature: float, N: int, V: int, extra: int, scale: float, chunk: int
) -> None:
    hidden, head, _, targets = some(N, 3, V, torch.float32)
    teacher = scale * some(N, 2, max(V + extra, 1), torch.float32)[2]
    targets = targets % min(V, teacher.shape[1])
    hidden = (scale * hidden).requires_grad_()
    weights = torch.linspace(0.5, 1.5, N)
    loss, stats = distill_loss(
        hidden, Head(head), lambda rows: teacher[rows], targets,
        objective=Jsd(beta), temperature=temperature, chunk=chunk, weights_N=weights,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, hidden)

    # float32 logits are the input here: the reference starts from their exact values.
    logits = (hidden.detach() @ head.T).double().requires_grad_()
    exact = dense_loss(logits, teacher, beta, temperature)
    (exact[0] * weights).sum().backward()
    assert logits.grad is not None
    names = ("loss", "forward_kl", "reverse_kl", "jsd_half")
    for name, want in zip(names, exact, strict=True):
        got = getattr(stats, name)
        torch.testing.assert_close(got.double(), want.detach(), rtol=2e-6, atol=2e-6 * (1 + scale))
        assert got.min() >= -1e-6 * (1 + scale)
    assert stats.jsd_half.max() <= log(2) + 1e-6
    assert loss.item() == pytest.approx((weights * stats.loss).sum().item(), rel=1e-5, abs=1e-6)
    want = logits.grad @ head.double()
    torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=2e-6 * (1 + scale))


@pytest.mark.parametrize("beta", BETAS)
def test_probabilities_that_underflow_leave_the_loss_exact(beta: float) -> None:
    # Both sides underflow on tokens 2 and 3, each alone on one of the others.
    logits = torch.tensor([[0.0, -400.0, -300.0, -250.0]])
    teacher = torch.tensor([[-350.0, 0.0, -200.0, -300.0]])
    loss, stats, dz = on_logits(logits, teacher, objective=Jsd(beta))
    exact_logits = logits.double().requires_grad_()
    exact = dense_loss(exact_logits, teacher, beta)[0].sum()
    (want,) = torch.autograd.grad(exact, exact_logits)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert stats.forward_kl.item() == pytest.approx(400.0)
    assert stats.reverse_kl.item() == pytest.approx(350.0)
    torch.testing.assert_close(dz.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [*BETAS, 0.3, 0.7, 1e-6, 1 - 1e-6])
def test_a_teacher_that_is_the_student_gives_exactly_zero(beta: float, dtype: torch.dtype) -> None:
    hidden, head, _, targets = some(9, 8, 1000, dtype)
    hidden = (5 * hidden).requires_grad_()
    teacher = (hidden @ head.T).detach()
    loss, stats = distill_loss(
        hidden, Head(head), lambda rows: teacher[rows], targets, objective=Jsd(beta)
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 0
    assert not torch.count_nonzero(gradient)
    assert not any(field.any() for field in stats[:4])
    assert (stats.student_entropy == stats.teacher_entropy).all()


def test_the_chunk_and_the_block_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, teacher, targets = some(13, 4, 11)
    hidden.requires_grad_()

    def everything(chunk: int) -> list[Tensor]:
        loss, stats = distill_loss(
            hidden, Head(head), lambda rows: teacher[rows], targets, objective=Jsd(0.3), chunk=chunk
        )
        return [loss.detach(), *torch.autograd.grad(loss, hidden), *stats]

    whole = everything(13)
    for chunk, block in ((1, 10**6), (5, 10**6), (100, 10**6), (13, 1), (5, 25), (6, 33)):
        monkeypatch.setattr(objectives, "BLOCK", block)
        for got, want in zip(everything(chunk), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_the_teacher_is_asked_once_per_chunk_in_order_without_gradient() -> None:
    hidden, head, teacher, targets = some(7, 4, 5)
    teacher.requires_grad_()
    before, asked = teacher.detach().clone(), []

    def teacher_logits(rows: slice) -> Tensor:
        asked.append((rows.start, rows.stop, torch.is_grad_enabled()))
        return teacher[rows]

    loss, _ = distill_loss(
        hidden.requires_grad_(),
        Head(head),
        teacher_logits,
        targets,
        objective=Jsd(0.5),
        temperature=2.0,
        chunk=3,
    )
    loss.backward()
    assert asked == [(0, 3, False), (3, 6, False), (6, 7, False)]
    assert teacher.grad is None
    assert torch.equal(teacher, before)


def test_predicting_the_next_token_costs_nothing_and_predicting_the_current_one_fails() -> None:
    tokens = torch.tensor([3, 1, 4, 0, 5, 2, 6])
    inputs, targets = tokens[:-1], tokens[1:]
    knows_the_next = 20.0 * torch.eye(7)[targets]
    _, aligned, _ = on_logits(knows_the_next, knows_the_next, targets, objective=Jsd(1.0))
    _, swapped, _ = on_logits(knows_the_next, knows_the_next, inputs, objective=Jsd(1.0))
    assert aligned.nll.max() < 1e-6
    assert swapped.nll.min() > 19


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_padding_rows_of_either_vocabulary_are_cut_not_filled(beta: float) -> None:
    hidden, head, teacher, targets = some(6, 4, 12)
    targets = targets % 10

    def of(student_V: int, teacher_V: int) -> list[Tensor]:
        h = hidden.clone().requires_grad_()
        loss, stats = distill_loss(
            h,
            Head(head[:student_V]),
            lambda rows: teacher[rows, :teacher_V],
            targets,
            objective=Jsd(beta),
            chunk=4,
        )
        return [loss.detach(), *torch.autograd.grad(loss, h), *stats]

    want = of(10, 10)
    for widths in ((12, 10), (10, 12)):
        for got, expected in zip(of(*widths), want, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("target", [10, 11, -100])
def test_a_target_outside_the_shared_vocabulary_is_refused(target: int) -> None:
    hidden, head, teacher, targets = some(3, 4, 12)
    targets = torch.tensor([0, 9, target])
    with pytest.raises(ContractError, match=f"{target}.*share 0 to 9"):
        distill_loss(
            hidden, Head(head), lambda rows: teacher[rows, :10], targets, objective=Jsd(0.5)
        )


@pytest.mark.parametrize("beta", BETAS)
def test_temperature_divides_both_logits_and_the_gradient_once(beta: float) -> None:
    logits, _, teacher, targets = some(4, 6, 6)
    plain, of_plain, plain_dz = on_logits(logits, teacher, targets, objective=Jsd(beta))
    # Logits three times as large at temperature 3: the same distributions, a third of the gradient.
    loss, stats, dz = on_logits(
        3 * logits, 3 * teacher, targets, objective=Jsd(beta), temperature=3.0
    )
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(dz, plain_dz / 3)
    torch.testing.assert_close(stats.student_entropy, of_plain.student_entropy)
    # nll stays the model's own, at temperature 1.
    nll = torch.nn.functional.cross_entropy(3 * logits, targets, reduction="none")
    torch.testing.assert_close(stats.nll, nll)


def test_weights_scale_positions_and_leave_the_statistics_alone() -> None:
    hidden, head, teacher, targets = some(3, 4, 5)
    weights = torch.tensor([2.0, 0.0, 0.25], dtype=F64)
    hidden.requires_grad_()

    def of(weights_N: Tensor | None) -> tuple[Tensor, TokenStats, Tensor]:
        loss, stats = distill_loss(
            hidden,
            Head(head),
            lambda rows: teacher[rows],
            targets,
            objective=Jsd(0.5),
            weights_N=weights_N,
        )
        return loss.detach(), stats, torch.autograd.grad(loss, hidden)[0]

    plain_loss, plain, plain_dh = of(None)
    loss, stats, dh = of(weights)
    torch.testing.assert_close(plain_loss, plain.loss.sum())
    torch.testing.assert_close(loss, 2 * plain.loss[0] + plain.loss[2] / 4)
    torch.testing.assert_close(dh, weights[:, None] * plain_dh)
    assert all(torch.equal(a, b) for a, b in zip(stats, plain, strict=True))


def test_no_positions_give_zero_with_a_gradient_path() -> None:
    hidden = torch.empty(0, 4, requires_grad=True)

    def nobody(rows: slice) -> Tensor:
        raise AssertionError("the teacher has nothing to say")

    loss, stats = distill_loss(
        hidden, Head(torch.ones(5, 4)), nobody, torch.empty(0, dtype=torch.long), objective=Jsd(0.5)
    )
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)
    assert [field.shape for field in stats] == [(0,)] * 7


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_logit_that_is_not_finite_is_not_hidden(beta: float, poison: float, side: str) -> None:
    logits, _, teacher, _ = some(3, 4, 4, torch.float32)
    (logits if side == "student" else teacher)[1, 2] = poison
    loss, stats, dz = on_logits(logits, teacher, objective=Jsd(beta))
    assert not loss.isfinite()
    assert stats.loss.isfinite().tolist() == [True, False, True]
    assert not dz[1].isfinite().all()


# Token 2 has probability 0, as a masked or padded vocabulary has it, on one side or on both.
NEVER = [-torch.inf, torch.finfo(torch.float32).min]


def evaluated(logits: Tensor, teacher: Tensor, beta: float) -> tuple[TokenStats, Tensor]:
    """Of logits themselves: an identity as head makes NaN of 0 times infinity."""
    z, target = logits.clone(), torch.tensor([2])
    stats, _ = evaluate_(Jsd(beta), z, teacher, target, 1.0, True)
    return stats, z


@pytest.mark.parametrize("never", NEVER)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("of_both", [False, True])
def test_what_the_teacher_never_gives_is_what_mathematics_says(
    never: float, beta: float, of_both: bool
) -> None:
    # p = (1/2, 1/4, 1/4) or (2/3, 1/3, 0); q = (1/4, 3/4, 0)
    logits, teacher = P.log().float(), torch.tensor([[log(1 / 4), log(3 / 4), never]])
    if of_both:
        logits[0, 2] = never
    stats, dz = evaluated(logits, teacher, beta)
    loss = stats.loss
    p = torch.tensor([2 / 3, 1 / 3, 0] if of_both else [1 / 2, 1 / 4, 1 / 4], dtype=F64)
    q = torch.tensor([1 / 4, 3 / 4, 0], dtype=F64)

    def kl(a: Tensor, b: Tensor) -> float:
        return torch.where(a > 0, a * (a / b).log(), 0).sum().item()  # 0 log 0 = 0; log a/0 = inf

    m = beta * q + (1 - beta) * p
    want = (
        beta * kl(q, m) + (1 - beta) * kl(p, m)
        if 0 < beta < 1
        else kl(*[(q, p), (p, q)][int(beta)])
    )
    assert loss.item() == pytest.approx(want, rel=1e-6)
    assert stats.forward_kl.item() == pytest.approx(kl(q, p), rel=1e-6)
    assert stats.reverse_kl.item() == pytest.approx(kl(p, q), rel=1e-6)
    half = (p + q) / 2
    assert stats.jsd_half.item() == pytest.approx((kl(p, half) + kl(q, half)) / 2, rel=1e-6)
    assert stats.student_entropy.item() == pytest.approx(torch.special.entr(p).sum().item())
    assert stats.teacher_entropy.item() == pytest.approx(torch.special.entr(q).sum().item())
    assert not dz.isnan().any()
    if beta == 0:
        assert dz[0].tolist() == pytest.approx((p - q).tolist(), abs=1e-7)
    if beta == 1 and not of_both:
        assert loss == torch.inf and (dz[0, :2] < 0).all()  # a step against it gives to the others


@pytest.mark.parametrize("never", NEVER)
def test_what_the_student_never_gives_is_what_mathematics_says(never: float) -> None:
    logits = torch.tensor([[log(1 / 4), log(3 / 4), never]])
    stats, dz = evaluated(logits, P.log().float(), 0.0)
    assert stats.loss == torch.inf and dz[0].tolist() == pytest.approx([-1 / 4, 1 / 2, -1 / 4])
    # KL((1/4, 3/4, 0) || (1/2, 1/4, 1/4)) = 1/4 ln(1/2) + 3/4 ln 3
    assert stats.reverse_kl.item() == pytest.approx(3 / 4 * log(3) - 1 / 4 * log(2))
    assert stats.nll.item() > 1e38
    assert not evaluated(logits, P.log().float(), 1.0)[1].isnan().any()


def test_an_infinite_loss_of_a_position_that_does_not_count_counts_nothing() -> None:
    logits = torch.zeros(2, 3)
    teacher = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 1.0, 2.0]])
    weights = torch.tensor([0.0, 1.0])
    loss, _, dz = on_logits(logits, teacher, objective=Jsd(1.0), weights_N=weights)
    alone, _, dz_alone = on_logits(logits[1:], teacher[1:], objective=Jsd(1.0))
    assert loss == alone
    assert torch.equal(dz, torch.cat([torch.zeros(1, 3), dz_alone]))


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns, and counts products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        self.products += func.overloadpacket is torch.ops.aten.mm
        return out


EVERY = [
    *(Jsd(beta) for beta in (0.0, 0.3, 0.5, 1.0)),
    CrossEntropy(),
    PolicyGradient(torch.linspace(-4, -0.1, 64), clip=5.0),
    *(TopK(3, "union", beta) for beta in (0.0, 0.5, 1.0)),
]


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_all_positions_and_the_vocabulary(
    objective: Objective, dtype: torch.dtype
) -> None:
    N, H, V, chunk = 64, 4, 100, 8
    hidden, head, teacher_hidden, targets = some(N, H, V, dtype)
    teacher_hidden = teacher_hidden[:, :H]
    with Largest() as seen:
        loss, _ = distill_loss(
            hidden.requires_grad_(), Head(head), lambda rows: teacher_hidden[rows] @ head.T,
            targets, objective=objective, chunk=chunk,
        )  # fmt: skip
        loss.backward()
    assert seen.numel <= 5 * chunk * V  # the scratch of a chunk; [N, V] would be 8 * chunk * V


def test_no_gradient_is_formed_where_none_is_wanted() -> None:
    hidden, head, teacher, targets = some(6, 4, 5)

    def products(hidden: Tensor) -> tuple[int, Tensor]:
        with Largest() as seen:
            loss, _ = distill_loss(
                hidden, Head(head), lambda rows: teacher[rows], targets, objective=Jsd(0.5), chunk=3
            )
        return seen.products, loss

    wanted, loss = products(hidden.clone().requires_grad_())
    assert wanted == 4 and loss.requires_grad
    unwanted, same = products(hidden)
    assert unwanted == 2 and not same.requires_grad and same == loss
    with torch.no_grad():
        assert products(hidden.clone().requires_grad_())[0] == 2


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: type(o).__name__)
def test_bfloat16_rounds_where_the_model_itself_would(objective: Objective) -> None:
    hidden, head, teacher, targets = some(64, 16, 50, torch.bfloat16)
    hidden.requires_grad_()
    loss, _ = distill_loss(
        hidden, Head(head), lambda rows: teacher[rows], targets, objective=objective, chunk=30
    )
    dense = dense_values(objective, (hidden @ head.T).float(), teacher, targets).sum()
    (got,) = torch.autograd.grad(loss, hidden)
    (want,) = torch.autograd.grad(dense, hidden)
    assert loss.dtype == torch.float32 and got.dtype == torch.bfloat16
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, want, rtol=0.02, atol=1e-3)


def test_autocast_does_not_lower_the_precision() -> None:
    hidden, head, teacher, targets = some(6, 16, 50, torch.float32)

    def of() -> list[Tensor]:
        h = hidden.clone().requires_grad_()
        loss, stats = distill_loss(
            h, Head(head), lambda rows: teacher[rows], targets, objective=Jsd(0.3)
        )
        loss.backward()
        assert h.grad is not None
        return [loss.detach(), h.grad, *stats]

    plain = of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = of()
    assert all(torch.equal(a, b) for a, b in zip(plain, lowered, strict=True))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"temperature": 0.0}, ValueError),
        ({"chunk": 0}, ValueError),
        ({"head": Head(torch.ones(5, 4))}, TypeError),
        ({"head": Head(torch.ones(5, 4, dtype=F64, requires_grad=True))}, ValueError),
        ({"head": torch.ones(5, 4, dtype=F64)}, TypeCheckError),
        ({"targets_N": torch.zeros(2, dtype=torch.long)}, TypeCheckError),
        ({"weights_N": torch.ones(3, 1)}, TypeCheckError),
    ],
)
def test_arguments_that_mean_nothing_are_refused(change: dict, error: type[Exception]) -> None:
    hidden, head, teacher, targets = some(3, 4, 5)
    arguments = {
        "hidden_NH": hidden,
        "head": Head(head),
        "targets_N": targets,
        "objective": Jsd(0.5),
    }
    with pytest.raises(error):
        distill_loss(teacher_logits=lambda rows: teacher[rows], **(arguments | change))
