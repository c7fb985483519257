"""Declare what is trained: a pair, how its student is stored, its adapter."""

from __future__ import annotations

import re
import string
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from stillhouse.spec.values import MISSING, STRICT, BelowOne, Count, Dtype, Natural

INT_GROUPS, BNB_GROUPS = (32, 64, 128), (32, 64, 128, 256, 512, 1024)  # sizes that a quantiser has
MAX_PAIR_NAME = 30  # of one that nobody gave, so that a slug has room for the method


@dataclass(frozen=True, config=STRICT)
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
        return not self.differences

    @property
    def differences(self) -> list[str]:
        """What the teacher has and the student's unquantised base has not, a sentence each."""
        both = {
            "weights": (self.teacher, self.student),
            "revision": (self.teacher_revision, self.student_revision),
            "dtype": (self.teacher_dtype, self.student_dtype),
        }
        found = [
            f"its {what} is {its}, not {own}" for what, (its, own) in both.items() if its != own
        ]
        if self.pair_source == "generated" and self.student_steps is not None:
            found.append(f"the student was trained by itself (student_steps {self.student_steps})")
        return found


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


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
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
