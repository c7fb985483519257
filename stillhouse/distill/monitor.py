"""Evaluate a run during training, without changing what it trains.

`eval/accuracy` is the share of held-out questions that greedy answers get right, by the number
after ####. `train/score` and `eval/avg_score` reproduce the monitor of the cliff experiments: how
similar a student's answer is to one fresh teacher answer. They measure the similarity of texts, not
correctness. `eval/forward_kl` and `eval/reverse_kl` are KL(teacher || student) and KL(student ||
teacher) per token of answers to held-out prompts: the data's own, or the teacher's (eval_answers),
drawn once and the same in every arm of a seed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.distill.encoded import Example
from stillhouse.distill.head import head_of
from stillhouse.distill.loop import Loop, positions_of
from stillhouse.distill.losses import distill_loss
from stillhouse.distill.objectives import Jsd
from stillhouse.errors import ConfigError
from stillhouse.spec import TrainSpec

SCORED_ROWS = 8  # each needs a teacher answer; enough for a curve, and still affordable
EVAL_BATCH = 16
ASKED_ROWS = 256  # the standard error of an accuracy is then at most 3 points
BEYOND = 10**9  # a row, or a step, beyond all that are trained on: no training draw is used twice


def score(student: str, teacher: str) -> float:
    """Similarity of two texts in [0, 1]: 0.4 Jaccard + 0.3 length ratio + 0.3 shared bigrams.

    In words; bigrams: the share of the teacher's that the student also has. Source: the score
    of the cliff repository (bledden/context-distillation-tinkerideas, tinker_trainer.py).
    """
    s, t = student.split(), teacher.split()
    if not s or not t:
        return 0.0
    jaccard = len({*s} & {*t}) / len({*s} | {*t})
    length = min(len(s), len(t)) / max(len(s), len(t))
    pairs_s, pairs_t = {*zip(s, s[1:], strict=False)}, {*zip(t, t[1:], strict=False)}
    shared = len(pairs_s & pairs_t) / len(pairs_t) if pairs_t else 0.0
    return min(1.0, max(0.0, 0.4 * jaccard + 0.3 * length + 0.3 * shared))


def answer_in(text: str) -> str | None:
    """The number that a worked answer ends in, as GSM8K writes it: #### 1,234 is 1234."""
    found = re.search(r"####\s*(-?[\d,]*\.?\d+)", text)
    return found[1].replace(",", "") if found else None


class Monitor:
    """Computes scores, accuracy, and held-out losses at the steps that the spec sets."""

    def __init__(
        self,
        spec: TrainSpec,
        loop: Loop,
        held_out: Sequence[Example],
        tokenizer: Any,
    ) -> None:
        self.spec, self.loop, self.tokenizer = spec, loop, tokenizer
        asks_teacher = spec.monitor.eval_answers == "teacher"
        self.held_out = [e for e in held_out if asks_teacher or e.completion_ids]
        self.is_answered = not asks_teacher
        if spec.monitor.do_eval and not self.held_out:
            raise ConfigError(
                f"do_eval: data {spec.data.data_name} has no held-out row with a completion"
                f" (held_out_rows {spec.data.held_out_rows}); raise it, take the teacher's answers"
                " to the prompts (eval_answers=teacher), or leave do_eval out"
            )
        self.questions = [e for e in held_out if e.answer is not None][:ASKED_ROWS]
        if spec.monitor.accuracy_steps and not self.questions:
            raise ConfigError(
                f"accuracy_steps: data {spec.data.data_name} has no held-out row with an answer"
                f" (held_out_rows {spec.data.held_out_rows}); leave it at 0"
            )

    def measure(self, step: int) -> dict[str, float]:
        """Metrics due after step `step`, counted from 0; every process measures the same rows."""
        monitor, metrics = self.spec.monitor, dict[str, float]()
        done = step + 1
        if monitor.score_steps and done % monitor.score_steps == 0:
            choice = self.loop.sequences.choice
            examples = [choice.examples[row] for row in choice.rows(step)[:SCORED_ROWS]]
            metrics["train/score"] = self._score(examples, step)
        is_last = done == self.spec.training.max_steps
        if monitor.accuracy_steps and (done % monitor.accuracy_steps == 0 or is_last):
            metrics["eval/accuracy"] = float(self.right().mean())
        if monitor.do_eval and (done % monitor.eval_steps == 0 or is_last):
            with self.loop.clock.phase("eval"):
                if not self.is_answered:
                    self.held_out, self.is_answered = self._answered(), True
                metrics |= self._held_out_loss()
            metrics["eval/avg_score"] = self._score(self.held_out[:SCORED_ROWS], step)
        return metrics

    def _score(self, examples: Sequence[Example], step: int) -> float:
        """Mean score of fresh student answers against fresh teacher answers."""
        rows = range(BEYOND, BEYOND + len(examples))
        writers = [self.loop.sequences.writers[who] for who in ("student", "teacher")]
        with self.loop.clock.phase("eval"):
            written = [write(examples, step, rows).ids for write in writers]
        texts = [self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in written]
        return sum(map(score, *texts)) / len(examples)

    def right(self) -> Float[Tensor, " Q"]:
        """1 for each held-out question that the student's greedy answer gets right, else 0."""
        write = self.loop.sequences.writers["student"]
        with self.loop.clock.phase("eval"):
            ids = write(self.questions, 0, range(len(self.questions)), greedy=True).ids
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        pairs = zip(texts, self.questions, strict=True)
        right = [answer_in(text) == question.answer for text, question in pairs]
        return torch.tensor(right, dtype=torch.float64)

    def _answered(self) -> list[Example]:
        """The held-out prompts with an answer of the teacher's to each."""
        rows = range(BEYOND, BEYOND + len(self.held_out))
        written = self.loop.sequences.writers["teacher"](self.held_out, BEYOND, rows).ids
        both = zip(self.held_out, written, strict=True)
        return [replace(e, completion_ids=tuple(ids)) for e, ids in both]

    @torch.no_grad()
    def _held_out_loss(self) -> dict[str, float]:
        """JSD(beta), both KLs and the NLL per token of the held-out answers, in nats."""
        loop, sums = self.loop, torch.zeros(5, dtype=torch.float64)
        was_training = loop.student.training
        loop.student.eval()
        head = head_of(loop.student)
        for start in range(0, len(self.held_out), EVAL_BATCH):
            part = self.held_out[start : start + EVAL_BATCH]
            completions = [list(e.completion_ids) for e in part]
            prompts, none = [e.prompt_ids for e in part], [0] * len(part)
            logits = loop.score(part, completions, none)
            with loop.accelerator.autocast():
                hidden_NH, target_N = positions_of(
                    loop.student, prompts, completions, none, max(map(len, prompts)),
                    loop.pad_id, loop.accelerator.device,
                )  # fmt: skip
            loss, stats = distill_loss(
                hidden_NH.to(head.weight_VH.dtype), head, logits, target_N,
                objective=Jsd(self.spec.loss.beta), temperature=self.spec.loss.loss_temperature,
                chunk=self.spec.loss.loss_chunk,
            )  # fmt: skip
            parts = loss, stats.nll.sum(), stats.forward_kl.sum(), stats.reverse_kl.sum()
            numbers = [*(part.item() for part in parts), float(len(target_N))]
            sums += torch.tensor(numbers, dtype=torch.float64)
        loop.student.train(was_training)
        *totals, tokens = sums.tolist()
        names = "loss", "nll", "forward_kl", "reverse_kl"
        return {f"eval/{name}": sum_ / tokens for name, sum_ in zip(names, totals, strict=True)}
