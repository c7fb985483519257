"""Test both dialects of the command line, and every published line."""

import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.compose import Overrides, compose, from_command_line, vocabulary
from stillhouse.errors import ConfigError
from stillhouse.flags import Setting, leaves, parse
from stillhouse.identity import to_plain
from stillhouse.spec import EvalSpec, TrainSpec
from tests.builders.published import EVAL, TRAIN, flags_of, lines


def train(line: str) -> TrainSpec:
    return compose(from_command_line(shlex.split(line), TrainSpec), TrainSpec)


def evaluate(line: str) -> EvalSpec:
    return compose(from_command_line(shlex.split(line), EvalSpec), EvalSpec)


def flat(spec: TrainSpec | EvalSpec) -> dict[str, Any]:
    return {leaf: value for section in to_plain(spec).values() for leaf, value in section.items()}


def as_number_or_text(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


@pytest.mark.parametrize("line", lines(TRAIN))
def test_a_published_training_line_sets_what_it_says_and_nothing_else(line: str):
    words = flags_of(line)
    asked: dict[str, Any] = {}
    while words:
        flag = words.pop(0).removeprefix("--").replace("-", "_")
        if flag == "do_eval":
            asked[flag] = True
        elif flag == "tags":
            asked.setdefault(flag, []).append(words.pop(0))
        else:
            asked[flag] = as_number_or_text(words.pop(0))
    defaults = flat(train(""))
    if asked["quant_type"] == "bnb_fp4":
        asked["quant_group_size"] = 64  # comes with the quantiser that the flag chooses
    assert flat(train(" ".join(flags_of(line)))) == defaults | asked


def test_the_published_evaluations_name_their_adapters_in_order_in_either_spelling():
    first, second, tomorrow, bare = (evaluate(" ".join(flags_of(line))) for line in lines(EVAL))
    assert first.evaluation.lora_paths == (
        "dump/lmbda_1_int4",
        "dump/lmbda_0_int4",
        "dump/lmbda_05_int4",
        "dump/lmbda_1_bnb_fp4",
        "dump/lmbda_0_bnb_fp4",
    )
    assert second.evaluation.lora_paths == ("dump/lmbda_0_int4", "dump/lmbda_0_bnb_fp4")
    assert second.evaluation.eval_teacher
    assert not tomorrow.evaluation.eval_teacher
    assert tomorrow.evaluation.eval_ptq
    assert tomorrow.quant.quant_type == "int4"
    assert bare.evaluation.lora_paths == ()
    tasks = ["hellaswag", "arc_easy", "arc_challenge", "winogrande", "mmlu", "wikitext"]
    assert [task.task for task in bare.suite.tasks] == tasks
    assert bare.pair.pair_name == "qwen3_4b_self"


@pytest.mark.parametrize(
    "line",
    [
        "--learning-rate 5e-6",
        "--learning_rate 5e-6",
        "--learning-rate=5e-6",
        "--learning_rate=5e-6",
        "learning_rate=5e-6",
        "learning-rate=5e-6",
        "optim.learning_rate=0.000005",
        "--optim.learning-rate 5e-06",
        "lr_scheduler_type=linear --learning-rate 1 learning_rate=5e-6",  # the last word counts
    ],
)
def test_every_spelling_reaches_the_same_point(line: str):
    assert train(line) == train("--learning-rate 5e-6")
    assert train(line).optim.learning_rate == 5e-6


@pytest.mark.parametrize(
    "line", ["--quant-type bnb_nf4", "quant_type=bnb_nf4", "quant=bnb_nf4", "--quant bnb_nf4"]
)
def test_quant_type_brings_the_group_size_of_its_quantiser(line: str):
    assert train(line).quant.quant_group_size == 64
    assert train("--quant-type none").quant.quant_group_size is None


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("", False),
        ("--do-eval", True),
        ("--do_eval", True),
        ("--no-do-eval", False),
        ("--no_do_eval", False),
        ("--do-eval=false", False),
        ("do_eval=true", True),
        ("--do-eval --no-do-eval", False),
    ],
)
def test_a_yes_or_no_knob_needs_no_value(line: str, value: bool):
    assert train(line).monitor.do_eval is value


def test_a_yes_or_no_flag_does_not_swallow_the_next_word():
    spec = train("--do-eval lmbda=0.5")
    assert spec.monitor.do_eval
    assert spec.method.lmbda == 0.5


def test_list_flags_are_repeated_and_hydras_lists_are_written_at_once():
    assert train("--tags a --lmbda 0 --tags b").place.tags == ("a", "b")
    assert train("tags=[a,b]").place.tags == ("a", "b")
    assert train("--target-modules q_proj --target-modules v_proj").lora.target_modules == (
        "q_proj",
        "v_proj",
    )


def test_a_flags_text_is_taken_as_it_stands():
    template = 'Say "a, b = [c]": {question}'
    assert train(shlex.join(["--prompt-template", template])).data.prompt_template == template
    assert train("--name 12").place.name == "12"
    assert train("--name true").place.name == "true"
    assert train("--name null").place.name is None
    assert train("--tags 1,2").place.tags == ("1,2",)


def test_knots_can_be_given_in_both_dialects():
    knots = ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0))
    assert train("--lmbda [[0,0],[0.5,0],[0.5,1]]").method.lmbda == knots
    assert train("lmbda=[[0,0],[0.5,0],[0.5,1]]").method.lmbda == knots


def test_negative_numbers_are_values_not_flags():
    with pytest.raises(ConfigError, match=r"lie in \[0, 1\]"):
        train("--lmbda -1")


REFUSED = {
    "--lmda 0.5": 'no knob "lmda". Did you mean "lmbda"?',
    "lmda=0.5": 'no knob "lmda". Did you mean "lmbda"?',
    "--lora_paths a": 'no knob "lora_paths". It is a knob of eval.py.',
    "sample=5": 'no knob "sample". It is a knob of eval.py.',
    "optim.learnin_rate=1": 'Did you mean "optim.learning_rate"?',
    "loss.betta=1": 'Did you mean "loss.beta"?',
    "method.beta=1": 'no knob "method.beta"',
    "--pear tiny": 'Did you mean "pair"?',
    "hydra.run.dir=x": 'no knob "hydra.run.dir"',
    "--": 'no knob ""',
    "--lmbda": "--lmbda needs a value",
    "--lmbda --beta 1": "--lmbda needs a value",
    "--no-lmbda": "only a yes/no knob can be negated",
    "--no-do-eval=true": "only a yes/no knob can be negated",
    "lmbda": "neither KEY=VALUE nor a flag",
    "-lmbda": "neither KEY=VALUE nor a flag",
    "+lmbda=1": "neither KEY=VALUE nor a flag",
    "~lmbda": "neither KEY=VALUE nor a flag",
    "=1": "neither KEY=VALUE nor a flag",
    "--do-eval maybe": '"maybe" is neither',
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_slip_is_refused_with_its_word_and_the_nearest_right_one(line: str):
    with pytest.raises(ConfigError) as refused:
        train(line)
    assert REFUSED[line] in str(refused.value)
    assert str(refused.value).startswith("command line")
    assert "\n" not in str(refused.value)


def test_an_evaluation_refuses_the_knobs_of_training():
    with pytest.raises(ConfigError, match="no knob"):
        evaluate("--lmbda 0.5")


def test_a_misspelt_negated_flag_is_told_its_right_spelling():
    with pytest.raises(ConfigError, match="eval_teacher|no-eval-teacher"):
        evaluate("--no-evl-teacher")


def test_the_last_word_on_a_list_counts_in_mixed_dialects():
    assert train("--tags a tags=[b]").place.tags == ("b",)


@pytest.mark.parametrize(("line", "name"), [("name=12", "12"), ("wandb_project=1e5", "1e5")])
def test_a_text_knob_takes_digits_in_both_dialects(line: str, name: str):
    assert name in flat(train(line)).values()


def test_a_text_with_a_line_break_stays_one_text():
    assert train("--tags 'a\nb'").place.tags == ("a\nb",)


def test_settings_keep_their_order():
    settings = parse(["--beta", "0", "lmbda=1", "pair=tiny"], vocabulary(TrainSpec))
    assert settings == [
        Setting("loss.beta", "0", False, False),
        Setting("method.lmbda", "1", False, False),
        Setting("pair", "tiny", True, False),
    ]


@given(st.sampled_from(sorted(leaves(TrainSpec))), st.randoms(use_true_random=False))
def test_dashes_and_underscores_are_the_same_anywhere_in_a_flag(name: str, random: Any):
    spelt = "".join(random.choice("-_") if c == "_" else c for c in name)
    names = vocabulary(TrainSpec)
    assert parse([f"--{spelt}=1"], names)[0].key == parse([f"{name}=1"], names)[0].key


def test_groups_are_flags_too():
    assert train("--pair tiny --method hybrid") == train("pair=tiny method=hybrid")
    assert from_command_line(["--pair", "tiny"], TrainSpec) == Overrides({"pair": "tiny"}, {})
