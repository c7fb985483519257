"""Put a point's teacher where its spec says: in this process, or on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from stillhouse.distill.teacher import Teacher, described, probe
from stillhouse.distill.teacher_cache import CachedTeacher
from stillhouse.rundir import Json
from stillhouse.spec import TrainSpec


def placed(
    spec: TrainSpec,
    device: torch.device,
    load: Callable[[], Teacher],
    poll: Callable[[], None],
) -> tuple[Teacher, Json | None]:
    """The teacher of a point, and its manifest; None if its files are not on this machine.

    `load`: gives the teacher with its model in this process; `poll`: see `CachedTeacher`.

    Raises:
        ContractError: another teacher is where this one should be.
    """
    scoring, cache_dir = spec.scoring, Path(spec.place.cache_dir)
    files = described(spec.pair, cache_dir, spec.place.commits)
    if scoring.teacher_at == "cache":
        assert files is not None, "what is not here was refused when the pair was prepared"
        if spec.training.mixed_precision != "no":
            files |= {"mixed_precision": spec.training.mixed_precision}  # of a base as the teacher
        most = int(scoring.teacher_cache_gib * 2**30)
        teacher: Teacher = CachedTeacher(files, cache_dir, most, device, load, _say, poll)
    else:
        teacher = load()
    return teacher, None if files is None else files | {"probe": probe(teacher)}


def _say(text: str) -> None:
    print(text, flush=True)
