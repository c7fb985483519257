"""Log in to a Kubernetes cluster; the only module that imports `kubernetes`.

The official client reads kubeconfigs, renews logins and handles TLS. Above its connection pool
(`client.py`) everything is plain dicts and bytes: its models cost more time than a server's answer.
"""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from stillhouse.errors import ConfigError, nearest
from stillhouse.sweep.cluster.client import Cluster
from stillhouse.sweep.cluster.errors import ApiError, Gone, Json, Watched, in_words
from stillhouse.sweep.cluster.exec import CommandFailed
from stillhouse.sweep.cluster.login import Login, error_lines

__all__ = ["ApiError", "Cluster", "CommandFailed", "Gone", "Watched", "connect"]

OLDEST = (1, 31)  # pod failure policies are stable from here on
PATIENCE_S = 10.0  # for a person who waits
PATIENCE_IN_POD_S = 300.0  # a driver in the cluster may start while its API server restarts
CONNECTIONS = 64
POD_IDENTITY = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ODD = (
    TypeError,
    AttributeError,
    LookupError,
)  # how the official client meets YAML of another shape
THIS_MACHINE = r"localhost$|127\.|::1$"


def connect(context: str | None, namespace: str | None, patience_s: float | None = None) -> Cluster:
    """The cluster of a kubeconfig's context, or the one that this pod runs in.

    Args:
        context: None is the kubeconfig's current one; in a pod without kubeconfig it means nothing.
        namespace: None is the context's, or the pod's.
        patience_s: how long a server may take to answer at all; 10 seconds, in a pod 300.

    Raises:
        ConfigError: no kubeconfig, no such context, nobody answers, login refused, server too old.
    """
    login = _log_in(context)
    cluster = Cluster(login, namespace or login.namespace)
    patience_s = patience_s or (PATIENCE_IN_POD_S if login.is_pod else PATIENCE_S)
    cluster.gives_up_at = time.monotonic() + patience_s
    try:
        version, _ = cluster.introduction()
    except ApiError as no:
        said, todo = "gives no answer", "is the address right, the VPN up, the server there?"
        if no.status in (401, 403):
            said, todo = "does not know us", login.how()
        raise ConfigError(f"{login} {said}: {no.message}; {todo}") from no
    except (ValueError, KeyError, TypeError) as error:
        said = "does not answer as Kubernetes does; is the address right?"
        raise ConfigError(f"{login} {said}") from error
    numbers = re.match(r"v(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST:
        raise ConfigError(
            f"{login} is Kubernetes {version}; the oldest that keeps what is promised here is"
            f" {OLDEST[0]}.{OLDEST[1]}: set another kube_context, or ask for an upgrade"
        )
    cluster.gives_up_at = math.inf
    return cluster


def _log_in(context: str | None) -> Login:
    """Read the kubeconfig, or the identity that a pod was given.

    Raises:
        ConfigError: there is neither, or what is there cannot be used.
    """
    from kubernetes.config import ConfigException
    from yaml import YAMLError

    paths = os.environ.get("KUBECONFIG") or "~/.kube/config"
    files = [Path(part).expanduser() for part in paths.split(os.pathsep) if part]
    files = [file for file in files if file.is_file()]
    where = ", ".join(map(str, files)) or str(POD_IDENTITY)
    try:
        if files:
            return _from_kubeconfig(files, where, context)
        if "KUBERNETES_SERVICE_HOST" in os.environ and (POD_IDENTITY / "token").is_file():
            return _from_pod()
    except (ConfigException, YAMLError, OSError, ValueError, *ODD) as error:
        why = "it is YAML, but no kubeconfig" if isinstance(error, ODD) else in_words(error)
        raise ConfigError(
            f"{where} is no way to log in: {why}; `kubectl config view` says whether kubectl can"
            " read it, and KUBECONFIG names another file"
        ) from error
    raise ConfigError(
        f"no kubeconfig: {paths} is not there; ask whoever runs the cluster for one and put it"
        " there, or set KUBECONFIG to where it is"
    )


def _from_kubeconfig(files: list[Path], where: str, context: str | None) -> Login:
    from kubernetes.client import Configuration
    from kubernetes.config import kube_config

    merger = cast(Any, kube_config).KubeConfigMerger(os.pathsep.join(map(str, files)))
    said: Json = merger.config.value
    names: list[str] = [entry.value["name"] for entry in said["contexts"]]
    name = context or said.get("current-context") or ""
    if name not in names:
        lacks = f'no context "{name}"' if name else "no current context"
        raise ConfigError(
            f"{where} has {lacks}; it has {', '.join(names) or 'none'}.{nearest(name, names)}"
            " Set site.kube_context to one of them (null: the current one)"
        )
    loader = cast(Any, kube_config).KubeConfigLoader(
        merger.config, name, config_base_path=None, config_persister=merger.save_changes
    )
    configuration = Configuration()
    with error_lines() as lines:  # that a login command failed is said nowhere else
        loader.load_and_set(configuration)
    facts: Json = loader.current_context["context"]
    users: list[Json] = [entry.value for entry in said["users"]]
    user: Json = next((u["user"] for u in users if u["name"] == facts.get("user")), None) or {}
    plugin: Json = user.get("exec") or {}
    command = plugin.get("command")
    if command and not (hasattr(loader, "token") or getattr(loader, "cert_file", None)):
        why = in_words(" ".join(lines)) or "it gave neither token nor certificate"
        raise ConfigError(
            f'context "{name}" of {where} logs in with "{command}", which failed: {why}; run it by'
            " hand, log in, then run the same line"
        )
    return _login(configuration, name, facts.get("namespace") or "default")


def _from_pod() -> Login:
    from kubernetes.client import Configuration
    from kubernetes.config import incluster_config

    files = {"token_filename": "token", "cert_filename": "ca.crt"}
    paths = {key: str(POD_IDENTITY / name) for key, name in files.items()}
    configuration = Configuration()
    cast(Any, incluster_config).InClusterConfigLoader(**paths).load_and_set(configuration)
    namespace = (POD_IDENTITY / "namespace").read_text().strip()
    return _login(configuration, "", namespace, is_pod=True)


def _login(configuration: Any, context: str, namespace: str, is_pod: bool = False) -> Login:
    from kubernetes.client.rest import RESTClientObject
    from kubernetes.stream import ws_client

    configuration.connection_pool_maxsize = CONNECTIONS
    configuration.keep_alive = True  # or a watch through a forgetful router hangs for ever
    server: str = configuration.host
    parts = urlsplit(server)
    if re.match(THIS_MACHINE, parts.hostname or ""):
        configuration.proxy = None  # as kubectl: nobody proxies to the machine itself
    pool = RESTClientObject(configuration).pool_manager.connection_from_url(server)
    is_relayed = parts.scheme == "http" and pool.proxy is not None  # then a proxy reads whole URLs
    return Login(
        configuration, pool, server if is_relayed else parts.path, context, namespace, is_pod,
        again=lambda: _log_in(context or None),
        open_socket=cast(Any, ws_client).create_websocket,
    )  # fmt: skip
