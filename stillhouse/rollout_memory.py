"""Estimate, without torch, the memory that writing rollouts takes besides the student.

A rollout is written by a copy of the student's projections with the adapter folded in, in the dtype
that the student computes in. It also keeps keys and values of every position. Models that are not
on this machine, or whose config lacks the numbers, are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from math import prod
from pathlib import Path

from stillhouse.compatibility import positions
from stillhouse.errors import ContractError
from stillhouse.local_models import at_hand
from stillhouse.memory import host_bytes
from stillhouse.model_files import EMBEDDINGS, HEADS, count, read
from stillhouse.spec import TrainSpec, computed_in
from stillhouse.weights_file import tensors_of

GPU = Path("/dev/nvidia0")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def lines(specs: Iterable[TrainSpec]) -> list[str]:
    """A sentence for each kind of student whose rollouts these points train on."""
    said: dict[tuple[object, ...], str | None] = {}
    for spec in specs:
        if spec.method.lmbda == 0 or spec.pair.pair_source != "hub":
            continue
        rollout, site = spec.rollout, (spec.site.site_name, spec.site.memory_gib)
        key = (spec.pair, computed_in(spec), rollout, positions(spec), _rows(spec), site)
        if key not in said:
            said[key] = None
            with contextlib.suppress(ContractError, OSError):  # `fits.check` reports these
                said[key] = _said(spec)
    return list(dict.fromkeys(line for line in said.values() if line))


def _said(spec: TrainSpec) -> str | None:
    pair = spec.pair
    found = at_hand(pair.student, pair.student_revision, "model", spec.place.commits)
    if found is None or not found.path.is_dir():
        return None
    dtype = computed_in(spec)
    projections = [
        prod(tensor.shape)
        for name, tensor in tensors_of(found.path).items()
        if len(tensor.shape) == 2 and not name.endswith((*EMBEDDINGS, *HEADS))
    ]
    copy = BYTES[dtype] * sum(projections)
    text = read(found.path).text
    layers, heads = count(text, "num_hidden_layers"), count(text, "num_attention_heads")
    groups, hidden = count(text, "num_key_value_heads") or heads, count(text, "hidden_size")
    if layers is None or heads is None or groups is None or hidden is None:
        return None
    width = count(text, "head_dim") or hidden // heads
    rows = min(spec.rollout.rollout_rows, _rows(spec))
    past = 2 * layers * groups * width * BYTES[dtype] * rows * positions(spec)
    told = (
        f"rollouts of pair {pair.pair_name}: a copy of {copy / 1e9:.2g} GB ({dtype}) beside the"
        f" student, and up to {past / 1e9:.2g} GB of keys and values ({rows} rows at once)"
    )
    there = _there(spec)
    if there is None or copy + past <= there:
        return told
    writes = "transformers' generate writes, slowly" if copy > there else "set fewer rollout_rows"
    return f"{told}; {there / 1e9:.2g} GB are there: {writes}"


def _rows(spec: TrainSpec) -> int:
    t = spec.training
    return t.per_device_train_batch_size * t.gradient_accumulation_steps * t.num_processes


def _there(spec: TrainSpec) -> int | None:
    """Memory where it runs, in bytes; None for a GPU, whose memory is not known here."""
    if spec.site.site_name == "local":
        return None if GPU.exists() else host_bytes()
    if spec.site.gpu_resource is not None:
        return None
    return int(spec.site.memory_gib * 2**30)
