"""Define the types of values: numbers with a range, names, bins, schedules."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _no_flag(value: Any) -> Any:
    """Refuse a bool: Python counts True as 1, but a person who writes true means something else."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


Number = BeforeValidator(_no_flag)
Count = Annotated[int, Field(ge=1), Number]
Natural = Annotated[int, Field(ge=0), Number]
Share = Annotated[float, Field(ge=0, le=1), Number]
BelowOne = Annotated[float, Field(ge=0, lt=1), Number]
Positive = Annotated[float, Field(gt=0), Number]
AtLeastOne = Annotated[float, Field(ge=1), Number]
NonNegative = Annotated[float, Field(ge=0), Number]
# It becomes a file name below runs/names, so it is one, and nothing else.
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"
Name = Annotated[str, Field(pattern=rf"^{NAME}$", max_length=200)]
Dtype = Literal["float32", "bfloat16", "float16"]
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

# Hex digits of the hash: 40 bits, one collision expected near 10^6 points of one slug.
ID_DIGITS = 10
MISSING = "???"  # OmegaConf's mark of a value that only the user can know
MAX_NAME = 52  # a Job name becomes a label and a pod name: 63 minus what Kubernetes appends


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


_Float = Annotated[float, Number]
_Schedule = Annotated[
    _Float | tuple[tuple[_Float, _Float], ...], BeforeValidator(_knots), AfterValidator(_in_order)
]
ShareSchedule = Annotated[_Schedule, _within(0, 1, "in [0, 1]")]
Schedule = Annotated[_Schedule, _within(0, math.inf, "at or above 0")]
