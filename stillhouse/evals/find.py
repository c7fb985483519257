"""Find adapters: resolve the paths that a user typed to directories, each once.

an adapter        a directory with adapter_config.json
a run             a directory with spec.json; its adapter is in adapter/
anything else     is searched recursively, links followed
dump/NAME, NAME   where there is no such path: the run of that name;  dump/: every run with a name

A name is a link below runs/names. In a pod it may also be a name that only its launcher knows: then
STILLHOUSE_NAMES (a mounted ConfigMap) has a file of that name, which contains the run's directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from stillhouse.errors import ConfigError, ContractError, nearest
from stillhouse.identity import as_before
from stillhouse.rundir import RunDir, Runs
from stillhouse.spec import EvalSpec, PairSpec
from stillhouse.text import number_of

MARK = "adapter_config.json"  # PEFT writes it into every adapter


@dataclass(frozen=True)
class Found:
    """An adapter, the directory that its scores belong to, and what people call it."""

    adapter: Path
    home: Path  # the run's directory; of an adapter outside any run, a directory of its own
    name: str | None  # None: a run without a name


class Adapters(NamedTuple):
    """What was found, and what of it cannot be scored."""

    found: list[Found]
    untrained: int  # runs that have no adapter yet
    gone: dict[Path, str]  # runs without a readable adapter, and why


def adapters(spec: EvalSpec, runs: Runs) -> Adapters:
    """The adapters that an evaluation names; without names, of every run of its pair.

    Raises: as `typed`.
    """
    words = spec.evaluation.lora_paths
    return typed(words, runs) if words else trained(spec.pair, runs)


def typed(words: tuple[str, ...], runs: Runs) -> Adapters:
    """Every adapter at or below these paths, in their order.

    A launcher names the runs of a pack by their directories: one that is gone, or has no adapter,
    ends neither the evaluation of the others nor the baselines', and is returned with the reason.

    Raises:
        ConfigError: a path that does not exist, or with no adapter at or below it.
        ContractError: a run whose record cannot be read.
    """
    found: dict[Path, Found] = {}
    untrained: set[Path] = set()
    gone: dict[Path, str] = {}
    names = _names(runs)
    for word in words:
        try:
            adapters, unfinished = _adapters_of(word, runs)
            described = [(adapter.resolve(), _described(adapter, names)) for adapter in adapters]
        except (ConfigError, ContractError) as error:
            if not _is_run_path(Path(word), runs):
                raise
            gone[Path(word)] = str(error)
            continue
        for real, one in described:
            found.setdefault(real, one)
        untrained |= unfinished
    return Adapters(list(found.values()), len(untrained), gone)


def _is_run_path(path: Path, runs: Runs) -> bool:
    """Whether a path is written as a run directory, whether it exists or not."""
    return path.parent == runs.root and bool(re.fullmatch(r".+-[0-9a-f]{10}", path.name))


def _adapters_of(word: str, runs: Runs) -> tuple[list[Path], set[Path]]:
    """The adapters that one word names, and the runs there that have none yet."""
    adapters, unfinished = _below(_place(word, runs))
    if not adapters:
        raise ConfigError(
            f"{word}: no adapter (a directory with {MARK}) and no run with an adapter/ in it or"
            f" below it; not trained yet: {number_of(len(unfinished), 'run')} there"
        )
    return adapters, unfinished


def trained(pair: PairSpec, runs: Runs) -> Adapters:
    """Every run of exactly this pair whose adapter is whole."""
    names = _names(runs)
    wanted = as_before("pair", TypeAdapter(PairSpec).dump_python(pair, mode="json"))
    found: list[Found] = []
    torn: dict[Path, str] = {}
    for run in runs.all():
        try:
            if run.is_trained() and as_before("pair", (run.contract() or {})["pair"]) == wanted:
                found.append(_described(run.adapter, names))
        except ContractError as error:
            torn[run.path] = str(error)
    return Adapters(found, 0, torn)


def _place(word: str, runs: Runs) -> Path:
    path = Path(word).expanduser()
    if path.is_dir():
        return path
    if path == Path("dump") and runs.names.is_dir():
        return runs.names
    if path.parent in (Path("dump"), Path()):
        if (runs.names / path.name).is_dir():
            return runs.names / path.name
        if (run := _aliases().get(path.name)) is not None:
            if not (runs.root / run).is_dir():
                raise ConfigError(f"{word}: its run {run} is not in {runs.root}; train it first")
            return runs.root / run
    names = [*(link.name for link in runs.names.glob("*")), *_aliases()]
    raise ConfigError(
        f"{word}: no such directory, and no run in {runs.root} has the name"
        f' "{path.name}".{nearest(path.name, names)}'
    )


def _below(top: Path) -> tuple[list[Path], set[Path]]:
    """Adapters at or below `top`, and the runs there that have none yet."""
    adapters: list[Path] = []
    untrained: set[Path] = set()
    seen: set[Path] = set()  # links can lead in circles

    def visit(directory: Path) -> None:
        if directory.resolve() in seen:
            return
        seen.add(directory.resolve())
        if (directory / MARK).is_file():
            adapters.append(directory)
        elif (directory / "spec.json").is_file():
            if (directory / "adapter" / MARK).is_file():
                adapters.append(directory / "adapter")
            else:
                untrained.add(directory.resolve())
        else:
            for child in _children(directory):
                visit(child)

    visit(top)
    return adapters, untrained


def _children(directory: Path) -> Iterator[Path]:
    # A hidden directory is one that is being written, or was when its writer was killed.
    for child in sorted(directory.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            yield child


def _described(adapter: Path, names: dict[Path, str]) -> Found:
    real = adapter.resolve()
    in_directory = real.name == "adapter"
    home = real.parent if in_directory else real
    # A link carries the name that a user chose: a run's name, or the --output_dir of its training.
    link = next((p for p in (adapter, adapter.parent) if p.is_symlink()), None)
    if link is not None and link.resolve() in (real, home):
        return Found(adapter, home, link.name)
    if not (in_directory and (home / "spec.json").is_file()):
        return Found(adapter, home, home.name)
    record = RunDir(home).record() or {}
    return Found(adapter, home, names.get(home) or record["spec"]["place"]["name"])


def _names(runs: Runs) -> dict[Path, str]:
    aliases = {(runs.root / run).resolve(): name for name, run in _aliases().items()}
    links = sorted(runs.names.glob("*"), reverse=True)
    return {**aliases, **{link.resolve(): link.name for link in links}}


def _aliases() -> dict[str, str]:
    """Names that a pod's launcher knows, and the run directories that they mean."""
    files = Path(os.environ.get("STILLHOUSE_NAMES", "/names")).glob("[!.]*")
    return {file.name: file.read_text().strip() for file in files if file.is_file()}
