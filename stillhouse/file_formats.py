"""Declare the fields that each JSON file of the project must have for other code to rely on.

There is one shape per format. Extra fields are allowed. A field that is missing or of another type
raises an error that names the field, its file and what to do, so that one broken file costs a
reader one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic reads no other before Python 3.12
)

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from stillhouse.errors import ContractError
from stillhouse.spec import Dtype

Json = dict[str, Any]


def checked(content: Json, shape: Any, path: Path, cure: str) -> Json:
    """The object that was read from `path`, unchanged, if it has the fields that are relied on.

    Raises:
        ContractError: it has not; names the first wrong field, and the `cure`.
    """
    try:
        shape.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise ContractError(f"{path}: {where}: {reason}; {cure}") from error
    return content


_LENIENT = ConfigDict(strict=True, extra="allow")


@with_config(_LENIENT)
class _Code(TypedDict):
    digest: str


class _Libraries(TypedDict, total=False):
    versions: dict[str, str | None]


@with_config(_LENIENT)
class _Place(TypedDict):
    cache_dir: str


@with_config(_LENIENT)
class _Training(TypedDict):
    max_steps: int
    seed: int


@with_config(_LENIENT)
class _Pair(TypedDict):
    pair_name: str


@with_config(_LENIENT)
class _Quant(TypedDict):
    quant_type: str


@with_config(_LENIENT)
class _Method(TypedDict):
    method_name: str


@with_config(_LENIENT)
class _Spec(TypedDict):
    """The fields of a resolved config that are read without composing it again."""

    pair: _Pair
    quant: _Quant
    data: dict[str, Any]
    loss: dict[str, Any]
    method: _Method
    training: _Training
    place: _Place
    # A version that did not know a section yet left it out.
    rescue: NotRequired[dict[str, Any]]
    scoring: NotRequired[dict[str, Any]]
    lora: NotRequired[dict[str, Any]]
    rollout: NotRequired[dict[str, Any]]
    optim: NotRequired[dict[str, Any]]
    monitor: NotRequired[dict[str, Any]]
    watch: NotRequired[dict[str, Any]]
    tracking: NotRequired[dict[str, Any]]
    site: NotRequired[dict[str, Any]]


class _Record(_Libraries):
    """What is relied on in spec.json."""

    versioned: dict[str, dict[str, Any]]
    spec: _Spec
    code: _Code


class _Row(TypedDict):
    """What is relied on in a baseline's baseline.json."""

    label: str
    pair: _Pair
    quant: _Quant | None
    chat: NotRequired[str]


class _Status(TypedDict, total=False):
    """What is relied on in status.json; any of it may be missing."""

    phase: str
    step: int | None
    max_steps: int | None
    attempt: int
    attempts_without_progress: int
    pid: int | None
    exit_code: int | None
    cause: str | None
    finished: float | None
    warnings: dict[str, str] | None
    stopped_by: str | None
    eval_cause: str | None
    eval_exit_code: int | None
    eval_finished: float | None


@with_config(_LENIENT)
class _File(TypedDict):
    size: int


class _Contract(TypedDict):
    """What is relied on in adapter/stillhouse.json, to say whether an adapter is there."""

    id: str
    files: dict[str, _File]


class _Answer(TypedDict, total=False):
    """The fields of a result in eval/<task>.json; each may be missing, or has this type."""

    task: str
    metric: str
    value: float
    metrics: dict[str, Any]
    higher_is_better: bool
    n: int
    seconds: float
    samples: list[dict[str, Any]]
    versions: dict[str, Any]


class _Score(_Answer):
    """The field that shows whether a score answers a question."""

    key: str


@with_config(_LENIENT)
class _Sample(TypedDict):
    doc: int
    value: float


class _WholeScore(TypedDict):
    """What tables and statistics are made of."""

    key: str
    metric: str
    value: float
    metrics: dict[str, Any]
    higher_is_better: bool
    n: Annotated[int, Field(ge=0)]
    seconds: float
    samples: list[_Sample]
    versions: dict[str, Any]


def _has_totals(seconds: dict[str, float]) -> dict[str, float]:
    if missing := {"load", "total"} - seconds.keys():
        raise ValueError(f"no {min(missing)}")
    return seconds


class _EvalNote(TypedDict, total=False):
    """What is relied on in eval_begun.json and eval_error.json; any of it may be missing."""

    pid: int
    job: str | None
    deaths: int
    code: int
    cause: str


class _Cost(TypedDict):
    """What is relied on in cost.json."""

    seconds: Annotated[dict[str, float], AfterValidator(_has_totals)]
    tokens: dict[str, float]
    device: str
    devices: int
    price_usd_per_hour: float | None


@with_config(_LENIENT)
class _Point(TypedDict):
    id: str
    slug: str
    name: str | None
    overrides: dict[str, Any]


@with_config(_LENIENT)
class _Baseline(TypedDict):
    label: str
    pair_name: str
    quant_type: str | None
    directory: str


class _Sweep(TypedDict):
    """What is relied on in a sweep's record, to show the sweep's state."""

    name: str
    points: list[_Point]
    baselines: list[_Baseline]
    suite: dict[str, Any] | None
    path: NotRequired[str | None]
    cache_dir: NotRequired[str | None]
    commits: NotRequired[dict[str, str] | None]


@with_config(_LENIENT)
class _Compared(TypedDict):
    by: str
    metric: str
    baseline: Any


class _WholeSweep(_Sweep):
    """The further fields of a sweep's record that a report needs."""

    axes: dict[str, list[Any]]
    compare: _Compared | None
    file: str | None
    question: str | None
    created: float


@with_config(_LENIENT)
class _Measured(TypedDict):
    value: float | None
    low: float | None
    high: float | None
    n: int


class _Verdict(TypedDict):
    """What is relied on in a preflight's result."""

    numbers: dict[str, _Measured]
    measured: NotRequired[dict[str, Any]]
    facts: NotRequired[dict[str, Any]]
    sources: NotRequired[dict[str, dict[str, Any]]]


@with_config(_LENIENT)
class _Made(TypedDict):
    """What is relied on in made.json: a directory of the cache, and what was found when made."""

    facts: dict[str, Any]
    files: dict[str, int]


@with_config(_LENIENT)
class _Saved(_File):
    sha256: str


@with_config(_LENIENT)
class _Teacher(TypedDict):
    """What is relied on in a teacher's manifest: of a run, and of what a cache keeps."""

    weights: str
    settings: str
    tokenizer: str
    dtype: Dtype
    probe: list[Annotated[float, Field(allow_inf_nan=False)]]


RECORD: Any = TypeAdapter(with_config(_LENIENT)(_Record))
ROW: Any = TypeAdapter(with_config(_LENIENT)(_Row))
STATUS: Any = TypeAdapter(with_config(_LENIENT)(_Status))
CONTRACT: Any = TypeAdapter(with_config(_LENIENT)(_Contract))
SCORE: Any = TypeAdapter(with_config(_LENIENT)(_Score))
WHOLE_SCORE: Any = TypeAdapter(with_config(_LENIENT)(_WholeScore))
EVAL_NOTE: Any = TypeAdapter(with_config(_LENIENT)(_EvalNote))
VERDICT: Any = TypeAdapter(with_config(_LENIENT)(_Verdict))
MADE: Any = TypeAdapter(_Made)
SAVED: Any = TypeAdapter(dict[str, _Saved])
COST: Any = TypeAdapter(with_config(_LENIENT)(_Cost))
SWEEP: Any = TypeAdapter(with_config(_LENIENT)(_Sweep))
WHOLE_SWEEP: Any = TypeAdapter(with_config(_LENIENT)(_WholeSweep))
TEACHER: Any = TypeAdapter(_Teacher)
