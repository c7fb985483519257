"""This file is where repositories of the hub are found on this machine, and brought here if asked.

Nothing is downloaded unless a person or a Job said so (`fetch`); everything else only looks.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from stillhouse.distill.cache import Say, alone
from stillhouse.errors import ConfigError
from stillhouse.rundir import read_json
from stillhouse.spec import DataSpec, PairSpec, digest

# What is used of a model: many repositories hold its weights two or three times.
MODEL_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.tiktoken", "*.txt"]


def snapshot(repo: str, revision: str | None, repo_type: str) -> Path | None:
    """The directory that holds a hub repository's files on this machine, None where there is none.

    Never opens a connection. Its name is the commit.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        where = snapshot_download(
            repo,
            repo_type=repo_type,
            revision=revision,
            allow_patterns=_patterns(repo_type),
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(str(where))


def _patterns(repo_type: str) -> list[str] | None:
    return MODEL_FILES if repo_type == "model" else None


def missing_file(directory: Path) -> str | None:
    """The first file that a model directory lacks; weights are safetensors, never pickles."""
    if not (directory / "config.json").is_file():
        return "config.json"
    index = read_json(directory / "model.safetensors.index.json")
    shards = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    return next((shard for shard in shards if not (directory / shard).is_file()), None)


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name, and not that of a path."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def download_command(repo: str, revision: str | None, repo_type: str) -> str:
    """The command that brings a hub repository to this machine."""
    words = ["hf download", repo]
    words += ["--repo-type dataset"] if repo_type == "dataset" else []
    words += [f"--revision {revision}"] if revision else []
    return f"`{' '.join(words)}`"


def fetch(pair: PairSpec, data: DataSpec, cache_dir: Path) -> None:
    """Bring the weights of a pair and the rows it trains on to this machine, if they are not here.

    What is here is not looked up again, so a branch that moved on changes nothing. Of several
    processes one downloads and the others wait, and say so; a killed download goes on.
    Raises ConfigError where a repository does not exist, wants an access that we do not have, or
    we were told to stay offline; ConnectionError where the hub cannot be reached: try again.
    """

    def say(line: str) -> None:
        print(f"pair {pair.pair_name}: {line}", flush=True)

    wanted: list[tuple[str, str | None, str]] = []
    if pair.pair_source == "hub":
        wanted += [(pair.student, pair.student_revision, "model")]
        wanted += [(pair.teacher, pair.teacher_revision, "model")]
    if data.data_source not in ("generated", "local") and data.data_path:
        wanted += [(data.data_path, None, "dataset")]
    for repo, revision, repo_type in dict.fromkeys(wanted):
        if looks_like_hub_id(repo) and not Path(repo).expanduser().exists():
            lock = cache_dir / f"fetch-{digest([repo, revision, repo_type])[:10]}.lock"
            with alone(lock, say):
                found = snapshot(repo, revision, repo_type)
                if found is None or (repo_type == "model" and missing_file(found)):
                    _download(repo, revision, repo_type, say)


def _download(repo: str, revision: str | None, repo_type: str, say: Say) -> None:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    name = f"{repo}{f' at {revision}' if revision else ''}"
    if constants.is_offline_mode():
        raise ConfigError(
            f"{name}: not on this machine, and HF_HUB_OFFLINE says to stay offline; unset it, or"
            f" get it with {download_command(repo, revision, repo_type)}"
        )
    say(f"downloading {name} from {constants.ENDPOINT}")
    disable_progress_bars()  # in a log each of their steps is a line
    try:
        snapshot_download(
            repo, repo_type=repo_type, revision=revision, allow_patterns=_patterns(repo_type)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        status = answer.response.status_code if isinstance(answer, HfHubHTTPError) else 0
        reason = str(answer or error).splitlines()[0]
        if 400 <= status < 500 and status not in (408, 429):
            raise ConfigError(
                f"{name}: {constants.ENDPOINT} does not give us this {repo_type} ({reason}): it"
                " does not exist, or it wants its licence accepted there and a token of that"
                " account here (HF_TOKEN; on a cluster the Secret that site.hf_secret names)"
            ) from error
        raise ConnectionError(
            f"{name}: {constants.ENDPOINT} cannot be reached: {reason}"
        ) from error


def stay_offline() -> None:
    """Open no connection to the hub from here on, in this process and those it starts."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True  # read once, when it was imported
