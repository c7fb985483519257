"""Test that chat turns become the text that a chat template writes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stillhouse.distill.chat import Chat, Skip, declared_stop_ids
from stillhouse.distill.encoder import Context
from stillhouse.distill.prompts import load_prompts
from stillhouse.distill.toy import problems, tiny
from stillhouse.errors import ConfigError, ContractError
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
        generated, prepared, Chat(tiny.tokenizer(), generated), Context(2), tmp_path / "cache"
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
    thinks = "assistant\n{% if think != 'off' %}<think>\n{% endif %}{% endif %}"
    text = tokenizer(CHATML.replace("assistant\n{% endif %}", thinks))
    with pytest.raises(Skip, match="does not write behind its own prompt") as skipped:
        Chat(text, data()).render(asked("?"), "4")
    assert skipped.value.seen == (
        "the prompt goes on '<think>\\n', the conversation '4<|im_end|>\\n';"
        " chat_template_kwargs can set think"
    )
    row = Chat(text, data(chat_template_kwargs={"think": "off"})).render(asked("?"), "4")
    assert row.answer == "4<|im_end|>"


# ---------------------------------------------------------------- templates of many makers

TEMPLATES = {  # name: (template, its EOS token, what an answer "4" to "?" is, the end of it)
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|end_of_text|>",
        "4<|eot_id|>",
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<eos>",
        "4<end_of_turn>",
    ),
    "phi 4 mini": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
        "4<|end|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "</s>",
        " 4</s>",
    ),
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}",
        "<|end_of_sentence|>",
        "4<|end_of_sentence|>",
    ),
    "nothing behind an answer": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|endoftext|>",
        "4<|endoftext|>",
    ),
    "a newline behind an answer": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "<|endoftext|>",
        "4<|endoftext|>",
    ),
    "an end of many tokens": (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n### End\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}",
        "<|endoftext|>",
        "4\n### End<|endoftext|>",
    ),
    "a marked generation": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|endoftext|>",
        "4<|im_end|>",
    ),
    "a system turn of its own": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
        + CHATML,
        "<|im_end|>",
        "4<|im_end|>",
    ),
    "another end of the last turn": (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}",
        "<|return|>",
        "4<|return|>",
    ),
    "thoughts of the last turn alone": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last"
        " %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        "<think>\n\n</think>\n\n4<|im_end|>",
    ),
}


def words_in(template: str) -> list[str]:
    return re.findall(r"<\|?[\w ]+\|?>|</s>|\[/?INST\]", template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_on_is_what_the_template_writes(name: str) -> None:
    template, eos, answer = TEMPLATES[name]
    text = tokenizer(template, *words_in(template), "<bos>", eos=eos)
    text.bos_token = "<bos>"
    chat = Chat(text, data())
    assert chat.end_token == answer[answer.rindex("</s>" if name == "mistral" else "<") :]
    assert set(chat.stop_ids) == {chat.end_id, text.eos_token_id}
    longer = [*asked("1+1?"), {"role": "assistant", "content": "2"}, *asked("And +1?")]
    for turns in (asked("?"), longer):
        said = [*turns, {"role": "assistant", "content": "4"}]
        row = chat.render(turns, "4")
        assert row.answer == answer and not row.add_special_tokens
        assert row.prompt == text.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        whole = text.apply_chat_template(said, tokenize=False)
        ours = row.prompt + str(row.answer)
        # All of it, less what follows the end; where nothing ends a turn, EOS does.
        assert whole.startswith(ours) or ours == whole.rstrip() + eos
        ((prompt_ids, answer_ids),) = chat.encode([row])
        assert text.decode(prompt_ids) == row.prompt and text.decode(answer_ids) == row.answer
        assert answer_ids[-1] == chat.end_id and prompt_ids[-1] not in chat.stop_ids
        assert prompt_ids.count(text.bos_token_id) == row.prompt.count("<bos>") <= 1


def test_an_answer_is_written_with_its_thoughts_and_its_tool_calls() -> None:
    template, eos, _ = TEMPLATES["thoughts of the last turn alone"]
    chat = Chat(tokenizer(template, eos=eos), data())
    turn = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    assert chat.render(asked("?"), turn).answer == "<think>\n2+2\n</think>\n\n4<|im_end|>"
    calls = (
        "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = Chat(tokenizer(calls), data()).render(asked("?"), turn, [{"name": "add"}])
    assert row.prompt.startswith('tools: [{"name": "add"}]\n<|im_start|>user\n?<|im_end|>\n')
    assert row.answer == '<call>{"name": "add", "arguments": {"a": 2}}</call><|im_end|>'


def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_some() -> None:
    named = {"default": CHATML, "tool_use": "with tools\n" + CHATML}
    chat = Chat(tokenizer(named), data())
    assert not chat.render(asked("?")).prompt.startswith("with tools")
    assert chat.render(asked("?"), "4", [{"name": "add"}]).prompt.startswith("with tools\n<|im_s")
    assert len(chat.fingerprint()["templates"]) == 2
    with pytest.raises(ConfigError, match="multiple chat templates with no default"):
        Chat(tokenizer({"rag": CHATML, "tool_use": CHATML}), data())


def test_a_template_lies_in_a_file_of_its_own(tmp_path: Path) -> None:
    tokenizer(CHATML).save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == CHATML
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert Chat(read, data()).fingerprint() == Chat(tokenizer(CHATML), data()).fingerprint()


def test_what_a_template_refuses_or_breaks_on_is_a_row_that_is_skipped() -> None:
    template, eos, _ = TEMPLATES["gemma"]
    chat = Chat(tokenizer(template, *words_in(template), "<bos>", eos=eos), data())
    system = [{"role": "system", "content": "Be brief."}, *asked("?")]
    with pytest.raises(Skip, match="refuses") as refused:
        chat.render(system, "4")
    assert refused.value.seen == "System role not supported"
    template, eos, _ = TEMPLATES["phi 4 mini"]
    with pytest.raises(Skip, match="breaks on"):
        Chat(tokenizer(template, eos=eos), data()).render([{"role": "user", "content": 3}])
    with pytest.raises(ConfigError, match="cannot be read: .*endfor"):
        Chat(tokenizer("{% for m in messages %}"), data())


def test_a_prompt_never_ends_in_end_of_text() -> None:
    closed = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(Skip, match="ends in end-of-text"):
        Chat(tokenizer(closed), data()).render(asked("?"), "4")
    text = tokenizer(None)
    text.bos_token = "<|im_start|>"
    ids = [("<|im_start|>", text.bos_token_id), ("<|end|>", text.eos_token_id)]
    around = processors.TemplateProcessing(single="<|im_start|> $A <|end|>", special_tokens=ids)
    text.backend_tokenizer.post_processor = around
    chat, (a, b) = Chat(text, data()), text.convert_tokens_to_ids(["a", "b"])
    assert text("a")["input_ids"] == [text.bos_token_id, a, text.eos_token_id]
    rows = [chat.plain("a", "b"), chat.plain("<|im_start|>a"), chat.plain("a<|end|>")]
    prompt = [text.bos_token_id, a]
    assert chat.encode(rows) == [(prompt, [b, text.eos_token_id]), (prompt, []), (prompt, [])]


def test_text_is_read_behind_its_prompt_where_a_tokenizer_begins_with_a_space() -> None:
    """As SentencePiece does: alone, "4" is "▁4"; behind "[/INST]", which is no space, it is "4"."""
    pieces = {
        p: i for i, p in enumerate(["<unk>", "</s>", "▁", "▁4", "4", "[/I]", "[I]", "▁?", "?"])
    }
    words = Tokenizer(models.BPE(vocab=pieces, merges=[("▁", "4"), ("▁", "?")], unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    words.add_special_tokens([AddedToken(w, special=True) for w in ("</s>", "[I]", "[/I]")])
    text = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    text.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content }}[/I]{% else %}"
        "{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    chat = Chat(text, data())
    assert text("4", add_special_tokens=False)["input_ids"] == [3]
    assert chat.encode([chat.render(asked("?"), "4")]) == [([6, 8, 5], [4, 1])]
    assert chat.encode([chat.render(asked("?"))]) == [([6, 8, 5], [])]


# ---------------------------------------------------------------- kwargs, dates, ends


def test_a_date_that_the_caller_owes_is_given_and_a_templates_own_is_left() -> None:
    def first_line(head: str, **changes: Any) -> str:
        return Chat(tokenizer(head + CHATML), data(**changes)).render(asked("?")).prompt[:40]

    owed = "Today: {{ date_string }}\n"
    assert first_line(owed).startswith("Today: 01 Jan 2026\n")
    assert first_line(owed, template_date="2026-07-04").startswith("Today: 04 Jul 2026\n")
    chosen = {"date_string": "a day"}
    assert first_line(owed, chat_template_kwargs=chosen).startswith("Today: a day\n")
    # As Llama 3.1 and 3.2 do it.
    fixed = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    assert first_line(fixed + owed).startswith("Today: 26 Jul 2024\n")
    today = fixed.replace("'26 Jul 2024'", "strftime_now('%d %b %Y')")
    assert first_line(today + owed).startswith("Today: 01 Jan 2026\n")
    assert first_line(fixed + owed, chat_template_kwargs=chosen).startswith("Today: a day\n")
    now = "{% set now = strftime_now %}{% macro day() %}{{ now('%A, %B') }}{% endmacro %}"
    assert first_line(now + "{{ day() }}\n").startswith("Thursday, January\n")


def test_kwargs_that_nobody_reads_are_refused() -> None:
    with pytest.raises(ConfigError, match="tokenizer has none"):
        Chat(tokenizer(None), data(chat_template_kwargs={"enable_thinking": False}))
    for name in ("messages", "tools", "strftime_now", "range", "m"):
        with pytest.raises(ConfigError, match=f"no variable {name} to set; it reads none"):
            Chat(tokenizer(CHATML), data(chat_template_kwargs={name: "x"}))


def test_where_a_sequence_ends_is_what_anybody_says(tmp_path: Path) -> None:
    def ends(config: dict[str, Any], generation: dict[str, Any] | None) -> list[int]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        file = tmp_path / "generation_config.json"
        file.unlink(missing_ok=True)
        if generation is not None:
            file.write_text(json.dumps(generation))
        return declared_stop_ids(str(tmp_path), None)

    llama = {"model_type": "llama"}
    assert ends({**llama, "eos_token_id": 7}, None) == [7]
    assert ends({**llama, "eos_token_id": [7, 8]}, {"eos_token_id": [8, 9]}) == [7, 8, 9]
    assert ends({**llama, "eos_token_id": None}, {"eos_token_id": 3}) == [3]
    assert ends({**llama, "eos_token_id": None}, {}) == []
    gemma = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    gemma["text_config"]["eos_token_id"] = 5
    assert 5 in ends({**gemma, "eos_token_id": 6}, None)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ContractError, match="cannot be loaded"):
        declared_stop_ids(str(tmp_path), None)
    text = tokenizer(CHATML)
    assert Chat(text, data(), [9, 3]).stop_ids == sorted(
        {3, 9, text.eos_token_id, text.convert_tokens_to_ids("<|im_end|>")}
    )
    with pytest.raises(ConfigError, match="nothing says where an answer ends"):
        Chat(tokenizer(None, eos=None), data())
    bare = tokenizer(None, "<|stop|>", eos=None)
    stop = bare.convert_tokens_to_ids("<|stop|>")
    assert Chat(bare, data(), [stop]).plain("a", "b").answer == "b<|stop|>"
    with pytest.raises(ConfigError, match="does not read as one token"):
        Chat(bare, data(), bare.convert_tokens_to_ids(["Ā"]))
    assert Chat(tokenizer(CHATML, eos=None), data()).stop_ids == [
        text.convert_tokens_to_ids("<|im_end|>") - 1
    ]
