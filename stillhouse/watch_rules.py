"""Watch a run: apply rules to the metrics that it logs, and report their findings.

A rule is data (`watch_rules` in conf/): a metric, a condition on its mean over a window of steps,
and whether that is a warning or ends the run. Findings depend on the metrics alone, so a resumed
run finds the same as an uninterrupted one. Torch is not imported: rules are checked at plan time,
on a laptop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from stillhouse.errors import ConfigError, nearest
from stillhouse.spec import TrainSpec, WatchRule, is_capped

# What every step logs, and what only some do. A test holds these lists against real runs. Seconds
# (time/*) are not here: they differ from process to process, and a rule must not.
_ALWAYS = [
    "train/loss",
    "train/forward_kl",
    "train/reverse_kl",
    "train/jsd_half",
    "train/nll",
    "train/student_entropy",
    "train/teacher_entropy",
    "train/entropy_ratio",
    "train/phase",
    "train/seed_tokens",
    "train/grad_norm",
    "train/learning_rate",
    "tokens/prompt",
    "tokens/completion",
    "tokens/rollout",
    "tokens/teacher",
]
_ON_POLICY = [
    "train/on_policy_loss",
    "train/kl_divergence",
    "rollout/staleness",
    "rollout/gap_mean",
    "rollout/gap_max",
    "rollout/gap_k3",
    "rollout/ess",
    "rollout/ess_sequence",
    "rollout/length",
    "rollout/length_share",
    "rollout/compression",
]
_OVERLAP = [
    "ratio",
    "advantage",
    "entropy_gap",
    "mass_student",
    "mass_teacher",
    "advantage_shared",
    "advantage_student_only",
    "advantage_teacher_only",
    "student_entropy",
    "teacher_entropy",
]
_HELD_OUT = ("eval/loss", "eval/nll", "eval/forward_kl", "eval/reverse_kl", "eval/avg_score")


@dataclass(frozen=True)
class Finding:
    """A rule whose condition holds, at the first step where it does."""

    rule: str
    step: int
    text: str


def logged(spec: TrainSpec) -> set[str]:
    """The names of the metrics that some step of this run logs."""
    method, monitor = spec.method, spec.monitor
    writes = method.lmbda != 0
    reads = method.lmbda != 1 or method.replay_injection > 0
    names: set[str] = set(_ALWAYS)
    if writes:
        names.update(_ON_POLICY)
    if reads:
        names.add("train/off_policy_loss")
    if writes or method.off_policy_source == "teacher":
        names.add("rollout/truncation_rate")
    if writes and is_capped(spec):
        names.add("train/ratio_capped")
    if reads and method.off_policy_source == "teacher":
        names.add("rollout/teacher_gap")
    if method.anchor_weight != 0:
        names.add("train/anchor_kl")
    if writes and monitor.overlap_steps:
        places = [
            "",
            *(f"/{first}-{'' if end is None else end - 1}" for first, end in monitor.overlap_bins),
        ]
        names.update(f"overlap/{name}{place}" for name in _OVERLAP for place in places)
        names.update(("overlap/positions", "overlap/empty"))
    if monitor.accuracy_steps:
        names.add("eval/accuracy")
    if monitor.score_steps:
        names.add("train/score")
    if monitor.do_eval:
        names.update(_HELD_OUT)
    return names


def rules_of(spec: TrainSpec) -> dict[str, WatchRule]:
    """The rules of this run, without optional ones whose metric or window it does not have."""
    known, steps = logged(spec), spec.training.max_steps
    return {
        name: rule
        for name, rule in spec.watch.watch_rules.items()
        if not rule.optional or (rule.metric in known and rule.window <= steps)
    }


def stops(spec: TrainSpec, name: str) -> bool:
    """Whether what this rule finds ends the run."""
    return spec.watch.watch_rules[name].action == "stop" or name in spec.watch.stop_on


def check(spec: TrainSpec, where: str) -> None:
    """Refuse rules that could never find anything.

    Raises:
        ConfigError: a metric that this run does not log, or a window longer than the run.
    """
    known, steps = logged(spec), spec.training.max_steps
    for name, rule in rules_of(spec).items():
        if rule.metric not in known:
            raise ConfigError(
                f"{where}: watch rule {name}: this run logs no metric {rule.metric}."
                f"{nearest(rule.metric, known)} (optional: true leaves a rule out where its metric"
                " is not logged)"
            )
        if rule.window > steps:
            raise ConfigError(
                f"{where}: watch rule {name}: its window of {rule.window} steps is longer than"
                f" the run, {steps}; shorten it, or leave the rule out"
            )


class Watch:
    """The rules of a run, and what they have seen so far."""

    def __init__(self, spec: TrainSpec) -> None:
        self.rules = rules_of(spec)
        self.fired: set[str] = set()
        self.seen: dict[str, dict[int, float]] = {r.metric: {} for r in self.rules.values()}
        # Of each rule that compares with the past: window means by the step they end at.
        self.means: dict[str, list[tuple[int, float]]] = {name: [] for name in self.rules}

    def see(self, metrics: Mapping[str, float]) -> list[Finding]:
        """The rules that a step's metrics fulfil for the first time."""
        step = int(metrics["step"])
        for metric, values in self.seen.items():
            value = metrics.get(metric)
            # In a resumed run, metrics.jsonl has null where the earlier process had infinity.
            if value is not None and math.isfinite(value):
                values[step] = value
        found: list[Finding] = []
        for name, rule in self.rules.items():
            said = self._said(name, rule, step)
            if said is not None and name not in self.fired:
                self.fired.add(name)
                found.append(Finding(name, step, f"{name}: {said}"))
        return found

    def _said(self, name: str, rule: WatchRule, step: int) -> str | None:
        """The text of the finding for the window that ends at this step; None: no finding."""
        first = step - rule.window + 1
        values = self._between(rule.metric, first, step)
        if first < 0 or not values or step not in self.seen[rule.metric]:
            return None
        mean = fmean(values)
        where = f"{rule.metric} is {mean:.3g} on average over steps {first} to {step}"
        if rule.unless_above is not None and mean > rule.unless_above:
            return None
        match rule.condition:
            case "above":
                return f"{where}, above {rule.limit:g}" if mean > rule.limit else None
            case "below":
                return f"{where}, below {rule.limit:g}" if mean < rule.limit else None
            case "gains_less":
                middle = first + rule.window // 2
                halves = (
                    self._between(rule.metric, first, middle - 1),
                    self._between(rule.metric, middle, step),
                )
                if not all(halves):
                    return None
                gain = fmean(halves[1]) - fmean(halves[0])
                said = f"{where}, and {gain:+.2g} from its first half to its second"
                return f"{said}: less than {rule.limit:+g}" if gain < rule.limit else None
            case "above_lowest":
                earlier = [m for end, m in self.means[name] if end < first]
                self.means[name].append((step, mean))
                lowest = min(earlier, default=0.0)
                if lowest <= 0 or mean <= rule.limit * lowest:
                    return None
                return (
                    f"{where}, {mean / lowest:.3g} times its lowest before; allowed {rule.limit:g}"
                )

    def _between(self, metric: str, first: int, last: int) -> list[float]:
        return [v for step, v in self.seen[metric].items() if first <= step <= last]


def replayed(
    spec: TrainSpec, history: Iterable[Mapping[str, float]]
) -> tuple[Watch, list[Finding]]:
    """A watch that has seen these steps, and what it found in them."""
    watch = Watch(spec)
    return watch, [finding for metrics in history for finding in watch.see(metrics)]
