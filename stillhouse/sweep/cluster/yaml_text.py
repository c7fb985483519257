"""Write a manifest as YAML: the bytes that are shown are the bytes that are sent.

A few lines of our own, because PyYAML takes several times as long, which matters for thousands of
Jobs. Text is quoted as soon as some YAML version could read it as anything else.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any, cast

from stillhouse.rundir import Json

_PLAIN = re.compile(r"(?:--)?[A-Za-z/][A-Za-z0-9_./=@-]*")
_NOT_TEXT = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"})


def to_yaml(manifest: Json) -> bytes:
    """A manifest of mappings, lists, text, whole numbers, true, false and null, as YAML."""
    lines: list[str] = []
    _write(manifest, "", "", lines)
    return "".join(f"{line}\n" for line in lines).encode()


def _write(node: Any, lead: str, indent: str, lines: list[str]) -> None:
    """The lines of a mapping or list that is not empty; `lead` stands before the first of them."""
    deeper = f"{indent}  "
    if isinstance(node, dict):
        for key, value in cast("Json", node).items():
            if isinstance(value, dict | list) and value:
                lines.append(f"{lead}{_scalar(key)}:")
                _write(value, deeper, deeper, lines)
            else:
                lines.append(f"{lead}{_scalar(key)}: {_scalar(value)}")
            lead = indent
        return
    for item in cast("list[Any]", node):
        if isinstance(item, dict | list) and item:
            _write(item, f"{lead}- ", deeper, lines)
        else:
            lines.append(f"{lead}- {_scalar(item)}")
        lead = indent


def _scalar(value: Any) -> str:
    # Numbers, true, null, {} and []: YAML reads JSON.
    return _text(value) if isinstance(value, str) else json.dumps(value)


@functools.lru_cache(maxsize=4096)  # a Job has few texts of its own
def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT:
        return text
    return '"' + re.sub(r'[^ -~]|["\\]', _escape, text) + '"'


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] in '"\\':
        return f"\\{match[0]}"
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
