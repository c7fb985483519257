"""Compose settings and `conf/` into a checked spec; the only module that uses Hydra.

Hydra composes the chosen groups (a file's defaults list, a pair's `override`). Single values are
then set in the plain result. The result is cached per choice of groups, so a grid of 10,000 points
calls Hydra a handful of times; a test checks that this equals Hydra composing each point whole.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from stillhouse import flags, tasks, watch_rules
from stillhouse.errors import ConfigError, nearest
from stillhouse.identity import to_plain
from stillhouse.spec import EvalJobSpec, EvalSpec, TrainSpec

Spec = TypeVar("Spec", TrainSpec, EvalSpec)
FILE_OF = {TrainSpec: "train", EvalSpec: "eval"}
OWN_PAIR, OWN_SUITE = "own", "local"  # in conf/pair, conf/suite: the user's own
# In the order they override one another (conf/train.yaml says the same).
GROUPS = {
    TrainSpec: frozenset({"quant", "data", "loss", "optim", "rescue", "site", "pair", "method"}),
    EvalSpec: frozenset({"quant", "data", "suite", "pair"}),
    EvalJobSpec: frozenset({"quant", "data", "suite", "pair", "site"}),
}


def conf_dir() -> Path:
    """`conf/` of the checkout, or the copy that an installed wheel carries."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def k8s_dir() -> Path:
    """`k8s/` of the checkout, or the copy that an installed wheel carries."""
    inside = Path(__file__).parent / "k8s"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "k8s"


@functools.cache
def vocabulary(spec_type: type[Any]) -> flags.Vocabulary:
    """The names that settings of this spec may use."""
    return flags.Vocabulary(spec_type, GROUPS[spec_type])


@dataclasses.dataclass(frozen=True)
class Overrides:
    """What is asked on top of the defaults: groups chosen, and values of single leaves."""

    groups: Mapping[str, str]
    values: Mapping[str, Any]  # dotted path -> value

    def over(self, other: Overrides) -> Overrides:
        """Self on top of `other`: choosing a group in self keeps the values set in `other`."""
        return Overrides({**other.groups, **self.groups}, {**other.values, **self.values})


def from_command_line(argv: list[str], spec_type: type[Any]) -> Overrides:
    """Overrides from words in either dialect.

    Raises:
        ConfigError: an unknown name, a value that cannot be read, a sweep (`lmbda=0,1`) where one
            value is wanted.
    """
    where = "command line"
    groups: dict[str, str] = {}
    values: dict[str, Any] = {}
    for setting in flags.parse(argv, vocabulary(spec_type), where):
        options = parse_value(setting, where)
        if len(options) != 1:
            raise ConfigError(
                f"{where}: {setting.key}={setting.text} is a sweep; one run wants one value"
                " (stillhouse run takes sweeps)"
            )
        if setting.is_group:
            groups[setting.key] = str(options[0])
        else:
            values[setting.key] = options[0]
    return Overrides(groups, values)


def parse_value(setting: flags.Setting, where: str) -> list[Any]:
    """The values a setting asks for: one, or several if it is a sweep in Hydra's syntax."""
    if "${" in setting.text:
        raise ConfigError(
            f"{where}: {setting.key}={setting.text}: let your shell fill in variables"
        )
    if setting.items:
        return [list(setting.items)]
    if setting.literal:
        return [None if setting.text == "null" else setting.text]
    if setting.text.startswith('{"'):  # JSON, as other tools take chat_template_kwargs
        with contextlib.suppress(ValueError):
            return [json.loads(setting.text)]
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"{setting.key}={setting.text}")
        if parsed.is_sweep_override():
            if not parsed.is_discrete_sweep():
                raise ConfigError(
                    f"{where}: {setting.key}={setting.text}: a grid needs a list"
                    " (0,0.5,1 or range(0,3))"
                )
            return [_plain(value) for value in parsed.sweep_iterator()]
    except HydraException as error:
        reason = str(error).splitlines()[0]
        flag = f"--{setting.key.rpartition('.')[2].replace('_', '-')}"
        cure = f"{flag} 'TEXT' takes it as it is" if setting.is_text else "quote odd characters"
        raise ConfigError(
            f'{where}: {setting.key}: cannot read "{setting.text}" ({reason}); {cure}'
        ) from error
    value = _plain(parsed.value())
    is_text = setting.is_text and isinstance(value, int | float)
    return [setting.text if is_text else value]  # a run may be called 12, and 1e-5 is a name too


def _plain(value: Any) -> Any:
    """Hydra's quoted strings and nested lists as plain Python."""
    if isinstance(value, list):
        return [_plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(v) for key, v in cast("dict[Any, Any]", value).items()}
    return value.text if hasattr(value, "text") else value


def resolve(key: str, value: Any, spec_type: type[Any], where: str) -> Overrides:
    """Overrides from one key of a sweep file, whose value is parsed already."""
    path, leaf = vocabulary(spec_type).find(key, where)
    if leaf is None:
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {path} names a file in conf/{path}, got {value!r}")
        return Overrides({path: value}, {})
    return Overrides({}, {path: value})


def data_file(name: str) -> Any:
    """What conf/NAME.yaml holds, as plain data."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{name}.yaml"), resolve=True)


def options_of(group: str) -> list[str]:
    """The files of a config group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


@functools.lru_cache(maxsize=256)
def _composed(config: str, groups: tuple[tuple[str, str], ...], where: str) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for group, option in groups:
        if option not in options_of(group):
            allowed = ", ".join(options_of(group))
            raise ConfigError(
                f'{where}: no "{option}" in conf/{group} ({allowed}).'
                f"{nearest(option, options_of(group))}"
            )
    choices = [f"{group}={option}" for group, option in groups]
    try:
        with initialize_config_dir(str(conf_dir().absolute()), version_base="1.3"):
            config_tree = compose(config, overrides=choices)
        return cast("dict[str, Any]", OmegaConf.to_container(config_tree, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"conf/{config}.yaml with {' '.join(choices)}: {error}") from error


@functools.cache
def _sections(spec_type: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(spec_type)]


@functools.cache
def _adapter(spec_type: type[Any]) -> Any:
    return TypeAdapter(spec_type)


def compose(overrides: Overrides, spec_type: type[Spec], where: str = "command line") -> Spec:
    """The checked spec that `conf/` and these overrides describe.

    Raises:
        ConfigError: an option that does not exist, a value of the wrong type or out of range.
    """
    groups = tuple(sorted(_chosen(overrides).items()))
    tree = _composed(FILE_OF[spec_type], groups, where)
    # A pair file brings settings for training too; a spec takes the sections it has.
    plain = {name: dict(tree[name]) for name in _sections(spec_type) if name in tree}
    for path, value in overrides.values.items():
        section, leaf = path.split(".")
        plain[section][leaf] = copy.copy(value)
    if "suite" in plain:
        plain["suite"] = tasks.completed(plain["suite"], where)
    return check(plain, spec_type, where)


def _chosen(overrides: Overrides) -> dict[str, str]:
    """The groups; OWN_PAIR where only weights are named, OWN_SUITE where only tasks are."""
    own: dict[str, str] = {}
    if {"pair.student", "pair.teacher"} & overrides.values.keys():
        own["pair"] = OWN_PAIR
    if overrides.values.get("suite.include_path") is not None:
        own["suite"] = OWN_SUITE
    return own | dict(overrides.groups)


def check(plain: Mapping[str, Any], spec_type: type[Spec], where: str) -> Spec:
    """A spec from plain dicts, or an error in words a person can act on."""
    try:
        spec = cast("Spec", _adapter(spec_type).validate_python(plain))
    except ValidationError as error:
        raise ConfigError(_explain(error, spec_type, where)) from error
    if isinstance(spec, TrainSpec):
        watch_rules.check(spec, where)
    return spec


def _explain(error: ValidationError, spec_type: type[Any], where: str) -> str:
    first = error.errors(include_url=False)[0]
    loc = [str(part) for part in first["loc"]]
    key = ".".join(loc[:2])
    value = first.get("input")
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [leaf.path for leaf in vocabulary(spec_type).leaves.values()]
        return f'{where}: no knob "{key}".{nearest(key, known)}'
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    if first["type"] == "string_type" and isinstance(value, int | float):
        reason += "; text that reads as a number stands in quotes"
    if dataclasses.is_dataclass(value) or isinstance(value, Mapping) or not key:
        return f"{where}: {key or 'settings'}: {reason}"
    return f"{where}: {key} = {value!r}: {reason}"


def help_text(script: str, spec_type: type[Any]) -> str:
    """Every group with its options and every knob with its default, for a terminal."""
    tree = _composed(FILE_OF[spec_type], (), script)
    lines = [f"python {script} [--knob VALUE | knob=VALUE ...]", "", "groups:"]
    groups = sorted(GROUPS[spec_type])
    lines += [f"  --{group:<8} {', '.join(options_of(group))}" for group in groups]
    lines += [
        "",
        "knobs, with the defaults of the default pair (their ranges: stillhouse/spec/):",
    ]
    for name, leaf in vocabulary(spec_type).leaves.items():
        section, _, key = leaf.path.partition(".")
        lines.append(f"  --{name.replace('_', '-'):<30} {_text(tree[section][key])}")
    return "\n".join(lines)


def as_command_line(overrides: Overrides) -> list[str]:
    """The overrides as words that any command of this project takes: what a person can paste."""
    words = [f"{group}={option}" for group, option in overrides.groups.items()]
    return words + [f"{path.split('.')[-1]}={_text(v)}" for path, v in overrides.values.items()]


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        items = cast("Iterable[Any]", value)
        return f"[{','.join(_text(item) for item in items)}]"
    if isinstance(value, dict):
        entries = cast("dict[str, Any]", value).items()
        if not all(_is_plain_key(key) for key, _ in entries):  # Hydra's grammar quotes no key
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        # A template writes 2.0 and 2 as they are.
        texts = (f"{k}:{v if isinstance(v, float) else _text(v)}" for k, v in entries)
        return f"{{{','.join(texts)}}}"
    if isinstance(value, float) and value.is_integer() and math.fabs(value) < 1e6:
        return str(int(value))
    if isinstance(value, str) and not _is_plain_word(value):
        # In Hydra's quotes a backslash is one, except in a row of them before a quote.
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
        escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
        return f"'{escaped}'"
    return str(value)


def _is_plain_key(text: Any) -> bool:
    # What is no text is of a sweep file, before anybody checked it.
    return isinstance(text, str) and ":" not in text and _is_plain_word(text)


def _is_plain_word(text: str) -> bool:
    """Whether Hydra's grammar reads these characters as the text they are, and nothing else."""
    if re.fullmatch(r"[A-Za-z_][\w./:@-]*|[/.][\w./:@-]*", text, re.ASCII) is None:
        return False
    return text.lower() not in ("null", "true", "false", "nan", "inf")


def as_json(spec: TrainSpec | EvalSpec) -> str:
    """A resolved spec as JSON, a line for each section; without the site, which is no pod's."""
    sections = {name: leaves for name, leaves in to_plain(spec).items() if name != "site"}
    lines = (f"{json.dumps(name)}: {_compact(leaves)}" for name, leaves in sections.items())
    return "{" + ",\n".join(lines) + "}"


def _compact(leaves: Any) -> str:
    return json.dumps(leaves, separators=(",", ":"), ensure_ascii=False)


def from_json(text: str, spec_type: type[Spec], where: str = "--spec") -> Spec:
    """The checked spec in such a text; its site is the default one.

    Raises:
        ConfigError: it is none.
    """
    try:
        plain: Any = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error}); a launcher writes it") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{where}: not an object of sections ({', '.join(_sections(spec_type))})")
    sections = cast("dict[str, Any]", plain)
    if "site" in _sections(spec_type):
        sections = {"site": _composed(FILE_OF[spec_type], (), where)["site"], **sections}
    return check(sections, spec_type, where)


def from_arguments(words: list[str], spec_type: type[Spec]) -> Spec:
    """The checked spec of a command line: a person's words, or a launcher's `--spec JSON`.

    Raises:
        ConfigError: it is none.
    """
    if words[:1] == ["--spec"] and len(words) == 2:
        return from_json(words[1], spec_type)
    return compose(from_command_line(words, spec_type), spec_type)
