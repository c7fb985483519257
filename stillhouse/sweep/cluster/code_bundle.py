"""Pack the code into one immutable ConfigMap whose name follows from its content.

Pods run what was submitted, whatever their image holds and whatever changes here while they wait:

    code.tar.gz    stillhouse/ conf/ k8s/ train.py eval.py    pod.py    process 1, which unpacks it
                   tasks/: the files of those tasks of the suite that are the user's own

Only files that belong to the project (`carried`) are packed, and the task files that the suite
names.

The name has two digests: of the sources (`code_identity`, which tells whether other code began a
point) and of all that is packed, because another `conf/` is another bundle of the same code.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stillhouse.errors import ConfigError
from stillhouse.rundir import Json, code_identity
from stillhouse.spec import SuiteSpec
from stillhouse.sweep.cluster import secrets
from stillhouse.sweep.cluster.manifest import config_map, label_value
from stillhouse.sweep.cluster.project_files import (
    KINDS,
    project_files,
    refuse_secrets,
    refuse_secrets_in_settings,
)
from stillhouse.tasks import IN_BUNDLE, chosen

MAX_BYTES = 2**20 - 4096  # a ConfigMap holds 1 MiB, its keys and labels included
MAX_TASKS = 64 * 2**20  # of tasks' files before they are packed: more is not even read
SHOWN = 3  # of the largest files, where it is too much
KEY_DIGITS = 8
# The checkout's train.py and eval.py, which an installed package does not bring.
_SCRIPT = '''"""{what}."""

import sys

from stillhouse.errors import explained_imports

with explained_imports():
    from stillhouse.entrypoints import {main}

if __name__ == "__main__":
    sys.exit({main}(sys.argv[1:]))
'''
_TRAINS = (
    "Train one point: `python train.py --pair tiny --lmbda 0.5`, or `accelerate launch train.py …`"
)
_SCORES = (
    "Score adapters and baselines: `python eval.py --pair tiny --suite tiny --lora-paths runs/`"
)
SCRIPTS = {
    "train.py": _SCRIPT.format(what=_TRAINS, main="train_main"),
    "eval.py": _SCRIPT.format(what=_SCORES, main="eval_main"),
}


@dataclass(frozen=True)
class Bundle:
    """The packed code."""

    digest: str  # of the sources, as code_identity has it
    key: str  # <digest>-<eight digits of all that travels>: what `manifest.render` is given
    manifest: Json


@functools.cache
def bundle(suite: SuiteSpec | None = None) -> Bundle:
    """The code of this process, from a checkout or from an installed package, and what a suite
    asks of the user's own.

    Raises:
        ConfigError: the sources changed since this process began, some are not the project's, a
            file holds a secret, or it is more than a ConfigMap can take.
    """
    files = _files() | (_task_files(suite) if suite else {})
    digest = _digest(files)
    if digest != code_identity()["digest"]:
        raise ConfigError(
            "stillhouse/ changed while this command ran, so what would be sent is not what was"
            " checked; run it again"
        )
    for path, data in files.items():
        if path.startswith(f"{IN_BUNDLE}/"):
            _refuse_keys(path, data)
        else:
            refuse_secrets(path, data)
    archive = _archive(files)
    packed = gzip.compress(archive, compresslevel=9, mtime=0)
    process_1 = files["stillhouse/pod.py"].decode()
    if len(packed) + len(process_1) > MAX_BYTES:
        largest = sorted(files, key=lambda path: -len(files[path]))[:SHOWN]
        raise ConfigError(
            f"the code is {len(packed) / 2**20:.2f} MiB when packed, and a ConfigMap holds 1 MiB;"
            f" the largest files are {', '.join(largest)}{_other_ways(largest)}"
        )
    key = f"{digest}-{hashlib.sha256(archive).hexdigest()[:KEY_DIGITS]}"
    labels = {"stillhouse/kind": "code", "stillhouse/code": digest}
    manifest = config_map(
        f"stillhouse-code-{key}",
        labels,
        immutable=True,
        data={"pod.py": process_1},
        binaryData={"code.tar.gz": base64.b64encode(packed).decode()},
    )
    return Bundle(digest, key, manifest)


def sweep_file(name: str, sweep: str, file: str, content: bytes) -> Json:
    """The ConfigMap that brings a sweep's file to its driver.

    `name`: `JobSpec.sweep_file`; `sweep`: its name; `file`: the file's, without directories.

    Raises:
        ConfigError: the file holds a secret.
    """
    refuse_secrets_in_settings(file, content)
    labels = {"stillhouse/kind": "sweep-file", "stillhouse/sweep": label_value(sweep)}
    return config_map(name, labels, immutable=True, data={file: content.decode()})


def _files() -> dict[str, bytes]:
    """The project's files to pack, by their paths in the archive."""
    package = Path(__file__).parents[2]
    # An installed package has them inside.
    inside = [top for top in ("conf", "k8s") if (package / top).is_dir()]
    beside = [top for top in ("conf", "k8s") if top not in inside]
    found = project_files(package.parent, [package.name, *beside])
    files = {name: text.encode() for name, text in SCRIPTS.items()}
    for path, file in found.items():
        if file.suffix in KINDS or file.name == "Dockerfile":
            is_inside = path.startswith(tuple(f"{package.name}/{top}/" for top in inside))
            files[path.partition("/")[2] if is_inside else path] = file.read_bytes()
    return files


def _task_files(suite: SuiteSpec) -> dict[str, bytes]:
    """What the suite's own tasks are made of, by its path in the archive."""
    root = Path(suite.include_path or "").expanduser()
    files = {f for task in chosen(suite, "suite").values() for f in task.files}
    size = sum((root / file).stat().st_size for file in files)
    if size > MAX_TASKS:
        largest = sorted(map(str, files), key=lambda file: -(root / file).stat().st_size)[:SHOWN]
        raise ConfigError(
            f"suite: the files of its tasks are {size / 2**20:.0f} MiB, and what travels is at most"
            f" 1 MiB when packed; the largest are {', '.join(largest)}"
            f"{_other_ways([f'{IN_BUNDLE}/{file}' for file in largest])}"
        )
    return {f"{IN_BUNDLE}/{file.as_posix()}": (root / file).read_bytes() for file in files}


def _other_ways(largest: Sequence[str]) -> str:
    is_of_task = any(path.startswith(f"{IN_BUNDLE}/") for path in largest)
    return "; a task's data may be a hub data set (dataset_path) instead" if is_of_task else ""


def _digest(files: Mapping[str, bytes]) -> str:
    """What code_identity would say of these sources."""
    sources = sorted(Path(path).relative_to("stillhouse") for path in files if _is_source(path))
    hasher = hashlib.sha256()
    for source in sources:
        hasher.update(f"{source}\n".encode() + files[f"stillhouse/{source.as_posix()}"])
    return hasher.hexdigest()[:16]


def _is_source(path: str) -> bool:
    return path.startswith("stillhouse/") and path.endswith(".py")


def _archive(files: Mapping[str, bytes]) -> bytes:
    """A tar that depends on the names and bytes alone: no owner, no time, no order of a disk."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(files):
            member = tarfile.TarInfo(path)
            member.size = len(files[path])
            member.mode = 0o644
            archive.addfile(member, io.BytesIO(files[path]))
    return buffer.getvalue()


def _refuse_keys(path: str, data: bytes) -> None:
    """Refuse what has the form of a key in a user's task files; `token = …` is harmless there."""
    for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
        if secrets.find(line) not in (None, secrets.BY_NAME):
            secrets.refuse(line, "", f"{path}, line {number}")
