"""Test the row formats of others: the conversation each row holds, and why a row is rejected."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from stillhouse.distill.formats import Conversation, Skip, read
from stillhouse.spec import DataSpec

DATA = DataSpec(
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
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def said(role: str, value: str) -> dict[str, Any]:
    return {"from": role, "value": value}


def roles(found: Conversation) -> list[tuple[str, str]]:
    return [(t["role"], t["content"]) for t in found.turns]


def answered(found: Conversation) -> str | None:
    return None if found.completion is None else found.completion["content"]


ASKED = [turn("user", "Find 1+1.")]
SOLVED = [*ASKED, turn("assistant", "2")]


def test_one_question_and_its_answer_are_the_same_in_every_form() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Find 1+1.", "completion": "2"},
        {"prompt": ASKED, "completion": [turn("assistant", "2")]},
        {"prompt": ASKED, "completion": "2"},
        {"prompt": "Find 1+1.", "completion": [turn("assistant", "2")]},
        {"messages": SOLVED},
        {"messages": [said("human", "Find 1+1."), said("gpt", "2")]},
        {"conversations": [said("human", "Find 1+1."), said("gpt", "2")]},
        {"conversations": SOLVED},
        {"conversations": [turn("human", "Find 1+1."), turn("gpt", "2")]},
        {"instruction": "Find 1+1.", "input": "", "output": "2"},
        {"instruction": "Find 1+1.", "response": "2", "context": "", "category": "sums"},
    ]
    for row in rows:
        found = read(row, DATA)
        assert roles(found) == [("user", "Find 1+1.")], row
        assert answered(found) == "2", row
        assert found.tools is None


def test_what_ends_in_a_user_or_a_tool_turn_is_a_prompt_without_an_answer() -> None:
    called = [*ASKED, turn("assistant", None, tool_calls=[CALL])]
    rows: list[dict[str, Any]] = [
        {"prompt": "Find 1+1."},
        {"prompt": ASKED},
        {"messages": ASKED},
        {"conversations": [said("human", "Find 1+1.")]},
        {"instruction": "Find 1+1."},
        {"messages": [*SOLVED, turn("user", "And +1?")]},
        {"messages": [*called, turn("tool", "2", tool_call_id="c1")]},
    ]
    for row in rows:
        assert read(row, DATA).completion is None, row
    assert roles(read(rows[5], DATA))[1:] == [("assistant", "2"), ("user", "And +1?")]


def test_a_null_field_is_an_absent_field_wherever_it_stands() -> None:
    every = ("prompt", "completion", "messages", "conversations", "instruction", "input", "output")
    every += ("tools", "answer", "system", "chosen", "rejected", "label", "history")
    message = dict.fromkeys(("name", "tool_calls", "tool_call_id", "from", "value", "weight"))
    rows: list[dict[str, Any]] = [
        {"prompt": "Find 1+1.", "completion": "2"},
        {"messages": SOLVED},
        {"conversations": [said("human", "Find 1+1."), said("gpt", "2")]},
        {"instruction": "Find 1+1.", "output": "2"},
        {"prompt": ASKED, "completion": [turn("assistant", "2")]},
    ]
    for row in rows:
        bare = read(row, DATA)
        assert read(dict.fromkeys(every) | row, DATA) == bare
        assert read(dict.fromkeys(every, float("nan")) | row, DATA) == bare
        filled = {
            name: [message | {"role": None, "content": None} | m for m in value]
            if isinstance(value, list)
            else value
            for name, value in row.items()
        }
        assert read(filled, DATA) == bare


def test_nulls_that_a_table_adds_to_calls_and_tools_are_left_out() -> None:
    filled = {"id": None, "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    filled["function"]["arguments"] |= {"b": 2, "city": None}  # another row's call has a city
    schema = {**TOOL, "strict": None}
    row = {"messages": [*ASKED, turn("assistant", None, tool_calls=[filled])], "tools": [schema]}
    found = read(row, DATA)
    assert found.completion == turn("assistant", "", tool_calls=[CALL])
    assert found.tools == [TOOL]


def test_text_parts_become_one_string_and_other_parts_are_named() -> None:
    parts = [{"type": "text", "text": "Find ", "image": None}, {"type": "text", "text": "1+1."}]
    row = {"messages": [turn("user", parts), turn("assistant", [{"type": "text", "text": "2"}])]}
    found = read(row, DATA)
    assert (roles(found), answered(found)) == ([("user", "Find 1+1.")], "2")
    for part, kind in (
        ({"type": "image", "image": "a.png"}, "image"),
        ({"type": "image_url", "image_url": {"url": "x"}, "text": None}, "image_url"),
        ({"type": "input_audio"}, "input_audio"),
        ({"url": "x"}, "without a type"),
    ):
        with pytest.raises(Skip, match="content with parts that are no text") as caught:
            read({"messages": [turn("user", [*parts, part]), turn("assistant", "2")]}, DATA)
        assert caught.value.seen == f"a part is {kind}"


def test_tools_and_calls_are_handed_on_as_templates_take_them() -> None:
    written = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    turns = [
        *ASKED,
        turn("assistant", "", tool_calls=[{"id": "c1", **written}]),
        turn("tool", "", tool_call_id="c1", name="add"),
        turn("assistant", "2", reasoning_content="easy"),
    ]
    for tools in ([TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]):
        found = read({"messages": turns, "tools": tools}, DATA)
        assert found.tools == [TOOL]
        assert found.turns[1]["tool_calls"] == [{"id": "c1", **CALL}]
        assert found.turns[2] == turns[2]
        assert found.completion == turns[3]
    for none in (None, [], "[]", ""):
        assert read({"messages": turns, "tools": none}, DATA).tools is None
    for wrong in ("add", {"name": "add"}, [1], ["add"]):
        with pytest.raises(Skip, match="tools that are no list"):
            read({"messages": turns, "tools": wrong}, DATA)


def test_of_a_completion_of_several_turns_the_last_is_learnt() -> None:
    call, result = turn("assistant", "", tool_calls=[CALL]), turn("tool", "2")
    found = read(
        {"prompt": ASKED, "completion": [call, result, turn("assistant", "It is 2.")]}, DATA
    )
    assert [t["role"] for t in found.turns] == ["user", "assistant", "tool"]
    assert answered(found) == "It is 2."


def test_sharegpt_speakers_are_roles_and_its_function_calls_are_calls() -> None:
    row = {
        "system": "Use the tool.",
        "tools": json.dumps([TOOL]),
        "conversations": [
            said("human", "Find 1+1."),
            said("function_call", '{"name": "add", "arguments": {"a": 1, "b": 2}}'),
            said("observation", "2"),
            said("gpt", "It is 2."),
        ],
    }
    found = read(row, DATA)
    assert [t["role"] for t in found.turns] == ["system", "user", "assistant", "tool"]
    assert found.turns[2]["tool_calls"] == [CALL]
    assert (answered(found), found.tools) == ("It is 2.", [TOOL])
    for speaker in ("tool", "function", "function_response"):
        row["conversations"][2] = said(speaker, "2")
        assert read(row, DATA).turns[3]["role"] == "tool"
    row["conversations"][1] = said("function_call", "add 1 and 2")
    with pytest.raises(Skip, match="function_call that is no call"):
        read(row, DATA)


def test_alpaca_puts_the_input_under_the_instruction_and_history_and_system_before() -> None:
    row = {
        "instruction": "Add them.",
        "input": "1 and 1",
        "output": "2",
        "system": "You add.",
        "history": [["Hi.", "Hello."]],
    }
    found = read(row, DATA)
    assert roles(found) == [
        ("system", "You add."),
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "Add them.\n1 and 1"),
    ]
    assert answered(found) == "2"
    assert roles(read(row | {"system": "", "history": []}, DATA)) == [
        ("user", "Add them.\n1 and 1")
    ]
    with pytest.raises(Skip, match="history that is no list"):
        read(row | {"history": [["Hi."]]}, DATA)


def test_of_several_forms_in_one_row_messages_come_first_then_conversations_then_a_prompt() -> None:
    row = {
        "messages": [turn("user", "m"), turn("assistant", "M")],
        "conversations": [said("human", "c"), said("gpt", "C")],
        "prompt": "p",
        "completion": "P",
        "instruction": "i",
        "output": "I",
    }
    for field, answer in (("messages", "M"), ("conversations", "C"), ("prompt", "P")):
        assert answered(read(row, DATA)) == answer
        row[field] = None
    assert answered(read(row, DATA)) == "I"


def test_a_system_prompt_in_a_field_of_its_own_comes_first_unless_the_turns_have_one() -> None:
    rows: list[dict[str, Any]] = [{"prompt": "x"}, {"messages": [turn("user", "x")]}]
    for row in rows:
        found = read(row | {"system": "Be brief."}, DATA)
        assert roles(found) == [("system", "Be brief."), ("user", "x")]
    own = {"messages": [turn("system", "s"), turn("user", "x")], "system": "Be brief."}
    assert roles(read(own, DATA)) == [("system", "s"), ("user", "x")]
    assert roles(read({"prompt": "x", "system": 3}, DATA)) == [("user", "x")]


def test_a_template_goes_round_the_last_question_not_round_what_a_tool_said() -> None:
    data = dataclasses.replace(DATA, prompt_template="Sum: {question}")
    called = turn("assistant", "", tool_calls=[CALL])
    found = read({"messages": [*ASKED, called, turn("tool", "2"), turn("assistant", "2")]}, data)
    assert [t["content"] for t in found.turns] == ["Sum: Find 1+1.", "", "2"]


def test_without_a_chat_template_a_text_is_asked_as_it_is_and_turns_one_per_line() -> None:
    assert read({"prompt": "a "}, DATA).plain == "a "
    assert read({"messages": [turn("system", "s"), turn("user", "a")]}, DATA).plain == "s\na\n"
    gsm8k = dataclasses.replace(DATA, data_source="gsm8k")
    found = read({"question": "a", "answer": "b #### 1,000", "messages": None}, gsm8k)
    assert (found.plain, answered(found), found.answer) == ("a\n", "b #### 1,000", "1000")


def test_what_cannot_be_used_is_told_by_its_reason_and_what_was_seen() -> None:
    asked = turn("user", "x")
    rows: list[tuple[dict[str, Any], str, str]] = [
        (
            {"text": "x", "id": 1},
            "no prompt, messages, conversations or instruction",
            "it has text, id",
        ),
        ({"question": "x", "answer": "y"}, "no prompt, messages, ", "it has question, answer"),
        ({}, "no prompt, messages, ", "it has nothing"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "a preference pair", "it has prompt, ch"),
        ({"chosen": SOLVED, "rejected": SOLVED}, "a preference pair", "it has chosen, rejected"),
        ({"prompt": "x", "completion": "y", "label": False}, "completion that its label calls", ""),
        ({"prompt": " "}, "empty", 'prompt is " "'),
        ({"prompt": 3}, "prompt that is no text", "it is 3"),
        ({"prompt": "x", "completion": 3}, "completion that is no text", "it is 3"),
        ({"prompt": []}, "empty", "prompt is []"),
        ({"prompt": SOLVED}, "prompt that ends in an assistant turn", "of user, assistant"),
        (
            {"prompt": [asked], "completion": [asked]},
            "completion that does not end in an",
            "user, user",
        ),
        ({"messages": "x"}, "messages that are no turns", 'it is "x"'),
        ({"messages": ["x"]}, "messages that are no turns", 'one is "x"'),
        ({"messages": [{"user": "x"}]}, "messages that are no turns", "a turn: it has user"),
        (
            {"messages": [{"role": "user"}]},
            "messages that are no turns",
            "a turn of user: it has role",
        ),
        ({"messages": [turn("user", "x"), turn("assistant", "")]}, "empty", 'of assistant is ""'),
        ({"messages": [turn("assistant", "x")]}, "no prompt", "its only turn is the assistant's"),
        ({"messages": [turn("system", "x")]}, "no question", "its turns are of system"),
        ({"instruction": ""}, "empty", 'instruction is ""'),
        (
            {"messages": [asked, turn("assistant", "", tool_calls="x")]},
            "tool_calls that are no",
            '"x"',
        ),
    ]
    for row, reason, seen in rows:
        with pytest.raises(Skip) as caught:
            read(row, DATA)
        assert caught.value.reason.startswith(reason), row
        assert seen in caught.value.seen, row


def test_a_preference_pair_that_also_has_messages_is_read_as_these() -> None:
    assert answered(read({"messages": SOLVED, "chosen": "a", "rejected": "b"}, DATA)) == "2"
    assert answered(read({"prompt": "x", "completion": "y", "label": True}, DATA)) == "y"
