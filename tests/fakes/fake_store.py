"""Store the objects of the fake API server: versions, history, names and owners.

Every write gets the next resourceVersion and leaves one `Change`, which watches read. A stored
object is never changed in place, so a page, a watch or a test may keep what it was given.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from tests.fakes.fake_rules import (
    RESOURCES,
    Json,
    Refused,
    Resource,
    fill_in,
    forbidden_changes,
    invalid,
    merged,
    mistakes,
)

STATUS = "status"
FOREGROUND = "foregroundDeletion"
MODIFIED = (
    "the object has been modified; please apply your changes to the latest version and try again"
)


@dataclass(frozen=True)
class Item:
    """One version of one object, and its bytes."""

    obj: Json
    data: bytes

    @cached_property
    def in_list(self) -> bytes:
        """Its bytes in a list, where a real server leaves a kind of its own out."""
        if ".x-k8s.io/" in self.obj["apiVersion"]:
            return self.data
        plain = {k: v for k, v in self.obj.items() if k not in ("apiVersion", "kind")}
        return json.dumps(plain, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Change:
    version: int
    resource: str
    namespace: str
    before: Item | None
    after: Item | None  # None: deleted; `before` then carries the version of the deletion


@dataclass(frozen=True)
class Snapshot:
    """The state that later pages of a list are read from."""

    version: int
    items: list[Item]


class Store:
    """The counterpart of a real server's etcd and registries. Thread-safe."""

    def __init__(self, window: int = 100_000) -> None:
        self.window = window  # changes that watches can still ask for
        self.version = 100
        self.changed = threading.Condition(threading.RLock())
        self.now: Callable[[], str] = lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.quotas: dict[tuple[str, str], int] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self.pods_linger = False  # a running pod that is deleted stays, until `vanish`
        self.is_closed = False
        self._items: dict[str, dict[tuple[str, str], Item]] = defaultdict(dict)
        self._changes: list[Change] = []
        self._oldest = self.version  # watches from before this version are told to list again
        self._owned: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
        self._born = 0

    # Reading.

    def get(self, resource: str, namespace: str, name: str) -> Item | None:
        return self._items[resource].get((namespace, name))

    def need(self, resource: str, namespace: str, name: str) -> Item:
        item = self.get(resource, namespace, name)
        if item is None:
            known = RESOURCES[resource]
            said = f'{known.full} "{name}" not found'
            raise Refused(404, "NotFound", said, name=name, group=known.group, kind=resource)
        return item

    def all(self, resource: str, namespace: str | None) -> list[Item]:
        """Every object of a namespace (None: of all), ordered by name, as a list is."""
        items = self._items[resource]
        keys = sorted(key for key in items if namespace in (None, key[0]))
        return [items[key] for key in keys]

    def since(self, version: int, resource: str, namespace: str) -> Iterator[Change]:
        """The changes after `version`.

        Raises:
            Refused: 410, history does not reach so far back.
        """
        if version < self._oldest:
            said = f"too old resource version: {version} ({self._oldest})"
            raise Refused(410, "Expired", said)
        start = version - self._oldest
        for change in self._changes[start:]:
            if change.resource == resource and change.namespace == namespace:
                yield change

    def forget(self) -> None:
        """Compact the history: no earlier change can be requested any more."""
        with self.changed:
            self._changes.clear()
            self._oldest = self.version
            self.snapshots.clear()

    # Writing.

    def create(self, resource: Resource, namespace: str, obj: Json, dry_run: bool = False) -> Item:
        with self.changed:
            obj = json.loads(json.dumps(obj))
            meta = obj.setdefault("metadata", {})
            if resource.is_namespaced and meta.setdefault("namespace", namespace) != namespace:
                said = "the namespace of the provided object does not match the namespace sent on"
                raise Refused(400, "BadRequest", f"{said} the request")
            self._born += 1
            if not meta.get("name") and "generateName" in meta:
                meta["name"] = f"{meta['generateName']}{self._born:05x}"
            name = meta.get("name", "")
            if not name:
                said = "Required value: name or generateName is required"
                raise invalid(resource, "", [("FieldValueRequired", "metadata.name", said)])
            if resource.is_namespaced and self.get("namespaces", "", namespace) is None:
                said = f'namespaces "{namespace}" not found'
                raise Refused(404, "NotFound", said, name=namespace, kind="namespaces")
            obj |= {"apiVersion": resource.api_version, "kind": resource.kind}
            meta |= {"uid": f"{self._born:08x}-0000-4000-8000-000000000000", "generation": 1}
            meta["creationTimestamp"] = self.now()
            fill_in(resource, obj)
            if causes := mistakes(resource, obj):
                raise invalid(resource, name, causes)
            self._check_quota(resource, namespace, name)  # before the name, as a real one
            if self.get(resource.name, namespace, name) is not None:
                said = f'{resource.full} "{name}" already exists'
                details = {"name": name, "group": resource.group, "kind": resource.name}
                raise Refused(409, "AlreadyExists", said, **details)
            if dry_run:
                return _item(obj)
            return self._write(resource.name, namespace, name, obj)

    def update(
        self, resource: Resource, namespace: str, name: str, obj: Json, sub: str = "",
        dry_run: bool = False,
    ) -> Item:  # fmt: skip
        """Replace an object, or only its status; an update that changes nothing is none."""
        with self.changed:
            old = self.need(resource.name, namespace, name)
            new = json.loads(json.dumps(obj))
            asked, meta = new.get("metadata", {}), old.obj["metadata"]
            for key in ("resourceVersion", "uid"):
                if asked.get(key, meta[key]) != meta[key]:
                    said = f'Operation cannot be fulfilled on {resource.full} "{name}": {MODIFIED}'
                    details = {"name": name, "group": resource.group, "kind": resource.name}
                    raise Refused(409, "Conflict", said, **details)
            if sub == STATUS:
                new = {**old.obj, STATUS: new.get(STATUS, {})}
            elif resource.has_status:
                new[STATUS] = old.obj.get(STATUS, {})
            kept = (
                "uid",
                "creationTimestamp",
                "generation",
                "resourceVersion",
                "name",
                "namespace",
            )
            new["metadata"] = {
                **new["metadata"], **{key: meta[key] for key in kept if key in meta}
            }  # fmt: skip
            new |= {"apiVersion": resource.api_version, "kind": resource.kind}
            if new == old.obj:
                return old
            if not sub:
                causes = mistakes(resource, new) + forbidden_changes(resource, old.obj, new)
                if causes:
                    raise invalid(resource, name, causes)
            if new.get("spec") != old.obj.get("spec"):
                new["metadata"]["generation"] = meta.get("generation", 1) + 1
            if dry_run:
                return _item(new)
            if kept_by(old.obj) and "deletionTimestamp" in meta and not kept_by(new):
                return self._remove(resource.name, namespace, name)
            return self._write(resource.name, namespace, name, new)

    def patch(
        self, resource: Resource, namespace: str, name: str, patch: Json, sub: str = "",
        dry_run: bool = False,
    ) -> Item:  # fmt: skip
        """A JSON merge patch."""
        with self.changed:
            old = self.need(resource.name, namespace, name)
            asked = merged(old.obj, patch)
            if "resourceVersion" not in patch.get("metadata", {}):
                asked["metadata"] = {
                    **asked["metadata"], "resourceVersion": old.obj["metadata"]["resourceVersion"]
                }  # fmt: skip
            return self.update(resource, namespace, name, asked, sub, dry_run)

    def delete(self, resource: Resource, namespace: str, name: str, options: Json) -> Item:
        """Delete, and what it owns after it, or (Foreground) before it; the item as it was last."""
        with self.changed:
            item = self.need(resource.name, namespace, name)
            uid = item.obj["metadata"]["uid"]
            asked = options.get("preconditions", {}).get("uid", uid)
            if asked != uid:
                said = (
                    f'Operation cannot be fulfilled on {resource.kind_full} "{name}": the UID in'
                    f" the precondition ({asked}) does not match the UID in record ({uid}). The"
                    " object might have been deleted and then recreated"
                )
                details = {"name": name, "group": resource.group, "kind": resource.kind}
                raise Refused(409, "Conflict", said, **details)
            if options.get("dryRun"):
                return item
            policy = options.get("propagationPolicy", "Background")
            owned = set() if policy == "Orphan" else self._owned.pop(uid, set())
            meta = item.obj["metadata"]
            finalizers = list(meta.get("finalizers", []))
            if policy == "Foreground" and owned:
                self._owned[uid] = set(owned)
                finalizers.append(FOREGROUND)
            is_running = resource.name == "pods" and item.obj[STATUS].get("phase") == "Running"
            if finalizers or is_running:
                now = {"deletionTimestamp": meta.get("deletionTimestamp", self.now())}
                meta = {**meta, **now, **({"finalizers": finalizers} if finalizers else {})}
                item = self._write(resource.name, namespace, name, {**item.obj, "metadata": meta})
            if not finalizers and not (is_running and self.pods_linger):
                item = self._remove(resource.name, namespace, name)
            for kind, ns, dependent in sorted(owned):
                if self.get(kind, ns, dependent) is not None:
                    self.delete(RESOURCES[kind], ns, dependent, {})
            return item

    def vanish(self, resource: str, namespace: str, name: str) -> None:
        """Remove an object that is being deleted, as whoever kept it would in the end."""
        with self.changed:
            assert "deletionTimestamp" in self.need(resource, namespace, name).obj["metadata"]
            self._remove(resource, namespace, name)

    def _write(self, resource: str, namespace: str, name: str, obj: Json) -> Item:
        before = self.get(resource, namespace, name)
        self.version += 1
        meta = {**obj["metadata"], "resourceVersion": str(self.version)}
        after = _item({**obj, "metadata": meta})
        self._items[resource][namespace, name] = after
        for owner in meta.get("ownerReferences", []):
            self._owned[owner["uid"]].add((resource, namespace, name))
        self._note(Change(self.version, resource, namespace, before, after))
        return after

    def _remove(self, resource: str, namespace: str, name: str) -> Item:
        item = self._items[resource].pop((namespace, name))
        self.version += 1
        meta = {**item.obj["metadata"], "resourceVersion": str(self.version)}
        last = _item({**item.obj, "metadata": meta})
        self._note(Change(self.version, resource, namespace, last, None))
        for owner in meta.get("ownerReferences", []):
            self._release(owner, (resource, namespace, name))
        return last

    def _release(self, owner: Json, dependent: tuple[str, str, str]) -> None:
        """An owner that waits in the foreground goes with the last thing it owned."""
        left = self._owned.get(owner["uid"], set())
        left.discard(dependent)
        kind = next(known.name for known in RESOURCES.values() if known.kind == owner["kind"])
        item = self.get(kind, dependent[1], owner["name"])
        is_it = item is not None and item.obj["metadata"]["uid"] == owner["uid"]
        if item and is_it and not left and item.obj["metadata"].get("finalizers") == [FOREGROUND]:
            self._owned.pop(owner["uid"], None)
            self._remove(kind, dependent[1], owner["name"])

    def _note(self, change: Change) -> None:
        self._changes.append(change)
        if len(self._changes) > 2 * self.window:
            self._changes = self._changes[-self.window :]
            self._oldest = self.version - self.window
        self.changed.notify_all()

    def _check_quota(self, resource: Resource, namespace: str, name: str) -> None:
        limit = self.quotas.get((namespace, resource.name))
        if limit is None:
            return
        used = len(self.all(resource.name, namespace))
        if used >= limit:
            what = f"count/{resource.full}"
            said = (
                f'{resource.full} "{name}" is forbidden: exceeded quota: {namespace}, requested:'
                f" {what}=1, used: {what}={used}, limited: {what}={limit}"
            )
            details: Any = {"name": name, "group": resource.group, "kind": resource.name}
            raise Refused(403, "Forbidden", said, **details)


def kept_by(obj: Json) -> list[str]:
    """Who still holds an object that is being deleted."""
    return obj["metadata"].get("finalizers") or []


def _item(obj: Json) -> Item:
    return Item(obj, json.dumps(obj, separators=(",", ":")).encode())
