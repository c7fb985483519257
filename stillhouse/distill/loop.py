"""This file is where a run is trained: one loop for every method, blind to which one it is.

A step asks the method's schedule for its plan, tosses the shared coin, lets a writer write the
sequences and a scorer score them, and differentiates the mean loss per completion token over all
processes. Who writes and who scores are functions the loop is given. B rows, P prompt positions,
T positions, N completion tokens of a batch, H width.

Processes: `num_processes` is how many shares a step's batch has; the processes that are really
there take equal numbers of shares. So one GPU can repeat, more slowly, what eight did.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stillhouse.distill.losses import TokenStats, distill_loss
from stillhouse.distill.models import head_weight, hidden_states
from stillhouse.distill.prompts import Example
from stillhouse.distill.quant import assert_gradients_exact
from stillhouse.distill.rollouts import (
    Completions,
    counted_generator,
    pad_left,
    permutation,
    uniforms,
)
from stillhouse.errors import ConfigError, Diverged
from stillhouse.methods import step_plan
from stillhouse.spec import TrainSpec

# (examples, step, global rows, padded prompt length) -> completions
Writer = Callable[[Sequence[Example], int, Sequence[int], int], Completions]
# (teacher prompts, completions) -> logits [n, V] of the rows a slice picks among the N positions
Scorer = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Callable[[slice], Tensor]]

# A distribution compared with itself: what rounding leaves of the loss, in nats per token.
SAME_FUNCTION = 1e-4


@dataclass
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # or the next phase pays for this one's kernels
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Share:
    """The sequences of one of `num_processes` shares of a step."""

    index: int
    examples: list[Example]
    completions: list[list[int]]


def positions_of(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    prompt_length: int,
    pad_id: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] that predict each completion token, and those tokens [N].

    Prompts are padded on the left and completions on the right, so the state that predicts the
    first completion token is the last prompt position of every row.
    """
    ids_BP, mask_BP = pad_left(prompts, prompt_length, pad_id)
    width = max(map(len, completions))
    ids_BC = torch.tensor([list(c) + [pad_id] * (width - len(c)) for c in completions])
    mask_BC = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in completions])
    ids_BT = torch.cat([ids_BP, ids_BC], 1).to(device)
    mask_BT = torch.cat([mask_BP, mask_BC], 1).to(device)
    hidden_BTH = hidden_states(model, ids_BT, mask_BT)
    is_completion_BC = mask_BT[:, prompt_length:].bool()
    return hidden_BTH[:, prompt_length - 1 : -1][is_completion_BC], ids_BT[:, prompt_length:][
        is_completion_BC
    ]


def learning_rate(spec: TrainSpec, step: int) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then the named schedule."""
    optim, steps = spec.optim, max(1, spec.training.max_steps)
    warmup = round(optim.warmup_ratio * steps)
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if optim.lr_scheduler_type == "linear":
        return optim.learning_rate * (1 - done)
    if optim.lr_scheduler_type == "cosine":
        return optim.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return optim.learning_rate


class Loop:
    """One optimiser step at a time. Holds student and optimiser; knows no method by name."""

    def __init__(
        self,
        spec: TrainSpec,
        accelerator: Accelerator,
        student: nn.Module,
        examples: Sequence[Example],
        writers: dict[str, Writer],
        score: Scorer,
        pad_id: int,
    ) -> None:
        self.spec, self.accelerator, self.student = spec, accelerator, student
        self.examples, self.writers, self.score, self.pad_id = examples, writers, score, pad_id
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        optim = spec.optim
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_epsilon,
            weight_decay=optim.weight_decay,
        )
        self.clock = Clock()
        self.shares: list[Share] = []  # of the step at hand, for the monitor and for a post-mortem

    def rows_of(self, step: int) -> list[int]:
        """The dataset rows of a step, for all shares: consecutive places in the epochs' orders."""
        t, size = self.spec.training, len(self.examples)
        batch = t.per_device_train_batch_size * t.gradient_accumulation_steps * t.num_processes
        places = range(step * batch, (step + 1) * batch)
        orders = {
            epoch: permutation(t.seed, epoch, size)
            for epoch in range(places[0] // size, places[-1] // size + 1)
        }
        return [orders[place // size][place % size] for place in places]

    def is_on_policy(self, step: int) -> bool:
        """The coin of a step: one for all processes, because all of them toss the same one."""
        plan = step_plan(self.spec.method, step, self.spec.training.max_steps)
        coin = uniforms(self.spec.training.seed, "coin", step, [0], 1).item()
        return coin < plan.lmbda

    def gradients(self, step: int) -> dict[str, float]:
        """Leave the gradient of the step's mean loss in `.grad`; the step's metrics.

        Raises:
            Interrupted: asked to stop while writing; no parameter was changed.
        """
        t = self.spec.training
        plan = step_plan(self.spec.method, step, t.max_steps)
        on_policy = self.is_on_policy(step)
        source = "student" if on_policy else plan.off_policy_source
        written = self._write(step, source)
        assert_gradients_exact(self.student)
        tokens = sum(len(c) for share in self.shares for c in share.completions)
        total = self._sum([float(tokens)])[0]
        sums = torch.zeros(len(TokenStats._fields), dtype=torch.float64)
        self.student.train()
        for share in self.shares:
            size = t.micro_batch or t.per_device_train_batch_size
            for start in range(0, len(share.completions), size):
                # Dropout, too, is counted: by step and share, not by what ran before.
                place = share.index * len(share.completions) + start
                torch.manual_seed(counted_generator(t.seed, "dropout", step, place).initial_seed())
                stats = self._micro_batch(share, slice(start, start + size), total)
                sums += torch.stack([s.sum() for s in stats]).double().cpu()
        with self.clock.phase("train"):
            self._sum_gradients()
        prompt_tokens = sum(len(e.prompt_ids) for share in self.shares for e in share.examples)
        truncated, rows = written
        reduced = self._sum([*sums.tolist(), float(prompt_tokens), float(truncated), float(rows)])
        names = [f"train/{name}" for name in TokenStats._fields]
        metrics = {name: value / total for name, value in zip(names, reduced, strict=False)}
        prompt_tokens, truncated, rows = reduced[-3:]
        metrics |= {
            "train/phase": float(on_policy),
            "train/seed_tokens": 0.0,
            "tokens/prompt": prompt_tokens,
            "tokens/completion": total,
            "tokens/rollout": total if source == "student" else 0.0,
            "tokens/teacher": total if source == "teacher" else 0.0,
        }
        if source != "dataset":
            metrics["rollout/truncation_rate"] = truncated / rows
        if on_policy:
            metrics["train/on_policy_loss"] = metrics["train/loss"]
            metrics["train/kl_divergence"] = metrics["train/reverse_kl"]
        return metrics

    def _write(self, step: int, source: str) -> tuple[int, int]:
        """Fill `shares` with this process's sequences; (truncated rows, rows) of it."""
        t, everyone = self.spec.training, self.rows_of(step)
        per_share = t.per_device_train_batch_size * t.gradient_accumulation_steps
        mine = t.num_processes // self.accelerator.num_processes
        first = self.accelerator.process_index * mine
        # All processes pad to one length: a row's arithmetic must not depend on their number.
        length = max(len(self.examples[row].prompt_ids) for row in everyone)
        self.shares, truncated = [], 0
        with self.clock.phase("rollout"):
            for index in range(first, first + mine):
                places = range(index * per_share, (index + 1) * per_share)
                examples = [self.examples[everyone[place]] for place in places]
                written = self.writers[source](examples, step, list(places), length)
                truncated += written.truncated
                self.shares.append(Share(index, examples, written.ids))
        self.prompt_length = length
        return truncated, mine * per_share

    def _micro_batch(self, share: Share, part: slice, total: float) -> TokenStats:
        examples, completions = share.examples[part], share.completions[part]
        with self.clock.phase("teacher"):
            logits = self.score([e.teacher_prompt_ids for e in examples], completions)
        with self.clock.phase("train"):
            head_VH = head_weight(self.student)
            with self.accelerator.autocast():
                hidden_NH, target_N = positions_of(
                    self.student,
                    [e.prompt_ids for e in examples],
                    completions,
                    self.prompt_length,
                    self.pad_id,
                    self.accelerator.device,
                )
            loss, stats = distill_loss(
                hidden_NH.to(head_VH.dtype),
                head_VH,
                logits,
                target_N,
                beta=self.spec.loss.beta,
                temperature=self.spec.loss.loss_temperature,
                chunk=self.spec.loss.loss_chunk,
            )
            (loss / total).backward()
        return stats

    def _sum(self, numbers: list[float]) -> list[float]:
        """The numbers, each summed over all processes."""
        if self.accelerator.num_processes == 1:
            return numbers
        local = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        return torch.as_tensor(self.accelerator.reduce(local, "sum")).tolist()

    def _sum_gradients(self) -> None:
        """One reduction for all adapters' gradients: they are small and the base has none."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.accelerator.num_processes == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        summed = torch.as_tensor(self.accelerator.reduce(flat, "sum"))
        for p, part in zip(
            self.parameters, summed.split([p.numel() for p in self.parameters]), strict=True
        ):
            p.grad = part.view_as(p).clone()

    def update(self, step: int) -> dict[str, float]:
        """Clip, step, and forget the gradient.

        Raises:
            Diverged: a gradient that is not finite; no parameter was changed.
        """
        optim = self.spec.optim
        with self.clock.phase("train"):
            norm = float(nn.utils.clip_grad_norm_(self.parameters, optim.max_grad_norm))
            if not torch.isfinite(torch.tensor(norm)):
                raise Diverged(f"step {step}: the gradient's norm is {norm}")
            rate = learning_rate(self.spec, step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {"train/grad_norm": norm, "train/learning_rate": rate}


def check_first_step(spec: TrainSpec, metrics: dict[str, float], is_same_function: bool) -> None:
    """Stop a run whose first numbers say that it trains something else than it means to.

    Raises:
        ConfigError: targets that are misaligned, or a teacher that is the student and yet differs.
    """
    limit = spec.training.sanity_max_nll
    for name in ("train/nll", "train/loss"):
        if metrics[name] > limit:
            raise ConfigError(
                f"step 0: {name} is {metrics[name]:.2f} nats per token, above sanity_max_nll"
                f" {limit:g}: inputs and targets are probably misaligned (wrong tokenizer, template"
                " or shift). If this pair really starts there, set sanity_max_nll higher"
            )
    if is_same_function and abs(metrics["train/loss"]) > SAME_FUNCTION:
        raise ConfigError(
            f"step 0: teacher and student are one function, and the loss between them is"
            f" {metrics['train/loss']:.2e} nats per token, not 0: the two are not fed the same text"
        )


def needed_shares(spec: TrainSpec, processes: int) -> None:
    """Raise ConfigError unless the processes at hand can take equal numbers of shares."""
    if spec.training.num_processes % processes:
        raise ConfigError(
            f"num_processes is {spec.training.num_processes} and {processes} processes were"
            " launched: they must divide it (launch fewer, or set --num-processes"
            f" {processes}, which is another point)"
        )
