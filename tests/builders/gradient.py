"""Write the gradient of one training step to a file: the work of a process of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from stillhouse.compose import compose, from_command_line
from stillhouse.distill.run import Run
from stillhouse.rundir import Runs
from stillhouse.spec import TrainSpec
from stillhouse.stop import StopFlag


def write_gradient(
    file: Path, step: int, words: list[str], environment: Mapping[str, str] | None = None
) -> None:
    """Of the point of these words; `environment` makes this process one rank of several."""
    os.environ.update(environment or {})
    spec = compose(from_command_line(words, TrainSpec), TrainSpec)
    run = Run(spec, Runs(Path(spec.place.runs)).of(spec), StopFlag())
    run.loop.gradients(step)
    if run.is_main:
        shares = [share for batch in run.loop.batches for share in batch.shares]
        tokens = [t for share in shares for ids in share.written.ids for t in ids]
        gradient = torch.cat([p.grad.flatten() for p in run.loop.parameters if p.grad is not None])
        processes = torch.tensor(run.accelerator.num_processes)
        content = {"gradient": gradient, "tokens": torch.tensor(tokens), "processes": processes}
        save_file(content, file)
    run.accelerator.end_training()  # as Run.train does
