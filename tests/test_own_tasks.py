"""Test a user's own tasks on models: generation and choice, with their own functions and rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from stillhouse import entrypoints
from stillhouse.compose import compose, from_command_line
from stillhouse.distill.toy import tiny
from stillhouse.errors import ConfigError
from stillhouse.evals.suite import load_tasks
from stillhouse.identity import score_key
from stillhouse.rundir import read_json
from stillhouse.spec import EvalSpec
from tests.builders import own_tasks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of random micro models in two directories, and the tasks."""
    place = tmp_path_factory.mktemp("place")
    text = tiny.tokenizer()
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(text), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
            pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.3,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        model.generation_config = GenerationConfig()
        model.save_pretrained(place / role)
        text.save_pretrained(place / role)
    own_tasks.write(place / "tasks")
    return place


def words(place: Path, *more: str) -> list[str]:
    dtypes = ["student_dtype=float32", "teacher_dtype=float32", "threads=1"]
    pair = [f"student={place / 'student'}", f"teacher={place / 'teacher'}", *dtypes]
    there = [f"cache_dir={place / 'cache'}", f"runs={place / 'runs'}"]
    return [*pair, *there, f"include_path={place / 'tasks'}", *more]


def spec(place: Path, *more: str) -> EvalSpec:
    return compose(from_command_line(words(place, *more), EvalSpec), EvalSpec)


def refused(place: Path, *more: str) -> str:
    asked = spec(place, *more)
    with pytest.raises(ConfigError) as error:
        load_tasks(asked.suite, asked.suite.tasks, place)
    return str(error.value)


@pytest.fixture
def edited(place: Path, tmp_path: Path) -> Path:
    """The tasks in a directory of their own, to be broken."""
    for name in ("student", "teacher"):
        (tmp_path / name).symlink_to(place / name)
    shutil.copytree(place / "tasks", tmp_path / "tasks")
    return tmp_path


def test_own_generation_and_choice_are_scored_by_their_own_metrics(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entrypoints.eval_main(words(place)) == 0
    printed = capsys.readouterr().out
    assert "my_choice" in printed and "my_sums" in printed
    asked = spec(place).suite
    for task in asked.tasks:
        files = [*(place / "runs" / "baselines").glob(f"*/eval/{task.task}.json")]
        assert len(files) == 2, "teacher and student"
        for file in files:
            score = read_json(file)
            assert score is not None
            assert (score["metric"], score["n"]) == (task.metric, len(own_tasks.ROWS))
            assert score["key"] == score_key(asked, task)
            values = [sample["value"] for sample in score["samples"]]
            assert score["value"] == pytest.approx(sum(values) / len(own_tasks.ROWS))
    assert entrypoints.eval_main(words(place)) == 0
    assert "0 of 4 scores to find" in capsys.readouterr().out


def test_a_task_is_read_with_its_functions_its_rows_and_its_own_length(place: Path) -> None:
    asked = spec(place)
    loaded = {t.spec.task: t.loaded for t in load_tasks(asked.suite, asked.suite.tasks, place)}
    choice, sums = loaded["my_choice"], loaded["my_sums"]
    doc = next(iter(choice.test_docs()))
    assert choice.doc_to_text(doc) == "How much is 1+2"
    assert sums.config.generation_kwargs["max_gen_toks"] == 7
    asked = spec(place, "max_gen_toks=3", "tasks=my_sums")
    [sums] = load_tasks(asked.suite, asked.suite.tasks, place)
    assert sums.loaded.config.generation_kwargs["max_gen_toks"] == 3


def test_a_name_that_is_taken_is_refused(edited: Path) -> None:
    yaml = edited / "tasks" / "my_sums.yaml"
    for name, whose in (("tiny_gen", "this project"), ("gsm8k", "lm-eval")):
        yaml.write_text(own_tasks.GEN.replace("my_sums", name))
        assert f"task {name}: {whose} has one of this name" in refused(edited, f"tasks=[{name}]")


def test_what_a_task_makes_of_its_files_is_42_in_a_sentence(edited: Path) -> None:
    folder = edited / "tasks"
    breaks = {
        "scoring.py": ("def digits(", "import nowhere_at_all\ndef digits(", "nowhere_at_all"),
        "data/rows.jsonl": ('{"question"', '{"question', "my_sums"),
        "my_sums.yaml": ("{{question}}", "{{nothing}}", "nothing"),
    }
    for file, (old, new, says) in breaks.items():
        kept = (folder / file).read_text()
        (folder / file).write_text(kept.replace(old, new, 1))
        said = refused(edited, "tasks=[my_sums]")
        assert said.startswith("task my_sums (") and says in said, said
        (folder / file).write_text(kept)
    asked = spec(edited)
    (folder / "scoring.py").write_text("# another\n" + own_tasks.SCORING)
    with pytest.raises(ConfigError, match="changed since it was asked for"):
        load_tasks(asked.suite, asked.suite.tasks, edited)


def test_a_metric_that_fails_is_the_users_to_mend_and_says_where(
    edited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = own_tasks.SCORING.replace("text = predictions[0]", "text = predictions['x']")
    (edited / "tasks" / "scoring.py").write_text(failing)
    assert entrypoints.eval_main(words(edited, "tasks=[my_sums]", "eval_student=false")) == 42
    said = capsys.readouterr().err
    assert "task my_sums: TypeError: " in said and "scoring.py, line 3" in said
