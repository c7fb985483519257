"""This file is where it is tested that data files become ids, and that what cannot is counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.distill import problems, tiny
from stillhouse.distill.pairs import PreparedPair
from stillhouse.distill.prompts import Example, PromptSet, load_others, load_prompts
from stillhouse.errors import ConfigError, DataError
from stillhouse.spec import DataSpec

TEXT = tiny.tokenizer()
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
    path: Path | str | None, *, text: Any = TEXT, few_shot: int = 0, **changes: Any
) -> PromptSet:
    where = None if path is None else str(path)
    data = dataclasses.replace(LOCAL, data_path=where, **changes)
    return load_prompts(data, NOWHERE, text, few_shot)


def prompt(example: Example) -> str:
    return TEXT.decode(example.prompt_ids)


def completion(example: Example) -> str:
    return TEXT.decode(example.completion_ids)


def turn(role: str, content: str | None) -> dict[str, Any]:
    return {"role": role, "content": content}


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Find {n}+1.", "completion": f"{n + 1}"} for n in range(count)]


# ---------------------------------------------------------------- one loader each


def test_generated_problems_come_with_their_worked_answers(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", *problems.chat_rows("train", 20))
    lines(tmp_path / "held_out.jsonl", *problems.chat_rows("held_out", 10))
    data = dataclasses.replace(LOCAL, data_source="generated", held_out_rows=4)
    prepared = dataclasses.replace(NOWHERE, data_dir=tmp_path)
    found = load_prompts(data, prepared, TEXT, 0)
    assert (len(found.train), len(found.held_out), found.skipped) == (20, 4, {})
    first = problems.chat_rows("train", 1)[0]
    question, worked = (message["content"] for message in first["messages"])
    assert prompt(found.train[0]) == f"<|user|>{question}<|assistant|>"
    assert completion(found.train[0]) == f"{worked}<eos>"
    assert found.train[0].answer == first["answer"]
    assert [example.row for example in found.held_out] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="only train may be trained on"):
        load_prompts(dataclasses.replace(data, data_split="test"), prepared, TEXT, 0)
    with pytest.raises(DataError, match="held_out_rows is 11, only 10 of 10 rows"):
        load_prompts(dataclasses.replace(data, held_out_rows=11), prepared, TEXT, 0)


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
        {"messages": [turn("user", "d"), turn("assistant", "e"), turn("user", "thanks")]},
    ]
    found = load(lines(tmp_path / "a.jsonl", *rows)).train
    assert [prompt(e) for e in found] == [f"<|user|>{c}<|assistant|>" for c in "acd"]
    assert [completion(e) for e in found] == ["b<eos>", "", "e<eos>"]
    assert [e.answer for e in found] == ["7", None, None]
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
    jsonl = load(lines(tmp_path / "one" / "train.jsonl", *rows))
    assert load(tmp_path).train == jsonl.train
    assert load(tmp_path / "one").train == jsonl.train


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
    found = load_others(file, data, TEXT)
    assert [prompt(example) for example in found] == ["<|user|>Other?<|assistant|>"]
    with pytest.raises(DataError, match=r"other_file: .*gone.jsonl: no such file"):
        load_others(tmp_path / "gone.jsonl", data, TEXT)
    file.write_text('{"question": "no"}\n')
    with pytest.raises(DataError, match="no row can be used, 1 no prompt or messages field"):
        load_others(file, data, TEXT)


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
        {"messages": [turn("user", "x")]},
        {"messages": [turn("assistant", "x")]},
        {"messages": [turn("user", None), turn("assistant", "x")]},
        {"messages": "x"},
        {"messages": [turn("system", "x"), turn("user", "x"), turn("assistant", "x")]},
        {"prompt": "9" * 62},
        {"prompt": "9" * 55},
        {"prompt": "9" * 54},
    ]
    found = load(lines(tmp_path / "a.jsonl", *rows))
    assert [e.row for e in found.train] == [0, 14]
    assert found.skipped == {
        "empty": 4,
        "prompt that is no text": 1,
        "no prompt or messages field": 1,
        "no assistant turn": 1,
        "no prompt": 1,
        "messages that are no turns": 2,
        "turns that the chat template refuses (the roles are user and assistant)": 1,
        "prompt too long": 1,
        "no room for a completion": 1,
    }
    assert found.summary().startswith("2 rows to train on, 0 held out, 13 left out: 4 empty, ")


def test_a_file_without_a_usable_row_is_an_error_with_the_counts(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "a.jsonl", {"prompt": ""}, {"prompt": ""}, {"messages": []}, {"text": "x"}
    )
    with pytest.raises(DataError, match="none of its 4 rows.*, 3 empty, 1 no prompt or messages"):
        load(file)
    with pytest.raises(DataError, match="held_out_rows is 1, only 0 of 4 rows.*, 3 empty"):
        load(file, held_out_rows=1)
    with pytest.raises(DataError, match="none of its 0 rows"):
        load(lines(tmp_path / "b.jsonl"))


# ---------------------------------------------------------------- files that are wrong


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
        DataError, match=r"no train\.jsonl or train\.parquet \(data_split is train\)"
    ):
        load(tmp_path)
    with pytest.raises(ConfigError, match="data_path says where its rows are; it is null"):
        load(None)
    (tmp_path / "a.csv").write_text("prompt\nx\n")
    with pytest.raises(DataError, match=r"a\.csv: not a \.jsonl or \.parquet file"):
        load(tmp_path / "a.csv")
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
    assert one.held_out == same.held_out == more.held_out[:5]
    assert one.held_out != other.held_out


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
