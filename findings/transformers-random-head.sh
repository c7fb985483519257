#!/usr/bin/env bash
# transformers fills a weight that the checkpoint lacks with random numbers, and goes on.
#
# Expected: from_pretrained refuses an untied causal LM whose checkpoint has no lm_head.weight.
# Happens: it draws a new head, logs a table ("MISSING"), and returns the model. Two loads differ.
# Versions: transformers 5.23.0, torch 2.13.0, safetensors 0.8.0.
# Matters: a teacher with a random head gives a finite loss and a plausible curve; logs are often turned off.
# Do: load with output_loading_info=True and refuse a model whose missing_keys is not empty.
#
# Seen on 2026-11-30:
#   transformers 5.23.0, torch 2.13.0+cu130, safetensors 0.8.0
#   two loads of one folder differ by up to 0.52 nats; missing_keys: {'lm_head.weight'}
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
pins=('transformers==5.23.0' 'torch==2.13.0' 'numpy==2.4.6' 'safetensors==0.8.0')
if command -v uv >/dev/null; then
  uv venv --quiet venv && uv pip install --quiet --python venv/bin/python "${pins[@]}"
else
  python3 -m venv venv && venv/bin/python -m pip install --quiet "${pins[@]}"
fi

venv/bin/python - <<'EOF'
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file

print(f"transformers {transformers.__version__}, torch {torch.__version__}, safetensors {safetensors.__version__}")
transformers.logging.set_verbosity_warning()
transformers.logging.disable_progress_bar()
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)
transformers.LlamaForCausalLM(config).save_pretrained("model")
weights = load_file("model/model.safetensors")
del weights["lm_head.weight"]
save_file(weights, "model/model.safetensors", metadata={"format": "pt"})

first, info = transformers.AutoModelForCausalLM.from_pretrained("model", output_loading_info=True)
second = transformers.AutoModelForCausalLM.from_pretrained("model")
ids = torch.arange(3, 11)[None]
with torch.no_grad():
    nats = (first(ids).logits.log_softmax(-1) - second(ids).logits.log_softmax(-1)).abs().max().item()
print(f"two loads of one folder differ by up to {nats:.2f} nats; missing_keys: {set(info['missing_keys'])}")
assert nats > 0.01, nats
assert set(info["missing_keys"]) == {"lm_head.weight"}, info
EOF
