"""Serve a small fake Kubernetes API for tests that need no cluster.

It speaks real HTTP on loopback, with real resourceVersions, pages, watches, conflicts and refusals.
It contains no mocks and no Job controller: a test plays that part by hand, with `fake_jobs.Hands`.
`api_behaviour.py` runs the same checks on this server and on a real one. `faults.Faults` says which
requests fail on the way, and how.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.fakes.fake_jobs import Hands
from tests.fakes.fake_rules import (
    KUEUE,
    RESOURCES,
    Json,
    Refused,
    Resource,
    field_selector,
    label_selector,
)
from tests.fakes.fake_store import Change, Item, Snapshot, Store
from tests.fakes.faults import Faults
from tests.fakes.wire import Door, HungUp, Reply, Request, status_body

VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
WEBSOCKET = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455's constant
Ended = tuple[Iterable[bytes], bytes, int]  # stdout, stderr, exit code
Exec = Callable[[str, list[str]], Ended]
Take = Callable[[str, list[str], Iterator[bytes]], Ended]  # with what comes on stdin


class FakeApi(Hands):
    """A server with a namespace "lab", a user "ada" and Kueue; closes as a context manager."""

    def __init__(self, faults: Faults | None = None) -> None:
        super().__init__(Store())
        self.git_version = "v1.34.4"
        self.kueue = True
        self.user = "ada"
        self.bookmark_s = 1.0
        self.requests: Counter[tuple[str, str]] = Counter()
        self.logs: dict[str, bytes] = {}
        self.execs: Exec = lambda pod, command: ((), b"no such command", 127)
        self.takes: Take = lambda pod, command, stdin: ((), b"no such command", 127)
        self._token = 1
        self._denied: set[tuple[str, str, str]] = set()
        self._created: Counter[tuple[str, str]] = Counter()
        self._deleted: Counter[tuple[str, str]] = Counter()
        self.doors: list[Door] = []
        self._main = self.door(faults or Faults())
        self.namespace("lab")

    def __enter__(self) -> FakeApi:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.store.is_closed = True
        with self.store.changed:
            self.store.changed.notify_all()
        for door in self.doors:
            door.close()

    # Ways in.

    @property
    def url(self) -> str:
        return self._main.url

    @property
    def faults(self) -> Faults:
        return self._main.faults

    def door(self, faults: Faults) -> Door:
        """Open one more port, with faults of its own."""
        self.doors.append(Door(self._handle, faults, self._login))
        return self.doors[-1]

    def kubeconfig(self, path: Path, namespace: str = "lab") -> Path:
        return self._main.kubeconfig(path, namespace)

    def away(self) -> None:
        self._main.away()

    def back(self) -> None:
        self._main.back()

    def _login(self) -> Json:
        return {"token": f"token-{self._token}"}

    # What a test sets and asks.

    def created(self, resource: str) -> Counter[str]:
        """Name -> how often a client created it; what `put` made is not counted."""
        return Counter({name: n for (kind, name), n in self._created.items() if kind == resource})

    def deleted(self, resource: str) -> Counter[str]:
        return Counter({name: n for (kind, name), n in self._deleted.items() if kind == resource})

    def deny(self, verb: str, resource: str, sub: str = "") -> None:
        self._denied.add((verb, resource, sub))

    def allow(self, verb: str, resource: str, sub: str = "") -> None:
        self._denied.discard((verb, resource, sub))

    def expire_login(self) -> None:
        """401 for every kubeconfig written so far."""
        self._token += 1

    def say(self, pod: str, text: bytes) -> None:
        """Add output to a pod's log, also for clients that follow it."""
        with self.store.changed:
            self.logs[pod] = self.logs.get(pod, b"") + text
            self.store.changed.notify_all()

    # Requests.

    def _handle(self, request: Request, reply: Reply) -> None:
        try:
            self._check_login(request)
            self._route(request, reply)
        except Refused as no:
            reply.send(no.code, status_body(no.code, no.reason, no.message, **no.details))
        except HungUp:
            raise
        except Exception as mistake:  # ours: a final answer, or a client would try for ever
            reply.send(418, status_body(418, "FakeApi", f"{type(mistake).__name__}: {mistake}"))
            raise

    def _check_login(self, request: Request) -> None:
        asked = request.headers.get("authorization", "").lower()
        if asked != f"bearer {self._login()['token']}".lower():
            raise Refused(401, "Unauthorized", "Unauthorized")

    def _route(self, request: Request, reply: Reply) -> None:
        parts = request.path.strip("/").split("/")
        match parts:
            case ["version"]:
                minor = self.git_version.split(".")[1]
                said = {"major": "1", "minor": minor, "gitVersion": self.git_version}
                reply.send(200, _bytes(said))
            case ["apis", group] if group == KUEUE and self.kueue:
                reply.send(200, _bytes(_api_group(group)))
            case ["apis", "authorization.k8s.io", "v1", "selfsubjectaccessreviews"]:
                self._review_access(request, reply)
            case ["apis", "authentication.k8s.io", "v1", "selfsubjectreviews"]:
                who = {"username": self.user, "groups": ["system:authenticated"]}
                said = {"kind": "SelfSubjectReview", "status": {"userInfo": who}}
                reply.send(201, _bytes({"apiVersion": "authentication.k8s.io/v1", **said}))
            case ["api", "v1", "namespaces", *name] if len(name) <= 1:
                self._object(RESOURCES["namespaces"], "", name, request, reply)
            case ["api", version, "namespaces", ns, resource, *name]:
                self._known(f"{version}", resource, ns, name, request, reply)
            case ["apis", group, version, "namespaces", ns, resource, *name]:
                self._known(f"{group}/{version}", resource, ns, name, request, reply)
            case _:
                _no_page(reply)

    def _known(
        self, version: str, resource: str, ns: str, name: list[str], request: Request, reply: Reply
    ) -> None:
        known = RESOURCES.get(resource)
        if (
            known is None
            or known.api_version != version
            or (known.group == KUEUE and not self.kueue)
        ):
            _no_page(reply)
        else:
            self._object(known, ns, name, request, reply)

    def _object(
        self, known: Resource, ns: str, name: list[str], request: Request, reply: Reply
    ) -> None:
        """One request about one kind of object: the verb, the right to it, the work."""
        verb = VERBS.get(request.method, "get")
        if not name and verb == "get":
            verb = "watch" if request.query.get("watch") in ("1", "true") else "list"
        sub = name[1] if len(name) > 1 else ""
        if not reply.muted or request.is_write:
            self.requests[verb, known.name] += 1
        self._check_right(verb, known, ns, name[0] if name else "", sub)
        if sub == "log":
            return self._log(name[0], ns, request, reply)
        if sub == "exec":
            return self._exec(name[0], ns, request, reply)
        if sub not in ("", "status"):
            return _no_page(reply)
        if verb == "list":
            return self._list(known, ns, request, reply)
        if verb == "watch":
            return self._watch(known, ns, request, reply)
        if verb == "get":
            item = self.store.need(known.name, ns, name[0])
            return reply.send(200, _as_asked(item, request))
        self._write(verb, known, ns, name, sub, request, reply)

    def _write(
        self, verb: str, known: Resource, ns: str, name: list[str], sub: str, request: Request,
        reply: Reply,
    ) -> None:  # fmt: skip
        dry_run = request.query.get("dryRun") == "All"
        body = _decoded(known, request)
        if verb == "create":
            item = self.store.create(known, ns, body, dry_run)
            if not dry_run:
                self._created[known.name, item.obj["metadata"]["name"]] += 1
            return reply.send(201, item.data)
        if verb == "delete":
            dry_run = dry_run or bool(body.get("dryRun"))
            item = self.store.delete(known, ns, name[0], {**body, "dryRun": dry_run})
            if not dry_run:
                self._deleted[known.name, name[0]] += 1
            uid = item.obj["metadata"]["uid"]
            details = {"name": name[0], "group": known.group, "kind": known.name, "uid": uid}
            said = {"kind": "Status", "apiVersion": "v1", "status": "Success", "details": details}
            return reply.send(200, _bytes(said))
        change = self.store.patch if verb == "patch" else self.store.update
        reply.send(200, change(known, ns, name[0], body, sub, dry_run).data)

    def _check_right(self, verb: str, known: Resource, ns: str, name: str, sub: str) -> None:
        if (verb, known.name, sub) not in self._denied:
            return
        what = f'{known.full} "{name}"' if name else known.full
        said = f'{what} is forbidden: User "{self.user}" cannot {verb} resource'
        said += f' "{known.name}{"/" * bool(sub)}{sub}" in API group "{known.group}"'
        said += f' in the namespace "{ns}"' if ns else " at the cluster scope"
        details: Any = {"name": name, "group": known.group, "kind": known.name}
        raise Refused(403, "Forbidden", said, **details)

    def _review_access(self, request: Request, reply: Reply) -> None:
        asked = json.loads(request.body)
        of = asked["spec"]["resourceAttributes"]
        denied = (of["verb"], of["resource"], of.get("subresource", "")) in self._denied
        reply.send(201, _bytes({**asked, "status": {"allowed": not denied}}))

    # Lists and watches.

    def _list(self, known: Resource, ns: str, request: Request, reply: Reply) -> None:
        limit = int(request.query.get("limit") or 0)
        with self.store.changed:
            snapshot, start = self._page(known, ns, request)
            end = start + limit if limit else len(snapshot.items)
            page, left = snapshot.items[start:end], len(snapshot.items) - end
            meta: Json = {"resourceVersion": str(snapshot.version)}
            if left > 0:
                key = json.dumps({"of": id(snapshot), "v": snapshot.version, "start": end})
                meta["continue"] = base64.urlsafe_b64encode(key.encode()).decode()
                self.store.snapshots[f"{id(snapshot)}"] = snapshot
                if "labelSelector" not in request.query and "fieldSelector" not in request.query:
                    meta["remainingItemCount"] = left
        is_partial = "PartialObjectMetadata" in request.headers.get("accept", "")
        kind, version = f"{known.kind}List", known.api_version
        if is_partial:
            kind, version = "PartialObjectMetadataList", "meta.k8s.io/v1"
        items = [_partial(item.obj) if is_partial else item.in_list for item in page]
        head = _bytes({"kind": kind, "apiVersion": version, "metadata": meta})[:-1]
        body = b"[" + b",".join(items) + b"]"
        if is_partial and not items:
            body = b"null"  # as a real server says it
        reply.send(200, head + b',"items":' + body + b"}")

    def _page(self, known: Resource, ns: str, request: Request) -> tuple[Snapshot, int]:
        token = request.query.get("continue", "")
        if not token:
            is_meant = _selection(known, request)
            items = [item for item in self.store.all(known.name, ns) if is_meant(item.obj)]
            return Snapshot(self.store.version, items), 0
        try:
            key = json.loads(base64.urlsafe_b64decode(token))
        except ValueError as error:
            said = "invalid continue token: continue key is not valid"
            raise Refused(400, "BadRequest", said) from error
        snapshot = self.store.snapshots.get(f"{key['of']}")
        if snapshot is None or self.store.version - snapshot.version > self.store.window:
            said = "The provided continue parameter is too old to display a consistent list result."
            raise Refused(410, "Expired", said)
        return snapshot, key["start"]

    def _watch(self, known: Resource, ns: str, request: Request, reply: Reply) -> None:
        is_meant = _selection(known, request)
        is_partial = "PartialObjectMetadata" in request.headers.get("accept", "")
        wants_bookmarks = request.query.get("allowWatchBookmarks") in ("1", "true")
        ends = monotonic() + float(request.query.get("timeoutSeconds") or 1800)
        store = self.store
        seen = int(request.query.get("resourceVersion") or 0)
        reply.stream(200)
        try:
            if seen == 0:
                with store.changed:
                    seen, items = store.version, store.all(known.name, ns)
                for item in items:
                    if is_meant(item.obj):
                        reply.chunk(_event("ADDED", item, is_partial))
            marked = seen
            while monotonic() < ends and not store.is_closed and not reply.is_gone():
                with store.changed:
                    if store.version <= seen:
                        wait = min(self.bookmark_s, ends - monotonic())
                        store.changed.wait(max(wait, 0.001))
                    now, changes = store.version, list(store.since(seen, known.name, ns))
                for change in changes:
                    reply.chunk(_told(change, is_meant, is_partial))
                if wants_bookmarks and not changes and now > marked:
                    reply.chunk(_bookmark(known, now))
                    marked = now
                seen = max(seen, now)
            if wants_bookmarks:
                reply.chunk(_bookmark(known, seen))
        except Refused as no:
            said = status_body(no.code, no.reason, no.message)
            reply.chunk(b'{"type":"ERROR","object":' + said + b"}\n")
        reply.end()

    # Pods that say and do something.

    def _log(self, pod: str, ns: str, request: Request, reply: Reply) -> None:
        def phase() -> str:
            item = self.store.get("pods", ns, pod)
            return item.obj["status"]["phase"] if item else "gone"

        self.store.need("pods", ns, pod)
        if phase() == "Pending":
            said = f'container "main" in pod "{pod}" is waiting to start: ContainerCreating'
            raise Refused(400, "BadRequest", said)
        text = self.logs.get(pod, b"")
        start = 0
        if "tailLines" in request.query:
            lines = text.splitlines(keepends=True)
            start = len(text) - len(b"".join(lines[-int(request.query["tailLines"]) :]))
        if request.query.get("follow") not in ("1", "true"):
            return reply.send(200, text[start:], {"Content-Type": "text/plain"})
        reply.stream(200, {"Content-Type": "text/plain"})
        while True:
            with self.store.changed:
                ended = phase() != "Running" or self.store.is_closed or reply.is_gone()
                text = self.logs.get(pod, b"")
                if len(text) <= start and not ended:
                    self.store.changed.wait(0.25)
                    continue
            reply.chunk(text[start:])
            start = max(start, len(text))
            if ended:
                return reply.end()

    def _exec(self, pod: str, ns: str, request: Request, reply: Reply) -> None:
        """A command in a pod, over a WebSocket: channel 1 is its output, 2 errors, 3 its end."""
        item = self.store.need("pods", ns, pod)
        if item.obj["status"]["phase"] != "Running":
            said = f"cannot exec in a stopped container; current phase is {item.obj['status']}"
            raise Refused(400, "BadRequest", said)
        words = parse_qsl(urlsplit(request.target).query, keep_blank_values=True)
        command = [value for key, value in words if key == "command"]
        key = request.headers["sec-websocket-key"] + WEBSOCKET
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        asked = request.headers.get("sec-websocket-protocol", "").split(",")[0].strip()
        reply.raw(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: {asked}\r\n\r\n".encode()
        )
        if ("stdin", "true") in words:
            stdout, stderr, code = self.takes(pod, command, _stdin(reply.connection))
        else:
            stdout, stderr, code = self.execs(pod, command)
        for chunk in stdout:
            reply.raw(_frame(b"\x01" + chunk))
        if stderr:
            reply.raw(_frame(b"\x02" + stderr))
        reply.raw(_frame(b"\x03" + _exit_status(code)))
        reply.raw(_frame(struct.pack(">H", 1000), opcode=8))
        raise HungUp


def _stdin(connection: socket.socket) -> Iterator[bytes]:
    """What a client sends on channel 0, a frame at a time, until it closes or goes."""

    def read(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = connection.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    with contextlib.suppress(EOFError, OSError):
        while True:
            opcode, size = read(1)[0] & 15, read(1)[0] & 127
            if size > 125:
                size = int.from_bytes(read(2 if size == 126 else 8), "big")
            mask = int.from_bytes(read(4) * (-(-size // 4)), "big")
            padded = read(size) + bytes(-size % 4)
            plain = (int.from_bytes(padded, "big") ^ mask).to_bytes(len(padded), "big")[:size]
            if opcode == 8:
                return
            if opcode == 2 and plain[:1] == b"\0":
                yield plain[1:]


def _exit_status(code: int) -> bytes:
    if not code:
        return _bytes({"metadata": {}, "status": "Success"})
    said = f"command terminated with non-zero exit code: exit status {code}"
    causes = [{"reason": "ExitCode", "message": str(code)}]
    no = {"metadata": {}, "status": "Failure", "message": said, "reason": "NonZeroExitCode"}
    return _bytes({**no, "details": {"causes": causes}})


def _frame(payload: bytes, opcode: int = 2) -> bytes:
    size = len(payload)
    if size < 126:
        head = struct.pack(">BB", 0x80 | opcode, size)
    elif size < 1 << 16:
        head = struct.pack(">BBH", 0x80 | opcode, 126, size)
    else:
        head = struct.pack(">BBQ", 0x80 | opcode, 127, size)
    return head + payload


def _selection(known: Resource, request: Request) -> Callable[[Json], bool]:
    labels = label_selector(request.query.get("labelSelector", ""))
    fields = field_selector(known, request.query.get("fieldSelector", ""))
    return lambda obj: labels(obj) and fields(obj)


def _told(change: Change, is_meant: Callable[[Json], bool], is_partial: bool) -> bytes:
    """The event that a watch with a selector gets for a change; b"" for none."""
    was = change.before is not None and is_meant(change.before.obj)
    is_now = change.after is not None and is_meant(change.after.obj)
    if is_now and change.after is not None:
        return _event("MODIFIED" if was else "ADDED", change.after, is_partial)
    if was and change.before is not None:
        meta = {**change.before.obj["metadata"], "resourceVersion": str(change.version)}
        last = {**change.before.obj, "metadata": meta}
        return _event("DELETED", Item(last, _bytes(last)), is_partial)
    return b""


def _event(kind: str, item: Item, is_partial: bool) -> bytes:
    data = _partial(item.obj) if is_partial else item.data
    return b'{"type":"%b","object":%b}\n' % (kind.encode(), data)


def _bookmark(known: Resource, version: int) -> bytes:
    meta = {"resourceVersion": str(version), "creationTimestamp": None}
    obj = {"kind": known.kind, "apiVersion": known.api_version, "metadata": meta}
    return _bytes({"type": "BOOKMARK", "object": obj}) + b"\n"


def _partial(obj: Json) -> bytes:
    head = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
    return _bytes({**head, "metadata": obj["metadata"]})


def _as_asked(item: Item, request: Request) -> bytes:
    is_partial = "PartialObjectMetadata" in request.headers.get("accept", "")
    return _partial(item.obj) if is_partial else item.data


def _decoded(known: Resource, request: Request) -> Json:
    """The body as an object of the kind that the path names."""
    if not request.body:
        return {}
    kind = request.headers.get("content-type", "application/json").split(";")[0]
    patch = request.method == "PATCH"
    if kind != ("application/merge-patch+json" if patch else "application/json"):
        raise Refused(415, "UnsupportedMediaType", f"the body of the request was in {kind}")
    try:
        body = json.loads(request.body)
    except ValueError as error:
        said = f"the object provided is unrecognized (must be of type {known.kind}): {error}"
        raise Refused(
            400, "BadRequest", f"error decoding patch: {error}" if patch else said
        ) from error
    if request.method in ("POST", "PUT") and body.get("kind", known.kind) != known.kind:
        said = f'{body["kind"]} in version "v1" cannot be handled as a {known.kind}'
        raise Refused(400, "BadRequest", f"{said}: unknown conversion")
    return body


def _api_group(name: str) -> Json:
    versions = [{"groupVersion": f"{name}/{v}", "version": v} for v in ("v1beta2", "v1beta1")]
    preferred = {"preferredVersion": versions[0]}
    return {"kind": "APIGroup", "apiVersion": "v1", "name": name, "versions": versions, **preferred}


def _no_page(reply: Reply) -> None:
    reply.send(404, b"404 page not found\n", {"Content-Type": "text/plain; charset=utf-8"})


def _bytes(obj: Json) -> bytes:
    return json.dumps(obj, separators=(",", ":")).encode()
