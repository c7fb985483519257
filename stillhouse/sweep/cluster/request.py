"""Define the API resources in use, and `Ask`: one request and how its answer is handled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stillhouse.sweep.cluster.errors import ApiError, Json

ANSWER_S = 70.0  # a server gives up a request after 60 s by itself
JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
PARTIAL = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
KUEUE, VISIBILITY = "kueue.x-k8s.io", "visibility.kueue.x-k8s.io"
QUEUES, PENDING = ("workloads", "localqueues"), "pendingworkloads"
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
    is_patient: bool = True  # 429 and 5xx are waited out
    retry: Callable[[ApiError], bool] = never  # and these too
    still: Callable[[], bool] | None = None  # whether it is still wanted, asked after a wait
    read_s: float | None = ANSWER_S
    is_stream: bool = False


def query(**words: object) -> Json:
    """The query's parameters without empty values."""
    return {key: value for key, value in words.items() if value != ""}
