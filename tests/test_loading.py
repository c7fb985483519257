"""Test that files that cannot be loaded completely give a one-sentence error."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse import compatibility, entrypoints
from stillhouse.compose import compose, from_command_line
from stillhouse.distill import loading
from stillhouse.distill.loaded import load
from stillhouse.distill.toy import tiny
from stillhouse.errors import ContractError
from stillhouse.spec import TrainSpec

SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "tie_word_embeddings": False, "bos_token_id": None,
    "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a kilobyte, head and embedding apart."""
    torch.manual_seed(0)
    into = tmp_path_factory.mktemp("whole")
    with tiny.no_bars():
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(into)
    tiny.tokenizer().save_pretrained(into)
    return into


@pytest.fixture
def here(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "m"))


def say(here: Path, **config: Any) -> None:
    """Change lines of its config."""
    file = here / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | config))


def change(here: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change its tensors."""
    tensors = load_file(here / "model.safetensors")
    edit(tensors)
    save_file(tensors, here / "model.safetensors", {"format": "pt"})


def refusal(here: Path) -> str:
    with pytest.raises(ContractError) as caught, tiny.no_bars():
        loading.causal_lm(here, None, torch.float32)
    assert str(here) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_model_is_loaded_as_it_was_saved(whole: Path) -> None:
    with tiny.no_bars():
        model = loading.causal_lm(whole, None, torch.float32)
    saved = load_file(whole / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())
    assert loading.tokenizer(whole).eos_token == "<eos>"


def test_writing_ends_where_any_file_or_the_template_says(here: Path, tmp_path: Path) -> None:
    say(here, eos_token_id=None)
    (here / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    template = here / "chat_template.jinja"
    template.write_text(template.read_text().replace("eos_token", "'<|user|>'"))
    rows = [{"prompt": f"{n}+1?", "completion": f"{n + 1}"} for n in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [f"student={here}", f"teacher={here}", f"data_path={tmp_path / 'd.jsonl'}", "data=local"]
    line += [
        "quant=none",
        "lora_r=1",
        "held_out_rows=2",
        "mixed_precision=no",
        f"cache_dir={tmp_path}",
    ]
    spec = compose(from_command_line(line, TrainSpec), TrainSpec)
    with tiny.no_bars():
        loaded = load(spec, lambda: None)
    assert loaded.roles.eos_ids == [1, 2, 7]
    assert {loaded.prompts.train[i].completion_ids[-1] for i in range(4)} == {2}


def test_weights_that_a_checkpoint_lacks_are_not_made_up(here: Path) -> None:
    change(here, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lack lm_head.weight, which would be random numbers" in refusal(here)
    say(here, num_hidden_layers=3)
    said = refusal(here)
    assert "lm_head.weight, model.layers.2." in said and " and " in said
    say(here, num_hidden_layers=2, tie_word_embeddings=True)
    with tiny.no_bars():
        loading.causal_lm(here, None, torch.float32)  # what is tied is not missing


def test_weights_that_the_config_has_no_room_for_are_not_left_out(here: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    change(here, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert f"hold {name}, for which a LlamaForCausalLM" in refusal(here)


def test_what_belongs_to_no_layer_of_the_model_may_be_left_out(here: Path) -> None:
    # Vision towers, heads that predict further tokens, buffers of earlier versions.
    extra = {"model.visual.proj.weight": torch.ones(2, 2), "mtp.fc.weight": torch.ones(2, 2)}
    change(here, lambda tensors: tensors.update(extra))
    with tiny.no_bars():
        model = loading.causal_lm(here, None, torch.float32)
    assert not extra.keys() & model.state_dict().keys()


def test_other_shapes_than_the_config_says_are_a_sentence(here: Path) -> None:
    say(here, intermediate_size=16)
    assert "cannot be loaded" in refusal(here)


def test_damaged_files_are_a_sentence(here: Path) -> None:
    (here / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!")
    assert "SafetensorError" in refusal(here)
    (here / "config.json").write_text('{"model_type": "lla')
    assert "cannot be loaded" in refusal(here)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "nobody_knows_it"},
        {"model_type": "custom", "auto_map": {"AutoConfig": "configuration_custom.Config"}},
        {"model_type": "bert"},
        {"hidden_act": "no_such_function"},
        {"num_attention_heads": 3},
    ],
)
def test_a_config_that_transformers_cannot_use_is_a_sentence(
    here: Path, config: dict[str, Any]
) -> None:
    say(here, **config)
    assert str(here) in refusal(here)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "nobody_knows_it"},
        {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Config"}},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 3},
        {"intermediate_size": 16},
    ],
)
def test_a_run_of_such_a_model_ends_with_42(
    here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], config: dict[str, Any]
) -> None:
    say(here, **config)
    data = tmp_path / "d.jsonl"
    data.write_text("".join(f'{{"prompt": "{n} and 1?", "completion": "2"}}\n' for n in range(9)))
    line = [f"student={here}", f"teacher={here}", "data=local", f"data_path={data}", "quant=none"]
    line += ["student_dtype=float32", "teacher_dtype=float32", "mixed_precision=no", "threads=1"]
    line += ["max_length=64", "min_completion=4", "held_out_rows=1", "num_processes=1"]
    line += [f"runs={tmp_path}/runs", f"cache_dir={tmp_path}/cache"]
    assert entrypoints.train_main(line) == 42
    said = capfd.readouterr().err
    assert "ContractError" in said and "Traceback" not in said


def test_a_tokenizer_that_cannot_be_loaded_is_a_sentence(here: Path) -> None:
    (here / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ContractError, match="the tokenizer of .* cannot be loaded"):
        loading.tokenizer(here)
    for file in here.glob("*token*"):
        file.unlink()
    with pytest.raises(ContractError, match="the tokenizer of .* cannot be loaded"):
        loading.tokenizer(here)


def test_what_may_go_away_by_itself_is_no_mistake_of_the_user() -> None:
    for error in (MemoryError(), torch.OutOfMemoryError(), OSError(5, "Input/output error")):
        with pytest.raises(type(error)), loading.told("a model"):
            raise error
    for text, wanted in (("can't allocate memory", RuntimeError), ("size mismatch", ContractError)):
        with pytest.raises(wanted), loading.told("a model"):
            raise RuntimeError(text)


def test_the_families_whose_experts_peft_cannot_drop_out_are_those_it_converts() -> None:
    conversion: Any = importlib.import_module("peft.utils.transformers_weight_conversion")
    table = conversion._MODEL_TO_CONVERSION_PATTERN
    converted = {kind: base for kind, base in table.items() if base in compatibility.EXPERT_NAMES}
    named_by_class = {kind for kind in converted if kind[0].isupper()}
    assert {k: v for k, v in converted.items() if k not in named_by_class} | {
        "qwen2_moe": "qwen2_moe"
    } == compatibility.MOE
    for base, names in compatibility.EXPERT_NAMES.items():
        assert names == set(conversion._MOE_TARGET_MODULE_MAPPING[base])
