"""Declare what a step does: its sequences, its loss, its teacher's place, its budget."""

from __future__ import annotations

import re
from dataclasses import field
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from stillhouse.spec.values import (
    MISSING,
    STRICT,
    AtLeastOne,
    BelowOne,
    Count,
    Natural,
    NonNegative,
    Number,
    Positive,
    Schedule,
    Share,
    ShareSchedule,
    TemplateName,
    TemplateValue,
)


@dataclass(frozen=True, config=STRICT)
class MethodSpec:
    """Where the sequences of a step come from, as schedules over the run."""

    method_name: str
    lmbda: ShareSchedule  # share of the student's own rollouts in what is trained on
    lmbda_as: Literal["coin", "weight"]  # per step one kind, by a coin; or both, their losses mixed
    off_policy_source: Literal["dataset", "teacher"]  # what is not a rollout
    seed_tokens: Schedule  # first tokens of a rollout that the teacher writes; rounded down
    anchor_weight: Schedule  # of KL(student || student at its start), added to the loss
    replay_size: Natural  # steps whose sequences are kept and drawn from; 0: none are
    replay_injection: Share  # probability that a step puts teacher sequences there too

    @model_validator(mode="after")
    def _replays(self) -> MethodSpec:
        if self.replay_injection and not self.replay_size:
            raise ValueError(
                f"replay_injection {self.replay_injection:g} without a buffer: set replay_size,"
                " the number of steps that it keeps, or leave replay_injection at 0"
            )
        if self.replay_size and (self.lmbda != 1 or self.off_policy_source != "teacher"):
            raise ValueError(
                "a replay buffer takes every rollout, and teacher sequences by replay_injection:"
                " leave lmbda at 1 and off_policy_source at teacher"
            )
        return self

    @property
    def samples_teacher(self) -> bool:
        """Whether some step wants text that the teacher writes."""
        mixes = self.off_policy_source == "teacher" and self.lmbda != 1
        return mixes or self.seed_tokens != 0 or self.replay_injection > 0


@dataclass(frozen=True, config=STRICT)
class RescueSpec:
    """Settings for a pair that does not distill by itself: which prompts are used, and a cold start
    on the teacher's answers. Every method can use them; by default all are off."""

    cold_start: NonNegative  # share of the steps that come first and learn the teacher's answers
    cold_prompts: Natural  # how many prompts are the cold start's own, each answered once
    # Share of the prompts that a step may ask, those on which student and teacher agree most first.
    kept_prompts: ShareSchedule
    # mass: by the teacher's mass on shared tokens (Eq. 10); kl: by the least reverse KL per token.
    kept_by: Literal["mass", "kl"]
    other_prompts: BelowOne  # share of a step's prompts that are of another kind than the data's
    other_file: str | None  # rows of these, in a file; null: a generated pair's own

    @model_validator(mode="after")
    def _means_something(self) -> RescueSpec:
        if self.cold_start > 1:
            raise ValueError(
                f"cold_start {self.cold_start:g} is longer than the run: it is a share of its steps"
                " in [0, 1] (1: nothing but the teacher's answers)"
            )
        if (self.cold_start > 0) != (self.cold_prompts > 0):
            raise ValueError(
                f"cold_start {self.cold_start:g} on {self.cold_prompts} prompts: set both, or"
                " neither; cold_prompts is how many of the data's prompts are its own"
            )
        shares = (
            self.kept_prompts if isinstance(self.kept_prompts, tuple) else ((0, self.kept_prompts),)
        )
        if not all(share > 0 for _, share in shares):
            raise ValueError("kept_prompts 0: a share in (0, 1] is kept, or nothing could be asked")
        if self.other_file is not None and not self.other_prompts:
            raise ValueError("other_file without other_prompts, the share of prompts from there")
        return self


@dataclass(frozen=True, config=STRICT)
class LossSpec:
    """What is differentiated: on the student's own rollouts, and on all other sequences."""

    on_loss: Literal["jsd", "pg", "topk"]
    off_loss: Literal["jsd", "ce"]
    beta: Share  # of jsd, topk: 0 forward KL(teacher || student), 1 reverse KL(student || teacher)
    advantage_clip: Schedule  # of pg: |log q - log p| of a sampled token counts up to this, in nats
    # Of pg: what every sampled token counts instead, a control that no teacher has a part in.
    fixed_advantage: Annotated[float, Number] | None
    # Of a teacher whose weights are an exponential moving average of the student's: how much of it
    # each update keeps (0: it is the student as it is now). null: the teacher is frozen.
    ema_decay: BelowOne | None
    ratio_cap: AtLeastOne | None  # of pg: p / p_sample of a token counts up to this; null: no bound
    loss_top_k: Count  # of topk: tokens of a support; the rest is one bucket, exactly
    top_k_support: Literal["student", "teacher", "union", "intersection"]  # whose top k
    loss_temperature: Positive  # both sides' logits are divided by it
    # Of a token's loss, by where it stands: knots over the fraction of max_new_tokens before it.
    position_weights: Schedule
    loss_chunk: Count  # positions per chunk of the loss: memory, not meaning

    @model_validator(mode="after")
    def _means_something(self) -> LossSpec:
        if self.off_loss == "ce" and self.loss_temperature != 1:
            raise ValueError(
                "off_loss ce is of the student's own distribution, at loss_temperature 1; got"
                f" {self.loss_temperature:g}"
            )
        if self.fixed_advantage is not None and self.on_loss != "pg":
            raise ValueError(
                f"fixed_advantage {self.fixed_advantage:g} is of on_loss pg, and on_loss is"
                f" {self.on_loss}; set one of them otherwise"
            )
        if self.fixed_advantage == 0:
            raise ValueError(
                "fixed_advantage 0: no rollout would change anything; use another number, or null"
                " for the teacher's"
            )
        return self


def _is_server_url(value: str) -> str:
    found = re.fullmatch(r"http://[^\s/:@]+:(\d{1,5})", value)
    if found is None or int(found[1]) > 65535:
        raise ValueError(f"an address of a teacher is http://HOST:PORT, not {value}")
    return value


@dataclass(frozen=True, config=STRICT)
class ScoringSpec:
    """Where the teacher is that scores. Its numbers are the same wherever it is."""

    # process: in the student's. cache: what it gave is read from disk. server: one process for many
    # points (docs/teachers.md).
    teacher_at: Literal["process", "cache", "server"]
    # alone: each row by itself, unpadded, as a cache keeps it; last digits differ from together.
    teacher_rows: Literal["together", "alone"]
    teacher_cache_gib: Positive  # cache: it writes no more rows beyond
    # server: where `stillhouse teacher` serves; None: `stillhouse run` starts one for its points.
    teacher_url: Annotated[str, AfterValidator(_is_server_url)] | None
    teacher_patience_s: Positive  # server: a point waits so long, then saves and ends with 85


@dataclass(frozen=True, config=STRICT)
class DataSpec:
    """Prompts and the dataset's own completions."""

    data_name: str
    data_source: Literal["generated", "gsm8k", "tulu3", "local", "packaged"]
    data_path: str | None  # hub id, a local file or directory of rows, or packaged sources: A+B
    data_split: str
    prompt_template: str | None  # has {question}: what is put around a row's (last) question
    # Variables of the tokenizer's chat template, such as enable_thinking: false.
    chat_template_kwargs: dict[TemplateName, TemplateValue] = field(hash=False)
    template_date: str  # YYYY-MM-DD: today, for a template that asks what day it is
    max_length: Annotated[int, Field(ge=16), Number]  # prompt + completion, tokens
    min_completion: Count  # tokens a row must leave room for, or it is counted and left out
    max_rows: Count | None
    held_out_rows: Natural  # for the loss that do_eval reports; never trained on

    @field_validator("prompt_template")
    @classmethod
    def _has_slot(cls, value: str | None) -> str | None:
        if value is not None and "{question}" not in value:
            raise ValueError("a prompt_template must contain {question}")
        return value

    @field_validator("template_date", mode="before")
    @classmethod
    def _is_day(cls, value: Any) -> Any:
        if isinstance(value, date):  # YAML makes one of 2026-01-01
            return value.isoformat()
        if isinstance(value, str):
            try:
                return date.fromisoformat(value).isoformat()
            except ValueError as error:
                raise ValueError(f"a day is written YYYY-MM-DD ({error})") from error
        return value

    @field_validator("data_path")
    @classmethod
    def _is_given(cls, value: str | None) -> str | None:
        if value == MISSING:
            raise ValueError("there is no default; give it as data_path=FILE")
        return value

    @model_validator(mode="after")
    def _names_a_source_once(self) -> DataSpec:
        names = (self.data_path or "").split("+") if self.data_source == "packaged" else []
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            once = "+".join(dict.fromkeys(names))
            raise ValueError(
                f"data_path {self.data_path} names {twice} twice, whose rows are taken once; write"
                f" data_path={once}"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class RolloutSpec:
    """How the student writes. Nothing is inherited from a model's generation_config."""

    max_new_tokens: Count
    min_new_tokens: Natural  # end-of-text is forbidden before it
    temperature: Positive  # of sampling; the loss has its own
    horizon: ShareSchedule  # share of max_new_tokens that a rollout may have, over the run
    rollout_rows: Count  # written at once, at most: memory, and in float32 not meaning

    @model_validator(mode="after")
    def _room(self) -> RolloutSpec:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is above"
                f" max_new_tokens {self.max_new_tokens}"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class OptimSpec:
    """AdamW, its schedule and its limits."""

    learning_rate: Positive
    lr_scheduler_type: Literal["constant", "linear", "cosine"]  # after the warm-up
    warmup_ratio: Share
    weight_decay: NonNegative
    adam_beta1: BelowOne
    adam_beta2: BelowOne
    adam_epsilon: Positive
    max_grad_norm: Positive


@dataclass(frozen=True, config=STRICT)
class TrainingSpec:
    """The budget of a run and how it is laid over devices."""

    max_steps: Natural
    per_device_train_batch_size: Count  # sequences per device and accumulation step
    gradient_accumulation_steps: Count
    num_processes: Count  # sequences per step = batch × accumulation × processes
    mixed_precision: Literal["no", "bf16"]
    gradient_checkpointing: bool
    seed: Natural
    sanity_max_nll: (
        Positive  # nats per token at step 0 above which inputs and targets are misaligned
    )
    # Nats per token, mean: between log-probabilities as drawn and as trained; beyond it a run ends
    # (43). null: by the dtype that the student computes in.
    max_rollout_gap: Positive | None
    micro_batch: Count | None  # splits the per-device batch further; null: not at all
    save_steps: Count
