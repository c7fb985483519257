"""Put a point's teacher where its spec says: in this process, on disk, or behind a server."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from stillhouse.distill.teacher import Teacher, described, difference, probe
from stillhouse.distill.teacher_cache import CachedTeacher
from stillhouse.errors import ConfigError, ContractError
from stillhouse.rundir import Json
from stillhouse.spec import TrainSpec


def placed(
    spec: TrainSpec,
    device: torch.device,
    load: Callable[[], Teacher],
    ends: tuple[int, Sequence[int]],
    poll: Callable[[], None],
) -> tuple[Teacher, Json | None]:
    """The teacher of a point, and its manifest; None if its files are not on this machine.

    `load`: gives the teacher with its model in this process. `ends`: the ids of padding and of
    end-of-text. `poll` is called while a server or another point is waited for, and may raise.

    Raises:
        ContractError: another teacher is where this one should be.
        ConfigError: no server is named, or it does not take the token.
        Interrupted: a server gives no answer.
    """
    scoring, cache_dir = spec.scoring, Path(spec.place.cache_dir)
    files = described(spec.pair, cache_dir, spec.place.commits)
    if scoring.teacher_at == "server":
        return _served(spec, device, files, ends, poll)
    if scoring.teacher_at == "cache":
        assert files is not None, "what is not here was refused when the pair was prepared"
        if spec.training.mixed_precision != "no":
            files |= {"mixed_precision": spec.training.mixed_precision}  # of a base as the teacher
        most = int(scoring.teacher_cache_gib * 2**30)
        teacher: Teacher = CachedTeacher(files, cache_dir, most, device, load, _say, poll)
    else:
        teacher = load()
    return teacher, None if files is None else files | {"probe": probe(teacher)}


def _served(
    spec: TrainSpec,
    device: torch.device,
    files: Json | None,
    ends: tuple[int, Sequence[int]],
    poll: Callable[[], None],
) -> tuple[Teacher, Json]:
    from stillhouse.distill.teacher_client import ServedTeacher

    url = spec.scoring.teacher_url or os.environ.get("STILLHOUSE_TEACHER_URL")
    if not url:
        raise ConfigError(
            "teacher_at server without an address: only `stillhouse run` starts a server of its"
            " own; start one with `stillhouse teacher`, and name it: teacher_url=http://HOST:PORT"
        )
    token = os.environ.get("STILLHOUSE_TEACHER_TOKEN", "")
    if not token:
        raise ConfigError(
            f"teacher_at server: STILLHOUSE_TEACHER_TOKEN is not set; it is the token that the"
            f" teacher at {url} was started with"
        )
    teacher = ServedTeacher(url, token, spec.scoring.teacher_patience_s, device, *ends, poll)
    here = (files or teacher.manifest) | {"probe": probe(teacher)}
    if other := difference(here, teacher.manifest):
        raise ContractError(
            f"the teacher at {url} is not that of pair {spec.pair.pair_name} on this machine:"
            f" {other} (then: here; now: there). Serve that pair, or name another address"
        )
    return teacher, teacher.manifest


def _say(text: str) -> None:
    print(text, flush=True)
