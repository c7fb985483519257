"""Refuse a path that does not exist in a pod.

A pod has the two volumes and the code that was sent with it, and nothing else of this machine. The
check only looks at names and local files: a name that is no path here and has the form of a hub id
is taken for one.
"""

from __future__ import annotations

import os.path
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from stillhouse.errors import ConfigError
from stillhouse.local_models import SUFFIXES
from stillhouse.spec import EvalSpec, TrainSpec
from stillhouse.sweep.cluster.jobspec import CACHE, RUNS

MOUNTS = (RUNS, CACHE)


def refuse(specs: Iterable[TrainSpec | EvalSpec]) -> None:
    """Refuse weights and rows that lie where no pod would find them.

    Raises:
        ConfigError: one of them does; the message says which, and how a pod gets it.
    """
    seen: set[tuple[str, str]] = set()
    for spec in specs:
        for knob, name in _named(spec):
            if (knob, name) in seen:
                continue
            seen.add((knob, name))
            # What is always a path has no form of a hub id.
            if (knob == "other_file" or is_path(name)) and not is_mounted(name):
                raise ConfigError(_why(knob, name))


def is_path(name: str) -> bool:
    """Whether a name is of a place, here or in a pod, and not of a repository on the hub."""
    is_written_so = name.startswith(("/", "~", ".")) or name.count("/") > 1
    return is_written_so or name.endswith(SUFFIXES) or Path(name).exists()


def is_mounted(path: str) -> bool:
    """Whether a path is below one of the volumes that every pod has."""
    parts = PurePosixPath(os.path.normpath(path)).parts
    return any(PurePosixPath(mount).parts == parts[:2] and len(parts) > 2 for mount in MOUNTS)


def _named(spec: TrainSpec | EvalSpec) -> Iterator[tuple[str, str]]:
    """Every name of weights or rows, with its knob."""
    if spec.pair.pair_source == "hub":
        yield "student", spec.pair.student
        yield "teacher", spec.pair.teacher
    if spec.data.data_source != "generated" and spec.data.data_path is not None:
        yield "data_path", spec.data.data_path
    if isinstance(spec, TrainSpec):
        if spec.rescue.other_file is not None:
            yield "other_file", spec.rescue.other_file
        return
    for adapter in spec.evaluation.lora_paths:
        if adapter.startswith(("/", "~", ".")):  # NAME and dump/NAME are runs, found on the volume
            yield "lora_paths", adapter


def _why(knob: str, name: str) -> str:
    return (
        f"{knob}={name}: no pod has this path; of paths, a pod sees what is below"
        f" {' and '.join(MOUNTS)}. `stillhouse push {shlex.quote(name)}` puts it on the cache"
        " volume and prints what to say instead. What is on the hub is said as OWNER/NAME"
        " (hf_secret, where it is private)"
    )
