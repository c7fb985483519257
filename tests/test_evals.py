"""Test that evaluation scores the function that was trained, and scores it once."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import lm_eval.utils
import pytest
import torch
from lm_eval.api.group import Group
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from stillhouse import pod
from stillhouse.compose import compose, from_command_line
from stillhouse.distill import models
from stillhouse.distill.chat import Chat
from stillhouse.distill.encoder import Context
from stillhouse.distill.engine import Engine
from stillhouse.distill.prompts import load_prompts
from stillhouse.distill.quant import dequantized_weight, quantize_
from stillhouse.distill.toy import problems, tiny
from stillhouse.errors import ConfigError, ContractError, DataError, Interrupted, exit_code_of
from stillhouse.evals import find, harness, written
from stillhouse.evals.lm import Lm
from stillhouse.evals.suite import LoadedTask, Scorer, _set_every_field, _tiny_task, load_tasks
from stillhouse.identity import baseline_key, score_key
from stillhouse.rundir import (
    RunDir,
    Runs,
    eval_file,
    link_path,
    new_record,
    read_eval_note,
    read_json,
    write_json,
)
from stillhouse.spec import EvalSpec, SuiteSpec, TaskSpec, TrainSpec

LIMIT = 8
GEN = TaskSpec("tiny_gen", "exact_match", None, True)
MC = TaskSpec("tiny_mc", "acc", None, True)
GEN_AGAIN = TaskSpec("tiny_gen@requantised", "exact_match", None, True)
DATA = compose(from_command_line(["pair=tiny"], EvalSpec), EvalSpec).data
ADAPTERS_ONLY = ["eval_teacher=false", "eval_student=false", "eval_ptq=false"]


class Never:
    def check(self) -> None: ...


class After:
    """Asks to stop at the n-th poll."""

    def __init__(self, polls: int) -> None:
        self.left = polls

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted("asked to stop")


def suite(*tasks: TaskSpec, chat: bool = True, limit: int | None = LIMIT) -> SuiteSpec:
    return SuiteSpec("test", tasks or (GEN, MC), chat, limit, 16)


def llama(
    vocabulary: int, hidden: int = 32, seed: int = 0, positions: int = 256, **more: Any
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
        **more,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig()  # as models.load_base leaves it
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A pair of random micro models, and what was prepared for it."""
    place = tmp_path_factory.mktemp("place")
    text = tiny.tokenizer()
    for seed, role in enumerate(("student", "teacher")):
        llama(len(text), seed=seed).save_pretrained(place / role)
        text.save_pretrained(place / role)
    return place


def pair_words(place: Path) -> list[str]:
    return [
        "pair=tiny",
        "pair_source=hub",
        f"student={place / 'student'}",
        f"teacher={place / 'teacher'}",
        f"cache_dir={place / 'cache'}",
        "threads=1",
    ]


def asked(place: Path, runs: Path, *words: str) -> EvalSpec:
    line = [*pair_words(place), "suite=tiny", f"limit={LIMIT}", "max_gen_toks=12"]
    line += [f"runs={runs}", "quant=int4", *words]
    return compose(from_command_line(line, EvalSpec), EvalSpec)


def point(place: Path, runs: Path, *words: str) -> TrainSpec:
    line = [*pair_words(place), f"runs={runs}", "quant=int4", *words]
    return compose(from_command_line(line, TrainSpec), TrainSpec)


def trained(place: Path, runs: Path, *words: str, size: float = 0.3) -> RunDir:
    """A run with an adapter that moves every layer by weights of that size."""
    spec = point(place, runs, *words)
    run, prepared = Runs(runs).of(spec), models.prepare(spec.pair, spec.quant, place / "cache")
    base = models.load_base(
        prepared.student, prepared.student_revision, "float32", spec.quant, torch.device("cpu")
    )
    student = models.new_student(base, spec.lora, 0)
    generator = torch.Generator().manual_seed(spec.training.seed)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(size * torch.randn(weight.shape, generator=generator))
    write_json(run.spec_file, new_record(spec, {}))
    models.save_adapter(student, spec, prepared, run.adapter)
    if spec.place.name:
        Runs(runs).link_name(spec.place.name, run)
    return run


def data_dir(place: Path, runs: Path) -> Path:
    spec = asked(place, runs)
    return models.prepare(spec.pair, spec.quant, place / "cache").data_dir


def scores_below(root: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(root.rglob("eval/*.json"))
    return {str(f.relative_to(root)): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


def choice_loglikelihoods(model: Any, text: Any, row: dict[str, Any]) -> list[float]:
    """Of each worked answer after its prompt, one forward pass each: no batch, no padding."""
    prompt = f"<|user|>{row['question']}<|assistant|>"
    found = []
    for choice in row["choices"]:
        start, ids = len(text.encode(prompt)), torch.tensor([text.encode(prompt + choice)])
        with torch.no_grad():
            log_p_TV = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append(log_p_TV[start - 1 :].gather(1, ids[0, start:, None]).sum().item())
    return found


# ---------------------------------------------------------------- the table of a pair


@pytest.fixture(scope="module")
def table(place, tmp_path_factory):
    """Every kind of row, scored: (runs, run by name, what was printed)."""
    runs = tmp_path_factory.mktemp("table") / "runs"
    made = {
        "lmbda_1_int4": trained(place, runs, "name=lmbda_1_int4", "lmbda=1"),
        "lmbda_0_int4": trained(place, runs, "name=lmbda_0_int4", "lmbda=0"),
        "plain": trained(place, runs, "name=plain", "quant=none"),
        "nf4": trained(place, runs, "quant=bnb_nf4", "quant_group_size=32"),
    }
    return runs, made


def test_every_row_is_scored_and_each_base_loaded_once(place, table, capsys, monkeypatch):
    runs, made = table
    loads: list[Any] = []
    load_base = models.load_base

    def counted(*args: Any) -> Any:
        loads.append(args[3] and args[3].quant_type)
        return load_base(*args)

    monkeypatch.setattr(models, "load_base", counted)
    assert harness.run_suite(asked(place, runs, f"lora_paths=[{runs}]"), Never()) == 0
    printed = capsys.readouterr().out
    assert sorted(loads, key=str) == [None, None, "bnb_nf4", "int4"]  # teacher, student, nf4, int4

    rows = printed[printed.index("model  ") :].splitlines()
    assert rows[0] == "model                     | tiny_gen |  tiny_mc"
    labels = [row.split(" | ")[0].rstrip() for row in rows[1:]]
    nf4 = f"bnb_nf4_tiny-g-{made['nf4'].id}"
    assert labels[:3] == ["teacher", "student", "ptq_int4"]
    assert sorted(labels[3:]) == sorted(["int4_lmbda_1", "int4_lmbda_0", "none_plain", nf4])
    said = [line for line in printed.splitlines() if "another quantiser" in line]
    assert len(said) == 1
    assert nf4 in said[0] and "none_plain" in said[0] and "lmbda" not in said[0]

    before = scores_below(runs)
    assert len(before) == 2 * len(labels)
    loads.clear()
    assert harness.run_suite(asked(place, runs, f"lora_paths=[{runs}]"), Never()) == 0
    again = capsys.readouterr().out
    assert again[again.index("model  ") :].splitlines() == rows
    assert "0 of 14 scores to find" in again
    assert loads == [] and scores_below(runs) == before, "a finished score is not computed again"


def test_a_score_that_another_evaluation_writes_meanwhile_counts_as_replaced_by_none(
    place, table, monkeypatch
):
    runs, made = table
    run, versions = made["plain"], models.versions
    spec, file = (
        asked(place, runs, f"lora_paths=[{run.path}]", *ADAPTERS_ONLY),
        run.eval_file("tiny_mc"),
    )
    harness.run_suite(spec, Never())
    theirs = read_json(file)
    file.unlink()

    def slow() -> dict[str, str]:
        write_json(file, theirs)  # between our look at the file and our writing
        return versions()

    monkeypatch.setattr(models, "versions", slow)
    harness.run_suite(spec, Never())
    ours = read_json(file)
    assert ours == theirs | {key: ours[key] for key in ("seconds", "finished")}


@pytest.mark.parametrize("which", ["lmbda_1_int4", "plain", "nf4"])
def test_an_adapter_is_scored_as_the_function_it_was_trained_as(place, table, which):
    runs, made = table
    run = made[which]
    spec = asked(place, runs, f"lora_paths=[{run.path}]", *ADAPTERS_ONLY)
    harness.run_suite(spec, Never())
    score = read_json(run.eval_file("tiny_mc"))
    contract = run.contract()
    assert score is not None and contract is not None
    assert (score["quant_type"], score["n"]) == (contract["quant"]["quant_type"], LIMIT)

    quant = harness._quant(contract, run.adapter)
    base = models.load_base(str(place / "student"), None, "float32", quant, torch.device("cpu"))
    model = models.attach_adapter(base, run.adapter, "default")
    text = models.load_tokenizer(str(place / "student"), None)
    hits = []
    for row in problems.test_rows(LIMIT):
        lls = choice_loglikelihoods(model, text, row)
        hits.append(float(lls.index(max(lls)) == row["label"]))
    assert [s["value"] for s in score["samples"]] == hits
    assert [s["doc"] for s in score["samples"]] == list(range(LIMIT))
    assert score["value"] == pytest.approx(sum(hits) / LIMIT)


def test_a_score_says_what_was_asked_and_of_which_weights(place, table):
    runs, made = table
    run, spec = made["lmbda_1_int4"], asked(place, runs)
    harness.run_suite(spec, Never())
    score = read_json(run.eval_file("tiny_gen"))
    assert score is not None
    assert score["key"] == score_key(spec.suite, GEN)
    assert score["task"] == "tiny_gen" and score["metric"] == "exact_match"
    assert score["higher_is_better"] is True and score["format"] == 1
    assert score["metrics"] == {"exact_match,answer": score["value"]}
    assert {s["value"] for s in score["samples"]} <= {0.0, 1.0} and len(score["samples"]) == LIMIT
    assert set(score["versions"]) == {"lm_eval", "transformers", "torch", "peft", "task_version"}
    assert score["adapter_digest"] and score["seconds"] > 0 and score["finished"] > 1e9
    homes = {p.name.split("-")[0]: p for p in (runs / "baselines").iterdir()}
    assert set(homes) == {"teacher", "student", "ptq"}
    for label, home in homes.items():
        about, of_it = read_json(home / "baseline.json"), read_json(eval_file(home, "tiny_gen"))
        assert about is not None and of_it is not None
        assert (about["label"], of_it["adapter_digest"]) == (label, None)
        assert (about["quant"] is not None) == (label == "ptq")


def test_with_no_paths_every_trained_run_of_this_pair_is_scored(place, tmp_path, capsys):
    runs = tmp_path / "runs"
    mine = trained(place, runs, "name=mine")
    trained(place, runs, "name=other", "teacher_few_shot=1")  # another pair
    point_without_adapter = Runs(runs).of(point(place, runs, "lmbda=0.25"))
    write_json(point_without_adapter.spec_file, new_record(point(place, runs, "lmbda=0.25"), {}))
    harness.run_suite(asked(place, runs, "eval_teacher=false", "eval_student=false"), Never())
    printed = capsys.readouterr().out
    assert "int4_mine" in printed and "other" not in printed
    assert list(scores_below(mine.path)) == ["eval/tiny_gen.json", "eval/tiny_mc.json"]


def test_another_question_and_another_adapter_are_scored_anew(place, tmp_path):
    runs = tmp_path / "runs"
    run = trained(place, runs)
    harness.run_suite(asked(place, runs, *ADAPTERS_ONLY), Never())
    first = scores_below(run.path)
    harness.run_suite(asked(place, runs, *ADAPTERS_ONLY, "limit=5"), Never())
    score = read_json(run.eval_file("tiny_gen"))
    assert score is not None and score["n"] == 5 and scores_below(run.path) != first
    trained(place, runs, size=0.5)  # the same point, trained again to other weights
    harness.run_suite(asked(place, runs, *ADAPTERS_ONLY, "limit=5"), Never())
    again = read_json(run.eval_file("tiny_gen"))
    assert again is not None and again["adapter_digest"] != score["adapter_digest"]


def test_a_score_of_other_weights_or_another_lm_eval_is_said_and_made_anew(place, tmp_path, capsys):
    spec = asked(place, tmp_path, "eval_student=false", "eval_ptq=false", "suite=tiny")
    trained(place, tmp_path)
    harness.run_suite(spec, Never())
    (run,), (home,) = [*Runs(tmp_path).all()], [*tmp_path.glob("baselines/teacher-*")]
    teacher, adapter = eval_file(home, "tiny_mc"), run.eval_file("tiny_gen")
    before = {file: read_json(file) or {} for file in (teacher, adapter)}
    assert before[teacher]["sources"].keys() == {"teacher", "tokenizer"}
    assert before[adapter]["sources"].keys() == {"student", "tokenizer"}
    assert before[adapter]["before"] == []
    assert before[adapter]["machine"]["cpu_capability"]
    sources = before[teacher]["sources"]
    other = {"sources": sources | {"teacher": sources["teacher"] | {"digest": "0" * 64}}}
    write_json(teacher, before[teacher] | other | {"value": 0.125})
    versions = {"versions": before[adapter]["versions"] | {"lm_eval": "0.0.1"}}
    write_json(adapter, before[adapter] | versions | {"value": 0.875})
    capsys.readouterr()
    harness.run_suite(spec, Never())
    said = capsys.readouterr().out
    assert "2 of 4 scores to find" in said
    assert "eval: teacher tiny_mc drifted, scored anew: teacher: the weights of" in said
    assert "tiny_gen drifted, scored anew: lm-eval was 0.0.1 and is" in said
    for file, old in ((teacher, 0.125), (adapter, 0.875)):
        after = read_json(file) or {}
        assert after["value"] == before[file]["value"]
        (note,) = after["before"]
        assert note["value"] == old
        assert len(note["why"]) == 1


def test_what_two_evaluations_score_at_once_is_kept_of_the_first(place, tmp_path, monkeypatch):
    spec = asked(place, tmp_path, "eval_student=false", "eval_ptq=false", "suite=tiny")
    trained(place, tmp_path)
    score, firsts = Scorer.score, list[dict[Path, object]]()

    def meanwhile(self, *args):
        if not firsts:
            firsts.append({})
            harness.run_suite(spec, Never())
            firsts.append({file: read_json(file) for file in tmp_path.glob("**/eval/*.json")})
        return score(self, *args)

    monkeypatch.setattr(Scorer, "score", meanwhile)
    harness.run_suite(spec, Never())
    kept = {file: read_json(file) for file in tmp_path.glob("**/eval/*.json")}
    assert len(kept) == 4 and kept == firsts[1]


def test_teacher_and_untrained_student_of_a_self_pair_are_asked_once(place, tmp_path, monkeypatch):
    runs, asked_for = tmp_path / "runs", []
    score = Scorer.score

    def counted(self: Scorer, model: Any, task: LoadedTask, label: str, examples: int = 0) -> Any:
        asked_for.append((label, task.spec.task))
        return score(self, model, task, label, examples)

    monkeypatch.setattr(Scorer, "score", counted)
    spec = asked(place, runs, f"teacher={place / 'student'}", "eval_ptq=false")
    harness.run_suite(spec, Never())
    assert asked_for == [("teacher", "tiny_gen"), ("teacher", "tiny_mc")]
    values = {p.parent.parent.name.split("-")[0] for p in runs.rglob("tiny_mc.json")}
    assert values == {"teacher", "student"}


def test_of_two_that_score_the_same_at_once_one_score_stays(place, tmp_path, monkeypatch):
    spec = asked(place, tmp_path, "eval_student=false", "eval_ptq=false")
    score, overtaken = Scorer.score, []

    def slowly(self: Scorer, model: Any, task: LoadedTask, label: str, examples: int = 0) -> Any:
        if not overtaken:
            overtaken.append(label)
            harness.run_suite(spec, Never())
            overtaken.extend(file.read_bytes() for file in scored())
        return score(self, model, task, label, examples)

    def scored() -> list[Path]:
        return sorted(tmp_path.glob("baselines/teacher-*/eval/*.json"))

    monkeypatch.setattr(Scorer, "score", slowly)
    harness.run_suite(spec, Never())
    assert overtaken == ["teacher", *(file.read_bytes() for file in scored())]


# ---------------------------------------------------------------- merged and quantised again


def test_the_second_column_is_the_adapter_merged_into_the_dense_base_and_quantised(place, table):
    runs, made = table
    run = made["lmbda_1_int4"]
    spec = point(place, runs, "lmbda=1", "name=lmbda_1_int4")
    prepared = models.prepare(spec.pair, spec.quant, place / "cache")
    cpu = torch.device("cpu")
    base = (prepared.student, prepared.student_revision, "float32")
    again = models.merged_and_requantised(*base, spec.quant, cpu, run.adapter)

    name = "model.layers.1.mlp.down_proj"
    trained = models.attach_adapter(models.load_base(*base, spec.quant, cpu), run.adapter, "x")
    layer: Any = trained.get_base_model().get_submodule(name)
    delta = layer.lora_B["x"].weight @ layer.lora_A["x"].weight * layer.scaling["x"]
    dense: Any = models.load_base(*base, None, cpu).get_submodule(name)
    weight = dense.weight
    by_hand = torch.nn.Linear(*weight.T.shape, bias=False)
    by_hand.weight.data = weight + delta
    holder: Any = torch.nn.ModuleDict({"only": by_hand})
    quantize_(holder, spec.quant)
    torch.testing.assert_close(
        dequantized_weight(again.get_submodule(name)), dequantized_weight(holder["only"])
    )
    difference = dequantized_weight(again.get_submodule(name)) - (
        dequantized_weight(layer.base_layer) + delta
    )
    assert difference.abs().max() > 0.01, "it is another function than was trained"


def test_an_adapter_gets_both_scores_and_a_row_without_one_the_same_twice(
    place, tmp_path, capsys, monkeypatch
):
    runs, asked_for = tmp_path / "runs", []
    run = trained(place, runs, "name=one")
    score = Scorer.score

    def counted(self: Scorer, model: Any, task: LoadedTask, label: str, examples: int = 0) -> Any:
        asked_for.append((label, task.spec.task))
        return score(self, model, task, label, examples)

    monkeypatch.setattr(Scorer, "score", counted)
    spec = asked(place, runs, "suite=tiny_requantised", "eval_teacher=false", "eval_student=false")
    harness.run_suite(spec, Never())
    tasks = [task.task for task in spec.suite.tasks]
    assert tasks == ["tiny_gen", "tiny_gen@requantised", "tiny_mc", "tiny_mc@requantised"]
    assert asked_for == [("ptq_int4", "tiny_gen"), ("ptq_int4", "tiny_mc")] + [
        ("int4_one", task) for task in sorted(tasks, key=lambda task: "@" in task)
    ]
    found = [read_json(run.eval_file(task)) for task in tasks]
    assert [score["task"] for score in found if score] == tasks
    assert len({score["key"] for score in found if score}) == 4
    (ptq,) = (runs / "baselines").iterdir()
    twice = [read_json(eval_file(ptq, task)) for task in tasks[:2]]
    assert twice[0] and twice[1] and twice[0]["samples"] == twice[1]["samples"]
    header = "model                     | tiny_gen | tiny_gen@requantised |  tiny_mc"
    assert header in capsys.readouterr().out


def test_the_second_score_is_that_of_the_other_function(place, tmp_path):
    runs = tmp_path / "runs"
    run = trained(place, runs)
    words = ["suite=tiny_requantised", "limit=24", *ADAPTERS_ONLY]
    harness.run_suite(asked(place, runs, *words), Never())
    spec = point(place, runs)
    again = models.merged_and_requantised(
        str(place / "student"), None, "float32", spec.quant, torch.device("cpu"), run.adapter
    )
    text = models.load_tokenizer(str(place / "student"), None)
    hits = []
    for row in problems.test_rows(24):
        lls = choice_loglikelihoods(again, text, row)
        hits.append(float(lls.index(max(lls)) == row["label"]))
    first, second = (read_json(run.eval_file(f"tiny_mc{x}")) for x in ("", "@requantised"))
    assert first is not None and second is not None
    assert [s["value"] for s in second["samples"]] == hits
    assert [s["value"] for s in first["samples"]] != hits


def test_a_task_is_asked_as_trained_or_requantised_and_in_no_third_way():
    assert (GEN_AGAIN.asks, GEN_AGAIN.is_requantised) == ("tiny_gen", True)
    assert (GEN.asks, GEN.is_requantised) == ("tiny_gen", False)
    with pytest.raises(ValueError, match="a task is NAME or NAME@requantised, got tiny_gen@int8"):
        TaskSpec("tiny_gen@int8", "exact_match", None, True)


# ---------------------------------------------------------------- stopping and refusing


def test_a_template_is_compiled_once_for_all_documents():
    compiled: Any = lm_eval.utils.env.from_string
    before = compiled.cache_info().misses
    filled = [lm_eval.utils.apply_template("{{ n }} apples", {"n": n}) for n in range(3)]
    assert filled == ["0 apples", "1 apples", "2 apples"]
    assert compiled.cache_info().misses == before + 1


def test_distinct_n_grams_and_lengths_by_hand():
    assert written.pieces("A: 7+3=10. #### 8") == [*"A:7+3=", "10", *".####", "8"]
    assert written.length(["7+3", "a"]) == 2
    # n = 1: 4 of 6 (a, b, c, d); n = 2: ab, bc, ab, bd, 3 of 4; n = 3: abc, abd, 2 of 2.
    assert written.distinct(["a b c", "a b d", ""]) == pytest.approx((4 / 6 + 3 / 4 + 1) / 3)
    assert written.distinct([""]) == 0


def test_drawn_answers_are_the_same_in_any_batch_and_others_to_the_same_question(place, tmp_path):
    text = tiny.tokenizer()
    model = llama(len(text))
    names = [TaskSpec(name, name.split("_")[-1], None, True) for name in written.TASKS]
    found = []
    for size in (LIMIT * written.SAMPLES, 3):
        scorer = Scorer(suite(*names, limit=3), Chat(text, DATA), size, Never())
        tasks = load_tasks(scorer.suite, names, data_dir(place, tmp_path))
        scores = [scorer.score(model, task, "model") for task in tasks]
        found.append([(score["value"], score["samples"]) for score in scores])
    assert found[0] == found[1]
    (length, _), (distinct, of_all), (drawn_length, _), (drawn, per_question) = found[0]
    assert length != drawn_length, "one is of the likeliest tokens"
    assert of_all == [] and len(per_question) == 3
    assert 0 < distinct <= 1 and drawn > 0.5, "four answers that differ"


def test_being_stopped_keeps_what_is_finished_and_goes_on_to_the_same_table(
    place, tmp_path, capsys
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for runs in (whole, stopped):
        trained(place, runs, "name=one")

    def spec(runs: Path) -> EvalSpec:
        return asked(place, runs, "eval_teacher=false", "eval_student=false")

    harness.run_suite(spec(whole), Never())
    expected = capsys.readouterr().out
    codes, finished = [], []
    for polls in (4, 20, 10_000):
        codes.append(exit_code_of(lambda n=polls: harness.run_suite(spec(stopped), After(n))))
        finished.append(len(scores_below(stopped)))
    assert codes == [85, 85, 0], (
        f"{finished}: the first stop falls into the middle of the first task"
    )
    assert finished[0] == 0 and 0 < finished[1] < 4 and finished[2] == 4
    printed = capsys.readouterr().out
    assert printed[printed.index("model  ") :] == expected[expected.index("model  ") :]


@pytest.mark.parametrize(
    ("size", "message"), [(0.0, "leaves every output as it is"), (float("nan"), "NaN")]
)
def test_an_adapter_without_effect_or_without_numbers_is_refused_and_costs_others_nothing(
    place, tmp_path, size, message
):
    runs, apart = tmp_path / "runs", tmp_path / "apart"
    bad, good = trained(place, runs, "seed=1", size=size), trained(place, runs, "seed=2")
    spec = asked(place, runs, f"lora_paths=[{bad.path},{good.path}]", "eval_teacher=false")
    with pytest.raises(ContractError, match=message):
        harness.run_suite(spec, Never())
    note = read_eval_note(bad.path, "error")
    assert note["code"] == 42 and message in note["cause"]
    assert scores_below(bad.path) == {} and len(scores_below(runs)) == 2 * 3

    alone = trained(place, apart, "seed=2")
    harness.run_suite(asked(place, apart, *ADAPTERS_ONLY), Never())
    for task in ("tiny_gen", "tiny_mc"):
        beside, by_itself = (read_json(run.eval_file(task)) for run in (good, alone))
        assert beside and by_itself and beside["samples"] == by_itself["samples"]

    shutil.rmtree(bad.adapter)
    trained(place, runs, "seed=1")
    before = scores_below(good.path)
    assert harness.run_suite(spec, Never()) == 0
    assert len(scores_below(bad.path)) == 2 and scores_below(good.path) == before
    assert read_eval_note(bad.path, "error") == {}


def score_as_a_pod(spec: EvalSpec, deadly: str, told: Path) -> None:
    """An evaluation in a process of its own, which dies when it comes to the row `deadly`."""
    os.environ |= {"STILLHOUSE_JOB": "uid", "STILLHOUSE_EXIT_FILE": str(told)}
    score = Scorer.score

    def mortal(self: Scorer, model: Any, task: LoadedTask, label: str, examples: int = 0) -> Any:
        if label == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, model, task, label, examples)

    Scorer.score = mortal
    sys.exit(exit_code_of(lambda: harness.run_suite(spec, Never())))


def test_an_adapter_that_kills_its_process_is_blamed_and_the_others_are_scored(place, tmp_path):
    runs = tmp_path / "runs"
    bad, good = trained(place, runs, "name=bad"), trained(place, runs, "name=good", "seed=2")
    spec = asked(place, runs, f"lora_paths=[{bad.path},{good.path}]", *ADAPTERS_ONLY)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.test_evals"])

    def ended(deadly: str, told: Path) -> tuple[int | None, dict[str, Any]]:
        process = processes.Process(target=score_as_a_pod, args=(spec, deadly, told))
        process.start()
        process.join()
        lines = [json.loads(line) for line in told.read_text().splitlines()]
        return process.exitcode, pod.rows_of(lines, 137, "killed")

    at_work = {"failed": {bad.id: [137, "killed, while it was scored"]}}
    assert ended("int4_bad", tmp_path / "1") == (-signal.SIGKILL, at_work)
    assert scores_below(runs) == {}, "it was the first"
    code, rows = ended("int4_bad", tmp_path / "2")
    assert (code, rows) == (-signal.SIGKILL, at_work | {"done": good.id})
    assert len(scores_below(good.path)) == 2, "it comes last"
    code, rows = ended("int4_bad", tmp_path / "3")
    assert (code, rows["done"], rows["failed"][bad.id][0]) == (42, good.id, 42)
    assert "2 processes in a row died" in read_eval_note(bad.path, "error")["cause"]
    assert ended("nobody", tmp_path / "4")[0] == 0
    assert len(scores_below(bad.path)) == 2
    assert [*runs.glob("**/eval_*.json")] == []


def test_an_adapter_that_cannot_be_rebuilt_is_refused(place, tmp_path):
    runs = tmp_path / "runs"
    run = trained(place, runs)
    contract = json.loads((run.adapter / "stillhouse.json").read_text())

    def refused(message: str, **changes: Any) -> None:
        write_json(run.adapter / "stillhouse.json", contract | changes)
        with pytest.raises(ContractError, match=message):
            harness.run_suite(
                asked(place, runs, f"lora_paths=[{run.path}]", *ADAPTERS_ONLY), Never()
            )
        assert scores_below(runs) == {}

    refused("trained over", base=contract["base"] | {"digest": "0" * 64})
    refused("would rebuild", numerics=contract["numerics"] | {"library_version": "0"})
    refused("unknown to this version", quant=contract["quant"] | {"quant_type": "nvfp4"})
    (run.adapter / "stillhouse.json").unlink()
    with pytest.raises(ContractError, match="numerics contract"):
        harness.run_suite(asked(place, runs, f"lora_paths=[{run.path}]"), Never())


def test_an_adapter_with_a_changed_tensor_is_refused(place, tmp_path):
    runs = tmp_path / "runs"
    run = trained(place, runs)
    file = run.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ContractError, match="not the file that training saved"):
        harness.run_suite(asked(place, runs, f"lora_paths=[{run.path}]"), Never())


def test_an_adapter_outside_any_run_keeps_its_scores_in_itself(place, tmp_path, capsys):
    run = trained(place, tmp_path / "runs")
    for name in ("a", "b"):
        shutil.copytree(run.adapter, tmp_path / "given" / name)
    words = [f"lora_paths=[{tmp_path / 'given'}]", *ADAPTERS_ONLY]
    harness.run_suite(asked(place, tmp_path / "runs", *words), Never())
    assert [p for p in scores_below(tmp_path / "given") if "gen" in p] == [
        "a/eval/tiny_gen.json",
        "b/eval/tiny_gen.json",
    ]
    assert "int4_a " in capsys.readouterr().out


def test_only_the_first_process_of_a_launcher_scores(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert harness.run_suite(asked(place, tmp_path / "runs"), Never()) == 0
    assert capsys.readouterr().out == "" and not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- finding


def bare_run(place: Path, runs: Path, *words: str, adapter: bool = True) -> RunDir:
    spec = point(place, runs, *words)
    run = Runs(runs).of(spec)
    write_json(run.spec_file, new_record(spec, {}))
    if adapter:
        write_json(run.adapter / find.MARK, {})
    return run


def test_paths_of_every_kind_lead_to_each_adapter_once(place, tmp_path):
    runs = Runs(tmp_path / "runs")
    one, two = bare_run(place, runs.root, "seed=1"), bare_run(place, runs.root, "seed=2")
    bare_run(place, runs.root, "seed=3", adapter=False)
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


def test_a_name_below_dump_means_the_run_of_that_name(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = Runs(tmp_path / "runs")
    run = bare_run(place, runs.root)
    runs.link_name("lmbda_1_int4", run)
    for word in ("dump/lmbda_1_int4", "lmbda_1_int4", "dump/", "dump"):
        found, _, _ = find.typed((word,), runs)
        assert [(f.home, f.name) for f in found] == [(run.path, "lmbda_1_int4")]
    with pytest.raises(ConfigError, match=r'dump/lmbda_2_int4.*Did you mean "lmbda_1_int4"'):
        find.typed(("dump/lmbda_2_int4",), runs)
    (tmp_path / "dump" / "lmbda_1_int4").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no adapter"):  # a path that exists is what it is
        find.typed(("dump/lmbda_1_int4",), runs)


def test_a_path_without_adapters_says_what_was_looked_for(place, tmp_path):
    runs = Runs(tmp_path / "runs")
    bare_run(place, runs.root, adapter=False)
    with pytest.raises(
        ConfigError, match=r"adapter_config\.json.*1 runs there are not trained yet"
    ):
        find.typed((str(runs.root),), runs)


def test_a_run_of_a_pack_that_is_gone_does_not_end_the_others(place, tmp_path):
    runs = Runs(tmp_path / "runs")
    here, lost = bare_run(place, runs.root), runs.root / "tiny-gkd-0123456789"
    found, _, gone = find.typed((str(here.path), str(lost)), runs)
    assert [f.home for f in found] == [here.path]
    assert gone.keys() == {lost} and "no such directory" in gone[lost]
    torn = bare_run(place, runs.root, "seed=7")
    torn.spec_file.write_text("{")
    found, _, gone = find.typed((str(here.path), str(torn.path)), runs)
    assert [f.home for f in found] == [here.path] and gone.keys() == {torn.path}
    found, _, gone = find.typed((str(lost),), runs)
    assert not found and gone.keys() == {lost}, "baselines may be asked for besides"
    with pytest.raises(ConfigError, match="no such directory"):
        find.typed((str(here.path), str(tmp_path / "typo")), runs)


def test_a_base_that_cannot_be_loaded_and_a_directory_without_room_fail_their_rows_alone(
    place, tmp_path
):
    """/proc/self is a directory in which nobody can make a file, root included."""
    for role in ("student", "teacher"):
        shutil.copytree(place / role, tmp_path / role)
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    runs = Runs(tmp_path / "runs")
    spec = asked(tmp_path, runs.root)
    homes = {
        kind: runs.baseline(kind, baseline_key(kind, spec.pair, spec.quant, spec.data))
        for kind in ("teacher", "student", "ptq")
    }
    homes["ptq"].parent.mkdir(parents=True)
    homes["ptq"].symlink_to("/proc/self")
    with pytest.raises(ContractError, match=r"2 rows could not be scored") as error:
        harness.run_suite(spec, Never())
    assert "teacher cannot be loaded" in str(error.value)
    assert f"{homes['ptq']}/baseline.json: cannot be written" in str(error.value)
    assert {file.parent.parent for file in runs.root.rglob("eval/*.json")} == {homes["student"]}


def test_a_torn_run_is_left_out_and_named_where_every_run_of_a_pair_is_meant(place, tmp_path):
    runs = Runs(tmp_path / "runs")
    torn = bare_run(place, runs.root)
    (torn.adapter / "stillhouse.json").write_text("{")
    found, _, gone = find.trained(point(place, tmp_path).pair, runs)
    assert not found and gone.keys() == {torn.path} and "not JSON" in gone[torn.path]


def test_a_label_is_cut_to_the_column_but_keeps_the_id():
    home = Path("runs/qwen3-4b-self-extended-on-policy-0123456789")
    label = harness._label("int4", find.Found(home / "adapter", home, None))
    assert label == "int4_qwen3-4b-0123456789"
    named = find.Found(home / "adapter", home, "lmbda_0_bnb_fp4")
    assert harness._label("bnb_fp4", named) == "bnb_fp4_lmbda_0"


# ---------------------------------------------------------------- what lm-eval is made to ask


def bos_outside_template() -> Any:
    """A tokenizer that adds a BOS to whatever it reads, while its chat template has none."""
    text = tiny.tokenizer()
    text.add_special_tokens({"bos_token": "<bos>"})
    text.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", text.bos_token_id)]
    )
    assert text.encode("x")[0] == text.bos_token_id
    return text


def with_bos() -> Any:
    """The same, and the chat template writes a BOS too."""
    text = bos_outside_template()
    text.chat_template = "{{ bos_token }}" + text.chat_template
    return text


@pytest.mark.parametrize("make_tokenizer", [tiny.tokenizer, with_bos, bos_outside_template])
def test_lm_eval_feeds_exactly_the_prompts_of_training(place, tmp_path, make_tokenizer):
    text = make_tokenizer()
    rows = problems.test_rows(LIMIT)
    file = tmp_path / "same.jsonl"
    turns = [
        [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["worked"]}]
        for r in rows
    ]
    file.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    spec = point(place, tmp_path, "data=local", f"data_path={file}", "held_out_rows=0")
    prepared = models.prepare(spec.pair, spec.quant, place / "cache")
    asked = load_prompts(spec.data, prepared, Chat(text, spec.data), Context(), place / "cache")
    training = {e.prompt_ids for e in asked.train}
    assert len(training) == LIMIT

    model, seen = llama(len(text)), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    scorer = Scorer(suite(), Chat(text, DATA), LIMIT, Never())
    for task in load_tasks(suite(), [GEN, MC], data_dir(place, tmp_path)):
        seen.clear()
        scorer.score(model, task, "model")
        if task.spec == GEN:  # the first forward pass holds all prompts, padded on the left
            prompts = seen[0].tolist()
        else:  # two questions of four choices at a time: both prompts, then what follows them
            assert [len(batch) for batch in seen] == [2, 8] * 4
            prompts = [ids for batch in seen[::2] for ids in batch.tolist()]
        assert len(prompts) == LIMIT
        assert {tuple(i for i in ids if i != text.pad_token_id) for ids in prompts} == training


@pytest.mark.parametrize("source", ["tiny", "tiny_context"])
def test_a_teacher_of_few_shots_is_asked_exactly_what_it_reads_in_training(place, tmp_path, source):
    """The examples, too: they are the ones that load_prompts shows it."""
    text, rule = tiny.tokenizer(), problems.RULE if source == "tiny_context" else None
    rows = {
        "train": problems.chat_rows("train", 8, rule),
        "held_out": problems.chat_rows("held_out", LIMIT, rule),
        "test": problems.test_rows(LIMIT, rule),
    }
    # What is asked is what is trained on, this once: so the two prompts can be compared.
    rows["test"] = [
        asked_row | {"question": row["messages"][0]["content"]}
        for asked_row, row in zip(rows["test"], rows["held_out"], strict=True)
    ]
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    spec = point(place, tmp_path, f"held_out_rows={LIMIT}", "teacher_few_shot=4")
    prepared = models.prepare(spec.pair, spec.quant, place / "cache")
    prepared = dataclasses.replace(prepared, data_dir=tmp_path)
    asked = load_prompts(spec.data, prepared, Chat(text, spec.data), Context(4), place / "cache")
    read = {e.teacher_prompt_ids for e in asked.held_out}
    assert len(read) == LIMIT and all(len(ids) > 150 for ids in read)

    model, seen = llama(len(text), positions=512), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    scorer = Scorer(suite(), Chat(text, DATA), LIMIT, Never())
    for task in load_tasks(suite(), [GEN, MC], tmp_path):
        for examples in (4, 0):
            seen.clear()
            scorer.score(model, task, "teacher", examples)
            fed = [tuple(i for i in ids if i != text.pad_token_id) for ids in seen[0].tolist()]
            if task.spec == GEN:
                assert (set(fed) == read) == (examples == 4)
            else:
                assert all(any(ids[: len(p)] == p for p in read) for ids in fed) == (examples == 4)


def test_only_the_teacher_of_a_few_shot_pair_reads_examples(place, tmp_path, monkeypatch):
    runs, asked_for = tmp_path / "runs", []
    score = Scorer.score

    def counted(self: Scorer, model: Any, task: LoadedTask, label: str, examples: int = 0) -> Any:
        asked_for.append((label, task.spec.task, examples))
        return score(self, model, task, label, examples)

    monkeypatch.setattr(Scorer, "score", counted)
    words = [f"teacher={place / 'student'}", "teacher_few_shot=2", "eval_ptq=false"]
    trained(place, runs, "name=one", *words[:2])
    harness.run_suite(asked(place, runs, *words), Never())
    assert asked_for == [
        (label, task, 2 if label == "teacher" else 0)
        for label in ("teacher", "student", "int4_one")
        for task in ("tiny_gen", "tiny_mc")
    ]
    scores = {p.parent.parent.name.split("-")[0]: read_json(p) for p in runs.rglob("tiny_gen.json")}
    assert {label: score and score["examples"] for label, score in scores.items()} == {
        "teacher": 2,
        "student": 0,
        "tiny": 0,
    }


def test_scores_of_another_day_are_other_scores(place, tmp_path, capsys):
    """Of a run, which was trained on one; and a baseline of another day is another baseline."""
    runs = tmp_path / "runs"
    run = trained(place, runs, "name=one")
    only = ["eval_ptq=false", "eval_teacher=false", "limit=2"]
    own, other = asked(place, runs, *only), asked(place, runs, *only, "template_date=2030-01-01")
    harness.run_suite(own, Never())
    scored = scores_below(runs)
    assert len(scored) == 4 and "is asked with" not in capsys.readouterr().out
    harness.run_suite(other, Never())
    said = 'is asked with {"chat_template_kwargs": {}, "template_date": "2030-01-01"}'
    assert said in capsys.readouterr().out
    now = scores_below(runs)
    kept = {file for file, score in scored.items() if now[file] == score}
    assert len(now) == 6 and kept == {file for file in scored if file.startswith("baselines/")}
    mine = str(eval_file(run.path, "tiny_gen").relative_to(runs))
    before, after = (json.loads(scores[mine][1])["key"] for scores in (scored, now))
    assert after != before == score_key(own.suite, GEN)


def chain(text: Any, steps: dict[int, int]) -> LlamaForCausalLM:
    """A model whose next token follows from the current one alone; by default it ends the text."""
    size = len(text)
    hidden = size + -size % 4  # RoPE wants even heads
    model: Any = llama(size, hidden=hidden, tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, hidden))
        model.lm_head.weight.zero_()
        for now in range(size):
            model.lm_head.weight[steps.get(now, text.eos_token_id), now] = 1.0
    return model


def test_what_a_row_writes_after_its_end_is_no_part_of_its_answer(tmp_path):
    text = tiny.tokenizer()

    def token(word: str) -> int:
        (found,) = text.encode(word)
        return found

    # x goes straight to "#### 8<eos>" and would then write 9; y first loses six tokens.
    words = ["#", "a", "b", "c", "d", "e", "####", " ", "8"]
    ids = [*map(token, words), text.eos_token_id, token("9")]
    steps = dict(zip(ids, ids[1:], strict=False)) | {
        token("x"): token("####"),
        token("9"): token("9"),
    }
    steps[token("y")] = ids[0]
    rows = [
        {"question": q, "answer": "8", "choices": ["8", "9"], "label": 0} for q in ("x", "y", "y")
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plain = suite(GEN, chat=False)
    (task,) = load_tasks(plain, [GEN], tmp_path)
    score = Scorer(plain, Chat(text, DATA), 8, Never()).score(chain(text, steps), task, "chain")
    assert [s["value"] for s in score["samples"]] == [1.0, 1.0, 1.0]
    rows[1]["answer"] = "88"
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (task,) = load_tasks(plain, [GEN], tmp_path)
    score = Scorer(plain, Chat(text, DATA), 8, Never()).score(chain(text, steps), task, "chain")
    assert [s["value"] for s in score["samples"]] == [1.0, 0.0, 1.0]
    assert score["value"] == pytest.approx(2 / 3)


def test_an_answer_ends_where_the_chat_template_ends_a_turn(tmp_path):
    """The end is no part of it, though this tokenizer would write it as it writes any word."""
    text = tiny.tokenizer()
    text.add_tokens(["<|done|>"])
    text.chat_template = text.chat_template.replace("eos_token", "'<|done|>'")
    chat = Chat(text, DATA)
    assert chat.stop_ids == sorted({text.eos_token_id, chat.end_id}) and len(chat.stop_ids) == 2
    (eight,), (nine,), (asks,) = (text.encode(t) for t in ("8", "9", "<|assistant|>"))
    steps = {asks: eight, eight: chat.end_id, chat.end_id: nine, nine: nine}
    row = {"question": "x", "answer": "8", "choices": ["8", "9"], "label": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    whole = _tiny_task("tiny_gen", tmp_path)
    whole["filter_list"] = [{"name": "none", "filter": [{"function": "take_first"}]}]
    loaded = TaskManager(include_defaults=False).load([whole])["tasks"]["tiny_gen"]
    _set_every_field(loaded, None, 6, False)
    score = Scorer(suite(GEN), chat, 8, Never()).score(
        chain(text, steps), LoadedTask(GEN, loaded), "m"
    )
    assert score["value"] == 1.0


def test_what_is_asked_without_a_template_never_ends_in_end_of_text():
    text = with_bos()
    around = TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[("<bos>", text.bos_token_id), ("<eos>", text.eos_token_id)],
    )
    text.backend_tokenizer.post_processor = around
    lm = Lm(Engine(llama(len(text))), Chat(text, DATA), 8, is_chat=False)
    (eight,) = text.encode("8", add_special_tokens=False)
    assert text.encode("8") == [text.bos_token_id, eight, text.eos_token_id]
    assert lm.tok_encode("8") == [text.bos_token_id, eight]
    ids_BT, mask_BT = lm.tok_batch_encode(["8", "88"])
    assert ids_BT.tolist()[0] == [text.pad_token_id, text.bos_token_id, eight]
    assert mask_BT.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_tasks_are_asked_as_training_asks(monkeypatch):
    """The same day, the same variables; a begun answer is gone on with; a system turn may go."""
    text = tiny.tokenizer()
    head = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    text.chat_template = (
        f"{head}{{{{ strftime_now('%Y') }}}}{{{{ ' briefly' if brief else '' }}}}"
        + text.chat_template
    )
    data = dataclasses.replace(DATA, template_date="1999-12-31", chat_template_kwargs={"brief": 1})
    lm = Lm(Engine(llama(len(text))), Chat(text, data), 8, is_chat=True)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "8 "}]
    assert lm.apply_chat_template(turns[:1]) == "1999 briefly<|user|>x<|assistant|>"
    begun = lm.apply_chat_template(turns, add_generation_prompt=False)
    assert begun == "1999 briefly<|user|>x<|assistant|>8 "
    system = {"role": "system", "content": "Be kind."}
    assert lm.apply_chat_template([system, *turns], add_generation_prompt=False) == begun
    assert lm.left_out == 1
    with pytest.raises(ConfigError, match="a task has turns that the chat template refuses"):
        lm.apply_chat_template([{"role": "tool", "content": "x"}])


def test_perplexity_keeps_nats_and_units_per_document_and_prefixes_one_bos(place, tmp_path):
    text = with_bos()
    model = llama(len(text))
    pages = ["Ben has 3 cups.", "Then 2 are lost. How many cups now?"]
    config = {
        "task": "pages",
        "custom_dataset": lambda **_: {"test": _rows_of([{"page": p} for p in pages])},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "page",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity",
             "higher_is_better": False}
        ],
    }  # fmt: skip
    loaded = TaskManager(include_defaults=False).load([config])["tasks"]["pages"]
    loaded.set_config(key="num_fewshot", value=0)
    task = LoadedTask(TaskSpec("pages", "word_perplexity", None, False), loaded)
    score = Scorer(suite(chat=False), Chat(text, DATA), 8, Never()).score(model, task, "model")
    nats, words = [], [len(p.split()) for p in pages]
    for page in pages:
        ids = torch.tensor([text.encode(page)])  # its own BOS is the one prefix
        with torch.no_grad():
            log_p_TV = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        nats.append(-log_p_TV.gather(1, ids[0, 1:, None]).sum().item())
    assert [s["weight"] for s in score["samples"]] == words
    per_word = [n / w for n, w in zip(nats, words, strict=True)]
    assert [s["value"] for s in score["samples"]] == pytest.approx(per_word, rel=1e-5)
    assert score["value"] == pytest.approx(2.718281828459045 ** (sum(nats) / sum(words)), rel=1e-5)
    assert score["higher_is_better"] is False


def _rows_of(rows: list[dict[str, Any]]) -> Any:
    from stillhouse.evals.suite import _Rows

    return _Rows(rows)


def test_the_documents_of_a_group_are_numbered_through(place, tmp_path):
    local = TaskManager(include_defaults=False)
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = Group.from_config(GroupConfig(group="both", aggregate_metric_list=[mean]))
    config = _tiny_task("tiny_mc", data_dir(place, tmp_path))
    for name in ("left", "right"):
        (member,) = local.load([config | {"task": name}])["tasks"].values()
        member.set_config(key="num_fewshot", value=0)
        group.add(member)
    task = LoadedTask(TaskSpec("both", "acc", None, True), group)
    text = tiny.tokenizer()
    score = Scorer(suite(limit=5), Chat(text, DATA), 8, Never()).score(
        llama(len(text)), task, "model"
    )
    assert [s["doc"] for s in score["samples"]] == list(range(10)) and score["n"] == 10
    values = [s["value"] for s in score["samples"]]
    assert values[:5] == values[5:] and score["value"] == pytest.approx(sum(values) / 10)


def test_a_prompt_that_loses_its_beginning_is_said(place, tmp_path, capsys):
    text = tiny.tokenizer()
    row = {"question": "Ben has 1 cup. " * 60, "answer": "1", "choices": ["1", "2"], "label": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    for task in load_tasks(suite(), [GEN, MC], tmp_path):
        Scorer(suite(), Chat(text, DATA), 8, Never()).score(llama(len(text)), task, "model")
        out = capsys.readouterr().out
        assert f"model {task.spec.task}" in out and "lost their beginning (over 256 tokens)" in out


def test_a_task_that_cannot_be_asked_is_one_sentence(place, tmp_path):
    here = data_dir(place, tmp_path)
    missing = TaskSpec("hellaswag", "acc", None, True)
    known = Path(TaskManager.__init__.__code__.co_filename).parent / "hellaswag"

    def only_hellaswag() -> TaskManager:
        return TaskManager(include_path=str(known), include_defaults=False)

    harness._stay_offline()
    with pytest.raises(ConfigError, match="hellaswag: its data is not on this machine.*OFFLINE=0"):
        load_tasks(suite(missing), [missing], here, only_hellaswag)
    typo = TaskSpec("helaswag", "acc", None, True)
    with pytest.raises(ConfigError, match='Did you mean "hellaswag"'):
        load_tasks(suite(typo), [typo], here, only_hellaswag)
    shots = TaskSpec("tiny_gen", "exact_match", 3, True)
    with pytest.raises(ConfigError, match="trained to answer without examples"):
        load_tasks(suite(shots), [shots], here)
    with pytest.raises(ConfigError, match="test.jsonl: not there"):
        load_tasks(suite(), [GEN], tmp_path / "nowhere")
    (tmp_path / "test.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(DataError, match="line 1"):
        load_tasks(suite(), [GEN], tmp_path)


def test_a_metric_that_the_task_does_not_have_is_refused_with_those_it_has(place, tmp_path):
    text, odd = tiny.tokenizer(), TaskSpec("tiny_mc", "acc_nrm", None, True)
    (task,) = load_tasks(suite(odd), [odd], data_dir(place, tmp_path))
    with pytest.raises(ConfigError, match=r'it has acc, acc_norm\. Did you mean "acc_norm"'):
        Scorer(suite(odd), Chat(text, DATA), 8, Never()).score(llama(len(text)), task, "model")


def test_a_chat_suite_refuses_a_tokenizer_without_a_template():
    text = tiny.tokenizer()
    text.chat_template = None
    with pytest.raises(ConfigError, match="apply_chat_template=false"):
        Scorer(suite(), Chat(text, DATA), 8, Never())
