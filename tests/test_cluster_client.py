"""Test the connection to a cluster, against the fake API server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import api_behaviour
import pytest
from api_behaviour import config_map, job, listed, version_of
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import ConfigError, Interrupted
from stillhouse.sweep.cluster import connect as connection
from stillhouse.sweep.cluster import errors
from stillhouse.sweep.cluster.connect import ApiError, Cluster, CommandFailed, Gone, connect
from stillhouse.sweep.cluster.errors import Streams
from tests.fakes.behaving import until
from tests.fakes.fake_api import FakeApi
from tests.fakes.faults import Faults, Proxy


@pytest.fixture
def log_in(fake, tmp_path, monkeypatch) -> Iterator[Callable[..., Cluster]]:
    """Connects to the fake, through any of its doors."""
    made: list[Cluster] = []

    def connected(door=fake) -> Cluster:
        path = door.kubeconfig(tmp_path / f"kubeconfig-{len(made)}")
        monkeypatch.setenv("KUBECONFIG", str(path))
        cluster = connect(None, None)
        cluster.first_delay_s = 0.001
        made.append(cluster)
        return cluster

    yield connected
    for cluster in made:
        cluster.close()


@pytest.fixture
def cluster(log_in) -> Cluster:
    return log_in()


# What an API server does, and the fake too.


@pytest.mark.parametrize("check", api_behaviour.ALL, ids=lambda check: check.__name__)
def test_the_fake_does_what_a_real_server_does(check: Callable[[Cluster], None], cluster: Cluster):
    check(cluster)


def test_the_fake_names_the_right_that_lacks(fake, cluster):
    fake.deny("list", "jobs")
    fake.deny("create", "jobs")
    fake.deny("get", "pods", sub="log")
    api_behaviour.who_lacks_a_right_is_told_which(cluster)
    assert not cluster.may("list", "jobs", "batch") and cluster.may("list", "pods")


def test_the_fake_keeps_to_a_quota(fake, cluster):
    fake.quota("jobs", 1)
    api_behaviour.beyond_the_quota_is_forbidden(cluster)
    assert api_behaviour.listed(cluster, "jobs") == ["first"]


def test_the_fake_forgets_history_when_it_is_told_to(fake, cluster):
    api_behaviour.a_watch_of_forgotten_history_is_gone(cluster, fake.forget)
    assert {"first", "second"} <= {*api_behaviour.listed(cluster, "configmaps")}


@pytest.mark.parametrize("how", api_behaviour.JOBS)
def test_jobs_and_pods_of_the_fake_stand_as_on_a_real_server(how: str, fake, cluster):
    def act(how: str) -> None:
        ends: dict[str, Callable[[], object]] = {
            "complete": lambda: fake.complete(how, "done"),
            "poison": lambda: fake.fail(how, 42, "bad"),
            "spent": lambda: fake.fail(how, 1, ends="BackoffLimitExceeded"),
            "out-of-memory": lambda: fake.fail(
                how, 137, reason="OOMKilled", ends="BackoffLimitExceeded"
            ),
            "late": lambda: fake.fail(how, 143, ends="DeadlineExceeded"),
            "asleep": lambda: fake.suspend(how),
            "running": lambda: fake.run_pod(how),
            "no-room": lambda: fake.pending(how),
            "no-image": lambda: fake.pending(how, "ImagePullBackOff", "Back-off"),
            "evicted": lambda: fake.disrupt(how),
            "put-to-sleep": lambda: (fake.run_pod(how), fake.suspend(how)),
        }
        ends[how]()

    api_behaviour.a_job_comes_to_stand(cluster, how, act)


@pytest.mark.parametrize("state", api_behaviour.WORKLOADS)
def test_workloads_of_the_fake_stand_as_kueue_leaves_them(state: str, fake, cluster):
    cluster.create("jobs", job("queued"))
    fake.workload("queued", "nowhere" if state == "inadmissible" else "stands", state)
    assert api_behaviour.workload_of(cluster, "queued") == api_behaviour.WORKLOADS[state]


def test_a_page_is_gone_when_its_list_is_older_than_history(fake, cluster):
    for number in range(3):
        cluster.create("configmaps", config_map(f"c-{number}"))
    pages = cluster.pages("configmaps", limit=1)
    next(pages)
    fake.forget()
    with pytest.raises(Gone):
        next(pages)


def test_a_watch_gets_bookmarks_from_which_it_can_go_on(fake, cluster):
    fake.bookmark_s = 0.01
    version = version_of(cluster, "configmaps")
    watch = cluster.watch("configmaps", "of=this", version, 30)
    cluster.create("configmaps", config_map("other"))  # moves the version on, unseen by this watch
    mark = next(watch)
    assert mark.kind == "BOOKMARK" and mark.object["kind"] == "ConfigMap"
    reached = mark.object["metadata"]["resourceVersion"]
    assert int(reached) > int(version)
    fake.forget()
    cluster.create("configmaps", config_map("mine", {"of": "this"}))
    assert next(cluster.watch("configmaps", "of=this", reached, 30)).kind == "ADDED"


def test_a_job_deleted_in_the_foreground_stays_until_its_pod_is_gone(fake, cluster):
    fake.pods_linger = True
    cluster.create("jobs", job("run", suspend=False))
    pod = fake.run_pod("run")
    assert cluster.delete("jobs", "run", foreground=True)
    with pytest.raises(ApiError, match="AlreadyExists"):
        cluster.create("jobs", job("run", suspend=False))
    assert "deletionTimestamp" in fake.get("pods", pod)["metadata"]
    fake.end_pods("run", exit_code=85)
    assert fake.names("pods") == [] and cluster.read("jobs", "run") is None


# Bad days.


@pytest.mark.parametrize("fault", ["refuse", "drop_before", "busy", "error", "unavailable", "cut"])
def test_a_read_is_tried_until_it_is_answered(fault: str, fake, cluster):
    cluster.create("configmaps", config_map("one", a="b" * 2000))
    before = cluster.requests
    fake.faults.script("GET", "/configmaps/one", fault, fault)
    assert (cluster.read("configmaps", "one") or {})["data"] == {"a": "b" * 2000}
    assert cluster.requests == before + 3 and cluster.trouble == ""


def test_a_server_that_is_busy_is_given_the_time_it_asks_for(fake, cluster):
    fake.faults.retry_after_s = 1
    fake.faults.script("POST", "/jobs", "busy")
    begun = time.monotonic()
    cluster.create("jobs", job("one"))
    assert time.monotonic() - begun >= 1.0


def test_a_create_whose_answer_was_lost_finds_its_name_taken(fake, cluster):
    fake.faults.script("POST", "/jobs", "drop_after")
    with pytest.raises(ApiError, match="409 AlreadyExists"):
        cluster.create("jobs", job("one"))
    assert fake.created("jobs") == {"one": 1}


def test_a_create_that_had_to_wait_asks_whether_it_is_still_wanted(fake, cluster):
    fake.faults.script("POST", "/jobs", "drop_after", "unavailable")
    asked: list[int] = []

    def still() -> bool:
        asked.append(len(asked))
        return len(asked) < 2

    with pytest.raises(ApiError, match="0 Abandoned: 503"):
        cluster.create("jobs", job("one"), still=still)
    assert asked == [0, 1]
    cluster.create("jobs", job("two"), still=lambda: False)  # a first attempt is always made
    assert fake.created("jobs") == {"one": 1, "two": 1}


def test_two_writers_that_meet_at_a_quota_are_no_conflict_of_the_object(fake, cluster):
    for method, ask in (
        ("POST", lambda: cluster.create("configmaps", config_map("one"))),
        ("PATCH", lambda: cluster.patch("configmaps", "one", {"data": {"a": "b"}})),
        ("DELETE", lambda: cluster.delete("configmaps", "one")),
    ):
        fake.faults.script(method, "/configmaps", "contention", "contention")
        assert ask()
    assert fake.created("configmaps") == {"one": 1}


def test_a_deletion_whose_answer_was_lost_says_that_nothing_was_there(fake, cluster):
    cluster.create("jobs", job("one"))
    fake.faults.script("DELETE", "/jobs", "drop_after")
    assert not cluster.delete("jobs", "one")
    assert fake.deleted("jobs") == {"one": 1}


def test_whoever_waits_can_be_told_to_stop_and_says_what_the_trouble_was(fake, log_in):
    door = fake.door(Faults())
    cluster = log_in(door)
    cluster.first_delay_s = 60.0
    door.away()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cluster.read, "jobs", "one")
        until(lambda: cluster.trouble != "")
        cluster.stop.set()
        with pytest.raises(Interrupted, match="asked to stop while http://127"):
            waiting.result()
    door.back()
    assert cluster.read("jobs", "one") is None  # a first attempt is always made


def test_a_server_that_comes_back_is_found_again(fake, log_in):
    door = fake.door(Faults())
    cluster = log_in(door)
    door.away()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cluster.create, "jobs", job("one"))
        until(lambda: cluster.trouble != "")
        door.back()
        assert waiting.result()["metadata"]["name"] == "one"
    assert cluster.trouble == ""


def test_a_server_that_just_came_back_may_deny_what_it_granted_before(fake, log_in):
    door = fake.door(Faults())
    cluster = log_in(door)
    fake.deny("create", "jobs")
    with pytest.raises(ApiError, match="403 Forbidden"):
        cluster.create("jobs", job("one"))
    door.away()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cluster.create, "jobs", job("one"))
        until(lambda: cluster.trouble != "")
        door.back()
        until(lambda: "cannot create resource" in cluster.trouble)
        fake.allow("create", "jobs")
        assert waiting.result()["metadata"]["name"] == "one"


@pytest.mark.parametrize("kill_after", [False, True])
def test_a_killed_writer_writes_nothing_more_from_any_thread(kill_after: bool, fake, log_in):
    door = fake.door(Faults())
    cluster = log_in(door)
    door.faults = Faults(kill_at=10, kill_after=kill_after, on_kill=cluster.stop.set)

    def create(number: int) -> str:
        try:
            cluster.create("jobs", job(f"j-{number}"))
        except Interrupted:
            return "killed"
        return "done"

    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(create, range(40)))
    assert set(ends) == {"done", "killed"}
    assert len(fake.created("jobs")) == 9 + kill_after


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("way", ["door", "proxy"])
def test_on_a_bad_day_everything_is_written_exactly_once(
    seed: int, way: str, fake, log_in, tmp_path
):
    rates = dict.fromkeys(
        ("refuse", "drop_before", "drop_after", "busy", "error", "unavailable", "twice", "cut"),
        0.06,
    )
    faults = Faults(seed=seed, cut_bytes=100, slow_s=0.001, slow=0.02, **rates)
    if way == "door":
        door = fake.door(Faults())
    else:
        proxy = Proxy(fake.kubeconfig(tmp_path / "behind"))
        door = proxy.door
    cluster = log_in(door)
    door.faults = faults

    def create(number: int) -> None:
        try:
            cluster.create("configmaps", config_map(f"c-{number}", {"of": "this"}))
        except ApiError as no:
            assert no.reason == "AlreadyExists"

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(create, range(60)))
    assert sorted(fake.created("configmaps").values()) == [1] * 60
    assert len(listed(cluster, "configmaps", "of=this", limit=7)) == 60
    assert faults.struck.total() > 20
    if way == "proxy":
        proxy.close()


def test_faults_strike_the_same_requests_whatever_the_order():
    asked = [("POST", f"/jobs/{number % 50}") for number in range(200)]
    once, twice = Faults(seed=1, busy=0.2, cut=0.1), Faults(seed=1, busy=0.2, cut=0.1)
    first = sorted((ask, f"{once.draw(*ask)}") for ask in asked)
    assert first == sorted((ask, f"{twice.draw(*ask)}") for ask in reversed(asked))
    assert 20 < once.struck["busy"] < 60


# Streams.


@settings(deadline=None)
@given(st.lists(st.binary().map(lambda b: b.replace(b"\n", b"")), max_size=5), st.data())
def test_lines_survive_any_way_of_cutting_the_stream(lines: list[bytes], data):
    stream = b"".join(line + b"\n" for line in lines)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert list(errors.lines(iter(pieces))) == [line for line in lines if line]
    assert list(errors.lines(iter([*pieces, b"half"]))) == [line for line in lines if line]


def test_a_watch_whose_connection_breaks_ends_without_an_error(fake, cluster):
    version = version_of(cluster, "configmaps")
    for number in range(4):
        cluster.create("configmaps", config_map(f"c-{number}"))
    fake.faults.cut_bytes = 600
    fake.faults.script("GET", "/configmaps", "cut")
    heard = list(cluster.watch("configmaps", "", version, 30))
    assert 0 < len(heard) < 4
    last = heard[-1].object["metadata"]["resourceVersion"]
    more = cluster.watch("configmaps", "", last, 30)
    names = [w.object["metadata"]["name"] for w in heard]
    names += [next(more).object["metadata"]["name"] for _ in range(4 - len(heard))]
    assert names == [f"c-{number}" for number in range(4)]


def test_a_watch_ends_when_its_time_is_over_or_when_it_is_closed(fake, cluster):
    fake.bookmark_s = 0.1
    version = version_of(cluster, "jobs")
    assert {w.kind for w in cluster.watch("jobs", "", version, 0.2)} <= {"BOOKMARK"}
    heard: list[object] = []
    reader = threading.Thread(target=lambda: heard.extend(cluster.watch("jobs", "", version, 300)))
    reader.start()
    until(lambda: fake.requests["watch", "jobs"] == 2)
    cluster.close()
    reader.join(10)
    assert not reader.is_alive()


def test_a_log_comes_as_it_is_written_and_ends_with_its_pod(fake, cluster):
    cluster.create("jobs", job("run", suspend=False))
    waiting = fake.pending("run", "ContainerCreating")
    with pytest.raises(ApiError, match="400 BadRequest: .*is waiting to start"):
        list(cluster.log(waiting))
    pod = fake.run_pod("run")
    fake.say(pod, b"one\ntwo\n")
    assert b"".join(cluster.log(pod, tail=1)) == b"two\n"
    pieces = cluster.log(pod, follow=True)
    assert next(pieces) == b"one\ntwo\n"
    fake.say(pod, b"three \xff")
    assert next(pieces) == b"three \xff"
    fake.complete("run")
    assert list(pieces) == []
    with pytest.raises(ApiError, match='404 NotFound: pods "none" not found'):
        list(cluster.log("none"))


def test_a_command_in_a_pod_gives_back_its_bytes_or_why_it_failed(fake, cluster):
    cluster.create("jobs", job("run", suspend=False))
    pod = fake.run_pod("run")
    big = os.urandom(300_000)
    asked: list[list[str]] = []

    def act(_: str, command: list[str]) -> tuple[list[bytes], bytes, int]:
        asked.append(command)
        if command[0] == "fail":
            return [b"half"], b"no such run: x\n", 42
        return [big[:100], big[100:70_000], big[70_000:]], b"a warning", 0

    fake.execs = act
    assert b"".join(cluster.exec(pod, ["tar", "a b", "&=?"])) == big
    assert asked == [["tar", "a b", "&=?"]]
    with pytest.raises(CommandFailed, match="no such run: x") as no:
        list(cluster.exec(pod, ["fail"]))
    assert no.value.exit_code == 42
    fake.faults.cut_bytes = 200_000
    fake.faults.script("GET", "/exec", "cut")
    with pytest.raises(ApiError, match="Dropped"):
        list(cluster.exec(pod, ["tar"]))
    with pytest.raises(ApiError, match='404 NotFound: pods "none" not found'):
        list(cluster.exec("none", ["tar"]))
    fake.deny("get", "pods", sub="exec")
    with pytest.raises(ApiError, match="403 Forbidden: .*pods/exec"):
        list(cluster.exec(pod, ["tar"]))


# Logging in.


def write(path: Path, user: object, server: str = "http://127.0.0.1:9", **more: object) -> str:
    config = {
        "current-context": "lab",
        "contexts": [{"name": "lab", "context": {"cluster": "there", "user": "me"}}],
        "clusters": [{"name": "there", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": user}],
    }
    path.write_text(json.dumps({**config, **more}))
    return str(path)


def refused(context: str | None = None, patience_s: float = 0.3) -> str:
    with pytest.raises(ConfigError) as no:
        connect(context, None, patience_s)
    return str(no.value)


def test_without_a_kubeconfig_it_says_where_one_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert re.match("no kubeconfig: .*none is not there; ask whoever runs", refused())
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no kubeconfig: ~/.kube/config is not there" in refused()


def test_an_unknown_context_is_answered_with_those_there_are(tmp_path, monkeypatch):
    path = write(tmp_path / "kubeconfig", {})
    monkeypatch.setenv("KUBECONFIG", path)
    assert f'{path} has no context "lap"; it has lab. Did you mean "lab"?' in refused("lap")
    write(tmp_path / "kubeconfig", {}, **{"current-context": ""})
    assert "has no current context; it has lab." in refused()


CONTEXT = "current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\n"


@pytest.mark.parametrize(
    "text",
    [
        "", "clusters: [", "hello", "7", "true", "- a\n- b", "contexts: 5\nclusters: 6",
        "current-context: x\ncontexts: [1]",
        "current-context: x\ncontexts: [{name: x, context: 5}]",
        f"{CONTEXT}clusters: hello", f"{CONTEXT}clusters: []\nusers: 4",
        f"{CONTEXT}clusters: [{{name: c, cluster: {{server: 7}}}}]",
        f"{CONTEXT}clusters: [{{name: c, cluster: {{server: 'http://x'}}}}]\n"
        "users: [{name: u, user: {exec: hello}}]",
        "\0",
    ],
)  # fmt: skip
def test_a_file_that_is_no_kubeconfig_is_named_in_words(text: str, tmp_path, monkeypatch):
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(path))
    said = refused()
    assert f"{path} is no way to log in: " in said and "`kubectl config view`" in said
    assert not re.search(r"object|indices|subscriptable|iterable|attribute|NoneType", said)


def test_a_server_that_does_not_answer_is_given_up(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", write(tmp_path / "kubeconfig", {}))
    said = refused()
    assert 'http://127.0.0.1:9 (context "lab") gives no answer: ' in said
    assert "Connection refused; is the address right, the VPN up" in said
    fake.away()
    monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig(tmp_path / "kubeconfig")))
    assert "gives no answer" in refused()


def test_a_server_that_stutters_while_we_connect_is_waited_for(fake, log_in):
    fake.faults.script("GET", "/version", "drop_before", "unavailable")
    fake.faults.script("POST", "/selfsubjectreviews", "cut", "busy")
    fake.faults.cut_bytes = 10
    cluster = log_in()
    assert (cluster.user, cluster.version, cluster.namespace) == ("ada", "v1.34.4", "lab")
    assert cluster.kueue() == "v1beta2"
    fake.kueue = False
    assert log_in().kueue() is None


def test_a_web_page_is_no_cluster(fake, tmp_path, monkeypatch):
    def page(request, reply) -> None:
        reply.send(200, b"<html>Sign in</html>", {"Content-Type": "text/html"})

    fake.door(Faults()).handle = page
    config = fake.doors[-1].kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(config))
    assert "does not answer as Kubernetes does; is the address right?" in refused()


@pytest.mark.parametrize(
    ("version", "is_too_old"), [("v1.30.9", True), ("v1.31.0", False), ("v1.33.1-gke.100", False)]
)
def test_a_server_older_than_the_oldest_is_refused(version: str, is_too_old: bool, fake, log_in):
    fake.git_version = version
    if is_too_old:
        with pytest.raises(ConfigError, match=r"is Kubernetes v1\.30\.9; the oldest .* is 1\.31"):
            log_in()
    else:
        assert log_in().version == version


def test_a_login_that_the_server_does_not_know_is_said(fake, tmp_path, monkeypatch):
    path = str(fake.kubeconfig(tmp_path / "kubeconfig"))
    monkeypatch.setenv("KUBECONFIG", path)
    fake.expire_login()
    said = refused()
    assert "login expired; log in again, as you did to get the kubeconfig" in said
    assert f'{fake.url} (context "fake"): ' in said


def plugin(tmp_path: Path, fake: FakeApi) -> Path:
    """A login command that says whatever stands in a file, and counts its calls."""
    (tmp_path / "token").write_text("token-1")
    command = tmp_path / "log-in"
    command.write_text(
        f"""#!{sys.executable}
import json, pathlib, sys
here = pathlib.Path({str(tmp_path)!r})
with (here / "calls").open("a") as calls:
    calls.write("x")
token = (here / "token").read_text()
if not token:
    sys.exit("your session is over: lab login")
status = {{"token": token}}
kind = {{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}}
print(json.dumps({{**kind, "status": status}}))
"""
    )
    command.chmod(0o700)
    way = {"command": str(command), "apiVersion": "client.authentication.k8s.io/v1"}
    write(tmp_path / "kubeconfig", {"exec": {**way, "interactiveMode": "Never"}}, fake.url)
    return tmp_path / "kubeconfig"


def test_a_token_that_runs_out_is_renewed_once_for_all_threads(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(plugin(tmp_path, fake)))
    cluster = connect(None, "lab")
    fake.expire_login()
    (tmp_path / "token").write_text("token-2")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: cluster.read("jobs", "one"), range(20))) == [None] * 20
    assert (tmp_path / "calls").read_text() == "xx"


def test_a_login_command_that_fails_is_quoted(fake, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("KUBECONFIG", str(plugin(tmp_path, fake)))
    cluster = connect(None, "lab")
    (tmp_path / "token").write_text("")
    fake.expire_login()
    with pytest.raises(ConfigError, match="which failed: .*your session is over: lab login; run"):
        cluster.read("jobs", "one")
    said = refused()
    assert f'context "lab" of {tmp_path}/kubeconfig logs in with "{tmp_path}/log-in"' in said
    (tmp_path / "log-in").unlink()
    assert "No such file" in refused()
    assert capfd.readouterr().err == ""


def test_in_a_pod_its_service_account_is_used(tmp_path, monkeypatch):
    for name, text in {"token": "t", "ca.crt": "no certificate", "namespace": "lab"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(connection, "POD_IDENTITY", tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "9")
    said = refused("a context that only the laptop knows")
    assert "https://127.0.0.1:9 (this pod's service account) gives no answer" in said


def test_importing_the_connection_loads_no_kubernetes():
    program = "import stillhouse.sweep.cluster.connect, sys; print('kubernetes' in sys.modules)"
    words = [sys.executable, "-c", program]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "False\n"


def test_everything_is_sent_under_one_name(fake, log_in):
    names: set[str] = set()
    door = fake.door(Faults())
    answer = door.handle

    def note(request, reply) -> None:
        names.add(request.headers.get("user-agent", ""))
        answer(request, reply)

    door.handle = note
    cluster = log_in(door)
    cluster.create("jobs", job("one"))
    listed(cluster, "jobs")
    assert len(names) == 1 and re.fullmatch(r"stillhouse/\S+", names.pop())


def test_a_stream_that_was_being_opened_when_all_were_ended_is_ended_too():
    class Stream:
        ends = 0

        def abort(self) -> None:
            self.ends += 1

        def close(self) -> None:
            pass

    streams, early, late = Streams(), Stream(), Stream()
    with streams.kept(early):
        streams.end()
    with streams.kept(late):
        assert (early.ends, late.ends) == (1, 1)
