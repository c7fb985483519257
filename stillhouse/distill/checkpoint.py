"""Save and restore the state of a run, so that a resume gives the same numbers as no interruption.

A checkpoint is a directory of safetensors and JSON files (nothing is ever unpickled) with a
manifest of sizes and digests. It appears in one rename. A resume takes the newest complete
checkpoint; it skips a damaged one and logs that. Random numbers are derived from counters, so there
is no generator state to save: a checkpoint holds the adapter, the optimizer's moments, a teacher
that averages the student, the step, the costs, the replay buffer, and metrics that are not logged
yet.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.distill.average import Average
from stillhouse.errors import ContractError
from stillhouse.file_formats import SAVED, checked
from stillhouse.rundir import (
    Json,
    RunDir,
    file_digest,
    publish,
    read_json,
    temporary_name,
    write_json,
)

KEEP = 2  # a crash may damage the newest; the one before it is then used


def save(
    run: RunDir,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Json,
    average: Average | None = None,
) -> None:
    """Save the state after `step` completed steps.

    Raises:
        OSError: the disk is full; no earlier checkpoint is lost.
    """
    final = run.checkpoints / f"step-{step}"
    temporary = temporary_name(final)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(run.checkpoints)
    temporary.mkdir()
    try:
        save_file(_trainable(model), temporary / "adapter.safetensors")
        save_file(_moments(model, optimizer), temporary / "optimizer.safetensors")
        if average is not None:
            save_file(average.tensors, temporary / "teacher.safetensors")
        write_json(temporary / "state.json", state | {"step": step})
        files = {
            p.name: {"size": p.stat().st_size, "sha256": file_digest(p)}
            for p in sorted(temporary.iterdir())
        }
        write_json(temporary / "manifest.json", files)
        publish(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _complete_names(run.checkpoints)[:-KEEP]:
        shutil.rmtree(old)


def load_newest(
    run: RunDir,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    say: Any,
    average: Average | None = None,
) -> Json | None:
    """Restore the newest complete checkpoint in place; its state, or None if there is none."""
    for directory in reversed(_complete_names(run.checkpoints)):
        problem = _torn(directory)
        if problem:
            say(f"{directory}: {problem}; skipped, going back to the checkpoint before it")
            continue
        _restore(directory, model, optimizer)
        if average is not None:
            average.restore(load_file(directory / "teacher.safetensors"))
        return read_json(directory / "state.json")
    return None


def remove_all(run: RunDir) -> None:
    """Delete all checkpoints of a run that no longer needs any."""
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def _restore(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    saved = load_file(directory / "adapter.safetensors")
    parameters = dict(_named(model))
    if saved.keys() != parameters.keys():
        raise ContractError(
            f"{directory}: holds other tensors than this spec trains; move it away and run again"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    for key, tensor in load_file(directory / "optimizer.safetensors").items():
        name, _, moment = key.rpartition(".")
        parameter = parameters[name]
        # AdamW keeps its step count on the CPU and its moments with the parameter.
        place = tensor if moment == "step" else tensor.to(parameter.device)
        optimizer.state[parameter][moment] = place


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().contiguous() for name, p in _named(model)}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{moment}": cast("Tensor", value).contiguous()
        for name, parameter in _named(model)
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def _complete_names(checkpoints: Path) -> list[Path]:
    """Checkpoint directories, oldest first; temporary ones have other names."""
    found = [p for p in checkpoints.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _remove_leftovers(checkpoints: Path) -> None:
    for leftover in checkpoints.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _torn(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(directory / "manifest.json")
        if manifest is None:
            return "no manifest"
        checked(manifest, SAVED, directory / "manifest.json", "somebody edited it")
    except ContractError as error:
        return str(error)
    for name, entry in manifest.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            return f"{name} is missing or cut short"
        if file_digest(path) != entry["sha256"]:
            return f"{name} is not what was written"
    return None
