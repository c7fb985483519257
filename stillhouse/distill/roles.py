"""Load the two models of a pair, and build the functions that generate and score sequences.

All writers share one signature, and so do all scorers. So the loop need not know that the teacher
may be the student's own base with the adapter disabled, or with an average of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import nn

from stillhouse.distill import models
from stillhouse.distill.average import Average
from stillhouse.distill.chat import Chat
from stillhouse.distill.encoded import Example
from stillhouse.distill.engine import Engine
from stillhouse.distill.loop import Logits, Scorer
from stillhouse.distill.pairs import PreparedPair
from stillhouse.distill.rollouts import Completions
from stillhouse.distill.sequences import Writer
from stillhouse.distill.teacher import Draws, ModelTeacher, Teacher
from stillhouse.distill.teacher_places import placed
from stillhouse.spec import RolloutSpec, TrainSpec

PromptOf = Callable[[Example], Sequence[int]]


class Roles:
    """Student and teacher of a run."""

    def __init__(
        self,
        spec: TrainSpec,
        prepared: PreparedPair,
        chat: Chat,
        accelerator: Accelerator,
        poll: Callable[[], None],
    ) -> None:
        """Load both; the teacher is the student's own base if the two are identical."""
        self.spec, self.accelerator, self.poll = spec, accelerator, poll
        pair, device = spec.pair, accelerator.device
        base = models.load_base(
            prepared.student, prepared.student_revision, pair.student_dtype, spec.quant, device
        )
        self.student = models.new_student(base, spec.lora, spec.training.seed)
        if spec.training.gradient_checkpointing:
            # A checkpointed block over a frozen base has no gradient unless its input requires one.
            base.enable_input_require_grads()  # type: ignore[operator]
            base.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        is_shared = spec.quant.quant_type == "none" and (
            prepared.student,
            prepared.student_revision,
            pair.student_dtype,
        ) == (prepared.teacher, prepared.teacher_revision, pair.teacher_dtype)
        decay = spec.loss.ema_decay
        self.average = None if decay is None else Average(self.student, decay)
        is_shared = is_shared or self.average is not None
        self.is_same_function = is_shared and not pair.has_context
        self.eos_ids, pad = chat.stop_ids, chat.tokenizer.pad_token_id
        self.pad_id = self.eos_ids[0] if pad is None else pad
        self.engine = Engine(self.student)
        load = partial(self._load_teacher, prepared, is_shared)
        self.teacher, self.manifest = placed(spec, device, load, (self.pad_id, self.eos_ids), poll)

    def _load_teacher(self, prepared: PreparedPair, is_shared: bool) -> ModelTeacher:
        """The teacher's model, in this process."""
        if is_shared:
            return self._of_model(self.student, self.engine, self.average)
        model = models.load_base(
            prepared.teacher, prepared.teacher_revision, self.spec.pair.teacher_dtype, None,
            self.accelerator.device,
        )  # fmt: skip
        return self._of_model(model, Engine(model))

    def _of_model(
        self, model: nn.Module, engine: Engine, average: Average | None = None
    ) -> ModelTeacher:
        frozen = partial(self._frozen, model, average)
        return ModelTeacher(model, engine, frozen, self.pad_id, self.eos_ids, self.poll)

    @contextlib.contextmanager
    def _frozen(self, model: nn.Module, average: Average | None) -> Iterator[None]:
        """Use a model without training it: another one, or the student with its adapter disabled,
        or with the average of its adapter."""
        if model is not self.student:
            yield
            return
        was_training = self.student.training
        weights = self.student.disable_adapter() if average is None else average.in_place()
        self.student.eval()
        try:
            with weights, self.accelerator.autocast():
                yield
        finally:
            self.student.train(was_training)

    def how(self) -> str:
        """How the student generates, for the log."""
        with self.accelerator.autocast():
            return self.engine.how()

    def teacher_scorer(self) -> Scorer:
        """Scores with the teacher's logits; its prompts may begin with few-shot examples."""
        is_alone = self.spec.scoring.teacher_rows == "alone"
        return _scorer(self.teacher, lambda e: e.teacher_prompt_ids, is_alone)

    def start_scorer(self) -> Scorer:
        """Scores with the student's logits before its first step: the adapter is disabled."""
        return _scorer(self._of_model(self.student, self.engine), lambda e: e.prompt_ids)

    def writers(self) -> dict[str, Writer]:
        """The writers, by the names that methods use."""
        # The student, as it is now, writes by the same lines as a teacher of this process.
        student = ModelTeacher(
            self.student, self.engine, lambda: self.accelerator.autocast(), self.pad_id,
            self.eos_ids, self.poll,
        )  # fmt: skip
        return {
            "student": partial(self._write, "student", student, lambda e: e.prompt_ids),
            "teacher": partial(
                self._write, "teacher", self.teacher, lambda e: e.teacher_prompt_ids
            ),
            "dataset": read,
        }

    def _write(
        self,
        who: str,
        writer: Teacher,
        prompt_of: PromptOf,
        examples: Sequence[Example],
        step: int,
        rows: Sequence[int],
        *,
        tokens: int | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
        greedy: bool = False,
    ) -> Completions:
        draws = Draws(self.spec.training.seed, who, step, rows)
        rollout = _at_most(self.spec.rollout, tokens)
        prompts = [prompt_of(e) for e in examples]
        return writer.write(prompts, draws, rollout, prefixes=prefixes, greedy=greedy)


def _scorer(teacher: Teacher, prompt_of: PromptOf, alone: bool = False) -> Scorer:

    def score(
        examples: Sequence[Example],
        completions: Sequence[Sequence[int]],
        forced: Sequence[int],
    ) -> Logits:
        prompts = [prompt_of(e) for e in examples]
        hidden_NH = teacher.hidden(prompts, completions, forced, alone=alone)
        head = teacher.head()
        return lambda rows: head.logits(hidden_NH[rows])

    return score


def _at_most(rollout: RolloutSpec, tokens: int | None) -> RolloutSpec:
    if tokens is None:
        return rollout
    least = min(rollout.min_new_tokens, tokens)
    return replace(rollout, max_new_tokens=tokens, min_new_tokens=least)


def read(examples: Sequence[Example], *_: Any, **__: Any) -> Completions:
    """The completions that the data has."""
    ids = [list(e.completion_ids) for e in examples]
    return Completions(ids, [False] * len(ids), [[] for _ in ids], [0] * len(ids))
