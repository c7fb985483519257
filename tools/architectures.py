"""Write docs/architectures.md: how the package handles each model architecture.

    python tools/architectures.py          writes docs/architectures.md, in some two minutes

Each is a random model of one or two layers, built from transformers' own class: the result depends
on an architecture's code and not on its weights. tests/test_architectures.py checks the table.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architectures.md"

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Not every config knows every size, and some derive one from others.
NO_HEAD_DIM = {"head_dim": None}
LATENT = {
    "head_dim": None, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


class Family(NamedTuple):
    """An architecture: transformers' name of it, models that people know, and its sizes."""

    kind: str
    known: str
    sizes: dict[str, Any] = {}
    of_text: dict[str, Any] | None = None  # sizes of the text config of a multimodal one


FAMILIES = [
    Family("llama", "Llama 2 to 3.3, SmolLM2, TinyLlama"),
    Family("mistral", "Mistral 7B, Mistral Nemo"),
    Family("ministral", "Ministral 8B"),
    Family("ministral3", "Ministral 3"),
    Family("qwen2", "Qwen 2, Qwen 2.5"),
    Family("qwen3", "Qwen 3"),
    Family("qwen3_5_text", "Qwen 3.5, its text part", {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }),
    Family("gemma", "Gemma 1"),
    Family("gemma2", "Gemma 2"),
    Family("gemma3_text", "Gemma 3 1B"),
    Family("gemma3", "Gemma 3 4B to 27B", {"vision_config": TOWER, "mm_tokens_per_image": 4}, {}),
    Family("gemma4_text", "Gemma 4, its text part", {
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 32, "global_head_dim": 8,
        "final_logit_softcapping": 30.0, "num_kv_shared_layers": 0,
    }),
    Family("vaultgemma", "VaultGemma"),
    Family("phi", "Phi 1 to 2"),
    Family("phi3", "Phi 3, Phi 4"),
    Family("granite", "Granite 3", {"logits_scaling": 8.0}),
    Family("granitemoehybrid", "Granite 4, its dense sizes", {
        **MAMBA, "logits_scaling": 6.0, "num_hidden_layers": 2, "num_local_experts": 0,
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64,
    }),
    Family("cohere", "Command R", {"logit_scale": 0.0625}),
    Family("cohere2", "Command R7B, Command A, Tiny Aya", {"logit_scale": 0.25}),
    Family("olmo", "OLMo"),
    Family("olmo2", "OLMo 2"),
    Family("olmo3", "OLMo 3"),
    Family("falcon", "Falcon 7B, without alibi", NO_HEAD_DIM),
    Family("falcon", "Falcon RW, with alibi", {**NO_HEAD_DIM, "alibi": True}),
    Family("falcon_h1", "Falcon H1", {**MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.02}),
    Family("gpt_neox", "Pythia, GPT-NeoX"),
    Family("gpt2", "GPT-2"),
    Family("gpt_neo", "GPT-Neo", {
        "num_layers": 1, "num_hidden_layers": None, "attention_types": [[["global"], 1]],
    }),
    Family("gptj", "GPT-J", {"rotary_dim": 8}),
    Family("codegen", "CodeGen", {"rotary_dim": 8}),
    Family("gpt_bigcode", "StarCoder"),
    Family("opt", "OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    Family("bloom", "BLOOM"),
    Family("mpt", "MPT"),
    Family("xglm", "XGLM", {"ffn_dim": 64}),
    Family("biogpt", "BioGPT"),
    Family("stablelm", "StableLM 2"),
    Family("nemotron", "Nemotron 4, Minitron"),
    Family("glm", "GLM 4 9B"),
    Family("glm4", "GLM 4 0414"),
    Family("smollm3", "SmolLM3"),
    Family("exaone4", "EXAONE 4"),
    Family("starcoder2", "StarCoder 2"),
    Family("arcee", "AFM 4.5B"),
    Family("helium", "Helium"),
    Family("lfm2", "LFM2", {
        "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"],
    }),
    Family("seed_oss", "Seed-OSS"),
    Family("hyperclovax", "HyperCLOVA X SEED", {"logits_scaling": 0.125}),
    Family("minicpm3", "MiniCPM 3", {**LATENT, "dim_model_base": 8}),
    Family("hunyuan_v1_dense", "Hunyuan 0.5B to 7B"),
    Family("ernie4_5", "ERNIE 4.5 0.3B"),
    Family("apertus", "Apertus"),
    Family("bitnet", "BitNet b1.58"),
    Family("cwm", "Code World Model"),
    Family("diffllama", "DiffLlama"),
    Family("doge", "Doge", {"num_key_value_heads": 4}),
    Family("jais2", "Jais 2"),
    Family("nanochat", "nanochat"),
    Family("persimmon", "Persimmon"),
    Family("internlm3", "InternLM 3"),
    Family("youtu", "Youtu-LLM", LATENT),
    Family("modernbert-decoder", "Ettin decoders"),
    Family("recurrent_gemma", "RecurrentGemma", {"num_hidden_layers": 3}),
    Family("mamba", "Mamba", {"time_step_rank": 32}),
    Family("openai-gpt", "GPT-1"),
    Family("mixtral", "Mixtral (a mixture)", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("granitemoe", "Granite 3 MoE (a mixture)", {
        "logits_scaling": 6.0, "num_local_experts": 4, "num_experts_per_tok": 2,
    }),
    Family("qwen3_moe", "Qwen 3 30B-A3B (a mixture)", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    }),
    Family("gpt_oss", "gpt-oss (a mixture)", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("bert", "BERT"),
]  # fmt: skip


def tiny(family: Family) -> Any:
    """A random model of this family, in float32 and eval mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SIZES, **family.sizes}
    if family.of_text is not None:
        sizes = {**family.sizes, "text_config": {**SIZES, **family.of_text}}
    known = {name: size for name, size in sizes.items() if size is not None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.kind, **known)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Row(NamedTuple):
    """How the package handles a family; the fields are the table's columns."""

    trains: str
    logits: str = "–"
    stored: str = "–"  # share of the decoder's matrices that int4 stores
    adapted: str = "–"  # the same of the layers that are adapted by default
    written: str = "–"  # who writes rollouts


def row(family: Family) -> Row:
    """The outcome of a family, from random models and the functions that a run uses."""
    from stillhouse.distill.head import head_of
    from stillhouse.errors import ContractError

    try:
        head = head_of(tiny(family))
    except ContractError as error:
        return Row(f"no: {_short(error)}")
    adapted, written = _adapted(family)
    return Row("yes", form_of(head), _stored(family), adapted, written)


def form_of(head: Any) -> str:
    """A head as a formula."""
    text = "W h" if head.bias_V is None else "W h + b"
    if head.scale != 1:
        text = f"{head.scale:.4g} × {text}"
    return text if head.cap is None else f"{text}, capped at {head.cap:g}"


def _stored(family: Family) -> str:
    from stillhouse.distill.layers import coverage
    from stillhouse.distill.quant import quantize_
    from stillhouse.errors import StillhouseError
    from stillhouse.spec import QuantSpec

    model = tiny(family)
    try:
        quantize_(model, QuantSpec(quant_type="int4", quant_group_size=32, double_quant=False))
    except StillhouseError as error:
        share = re.search(r"[\d.]+%", str(error))
        return f"refused: {share[0]}" if share else f"refused: {_short(error)}"
    return f"{coverage(model).quantised_share:.0%}"


def _adapted(family: Family) -> tuple[str, str]:
    """The share that is adapted, of a student without a quantiser, and who writes its rollouts."""
    from stillhouse.distill.adapters import new_student
    from stillhouse.distill.decode import FusedLlama
    from stillhouse.distill.engine import Engine
    from stillhouse.distill.layers import coverage
    from stillhouse.errors import StillhouseError
    from stillhouse.spec import LoraSpec

    named = ""
    train = yaml.safe_load((ROOT / "conf" / "train.yaml").read_text())
    targets: list[str] = train["lora"]["target_modules"]
    while True:
        lora = LoraSpec(lora_r=8, lora_alpha=16, lora_dropout=0.0, target_modules=tuple(targets))
        try:
            student = new_student(tiny(family), lora, seed=0)
            break
        except StillhouseError as error:
            told = re.search(r"Set target_modules=\[([^\]]+)\]", str(error))
            if told is None or named:
                return f"refused{named}: {_short(error)}", "–"
            named, targets = f" with `target_modules=[{told[1]}]`", told[1].split(",")
    engine = Engine(student.eval())
    engine.refold()
    writer = "`generate`" if engine.form is None else "folded copy"
    if isinstance(engine.form, FusedLlama):
        writer = "fused forms"
    return f"{coverage(student).adapted_share:.0%}{named}", writer


def _short(error: Exception) -> str:
    """A sentence's first part, without the name of the class, which the row gives."""
    return re.split(r"[;:(]", str(error).partition(" ")[2])[0].strip()


def page(rows: Mapping[str, Row]) -> str:
    """The whole of docs/architectures.md, of rows by what `label` says."""
    lines = [f"| {label} | {' | '.join(row)} |" for label, row in rows.items()]
    made_with = f"transformers {version('transformers')} and peft {version('peft')}"
    return f"""# Architectures

Made by `python tools/architectures.py` with {made_with}; edit that.
Each row is a random model of one or two layers: what decides is an architecture's code, not its
weights. `tests/test_architectures.py` holds them: the log-probabilities of the loss, of a batch
that is padded on the left, are those of the model's own logits to 1e-5 in float32. Your model is
asked the same when it is loaded ([why](decisions/0007-logits-are-proven.md)). An architecture that
is not here trains if it passes, and is refused with the difference if not.

- **Logits**: what becomes of the last hidden state h, solved from what the model answers. W is the
  head, b its bias.
- **int4**: the share of the text decoder's matrix weights that `quant=int4` stores in 4 bits. A
  student of less than 95 % is refused.
- **LoRA**: the share that the default `target_modules` adapt; where they do not fit, those that the
  refusal names.
- **Rollouts**: who writes them, for a student in float32.

| Family | Model type | Trains | Logits | int4 | LoRA | Rollouts |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def label(family: Family) -> str:
    """A row's first two columns."""
    return f"{family.known} | `{family.kind}`"


def main() -> None:
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page({label(family): row(family) for family in FAMILIES}), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(FAMILIES)} architectures")


if __name__ == "__main__":
    main()
