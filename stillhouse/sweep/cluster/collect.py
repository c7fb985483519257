"""Fetch results from a volume that this machine does not mount.

A short-lived Job mounts the volume of runs, read-only. By `exec` its pod sends what is not here yet
(`transfer`): the small files, and on request the adapters. A directory is replaced in one rename,
so a collect can be interrupted anywhere and run again. `collected.json` in a directory says where
it came from. A directory without that file is this machine's own work; it is left alone, and so is
one that was changed here since it came.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from stillhouse.errors import ConfigError, ContractError
from stillhouse.rundir import (
    Json,
    RunDir,
    Runs,
    make_directory,
    now,
    publish,
    read_json,
    sweep_leftovers,
    write_json,
)
from stillhouse.spec import SiteSpec
from stillhouse.sweep.cluster.connect import Cluster
from stillhouse.sweep.cluster.volume_pod import Say, VolumePod
from stillhouse.sweep.points import Sweep
from stillhouse.text import number_of
from stillhouse.transfer import state

# What a report, a status and a cost are made of; the contract says that an adapter lies there.
SMALL = (
    "spec.json", "status.json", "metrics.jsonl", "cost.json", "log.txt", "diverged.json",
    "baseline.json", "eval/*.json", "adapter/stillhouse.json",
)  # fmt: skip
WEIGHTS = ("adapter/*",)
STAGE = ".collecting"  # below runs: what has come and is not in its place yet
BATCH = 200  # directories of one request: it travels in a URL, and some proxies cut at 8 KB
BATCH_BYTES = 1 << 30  # of adapters; what is lost when a stream is cut
# Bytes of one file that come at most: a metrics.jsonl of a million steps, a log; then a verdict.
LARGEST_SMALL, LARGEST_VERDICT = 1 << 28, 1 << 24
SLACK = 1 << 26  # bytes on top of what contracts say of adapters: the contracts themselves
SHOWN = 5  # directories that a list names before it only counts them


@dataclass
class Collected:
    """What came, and what did not."""

    files: int = 0
    bytes: int = 0
    came: list[str] = field(default_factory=list[str])  # directories in which something is new
    unchanged: int = 0  # directories that were here already, as they are there
    missing: list[str] = field(default_factory=list[str])  # directories that are not there
    kept: dict[str, str] = field(default_factory=dict[str, str])  # left alone here, and why
    verdicts: int = 0  # of preflights, that are new here or newer

    def lines(self, sweep: Sweep) -> list[str]:
        """The same as a person reads it."""
        names = {point.directory: str(point) for point in sweep.points}

        def some(directories: Sequence[str]) -> str:
            more = ["…"] if len(directories) > SHOWN else []
            return ", ".join([*(names.get(d, d) for d in directories[:SHOWN]), *more])

        of = "1 directory" if len(self.came) == 1 else f"{len(self.came)} directories"
        said = f"{number_of(self.files, 'file')} ({size(self.bytes)}) of {of} came"
        lines = [f"{said}, {self.unchanged} were here already"]
        if self.verdicts:
            came = number_of(self.verdicts, "verdict")
            lines.append(f"  {came} of preflights came; `stillhouse plan` shows them")
        if self.missing:
            lines.append(f"  {len(self.missing)} are not there yet [{some(self.missing)}]")
        reasons: dict[str, list[str]] = {}
        for what, why in self.kept.items():
            reasons.setdefault(why, []).append(what)
        return lines + [
            f"  left alone, {len(whats)}: {why} [{some(whats)}]" for why, whats in reasons.items()
        ]

    def as_json(self) -> Json:
        return asdict(self)


def collect(
    cluster: Cluster, site: SiteSpec, sweep: Sweep, runs: Path, adapters: bool, say: Say
) -> Collected:
    """Fetch what the runs and baselines of a sweep left on the volume into `runs`.

    Raises:
        ConfigError: a right is missing, the pod cannot start, another collect is at work here.
        Interrupted: asked to stop, or the pod was lost again and again; what came stays.
    """
    make_directory(runs, "--runs")
    directories = [point.directory for point in sweep.points]
    directories += [f"baselines/{row.directory.name}" for row in sweep.meant_baselines]
    with _alone(runs), VolumePod(cluster, site, sweep.name, say) as volume_pod:
        home = _Home(runs, f"{cluster.server} {cluster.namespace}/{site.runs_claim}", volume_pod)
        home.fetch_small(directories)
        home.fetch_verdicts()
        if adapters:
            home.fetch_weights(directories)
    return home.collected


@contextlib.contextmanager
def _alone(runs: Path) -> Generator[None, None, None]:
    """Let no two collects write below `runs` at once."""
    try:
        with FileLock(runs / f"{STAGE}.lock", blocking=False):
            for place in (runs, runs / "baselines", Runs(runs).verdicts):
                sweep_leftovers(place)
            yield
            shutil.rmtree(runs / STAGE, ignore_errors=True)
    except Timeout as error:
        raise ConfigError(f"{runs}: another `stillhouse collect` writes here now") from error


# ------------------------------------------------------------------------------- here


class _Home:
    """The local directory of runs, into which results are fetched."""

    def __init__(self, runs: Path, source: str, volume_pod: VolumePod) -> None:
        self.runs, self.source, self.volume_pod = runs, source, volume_pod
        self.stage, self.fresh = runs / STAGE / "came", runs / STAGE / "new"
        self.collected = Collected()
        self.names: dict[str, str] = {}

    def fetch_small(self, directories: Sequence[str]) -> None:
        wanted: list[str] = []
        for directory in directories:
            why = self._why_kept(directory)
            if why is None:
                wanted.append(directory)
            else:
                self.collected.kept[directory] = f"{why}; move it away to have the cluster's"
        for at in range(0, len(wanted), BATCH):
            batch = wanted[at : at + BATCH]
            states = {directory: self._marker(directory).get("state") for directory in batch}
            have = {directory: known for directory, known in states.items() if known}
            manifest = self._ask(batch, SMALL, have)
            self.collected.unchanged += len(manifest["unchanged"])
            self.collected.missing += manifest["missing"]
            self.names |= manifest["names"]
            self._say(at + len(batch), len(wanted), "directories")
        for name, directory in self.names.items():
            self._link_name(name, directory)

    def fetch_verdicts(self) -> None:
        """What preflights found on the cluster, where nothing newer is known here."""
        there = Runs(self.runs).verdicts
        wanted = {"directories": [there.name], "files": ["*.json"], "largest": LARGEST_VERDICT}
        self.volume_pod.ask(wanted, self.stage)
        for came in sorted((self.stage / there.name).glob("*.json")):
            name = f"{there.name}/{came.name}"
            try:
                found, known = _verdict(came), _verdict(there / came.name)
            except ContractError as error:
                self.collected.kept[name] = str(error).replace(f"{self.stage}/", "")
                continue
            if found and (known is None or known["created"] < found["created"]):
                write_json(there / came.name, found)
                self.collected.verdicts += 1

    def fetch_weights(self, directories: Sequence[str]) -> None:
        """The adapters of those that are trained; their small files are here."""
        wanted = [
            directory
            for directory in directories
            if directory not in self.collected.kept and RunDir(self.runs / directory).was_trained()
        ]
        done = 0
        for batch in self._by_size(wanted):
            have = {directory: state(self.runs / directory, WEIGHTS) for directory in batch}
            self._ask(batch, WEIGHTS, have)
            done += len(batch)
            self._say(done, len(wanted), "adapters")

    def _by_size(self, directories: Iterable[str]) -> Iterator[list[str]]:
        batch: list[str] = []
        weight = 0
        for directory in directories:
            own = self._weight(directory)
            if batch and (weight + own > BATCH_BYTES or len(batch) == BATCH):
                yield batch
                batch, weight = [], 0
            batch.append(directory)
            weight += own
        if batch:
            yield batch

    def _weight(self, directory: str) -> int:
        """Bytes of a run's adapter, as its contract says."""
        contract = RunDir(self.runs / directory).contract() or {"files": {}}
        return sum(entry["size"] for entry in contract["files"].values())

    def _ask(self, batch: Sequence[str], files: Sequence[str], have: dict[str, str]) -> Json:
        """Fetch and put into place the files of some directories; the manifest of what came."""
        request: Json = {"directories": list(batch), "files": list(files), "have": have}
        if files is WEIGHTS:
            request["most"] = sum(map(self._weight, batch)) + SLACK
        else:
            request["largest"] = LARGEST_SMALL
        manifest = self.volume_pod.ask(request, self.stage)
        for directory in batch:
            came = [name for name in manifest["files"] if name.startswith(f"{directory}/")]
            if not came:
                continue
            shutil.rmtree(self.fresh, ignore_errors=True)
            try:
                self._settle(directory, files is WEIGHTS)
            except ContractError as error:
                self.collected.kept[directory] = str(error).replace(f"{self.runs / STAGE}/", "")
                continue
            self.collected.files += len(came)
            self.collected.bytes += sum(manifest["files"][name]["size"] for name in came)
            if directory not in self.collected.came:
                self.collected.came.append(directory)
        return manifest

    def _settle(self, directory: str, is_weights: bool) -> None:
        """Move a fetched directory into its place, in one step.

        Raises:
            ContractError: what came is not what the directory's name says, or not whole.
        """
        came, here = self.stage / directory, self.runs / directory
        fresh = self.fresh / here.name
        fresh.parent.mkdir(parents=True)
        if is_weights:
            if _contract_bytes(came) != _contract_bytes(here):
                raise ContractError("its adapter changed while it was fetched; collect again")
            _link(here, fresh, lambda name: not name.startswith("adapter/"))
            (came / "adapter").rename(fresh / "adapter")
            if not RunDir(fresh).is_trained():
                raise ContractError("its adapter is not whole on the volume")
        else:
            came.rename(fresh)
            RunDir(fresh).record()
            if _contract_bytes(fresh) and _contract_bytes(fresh) == _contract_bytes(here):
                _link(here, fresh, lambda name: name.startswith("adapter/"))
            marker = {"format": 1, "from": self.source, "at": now(), "state": state(fresh, SMALL)}
            write_json(RunDir(fresh).collected_file, marker)
        here.parent.mkdir(parents=True, exist_ok=True)
        publish(fresh, here)

    def _why_kept(self, directory: str) -> str | None:
        """Why a directory must not be replaced; None if it may."""
        here = self.runs / directory
        marker = self._marker(directory)
        if not marker:
            is_ours = any(path for pattern in SMALL for path in here.glob(pattern))
            return "this machine's own work" if is_ours else None
        if marker["from"] != self.source:
            return f"came from {marker['from']}"
        if marker["state"] != state(here, SMALL):
            return "changed on this machine since it came"
        return "a process here is at work on it" if RunDir(here).is_locked() else None

    def _marker(self, directory: str) -> Json:
        """Where a directory came from; {} where nobody can tell, and then it is left alone."""
        try:
            marker = read_json(RunDir(self.runs / directory).collected_file) or {}
        except ContractError:
            return {}
        return marker if {"from", "state"} <= marker.keys() else {}

    def _link_name(self, name: str, directory: str) -> None:
        run = RunDir(self.runs / directory)
        if run.path.is_dir():
            try:
                Runs(self.runs).link_name(name, run)
            except ContractError as error:
                self.collected.kept[f"names/{name}"] = str(error)

    def _say(self, done: int, of: int, what: str) -> None:
        self.volume_pod.say(f"{done:,} of {of:,} {what}, {size(self.collected.bytes)} came")


def _verdict(file: Path) -> Json | None:
    """What a preflight found, None where there is no such file.

    Raises:
        ContractError: it is not what a preflight writes.
    """
    found = read_json(file)
    if found is not None and not isinstance(found.get("created"), int | float):
        raise ContractError(f'{file}: no verdict of a preflight ("created" is no time)')
    return found


def _contract_bytes(directory: Path) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        return (directory / "adapter" / "stillhouse.json").read_bytes()
    return b""


def _link(old: Path, new: Path, is_wanted: Callable[[str], bool]) -> None:
    """Let `new` have the files of `old` that are wanted and that it has not."""
    for path in old.rglob("*"):
        name = path.relative_to(old).as_posix()
        target = new / name
        if not path.is_file() or not is_wanted(name) or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # a file system without links
            shutil.copy2(path, target)


def size(count: int) -> str:
    """A number of bytes as a person says it: 42 kB, 3.4 MB."""
    amount, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 999.5 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.0f} B" if units[0] == "B" else f"{amount:.3g} {units[0]}"
