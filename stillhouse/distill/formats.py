"""Parse a row of training data, in any supported format, into one conversation.

The first of these fields that is present and not null decides the format:

    messages       [{role, content}, …]; or from/value in place of role/content
    conversations  the same, as in ShareGPT: human, gpt, observation, function_call, …
    prompt         a string, or [{role, content}, …]; completion: the same, or absent (TRL)
    instruction    and input (or context), output (or response), history, system (Alpaca, Dolly)
    question       and answer: GSM8K's form, if data_source is gsm8k

So if a row has both messages and a prompt, its messages count: the prompt repeats their start.
A null (in a row, a message, a tool call) counts as absent. A conversation that ends in an
assistant's turn has an answer; one that ends in a user's or a tool's turn is a prompt only. Every
other field of a message (tool_calls, tool_call_id, name, reasoning_content) is passed on to the
chat template.

This module needs neither torch nor a tokenizer. A row that cannot be used raises `Skip`, which
names the problem in the file's own terms.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from stillhouse.spec import DataSpec

Row = dict[str, Any]
Turn = dict[str, Any]  # role, content (a string), and what else the template may read

UNDERSTOOD = (
    "prompt[, completion], messages, conversations (ShareGPT) or instruction[, input, output]"
    " (Alpaca); question, answer with data=gsm8k"
)
# Other projects' names for the roles. No chat template uses these, so they are unambiguous …
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant"}
ROLES |= {"bing": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
# … and these count in ShareGPT's `from` only: as roles, templates distinguish them.
SPEAKERS = ROLES | dict.fromkeys(
    ("observation", "function", "function_response", "tool_response"), "tool"
)
TEXTS = ("text", "input_text", "output_text", "without a type")  # types of a part
SHOWN = 60  # characters of a value that messages show


class Skip(Exception):
    """A row that cannot be used: the reason it is counted under, and what was found instead."""

    def __init__(self, reason: str, seen: str = "") -> None:
        super().__init__(reason)
        self.reason, self.seen = reason, seen


@dataclass(frozen=True)
class Conversation:
    """A row in the common form that all formats are converted to."""

    turns: list[Turn]  # ends where the assistant has to speak
    completion: Turn | None  # the assistant's turn that follows in the data
    tools: list[Any] | None  # the tools that may be called, in the chat template's format
    plain: str  # the same prompt for a tokenizer without a chat template
    answer: str | None  # what a correct completion ends in, if the source says so


def read(row: Row, data: DataSpec) -> Conversation:
    """The conversation in a row. Raises Skip if there is none, or none to learn from."""
    row = {name: value for name, value in row.items() if _is_there(value)}
    if data.data_source == "gsm8k":
        return _question(row, data)
    if {"chosen", "rejected"} <= row.keys() and not {"messages", "conversations"} & row.keys():
        raise Skip(
            "a preference pair (chosen, rejected): which of them is to be learnt is not said",
            columns(row),
        )
    if row.get("label") is False and "completion" in row:
        raise Skip("completion that its label calls false", columns(row))
    for field, reader in _READERS.items():
        if field in row:
            return reader(row, data)
    raise Skip("no prompt, messages, conversations or instruction", columns(row))


def columns(row: Row) -> str:
    """The names of what a row has, for a sentence."""
    return f"it has {', '.join(map(str, row))}" if row else "it has nothing"


# ---------------------------------------------------------------- the forms


def _question(row: Row, data: DataSpec) -> Conversation:
    """GSM8K's form: a question, and an answer whose number follows ####."""
    question, solution = _text(row, "question"), _text(row, "answer")
    prompt = _asked(question, data)
    number = solution.rpartition("####")[2].strip().replace(",", "") if "####" in solution else None
    return Conversation([_user(prompt)], _assistant(solution), None, prompt + "\n", number)


def _messages(row: Row, data: DataSpec) -> Conversation:
    field = "messages" if "messages" in row else "conversations"
    turns = _turns(row[field], field)
    completion = turns.pop() if turns[-1]["role"] == "assistant" else None
    return _conversation(row, data, turns, completion)


def _prompt(row: Row, data: DataSpec) -> Conversation:
    """A prompt, and a completion if there is one; each is a string or a list of messages."""
    if isinstance(row["prompt"], list):
        turns = _turns(row["prompt"], "prompt")
    else:
        turns = [_user(_text(row, "prompt"))]
    if turns[-1]["role"] == "assistant":
        raise Skip("prompt that ends in an assistant turn", _roles(turns))
    completion = None
    if isinstance(row.get("completion"), list):
        # Of several turns (a call, its result, the answer), only the last is trained on.
        turns += _turns(row["completion"], "completion")
        if turns[-1]["role"] != "assistant":
            raise Skip("completion that does not end in an assistant turn", _roles(turns))
        completion = turns.pop()
    elif "completion" in row:
        completion = _assistant(_text(row, "completion"))
    end = "" if isinstance(row["prompt"], str) else "\n"  # a plain text is used unchanged
    return _conversation(row, data, turns, completion, end)


def _instruction(row: Row, data: DataSpec) -> Conversation:
    """Alpaca's form, and Dolly's names for it; the input stands under the instruction."""
    turns: list[Turn] = []
    for pair in row.get("history", []):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise Skip("history that is no list of [question, answer]", f"it has {_shown(pair)}")
        turns += [_user(pair[0]), _assistant(pair[1])]
    text = _text(row, "instruction")
    for field in ("input", "context"):
        if row.get(field, "") != "":
            text += f"\n{_text(row, field)}"
    output = next((field for field in ("output", "response") if field in row), None)
    completion = None if output is None else _assistant(_text(row, output))
    return _conversation(row, data, [*turns, _user(text)], completion)


_READERS = {
    "messages": _messages,
    "conversations": _messages,
    "prompt": _prompt,
    "instruction": _instruction,
}


def _conversation(
    row: Row, data: DataSpec, turns: list[Turn], completion: Turn | None, end: str = "\n"
) -> Conversation:
    """Build a conversation from turns before the assistant speaks; apply prompt_template."""
    if not turns:
        raise Skip("no prompt", "its only turn is the assistant's")
    if completion is None and turns[-1]["role"] == "system":
        raise Skip("no question", _roles(turns))
    questions = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    last = questions[-1] if questions else -1
    turns[last] = turns[last] | {"content": _asked(turns[last]["content"], data)}
    system = row.get("system")  # a field of its own, as Anthropic's and Alpaca's rows have it
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    plain = "\n".join(turn["content"] for turn in turns) + end
    return Conversation(turns, completion, _tools(row), plain, _answer(row))


def _asked(question: str, data: DataSpec) -> str:
    """The question, inserted into data.prompt_template."""
    return (data.prompt_template or "{question}").replace("{question}", question)


# ---------------------------------------------------------------- turns


def _turns(messages: Any, field: str) -> list[Turn]:
    if not isinstance(messages, list):
        raise Skip(f"{field} that are no turns", f"it is {_shown(messages)}")
    turns = [_turn(message, field) for message in messages]
    if not turns:
        raise Skip("empty", f"{field} is []")
    for turn in turns:
        # A tool may return nothing, and a tool call needs no text.
        if not (turn["content"].strip() or turn["role"] == "tool" or turn.get("tool_calls")):
            raise Skip("empty", f"a turn of {turn['role']} is {_shown(turn['content'])}")
    return turns


def _turn(message: Any, field: str) -> Turn:
    """A message without its nulls, its content one string, its calls' arguments parsed."""
    turn = _without_nulls(message)
    if not isinstance(turn, dict):
        raise Skip(f"{field} that are no turns", f"one is {_shown(message)}")
    if "role" not in turn and isinstance(turn.get("from"), str):
        turn = _from_sharegpt(turn)
    if not isinstance(turn.get("role"), str):
        raise Skip(f"{field} that are no turns", f"a turn: {columns(turn)}")
    turn["role"] = ROLES.get(turn["role"], turn["role"])
    calls = turn.get("tool_calls")
    if calls == []:
        del turn["tool_calls"]
    elif calls is not None:
        turn["tool_calls"] = [_parsed_call(call) for call in _listed(calls, "tool_calls")]
    content = turn.get("content", "" if turn.get("tool_calls") else None)
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise Skip(f"{field} that are no turns", f"a turn of {turn['role']}: {columns(turn)}")
    return turn | {"content": content}


def _part(part: Any) -> str:
    """The text of a part of a message.

    Parts are joined with nothing between: so do the templates that read parts, and one string is
    what all others need. A template that reads only parts gets them back as one.
    """
    if isinstance(part, str):
        return part
    kind = part.get("type", "without a type") if isinstance(part, dict) else _shown(part)
    if isinstance(part, dict) and "text" in part and kind in TEXTS:
        return _text(part, "text") if part["text"] else ""
    raise Skip("content with parts that are no text", f"a part is {kind}")


def _from_sharegpt(turn: Turn) -> Turn:
    """from and value as role and content; a function_call's value is a call or several, as JSON."""
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    speaker, value = turn["from"], turn.get("value")
    if speaker != "function_call":
        return rest | {"role": SPEAKERS.get(speaker, speaker), "content": value}
    calls = _parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise Skip("function_call that is no call", f"it is {_shown(value)}")
    functions = [{"type": "function", "function": call} for call in calls]
    return rest | {"role": "assistant", "tool_calls": functions}


def _parsed_call(call: Any) -> Any:
    """A call whose arguments are an object: as JSON in a string, templates would quote them."""
    if not isinstance(call, dict):
        raise Skip("tool_calls that are no calls", f"one is {_shown(call)}")
    if isinstance(call.get("function"), dict):
        return call | {"function": _parsed_call(call["function"])}
    arguments = _parsed(call.get("arguments"))
    return call | {"arguments": arguments} if isinstance(arguments, dict) else call


def _tools(row: Row) -> list[Any] | None:
    """The tools that may be called: a list of objects, or JSON of the list or of each object."""
    listed = _listed(row.get("tools", []), "tools")
    tools = [_without_nulls(_parsed(tool)) for tool in listed]
    for tool in tools:
        if not isinstance(tool, dict):
            raise Skip("tools that are no list of objects", f"one is {_shown(tool)}")
    return tools or None


def _listed(value: Any, field: str) -> list[Any]:
    found = [] if value == "" else _parsed(value)
    if not isinstance(found, list):
        raise Skip(f"{field} that are no list", f"it is {_shown(value)}")
    return found


def _parsed(value: Any) -> Any:
    """The value of JSON in a string; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _without_nulls(value: Any) -> Any:
    """The value without null fields: in a table, each row has the fields of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if _is_there(inner)}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- values


def _is_there(value: Any) -> bool:
    """Whether a field holds something; a table may give a missing number as nan."""
    return value is not None and not (isinstance(value, float) and value != value)


def _text(row: Row, field: str) -> str:
    if field not in row:
        raise Skip(f"no {field} field", columns(row))
    value = row[field]
    if not isinstance(value, str):
        raise Skip(f"{field} that is no text", f"it is {_shown(value)}")
    if not value.strip():
        raise Skip("empty", f"{field} is {_shown(value)}")
    return value


def _answer(row: Row) -> str | None:
    value = row.get("answer")
    return str(value) if isinstance(value, str | int) else None


def _user(text: str) -> Turn:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def _roles(turns: list[Turn]) -> str:
    return f"its turns are of {', '.join(turn['role'] for turn in turns)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
