"""Decide which files belong to the project and may leave this machine with it.

They are the files that git tracks (changed or not committed yet: the present content is sent) or,
of an installed package, those that its RECORD lists. Where neither is at hand, in a pod and in an
unpacked archive, they are all files of our kinds (`KINDS`). Another file of these kinds would be
read here and be missing in a pod, so an error names it.

The code bundle and `tools/image.py` use this module; the latter runs on any Python, so only the
standard library may be imported.
"""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from stillhouse.errors import ConfigError
from stillhouse.sweep.cluster import secrets

KINDS = frozenset({".py", ".yaml", ".sh", ".j2"})  # what our code is made of
PACKAGE = "stillhouse/__init__.py"  # who does not list it does not speak of this project
SHOWN = 3  # files that a refusal names before it only counts them
# Set in a git hook, and of that repository, which need not be ours.
OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")


def project_files(root: Path, names: Sequence[str]) -> dict[str, Path]:
    """The project's files among these files and folders of `root`, by their path below it.

    Raises:
        ConfigError: beside them lies a file of our kinds that is not the project's, or a link; or
            nobody can tell.
    """
    there = dict(_walked(root, names))
    links = [path for path, file in there.items() if file.is_symlink() and _matters(file)]
    if links:
        raise ConfigError(
            f"{_some(links)}: a link, and links are not followed: no pod would have it. Put the"
            " file itself there, or move the link away"
        )
    listed, cure = _recorded(root), "move it away, or add its line to RECORD (PATH,,)"
    if listed is None:
        listed = _tracked(root, names)
        cure = "`git add` it (-f where .gitignore has it), or move it away"
    if listed is None:
        return {path: file for path, file in there.items() if path in names or _is_ours(path, file)}
    strange = [path for path, file in there.items() if path not in listed and _matters(file)]
    if strange:
        who = "the installed package's RECORD lists" if "RECORD" in cure else "git tracks"
        raise ConfigError(
            f"{_some(strange)}: in use here, but not among what {who}, so no pod would have it:"
            f" {cure}"
        )
    return {p: file for p, file in there.items() if p in listed and not file.is_symlink()}


def refuse_secrets(path: str, data: bytes) -> None:
    """Refuse a secret in a file of the project.

    Raises:
        ConfigError: a line of it holds one; the message has its number, and not its text.
    """
    if path.startswith("conf/"):
        refuse_secrets_in_settings(path, data)
    for place, line in _lines(path, data):
        name, _, value = line.partition(":")
        if path.endswith(".yaml") and secrets.find(value.strip(), name.strip()) == secrets.BY_NAME:
            secrets.refuse(value.strip(), name.strip(), place)
        if secrets.find_key(line) is not None:  # in sources forty digits are a commit or a digest
            secrets.refuse(line, "", place)


def refuse_secrets_in_settings(path: str, data: bytes) -> None:
    """The same of `name: value` lines, where the name may say that the value is a secret."""
    for place, line in _lines(path, data):
        name, _, value = line.partition(":")
        if not name.lstrip().startswith("#"):
            secrets.refuse(value.strip(), name.strip(), place)


def _lines(path: str, data: bytes) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
        yield f"{path}, line {number}", line


def _walked(root: Path, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Every file and link below, by its path from `root`, in order."""
    for name in names:
        top = root / name
        for file in sorted(top.rglob("*")) if top.is_dir() and not top.is_symlink() else [top]:
            if file.is_symlink() or file.is_file():
                yield file.relative_to(root).as_posix(), file


def _matters(file: Path) -> bool:
    """Whether Python, Hydra or we would read it."""
    is_folder = file.is_symlink() and file.is_dir()
    return is_folder or file.suffix in KINDS or file.name == "Dockerfile"


def _is_ours(path: str, file: Path) -> bool:
    is_hidden = any(part.startswith((".", "__pycache__")) for part in path.split("/"))
    return _matters(file) and not file.is_symlink() and not is_hidden


def _recorded(root: Path) -> set[str] | None:
    """What the RECORD of a package that is installed in `root` lists; None where it is no such."""
    for record in sorted(root.glob("stillhouse-*.dist-info/RECORD")):
        with record.open(newline="", encoding="utf-8") as file:
            listed = {row[0] for row in csv.reader(file) if row}
        if PACKAGE in listed:
            return listed
    return None


def _tracked(root: Path, names: Sequence[str]) -> set[str] | None:
    """What git tracks of these; None where there is no git, or it has none of us."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--", *names]
    env = {name: value for name, value in os.environ.items() if name not in OF_A_HOOK}
    try:
        done = subprocess.run(command, capture_output=True, check=True, env=env)
    except (OSError, subprocess.CalledProcessError) as error:
        if not any((place / ".git").exists() for place in (root, *root.parents)):
            return None
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        why = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        raise ConfigError(
            f"{root}: git does not say which files are the project's, and no others leave this"
            f" machine: {' '.join(why.split())}"
        ) from error
    listed = {os.fsdecode(name) for name in done.stdout.split(b"\0") if name}
    return listed if PACKAGE in listed else None


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more
