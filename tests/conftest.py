"""Check annotations at run time in the packages that pyright cannot check in strict mode.

Every call of an annotated function there is checked, tensor shapes included. The launcher is
checked by pyright in strict mode, which costs its tests no time.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest

if TYPE_CHECKING:
    from stillhouse.sweep.cluster.connect import Cluster
    from tests.fakes.fake_api import FakeApi

# A fixed user: composed configurations are cached, and Jobs carry their owner's name.
os.environ["USER"] = "ada"
# There are more workers than cores: second threads would only spin while they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before any test imports the package: each call of an annotated function of these is then checked.
# The tower lets an int stand where a float is asked for, as type checkers do.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
with_shapes = jaxtyping.jaxtyped


def checked(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The decorator that the import hook writes; one that compares shapes only where some are
    named, since binding the arguments of all other calls for that costs a tenth of the suite."""

    def decorate(thing: Any) -> Any:
        if inspect.isclass(thing) or "[Tensor," in str(inspect.get_annotations(thing)):
            return with_shapes(typechecker=typechecker)(thing)
        return typechecker(thing)

    return decorate


jaxtyping.jaxtyped = checked  # type: ignore[assignment]
jaxtyping.install_import_hook(["stillhouse.distill", "stillhouse.evals"], CHECKER)


# What takes longest begins first, so that no worker is left alone with it at the end.
LONGEST = """run hub sequences report harness harness_faults grid pod suite watch_rules docs
cluster_verbs cluster_lines ids end_to_end"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = [f"test_{name}" for name in LONGEST.split()]
    items.sort(key=lambda item: [*order, item.path.stem].index(item.path.stem))


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU from all tests but the GPU tests, so that every machine gives the same
    numbers."""
    asked = config.option.markexpr
    if "gpu" not in asked or "not gpu" in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of random micro models, and below `cache` what was prepared for it."""
    from tests.builders.micro_models import write_pair

    directory = tmp_path_factory.mktemp("models")
    write_pair(directory)
    return directory


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory with six sweeps, to be read only; no two share a point."""
    from tests.builders.cliff_runs import SMALL, write_cliff
    from tests.builders.sample_runs import SAMPLES, write_sample

    root = tmp_path_factory.mktemp("runs")
    write_cliff(root, SMALL)
    for sample in SAMPLES:
        write_sample(root, sample)
    return root


@pytest.fixture(scope="session")
def report(finished: Path) -> Callable[[str], Path]:
    """By a sweep's name in `finished`: the folder of its report."""
    from stillhouse.results.report import write_report

    return cache(lambda name: write_report(name, finished).parent)


@pytest.fixture
def fake() -> Iterator[FakeApi]:
    """An API server with an empty namespace."""
    from tests.fakes.fake_api import FakeApi

    with FakeApi() as server:
        yield server


@pytest.fixture
def cluster(fake: FakeApi, tmp_path: Path) -> Iterator[Cluster]:
    """A client of it."""
    from tests.builders.driving import cluster_of

    with cluster_of(fake, tmp_path / "kubeconfig") as client:
        yield client


@pytest.fixture
def furnished(fake: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a sweep needs is in the namespace, and a kubeconfig leads there from an empty
    working directory."""
    from tests.builders.lab import furnish, kubeconfig

    furnish(fake)
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(fake, tmp_path)))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command that is to end with 0 (or `code`): what it printed; of a mistake, to stderr."""
    from stillhouse.cli import main

    def run(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        ended = main([*words])
        out, error = capsys.readouterr()
        assert ended == code, f"{words} ended with {ended}:\n{out}{error}"
        return out if code != 42 else error

    return run


@pytest.fixture
def works(fake: FakeApi) -> Iterator[dict[str, int]]:
    """A cluster at work; how points end, by id, where it is not well."""
    from tests.builders.lab import finish

    until, codes = threading.Event(), dict[str, int]()
    thread = threading.Thread(target=finish, args=(fake, until, codes))
    thread.start()
    yield codes
    until.set()
    thread.join()
