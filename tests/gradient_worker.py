"""Write the gradient of one training step to a file, from a process of its own.

Command line: FILE STEP WORDS…
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from stillhouse.compose import compose, from_command_line
from stillhouse.distill.run import Run
from stillhouse.rundir import Runs
from stillhouse.spec import TrainSpec
from stillhouse.stop import StopFlag

if __name__ == "__main__":
    file, step, *words = sys.argv[1:]
    spec = compose(from_command_line(words, TrainSpec), TrainSpec)
    run = Run(spec, Runs(Path(spec.place.runs)).of(spec), StopFlag())
    run.loop.gradients(int(step))
    if run.is_main:
        shares = [share for batch in run.loop.batches for share in batch.shares]
        tokens = [t for share in shares for ids in share.written.ids for t in ids]
        gradient = torch.cat([p.grad.flatten() for p in run.loop.parameters if p.grad is not None])
        processes = torch.tensor(run.accelerator.num_processes)
        content = {"gradient": gradient, "tokens": torch.tensor(tokens), "processes": processes}
        save_file(content, file)
    run.accelerator.end_training()  # as Run.train does
