"""Test that an evaluation scores the function that was trained, and scores it once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.distill import models
from stillhouse.distill.quant import dequantized_weight, quantize_
from stillhouse.distill.toy import problems
from stillhouse.evals import find, harness
from stillhouse.evals.suite import LoadedTask, Scorer
from stillhouse.identity import score_key
from stillhouse.rundir import Runs, eval_file, new_record, read_json, write_json
from stillhouse.spec import SuiteSpec, TaskSpec
from tests.builders.micro_models import (
    ADAPTERS_ONLY,
    GEN,
    LIMIT,
    eval_spec,
    run_suite,
    scores_below,
    train_spec,
    trained_run,
)


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


@pytest.fixture(scope="module")
def table(models_dir, tmp_path_factory):
    """Every kind of row, scored: (runs, run by name, what was printed)."""
    runs = tmp_path_factory.mktemp("table") / "runs"
    made = {
        "lmbda_1_int4": trained_run(models_dir, runs, "name=lmbda_1_int4", "lmbda=1"),
        "lmbda_0_int4": trained_run(models_dir, runs, "name=lmbda_0_int4", "lmbda=0"),
        "plain": trained_run(models_dir, runs, "name=plain", "quant=none"),
        "nf4": trained_run(models_dir, runs, "quant=bnb_nf4", "quant_group_size=32"),
    }
    return runs, made


@pytest.fixture
def scored(monkeypatch) -> list[tuple[str, str, int]]:
    """Label, task and examples of each score that is computed."""
    found: list[tuple[str, str, int]] = []
    score = Scorer.score

    def counted(self: Scorer, model: Any, task: LoadedTask, label: str, examples: int = 0) -> Any:
        found.append((label, task.spec.task, examples))
        return score(self, model, task, label, examples)

    monkeypatch.setattr(Scorer, "score", counted)
    return found


def test_every_row_is_scored_and_each_base_loaded_once(models_dir, table, capsys, monkeypatch):
    runs, made = table
    loads: list[Any] = []
    load_base = models.load_base

    def counted(*args: Any) -> Any:
        loads.append(args[3] and args[3].quant_type)
        return load_base(*args)

    monkeypatch.setattr(models, "load_base", counted)
    assert run_suite(eval_spec(models_dir, runs, f"lora_paths=[{runs}]")) == 0
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
    assert run_suite(eval_spec(models_dir, runs, f"lora_paths=[{runs}]")) == 0
    again = capsys.readouterr().out
    assert again[again.index("model  ") :].splitlines() == rows
    assert "0 of 14 scores to find" in again
    assert loads == [] and scores_below(runs) == before, "a finished score is not computed again"


def test_a_score_that_another_evaluation_writes_meanwhile_counts_as_replaced_by_none(
    models_dir, table, monkeypatch
):
    runs, made = table
    run, versions = made["plain"], models.versions
    spec = eval_spec(models_dir, runs, f"lora_paths=[{run.path}]", *ADAPTERS_ONLY)
    run_suite(spec)
    file = run.eval_file("tiny_mc")
    theirs = read_json(file) or {}
    file.unlink()

    def slow() -> dict[str, str]:
        write_json(file, theirs)  # between our look at the file and our writing
        return versions()

    monkeypatch.setattr(models, "versions", slow)
    run_suite(spec)
    ours = read_json(file) or {}
    assert ours == theirs | {key: ours[key] for key in ("seconds", "finished")}


def test_the_tables_headings_tell_tasks_apart():
    names = ["tiny_sampled_length", "tiny_sampled_distinct", "arc_easy_val", "mmlu"]
    suite = SuiteSpec("s", tuple(TaskSpec(n, "acc", 0, True) for n in names), False, None, 8)
    assert [cell.strip() for cell in harness.table([], suite).split("|")] == ["model", *names]


@pytest.mark.parametrize("which", ["lmbda_1_int4", "plain", "nf4"])
def test_an_adapter_is_scored_as_the_function_it_was_trained_as(models_dir, table, which):
    runs, made = table
    run = made[which]
    spec = eval_spec(models_dir, runs, f"lora_paths=[{run.path}]", *ADAPTERS_ONLY)
    run_suite(spec)
    score = read_json(run.eval_file("tiny_mc"))
    contract = run.contract()
    assert score is not None and contract is not None
    assert (score["quant_type"], score["n"]) == (contract["quant"]["quant_type"], LIMIT)

    quant = harness._quant(contract, run.adapter)
    base = models.load_base(
        str(models_dir / "student"), None, "float32", quant, torch.device("cpu")
    )
    model = models.attach_adapter(base, run.adapter, "default")
    text = models.load_tokenizer(str(models_dir / "student"), None)
    hits = []
    for row in problems.test_rows(LIMIT):
        lls = choice_loglikelihoods(model, text, row)
        hits.append(float(lls.index(max(lls)) == row["label"]))
    assert [s["value"] for s in score["samples"]] == hits
    assert [s["doc"] for s in score["samples"]] == list(range(LIMIT))
    assert score["value"] == pytest.approx(sum(hits) / LIMIT)


def test_a_score_says_what_was_asked_and_of_which_weights(models_dir, table):
    runs, made = table
    run, spec = made["lmbda_1_int4"], eval_spec(models_dir, runs)
    run_suite(spec)
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


def test_with_no_paths_every_trained_run_of_this_pair_is_scored(models_dir, tmp_path, capsys):
    runs = tmp_path / "runs"
    mine = trained_run(models_dir, runs, "name=mine")
    trained_run(models_dir, runs, "name=other", "teacher_few_shot=1")  # another pair
    point_without_adapter = Runs(runs).of(train_spec(models_dir, runs, "lmbda=0.25"))
    write_json(
        point_without_adapter.spec_file, new_record(train_spec(models_dir, runs, "lmbda=0.25"), {})
    )
    run_suite(eval_spec(models_dir, runs, "eval_teacher=false", "eval_student=false"))
    printed = capsys.readouterr().out
    assert "int4_mine" in printed and "other" not in printed
    assert list(scores_below(mine.path)) == ["eval/tiny_gen.json", "eval/tiny_mc.json"]


def test_another_question_and_another_adapter_are_scored_anew(models_dir, tmp_path):
    runs = tmp_path / "runs"
    run = trained_run(models_dir, runs)
    run_suite(eval_spec(models_dir, runs, *ADAPTERS_ONLY))
    first = scores_below(run.path)
    run_suite(eval_spec(models_dir, runs, *ADAPTERS_ONLY, "limit=5"))
    score = read_json(run.eval_file("tiny_gen"))
    assert score is not None and score["n"] == 5 and scores_below(run.path) != first
    trained_run(models_dir, runs, size=0.5)  # the same point, trained again to other weights
    run_suite(eval_spec(models_dir, runs, *ADAPTERS_ONLY, "limit=5"))
    again = read_json(run.eval_file("tiny_gen"))
    assert again is not None and again["adapter_digest"] != score["adapter_digest"]


def test_a_score_of_other_weights_or_another_lm_eval_is_said_and_made_anew(
    models_dir, tmp_path, capsys
):
    spec = eval_spec(models_dir, tmp_path, "eval_student=false", "eval_ptq=false", "suite=tiny")
    trained_run(models_dir, tmp_path)
    run_suite(spec)
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
    run_suite(spec)
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


def test_teacher_and_untrained_student_of_a_self_pair_are_asked_once(models_dir, tmp_path, scored):
    runs = tmp_path / "runs"
    spec = eval_spec(models_dir, runs, f"teacher={models_dir / 'student'}", "eval_ptq=false")
    run_suite(spec)
    assert scored == [("teacher", "tiny_gen", 0), ("teacher", "tiny_mc", 0)]
    values = {p.parent.parent.name.split("-")[0] for p in runs.rglob("tiny_mc.json")}
    assert values == {"teacher", "student"}


def test_the_second_column_is_the_adapter_merged_into_the_dense_base_and_quantised(
    models_dir, table
):
    runs, made = table
    run = made["lmbda_1_int4"]
    spec = train_spec(models_dir, runs, "lmbda=1", "name=lmbda_1_int4")
    prepared = models.prepare(spec.pair, spec.quant, models_dir / "cache")
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
    models_dir, tmp_path, capsys, scored
):
    runs = tmp_path / "runs"
    run = trained_run(models_dir, runs, "name=one")
    spec = eval_spec(
        models_dir, runs, "suite=tiny_requantised", "eval_teacher=false", "eval_student=false"
    )
    run_suite(spec)
    tasks = [task.task for task in spec.suite.tasks]
    assert tasks == ["tiny_gen", "tiny_gen@requantised", "tiny_mc", "tiny_mc@requantised"]
    assert scored == [("ptq_int4", "tiny_gen", 0), ("ptq_int4", "tiny_mc", 0)] + [
        ("int4_one", task, 0) for task in sorted(tasks, key=lambda task: "@" in task)
    ]
    found = [read_json(run.eval_file(task)) for task in tasks]
    assert [score["task"] for score in found if score] == tasks
    assert len({score["key"] for score in found if score}) == 4
    (ptq,) = (runs / "baselines").iterdir()
    twice = [read_json(eval_file(ptq, task)) for task in tasks[:2]]
    assert twice[0] and twice[1] and twice[0]["samples"] == twice[1]["samples"]
    header = "model                     | tiny_gen | tiny_gen@requantised |  tiny_mc"
    assert header in capsys.readouterr().out


def test_the_second_score_is_that_of_the_other_function(models_dir, tmp_path):
    runs = tmp_path / "runs"
    run = trained_run(models_dir, runs)
    words = ["suite=tiny_requantised", "limit=24", *ADAPTERS_ONLY]
    run_suite(eval_spec(models_dir, runs, *words))
    spec = train_spec(models_dir, runs)
    again = models.merged_and_requantised(
        str(models_dir / "student"), None, "float32", spec.quant, torch.device("cpu"), run.adapter
    )
    text = models.load_tokenizer(str(models_dir / "student"), None)
    hits = []
    for row in problems.test_rows(24):
        lls = choice_loglikelihoods(again, text, row)
        hits.append(float(lls.index(max(lls)) == row["label"]))
    first, second = (read_json(run.eval_file(f"tiny_mc{x}")) for x in ("", "@requantised"))
    assert first is not None and second is not None
    assert [s["value"] for s in second["samples"]] == hits
    assert [s["value"] for s in first["samples"]] != hits


def test_an_adapter_outside_any_run_keeps_its_scores_in_itself(models_dir, tmp_path, capsys):
    run = trained_run(models_dir, tmp_path / "runs")
    for name in ("a", "b"):
        shutil.copytree(run.adapter, tmp_path / "given" / name)
    words = [f"lora_paths=[{tmp_path / 'given'}]", *ADAPTERS_ONLY]
    run_suite(eval_spec(models_dir, tmp_path / "runs", *words))
    assert [p for p in scores_below(tmp_path / "given") if "gen" in p] == [
        "a/eval/tiny_gen.json",
        "b/eval/tiny_gen.json",
    ]
    assert "int4_a " in capsys.readouterr().out


def test_a_label_is_cut_to_the_column_but_keeps_the_id():
    home = Path("runs/qwen3-4b-self-extended-on-policy-0123456789")
    label = harness._label("int4", find.Found(home / "adapter", home, None))
    assert label == "int4_qwen3-4b-0123456789"
    named = find.Found(home / "adapter", home, "lmbda_0_bnb_fp4")
    assert harness._label("bnb_fp4", named) == "bnb_fp4_lmbda_0"


def test_only_the_teacher_of_a_few_shot_pair_reads_examples(models_dir, tmp_path, scored):
    runs = tmp_path / "runs"
    words = [f"teacher={models_dir / 'student'}", "teacher_few_shot=2", "eval_ptq=false"]
    trained_run(models_dir, runs, "name=one", *words[:2])
    run_suite(eval_spec(models_dir, runs, *words))
    assert scored == [
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


def test_scores_of_another_day_are_other_scores(models_dir, tmp_path, capsys):
    """Of a run, which was trained on one; and a baseline of another day is another baseline."""
    runs = tmp_path / "runs"
    run = trained_run(models_dir, runs, "name=one")
    only = ["eval_ptq=false", "eval_teacher=false", "limit=2"]
    own, other = (
        eval_spec(models_dir, runs, *only),
        eval_spec(models_dir, runs, *only, "template_date=2030-01-01"),
    )
    run_suite(own)
    scored = scores_below(runs)
    assert len(scored) == 4 and "is asked with" not in capsys.readouterr().out
    run_suite(other)
    said = 'is asked with {"chat_template_kwargs": {}, "template_date": "2030-01-01"}'
    assert said in capsys.readouterr().out
    now = scores_below(runs)
    kept = {file for file, score in scored.items() if now[file] == score}
    assert len(now) == 6 and kept == {file for file in scored if file.startswith("baselines/")}
    mine = str(eval_file(run.path, "tiny_gen").relative_to(runs))
    before, after = (json.loads(scores[mine][1])["key"] for scores in (scored, now))
    assert after != before == score_key(own.suite, GEN)
