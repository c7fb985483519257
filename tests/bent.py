"""Change valid input one field at a time, and check that each result is handled without a crash.

    python -m tests.bent 10000 [SEED]      takes a few minutes; exit code 1 after any traceback

Every changed input must end in a valid answer or an error message. `make test` runs a smaller
number (tests/test_bent.py). The six kinds are what others write, truncate or edit: sweep files,
command lines, files of a run, scores, Jobs (with their pods, events and Workloads) and ConfigMaps.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import stillhouse
from stillhouse import cli
from stillhouse.compose import compose, from_command_line
from stillhouse.errors import StillhouseError
from stillhouse.identity import suite_key
from stillhouse.rundir import Json, RunDir
from stillhouse.spec import EvalSpec, TrainSpec
from stillhouse.sweep import registry
from stillhouse.sweep.cluster.cache import NamespaceCache, baselines_seen
from stillhouse.sweep.cluster.describe import job_details, said_of_others
from stillhouse.sweep.cluster.facts import keys_of
from stillhouse.sweep.cluster.find import Names
from stillhouse.sweep.cluster.job_outcomes import attempts_patch, records_of
from stillhouse.sweep.cluster.jobspec import JobSpecs
from stillhouse.sweep.cluster.kueue import queue_view
from stillhouse.sweep.cluster.ledger import Ledger, read_sweep, sweeps
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.cluster.replace import carried_attempts, is_better_made_anew
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.plan import Action
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.state import Record
from tests.builders.sample_runs import Sample, write_sample

# --------------------------------------------------------------------------------- bending

WORDS = st.sampled_from(
    ["", " ", "x", "null", "-1", "1e999", "0x10", "010", "1:30", "no", "${oc.env:HOME}",
     "../..", "a/b", "\x1b[2J", "\u202e", "\x00", "'", "\\", "{", "[0,1", "a,b", "=", "é" * 70,
     "--", "2025-13-99", "[1,{}]", '{"a":', "9" * 40]
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 3) | st.floats() | WORDS
    | st.text(max_size=6)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)  # fmt: skip


def places(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every field and item that can be changed."""
    keys: list[Any] = []
    if isinstance(content, dict):
        keys = [*content]
    elif isinstance(content, list):
        keys = [*range(len(content))]
    return [p for key in keys for p in ((*at, key), *places(content[key], (*at, key)))]


def bent(draw: Any, content: Any) -> Any:
    """A copy with one field removed, replaced, wrapped in a list, added or renamed."""
    content = copy.deepcopy(content)
    *way, last = draw(st.sampled_from(places(content)))
    inside = functools.reduce(lambda inner, key: inner[key], way, content)
    how = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "rename", "more"]))
    if how == "replace":
        inside[last] = draw(VALUES)
    elif how == "wrap":
        inside[last] = [inside[last]]
    elif how == "more" and isinstance(inside, dict):
        inside[draw(st.text(max_size=8) | st.sampled_from(["name", "seed", "pair"]))] = draw(VALUES)
    elif how == "rename" and isinstance(inside, dict):
        inside[draw(WORDS)] = inside.pop(last)
    else:
        del inside[last]
    return content


def torn(draw: Any, data: bytes) -> bytes:
    """The bytes truncated, or with other bytes inserted in the middle."""
    at = draw(st.integers(0, len(data)))
    if draw(st.booleans()):
        return data[:at]
    return data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 4)) :]


# ----------------------------------------------------------------------------------- kinds


def answered(*words: str) -> None:
    """Assert that a command ends with one of our exit codes; its output is not checked."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = cli.main([*words])
    assert code in (0, 1, 42), (words, code)


SWEEP = {
    "question": "Does it help?",
    "base": {"pair": "tiny", "quant": "int4", "max_steps": 5, "tags": ["a", "b"], "seed": 3,
             "chat_template_kwargs": {"thinking": False}, "target_modules": ["q_proj"]},
    "grid": {"lmbda": [0, 0.5], "beta": [0, 1], "method": ["gkd", "hybrid"]},
    "points": [{"name": "lr_low", "learning_rate": 5e-6, "tags": ["x"]}, {"learning_rate": 1e-5}],
    "rules": [{"where": {"lmbda": 0}, "set": {"weight_decay": 0.1}},
              {"where": {"beta": 1, "lmbda": 0.5}, "skip": True}],
    "compare": {"by": "lmbda", "metric": "tiny_gen/exact_match", "baseline": 0},
    "eval": {"suite": "tiny", "pack": 2, "limit": 4, "baselines": ["teacher"]},
    "site": {"max_parallel": 2, "infra_retries": 1, "pod_env": {"A": "b"}},
}  # fmt: skip


def sweep_file(draw: Any) -> None:
    """A sweep file."""
    content = dict(SWEEP) if draw(st.booleans()) else {**SWEEP, "seeds": 2}
    if "seeds" in content:
        content["base"] = {k: v for k, v in SWEEP["base"].items() if k != "seed"}
    data = yaml.safe_dump(bent(draw, content), allow_unicode=True).encode("utf-8", "replace")
    file = Path(f"bent{draw(st.sampled_from(['', '_2', ' x']))}.yaml")
    file.write_bytes(torn(draw, data) if draw(st.integers(0, 4)) == 0 else data)
    try:
        with contextlib.suppress(StillhouseError):
            json.dumps(registry.record_of(load_sweep(str(file), [], Path("runs"))))
    finally:
        file.unlink()


LINES: list[tuple[str, list[str]]] = [
    ("train", ["--pair", "tiny", "--lmbda", "0.5", "--learning-rate", "5e-6", "--tags", "a",
               "--tags", "b", "--quant-type", "int4", "--no-eval-teacher"]),
    ("train", ["pair=tiny", "method=hybrid", "lmbda=[[0,1],[100,0]]", "name=mine", "tags=[a,b]",
               "chat_template_kwargs={thinking:false}", "optim.learning_rate=1e-5", "max_steps=7"]),
    ("eval", ["--pair", "tiny", "--suite", "tiny", "--lora-paths", "dump/a", "--limit", "4"]),
    ("eval", ["pair=tiny", "suite=tiny", "lora_paths=[a,b]", "eval_student=false"]),
    ("grid", ["pair=tiny", "lmbda=0,0.5", "seeds=2", "beta=range(0,1)", "max_steps=4"]),
    ("verb", ["status", "grid", "--json", "--point", "lmbda=0", "--cost"]),
    ("verb", ["status", "grid", "--runs", "runs", "--all", "--backend", "local"]),
    ("verb", ["plan", "pair=tiny", "lmbda=0,1", "seeds=1", "--json"]),
    ("verb", ["retry", "grid", "--where", "lmbda > 0.5", "--cause", "oom"]),
    ("verb", ["logs", "grid", "--point", "lmbda=0", "--json"]),
]  # fmt: skip


def command_line(draw: Any) -> None:
    """The arguments of an entry point (train.py, eval.py) or a verb."""
    kind, line = draw(st.sampled_from(LINES))
    words = [*line]
    at = draw(st.integers(0, len(words) - 1))
    how = draw(st.sampled_from(["replace", "value", "remove", "more", "letter"]))
    if how == "replace":
        words[at] = draw(WORDS | st.text(max_size=8))
    elif how == "value":
        key, equals, _ = words[at].partition("=")
        words[at] = f"{key}{equals or '='}{draw(WORDS | st.text(max_size=8))}"
    elif how == "remove":
        del words[at]
    elif how == "more":
        words.insert(at, draw(WORDS | st.sampled_from(line)))
    else:
        cut = draw(st.integers(0, len(words[at])))
        words[at] = words[at][:cut] + draw(st.text(max_size=2)) + words[at][cut + 1 :]
    if kind == "verb":
        if words and words[0] in cli.VERBS.keys() - {"run", "push", "doctor", "collect"}:
            with contextlib.suppress(SystemExit):  # --help
                answered(*words)
        return
    with contextlib.suppress(StillhouseError):
        if kind == "grid":
            load_sweep(None, words, Path("runs"))
        elif kind == "train":
            compose(from_command_line(words, TrainSpec), TrainSpec)
        else:
            compose(from_command_line(words, EvalSpec), EvalSpec)


@functools.cache
def sample() -> RunDir:
    """The first run of a finished sweep in this directory."""
    return write_sample(Path("runs"), Sample(name="grid", seeds=1))[0]


@contextlib.contextmanager
def bent_file(draw: Any, file: Path) -> Generator[None, None, None]:
    before = file.read_bytes()
    if file.suffix == ".jsonl":
        data = torn(draw, before)
    else:
        content = bent(draw, json.loads(before))
        data = json.dumps(content).encode()
        data = torn(draw, data) if draw(st.integers(0, 4)) == 0 else data
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(before)


def status_file(draw: Any) -> None:
    """A file that a run left, other than its scores; or a sweep's record."""
    run = sample()
    files = [run.status_file, run.spec_file, run.adapter / "stillhouse.json", run.cost_file,
             run.metrics_file, Path("runs/sweeps/grid.json")]  # fmt: skip
    with bent_file(draw, draw(st.sampled_from(files))):
        answered("status", "grid", "--json")
        answered(*draw(st.sampled_from([("status",), ("status", "grid", "--cost"),
                                        ("status", run.id), ("logs", "grid")])))  # fmt: skip
        if draw(st.integers(0, 40)) == 37:  # a second each
            answered("report", "grid")


def score(draw: Any) -> None:
    """A file that an evaluation left."""
    run = sample()
    baseline = next(Path("runs/baselines").glob("teacher-*"))
    files = [run.eval_file("tiny_gen"), run.eval_file("tiny_mc"), *baseline.rglob("*.json")]
    with bent_file(draw, draw(st.sampled_from(files))):
        answered("status", "grid", "--json")
        if draw(st.integers(0, 40)) == 37:
            answered("report", "grid")
        elif draw(st.integers(0, 4)) == 0:
            with contextlib.suppress(StillhouseError):
                stillhouse.load("grid")


@functools.cache
def asked() -> Sweep:
    words = ["pair=tiny", "lmbda=0,1", "seeds=1", "owner=ada", "suite=tiny"]
    return load_sweep(None, words, Path("runs"), site="cluster")


class Kept:
    """A cluster of which only ConfigMaps are read."""

    def __init__(self, maps: list[Json]) -> None:
        self.maps = {item["metadata"]["name"]: item for item in maps}

    def read(self, resource: str, name: str) -> Json | None:
        return self.maps.get(name)

    def pages(self, resource: str, labels: str, **_: Any) -> list[tuple[list[Json], str]]:
        wanted = [pair.partition("=")[::2] for pair in labels.split(",")]

        def is_meant(item: Json) -> bool:
            said = item["metadata"].get("labels") or {}
            return all(said.get(key) == value for key, value in wanted)

        return [([item for item in self.maps.values() if is_meant(item)], "1")]

    def patch(self, resource: str, name: str, merge: Json) -> Json:
        return self.maps.get(name) or {"metadata": {"name": name}}

    def create(self, resource: str, body: Json, **_: object) -> Json:
        return body

    def replace(self, resource: str, name: str, body: Json) -> Json:
        return body


TIME = "2026-11-30T10:00:00Z"


@functools.cache
def objects() -> list[tuple[str, Json]]:
    """A Job of each kind, and the other objects of a namespace about it."""
    sweep = asked()
    steps, (first, *_), ids = JobSpecs(sweep), asked().points, [p.id for p in asked().points]
    group = first.group
    teacher = (Path("teacher-0123456789"),)
    wanted = [Action("train", group, (first.id,)), Action("eval", group, (*ids,), teacher),
              Action("prepare", group)]  # fmt: skip
    found: list[tuple[str, Json]] = []
    for number, action in enumerate(wanted):
        job = render(steps.of(action), sweep.site, "0123456789abcdef-01234567")
        meta = {"uid": f"uid-{number}", "creationTimestamp": TIME, "resourceVersion": "1"}
        job["metadata"] |= meta
        attempt = [{"pod": "p", "code": 1, "cause": "crashed", "ran": 1.5, "start": 0.5}]
        job["metadata"]["annotations"] |= {
            "stillhouse/attempts": json.dumps(attempt), "stillhouse/names": "mine 'my own'",
        }  # fmt: skip
        ends = [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded",
                 "message": "no", "lastTransitionTime": TIME}]  # fmt: skip
        live = {"active": 1, "ready": 0, "failed": 1, "startTime": TIME}
        for status in (live, live | {"conditions": ends}):
            found.append(("jobs", job | {"status": status}))
    name, uid = found[0][1]["metadata"]["name"], "uid-0"
    labels = {"batch.kubernetes.io/job-name": name, "batch.kubernetes.io/controller-uid": uid}
    said = json.dumps({"exit_code": 1, "cause": "crashed", "tail": "step 7"})
    ended = {
        "exitCode": 1,
        "reason": "Error",
        "startedAt": TIME,
        "finishedAt": TIME,
        "message": said,
    }
    pod: Json = {
        "metadata": {"name": "pod", "uid": "uid-pod", "labels": labels, "creationTimestamp": TIME,
                     "ownerReferences": [{"controller": True}]},
        "spec": {"nodeName": "n"},
        "status": {"phase": "Failed", "conditions": [{"type": "Ready", "status": "False"}],
                   "containerStatuses": [{"name": "main", "state": {"terminated": ended}}]},
    }  # fmt: skip
    waits: Json = copy.deepcopy(pod)
    waiting = {"reason": "ErrImagePull", "message": 'image "x": no'}
    waits["status"] = {"phase": "Pending", "conditions": [
        {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available: no"}],
        "containerStatuses": [{"name": "main", "state": {"waiting": waiting}}]}  # fmt: skip
    event = {"metadata": {"name": "e", "creationTimestamp": TIME}, "reason": "FailedCreate",
             "message": "exceeded quota: q, requested: cpu=8, used: cpu=1, limited: cpu=4",
             "involvedObject": {"kind": "Job", "name": name, "uid": uid},
             "lastTimestamp": TIME, "series": {"count": 2}}  # fmt: skip
    workload = {"metadata": {"name": "w", "ownerReferences": [{"kind": "Job", "uid": uid}]},
                "spec": {"active": True}, "status": {"conditions": [
                    {"type": "QuotaReserved", "status": "False", "reason": "Pending",
                     "message": "more needed"},
                    {"type": "Evicted", "status": "True", "reason": "Preempted"}],
                    "admissionChecks": [{"name": "c", "state": "Retry"}]}}  # fmt: skip
    return [*found, ("pods", pod), ("pods", waits), ("events", event), ("workloads", workload)]


def job_object(draw: Any) -> None:
    """A Job, or a pod, event or Workload of it, as an API server might return it."""
    sweep, all_of = asked(), objects()
    number = draw(st.integers(0, len(all_of) - 1))
    kind, item = all_of[number]
    if draw(st.integers(0, 2)) == 0 and kind == "jobs":  # what people edit: annotations
        notes = item["metadata"]["annotations"]
        key = draw(st.sampled_from(sorted(notes)))
        notes = notes | {key: draw(WORDS | st.text(max_size=20) | VALUES.map(json.dumps))}
        item = item | {"metadata": item["metadata"] | {"annotations": notes}}
    else:
        item = bent(draw, item)
    ledger = Ledger(Kept([]), "stillhouse-runs")  # type: ignore[arg-type]
    cache = NamespaceCache(ledger)
    others = [all_of[n] for n in range(len(all_of)) if n != number and draw(st.booleans())]
    for resource, one in [*others, (kind, item)]:
        if resource == "workloads":
            queued = cache.viewed(queue_view, one)
            cache.replace_queue([queued] if queued else [], [job.uid for job in cache.jobs()])
        else:
            cache.learn(resource, one)
    assert sweep.suite is not None
    key = suite_key(sweep.suite)
    for point in sweep.points:
        for scores in (None, key):
            cache.look(point.id, scores)
    baselines_seen(cache, sweep)
    for job in cache.jobs():
        cache.why(job)
        attempts_patch(job, cache.pods_of(job))
        records = dict(records_of(job, cache, 1e9))
        ledger.write(records)
        ledger.refresh(keys_of(job), 0.0)
        job_details([job], cache, records)
        said_of_others([job], cache)
        is_better_made_anew(job, cache.pods_of(job), sweep.site, was_there=True)
        carried_attempts(job, cache.pods_of(job))
    ledger.notes()


def config_map(draw: Any) -> None:
    """A ConfigMap: of the ledger, of names, of a sweep."""
    one = asked().points[0].id
    records = {one: Record("failed", 43, "NaN", "tail", at=1.0).to_json(),
               f"{one}.abcdef0123": Record("done", at=2.0).to_json()}  # fmt: skip
    labels = {"app.kubernetes.io/part-of": "stillhouse"}
    shard: Json = {
        "metadata": {"name": f"stillhouse-done-stillhouse-runs-{one[0]}",
                     "labels": labels | {"stillhouse/kind": "ledger",
                                         "stillhouse/claim": "stillhouse-runs"}},
        "data": records}  # fmt: skip
    names: Json = {"metadata": {"name": "stillhouse-names", "labels": labels},
                   "data": {"mine": f"tiny-gkd-{one}"}}  # fmt: skip
    maps = [shard, names, _sweep_map()]
    number = draw(st.integers(0, 2))
    how = draw(st.integers(0, 2))
    if how == 0 and number == 0:  # one record, as somebody edits it
        record = json.dumps(bent(draw, json.loads(records[one])))
        text = draw(WORDS | st.text(max_size=9) | st.just(record))
        maps[0] = shard | {"data": records | {one: text}}
    elif how == 0 and number == 2:
        record = json.loads(_sweep_record())
        data = torn(draw, json.dumps(bent(draw, record)).encode())
        maps[2] = _sweep_map(
            data if draw(st.booleans()) else json.dumps(bent(draw, record)).encode()
        )
    else:
        part = draw(st.sampled_from(["data", "binaryData", "labels", "annotations"]))
        inside = maps[number]["metadata"] if part in ("labels", "annotations") else maps[number]
        keys = WORDS | st.text(max_size=9)
        # An API server lets only texts in here.
        texts = draw(st.dictionaries(keys, WORDS | st.text(max_size=9), max_size=2))
        inside[part] = texts if draw(st.booleans()) else {**inside.get(part, {}), **texts}
    cluster: Any = Kept(maps)
    ledger = Ledger(cluster, "stillhouse-runs")
    ledger.read()
    ledger.notes()
    ledger.records()
    cache = NamespaceCache(ledger)
    suite = asked().suite
    assert suite is not None
    cache.look(one, suite_key(suite))
    with contextlib.suppress(StillhouseError):
        ledger.write({one: None})
    with contextlib.suppress(StillhouseError):
        Names(cluster).claim("mine", "another")
    for mark in sweeps(cluster):
        with contextlib.suppress(StillhouseError):
            if (record := read_sweep(cluster, mark.name)) is not None:
                registry.of_record(record, Path("runs"), "here")


@functools.cache
def _sweep_record() -> str:
    return json.dumps(registry.record_of(asked()) | {"name": "s"})


def _sweep_map(data: bytes | None = None) -> Json:
    import base64
    import gzip

    packed = base64.b64encode(gzip.compress(data or _sweep_record().encode())).decode()
    labels = {"app.kubernetes.io/part-of": "stillhouse", "stillhouse/kind": "sweep"}
    meta = {"name": "stillhouse-sweep-s", "labels": labels, "creationTimestamp": TIME,
            "annotations": {"stillhouse/name": "s"}}  # fmt: skip
    return {"metadata": meta, "binaryData": {"sweep.json.gz": packed}}


KINDS: dict[str, Callable[[Any], None]] = {
    one.__name__: one
    for one in (sweep_file, command_line, status_file, score, job_object, config_map)
}


def run(kind: str, count: int, number: int = 0) -> int:
    """Generate `count` inputs of a kind, in the working directory; raises what one ended in.

    Returns how many ended in an answer or a sentence: fewer than `count` where no more differ.
    """
    ended = 0

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(st.data())
    def one(data: st.DataObject) -> None:
        nonlocal ended
        KINDS[kind](data.draw)
        ended += 1

    one()
    return ended


def main(count: int, number: int) -> int:
    """The exit code; what ended in a traceback is printed, the smallest input first."""
    failed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        for kind in KINDS:
            try:
                ended = run(kind, -(-count // len(KINDS)), number)
                print(f"{kind}: {ended} ended in an answer or a sentence", flush=True)
            except BaseException as error:
                failed[kind] += 1
                print(f"{kind}: {error!r}", flush=True)
                traceback.print_exc()
        os.chdir("/")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
