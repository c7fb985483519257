"""Test that sweeps survive failures of drivers, connections and the API server.

Whatever fails, each Job is created exactly once and every point finishes. The count does not come
from the launcher: an administrator's watch sees every Job that ever existed.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Kubernetes, until
from tests.cluster.desk import AWAY, SITE, Desk, end_of
from tests.fakes.faults import Faults, Proxy

pytestmark = pytest.mark.cluster

KILLS = 20
PACK = 8


def sweep_of(ada: Desk, points: int, window: int) -> tuple[str, ...]:
    """The command that runs a sweep of so many points, at most `window` of them at once."""
    file = ada.sweep(
        "chaos",
        "base: {pair: tiny, quant: int4}",
        f"seeds: {points}",
        f"eval: {{suite: tiny, pack: {PACK}}}",
        f"site: {{max_parallel: {window}}}",
    )
    return ("run", file, *SITE, *AWAY)


def check(ada: Desk, points: int) -> None:
    """All is done, and was made once."""
    assert ada.status("chaos")["totals"]["done"] == points
    evals = -(-points // PACK)
    until("all was seen", lambda: ada.seen.count() >= 1 + points + evals)
    found = {kind: ada.seen.count(kind) for kind in ("prepare", "train", "eval")}
    assert found == {"prepare": 1, "train": points, "eval": evals}
    assert ada.seen.made_twice() == []
    assert len({job["metadata"]["labels"]["stillhouse/hash"] for job in ada.seen.jobs()}) == sum(
        found.values()
    )
    until("all are complete", lambda: {*map(end_of, ada.seen.jobs())} == {"Complete"})


def test_twenty_drivers_are_killed_and_every_job_is_made_once(kube: Kubernetes, ada: Desk):
    draw = random.Random(9)
    command = sweep_of(ada, points=90, window=4)
    kube.behave(namespace=ada.space.name, after_s=(0.2, 1.0))
    for _ in range(KILLS):
        driver = ada.start(*command)
        enough = ada.seen.count() + draw.randint(1, 3)
        until(
            "it makes some more Jobs, or is at its end",
            lambda driver=driver, enough=enough: (
                ada.seen.count() >= enough or driver.process.poll() is not None
            ),
        )
        time.sleep(draw.uniform(0, 0.4))  # anywhere: between two requests, or in the middle of one
        assert driver.kill() == -9, f"nothing was left to kill for: {driver.said}"
    two = [ada.start(*command) for _ in range(2)]
    for driver in two:
        driver.ends()
    check(ada, points=90)


def test_the_api_server_restarts_while_two_drivers_send_the_same_sweep(kube: Kubernetes, ada: Desk):
    command = sweep_of(ada, points=40, window=20)
    two = [ada.start(*command) for _ in range(2)]
    for enough in (8, 25):
        until("they are at it", lambda enough=enough: ada.seen.count("train") >= enough)
        kube.stop_apiserver()
        kube.start_apiserver()
    for driver in two:
        driver.ends()
    check(ada, points=40)


def test_a_bad_way_to_the_api_server_costs_time_and_no_point(ada: Desk, tmp_path: Path):
    rates: dict[str, Any] = {
        "drop_before": 0.05,
        "drop_after": 0.05,
        "busy": 0.05,
        "error": 0.05,
        "twice": 0.05,
    }
    faults = Faults(seed=11, slow=0.05, cut=0.05, refuse=0.02, **rates)
    command = sweep_of(ada, points=30, window=10)
    with Proxy(ada.kubeconfig, faults) as proxy:
        way = proxy.kubeconfig(tmp_path / "proxy.kubeconfig", ada.space.name)
        ada.start(*command, kubeconfig=way).ends()
    assert faults.struck["drop_after"] and faults.struck["twice"], "it was a bad way"
    check(ada, points=30)
