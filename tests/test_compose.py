"""Test conf/ as Hydra composes it, and the fast path that must give the same result."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.compose import (
    GROUPS,
    Overrides,
    as_command_line,
    check,
    compose,
    conf_dir,
    from_command_line,
    options_of,
    resolve,
)
from stillhouse.errors import ConfigError
from stillhouse.flags import leaves
from stillhouse.identity import point_id
from stillhouse.spec import EvalSpec, TrainSpec

CONF = Path(__file__).parent.parent / "conf"
OPTIONS = [(path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml"))]
SPEC_OF = {"train": TrainSpec, "eval": EvalSpec}
OWN = {"pair.student": "models/own", "pair.teacher": "models/large"}
TOLD = {"metric": "acc", "num_fewshot": None, "higher_is_better": True, "content": "0123456789"}
NEEDS: dict[tuple[str, str], dict[str, Any]] = {
    ("suite", "local"): {"suite.include_path": "x", "suite.tasks": [{"task": "mine", **TOLD}]},
    ("pair", "own"): OWN,
    ("data", "local"): {"data.data_path": "rows.jsonl"},
    ("rescue", "aligned_others"): {"rescue.other_file": "rows.jsonl"},
    ("rescue", "cold_start_others"): {"rescue.other_file": "rows.jsonl"},
}


def whole_hydra(config: str, words: list[str]) -> Any:
    """What Hydra itself makes of `conf/` and these words, checked as a spec."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
        tree = hydra_compose(config, overrides=words)
    plain: Any = OmegaConf.to_container(tree, resolve=True)
    spec_type = SPEC_OF[config]
    sections = {leaf.path.split(".")[0] for leaf in leaves(spec_type).values()}
    return check({k: v for k, v in plain.items() if k in sections}, spec_type, "hydra")


def test_the_configuration_that_is_tested_is_the_one_that_is_used():
    assert conf_dir().resolve() == CONF.resolve()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_file_in_conf_composes(group: str, option: str):
    used_by: list[Any] = [t for t in (TrainSpec, EvalSpec) if group in GROUPS[t]]
    assert used_by, f"conf/{group} is in no defaults list"
    for spec_type in used_by:
        overrides = Overrides({group: option}, NEEDS.get((group, option), {}))
        section = getattr(compose(overrides, spec_type), group)
        named = getattr(section, "quant_type", None) or getattr(section, f"{group}_name", option)
        # int4_g64 is int4 in groups of 64.
        assert named == (option.partition("_g")[0] if group == "quant" else option)


@pytest.mark.parametrize("config", SPEC_OF)
def test_the_groups_are_those_of_the_defaults_list_and_their_folders(config: str):
    import yaml

    defaults = yaml.safe_load((CONF / f"{config}.yaml").read_text())["defaults"]
    listed = [next(iter(entry)) for entry in defaults if isinstance(entry, dict)]
    assert set(listed) == GROUPS[SPEC_OF[config]]
    assert all((CONF / group).is_dir() for group in listed)


def test_the_defaults_are_the_published_ones():
    spec = compose(Overrides({}, {}), TrainSpec)
    assert (spec.pair.student, spec.pair.teacher) == ("Qwen/Qwen3-4B-Instruct-2507",) * 2
    assert (spec.method.lmbda, spec.method.off_policy_source, spec.loss.beta) == (1, "dataset", 1)
    assert (spec.lora.lora_r, spec.lora.lora_alpha, spec.lora.lora_dropout) == (32, 64, 0.05)
    assert (spec.optim.learning_rate, spec.optim.warmup_ratio, spec.optim.weight_decay) == (
        1e-5,
        0.2,
        0,
    )
    training = spec.training
    batch = (training.per_device_train_batch_size, training.gradient_accumulation_steps)
    assert (*batch, training.num_processes) == (4, 2, 8)
    assert (training.max_steps, training.seed, spec.monitor.eval_steps) == (1000, 42, 250)
    assert (spec.rollout.max_new_tokens, spec.rollout.min_new_tokens) == (128, 16)
    assert (spec.data.max_length, spec.data.min_completion) == (1024, 32)


def test_pair_then_method_then_command_line_override_one_another():
    def steps(*words: str) -> int:
        return compose(from_command_line(list(words), TrainSpec), TrainSpec).training.max_steps

    assert steps() == 1000
    assert steps("pair=context") == 100
    assert steps("method=extended_on_policy", "pair=context") == 200
    assert steps("max_steps=7", "method=extended_on_policy", "pair=context") == 7


def own(*words: str, spec_type: Any = TrainSpec) -> Any:
    return compose(from_command_line(list(words), spec_type), spec_type)


def test_weights_that_are_named_without_a_pair_are_a_pair_of_ones_own():
    both = ["student=models/Small v2", "teacher=owner/Large"]
    for spec_type in (TrainSpec, EvalSpec):
        for words in (both, ["--student", "models/Small v2", "--teacher=owner/Large"]):
            spec = own(*words, spec_type=spec_type)
            assert spec == own("pair=own", *words, spec_type=spec_type)
            pair = spec.pair
            assert (pair.student, pair.teacher) == ("models/Small v2", "owner/Large")
            assert (pair.pair_name, pair.pair_source, pair.vocab_size) == ("small-v2", "hub", None)
            assert spec.quant.quant_type == "none"
    assert own(*both).training.num_processes == 1
    assert own().pair.pair_name == own("pair_name=qwen3_4b_self").pair.pair_name, "nobody named one"
    kept = own("pair=context", "teacher=other/model")
    assert (kept.pair.pair_name, kept.pair.student) == ("context", "Qwen/Qwen3-4B-Instruct-2507")


def test_a_pair_of_ones_own_is_two_models_or_a_sentence():
    for word, lacks in (("student=a", "teacher"), ("teacher=a", "student")):
        with pytest.raises(ConfigError, match=f"command line: pair: {lacks} not given; .*quant="):
            own(word)
    with pytest.raises(ConfigError, match="student and teacher not given"):
        own("pair=own")


def test_a_pair_is_called_as_its_student_in_letters_that_a_job_may_have():
    names = {
        "models/Small v2/": "small-v2",
        "Qwen/Qwen3-4B-Instruct-2507": "qwen3-4b-instruct-2507",
        "/data/größe": "gr-e",
        "模型": "own",
        "..": "own",
        f"x/{'long-' * 20}": "long-long-long-long-long-long",
    }
    for student, name in names.items():
        assert own(f"student='{student}'", "teacher=t").pair.pair_name == name, student
    one, other = own("student=a/base", "teacher=t"), own("student=b/base", "teacher=t")
    assert one.pair.pair_name == other.pair.pair_name and point_id(one) != point_id(other)


def test_a_pair_brings_its_quantiser_and_the_command_line_may_choose_another():
    own = compose(Overrides({"pair": "smollm2_self"}, {}), TrainSpec)
    assert own.quant.quant_type == "bnb_nf4"
    other = compose(Overrides({"pair": "smollm2_self", "quant": "int4"}, {}), TrainSpec)
    assert (other.quant.quant_type, other.quant.quant_group_size) == ("int4", 32)


def test_a_method_settles_its_own_loss_whatever_the_family():
    def off_loss(method: str, loss: str) -> str:
        return compose(Overrides({"method": method, "loss": loss}, {}), TrainSpec).loss.off_loss

    losses = {
        m: [off_loss(m, f) for f in ("ce_pg", "jsd")] for m in ("off_policy", "sft", "hybrid")
    }
    assert losses == {"off_policy": ["jsd"] * 2, "sft": ["ce"] * 2, "hybrid": ["ce", "jsd"]}


def test_the_tiny_pair_says_how_many_tokens_it_has():
    from stillhouse.distill.toy.tiny import VOCABULARY

    tiny = compose(Overrides({"pair": "tiny"}, {}), TrainSpec)
    assert tiny.pair.vocab_size == VOCABULARY


# Values for the parity of the fast path: any of them may be set on any choice of groups.
LEAF_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "lmbda": st.one_of(
        st.floats(0, 1), st.sampled_from([0, 1, [[0, 0], [0.5, 0], [0.5, 1]], [[0.25, 1], [1, 0]]])
    ),
    "beta": st.floats(0, 1),
    "learning_rate": st.floats(1e-9, 1, exclude_min=True),
    "weight_decay": st.floats(0, 1),
    "max_new_tokens": st.integers(32, 4096),
    "max_steps": st.integers(0, 10**6),
    "seed": st.integers(0, 2**31),
    "lora_r": st.integers(1, 512),
    "lora_alpha": st.one_of(st.none(), st.integers(1, 512)),
    "do_eval": st.booleans(),
    "tags": st.lists(st.sampled_from(["a", "lr-batch", "x.y", "3b"]), max_size=3),
    "micro_batch": st.sampled_from([None, 1]),
    "lr_scheduler_type": st.sampled_from(["constant", "linear", "cosine"]),
    "student": st.sampled_from(["a/b", "./models/x", "Qwen/Qwen3-4B-Instruct-2507"]),
    "teacher": st.sampled_from(["a/b", "/models/Y", "../z"]),
    "price_usd_per_hour": st.one_of(st.none(), st.floats(0, 1000)),
    "data_path": st.sampled_from(["rows.jsonl", "allenai/x", "/data/rows.parquet"]),
    "eval_teacher": st.booleans(),
    "lora_paths": st.lists(st.sampled_from(["dump/a", "runs"]), max_size=2),
    "limit": st.one_of(st.none(), st.integers(1, 1000)),
}


# Asked once: type checks of the package draw random numbers, which a strategy must not.
KNOWN = {spec_type: leaves(spec_type) for spec_type in (TrainSpec, EvalSpec)}
CHOICES = {group: options_of(group) for group, _ in OPTIONS}
CHOICES["suite"].remove("local")  # Hydra reads no tasks
CHOICES["rescue"] = ["none", "aligned", "low_kl"]  # the others ask more of a pair and of its data


@st.composite
def asked(draw: Any, spec_type: Any) -> tuple[dict[str, str], dict[str, Any]]:
    groups = {
        group: draw(st.sampled_from(CHOICES[group]))
        for group in draw(st.lists(st.sampled_from(sorted(GROUPS[spec_type])), unique=True))
    }
    known = KNOWN[spec_type]
    names = sorted(name for name in LEAF_VALUES if name in known)
    chosen = draw(st.lists(st.sampled_from(names), unique=True, max_size=6))
    if groups.get("method") == "replay_buffer" and "lmbda" in chosen:
        chosen.remove("lmbda")  # a buffer takes every rollout
    if groups.get("data") == "local" and "data_path" not in chosen:
        chosen.append("data_path")
    if {"student", "teacher"} & {*chosen}:  # and no pair: Hydra is not told what that means
        groups.setdefault("pair", "own")
    if groups.get("pair") == "own":
        chosen = [*{*chosen, "student", "teacher"}]
    return groups, {known[name].path: draw(LEAF_VALUES[name]) for name in chosen}


def assert_equal_to_hydra(overrides: Overrides, config: str) -> None:
    words = [f"{group}={option}" for group, option in overrides.groups.items()]
    # repr spells a float exactly; the values of LEAF_VALUES need no quotes in Hydra's grammar.
    words += [f"{path}={spelt(value)}" for path, value in overrides.values.items()]
    assert compose(overrides, SPEC_OF[config]) == whole_hydra(config, words)


def spelt(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(spelt, value))}]" if isinstance(value, list) else str(value)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(asked(TrainSpec))
def test_the_fast_path_equals_hydra_composing_the_whole_of_a_training_point(
    asked: tuple[dict[str, str], dict[str, Any]],
):
    assert_equal_to_hydra(Overrides(*asked), "train")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(asked(EvalSpec))
def test_the_fast_path_equals_hydra_composing_the_whole_of_an_evaluation(
    asked: tuple[dict[str, str], dict[str, Any]],
):
    assert_equal_to_hydra(Overrides(*asked), "eval")


def test_every_pair_method_and_quantiser_equal_hydras_composition():
    pairs, methods, quantisers = map(options_of, ("pair", "method", "quant"))
    # The zoo's are files of one kind; tests/test_styles.py has each of them.
    pairs = [pair for pair in pairs if not pair.startswith("zoo_") or pair == "zoo_brief"]
    # Each option at least once, in changing company; all combinations would take a minute.
    for i in range(max(len(pairs), len(methods), len(quantisers))):
        groups = {
            "pair": pairs[i % len(pairs)],
            "method": methods[i % len(methods)],
            "quant": quantisers[i % len(quantisers)],
        }
        own = OWN if groups["pair"] == "own" else {}
        assert_equal_to_hydra(Overrides(groups, {"loss.beta": 0.5, **own}), "train")


def test_a_composed_point_leaves_no_trace_in_the_next():
    before = compose(Overrides({"pair": "tiny"}, {}), TrainSpec)
    changed = {"place.tags": ["x"], "lora.target_modules": ["q_proj"], "method.lmbda": 0.0}
    compose(Overrides({"pair": "tiny"}, changed), TrainSpec)
    assert compose(Overrides({"pair": "tiny"}, {}), TrainSpec) == before


def test_composing_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = compose(Overrides({"pair": "context"}, {}), TrainSpec)
    monkeypatch.chdir(tmp_path)
    from stillhouse.compose import _composed  # pyright: ignore[reportPrivateUsage]

    _composed.cache_clear()
    assert compose(Overrides({"pair": "context"}, {}), TrainSpec) == here


def test_overrides_lie_over_one_another():
    low = Overrides({"pair": "tiny", "quant": "int4"}, {"loss.beta": 0.0, "method.lmbda": 0.0})
    high = Overrides({"quant": "none"}, {"loss.beta": 1.0})
    assert high.over(low) == Overrides(
        {"pair": "tiny", "quant": "none"}, {"loss.beta": 1.0, "method.lmbda": 0.0}
    )


def test_overrides_come_back_from_the_words_they_print():
    overrides = Overrides(
        {"pair": "tiny", "quant": "none"},
        {
            "optim.learning_rate": 1e-5,
            "method.lmbda": [[0, 0], [0.5, 1]],
            "training.micro_batch": None,
            "monitor.do_eval": True,
            "place.tags": ["a", "b"],
            "pair.student": "a/b",
            "training.seed": 3,
        },
    )
    assert from_command_line(as_command_line(overrides), TrainSpec) == overrides


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.prompt_template", "Q: {question}, please"),
        ("place.tags", ["a b", "c,d"]),
        ("place.name", "true"),
        ("place.name", "1e-5"),
        ("place.name", "null"),
        ("watch.watch_rules", {"a": {"limit": 0.5, "unless_above": None, "metric": "b/c d"}}),
    ],
)
def test_a_text_comes_back_from_the_words_it_is_printed_as(path: str, value: Any):
    overrides = Overrides({}, {path: value})
    assert from_command_line(as_command_line(overrides), TrainSpec) == overrides


def test_a_key_of_a_sweep_file_is_a_group_or_a_leaf():
    assert resolve("quant_type", "int4", TrainSpec, "here") == Overrides({"quant": "int4"}, {})
    assert resolve("lmbda", 0.5, TrainSpec, "here") == Overrides({}, {"method.lmbda": 0.5})
    with pytest.raises(ConfigError, match="here: pair names a file in conf/pair, got 5"):
        resolve("pair", 5, TrainSpec, "here")
    with pytest.raises(ConfigError, match='here: no knob "lmda".*"lmbda"'):
        resolve("lmda", 0.5, TrainSpec, "here")


REFUSED = {
    "pair=tyni": 'no "tyni" in conf/pair (context, gemma3_270m_self, horizon,',
    "--quant-type int5": 'Did you mean "int4"?',
    "loss=nothing": 'no "nothing" in conf/loss (ce_pg, jsd)',
    "lmbda=0,1": "is a sweep; one run wants one value",
    "pair=tiny,context": "is a sweep; one run wants one value",
    "lmbda=interval(0,1)": "a grid needs a list",
    "prompt_template={question}": "--prompt-template 'TEXT' takes it as it is",
    "lmbda=1.5": "method.lmbda = 1.5: the values of this schedule lie in [0, 1]",
    "learning_rate=fast": "optim.learning_rate = 'fast'",
    "max_steps=1.5": "training.max_steps = 1.5",
    "lr_scheduler_type=sawtooth": "input should be 'constant', 'linear' or 'cosine'",
    "data=local": "there is no default; give it as data_path=FILE",
    "micro_batch=3": "micro_batch 3 must divide per_device_train_batch_size 4",
    "min_new_tokens=500": "min_new_tokens 500 is above max_new_tokens 128",
    "min_completion=2000": "min_completion 2000 must be below max_length 1024",
    "tags=a": "place.tags = 'a'",
}


@pytest.mark.parametrize("word", REFUSED)
def test_a_value_that_cannot_be_is_refused_in_one_line(word: str):
    with pytest.raises(ConfigError) as refused:
        compose(from_command_line(word.split(" "), TrainSpec), TrainSpec)
    message = str(refused.value)
    assert REFUSED[word] in message
    assert message.startswith("command line: ")
    assert "\n" not in message


def test_a_glob_is_refused_like_any_other_value_that_cannot_be():
    with pytest.raises(ConfigError):
        from_command_line(["method=glob(*)"], TrainSpec)


def test_an_unknown_key_in_plain_settings_is_told_its_nearest():
    from stillhouse.identity import to_plain

    plain = to_plain(compose(Overrides({}, {}), TrainSpec))
    plain["loss"]["betta"] = 0.5
    with pytest.raises(ConfigError, match='loss.betta".*"loss.beta"'):
        check(plain, TrainSpec, "a file")
