"""Test pods that really train: containers of this machine, as user 1000, in *restricted*.

*restricted* is the Pod Security level of the namespace. The results are compared, bit by bit, with
what the same sweep produces on this machine without a cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.rundir import RunDir, Runs
from tests.cluster.api import PATHS
from tests.cluster.cluster import Json, Kubernetes, until
from tests.cluster.desk import AWAY, ROOT, Desk, Typed, at_desk, end_of

pytestmark = pytest.mark.cluster

CACHE = ROOT / ".cache" / "tests"  # the cheap pair, made once per checkout
CHEAP = (
    "pair: tiny, teacher_steps: 8, student_steps: 8, per_device_train_batch_size: 4,"
    " max_new_tokens: 6, sanity_max_nll: 9, threads: 1"
)
SMALL = (
    "question: Does a sweep survive a cluster?",
    f"base: {{{CHEAP}, max_steps: 10, save_steps: 3}}",
    "grid: {lmbda: [0, 1]}",
    "compare: {by: lmbda, metric: tiny_mc/acc, baseline: 0}",
    "eval: {suite: tiny, limit: 8, pack: 3}",
)
POISON = "1.0e+30"  # a learning rate that makes the loss NaN
ROUGH = (
    f"base: {{{CHEAP}, max_steps: 150, save_steps: 10}}",
    "grid: {lmbda: [0.7, 0.8, 0.9, 1]}",
    f"points: [{{lmbda: 1, learning_rate: {POISON}}}]",
)
SLOW = (  # a rule that one of two points breaks in its second step
    "{slow: {metric: train/learning_rate, condition: below, limit: 0.001, window: 2,"
    " unless_above: null, action: stop, optional: false}}"
)
STOPPING = (
    f"base: {{{CHEAP}, lmbda: 1, max_steps: 10, save_steps: 3, watch_rules: {SLOW}}}",
    "grid: {learning_rate: [0.0001, 0.005]}",
    "compare: {by: learning_rate, metric: tiny_mc/acc, baseline: 0.005}",
    "eval: {suite: tiny, limit: 8, pack: 3}",
)
WITHIN_S = 60  # docs/cluster.md: why something waits is named within a minute
NEEDED_S = 400.0  # for anything that a few pods do one after the other, on a busy machine


@pytest.fixture
def ada(kube_real: Kubernetes, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Desk]:
    name = request.node.name.replace("_", "-").removeprefix("test-")[:40].strip("-")
    with at_desk(kube_real, name, tmp_path) as desk:
        yield desk


def at_site(ada: Desk, **more: str) -> str:
    """The `site:` of a sweep whose pods run on the real node: little is asked, for two cores."""
    asked = {"image": ada.kube.real_image(), "cpu": "0.3", "memory_gib": "3", "shm_gib": "0.5"}
    words = [f"{key}: {value}" for key, value in (asked | more).items()]
    return f"site: {{{', '.join(words)}}}"


def locally(ada: Desk, name: str, lines: tuple[str, ...]) -> Typed:
    """The same sweep, run on this machine; its runs are in the folder `here`."""
    here = ada.folder / "here"
    here.mkdir()
    (here / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return ada.start("run", f"here/{name}.yaml", "--runs", "here", f"cache_dir={CACHE}")


def ended(ada: Desk, kind: str) -> Json:
    """The one Job of a kind, once it is at its end."""
    until("it is made", lambda: ada.seen.jobs(kind))
    until("it is at its end", lambda: end_of(ada.seen.jobs(kind)[0]), NEEDED_S)
    (job,) = ada.seen.jobs(kind)
    return job


def job_called(ada: Desk, name: str) -> Json:
    """The Job of a line of k8s/train.sh."""
    jobs = ada.seen.jobs("train")
    return next(j for j in jobs if j["metadata"]["annotations"].get("stillhouse/names") == name)


def outcome(runs: Path) -> dict[str, object]:
    """All of a sweep that must not depend on where it ran and on what befell it."""
    found: dict[str, object] = {}
    for run in Runs(runs).all():
        weights = run.adapter / "adapter_model.safetensors"
        found[f"{run.id} adapter"] = weights.read_bytes() if weights.exists() else None
        found[f"{run.id} metrics"] = [
            {key: value for key, value in one.items() if not key.startswith("time/")}
            for one in run.metrics()
        ]
    for file in sorted(runs.glob("**/eval/*.json")):
        score = json.loads(file.read_text())
        kept = {key: score[key] for key in ("value", "n", "samples", "key", "quant_type")}
        found[str(file.relative_to(runs))] = kept
    return found


def table(said: str) -> list[str]:
    """A report without its lines about time, money and the code's place: what the points gave."""
    return [line for line in said.partition("| lmbda | runs")[0].splitlines() if "|" in line]


# ------------------------------------------------------------------------------- from end to end


def test_a_detached_sweep_of_real_pods_gives_what_this_machine_gives(ada: Desk):
    sweep = ada.sweep("small", *SMALL, at_site(ada, gpu_resource="null"))
    said = ada.say("run", sweep, *AWAY, "--detach")
    assert "this machine is not needed any more" in said
    reference = locally(ada, "small", SMALL)  # meanwhile
    driver = ended(ada, "drive")
    assert end_of(driver) == "Complete"
    assert ada.status("small")["totals"]["done"] == 2
    assert [ada.seen.count(kind) for kind in ("prepare", "train", "eval")] == [1, 2, 1]
    assert ada.seen.made_twice() == []
    owners = {path.stat().st_uid for path in ada.space.runs.rglob("*")}
    assert owners == {1000}, "an unprivileged user wrote it all"

    name = driver["metadata"]["name"]
    assert "scored 2 points and 3 baselines" in ada.say("logs", name, *AWAY)
    assert "of 5 directories came" in ada.say("collect", sweep, "--adapters")
    came = outcome(ada.folder / "runs")
    assert len([key for key in came if key.endswith("adapter")]) == 2 and None not in came.values()
    reference.ends(timeout_s=NEEDED_S)
    here = ada.folder / "here"
    assert came == outcome(here)
    there, at_home = ada.say("report", "small"), ada.say("report", "small", "--runs", "here")
    assert "lmbda = 1" in there
    assert table(there) == table(at_home)
    ada.delete_jobs()
    before = ada.seen.count()
    assert "nothing left to do" in ada.say("run", sweep, *AWAY)
    assert ada.seen.count() == before
    one = next(iter(Runs(here).all())).id
    assert "trained, 10 steps" in ada.say("logs", sweep, "--point", one, *AWAY)


def test_a_point_that_a_rule_stops_leaves_state_cause_and_rule_and_the_sweep_goes_on(ada: Desk):
    sweep = ada.sweep("watched", *STOPPING, at_site(ada, gpu_resource="null"))
    said = ada.say("run", sweep, *AWAY, code=1)
    assert "1 stopped" in said and "by watch rule slow: train/learning_rate is 0.0001" in said
    totals = ada.status("watched", code=1)["totals"]
    assert (totals["done"], totals["stopped"]) == (1, 1)
    (stopped,) = [p["id"] for p in ada.status("watched", code=1)["points"] if p["cause"]]
    (job,) = ada.seen.jobs("train", point=stopped)
    assert job["status"]["failed"] == 1, "it is not retried"
    (path,) = ada.space.runs.glob(f"*-{stopped}")
    run = RunDir(path)
    status = run.status()
    assert (status["exit_code"], status["stopped_by"], status["attempt"]) == (46, "slow", 1)
    assert (run.checkpoints / "step-2").is_dir() and not run.is_trained()
    before = ada.seen.count()
    assert "nothing left to do" in ada.say("run", sweep, *AWAY, code=1)
    assert ada.seen.count() == before and ada.seen.made_twice() == []
    ada.say("collect", sweep)
    assert "1 stopped by slow" in ada.say("report", "watched")


def test_a_preflight_is_a_job_that_succeeds_whatever_its_verdict(ada: Desk):
    pair = [word.replace(": ", "=") for word in CHEAP.split(", ")]
    site = at_site(ada, gpu_resource="null").removeprefix("site: {").removesuffix("}")
    words = [*pair, "student_steps=null", "quant=none", *site.replace(": ", "=").split(", ")]
    line = ("preflight", *words, "--prompts", "4", *AWAY)
    assert "sent: Job preflight-tiny-" in ada.say(*line)
    job = ended(ada, "preflight")
    assert end_of(job) == "Complete", "unlikely is a verdict, and nothing to try again"
    (file,) = ada.space.runs.glob("preflight/tiny-*.json")
    found = json.loads(file.read_text())
    assert (found["verdict"], found["rule"]) == ("unlikely", "same_function")
    assert "the teacher is the student" in ada.say("logs", job["metadata"]["name"], *AWAY)
    assert "nothing was sent" in ada.say(*line)


def test_what_is_pushed_lies_whole_on_the_cache_volume_and_is_not_sent_again(ada: Desk):
    rows = ada.folder / "rows"
    (rows / "deep").mkdir(parents=True)
    (rows / "a.jsonl").write_text('{"prompt": "2 + 2 ="}\n' * 5000)
    (rows / "deep" / "b.bin").write_bytes(bytes(range(256)) * 9000)
    site = at_site(ada, gpu_resource="null").removeprefix("site: {").removesuffix("}")
    line = ("push", "rows", *site.replace(": ", "=").split(", "))
    said = ada.say(*line)
    (there,) = ada.space.cache.glob("pushed/rows-*")
    assert f"/cache/pushed/{there.name}" in said
    for file in ("a.jsonl", "deep/b.bin"):
        assert (there / file).read_bytes() == (rows / file).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    assert f"/cache/pushed/{there.name}" in ada.say(*line)
    assert before == {path: path.stat().st_mtime_ns for path in there.rglob("*")}


# --------------------------------------------------------------------------------- disturbances


class Rough:
    """The points of one sweep on the real node, and what one may do to them."""

    def __init__(self, ada: Desk, sweep: str) -> None:
        self.ada, self.kube, self.sweep = ada, ada.kube, sweep
        points = json.loads(ada.say("plan", sweep, *AWAY, "--json"))["points"]
        is_poison = {p["id"]: float(p["overrides"].get("learning_rate", 0)) > 1 for p in points}
        (self.poison,) = [id_ for id_, is_ in is_poison.items() if is_]
        self.healthy = [id_ for id_, is_ in is_poison.items() if not is_]
        self.undisturbed = list(self.healthy)

    def run(self, id_: str) -> RunDir:
        (path,) = [*self.ada.space.runs.glob(f"*-{id_}")] or [Path("nowhere")]
        return RunDir(path)

    def steps(self, id_: str) -> int:
        """How many steps a point has made."""
        file = self.run(id_).metrics_file
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def pods(self, id_: str) -> list[Json]:
        """Its pods that are not at their end, nor on the way to it."""
        selector = f"?labelSelector=stillhouse/point={id_}"
        pods = self.kube.call("GET", PATHS["Pod"].format(self.ada.space.name) + selector)["items"]
        return [pod for pod in pods if is_at_work(pod)]

    def cause(self, id_: str) -> str:
        """What `status` says of it."""
        said = self.ada.start("status", self.sweep, *AWAY, "--json")
        said.process.wait(60)
        (found,) = (p for p in json.loads(said.said)["points"] if p["id"] == id_)
        return found["cause"] or ""

    def job(self, id_: str) -> Json:
        """Its Job as it last was."""
        (job,) = self.ada.seen.jobs("train", point=id_)
        return job

    def in_mid_training(self, ids: list[str], more_than: int = 5) -> str:
        """One of these points, as soon as one has made so many steps and is not trained."""

        def one() -> str:
            begun = [id_ for id_ in ids if self.steps(id_) > more_than]
            return next((id_ for id_ in begun if not self.run(id_).is_trained()), "")

        return until("one is in mid-training", one, NEEDED_S)

    def next(self) -> str:
        """A healthy point in mid-training that nothing has happened to yet."""
        id_ = self.in_mid_training(self.undisturbed)
        self.undisturbed.remove(id_)
        return id_


def is_at_work(pod: Json) -> bool:
    is_over = pod["status"]["phase"] in ("Succeeded", "Failed")
    return not is_over and "deletionTimestamp" not in pod["metadata"]


def trainer_of(id_: str) -> int:
    """The process that trains a point, as this machine numbers it."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
            if b"train.py" in line and f"STILLHOUSE_ID={id_}".encode() in environment:
                return int(folder.name)
    raise AssertionError(f"nobody trains {id_}")


def test_whatever_befalls_pods_and_node_the_results_are_as_if_undisturbed(ada: Desk):
    kube, here = ada.kube, ada.space.name
    kube.kueue.queue("rough", here, {"cpu": "0.7"})  # two pods at once
    kube.kueue.priority("urgent", 1000)
    sweep = ada.sweep("rough", *ROUGH, at_site(ada, queue="rough", gpu_resource="null"))
    points = Rough(ada, sweep)
    assert "sent" in ada.say("run", sweep, *AWAY, "--detach")
    reference = locally(ada, "rough", ROUGH)  # meanwhile

    until("the driver submits", lambda: ada.seen.jobs("train"), NEEDED_S)
    kube.stop_apiserver()
    kube.start_apiserver()

    killed = points.next()
    os.kill(trainer_of(killed), signal.SIGKILL)

    evicted = points.next()
    name = points.pods(evicted)[0]["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction"}
    meta = {"metadata": {"name": name, "namespace": here}}
    kube.call("POST", f"{PATHS['Pod'].format(here)}/{name}/eviction", eviction | meta)

    deleted = points.next()
    name = points.pods(deleted)[0]["metadata"]["name"]
    kube.kubectl("delete", "pod", name, "-n", here, "--grace-period=0", "--force", "--wait=false")

    # One of higher priority takes a place. It has not memory enough to load its program.
    points.next()
    urgent = ("urgent", *words_of(ada), "max_steps=151", "queue_priority=urgent")
    line = ("train", *urgent, "memory_gib=0.2", "shm_gib=0.1")
    ada.say(*line)
    preempted = until("one is preempted", lambda: preempted_of(points), NEEDED_S)
    made = points.steps(preempted)
    until("the urgent one is at its end", lambda: end_of(job_called(ada, "urgent")), NEEDED_S)
    said = ada.say("status", "urgent", *AWAY, code=1)
    assert "(OOMKilled)" in said and "site.memory_gib" in said

    # It goes on; then all of the node is lost, the driver too.
    lost = points.in_mid_training([preempted], more_than=made)
    kube.kill_node()
    until("the node is missed", lambda: kube.ready_nodes("type=real") == 0)
    until("its pods are given up", lambda: not points.pods(lost))
    until("the status names the node", lambda: "its node" in points.cause(lost), WITHIN_S)
    kube.start_node()
    driver = ended(ada, "drive")

    # Nothing lost, nothing twice, and poison is not retried.
    totals = ada.status("rough", code=1)["totals"]
    assert (totals["done"], totals["failed"]) == (4, 1)
    said = ada.say("status", sweep, *AWAY, code=1)
    assert "failed" in said and "Diverged: step 1: the loss is nan" in said
    assert ada.seen.count("train") == 6 and ada.seen.made_twice() == []
    assert points.job(points.poison)["status"]["failed"] == 1
    poisoned = points.run(points.poison)
    assert poisoned.status()["attempt"] == 1, poisoned.log_file.read_text()
    (left, *_) = json.loads(points.job(killed)["metadata"]["annotations"]["stillhouse/attempts"])
    assert left["code"] == 137, "what an attempt left is kept, its pod is long gone"
    for id_ in (killed, evicted, deleted, lost):
        assert points.run(id_).status()["attempt"] > 1

    said = ada.say(*line, code=1)
    assert "nothing was sent" in said and ("out of memory" in said or "OOMKilled" in said)
    assert "failed" in ada.say("logs", driver["metadata"]["name"], *AWAY)

    ada.say("collect", sweep, "--adapters")
    came = outcome(ada.folder / "runs")
    assert len([key for key, value in came.items() if "adapter" in key and value]) == 4
    reference.ends(code=1, timeout_s=NEEDED_S)
    assert came == outcome(ada.folder / "here")


def preempted_of(points: Rough) -> str:
    """A point that made steps and has to wait now; "" where there is none."""
    suspended = [id_ for id_ in points.healthy if points.job(id_)["spec"].get("suspend")]
    return next((id_ for id_ in suspended if points.steps(id_)), "")


def words_of(ada: Desk) -> list[str]:
    """What makes a line of k8s/train.sh of a point of the sweep."""
    first = ada.seen.jobs("train")[0]["metadata"]["annotations"]["stillhouse/words"].split()
    site = (
        at_site(ada, queue="rough", gpu_resource="null")
        .removeprefix("site: {")
        .removesuffix("}")
        .split(", ")
    )
    kept = [w for w in first if not w.startswith(("runs=", "cache_dir=", "name="))]
    return [*kept, *(word.replace(": ", "=", 1) for word in site)]


# ------------------------------------------------------------------------ in mid-submission


def test_the_api_server_restarts_in_mid_submission_and_nothing_is_sent_twice(ada: Desk):
    lmbdas = ", ".join(str(i / 60) for i in range(60))
    lines = ("base: {pair: tiny}", f"grid: {{lmbda: [{lmbdas}]}}", "seeds: 2")
    fake = "{key: kwok.x-k8s.io/node, operator: Exists}"
    site = at_site(ada, node_selector="{type: fake}", tolerations=f"[{fake}]")
    run = ada.start("run", ada.sweep("many", *lines, site), *AWAY)
    until("it is under way", lambda: ada.seen.count("train") >= 10, NEEDED_S)
    ada.kube.stop_apiserver()
    sent = ada.seen.count("train")
    ada.kube.start_apiserver()
    assert "120 done" in run.ends(0, NEEDED_S)
    assert sent < 120, "it was in mid-submission"
    assert ada.seen.count("train") == 120 and ada.seen.made_twice() == []
