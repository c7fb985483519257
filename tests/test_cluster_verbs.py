"""Test the verbs on a cluster: what they send, print, repair and refuse, on the fake API server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from stillhouse.cli import main
from stillhouse.rundir import Runs
from stillhouse.sweep.cluster.connect import connect
from stillhouse.sweep.cluster.find import Names
from stillhouse.sweep.cluster.ledger import read_sweep, sweeps, write_sweep
from tests.builders.lab import CLUSTER, GRID, SITE, grid, only, said, train
from tests.fakes.fake_api import FakeApi

pytestmark = pytest.mark.usefixtures("furnished")


def _no_kubeconfig(fake: FakeApi) -> None:
    os.environ["KUBECONFIG"] = "/no/such/kubeconfig"


def _nobody_answers(fake: FakeApi) -> None:
    fake.away()


REFUSED: dict[str, tuple[Callable[[FakeApi], object], str]] = {
    "no kubeconfig": (_no_kubeconfig, "no kubeconfig"),
    "expired login": (lambda fake: fake.expire_login(), "login expired"),
    "old server": (lambda fake: setattr(fake, "git_version", "v1.30.4"), "v1.30.4"),
    "a right": (lambda fake: fake.deny("create", "jobs"), "create jobs.batch"),
    "a claim": (
        lambda fake: fake.remove("persistentvolumeclaims", "stillhouse-cache"),
        'volume claim "stillhouse-cache"',
    ),
    "an account": (
        lambda fake: fake.remove("serviceaccounts", "stillhouse-worker"),
        'service account "stillhouse-worker"',
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("door", ["train", "run"])
def test_what_is_missing_is_42_before_anything_is_created(
    what: str, door: str, fake: FakeApi, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", os.environ["KUBECONFIG"])  # given back after the test
    break_it, says = REFUSED[what]
    break_it(fake)
    words = train("mine") if door == "train" else ("run", *GRID, *CLUSTER, *SITE)
    error = say(*words, code=42)
    assert says in error and "Traceback" not in error
    assert not fake.created("jobs") and not fake.created("configmaps")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--queue", "nowhere"), 'LocalQueue "nowhere"'),
        (("--namespace", "nowhere"), 'namespace "nowhere"'),
        (("--image", "stillhouse:latest"), "make image"),
        (("--image", "stillhouse@sha256:" + "0" * 64), "make image"),
        (("--kube-context", "nowhere"), "nowhere"),
        (("--lmda", "0"), 'Did you mean "lmbda"'),
        (("--quant-type", "int5"), 'Did you mean "int4"'),
        (("--tags", "hf_" + "aB3" * 12), "secret"),
    ],
)
@pytest.mark.parametrize("door", ["train", "run"])
def test_a_mistake_is_42_before_anything_is_created(
    words: tuple[str, ...], says: str, door: str, fake: FakeApi, say: Callable[..., str]
) -> None:
    asked = ("train", "mine", "--pair", "tiny") if door == "train" else ("run", *GRID, *CLUSTER)
    error = say(*asked, *SITE, *words, code=42)
    assert says in error
    assert not fake.created("jobs") and not fake.created("configmaps")


def test_an_api_server_that_does_not_answer_is_42(
    fake: FakeApi, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.sweep.cluster import connect

    monkeypatch.setattr(connect, "PATIENCE_S", 0.2)
    fake.away()
    assert "gives no answer" in say("status", *CLUSTER, code=42)


def test_doctor_says_what_is_missing_and_what_to_apply(
    fake: FakeApi, say: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "missing" not in say("doctor", *SITE)
    fake.remove("persistentvolumeclaims", "stillhouse-runs")
    fake.deny("create", "pods", "exec")
    assert main(["doctor", *SITE, "--json"]) == 42
    found = json.loads(capsys.readouterr().out)
    wrong = [one for one in found["findings"] if not one["ok"]]
    assert not found["is_fine"]
    assert 'claim "stillhouse-runs"' in wrong[0]["what"] and "storage" in wrong[0]["remedy"]
    assert "pods/exec" in wrong[1]["what"] and "access.yaml" in wrong[1]["remedy"]
    fake.allow("create", "pods", "exec")
    assert main(["doctor", *SITE]) == 42
    assert "k8s/storage.yaml" in capsys.readouterr().out


def test_run_sends_what_its_dry_run_prints_and_sees_it_done(
    fake: FakeApi, works: dict[str, int], say: Callable[..., str], tmp_path: Path
) -> None:
    rendered = list(yaml.safe_load_all(say("run", *GRID, *CLUSTER, *SITE, "--dry-run")))
    out = say("run", *GRID, *CLUSTER, *SITE)
    sweep = grid()
    assert f"{sweep.name}: 4 points: 4 done" in out
    assert fake.created("jobs").keys() == {job["metadata"]["name"] for job in rendered}
    assert set(fake.created("jobs").values()) == {1}
    kinds = [job["metadata"]["labels"]["stillhouse/kind"] for job in rendered]
    assert kinds == ["prepare", *["train"] * 4, "eval"]
    assert Runs(Path("runs")).sweep_file(sweep.name).is_file()
    idle = say("run", *GRID, *CLUSTER, *SITE)
    assert "nothing left to do" in idle and sum(fake.created("jobs").values()) == 6
    told = json.loads(say("status", sweep.name, *CLUSTER, "--json"))
    assert told["totals"]["done"] == 4 and told["sweep"] == sweep.name


def test_a_run_lists_the_namespace_once(
    fake: FakeApi, works: dict[str, int], say: Callable[..., str]
) -> None:
    say("run", *GRID, *CLUSTER, *SITE)
    assert fake.requests["list", "jobs"] == 2, "ours, and the names of all others"
    told = json.loads(say("run", *GRID, *CLUSTER, *SITE, "--json"))
    assert told["totals"]["done"] == 4
    assert fake.requests["list", "jobs"] == 3, "ours; nothing is left to be in others' way"


def test_a_dry_run_needs_no_cluster_and_is_the_same_text_for_one_point(
    tmp_path: Path, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    dry_run = ("run", *GRID, *CLUSTER, *SITE, "--dry-run")
    everything = say(*dry_run)
    point = grid().points[1]
    alone = say(*dry_run, "--point", point.id[:6])
    kinds = [job["metadata"]["labels"]["stillhouse/kind"] for job in yaml.safe_load_all(alone)]
    assert kinds == ["prepare", "train", "eval"]
    assert alone.split("---\n")[1] in everything
    told = json.loads(say(*dry_run, "--json"))
    assert "---\n".join(told["manifests"]) == everything
    for more in ("--backend=local", "--detach"):
        assert "stillhouse plan" in say(*dry_run, more, code=42)
    assert "stillhouse run --backend cluster --dry-run" in say("render", *GRID, code=42)


def test_what_failed_is_grouped_and_retried_by_its_knobs_or_its_cause(
    fake: FakeApi, works: dict[str, int], say: Callable[..., str]
) -> None:
    sweep = grid()
    points = sweep.points  # lmbda 0, 0, 0.5, 0.5
    works.update({points[0].id: 43, points[1].id: 44, points[2].id: 43})
    say("run", *GRID, *CLUSTER, *SITE, code=1)
    out = say("status", sweep.name, *CLUSTER, code=1)
    assert out.splitlines()[0] == f"{sweep.name}: 4 points: 1 done, 3 failed"
    assert "  failed   2: as it was told to [" in out, "one line for one reason"
    works.clear()

    def failed() -> set[str]:
        told = json.loads(say("status", sweep.name, *CLUSTER, "--json", code=1))
        return {point["id"] for point in told["points"] if point["state"] == "failed"}

    say("retry", sweep.name, *CLUSTER, "--where", "lmbda > 0.3")
    assert failed() == {points[0].id, points[1].id}
    say("retry", sweep.name, *CLUSTER, "--cause", "oom")
    assert failed() == {points[0].id}
    assert "nothing to retry" in say("retry", sweep.name, *CLUSTER, "--cause", "deadline")
    error = say("retry", sweep.name, *CLUSTER, "--where", "learning_rate > 1e-6", code=42)
    assert 'no knob "learning_rate"' in error
    say("retry", *GRID, *SITE, *CLUSTER, "--where", "learning_rate > 1e-9 and seed == 0")
    assert "4 points: 4 done" in say("run", *GRID, *CLUSTER, *SITE)


def test_ctrl_c_leaves_the_jobs_running_and_the_same_command_goes_on(
    fake: FakeApi, tmp_path: Path, say: Callable[..., str]
) -> None:
    words = [sys.executable, "-m", "stillhouse", "run", *GRID, *CLUSTER, *SITE]
    run = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    _until(lambda: bool(fake.names("jobs")))
    run.send_signal(signal.SIGINT)
    out, _ = run.communicate(timeout=30)
    assert run.returncode == 85
    assert "running Jobs continue, no new ones are submitted" in out
    assert len(fake.names("jobs")) == 1 and not fake.deleted("jobs"), "its pair's preparation"


def _until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_cancel_marks_the_sweep_and_lets_what_runs_save(
    fake: FakeApi, tmp_path: Path, say: Callable[..., str]
) -> None:
    words = [sys.executable, "-m", "stillhouse", "run", *GRID, *CLUSTER, *SITE]
    run = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    _until(lambda: bool(fake.names("jobs")))
    fake.complete(only(fake, "prepare"))
    _until(lambda: len(fake.all("jobs", "stillhouse/kind=train")) == 4)
    sweep = grid()
    out = say("cancel", sweep.name, *CLUSTER)
    assert out.count("asked to save and stop") == 4
    stdout, _ = run.communicate(timeout=40)
    assert run.returncode == 85 and "cancelled by `stillhouse cancel`" in stdout
    assert fake.all("jobs", "stillhouse/kind=train") == []
    told = json.loads(say("status", sweep.name, *CLUSTER, "--json"))
    assert {point["cause"] for point in told["points"]} == {"cancelled by ada"}
    assert {point["state"] for point in told["points"]} == {"waiting"}


def test_what_another_owns_is_neither_cancelled_nor_taken_over(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("mine", "--lmbda", "0", "--seed", "0"))
    error = say("cancel", "mine", "owner=bob", *CLUSTER, code=42)
    assert "are ada's" in error and "owner=ada" in error
    assert "is ada's" in say("run", *GRID, *CLUSTER, *SITE, "owner=bob", code=42)
    assert fake.names("jobs") == [only(fake)]
    assert "asked to save" in say("cancel", "mine", "owner=ada", *CLUSTER)


def test_a_driver_is_left_in_the_cluster_and_found_a_second_time(
    fake: FakeApi, say: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: {pair: tiny}\ngrid: {lmbda: [0, 0.5]}\neval: {suite: tiny}\n")
    words = ("run", str(file), *CLUSTER, *SITE, "--detach")
    out = say(*words)
    driver = only(fake, "drive")
    assert f"driver {driver}: sent" in out and f"logs {driver} -f" in out
    job = fake.get("jobs", driver)
    assert job
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "/sweep/mine.yaml" in args and "--backend=cluster" in args and "owner=ada" in args
    (volume,) = [v for v in job["spec"]["template"]["spec"]["volumes"] if v["name"] == "sweep"]
    carried = fake.get("configmaps", volume["configMap"]["name"])
    assert carried and carried["data"] == {"mine.yaml": file.read_text()}
    assert "at work already" in say(*words)
    assert f"driver {driver}: waits" in say("status", "mine", *CLUSTER)
    fake.run_pod(driver)
    assert f"driver {driver}: runs for" in say("status", "mine", *CLUSTER)
    assert "asked to save and stop" in say("cancel", "mine", *CLUSTER)
    assert fake.names("jobs") == []
    assert "sent" in say(*words), "and it goes on from there"


def test_a_driver_in_a_pod_does_what_the_words_on_its_job_say(
    fake: FakeApi, works: dict[str, int], say: Callable[..., str], tmp_path: Path
) -> None:
    say("run", *GRID, *CLUSTER, *SITE, "--detach")
    driver = only(fake, "drive")
    job = fake.get("jobs", driver)
    assert job
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    words = [
        word.replace("/runs", str(tmp_path / "volume")) for word in args[args.index("--") + 1 :]
    ]
    assert "4 points: 4 done" in say(*words)
    sweep = grid()
    trained = fake.created("jobs").keys() & {f"{p.slug}-{p.id}" for p in sweep.points}
    assert len(trained) == 4


def test_new_code_goes_on_only_when_asked(
    fake: FakeApi, say: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    say("train", "mine", *GRID[:1], "lmbda=0", "seed=0", *SITE)
    (job,) = fake.all("jobs")
    name = job["metadata"]["name"]
    labels = job["metadata"]["labels"] | {"stillhouse/code": "0" * 16}
    fake.put("jobs", {**job, "metadata": {**job["metadata"], "labels": labels}})
    out = say("run", *GRID, *CLUSTER, *SITE, code=1)
    assert "begun by other code" in out and "--code=new" in out
    assert fake.names("jobs") == [name] and not fake.deleted("jobs")
    say("run", *GRID, *CLUSTER, *SITE, "--code=new", "--detach")
    assert fake.deleted("jobs")[name] == 1


def test_the_record_and_the_names_of_a_sweep_lie_in_the_cluster(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say("run", *GRID, "name=mine", *CLUSTER, *SITE, "--detach")
    cluster = connect(None, None)
    sweep = grid(Path("runs"), "name=mine")
    assert [mark.name for mark in sweeps(cluster)] == [sweep.name]
    record = read_sweep(cluster, sweep.name)
    assert record and [point["id"] for point in record["points"]] == [p.id for p in sweep.points]
    assert Names(cluster).read() == {str(p.name): f"{p.slug}-{p.id}" for p in sweep.points}
    cluster.close()


def test_a_pair_that_cannot_be_prepared_is_named_and_tried_again(
    fake: FakeApi, say: Callable[..., str], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "stillhouse", "run", *GRID, *CLUSTER, *SITE]
    run = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    _until(lambda: bool(fake.names("jobs")))
    job = only(fake, "prepare")
    fake.fail(job, exit_code=42, message=said(42, "ConfigError: its weights are not there"))
    run.communicate(timeout=30)
    assert run.returncode == 1
    name = grid().name
    out = say("status", name, *CLUSTER, code=1)
    assert f"failed   preparing ({job}): ConfigError: its weights are not there" in out
    fake.logs[fake.pods_of(job)[0]["metadata"]["name"]] = b"no weights here\n"
    assert f"==> {job} <==\nno weights here" in say("logs", name, *CLUSTER)
    assert "1 wait" in say("retry", name, *CLUSTER)
    assert fake.names("jobs") == []
    assert say("status", name, *CLUSTER).startswith(f"{name}: 4 points: 4 new")


def test_a_pair_that_waits_says_why_and_another_site_is_heeded(
    fake: FakeApi, tmp_path: Path, say: Callable[..., str]
) -> None:
    def driver(*more: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "stillhouse", "run", *GRID, *CLUSTER, *SITE, *more]
        return subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    def uid(job: str) -> str:
        return ((fake.get("jobs", job) or {}).get("metadata") or {}).get("uid", "")

    first = driver()
    _until(lambda: bool(fake.names("jobs")))
    job = only(fake, "prepare")
    fake.pending(job, "ImagePullBackOff", "not found")
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=30)
    name = grid().name
    why = f"preparing {job}: waits: image not pulled: not found"
    assert why in say("status", name, *CLUSTER)
    told = json.loads(say("status", name, *CLUSTER, "--json"))
    assert any(why in line for line in told["remarks"])
    before = uid(job)
    second = driver("image=lab.example/other@sha256:" + "b2" * 32)
    _until(lambda: job not in fake.names("jobs") or uid(job) != before)
    _until(lambda: job in fake.names("jobs"))
    second.send_signal(signal.SIGINT)
    second.communicate(timeout=30)
    there = fake.get("jobs", job) or {}
    assert "lab.example/other" in there["spec"]["template"]["spec"]["containers"][0]["image"]
    # Another sweep of the same pair waits for the same Job.
    say("run", *GRID, "name=other", "lmbda=0.25", *CLUSTER, *SITE, "--detach")
    other = grid(Path("runs"), "name=other", "lmbda=0.25").name
    assert f"preparing {job}: waits" in say("status", other, *CLUSTER)


def test_no_driver_is_said_to_be_sent_while_the_last_one_still_ends(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    line = ("run", *GRID, *CLUSTER, *SITE, "--detach")
    fake.pods_linger = True
    assert ": sent; this machine is not needed" in say(*line)
    job = only(fake, "drive")
    fake.run_pod(job)
    say("cancel", grid().name, *CLUSTER)
    assert f"driver {job}: Job {job} is still being deleted" in say(*line, code=42)
    fake.end_pods(job, exit_code=85)
    assert ": sent; this machine is not needed" in say(*line)


def test_collect_brings_a_sweep_home_and_the_report_finds_it(
    fake: FakeApi, say: Callable[..., str], tmp_path: Path
) -> None:
    from test_cluster_collect import Lab, kubelet

    cluster = connect(None, None)
    volume = Lab(fake, cluster, tmp_path).volume
    write_sweep(cluster, json.loads(Runs(volume).sweep_file("grid").read_text()))
    cluster.close()
    with kubelet(fake, fake.run_pod):
        out = say("collect", "grid", *SITE)
    assert "8 directories came" in out and "stillhouse report grid" in out
    assert fake.names("jobs") == [], "its pod is not left behind"
    assert Runs(Path("runs")).sweep_file("grid").is_file()
    assert "the page: " in say("report", "grid")
