"""Download models and data sets from the Hugging Face Hub.

Nothing is downloaded unless a person or a Job asks for it (`fetch`). `at_hand` finds what is
already on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from stillhouse.distill.cache import Say, alone
from stillhouse.errors import ConfigError
from stillhouse.identity import digest
from stillhouse.local_models import (
    MODEL_FILES,
    download_command,
    looks_like_hub_id,
    missing_file,
    pinned,
    snapshot,
)
from stillhouse.spec import DataSpec, PairSpec


def fetch(pair: PairSpec, data: DataSpec, cache_dir: Path, commits: Mapping[str, str]) -> None:
    """Download the weights of a pair and the rows it trains on, if they are not on this machine.

    What is present is not looked up again, so a branch that has moved changes nothing. Of several
    processes one downloads; the others wait and log that. An interrupted download resumes.
    Raises ConfigError if a repository does not exist, requires access that this account lacks, or
    offline mode is set; ConnectionError if the hub cannot be reached: try again.
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
        revision = pinned(commits, repo, revision, repo_type)
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
    disable_progress_bars()  # in a log file, each update would be a line
    try:
        snapshot_download(
            repo,
            repo_type=repo_type,
            revision=revision,
            allow_patterns=[*MODEL_FILES] if repo_type == "model" else None,
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
