"""Resolve a sweep, a run or a Job of a cluster by its name or id.

lmbda_beta           a sweep that anybody started there
lmbda0_lr5e6         a name that k8s/train.sh or a sweep gave
3f9a                 the first digits of an id, or of any Job's hash
eval                 a label of k8s/eval.sh: all Jobs that have it
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from stillhouse.errors import ConfigError, nearest
from stillhouse.rundir import Json
from stillhouse.sweep import registry
from stillhouse.sweep.cluster.connect import ApiError, Cluster
from stillhouse.sweep.cluster.ledger import ROOM, read_sweep, sweeps
from stillhouse.sweep.cluster.manifest import SELECTOR, config_map
from stillhouse.sweep.cluster.ownership import refuse_stranger
from stillhouse.sweep.points import Sweep, point_of


def find(cluster: Cluster, word: str, runs: Path, there: str) -> Sweep:
    """What a word means; `there`: the words that lead a command to this cluster.

    Raises:
        ConfigError: it means nothing there, or more than one thing.
    """
    record = read_sweep(cluster, word)
    if record is not None:
        return _sweep(cluster, record, runs)
    names = Names(cluster).read()
    if word in names:
        return registry.alone(point_of(names[word], word), runs, _sweeps(cluster, runs))
    called = _called(cluster)
    labelled = [job for job, others in called.items() if word in others]
    if labelled:
        return Sweep(word, runs, tuple(map(point_of, sorted(labelled))), is_whole=False)
    found = {name for name in (*called, *names.values()) if _is_meant(name, word)}
    known = [] if found else list(_sweeps(cluster, runs))
    found |= {p.directory for s in known for p in s.points if _is_meant(p.directory, word)}
    if len(found) == 1:
        return registry.alone(point_of(found.pop()), runs, _sweeps(cluster, runs))
    if found:
        raise ConfigError(
            f'"{word}" means {len(found)} Jobs ({", ".join(sorted(found)[:4])} …); give more digits'
        )
    raise ConfigError(
        f'no sweep, run or Job "{word}" in namespace {cluster.namespace} (`stillhouse status'
        f" {there}` lists the sweeps).{nearest(word, [*names, *(sweep.name for sweep in known)])}"
    )


def _is_meant(name: str, word: str) -> bool:
    return name == word or name.rpartition("-")[2].startswith(word)


def _called(cluster: Cluster) -> dict[str, list[str]]:
    """The Jobs that are there, and what people call them."""
    found: dict[str, list[str]] = {}
    for items, _ in cluster.pages("jobs", SELECTOR, metadata_only=True):
        for item in items:
            notes: Mapping[str, str] = item["metadata"].get("annotations") or {}
            found[item["metadata"]["name"]] = shlex.split(notes.get("stillhouse/names", ""))
    return found


def _sweeps(cluster: Cluster, runs: Path) -> Iterator[Sweep]:
    for mark in sweeps(cluster):
        record = read_sweep(cluster, mark.name)
        if record is not None:
            yield _sweep(cluster, record, runs)


def _sweep(cluster: Cluster, record: Json, runs: Path) -> Sweep:
    where = f"sweep {record.get('name')} in namespace {cluster.namespace}"
    return registry.of_record(record, runs, where)


# ---------------------------------------------------------------------------------- names of runs


NAMES = "stillhouse-names"


class Names:
    """What people call their runs: one meaning each, in one namespace."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def read(self) -> dict[str, str]:
        """Every name, and the run directory that it means."""
        item = self.cluster.read("configmaps", NAMES)
        return dict(item.get("data") or {}) if item else {}

    def claim(self, name: str, directory: str) -> bool:
        """Make a name mean a run directory; False if it already did."""
        return bool(self.claim_all({name: directory}))

    def claim_all(self, names: Mapping[str, str]) -> set[str]:
        """Make names mean run directories, all or none; those that are new.

        Raises:
            ConfigError: a name already means another directory, there is no room, or the ConfigMap
                is not ours.
        """
        while True:
            item = self.cluster.read("configmaps", NAMES)
            refuse_stranger(item, None)
            there: dict[str, str] = (item or {}).get("data") or {}
            new = {name: to for name, to in names.items() if there.get(name) != to}
            for name in new.keys() & there.keys():
                raise ConfigError(
                    f'the name "{name}" already means {there[name]} on this cluster, and this is'
                    f" {new[name]}: another configuration. Choose another name"
                )
            if not new:
                return set()
            data = there | new
            if sum(len(name) + len(to) for name, to in data.items()) > ROOM:
                raise ConfigError(
                    f"configmap {NAMES}: full ({len(there)} names); remove some with `kubectl edit"
                    f" configmap {NAMES}`"
                )
            try:
                if item is None:
                    self.cluster.create("configmaps", config_map(NAMES, {}, data=data))
                else:
                    self.cluster.replace("configmaps", NAMES, item | {"data": data})
                return set(new)
            except ApiError as error:
                if error.status not in (404, 409):  # somebody was quicker: read again
                    raise
