"""This file is where it is tested that turns become the text that a chat template writes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stillhouse.distill import problems, tiny
from stillhouse.distill.chat import Chat, Skip
from stillhouse.distill.prompts import load_prompts
from stillhouse.errors import ConfigError
from tests.test_prompts import LOCAL, NOWHERE, lines

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template: Any, *specials: str, eos: str | None = "<|end|>") -> Any:
    """One token per byte, and one for each special word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    words = [*({"<|im_start|>", "<|im_end|>", *specials} | ({eos} if eos else set()))]
    bytes_.add_special_tokens([AddedToken(w, special=True) for w in sorted(words)])
    fast = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token=eos)
    fast.chat_template = template
    return fast


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def data(**changes: Any) -> Any:
    return dataclasses.replace(LOCAL, **changes)


def test_the_generated_problems_have_the_ids_they_always_had(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", *problems.chat_rows("train", 200))
    lines(tmp_path / "held_out.jsonl", *problems.chat_rows("held_out", 20))
    generated = data(data_source="generated", held_out_rows=10, max_length=128)
    prepared = dataclasses.replace(NOWHERE, data_dir=tmp_path)
    found = load_prompts(
        generated, prepared, Chat(tiny.tokenizer(), generated), 2, tmp_path / "cache"
    )
    ids = [
        [e.prompt_ids, e.completion_ids, e.teacher_prompt_ids]
        for e in (*found.train, *found.held_out)
    ]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] == "410e287f946656bb"


def test_an_answer_ends_in_the_token_that_ends_a_turn_and_not_in_the_tokenizers_own() -> None:
    text = tokenizer(CHATML)
    chat = Chat(text, data())
    assert (text.eos_token, chat.end_token) == ("<|end|>", "<|im_end|>")
    row = chat.render(asked("How many?"), "Two.")
    assert row.prompt == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert row.answer == "Two.<|im_end|>"
    ((prompt_ids, answer_ids),) = chat.encode([row])
    assert text.decode(prompt_ids + answer_ids) == row.prompt + row.answer
    assert answer_ids[-1] == chat.end_id == text.convert_tokens_to_ids("<|im_end|>")


def test_an_answer_behind_an_empty_think_block_carries_it_unless_the_prompt_does() -> None:
    hybrid = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}"
    )
    text = tokenizer(hybrid)
    either = Chat(text, data()).render(asked("?"), "4")
    assert either.answer == "<think>\n\n</think>\n\n4<|im_end|>"
    off = Chat(text, data(chat_template_kwargs={"enable_thinking": False})).render(asked("?"), "4")
    assert off.answer == "4<|im_end|>" and off.prompt.endswith("<think>\n\n</think>\n\n")
    assert off.prompt + off.answer == either.prompt + str(either.answer)
    with pytest.raises(ConfigError, match="no variable enable_thinkin to set; it reads enable_th"):
        Chat(text, data(chat_template_kwargs={"enable_thinkin": False}))


def test_todays_date_is_a_setting() -> None:
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y %H:%M:%S') + '\n' }}" + CHATML
    chat = Chat(tokenizer(dated), data())
    assert chat.render(asked("?")).prompt.startswith("Today: 01 Jan 2026 00:00:00\n<|im_start|>")
    other = Chat(tokenizer(dated), data(template_date="2027-12-31"))
    assert other.render(asked("?")).prompt.startswith("Today: 31 Dec 2027 00:00:00\n")


def test_an_answer_that_is_not_written_behind_its_prompt_is_skipped() -> None:
    thinks = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(Skip, match="does not write behind its own prompt"):
        Chat(tokenizer(thinks), data()).render(asked("?"), "4")
