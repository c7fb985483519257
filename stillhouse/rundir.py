"""Define every file name below `runs/`, and provide the only way to read or write these files.

    <runs>/<slug>-<id>/        spec.json status.json metrics.jsonl cost.json log.txt run.lock
                               checkpoints/step-N/  adapter/  eval/<task>.json
                               eval_begun.json  eval_error.json: an evaluation's notes (eval_note)
                               collected.json: it came from a cluster's volume (`collect`)
    <runs>/names/NAME          link to the run of that name
    <runs>/sweeps/NAME.json    a sweep as it was requested
    <runs>/baselines/<slug>-<id>/   baseline.json  eval/  eval_*.json: rows that no run trained
    <runs>/preflight/<pair>-<key>.json   the result of a preflight
    <runs>/reports/NAME/       tables, plots and the page of a sweep
    <runs>/.before/<slug>-<id>.N/   the earlier files of a run that was started over

Every write is atomic (temporary file, fsync, rename), so the files stay valid if a process is
killed at any moment.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

from filelock import FileLock, Timeout

from stillhouse.errors import ContractError
from stillhouse.file_formats import (
    CONTRACT,
    COST,
    EVAL_NOTE,
    RECORD,
    ROW,
    SCORE,
    STATUS,
    VERDICT,
    WHOLE_SCORE,
    checked,
)
from stillhouse.files import (
    Json,
    file_digest,
    link_path,
    make_directory,
    publish,
    read_json,
    sweep_leftovers,
    temporary_name,
    write_atomic,
    write_json,
)
from stillhouse.identity import digest, point_id, slug, to_plain, versioned
from stillhouse.spec import TrainSpec

# Code that works on run directories needs files.py too, and imports it from here.
__all__ = [
    "FORMAT", "Json", "RunDir", "Runs", "code_identity", "directory_name", "eval_file", "eval_note",
    "file_digest", "link_path", "make_directory", "new_record", "now", "publish", "read_baseline",
    "read_eval_note", "read_json", "read_score", "sweep_leftovers", "temporary_name",
    "version", "write_atomic", "write_json",
]  # fmt: skip

FORMAT = 1  # of a run directory; another number is refused, never guessed at


def read_score(directory: Path, task: str, whole: bool = False) -> Json | None:
    """A run's or a baseline's result on one task, None where there is none.

    `whole`: with all that tables are made of, and not only what says which question it answers.

    Raises:
        ContractError: the file is there and is no score.
    """
    file = eval_file(directory, task)
    score = read_json(file)
    cure = "move it away, and `stillhouse run` scores anew"
    return None if score is None else checked(score, WHOLE_SCORE if whole else SCORE, file, cure)


def read_baseline(directory: Path) -> Json | None:
    """The description of a row that no run trained (baseline.json), None where there is none.

    Raises:
        ContractError: the file is there and is no such description.
    """
    file = directory / "baseline.json"
    row = read_json(file)
    cure = "move it away, and `stillhouse run` writes it anew"
    return None if row is None else checked(row, ROW, file, cure)


@cache
def code_identity() -> Json:
    """The code that this process runs: a digest of its sources, and its git state, if any."""
    package = Path(__file__).parent
    hasher = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        hasher.update(f"{source.relative_to(package)}\n".encode() + source.read_bytes())

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(package), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None  # installed from a wheel, or no git here: the digest is enough
        return done.stdout.strip()

    return {
        "digest": hasher.hexdigest()[:16],
        "revision": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", ".")),
    }


def version() -> str:
    """What is installed, and the digest of the code, which runs and Jobs name."""
    found = [there.version for there in metadata.distributions(name="stillhouse")]
    return f"stillhouse {(found or ['not installed'])[0]}, code {code_identity()['digest']}"


@dataclass(frozen=True)
class RunDir:
    """The directory of one point; see the module's picture for what lies where."""

    path: Path

    @property
    def id(self) -> str:
        # A directory that was set aside has a number after the id.
        return self.path.name.rpartition("-")[2].partition(".")[0]

    @property
    def spec_file(self) -> Path:
        return self.path / "spec.json"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def cost_file(self) -> Path:
        return self.path / "cost.json"

    @property
    def log_file(self) -> Path:
        return self.path / "log.txt"

    @property
    def collected_file(self) -> Path:
        """The file that says where the directory was collected from; local runs have none."""
        return self.path / "collected.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def eval_file(self, task: str) -> Path:
        return eval_file(self.path, task)

    def lock(self) -> FileLock:
        """Held by whoever trains this run, so that no two processes ever do."""
        make_directory(self.path)
        # It waits one second, because `is_locked` holds the lock for an instant.
        return FileLock(self.path / "run.lock", timeout=1)

    def is_locked(self) -> bool:
        """Whether some live process trains this run now."""
        if not (self.path / "run.lock").exists():
            return False
        try:
            with FileLock(self.path / "run.lock", blocking=False):
                return False
        except Timeout:
            return True

    def record(self) -> Json | None:
        """spec.json, checked to be of this format and of this identity; None for a new run.

        Raises:
            ContractError: written by another version, or its content is not what its name says.
        """
        record = read_json(self.spec_file)
        if record is None:
            return None
        if record.get("format") != FORMAT:
            raise ContractError(
                f"{self.spec_file}: written in format {record.get('format')}, this version reads"
                f" format {FORMAT}; use another --runs directory, or the version that wrote it"
            )
        cure = "move the directory away and run again"
        checked(record, RECORD, self.spec_file, cure)
        if _digest_of(record["versioned"])[: len(self.id)] != self.id:
            raise ContractError(
                f"{self.spec_file}: its content is not the point {self.id}; somebody edited it."
                " Move the directory away and run again"
            )
        return record

    def status(self) -> Json:
        """status.json, {} before the first attempt.

        Raises:
            ContractError: it is there, and is not what we write.
        """
        status = read_json(self.status_file) or {}
        return checked(status, STATUS, self.status_file, "move it away and run again")

    def update_status(self, **fields: Any) -> Json:
        """Change some fields of status.json and keep the rest."""
        status = self.status() | fields
        write_json(self.status_file, status)
        return status

    def cost(self) -> Json | None:
        """cost.json, None before the end.

        Raises:
            ContractError: it is there, and is not what we write.
        """
        cost = read_json(self.cost_file)
        cure = "move it away: only what the run cost is lost with it"
        return None if cost is None else checked(cost, COST, self.cost_file, cure)

    def metrics(self) -> list[Json]:
        """The lines of metrics.jsonl, one object per step; a torn last line is left out.

        Raises:
            ContractError: a line before it is no such object.
        """
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_bytes().split(b"\n")
        return [self._metrics_of(line, number) for number, line in enumerate(lines[:-1], 1)]

    def _metrics_of(self, line: bytes, number: int) -> Json:
        try:
            content: Any = json.loads(line)
        except ValueError as error:
            raise ContractError(
                f"{self.metrics_file}, line {number}: not JSON ({error}); take that line and those"
                " behind it out, or move the directory away and run again"
            ) from error
        found = cast("Json", content) if isinstance(content, dict) else {}
        if not isinstance(found.get("step"), int):
            raise ContractError(
                f"{self.metrics_file}, line {number}: no object with a step; take that line out, or"
                " move the directory away and run again"
            )
        return found

    def keep_metrics_before(self, step: int) -> None:
        """Truncate metrics.jsonl to the steps before `step`, for a resume from there."""
        if self.metrics_file.exists():
            kept = [m for m in self.metrics() if m["step"] < step]
            text = "".join(json.dumps(m) + "\n" for m in kept)
            write_atomic(self.metrics_file, text.encode())

    def contract(self) -> Json | None:
        """The adapter's numerics contract (adapter/stillhouse.json), None without an adapter.

        Raises:
            ContractError: it is there, and is not what we write.
        """
        file = self.adapter / "stillhouse.json"
        contract = read_json(file)
        cure = f"move {self.adapter} away and run again"
        return None if contract is None else checked(contract, CONTRACT, file, cure)

    def is_trained(self) -> bool:
        """Whether the adapter is there, complete, and of this point.

        Raises:
            ContractError: its contract is not what we write.
        """
        contract = self.contract()
        if contract is None or contract["id"] != self.id:
            return False
        return all(
            (self.adapter / name).is_file()
            and (self.adapter / name).stat().st_size == entry["size"]
            for name, entry in contract["files"].items()
        )

    @property
    def set_aside_root(self) -> Path:
        """The directory of runs that were set aside; hidden, so that they are not found as runs."""
        return self.path.parent / ".before"

    def set_aside(self) -> Path:
        """Move this run's files away, so that the point starts over; the caller holds the lock.

        The lock stays, and spec.json is moved last: until then the run is unchanged.
        """
        names = (f"{self.path.name}.{number}" for number in itertools.count(1))
        into = next(path for name in names if not (path := self.set_aside_root / name).exists())
        into.mkdir(parents=True)
        for entry in sorted(self.path.iterdir(), key=lambda path: path.name == "spec.json"):
            if entry.name != "run.lock":
                entry.rename(into / entry.name)
        return into

    def was_trained(self) -> bool:
        """Whether the adapter is here, or on the volume if the run was collected without it.

        A volume shows an adapter's contract only together with all of its weights.
        """
        if self.is_trained():
            return True
        contract = self.contract() if self.collected_file.exists() else None
        return contract is not None and contract.get("id") == self.id


def _digest_of(content: Any) -> str:
    try:
        return digest(content)
    except ValueError:  # NaN or infinity: nothing that we wrote
        return ""


def directory_name(slug_: str, id_: str) -> str:
    """The name of a point's run directory."""
    return f"{slug_}-{id_}"


def eval_file(directory: Path, task: str) -> Path:
    """Where a run's or a baseline's result on one task lies."""
    return directory / "eval" / f"{task}.json"


def eval_note(directory: Path, kind: Literal["begun", "error"]) -> Path:
    """Where an evaluation notes that it begins with a row, or why it could not score it."""
    return directory / f"eval_{kind}.json"


def read_eval_note(directory: Path, kind: Literal["begun", "error"]) -> Json:
    """Such a note, {} where there is none: one that somebody tore ends no evaluation."""
    file = eval_note(directory, kind)
    try:
        return checked(read_json(file) or {}, EVAL_NOTE, file, "move it away")
    except ContractError:
        return {}


@dataclass(frozen=True)
class Runs:
    """A directory of runs."""

    root: Path

    def of(self, spec: TrainSpec) -> RunDir:
        """The run directory that this content has, whether it exists or not."""
        return RunDir(self.root / directory_name(slug(spec), point_id(spec)))

    def all(self) -> Iterator[RunDir]:
        """Every run that was ever started here."""
        for spec_file in sorted(self.root.glob("*/spec.json")):
            yield RunDir(spec_file.parent)

    def find(self, word: str) -> list[RunDir]:
        """The runs that a person can mean by `word`: a NAME, or a prefix of an id."""
        link = self.names / word
        if link.is_symlink():
            return [RunDir(self.root / os.path.basename(link.readlink()))]
        return [run for run in self.all() if run.id.startswith(word) or run.path.name == word]

    @property
    def names(self) -> Path:
        return self.root / "names"

    def sweep_file(self, name: str) -> Path:
        return self.root / "sweeps" / f"{name}.json"

    def sweep_log(self, name: str) -> Path:
        """The output of preparing its pairs and scoring its points."""
        return self.sweep_file(name).with_suffix(".log")

    def cancel_file(self, name: str) -> Path:
        """The file that says when a running `run` of the sweep was asked to end."""
        return self.sweep_file(name).with_suffix(".cancelled")

    def baseline(self, label: str, key: str) -> Path:
        """Directory of a row that no run trained: teacher, student or ptq."""
        return self.root / "baselines" / f"{label}-{key}"

    @property
    def verdicts(self) -> Path:
        """The directory of the results of preflights."""
        return self.root / "preflight"

    def verdict_file(self, pair_name: str, key: str) -> Path:
        """What a preflight found of a pair; `verdict.key_of` gives the key."""
        return self.verdicts / f"{pair_name}-{key}.json"

    def verdict(self, pair_name: str, key: str) -> Json | None:
        """The content of that file, None where there is none.

        Raises:
            ContractError: it is there, and is not what a preflight writes.
        """
        file = self.verdict_file(pair_name, key)
        found = read_json(file)
        cure = "move it away, and `stillhouse preflight` measures anew"
        return None if found is None else checked(found, VERDICT, file, cure)

    def report(self, name: str) -> Path:
        return self.root / "reports" / name

    def link_name(self, name: str, run: RunDir) -> None:
        """Make `names/NAME` lead to the run.

        Raises:
            ContractError: the name already means another configuration.
        """
        link_path(self.names / name, run.path)


def new_record(spec: TrainSpec, versions: Json) -> Json:
    """What spec.json says: the resolved config, its identity, the code and the libraries."""
    return {
        "format": FORMAT,
        "id": point_id(spec),
        "slug": slug(spec),
        "spec": to_plain(spec),
        "versioned": versioned(spec),
        "code": code_identity(),
        "image": os.environ.get("STILLHOUSE_IMAGE"),  # of the pod, by digest; None: no pod
        "versions": versions,
        "created": now(),
    }


def now() -> float:
    """Seconds since the epoch, to the millisecond."""
    return round(time.time(), 3)
