"""Test the preflight of a pair: what it measures before training, and what it answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse import preflight_rules
from stillhouse.cli import main
from stillhouse.distill import preflight
from stillhouse.distill.monitor import answer_in
from stillhouse.distill.pairs import prepare
from stillhouse.distill.preflight import bootstrapped, shares
from stillhouse.distill.run import Run
from stillhouse.preflight_rules import Measured
from stillhouse.rundir import Runs, read_json, write_json
from stillhouse.spec import TrainSpec
from stillhouse.stop import StopFlag
from tests.builders.cheap import cheap, words

# A teacher and a student of it with something to learn; tests/test_watch_rules.py has them too.
PAIR = ["teacher_steps=100", "student_steps=150", "max_new_tokens=24", "lmbda=1"]
SELF = ["teacher_steps=8", "student_steps=null", "quant=none", "lmbda=1"]


def pair(root: Path, *more: str) -> TrainSpec:
    return cheap(root, *PAIR, *more)


def asked(root: Path, *more: str) -> list[str]:
    """The words behind `stillhouse preflight`."""
    return [*words(root, *PAIR, *more), "--prompts", "12"]


def looked(
    spec: TrainSpec, prompts: int = 12, pilot: int | None = None, prefixes: tuple[int, ...] = ()
) -> dict[str, Any]:
    return preflight.preflight(spec, prompts, pilot, StopFlag(), prefixes)


# ---- intervals


def test_a_mean_has_the_interval_of_resampled_prompts() -> None:
    ones, zeros = torch.ones(30, 1), torch.zeros(70, 1)
    measured = bootstrapped(torch.cat([ones, zeros]).double(), lambda x: x.mean(-2).squeeze(-1))
    assert measured.value == pytest.approx(0.3) and measured.n == 100
    # The binomial standard error is 0.0458, and 1.96 of them are 0.09.
    assert measured.low == pytest.approx(0.21, abs=0.02)
    assert measured.high == pytest.approx(0.39, abs=0.02)


def test_no_right_answer_of_64_may_still_be_a_few_in_a_hundred() -> None:
    none = shares(torch.zeros(64, 1).double(), lambda x: x.mean(-2).squeeze(-1))
    assert (none.value, none.low) == (0, 0)
    assert 0.03 < none.high < 0.07  # by the rule of three, 3 / 64 = 0.047
    level = shares(torch.zeros(64, 2).double(), lambda x: x.mean(-2)[..., 0] - x.mean(-2)[..., 1])
    assert level.value == 0 and 0.02 < -level.low < 0.07 and 0.02 < level.high < 0.07


def test_the_same_prompts_give_the_same_interval() -> None:
    column = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
    first, second = (bootstrapped(column, lambda x: x.mean(-2).squeeze(-1)) for _ in range(2))
    assert first == second


def test_a_share_of_nothing_is_not_defined() -> None:
    nothing = bootstrapped(
        torch.zeros(5, 2).double(), lambda x: x[..., 0].sum(-1) / x[..., 1].sum(-1)
    )
    assert nothing.as_json() == {"value": None, "low": None, "high": None, "n": 5}


# ---- numbers


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return looked(pair(tmp_path_factory.mktemp("runs")))


def test_every_number_has_an_interval_that_holds_it(found: dict[str, Any]) -> None:
    numbers = found["numbers"]
    assert {"ratio_1", "ratio_4", "mass_teacher_4", "advantage_4", "entropy_gap"} <= set(numbers)
    assert {"reverse_kl", "forward_kl", "told_apart", "told_apart_noise"} <= set(numbers)
    assert {"student_accuracy", "teacher_accuracy", "teacher_lead"} <= set(numbers)
    assert {"continuation_25", "kept_25", "continuation_50", "kept_50"} <= set(numbers)
    for name, number in numbers.items():
        if number["value"] is not None:
            assert number["low"] <= number["value"] <= number["high"], name


def test_overlap_is_what_the_first_step_of_a_run_would_log(tmp_path: Path) -> None:
    spec = pair(tmp_path, "overlap_k=4")
    numbers = looked(spec)["numbers"]
    run = Run(spec, Runs(tmp_path).of(spec), StopFlag())
    metrics = run.loop.gradients(0)
    # Other prompts, other draws: the same pair, to within the interval of few prompts.
    assert metrics["overlap/ratio"] == pytest.approx(numbers["ratio_4"]["value"], abs=0.15)


def test_accuracies_are_of_greedy_answers_and_continuations_of_the_students_own(
    tmp_path: Path,
) -> None:
    spec = pair(tmp_path)
    numbers = looked(spec, prefixes=(3, 20, 999))["numbers"]
    run = Run(spec, Runs(tmp_path).of(spec), StopFlag())
    prompts = run.prompts.held_out[:12]
    writers = run.roles.writers()

    def share(who: str, prefixes: list[list[int]] | None) -> float:
        ids = writers[who](prompts, preflight.FIRST, range(12), prefixes=prefixes, greedy=True).ids
        texts = run.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return sum(answer_in(t) == e.answer for t, e in zip(texts, prompts, strict=True)) / 12

    own = writers["student"](prompts, preflight.FIRST, range(12)).ids
    half = [ids[: len(ids) // 2] for ids in own]
    teacher, student = share("teacher", None), share("student", None)
    assert numbers["teacher_accuracy"]["value"] == pytest.approx(teacher)
    assert numbers["teacher_lead"]["value"] == pytest.approx(teacher - student)
    ahead = share("teacher", half) - share("student", half)
    assert numbers["continuation_50"]["value"] == pytest.approx(ahead)
    three = [ids[:3] for ids in own]
    assert all(len(ids) > 3 for ids in own) and numbers["continuation_at_3"]["n"] == 12
    assert numbers["teacher_at_3"]["value"] == pytest.approx(share("teacher", three))
    ahead = share("teacher", three) - share("student", three)
    assert numbers["continuation_at_3"]["value"] == pytest.approx(ahead)
    longer = sum(len(ids) > 20 for ids in own)
    assert 2 <= longer < 12 and numbers["continuation_at_20"]["n"] == longer, "answers that go on"
    assert "continuation_at_999" not in numbers


def test_one_function_overlaps_wholly_and_cannot_be_told_apart(tmp_path: Path) -> None:
    found = looked(cheap(tmp_path, *SELF), prompts=40)
    numbers = found["numbers"]
    assert found["facts"]["is_same_function"]
    assert numbers["ratio_4"]["value"] == 1
    assert abs(numbers["reverse_kl"]["value"]) < 1e-6
    assert numbers["told_apart"]["low"] <= 0.5 <= numbers["told_apart"]["high"]


def test_different_models_are_told_apart_better_than_two_answers_of_one(
    found: dict[str, Any],
) -> None:
    numbers = found["numbers"]
    assert numbers["told_apart"]["value"] > numbers["told_apart_noise"]["high"]


def test_a_teacher_that_only_scores_is_asked_for_no_text(tmp_path: Path) -> None:
    found = looked(pair(tmp_path, "teacher_samples=false"), prompts=4)
    assert not found["facts"]["teacher_writes"]
    assert "ratio_4" in found["numbers"] and "reverse_kl" in found["numbers"]
    missing = {"forward_kl", "told_apart", "teacher_lead", "kept_25"}
    assert not missing & set(found["numbers"])


def test_a_pilot_is_thrown_away_and_leaves_a_number(tmp_path: Path) -> None:
    found = looked(pair(tmp_path), pilot=2)
    assert found["facts"]["pilot_steps"] == 2
    assert -1 <= found["numbers"]["pilot_gain"]["value"] <= 1
    assert not list(Runs(tmp_path).all())


def test_two_ends_of_text_and_what_is_not_defined_are_said(
    tmp_path: Path, found: dict[str, Any]
) -> None:
    assert found["facts"]["end_of_text"] == {"student": [1], "teacher": [1]}
    asked = {"pair": "p", "quant": "none", "loss": "jsd", "beta": 1, "max_steps": 5}
    said = {"verdict": "unsure", "rule": "r", "reasons": [], "recipe": None, "calibrated_on": "x"}
    facts = found["facts"] | {"end_of_text": {"student": [1], "teacher": [2, 3]}}
    nothing = dict.fromkeys(("value", "low", "high")) | {"n": 64}
    numbers = {"numbers": {"reverse_kl": Measured(1, 0.5, 2, 9).as_json(), "kept_25": nothing}}
    text = preflight_rules.as_text({**asked, **said, **numbers, "facts": facts})
    assert text.splitlines()[-2:] == [
        "  reverse_kl         1  [0.5, 2]",
        "  kept_25            –  not defined here",
    ]
    assert "end of text: [1] for the student, [2, 3] for the teacher" in text


# ---- the verb


def test_the_verb_exits_with_its_verdict_and_prints_one_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["preflight", *words(tmp_path, *SELF), "--prompts", "4", "--json"]
    assert main(line) == 3
    said = json.loads(capsys.readouterr().out)
    assert (said["verdict"], said["rule"], said["max_steps"]) == ("unlikely", "same_function", 6)
    assert said["reasons"][0] == "the teacher is the student; there is nothing to learn"
    (file,) = (tmp_path / "preflight").iterdir()
    assert read_json(file) == said


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["preflight", *words(tmp_path, *SELF), "--prompts", "4", "--json"]
    assert main(line) == 3
    first = capsys.readouterr().out
    monkeypatch.setattr(preflight, "preflight", lambda *_: pytest.fail("it is measured again"))
    assert main(line) == 3
    assert capsys.readouterr().out == first
    with pytest.raises(pytest.fail.Exception):
        main([*line, "--prompts", "5"])
    (file,) = (tmp_path / "preflight").iterdir()
    of_others = json.loads(file.read_text())
    of_others["sources"]["teacher"]["digest"] = "0" * 64
    write_json(file, of_others)
    with pytest.raises(pytest.fail.Exception):
        main(line)


def test_the_same_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["preflight", *asked(tmp_path)])
    said = capsys.readouterr().out
    verdict = said.partition(":")[0]
    assert code == {"likely": 0, "unlikely": 3, "unsure": 4}[verdict]
    assert "tiny in int4, with jsd, beta 1, 6 steps" in said
    assert "of 12 prompts, 12 with an answer:" in said
    assert "thresholds: sweeps/zoo.yaml" in said


def test_in_a_pod_every_verdict_is_a_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_IN_POD", "1")
    assert main(["preflight", *words(tmp_path, *SELF), "--prompts", "4"]) == 0


def test_data_without_answers_is_no_mistake_and_says_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Find {n}+1."},
                {"role": "assistant", "content": "9"},
            ]
        }
        for n in range(9)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = asked(tmp_path, "data=local", f"data_path={file}", "min_completion=1", "held_out_rows=4")
    assert main(["preflight", *line]) == 4
    said = capsys.readouterr().out
    assert "capability: not measured, the data has no answers" in said
    assert "teacher_lead" not in said


def test_tokenizers_that_differ_are_a_mistake_that_says_what_would_be_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = cheap(tmp_path)
    prepared = prepare(spec.pair, spec.quant, Path(spec.place.cache_dir))
    other = tmp_path / "other"
    shutil.copytree(prepared.teacher, other)
    file = other / "tokenizer.json"
    plain = json.loads(file.read_text())
    vocabulary = plain["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(plain))
    line = asked(tmp_path, "pair_source=hub", f"student={prepared.student}", f"teacher={other}")
    assert main(["preflight", *line, "pair_seed=null"]) == 42
    said = capsys.readouterr().err
    assert "tokenizers of student" in said and "two models with the same tokenizer" in said


@pytest.mark.parametrize("word", ["--prompts=1", "--prompts=x", "--pilot=0", "--promts=3"])
def test_what_cannot_be_asked_is_a_mistake(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preflight", *words(tmp_path), word]) == 42
    assert capsys.readouterr().err.startswith("ConfigError: ")


# ---- pairs that this machine cannot hold

REAL = ["qwen3_4b_self", "qwen3_4b_30b", "llama_8b_70b", "context", "smollm2_self"]


@pytest.mark.parametrize("name", REAL)
def test_a_real_pair_is_asked_by_a_job_of_the_same_words(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["preflight", f"pair={name}", "--backend", "cluster", "--dry-run", "image=r.example/a:1"]
    assert main([*line, "--pilot", "50", "--prefixes", "16,64"]) == 0
    (words,) = [text for text in capsys.readouterr().out.splitlines() if "stillhouse/words" in text]
    assert f"pair={name} " in words and "--prompts=64 --pilot=50 --prefixes=16,64" in words


@pytest.mark.parametrize("prefixes", ["sixteen", "16;64", "0", "16,-1"])
def test_prefixes_that_are_no_counts_are_a_mistake(
    prefixes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preflight", *asked(tmp_path), f"--prefixes={prefixes}"]) == 42
    assert "--prefixes" in capsys.readouterr().err
