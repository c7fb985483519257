"""Test the sources of a point (weights, tokenizer, rows) by content, and the effects of changes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse import entrypoints, fingerprints, local_models
from stillhouse.compose import Overrides, as_command_line, compose, from_command_line
from stillhouse.distill.pairs import prepare
from stillhouse.distill.run import Run, train_run
from stillhouse.errors import ConfigError, ContractError, Interrupted
from stillhouse.identity import digest, point_id
from stillhouse.rundir import Json, RunDir, Runs, file_digest, new_record, write_json
from stillhouse.sources import differences, drift, rests_on, sources_of
from stillhouse.spec import QuantSpec, TrainSpec
from stillhouse.stop import StopFlag
from tests.builders.cheap import CACHE, cheap

A, B = "a" * 40, "b" * 40  # commits
NONE = QuantSpec("none", None, False)


def rows(plus: int) -> bytes:
    lines = [{"prompt": f"What is {n} + {plus}?", "completion": f"{n + plus}"} for n in range(12)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


class World:
    """Somebody's own pair and rows, and a place for runs."""

    def __init__(self, home: Path) -> None:
        self.home, self.runs = home, home / "runs"
        made = prepare(cheap(CACHE).pair, NONE, CACHE)
        shutil.copytree(made.student, home / "student")
        shutil.copytree(made.teacher, home / "teacher")
        (home / "rows.jsonl").write_bytes(rows(1))
        (home / "others.jsonl").write_bytes(rows(2))

    def spec(self, *more: str) -> TrainSpec:
        home = self.home
        return cheap(
            self.runs, "pair_source=hub", f"student={home / 'student'}", "quant=none", "lmbda=0",
            f"teacher={home / 'teacher'}", "data=local", f"data_path={home / 'rows.jsonl'}",
            f"other_file={home / 'others.jsonl'}", "other_prompts=0.25", "held_out_rows=2",
            "max_length=64", "min_completion=2", "max_steps=2", f"cache_dir={home / 'cache'}",
            "sanity_max_nll=99", *more,
        )  # fmt: skip

    def run(self, *more: str) -> RunDir:
        return Runs(self.runs).of(self.spec(*more))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One in which a point was trained."""
    world = World(tmp_path_factory.mktemp("world"))
    assert entrypoints.train(world.spec()) == 0
    return world


class Stops(StopFlag):
    """Somebody asks the process to stop when so many steps have begun."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def check(self) -> None:
        self.after -= 1
        self.is_set = self.is_set or self.after < 0
        super().check()


def flipped(file: Path) -> bytes:
    """The file's bytes with one of the last changed: the same size, another number."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    return bytes(content)


# ------------------------------------------------------------------- a trained point


def test_a_run_records_what_it_rests_on_and_where_it_ran(world: World) -> None:
    record = world.run().record()
    assert record is not None
    assert record["sources"] == sources_of(world.spec(), world.home / "cache")
    assert list(record["sources"]) == ["student", "tokenizer", "teacher", "data", "other_prompts"]
    assert record["processor"] and record["cpu_capability"] and record["device"] == "cpu"
    assert record["threads"] == 1 and record["versions"]["tokenizers"]


CHANGES: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "rows": ("rows.jsonl", lambda _: rows(3), "data: .*rows.jsonl is not what it was"),
    "other prompts": ("others.jsonl", lambda _: rows(4), "other_prompts: .*others.jsonl is"),
    "student": ("student/model.safetensors", flipped, "student: the weights of .*student are not"),
    "teacher": ("teacher/model.safetensors", flipped, "teacher: the weights of .*teacher are not"),
    "vocabulary": ("student/tokenizer.json", flipped, "tokenizer: the tokenizer or the chat temp"),
    "template": ("student/chat_template.jinja", lambda _: b"{{ 1 }}", "tokenizer: the tokenizer"),
    "turn ends": (
        "student/generation_config.json", lambda _: b'{"eos_token_id": [1, 2]}',
        "student: config.json or generation_config.json of .*student is not what it was",
    ),
    "config": ("teacher/config.json", lambda _: b'{"rope_theta": 1}', "teacher: config.json or"),
}  # fmt: skip


def test_a_trained_point_whose_sources_changed_is_refused_until_they_are_back(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, (name, changed, said) in CHANGES.items():
        file = world.home / name
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(changed(file))
        with pytest.raises(ContractError, match=said) as refused:
            entrypoints.train(world.spec())
        assert refused.value.exit_code == 42, change
        assert "Restore that, or begin this point anew" in str(refused.value)
        assert "--sources=new" in str(refused.value)
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)
    assert entrypoints.train(world.spec()) == 0
    assert "done already" in capsys.readouterr().out


def test_what_is_not_on_this_machine_says_nothing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was trained elsewhere and copied here is done."""
    away = world.home / "away"
    away.mkdir()
    for name in ("student", "teacher", "rows.jsonl", "others.jsonl"):
        (world.home / name).rename(away / name)
    try:
        assert sources_of(world.spec(), world.home / "cache") == {}
        assert entrypoints.train(world.spec()) == 0
        assert "done already" in capsys.readouterr().out
        # Where only some of it is here, only that is compared.
        (world.home / "rows.jsonl").write_bytes(rows(3))
        with pytest.raises(ContractError, match="data: .*rows.jsonl is not what it was"):
            entrypoints.train(world.spec())
    finally:
        for name in ("student", "teacher", "rows.jsonl", "others.jsonl"):
            (away / name).rename(world.home / name)


def test_a_run_of_other_weights_or_rows_begun_before_they_were_recorded_is_not_done(
    world: World,
) -> None:
    run = world.run()
    record = run.spec_file.read_bytes()
    plain = json.loads(record)
    del plain["sources"]
    write_json(run.spec_file, plain)
    with pytest.raises(ContractError, match="begun before a run recorded what it rests on"):
        entrypoints.train(world.spec())
    run.spec_file.write_bytes(record)


# ------------------------------------------------------------------- one that is not trained yet


def test_a_stopped_run_goes_on_only_over_what_it_began_with(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """And anew, where that is asked for: what lay there is kept."""
    point = ["seed=2", "max_steps=4"]
    run, file = world.run(*point), world.home / "rows.jsonl"
    before = file.read_bytes()
    with pytest.raises(Interrupted):
        train_run(world.spec(*point), run, Stops(after=2))
    saved = sorted(path.name for path in run.checkpoints.iterdir())
    file.write_bytes(rows(3))
    with pytest.raises(ContractError, match=r"data: .* sha256 \w{10}… then, sha256 \w{10}… now"):
        entrypoints.train(world.spec(*point))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == saved
    file.write_bytes(before)
    record = json.loads(run.spec_file.read_text())
    write_json(run.spec_file, record | {"cpu_capability": "ABACUS"})
    with pytest.raises(Interrupted):
        train_run(world.spec(*point), run, Stops(after=1))
    said = capsys.readouterr().out
    assert "going on from step 2" in said and "not where this run began" in said
    went_on = (run.record() or {})["went_on"]
    assert went_on == [{"cpu_capability": record["cpu_capability"]}]

    file.write_bytes(rows(3))
    assert entrypoints.train(world.spec(*point, "sources=new")) == 0
    said = capsys.readouterr().out
    kept = world.runs / ".before" / f"{run.path.name}.1"
    assert "begins anew" in said and str(kept) in said and "going on from" not in said
    assert (kept / "checkpoints").is_dir() and (kept / "spec.json").is_file()
    record = run.record()
    assert record is not None and run.is_trained()
    assert record["sources"] == sources_of(world.spec(*point), world.home / "cache")
    # Where nothing changed, the same words change nothing.
    assert entrypoints.train(world.spec(*point, "sources=new")) == 0
    assert "done already" in capsys.readouterr().out
    file.write_bytes(before)
    assert kept not in [found.path for found in Runs(world.runs).all()]


def test_what_changes_while_it_is_read_is_no_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.distill import loaded

    file = world.home / "rows.jsonl"
    before, read = file.read_bytes(), loaded.load_prompts

    def changes_behind(*args: Any, **more: Any) -> Any:
        found = read(*args, **more)
        file.write_bytes(rows(3))
        return found

    monkeypatch.setattr(loaded, "load_prompts", changes_behind)
    with pytest.raises(ContractError, match="it changed while it was read; run again"):
        Run(world.spec("seed=3"), world.run("seed=3"), StopFlag())
    file.write_bytes(before)


# ------------------------------------------------------------------- generated pairs


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The cache of another machine, with the same cheap pair in it."""
    prepare(cheap(CACHE).pair, cheap(CACHE).quant, CACHE)
    shutil.copytree(CACHE, tmp_path / "cache", ignore=shutil.ignore_patterns("*.lock", "rows"))
    return tmp_path / "cache"


def of_other_weights(cache: Path, spec: TrainSpec) -> None:
    """As another CPU would have made them: the recipe is the same one, the numbers are not."""
    file = cache / local_models.prepared(spec.pair, cache)["student"] / "model.safetensors"
    file.write_bytes(flipped(file))


def test_weights_made_by_the_same_recipe_are_compared_by_what_they_are(
    tmp_path: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point = ["lmbda=0", "max_steps=1"]
    spec = cheap(tmp_path / "runs", *point)
    run = Runs(tmp_path / "runs").of(spec)
    assert entrypoints.train(spec) == 0
    there = cheap(tmp_path / "runs", *point, f"cache_dir={elsewhere}")
    assert entrypoints.train(there) == 0, "the same weights in another place"
    of_other_weights(elsewhere, there)
    with pytest.raises(ContractError, match="student: the weights of tiny are not what they were"):
        entrypoints.train(there)
    # As 654a82a left it: the contract names the student's weights.
    record = json.loads(run.spec_file.read_text())
    del record["sources"], record["processor"], record["cpu_capability"]
    write_json(run.spec_file, record)
    capsys.readouterr()
    assert entrypoints.train(spec) == 0 and "done already" in capsys.readouterr().out
    with pytest.raises(ContractError, match="student: the weights of tiny are not what they were"):
        entrypoints.train(there)
    # And before it had an adapter: its record has the losses that the two were trained to.
    shutil.rmtree(run.adapter)
    here = sources_of(spec, CACHE)
    assert drift(run, spec, here) == []
    here["teacher"]["loss"] = 1.5
    (said,) = drift(run, spec, here)
    assert said.startswith("teacher: the weights of tiny are not what they were: trained to a loss")
    assert said.endswith("then, 1.5 now")


def test_a_run_that_has_to_make_its_pair_first_finds_out_then(
    tmp_path: Path, elsewhere: Path
) -> None:
    point = ["lmbda=0", "max_steps=3", "save_steps=1"]
    spec = cheap(tmp_path / "runs", *point)
    run = Runs(tmp_path / "runs").of(spec)
    with pytest.raises(Interrupted):
        train_run(spec, run, Stops(after=1))
    there = cheap(tmp_path / "runs", *point, f"cache_dir={elsewhere}")
    of_other_weights(elsewhere, there)
    shutil.rmtree(elsewhere / "prepared")
    assert sources_of(there, elsewhere) == {}, "nobody has prepared it yet"
    with pytest.raises(ContractError, match="student: the weights of tiny are not what they were"):
        entrypoints.train(there)
    assert run.status()["exit_code"] == 42 and run.checkpoints.is_dir()


# ------------------------------------------------------------------- the hub's cache


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with two commits of a model and of a data set; main is the first."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    made = prepare(cheap(CACHE).pair, NONE, CACHE)
    for kind, name in (("models", "pair"), ("datasets", "rows")):
        home = tmp_path / "hub" / f"{kind}--some--{name}"
        for commit in (A, B):
            if kind == "models":
                shutil.copytree(made.student, home / "snapshots" / commit)
            else:
                (home / "snapshots" / commit).mkdir(parents=True)
                (home / "snapshots" / commit / "train.jsonl").write_bytes(
                    rows(len(commit.strip("a")))
                )
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(A)
    return tmp_path / "hub"


def of_the_hub(root: Path, *more: str) -> TrainSpec:
    return cheap(
        root / "runs", "pair_source=hub", "student=some/pair", "teacher=some/pair", "quant=none",
        "data=tulu3", "data_path=some/rows", f"cache_dir={root / 'cache'}", *more,
    )  # fmt: skip


def test_a_branch_that_moved_is_another_commit_unless_a_commit_was_said_to_be_meant(
    tmp_path: Path, hub: Path
) -> None:
    spec = of_the_hub(tmp_path)
    here = sources_of(spec, tmp_path / "cache")
    assert {key: entry["commit"] for key, entry in here.items()} == {
        "student": A, "teacher": A, "data": A,
    }  # fmt: skip
    run = Runs(tmp_path / "runs").of(spec)
    write_json(run.spec_file, new_record(spec, {}) | {"sources": here})
    for name in ("models--some--pair", "datasets--some--rows"):
        (hub / name / "refs" / "main").write_text(B)
    with pytest.raises(ContractError, match="'commits={some/pair:aaaa") as refused:
        entrypoints.train(spec)
    assert "commit aaaaaaaaaa then" in str(refused.value)
    assert "commit bbbbbbbbbb now" in str(refused.value)
    meant = of_the_hub(tmp_path, f"commits={{some/pair:{A},datasets/some/rows:{A}}}")
    assert point_id(meant) == point_id(spec) and rests_on(meant) != rests_on(spec)
    assert drift(run, meant, sources_of(meant, tmp_path / "cache")) == []
    prepared = prepare(meant.pair, meant.quant, tmp_path / "cache", meant.place.commits)
    assert prepared.student_revision == prepared.teacher_revision == A
    assert prepare(spec.pair, spec.quant, tmp_path / "cache").student_revision == B


def test_rows_of_the_hub_are_those_of_the_commit_that_is_meant(hub: Path, tmp_path: Path) -> None:
    from stillhouse.distill.prompts import rows_at_hand

    data = of_the_hub(tmp_path).data
    assert rows_at_hand(data, tmp_path, {}).name == A
    assert rows_at_hand(data, tmp_path, {"datasets/some/rows": B, "some/rows": A}).name == B
    with pytest.raises(
        ConfigError, match=f"hf download some/rows --repo-type dataset .* {'c' * 40}"
    ):
        rows_at_hand(data, tmp_path, {"datasets/some/rows": "c" * 40})


def test_a_download_is_of_the_commit_that_is_meant(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from stillhouse.distill.hub import fetch

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spec = of_the_hub(tmp_path)
    fetch(spec.pair, spec.data, tmp_path / "cache", {"some/pair": B})  # all of it is here
    with pytest.raises(ConfigError, match=f"some/pair at {'c' * 40}: not on this machine"):
        fetch(spec.pair, spec.data, tmp_path / "cache", {"some/pair": "c" * 40})


def test_the_hubs_cache_is_where_its_library_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    homes = {
        "": tmp_path / ".cache/huggingface/hub",
        "XDG_CACHE_HOME": tmp_path / "x/huggingface/hub",
        "HF_HOME": tmp_path / "x/hub",
        "HUGGINGFACE_HUB_CACHE": tmp_path / "x",
        "HF_HUB_CACHE": tmp_path / "x",
    }
    for variable, home in homes.items():
        if variable:
            monkeypatch.setenv(variable, str(tmp_path / "x"))
        folder = home / "models--some--pair" / "snapshots" / A
        folder.mkdir(parents=True)
        assert local_models.snapshot("some/pair", A, "model") == folder, variable
        assert local_models.snapshot("some/pair", None, "model") is None, "no branch leads there"
        assert local_models.snapshot("some/pair", f"../snapshots/{A}", "model") is None
        shutil.rmtree(home)


def test_a_download_that_was_cut_short_is_not_at_hand(hub: Path) -> None:
    home = hub / "models--some--pair"
    files = {"config.json": {}, "model.safetensors": {}, "pytorch_model.bin": {}}
    write_json(home / "trees" / f"{A}.json", {"format_version": 1, "files": files})
    found = local_models.snapshot("some/pair", None, "model")
    assert found is not None, "what is not used need not be there"
    (found / "model.safetensors").unlink()
    assert local_models.snapshot("some/pair", None, "model") is None


# ------------------------------------------------------------------- fingerprints


def weights_file(path: Path, sizes: dict[str, int]) -> dict[str, int]:
    """A safetensors file of zeros, mostly a hole; where each tensor's middle lies."""
    header: Json = {}
    end = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: 8 + len(text) + sum(both) // 2 for name, both in offsets.items()}


def written_at(file: Path, where: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(where)
        opened.write(b"\x01")


def test_a_large_weights_file_is_told_by_a_byte_of_any_tensors_middle(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    sizes = {"embed": 200 * 2**20, "norm": 64, "head": 100 * 2**20}
    middles = weights_file(file, sizes)
    cache = tmp_path / "cache"
    seen = {fingerprints.of_file(file, cache, samples=True)}
    assert next(iter(seen)).startswith("sampled-")
    ends = {"first": 8, "last": file.stat().st_size - 1}
    for name, where in (middles | ends).items():
        written_at(file, where)
        found = fingerprints.of_file(file, cache, samples=True)
        assert found not in seen, name
        seen.add(found)
    os.truncate(file, file.stat().st_size + 2**20)
    assert fingerprints.of_file(file, cache, samples=True) not in seen, "another size"


def test_what_was_read_is_not_read_again_while_it_is_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    file.write_bytes(b"x" * fingerprints.REMEMBERED)
    first = fingerprints.of_file(file, cache)
    assert not cache.exists(), "a file that was written just now may be written again unseen"
    monkeypatch.setattr(fingerprints, "SETTLED_S", -1)
    assert fingerprints.of_file(file, cache) == first
    (memory,) = cache.rglob("*.json")
    known = json.loads(memory.read_text())
    write_json(memory, known | {"digest": "as remembered"})
    assert fingerprints.of_file(file, cache) == "as remembered"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    written_at(file, 5)
    os.utime(
        file, ns=times
    )  # its size and its time are what they were, and it is seen all the same
    changed = fingerprints.of_file(file, cache)
    assert changed not in (first, "as remembered")
    memory.write_text("{torn")
    assert fingerprints.of_file(file, cache) == changed, "a memory that cannot be read is none"


def test_json_that_is_spelled_otherwise_or_saved_by_another_version_is_the_same(
    tmp_path: Path,
) -> None:
    def digest_of(text: str) -> str:
        (tmp_path / "config.json").write_text(text)
        return fingerprints.of_settings([tmp_path / "config.json"], tmp_path)

    one = digest_of('{"a": 1, "b": [2], "transformers_version": "5.23"}')
    assert digest_of('{"b": [2],\n "a": 1, "transformers_version": "6.0"}') == one
    others = {digest_of(text) for text in ('{"a": 1, "b": [3]}', '{"a": 1}', "{torn", "[1]", "NaN")}
    assert len(others | {one}) == 6


def test_what_a_source_was_and_is_can_be_of_two_kinds() -> None:
    commit = {"what": "some/pair", "kind": "model", "commit": A}
    files = {"what": "some/pair", "kind": "model", "digest": "0123456789abcdef"}
    (said,) = differences({"student": commit}, {"student": files})
    assert said == (
        "student: the weights of some/pair are not what they were: commit aaaaaaaaaa then, sha256"
        " 0123456789… now"
    )
    assert differences({"student": commit}, {"teacher": files}) == [], "nothing is known of both"


def test_commits_on_a_command_line_are_read_as_they_were_written() -> None:
    asked = {"some/pair@v1.0-rc": A, "datasets/some/rows": "1" * 40, "some/other": "0e" * 20}
    (word,) = as_command_line(Overrides({}, {"place.commits": asked}))
    assert (
        compose(from_command_line(["pair=tiny", word], TrainSpec), TrainSpec).place.commits == asked
    )
    with pytest.raises(ConfigError, match="place.commits"):
        compose(from_command_line(["commits={some/pair:main}"], TrainSpec), TrainSpec)


def test_a_contract_may_name_the_sample_or_as_older_ones_did_all_bytes(tmp_path: Path) -> None:
    from stillhouse.distill.adapters import check_contract
    from stillhouse.distill.pairs import PreparedPair
    from stillhouse.distill.quant import numerics

    file = tmp_path / "model.safetensors"
    weights_file(file, {"embed": 64})
    whole = digest({file.name: file_digest(file)})
    prepared = PreparedPair(
        str(tmp_path), str(tmp_path), None, None, tmp_path, {}, student_weights="sampled"
    )
    base: Json = {"path": "elsewhere", "revision": None}
    contract = {
        "id": "0123456789",
        "quant": dataclasses.asdict(NONE),
        "numerics": numerics(NONE),
    }
    for known in ("sampled", whole):
        check_contract(contract | {"base": base | {"digest": known}}, prepared, NONE)
    with pytest.raises(ContractError, match="was trained over elsewhere with digest other"):
        check_contract(contract | {"base": base | {"digest": "other"}}, prepared, NONE)
