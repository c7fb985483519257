"""Read YAML that people wrote: words stay text, and numbers are decimal.

PyYAML reads YAML 1.1: to it 5e-6 is text, 010 is eight, 1:30 is ninety, and `no` is false. Here
only what looks like a number, true, false or null is read as one; the rest is text. `${...}` is
refused, not filled in: somebody else's file must not depend on the environment of its reader.
"""

from __future__ import annotations

import math
import re
from typing import Any, cast

import yaml

_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STR = "tag:yaml.org,2002:str"
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "float": r"[-+]?(?:(?:0|[1-9][0-9_]*)?\.[0-9_]+|(?:0|[1-9][0-9_]*)\.?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
# What YAML 1.1 readers would take for another number than a person does.
_ODD_NUMBER = re.compile(
    r"[-+]?0[0-9_]+|[-+]?0[xXoObB][0-9a-fA-F_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+"
)


class _Loader(_BASE):
    """A loader of its own resolvers; the classes it comes from keep theirs."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), None
    )


def _text(loader: Any, node: Any) -> str:
    value = cast("str", loader.construct_scalar(node))
    if not node.style and _ODD_NUMBER.fullmatch(value):
        raise yaml.constructor.ConstructorError(
            problem=f"{value} is a number in another base to some readers and not to others;"
            " write it in decimal, or as text in quotes",
            problem_mark=node.start_mark,
        )
    if "${" in value:
        raise yaml.constructor.ConstructorError(
            problem=f"{value!r}: ${{…}} is not filled in; write what it stands for",
            problem_mark=node.start_mark,
        )
    return value


def _whole(loader: Any, node: Any) -> int:
    return int(loader.construct_scalar(node))


def _real(loader: Any, node: Any) -> float | str:
    written = cast("str", loader.construct_scalar(node))
    number = float(written.replace(".inf", "inf").replace(".nan", "nan"))
    # Beyond all numbers: the digits of a commit, such as 1234e567.
    return written if math.isinf(number) and "inf" not in written.lower() else number


def _mapping(loader: Any, node: Any) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                problem="found a list or a mapping as a key", problem_mark=key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                problem=f"found duplicate key {key}", problem_mark=key_node.start_mark
            )
        seen.add(key)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor(_STR, _text)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(text: str) -> Any:
    """What a YAML text says, as plain data.

    Raises:
        yaml.YAMLError: it is none, has a key twice, a number that means two things, or `${…}`; its
            `problem` says which, its `problem_mark` where.
        RecursionError: it nests too deep.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (KeyError, ValueError) as error:  # !!int x, or a number of ten thousand digits
        raise yaml.YAMLError(f"a value is not of its type: {error}") from error
