"""Compare, without torch, the places where the teachers of a sweep can be (`teacher_at`).

Teachers that are not on this machine, that are small, or that one point alone has, are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from stillhouse.errors import ContractError
from stillhouse.local_models import model
from stillhouse.model_files import count, read
from stillhouse.rollout_memory import BYTES, GPU
from stillhouse.spec import TrainSpec
from stillhouse.weights_file import tensors_of

WORTH = 10**8  # bytes of weights from which the place of a teacher matters
IN_FILES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def lines(specs: Iterable[TrainSpec]) -> list[str]:
    """What each place of each teacher takes, the place where it is now, and the best one."""
    of_teacher: dict[Any, list[TrainSpec]] = {}
    for spec in specs:
        pair = spec.pair
        key = (pair.teacher, pair.teacher_revision, pair.teacher_dtype, pair.teacher_steps)
        of_teacher.setdefault(key, []).append(spec)
    said: list[str] = []
    for points in of_teacher.values():
        with contextlib.suppress(ContractError, OSError):  # `fits.check` reports these
            said += _compared(points)
    return ["where can the teacher be (teacher_at)?", *said] if said else []


def _compared(points: Sequence[TrainSpec]) -> list[str]:
    # What a server is refused for is the student's own base, or an average of it: loaded anyway.
    points = _that_may_have(points, teacher_at="server")
    if len(points) < 2:
        return []
    pair, site, place = points[0].pair, points[0].site, points[0].place
    there = model(pair, "teacher", Path(place.cache_dir), place.commits)
    hidden = None if there is None else count(read(there.path).text, "hidden_size")
    if there is None or hidden is None:
        return []
    width, tensors = BYTES[pair.teacher_dtype], tensors_of(there.path).values()
    size = width * sum(prod(tensor.shape) for tensor in tensors)
    if size < WORTH:
        return []
    at_once = min(len(points), site.max_parallel)
    is_local = site.site_name == "local"
    # Such weights stay mapped files, whose pages the processes of one machine share.
    in_files = {tensor.dtype for tensor in tensors}
    is_shared = is_local and not GPU.exists() and in_files == {IN_FILES[pair.teacher_dtype]}
    each = f"{_gb(size)} in each of {at_once} points at once"
    if is_shared:
        each = (
            f"{_gb(size)} for all: its files are in {pair.teacher_dtype}, and processes share them"
        )
    rows = {"process": f"{len(points)} loads, and {each}"}
    if is_local:
        rows["server"] = f"1 load, and {_gb(size)} once"
    if cached := _that_may_have(points, teacher_at="cache", teacher_rows="alone"):
        who = "each point" if len(cached) == len(points) else f"{len(cached)} of them"
        kept = f"{hidden * width:,} bytes a token kept on disk"
        rows["cache"] = f"{who} (lmbda 0, with teacher_rows=alone): a row is scored once, {kept}"
    best = "process"
    if len(cached) == len(points):
        best = "cache"
    elif is_local and at_once > 1 and not is_shared:
        best = "server"
    now = {spec.scoring.teacher_at for spec in points}
    lines = [f"  teacher of pair {pair.pair_name}: {_gb(size)} of weights, {len(points)} points"]
    for name, what in rows.items():
        marks = ", ".join(["now"] * (name in now) + ["best"] * (name == best))
        lines.append(f"    {name:<8} {marks:<9} {what}")
    return lines


def _that_may_have(points: Sequence[TrainSpec], **scoring: Any) -> list[TrainSpec]:
    """The points that these leaves fit; a spec itself refuses what does not fit it."""
    known: dict[Any, bool] = {}
    found: list[TrainSpec] = []
    for spec in points:
        key = (spec.pair, spec.quant, spec.method.lmbda, spec.rescue, spec.loss.ema_decay)
        if key not in known:
            known[key] = True
            try:
                replace(spec, scoring=replace(spec.scoring, teacher_url=None, **scoring))
            except ValueError:
                known[key] = False
        if known[key]:
            found.append(spec)
    return found


def _gb(size: int) -> str:
    return f"{size / 1e9:.2g} GB"
