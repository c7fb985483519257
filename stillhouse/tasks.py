"""Read the user's own lm-eval tasks: YAML files below a suite's include_path.

A task is its YAML with all that it includes, the Python files that its `!function` tags name, and
the files of its data. Their digest is part of the question that a score answers, and these files
are sent to a cluster. Nothing is executed here and lm-eval is not imported, so a laptop that only
launches can tell what a suite asks for.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stillhouse.errors import ConfigError, nearest
from stillhouse.spec import ID_DIGITS, MISSING, REQUANTISED, SuiteSpec

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it names a file: eval/<task>.json
PASSED_OVER = {"__pycache__", ".ipynb_checkpoints"}  # lm-eval skips them too
IN_BUNDLE = "tasks"  # where these files lie beside the code that travels to a cluster
Plain = dict[str, Any]


@dataclass(frozen=True)
class Function:
    """What `!function module.name` names: a function of a Python file beside the YAML."""

    file: Path
    name: str


@dataclass(frozen=True)
class OwnTask:
    """A task that a YAML file below include_path describes."""

    name: str
    yaml: Path
    files: tuple[Path, ...]  # all that it is made of, relative to include_path, sorted
    config: Mapping[str, Any]  # with what it includes; functions are not loaded

    def digest(self, root: Path) -> str:
        """Ten hex digits of the names and bytes of its files."""
        hasher = hashlib.sha256()
        for file in self.files:
            hasher.update(f"{file.as_posix()}\n{_digest_of(root / file)}\n".encode())
        return hasher.hexdigest()[:ID_DIGITS]


def completed(suite: Plain, where: str) -> Plain:
    """A suite as plain data, with every task of include_path in full: metric, digest.

    `tasks` may hold bare names, or be null for all tasks that are there. A suite that was already
    completed is not checked again, as in a pod: loading a task compares its digest.

    Raises:
        ConfigError: a directory, file, function or metric that is not there or cannot be read.
    """
    include, tasks = suite.get("include_path"), suite.get("tasks")
    if include == MISSING:
        raise ConfigError(
            f"{where}: suite {suite.get('suite_name')} is of tasks of your own: include_path=DIR"
            " says where their YAML files are"
        )
    if include is None:
        bare = [tasks] if isinstance(tasks, str) else [t for t in tasks or () if isinstance(t, str)]
        if bare:
            raise ConfigError(
                f"{where}: task {bare[0]}: include_path=DIR says where its YAML is; a task of"
                " lm-eval's own is written in full: {task: NAME, metric: NAME, num_fewshot: null,"
                " higher_is_better: true}"
            )
        return suite
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(include, str) or (tasks is not None and not isinstance(tasks, list | tuple)):
        return suite  # whoever checks the types says so
    entries: list[Any] = [*cast("list[Any]", tasks or [])]
    if all(map(_is_whole, entries)) and any(map(_is_own, entries)):
        return suite
    own = read(include, where)
    done = [_completed(entry, own, Path(include), where) for entry in entries or own]
    if not any(map(_is_own, done)):
        raise ConfigError(
            f"{where}: include_path {include} has none of the suite's tasks; it has"
            f" {', '.join(own)} (tasks=[{next(iter(own))}] asks one)"
        )
    return {**suite, "tasks": done}


def _is_whole(entry: Any) -> bool:
    wanted = {"task", "metric", "num_fewshot", "higher_is_better"}
    return isinstance(entry, dict) and wanted <= {*cast("Plain", entry)}


def _is_own(entry: Any) -> bool:
    return isinstance(entry, dict) and cast("Plain", entry).get("content") is not None


def _completed(entry: Any, own: Mapping[str, OwnTask], root: Path, where: str) -> Any:
    given = cast("Plain", {"task": entry} if isinstance(entry, str) else entry)
    if not isinstance(entry, dict | str) or not isinstance(given.get("task"), str):
        return given
    name = given["task"].removesuffix(REQUANTISED)
    task = own.get(name)
    if task is None:
        if set(given) == {"task"}:
            raise ConfigError(
                f'{where}: no task "{name}" in include_path {root} ({", ".join(own)}).'
                f"{nearest(name, own)}"
            )
        return given  # lm-eval's own, written in full
    is_said = {"metric", "higher_is_better"} <= set(given)
    metric = {} if is_said else _metric(task, given.get("metric"), where)
    content = {"num_fewshot": None, "content": task.digest(_expanded(str(root)))}
    return {**metric, **content, **given}


def _metric(task: OwnTask, wanted: Any, where: str) -> Plain:
    """The metric that is reported: the wanted one of a task's metric_list, or its first."""
    listed: Any = task.config.get("metric_list")
    entries = cast("list[Any]", listed if isinstance(listed, list) else [])
    metrics = [cast("Plain", entry) for entry in entries if isinstance(entry, dict)]
    names = [_name_of(entry.get("metric")) for entry in metrics]
    if wanted is not None and wanted not in names:
        there = ", ".join(name for name in names if name)
        raise ConfigError(
            f"{where}: {task.yaml}: metric_list has no {wanted} ({there});"
            " higher_is_better beside it says how another is read"
        )
    place = 0 if wanted is None else names.index(wanted)
    name = names[place] if names else None
    if name is None:
        raise ConfigError(
            f"{where}: {task.yaml}: metric_list does not name a metric; the first one of"
            " `metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]` is"
            " the number that is quoted"
        )
    is_better = metrics[place].get("higher_is_better")
    if not isinstance(is_better, bool):
        raise ConfigError(
            f"{where}: {task.yaml}: metric {name} does not say higher_is_better: true or false"
        )
    return {"metric": name, "higher_is_better": is_better}


def _name_of(metric: Any) -> str | None:
    """What lm-eval calls a metric: a function by its own name."""
    name = metric.name if isinstance(metric, Function) else metric
    return name if isinstance(name, str) else None


# ---------------------------------------------------------------- files


def read(include_path: str, where: str) -> dict[str, OwnTask]:
    """Every task below a directory, by its name, in the order of the files' names.

    Raises:
        ConfigError: no such directory, no task in it, a file that cannot be read as a task.
    """
    root = _expanded(include_path)
    if not root.is_dir():
        raise ConfigError(f"{where}: include_path {include_path}: no such directory")
    found: dict[str, OwnTask] = {}
    for file in sorted(root.rglob("*.yaml")):
        if PASSED_OVER & {*file.parts}:
            continue
        task = _task(file, root, where)
        if task is None:
            continue
        if task.name in found:
            raise ConfigError(
                f"{where}: two files describe the task {task.name}: {found[task.name].yaml} and"
                f" {task.yaml}"
            )
        found[task.name] = task
    if not found:
        raise ConfigError(
            f"{where}: include_path {include_path}: no *.yaml below it describes a task (`task:"
            " NAME`)"
        )
    return found


def chosen(suite: SuiteSpec, where: str) -> dict[str, OwnTask]:
    """The user's own tasks that a suite contains, by lm-eval's name.

    Raises:
        ConfigError: their files are not what they were when the suite was read.
    """
    own = {} if suite.include_path is None else read(suite.include_path, where)
    found: dict[str, OwnTask] = {}
    for spec in suite.tasks:
        if spec.content is None or suite.include_path is None:
            continue
        task = own.get(spec.asks)
        if task is None or task.digest(_expanded(suite.include_path)) != spec.content:
            raise ConfigError(
                f"{where}: task {spec.asks}: its files below {suite.include_path} changed since it"
                " was asked for; run the command again, or restore them"
            )
        found[spec.asks] = task
    return found


def _expanded(include_path: str) -> Path:
    return Path(include_path).expanduser()


def _task(file: Path, root: Path, where: str) -> OwnTask | None:
    """The task of a YAML file; None of one that only others include, or that is a group."""
    files: set[Path] = set()
    config = _config(file, root, files, where, ())
    name = config.get("task")
    if not isinstance(name, str) or "group" in config:
        return None
    if not TASK_NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {file}: task {name!r}: letters, digits, dot, dash and underscore make a name"
        )
    for function in _functions(config):
        files.add(function.file)
    files |= {*_data_files(config, file, root, where)}
    inside = {_inside(path, root, file, where) for path in files}
    return OwnTask(name, file, tuple(sorted(inside)), config)


def _inside(path: Path, root: Path, of: Path, where: str) -> Path:
    """A path relative to include_path; a path outside of it is refused (ConfigError)."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"{where}: {of}: {path} is outside of include_path {root}; what a task is made of lies"
            " below it, so that it can be told apart, and taken along to a cluster"
        )
    return path.resolve().relative_to(root.resolve())


def _config(
    file: Path, root: Path, files: set[Path], where: str, including: tuple[Path, ...]
) -> Plain:
    """A YAML file with what it includes below it, as lm-eval merges them."""
    _inside(file, root, including[-1] if including else file, where)
    if file.resolve() in {path.resolve() for path in including}:
        raise ConfigError(f"{where}: {file}: includes itself")
    files.add(file)
    own = _parsed(file, where)
    includes: Any = own.pop("include", [])
    merged: Plain = {}
    for include in cast("list[Any]", includes if isinstance(includes, list) else [includes]):
        other = file.parent / str(include)
        if not other.is_file():
            raise ConfigError(f"{where}: {file}: include: {include}: no such file")
        merged |= _config(other, root, files, where, (*including, file))
    merged.pop("task_list", None)
    return merged | own


def _parsed(file: Path, where: str) -> Plain:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: Loader, node: yaml.Node) -> Function:
        named = str(loader.construct_scalar(cast("yaml.ScalarNode", node)))
        return _function(named, file, where)

    Loader.add_constructor("!function", function)
    try:
        with file.open("rb") as opened:
            content: Any = yaml.load(opened, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: {file}{line}: not YAML ({reason})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: {file}: not a mapping; a task is one (`task: NAME` …)")
    return cast("Plain", content)


def _function(named: str, file: Path, where: str) -> Function:
    """The function that a tag names; its file is beside the YAML, and is not imported here."""
    module, _, name = named.rpartition(".")
    python = file.parent / f"{module.replace('.', '/')}.py"
    if not module or not python.is_file():
        raise ConfigError(
            f"{where}: {file}: !function {named}: no file {python}; a function is"
            " FILE.NAME, of a Python file beside the YAML"
        )
    if not re.search(rf"\b{re.escape(name)}\b", python.read_text("utf-8", errors="replace")):
        raise ConfigError(f"{where}: {file}: !function {named}: {python} has no {name}")
    return Function(python, name)


def _functions(value: Any) -> Iterator[Function]:
    if isinstance(value, Function):
        yield value
    elif isinstance(value, dict):
        for inner in cast("Plain", value).values():
            yield from _functions(inner)
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _functions(inner)


# ---------------------------------------------------------------- data


def with_data(config: Plain, yaml: Path) -> Plain:
    """The config with every path of its own data files absolute, whatever directory we are in."""
    folder = yaml.parent.absolute()
    config = dict(config)
    kwargs = config.get("dataset_kwargs")
    if isinstance(kwargs, dict):
        config["dataset_kwargs"] = {
            key: _at(value, folder) if key in ("data_files", "data_dir") else value
            for key, value in cast("Plain", kwargs).items()
        }
    path = config.get("dataset_path")
    if isinstance(path, str) and (folder / path).exists():
        config["dataset_path"] = str(folder / path)
    return config


def _at(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return value if "://" in value else str(folder / value)
    if isinstance(value, dict):
        return {key: _at(inner, folder) for key, inner in cast("Plain", value).items()}
    return [_at(inner, folder) for inner in cast("list[Any]", value)]


def _data_files(config: Plain, yaml: Path, root: Path, where: str) -> Iterator[Path]:
    """The files of a task's own data."""
    kwargs = config.get("dataset_kwargs")
    given = cast("Plain", kwargs) if isinstance(kwargs, dict) else {}
    path = config.get("dataset_path")
    named = [*_texts(given.get("data_files"))]
    folders = [given.get("data_dir"), path]
    named += [
        f"{folder}/**/*"
        for folder in folders
        if isinstance(folder, str) and folder and (yaml.parent / folder).is_dir()
    ]
    for pattern in named:
        if "://" in pattern:
            continue
        is_absolute = Path(pattern).is_absolute()
        found = [Path(pattern)] if is_absolute else sorted(yaml.parent.glob(pattern))
        files = [file for file in found if file.is_file()]
        if not files:
            raise ConfigError(
                f"{where}: {yaml}: data file {pattern}: no such file beside it (paths of"
                " data_files are relative to the YAML)"
            )
        yield from files


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        is_named = isinstance(value, dict)
        named = [*cast("Plain", value).values()] if is_named else cast("list[Any]", value)
        for one in named:
            yield from _texts(one)


def _digest_of(file: Path) -> str:
    stat = file.stat()
    return _hashed(str(file.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _hashed(file: str, size: int, changed: int) -> str:
    """sha256 of a file; read again when its size or its time is another."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
