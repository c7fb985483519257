"""Train a run: one training loop for all methods, which does not know which method it runs.

A step takes its plan from the method's schedules and its batches from `sequences`. It
differentiates the mean loss per trained token of each batch, over all processes, weighted by the
batches' weights. The functions that generate and score sequences are passed in.
Legend: B rows, P prompt positions, T positions, N trained tokens of a batch, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stillhouse.distill.clock import Clock
from stillhouse.distill.curriculum import Choice
from stillhouse.distill.diagnostics import Summary
from stillhouse.distill.encoded import Example
from stillhouse.distill.gap import Drawn, Gap, check, numbers, watched
from stillhouse.distill.head import head_of, hidden_states
from stillhouse.distill.losses import distill_loss
from stillhouse.distill.objectives import (
    CrossEntropy,
    Jsd,
    Objective,
    PolicyGradient,
    TokenStats,
    TopK,
)
from stillhouse.distill.quant import assert_gradients_exact
from stillhouse.distill.rollouts import Completions, counted_generator, pad_left
from stillhouse.distill.sequences import Batch, Sequences, Share, Writer
from stillhouse.errors import ConfigError, Diverged
from stillhouse.methods import StepPlan, step_plan, value_at
from stillhouse.spec import TrainSpec, is_capped

Logits = Callable[[slice], Tensor]  # logits [n, V] of the rows a slice picks among N positions
# (examples, completions, how many first tokens of each are not trained on) -> logits
Scorer = Callable[[Sequence[Example], Sequence[Sequence[int]], Sequence[int]], Logits]

# Nats per token: the largest loss that rounding can cause between identical distributions.
SAME_FUNCTION = 1e-4
LEAST_ENTROPY = 1e-9  # nats per token; below it the teacher is certain, and a ratio says nothing


def positions_of(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    forced: Sequence[int],
    prompt_length: int,
    pad_id: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] that predict each trained completion token, and those tokens [N].

    Prompts are padded on the left and completions on the right, so the state that predicts the
    first completion token is the last prompt position of every row. The first `forced` tokens of a
    completion are input only, not predicted.
    """
    ids_BP, mask_BP = pad_left(prompts, prompt_length, pad_id)
    width = max(map(len, completions))
    ids_BC = torch.tensor([list(c) + [pad_id] * (width - len(c)) for c in completions])
    mask_BC = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in completions])
    ids_BT = torch.cat([ids_BP, ids_BC], 1).to(device)
    mask_BT = torch.cat([mask_BP, mask_BC], 1).to(device)
    hidden_BTH = hidden_states(model, ids_BT, mask_BT)
    is_own_BC = torch.arange(width) >= torch.tensor(forced)[:, None]
    is_trained_BC = (mask_BC.bool() & is_own_BC).to(device)
    return hidden_BTH[:, prompt_length - 1 : -1][is_trained_BC], ids_BT[:, prompt_length:][
        is_trained_BC
    ]


def places_of(completions: Sequence[Sequence[int]], forced: Sequence[int]) -> Tensor:
    """How many tokens of its completion precede each trained token, [N], in the same order."""
    return torch.cat(
        [torch.arange(skip, len(c)) for c, skip in zip(completions, forced, strict=True)]
    )


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
    """Runs one optimizer step at a time. Holds student and optimizer; knows no method by name."""

    def __init__(
        self,
        spec: TrainSpec,
        accelerator: Accelerator,
        student: nn.Module,
        choice: Choice,
        writers: Mapping[str, Writer],
        score: Scorer,
        start: Scorer,
        pad_id: int,
        eos_ids: Sequence[int],
    ) -> None:
        """`score` gives the teacher's logits, `start` the student's as it was before step 0."""
        self.spec, self.accelerator, self.student = spec, accelerator, student
        self.sequences = Sequences(spec, accelerator, choice, writers)
        self.score, self.start, self.pad_id, self.eos_ids = score, start, pad_id, eos_ids
        self.step = 0  # the current step
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
        self.summary: Summary | None = None  # of the current step, if it is to be measured
        self.gaps = {"student": Gap(), "teacher": Gap()}  # of the current step, by writer
        self.found_gaps: dict[str, dict[str, float]] = {}  # its numbers
        self.batches: list[Batch] = []  # of the current step, for the monitor and for a post-mortem

    def gradients(self, step: int) -> dict[str, float]:
        """Leave the gradient of the step's loss in `.grad`; return the step's metrics.

        Raises:
            Interrupted: asked to stop during a rollout; no parameter was changed.
        """
        plan, self.step = step_plan(self.spec, step), step
        with self.clock.phase("rollout"):
            self.batches = self.sequences.batches(step, plan)
        assert_gradients_exact(self.student)
        self.student.train()
        self.summary = self._summary(step)
        self.gaps = {who: Gap() for who in self.gaps}
        mixed = dict.fromkeys((f"train/{name}" for name in TokenStats._fields), 0.0)
        metrics: dict[str, float] = {}
        total = 0.0
        for batch in self.batches:
            means, tokens = self._differentiate(batch, plan, step)
            total += tokens
            for name in mixed:
                mixed[name] += batch.weight * means[name]
            if "train/anchor_kl" in means:
                anchor = batch.weight * means["train/anchor_kl"]
                metrics["train/anchor_kl"] = metrics.get("train/anchor_kl", 0.0) + anchor
            if batch.is_on_policy:
                metrics["train/on_policy_loss"] = means["train/loss"]
                metrics["train/kl_divergence"] = means["train/reverse_kl"]
                metrics["rollout/staleness"] = float(step - batch.step)
                if "train/ratio_capped" in means:
                    metrics["train/ratio_capped"] = means["train/ratio_capped"]
            else:
                metrics["train/off_policy_loss"] = means["train/loss"]
        with self.clock.phase("train"):
            self._sum_gradients()
        on_policy = sum(batch.weight for batch in self.batches if batch.is_on_policy)
        mixed["train/entropy_ratio"] = mixed["train/student_entropy"] / max(
            mixed["train/teacher_entropy"], LEAST_ENTROPY
        )
        metrics = mixed | metrics | self._wrote()
        metrics |= self._gap(plan)
        if self.summary is not None:
            metrics |= self.summary.metrics(self._sum(self.summary.numbers()))
        return metrics | {
            "train/phase": on_policy,
            "train/seed_tokens": float(plan.seed_tokens if on_policy else 0),
            "tokens/completion": total,
        }

    def _gap(self, plan: StepPlan) -> dict[str, float]:
        """Metrics of the gap between rollouts and the trained function, over all processes."""
        found = self.found_gaps = {
            who: numbers(self._sum(gap.sums), self._largest(gap.largest))
            for who, gap in self.gaps.items()
        }
        if found["teacher"] and not plan.is_cold:
            # After a resume, cold-start answers are rewritten in other batches and round otherwise.
            return found["student"] | {"rollout/teacher_gap": found["teacher"]["rollout/gap_mean"]}
        return found["student"]

    def check_rollouts(self, step: int) -> None:
        """Refuse to train on what `gradients` found to be drawn from another distribution.

        Raises:
            Diverged: the gap exceeds max_rollout_gap; no parameter was changed.
        """
        for who, of_writer in self.found_gaps.items():
            check(self.spec, step, of_writer, who)

    def _summary(self, step: int) -> Summary | None:
        """The collector of overlap statistics, at the steps that measure them; else None."""
        monitor = self.spec.monitor
        is_last = step == self.spec.training.max_steps - 1
        if not monitor.overlap_steps or (step % monitor.overlap_steps and not is_last):
            return None
        return Summary(monitor.overlap_k, monitor.overlap_bins)

    def _differentiate(
        self, batch: Batch, plan: StepPlan, step: int
    ) -> tuple[dict[str, float], float]:
        """Add the gradient of a batch's weighted mean loss; return its means and token count."""
        t = self.spec.training
        total = self._sum([float(batch.trained_tokens)])[0]
        each = max(total, 1.0)  # if all tokens are forced, there is nothing to learn from
        sums = torch.zeros(len(TokenStats._fields) + 2, dtype=torch.float64)
        size = t.micro_batch or t.per_device_train_batch_size
        for share in batch.shares:
            for first in range(0, len(share.examples), size):
                # Dropout is seeded by step and share, too, and does not depend on what ran before.
                place = share.index * len(share.examples) + first
                dropout = counted_generator(t.seed, f"dropout {batch.writer}", step, place)
                torch.manual_seed(dropout.initial_seed())
                part = slice(first, first + size)
                sums += self._micro_batch(batch, share, part, plan, batch.weight / each)
        means = [value / each for value in self._sum(sums.tolist())]
        named = {f"train/{name}": m for name, m in zip(TokenStats._fields, means, strict=False)}
        if plan.anchor_weight:
            named["train/anchor_kl"] = means[-2]
            named["train/loss"] += plan.anchor_weight * means[-2]
        if is_capped(self.spec) and batch.is_on_policy:
            named["train/ratio_capped"] = means[-1]
        return named, total

    def _wrote(self) -> dict[str, float]:
        """Metrics of what was generated, over all processes; replayed sequences do not count."""
        wrote = self.sequences.wrote
        prompts = sum(len(e.prompt_ids) for b in self.batches for s in b.shares for e in s.examples)
        kinds = (
            "student",
            "teacher",
            "truncated",
            "rows",
            "rollouts",
            "length",
            "room",
            "compression",
        )
        summed = self._sum([float(prompts), *(float(wrote[kind]) for kind in kinds)])
        prompt, student, teacher, truncated, rows, rollouts, length, room, compression = summed
        found = {"tokens/prompt": prompt, "tokens/rollout": student, "tokens/teacher": teacher}
        if rows:
            found["rollout/truncation_rate"] = truncated / rows
        if rollouts:
            found["rollout/length"] = length / rollouts
            found["rollout/length_share"] = length / room  # of the length allowed at this step
            found["rollout/compression"] = compression / rollouts
        return found

    def _micro_batch(
        self, batch: Batch, share: Share, part: slice, plan: StepPlan, scale: float
    ) -> Tensor:
        """Add the gradient of a part of a share; return sums over its tokens: the statistics, the
        anchor's KL, and how many ratios were capped."""
        loss_spec, examples, written = self.spec.loss, share.examples[part], share.written[part]
        sequences = (examples, written.ids, written.forced)
        with self.clock.phase("teacher"):
            logits = self.score(*sequences)
            start = self.start(*sequences) if plan.anchor_weight else None
        with self.clock.phase("train"):
            head = head_of(self.student)
            with self.accelerator.autocast():
                hidden_NH, target_N = positions_of(
                    self.student,
                    [e.prompt_ids for e in examples],
                    written.ids,
                    written.forced,
                    batch.prompt_length,
                    self.pad_id,
                    self.accelerator.device,
                )
            hidden_NH = hidden_NH.to(head.weight_VH.dtype)
            how = {"temperature": loss_spec.loss_temperature, "chunk": loss_spec.loss_chunk}
            objective = self._objective(batch, written, plan)
            places_N = places_of(written.ids, written.forced).to(hidden_NH.device)
            weights_N = self._weights(places_N, hidden_NH)
            seen = {}
            if self.summary is not None and batch.is_on_policy:
                seen = {"summary": self.summary, "places_N": places_N}
            drawn = self._drawn(batch, written)
            if drawn is not None and batch.is_on_policy and not self.spec.lora.lora_dropout:
                seen["drawn"] = drawn
            if drawn is not None and not batch.is_on_policy:
                logits = watched(logits, drawn, target_N)
            loss, stats = distill_loss(
                hidden_NH,
                head,
                logits,
                target_N,
                objective=objective,
                weights_N=weights_N,
                **how,
                **seen,
            )
            sums = [s.sum().double() for s in stats]
            if weights_N is not None:  # log what is differentiated
                sums[0] = loss.detach().double()
            held = loss.new_zeros(())
            if start is not None:
                held, _ = distill_loss(hidden_NH, head, start, target_N, objective=Jsd(1.0), **how)
            ((loss + plan.anchor_weight * held) * scale).backward()
            if drawn is not None:
                if not drawn.log_probs and len(target_N):
                    self._ask_without_dropout(batch, examples, written, drawn)
                self.gaps[batch.writer].add(drawn.seen_N(), written)
        capped = objective.capped if isinstance(objective, PolicyGradient) else []
        count = torch.as_tensor(sum(capped), dtype=torch.float64, device=loss.device)
        return torch.stack([*sums, held.detach().double(), count]).cpu()

    def _drawn(self, batch: Batch, written: Completions) -> Drawn | None:
        """The collector for these rows' log-probabilities. None if they were not drawn, if an
        earlier model drew them, or if enough rows of the step were checked."""
        changes = batch.is_on_policy or self.spec.loss.ema_decay is not None
        is_sample = batch.is_on_policy and not self.spec.lora.lora_dropout
        if (changes and batch.step != self.step) or not any(written.log_probs):
            return None
        if not is_sample and self.gaps[batch.writer].sums[0]:
            return None
        rollout = self.spec.rollout
        is_endless_N = places_of(written.ids, written.forced) < rollout.min_new_tokens
        return Drawn(rollout.temperature, self.eos_ids, is_endless_N)

    @torch.no_grad()
    def _ask_without_dropout(
        self, batch: Batch, examples: Sequence[Example], written: Completions, drawn: Drawn
    ) -> None:
        """Compute log-probabilities of a sample of rollouts without dropout, as when written."""
        self.student.eval()
        with self.accelerator.autocast():
            hidden_NH, target_N = positions_of(
                self.student, [e.prompt_ids for e in examples], written.ids, written.forced,
                batch.prompt_length, self.pad_id, self.accelerator.device,
            )  # fmt: skip
        self.student.train()
        head = head_of(self.student)
        hidden_NH = hidden_NH.to(head.weight_VH.dtype)
        score = watched(lambda rows: head.logits(hidden_NH[rows]), drawn, target_N)
        for first in range(0, len(target_N), self.spec.loss.loss_chunk):
            score(slice(first, first + self.spec.loss.loss_chunk))

    def _weights(self, places_N: Tensor, like_NH: Tensor) -> Tensor | None:
        """The weight of each token's loss; None if all are 1."""
        schedule, most = self.spec.loss.position_weights, self.spec.rollout.max_new_tokens
        if schedule == 1 or not len(places_N):
            return None
        by_place = [value_at(schedule, place / most) for place in range(int(places_N.max()) + 1)]
        return like_NH.new_tensor(by_place)[places_N]

    def _objective(self, batch: Batch, written: Completions, plan: StepPlan) -> Objective:
        """The objective for these sequences."""
        loss = self.spec.loss
        if not batch.is_on_policy:
            return CrossEntropy() if plan.off_loss == "ce" else Jsd(loss.beta)
        if plan.on_loss == "topk":
            return TopK(loss.loss_top_k, loss.top_k_support, loss.beta)
        if plan.on_loss == "pg":
            drawn = [number for row in written.log_probs for number in row]
            sampled_N = torch.tensor(drawn, device=self.accelerator.device)
            clip, fixed = plan.advantage_clip, loss.fixed_advantage
            return PolicyGradient(sampled_N, clip, loss.ratio_cap, fixed)
        return Jsd(loss.beta)

    def _sum(self, numbers: list[float]) -> list[float]:
        """The numbers, each summed over all processes."""
        if self.accelerator.num_processes == 1:
            return numbers
        local = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        return torch.as_tensor(self.accelerator.reduce(local, "sum")).tolist()

    def _largest(self, number: float) -> float:
        """The largest of all processes' numbers."""
        if self.accelerator.num_processes == 1:
            return number
        local = torch.tensor([number], dtype=torch.float64, device=self.accelerator.device)
        return float(torch.as_tensor(self.accelerator.gather(local)).max())

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
        """Clip the gradient, update the parameters, and clear the gradient.

        Raises:
            Diverged: the gradient is not finite; no parameter was changed.
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
    """Stop a run whose first metrics show that it does not train what it is meant to.

    Raises:
        ConfigError: targets are misaligned, or the teacher is the student and yet differs.
    """
    limit = spec.training.sanity_max_nll
    for name in ("train/nll", "train/loss"):
        if metrics[name] > limit:
            raise ConfigError(
                f"step 0: {name} is {metrics[name]:.2f} nats per token, above sanity_max_nll"
                f" {limit:g}: inputs and targets are probably misaligned (wrong tokenizer, template"
                " or shift). If this pair really starts there, set sanity_max_nll higher"
            )
    if is_same_function and abs(metrics["train/reverse_kl"]) > SAME_FUNCTION:
        raise ConfigError(
            f"step 0: teacher and student are one function, and the KL between them is"
            f" {metrics['train/reverse_kl']:.2e} nats per token, not 0: the two are not fed the"
            " same text"
        )


def needed_shares(spec: TrainSpec, processes: int) -> None:
    """Raise ConfigError unless the processes at hand can take equal numbers of shares."""
    if spec.training.num_processes % processes:
        raise ConfigError(
            f"num_processes is {spec.training.num_processes} and {processes} processes were"
            " launched: they must divide it (launch fewer, or set --num-processes"
            f" {processes}, which is another point)"
        )
