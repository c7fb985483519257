"""This file is where the loss is measured against a dense computation in TRL's style.

    python benchmarks/loss.py       prints a Markdown table, in some three minutes

Both get hidden states and end with the gradient of the mean loss with respect to the student's;
both form the teacher's logits by a product with its head. Ours also makes every logged statistic.
Legend: N positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.distill.losses import distill_loss

BATCH, TIME, VOCABULARY, HIDDEN = 2, 512, 49_152, 576
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
THREADS = 2
PAIRS = 5  # alternating runs per beta, after one that warms up
MEMORY_LIMIT = 0.10
VALUE_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4


class Inputs(NamedTuple):
    hidden_NH: Tensor
    head_VH: Tensor
    teacher_hidden_NH: Tensor
    teacher_head_VH: Tensor
    targets_N: Tensor


def inputs(N: int, V: int, H: int) -> Inputs:
    g = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(N, H, generator=g) for _ in range(2))
    # In place: a temporary as large as a head would raise the peak before anything is measured.
    head, teacher_head = (torch.randn(V, H, generator=g).mul_(0.08) for _ in range(2))
    targets = torch.randint(V, (N,), generator=g)
    return Inputs(hidden.requires_grad_(), head, teacher_hidden, teacher_head, targets)


def ours(x: Inputs, beta: float) -> Tensor:
    total, _ = distill_loss(
        x.hidden_NH,
        x.head_VH,
        lambda rows: x.teacher_hidden_NH[rows] @ x.teacher_head_VH.T,
        x.targets_N,
        beta=beta,
    )
    return total / len(x.targets_N)


def dense(x: Inputs, beta: float) -> Tensor:
    """Mean JSD_beta with all logits at once, by the operations of TRL's `generalized_jsd_loss`.

    Left out in its favour: the division of both logits by a temperature of 1, the mask, statistics.
    """
    logits_NV = x.hidden_NH @ x.head_VH.T
    with torch.no_grad():
        teacher_NV = x.teacher_hidden_NH @ x.teacher_head_VH.T
    log_p, log_q = F.log_softmax(logits_NV, -1), F.log_softmax(teacher_NV, -1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True)

    if beta == 0:
        values_NV = kl(log_q, log_p)
    elif beta == 1:
        values_NV = kl(log_p, log_q)
    else:
        share = torch.tensor(beta)
        both = torch.stack([log_p + torch.log1p(-share), log_q + torch.log(share)])
        log_m = torch.logsumexp(both, dim=0)
        values_NV = share * kl(log_q, log_m) + (1 - share) * kl(log_p, log_m)
    return values_NV.sum() / len(x.targets_N)


VARIANTS: dict[str, Callable[[Inputs, float], Tensor]] = {"ours": ours, "dense": dense}


def step(variant: str, x: Inputs, beta: float) -> tuple[float, float, Tensor]:
    """Seconds of forward and backward, the loss, and its gradient."""
    x.hidden_NH.grad = None
    begin = time.perf_counter()
    loss = VARIANTS[variant](x, beta)
    loss.backward()
    seconds = time.perf_counter() - begin
    assert x.hidden_NH.grad is not None
    return seconds, loss.item(), x.hidden_NH.grad


def timed(beta: float) -> list[float]:
    """Time ratio, seconds of ours and of dense, relative difference of values and of gradients."""
    x = inputs(BATCH * TIME, VOCABULARY, HIDDEN)
    # The first pair warms up, and is compared.
    _, value, gradient = step("ours", x, beta)
    _, dense_value, dense_gradient = step("dense", x, beta)
    pairs = [[step(variant, x, beta)[0] for variant in VARIANTS] for _ in range(PAIRS)]
    # Neighbours in time share what else the machine is doing, so the ratio is taken pair by pair.
    ratio = statistics.median(ours_s / dense_s for ours_s, dense_s in pairs)
    seconds = [statistics.median(column) for column in zip(*pairs, strict=True)]
    value_off = abs(value - dense_value) / dense_value
    gradient_off = float((gradient - dense_gradient).norm() / dense_gradient.norm())
    return [ratio, *seconds, value_off, gradient_off]


def resident_mib(line: str) -> float:
    """What Linux says of this process's memory: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(found.split()[1]) / 1024 for found in lines if found.startswith(line))


def extra_mib(variant: str, beta: float) -> float:
    """Peak memory above what was resident before the call, by the kernel's own count.

    For a fresh process, since a peak never falls. (Not getrusage's ru_maxrss: a child starts with
    its parent's.) The small call first loads what libraries load once. The start is what is
    resident, not an earlier peak, so that an error can only add.
    """
    step(variant, inputs(4, 512, HIDDEN), beta)
    x = inputs(BATCH * TIME, VOCABULARY, HIDDEN)
    before = resident_mib("VmRSS")
    step(variant, x, beta)
    return resident_mib("VmHWM") - before


def in_a_process(*arguments: str) -> list[float]:
    """What this script prints when called with these arguments.

    PASSIVE: a thread that waits for the other gives its core away. By default it spins, and then
    any third process on two cores is what is measured (ratios from 0.8 to 2.4 at beta = 0).
    """
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout)


def row(beta: float) -> tuple[str, bool]:
    """A line of the table, and whether it keeps to the limits."""
    ratio, ours_s, dense_s, value_off, gradient_off = in_a_process(f"{beta}")
    (ours_mib,), (dense_mib,) = (in_a_process(f"{beta}", variant) for variant in VARIANTS)
    limit = 1.1 if beta in (0, 1) else 0.5
    line = (
        f"| {beta:g} | {ratio:.2f} | {limit} | {ours_s:.2f} / {dense_s:.2f}"
        f" | {ours_mib / dense_mib:.3f} | {ours_mib:.0f} / {dense_mib:.0f}"
        f" | {value_off:.0e} | {gradient_off:.0e} |"
    )
    return line, (
        ratio <= limit
        and ours_mib / dense_mib <= MEMORY_LIMIT
        and value_off <= VALUE_LIMIT
        and gradient_off <= GRADIENT_LIMIT
    )


def main() -> None:
    torch.set_num_threads(THREADS)
    match sys.argv[1:]:
        case []:
            table()
        case [beta]:
            print(json.dumps(timed(float(beta))))
        case [beta, variant]:
            print(json.dumps([extra_mib(variant, float(beta))]))


def table() -> None:
    lines, kept = zip(*(row(beta) for beta in BETAS), strict=True)
    print(
        f"{BATCH} × {TIME} positions, vocabulary {VOCABULARY:,}, hidden {HIDDEN}, float32,"
        f" {THREADS} threads (OMP_WAIT_POLICY=PASSIVE), torch {torch.__version__}, load average"
        f" {os.getloadavg()[0]:.1f} at the end. Time: median of {PAIRS} alternating pairs of runs,"
        f" each ours over dense, ours with all statistics. Limits: extra memory {MEMORY_LIMIT:g},"
        f" values {VALUE_LIMIT:g}, gradients {GRADIENT_LIMIT:g}, the last two relative.\n"
    )
    print("| beta | time | limit | s | extra memory | MiB | value off by | gradient off by |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    missed = [f"{beta:g}" for beta, keeps in zip(BETAS, kept, strict=True) if not keeps]
    if missed:
        sys.exit(f"the loss misses a limit at beta {', '.join(missed)}")


if __name__ == "__main__":
    main()
