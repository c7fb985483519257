"""Test the verbs on a cluster: what they send, print, repair and refuse, on the fake API server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.cli import main
from stillhouse.rundir import Json, Runs
from stillhouse.sweep import registry
from stillhouse.sweep.cluster.find import Names
from stillhouse.sweep.cluster.ledger import read_sweep, sweeps
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep
from tests.builders.lab import IMAGE, SITE, said
from tests.builders.published import EVAL, TRAIN, lines, name_of
from tests.fakes.fake_api import FakeApi

ROOT = Path(__file__).parent.parent
PUBLISHED = [line for line in lines(TRAIN) + lines(EVAL) if line.startswith("k8s/")]
GRID = ("pair=tiny", "lmbda=0,0.5", "seeds=2")
CLUSTER = ("--backend", "cluster")
POINTS = 1500  # of a large sweep
TAIL = "step 6\nstep 7"  # what points that fail printed last


pytestmark = pytest.mark.usefixtures("furnished")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command that is to end with 0 (or `code`); what it printed to stdout."""

    def run(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        ended = main([*words])
        out, error = capsys.readouterr()
        assert ended == code, f"{words} ended with {ended}:\n{out}{error}"
        return out if code != 42 else error

    return run


def grid(runs: Path = Path("runs"), *more: str) -> Sweep:
    return load_sweep(None, [*GRID, *SITE, *more], runs, "cluster")


def train(name: str, *words: str) -> tuple[str, ...]:
    return ("train", name, "--pair", "tiny", *words, *SITE)


def only(fake: FakeApi, kind: str = "train") -> str:
    (job,) = fake.all("jobs", f"stillhouse/kind={kind}")
    return job["metadata"]["name"]


# ------------------------------------------------------------------------------------ lines


def test_the_published_lines_make_26_jobs_and_a_second_time_none(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    words = [line.split() for line in PUBLISHED]
    first = [say(Path(door).stem, *rest, *SITE) for door, *rest in words]
    assert len(fake.names("jobs")) == 26 == sum(fake.created("jobs").values())
    (twin,) = [out for out in first if "nothing was sent" in out]
    assert "lmbda0_lr1e5 is the same configuration as lmbda_0_int4: now a name of it" in twin
    named = {name_of(line) for line in PUBLISHED if "train.sh" in line}
    known = fake.get("configmaps", "stillhouse-names")
    assert known and set(known["data"]) == named and len(set(known["data"].values())) == 23
    for door, *rest in words:
        assert "nothing was sent" in say(Path(door).stem, *rest, *SITE)
    assert sum(fake.created("jobs").values()) == 26
    assert fake.created("configmaps").most_common(1)[0][1] == 1, "the code travels once"


def test_a_dry_run_prints_the_object_that_is_sent(
    fake: FakeApi, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr(fake, "_route", _listening(fake._route, sent))
    for line in (PUBLISHED[5], PUBLISHED[-1]):
        door, *rest = line.split()
        printed = say(Path(door).stem, *rest, *SITE, "--dry-run")
        before = len(sent)
        say(Path(door).stem, *rest, *SITE)
        assert json.dumps(yaml.safe_load(printed), separators=(",", ":")).encode() in sent[before:]


def _listening(route: Any, sent: list[bytes]) -> Any:
    def listening(request: Any, reply: Any) -> None:
        sent.append(request.body)
        route(request, reply)

    return listening


def test_a_line_says_where_its_run_is_and_how_to_go_on(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    out = say(*train("mine", "--lmbda", "0"))
    job = only(fake)
    assert f"run directory: /runs/{job} of volume stillhouse-runs" in out
    for verb in ("logs mine -f", "status mine", "collect mine", "cancel mine"):
        assert f"stillhouse {verb} --backend cluster" in out
    told = say("status", "mine", *CLUSTER)
    assert told.splitlines()[0] == f"{job}: 1 point: 1 waiting"


def test_a_second_call_says_what_became_of_the_first(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    line = train("mine", "--lmbda", "0")
    say(*line)
    job = only(fake)
    fake.pending(job)
    assert "no node has 1 free nvidia.com/gpu" in say(*line)
    fake.run_pod(job)
    assert f"nothing was sent: {job} is there already, running" in say(*line)
    fake.fail(job, exit_code=43, message=said(43, "Diverged: NaN at step 7"))
    out = say(*line, code=1)
    assert "failed: Diverged: NaN at step 7" in out
    assert "`stillhouse retry mine --backend cluster`, then the same line" in out
    say("retry", "mine", *CLUSTER)
    assert fake.names("jobs") == []
    assert "sent: Job" in say(*line)
    fake.complete(job)
    assert "is there already, done" in say(*line)


def test_a_line_of_another_site_says_what_the_job_that_is_there_asks(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("mine", "--memory-gib", "9"))
    fake.pending(only(fake))
    out = say(*train("mine", "--memory-gib", "12"))
    assert (
        "sent from another site: memory_gib is 9.0 there and 12.0 here; `stillhouse cancel" in out
    )
    assert "another site" not in say(*train("mine", "--memory-gib", "9"))


def test_a_line_whose_job_is_gone_sends_it_again(fake: FakeApi, say: Callable[..., str]) -> None:
    line = train("mine", "--lmbda", "0")
    say(*line)
    job = only(fake)
    fake.complete(job)
    fake.remove("jobs", job)
    assert f"sent: Job {job}" in say(*line), "it will find itself done"


def test_a_name_that_means_another_configuration_is_refused_with_the_difference(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("mine", "--lmbda", "0"))
    (job,) = fake.names("jobs")
    error = say(*train("mine", "--lmbda", "0.5", "--learning-rate", "5e-6"), code=42)
    assert f'the name "mine" means {job} already' in error
    assert "learning_rate is not set there and 5e-06 here, lmbda is 0 there and 0.5 here" in error
    fake.remove("jobs", job)
    error = say(*train("mine", "--lmbda", "0.5"), code=42)
    assert "another configuration, whose Job is gone" in error
    assert fake.names("jobs") == []


def test_a_job_of_that_name_that_is_not_ours_is_left_alone(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    job = yaml.safe_load(say(*train("mine"), "--dry-run"))
    ours: dict[str, str] = job["metadata"]["labels"]
    for labels, how in (
        (ours | {"stillhouse/hash": "f" * 40}, "is there with another content"),
        ({"app": "another"}, "is there and is not ours"),
    ):
        job["metadata"]["labels"] = labels
        fake.put("jobs", job)
        assert how in say(*train("mine"), code=42)
        assert not fake.created("configmaps"), "neither the code nor a name"
        fake.remove("jobs", job["metadata"]["name"])


def test_an_evaluation_says_how_the_runs_stand_that_it_names(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("one", "--lmbda", "0"))
    fake.complete(only(fake))
    say(*train("two", "--lmbda", "1"))
    adapters = [
        word for name in ("one", "two", "three") for word in ("--lora-paths", f"dump/{name}")
    ]
    out = say("eval", "mine", "--pair", "tiny", *adapters, *SITE)
    told = {line.strip().split(":")[0]: line for line in out.splitlines() if "dump/" in line}
    assert "trained" in told["dump/one"] and "waiting" in told["dump/two"]
    assert "no run of that name is known" in told["dump/three"]
    job = only(fake, "eval")
    assert say("status", "mine", *CLUSTER).startswith("mine: 1 point: 1 waiting")
    fake.fail(job, exit_code=42, message=said(42, "ConfigError: dump/three: no such run"))
    assert "dump/three: no such run" in say("status", "mine", *CLUSTER, code=1)
    say("retry", job, *CLUSTER)
    assert job not in fake.names("jobs")


def test_a_line_with_json_prints_one_object(fake: FakeApi, say: Callable[..., str]) -> None:
    told = json.loads(say(*train("mine"), "--json"))
    assert told["sent"] is True and told["job"] == only(fake)
    assert [point["name"] for point in told["points"]] == ["mine"]
    assert json.loads(say(*train("mine"), "--json"))["sent"] is False


# ------------------------------------------------------------------------- refused beforehand


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


# ------------------------------------------------------------------------------------ sweeps


def finish(fake: FakeApi, until: threading.Event, exit_codes: dict[str, int] | None = None) -> None:
    """Do what a cluster does: every Job that comes runs and ends."""
    while not until.is_set():
        for job in fake.all("jobs"):
            meta, conditions = job["metadata"], job.get("status", {}).get("conditions") or ()
            if any(c["type"] in ("Complete", "Failed") for c in conditions):
                continue
            code = (exit_codes or {}).get(meta["labels"].get("stillhouse/point", ""), 0)
            try:
                if code:
                    fake.fail(
                        meta["name"], exit_code=code, message=said(code, "as it was told to", TAIL)
                    )
                else:
                    fake.complete(meta["name"])
            except KeyError:  # it was deleted while we looked
                continue
        until.wait(0.02)


@pytest.fixture
def works(fake: FakeApi) -> Generator[dict[str, int], None, None]:
    """A cluster at work; how points end, by id, where it is not well."""
    until, codes = threading.Event(), dict[str, int]()
    thread = threading.Thread(target=finish, args=(fake, until, codes))
    thread.start()
    yield codes
    until.set()
    thread.join()


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


def test_status_knows_a_sweep_from_any_machine_and_by_any_of_its_words(
    fake: FakeApi, works: dict[str, int], say: Callable[..., str], tmp_path: Path
) -> None:
    say("run", *GRID, "name=mine", *CLUSTER, *SITE)
    sweep = grid(Path("runs"), "name=mine")
    os.chdir("/")  # another machine: nothing of it is here
    assert say("status", *CLUSTER).splitlines()[0] == f"{sweep.name}: 4 points: 4 done"
    point = sweep.points[2]
    for word in (point.name, point.id[:7], f"{point.slug}-{point.id}"):
        told = json.loads(say("status", str(word), *CLUSTER, "--json"))
        assert [one["id"] for one in told["points"]] == [point.id]
        assert told["totals"]["done"] == 1 and told["points"][0]["overrides"]["lmbda"] == 0.5
    error = say("status", "mone", *CLUSTER, code=42)
    assert 'no sweep, run or Job "mone"' in error
    assert json.loads(say("status", *CLUSTER, "--json"))["sweeps"][0]["totals"]["done"] == 4


def test_one_point_is_told_with_its_attempts_and_where_they_were(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("mine"))
    job = only(fake)
    fake.run_pod(job, node="gpu-7")
    fake.fail(job, exit_code=44, message=said(44, "OutOfMemory: 80 GB", "step 3\nstep 4"))
    out = say("status", "mine", *CLUSTER, code=1)
    for words in (f"job {job}: failed, ada's", "on gpu-7", "exit code 44: OutOfMemory", "| step 4"):
        assert words in out


def test_logs_come_from_the_pod_while_it_is_there_and_then_from_what_was_collected(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("mine"))
    job = only(fake)
    fake.logs[fake.run_pod(job)] = b"step 1\nstep 2\n"
    assert say("logs", "mine", *CLUSTER) == "step 1\nstep 2\n"
    fake.logs[fake.pods_of(job)[0]["metadata"]["name"]] = "10%\r20%\r\n\x1b[2Jé\n".encode()
    assert say("logs", "mine", *CLUSTER) == "10%\n20%\n\\x1b[2Jé\n"
    fake.logs[fake.pods_of(job)[0]["metadata"]["name"]] = b"step 1\nstep 2\n"
    assert json.loads(say("logs", "mine", *CLUSTER, "--json"))["logs"].popitem()[1] == (
        "step 1\nstep 2\n"
    )
    fake.complete(job)
    fake.remove("jobs", job)
    assert say("logs", "mine", *CLUSTER) == ""
    run = Path("runs") / job
    run.mkdir(parents=True)
    (run / "log.txt").write_text("step 1\nstep 2\nstep 3\n")
    assert say("logs", "mine", *CLUSTER) == "step 1\nstep 2\nstep 3\n"


def test_logs_follow_a_point_through_its_attempts(fake: FakeApi, say: Callable[..., str]) -> None:
    say(*train("mine"))
    job = only(fake)
    fake.logs[fake.run_pod(job)] = b"first attempt\n"
    words = [sys.executable, "-m", "stillhouse", "logs", "mine", "-f", *CLUSTER]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout and follower.stdout.readline() == "first attempt\n"
        fake.disrupt(job)
        fake.logs[fake.run_pod(job)] = b"second attempt\n"
        assert follower.stdout.readline() == "second attempt\n"
        fake.complete(job)
    assert follower.returncode == 0


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
    from stillhouse.sweep.cluster.connect import connect

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


def test_a_pod_that_goes_on_without_its_job_is_seen_and_nothing_is_sent_beside_it(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("mine"))
    job = only(fake)
    pod = fake.run_pod(job)
    fake.let_go(job)
    out = say("status", "mine", *CLUSTER)
    assert "1 running" in out and f"pod {pod} goes on, its Job was deleted without it" in out
    assert "nothing was sent" in (out := say(*train("mine"))) and pod in out
    assert fake.names("jobs") == []


def test_a_run_that_still_saves_is_waited_for(fake: FakeApi, say: Callable[..., str]) -> None:
    fake.pods_linger = True
    say(*train("mine"))
    job = only(fake)
    fake.run_pod(job)
    assert "asked to save and stop: mine" in say("cancel", "mine", *CLUSTER)
    out = say(*train("mine"))
    assert "its Job is being deleted; the same line sends it again once it is gone" in out
    fake.end_pods(job, exit_code=85)
    assert "sent: Job" in say(*train("mine"))


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


def test_what_the_ledger_kept_of_a_log_is_shown_when_the_pod_is_gone(
    fake: FakeApi,
    works: dict[str, int],
    say: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep = grid()
    works.update({point.id: 43 for point in sweep.points})
    say("run", *GRID, *CLUSTER, *SITE, code=1)
    for job in fake.all("jobs", "stillhouse/kind=train"):
        fake.remove("jobs", job["metadata"]["name"])
    out = say("logs", sweep.name, *CLUSTER)
    assert out.count("==> ") == 4 and out.count("step 6\nstep 7") == 4
    created = len(fake.names("jobs"))
    capsys.readouterr()
    assert main(["logs", sweep.name, "--point", sweep.points[0].id, *CLUSTER]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("step 6\nstep 7\n")
    assert f"pod is gone, `stillhouse collect {sweep.name}` fetches its log" in shown.err
    assert len(fake.names("jobs")) == created, "no pod is started to read a log"


def test_status_says_what_was_spent_and_plan_what_the_rest_will_cost(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    from stillhouse.sweep.cluster.connect import connect
    from stillhouse.sweep.cluster.ledger import Ledger, Record, write_sweep

    sweep = grid()
    cluster = connect(None, None)
    record = Record("done", at=1e9, queued=7200, running=3600, devices=1)
    Ledger(cluster, "stillhouse-runs").write({sweep.points[0].id: record})
    write_sweep(cluster, registry.record_of(sweep))
    cluster.close()
    assert "queued" in say("status", sweep.name, *CLUSTER, "--cost")
    told = json.loads(say("status", sweep.name, *CLUSTER, "--cost", "--json"))
    assert "device_hours" in told["cost"]
    out = say("plan", *GRID, *CLUSTER, *SITE, "price_usd_per_hour=2")
    assert "GPU-hours" in out and "$" in out, "the first of that shape took an hour"


def test_collect_brings_a_sweep_home_and_the_report_finds_it(
    fake: FakeApi, say: Callable[..., str], tmp_path: Path
) -> None:
    from test_cluster_collect import Lab, kubelet

    from stillhouse.sweep.cluster.connect import connect
    from stillhouse.sweep.cluster.ledger import write_sweep

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


# -------------------------------------------------------------------------------------- size


def test_a_status_of_thousands_of_points_is_one_screen_and_a_few_lists(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    from stillhouse.sweep.cluster.connect import connect
    from stillhouse.sweep.cluster.ledger import write_sweep

    pattern = yaml.safe_load(say(*train("pattern"), "--dry-run"))
    points = [f"{place:010x}" for place in range(POINTS)]
    for place, id_ in enumerate(points):
        fake.put("jobs", _like(pattern, id_, place))
    cluster = connect(None, None)
    write_sweep(cluster, _record(points))
    cluster.close()
    before = sum(fake.requests.values())
    out = say("status", "big", *CLUSTER, code=1)
    shown = out.splitlines()
    assert shown[0] == "big: 1500 points: 750 done, 650 waiting, 100 failed"
    assert len(shown) <= 40, "one screen"
    assert fake.requests["list", "jobs"] == 3, "pages of 500, once"
    assert sum(fake.requests.values()) - before < 15, "nothing is asked point by point"


def _like(pattern: Json, id_: str, place: int) -> Json:
    """A Job of a point: half of them done, 100 failed, the rest suspended."""
    job: Json = json.loads(json.dumps(pattern))
    meta = job["metadata"]
    job["metadata"] = {
        "name": f"tiny-gkd-{id_}",
        "labels": meta["labels"] | {"stillhouse/point": id_, "stillhouse/sweep": "big"},
        "annotations": meta["annotations"] | {"stillhouse/points": id_},
    }
    ended = {"status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    if place < POINTS // 2:
        job["status"] = {"conditions": [{"type": "Complete", **ended}]}
    elif place < POINTS // 2 + 100:
        reason = {"reason": "DeadlineExceeded", "message": "Job was active longer than specified"}
        job["status"] = {"conditions": [{"type": "Failed", **ended, **reason}]}
    else:
        job["spec"]["suspend"] = True
        job["status"] = {}
    return job


def _record(points: list[str]) -> Json:
    return {
        "format": 1, "name": "big", "suite": None, "baselines": [],
        "points": [
            {"id": id_, "slug": "tiny-gkd", "name": None,
             "overrides": {"lmbda": place % 10 / 10, "seed": place // 10}}
            for place, id_ in enumerate(points)
        ],
    }  # fmt: skip


def test_a_status_with_many_reasons_names_three_points_of_each(
    fake: FakeApi, works: dict[str, int], say: Callable[..., str]
) -> None:
    sweep = load_sweep(None, ["pair=tiny", "seeds=5", *SITE], Path("runs"), "cluster")
    works.update({point.id: 43 for point in sweep.points})
    say("run", "pair=tiny", "seeds=5", *CLUSTER, *SITE, code=1)
    out = say("status", sweep.name, *CLUSTER, code=1)
    (line,) = [line for line in out.splitlines() if line.startswith("  failed")]
    assert line.startswith("  failed   5: as it was told to [") and line.count("seed=") == 3


def test_a_dry_run_is_what_a_script_prints_too(fake: FakeApi, tmp_path: Path) -> None:
    words = [str(ROOT / "k8s" / "train.sh"), *PUBLISHED[0].split()[1:], "--image", IMAGE]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    for _ in range(2):
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert "run directory: /runs/" in done.stdout
    assert "nothing was sent" in done.stdout and len(fake.names("jobs")) == 1
