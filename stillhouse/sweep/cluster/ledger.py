"""Record in ConfigMaps how each task ended, and which sweeps were started; they outlive the Jobs.

    stillhouse-done-<runs claim>-<digit>   how each task ended, by the id's first digit: 16 of them
    stillhouse-sweep-<name>                a sweep as last requested, and whether it was cancelled

No lock is needed: a record is one key of a merge patch, so drivers that write at the same time keep
each other's records. The names that people give to runs are in `names`.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import threading
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from stillhouse.errors import ConfigError, ContractError
from stillhouse.rundir import Json
from stillhouse.sweep.cluster.connect import Cluster
from stillhouse.sweep.cluster.manifest import SELECTOR, config_map, label_value
from stillhouse.sweep.cluster.objects import seconds
from stillhouse.sweep.cluster.ownership import KIND, create_or_read, refuse_stranger
from stillhouse.sweep.state import Record, record_of

DIGITS = "0123456789abcdef"
ROOM = 900 * 1024  # bytes of one ConfigMap that we fill; the API takes 1 MiB
CANCELLED = "stillhouse/cancelled"  # annotation of a sweep's record: seconds since the epoch

KEY = re.compile(r"(prepare\.)?([a-z0-9-]*-)?[0-9a-f]{10,}(\.[0-9a-f]+)?")  # as *_of make them


def score_of(what: str, scores: str) -> str:
    """The key of the scores of a point (by id) or a baseline (by its directory's name)."""
    return f"{what}.{scores}"


def prepare_of(key: str) -> str:
    """The key of a pair that was prepared; `key`: ten hex digits."""
    return f"prepare.{key}"


def shard_of(key: str) -> str:
    """Which ConfigMap holds a key: the first digit of the id in it."""
    what, _, rest = key.partition(".")
    id_ = rest if what == "prepare" else what.rpartition("-")[2]
    return id_[:1]


class Ledger:
    """How the tasks of one runs volume ended. Safe to use from several threads."""

    def __init__(self, cluster: Cluster, claim: str) -> None:
        self.cluster, self.claim = cluster, claim
        self._said: dict[str, dict[str, str]] = {digit: {} for digit in DIGITS}
        self._read_at = dict.fromkeys(DIGITS, float("-inf"))
        self._locks = {digit: threading.Lock() for digit in DIGITS}
        self._was_read = False
        self._is_ours: set[str] = set()  # digits of ConfigMaps that have our labels
        self.strangers: tuple[str, ...] = ()  # ConfigMaps that only look like parts of it
        self._cancelled: dict[str, float] = {}

    # ------------------------------------------------------------------------------ reading

    def read(self) -> None:
        """Read all of it: one LIST."""
        labels = f"stillhouse/kind=ledger,stillhouse/claim={label_value(self.claim)}"
        began = time.monotonic()
        found = {digit: cast("Json", {}) for digit in DIGITS}
        digits = {self._name(digit): digit for digit in DIGITS}
        strangers: list[str] = []
        for items, _ in self.cluster.pages("configmaps", f"{SELECTOR},{labels}"):
            for item in items:  # a copy has the labels of what it is a copy of: the name decides
                name = item["metadata"]["name"]
                if name in digits:
                    found[digits[name]] = item
                else:
                    strangers.append(name)
        self.strangers = tuple(sorted(strangers))
        self._is_ours = {digit for digit, item in found.items() if item}
        for digit, item in found.items():
            with self._locks[digit]:
                self._take(digit, item, began)
        self._was_read = True

    def get(self, key: str) -> Record | None:
        """How a task ended, as far as was read."""
        digit = shard_of(key)
        said = self._said.get(digit, {}).get(key)
        if said is None:
            return None
        record = record_of(said)
        if record.state != "unreadable":
            return record
        return replace(
            record,
            cause=f"ConfigMap {self._name(digit)}, key {key}: {record.cause}; put back what stood"
            " there, or `stillhouse retry` takes it out and looks anew",
        )

    def records(self) -> dict[str, Record]:
        """All that can be read, by its keys."""
        said = [item for shard in self._said.values() for item in shard.items()]
        found = {key: record_of(text) for key, text in said}
        return {key: record for key, record in found.items() if record.state != "unreadable"}

    def notes(self) -> list[str]:
        """What stands there and is no part of it, a line each."""
        copies = "has the labels of the ledger and not its name: a copy? It is not read"
        lines = [f"ConfigMap {name} {copies}" for name in self.strangers]
        for digit, shard in self._said.items():
            odd = sorted(key for key in shard if KEY.fullmatch(key) is None)
            if odd:
                lines.append(
                    f"ConfigMap {self._name(digit)}: {', '.join(odd[:3])} is no key of the ledger"
                    f"{f', nor are {len(odd) - 3} more' if len(odd) > 3 else ''}; not read"
                )
        return lines

    def cancelled_at(self, key: str) -> float | None:
        """When we saw that somebody cancelled it, by our clock; None if it always was."""
        return self._cancelled.get(key)

    def refresh(self, keys: Iterable[str], within_s: float) -> set[str]:
        """Read anew what of these keys was last read before that; the keys that changed."""
        changed: set[str] = set()
        for digit in sorted({shard_of(key) for key in keys}):
            with self._locks[digit]:
                began = time.monotonic()
                if began - self._read_at[digit] <= within_s:
                    continue
                item = self.cluster.read("configmaps", self._name(digit))
                changed |= self._take(digit, item or {}, began)
        return changed

    def _take(self, digit: str, item: Json, read_at: float) -> set[str]:
        """Learn what a ConfigMap says, asked for at `read_at`; the keys that say something new."""
        before, after = self._said[digit], cast("dict[str, str]", item.get("data") or {})
        changed = {key for key, said in after.items() if before.get(key) != said}
        changed |= before.keys() - after.keys()
        for key in changed if self._was_read else ():
            if key in after and record_of(after[key]).state == "cancelled":
                self._cancelled[key] = time.time()
            else:
                self._cancelled.pop(key, None)
        self._said[digit], self._read_at[digit] = after, read_at
        return changed

    # ------------------------------------------------------------------------------ writing

    def write(self, records: Mapping[str, Record | None]) -> None:
        """Write records, one request for each ConfigMap that they lie in; None removes one.

        Raises:
            ConfigError: a ConfigMap is full, or has the name and not the labels of ours.
        """
        shards: dict[str, dict[str, str | None]] = {}
        for key, record in records.items():
            shards.setdefault(shard_of(key), {})[key] = record and record.to_json()
        for digit, data in shards.items():
            with self._locks[digit]:
                began = time.monotonic()
                item = self._patch(digit, self._fitted(digit, data))
                self._take(digit, item, began)

    def _fitted(self, digit: str, data: dict[str, str | None]) -> dict[str, str | None]:
        """The records; without causes, tails and times where room is short."""
        there = sum(len(key) + len(said) for key, said in self._said[digit].items())

        def size(of: Mapping[str, str | None]) -> int:
            return there + sum(len(key) + len(said or "") for key, said in of.items())

        if size(data) <= ROOM:
            return data
        bare = {key: said and record_of(said).bare().to_json() for key, said in data.items()}
        if size(bare) > ROOM + ROOM // 10:
            raise ConfigError(
                f"configmap {self._name(digit)}: full ({there >> 10} KiB); the runs of volume"
                f" {self.claim} are too many for one ledger: use another site.runs_claim"
            )
        return bare

    def _patch(self, digit: str, data: Mapping[str, str | None]) -> Json:
        labels = {"stillhouse/kind": "ledger", "stillhouse/claim": label_value(self.claim)}
        there = {key: said for key, said in data.items() if said is not None}
        body = config_map(self._name(digit), labels, data=there)
        if digit not in self._is_ours:
            made = _make(self.cluster, body)
            self._is_ours.add(digit)
            if made is not None:
                return made
        return _put(self.cluster, body, {"data": dict(data)})

    def _name(self, digit: str) -> str:
        return f"stillhouse-done-{self.claim}-{digit}"


def _make(cluster: Cluster, body: Json) -> Json | None:
    """Make a ConfigMap; None where it is there, and is ours."""
    there, is_new = create_or_read(cluster, "configmaps", body)
    if not is_new:
        refuse_stranger(there, body["metadata"]["labels"][KIND])
    return there if is_new else None


def _put(cluster: Cluster, body: Json, patch: Json) -> Json:
    """Change a ConfigMap, or make it."""
    while True:
        item = cluster.patch("configmaps", body["metadata"]["name"], patch)
        item = item or _make(cluster, body)  # None: somebody just made it
        if item is not None:
            return item


# ------------------------------------------------------------------------------------ sweeps


@dataclass(frozen=True)
class SweepMark:
    """A sweep that was started on this cluster."""

    name: str
    cancelled: str | None  # changes whenever somebody cancels it
    created: float


def write_sweep(cluster: Cluster, record: Json) -> None:
    """Write a sweep down as it is asked now; `record` as `registry` makes it, with its "name".

    Raises:
        ConfigError: it is too large for a ConfigMap, or something else has its name.
    """
    name: str = record["name"]
    packed = base64.b64encode(gzip.compress(json.dumps(record).encode(), mtime=0)).decode()
    if len(packed) > ROOM:
        raise ConfigError(
            f"sweep {name}: its {len(record['points'])} points do not fit into one ConfigMap"
            f" ({len(packed) >> 10} KiB packed); split it into several files"
        )
    labels = {"stillhouse/kind": "sweep", "stillhouse/sweep": label_value(name)}
    body = config_map(sweep_object(name), labels, binaryData={"sweep.json.gz": packed})
    body["metadata"]["annotations"] = {"stillhouse/name": name}
    if _make(cluster, body) is None:
        _put(cluster, body, body)


def read_sweep(cluster: Cluster, name: str) -> Json | None:
    """A sweep as it was last asked here, or None.

    Raises:
        ContractError: what is there cannot be read.
    """
    item = cluster.read("configmaps", sweep_object(name))
    if item is None:
        return None
    try:
        packed = base64.b64decode(item["binaryData"]["sweep.json.gz"])
        record = json.loads(gzip.decompress(packed))
    except (KeyError, TypeError, ValueError, EOFError, OSError, zlib.error) as error:
        raise ContractError(
            f"ConfigMap {sweep_object(name)}: no sweep that can be read ({error}); run it again"
        ) from error
    if not isinstance(record, dict) or cast("Json", record).get("name") != name:
        raise ContractError(f"ConfigMap {sweep_object(name)}: not the sweep {name}; run it again")
    return cast("Json", record)


def sweeps(cluster: Cluster, name: str | None = None) -> list[SweepMark]:
    """The sweeps that were started here, by name; with `name`, only that one. No contents."""
    wanted = f"{SELECTOR},stillhouse/kind=sweep"
    if name is not None:
        wanted += f",stillhouse/sweep={label_value(name)}"
    found: list[SweepMark] = []
    for items, _ in cluster.pages("configmaps", wanted, metadata_only=True):
        found += [mark for item in items if (mark := _mark(item["metadata"])) is not None]
    return sorted((mark for mark in found if name in (None, mark.name)), key=lambda m: m.name)


def _mark(meta: Json) -> SweepMark | None:
    """What a sweep's ConfigMap says; None of a copy, which has all of it but the name."""
    notes: dict[str, str] = meta.get("annotations") or {}
    created = seconds(meta["creationTimestamp"]) or 0.0
    name = notes.get("stillhouse/name") or meta["name"].removeprefix("stillhouse-sweep-")
    if meta["name"] != sweep_object(name):
        return None
    return SweepMark(name, notes.get(CANCELLED), created)


def cancel_sweep(cluster: Cluster, name: str) -> bool:
    """Ask every driver of a sweep to end; False where no such sweep was started here."""
    notes = {CANCELLED: f"{time.time():.3f}"}
    patch: Json = {"metadata": {"annotations": notes}}
    return cluster.patch("configmaps", sweep_object(name), patch) is not None


def sweep_object(name: str) -> str:
    """The ConfigMap that holds a sweep: a DNS name, with a hash where the name had to change."""
    label = re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip(".-")[:60].rstrip(".-")
    label = re.sub(r"[.-]{2,}", "-", label)
    if label != name:
        label += f"-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
    return f"stillhouse-sweep-{label.lstrip('-')}"
