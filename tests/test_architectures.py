"""Test the loss, and the probe of output heads, against the logits of the models themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import jsd, some
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.distill.head import Head, head_of, head_weight, hidden_states
from stillhouse.distill.losses import distill_loss
from stillhouse.distill.objectives import Jsd
from stillhouse.errors import ContractError
from tools.architectures import FAMILIES, PAGE, Family, form_of, label, tiny

# Two rows, one of them padded on the left, of other tokens and lengths than the probe's.
IDS = torch.tensor([[11, 7, 30, 44, 5, 9, 21, 60, 3, 8], [4, 4, 4, 17, 29, 90, 6, 33, 12, 70]])
MASK = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])


@pytest.fixture(autouse=True)
def _makers_warnings() -> Iterator[None]:
    with warnings.catch_warnings():  # of how their own old layers are written
        warnings.simplefilter("ignore")
        yield


def own_logits(model: Any) -> Tensor:
    """The model's own logits of the real positions, each row asked alone."""
    rows = [ids[mask.bool()] for ids, mask in zip(IDS, MASK, strict=True)]
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])


def of_the_loss(model: Any) -> Tensor:
    """What the loss forms of them, in a batch that is padded on the left."""
    with torch.no_grad():
        return head_of(model).logits(hidden_states(model, IDS, MASK)[MASK.bool()])


def written() -> dict[str, list[str]]:
    """The page's rows: trains, logits and the rest, by family."""
    lines = [x.strip("| ").split(" | ") for x in PAGE.read_text().splitlines() if x.count("|") > 6]
    return {" | ".join(cells[:2]): cells[2:] for cells in lines[2:]}


def test_every_row_of_the_page_says_what_its_architecture_does() -> None:
    rows, trained = written(), 0
    assert list(rows) == [label(family) for family in FAMILIES]
    for family in FAMILIES:
        model = tiny(family)
        trains, logits, *_ = rows[label(family)]
        if trains != "yes":
            with pytest.raises(ContractError, match=type(model).__name__):
                head_of(model)
            continue
        trained += 1
        got, want = of_the_loss(model).log_softmax(-1), own_logits(model).log_softmax(-1)
        assert (got - want).abs().max() < 1e-5, family
        assert form_of(head_of(model)) == logits
    assert trained >= 50


def family(kind: str, **sizes: Any) -> Family:
    return next(f for f in FAMILIES if f.kind == kind)._replace(**sizes)


def test_a_scale_that_no_config_names_is_found_to_the_last_digit() -> None:
    for scaling in (3.0, 7.7, 0.037):
        model = tiny(family("granite", sizes={"logits_scaling": scaling}))
        assert head_of(model).scale == pytest.approx(1 / scaling, rel=1e-7)


def test_one_matrix_gives_the_logits_of_a_plain_or_scaled_head_and_no_other() -> None:
    for kind in ("llama", "granite"):
        model = tiny(family(kind))
        with torch.no_grad():
            states_NH = hidden_states(model, IDS, MASK)[MASK.bool()]
            logits_NV = states_NH @ head_weight(model).T
        assert torch.allclose(logits_NV, own_logits(model), rtol=0, atol=1e-5)
    for kind, follows in (("gemma2", "a soft cap follows"), ("phi", "a bias follows")):
        with pytest.raises(ContractError, match=follows):
            head_weight(tiny(family(kind)))


def test_a_cap_is_found_where_random_logits_lie_far_below_it() -> None:
    model = tiny(family("gemma2", sizes={"final_logit_softcapping": 45.0}))
    assert own_logits(model).abs().max() < 10
    assert head_of(model).cap == 45.0


@pytest.mark.parametrize("kind", ["granite", "gemma2", "phi", "llama"])
def test_in_bfloat16_a_head_is_what_it_is_in_float32(kind: str) -> None:
    want, got = (
        form_of(head_of(tiny(family(kind)).to(d))) for d in (torch.float32, torch.bfloat16)
    )
    assert got == want


class Elsewhere(LlamaForCausalLM):
    """A Llama whose logits are no form that is known."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        output = super().forward(*args, **kwargs)
        assert output.logits is not None
        output.logits = self.change(output.logits)
        return output

    def change(self, logits: Tensor) -> Tensor:
        return logits


def llama(of: type[LlamaForCausalLM] = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    return of(LlamaConfig(**tiny(family("llama")).config.to_diff_dict())).eval()


def test_logits_that_are_no_known_form_are_refused_with_the_difference() -> None:
    changes = {
        "a square": lambda z: z + 0.01 * z * z,
        "a shift of one token": lambda z: z + 0.1 * (torch.arange(z.shape[-1]) == 7),
        "a cap that is no tanh": lambda z: z.clamp(-20, 20),
    }
    for name, change in changes.items():
        model = llama(Elsewhere)
        model.change = change
        with pytest.raises(ContractError, match="not what the loss would form.* differ by"):
            head_of(model)
            pytest.fail(f"{name} was taken for a head")


def test_rows_that_read_their_padding_or_what_follows_are_refused() -> None:
    learned = tiny(family("gpt2"))
    learned.transformer.forward = _without_positions(learned.transformer.forward)
    with pytest.raises(ContractError, match="padded on the left than alone"):
        head_of(learned)
    with pytest.raises(ContractError, match="no causal language model"):
        head_of(tiny(family("bert")))


def _without_positions(forward: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        return forward(*args, **kwargs)

    return wrapped


def test_a_model_without_head_or_decoder_and_an_adapted_head_are_refused_by_name() -> None:
    with pytest.raises(ContractError, match="LlamaModel has no head"):
        head_of(llama().model)
    with pytest.raises(ContractError, match="ModuleDict has no head"):
        head_of(nn.ModuleDict())
    base = llama()
    head_of(base)  # known before it is adapted
    adapted = get_peft_model(base, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ContractError, match="head is adapted"):
        head_of(adapted)
    broken = llama()
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ContractError, match="NaN"):
        head_of(broken)


def test_a_probe_leaves_the_model_as_it_was() -> None:
    model = llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    head_of(model)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.model._forward_hooks


@pytest.mark.parametrize(
    ("kind", "beta"),
    [("granite", 0.5), ("phi", 0.3), ("gemma2", 0.0), ("gemma2", 0.5), ("gemma2", 1.0)],
)
def test_the_gradient_of_a_scaled_capped_or_biased_head_is_that_of_finite_differences(
    kind: str, beta: float
) -> None:
    model = tiny(family(kind)).double()
    head = head_of(model)
    if head.cap:
        head = Head(head.weight_VH, None, 0.5, 2.0)  # bends where these logits are
    hidden_NH = hidden_states(model, IDS, MASK)[MASK.bool()][:3].detach()
    hidden_NH.requires_grad_()
    teacher_NV = own_logits(model).roll(3, 0)[:3].double()
    target_N = torch.tensor([1, 2, 3])

    def loss(hidden_NH: Tensor) -> Tensor:
        return distill_loss(
            hidden_NH, head, lambda rows: teacher_NV[rows], target_N,
            objective=Jsd(beta), temperature=1.3, chunk=2,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden_NH,), fast_mode=True)
    bias_V = 0 if head.bias_V is None else head.bias_V
    z_NV = head.scale * (hidden_NH @ head.weight_VH.T + bias_V)
    z_NV = z_NV if head.cap is None else head.cap * torch.tanh(z_NV / head.cap)
    log_p, log_q = ((x / 1.3).log_softmax(-1) for x in (z_NV, teacher_NV))
    dense = jsd(beta, log_p, log_q).sum()
    chunked = loss(hidden_NH)
    torch.testing.assert_close(chunked, dense)
    for got, want in zip(
        *(torch.autograd.grad(x, hidden_NH) for x in (chunked, dense)), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_with_the_students_bent_head_gives_exactly_zero(dtype: torch.dtype) -> None:
    hidden, weight, _, targets = some(9, 8, 100, dtype)
    head = Head(weight, weight[:, 0].clone(), 0.3, 2.0)
    hidden.requires_grad_()
    teacher = head.logits(hidden.detach())
    for objective in (Jsd(0.0), Jsd(0.5), Jsd(1.0)):
        loss, _ = distill_loss(
            hidden, head, lambda rows: teacher[rows], targets, objective=objective
        )
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.item() == 0 and not torch.count_nonzero(gradient)


def test_the_page_is_the_one_that_is_linked() -> None:
    assert Path("docs/architectures.md").resolve() == PAGE
