"""Measure the cluster backend on a real API server, as ratios within one run.

    python -m benchmarks.cluster                     every part in its full size, printed
    python -m benchmarks.cluster queue --points 200  one part, small
    python -m benchmarks.cluster --write             into docs/benchmarks.md, each part once it ends

Nodes are fake (kwok) except in `real`, which runs under tests/cluster/alone and needs root. The
duration of each part is printed with its numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from benchmarks.run import put
from stillhouse.rundir import Runs, new_record, write_json
from stillhouse.sweep.cluster.code_bundle import bundle
from stillhouse.sweep.cluster.connect import Cluster, connect
from stillhouse.sweep.cluster.jobs import WRITERS
from stillhouse.sweep.cluster.jobspec import JobSpecs
from stillhouse.sweep.cluster.ledger import Ledger, prepare_of
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.state import Record
from tests.cluster import binaries
from tests.cluster.api import PATHS
from tests.cluster.cluster import Json, Kubernetes, until
from tests.cluster.desk import AWAY, IMAGE, Desk, Typed, at_desk, end_of

FULL = {"submit": 10_000, "queue": 2_000, "chaos": 10_000, "real": 5}
TITLES = {
    "submit": "Jobs: submitting, submitting again, looking",
    "queue": "Jobs: a sweep through Kueue, and one that is more urgent",
    "chaos": "Jobs: to completion, with failing pods and drivers that are killed",
    "real": "Jobs: a real pod that does nothing",
}
SITE = (f"image={IMAGE}", "cpu=0.05", "memory_gib=0.5", "shm_gib=0.1")
KUBECTLS = 40  # files for kubectl create; it is slow enough for a rate
RUNS = 5
QUOTA = 64
# Pods of one second leave the quota half empty: on 2 cores the API server then lets 7 Jobs a second
# through Kueue and 20 by hand (a ratio of 2.8), and no Job is ever preempted. A short point of ours
# takes ten.
POD_S = 10
WINDOW = 1_000
FAILING = 0.03
KILLS = 10
MEMORY_MIB = 400


# ------------------------------------------------------------------------------------- helpers


@contextlib.contextmanager
def desk(kube: Kubernetes, name: str) -> Generator[Desk, None, None]:
    with tempfile.TemporaryDirectory() as folder, at_desk(kube, name, Path(folder)) as ada:
        yield ada


@contextlib.contextmanager
def client(ada: Desk) -> Generator[Cluster, None, None]:
    """The launcher's own client, as ada."""
    os.environ["KUBECONFIG"] = str(ada.kubeconfig)
    with contextlib.closing(connect(None, None)) as cluster:
        yield cluster


def sweep_of(ada: Desk, name: str, points: int, first: int, *words: str) -> tuple[str, Sweep]:
    """A sweep of so many seeds from `first` on, scored on nothing: its file, and itself."""
    seeds = ", ".join(map(str, range(first, first + points)))
    file = ada.sweep(name, "base: {pair: tiny}", f"seeds: [{seeds}]")
    path = ada.folder / file
    return file, load_sweep(str(path), [*SITE, *words], Path("runs"), "cluster")


def bodies_of(sweep: Sweep) -> list[Json]:
    """The Jobs that `run` would send for the points of a sweep."""
    steps, groups, code = JobSpecs(sweep), sweep.groups, bundle().key
    actions = (Action("train", groups[point.id], (point.id,)) for point in sweep.points)
    return [render(steps.of(action), sweep.site, code) for action in actions]


def jobs_in(ada: Desk) -> int:
    """How many Jobs there are, by the cheapest question."""
    found = ada.kube.call("GET", f"{PATHS['Job'].format(ada.space.name)}?limit=1")
    return len(found["items"]) + found["metadata"].get("remainingItemCount", 0)


def wait(
    what: str, check: Callable[[], bool], typed: Typed | None = None, each_s: float = 0.2
) -> float:
    """The time at which `check` first holds; it is polled rarely, to cost the others little."""
    end = time.monotonic() + 3_600
    while not check():
        if typed is not None and typed.process.poll() not in (None, 0):
            sys.exit(f"{typed} ended with {typed.process.returncode}:\n{typed.said[-3000:]}")
        if time.monotonic() > end:
            sys.exit(f"not within an hour: {what}")
        time.sleep(each_s)
    return time.monotonic()


def let_go(ada: Desk) -> None:
    """Unsuspend the first Job, where no controller does it."""
    path = PATHS["Job"].format(ada.space.name)
    (job,) = until("it is made", lambda: ada.kube.call("GET", path)["items"], 120)
    patch: Json = {"spec": {"suspend": False}}
    name = job["metadata"]["name"]
    ada.kube.call("PATCH", f"{path}/{name}", patch, kind="merge-patch+json")


def complete(ada: Desk, sweep: str | None = None) -> int:
    """How many trainings (of a sweep) are complete."""
    jobs = ada.seen.jobs("train", sweep=sweep) if sweep else ada.seen.jobs("train")
    return sum(end_of(job) == "Complete" for job in jobs)


def table(rows: Sequence[tuple[str, str, str]], head: str = "measured") -> str:
    lines = [f"| | {head} | limit |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {found} | {limit} |" for what, found, limit in rows])


# ---------------------------------------------------------------------------------- submitting


def submit(programs: Path, points: int) -> str:
    """10,000 points born suspended, window off; then again, with nothing to do, and `status`."""
    with Kubernetes(programs, fake_nodes=1) as kube:
        make_queues_known(kube)
        before, _ = _bare(kube, "before", points // 2)  # on both sides of ours: the server ages
        ours, memory, again = _ours(kube, points)
        after, kubectl = _bare(kube, "after", points // 2)
    bare = 2 / (1 / before + 1 / after)
    listed, status, rerun = again
    return table(
        [
            (f"`run`: {points:,} Jobs, each second", f"{ours:.0f}", ""),
            (f"bare create loop, {WRITERS} at once, same bodies", f"{bare:.0f}", ""),
            ("ratio", f"{ours / bare:.2f}", "≥ 0.8"),
            (f"`kubectl create -f` one after the other ({KUBECTLS})", f"{kubectl:.1f}", ""),
            ("ratio", f"{ours / kubectl:.0f}", "≥ 10"),
            ("memory of the launcher, MiB", f"{memory:.0f}", f"{MEMORY_MIB}"),
            (f"one paged LIST of {points:,} Jobs, whole process, s", listed.shown(listed), ""),
            ("`status`, s", status.shown(listed), "2"),
            ("`run` with nothing to do, s", rerun.shown(listed), "2"),
        ]
    )


def make_queues_known(kube: Kubernetes) -> None:
    """Kueue's kinds without Kueue: what is born suspended stays so."""
    for path in sorted((kube.binaries / "manifests" / "kueue").iterdir()):
        kube.create(yaml.load(path.read_text(), yaml.CSafeLoader))


def make_queue(ada: Desk) -> None:
    kind = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue"}
    meta = {"name": "still", "namespace": ada.space.name}
    until(
        "queues are known",
        lambda: ada.kube.create({**kind, "metadata": meta, "spec": {"clusterQueue": "none"}}),
    )


def _ours(kube: Kubernetes, points: int) -> tuple[float, float, list[Took]]:
    """Jobs a second, MiB of the launcher, and what a LIST, `status` and an idle `run` took."""
    queued = ("site=kueue", "queue=still", f"max_parallel={2 * points}")
    with desk(kube, "ours") as ada:
        make_queue(ada)
        file, sweep = sweep_of(ada, "big", points, 0, *queued)
        command = ("run", file, *queued, *SITE, *AWAY)
        ada.seen.close()  # 10,000 Jobs are told to nobody else
        driver = ada.start(*command)
        let_go(ada)  # the prepare Job
        begin = wait("the first is there", lambda: jobs_in(ada) > 1, driver, 0.02)
        first = jobs_in(ada)
        # The prepare Job may be gone by then: what has ended is deleted after a while.
        end = wait("all are there", lambda: jobs_in(ada) >= points, driver)
        memory = peak_mib(driver)
        driver.kill()
        with client(ada) as cluster:
            done = {point.id: Record("done", at=time.time()) for point in sweep.points}
            Ledger(cluster, "stillhouse-runs").write(done)
        status = ["-m", "stillhouse", "status", "big", *AWAY]
        looked = in_turn(ada, ["-c", LISTER], status, ["-m", "stillhouse", *command])
        return (points - first) / (end - begin), memory, looked


LISTER = """
from stillhouse.sweep.cluster.connect import connect
from stillhouse.sweep.cluster.manifest import SELECTOR
print(sum(len(items) for items, _ in connect(None, None).pages("jobs", SELECTOR)))
"""


@dataclass
class Took:
    """Seconds of some runs of one command: by the clock, and of the processor."""

    wall: list[float] = field(default_factory=list[float])
    processor: list[float] = field(default_factory=list[float])

    def shown(self, first: Took) -> str:
        """Medians, and those of the ratios to the first command of each turn."""
        found: list[str] = []
        for mine, other in ((self.wall, first.wall), (self.processor, first.processor)):
            ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
            of = "" if self is first else f" ({ratio:.2f} of it)"
            found.append(f"{statistics.median(mine):.2f}{of}")
        return f"{found[0]}; processor {found[1]}"


def in_turn(ada: Desk, *commands: Sequence[str]) -> list[Took]:
    """What commands take, one after the other, so that all meet the same load."""
    took = [Took() for _ in commands]
    for _ in range(RUNS):
        for words, each in zip(commands, took, strict=True):
            before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            done = subprocess.run(
                [sys.executable, *words], cwd=ada.folder, env=ada.env(),
                capture_output=True, text=True,
            )  # fmt: skip
            each.wall.append(time.perf_counter() - begin)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            each.processor.append(used)
            if done.returncode:
                said = f"{done.stdout}{done.stderr}"
                sys.exit(f"{' '.join(words)} ended with {done.returncode}: {said}")
    return took


def peak_mib(typed: Typed) -> float:
    """The most memory that a process ever had."""
    status = Path(f"/proc/{typed.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def _bare(kube: Kubernetes, name: str, points: int) -> tuple[float, float]:
    """Jobs a second: by a loop that does nothing else, and by kubectl, one file at a time."""
    with desk(kube, name) as ada, client(ada) as cluster:
        ada.seen.close()
        _, sweep = sweep_of(ada, name, points + KUBECTLS, 0, "site=kueue", "queue=still")
        bodies = bodies_of(sweep)
        begin = time.monotonic()
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda body: cluster.create("jobs", body), bodies[:points]))
        bare = points / (time.monotonic() - begin)
        files = [ada.folder / f"{nth}.json" for nth in range(KUBECTLS)]
        for file, body in zip(files, bodies[points:], strict=True):
            file.write_text(json.dumps(body))
        begin = time.monotonic()
        for file in files:
            kube.kubectl("create", "-n", ada.space.name, "-f", str(file))
        return bare, KUBECTLS / (time.monotonic() - begin)


# --------------------------------------------------------------------------------------- queue


def queue(programs: Path, points: int) -> str:
    """2,000 points through a quota of 64 GPUs; then again, with a more urgent sweep in between."""
    urgent = points // 10
    with Kubernetes(programs, fake_nodes=10, kueue=True) as kube:
        kube.behave(labels={"stillhouse/kind": "train"}, after_s=POD_S)
        by_hand = _by_hand(kube, points)
        alone = _through_kueue(kube, points)
        mixed, preempted = _with_an_urgent_one(kube, points, urgent)
    return table(
        [
            (
                f"{points:,} Jobs of {POD_S} s resumed by hand in a window of {QUOTA}, s",
                f"{by_hand:.0f}",
                "",
            ),
            (f"the same as a sweep through a LocalQueue of {QUOTA} GPUs, s", f"{alone:.0f}", ""),
            ("ratio", f"{alone / by_hand:.2f}", "1.2"),
            (
                f"with {urgent} more urgent points and Kueue killed on the way, s",
                f"{mixed:.0f}",
                "",
            ),
            ("Jobs that were preempted", f"{preempted}", ""),
            ("Jobs made twice, points lost, failures counted", "0, 0, 0", "0"),
        ]
    )


def _by_hand(kube: Kubernetes, points: int) -> float:
    """Seconds from the first create to the last end, nobody but us letting Jobs go."""
    with desk(kube, "hand") as ada, client(ada) as cluster:
        _, sweep = sweep_of(ada, "hand", points, 0)
        bodies = bodies_of(sweep)
        for body in bodies:
            body["spec"]["suspend"] = True
        waiting: list[str] = []
        begin = time.monotonic()
        go: Json = {"spec": {"suspend": False}}

        def create(body: Json) -> None:
            waiting.append(cluster.create("jobs", body)["metadata"]["name"])

        def resume(name: str) -> None:
            cluster.patch("jobs", name, go)

        with ThreadPoolExecutor(WRITERS) as makers, ThreadPoolExecutor(WRITERS) as pool:
            made = [makers.submit(create, body) for body in bodies]
            resumed = 0
            while (done := complete(ada)) < points:
                while waiting and resumed - done < QUOTA:
                    pool.submit(resume, waiting.pop(0))
                    resumed += 1
                time.sleep(0.02)
            assert all(one.done() for one in made)
        return time.monotonic() - begin


def _through_kueue(kube: Kubernetes, points: int) -> float:
    with desk(kube, "alone") as ada:
        kube.kueue.queue("alone", ada.space.name, {"nvidia.com/gpu": QUOTA})
        file, _ = sweep_of(ada, "alone", points, 0)
        driver = ada.start("run", file, "site=kueue", "queue=alone", *SITE, *AWAY)
        begin = wait("the first is made", lambda: ada.seen.count("train") > 0, driver)
        end = wait("all are complete", lambda: complete(ada) == points, driver)
        driver.ends()
        check(ada, points)
        return end - begin


def _with_an_urgent_one(kube: Kubernetes, points: int, urgent: int) -> tuple[float, int]:
    kube.kueue.priority("bench-urgent", 1000)
    with desk(kube, "mixed") as ada:
        kube.kueue.queue("mixed", ada.space.name, {"nvidia.com/gpu": QUOTA})
        queued = ("site=kueue", "queue=mixed", *SITE, *AWAY)
        usual, _ = sweep_of(ada, "usual", points, 0)
        other, _ = sweep_of(ada, "urgent", urgent, points)
        first = ada.start("run", usual, *queued)
        begin = wait("the first is made", lambda: ada.seen.count("train") > 0, first)
        wait("a quarter is complete", lambda: complete(ada) >= points // 4, first)
        second = ada.start("run", other, "queue_priority=bench-urgent", *queued)
        wait("it is at work", lambda: complete(ada, "urgent") > 0, second)
        kube.kueue.stop()
        wait("nobody is let go", lambda: not ada.seen.at_work)
        kube.kueue.start()
        end = wait("all are complete", lambda: complete(ada) == points + urgent, first)
        second.ends()
        first.ends()
        check(ada, points + urgent)
        return end - begin, len(ada.seen.put_back)


def check(ada: Desk, points: int, may_fail: bool = False) -> None:
    """Every point exactly once, and no failure counted that was not the pods' own."""
    jobs, twice = ada.seen.jobs("train"), ada.seen.made_twice()
    failed = sum(bool(job["status"].get("failed")) for job in jobs)
    if len(jobs) != points or twice or complete(ada) != points or (failed and not may_fail):
        sys.exit(
            f"{len(jobs)} Jobs for {points} points, {complete(ada)} complete, {len(twice)} made"
            f" twice ({twice[:3]}), {failed} with failures"
        )


# --------------------------------------------------------------------------------------- chaos


def chaos(programs: Path, points: int) -> str:
    """10,000 points, window 1,000, 3 % of pods fail, ten drivers are killed."""
    draw = random.Random(9)
    with Kubernetes(programs, fake_nodes=20, gpus=64) as kube, desk(kube, "chaos") as ada:
        count_requests(kube)
        trains = {"stillhouse/kind": "train"}
        kube.behave(labels=trains, after_s=(1, 5), share=FAILING, exit_code=1)
        window = min(WINDOW, points // 10)
        file, _ = sweep_of(ada, "chaos", points, 0)
        command = ("run", file, f"max_parallel={window}", *SITE, *AWAY)
        driver = ada.start(*command)
        begin = wait("the first is made", lambda: ada.seen.count("train") > 0, driver)
        for nth in range(KILLS):
            enough = (nth + draw.random()) * points / KILLS
            wait("it is time", lambda enough=enough: complete(ada) >= enough, driver)
            driver.kill()
            driver = ada.start(*command)
        end = wait("all are complete", lambda: complete(ada) == points, driver)
        driver.ends()
        check(ada, points, may_fail=True)
        asked = requests(kube)
        failed = sum(job["status"].get("failed", 0) for job in ada.seen.jobs("train"))
    return table(
        [
            (f"{points:,} points to completion, window {window:,}, s", f"{end - begin:.0f}", ""),
            ("pods that failed", f"{failed}", ""),
            ("drivers that were killed", f"{KILLS}", ""),
            ("Jobs made twice, points lost", "0, 0", "0"),
            ("API requests of all drivers, per point", f"{asked / points:.2f}", ""),
        ]
    )


def count_requests(kube: Kubernetes) -> None:
    """Have the API server count what people ask, apart from its own controllers."""
    group = {"kind": "Group", "group": {"name": "stillhouse"}}
    rule: Json = {"subjects": [group], "resourceRules": [], "nonResourceRules": []}
    rule["resourceRules"] = [
        {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"],
         "clusterScope": True}
    ]  # fmt: skip
    rule["nonResourceRules"] = [{"verbs": ["*"], "nonResourceURLs": ["*"]}]
    spec: Json = {"matchingPrecedence": 1000, "rules": [rule]}
    spec["priorityLevelConfiguration"] = {"name": "global-default"}  # where people are anyway
    kind = {"apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "FlowSchema"}
    meta = {"metadata": {"name": "people"}, "spec": spec}
    kube.call("POST", "/apis/flowcontrol.apiserver.k8s.io/v1/flowschemas", {**kind, **meta})


def requests(kube: Kubernetes) -> float:
    """How many requests of people the API server let through."""
    told = "apiserver_flowcontrol_dispatched_requests_total"
    lines = str(kube.call("GET", "/metrics")).splitlines()
    found = [line for line in lines if line.startswith(told) and 'flow_schema="people"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)


# ---------------------------------------------------------------------------------------- real


def real(programs: Path, runs: int) -> str:
    """A real pod that finds its point done: `run` until it says so, against kubectl's own wait."""
    images = ("cpu=0.1", "memory_gib=1", "shm_gib=0.1", "node_selector={type: real}")
    with (
        Kubernetes(programs, fake_nodes=0, real_node=True) as kube,
        desk(kube, "real") as ada,
        client(ada) as cluster,
    ):
        site = (f"image={kube.real_image()}", *images)
        file = ada.sweep("real", "base: {pair: tiny}", f"seeds: {2 * runs + 1}")
        sweep = load_sweep(str(ada.folder / file), list(site), Path("runs"), "cluster")
        for point in sweep.points:
            run = Runs(ada.space.runs).of(point.spec)
            write_json(run.spec_file, new_record(point.spec, {}))
            write_json(run.adapter / "stillhouse.json", {"id": point.id, "files": {}})
        for path in [ada.space.runs, *ada.space.runs.rglob("*")]:
            path.chmod(0o777 if path.is_dir() else 0o666)
        prepare = JobSpecs(sweep).of(Action("prepare", sweep.points[0].group))
        done = {prepare_of(prepare.id): Record("done", at=time.time())}
        Ledger(cluster, "stillhouse-runs").write(done)

        def by_run(id_: str) -> float:
            begin = time.perf_counter()
            ada.say("run", file, f"--point={id_}", *site, *AWAY)
            return time.perf_counter() - begin

        def by_kubectl(body: Json) -> float:
            name = body["metadata"]["name"]
            there = ("-n", ada.space.name)
            begin = time.perf_counter()
            kube.kubectl("create", *there, "-f", "-", input=json.dumps(body))
            kube.kubectl("wait", *there, "--for=condition=complete", f"job/{name}", "--timeout=90s")
            return time.perf_counter() - begin

        bodies = bodies_of(sweep)
        by_run(sweep.points[0].id)  # sends the code, fills the caches
        ours, theirs = list[float](), list[float]()
        for nth in range(runs):  # alternating: both see the same load
            ours.append(by_run(sweep.points[1 + nth].id))
            theirs.append(by_kubectl(bodies[1 + runs + nth]))
    mine, bare = statistics.median(ours), statistics.median(theirs)
    return table(
        [
            (f"`run` of one point, to its end, s (median of {runs})", f"{mine:.2f}", ""),
            ("`kubectl create` and `kubectl wait`, s", f"{bare:.2f}", ""),
            ("over it, s", f"{mine - bare:.2f}", "2.5"),
        ]
    )


# ---------------------------------------------------------------------------------------- main

PARTS: dict[str, Callable[[Path, int], str]] = {
    "submit": submit,
    "queue": queue,
    "chaos": chaos,
    "real": real,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cluster backend.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--points", type=int, help="instead of each part's own number")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there is {', '.join(PARTS)}")
    programs = binaries.ready()
    for name in asked.parts or PARTS:
        begin = time.monotonic()
        found = PARTS[name](programs, asked.points or FULL[name])
        took = f"Took {time.monotonic() - begin:.0f} s"
        took += f"; load average {os.getloadavg()[0]:.1f} at the end.\n\n"
        print(f"## {TITLES[name]}\n\n{took}{found}\n", flush=True)
        if asked.write:
            put(f"cluster-{name}", took + found, TITLES[name])


if __name__ == "__main__":
    main()
