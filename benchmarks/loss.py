"""This file is where the loss is measured against a dense computation in TRL's style.

    python benchmarks/loss.py       prints a Markdown table, in about two minutes

Both get hidden states and end with the gradient of the mean loss with respect to the student's;
both form the teacher's logits by a product with its head. Ours also makes every logged statistic.
Legend: N positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

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
PAIRS = 7  # alternating runs per beta, after one that warms up
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


def resident_mib(line: str) -> float:
    """What Linux says of this process's memory: VmRSS now, VmHWM at its peak."""
    (kib,) = (x.split()[1] for x in Path("/proc/self/status").open() if x.startswith(line))
    return int(kib) / 1024


def extra_mib(variant: str, beta: float) -> float:
    """Peak memory above what was resident before the call, by the kernel's own count.

    Called in a fresh process, since a peak never falls. (Not by getrusage's ru_maxrss: a child
    starts with its parent's.) The small call first loads what libraries load once. The start is what
    is resident, not an earlier peak, so that an error can only add.
    """
    step(variant, inputs(4, 512, HIDDEN), beta)
    x = inputs(BATCH * TIME, VOCABULARY, HIDDEN)
    before = resident_mib("VmRSS")
    step(variant, x, beta)
    return resident_mib("VmHWM") - before


def measured_extra_mib(variant: str, beta: float) -> float:
    child = [sys.executable, __file__, variant, str(beta)]
    return float(subprocess.run(child, check=True, text=True, stdout=subprocess.PIPE).stdout)


def row(x: Inputs, beta: float) -> tuple[str, bool]:
    """A line of the table, and whether it keeps to the limits."""
    ratios, seconds = [], {"ours": [], "dense": []}
    last: dict[str, tuple[float, float, Tensor]] = {}
    for pair in range(PAIRS + 1):
        for variant in VARIANTS:
            last[variant] = step(variant, x, beta)
            seconds[variant].append(last[variant][0])
        if pair:  # neighbours in time share what else the machine is doing
            ratios.append(last["ours"][0] / last["dense"][0])
    time_ratio = statistics.median(ratios)
    (_, value, gradient), (_, dense_value, dense_gradient) = last["ours"], last["dense"]
    value_off = abs(value - dense_value) / dense_value
    gradient_off = float((gradient - dense_gradient).norm() / dense_gradient.norm())
    memory = {variant: measured_extra_mib(variant, beta) for variant in VARIANTS}
    memory_ratio = memory["ours"] / memory["dense"]
    time_limit = 1.1 if beta in (0, 1) else 0.5
    typical = {variant: statistics.median(seconds[variant][1:]) for variant in VARIANTS}
    line = (
        f"| {beta:g} | {time_ratio:.2f} | {time_limit}"
        f" | {typical['ours']:.2f} / {typical['dense']:.2f} | {memory_ratio:.3f}"
        f" | {memory['ours']:.0f} / {memory['dense']:.0f} | {value_off:.0e} | {gradient_off:.0e} |"
    )
    return line, (
        time_ratio <= time_limit
        and memory_ratio <= MEMORY_LIMIT
        and value_off <= VALUE_LIMIT
        and gradient_off <= GRADIENT_LIMIT
    )


def main() -> None:
    torch.set_num_threads(THREADS)
    if len(sys.argv) == 3:
        print(extra_mib(sys.argv[1], float(sys.argv[2])))
        return
    x = inputs(BATCH * TIME, VOCABULARY, HIDDEN)
    lines, kept = zip(*(row(x, beta) for beta in BETAS), strict=True)
    print(
        f"{BATCH} × {TIME} positions, vocabulary {VOCABULARY:,}, hidden {HIDDEN}, float32,"
        f" {THREADS} threads, torch {torch.__version__}, load average {os.getloadavg()[0]:.1f} at"
        f" the end. Time is the median of {PAIRS} alternating pairs of runs, each ours over dense."
        f" Limits: extra memory {MEMORY_LIMIT:g}, values {VALUE_LIMIT:g}, gradients"
        f" {GRADIENT_LIMIT:g}, both relative.\n"
    )
    print("| beta | time | limit | s | extra memory | MiB | value off by | gradient off by |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    missed = [f"{beta:g}" for beta, keeps in zip(BETAS, kept, strict=True) if not keeps]
    if missed:
        sys.exit(f"the loss misses a limit at beta {', '.join(missed)}")


if __name__ == "__main__":
    main()
