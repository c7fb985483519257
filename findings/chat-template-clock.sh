#!/usr/bin/env bash
# A caller cannot hand transformers' chat templates a clock: strftime_now=... becomes a string.
#
# Expected: apply_chat_template(..., strftime_now=f) replaces the template's clock, as any other keyword does.
# Happens: keywords are rebuilt out of plain JSON types, so f arrives as "<function>" and the template's call of
#   it ends in "TypeError: 'str' object is not callable". Without it, the prompt holds the day of the run.
# Versions: transformers 5.23.0, tokenizers 0.23.3, jinja2 3.1.6.
# Matters: templates that write "Today Date" give other tokens, caches and scores tomorrow.
# Do: where the template takes a date (date_string), pass it; else put a Jinja macro of that name before it.
#
# Seen on 2026-11-30:
#   transformers 5.23.0, tokenizers 0.23.3, jinja2 3.1.6
#   plain template: Today: (the day of the run). hello
#   with strftime_now=f: TypeError: 'str' object is not callable
#   what the template sees: <function>
#   with a macro before it: Today: 2026-01-01. hello
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf" CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
pins=('transformers==5.23.0' 'tokenizers==0.23.3' 'jinja2==3.1.6')
if command -v uv >/dev/null; then
  uv venv --quiet venv && uv pip install --quiet --python venv/bin/python "${pins[@]}"
else
  python3 -m venv venv && venv/bin/python -m pip install --quiet "${pins[@]}"
fi

venv/bin/python - <<'EOF'
from datetime import datetime

import jinja2
import tokenizers
import transformers
from tokenizers import Tokenizer, models

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, jinja2 {jinja2.__version__}")
words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
template = "Today: {{ strftime_now('%Y-%m-%d') }}.{% for m in messages %} {{ m.content }}{% endfor %}"
chat = [{"role": "user", "content": "hello"}]


def render(template, **words):
    return tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **words)


days = {f"{datetime.now():%Y-%m-%d}"}
plain = render(template)
days.add(f"{datetime.now():%Y-%m-%d}")  # around midnight there are two
print("plain template:", plain.replace(plain[7:17], "(the day of the run)"))
assert plain[7:17] in days, plain
try:
    said = render(template, strftime_now=lambda form: "2026-01-01")
except TypeError as error:
    said = f"TypeError: {error}"
print("with strftime_now=f:", said)
assert said == "TypeError: 'str' object is not callable", said
seen = render("{{ strftime_now }}", strftime_now=lambda form: "2026-01-01")
print("what the template sees:", seen)
assert seen == "<function>", seen
fixed = render("{% macro strftime_now(form) %}2026-01-01{% endmacro %}" + template)
print("with a macro before it:", fixed)
assert fixed == "Today: 2026-01-01. hello", fixed
EOF
