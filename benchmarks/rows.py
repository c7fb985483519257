"""Time the encoding of a data set, and a second load that finds it encoded.

    python benchmarks/rows.py        prints a Markdown table

The data set has 100,000 conversations of 200 tokens in a jsonl file, a byte-level BPE tokenizer of
8,000 tokens trained here on the same words, and a ChatML template. Each number is of a separate
process: one encodes, one finds the encoded rows of the first, one has no data at all.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS, TOKENS = 100_000, 200
FIRST_LIMIT_S, SECOND_LIMIT_S, MEMORY_LIMIT_MB = 60, 2, 500
VOCABULARY = 8000
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(folder: Path) -> None:
    """A tokenizer's directory and a file of rows that have TOKENS tokens on average."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(20_000)]
    # A few words are common and most are rare, as in any language.
    weights = [1 / (rank + 10) for rank in range(len(words))]
    text = [" ".join(rng.choices(words, weights, k=100)) for _ in range(2000)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text, VOCABULARY, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    # Ten tokens are the template's, of the rest a third is the question.
    per_word = sum(map(len, tokenizer(text)["input_ids"])) / sum(len(t.split()) for t in text)
    count = round((TOKENS - 10) / per_word)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(ROWS):
            said = rng.choices(words, weights, k=count)
            turns = {"user": said[: count // 3], "assistant": said[count // 3 :]}
            messages = [{"role": role, "content": " ".join(t)} for role, t in turns.items()]
            file.write(json.dumps({"messages": messages}) + "\n")


def child(folder: Path, has_data: bool) -> None:
    """Prints seconds of loading, also CPU, peak memory in MB, rows and tokens of this process."""
    from transformers import AutoTokenizer

    from stillhouse.distill.chat import Chat
    from stillhouse.distill.encoder import Context
    from stillhouse.distill.pairs import PreparedPair
    from stillhouse.distill.prompts import load_prompts
    from stillhouse.spec import DataSpec

    data = DataSpec(
        data_name="rows", data_source="local", data_path=str(folder / "rows.jsonl"),
        data_split="train", prompt_template=None, chat_template_kwargs={},
        template_date="2026-01-01", max_length=1024, min_completion=8, max_rows=None,
        held_out_rows=256,
    )  # fmt: skip
    chat = Chat(AutoTokenizer.from_pretrained(folder / "tokenizer"), data)
    nothing = PreparedPair("student", "teacher", None, None, folder, {})
    seconds, cpu, rows, tokens = 0.0, 0.0, 0, 0
    if has_data:
        begin, busy = time.perf_counter(), time.process_time()
        found = load_prompts(data, nothing, chat, Context(), folder / "cache")
        seconds, cpu = time.perf_counter() - begin, time.process_time() - busy
        rows = len(found.train) + len(found.held_out)
        for example in found.train:  # an epoch reads them all
            tokens += len(example.prompt_ids) + len(example.completion_ids)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"s": seconds, "cpu": cpu, "mb": peak_mb, "rows": rows, "tokens": tokens}))


def measured(folder: Path, what: str) -> dict[str, float]:
    command = [sys.executable, __file__, what, folder]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        bare = measured(folder, "bare")
        first, second = measured(folder, "data"), measured(folder, "data")
    more = {"first": first["mb"] - bare["mb"], "second": second["mb"] - bare["mb"]}
    print(
        f"{first['rows']:,.0f} rows, {first['tokens'] / first['rows']:.0f} tokens each,"
        f" {len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f} at the end."
        " MB: peak of the process beyond one without data, an epoch of reading included.\n"
    )
    print("| | s | limit, s | CPU s, all cores | MB | limit, MB |\n|---|---|---|---|---|---|")
    print(
        f"| first time: encoded | {first['s']:.1f} | {FIRST_LIMIT_S} | {first['cpu']:.1f} |"
        f" {more['first']:.0f} | |"
    )
    print(
        f"| second time: found | {second['s']:.2f} | {SECOND_LIMIT_S} | {second['cpu']:.2f} |"
        f" {more['second']:.0f} | {MEMORY_LIMIT_MB} |"
    )
    if first["s"] > FIRST_LIMIT_S or second["s"] > SECOND_LIMIT_S:
        sys.exit(f"limits are {FIRST_LIMIT_S} s for encoding and {SECOND_LIMIT_S} s for finding")
    if more["second"] > MEMORY_LIMIT_MB:
        sys.exit(f"found rows took {more['second']:.0f} MB, the limit is {MEMORY_LIMIT_MB} MB")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        child(Path(sys.argv[2]), sys.argv[1] == "data")
    else:
        main()
