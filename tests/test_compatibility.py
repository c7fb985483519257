"""Test that pairs whose models, data or settings do not fit are refused, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillhouse import cli, compatibility, model_files
from stillhouse.compose import compose, from_command_line
from stillhouse.errors import ConfigError, ContractError
from stillhouse.spec import TrainSpec
from stillhouse.weights_file import INDEX, WHOLE, header_of, parameters, tensors_of

Shapes = dict[str, list[int]]
# A Llama of one layer, as far as its files tell: 8 tokens, 4 wide, head and embedding apart.
SHAPES: Shapes = {"model.embed_tokens.weight": [8, 4], "lm_head.weight": [8, 4]}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": 7,
}
WORDS = {f"w{number}": number for number in range(8)}


def write_tensors(file: Path, shapes: Shapes, dtype: str = "F32", cut: int = 0) -> None:
    """A safetensors file by hand: the length of the header, the header, zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    said = json.dumps(header).encode()
    file.write_bytes((len(said).to_bytes(8, "little") + said + bytes(end))[: -cut or None])


def model(
    into: Path,
    shapes: Shapes | None = None,
    words: dict[str, int] | None = None,
    added: dict[str, int] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    dtype: str = "F32",
    **config: Any,
) -> Path:
    """A model directory, written by hand; None takes a line out of the config."""
    into.mkdir(parents=True, exist_ok=True)
    whole = {key: value for key, value in (CONFIG | config).items() if value is not None}
    (into / "config.json").write_text(json.dumps(whole))
    tokens = [{"id": id_, "content": token} for token, id_ in (added or {}).items()]
    vocabulary = {"type": "BPE", "vocab": WORDS if words is None else words}
    said = {"model": vocabulary, "added_tokens": tokens}
    (into / "tokenizer.json").write_text(json.dumps(said))
    (into / "tokenizer_config.json").write_text(json.dumps(tokenizer_config or {}))
    write_tensors(into / WHOLE, SHAPES if shapes is None else shapes, dtype)
    return into


def spec(directory: Path, *words: str) -> TrainSpec:
    line = ["pair=qwen3_4b_self", f"student={directory}", f"teacher={directory}", "data=local"]
    line += ["data_path=none.jsonl", "vocab_size=null", "max_length=64", "min_completion=8"]
    line += ["max_new_tokens=32", "overlap_k=4", "lora_dropout=0", *words]
    return compose(from_command_line(line, TrainSpec), TrainSpec)


def refusal(directory: Path, *words: str) -> str:
    """What is said of a pair of this model and itself; '' where it fits."""
    try:
        compatibility.check([spec(directory, *words)])
    except (ConfigError, ContractError) as error:
        assert error.exit_code == 42
        assert str(directory) in str(error) and "pair qwen3_4b_self: student" in str(error)
        return str(error)
    return ""


# ---------------------------------------------------------------- files


def test_the_header_of_a_weights_file_is_read_without_its_weights(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": [2, 3], "b": []})
    found = header_of(tmp_path / "x.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F32", ()),
    }
    assert parameters(found) == 2 * 3 + 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        (10**12).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{",
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a": {}}',
        (7).to_bytes(8, "little") + b'{"a":1}',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ],
)
def test_a_file_that_is_no_safetensors_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / WHOLE
    file.write_bytes(content)
    with pytest.raises(ContractError, match="no whole safetensors file"):
        header_of(file)


def test_a_file_that_was_cut_short_is_a_sentence(tmp_path: Path) -> None:
    write_tensors(tmp_path / WHOLE, {"a": [4]}, cut=1)
    with pytest.raises(ContractError, match="cut short"):
        header_of(tmp_path / WHOLE)


def test_an_index_is_held_against_its_shards(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one.safetensors", {"a": [2]})
    places = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ContractError, match=r"has no two\.safetensors, which .* names"):
        tensors_of(tmp_path)
    write_tensors(tmp_path / "two.safetensors", {"c": [2]})
    with pytest.raises(ContractError, match="holds no b, which .* promises"):
        tensors_of(tmp_path)
    write_tensors(tmp_path / "two.safetensors", {"b": [3]})
    assert {n: t.shape for n, t in tensors_of(tmp_path).items()} == {"a": (2,), "b": (3,)}
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ContractError, match="not JSON"):
        tensors_of(tmp_path)


def test_pickled_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="what is needed is its weights"):
        tensors_of(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ContractError, match=r"pickled \(pytorch_model.bin\)"):
        tensors_of(tmp_path)


# ---------------------------------------------------------------- halves of one model


def test_a_model_whose_halves_fit_is_not_refused(tmp_path: Path) -> None:
    assert refusal(model(tmp_path / "m")) == ""


def test_a_torn_config_is_a_sentence(tmp_path: Path) -> None:
    here = model(tmp_path / "m")
    for text in ('{"model_type": "lla', "[]", ""):
        (here / "config.json").write_text(text)
        assert "JSON" in refusal(here)
    (here / "config.json").unlink()
    assert "config.json: no such file" in refusal(here)


def test_a_vocabulary_beyond_the_embedding_is_refused_with_both_numbers(tmp_path: Path) -> None:
    said = refusal(model(tmp_path / "m", words=WORDS | {"w8": 8, "w9": 9}))
    assert "largest token id is 9" in said
    assert "model.embed_tokens.weight has 8 rows, so ids end at 7: 'w8' (8), 'w9' (9)" in said


def test_a_unigram_vocabulary_is_counted(tmp_path: Path) -> None:
    here = model(tmp_path / "m")
    pieces = [[f"w{number}", -1.0] for number in range(9)]
    (here / "tokenizer.json").write_text(json.dumps({"model": {"vocab": pieces}}))
    assert "largest token id is 8" in refusal(here)


@pytest.mark.parametrize("place", ["eos", "pad", "template", "jinja", "data", "special"])
def test_an_added_token_beyond_the_embedding_is_refused_where_it_is_used(
    tmp_path: Path, place: str
) -> None:
    here = model(tmp_path / "m", added={"<|tool|>": 8})
    assert refusal(here) == ""  # nobody uses it: Gemma 3's text models have such a one
    words: dict[str, Any] = {}
    data = tmp_path / "d.jsonl"
    if place in ("eos", "pad"):
        words = {f"{place}_token": {"content": "<|tool|>"} if place == "pad" else "<|tool|>"}
    elif place == "template":
        words = {"chat_template": "{% for m in messages %}<|tool|>{% endfor %}"}
    elif place == "jinja":
        (here / "chat_template.jinja").write_text("<|tool|>")
    elif place == "special":
        (here / "special_tokens_map.json").write_text('{"pad_token": "<|tool|>"}')
    else:
        data.write_text('{"prompt": "use <|tool|>"}\n')
    (here / "tokenizer_config.json").write_text(json.dumps(words))
    assert "'<|tool|>' (8) would be read" in refusal(here, f"data_path={data}")


def test_tokens_that_only_tokenizer_config_adds_are_counted(tmp_path: Path) -> None:
    added = {"added_tokens_decoder": {"9": {"content": "<pad>"}}, "pad_token": "<pad>"}
    assert "'<pad>' (9)" in refusal(model(tmp_path / "m", tokenizer_config=added))


def test_the_ids_of_data_are_held_against_the_embedding(tmp_path: Path) -> None:
    found = model_files.read(model(tmp_path / "m", added={"<|tool|>": 8}))
    compatibility.check_ids(7, found, "student m")
    with pytest.raises(ContractError, match=r"token id 8 \('<\|tool\|>'\).* has 8 rows"):
        compatibility.check_ids(8, found, "student m")


def test_what_prepare_noted_of_the_data_is_read_by_whoever_plans(tmp_path: Path) -> None:
    here = model(tmp_path / "m", added={"<|tool|>": 8})
    data = tmp_path / "d.jsonl"
    # Spelled so that only a JSON reader sees the token: the text alone does not tell.
    data.write_text('{"prompt": "use <|to\\u006fl|>"}\n')
    line = [f"data_path={data}", f"cache_dir={tmp_path}/cache"]
    assert refusal(here, *line) == ""
    compatibility.note_largest_id(spec(here, *line), 8)
    assert "the data holds token id 8 ('<|tool|>')" in refusal(here, *line)
    assert refusal(here, *line, "max_length=65") == "", "other limits keep other rows"
    data.write_text('{"prompt": "use nothing"}\n')
    assert refusal(here, *line) == "", "other rows"


def test_plan_refuses_models_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = model(tmp_path / "m", vocab_size=9)
    words = ["pair=qwen3_4b_self", f"student={here}", f"teacher={here}", f"runs={tmp_path}/runs"]
    for verb in ("plan", "run"):
        assert cli.main([verb, *words, "lmbda=0,1"]) == 42
        assert "vocab_size 9" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_where_an_answer_ends_must_be_said_somewhere(tmp_path: Path) -> None:
    here = model(tmp_path / "m", eos_token_id=None)
    assert "nothing says where an answer ends" in refusal(here)
    (here / "generation_config.json").write_text('{"eos_token_id": [7]}')
    assert refusal(here) == ""
    (here / "generation_config.json").unlink()
    (here / "tokenizer_config.json").write_text('{"eos_token": "w7"}')
    assert refusal(here) == ""
    (here / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}<|end|>"}')
    assert refusal(here) == ""  # a template may tell; who renders it finds out


def test_config_and_weights_must_be_of_one_checkpoint(tmp_path: Path) -> None:
    assert "vocab_size 9, model.embed_tokens.weight has 8 rows" in refusal(
        model(tmp_path / "a", vocab_size=9)
    )
    assert "hidden_size 6, model.embed_tokens.weight is 4 wide" in refusal(
        model(tmp_path / "b", hidden_size=6)
    )


def test_an_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    alone = {"model.embed_tokens.weight": [8, 4]}
    assert "no file holds a head" in refusal(model(tmp_path / "a", alone))
    assert refusal(model(tmp_path / "b", alone, tie_word_embeddings=True)) == ""
    other = alone | {"transformer.output_layer.weight": [8, 4]}
    assert refusal(model(tmp_path / "c", other)) == ""


def test_a_multimodal_config_is_read_where_it_is_about_text(tmp_path: Path) -> None:
    text = {"vocab_size": 9, "hidden_size": 4, "eos_token_id": 7}
    here = model(tmp_path / "m", vocab_size=100, text_config=text)
    assert "vocab_size 9" in refusal(here)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "stored by gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "stored by fp8"),
        ({"is_encoder_decoder": True}, "encoder with a decoder"),
        ({"architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "ForSequenceClassification"),
    ],
)
def test_other_kinds_of_checkpoints_are_refused(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    assert words in refusal(model(tmp_path / "m", **config))


def test_weights_of_another_kind_of_number_are_refused(tmp_path: Path) -> None:
    assert "stored as F8_E4M3" in refusal(model(tmp_path / "m", dtype="F8_E4M3"))


# ---------------------------------------------------------------- knobs


def test_positions_are_counted_with_the_numbers(tmp_path: Path) -> None:
    here = model(tmp_path / "m")
    # A prompt of 232 - 8 tokens and 32 new ones fill 256 positions; one more does not fit.
    assert refusal(here, "max_length=232") == ""
    said = refusal(here, "max_length=233")
    assert "256 positions" in said and "max_length 233" in said and "257" in said
    assert "max_length=232 or less" in said
    for key in ("rope_scaling", "rope_parameters"):
        yarn: dict[str, Any] = {key: {"rope_type": "yarn", "factor": 4.0}}
        longer = model(tmp_path / key, **yarn)
        assert refusal(longer, "max_length=233") == ""
    same = model(tmp_path / "same", rope_parameters={"rope_type": "default"})
    assert refusal(same, "max_length=233") != ""
    learned = model(tmp_path / "gpt2", max_position_embeddings=None, n_positions=64)
    assert "64 positions" in refusal(learned)


def test_names_that_mean_experts_are_refused_with_those_that_are_left(tmp_path: Path) -> None:
    here = model(tmp_path / "m", model_type="qwen3_moe")
    for dropout in ("lora_dropout=0", "lora_dropout=0.05"):
        said = refusal(here, dropout)
        assert "PEFT takes down_proj, gate_proj, up_proj of qwen3_moe" in said
        assert "target_modules=[q_proj,k_proj,v_proj,o_proj]" in said
        assert refusal(here, dropout, "target_modules=[q_proj]") == ""
        assert refusal(model(tmp_path / "dense"), dropout) == ""


def test_a_top_k_beyond_the_head_is_refused(tmp_path: Path) -> None:
    here = model(tmp_path / "m")
    assert "overlap_k 16 is above its 8 tokens" in refusal(here, "overlap_k=16")
    assert refusal(here, "overlap_k=16", "overlap_steps=0") == ""


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    here = model(tmp_path / "m")
    assert refusal(here) == ""
    model(here, vocab_size=9)
    assert "vocab_size 9" in refusal(here)


def test_a_run_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    here = model(tmp_path / "m", vocab_size=9)
    words = ["pair=qwen3_4b_self", f"student={here}", f"teacher={here}", f"runs={tmp_path}/runs"]
    code = (
        "import sys; from stillhouse.entrypoints import train_main;"
        f" code = train_main({words!r}); sys.exit(99 if 'torch' in sys.modules else code)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 42, ended
    assert "vocab_size 9" in ended.stderr and "Traceback" not in ended.stderr
