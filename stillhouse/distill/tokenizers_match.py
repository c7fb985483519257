"""Compare the labels of two tokenizers, so that token ids mean the same in both halves of a pair.

A student is compared with its teacher id by id, so one vocabulary entry in the wrong place is
enough to make a loss meaningless. These may differ: padding, truncation, the chat template, and
what is added around a sequence, because the student's tokenizer produces the ids that both models
read.
"""

from __future__ import annotations

import json
from typing import Any


def difference(student: Any, teacher: Any) -> str | None:
    """The first difference that affects ids, in words; None if there is none."""
    return (
        _vocabularies(student, teacher)
        or _end_and_start(student, teacher)
        or _special_tokens(student, teacher)
        or _rules(student, teacher)
    )


def _vocabularies(student: Any, teacher: Any) -> str | None:
    ours, theirs = (
        {number: token for token, number in text.get_vocab().items()} for text in (student, teacher)
    )
    for number in sorted(ours.keys() | theirs.keys()):
        if ours.get(number) != theirs.get(number):
            return (
                f"token {number} is {_shown(ours.get(number))} for the student and"
                f" {_shown(theirs.get(number))} for the teacher"
                f" ({len(ours)} and {len(theirs)} tokens)"
            )
    return None


def _end_and_start(student: Any, teacher: Any) -> str | None:
    # A student that learns to stop at one token from a teacher that stops at another never stops.
    for name in ("eos_token", "bos_token"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            return f"{name} is {_shown(ours)} for the student and {_shown(theirs)} for the teacher"
    return None


def _special_tokens(student: Any, teacher: Any) -> str | None:
    only_one = set(student.all_special_ids) ^ set(teacher.all_special_ids)
    only_one -= {student.pad_token_id, teacher.pad_token_id}
    if only_one:
        number = min(only_one)
        role = "student" if number in student.all_special_ids else "teacher"
        token = _shown(student.convert_ids_to_tokens(number))
        return f"token {number} ({token}) is special for the {role} only"
    return None


def _rules(student: Any, teacher: Any) -> str | None:
    ours, theirs = _rule_parts(student), _rule_parts(teacher)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) == theirs.get(name):
            continue
        if name == "merges" and ours.get(name) and theirs.get(name):
            pairs = list(zip(ours[name], theirs[name], strict=False))
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            return f"merge {at} differs ({len(ours[name])} and {len(theirs[name])} merges)"
        return f"the {name} of their tokenizer files differ, so one text becomes other ids"
    return None


def _rule_parts(text: Any) -> dict[str, Any]:
    """How text becomes ids, except the vocabulary; {} for a tokenizer without a fast backend."""
    if getattr(text, "backend_tokenizer", None) is None:
        return {}
    whole = json.loads(text.backend_tokenizer.to_str())
    parts = {name: whole[name] for name in ("normalizer", "pre_tokenizer")}
    return parts | {name: value for name, value in whole["model"].items() if name != "vocab"}


def _shown(token: str | None) -> str:
    return "missing" if token is None else json.dumps(token, ensure_ascii=False)
