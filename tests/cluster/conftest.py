"""Provide the clusters for the tests of this folder: one of each kind, shared by all tests."""

from __future__ import annotations

import os
import platform
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.cluster import binaries
from tests.cluster.cluster import Kubernetes
from tests.cluster.desk import Desk, at_desk
from tests.cluster.kueue import OBSERVABILITY


def cannot(reason: str) -> NoReturn:
    """Skips and says why. In CI a test that cannot run is one that failed."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tells, with a failure, what its cluster saw happen."""
    report = yield
    for name, value in item.funcargs.items() if report.failed else ():
        if isinstance(value, Kubernetes):
            report.sections.append((f"last events of {name}", value.events()))
    return report


@pytest.fixture(scope="session")
def programs() -> Path:
    """Where the programs are. `make test-cluster` has built them; without it they are built now."""
    try:
        return binaries.ready()
    except binaries.Missing as missing:
        cannot(str(missing))


@pytest.fixture(scope="session")
def kube(programs: Path) -> Iterator[Kubernetes]:
    """A control plane and three fake nodes of 8 GPUs. Each test makes its own namespaces in it."""
    with Kubernetes(programs, fake_nodes=3) as up:
        yield up


@pytest.fixture(scope="session", params=["as it comes", "words of 0.20"])
def kube_kueue(programs: Path, request: pytest.FixtureRequest) -> Iterator[Kubernetes]:
    """The same, and Kueue without a queue: as it comes, and with the words of its next version."""
    gates = [OBSERVABILITY] if request.param == "words of 0.20" else []
    with Kubernetes(programs, fake_nodes=3, kueue=True, kueue_gates=gates) as up:
        yield up


@pytest.fixture(scope="session")
def kube_real(programs: Path) -> Iterator[Kubernetes]:
    """Kueue, one node that runs real pods (type=real), and two fake ones (type=fake)."""
    if platform.system() != "Linux" or os.geteuid():
        cannot("a real node needs Linux and root")
    try:
        binaries.need_node_packages(install=False)
    except binaries.Missing as missing:
        cannot(str(missing))
    if "STILLHOUSE_ALONE" not in os.environ:
        cannot("a real node needs a network of its own: put tests/cluster/alone before the command")
    with Kubernetes(programs, fake_nodes=2, real_node=True, kueue=True) as up:
        yield up


@pytest.fixture
def ada(kube: Kubernetes, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Desk]:
    """Ada, who owns no cluster, at work in a namespace of the first one."""
    with at_desk(kube, f"ada-{zlib.crc32(request.node.name.encode()):08x}", tmp_path) as desk:
        yield desk


@pytest.fixture
def ada_queues(
    kube_kueue: Kubernetes, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Desk]:
    """Ada, where Kueue is."""
    name = f"ada-{zlib.crc32(request.node.name.encode()):08x}"
    with at_desk(kube_kueue, name, tmp_path) as desk:
        yield desk
