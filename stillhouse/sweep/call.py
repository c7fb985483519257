"""Hold the arguments of a launcher verb, and resolve its target to a sweep or to known points.

A target is a sweep file, or the name of something that was started before. With the cluster
backend, words about the site (`namespace=lab`, `site=kueue`) may follow a name, too: they say where
to look.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from stillhouse.compose import Overrides, from_command_line
from stillhouse.errors import ConfigError, nearest
from stillhouse.spec import SiteSpec, TrainSpec
from stillhouse.sweep import registry
from stillhouse.sweep.backend import Backend
from stillhouse.sweep.cluster import submit_args
from stillhouse.sweep.cluster.backend import ClusterBackend
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.local.backend import LocalBackend
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.site import CLUSTER, away_words, site_of

DEFAULT_RUNS = Path("runs")
BACKENDS = ("local", "cluster")


@dataclass(frozen=True)
class Call:
    """The target, words and options of a verb."""

    target: str | None = None
    words: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    backend_name: str = "local"
    runs: Path = DEFAULT_RUNS
    is_json: bool = False
    is_new_code: bool = False
    is_detached: bool = False
    is_dry_run: bool = False
    follows: bool = False
    shows_all: bool = False
    shows_cost: bool = False
    where: str | None = None
    cause: str | None = None
    adapters: bool = False
    is_sure: bool = False

    def __post_init__(self) -> None:
        if self.backend_name not in BACKENDS:
            there_is = " and ".join(BACKENDS)
            raise ConfigError(
                f"--backend {self.backend_name}: there is {there_is}."
                f"{nearest(self.backend_name, BACKENDS)}"
            )

    @property
    def is_cluster(self) -> bool:
        return self.backend_name == CLUSTER

    @functools.cached_property
    def is_about_all(self) -> bool:
        """Whether no target is named, only, perhaps, where to look."""
        return self.target is None and (not self.words or _of_site(self.words) is not None)

    @property
    def is_file(self) -> bool:
        """Whether a sweep file, or a grid that was typed, is meant; else a name."""
        target = self.target
        return (target is None and not self.is_about_all) or (
            target is not None and (target.endswith((".yaml", ".yml")) or Path(target).is_file())
        )

    @functools.cached_property
    def _sweep(self) -> Sweep:
        return load_sweep(self.target, list(self.words), self.runs, self.backend_name)

    def sweep(self) -> Sweep:
        """The sweep that a file and the words describe.

        Raises:
            ConfigError: whatever cannot be right in them.
        """
        return self._sweep

    def sweep_to_start(self) -> Sweep:
        """The same sweep, as somebody who starts it has to have it.

        Raises:
            ConfigError: as `sweep`; in a cluster, a path that no pod would have.
        """
        if self.is_cluster:
            submit_args.refuse_paths(point.spec for point in self.sweep().points)
        return self.sweep()

    @functools.cached_property
    def site(self) -> SiteSpec:
        """Where to look: what the sweep file or the words say, or else conf/site/cluster.yaml."""
        return self.sweep().site if self.is_file else site_of(_of_site_only(self))

    @property
    def only_site(self) -> SiteSpec:
        """Where to look, where the target says nothing of it."""
        return site_of(_of_site_only(self))

    @functools.cached_property
    def backend(self) -> Backend:
        """The place where the points run: this machine, or the cluster.

        Raises:
            ConfigError: there is no way to the cluster.
        """
        if self.is_cluster:
            return ClusterBackend(self.site, self.runs)
        return LocalBackend(self.runs)

    @property
    def cluster(self) -> ClusterBackend:
        """The cluster, for verbs that only a cluster has.

        Raises:
            ConfigError: this machine is meant; or as `backend`.
        """
        if not isinstance(self.backend, ClusterBackend):
            raise ConfigError("this needs a cluster, not this machine: say --backend cluster")
        return self.backend

    def find(self) -> Sweep:
        """The points that a verb such as status, logs, retry or cancel is about."""
        if self.is_file:
            found = self.backend.pinned(self.sweep())
        elif self.target is None:
            known = ", ".join(self.backend.names()) or "none yet"
            raise ConfigError(f"which sweep? A file, a sweep ({known}), a run's name or id")
        else:
            _of_site_only(self)
            found = self.backend.find(self.target)
        return registry.narrowed(found, self.points)

    def command(self, verb: str, target: str) -> str:
        """A command to tell the reader about, with the options that find these runs."""
        runs = "" if self.runs == DEFAULT_RUNS else f" --runs {self.runs}"
        there = f" {away_words(self.site)}" if self.is_cluster else ""
        return f"stillhouse {verb} {target}{runs}{there}"


def _of_site(words: tuple[str, ...]) -> Overrides | None:
    """What the words set, if that is only where to look."""
    try:
        overrides = from_command_line(list(words), TrainSpec)
    except ConfigError:  # an axis, or a slip: whoever reads the sweep says which
        return None
    keys = (*overrides.groups, *overrides.values)
    return overrides if all(key.partition(".")[0] == "site" for key in keys) else None


def _of_site_only(call: Call) -> Overrides:
    """The words behind a name, which can only say where to look.

    Raises:
        ConfigError: they say more.
    """
    if not call.words:
        return Overrides({}, {})
    if call.is_cluster:
        from_command_line(list(call.words), TrainSpec)  # says what is no knob at all
        overrides = _of_site(call.words)
        if overrides is not None:
            return overrides
    raise ConfigError(
        f"{' '.join(call.words)}: {call.target} names a sweep that is there already; words change a"
        " sweep file, or are a grid by themselves"
    )
