#!/usr/bin/env bash
# A chat template that loops over content parts drops a message whose content is a string, without an error.
#
# Expected: {"role": "user", "content": "hello"} is rendered, or the template's mismatch is an error.
# Happens: Jinja loops over the letters, "h".type is undefined, no branch is taken: the turn stays, its text is gone.
# Versions: transformers 5.23.0, tokenizers 0.23.3, jinja2 3.1.6.
# Matters: every prompt of a data set becomes the same one; loss falls and evaluation runs, on empty questions.
# Do: render one message with a marker word and look for it; or wrap strings as [{"type": "text", "text": ...}].
#
# Seen on 2026-11-30:
#   transformers 5.23.0, tokenizers 0.23.3, jinja2 3.1.6
#   content as parts:  <user>hello</user>
#   content as string: <user></user>
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
import warnings

import jinja2
import tokenizers
import transformers
from tokenizers import Tokenizer, models

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, jinja2 {jinja2.__version__}")
words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
tokenizer.chat_template = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "</{{ m.role }}>{% endfor %}"
)


def render(content):
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


with warnings.catch_warnings():
    warnings.simplefilter("error")
    parts, string = render([{"type": "text", "text": "hello"}]), render("hello")
print("content as parts: ", parts)
print("content as string:", string)
assert parts == "<user>hello</user>", parts
assert string == "<user></user>", string
EOF
