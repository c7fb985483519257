"""Run the checks that hold for the fake API server against a real one."""

from __future__ import annotations

import base64
import contextlib
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import stillhouse
from stillhouse.errors import ConfigError
from stillhouse.sweep.cluster.connect import ApiError, Cluster, CommandFailed, connect
from tests import api_behaviour
from tests.cluster.cluster import Kubernetes, until
from tests.cluster.kueue import OBSERVABILITY

pytestmark = pytest.mark.cluster

PACKAGE = Path(stillhouse.__file__).parent


@pytest.fixture
def cluster(kube: Kubernetes, request, monkeypatch) -> Iterator[Cluster]:
    """A client on a namespace of this test's own."""
    name = "api-" + f"{zlib.crc32(request.node.name.encode()):08x}"
    kube.namespace(name, volumes=False)
    monkeypatch.setenv("KUBECONFIG", str(kube.kubeconfig_in(name)))
    made = connect(None, None)
    yield made
    made.close()


@pytest.mark.parametrize("check", api_behaviour.ALL, ids=lambda check: check.__name__)
def test_a_real_server_does_what_the_fake_does(check: Callable[[Cluster], None], cluster: Cluster):
    check(cluster)


def test_a_real_server_names_the_right_that_lacks(kube: Kubernetes, cluster: Cluster, monkeypatch):
    account = kube.kubeconfig_for(cluster.namespace, "stillhouse-worker")
    monkeypatch.setenv("KUBECONFIG", str(account))
    nobody = connect(None, None)
    assert nobody.user == f"system:serviceaccount:{cluster.namespace}:stillhouse-worker"
    api_behaviour.who_lacks_a_right_is_told_which(nobody)


def test_a_real_server_keeps_to_a_quota(kube: Kubernetes, cluster: Cluster):
    kube.kubectl("create", "quota", "one", "--hard=count/jobs.batch=1", "-n", cluster.namespace)

    def is_counted() -> bool:
        return "used" in (cluster.read("resourcequotas", "one") or {}).get("status", {})

    until("the quota is counted", is_counted)
    api_behaviour.beyond_the_quota_is_forbidden(cluster)
    assert api_behaviour.listed(cluster, "jobs") == ["first"]


@pytest.mark.parametrize("how", api_behaviour.JOBS)
def test_jobs_and_pods_stand_on_a_real_server_as_on_the_fake(
    how: str, kube: Kubernetes, cluster: Cluster
):
    behaves = {
        "complete": {"message": "done"},
        "poison": {"exit_code": 42, "message": "bad"},
        "spent": {"exit_code": 1},
        "out-of-memory": {"exit_code": 137, "reason": "OOMKilled"},
        "no-image": {"waiting": True, "message": "Back-off"},
    }.get(how, {"forever": True})

    def act(how: str) -> None:
        if how not in ("evicted", "put-to-sleep"):
            return

        def running() -> list[str]:
            pages = cluster.pages("pods", fields="status.phase=Running")
            return [pod["metadata"]["name"] for pods, _ in pages for pod in pods]

        until("its pod runs", running)
        if how == "put-to-sleep":
            cluster.patch("jobs", how, {"spec": {"suspend": True}})
            return
        pod = {"name": running()[0], "namespace": cluster.namespace}
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": pod}
        kube.call("POST", cluster.path("pods", pod["name"], "eviction"), eviction)

    with kube.behave(namespace=cluster.namespace, **behaves):
        api_behaviour.a_job_comes_to_stand(cluster, how, act)
    assert how in api_behaviour.listed(cluster, "jobs")


def test_workloads_of_a_real_kueue_stand_as_those_of_the_fake(kube_kueue: Kubernetes, monkeypatch):
    space = kube_kueue.namespace("stands", volumes=False)
    kube_kueue.kueue.queue("stands", space.name, {"nvidia.com/gpu": 1})
    kube_kueue.kueue.priority("stands-first", 1000)
    monkeypatch.setenv("KUBECONFIG", str(kube_kueue.kubeconfig_in(space.name)))
    cluster = connect(None, None)
    assert cluster.kueue() == "v1beta2"

    def create(name: str, queue: str = "stands", priority: str = "") -> None:
        labels = {"kueue.x-k8s.io/queue-name": queue}
        labels |= {"kueue.x-k8s.io/priority-class": priority} if priority else {}
        wanted = api_behaviour.job(name, labels=labels)
        [main] = wanted["spec"]["template"]["spec"]["containers"]
        main["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
        cluster.create("jobs", wanted)

    is_next = OBSERVABILITY in kube_kueue.kueue.gates
    known = api_behaviour.WORKLOADS | (api_behaviour.NEXT_WORKLOADS if is_next else {})

    def stands(name: str, state: str) -> None:
        # What a preempted one waits for is said anew when the queue looks at it again: at once, or
        # when something else ends; or not, where it just looked at an equivalent one.
        first = 1 if state == "preempted" else 0
        with contextlib.suppress(TimeoutError):
            until(
                state,
                lambda: api_behaviour.workload_of(cluster, name)[first:] == known[state][first:],
            )
        found = api_behaviour.workload_of(cluster, name)
        assert found[first:] == known[state][first:]
        assert found[0][:2] == known[state][0][:2]

    with kube_kueue.behave(namespace=space.name, forever=True):
        create("first")
        stands("first", "admitted")
        create("second")
        stands("second", "pending")
        create("lost", "nowhere")
        stands("lost", "inadmissible")
        create("urgent", priority="stands-first")
        stands("first", "preempted")
    kube_kueue.look_again(space.name)
    stands("urgent", "finished")
    cluster.close()


def test_a_real_server_that_restarted_has_forgotten_what_was(kube: Kubernetes, cluster: Cluster):
    def forget() -> None:
        kube.stop_apiserver()
        kube.start_apiserver()

    api_behaviour.a_watch_of_forgotten_history_is_gone(cluster, forget)
    assert {"first", "second"} <= {*api_behaviour.listed(cluster, "configmaps")}


def test_a_server_that_restarts_in_mid_submission_gets_every_job_once(
    kube: Kubernetes, cluster: Cluster
):
    made: list[str] = []

    def create(number: int) -> None:
        try:
            made.append(cluster.create("jobs", api_behaviour.job(f"j-{number}"))["metadata"]["uid"])
        except ApiError as no:  # an attempt of ours was heard, its answer was not
            assert no.reason == "AlreadyExists"

    with ThreadPoolExecutor(16) as pool:
        creating = [pool.submit(create, number) for number in range(400)]
        until("some are there", lambda: len(made) > 50)
        kube.stop_apiserver()
        kube.start_apiserver()
        for one in creating:
            one.result()
    assert sorted(api_behaviour.listed(cluster, "jobs")) == sorted(f"j-{n}" for n in range(400))
    assert 50 < len(set(made)) == len(made) <= 400
    assert cluster.trouble == ""


def test_a_certificate_that_nobody_vouches_for_ends_the_login_at_once(
    kube: Kubernetes, tmp_path: Path, monkeypatch
):
    config = tmp_path / "kubeconfig"
    config.write_text(
        f"""
current-context: there
contexts: [{{name: there, context: {{cluster: there, user: me}}}}]
clusters: [{{name: there, cluster: {{server: "https://{kube.host}:{kube.port}"}}}}]
users: [{{name: me, user: {{token: none}}}}]
"""
    )
    monkeypatch.setenv("KUBECONFIG", str(config))
    with pytest.raises(ConfigError, match="gives no answer: .*certificate verify failed"):
        connect(None, None, patience_s=60)


HOME = """
import io, pathlib, sys, tarfile
with tarfile.open("/code/code.tar.gz") as code:
    code.extractall("/tmp/code", filter="data")
sys.path.insert(0, "/tmp/code")
from stillhouse.sweep.cluster.connect import connect
cluster = connect("a context of the laptop", None)
print(cluster.user, cluster.namespace, cluster.version, cluster.may("create", "jobs", "batch"))
sys.stdout.flush()
"""


def test_a_pod_of_a_real_node_speaks_obeys_and_finds_its_own_way_home(
    kube_real: Kubernetes, monkeypatch
):
    space = kube_real.namespace("speaks")
    monkeypatch.setenv("KUBECONFIG", str(kube_real.kubeconfig_in(space.name)))
    cluster = connect(None, None)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as code:
        code.add(PACKAGE, "stillhouse", filter=lambda e: None if "__pycache__" in e.name else e)
    text = base64.b64encode(packed.getvalue()).decode()
    cluster.create(
        "configmaps", {"metadata": {"name": "code"}, "binaryData": {"code.tar.gz": text}}
    )
    main = {
        "name": "main", "image": kube_real.real_image(), "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", f"{HOME}\nimport time; time.sleep(600)"],
        "securityContext": api_behaviour.SECURE,
        "volumeMounts": [{"name": name, "mountPath": f"/{name}"} for name in ("code", "tmp")],
    }  # fmt: skip
    pod = {
        "nodeSelector": {"type": "real"}, "dnsPolicy": "Default", "containers": [main],
        "serviceAccountName": "stillhouse-driver", "automountServiceAccountToken": True,
        "terminationGracePeriodSeconds": 1,
        "volumes": [
            {"name": "code", "configMap": {"name": "code"}}, {"name": "tmp", "emptyDir": {}},
        ],
    }  # fmt: skip
    cluster.create("jobs", api_behaviour.job("speaks", pod, suspend=False))

    def running() -> list[str]:
        pages = cluster.pages("pods", fields="status.phase=Running")
        return [pod["metadata"]["name"] for pods, _ in pages for pod in pods]

    until("the pod runs", running)
    name = running()[0]
    said = b""
    for piece in cluster.log(name, follow=True):
        said += piece
        if said.endswith(b"\n"):
            break
    account = f"system:serviceaccount:{space.name}:stillhouse-driver"
    assert said.decode() == f"{account} {space.name} {cluster.version} False\n"
    assert list(cluster.log(name, tail=1)) == [said]

    program = "import os, sys; sys.stdout.buffer.write(bytes(range(256)) * 20000)"
    sent = b"".join(cluster.exec(name, ["python", "-c", program]))
    assert sent == bytes(range(256)) * 20000
    with pytest.raises(CommandFailed, match="no such run") as no:
        list(cluster.exec(name, ["python", "-c", "import sys; print(1); sys.exit('no such run')"]))
    assert no.value.exit_code == 1
    with pytest.raises(CommandFailed, match="no-such-program"):
        list(cluster.exec(name, ["no-such-program"]))
    with pytest.raises(ApiError, match="404 NotFound"):
        list(cluster.exec("no-such-pod", ["true"]))
    monkeypatch.setenv("KUBECONFIG", str(kube_real.kubeconfig_for(space.name, "stillhouse-worker")))
    with pytest.raises(ApiError, match='403 Forbidden: .*"pods/exec"'):
        list(connect(None, None).exec(name, ["true"]))
    cluster.close()
