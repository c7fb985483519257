"""Test that the fused Llama decoder writes what `generate` writes, and refuses other cases.

`generate` is that of transformers. A case that the fused decoder cannot compute in the same way is
refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stillhouse.distill.decode import FusedLlama, obstacle
from stillhouse.distill.engine import Engine
from stillhouse.distill.models import load_base, new_student
from stillhouse.distill.quant import quantize_
from stillhouse.distill.rollouts import cut_after_eos, pad_left
from stillhouse.distill.toy import tiny
from stillhouse.distill.toy.problems import problems
from stillhouse.distill.toy.recipes import RECIPES
from stillhouse.spec import LoraSpec, QuantSpec

# PEFT 0.21 reads a name that transformers 6 will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUANTS = {
    "none": QuantSpec(quant_type="none", quant_group_size=None, double_quant=False),
    "int4": QuantSpec(quant_type="int4", quant_group_size=32, double_quant=False),
    "nf4": QuantSpec(quant_type="bnb_nf4", quant_group_size=64, double_quant=False),
    "nf4_double": QuantSpec(quant_type="bnb_nf4", quant_group_size=64, double_quant=True),
    "fp4": QuantSpec(quant_type="bnb_fp4", quant_group_size=64, double_quant=False),
}
EVERY_QUANT = pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS.keys())
LORA = LoraSpec(lora_r=4, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS)
V = 48


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    settings = dict[str, Any](
        vocab_size=V, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | more)).eval()


def moved(student: Any, seed: int = 1) -> Any:
    """The student with an adapter that is not zero any more."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return student.eval()


def student(quant: QuantSpec = QUANTS["none"], **more: Any) -> Any:
    base = llama(**more)
    quantize_(base, quant)
    return moved(new_student(base, LORA, 0))


def decode(model: nn.Module, ids_BP: Tensor, mask_BP: Tensor, pick: Any, **settings: Any) -> Tensor:
    """What the fused forms write, with the weights of now."""
    engine = Engine(model)
    engine.refold()
    assert isinstance(engine.form, FusedLlama)
    return engine.tokens(ids_BP, mask_BP, pick, pad_id=0, **settings)


PROMPTS = [[3, 5, 2, 9, 4], [7], [8, 8, 6]]
FOLLOWING = torch.randint(V, (3, 6), generator=torch.Generator().manual_seed(5))


def decoded_logits(model: nn.Module, length: int = 7) -> Tensor:
    """Logits [B, C, V] of the decoder behind PROMPTS, where it is made to pick FOLLOWING."""
    seen: list[Tensor] = []

    def pick(logits_BV: Tensor, row_b: Tensor) -> Tensor:
        seen.append(logits_BV.clone())
        return FOLLOWING[:, len(seen) - 1]

    decode(model, *pad_left(PROMPTS, length, 0), pick, eos_ids=[], max_new_tokens=6)
    return torch.stack(seen, 1)


@torch.no_grad()
def whole_logits(model: Any) -> Tensor:
    """The same by a forward pass over each row alone, without cache or padding."""
    rows = []
    for prompt, following in zip(PROMPTS, FOLLOWING.tolist(), strict=True):
        logits_TV = model(input_ids=torch.tensor([prompt + following])).logits[0]
        rows.append(logits_TV[len(prompt) - 1 : -1])
    return torch.stack(rows)


@EVERY_QUANT
def test_the_logits_are_those_of_the_function_that_is_trained(quant):
    model = student(quant)
    expected = whole_logits(model)
    assert (decoded_logits(model) - expected).abs().max() < 1e-5
    with model.disable_adapter():
        assert (whole_logits(model) - expected).abs().max() > 0.1, "this adapter does nothing"


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 8},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": YARN},
    ],
    ids=lambda more: next(iter(more)) + str(next(iter(more.values())))[-20:],
)
def test_every_shape_of_llama_gives_its_own_logits(more):
    model = llama(**more)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    expected = whole_logits(model)
    assert (decoded_logits(model) - expected).abs().max() < 1e-5


def test_an_adapter_that_is_disabled_is_left_out_and_counts_again_after():
    model = student(QUANTS["int4"])
    with model.disable_adapter():
        base = decoded_logits(model)
        assert (base - whole_logits(model)).abs().max() < 1e-5
    assert (decoded_logits(model) - whole_logits(model)).abs().max() < 1e-5
    assert (decoded_logits(model) - base).abs().max() > 0.1


def test_of_two_adapters_the_active_one_is_decoded():
    model = student()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["v_proj"]))
    moved(model, seed=2)
    first = decoded_logits(model)
    model.set_adapter("other")
    assert (decoded_logits(model) - whole_logits(model)).abs().max() < 1e-5
    assert (decoded_logits(model) - first).abs().max() > 0.1


def test_decoding_leaves_the_model_as_it_was():
    model = student(QUANTS["int4"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decoded_logits(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.training
    assert not any(p.is_inference() for p in model.parameters())
    model(input_ids=FOLLOWING, labels=FOLLOWING).loss.backward()


def test_dropout_is_off_even_where_the_model_trains():
    model = student()
    expected = decoded_logits(model)
    assert torch.equal(decoded_logits(model.train()), expected)


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding():
    together = decoded_logits(llama())
    assert (decoded_logits(llama(), length=20) - together).abs().max() < 1e-5
    picks = iter(FOLLOWING[1])
    alone: list[Tensor] = []

    def pick(logits_BV: Tensor, row_b: Tensor) -> Tensor:
        alone.append(logits_BV[0])
        return next(picks)[None]

    decode(llama(), *pad_left(PROMPTS[1:2], 1, 0), pick, eos_ids=[], max_new_tokens=6)
    assert (torch.stack(alone) - together[1]).abs().max() < 1e-5


def test_writing_ends_with_the_last_rows_end_whichever_of_the_ends_it_is():
    tokens = iter([[5, 1], [2, 6], [1, 2], [7, 7]])
    out = decode(
        llama(), *pad_left([[4], [5, 5]], 2, 0),
        lambda _, row_b: torch.tensor(next(tokens))[row_b],
        eos_ids=[1, 2], max_new_tokens=4,
    )  # fmt: skip
    assert [cut_after_eos(row, [1, 2]) for row in out.tolist()] == [[5, 2], [1]]


# --- the tiny pair's student, trained a little ----------------------------------------------------


PAD, EOS = 0, 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A student base that has learnt to end its answers, in a directory; ragged prompts."""
    directory = tmp_path_factory.mktemp("pair") / "student"
    tiny.make(RECIPES["tiny"]["student"], 60, 1, directory, lambda _: None)
    text = AutoTokenizer.from_pretrained(directory)
    assert (text.pad_token_id, text.eos_token_id) == (PAD, EOS)
    source = islice(problems({"word1": 1, "symbolic2": 1}, 3, "train"), 16)
    return directory, text([f"<|user|>{p.question}<|assistant|>" for p in source])["input_ids"]


def argmax(logits_BV: Tensor, row_b: Tensor) -> Tensor:
    return logits_BV.argmax(-1)


@EVERY_QUANT
def test_greedy_text_is_that_of_generate_token_for_token(pair, quant):
    directory, prompts = pair
    base = load_base(str(directory), None, "float32", quant, torch.device("cpu"))
    model = moved(new_student(base, LORA, 0))
    ids_BP, mask_BP = pad_left(prompts, max(map(len, prompts)) + 3, PAD)
    plain = GenerationConfig(
        max_new_tokens=32, do_sample=False, pad_token_id=PAD, eos_token_id=EOS, use_cache=True
    )
    theirs = model.generate(input_ids=ids_BP, attention_mask=mask_BP, generation_config=plain)
    ours = decode(model, ids_BP, mask_BP, argmax, eos_ids=[EOS], max_new_tokens=32)
    texts = [cut_after_eos(row, [EOS]) for row in ours.tolist()]
    assert texts == [cut_after_eos(row, [EOS]) for row in theirs[:, ids_BP.shape[1] :].tolist()]
    assert len({tuple(text) for text in texts}) > 3
    assert any(text[-1] == EOS for text in texts)


# --- what is refused ------------------------------------------------------------------------------


def qwen() -> nn.Module:
    config = Qwen3Config(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def with_adapter(**more: Any) -> nn.Module:
    return get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], **more))


def merged() -> nn.Module:
    model = student()
    model.merge_adapter()
    return model


def with_odd_norm() -> nn.Module:
    model = llama()
    model.model.layers[1].input_layernorm = nn.LayerNorm(64)
    return model


def prompt_tuned() -> nn.Module:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    return get_peft_model(llama(), config)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another architecture": (qwen, "Qwen3ForCausalLM has no fused form"),
    "bfloat16": (lambda: llama().bfloat16(), "torch.bfloat16"),
    "a rope that follows the length": (lambda: llama(rope_parameters=DYNAMIC), "dynamic"),
    "DoRA": (lambda: with_adapter(use_dora=True), "layers.0.self_attn.q_proj"),
    "a bias of the adapter": (
        lambda: get_peft_model(
            llama(attention_bias=True), LoraConfig(target_modules=["q_proj"], lora_bias=True)
        ),
        "layers.0.self_attn.q_proj",
    ),
    "a merged adapter": (merged, "layers.0.self_attn.q_proj"),
    "an adapted head": (lambda: get_peft_model(llama(), LoraConfig(target_modules=["lm_head"])),
                        "lm_head is a"),
    "a trained norm": (lambda: with_adapter(modules_to_save=["norm"]), "norm is a Modules"),
    "another norm": (with_odd_norm, "layers.1.input_layernorm is a LayerNorm"),
    "another adapter": (prompt_tuned, "not LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_would_compute_differently_is_refused_with_the_reason(case):
    build, reason = REFUSED[case]
    assert reason in str(obstacle(build()))


def test_mixed_precision_is_refused_and_plain_students_are_not():
    assert obstacle(llama()) is None
    for quant in QUANTS.values():
        assert obstacle(student(quant)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert obstacle(llama()) == "mixed precision"
