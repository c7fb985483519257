"""Call an API server as its administrator, in plain JSON."""

from __future__ import annotations

import functools
import json
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

Json = dict[str, Any]

HOOKS = "/apis/admissionregistration.k8s.io/v1"
QUEUES = "/apis/kueue.x-k8s.io/v1beta2"
PATHS = {  # where the API keeps the kinds that tests make; {}: of a namespace
    "Namespace": "/api/v1/namespaces",
    "Node": "/api/v1/nodes",
    "PersistentVolume": "/api/v1/persistentvolumes",
    "PersistentVolumeClaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Secret": "/api/v1/namespaces/{}/secrets",
    "Service": "/api/v1/namespaces/{}/services",
    "Pod": "/api/v1/namespaces/{}/pods",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "PriorityClass": "/apis/scheduling.k8s.io/v1/priorityclasses",
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    "MutatingWebhookConfiguration": f"{HOOKS}/mutatingwebhookconfigurations",
    "ValidatingWebhookConfiguration": f"{HOOKS}/validatingwebhookconfigurations",
    "Stage": "/apis/kwok.x-k8s.io/v1alpha1/stages",
    "ResourceFlavor": f"{QUEUES}/resourceflavors",
    "ClusterQueue": f"{QUEUES}/clusterqueues",
    "LocalQueue": f"{QUEUES}/namespaces/{{}}/localqueues",
    "WorkloadPriorityClass": f"{QUEUES}/workloadpriorityclasses",
}


class Refused(Exception):
    """The API server's answer where it is not 2xx."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text


class Api:
    """The API of the server at `url`, for whoever `keys`/admin.crt is."""

    def __init__(self, url: str, keys: Path) -> None:
        self.url = url
        self.keys = keys

    @functools.cached_property
    def opener(self) -> urllib.request.OpenerDirector:
        tls = ssl.create_default_context(cafile=self.keys / "ca.crt")
        tls.load_cert_chain(self.keys / "admin.crt", self.keys / "admin.key")
        handlers = (urllib.request.HTTPSHandler(context=tls), urllib.request.ProxyHandler({}))
        return urllib.request.build_opener(*handlers)

    def call(
        self, method: str, path: str, body: Json | bytes | None = None, kind: str = "json"
    ) -> Any:
        """The answer, parsed where it is JSON. `kind` of body: json, yaml, merge-patch+json, ...

        Raises Refused where the answer is not 2xx, OSError where there is none.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": f"application/{kind}"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with self.opener.open(request, timeout=30) as answer:
                text = answer.read().decode()
                is_json = answer.headers.get_content_subtype() == "json"
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(error.code, error.read().decode(errors="replace")) from None
        return json.loads(text) if is_json else text

    def create(self, *objects: Json) -> list[Json]:
        """Makes objects, of the kinds in PATHS; each says its namespace where its kind has one."""
        paths = [PATHS[o["kind"]].format(o["metadata"].get("namespace")) for o in objects]
        return [self.call("POST", path, o) for path, o in zip(paths, objects, strict=True)]
