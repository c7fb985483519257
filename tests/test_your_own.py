"""Follow docs/your-own.md as a newcomer would, with models, rows and tasks from elsewhere."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from stillhouse import cli, entrypoints
from stillhouse.compose import compose, from_command_line
from stillhouse.rundir import Runs
from stillhouse.spec import EvalSpec, TrainSpec
from tests.test_docs import BLOCK, commands

PAGE = (Path(__file__).parent.parent / "docs" / "your-own.md").read_text()
LAPTOP = PAGE.split("## On a cluster")[0]
LINES = [line.removeprefix("uv run ") for line in commands(LAPTOP)]
ON_A_CPU = "student_dtype=float32 teacher_dtype=float32 mixed_precision=no"
CHEAP = ["max_steps=2", "max_new_tokens=4", "min_new_tokens=0", "threads=1", "sanity_max_nll=99"]
CHEAP += ["per_device_train_batch_size=2", "overlap_bins=[[0,null]]", "held_out_rows=4"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen3(folder: Path, seed: int, layers: int) -> None:
    """A random Qwen3 with a tokenizer of its own: bytes, and the turns of ChatML."""
    ends = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*alphabet, *ends])}
    plain = Tokenizer(models.BPE(vocabulary, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    plain.decoder = decoders.ByteLevel()  # type: ignore
    text = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=ends[1], pad_token=ends[2], model_max_length=2048,
        additional_special_tokens=ends[:1], chat_template=CHATML,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, head_dim=8,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=2048, eos_token_id=vocabulary[ends[1]],
        pad_token_id=vocabulary[ends[2]], bos_token_id=None, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    text.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page wants to be there, and the files that it shows."""
    place = tmp_path_factory.mktemp("mine")
    qwen3(place / "models" / "small", 0, 1)
    qwen3(place / "models" / "large", 1, 2)
    sums = [(a, b) for a in range(4) for b in range(4)]
    rows = [{"prompt": f"How much is {a}+{b}?", "completion": str(a + b)} for a, b in sums]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _, text in BLOCK.findall(PAGE):
        name = text.splitlines()[0].removeprefix("# ")
        if name.endswith((".yaml", ".py")):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(text)
    asked = [{"question": f"1+{n - 1}", "answer": str(n)} for n in (3, 5, 7, 9)]
    (place / "tasks" / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return place


def test_the_page_has_its_files_and_the_whole_path() -> None:
    verbs = [" ".join(shlex.split(line)[:2]) for line in LINES]
    assert verbs == [
        "stillhouse preflight", "python train.py", "python eval.py",
        "stillhouse plan", "stillhouse run", "stillhouse report",
    ]  # fmt: skip
    assert ON_A_CPU in PAGE


def test_every_line_of_the_page_means_something(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for line in LINES:
        words = shlex.split(line)[2:]
        if "train.py" in line or "preflight" in line:
            words = words[: words.index("--prompts")] if "--prompts" in words else words
            spec = compose(from_command_line(words, TrainSpec), TrainSpec)
            assert (spec.pair.pair_name, spec.quant.quant_type) == ("small", "none")
        elif "eval.py" in line:
            suite = compose(from_command_line(words, EvalSpec), EvalSpec).suite
            assert [t.task for t in suite.tasks] == ["sums", "sums_choice"]
            assert [t.metric for t in suite.tasks] == ["number", "acc"]
    assert cli.main(["plan", "mine.yaml"]) == 0
    assert "6 new" in capsys.readouterr().out


def test_followed_on_a_laptop_the_page_ends_in_a_table(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    quick = [*ON_A_CPU.split(), *CHEAP]
    asked = dict(zip(("preflight", "train", "eval"), LINES, strict=False))
    words = {name: shlex.split(line)[2:] for name, line in asked.items()}
    assert entrypoints.preflight_main([*words["preflight"][:-1], "4", *quick]) in (0, 3, 4)
    assert "prompts" in capsys.readouterr().out
    assert entrypoints.train_main([*words["train"], *quick]) == 0
    [run] = Runs(Path("runs")).all()
    assert run.is_trained() and run.path.name.startswith("small-gkd-")
    assert entrypoints.train_main([*words["train"], *quick]) == 0
    assert "done already" in capsys.readouterr().out
    line = [*words["eval"], *ON_A_CPU.split()[:2], "threads=1", "limit=2"]
    assert entrypoints.eval_main(line) == 0
    table = capsys.readouterr().out.split("model  ")[1].splitlines()
    assert [row.split(" |")[0].strip() for row in table[1:4]] == [
        "teacher",
        "student",
        "none_first",
    ]
    assert all(len(row.split("|")) == 3 for row in table[1:4])
