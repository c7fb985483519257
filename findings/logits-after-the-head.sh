#!/usr/bin/env bash
# In many model families of transformers the logits are not last_hidden_state @ lm_head.weight.T.
#
# Expected: the output embeddings' weight, times the base model's last hidden state, gives model(...).logits.
# Happens: Granite divides by logits_scaling, Cohere multiplies by logit_scale, Gemma 2 caps with a tanh, Phi's head
#   has a bias, Falcon-H1 multiplies by lm_head_multiplier. Each model does it in its own forward, after the head.
# Versions: transformers 5.23.0, torch 2.13.0; tiny random models with scales as in published configs.
# Matters: fused or chunked losses that take hidden states and the head's weight compute another distribution,
#   with no error: a softmax at another temperature is still a softmax.
# Do: compare the loss's log-probabilities with model(...).logits once, on a few tokens, before training.
#
# Seen on 2026-11-30:
#   transformers 5.23.0, torch 2.13.0+cu130
#   llama: up to 0.0e+00 nats
#   granite: up to 4.8e+00 nats
#   cohere: up to 5.1e+00 nats
#   gemma2: up to 2.2e-01 nats
#   phi: up to 7.5e-01 nats
#   falcon_h1: up to 7.1e+00 nats
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
pins=('transformers==5.23.0' 'torch==2.13.0' 'numpy==2.4.6')
if command -v uv >/dev/null; then
  uv venv --quiet venv && uv pip install --quiet --python venv/bin/python "${pins[@]}"
else
  python3 -m venv venv && venv/bin/python -m pip install --quiet "${pins[@]}"
fi

venv/bin/python - <<'EOF'
import torch
import transformers
from transformers import CohereConfig, FalconH1Config, Gemma2Config, GraniteConfig, LlamaConfig, PhiConfig

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
transformers.logging.set_verbosity_error()
same = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
configs = [
    LlamaConfig(**same),
    GraniteConfig(**same, logits_scaling=8.0),
    CohereConfig(**same, logit_scale=0.0625),
    Gemma2Config(**same, head_dim=8, final_logit_softcapping=30.0),
    PhiConfig(**same),
    FalconH1Config(**same, lm_head_multiplier=0.0195, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16,
                   mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8),
]
ids = torch.arange(3, 11)[None]
worst = {}
for config in configs:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:  # zero in a fresh model, not in a trained one
        torch.nn.init.normal_(head.bias, std=0.3)
    with torch.no_grad():
        own = model(ids).logits.log_softmax(-1)
        product = (model.base_model(ids).last_hidden_state @ head.weight.T).log_softmax(-1)
    worst[config.model_type] = (own - product).abs().max().item()
    print(f"{config.model_type}: up to {worst[config.model_type]:.1e} nats")
assert worst.pop("llama") < 1e-5
assert min(worst.values()) > 0.01, worst
EOF
