"""Test that data files become token ids, and that unusable rows are counted."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.compose import compose, from_command_line
from stillhouse.distill import encoder
from stillhouse.distill.chat import Chat
from stillhouse.distill.encoded import Example, Joined
from stillhouse.distill.encoder import Context
from stillhouse.distill.pairs import PreparedPair
from stillhouse.distill.prompts import PromptSet, check_answers, load_others, load_prompts
from stillhouse.distill.tables import open_table
from stillhouse.distill.toy import problems, tiny
from stillhouse.errors import ConfigError, DataError
from stillhouse.spec import DataSpec, TrainSpec

TEXT = tiny.tokenizer()
NO_CONTEXT = Context()
NOWHERE = PreparedPair("student", "teacher", None, None, Path("no-such-directory"), {})
LOCAL = DataSpec(
    data_name="mine",
    data_source="local",
    data_path=None,
    data_split="train",
    prompt_template=None,
    chat_template_kwargs={},
    template_date="2026-01-01",
    max_length=64,
    min_completion=8,
    max_rows=None,
    held_out_rows=0,
)
GSM8K_TEMPLATE = (
    "Question: {question}\nSolve this step by step and provide the final numerical answer."
)


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(
    path: Path | str | None,
    *,
    text: Any = TEXT,
    few_shot: int = 0,
    template: str | None = None,
    **changes: Any,
) -> PromptSet:
    where = None if path is None else str(path)
    data = dataclasses.replace(LOCAL, data_path=where, **changes)
    return encoded(data, NOWHERE, text, Context(few_shot, template))


def encoded(
    data: DataSpec, prepared: PreparedPair, text: Any, context: Context = NO_CONTEXT
) -> PromptSet:
    """As a machine does that sees these rows for the first time."""
    with tempfile.TemporaryDirectory() as cache:  # what is mapped stays mapped
        return load_prompts(data, prepared, Chat(text, data), context, Path(cache))


def prompt(example: Example) -> str:
    return TEXT.decode(example.prompt_ids)


def completion(example: Example) -> str:
    return TEXT.decode(example.completion_ids)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Find {n}+1.", "completion": f"{n + 1}"} for n in range(count)]


# ---------------------------------------------------------------- one loader each


def test_generated_problems_come_with_their_worked_answers(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", *problems.chat_rows("train", 20))
    lines(tmp_path / "held_out.jsonl", *problems.chat_rows("held_out", 10))
    data = dataclasses.replace(LOCAL, data_source="generated", held_out_rows=4)
    prepared = dataclasses.replace(NOWHERE, data_dir=tmp_path)
    found = encoded(data, prepared, TEXT)
    assert (len(found.train), len(found.held_out), found.skipped) == (20, 4, {})
    first = problems.chat_rows("train", 1)[0]
    question, worked = (message["content"] for message in first["messages"])
    assert prompt(found.train[0]) == f"<|user|>{question}<|assistant|>"
    assert completion(found.train[0]) == f"{worked}<eos>"
    assert found.train[0].answer == first["answer"]
    assert [example.row for example in found.held_out] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="only train may be trained on"):
        encoded(dataclasses.replace(data, data_split="test"), prepared, TEXT)
    with pytest.raises(DataError, match="held_out_rows is 11, only 10 of 10 rows"):
        encoded(dataclasses.replace(data, held_out_rows=11), prepared, TEXT)


def test_gsm8k_rows_fill_the_template(tmp_path: Path) -> None:
    row = {"question": "What is 999+1?", "answer": "999+1=<<999+1=1000>>1000\n#### 1,000"}
    file = lines(tmp_path / "train.jsonl", row)
    found = load(file, data_source="gsm8k", prompt_template=GSM8K_TEMPLATE, max_length=256)
    assert prompt(found.train[0]) == (
        "<|user|>Question: What is 999+1?\nSolve this step by step and provide the final numerical"
        " answer.<|assistant|>"
    )
    assert completion(found.train[0]) == f"{row['answer']}<eos>"
    assert found.train[0].answer == "1000"


def test_braces_in_a_question_are_left_alone(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"question": "Is {x} in {question}?", "answer": "no"})
    found = load(file, data_source="gsm8k", prompt_template="Q: {question}")
    assert prompt(found.train[0]) == "<|user|>Q: Is {x} in {question}?<|assistant|>"
    assert found.train[0].answer is None


def test_tulu_3_conversations_end_before_the_last_assistant_turn(tmp_path: Path) -> None:
    messages = [turn("user", "Find 1+1."), turn("assistant", "2"), turn("user", "And +1?")]
    tulu = {"id": "x", "source": "s", "messages": [*messages, turn("assistant", "3")]}
    found = load(lines(tmp_path / "a.jsonl", tulu), data_source="tulu3")
    assert prompt(found.train[0]) == (
        "<|user|>Find 1+1.<|assistant|>2<eos><|user|>And +1?<|assistant|>"
    )
    assert completion(found.train[0]) == "3<eos>"


def test_local_rows_are_prompts_or_messages_with_or_without_a_completion(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "answer": 7},
        {"prompt": "c"},
        {"messages": [turn("user", "d"), turn("assistant", "e")]},
        {"messages": [turn("user", "d"), turn("assistant", "e"), turn("user", "f")]},
    ]
    found = load(lines(tmp_path / "a.jsonl", *rows)).train
    alone = [f"<|user|>{c}<|assistant|>" for c in "acd"]
    assert [prompt(e) for e in found] == [*alone, f"{alone[2]}e<eos><|user|>f<|assistant|>"]
    assert [completion(e) for e in found] == ["b<eos>", "", "e<eos>", ""]
    assert [e.answer for e in found] == ["7", None, None, None]
    assert found.unanswered() == [1, 3]
    assert all(e.teacher_prompt_ids == e.prompt_ids for e in found)


def test_parquet_and_jsonl_of_the_same_rows_give_the_same_examples(tmp_path: Path) -> None:
    rows = [
        {"messages": [turn("user", f"Find {n}+1."), turn("assistant", f"{n + 1}")]}
        for n in range(9)
    ]
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        half = rows[:5] if "00000-of" in name else rows[5:]
        (tmp_path / "data").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(half), tmp_path / "data" / name)
    jsonl = [*load(lines(tmp_path / "one" / "train.jsonl", *rows)).train]
    assert [*load(tmp_path).train] == [*load(tmp_path / "one").train] == jsonl


def test_a_hub_data_set_is_found_in_the_cache_or_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        load("some/set", data_source="gsm8k")
    assert str(caught.value) == (
        "data mine: some/set is not on this machine; get it with"
        " `hf download some/set --repo-type dataset`"
    )
    repository = tmp_path / "datasets--some--set"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    rows = [{"question": "Find 1+1.", "answer": "1+1=2\n#### 2"}]
    folder = repository / "snapshots" / "c0ffee" / "main"
    folder.mkdir(parents=True)
    name = "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    assert load("some/set", data_source="gsm8k").train[0].answer == "2"


def test_a_template_goes_round_a_prompt_and_round_the_last_question_of_a_conversation(
    tmp_path: Path,
) -> None:
    turns = [
        ("user", "First?"),
        ("assistant", "One."),
        ("user", "And then?"),
        ("assistant", "Two."),
    ]
    talk = [{"role": role, "content": content} for role, content in turns]
    asked = {"prompt": "Now?", "completion": "Yes."}
    file = lines(tmp_path / "a.jsonl", asked, {"messages": talk})
    found = load(file, prompt_template="In sums. {question}", held_out_rows=0)
    assert [prompt(example) for example in found.train] == [
        "<|user|>In sums. Now?<|assistant|>",
        "<|user|>First?<|assistant|>One.<eos><|user|>In sums. And then?<|assistant|>",
    ]


def test_prompts_of_another_kind_are_read_as_they_are_and_what_cannot_be_is_said(
    tmp_path: Path,
) -> None:
    data = dataclasses.replace(LOCAL, prompt_template="In sums. {question}")
    file = lines(tmp_path / "a.jsonl", {"prompt": "Other?"}, {"question": "no"})
    chat = Chat(TEXT, data)
    found = load_others(file, data, chat, tmp_path / "cache")
    assert [prompt(example) for example in found] == ["<|user|>Other?<|assistant|>"]
    with pytest.raises(DataError, match=r"other_file: .*gone.jsonl: no such file"):
        load_others(tmp_path / "gone.jsonl", data, chat, tmp_path / "cache")
    file.write_text('{"question": "no"}\n')
    with pytest.raises(DataError, match=r"no row can be used, 1 no prompt, .*\(row 0: it has que"):
        load_others(file, data, chat, tmp_path / "cache")


def test_a_template_that_reads_parts_gets_parts_and_another_gets_a_string(tmp_path: Path) -> None:
    asked, answer = [{"type": "text", "text": "Find 1+1."}], turn("assistant", "2")
    rows = [{"messages": [turn("user", said), answer]} for said in ("Find 1+1.", asked)]
    file = lines(tmp_path / "a.jsonl", *rows)
    for content in ("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"):
        text = tiny.tokenizer()
        text.chat_template = "{% for m in messages %}<|user|>" + content + "<eos>{% endfor %}"
        text.chat_template += "{% if add_generation_prompt %}<|user|>{% endif %}"
        found = load(file, text=text)
        assert [prompt(e) for e in found.train] == ["<|user|>Find 1+1.<eos><|user|>"] * 2
        assert [completion(e) for e in found.train] == ["2<eos>"] * 2


def test_tools_reach_the_template_or_the_row_is_left_out(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    asked, calls = turn("user", "Find 1+1."), turn("assistant", None, tool_calls=[call])
    rows: list[dict[str, Any]] = [
        {"messages": [asked, calls, turn("tool", "2", tool_call_id="c1"), turn("assistant", "2")]},
        {"messages": [asked, calls]},
        {"prompt": [asked], "tools": [call]},
        {"prompt": "Plain."},
    ]
    file, text = lines(tmp_path / "a.jsonl", *rows), tiny.tokenizer()
    text.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }}={% endfor %}"
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ m.tool_call_id }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.a }}"
        "{% endfor %}<eos>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    found = load(file, text=text).train
    assert [(prompt(e), completion(e)) for e in found] == [
        ("u:Find 1+1.<eos>a:add1<eos>t:2c1<eos>a:", "2<eos>"),
        ("u:Find 1+1.<eos>a:", "add1<eos>"),
        ("add=u:Find 1+1.<eos>a:", ""),
        ("u:Plain.<eos>a:", ""),
    ]
    plain = tiny.tokenizer()
    plain.chat_template = None
    for other, words in ((TEXT, "that the chat template does not"), (plain, "no chat template")):
        left = load(file, text=other)
        assert [e.row for e in left.train] == [3]
        assert sum(count for reason, count in left.skipped.items() if words in reason) == 3


def test_a_tokenizer_without_a_chat_template_gets_plain_text(tmp_path: Path) -> None:
    plain = tiny.tokenizer()
    plain.chat_template = None
    rows = [
        {"prompt": "Find 1+1. ", "completion": "2"},
        {"messages": [turn("user", "Find 2+1."), turn("assistant", "3")]},
    ]
    found = load(lines(tmp_path / "a.jsonl", *rows), text=plain).train
    assert [prompt(e) + completion(e) for e in found] == ["Find 1+1. 2<eos>", "Find 2+1.\n3<eos>"]


# ---------------------------------------------------------------- lengths


def test_a_completion_is_cut_at_max_length_and_then_has_no_eos(tmp_path: Path) -> None:
    row = {"prompt": "9" * 10, "completion": "8" * 20}  # 12 prompt ids with the roles, 21 with EOS
    file = lines(tmp_path / "a.jsonl", row)
    assert len(load(file, max_length=33).train[0].completion_ids) == 21
    cut = load(file, max_length=32).train[0]
    assert completion(cut) == "8" * 20
    assert completion(load(file, max_length=20).train[0]) == "8" * 8


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        {"prompt": "fine"},
        {"prompt": " "},
        {"prompt": "x", "completion": ""},
        {"prompt": 3},
        {"text": "no prompt here"},
        {"messages": []},
        {"messages": [turn("user", "x"), turn("assistant", "")]},
        {"messages": [turn("assistant", "x")]},
        {"messages": [turn("user", None), turn("assistant", "x")]},
        {"messages": "x"},
        {"messages": [turn("system", "x"), turn("user", "x"), turn("assistant", "x")]},
        {"prompt": "9" * 62},
        {"prompt": "9" * 55},
        {"prompt": "9" * 54},
    ]
    found = load(lines(tmp_path / "a.jsonl", *rows))
    assert [e.row for e in found.train] == [0, 13]
    assert found.skipped == {
        "empty": 4,
        "prompt that is no text": 1,
        "no prompt, messages, conversations or instruction": 1,
        "no prompt": 1,
        "messages that are no turns": 2,
        "turns that the chat template refuses": 1,
        "prompt too long": 1,
        "no room for a completion": 1,
    }
    assert found.seen["no prompt, messages, conversations or instruction"] == "row 4: it has text"
    assert found.seen["prompt too long"] == "row 11: its prompt has 64 tokens"
    assert found.summary().startswith(
        '2 rows to train on, 0 held out, 12 left out: 4 empty (row 1: prompt is " "), '
    )


def test_a_file_without_a_usable_row_is_an_error_with_the_counts(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "a.jsonl", {"prompt": ""}, {"prompt": ""}, {"messages": []}, {"text": "x"}
    )
    with pytest.raises(
        DataError, match=r"of its 4 rows.*, 3 empty \(.*1 no prompt.* it has text\); und"
    ):
        load(file)
    with pytest.raises(DataError, match="held_out_rows is 1, only 0 of 4 rows.*, 3 empty"):
        load(file, held_out_rows=1)
    with pytest.raises(DataError, match="none of its 0 rows"):
        load(lines(tmp_path / "b.jsonl"))


# ---------------------------------------------------------------- files that are wrong


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = sums(7)
    listed, text = json.dumps(rows, indent=1), "".join(json.dumps(row) + "\r\n" for row in rows)
    contents = {
        "a.jsonl": text.encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + text.encode(),
        "lines.json": b"\n" + text.encode(),
        "array.json": b"\xef\xbb\xbf " + listed.encode(),
        "a.jsonl.gz": gzip.compress(text.encode()),
        "array.json.gz": gzip.compress(listed.encode()),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert [prompt(e)[8:-13] for e in load(tmp_path / name).train] == [
            row["prompt"] for row in rows
        ]
    shards = tmp_path / "shards" / "data"
    shards.mkdir(parents=True)
    for shard in (0, 1):
        part = json.dumps(rows[shard * 4 : shard * 4 + 4]).encode()
        (shards / f"train-{shard}-of-2.json.gz").write_bytes(gzip.compress(part))
    assert [e.row for e in load(tmp_path / "shards").train] == [*range(7)]


def test_rows_of_parquet_are_the_same_alone_and_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"Find {n}+1.", "answer": None if n % 2 else n} for n in range(9)]
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=4)
    table = open_table([file], tmp_path)
    for numbers in ([], [3], [2, 3, 4, 8], [8, 0, 1, 5, 4], [*range(9)]):
        assert table.at(numbers) == [rows[number] for number in numbers]
    assert len(table) == 9


def test_a_line_that_cannot_be_parsed_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for broken in (b'{"prompt": "b"', b"\xff\xfe", b"[" * 100_000):
        file.write_bytes(b'{"prompt": "a"}\n\n' + broken + b"\n")
        with pytest.raises(DataError, match=r"a\.jsonl, line 3: not JSON"):
            load(file)
    file.write_text('{"prompt": "a"}\n["a"]\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: holds list, not an object"):
        load(file)


def test_paths_and_files_that_hold_no_rows_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file or directory"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="some/where: no such file or directory"):
        load("some/where")
    with pytest.raises(
        DataError, match=r"no train\.jsonl and no train-\*\.jsonl \(data_split is train\).*nothing$"
    ):
        load(tmp_path)
    with pytest.raises(ConfigError, match="data_path says where its rows are; it is null"):
        load(None)
    (tmp_path / "a.csv").write_text("prompt\nx\n")
    with pytest.raises(DataError, match=r"a\.csv: not a \.jsonl, .* or \.json\.gz file"):
        load(tmp_path / "a.csv")
    for name in ("a.jsonl.zst", "a.parquet.gz", "a.txt"):
        (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match=r"not a \.jsonl, \.parquet, \.json, \.jsonl\.gz or"):
            load(tmp_path / name)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}')[:-9])
    (tmp_path / "b.jsonl.gz").write_text("x")
    for name in "ab":
        with pytest.raises(DataError, match=rf"{name}\.jsonl\.gz: cannot be unpacked as gzip"):
            load(tmp_path / f"{name}.jsonl.gz")
    for content, wrong in {
        '[{"prompt": "a"}': r"a\.json: not a JSON array \(.*line 1",
        '[{"prompt": "a"}, 3]': r"a\.json: element 1 of the array is int, not an object",
        '{\n"prompt": "a"}': r"a\.json, line 1: not JSON",
    }.items():
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match=wrong):
            load(tmp_path / "a.json")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        load(tmp_path / "a.parquet")


# ---------------------------------------------------------------- held-out rows


@settings(max_examples=20, deadline=None)
@given(held=st.integers(0, 12), most=st.one_of(st.none(), st.integers(1, 20)))
def test_a_held_out_row_is_never_trained_on(
    tmp_path_factory: pytest.TempPathFactory, held: int, most: int | None
) -> None:
    file = lines(tmp_path_factory.mktemp("rows") / "a.jsonl", *sums(20))
    found = load(file, held_out_rows=held, max_rows=most)
    apart, trained = ([e.row for e in part] for part in (found.held_out, found.train))
    assert len(apart) == held
    assert not set(apart) & set(trained)
    # The first rows of the file, in its order: what "the first 50 questions" of a seed means.
    assert trained == [row for row in range(20) if row not in apart][:most]


def test_which_rows_are_held_out_follows_from_the_content(tmp_path: Path) -> None:
    one = load(lines(tmp_path / "a.jsonl", *sums(40)), held_out_rows=5)
    same = load(lines(tmp_path / "b" / "c.jsonl", *sums(40)), held_out_rows=5)
    more = load(lines(tmp_path / "d.jsonl", *sums(40)), held_out_rows=8)
    other = load(lines(tmp_path / "e.jsonl", *sums(41)), held_out_rows=5)
    assert one.held_out[:] == same.held_out[:] == more.held_out[:5]
    assert one.held_out[:] != other.held_out[:]


def test_a_prompt_that_is_held_out_is_not_trained_on_as_another_row(tmp_path: Path) -> None:
    found = load(lines(tmp_path / "a.jsonl", *sums(5), *sums(5)), held_out_rows=2)
    apart = {e.prompt_ids for e in found.held_out}
    assert not apart & {e.prompt_ids for e in found.train}
    assert found.skipped["same prompt as a held-out row"] == 10 - 2 - len(found.train)


# ---------------------------------------------------------------- what only the teacher sees


def test_the_teacher_reads_the_first_rows_solved_and_they_are_not_trained_on(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"Find {n}+1.", "completion": f"{n + 1}"} for n in range(6)]
    found = load(lines(tmp_path / "a.jsonl", *rows), few_shot=2, max_rows=3, max_length=32)
    assert [e.row for e in found.train] == [2, 3, 4]
    solved = "<|user|>Find 0+1.<|assistant|>1<eos><|user|>Find 1+1.<|assistant|>2<eos>"
    for example in found.train:
        assert TEXT.decode(example.teacher_prompt_ids) == solved + prompt(example)


def test_exemplars_come_after_the_system_turn_of_the_row(tmp_path: Path) -> None:
    text = tiny.tokenizer()
    text.chat_template = (
        "{% for m in messages %}[{{ m.role[0] }}:{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}[a:{% endif %}"
    )
    rows = [
        {"messages": [turn("system", f"s{n}"), turn("user", f"u{n}"), turn("assistant", f"a{n}")]}
        for n in range(2)
    ]
    found = load(lines(tmp_path / "a.jsonl", *rows), text=text, few_shot=1)
    assert text.decode(found.train[0].teacher_prompt_ids) == "[s:s1][u:u0][a:a0][u:u1][a:"


def test_few_shot_needs_solved_rows_and_rows_left_over(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="teacher_few_shot needs rows with a completion"):
        load(lines(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"}), few_shot=1)
    with pytest.raises(DataError, match="none of its 2 rows is left .* 2 shown to the teacher"):
        load(lines(tmp_path / "b.jsonl", *sums(2)), few_shot=2)


def test_a_prompt_that_the_teacher_cannot_hold_is_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "9" * count, "completion": "8"} for count in (8, 9, 490, 491)]
    found = load(lines(tmp_path / "a.jsonl", *rows), few_shot=1, max_length=512)
    # Exemplar 12 ids, prompt 492 or 493, and min_completion 8: 512 is what the tiny models hold.
    assert [e.row for e in found.train] == [1, 2]
    assert found.skipped == {"few-shot prompt too long for the teacher": 1}


def test_a_teacher_reads_its_template_over_the_row_after_the_exemplars(tmp_path: Path) -> None:
    rows = [{"prompt": f"Find {n}+1.", "completion": f"{n + 1}", "hint": n} for n in range(4)]
    file, template = lines(tmp_path / "a.jsonl", *rows), "{{{question}}} {hint}: {completion}"
    alone = load(file, template=template)
    for n, example in enumerate(alone.train):
        assert prompt(example) == f"<|user|>Find {n}+1.<|assistant|>"
        told = f"<|user|>{{Find {n}+1.}} {n}: {n + 1}<|assistant|>"
        assert TEXT.decode(example.teacher_prompt_ids) == told
    after = load(file, template=template, few_shot=1).train[0]
    solved = "<|user|>Find 0+1.<|assistant|>1<eos>"
    told = "<|user|>{Find 1+1.} 1: 2<|assistant|>"
    assert TEXT.decode(after.teacher_prompt_ids) == solved + told
    text = tiny.tokenizer()
    text.chat_template = None
    bare = load(file, text=text, template=template).train[0]
    assert text.decode(bare.teacher_prompt_ids) == "{Find 0+1.} 0: 1"


def test_a_template_changes_the_last_question_alone(tmp_path: Path) -> None:
    said = [turn("user", "a"), turn("assistant", "b"), turn("user", "a"), turn("assistant", "c")]
    found = load(
        lines(tmp_path / "a.jsonl", {"messages": said}), template="{question}={completion}"
    )
    told = "<|user|>a<|assistant|>b<eos><|user|>a=c<|assistant|>"
    assert TEXT.decode(found.train[0].teacher_prompt_ids) == told


@pytest.mark.parametrize("field", ["hint", "completion"])
def test_a_field_that_a_row_lacks_is_refused(tmp_path: Path, field: str) -> None:
    rows = [{"prompt": "a", "completion": "b", "hint": "c"}, {"prompt": "d", "hint": ["e"]}]
    said = rf"no text for \{{{field}\}} of teacher_prompt. .* else the row has: prompt, hint$"
    with pytest.raises(DataError, match=said):
        load(lines(tmp_path / "a.jsonl", *rows), template=f"{{question}} {{{field}}}")


# ---------------------------------------------------------------- the same rows, once


def mixed() -> list[dict[str, Any]]:
    """Rows of most kinds, a few of them twice, a few of no use."""
    useless = ({"prompt": " "}, {"prompt": 3}, {"text": "x"}, {"messages": []})
    rows: list[dict[str, Any]] = []
    for n in range(0, 120, 8):
        more = [turn("user", "Find 1+1."), turn("assistant", "2"), turn("user", f"And +{n}?")]
        rows += [
            {"prompt": f"Find {n}+1.", "completion": f"{n + 1}", "answer": n + 1},
            {"prompt": f"Find {n}-1."},
            {"messages": [turn("user", f"Ida has {n}."), turn("assistant", f"{n}")], "answer": "8"},
            {"messages": [*more, turn("assistant", f"{2 + n}")]},
            {"prompt": "9" * (n // 2 + 4), "completion": "8" * n},
            {"prompt": f"Find {n % 16}+0.", "completion": f"{n % 16}"},
            useless[n // 8 % 4],
            {"prompt": "x", "messages": [turn("user", f"Say {n}."), turn("assistant", f"{n}!")]},
        ]
    return rows


def test_rows_have_the_ids_and_the_places_that_they_had_before_they_were_encoded_in_batches(
    tmp_path: Path,
) -> None:
    plain = tiny.tokenizer()
    plain.chat_template = None
    file = lines(tmp_path / "mixed.jsonl", *mixed())
    before = {
        (TEXT, 0, None, None): "9a68cfc2420d2fa7",
        (TEXT, 0, 20, None): "f2e5133d211174fe",
        (TEXT, 0, None, "Sum: {question}"): "cddc18a08f1d096e",
        (TEXT, 1, None, None): "10083fe71ed25c2d",
        (plain, 0, 20, None): "f5d6d6e4b524cadd",
        (plain, 1, None, None): "5be695d8580cfc84",
    }
    for (text, few_shot, most, template), known in before.items():
        found = load(
            file, text=text, few_shot=few_shot, max_rows=most, prompt_template=template,
            held_out_rows=12,
        )  # fmt: skip
        parts = [
            [[e.prompt_ids, e.completion_ids, e.teacher_prompt_ids, e.row, e.answer] for e in part]
            for part in (found.train, found.held_out)
        ]
        assert hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16] == known


def test_the_same_bytes_tokenizer_template_and_limits_are_encoded_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "PROGRESS_S", 0.0)  # then each batch has its line
    cache, day = tmp_path / "cache", "2026-07-26"
    file = lines(tmp_path / "a.jsonl", *sums(40))

    def at(path: Path, text: Any = TEXT, few_shot: int = 0, **changes: Any) -> tuple[str, str]:
        data = dataclasses.replace(LOCAL, data_path=str(path), held_out_rows=2, **changes)
        found = load_prompts(data, NOWHERE, Chat(text, data), Context(few_shot), cache)
        assert len(found.held_out) == 2 and found.skipped == {}
        return found.key, capsys.readouterr().out

    first, said = at(file)
    assert re.search(r"^data mine: 38 of 38 rows encoded, [\d,]+ a second, 0 s left$", said, re.M)
    again = lines(tmp_path / "b" / "other-name.jsonl", *sums(40))
    assert at(file) == at(again) == (first, "")

    changed = tiny.tokenizer()
    changed.chat_template = changed.chat_template.replace("<|user|>", "<|user|> ")
    shorter = tiny.tokenizer()
    shorter.model_max_length = 128
    others = [
        at(file, changed),
        at(file, shorter),
        at(file, max_length=40),
        at(file, max_rows=9),
        at(file, prompt_template="Sum: {question}"),
        at(file, template_date=day),
        at(file, few_shot=2),
        at(lines(tmp_path / "c.jsonl", *sums(41))),
    ]
    assert all(said for _, said in others)
    assert len({first, *(key for key, _ in others)}) == 1 + len(others)


def test_what_was_encoded_says_how_many_rows_and_the_largest_token_id(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", *sums(9), {"text": "x"})
    data = dataclasses.replace(LOCAL, data_path=str(file), held_out_rows=2)
    found = load_prompts(data, NOWHERE, Chat(TEXT, data), NO_CONTEXT, tmp_path / "cache")
    made = tmp_path / "cache" / "rows" / found.key / "made.json"
    facts = json.loads(made.read_text())["facts"]
    assert facts["rows"] == {"train": 7, "held_out": 2}
    ids = [i for e in (*found.train, *found.held_out) for i in e.prompt_ids + e.completion_ids]
    assert facts["largest_token_id"] == found.largest_token_id == max(ids)
    assert facts["skipped"] == {"no prompt, messages, conversations or instruction": 1}


def test_no_row_behind_the_last_wanted_one_is_looked_at(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", *sums(3), {"prompt": ""}, *sums(5)[4:], {"prompt": ""})
    assert load(file, max_rows=3).skipped == {}
    found = load(file, max_rows=4)
    assert ([e.row for e in found.train], found.skipped) == ([0, 1, 2, 4], {"empty": 1})


def test_examples_are_sequences_one_behind_the_other_too(tmp_path: Path) -> None:
    found = load(lines(tmp_path / "a.jsonl", *sums(9)), held_out_rows=3)
    both, listed = Joined(found.train, found.held_out), [*found.train, *found.held_out]
    assert [*both] == listed and len(both) == 9
    assert [both[i] for i in (0, 5, 6, 8, -1, -9)] == [listed[i] for i in (0, 5, 6, 8, -1, -9)]
    assert both[4:8] == listed[4:8]
    with pytest.raises(IndexError):
        both[9]
    assert [*Joined(found.train, ())] == found.train[:]


def test_answers_are_asked_for_only_where_a_step_learns_them(tmp_path: Path) -> None:
    rows = load(lines(tmp_path / "a.jsonl", *sums(3), {"prompt": "x"}, {"prompt": "y"})).train

    def checked(*words: str) -> None:
        spec = compose(
            from_command_line(["pair=tiny", "max_steps=10", *words], TrainSpec), TrainSpec
        )
        check_answers(spec, "data mine", rows)

    checked("lmbda=1")
    checked("lmbda=0", "off_policy_source=teacher")
    checked("lmbda=0", "cold_start=1", "cold_prompts=2")
    checked("lmbda=[[0,0],[0.4,0],[0.4,1],[1,1]]", "cold_start=0.5", "cold_prompts=2")
    for words, step in (
        (["lmbda=0.5"], "lmbda is 0.5 at step 0"),
        (["lmbda=[[0,1],[0.5,1],[1,0]]"], "lmbda is 0.8 at step 6"),
        (["lmbda=0", "cold_start=0.5", "cold_prompts=2"], "lmbda is 0 at step 5"),
    ):
        with pytest.raises(ConfigError, match="2 of 5 rows have no answer .* is row 3") as caught:
            checked(*words)
        assert step in str(caught.value)
