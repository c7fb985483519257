"""Select failed points for `retry`: by a condition on their config fields, or by kind of cause.

    --where 'learning_rate > 1e-5 and lmbda in (0, 0.5)'      --cause oom

The condition is parsed, never executed: it can hold config fields, values and comparisons only.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from stillhouse.errors import (
    CANNOT_START,
    DIVERGED,
    MISTAKE,
    OUT_OF_MEMORY,
    TOO_LATE,
    ConfigError,
    nearest,
)
from stillhouse.flags import GROUP_OF_LEAF
from stillhouse.identity import to_plain
from stillhouse.sweep.points import Point
from stillhouse.sweep.state import Observation

CODES = {
    "oom": OUT_OF_MEMORY,
    "diverged": DIVERGED,
    "config": MISTAKE,
    "deadline": TOO_LATE,
    "cannot-start": CANNOT_START,
}
CAUSES = (*CODES, "infrastructure")

Knobs = Mapping[str, Any]

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, values: value in values,
    ast.NotIn: lambda value, values: value not in values,
}
_WORDS = {"true": True, "false": False, "null": None}  # as YAML and a command line say them


class Condition:
    """The condition of `--where`, as a test of a point's config fields.

    Raises:
        ConfigError: not a condition.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(f"--where {text!r}: {self._wanted}") from error
        self._check(self._tree)

    _wanted = (
        "a condition is KNOB COMPARISON VALUE, with and, or, not, in and parentheses:"
        " 'learning_rate > 1e-5'; text is quoted: quant == 'int4'"
    )

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                pass
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=part):
                parts = [part]
            case ast.Compare(left=left, comparators=rest, ops=ops) if all(
                type(op) in _COMPARE for op in ops
            ):
                parts = [left, *rest]
            case ast.Name() | ast.Constant(value=str() | int() | float() | None):
                parts = []
            case _:
                raise ConfigError(f"--where {self.text!r}: {self._wanted}")
        for part in parts:
            self._check(part)

    def holds(self, knobs: Knobs) -> bool:
        """Whether the condition is true for a point with these config fields.

        Raises:
            ConfigError: it names no knob of the point, or compares what has no order.
        """
        try:
            return bool(self._value(self._tree, knobs))
        except TypeError as error:
            raise ConfigError(f"--where {self.text!r}: {error}") from error

    def _value(self, node: ast.expr, knobs: Knobs) -> Any:
        match node:
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(self._value(part, knobs) for part in parts)
            case ast.BoolOp(values=parts):
                return any(self._value(part, knobs) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=part):
                return not self._value(part, knobs)
            case ast.UnaryOp(operand=part):
                return -self._value(part, knobs)
            case ast.Compare(left=left, ops=ops, comparators=rest):
                values = [self._value(part, knobs) for part in (left, *rest)]
                pairs = zip(values, values[1:], strict=False)
                return all(_COMPARE[type(op)](*pair) for op, pair in zip(ops, pairs, strict=True))
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return tuple(self._value(part, knobs) for part in parts)
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._knob(name, knobs)
            case _:  # `_check` let nothing else in
                raise AssertionError(node)

    def _knob(self, name: str, knobs: Knobs) -> Any:
        for key in (name, GROUP_OF_LEAF.get(name, name)):
            if key in knobs:
                return knobs[key]
        if name in _WORDS:
            return _WORDS[name]
        raise ConfigError(
            f'--where {self.text!r}: no knob "{name}" ({", ".join(knobs) or "none is known"}); with'
            f" the sweep's file as the target every knob is known.{nearest(name, knobs)}"
        )


def knobs_of(point: Point) -> dict[str, Any]:
    """A point's config fields: all, where the sweep file is at hand; else the axes only."""
    if point.resolved is None:
        return point.overrides
    sections = to_plain(point.resolved).values()
    return {k: v for section in sections for k, v in section.items()} | point.overrides


def is_caused_by(seen: Observation, cause: str) -> bool:
    """Whether a point that failed did so for this kind of cause."""
    return cause == next((k for k, code in CODES.items() if code == seen.exit_code), CAUSES[-1])


def check_cause(word: str) -> str:
    """The word, if it is a kind of cause.

    Raises:
        ConfigError: it is not.
    """
    if word not in CAUSES:
        raise ConfigError(f"--cause {word}: one of {', '.join(CAUSES)}.{nearest(word, CAUSES)}")
    return word
