#!/usr/bin/env bash
# RecurrentGemma in transformers reads left padding, whatever attention_mask and position_ids say.
#
# Expected: a row gives the same log-probabilities alone and left-padded with a mask; generate pads on the left.
# Happens: the convolution and the recurrence of the recurrent blocks take no mask, so pad tokens get in. Llama
#   agrees to 1e-6 on the same rows; RecurrentGemma is off by tenths of a nat, inside generate too.
# Versions: transformers 5.23.0, torch 2.13.0; a tiny model with random weights, the pad's embedding among them.
# Matters: scores and generated text depend on which rows share a batch.
# Do: batch only rows of one length, or pad on the right and read logits at each row's own last token.
#
# Seen on 2026-11-30:
#   transformers 5.23.0, torch 2.13.0+cu130
#   llama: forward differs by up to 4.8e-07 nats, generate's first token by 4.8e-07
#   recurrent_gemma: forward differs by up to 1.0e+00 nats, generate's first token by 2.8e-01
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
from transformers import LlamaConfig, LlamaForCausalLM, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
transformers.logging.set_verbosity_error()
same = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            pad_token_id=0, bos_token_id=1, eos_token_id=2)
models = [
    LlamaForCausalLM(LlamaConfig(**same)),
    RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**same, lru_width=32, head_dim=16, attention_window_size=16)),
]
row = torch.arange(3, 11)[None]
ones = torch.ones_like(row)
padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), row], 1)
mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), ones], 1)
positions = (mask.cumsum(1) - 1).clamp(min=0)
worst = {}
for model in models:
    torch.manual_seed(0)
    for weight in model.eval().parameters():
        torch.nn.init.normal_(weight, std=0.2)
    with torch.no_grad():
        alone = model(row, attention_mask=ones).logits.log_softmax(-1)
        beside = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:].log_softmax(-1)
        tail = model(torch.cat([row, row[:, :4] * 0], 1)).logits[:, :8].log_softmax(-1)  # right padding, for contrast
        ask = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        short = model.generate(row, attention_mask=ones, **ask).logits[0].log_softmax(-1)
        long = model.generate(padded, attention_mask=mask, **ask).logits[0].log_softmax(-1)
    assert (alone - tail).abs().max() < 1e-5, "right padding is read too"
    worst[model.config.model_type] = (alone - beside).abs().max().item(), (short - long).abs().max().item()
for name, (forward, generate) in worst.items():
    print(f"{name}: forward differs by up to {forward:.1e} nats, generate's first token by {generate:.1e}")
assert max(worst["llama"]) < 1e-5, worst
assert min(worst["recurrent_gemma"]) > 0.01, worst
EOF
