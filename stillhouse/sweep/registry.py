"""Write the record of a sweep, and find sweeps, runs and points by name or id.

    <runs>/sweeps/NAME.json        points, suite and baselines: all that showing the state takes
    <runs>/sweeps/NAME.cancelled   when somebody asked a running `run` of it to end
    <runs>/sweeps/NAME.log         output of preparing its pairs and scoring its points

The verbs that show or change the state of a sweep need no configuration, only this record: a sweep
outlives its file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter, ValidationError

from stillhouse.errors import ConfigError, ContractError, nearest
from stillhouse.file_formats import SWEEP, checked
from stillhouse.rundir import (
    FORMAT,
    Json,
    Runs,
    now,
    read_json,
    sweep_leftovers,
    write_json,
)
from stillhouse.spec import NAME, SuiteSpec
from stillhouse.sweep.points import Baseline, Point, Sweep, point_of
from stillhouse.text import number_of

MEND = "run the sweep's file again, once this one is moved away: that writes it anew"


def write(sweep: Sweep) -> None:
    """Write the sweep down as it is asked now, and make its points' names lead to their runs.

    Raises:
        ContractError: a name already means another configuration; nothing was written then.
    """
    runs = Runs(sweep.runs)
    refuse_another_sweep(read_json(runs.sweep_file(sweep.name)), sweep, str(sweep.runs))
    named = {point.name: sweep.run(point.id) for point in sweep.points if point.name}
    for name, run in named.items():
        link = runs.names / name
        if link.is_symlink() and link.readlink().name != run.path.name:
            runs.link_name(name, run)  # says what it means already
    write_record(sweep.runs, record_of(sweep))
    sweep_leftovers(runs.names)
    for name, run in named.items():
        runs.link_name(name, run)


def refuse_another_sweep(before: Json | None, sweep: Sweep, where: str) -> None:
    """Let no file take over the name of a sweep that another file asked for.

    A file may change as it likes, and may be moved if what it asks stays in part; `before`: the
    record of that name `where` this sweep is to be written.

    Raises:
        ContractError: the name means another sweep.
    """
    if before is None or sweep.file is None or not before.get("path"):
        return
    checked(before, SWEEP, Path(where) / sweep.name, MEND)
    was, is_ = Path(before["path"]), Path(sweep.file).resolve()
    if was == is_:
        return
    shared = {point["id"] for point in before["points"]} & {point.id for point in sweep.points}
    if was.is_file() or not shared:
        asks = before.get("question") or number_of(len(before["points"]), "point")
        raise ContractError(
            f'"{sweep.name}" already means the sweep of {was} in {where} ({asks}), and this is'
            f" {is_}: give one of the files another name"
        )


def write_record(runs: Path, record: Json) -> None:
    """Keep a sweep's record where the verbs of this machine find it."""
    file = Runs(runs).sweep_file(record["name"])
    sweep_leftovers(file.parent)
    write_json(file, record)


def record_of(sweep: Sweep) -> Json:
    """The sweep as it is asked now, in plain words that outlive its file."""
    suite = TypeAdapter(SuiteSpec).dump_python(sweep.suite, mode="json") if sweep.suite else None
    compare = sweep.compare
    return {
        "format": FORMAT,
        "name": sweep.name,
        "file": sweep.file,
        "path": sweep.file and str(Path(sweep.file).resolve()),
        "words": list(sweep.words),
        "question": sweep.question,
        "compare": compare
        and {"by": compare.by, "metric": compare.metric, "baseline": compare.baseline},
        "axes": {leaf: list(values) for leaf, values in sweep.axes.items()},
        "suite": suite,
        "pack": sweep.pack,
        "points": [
            {
                "id": point.id,
                "slug": point.slug,
                "name": point.name,
                "tags": list(point.tags),
                "overrides": point.overrides,
            }
            for point in sweep.points
        ],
        "baselines": [
            {
                "label": row.label,
                "pair_name": row.pair_name,
                "quant_type": row.quant_type,
                "directory": row.directory.name,
            }
            for row in sweep.baselines
        ],
        "cache_dir": sweep.points[0].spec.place.cache_dir,
        "commits": {**sweep.commits},
        "created": now(),
    }


def names(runs: Path) -> list[str]:
    """The sweeps that were ever started here."""
    return sorted(file.stem for file in Runs(runs).sweep_file("x").parent.glob("*.json"))


def read(runs: Path, name: str) -> Sweep | None:
    """A sweep that was started here, as it was last asked; None where there is none of that name
    (a word that is no name names none).

    Raises:
        ContractError: its file was written by another version.
    """
    if re.fullmatch(NAME, name) is None:
        return None
    file = Runs(runs).sweep_file(name)
    record = read_json(file)
    return None if record is None else of_record(record, runs, str(file))


def recorded_commits(runs: Path, name: str) -> dict[str, str]:
    """What open revisions meant when the sweep of this name first ran here; {} where it did not."""
    file = Runs(runs).sweep_file(name)
    record = read_json(file)
    return {} if record is None else checked(record, SWEEP, file, MEND).get("commits") or {}


def of_record(record: Json, runs: Path, where: str) -> Sweep:
    """The sweep that a record describes; `where` it was read, for an error.

    Raises:
        ContractError: it was written by another version, or is no record of a sweep.
    """
    if record.get("format") != FORMAT:
        raise ContractError(
            f"{where}: written in format {record.get('format')}, this version reads format"
            f" {FORMAT}; use another --runs directory, or the version that wrote it"
        )
    checked(record, SWEEP, Path(where), MEND)
    told: list[Json] = record["points"]
    points = (Point(p["id"], p["slug"], p["name"], p["overrides"]) for p in told)
    try:
        suite = record["suite"] and TypeAdapter(SuiteSpec).validate_python(record["suite"])
    except ValidationError as error:
        why = error.errors(include_url=False)[0]
        at = ".".join(map(str, why["loc"]))
        raise ContractError(f"{where}: suite.{at}: {why['msg'].lower()}; {MEND}") from error
    beside = ((runs / "baselines" / b["directory"], b["label"]) for b in record["baselines"])
    cache_dir = record.get("cache_dir")
    return Sweep(
        name=record["name"],
        runs=runs,
        points=tuple(points),
        suite=cast("SuiteSpec | None", suite),
        baselines=tuple(Baseline(directory, label) for directory, label in beside),
        cache_dir=Path(cache_dir) if cache_dir else None,
        commits=record.get("commits") or {},
    )


def find(word: str, runs: Path) -> Sweep:
    """What `word` means: a sweep's name, a run's NAME, or an id's first digits.

    Raises:
        ConfigError: it means nothing here, or more than one run.
    """
    sweep = read(runs, word)
    if sweep is not None:
        return sweep
    found = Runs(runs).find(word)
    if len(found) > 1:
        ids = ", ".join(sorted(run.id for run in found)[:4])
        raise ConfigError(f'"{word}" means {len(found)} runs ({ids} …); give more digits')
    if not found:
        links = Runs(runs).names
        known = [*names(runs), *([p.name for p in links.iterdir()] if links.is_dir() else [])]
        there = "" if runs == Path("runs") else f" --runs {runs}"
        where = f"below {runs}/" if runs.is_dir() else f"here: there is no directory {runs}"
        raise ConfigError(
            f'no sweep and no run "{word}" {where} (a sweep file ends in .yaml; `stillhouse'
            f" status{there}` lists the sweeps; a cluster's: --backend cluster)."
            f"{nearest(word, known)}"
        )
    return alone(point_of(found[0].path.name), runs, _readable(runs))


def _readable(runs: Path) -> Iterator[Sweep]:
    for name in names(runs):
        with contextlib.suppress(ContractError):  # `status` names it; a run is not its business
            if sweep := read(runs, name):
                yield sweep


def alone(point: Point, runs: Path, sweeps: Iterable[Sweep]) -> Sweep:
    """One point of the first sweep that has it, whose suite makes it done; else it by itself."""
    for sweep in sweeps:
        if point.id in sweep.by_id:
            return sweep.only({point.id})
    return Sweep(point.directory, runs, (point,), is_whole=False)


def narrowed(sweep: Sweep, words: Sequence[str]) -> Sweep:
    """The points that `--point` names, by name or by an id's first digits; all of them without one.

    Raises:
        ConfigError: a word that means no point of the sweep, or more than one.
    """
    if not words:
        return sweep
    chosen: set[str] = set()
    for word in words:
        found = [point for point in sweep.points if point.name == word] or [
            p for p in sweep.points if p.id.startswith(word) or p.directory == word
        ]
        if len(found) != 1:
            known = [point.name or point.id for point in sweep.points]
            reason = "no point" if not found else f"{len(found)} points"
            more = f" and {len(known) - 6} more" if len(known) > 6 else ""
            raise ConfigError(
                f"--point {word}: {reason} of {sweep.name} with this name or id."
                f"{nearest(word, known)} There is {', '.join(known[:6])}{more}"
            )
        chosen.add(found[0].id)
    return sweep.only(chosen)


def log_file(runs: Path, name: str) -> Path:
    """What preparing and scoring printed."""
    return Runs(runs).sweep_log(name)


def cancel(runs: Path, name: str) -> None:
    """Ask every `run` of this sweep that is under way now to end; later ones do not mind."""
    write_json(Runs(runs).cancel_file(name), {"asked": now()})


def cancel_mark(runs: Path, name: str) -> float | None:
    """What changes whenever somebody asks that; its value is by the clock of whoever asked."""
    file = Runs(runs).cancel_file(name)
    mark = read_json(file)
    if mark is not None and not isinstance(mark.get("asked"), int | float):
        raise ContractError(f"{file}: says no time; remove it, and run again")
    return None if mark is None else float(mark["asked"])
