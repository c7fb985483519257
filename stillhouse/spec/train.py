"""Declare a point, and what its sections ask of one another."""

from __future__ import annotations

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from stillhouse.spec.learning import (
    DataSpec,
    LossSpec,
    MethodSpec,
    OptimSpec,
    RescueSpec,
    RolloutSpec,
    ScoringSpec,
    TrainingSpec,
)
from stillhouse.spec.models import LoraSpec, PairSpec, QuantSpec
from stillhouse.spec.running import MonitorSpec, PlaceSpec, SiteSpec, TrackingSpec, WatchSpec
from stillhouse.spec.values import STRICT, Dtype


@dataclass(frozen=True, config=STRICT)
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
                f" and the teacher of pair {pair.pair_name} is not the student:"
                f" {'; '.join(pair.differences)}. null leaves it frozen"
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
