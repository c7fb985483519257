#!/usr/bin/env bash
# lm-eval's rolling log-likelihood starts a text with two BOS, and counts the second as part of the text.
#
# Expected: with a tokenizer that writes BOS itself (Llama's, Gemma's), a text is conditioned on one BOS, and its
#   log-likelihood is that of its own tokens. loglikelihood with an empty context does that.
# Happens: loglikelihood_rolling (wikitext and every other perplexity task) puts its prefix token before tokens that
#   begin with BOS: the model reads BOS BOS, log p(BOS | BOS) is added, and all else is conditioned on both.
# Versions: lm_eval 0.4.13, transformers 5.23.0, torch 2.13.0; a model of drawn weights.
# Matters: word, byte and bit perplexities are of another text, and differ between tokenizers that write BOS and others.
# Do: pass add_bos_token=False to HFLM for perplexity tasks, and look at the ids that reach the model.
#
# Seen on 2026-11-30:
#   lm_eval 0.4.13, transformers 5.23.0, torch 2.13.0+cu130
#   rolling reads [1, 1, 3, 4, 5]: -29.006 nats; loglikelihood reads [1, 3, 4, 5]: -29.214
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
pins=('lm_eval==0.4.13' 'transformers==5.23.0' 'torch==2.13.0' 'numpy==2.4.6' 'accelerate==1.15.0' 'peft==0.21.2')
if command -v uv >/dev/null; then
  uv venv --quiet venv && uv pip install --quiet --python venv/bin/python "${pins[@]}"
else
  python3 -m venv venv && venv/bin/python -m pip install --quiet "${pins[@]}"
fi

venv/bin/python - 2>/dev/null <<'EOF'
import importlib.metadata as metadata
import logging

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors

print(f"lm_eval {metadata.version('lm_eval')}, transformers {transformers.__version__}, torch {torch.__version__}")
logging.disable(logging.WARNING)
words = ["<pad>", "<s>", "</s>", *"abcdefgh"]
rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
rules.pre_tokenizer = pre_tokenizers.Whitespace()
rules.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=rules, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.5,
)).eval()
fed = []
model.register_forward_pre_hook(
    lambda module, args, kwargs: fed.append((args[0] if args else kwargs["input_ids"])[0].tolist()), with_kwargs=True
)
lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=32)
(rolling,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a b c d",), 0)], disable_tqdm=True)
read = fed[-1]
((plain, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("", "a b c d"), 0)], disable_tqdm=True)
print(f"rolling reads {read}: {rolling:.3f} nats; loglikelihood reads {fed[-1]}: {plain:.3f}")
assert read == [1, 1, 3, 4, 5], read
assert fed[-1] == [1, 3, 4, 5], fed[-1]
with torch.no_grad():
    log_p = model(torch.tensor([[1, 1, 3, 4, 5]])).logits[0].log_softmax(-1)
with_second = sum(log_p[i, token].item() for i, token in enumerate([1, 3, 4, 5, 6]))
assert abs(rolling - with_second) < 1e-4, (rolling, with_second)
assert abs(rolling - plain) > 0.1, (rolling, plain)
EOF
