"""Test which adapters the words of a user lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.compose import compose, from_command_line
from stillhouse.errors import ConfigError
from stillhouse.evals import find
from stillhouse.rundir import RunDir, Runs, link_path, new_record, write_json
from stillhouse.spec import TrainSpec


def train_spec(runs: Path, *words: str) -> TrainSpec:
    return compose(from_command_line(["pair=tiny", f"runs={runs}", *words], TrainSpec), TrainSpec)


def bare_run(runs: Path, *words: str, adapter: bool = True) -> RunDir:
    """A run of which only what says that it is one is there."""
    spec = train_spec(runs, *words)
    run = Runs(runs).of(spec)
    write_json(run.spec_file, new_record(spec, {}))
    if adapter:
        write_json(run.adapter / find.MARK, {})
    return run


def test_paths_of_every_kind_lead_to_each_adapter_once(tmp_path):
    runs = Runs(tmp_path / "runs")
    one, two = bare_run(runs.root, "seed=1"), bare_run(runs.root, "seed=2")
    bare_run(runs.root, "seed=3", adapter=False)
    write_json(one.path / ".adapter.123.tmp" / find.MARK, {})  # its writer was killed
    shelf = tmp_path / "shelf"
    link_path(shelf / "deep" / "best", one.path)
    (shelf / "deep" / "round").symlink_to(shelf)  # a circle
    write_json(shelf / "foreign" / find.MARK, {})

    def typed(*words: Any) -> tuple[list[Path], int]:
        found, untrained, gone = find.typed(tuple(map(str, words)), runs)
        assert not gone
        return [f.adapter.resolve() for f in found], untrained

    assert typed(one.adapter) == typed(one.path) == ([one.adapter], 0)
    assert typed(shelf) == ([one.adapter, shelf / "foreign"], 0)
    both, untrained = typed(runs.root)
    assert set(both) == {one.adapter, two.adapter} and untrained == 1
    assert len(typed(runs.root, one.path, shelf, one.adapter)[0]) == 3
    names = {f.adapter.resolve(): f.name for f in find.typed((str(shelf), str(two.path)), runs)[0]}
    assert names == {one.adapter: "best", shelf / "foreign": "foreign", two.adapter: None}


def test_a_name_below_dump_means_the_run_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = Runs(tmp_path / "runs")
    run = bare_run(runs.root)
    runs.link_name("lmbda_1_int4", run)
    for word in ("dump/lmbda_1_int4", "lmbda_1_int4", "dump/", "dump"):
        found, _, _ = find.typed((word,), runs)
        assert [(f.home, f.name) for f in found] == [(run.path, "lmbda_1_int4")]
    with pytest.raises(ConfigError, match=r'dump/lmbda_2_int4.*Did you mean "lmbda_1_int4"'):
        find.typed(("dump/lmbda_2_int4",), runs)
    (tmp_path / "dump" / "lmbda_1_int4").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no adapter"):  # a path that exists is what it is
        find.typed(("dump/lmbda_1_int4",), runs)


def test_a_path_without_adapters_says_what_was_looked_for(tmp_path):
    runs = Runs(tmp_path / "runs")
    bare_run(runs.root, adapter=False)
    with pytest.raises(ConfigError, match=r"adapter_config\.json.*not trained yet: 1 run there"):
        find.typed((str(runs.root),), runs)


def test_a_run_of_a_pack_that_is_gone_does_not_end_the_others(tmp_path):
    runs = Runs(tmp_path / "runs")
    here, lost = bare_run(runs.root), runs.root / "tiny-gkd-0123456789"
    found, _, gone = find.typed((str(here.path), str(lost)), runs)
    assert [f.home for f in found] == [here.path]
    assert gone.keys() == {lost} and "no such directory" in gone[lost]
    torn = bare_run(runs.root, "seed=7")
    torn.spec_file.write_text("{")
    found, _, gone = find.typed((str(here.path), str(torn.path)), runs)
    assert [f.home for f in found] == [here.path] and gone.keys() == {torn.path}
    found, _, gone = find.typed((str(lost),), runs)
    assert not found and gone.keys() == {lost}, "baselines may be asked for besides"
    with pytest.raises(ConfigError, match="no such directory"):
        find.typed((str(here.path), str(tmp_path / "typo")), runs)


def test_a_torn_run_is_left_out_and_named_where_every_run_of_a_pair_is_meant(tmp_path):
    runs = Runs(tmp_path / "runs")
    torn = bare_run(runs.root)
    (torn.adapter / "stillhouse.json").write_text("{")
    found, _, gone = find.trained(train_spec(tmp_path).pair, runs)
    assert not found and gone.keys() == {torn.path} and "not JSON" in gone[torn.path]


# ---------------------------------------------------------------- names in a pod


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Runs as a pod sees them, with a ConfigMap of names beside."""
    run = bare_run(tmp_path / "runs")
    names = tmp_path / "names"
    (names / "..2026_11_25").mkdir(parents=True)
    (names / "..data").symlink_to("..2026_11_25")
    for name, directory in (("alias", run.path.name), ("later", "tiny-gkd-0123456789")):
        (names / "..data" / name).write_text(f"{directory}\n")
        (names / name).symlink_to(f"..data/{name}")
    monkeypatch.setenv("STILLHOUSE_NAMES", str(names))
    return Runs(tmp_path / "runs")


def test_a_name_that_only_the_launcher_knows_is_found_in_a_pod(volume: Runs) -> None:
    (run,) = volume.all()
    for word in ("dump/alias", "alias"):
        [found], untrained, _ = find.typed((word,), volume)
        assert (found.home, found.name, untrained) == (run.path, "alias", 0)


def test_a_link_on_the_volume_comes_before_the_launchers_name(volume: Runs) -> None:
    other = volume.root / "other"
    (other / "adapter").mkdir(parents=True)
    (other / "adapter/adapter_config.json").write_text("{}")
    volume.names.mkdir()
    (volume.names / "alias").symlink_to("../other")
    [found], _, _ = find.typed(("dump/alias",), volume)
    assert found.home == other.resolve()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("dump/nobody", 'dump/nobody: no such directory, and no run in .* has the name "nobody"'),
        ("dump/alais", 'Did you mean "alias"'),
        ("later", "later: its run tiny-gkd-0123456789 is not in"),
    ],
)
def test_a_name_that_is_nowhere_is_a_mistake_that_names_it(
    volume: Runs, word: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        find.typed((word,), volume)
