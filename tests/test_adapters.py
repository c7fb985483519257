"""Test which layers an adapter changes, and what its contract checks when it is loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.compose import compose, from_command_line
from stillhouse.distill.adapters import attach_adapter, new_student, read_contract, save_adapter
from stillhouse.distill.layers import coverage, linear_layers, text_modules
from stillhouse.distill.pairs import PreparedPair
from stillhouse.distill.quant import (
    PackedLinear,
    dequantized_weight,
    quantization_error,
    quantize_,
)
from stillhouse.errors import ConfigError, ContractError
from stillhouse.rundir import RunDir, file_digest, write_json
from stillhouse.spec import LoraSpec, QuantSpec, TrainSpec

INT4 = QuantSpec(quant_type="int4", quant_group_size=32, double_quant=False)
NF4 = QuantSpec(quant_type="bnb_nf4", quant_group_size=64, double_quant=False)
DEFAULT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = torch.arange(24).view(2, 12)
MIXTURE = {"num_experts_per_tok": 2, "num_local_experts": 4}


def model(kind: str, **more: Any) -> Any:
    """A random model of two layers of width 64, of any architecture."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**sizes, **more})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def gpt2() -> Any:
    return model("gpt2", n_embd=64, n_head=2, n_layer=2, tie_word_embeddings=True)


def deepseek() -> Any:
    """One dense block, then one of four experts beside a shared one; a router of eight outputs."""
    return model(
        "deepseek_v3", first_k_dense_replace=1, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=64, q_lora_rank=32,
        kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        num_key_value_heads=2,
    )  # fmt: skip


def gemma3() -> Any:
    """A text decoder beside a vision tower whose layers have the same names."""
    text = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 28,
        "num_attention_heads": 2, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=95,
        boi_token_id=94, eoi_token_id=93,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def lora(*targets: str, rank: int = 4) -> LoraSpec:
    return LoraSpec(lora_r=rank, lora_alpha=8, lora_dropout=0.0, target_modules=targets)


def adapted(student: nn.Module) -> set[str]:
    return {n.removesuffix(".base_layer") for n in linear_layers(student) if "base_layer" in n}


# ---------------------------------------------------------------- which layers


def test_a_name_that_no_layer_has_is_refused_with_the_names_there_are_and_an_override_that_works():
    for build, targets, unknown, override in (
        (
            lambda: model("phi3"),
            DEFAULT,
            "q_proj, k_proj, v_proj, gate_proj, up_proj",
            "down_proj,gate_up_proj,o_proj,qkv_proj",
        ),
        (gpt2, DEFAULT, ", ".join(DEFAULT), "c_attn,c_fc,c_proj"),
        (
            lambda: model("mixtral", **MIXTURE),
            DEFAULT,
            "gate_proj, up_proj, down_proj",
            "k_proj,o_proj,q_proj,v_proj",
        ),
        (
            deepseek,
            DEFAULT,
            "q_proj, k_proj, v_proj",
            "kv_a_proj_with_mqa,kv_b_proj,o_proj,q_a_proj,q_b_proj",
        ),
        (
            lambda: model("llama"),
            ("q_proj", "v_porj"),
            "v_porj",
            "down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj",
        ),
        (lambda: model("llama"), ("lm_head", *DEFAULT), "lm_head", ",".join(sorted(DEFAULT))),
        (lambda: model("llama"), ("all-linear",), "all-linear", ",".join(sorted(DEFAULT))),
    ):
        base = build()
        with pytest.raises(ConfigError) as error:
            new_student(base, lora(*targets), 0)
        said = str(error.value)
        assert f"target_modules: {unknown} match no linear layer" in said
        assert type(base).__name__ in said and said.endswith(f"Set target_modules=[{override}]")
        student = new_student(build(), lora(*override.split(",")), 0)
        assert {name.rpartition(".")[2] for name in adapted(student)} == {*override.split(",")}


def test_names_that_peft_moves_to_experts_are_refused_where_linear_layers_have_them_too():
    # Of deepseek's three kinds of gate_proj PEFT would adapt the stacked experts' alone.
    with pytest.raises(ConfigError) as error:
        new_student(deepseek(), lora("o_proj", "gate_proj", "up_proj", "down_proj"), 0)
    assert "PEFT takes gate_proj, up_proj, down_proj" in str(error.value)
    assert str(error.value).endswith("Set target_modules=[o_proj]")


def test_every_layer_of_a_name_is_adapted_and_the_shares_are_those_by_hand():
    student = new_student(model("llama"), lora("q_proj", "down_proj"), 0)
    assert adapted(student) == {
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    # A layer: q and o 64 x 64, k and v 32 x 64, gate, up and down 128 x 64.
    found, layer = coverage(student), 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    assert (found.weights, found.quantised) == (2 * layer, 0)
    assert found.adapted == 2 * (64 * 64 + 128 * 64)
    assert found.as_json()["adapted_share"] == round(found.adapted / found.weights, 4) == 0.3333
    assert "33.3% are adapted" in found.told("none")


def test_of_a_model_that_sees_the_text_decoder_alone_is_quantised_and_adapted():
    base = gemma3()
    quantize_(base, INT4)
    packed = [n for n, m in base.named_modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 7 and all("language_model" in name for name in packed)
    student = new_student(base, lora(*DEFAULT), 0)
    assert adapted(student) == {*packed}
    assert not [n for n, _ in student.named_parameters() if "vision" in n and "lora" in n]
    found = coverage(student)
    assert (found.quantised_share, found.adapted_share, found.dense) == (1, 1, ())


def test_a_tower_inside_the_decoder_and_what_joins_it_to_the_text_are_no_part_of_it():
    # Phi-4-multimodal keeps its towers below the module that is its decoder; on no device, no time.
    with torch.device("meta"):
        config = AutoConfig.for_model("phi4_multimodal", num_hidden_layers=1, hidden_size=64,
            intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, vocab_size=96,
            pad_token_id=0, bos_token_id=1, eos_token_id=1)  # fmt: skip
        config.vision_config.num_hidden_layers = config.audio_config.num_blocks = 1
        base = AutoModelForCausalLM.from_config(config)
    assert {name.rpartition(".")[2] for name in linear_layers(base)} == {
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj"
    }  # fmt: skip
    assert not [name for name, _ in text_modules(base) if "embed_tokens_extend" in name]


def test_a_decoder_is_what_reads_the_tokens_whatever_get_decoder_gives():
    base = model("modernbert-decoder")  # its attribute `decoder` is the head
    assert base.get_decoder() is base.get_output_embeddings()
    assert {name.partition(".")[0] for name in linear_layers(base)} == {"model"}


# ---------------------------------------------------------------- what is quantised


def test_experts_that_would_stay_dense_refuse_a_quantised_student_with_the_share():
    for kind, more in (
        ("mixtral", MIXTURE),
        ("granitemoe", MIXTURE),
        ("gpt_oss", MIXTURE | {"head_dim": 32}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    ):
        base = model(kind, **more)
        with pytest.raises(ConfigError) as error:
            quantize_(base, INT4)
        for word in ("experts.gate_up_proj", "% of the text decoder", "Choose quant=none"):
            assert word in str(error.value)
        assert not [m for m in base.modules() if isinstance(m, PackedLinear)], "nothing half done"
        with pytest.raises(ConfigError, match="would stay dense"):
            quantization_error(base, NF4)
    # Mixtral, a layer: q, k, v, o of 12,288 weights; four experts of 3 x 64 x 128.
    with pytest.raises(ConfigError, match=f"store {12_288 / (12_288 + 98_304):.1%} of"):
        quantize_(model("mixtral", **MIXTURE), INT4)


def test_layers_that_compute_in_their_own_way_are_no_linear_layers_to_a_quantiser():
    with pytest.raises(ContractError, match="nothing to quantise; choose quant=none"):
        quantize_(model("falcon", new_decoder_architecture=False, multi_query=True), INT4)


@pytest.mark.parametrize("quant", [INT4, NF4], ids=["int4", "nf4"])
def test_the_transposed_layers_of_gpt2_are_quantised_as_what_they_multiply_by(quant):
    dense, packed = gpt2(), gpt2()
    quantize_(packed, quant)
    assert coverage(packed).quantised_share == 1
    error = norm = 0.0
    for name, layer in linear_layers(packed).items():
        twin = dense.get_submodule(name)
        stored = dequantized_weight(layer).T
        error += (stored - twin.weight).square().sum().item()
        norm += twin.weight.square().sum().item()
        twin.weight.data = stored.contiguous()
    assert quantization_error(gpt2(), quant) == pytest.approx((error / norm) ** 0.5, rel=1e-5)
    with torch.no_grad():
        expected, got = dense(input_ids=TOKENS).logits, packed(input_ids=TOKENS).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the contract


@pytest.fixture(scope="module")
def point() -> TrainSpec:
    words = ["pair=tiny", "quant=none", "lora_r=4", "target_modules=[v_proj,q_proj,down_proj]"]
    return compose(from_command_line(words, TrainSpec), TrainSpec)


def saved(base: Any, point: TrainSpec, place: Path) -> Path:
    """An adapter that changes what `base` computes, with its contract."""
    student = new_student(base, point.lora, 0)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.5)
    prepared = PreparedPair(str(place), str(place), None, None, place, {})
    save_adapter(student, point, prepared, place / "adapter")
    return place / "adapter"


def resigned(adapter: Path) -> None:
    """The contract's digests made those of the files as they are: only their content is wrong."""
    contract = json.loads((adapter / "stillhouse.json").read_text())
    for name, entry in contract["files"].items():
        entry |= {"size": (adapter / name).stat().st_size, "sha256": file_digest(adapter / name)}
    write_json(adapter / "stillhouse.json", contract)


def test_what_is_saved_names_layers_in_order_and_says_what_it_covers(point, tmp_path):
    adapter = saved(model("llama"), point, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    # PEFT keeps a set, whose order is another one in each process.
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    contract = read_contract(adapter)
    assert contract["adapter"]["peft_type"] == "LORA"
    assert len(contract["adapter"]["tensors"]) == 2 * 2 * 3
    down = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert contract["adapter"]["tensors"][down] == [4, 128]
    assert contract["coverage"]["quantised_share"] == 0
    # q 4,096, v 2,048 and down 8,192 of a layer's 36,864.
    assert contract["coverage"]["adapted_share"] == round(14_336 / 36_864, 4)


def test_an_adapter_of_any_architecture_comes_back_as_the_function_that_was_saved(point, tmp_path):
    for build, targets, quant in (
        (gemma3, ("q_proj", "down_proj"), INT4),
        (gpt2, ("c_attn", "c_fc"), INT4),
        (lambda: model("mixtral", **MIXTURE), ("q_proj",), None),
    ):
        place = tmp_path / f"{build.__name__}{targets[0]}{quant is None}"
        place.mkdir()
        bases = [build(), build()]
        for base in bases:
            if quant is not None:
                quantize_(base, quant)
        words = ["pair=tiny", "lora_r=4", f"target_modules=[{','.join(targets)}]"]
        adapter = saved(bases[0], compose(from_command_line(words, TrainSpec), TrainSpec), place)
        again = attach_adapter(bases[1], adapter, "again")
        with torch.no_grad():
            expected = bases[0].eval()(input_ids=TOKENS).logits
            assert torch.equal(again(input_ids=TOKENS).logits, expected)
            with again.disable_adapter():
                assert not torch.equal(again(input_ids=TOKENS).logits, expected)


def test_a_setting_that_is_not_the_contracts_is_refused_by_name(point, tmp_path):
    adapter = saved(model("llama"), point, tmp_path)
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    for changes, said in (
        ({"lora_alpha": 64}, r"lora_alpha 64 \(the contract: 8\)"),
        ({"r": 8}, r"r 8 \(the contract: 4\)"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"peft_type": "LOHA"}, r"peft_type LOHA \(the contract: LORA\)"),
        ({"use_rslora": True}, "use_rslora True"),
        ({"use_dora": True}, "use_dora True"),
        ({"exclude_modules": ["model.layers.0.mlp.down_proj"]}, "exclude_modules"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": None}, "r None"),
    ):
        write_json(file, config | changes)
        resigned(adapter)
        with pytest.raises(ContractError, match=said):
            read_contract(adapter)
    for text, said in (("{", "not JSON"), ("[]", "no JSON object"), ("{}", "peft_type None")):
        file.write_text(text)
        with pytest.raises(ContractError, match=said):
            read_contract(adapter)
    file.unlink()
    with pytest.raises(ContractError, match=r"adapter_config.json: missing; fetch"):
        read_contract(adapter)


def test_weights_that_are_cut_short_or_of_other_layers_are_refused(point, tmp_path):
    adapter = saved(model("llama"), point, tmp_path)
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    tensors = load(whole)  # load_file maps the file, and a map that is cut short kills the process
    first = min(tensors)

    def refused(said: str, change: Callable[[], Any]) -> None:
        change()
        resigned(adapter)
        with pytest.raises(ContractError, match=said):
            read_contract(adapter)

    refused("damaged or cut short", lambda: file.write_bytes(whole[: len(whole) // 2]))
    refused("damaged or cut short", lambda: file.write_bytes(b""))
    refused("damaged or cut short", lambda: file.write_bytes(b"\xff" * 64))
    less = {name: tensor for name, tensor in tensors.items() if name != first}
    refused(rf"1 are missing \({first}\)", lambda: save_file(less, file))
    more = tensors | {"base_model.model.extra.lora_A.weight": tensors[first].clone()}
    refused(r"1 are unknown there \(base_model.model.extra", lambda: save_file(more, file))
    cut = tensors | {first: tensors[first][:2].clone()}
    refused("some have other shapes", lambda: save_file(cut, file))
    file.unlink()
    with pytest.raises(ContractError, match=r"adapter_model.safetensors: missing; fetch"):
        read_contract(adapter)


def test_a_contract_without_the_newer_fields_is_read_and_what_is_there_is_compared(point, tmp_path):
    adapter = saved(model("llama"), point, tmp_path)
    contract = json.loads((adapter / "stillhouse.json").read_text())
    old = {key: contract[key] for key in contract if key not in ("adapter", "coverage")}
    write_json(adapter / "stillhouse.json", old)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["v_proj", "down_proj", "q_proj"]  # as a set's order had it
    write_json(adapter / "adapter_config.json", config)
    resigned(adapter)
    attach_adapter(model("llama"), adapter, "old")

    write_json(adapter / "adapter_config.json", config | {"lora_alpha": 2})
    with pytest.raises(ContractError, match="lora_alpha 2"):
        read_contract(adapter)
    write_json(adapter / "adapter_config.json", config | {"peft_type": "LOHA"})
    with pytest.raises(ContractError, match="peft_type LOHA"):
        read_contract(adapter)
    write_json(adapter / "adapter_config.json", config)
    file = adapter / "adapter_model.safetensors"
    tensors = load(file.read_bytes())
    save_file({name: t for name, t in tensors.items() if "layers.1" not in name}, file)
    resigned(adapter)
    with pytest.raises(ContractError, match="not the tensors of its base: 6 are missing"):
        attach_adapter(model("llama"), adapter, "less")


def test_a_contract_that_is_not_whole_is_refused_in_a_sentence(point, tmp_path):
    adapter = saved(model("llama"), point, tmp_path)
    contract = json.loads((adapter / "stillhouse.json").read_text())
    for key in ("id", "base", "quant", "numerics", "lora", "dtype", "files"):
        for wrong in ({}, {key: 7}):
            write_json(
                adapter / "stillhouse.json",
                {k: v for k, v in contract.items() if k != key} | wrong,
            )
            with pytest.raises(ContractError, match=f"stillhouse.json: {key} missing, or not what"):
                read_contract(adapter)
    for changes, said in (
        ({"files": {"adapter_model.safetensors": 3}}, "files missing"),
        ({"adapter": []}, "adapter missing"),
        ({"dtype": "int7"}, "dtype missing"),
        ({"lora": {"lora_r": 4}}, "unknown to this version"),
    ):
        write_json(adapter / "stillhouse.json", contract | changes)
        with pytest.raises(ContractError, match=said):
            read_contract(adapter)


def test_a_contract_that_is_not_whole_makes_no_trained_run_and_is_named(tmp_path):
    run = RunDir(tmp_path / "slug-0123456789")
    for files in (None, 3, {"adapter_model.safetensors": None}):
        write_json(run.adapter / "stillhouse.json", {"id": run.id, "files": files})
        (run.adapter / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(ContractError, match=r"adapter/stillhouse\.json: files"):
            run.is_trained()
    files = {"gone.safetensors": {"size": 1}}
    write_json(run.adapter / "stillhouse.json", {"id": run.id, "files": files})
    assert not run.is_trained()
