"""Format the state of a sweep as text or JSON, for the verbs plan, run and status.

The text is plain strings that need no terminal: the same words go to a screen, a log and a test.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse import preflight_rules
from stillhouse.compose import data_file
from stillhouse.errors import MISTAKE, ContractError
from stillhouse.methods import drawn
from stillhouse.rundir import Json, Runs
from stillhouse.sources import differences, rests_on, sources_of
from stillhouse.sweep import cost
from stillhouse.sweep.commits import placed
from stillhouse.sweep.points import Baseline, Point, Sweep
from stillhouse.sweep.state import FAILED, STATES, Observation
from stillhouse.sweep.sweep_file import text
from stillhouse.text import duration, number_of, shell_line

SHOWN = 20  # points, or values of an axis, that a list names before it only counts them
TAIL_LINES = 10  # of each log, where several are shown
MANY = 12  # points above which a status says them by axis, too
FEW = 6  # values of one axis in a status: all of it stays on one screen
NAMED = 3  # points that a reason names
DRAWN = 30  # methods that a plan draws before it only counts them


@dataclass(frozen=True)
class Phrases:
    """What a person reads about the place where points run."""

    there: str
    left: str  # the message of a `run` that leaves before the end
    again: str  # the command that starts waiting points, as the beginning of a sentence


PHRASES = {
    "local": Phrases(
        there="here",
        left="stopped before the end; the same command goes on from here",
        again="`stillhouse run`",
    ),
    "cluster": Phrases(
        there="on this cluster",
        left="detached: running Jobs continue, no new ones are submitted; the same command resumes"
        " here, and with --detach nobody needs to watch",
        again="`stillhouse run`, or the same line of k8s/train.sh or k8s/eval.sh,",
    ),
}


def counted(states: Mapping[str, int]) -> str:
    """`5 done, 2 running`, in one fixed order and without the zeros."""
    order = [STATES[0], "trained", *STATES[1:]]
    return ", ".join(f"{states[state]} {state}" for state in order if states.get(state))


def as_json(sweep: Sweep, observations: Mapping[str, Observation]) -> Json:
    """The one object that `--json` prints."""
    totals = Counter(observations[point.id].state for point in sweep.points)
    return {
        "sweep": sweep.name,
        "totals": {state: totals[state] for state in STATES},
        "points": [
            {
                "id": point.id,
                "name": point.name,
                "overrides": point.overrides,
                "state": observations[point.id].state,
                "cause": observations[point.id].cause,
                "warnings": [*observations[point.id].warnings],
            }
            for point in sweep.points
        ],
    }


def methods(points: Sequence[Point]) -> list[Json]:
    """How points train, as lines of text: each distinct one, and how many points do so."""
    alike: dict[Any, list[Point]] = {}
    for point in points:  # drawing is what takes time: of 10,000 points few differ in these
        loss = point.spec.loss
        losses = (loss.on_loss, loss.off_loss, loss.advantage_clip, loss.position_weights)
        rollout = (point.spec.rollout.horizon, point.spec.rollout.max_new_tokens)
        key = (point.spec.method, losses, rollout, point.spec.training.max_steps)
        alike.setdefault(key, []).append(point)
    counts: Counter[tuple[str, str]] = Counter()
    for same in alike.values():
        counts[same[0].spec.method.method_name, drawn(same[0].spec)] += len(same)
    return [{"method": m, "drawn": line, "points": n} for (m, line), n in counts.items()]


def method_lines(points: Sequence[Point]) -> list[str]:
    """The same for a screen, where they are few."""
    found = methods(points)
    if len(found) > DRAWN:
        return [f"  {len(found)} ways to train; --json draws each"]
    width = max((len(one["method"]) for one in found), default=0)
    lines = [f"  {one['method']:<{width}}  {one['drawn']}" for one in found]
    return ["share of rollouts (λ) over a run, and what is learnt from:", *lines]


def headline(sweep: Sweep, observations: Mapping[str, Observation]) -> str:
    """`quickstart: 9 points: 5 done, 4 new`."""
    states = Counter(observations[point.id].state for point in sweep.points)
    count = len(sweep.points)
    return f"{sweep.name}: {number_of(count, 'point')}: {counted(states)}"


def by_axis(
    sweep: Sweep,
    observations: Mapping[str, Observation],
    costs: Mapping[str, cost.Cost],
    limit: int = SHOWN,
) -> list[str]:
    """A table with a line per value of each axis: its points by state, and the time still to go."""
    present = [s for s in STATES if any(observations[r.id].state == s for r in sweep.points)]
    table = [["", "", "points", *present, *(["to go"] if costs else [])]]
    for axis in sweep.points[0].overrides if sweep.points else ():
        values: dict[str, list[Point]] = {}
        for point in sweep.points:
            values.setdefault(text(point.overrides[axis]), []).append(point)
        if len(values) == 1 and len(sweep.points) > 1:
            continue  # one value tells no point from another
        for place, (value, points) in enumerate(itertools.islice(values.items(), limit)):
            states = Counter(observations[point.id].state for point in points)
            line = [axis if place == 0 else "", value, str(len(points))]
            line += [str(states[state] or "") for state in present]
            known = [c.seconds for point in points if (c := costs.get(point.id)) and c.seconds]
            table.append([*line, *([duration(sum(known)) if known else ""] if costs else [])])
        if len(values) > limit:
            table.append(["", f"and {len(values) - limit} more", "", *([""] * len(table[0][3:]))])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  " + "  ".join(_cell(i, cell, widths[i]) for i, cell in enumerate(line)).rstrip()
        for line in table
    ]


def _cell(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def still_to_train(sweep: Sweep, observations: Mapping[str, Observation]) -> list[Point]:
    """The points whose training is still to be paid for."""
    return [point for point in sweep.points if not _is_settled(observations[point.id])]


def estimate(sweep: Sweep, costs: Mapping[str, cost.Cost]) -> list[str]:
    """Time and price of what is to be trained, and what that rests on."""
    if not costs:
        return []
    total = cost.totals(costs, dict.fromkeys(costs, ""))[-1]
    points = f"{number_of(total.runs, 'point')} to train"
    if total.unknown == total.runs:
        lines = [f"{points}: time not known"]
    else:
        slots = min(sweep.site.max_parallel, total.runs)
        lines = [
            f"{points}: about {duration(total.hours * 3600 / slots)} with {slots} at once",
            f"  scoring not counted; {total.device_hours:.2g} device-hours, {_price(total)}",
        ]
        if total.unknown:
            lines.append(f"  without {total.unknown} whose time is not known")
    bases = Counter(one.basis for one in costs.values()).most_common(4)
    return lines + [f"  {number_of(count, 'point')}, {basis}" for basis, count in bases]


def _is_settled(seen: Observation) -> bool:
    return seen.is_trained or seen.state in ("done", *FAILED)


def _price(total: cost.Total) -> str:
    if total.usd is None:
        return "price not known (site: price_usd_per_hour)"
    without = f" (without {total.unpriced} that have no price)" if total.unpriced else ""
    return f"${total.usd:.2f}{without}"


def reasons(sweep: Sweep, observations: Mapping[str, Observation]) -> list[str]:
    """What runs, waits or failed, and why: one line for each kind of reason.

    What failed comes last, where a person's eye rests. What is done, or was never begun and has
    nothing to say, is in the headline.
    """
    lines: list[str] = []
    for state in ("running", "waiting", "new", "drifted", "unreadable", "stopped", "failed"):
        kinds: dict[str, list[Point]] = {}
        for point in sweep.points:
            seen = observations[point.id]
            if seen.state == state and (seen.cause or state != "new"):
                kinds.setdefault(fingerprint(seen), []).append(point)
        for points in sorted(kinds.values(), key=len, reverse=True)[:SHOWN]:
            if len(points) <= NAMED and (state == "running" or len(points) == 1):
                lines += [_line(point, observations[point.id]) for point in points]
            else:
                cause = observations[points[0].id].cause
                why = f": {cause}" if cause else ":"
                lines.append(f"  {state:<8} {len(points)}{why} [{_who(points)}]")
        if len(kinds) > SHOWN:
            lines.append(f"  {state:<8} for {len(kinds) - SHOWN} more reasons (--all)")
    return lines + warned(sweep, observations)


def warned(sweep: Sweep, observations: Mapping[str, Observation]) -> list[str]:
    """What watch rules found: a line per rule, in the words of the first point that it warned of.

    Of points that a rule stopped, that is their cause.
    """
    kinds: dict[str, list[tuple[Point, str]]] = {}
    for point in sweep.points:
        if observations[point.id].state != "stopped":
            for text in observations[point.id].warnings:
                kinds.setdefault(text.partition(":")[0], []).append((point, text))
    return [
        f"  {'warning':<8} {len(points)}: {points[0][1]} [{_who([point for point, _ in points])}]"
        for points in kinds.values()
    ]


def every(sweep: Sweep, observations: Mapping[str, Observation]) -> list[str]:
    """A line for each point."""
    return [_line(point, observations[point.id]) for point in sweep.points]


def _line(point: Point, seen: Observation) -> str:
    steps = f", step {seen.step}" + (f"/{seen.max_steps}" if seen.max_steps else "")
    at = steps if seen.step and not seen.is_trained else ""
    cause = f": {seen.cause}" if seen.cause else ""
    return f"  {seen.state:<8} {point}{at}{cause}"


def failures(sweep: Sweep, observations: Mapping[str, Observation]) -> list[str]:
    """What failed and why: one line for each kind of cause."""
    kinds: dict[str, list[Point]] = {}
    for point in sweep.points:
        if observations[point.id].state in (*FAILED, "unreadable"):
            kinds.setdefault(fingerprint(observations[point.id]), []).append(point)
    return [_kind(points, observations) for points in sorted(kinds.values(), key=len, reverse=True)]


def ways_on(failed: Sequence[Observation], logs: str, retry: str) -> str:
    """What to do about points that failed; `logs` and `retry`: the commands."""
    has_mistake = any(seen.exit_code == MISTAKE for seen in failed)
    first = f"mend what ended with {MISTAKE}, or it ends so again; " if has_mistake else ""
    return f"`{logs}` shows what a point printed; {first}`{retry}`, then run, tries again"


def drifted(sweep: Sweep, observations: Mapping[str, Observation]) -> list[str]:
    """What rests on something that is another now, and on what: one line for each kind."""
    kinds: dict[tuple[str, ...], list[Point]] = {}
    for point in sweep.points:
        if observations[point.id].rests_on_other:
            kinds.setdefault(observations[point.id].rests_on_other, []).append(point)
    return [
        f"{observations[points[0].id].state} {len(points)}: {'; '.join(why)} [{_who(points)}]"
        for why, points in sorted(kinds.items(), key=lambda kind: len(kind[1]), reverse=True)
    ]


def drifted_baselines(baselines: Sequence[Baseline]) -> list[str]:
    """Which baselines have scores that are no longer valid, and why."""
    return [
        f"baseline {one.directory.name}: {'; '.join(one.rests_on_other)}; to be scored anew"
        for one in baselines
        if one.rests_on_other
    ]


def unreachable(why: str) -> list[str]:
    """What a plan says of a cluster that could not be asked."""
    return [
        f"no cluster could be asked: {why}",
        "  states are those of what was collected; all else counts as new",
    ]


def _kind(points: Sequence[Point], observations: Mapping[str, Observation]) -> str:
    first = observations[points[0].id]
    cause = first.cause or f"exit code {first.exit_code}"
    return f"{first.state} {len(points)}: {cause} [{_who(points)}]"


def _who(points: Sequence[Point]) -> str:
    return ", ".join(map(str, points[:NAMED])) + (" …" if len(points) > NAMED else "")


def fingerprint(seen: Observation) -> str:
    """What failures of one kind have in common: the cause without numbers, ids and paths."""
    words = (
        "…" if "/" in word or any(c.isdigit() for c in word) else word
        for word in (seen.cause or "").split()
    )
    return " ".join([str(seen.exit_code), *(word for word, _ in itertools.groupby(words))])


# ------------------------------------------------------------------------- verdicts of preflights


PAIRS = 6  # pairs (each with a loss and a number of steps) that a plan names


def verdicts(sweep: Sweep, runs: Path) -> list[Json]:
    """Each pair of a sweep, with its loss and steps, and its verdict; None: not asked, or asked of
    other weights or rows than are here now (`drifted`)."""
    rules = preflight_rules.rules_of(data_file("preflight"), "conf/preflight.yaml")
    alike: dict[Any, Point] = {}
    for point in sweep.points:  # a key takes long to make, and of 10,000 points few differ in it
        alike.setdefault(preflight_rules.asked_of(point.spec), point)
    here: dict[Any, Json] = {}
    return [_one(point, sweep, runs, rules, here) for point in alike.values()]


def _one(
    point: Point, sweep: Sweep, runs: Path, rules: preflight_rules.Rules, here: dict[Any, Json]
) -> Json:
    """`here`: what was looked at already, by what decides it."""
    spec, drifted, unreadable = point.spec, list[str](), None
    try:
        found = Runs(runs).verdict(spec.pair.pair_name, preflight_rules.key_of(spec))
    except ContractError as error:
        found, unreadable = None, str(error)
    if found is not None and "sources" in found:
        spec = placed(spec, sweep)
        key = rests_on(spec)
        if key not in here:
            here[key] = sources_of(spec, Path(spec.place.cache_dir))
        drifted = differences(found["sources"], here[key])
    if drifted:
        found = None
    error = found and found["facts"].get("quantization_error")
    if found is not None:  # by the rules of now, whatever they were when it was asked
        asked = preflight_rules.asked_numbers(spec.loss.beta, spec.training.max_steps)
        found = preflight_rules.decide(rules, preflight_rules.numbers_of(found) | asked)
    words = [w for w in point.words if not w.startswith(("seed=", "name=", "tags="))]
    where = [] if runs == Path("runs") else ["--runs", str(runs)]
    return {
        "pair": spec.pair.pair_name,
        "quant": spec.quant.quant_type,
        "loss": spec.loss.on_loss,
        "beta": spec.loss.beta,
        "max_steps": spec.training.max_steps,
        "max_new_tokens": spec.rollout.max_new_tokens,
        "quant_group_size": spec.quant.quant_group_size,
        "quantization_error": error,
        "verdict": found and found["verdict"],
        "reason": found["reasons"][0] if found else unreadable,
        "drifted": drifted,
        "command": shell_line(["stillhouse", "preflight", *words, *where]),
    }


def verdict_lines(found: Sequence[Json]) -> list[str]:
    """The same for a screen: what is known, then how to get what is not."""
    known = [one for one in found if one["verdict"]]
    lines = [f"  {one['verdict']:<8} {_named(one)}: {one['reason']}" for one in known[:PAIRS]]
    if len(known) > PAIRS:
        lines.append(f"  and {len(known) - PAIRS} more; --json has each")
    for one in [one for one in found if one["drifted"]][:PAIRS]:
        lines.append(f"  drifted  {_named(one)}: {'; '.join(one['drifted'])}; ask again")
    lines += [f"  unreadable {one['reason']}" for one in found if _is_unreadable(one)][:PAIRS]
    others = [one for one in found if not one["verdict"] and not _is_unreadable(one)]
    if others:
        more = f" and of {len(others) - 1} more" if len(others) > 1 else ""
        lines.append(f"  not asked of {_named(others[0])}{more}: {others[0]['command']}")
    return ["will these pairs distil (preflight)?", *lines]


def _is_unreadable(one: Json) -> bool:
    return one["verdict"] is None and one["reason"] is not None


def _named(one: Json) -> str:
    how = f"{one['loss']}, beta {one['beta']:g}, {number_of(one['max_steps'], 'step')}"
    how += f" of {number_of(one['max_new_tokens'], 'token')}"
    group = f" in groups of {one['quant_group_size']}" if one["quant_group_size"] else ""
    error = one["quantization_error"]
    changed = "" if error is None else f", weights changed by {error:.1%}"
    stored = "" if one["quant"] == "none" else f" in {one['quant']}"
    return f"{one['pair']}{stored}{group}{changed} ({how})"
