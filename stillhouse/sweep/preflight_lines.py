"""Report the preflight verdict of each pair in a plan, and the command for pairs without one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse import preflight_rules
from stillhouse.compose import data_file
from stillhouse.rundir import Json, Runs, read_json
from stillhouse.sources import differences, rests_on, sources_of
from stillhouse.sweep.commits import placed
from stillhouse.sweep.points import Point, Sweep

SHOWN = 6  # pairs (each with a loss and a number of steps) that a plan names


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
    spec, drifted = point.spec, list[str]()
    found = read_json(Runs(runs).verdict_file(spec.pair.pair_name, preflight_rules.key_of(spec)))
    if found is not None and "sources" in found:
        spec = placed(spec, sweep)
        key = rests_on(spec)
        if key not in here:
            here[key] = sources_of(spec, Path(spec.place.cache_dir))
        drifted = differences(found["sources"], here[key])
    if drifted:
        found = None
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
        "verdict": found and found["verdict"],
        "reason": found and found["reasons"][0],
        "drifted": drifted,
        "command": shlex.join(["stillhouse", "preflight", *words, *where]),
    }


def verdict_lines(found: Sequence[Json]) -> list[str]:
    """The same for a screen: what is known, then how to get what is not."""
    known = [one for one in found if one["verdict"]]
    asked = [f"  {one['verdict']:<8} {_named(one)}: {one['reason']}" for one in known[:SHOWN]]
    if len(known) > SHOWN:
        asked.append(f"  and {len(known) - SHOWN} more; --json has each")
    for one in [one for one in found if one["drifted"]][:SHOWN]:
        asked.append(f"  drifted  {_named(one)}: {'; '.join(one['drifted'])}; ask again")
    others = [one for one in found if not one["verdict"]]
    if others:
        more = f" and of {len(others) - 1} more" if len(others) > 1 else ""
        asked.append(f"  not asked of {_named(others[0])}{more}: {others[0]['command']}")
    return ["will these pairs distil (preflight)?", *asked]


def _named(one: Json) -> str:
    how = f"{one['loss']}, beta {one['beta']:g}, {one['max_steps']} steps"
    how += f" of {one['max_new_tokens']} tokens"
    return f"{one['pair']} in {one['quant']} ({how})"
