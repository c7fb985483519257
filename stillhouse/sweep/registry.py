"""Write the record of a sweep, and find sweeps, runs and points by name or id.

    <runs>/sweeps/NAME.json        points, suite and baselines: all that showing the state takes
    <runs>/sweeps/NAME.cancelled   when somebody asked a running `run` of it to end
    <runs>/sweeps/NAME.log         output of preparing its pairs and scoring its points

The verbs that show or change the state of a sweep need no configuration, only this record: a sweep
outlives its file.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from stillhouse.errors import ConfigError, ContractError, nearest
from stillhouse.file_formats import SWEEP, checked
from stillhouse.identity import baseline_key, chat_settings, to_plain
from stillhouse.rundir import (
    FORMAT,
    Json,
    RunDir,
    Runs,
    directory_name,
    now,
    read_json,
    sweep_leftovers,
    write_json,
)
from stillhouse.spec import NAME, PairSpec, QuantSpec, SuiteSpec
from stillhouse.sweep.dependencies import Beneath
from stillhouse.sweep.grid import Point, Sweep
from stillhouse.sweep.sweep_file import text

MEND = "run the sweep's file again, once this one is moved away: that writes it anew"


@dataclass(frozen=True)
class Row:
    """A point without its spec: only what names it and finds its run directory."""

    id: str
    slug: str
    name: str | None
    overrides: dict[str, Any]

    @property
    def directory(self) -> str:
        return directory_name(self.slug, self.id)

    def __str__(self) -> str:
        """Its name, or the values that it sets, and the id's first digits."""
        words = self.name or " ".join(f"{k}={text(v)}" for k, v in self.overrides.items())
        return f"{words or self.slug} ({self.id[:6]})"


@dataclass(frozen=True)
class Roster:
    """A sweep without specs: its points, their directories, and the suite that makes one done."""

    name: str
    runs: Path
    rows: tuple[Row, ...]
    suite: SuiteSpec | None
    baselines: tuple[Path, ...]  # directories of the rows that no run trained
    # The cache with the models and data of its points, and the commits of open revisions; None: not
    # known.
    cache_dir: Path | None = None
    commits: Mapping[str, str] = field(default_factory=dict[str, str])

    def beneath(self) -> Beneath:
        """What its points depend on now, for one look."""
        return Beneath(self.cache_dir, self.commits)

    @functools.cached_property
    def by_id(self) -> dict[str, Row]:
        return {row.id: row for row in self.rows}

    def run(self, id_: str) -> RunDir:
        return RunDir(self.runs / self.by_id[id_].directory)


@dataclass(frozen=True)
class BaselineRow:
    """A row that no run trains: teacher, student or ptq, of one pair and quantizer."""

    directory: Path
    label: str
    pair_name: str
    quant_type: str | None  # of ptq only: the others do not depend on it
    points: tuple[str, ...]  # ids of the points beside which it stands


def roster_of(sweep: Sweep) -> Roster:
    """The points of a sweep that was just read."""
    rows = (Row(p.id, p.slug, p.name, p.overrides) for p in sweep.points)
    baselines = tuple(row.directory for row in baseline_rows(sweep))
    place = sweep.points[0].spec.place
    return Roster(
        sweep.name, sweep.runs, tuple(rows), sweep.suite, baselines, Path(place.cache_dir),
        sweep.commits,
    )  # fmt: skip


def write(sweep: Sweep) -> None:
    """Write the sweep down as it is asked now, and make its points' names lead to their runs.

    Raises:
        ContractError: a name already means another configuration; nothing was written then.
    """
    runs, roster = Runs(sweep.runs), roster_of(sweep)
    refuse_another_sweep(read_json(runs.sweep_file(sweep.name)), sweep, str(sweep.runs))
    for row in roster.rows:
        link = runs.names / str(row.name)
        if row.name and link.is_symlink() and link.readlink().name != row.directory:
            runs.link_name(row.name, roster.run(row.id))  # says what it means already
    write_record(sweep.runs, record_of(sweep))
    sweep_leftovers(runs.names)
    for row in roster.rows:
        if row.name:
            runs.link_name(row.name, roster.run(row.id))


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
        asks = before.get("question") or f"{len(before['points'])} points"
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
            for row in baseline_rows(sweep)
        ],
        "cache_dir": sweep.points[0].spec.place.cache_dir,
        "commits": {**sweep.commits},
        "created": now(),
    }


def baseline_rows(sweep: Sweep) -> tuple[BaselineRow, ...]:
    """The rows of a sweep's table that no run trains."""
    groups: dict[tuple[PairSpec, QuantSpec, str], list[Point]] = {}
    for point in sweep.points if sweep.suite else ():
        chat = chat_settings(to_plain(point.spec)["data"])
        groups.setdefault((point.spec.pair, point.spec.quant, chat), []).append(point)
    found: dict[Path, BaselineRow] = {}
    for (pair, quant, _), points in groups.items():
        data, ids = points[0].spec.data, [point.id for point in points]
        for label in sweep.baselines:
            is_ptq = label == "ptq"
            if is_ptq and quant.quant_type == "none":
                continue  # it would be the student
            directory = Runs(sweep.runs).baseline(label, baseline_key(label, pair, quant, data))
            before = found[directory].points if directory in found else ()
            found[directory] = BaselineRow(
                directory, label, pair.pair_name, quant.quant_type if is_ptq else None,
                (*before, *ids),
            )  # fmt: skip
    return tuple(found.values())


def names(runs: Path) -> list[str]:
    """The sweeps that were ever started here."""
    return sorted(file.stem for file in Runs(runs).sweep_file("x").parent.glob("*.json"))


def read(runs: Path, name: str) -> Roster | None:
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


def of_record(record: Json, runs: Path, where: str) -> Roster:
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
    rows = (Row(p["id"], p["slug"], p["name"], p["overrides"]) for p in record["points"])
    try:
        suite = record["suite"] and TypeAdapter(SuiteSpec).validate_python(record["suite"])
    except ValidationError as error:
        why = error.errors(include_url=False)[0]
        at = ".".join(map(str, why["loc"]))
        raise ContractError(f"{where}: suite.{at}: {why['msg'].lower()}; {MEND}") from error
    baselines = tuple(runs / "baselines" / b["directory"] for b in record["baselines"])
    cache_dir = record.get("cache_dir")
    return Roster(
        record["name"], runs, tuple(rows), cast("SuiteSpec | None", suite), baselines,
        cache_dir and Path(cache_dir), record.get("commits") or {},
    )  # fmt: skip


def find(word: str, runs: Path) -> Roster:
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
        raise ConfigError(
            f'no sweep and no run "{word}" below {runs}/ (a sweep file ends in .yaml; `stillhouse'
            f" status` lists the sweeps; a cluster's: --backend cluster).{nearest(word, known)}"
        )
    return _with_its_sweep(found[0], runs)


def _with_its_sweep(run: RunDir, runs: Path) -> Roster:
    """One run, with the suite of a sweep it belongs to: what makes it done."""
    for name in names(runs):
        with contextlib.suppress(ContractError):  # `status` names it; this run is not its business
            sweep = read(runs, name)
            if sweep and run.id in sweep.by_id:
                return replace(sweep, rows=(sweep.by_id[run.id],), baselines=())
    slug = run.path.name.rpartition("-")[0]
    return Roster(run.path.name, runs, (Row(run.id, slug, None, {}),), None, ())


def narrowed(roster: Roster, words: Sequence[str]) -> Roster:
    """The points that `--point` names, by name or by an id's first digits; all of them without one.

    Raises:
        ConfigError: a word that means no point of the sweep, or more than one.
    """
    if not words:
        return roster
    chosen: dict[str, Row] = {}
    for word in words:
        found = [row for row in roster.rows if row.name == word] or [
            row for row in roster.rows if row.id.startswith(word) or row.directory == word
        ]
        if len(found) != 1:
            known = [row.name or row.id for row in roster.rows]
            reason = "no point" if not found else f"{len(found)} points"
            raise ConfigError(
                f"--point {word}: {reason} of {roster.name} with this name or id."
                f"{nearest(word, known)} `stillhouse status {roster.name} --all` lists them"
            )
        chosen[found[0].id] = found[0]
    rows = tuple(row for row in roster.rows if row.id in chosen)
    return replace(roster, rows=rows, baselines=())


def log_file(runs: Path, name: str) -> Path:
    """What preparing and scoring printed."""
    return Runs(runs).sweep_log(name)


def cancel(runs: Path, name: str) -> None:
    """Ask every `run` of this sweep that is under way now to end; later ones do not mind."""
    write_json(Runs(runs).cancel_file(name), {"asked": now()})


def cancel_mark(runs: Path, name: str) -> float | None:
    """What changes whenever somebody asks that; its value is by the clock of whoever asked."""
    file = Runs(runs).cancel_file(name)
    asked = read_json(file)
    if asked is not None and not isinstance(asked.get("asked"), int | float):
        raise ContractError(f"{file}: says no time; remove it, and run again")
    return None if asked is None else float(asked["asked"])
