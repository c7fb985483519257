"""Test the 4-bit base: its error, its gradients, and what it refuses."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.distill.quant import (
    PackedLinear,
    _PackedLinear,
    assert_gradients_exact,
    dequantized_weight,
    numerics,
    quantization_error,
    quantize_,
)
from stillhouse.errors import ConfigError, ContractError
from stillhouse.spec import QuantSpec

# PEFT 0.21 reads a name that transformers 6 will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

NONE = QuantSpec(quant_type="none", quant_group_size=None, double_quant=False)
INT4 = QuantSpec(quant_type="int4", quant_group_size=32, double_quant=False)
INT2 = QuantSpec(quant_type="int2", quant_group_size=32, double_quant=False)
INT3 = QuantSpec(quant_type="int3", quant_group_size=32, double_quant=False)
OURS = (INT4, INT3, INT2)
NF4 = QuantSpec(quant_type="bnb_nf4", quant_group_size=64, double_quant=False)
NF4_DOUBLE = QuantSpec(quant_type="bnb_nf4", quant_group_size=64, double_quant=True)
FP4 = QuantSpec(quant_type="bnb_fp4", quant_group_size=64, double_quant=False)
ALL = pytest.mark.parametrize(
    "quant",
    [INT4, INT2, NF4, NF4_DOUBLE, FP4],
    ids=["int4", "int2", "nf4", "nf4_double", "fp4"],
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(
    *, hidden_size: int = 64, tied: bool = True, biases: bool = True, seed: int = 0
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        attention_bias=biases,
    )
    return LlamaForCausalLM(config)


def linear(rows: list[list[float]], *, bias: bool = False) -> nn.Linear:
    weight = torch.tensor(rows)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight = nn.Parameter(weight)
    return layer


def with_lora(model: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_dropout=0.0, target_modules=TARGETS, init_lora_weights=False)
    # Adapters in the base's dtype: where they are wider, PEFT's bitsandbytes layer rounds the sum
    # Q(W)x + BAx once more than its dense layer does, which is PEFT's affair and not the base's.
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def densified(model: Any) -> LlamaForCausalLM:
    """A dense model whose weights are the quantised model's Q(W)."""
    twin: Any = llama(biases=model.config.attention_bias)
    twin.to(model.dtype)
    for name, layer in twin.named_modules():
        if isinstance(layer, nn.Linear):
            other = model.get_submodule(name)
            layer.weight.data = dequantized_weight(other).to(model.dtype)
            layer.bias = other.bias
    return twin


TOKENS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def evaluate(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(input_ids=TOKENS)
    model.train()


def lora_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 2 * len(TARGETS)
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


# --- what int4 does to a group --------------------------------------------------------------------


def test_a_group_on_the_grid_is_packed_as_by_hand_and_comes_back_exactly():
    # 16 values from -1.25 to 2.5: scale (2.5 + 1.25) / 15 = 0.25, zero point 1.25 / 0.25 = 5.
    layer = PackedLinear(linear([[(q - 5) * 0.25 for q in range(16)] * 2]), 32)
    assert layer.scale.tolist() == [[0.25]]
    assert layer.zero.tolist() == [[5]]
    assert layer.packed.tolist() == [[0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 2]
    assert dequantized_weight(layer).tolist() == [[(q - 5) * 0.25 for q in range(16)] * 2]


def test_fewer_bits_are_a_coarser_grid_in_the_same_room():
    # Two bits, -1 to 2: scale 3 / 3 = 1, zero point 1. Three bits, -1 to 2.5: scale 3.5 / 7 = 0.5.
    two = PackedLinear(linear([[-1.0, 0.0, 1.0, 2.0] * 8]), 32, bits=2)
    assert (two.scale.tolist(), two.zero.tolist()) == ([[1.0]], [[1]])
    assert two.packed.tolist() == [[0x01, 0x23] * 8]
    assert dequantized_weight(two).tolist() == [[-1.0, 0.0, 1.0, 2.0] * 8]
    three = PackedLinear(linear([[(q - 2) * 0.5 for q in range(8)] * 4]), 32, bits=3)
    assert (three.scale.tolist(), three.zero.tolist()) == ([[0.5]], [[2]])
    assert three.packed.tolist() == [[0x01, 0x23, 0x45, 0x67] * 4]
    rounded = PackedLinear(linear([[-1.0, 2.0, 0.4, 0.6] + [0.0] * 28]), 32, bits=2)
    assert dequantized_weight(rounded)[0, :4].tolist() == [-1.0, 2.0, 0.0, 1.0]


def test_each_bit_less_about_doubles_the_error():
    errors = [quantization_error(llama(), quant) for quant in OURS]
    assert all(1.8 < worse / better < 3 for better, worse in zip(errors, errors[1:], strict=False))


def test_a_weight_between_two_levels_goes_to_the_nearer():
    layer = PackedLinear(linear([[0.0, 15.0, 3.4, 3.6] + [0.0] * 28]), 32)  # scale 1, zero point 0
    assert dequantized_weight(layer)[0, :4].tolist() == [0.0, 15.0, 3.0, 4.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_is_not_clipped(sign: int):
    # All of [2, 3.75]: with 0 in the range the scale is 3.75 / 15 = 0.25 and every value a level.
    weights = [sign * 0.25 * q for q in range(8, 16)] * 4
    assert dequantized_weight(PackedLinear(linear([weights]), 32)).tolist() == [weights]


@pytest.mark.parametrize("constant", [0.3, -0.3, 0.0, 1.7])
def test_a_constant_group_comes_back_exactly(constant: float):
    layer = linear([[constant] * 32])
    assert torch.equal(dequantized_weight(PackedLinear(layer, 32)), layer.weight)


def test_groups_do_not_share_their_scales():
    small, large = [0.01 * q for q in range(16)] * 2, [float(q) for q in range(16)] * 2
    layer = PackedLinear(linear([small + large, large + small]), 32)
    torch.testing.assert_close(layer.scale, torch.tensor([[0.01, 1.0], [1.0, 0.01]]))


@given(
    rows=st.lists(st.floats(-1, 1, width=32), min_size=64, max_size=64),
    offset=st.sampled_from([-3.0, -0.5, 0.0, 0.5, 3.0]),
    magnitude=st.sampled_from([1e-6, 1.0, 1e6]),
    bits=st.sampled_from([2, 3, 4]),
)
def test_no_weight_moves_by_more_than_half_a_step_and_zero_does_not_move(
    rows, offset, magnitude, bits
):
    weight = (torch.tensor([rows]) + offset) * magnitude
    layer = PackedLinear(linear(weight.tolist()), 32, bits)
    error = (dequantized_weight(layer) - weight).abs().unflatten(1, (2, 32))
    assert (error <= layer.scale.unsqueeze(-1) / 2 * (1 + 1e-5)).all()
    assert not dequantized_weight(layer)[weight == 0].any()


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["cpu_constant", "packed_only"])
def test_int4_gives_output_and_gradients_of_the_dense_layer_bit_for_bit(dtype, path):
    torch.manual_seed(0)
    dense = nn.Linear(64, 48).to(dtype)
    int4 = PackedLinear(copy.deepcopy(dense), 32)
    dense.weight = nn.Parameter(dequantized_weight(int4).to(dtype))
    x = torch.randn(3, 5, 64, dtype=dtype)
    results = []
    for layer in (dense, int4):
        leaf = x.clone().requires_grad_()
        if layer is int4 and path == "packed_only":  # what an accelerator runs
            y = _PackedLinear.apply(leaf, int4.packed, int4.scale, int4.zero, int4.bias)
        else:
            y = layer(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, layer.bias.grad))
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, reference)


def test_the_packed_path_keeps_nothing_dense_for_the_backward():
    int4 = PackedLinear(nn.Linear(64, 48, bias=False), 32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(2, 64, requires_grad=True)
        _PackedLinear.apply(x, int4.packed, int4.scale, int4.zero, None)
    assert sum(t.nbytes for t in kept) == 48 * 64 // 2 + 48 * 2 * (4 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ALL
def test_lora_gradients_equal_the_dense_ones_after_an_eval_pass_too(quant, dtype):
    model = llama().to(dtype)
    quantize_(model, quant)
    reference = lora_gradients(with_lora(densified(model)))
    student = with_lora(model)
    evaluate(student)
    assert_gradients_exact(student)
    gradients = lora_gradients(student)
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=0, atol=0, msg=name)


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit:UserWarning")  # all that it says
@pytest.mark.parametrize("quant", [NF4, FP4], ids=["nf4", "fp4"])
def test_without_the_guard_an_eval_pass_spoils_the_gradients_and_that_is_caught(quant):
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes never repacks here")
    model = llama(biases=False)  # with biases the repacked layer fails aloud, at least
    quantize_(model, quant)
    reference = lora_gradients(with_lora(densified(model)))
    student = with_lora(model)
    for module in student.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it on this CPU
    evaluate(student)
    with pytest.raises(ContractError, match=r"layers\.0\.self_attn\.q_proj.*repacked"):
        assert_gradients_exact(student)
    gradients = lora_gradients(student)
    apart = max((g - reference[n]).norm() / reference[n].norm() for n, g in gradients.items())
    assert apart > 0.1
    with pytest.raises(ContractError, match="read back"):
        dequantized_weight(model.get_submodule("model.layers.0.self_attn.q_proj.base_layer"))


def test_a_first_call_under_inference_mode_leaves_the_layer_trainable_through():
    int4 = PackedLinear(nn.Linear(32, 8), 32)
    with torch.inference_mode():
        int4(torch.randn(2, 32))
    x = torch.randn(2, 32, requires_grad=True)
    int4(x).sum().backward()
    torch.testing.assert_close(x.grad, dequantized_weight(int4).sum(0).expand(2, 32))


@pytest.mark.parametrize("path", ["cpu_constant", "packed_only"])
def test_autocast_treats_int4_as_it_treats_a_dense_layer(path):
    torch.manual_seed(0)
    int4 = PackedLinear(nn.Linear(64, 48), 32)
    dense = nn.Linear(64, 48)
    dense.weight, dense.bias = nn.Parameter(dequantized_weight(int4)), int4.bias
    x = torch.randn(3, 64)
    outputs, gradients = [], []
    for layer in (dense, int4):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if layer is int4 and path == "packed_only":
                y = _PackedLinear.apply(leaf, int4.packed, int4.scale, int4.zero, int4.bias)
            else:
                y = layer(leaf)
        y.square().sum().backward()
        outputs.append(y)
        gradients.append(leaf.grad)
    assert outputs[1].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


# --- which layers, and in which model -------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@ALL
def test_every_linear_but_the_head_is_quantised(quant, tied):
    model, untouched = llama(tied=tied), llama(tied=tied)
    quantize_(model, quant)
    kept = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    replaced = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in kept]
    assert kept == ["lm_head"]
    assert len(replaced) == 2 * len(TARGETS)
    assert torch.equal(model.lm_head.weight, untouched.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, untouched.model.embed_tokens.weight)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_layer_that_shares_the_embedding_stays_dense_under_any_name():
    model = nn.ModuleDict({"tokens": nn.Embedding(8, 32), "out": nn.Linear(32, 8, bias=False)})
    model["mix"] = nn.Linear(32, 32)
    model["out"].weight = model["tokens"].weight
    quantize_(model, INT4)
    assert type(model["out"]) is nn.Linear
    assert model["out"].weight is model["tokens"].weight
    assert isinstance(model["mix"], PackedLinear)


def test_none_changes_nothing():
    model = llama()
    before = {name: id(module) for name, module in model.named_modules()}
    quantize_(model, NONE)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert quantization_error(model, NONE) == 0.0


@ALL
def test_quantising_draws_no_random_number_and_keeps_the_mode(quant):
    model = llama().eval()
    state = torch.get_rng_state()
    quantize_(model, quant)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


@ALL
def test_peft_wraps_every_layer_and_its_adapter_changes_the_output(quant):
    model = llama()
    quantize_(model, quant)
    student = with_lora(model).eval()
    kind = "Linear" if quant in OURS else "Linear4bit"
    wrapped = [m for m in student.modules() if hasattr(m, "lora_A") and type(m).__name__ == kind]
    assert len(wrapped) == 2 * len(TARGETS)
    with torch.no_grad():
        adapted = student(input_ids=TOKENS).logits
        with student.disable_adapter():
            plain = student(input_ids=TOKENS).logits
    assert (adapted - plain).abs().max() > 0.01


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_bitsandbytes_gets_the_block_the_levels_and_the_scales_asked_for(levels, double_quant):
    model: Any = nn.Sequential(nn.Linear(128, 8).bfloat16())
    quant_type: Any = f"bnb_{levels}"
    quantize_(model, QuantSpec(quant_type, quant_group_size=128, double_quant=double_quant))
    state = model[0].weight.quant_state
    assert (state.blocksize, state.quant_type, state.nested) == (128, levels, double_quant)
    assert model[0].compute_dtype == torch.bfloat16


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_an_adapter_into_int4_raises_and_harms_nothing(safe_merge):
    model = llama()
    quantize_(model, INT4)
    student = with_lora(model).eval()
    with torch.no_grad():
        before = student(input_ids=TOKENS).logits
        with pytest.raises(ContractError, match="cannot be merged"):
            student.merge_and_unload(safe_merge=safe_merge)
        with pytest.raises(ContractError, match="cannot be merged"):
            student.merge_adapter(safe_merge=safe_merge)
        assert torch.equal(student(input_ids=TOKENS).logits, before)


def test_an_initialisation_that_would_rewrite_the_base_raises():
    model = llama()
    quantize_(model, INT4)
    with pytest.raises(ContractError, match="cannot be merged"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))


def test_bitsandbytes_refuses_by_name_a_width_that_the_group_does_not_divide():
    # It would take it, and on a CPU silently read the wrong scales.
    model = llama(hidden_size=96)
    quant = QuantSpec(quant_type="bnb_nf4", quant_group_size=64, double_quant=False)
    with pytest.raises(ConfigError) as error:
        quantize_(model, quant)
    for part in ("layers.0.self_attn.q_proj", "in_features 96", "group_size 64", "(32, 64, 128"):
        assert part in str(error.value)
    assert "this layer fits (32,)" in str(error.value)


def test_the_last_group_of_a_row_may_be_shorter_and_has_a_scale_of_its_own():
    torch.manual_seed(0)
    dense = nn.Linear(96, 5)
    layer = PackedLinear(dense, 64)
    first, last = nn.Linear(64, 5), nn.Linear(32, 5)
    first.weight = nn.Parameter(dense.weight[:, :64].detach())
    last.weight = nn.Parameter(dense.weight[:, 64:].detach())
    parts = [
        dequantized_weight(PackedLinear(first, 64)),
        dequantized_weight(PackedLinear(last, 32)),
    ]
    assert torch.equal(dequantized_weight(layer), torch.cat(parts, 1))
    x = torch.randn(3, 96, requires_grad=True)
    packed = layer.packed, layer.scale, layer.zero
    _PackedLinear.apply(x, *packed, layer.bias).sum().backward()  # what a GPU runs
    torch.testing.assert_close(x.grad, dequantized_weight(layer).sum(0).expand(3, 96))


@ALL
def test_what_is_quantised_or_wrapped_already_is_refused(quant):
    model = llama()
    quantize_(model, quant)
    with pytest.raises(ContractError, match="already quantised"):
        quantize_(model, quant)
    with pytest.raises(ContractError, match="wrapped by PEFT"):
        quantize_(with_lora(llama()), quant)


def test_a_model_without_linear_layers_and_a_broken_weight_are_refused():
    with pytest.raises(ContractError, match="nothing to quantise"):
        quantize_(nn.ModuleDict({"lm_head": nn.Linear(32, 8)}), INT4)
    with pytest.raises(ContractError, match="0: its weight holds NaN"):
        quantize_(nn.Sequential(linear([[float("nan")] * 32])), INT4)


# --- what stays the same --------------------------------------------------------------------------


def test_a_saved_state_dict_gives_the_same_model_even_to_one_that_already_ran(tmp_path):
    first, second = llama(seed=0), llama(seed=1)
    quantize_(first, INT4)
    quantize_(second, INT4)
    evaluate(second)
    save_file({k: v.clone() for k, v in first.state_dict().items()}, tmp_path / "base.safetensors")
    second.load_state_dict(load_file(tmp_path / "base.safetensors"))
    with torch.no_grad():
        expected, got = first.eval()(input_ids=TOKENS), second.eval()(input_ids=TOKENS)
    assert torch.equal(got.logits, expected.logits)


def test_the_state_dict_holds_the_packed_form_only():
    layer = PackedLinear(nn.Linear(64, 48), 32)
    layer(torch.randn(1, 64))
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {"packed": (48, 32), "scale": (48, 2), "zero": (48, 2), "bias": (48,)}


def test_casting_the_model_does_not_move_the_grid():
    layer = PackedLinear(nn.Linear(64, 48), 32)
    before = dequantized_weight(layer)
    layer(torch.randn(1, 64))
    layer.to(torch.bfloat16)
    assert torch.equal(dequantized_weight(layer), before)
    assert layer(torch.randn(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@ALL
def test_the_quantisation_error_is_that_of_the_model_quantize_makes(quant):
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured = quantization_error(model, quant)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    dense, quantised = llama(), model
    quantize_(quantised, quant)
    pairs = [
        (dequantized_weight(layer), dequantized_weight(quantised.get_submodule(name)))
        for name, layer in dense.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    ]
    error = torch.cat([(w - q).flatten() for w, q in pairs]).norm()
    norm = torch.cat([w.flatten() for w, _ in pairs]).norm()
    assert measured == pytest.approx((error / norm).item(), rel=1e-5)
    # Of normal weights: four bits, and two.
    assert 0.05 < measured < 0.13 if quant is not INT2 else 0.35 < measured < 0.65


@pytest.mark.parametrize("quant", [INT4, NF4], ids=["int4", "nf4"])
def test_quantising_what_is_quantised_already_moves_it_little(quant):
    # Why a self pair needs a measured error: weights that are 4-bit already make one model twice.
    model = llama()
    quantize_(model, quant)
    assert quantization_error(densified(model), quant) < 0.01


@ALL
def test_the_contract_says_what_the_quantiser_is_in_plain_json(quant):
    contract = numerics(quant)
    assert json.loads(json.dumps(contract)) == contract
    assert contract["quant_type"] == quant.quant_type
    assert contract["quant_group_size"] == quant.quant_group_size
    assert contract["library"] == ("stillhouse" if quant in OURS else "bitsandbytes")


def test_quantisers_that_differ_have_contracts_that_differ():
    int4_64 = QuantSpec(quant_type="int4", quant_group_size=64, double_quant=False)
    contracts = [json.dumps(numerics(q)) for q in (NONE, *OURS, int4_64, NF4, NF4_DOUBLE, FP4)]
    assert len(set(contracts)) == len(contracts)
