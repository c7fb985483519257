"""Find which models and data sets are on this machine, and in which directories.

Nothing is downloaded and no library is used: a laptop that only launches has none of them. A path
means itself. A hub repository is looked up in the hub's cache, which has this layout:

    $HF_HUB_CACHE (or $HF_HOME/hub)/models--OWNER--NAME/refs/BRANCH        holds a commit
                                                       /snapshots/COMMIT/  its files
                                                       /trees/COMMIT.json  the files that it has

For the parts of a pair that were made on this machine, the record that `prepare` leaves in the
cache says where they are.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import TypeAdapter

from stillhouse.errors import ConfigError, ContractError, DataError
from stillhouse.identity import NOT_VERSIONED, digest
from stillhouse.rundir import Json, read_json
from stillhouse.spec import EvalSpec, PairSpec, TrainSpec

RepoType = Literal["model", "dataset"]
# What is used of a model: many repositories hold its weights two or three times.
MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.tiktoken", "*.txt")
SUFFIXES = (".jsonl", ".parquet", ".json", ".jsonl.gz", ".json.gz")  # of files of rows
FOLDERS = (".", "data", "main")  # where hub data sets keep their files
COMMIT = re.compile("[0-9a-f]{40}")
HTTP = ("httpx", "starlette", "uvicorn")  # libraries that serve a teacher, and ask one


@dataclass(frozen=True)
class AtHand:
    """A model or a data set on this machine."""

    path: Path
    commit: str | None  # None: a path that somebody filled, not a snapshot of the hub's


def require_libraries(specs: Iterable[TrainSpec | EvalSpec]) -> None:
    """Raises ConfigError where this environment lacks what these runs import."""
    lacks = [name for name in ("torch", *HTTP) if importlib.util.find_spec(name) is None]
    if "torch" in lacks:
        raise ConfigError(
            "this environment only launches and reads: training and scoring here need torch and its"
            " family (`uv sync`, or `pip install 'stillhouse[train,eval]'`)"
        )
    at_server = any(isinstance(s, TrainSpec) and s.scoring.teacher_at == "server" for s in specs)
    if lacks and at_server:
        raise ConfigError(
            f"teacher_at server needs {' and '.join(lacks)}, which this environment lacks (`uv"
            " sync`, or `pip install 'stillhouse[train]'`)"
        )


# ------------------------------------------------------------------------- repositories


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name, and not that of a path."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def open_name(repo: str, revision: str | None, repo_type: str) -> str:
    """The key in `place.commits` of a revision that may move: [datasets/]OWNER/NAME[@BRANCH]."""
    kind = "datasets/" if repo_type == "dataset" else ""
    return f"{kind}{repo}{f'@{revision}' if revision else ''}"


def pinned(
    commits: Mapping[str, str], repo: str, revision: str | None, repo_type: str
) -> str | None:
    """The revision to use: the commit that `commits` pins it to, or the revision itself."""
    return commits.get(open_name(repo, revision, repo_type), revision)


def snapshot(repo: str, revision: str | None, repo_type: str) -> Path | None:
    """The directory that holds a hub repository's files on this machine, None where there is none.

    Never opens a connection. Its name is the commit.
    """
    if not looks_like_hub_id(repo):
        return None
    home = _hub_cache() / f"{repo_type}s--{repo.replace('/', '--')}"
    commit = revision or "main"
    if COMMIT.fullmatch(commit) is None:
        branch = home / "refs" / commit
        # Of a revision such as ../../x there is no branch.
        if not branch.resolve().is_relative_to((home / "refs").resolve()) or not branch.is_file():
            return None
        commit = branch.read_text().strip()
    found = home / "snapshots" / commit
    return found if found.is_dir() and _is_whole(home, found, repo_type) else None


def _hub_cache() -> Path:
    env = os.environ
    home = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(cache)).expanduser()


def _is_whole(home: Path, found: Path, repo_type: str) -> bool:
    """False if a download was cut short; true if the list of expected files is not known."""
    try:
        tree = read_json(home / "trees" / f"{found.name}.json") or {}
    except (ContractError, OSError):
        return True
    files = cast("dict[str, Any]", tree.get("files") or {})
    return all((found / name).exists() for name in files if _is_used(name, repo_type))


def _is_used(name: str, repo_type: str) -> bool:
    patterns = MODEL_FILES if repo_type == "model" else ("*",)
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def missing_file(directory: Path) -> str | None:
    """The first file that a model directory lacks; weights are safetensors, never pickles."""
    if not (directory / "config.json").is_file():
        return "config.json"
    index = read_json(directory / "model.safetensors.index.json")
    shards = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    return next((shard for shard in shards if not (directory / shard).is_file()), None)


def download_command(repo: str, revision: str | None, repo_type: str) -> str:
    """The command that brings a hub repository to this machine."""
    words = ["hf download", repo]
    words += ["--repo-type dataset"] if repo_type == "dataset" else []
    words += [f"--revision {revision}"] if revision else []
    return f"`{' '.join(words)}`"


# ------------------------------------------------------------------------- models and rows


def model(pair: PairSpec, role: str, cache_dir: Path, commits: Mapping[str, str]) -> AtHand | None:
    """The student or the teacher of a pair, if all of its files are on this machine."""
    name, revision = source_of(pair, role)
    if pair.pair_source == "hub":
        found = at_hand(name, revision, "model", commits)
    else:
        lies = prepared(pair, cache_dir).get(role)
        found = AtHand(cache_dir / lies, None) if isinstance(lies, str) else None
    return found if found and missing_file(found.path) is None else None


def source_of(pair: PairSpec, role: str) -> tuple[str, str | None]:
    """The name and the revision of the student, or of the teacher."""
    if role == "student":
        return pair.student, pair.student_revision
    return pair.teacher, pair.teacher_revision


def at_hand(
    name: str, revision: str | None, repo_type: RepoType, commits: Mapping[str, str]
) -> AtHand | None:
    """What `name` means here: a path if there is one, else a hub repository's snapshot."""
    local = Path(name).expanduser()
    if local.exists():
        return AtHand(local, None)
    found = snapshot(name, pinned(commits, name, revision, repo_type), repo_type)
    return AtHand(found, found.name) if found else None


def split_files(root: Path, split: str) -> list[Path]:
    """A file itself; of a directory, SPLIT.jsonl or SPLIT-*.jsonl, another kind, or below data/.

    Raises DataError where there is none.
    """
    if root.is_file():
        return [root]
    for folder in FOLDERS:
        for suffix in SUFFIXES:
            found = [root / folder / f"{split}{suffix}"]
            found = [f for f in found if f.is_file()] or [
                *(root / folder).glob(f"{split}-*{suffix}")
            ]
            if found:
                return sorted(found)
    there = ", ".join(sorted(file.name for file in root.iterdir())[:5]) or "nothing"
    raise DataError(
        f"{root}: holds no {split}.jsonl and no {split}-*.jsonl (data_split is {split}), nor in"
        f" data/ or main/; {', '.join(SUFFIXES[1:])} are read too; it has {there}"
    )


# ------------------------------------------------------------------------- what was prepared


def prepared_file(pair: PairSpec, cache_dir: Path) -> Path:
    """The file in which `prepare` records what it made or found of a pair. For the same weights it
    is the same file, whatever the pair is called."""
    plain = TypeAdapter(PairSpec).dump_python(pair, mode="json")
    for key in ("pair.pair_name", "pair.teacher_prompt", *NOT_VERSIONED):
        section, _, leaf = key.partition(".")
        if section == "pair":
            del plain[leaf]
    return cache_dir / "prepared" / f"{digest(plain)[:16]}.json"


def prepared(pair: PairSpec, cache_dir: Path) -> Json:
    """What `prepare` recorded: `student`, `teacher` and `problems`, directories (below the cache
    where they are not absolute), and `facts` about the weights. {} where it was not run, or cannot
    be read: it is then made again."""
    try:
        return read_json(prepared_file(pair, cache_dir)) or {}
    except (ContractError, OSError):
        return {}
