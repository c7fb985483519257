"""Turn the numbers of a preflight into a verdict, by the first rule that holds.

The rules are data (conf/preflight.yaml). Each has the conditions under which it applies, what it
says, and what is worth trying. A condition is about a number's value, one end of its 95 % interval,
or a setting of the run: `beta`, `max_steps`. Torch is not imported: `plan` reads verdicts on a
laptop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from stillhouse.errors import ConfigError
from stillhouse.identity import as_before, digest, to_plain
from stillhouse.rundir import Json
from stillhouse.spec import TrainSpec
from stillhouse.text import number_of

LIKELY, UNLIKELY, UNSURE = 0, 3, 4  # exit codes
EXIT_CODES = {"likely": LIKELY, "unlikely": UNLIKELY, "unsure": UNSURE}
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
# Added after other knobs and before the first verdict: a key contains them, whatever their value.
_IN_KEYS = (("loss", "position_weights"), ("rollout", "horizon"))


@dataclass(frozen=True)
class Measured:
    """A number with its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float
    n: int  # prompts

    def as_json(self) -> Json:
        """The fields; NaN and infinity become null, because neither is JSON."""
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Measured:
        value, low, high = (
            math.nan if plain[key] is None else plain[key] for key in ("value", "low", "high")
        )
        return cls(value, low, high, plain["n"])


@checked(frozen=True, config=_STRICT)
class Condition:
    """That a number, or an end of its interval, lies on one side of a threshold."""

    number: str
    end: Literal["value", "low", "high"]
    side: Literal["above", "below"]
    threshold: float

    def holds(self, numbers: Mapping[str, Measured]) -> bool:
        """Whether the condition holds; false if the number was not measured."""
        if self.number not in numbers:
            return False
        found = getattr(numbers[self.number], self.end)
        return found > self.threshold if self.side == "above" else found < self.threshold


@checked(frozen=True, config=_STRICT)
class Rule:
    """What is said of a pair for which all conditions hold."""

    rule: str
    when: tuple[Condition, ...]  # none: always
    verdict: Literal["likely", "unlikely", "unsure"]
    reason: Annotated[str, Field(min_length=1)]
    recipe: str | None  # words of a command line that are worth trying, or what to do


@checked(frozen=True, config=_STRICT)
class Rules:
    """The rules, and the study that set their thresholds."""

    calibrated_on: str
    fitted_on: tuple[str, ...]  # pairs whose outcomes were known when the thresholds were set
    rules: tuple[Rule, ...]


def decide(rules: Rules, numbers: Mapping[str, Measured]) -> Json:
    """`verdict`, `rule`, `reasons`, `recipe` of the first rule whose conditions all hold."""
    rule = next(r for r in rules.rules if all(c.holds(numbers) for c in r.when))
    reasons = [rule.reason, *(_told(c, numbers[c.number]) for c in rule.when)]
    return {
        "verdict": rule.verdict,
        "rule": rule.rule,
        "reasons": reasons,
        "recipe": rule.recipe,
        "calibrated_on": rules.calibrated_on,
    }


def judged(rules: Rules, spec: TrainSpec, found: Mapping[str, Any]) -> Json:
    """The verdict on what was measured of a spec's pair, with what it was asked for."""
    beta, max_steps = spec.loss.beta, spec.training.max_steps
    asked = {
        "pair": spec.pair.pair_name,
        "quant": spec.quant.quant_type,
        "loss": spec.loss.on_loss,
        "beta": beta,
        "max_steps": max_steps,
    }
    return asked | decide(rules, numbers_of(found) | asked_numbers(beta, max_steps))


def _told(c: Condition, m: Measured) -> str:
    end = {"value": "", "low": "'s lower end", "high": "'s upper end"}[c.end]
    found = f"{m.value:.3g}"
    if m.n == 0:  # asked, not measured
        return f"{c.number} {c.side} {c.threshold:g}: {found}"
    found += f" [{m.low:.3g}, {m.high:.3g}]"
    return f"{c.number}{end} {c.side} {c.threshold:g}: {found}, n = {m.n}"


def numbers_of(found: Mapping[str, Any]) -> dict[str, Measured]:
    """The numbers of a verdict as its file keeps them."""
    return {name: Measured.of(plain) for name, plain in found["numbers"].items()}


def as_text(found: Mapping[str, Any]) -> str:
    """A verdict and its numbers for a terminal."""
    settings = f"{found['loss']}, beta {found['beta']:g}, {number_of(found['max_steps'], 'step')}"
    stored = "" if found["quant"] == "none" else f" in {found['quant']}"
    lines = [f"{found['verdict']}: {found['pair']}{stored}, with {settings}"]
    lines += [f"  {reason}" for reason in found["reasons"]]
    if found["recipe"]:
        lines.append(f"  worth trying: {found['recipe']}")
    lines.append(f"  rule {found['rule']}; thresholds: {found['calibrated_on']}")
    facts = found["facts"]
    if (error := facts.get("quantization_error")) is not None:
        lines.append(f"the quantiser changes the weights by {error:.2%} (||Q(W)-W||/||W||)")
    prompts = number_of(facts["prompts"], "prompt")
    lines.append(f"of {prompts}, {facts['with_answers']} with an answer:")
    if not facts["with_answers"]:
        lines.append("  capability: not measured, the data has no answers")
    if not facts["teacher_writes"]:
        lines.append("  capability: not measured, the teacher of this pair only scores")
    ends = facts["end_of_text"]
    if ends["student"] != ends["teacher"]:
        lines.append(
            f"  end of text: {ends['student']} for the student, {ends['teacher']} for the teacher:"
            " here both end at any of them, elsewhere the student may never stop"
        )
    numbers = numbers_of(found)
    width = max(map(len, numbers))
    lines += [
        f"  {name:<{width}}         –  not defined here"
        if math.isnan(m.value)
        else f"  {name:<{width}}  {m.value:>8.3g}  [{m.low:.3g}, {m.high:.3g}]"
        for name, m in numbers.items()
    ]
    return "\n".join(lines)


def rules_of(plain: Any, where: str) -> Rules:
    """Checked rules from plain data.

    Raises:
        ConfigError: they are not rules, or the last one does not always hold.
    """
    try:
        rules = TypeAdapter(Rules).validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {at}: {first['msg']}") from error
    if not rules.rules or rules.rules[-1].when:
        raise ConfigError(f"{where}: the last rule must always hold (when: [])")
    return rules


def asked_of(spec: TrainSpec) -> tuple[Any, ...]:
    """The parts of a spec that a verdict is about: the same pair under another loss, or for more
    steps, is another question, because both decide the outcome."""
    return spec.pair, spec.quant, spec.data, spec.loss, spec.rollout, spec.training.max_steps


def key_of(spec: TrainSpec) -> str:
    """Ten hex digits that identify what a verdict is about."""
    return key_of_plain(to_plain(spec))


def key_of_plain(plain: Mapping[str, Any]) -> str:
    """The same as `key_of`, for a spec as a run's record keeps it."""
    names = ("pair", "quant", "data", "loss", "rollout")
    sections = {name: as_before(name, plain[name]) for name in names}
    for name, leaf in _IN_KEYS:
        if leaf in plain[name]:
            sections[name] |= {leaf: plain[name][leaf]}
    return digest([sections, plain["training"]["max_steps"]])[:10]


def asked_numbers(beta: float, max_steps: int) -> dict[str, Measured]:
    """Settings that are not measured but affect the outcome; rules use them like other numbers."""
    told = {"beta": beta, "max_steps": max_steps}
    return {name: Measured(value, value, value, 0) for name, value in told.items()}
