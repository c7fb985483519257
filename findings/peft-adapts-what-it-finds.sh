#!/usr/bin/env bash
# peft adapts the part of target_modules that it finds, and says nothing of the rest.
#
# Expected: LoraConfig(target_modules=[...]) with names that the model does not have is an error or a warning.
# Happens: one name that matches is enough. On Phi-3, which fuses q, k, v into qkv_proj and gate, up into
#   gate_up_proj, the usual seven Llama names adapt o_proj and down_proj alone.
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# Matters: the run trains, saves and scores as "LoRA on all linear layers", with most of them frozen.
# Do: use target_modules="all-linear", or compare model.targeted_module_names with the names asked for.
#
# Seen on 2026-11-30:
#   peft 0.21.2, transformers 5.23.0, torch 2.13.0+cu130
#   asked for 7 names, adapted ['down_proj', 'o_proj']: 30% of the linear weights; 0 warnings about it
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
pins=('transformers==5.23.0' 'torch==2.13.0' 'numpy==2.4.6' 'peft==0.21.2')
if command -v uv >/dev/null; then
  uv venv --quiet venv && uv pip install --quiet --python venv/bin/python "${pins[@]}"
else
  python3 -m venv venv && venv/bin/python -m pip install --quiet "${pins[@]}"
fi

venv/bin/python - <<'EOF'
import warnings

import peft
import torch
import transformers

print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
asked = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
config = transformers.Phi3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
base = transformers.Phi3ForCausalLM(config)
sizes = {name: layer.weight.numel() for name, layer in base.model.named_modules()
         if isinstance(layer, torch.nn.Linear)}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=asked))
adapted = {name.rsplit(".")[-1] for name in model.targeted_module_names}
about_names = [str(w.message) for w in said if "target" in str(w.message) or "_proj" in str(w.message)]
share = sum(n for name, n in sizes.items() if name.rsplit(".")[-1] in adapted) / sum(sizes.values())
print(f"asked for {len(asked)} names, adapted {sorted(adapted)}: {share:.0%} of the linear weights; "
      f"{len(about_names)} warnings about it")
assert adapted == {"o_proj", "down_proj"}, adapted
assert not about_names, about_names
EOF
