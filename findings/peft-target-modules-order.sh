#!/usr/bin/env bash
# peft writes target_modules of adapter_config.json in the order of Python's string hashes.
#
# Expected: saving one adapter twice gives the same adapter_config.json.
# Happens: target_modules is kept as a set and written as a list in set order, which PYTHONHASHSEED decides. Two
#   processes write two files.
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# Matters: digests of an adapter's folder, caches and version control see a change where there is none.
# Do: sort target_modules in the file after saving, or compare the parsed configs with the lists as sets.
#
# Seen on 2026-11-30:
#   peft 0.21.2, transformers 5.23.0, torch 2.13.0+cu130
#   seed 1: q_proj o_proj up_proj down_proj k_proj gate_proj v_proj
#   seed 2: k_proj o_proj up_proj q_proj v_proj down_proj gate_proj
#   weights are the same bytes: True
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

cat >save.py <<'EOF'
import sys

import peft
import torch
import transformers

print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=names))
model.save_pretrained(sys.argv[1])
EOF
PYTHONHASHSEED=1 venv/bin/python save.py one
PYTHONHASHSEED=2 venv/bin/python save.py two
venv/bin/python - <<'EOF'
import json
from pathlib import Path

one, two = (json.loads(Path(name, "adapter_config.json").read_text()) for name in ("one", "two"))
print("seed 1:", *one["target_modules"])
print("seed 2:", *two["target_modules"])
weights = [Path(name, "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
print("weights are the same bytes:", weights[0] == weights[1])
assert one["target_modules"] != two["target_modules"]
assert one | {"target_modules": 0} == two | {"target_modules": 0}
assert sorted(one["target_modules"]) == sorted(two["target_modules"])
EOF
