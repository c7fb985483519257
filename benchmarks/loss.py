"""Measure the losses: β-JSD against a dense computation, and other objectives against β-JSD.

The dense computation is in TRL's style. The script also measures β-JSD with the overlap of student
and teacher against β-JSD without it.

    python benchmarks/loss.py       prints three Markdown tables, in some eight minutes

All take hidden states and end with the gradient of the mean loss with respect to the student's; all
form the teacher's logits by a product with its head. Ours also computes every logged statistic.
Legend: N positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.distill.diagnostics import Summary
from stillhouse.distill.head import Head
from stillhouse.distill.losses import CHUNK, distill_loss
from stillhouse.distill.objectives import CrossEntropy, Jsd, Objective, PolicyGradient, TopK

BATCH, TIME, VOCABULARY, HIDDEN = 2, 512, 49_152, 576
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
THREADS = 2
PAIRS = 5  # alternating runs per row of a table, after one that warms up
MEMORY_LIMIT = 0.10
VALUE_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
OVERLAP_K, OVERLAP_BINS = 16, [(0, 16), (16, 64), (64, 256), (256, None)]
OVERLAP_LIMIT, TENTH_LIMIT = 1.15, 1.02  # time, looking at every step and at every tenth, over not
OVERLAP_MEMORY_LIMIT = 0.10  # of one tensor [N, V]
BESIDE_LIMIT = 1.3  # time of another objective over that of JSD at beta 0.5


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


def sampled(x: Inputs) -> Tensor:
    """Log-probabilities as a sampler's: from 1/3 down to e^-12, under none of the two models."""
    return torch.linspace(-1.1, -12, len(x.targets_N))


BESIDE: dict[str, Callable[[Inputs], Objective]] = {
    "cross-entropy": lambda x: CrossEntropy(),
    "policy gradient": lambda x: PolicyGradient(sampled(x), clip=5.0),
    "top 16 of the student, beta 0": lambda x: TopK(16, "student", 0.0),
    "top 16 of the student, beta 0.5": lambda x: TopK(16, "student", 0.5),
    "top 16 of the student, beta 1": lambda x: TopK(16, "student", 1.0),
    "top 16 of the teacher, beta 1": lambda x: TopK(16, "teacher", 1.0),
    "union of both top 16, beta 1": lambda x: TopK(16, "union", 1.0),
    "intersection of both top 16, beta 1": lambda x: TopK(16, "intersection", 1.0),
    "top 256 of the student, beta 1": lambda x: TopK(256, "student", 1.0),
}


def ours(
    objective: Objective, x: Inputs, summary: Summary | None = None, chunk: int = CHUNK
) -> Tensor:
    total, _ = distill_loss(
        x.hidden_NH,
        Head(x.head_VH),
        lambda rows: x.teacher_hidden_NH[rows] @ x.teacher_head_VH.T,
        x.targets_N,
        objective=objective,
        summary=summary,
        places_N=torch.arange(len(x.targets_N), device=x.targets_N.device) % TIME,
        chunk=chunk,
    )
    return total / len(x.targets_N)


def looked_at(beta: float, x: Inputs) -> Tensor:
    """Ours, with the overlap of both sides at every position."""
    summary = Summary(OVERLAP_K, OVERLAP_BINS)
    mean = ours(Jsd(beta), x, summary)
    summary.metrics(summary.numbers())
    return mean


def dense(beta: float, x: Inputs) -> Tensor:
    """Mean JSD_beta with all logits at once, by the operations of TRL's `generalized_jsd_loss`.

    Left out in its favour: the division of both logits by a temperature of 1, the mask, statistics.
    """
    logits_NV = (x.hidden_NH @ x.head_VH.T).float()
    with torch.no_grad():
        teacher_NV = (x.teacher_hidden_NH @ x.teacher_head_VH.T).float()
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


VARIANTS: dict[str, Callable[[float, Inputs], Tensor]] = {
    "ours": lambda beta, x: ours(Jsd(beta), x),
    "dense": dense,
    "overlap": looked_at,
}


def step(of: Callable[[Inputs], Tensor], x: Inputs) -> tuple[float, float, Tensor]:
    """Seconds of forward and backward, the loss, and its gradient."""
    x.hidden_NH.grad = None
    _wait(x)
    begin = time.perf_counter()
    loss = of(x)
    loss.backward()
    _wait(x)
    seconds = time.perf_counter() - begin
    assert x.hidden_NH.grad is not None
    return seconds, loss.item(), x.hidden_NH.grad


def _wait(x: Inputs) -> None:
    if x.hidden_NH.is_cuda:
        torch.cuda.synchronize()


def timed(beta: float) -> list[float]:
    """Time ratio, seconds of ours and of dense, relative difference of values and of gradients."""
    x = inputs(BATCH * TIME, VOCABULARY, HIDDEN)
    both = [partial(VARIANTS[name], beta) for name in ("ours", "dense")]
    # The first pair warms up, and is compared.
    (_, value, gradient), (_, dense_value, dense_gradient) = (step(of, x) for of in both)
    ratio, seconds = raced(both, x)
    value_off = abs(value - dense_value) / dense_value
    gradient_off = float((gradient - dense_gradient).norm() / dense_gradient.norm())
    return [ratio, *seconds, value_off, gradient_off]


def watched(beta: float) -> list[float]:
    """Time ratio with the overlap to without, and the seconds of both."""
    x = inputs(BATCH * TIME, VOCABULARY, HIDDEN)
    both = [partial(VARIANTS[name], beta) for name in ("overlap", "ours")]
    for of in both:
        step(of, x)
    ratio, seconds = raced(both, x)
    return [ratio, *seconds]


def beside(name: str) -> list[float]:
    """Time ratio of the objective to JSD at beta 0.5, and the seconds of both."""
    x = inputs(BATCH * TIME, VOCABULARY, HIDDEN)
    both = [partial(ours, o) for o in (BESIDE[name](x), Jsd(0.5))]
    for of in both:
        step(of, x)
    ratio, seconds = raced(both, x)
    return [ratio, *seconds]


def raced(both: Sequence[Callable[[Inputs], Tensor]], x: Inputs) -> tuple[float, list[float]]:
    """Time of the first over that of the second, and the seconds of each: medians."""
    pairs = [[step(of, x)[0] for of in both] for _ in range(PAIRS)]
    # Consecutive runs share the machine's other load, so the ratio is taken pair by pair.
    ratio = statistics.median(first_s / second_s for first_s, second_s in pairs)
    return ratio, [statistics.median(column) for column in zip(*pairs, strict=True)]


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
    of = partial(VARIANTS[variant], beta)
    step(of, inputs(4, 512, HIDDEN))
    x = inputs(BATCH * TIME, VOCABULARY, HIDDEN)
    before = resident_mib("VmRSS")
    step(of, x)
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
    (ours_mib,), (dense_mib,) = (in_a_process(f"{beta}", name) for name in ("ours", "dense"))
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
            tables()
        case ["beside", name]:
            print(json.dumps(beside(name)))
        case ["watched", beta]:
            print(json.dumps(watched(float(beta))))
        case [beta]:
            print(json.dumps(timed(float(beta))))
        case [beta, variant]:
            print(json.dumps([extra_mib(variant, float(beta))]))


def row_beside(name: str) -> tuple[str, bool]:
    ratio, its_s, jsd_s = in_a_process("beside", name)
    return f"| {name} | {ratio:.2f} | {its_s:.2f} / {jsd_s:.2f} |", ratio <= BESIDE_LIMIT


def row_watched(beta: float) -> tuple[str, bool]:
    ratio, its_s, plain_s = in_a_process("watched", f"{beta}")
    (its_mib,), (plain_mib,) = (in_a_process(f"{beta}", name) for name in ("overlap", "ours"))
    tenth = 1 + (ratio - 1) / 10
    share = max(0.0, its_mib - plain_mib) / (BATCH * TIME * VOCABULARY * 4 / 2**20)
    line = (
        f"| {beta:g} | {ratio:.2f} | {tenth:.3f} | {its_s:.2f} / {plain_s:.2f} | {share:.3f}"
        f" | {its_mib:.0f} / {plain_mib:.0f} |"
    )
    kept = ratio <= OVERLAP_LIMIT and tenth <= TENTH_LIMIT and share <= OVERLAP_MEMORY_LIMIT
    return line, kept


def tables() -> None:
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
    others, others_kept = zip(*(row_beside(name) for name in BESIDE), strict=True)
    print(
        f"\nThe other objectives beside β-JSD at beta 0.5, same shape, as many pairs; limit"
        f" {BESIDE_LIMIT:g}; load average {os.getloadavg()[0]:.1f} at the end.\n"
    )
    print("| objective | time | s |")
    print("|---|---|---|")
    print("\n".join(others))
    watching = (0.0, 0.5, 1.0)
    looks, looks_kept = zip(*(row_watched(beta) for beta in watching), strict=True)
    print(
        f"\nWith all numbers of `distill/diagnostics.py` (k {OVERLAP_K}, {len(OVERLAP_BINS)} bins)"
        " beside the same loss without, same shape, as many pairs; at every step, and from that at"
        f" every tenth. Limits {OVERLAP_LIMIT:g} and {TENTH_LIMIT:g}. Memory: what is more at the"
        f" peak, as a share of one tensor [N, V]; limit {OVERLAP_MEMORY_LIMIT:g}. Load average"
        f" {os.getloadavg()[0]:.1f} at the end.\n"
    )
    print("| beta | time | at every tenth step | s | memory | MiB |")
    print("|---|---|---|---|---|---|")
    print("\n".join(looks))
    names = [
        *(f"beta {b:g}" for b in BETAS),
        *BESIDE,
        *(f"overlap at beta {b:g}" for b in watching),
    ]
    rows = zip(names, [*kept, *others_kept, *looks_kept], strict=True)
    missed = [name for name, keeps in rows if not keeps]
    if missed:
        sys.exit(f"the loss misses a limit: {', '.join(missed)}")


if __name__ == "__main__":
    main()
