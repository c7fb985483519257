"""Test a sweep on a real control plane, with the rights of a launcher and no more."""

from __future__ import annotations

import json

import pytest

from stillhouse.sweep.cluster.objects import seconds
from tests.cluster.cluster import Json, Kubernetes, until
from tests.cluster.desk import AWAY, SITE, Desk, end_of

pytestmark = pytest.mark.cluster

POISON = json.dumps({"exit_code": 42, "cause": "ConfigError: no such rows", "tail": "a last line"})
SAVED = json.dumps({"exit_code": 85, "cause": "Interrupted: state saved", "tail": ""})
RUN = (*SITE, *AWAY)


def sweep_of(ada: Desk, name: str, points: int = 3, *more: str) -> str:
    """A sweep of the tiny pair, one axis, scored in packs of two."""
    axis = ", ".join(str(i / 8) for i in range(points))
    scored = "eval: {suite: tiny, pack: 2}"
    return ada.sweep(name, "base: {pair: tiny}", f"grid: {{lmbda: [{axis}]}}", scored, *more)


def ids(ada: Desk, sweep: str) -> list[str]:
    """The ids of its points, in their order."""
    return [p["id"] for p in json.loads(ada.say("plan", sweep, *RUN, "--json"))["points"]]


def created(job: Json) -> float:
    return seconds(job["metadata"]["creationTimestamp"]) or 0.0


def ended(job: Json) -> float:
    """When a Job was complete."""
    ends = [c for c in job["status"]["conditions"] if c["type"] == "Complete"]
    return seconds(ends[0]["lastTransitionTime"]) or 0.0


def states(ada: Desk, sweep: str, code: int = 0) -> dict[str, str]:
    return {p["id"]: p["state"] for p in ada.status(sweep, code)["points"]}


def causes(ada: Desk, sweep: str, code: int = 0) -> dict[str, str]:
    return {p["id"]: p["cause"] or "" for p in ada.status(sweep, code)["points"]}


def test_a_sweep_goes_from_prepare_over_train_to_eval(ada: Desk):
    sweep = sweep_of(ada, "chain", 4)
    said = ada.say("run", sweep, *RUN)
    assert "4 done" in said and "stillhouse collect chain" in said
    assert {*states(ada, "chain").values()} == {"done"}
    prepares, trains, evals = (ada.seen.jobs(kind) for kind in ("prepare", "train", "eval"))
    assert (len(prepares), len(trains), len(evals)) == (1, 4, 2)
    assert all(ended(prepares[0]) <= created(train) for train in trains)
    of_point = {train["metadata"]["labels"]["stillhouse/point"]: train for train in trains}
    for pack in evals:
        scored = pack["metadata"]["annotations"]["stillhouse/points"].split(",")
        assert all(ended(of_point[id_]) <= created(pack) for id_ in scored)
    before = ada.seen.count()
    assert "nothing left to do" in ada.say("run", sweep, *RUN)
    assert ada.seen.count() == before


def test_what_would_break_again_is_named_and_not_tried_again_until_somebody_says_so(
    kube: Kubernetes, ada: Desk
):
    sweep = sweep_of(ada, "poison")
    poison, *others = ids(ada, sweep)
    about = {"stillhouse/point": poison}
    with kube.behave(namespace=ada.space.name, labels=about, exit_code=42, message=POISON):
        said = ada.say("run", sweep, *RUN, code=1)
    assert "ConfigError: no such rows" in said
    assert states(ada, "poison", code=1) == {poison: "failed"} | dict.fromkeys(others, "done")
    assert "ConfigError: no such rows" in causes(ada, "poison", code=1)[poison]
    (job,) = ada.seen.jobs("train", point=poison)
    assert job["status"]["failed"] == 1, "one pod, and no other after it"
    assert "nothing left to do" in ada.say("run", sweep, *RUN, code=1)

    assert "1 wait" in ada.say("retry", "poison", "--where", "lmbda == 0", *AWAY)
    ada.say("run", sweep, *RUN)
    assert {*states(ada, "poison").values()} == {"done"}
    assert ada.seen.made_twice() == [job["metadata"]["name"]]


def test_what_infrastructure_broke_is_tried_again_in_the_same_job(kube: Kubernetes, ada: Desk):
    sweep = sweep_of(ada, "crash", 2)
    crash, _ = ids(ada, sweep)
    about = {"stillhouse/point": crash}
    with kube.behave(namespace=ada.space.name, labels=about, exit_code=1, message="no such disk"):
        run = ada.start("run", sweep, *RUN)

        def is_told() -> bool:
            jobs = ada.seen.jobs("train", point=crash)
            return any("stillhouse/attempts" in job["metadata"]["annotations"] for job in jobs)

        until("what the attempt left is kept on the Job", is_told)
    run.ends()
    assert {*states(ada, "crash").values()} == {"done"}
    (job,) = ada.seen.jobs("train", point=crash)
    (left,) = json.loads(job["metadata"]["annotations"]["stillhouse/attempts"])
    assert left["code"] == 1 and "no such disk" in left["cause"]


def test_a_point_that_can_never_start_says_why_and_gives_its_slot_back(kube: Kubernetes, ada: Desk):
    sweep = sweep_of(ada, "stuck", 3, "site: {max_parallel: 1, patience_s: 20}")
    stuck, *others = ids(ada, sweep)
    about = {"stillhouse/point": stuck}
    said = "manifest unknown"
    with kube.behave(namespace=ada.space.name, labels=about, waiting=True, message=said):
        run = ada.start("run", sweep, *RUN)
        until("its Job is made", lambda: ada.seen.jobs("train", point=stuck))
        until("so it is said", lambda: "image not pulled" in causes(ada, "stuck")[stuck], 60)
        assert "image not pulled" in run.ends(code=1)
    assert states(ada, "stuck", code=1) == {stuck: "failed"} | dict.fromkeys(others, "done")
    assert "cannot start: image not pulled" in causes(ada, "stuck", code=1)[stuck]
    assert "1 wait" in ada.say("retry", "stuck", "--cause", "cannot-start", *AWAY)
    ada.say("run", sweep, *RUN)
    assert {*states(ada, "stuck").values()} == {"done"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("priority_class=nobodys",), "set site.priority_class to one that exists"),
        (("gpu_product=NVIDIA-B200",), "site.gpu_product"),
        (("num_processes=16",), "no node has 16 free nvidia.com/gpu"),
        (("memory_gib=4000",), "no node has enough free memory"),
    ],
)
def test_whatever_waits_says_why_within_a_minute(words: tuple[str, ...], says: str, ada: Desk):
    ada.say("train", "waits", "--pair", "tiny", *SITE, *words)

    def cause() -> str | None:
        (point,) = ada.status("waits")["points"]
        assert point["state"] == "waiting"
        return point["cause"] if says in (point["cause"] or "") else None

    until(f"the status says: {says}", cause, timeout_s=60)


def test_a_sweep_is_cancelled_and_goes_on_from_there(kube: Kubernetes, ada: Desk):
    sweep = sweep_of(ada, "pause", 3, "site: {max_parallel: 2}")
    here, trains = ada.space.name, {"stillhouse/kind": "train"}
    kube.behave(namespace=here, labels=trains, stopped=True, exit_code=85, message=SAVED)
    with kube.behave(namespace=here, labels=trains, forever=True):
        run = ada.start("run", sweep, *RUN)

        def running() -> int:
            return sum(job["status"].get("ready", 0) for job in ada.seen.jobs("train"))

        until("two run", lambda: running() == 2)
        assert ada.say("cancel", "pause", *AWAY).count("asked to save and stop") == 2
        assert "cancelled" in run.ends(code=85)
        until("their Jobs are gone", lambda: not ada.kube.call("GET", ada.seen.path)["items"][1:])
    found = causes(ada, "pause")
    assert sum("cancelled by ada" in cause for cause in found.values()) == 2
    ada.say("run", sweep, *RUN)
    assert {*states(ada, "pause").values()} == {"done"}
    assert len(ada.seen.made_twice()) == 2, "the two that were stopped"
    assert all(end_of(job) != "Failed" for job in ada.seen.jobs())
