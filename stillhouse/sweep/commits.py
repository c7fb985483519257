"""Resolve each open revision on the Hugging Face hub to one commit for all points of a sweep.

A branch moves, and a sweep lasts for days. The sweep's record holds the commits that its branches
pointed to when it first ran. Every point, every resume and every point that is added later uses
that commit (`place.commits`). A name is [datasets/]OWNER/NAME[@BRANCH] (`at_hand.open_name`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from stillhouse.local_models import COMMIT, RepoType, looks_like_hub_id, open_name, snapshot
from stillhouse.spec import TrainSpec
from stillhouse.sweep.points import Sweep

HUB = "https://huggingface.co"  # where HF_ENDPOINT does not say otherwise
PATIENCE_S = 10


@dataclasses.dataclass(frozen=True)
class Open:
    """A revision that may later point to another commit; None: the repository's main branch."""

    repo: str
    revision: str | None
    repo_type: RepoType

    @property
    def name(self) -> str:
        return open_name(self.repo, self.revision, self.repo_type)


Find = Callable[[Open], str | None]


def pinned(sweep: Sweep, recorded: Mapping[str, str], find: Find) -> Sweep:
    """The sweep with each open revision at one commit.

    A commit that a person gave (`commits={...}`) counts before the recorded one, that before what
    `find` finds now. What nobody knows stays open.
    """
    given = {key: commit for p in sweep.points for key, commit in p.spec.place.commits.items()}
    known = dict(given)
    for one in _opens(sweep):
        if one.name not in known:
            commit = recorded.get(one.name) or find(one)
            known |= {} if commit is None else {one.name: commit}
    return dataclasses.replace(sweep, commits=known)


def placed(spec: TrainSpec, sweep: Sweep) -> TrainSpec:
    """A point's spec that knows its sweep, and what open revisions mean in it."""
    commits = {**spec.place.commits, **sweep.commits}
    place = dataclasses.replace(spec.place, sweep=sweep.name, commits=commits)
    return dataclasses.replace(spec, place=place)


def open_revisions(spec: TrainSpec) -> Iterable[Open]:
    """The revisions of a point's models and rows that its spec leaves open."""
    pair, data = spec.pair, spec.data
    if pair.pair_source == "hub":
        for repo, revision in (
            (pair.student, pair.student_revision),
            (pair.teacher, pair.teacher_revision),
        ):
            if _is_of_hub(repo) and COMMIT.fullmatch(revision or "") is None:
                yield Open(repo, revision, "model")
    if data.data_source not in ("generated", "local") and _is_of_hub(data.data_path):
        yield Open(data.data_path or "", None, "dataset")


def _is_of_hub(name: str | None) -> bool:
    return bool(name) and looks_like_hub_id(name) and not Path(name).expanduser().exists()


def here(one: Open) -> str | None:
    """The commit in this machine's cache of the hub; None where it has none."""
    found = snapshot(one.repo, one.revision, one.repo_type)
    return found.name if found else None


def unasked(one: Open) -> None:
    """Never find a commit: a look at a cluster opens no connection to the hub."""


def of_hub(one: Open) -> str | None:
    """The commit that the hub names now; where it does not answer, the one on this machine.

    It is not asked where HF_HUB_OFFLINE says so, and nothing is downloaded.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return here(one)
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    url = f"{endpoint}/api/{one.repo_type}s/{one.repo}/revision/{one.revision or 'main'}"
    request = urllib.request.Request(url)
    if token := os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            commit = json.load(answer).get("sha")
    except (OSError, ValueError, AttributeError):
        return here(one)
    return commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else here(one)


def notes(sweep: Sweep) -> list[str]:
    """Which of its branches have moved on this machine since it first ran."""
    said: list[str] = []
    for one in _opens(sweep):
        commit, now = sweep.commits.get(one.name), here(one)
        if commit and now and now != commit:
            said.append(
                f"{one.name} is commit {now[:10]} on this machine now; this sweep began with"
                f" {commit[:10]} and goes on with that"
            )
    return said


def unknown(sweep: Sweep) -> list[str]:
    """The open revisions whose commit is not known."""
    return sorted({one.name for one in _opens(sweep)} - sweep.commits.keys())


def _opens(sweep: Sweep) -> list[Open]:
    """Every open revision of a sweep, once: of 10,000 points few differ in pair and data."""
    distinct = {(point.spec.pair, point.spec.data): point.spec for point in sweep.points}
    return list(dict.fromkeys(one for spec in distinct.values() for one in open_revisions(spec)))
