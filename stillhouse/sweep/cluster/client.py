"""Send requests to the Kubernetes API server, and retry them until they have a final answer.

429, 5xx and dropped connections are waited out, in growing pauses, until `stop` is set. So an
attempt whose answer was lost may have done a write, and callers write such that this does not
matter.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from stillhouse.errors import ConfigError, Interrupted
from stillhouse.sweep.cluster import errors
from stillhouse.sweep.cluster.errors import ApiError, Json, Watched
from stillhouse.sweep.cluster.exec import run
from stillhouse.sweep.cluster.login import Login

CONNECT_S = 10.0
DICE = random.Random()  # not the process's own: its state is others' business
WAKES_S = 30.0  # a server that just came back denies all until it has read who may do what


class Cluster:
    """One namespace of one cluster. Thread-safe. `trouble`: why requests are being retried now."""

    def __init__(self, login: Login, namespace: str) -> None:
        self.context, self.server, self.namespace = login.context, login.server, namespace
        self.user, self.version = "", ""
        self.requests = 0  # attempts, all of them
        self.trouble = ""  # "" where the last request had its answer
        self.stop = threading.Event()  # set: no attempt after the first one, but Interrupted
        self.first_delay_s, self.longest_delay_s = 0.2, 30.0
        self._login = login
        self._awake_at = -math.inf  # until then a server that came back may still be waking up
        self._login_lock, self._lock = threading.Lock(), threading.Lock()
        self.gives_up_at = math.inf  # monotonic; until then `connect` waits for a first answer
        self._streams = errors.Streams()
        self._kueue: str | None = None  # the version of its API; "" where there is none

    # Any object.

    def path(self, resource: str, name: str | None = None, sub: str | None = None) -> str:
        """Where a resource is served; for Kueue's, the first call asks which version there is."""
        is_queue = resource in QUEUES
        api = f"/apis/{KUEUE}/{self.kueue() or 'v1beta2'}" if is_queue else API[resource]
        parts = [] if resource in NOT_IN_A_NAMESPACE else ["namespaces", self.namespace]
        return "/".join([api, *parts, resource, *filter(None, (name, sub))])

    def read(self, resource: str, name: str) -> Json | None:
        """The object, or None where there is none."""
        return self._unless_missing(Ask("GET", self.path(resource, name)))

    def create(
        self, resource: str, body: Json, dry_run: bool = False,
        still: Callable[[], bool] | None = None,
    ) -> Json:  # fmt: skip
        """The object as the server filled it in. A dry run is checked strictly and keeps nothing.

        Args:
            still: asked before every attempt but the first whether the object is still wanted.

        Raises:
            ApiError: 409 where the name is taken, perhaps by an attempt of this very call; 403 over
                quota, where the name may be taken too; 400 and 422 for what no server accepts; 0
                "Abandoned" where it is not wanted any more.
        """
        how = {"dryRun": "All", "fieldValidation": "Strict"} if dry_run else {}
        path, retry = self.path(resource), errors.is_contention
        return self._json(Ask("POST", path, how, body, retry=retry, still=still))

    def patch(self, resource: str, name: str, merge: Json, sub: str | None = None) -> Json | None:
        """The object after a JSON merge patch, or None where there is none.

        Raises:
            ApiError: 409 where the patch names a resourceVersion that is no longer the object's.
        """
        is_careful = "resourceVersion" in merge.get("metadata", {})
        retry = never if is_careful else errors.is_contention
        path = self.path(resource, name, sub)
        return self._unless_missing(Ask("PATCH", path, {}, merge, MERGE_PATCH, retry=retry))

    def replace(self, resource: str, name: str, body: Json) -> Json:
        """The object after it was replaced; `body` carries the resourceVersion that it replaces.

        Raises:
            ApiError: 409 where the object is another by now, perhaps by an attempt of this call.
        """
        return self._json(Ask("PUT", self.path(resource, name), {}, body))

    def delete(
        self, resource: str, name: str, uid: str | None = None, grace_s: int | None = None,
        foreground: bool = False,
    ) -> bool:  # fmt: skip
        """Delete an object and what it owns: before it (it stays until then), or after.

        Returns:
            False where it was gone (perhaps by an attempt of this call) or has another uid.
        """
        body: Json = {"apiVersion": "v1", "kind": "DeleteOptions"}
        body["propagationPolicy"] = "Foreground" if foreground else "Background"
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        path = self.path(resource, name)
        try:
            self._json(Ask("DELETE", path, {}, body, retry=errors.is_contention))
        except ApiError as no:
            if no.status == 404 or (no.status == 409 and "precondition" in no.message):
                return False
            raise
        return True

    def pages(
        self, resource: str, selector: str = "", limit: int = 500, metadata_only: bool = False,
        fields: str = "",
    ) -> Iterator[tuple[list[Json], str]]:  # fmt: skip
        """A consistent list, page by page, each with the resourceVersion of the whole.

        Raises:
            Gone: reading it took longer than the server keeps its history.
        """
        words = query(labelSelector=selector, fieldSelector=fields, limit=limit)
        path, accept = self.path(resource), PARTIAL if metadata_only else JSON
        while True:
            page = self._json(Ask("GET", path, words, accept=accept))
            yield page["items"] or [], page["metadata"]["resourceVersion"]
            token = page["metadata"].get("continue")
            if not token:
                return
            words = words | {"continue": token}

    def watch(
        self, resource: str, selector: str, version: str, timeout_s: float, fields: str = ""
    ) -> Iterator[Watched]:
        """What changes after `version`, as it happens, and bookmarks.

        Ends after `timeout_s` (whole seconds, at least 1), by `close`, or when its connection does;
        the next one goes on from the last resourceVersion seen, a bookmark's included.

        Raises:
            Gone: the server no longer has that history, or lost its way: list again.
        """
        timeout = max(1, math.ceil(timeout_s))
        words = query(
            watch="1", allowWatchBookmarks="true", timeoutSeconds=timeout, resourceVersion=version,
            labelSelector=selector, fieldSelector=fields,
        )  # fmt: skip
        ask = Ask("GET", self.path(resource), words, read_s=timeout + 15.0, is_stream=True)
        with self._stream(ask) as pieces:
            for line in errors.lines(pieces):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise errors.refusal(410, json.dumps(event["object"]).encode())
                yield Watched(event["type"], event["object"])

    def may(self, verb: str, resource: str, group: str = "", sub: str | None = None) -> bool:
        """Whether we have a right in this namespace."""
        of = {"namespace": self.namespace, "verb": verb, "resource": resource, "group": group}
        spec = {"resourceAttributes": of | ({"subresource": sub} if sub else {})}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        answer = self.create("selfsubjectaccessreviews", review | {"spec": spec})
        return bool(answer["status"]["allowed"])

    def kueue(self) -> str | None:
        """The version of Kueue's API that is served; None without Kueue."""
        if self._kueue is None:
            found = self._unless_missing(Ask("GET", f"/apis/{KUEUE}"))
            self._kueue = found["preferredVersion"]["version"] if found else ""
        return self._kueue or None

    # Pods.

    def log(self, pod: str, follow: bool = False, tail: int | None = None) -> Iterator[bytes]:
        """What a pod said, in pieces as they come; ends with the pod, or with the connection.

        Raises:
            ApiError: 400 while it has not started, 404 when it is gone.
        """
        words = query(follow="true" if follow else "", tailLines="" if tail is None else tail)
        ask = Ask("GET", self.path("pods", pod, "log"), words, is_stream=True)
        with self._stream(replace(ask, read_s=None) if follow else ask) as pieces:
            yield from pieces

    def exec(
        self, pod: str, command: list[str], stdin: Iterable[bytes] | None = None
    ) -> Iterator[bytes]:
        """What a command in a pod writes to stdout, in pieces as they come. Never tried twice.

        Raises:
            CommandFailed: it ended with another code than 0.
            ApiError: no such pod, no right to it, or the connection ended before the command did.
        """
        with self._lock:
            self.requests += 1
        path = self.path("pods", pod, "exec")
        yield from run(self._login, self._streams, path, command, stdin)

    def close(self) -> None:
        """Set `stop` and end every open stream, whoever reads it."""
        self.stop.set()
        self._streams.end()

    # Inside.

    def introduction(self) -> tuple[str, str]:
        """The version of Kubernetes and our user name there; fills in both attributes."""
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        self.version = self._json(Ask("GET", "/version"))["gitVersion"]
        self.user = self.create("selfsubjectreviews", review)["status"]["userInfo"]["username"]
        return self.version, self.user

    def _json(self, ask: Ask) -> Json:
        return json.loads(self._send(ask).data)

    def _unless_missing(self, ask: Ask) -> Json | None:
        try:
            return self._json(ask)
        except ApiError as no:
            if no.status == 404:
                return None
            raise

    def _send(self, ask: Ask) -> Any:
        """urllib3's response, of the 200s, after as many attempts as that takes.

        Raises:
            ApiError: any other final answer; or no answer for as long as `connect` waits.
            Interrupted: `stop` is set and there was no final answer yet.
            ConfigError: the login ran out and a new one was refused too.
        """
        headers = {"Accept": ask.accept}
        body = None
        if ask.body is not None:
            headers["Content-Type"] = ask.kind
            body = json.dumps(ask.body, separators=(",", ":")).encode()
        path = f"{ask.path}?{urlencode(ask.query)}" if ask.query else ask.path
        attempt, refused = 0, 0
        while True:
            login, after_s = self._login, 0.0
            answer, no = self._attempt(login, ask, path, headers, body)
            if answer is not None:
                if no is None:
                    self.trouble = ""
                    return answer
                if no.status == 401 and not refused:
                    refused += 1
                    self._log_in_again(login)
                    continue
                if no.status == 401:
                    raise ConfigError(f"{login}: login expired; {login.how()}")
                is_passing = no.status >= 500 or no.status == 429 or ask.retry(no)
                is_passing |= errors.is_denied(no) and time.monotonic() < self._awake_at
                if not is_passing:
                    self.trouble = ""
                    raise no
                after_s = errors.seconds(answer.headers.get("Retry-After", ""))
            assert no is not None
            self._wait(no, attempt, after_s)
            if ask.still is not None and not ask.still():
                raise ApiError(0, "Abandoned", self.trouble)
            attempt += 1

    def _attempt(
        self, login: Login, ask: Ask, path: str, headers: dict[str, str], body: bytes | None
    ) -> tuple[Any, ApiError | None]:
        """(the response, if any, and what is wrong with it, if anything)."""
        from urllib3 import Timeout
        from urllib3.exceptions import HTTPError, SSLError

        connect_s, read_s = CONNECT_S, ask.read_s
        if self.gives_up_at < math.inf:  # a person waits
            connect_s = read_s = min(CONNECT_S, max(0.1, self.gives_up_at - time.monotonic()))
        with self._lock:
            self.requests += 1
        try:
            answer = login.pool.urlopen(
                ask.method, login.prefix + path, body=body, headers=headers | login.headers(),
                timeout=Timeout(connect=connect_s, read=read_s), retries=False, redirect=False,
                assert_same_host=False, preload_content=not ask.is_stream,
            )  # fmt: skip
            if 200 <= answer.status < 300:
                return answer, None
            return answer, errors.refusal(answer.status, answer.data)
        except HTTPError as error:
            no = ApiError(0, type(error).__name__, errors.in_words(error))
            if isinstance(error, SSLError) and self.gives_up_at < math.inf:
                raise no from error  # a certificate does not get better by waiting
            return None, no

    def _wait(self, no: ApiError, attempt: int, after_s: float) -> None:
        """Pause before the next attempt: as long as the server asks, plus a growing delay."""
        growing_s = min(self.longest_delay_s, self.first_delay_s * 2 ** min(attempt, 20))
        delay_s = after_s + DICE.uniform(growing_s / 2, growing_s)
        self.trouble = f"{no.status} {no.message}" if no.status else no.message
        if no.status == 0:
            self._awake_at = time.monotonic() + delay_s + WAKES_S
        if time.monotonic() + delay_s > self.gives_up_at:
            raise ApiError(0, no.reason, self.trouble)
        if self.stop.wait(delay_s):
            raise Interrupted(f"asked to stop while {self.server} was in trouble: {self.trouble}")

    def _log_in_again(self, refused: Login) -> None:
        """Tokens run out: read the kubeconfig anew, once for all threads that were refused."""
        with self._login_lock:
            if self._login is refused:
                self._login = refused.again()

    @contextlib.contextmanager
    def _stream(self, ask: Ask) -> Generator[Iterator[bytes], None, None]:
        with self._streams.kept(self._send(ask)) as answer:
            yield errors.chunks(answer)


ANSWER_S = 70.0  # a server gives up a request after 60 s by itself
JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
PARTIAL = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
KUEUE, QUEUES = "kueue.x-k8s.io", ("workloads", "localqueues")
API = {
    "jobs": "/apis/batch/v1",
    "selfsubjectaccessreviews": "/apis/authorization.k8s.io/v1",
    "selfsubjectreviews": "/apis/authentication.k8s.io/v1",
} | dict.fromkeys(
    ("pods", "configmaps", "events", "persistentvolumeclaims", "serviceaccounts", "namespaces",
     "resourcequotas"), "/api/v1"
)  # fmt: skip
NOT_IN_A_NAMESPACE = ("namespaces", "selfsubjectaccessreviews", "selfsubjectreviews")


def never(no: ApiError) -> bool:
    return False


@dataclass(frozen=True)
class Ask:
    """One request, and how its answer is handled."""

    method: str
    path: str
    query: Json = field(default_factory=dict[str, Any])
    body: Json | None = None
    kind: str = JSON
    accept: str = JSON
    retry: Callable[[ApiError], bool] = never  # waited out, as 429 and 5xx are
    still: Callable[[], bool] | None = None  # whether it is still wanted, asked after a wait
    read_s: float | None = ANSWER_S
    is_stream: bool = False


def query(**words: object) -> Json:
    """The query's parameters without empty values."""
    return {key: value for key, value in words.items() if value != ""}
