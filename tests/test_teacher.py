"""Test that a teacher is the same one, and gives the same bits, wherever it is."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse import entrypoints
from stillhouse.distill import teacher_cache
from stillhouse.distill.engine import Engine
from stillhouse.distill.teacher import ModelTeacher, difference, probe
from stillhouse.distill.teacher_cache import CachedTeacher, key_of
from stillhouse.errors import ConfigError, ContractError, Interrupted, NodeFault
from stillhouse.rundir import Runs, read_json, write_json
from stillhouse.stop import StopFlag
from tests.builders.cheap import cheap

V = 64
ROWS = [([5, 6, 7], [8, 9, 1]), ([3], [4, 5, 6, 7, 1]), ([9, 8, 7, 6], [2, 1])]
DESCRIBED = {"weights": "a", "settings": "b", "tokenizer": "c", "dtype": "float32", "libraries": {}}
CPU = torch.device("cpu")


def drawn(seed=0, **config):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes, **heads, **config))
    return model.requires_grad_(False).eval()


def in_process(model=None):
    model = drawn() if model is None else model
    return ModelTeacher(model, Engine(model), contextlib.nullcontext, 0, [1], lambda: None)


def no_model():
    raise AssertionError("every row is in the cache")


def asked(teacher, rows=ROWS, alone=True):
    prompts, completions = [list(part) for part in zip(*rows, strict=True)]
    return teacher.hidden(prompts, completions, [0] * len(rows), alone=alone)


@pytest.fixture
def said():
    return []


@pytest.fixture
def cached(tmp_path, said):
    """Makes teachers that share a cache."""

    def make(load=in_process, described=DESCRIBED, most=2**30, poll=lambda: None):
        return CachedTeacher(described, tmp_path, most, CPU, load, said.append, poll)

    return make


def files_of(teacher):
    return sorted(file for file in (teacher.folder / "rows").glob("??/*"))


# -------------------------------------------------------------------------------- the cache


def test_a_row_is_scored_once_whatever_the_points_and_alone_as_in_process(cached):
    first = cached()
    before = first.forwards  # of the probe
    assert torch.equal(asked(first), asked(in_process()))
    assert torch.equal(asked(first, ROWS[::-1] + ROWS), asked(in_process(), ROWS[::-1] + ROWS))
    assert first.forwards - before == len(ROWS)
    second = cached(load=no_model)
    assert torch.equal(asked(second), asked(first)) and second.forwards == 0
    assert torch.equal(second.head().weight_VH, first.head().weight_VH)


def test_neighbours_decide_no_bit_of_a_row_that_is_scored_alone():
    teacher = in_process()
    for row in ROWS:
        assert torch.equal(asked(teacher, [row]), asked(teacher, [row], alone=False))
    own = [asked(teacher, [row]) for row in ROWS]
    assert torch.equal(torch.cat(own), asked(teacher))
    assert torch.allclose(asked(teacher), asked(teacher, alone=False), atol=1e-5)


def test_two_points_at_once_score_each_row_once(cached):
    ways = [cached(), cached()]
    before = [way.forwards for way in ways]
    threads = [threading.Thread(target=asked, args=(way, ROWS * 3)) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(way.forwards for way in ways) - sum(before) == len(ROWS)


@pytest.mark.parametrize("tear", [lambda b: b[:40], lambda b: b[:-1] + b"x", lambda b: b""])
def test_a_torn_row_is_not_served_and_written_again(cached, tear):
    first = cached()
    whole = asked(first)
    for file in files_of(first):
        file.write_bytes(tear(file.read_bytes()))
    again = cached()
    assert torch.equal(asked(again), whole) and again.forwards >= len(ROWS)
    assert torch.equal(asked(cached(load=no_model)), whole)


def test_what_a_killed_writer_left_is_no_row(cached):
    first = cached()
    file = files_of(first)[0]
    file.with_name(f".{file.name}.{'0' * 16}.tmp").write_bytes(b"half a row")
    assert torch.equal(asked(cached()), asked(in_process()))


def test_a_full_cache_goes_on_without_writing_and_says_so_once(cached, said):
    small = cached(most=1)
    assert torch.equal(asked(small), asked(in_process())) and not files_of(small)
    assert len(said) == 2 and "teacher_cache_gib" in said[1]  # the first: the model is loaded


def test_a_full_disk_goes_on_without_writing_and_says_so_once(cached, said, monkeypatch):
    first = cached()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache, "temporary_name", full)
    assert torch.equal(asked(first), asked(in_process())) and first.forwards >= len(ROWS)
    assert [text for text in said if "No space left" in text] == [said[-1]]


def test_a_cache_that_takes_no_files_goes_on_without_writing_and_says_so(tmp_path, said):
    (tmp_path / "teachers").symlink_to("/proc/none")  # no files can be made there
    one = CachedTeacher(DESCRIBED, tmp_path, 2**30, CPU, in_process, said.append, lambda: None)
    assert torch.equal(asked(one), asked(in_process()))
    assert "it goes on without writing" in said[-1]


def test_what_another_point_is_just_writing_stops_no_point_that_begins(cached):
    first = cached()
    asked(first)
    kept = files_of(first)
    (kept[0].parent / ".row.tmp").symlink_to("renamed in this moment")
    kept += [first.folder / "head", first.folder / "manifest.json"]
    assert cached().used == sum(file.stat().st_size for file in kept)


def test_points_at_once_and_other_teachers_keep_to_one_limit(cached):
    full = cached()
    asked(full)
    teachers = full.folder.parent
    used = sum(file.stat().st_size for file in teachers.rglob("*") if file.is_file())
    row = max(file.stat().st_size for file in files_of(full))
    most = used + 8 * row  # another teacher's head and manifest, and a few of its rows
    ways = [cached(described=DESCRIBED | {"weights": "x"}, most=most) for _ in range(3)]
    for first in range(1, 35):
        asked(ways[first % 3], [([first], [4, 5, 6, 1])])
    assert not any(way.is_writing for way in ways)
    assert sum(file.stat().st_size for file in teachers.rglob("*") if file.is_file()) <= most


def test_who_waits_for_a_row_that_another_point_scores_hears_a_request_to_stop(cached, monkeypatch):
    monkeypatch.setattr(teacher_cache, "LOCK_S", 0.01)
    flag, inside, done = StopFlag(), threading.Event(), threading.Event()
    waiting = cached(poll=flag.check)
    first = cached()

    def score(*_, **__):
        inside.set()
        done.wait()
        raise NodeFault("ended")

    first.model().hidden = score  # type: ignore[method-assign]

    def work():
        with contextlib.suppress(NodeFault):
            asked(first)

    other = threading.Thread(target=work)
    other.start()
    inside.wait()
    flag.is_set = True
    try:
        with pytest.raises(Interrupted):
            asked(waiting)
    finally:
        done.set()
        other.join()


def test_a_row_that_is_no_number_is_not_kept(cached):
    model = drawn()
    sick = cached(load=lambda: in_process(model))
    before = files_of(sick)
    model.get_submodule("model.norm").get_parameter("weight").fill_(torch.nan)
    assert asked(sick).isnan().any() and files_of(sick) == before


def test_a_cache_of_another_teacher_is_refused_in_words(cached):
    first = cached()
    manifest = first.folder / "manifest.json"
    kept = read_json(manifest) or {}
    write_json(manifest, kept | {"weights": "another"})
    with pytest.raises(ContractError, match="its weights are not what they were"):
        cached()
    write_json(manifest, kept)
    shutil.rmtree(first.folder / "rows")
    with pytest.raises(ContractError, match="other log-probabilities, by .* remove .*scored anew"):
        cached(load=lambda: in_process(drawn(seed=1)))


def test_a_model_that_is_loaded_when_a_row_is_missing_is_the_recorded_teacher(cached):
    asked(cached(), ROWS[:1])
    another = cached(load=lambda: in_process(drawn(seed=1)))
    assert torch.equal(asked(another, ROWS[:1]), asked(in_process(), ROWS[:1]))
    before = files_of(another)
    with pytest.raises(ContractError, match="manifest.json: .* other log-probabilities"):
        asked(another)
    assert files_of(another) == before


@pytest.mark.parametrize(
    ("bend", "why"),
    [
        (lambda m: "{", "manifest.json: not JSON"),
        (lambda m: "[]", "manifest.json: holds no JSON object"),
        (lambda m: json.dumps({k: v for k, v in m.items() if k != "weights"}), "weights: field"),
        (lambda m: json.dumps(m | {"dtype": "float8"}), "manifest.json: dtype: input should be"),
        (lambda m: json.dumps(m | {"probe": None}), "manifest.json: probe: input should be"),
        (lambda m: json.dumps(m | {"probe": [math.nan] * 15}), "probe.0: input should be a finite"),
    ],
)
def test_a_manifest_that_is_torn_or_odd_is_refused_by_its_path(cached, bend, why):
    file = cached().folder / "manifest.json"
    file.write_text(bend(read_json(file)))
    with pytest.raises(ContractError, match=why):
        cached(load=no_model)


def test_a_teacher_that_answers_no_numbers_is_refused(cached):
    class Sick(ModelTeacher):
        def hidden(self, *args, **kwargs):
            return super().hidden(*args, **kwargs) * torch.nan

    def sick():
        model = drawn()
        return Sick(model, Engine(model), contextlib.nullcontext, 0, [1], lambda: None)

    with pytest.raises(ContractError, match="log-probabilities that are not finite"):
        cached(load=sick)
    assert torch.equal(asked(cached()), asked(in_process()))


def test_teachers_share_no_row_that_could_differ_and_a_template_of_its_own_is_no_other(cached):
    others = [{"weights": "x"}, {"dtype": "bfloat16"}, {"tokenizer": "x"}]
    folders = {cached(described=DESCRIBED | other).folder for other in [{}, *others]}
    assert len(folders) == 4
    keys = {key_of(DESCRIBED, torch.device(kind)) for kind in ("cpu", "cuda", "cuda:1")}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["lmbda=0.5", "teacher_rows=alone"], "lmbda 0.5: a cache is for sequences"),
        (["lmbda=[[0,0],[1,0.1]]", "teacher_rows=alone"], "that no step changes"),
        (["lmbda=0", "kept_prompts=0.5", "teacher_rows=alone"], "kept_prompts 0.5"),
        (["lmbda=0"], "add teacher_rows=alone"),
    ],
)
def test_a_cache_is_refused_for_what_depends_on_the_student(tmp_path, words, why):
    with pytest.raises(ConfigError, match=why):
        cheap(tmp_path, "teacher_at=cache", *words)


def test_off_policy_points_end_in_the_same_bits_with_the_cache_and_in_process(tmp_path):
    words = ["lmbda=0", "teacher_rows=alone", "do_eval=true", "overlap_steps=0"]
    cache = tmp_path / "cache"
    adapters = []
    for place in ("process", "cache", "cache"):
        spec = cheap(tmp_path / str(len(adapters)), *words, f"teacher_at={place}")
        if place == "cache":
            shutil.copytree(spec.place.cache_dir, cache, dirs_exist_ok=True)
            spec = cheap(Path(spec.place.runs), *words, f"teacher_at={place}", f"cache_dir={cache}")
        assert entrypoints.train(spec) == 0
        run = Runs(Path(spec.place.runs)).of(spec)
        adapters.append((run.id, (run.adapter / "adapter_model.safetensors").read_bytes()))
    assert adapters[0] == adapters[1] == adapters[2]


# ---------------------------------------------------------------------------- the same one


def test_a_manifest_tells_teachers_apart_and_not_roundings():
    one = DESCRIBED | {"probe": probe(in_process())}
    assert difference(one, one) is None
    rounded = [value + 1e-5 for value in one["probe"]]
    assert difference(one, one | {"probe": rounded}) is None
    other = one | {"probe": probe(in_process(drawn(seed=1)))}
    assert "other log-probabilities" in (difference(one, other) or "")
    for name, words in [("tokenizer", "chat template"), ("dtype", "another dtype")]:
        assert words in (difference(one, one | {name: "x"}) or "")


def test_a_run_is_not_resumed_with_another_teacher(tmp_path):
    spec = cheap(tmp_path)
    assert entrypoints.train(spec) == 0
    run = Runs(tmp_path).of(spec)
    record = run.record() or {}
    assert record["teacher"]["dtype"] == "float32" and len(record["teacher"]["probe"]) == 15
    shutil.rmtree(run.adapter)
    record["teacher"]["probe"][0] -= 3
    write_json(run.spec_file, record)
    with pytest.raises(ContractError, match="not the one this run began with: it gives fixed"):
        entrypoints.train(spec)
    del record["teacher"]["dtype"]
    write_json(run.spec_file, record)
    with pytest.raises(ContractError, match=r"spec\.json: dtype: field required; move the dir"):
        entrypoints.train(spec)
