"""Parse a command line in either dialect, Hydra's or flags, into one list of settings.

Hydra's (`optim.learning_rate=5e-6`, `lmbda=0`, `pair=tiny`) and flags (`--learning-rate 5e-6`,
`--per-device-train_batch-size 2`, repeatable `--tags`, `--no-eval-teacher`) may be mixed. A name
that is neither a leaf nor a group raises an error that suggests the nearest one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from stillhouse.errors import ConfigError, nearest
from stillhouse.spec import EvalSpec, TrainSpec

# `quant_type` is a leaf and chooses the quant group: an int4 student comes with int4's group size.
GROUP_OF_LEAF = {"quant_type": "quant"}

Kind = Literal["text", "texts", "flag", "other"]


@dataclass(frozen=True)
class Leaf:
    """One knob: where it lies in the config and how its text is to be read."""

    path: str  # "optim.learning_rate"
    kind: Kind


@dataclass(frozen=True)
class Setting:
    """One thing a command line asks for, before its value is parsed."""

    key: str  # a leaf's dotted path, or a group's name
    text: str
    is_group: bool
    literal: bool  # the text is the value itself, not Hydra's grammar
    items: tuple[str, ...] = ()  # of a repeated list flag
    is_text: bool = False  # of a leaf that holds text, so that 12 is one


def leaves(spec_type: type[Any]) -> dict[str, Leaf]:
    """Every leaf of a spec, by its unique name."""
    found: dict[str, Leaf] = {}
    for section in dataclasses.fields(spec_type):
        section_type = typing.get_type_hints(spec_type)[section.name]
        hints = typing.get_type_hints(section_type)
        for leaf in dataclasses.fields(section_type):
            assert leaf.name not in found, f"leaf {leaf.name} stands in two sections"
            found[leaf.name] = Leaf(f"{section.name}.{leaf.name}", _kind(hints[leaf.name]))
    return found


def _kind(annotation: Any) -> Kind:
    if annotation is bool:
        return "flag"
    if annotation == tuple[str, ...]:
        return "texts"
    options = typing.get_args(annotation)
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    if annotation is str or (is_union and set(options) <= {str, type(None)}):
        return "text"
    if typing.get_origin(annotation) is Literal and all(isinstance(o, str) for o in options):
        return "text"
    return "other"


class Vocabulary:
    """The names a command line may use: leaves (bare or dotted) and config groups."""

    def __init__(self, spec_type: type[Any], groups: frozenset[str]) -> None:
        self.leaves = leaves(spec_type)
        self.groups = groups
        self._paths = {leaf.path: leaf for leaf in self.leaves.values()}

    def find(self, name: str, where: str) -> tuple[str, Leaf | None]:
        """The key that `name` means: (group, None) or (dotted path, leaf).

        Raises:
            ConfigError: no such knob; the message names the nearest one.
        """
        name = GROUP_OF_LEAF.get(name.rpartition(".")[2], name)
        if name in self.groups:
            return name, None
        leaf = self.leaves.get(name) or self._paths.get(name)
        if leaf is None:
            known = [*self.leaves, *self.groups, *self._paths]
            cure = _elsewhere(name) or nearest(name, known)
            raise ConfigError(f'{where}: no knob "{name}".{cure}')
        return leaf.path, leaf


def _elsewhere(name: str) -> str:
    """Which entry point has this knob, in a sentence; "" where none has."""
    spec_types: dict[str, type[Any]] = {"train.py": TrainSpec, "eval.py": EvalSpec}
    for script, spec_type in spec_types.items():
        known = leaves(spec_type)
        if name in known or name in {leaf.path for leaf in known.values()}:
            return f" It is a knob of {script}."
    return ""


def parse(argv: list[str], vocabulary: Vocabulary, where: str = "command line") -> list[Setting]:
    """The settings of a command line, in order; repeated list flags are one setting.

    Raises:
        ConfigError: an unknown name, a flag without its value, a word that is neither dialect.
    """
    settings: list[Setting] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            settings.append(_hydra(word, vocabulary, where))
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        negated = name.startswith("no_") and name[3:] in vocabulary.leaves
        key, leaf = vocabulary.find(name[3:] if negated else name, f"{where}: --{word[2:]}")
        kind = leaf.kind if leaf else "text"
        if negated and (kind != "flag" or equals):
            raise ConfigError(
                f"{where}: {word}: only a yes/no knob can be negated, without a value"
            )
        if kind == "flag" and not equals:
            settings.append(Setting(key, "false" if negated else "true", False, False))
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{where}: {word} needs a value")
            value = words.pop(0)
        if kind == "texts":
            settings.append(_appended(settings, key, value))
        else:
            settings.append(Setting(key, value, leaf is None, kind == "text"))
    return settings


def _appended(settings: list[Setting], key: str, item: str) -> Setting:
    """The list flag with one more item; a value set in the other dialect is replaced."""
    last = next((s for s in reversed(settings) if s.key == key), None)
    items = (*last.items, item) if last else (item,)
    return Setting(key, ",".join(items), False, True, items)


def _hydra(word: str, vocabulary: Vocabulary, where: str) -> Setting:
    key, equals, text = word.partition("=")
    if not equals or not key or key[0] in "+~":
        raise ConfigError(
            f'{where}: "{word}" is neither KEY=VALUE nor a flag (--key VALUE);'
            " adding or deleting knobs (+, ~) is not possible"
        )
    path, leaf = vocabulary.find(key.replace("-", "_"), where)
    is_text = leaf is not None and leaf.kind == "text"
    return Setting(path, text, leaf is None, False, is_text=is_text)
