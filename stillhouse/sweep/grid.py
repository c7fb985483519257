"""Expand a sweep into a list of points, and check each of them.

    base < rules < grid, points < command line       who overrides whom; seeds multiply everything

A word of the command line with several values (`lmbda=0,1`) means the union of the sweeps that its
single values give: it replaces an axis of the file, and multiplies explicit points. A rule sets
further values for the points that have certain values, or leaves those points out. Every point is
composed and checked here, before anything starts: 10,000 in seconds (see `compose`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from stillhouse import packaged_prompts, scores
from stillhouse.compose import Overrides, as_command_line, compose, resolve, vocabulary
from stillhouse.errors import ConfigError, nearest
from stillhouse.identity import NOT_VERSIONED, digest, point_id, slug, suite_content
from stillhouse.spec import NAME, EvalSpec, SuiteSpec, TrainSpec
from stillhouse.sweep import sweep_file
from stillhouse.sweep.points import Point, Sweep, baselines_of, grouped
from stillhouse.sweep.sweep_file import (
    OF_SUITE,
    OWN,
    SEED,
    Axes,
    Compare,
    Knobs,
    SweepRequest,
    label,
    short,
    text,
)
from stillhouse.text import shell_line

MAX_POINTS = (
    100_000  # ten times the largest grid that is planned for; more is a slip of the keyboard
)
SHOWN = 60  # characters of a name that cannot be one


def load_sweep(target: str | None, words: list[str], runs: Path, site: str = "local") -> Sweep:
    """The sweep that a file (or none) and the words of a command line describe.

    `site`: the file of conf/site that counts where nobody names one.

    Raises:
        ConfigError: anything that cannot be right, in one or two lines that name the place.
    """
    if target is None and not words:
        raise ConfigError(
            "nothing is asked; give a sweep file, or a grid: pair=tiny lmbda=0,0.5,1 seeds=3"
        )
    request = sweep_file.read(target, words)
    if site != "local":
        request = dataclasses.replace(request, base={"site": site, **request.base})
    points = _points(request, runs)
    axes = {
        # By their spelling: a template's variables have no hash.
        name: tuple({repr(p.overrides[name]): p.overrides[name] for p in points}.values())
        for name in points[0].overrides
        if name != "seed"
    }
    suite = _suite(request, points[0].spec)
    if suite is not None:
        scores.check_rows(suite, request.where)
        for data in {point.spec.data for point in points}:
            packaged_prompts.check_apart(vars(data), suite, request.where)
    name = _name(points, axes, suite) if target is None else Path(target).stem
    _checked_name(name, "the grid's name" if target is None else f"{target}: the file's name")
    block = request.eval if suite else None
    pack = block.pack if block else 1
    points = grouped(points, pack)
    return Sweep(
        name=name,
        runs=runs,
        points=points,
        suite=suite,
        baselines=baselines_of(points, block.baselines, runs) if block else (),
        cache_dir=Path(points[0].spec.place.cache_dir),
        file=target,
        question=request.question,
        axes=axes,
        pack=pack,
        compare=_compare(request, axes, suite),
        words=tuple(words),
    )


def _points(request: SweepRequest, runs: Path) -> tuple[Point, ...]:
    """All points of a sweep, each checked, no two alike."""
    grid = {**request.grid, **request.typed} if request.grid or not request.points else None
    count = 0 if grid is None else math.prod(map(len, grid.values()))
    count += len(request.points) * math.prod(map(len, request.typed.values()))
    count *= len(request.seeds or [SEED])
    if count > MAX_POINTS:
        raise ConfigError(
            f"{request.where}: {count:,} points; at most {MAX_POINTS:,} are planned at once"
        )
    varying = list(dict.fromkeys(itertools.chain(grid or {}, request.typed, *request.points)))
    by_rules = list(itertools.chain(*(rule.set for rule in request.rules)))
    for key in (*varying, *by_rules, *request.base, *request.single):
        if key in ("place.runs", "place.output_dir"):
            raise ConfigError(
                f"{request.where}: {label(key)} is not for a sweep; use --runs DIR and name"
            )
        if key.split(".")[0] == "site" and key in (*varying, *by_rules):
            raise ConfigError(
                f"{request.where}: {label(key)} is one for all points; put it in site:"
            )
    axes = dict.fromkeys((*varying, *by_rules))
    axes = [key for key in axes if key not in ("place.name", "place.tags", SEED)]
    ruled = (_by_rules(request, own) for own in _own_knobs(request, grid))
    points = tuple(_point(request, own, axes, runs) for own in ruled if own is not None)
    if not points:
        raise ConfigError(f"{request.where}: its rules leave no point of what is asked")
    _refuse_twins(points, request.where)
    said_by_rules = [label(key) for key in axes if key not in varying]
    return _without_constants(points, said_by_rules) if said_by_rules else points


def _without_constants(points: tuple[Point, ...], names: Sequence[str]) -> tuple[Point, ...]:
    """The points, without those overrides of `names` that are the same in all of them."""
    first = points[0].overrides
    same = {n for n in names if all(point.overrides[n] == first[n] for point in points)}
    told = [{k: v for k, v in p.overrides.items() if k not in same} for p in points]
    pairs = zip(points, told, strict=True)
    return tuple(dataclasses.replace(point, overrides=overrides) for point, overrides in pairs)


def _own_knobs(request: SweepRequest, grid: Axes | None) -> Iterator[Knobs]:
    """What each point sets beyond base: the grid, then explicit points; seeds vary fastest."""
    explicit = itertools.product(request.points, _product(request.typed))
    chosen = [{**point, **typed} for point, typed in explicit]
    for knobs in itertools.chain(() if grid is None else _product(grid), chosen):
        if request.seeds is None:
            yield knobs
        else:
            yield from ({**knobs, SEED: seed} for seed in request.seeds)


def _by_rules(request: SweepRequest, own: Knobs) -> Knobs | None:
    """What a point sets, over what rules add for it; None where one leaves it out."""
    said = {**request.base, **own, **request.single}
    holding = [
        rule
        for rule in request.rules
        if all(key in said and said[key] == value for key, value in rule.where.items())
    ]
    if any(rule.skip for rule in holding):
        return None
    return {**dict(itertools.chain(*(rule.set.items() for rule in holding))), **own}


def _product(axes: Axes) -> Iterator[Knobs]:
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def _point(request: SweepRequest, own: Knobs, axes: Sequence[str], runs: Path) -> Point:
    knobs = {**request.base, **own, **request.single}
    knobs["place.runs"] = str(runs)
    knobs["place.tags"] = _tags(request, own)
    knobs["place.name"] = name = _point_name(request, knobs)
    groups = {key: value for key, value in knobs.items() if "." not in key}
    overrides = Overrides(groups, {key: value for key, value in knobs.items() if "." in key})
    try:
        for group, option in groups.items():
            if not isinstance(option, str):
                resolve(group, option, TrainSpec, request.where)
        spec = compose(overrides, TrainSpec, request.where)
    except ConfigError as error:
        # Composed with one `where` for all points, which lets Hydra's part be remembered.
        what = str(error).removeprefix(f"{request.where}: ")
        raise ConfigError(f"{request.where}: point {_describe(own, name)}: {what}") from error
    values = {label(key): _value(spec, key, groups) for key in axes}
    values["seed"] = spec.training.seed
    words = as_command_line(Overrides(_elsewhere(groups), _elsewhere(overrides.values)))
    return Point(
        point_id(spec), slug(spec), name, values, spec.place.tags, tuple(words), resolved=spec
    )


def _elsewhere(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides that mean the same on any machine, without empty names and tags."""
    return {
        key: value
        for key, value in knobs.items()
        if key.partition(".")[0] != "site"
        and key not in ("place.runs", "place.cache_dir")
        and (key, value) not in (("place.name", None), ("place.tags", []))
    }


def _tags(request: SweepRequest, own: Knobs) -> list[str]:
    """The tags of the sweep, of the point and of the command line, each once."""
    found: list[str] = []
    for knobs in (request.base, own, request.single):
        tags: Any = knobs.get("place.tags", [])
        if not isinstance(tags, list):
            raise ConfigError(
                f"{request.where}: tags is not a list. Did you mean tags: [{text(tags)}]?"
            )
        odd = [tag for tag in cast("list[Any]", tags) if not isinstance(tag, str)]
        if odd:
            raise ConfigError(f"{request.where}: tags: {short(odd[0])} is not text; quote it")
        found += cast("list[str]", tags)
    return list(dict.fromkeys(found))


def _point_name(request: SweepRequest, knobs: Knobs) -> str | None:
    """The name somebody gave, told apart where words or seeds make several points of it."""
    if knobs.get("place.name") is None:
        return None
    parts = [str(knobs["place.name"])]
    parts += [f"{label(key)}{text(knobs[key])}" for key in request.typed]
    parts += [f"s{knobs[SEED]}"] if request.seeds and len(request.seeds) > 1 else []
    name = "-".join(parts)
    return _checked_name(name, f"{request.where}: name")


def _checked_name(name: str, what: str) -> str:
    """A name of a point or of a sweep: it becomes a file, a label, and part of commands."""
    if re.fullmatch(NAME, name) is None:
        shown = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
        raise ConfigError(
            f"{what} {shown!r}: a name is of letters, digits, dot, dash and underscore, begins with"
            " a letter or digit, and has at most 200 of them"
        )
    return name


def _value(spec: TrainSpec, key: str, groups: Mapping[str, str]) -> Any:
    """The checked value of a knob; of a group, the option that the point got."""
    section, _, leaf = key.partition(".")
    if leaf:
        return getattr(getattr(spec, section), leaf)
    name_leaf = "quant_type" if key == "quant" else f"{key}_name"
    return groups.get(key) or getattr(getattr(spec, section), name_leaf, "default")


def _refuse_twins(points: Sequence[Point], where: str) -> None:
    by_id: dict[str, Point] = {}
    by_name: dict[str, Point] = {}
    for point in points:
        twin = by_id.setdefault(point.id, point)
        if twin is not point:
            differ = [key for key, value in point.overrides.items() if twin.overrides[key] != value]
            idle = [key for key in differ if _is_unversioned(key)]
            why = f" ({', '.join(idle)} does not change what is trained)" if idle else ""
            both = [_describe(p.overrides, p.name) for p in (twin, point)]
            raise ConfigError(
                f"{where}: two points are the same one: {both[0]}; {both[1]}{why}. Remove one"
            )
        if point.name and by_name.setdefault(point.name, point) is not point:
            raise ConfigError(f'{where}: two points are named "{point.name}"; a name means one')


def _is_unversioned(name: str) -> bool:
    path = vocabulary(TrainSpec).find(name, "")[0]
    return path in NOT_VERSIONED or path.partition(".")[0] in NOT_VERSIONED


def _describe(knobs: Mapping[str, Any], name: str | None) -> str:
    """A point in words that can be pasted: lmbda=0 beta=1 seed=3."""
    values = {k: v for k, v in knobs.items() if k not in ("place.name", "place.tags")}
    words = shell_line(as_command_line(Overrides({}, values)))
    return f'"{name}" ({words})' if name else words or "(base)"


def _suite(request: SweepRequest, spec: TrainSpec) -> SuiteSpec | None:
    block = request.eval
    if block is None or (block.suite is None and not request.picks_suite):
        return None
    groups = {} if block.suite in (None, OWN) else {"suite": block.suite}
    if not groups and spec.pair.pair_source == "generated":
        groups = {"suite": "tiny"}  # the one that asks about the generated problems
    elif not groups and spec.data.data_source == "gsm8k":
        groups = {"suite": "gsm8k"}
    said = {leaf: getattr(block, leaf) for leaf in OF_SUITE}
    values = {f"suite.{leaf}": value for leaf, value in said.items() if value is not None}
    return compose(Overrides(groups, values), EvalSpec, f"{request.where}: eval").suite


def _compare(
    request: SweepRequest, axes: Mapping[str, tuple[Any, ...]], suite: SuiteSpec | None
) -> Compare | None:
    """The comparison, with its axis and baseline as the points have them.

    None where the command line took away what it needs: a narrowed axis, another suite.
    """
    compare, where = request.compare, f"{request.where}: compare"
    if compare is None:
        return None
    by = label(vocabulary(TrainSpec).find(compare.by, f"{where}.by")[0])
    if by not in axes:
        raise ConfigError(f"{where}.by = {by}: not an axis of this sweep ({', '.join(axes)})")
    metrics = _metrics(suite) if suite else []
    alone = [name for name in metrics if name.partition("/")[2] == compare.metric]
    metric = alone[0] if len(alone) == 1 else compare.metric
    if {"suite", "include_path", "tasks"} & request.words and metric not in metrics:
        return None
    if suite is None:
        raise ConfigError(
            f"{where}: nothing is scored, so nothing can be compared; add eval: {{suite}}"
        )
    if metric not in metrics:
        raise ConfigError(
            f"{where}.metric = {compare.metric}: suite {suite.suite_name} has {', '.join(metrics)}."
            f"{nearest(compare.metric, metrics)}"
        )
    baseline: Any = compare.baseline
    if isinstance(baseline, list):
        knots = cast("list[Any]", baseline)
        baseline = tuple(tuple(cast("list[float]", k)) if isinstance(k, list) else k for k in knots)
    if baseline not in axes[by]:
        if by in request.words:
            return None
        values = ", ".join(map(text, axes[by]))
        raise ConfigError(f"{where}.baseline = {text(baseline)}: not a value of {by} ({values})")
    return Compare(by, metric, axes[by][axes[by].index(baseline)])


def _metrics(suite: SuiteSpec) -> list[str]:
    return [f"{task.task}/{task.metric}" for task in suite.tasks]


def _name(
    points: Sequence[Point], axes: Mapping[str, tuple[Any, ...]], suite: SuiteSpec | None
) -> str:
    """A readable name that follows from the content of a typed grid: tiny-lmbda-beta-3f9a0c."""
    pairs = {point.spec.pair.pair_name for point in points}
    words = [*(pairs if len(pairs) == 1 else ()), *axes]
    scored = None if suite is None else suite_content(suite)
    content = digest([sorted(point.id for point in points), scored])
    return f"{'-'.join(words)[:60]}-{content[:6]}"
