"""Test what a spec refuses, and what makes two points the same point."""

import dataclasses
import json
import re
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.compose import GROUPS, Overrides, as_command_line, compose, from_command_line
from stillhouse.errors import ConfigError
from stillhouse.flags import leaves
from stillhouse.identity import (
    AS_BEFORE,
    NOT_VERSIONED,
    baseline_key,
    chat_settings,
    digest,
    eval_id,
    point_id,
    score_key,
    slug,
    to_plain,
    versioned,
)
from stillhouse.spec import EvalSpec, MethodSpec, QuantSpec, TaskSpec, TrainSpec
from tests.builders.published import TRAIN, flags_of, lines, name_of


def train(**values: object) -> TrainSpec:
    """The default point with some leaves set; a bare group name chooses its option."""
    paths = leaves(TrainSpec)
    groups = {k: str(v) for k, v in values.items() if k in GROUPS[TrainSpec]}
    return compose(
        Overrides(groups, {paths[k].path: v for k, v in values.items() if k not in groups}),
        TrainSpec,
    )


# For every leaf a second value that is allowed beside the defaults.
OTHER: dict[str, object] = {
    "pair_name": "another",
    "pair_source": "gguf",
    "student": "another/model",
    "teacher": "another/model",
    "student_revision": "abc",
    "teacher_revision": "abc",
    "student_dtype": "float32",
    "teacher_dtype": "float32",
    "teacher_few_shot": 4,
    "teacher_prompt": "{question} Answer: {completion}",
    "teacher_samples": False,
    "vocab_size": 100,
    "pair_seed": 1,
    "student_steps": 1,
    "teacher_steps": 1,
    "method_name": "another",
    "lmbda": 0.25,
    "lmbda_as": "weight",
    "off_policy_source": "teacher",
    "seed_tokens": 8,
    "anchor_weight": 0.1,
    "replay_size": 50,
    "replay_injection": 0.2,
    "cold_start": 0.25,
    "cold_prompts": 32,
    "kept_prompts": 0.5,
    "kept_by": "kl",
    "other_prompts": 0.25,
    "other_file": "another",
    "on_loss": "pg",
    "off_loss": "ce",
    "beta": 0.25,
    "advantage_clip": 3,
    "fixed_advantage": -1,
    "ema_decay": 0.9,
    "ratio_cap": 2,
    "loss_top_k": 8,
    "top_k_support": "union",
    "loss_temperature": 2.0,
    "position_weights": [[0, 1], [1, 0]],
    "loss_chunk": 64,
    "teacher_at": "cache",
    "teacher_rows": "alone",
    "teacher_cache_gib": 1,
    "teacher_url": "http://10.0.0.5:8765",
    "teacher_patience_s": 60,
    "quant_type": "bnb_nf4",
    "quant_group_size": 64,
    "double_quant": True,
    "lora_r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj"],
    "data_name": "another",
    "data_source": "gsm8k",
    "data_path": "another",
    "data_split": "test",
    "prompt_template": "Q: {question}",
    "chat_template_kwargs": {"enable_thinking": False},
    "template_date": "2026-06-01",
    "max_length": 512,
    "min_completion": 16,
    "max_rows": 100,
    "held_out_rows": 1,
    "max_new_tokens": 64,
    "min_new_tokens": 8,
    "temperature": 0.7,
    "horizon": 0.5,
    "rollout_rows": 32,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 2.0,
    "max_steps": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_processes": 4,
    "mixed_precision": "no",
    "gradient_checkpointing": True,
    "seed": 7,
    "sanity_max_nll": 9.0,
    "max_rollout_gap": 0.3,
    "micro_batch": 2,
    "save_steps": 10,
    "do_eval": True,
    "eval_answers": "teacher",
    "eval_steps": 10,
    "score_steps": 10,
    "accuracy_steps": 10,
    "overlap_steps": 5,
    "overlap_k": 8,
    "overlap_bins": [[0, 8], [8, None]],
    "watch_rules": {},
    "stop_on": ["kl_runaway"],
    "tracker": "wandb",
    "wandb_project": "another",
    "wandb_mode": "online",
    "runs": "elsewhere",
    "cache_dir": "elsewhere",
    "name": "a-name",
    "output_dir": "elsewhere",
    "tags": ["a"],
    "threads": 1,
    "commits": {"owner/name@main": "1" * 40},
    "sources": "new",
    "sweep": "another",
    "site_name": "another",
    "max_parallel": 64,
    "infra_retries": 0,
    "price_usd_per_hour": 2.5,
    "owner": "bob",
    "kube_context": "another",
    "namespace": "another",
    "image": f"another@sha256:{'1' * 64}",
    "service_account": "another",
    "driver_account": "another",
    "runs_claim": "another",
    "cache_claim": "another",
    "queue": "team-a",
    "queue_priority": "high",
    "priority_class": "high",
    "gpu_resource": None,
    "gpu_product": "Tesla-T4",
    "node_selector": {"pool": "a"},
    "tolerations": [],
    "cpu": 1,
    "memory_gib": 1,
    "shm_gib": 1,
    "deadline_s": 60,
    "grace_s": 60,
    "patience_s": 60,
    "wandb_secret": "another",
    "hf_secret": "another",
    "pod_env": {"A": "b"},
    "runtime_class": "nvidia",
    "pull_secret": "regcred",
    "pod_annotations": {"sidecar.istio.io/inject": "false"},
}


# What some of them need before they mean anything.
COLD, OTHERS = {"cold_start": 0.5, "cold_prompts": 64}, {"other_prompts": 0.5, "other_file": "x"}
NAMED: dict[str, object] = {
    "pair": "qwen3_4b_self"
}  # without it, weights are a pair of one's own, and two are asked for
BESIDE: dict[str, dict[str, object]] = {
    "student": NAMED,
    "teacher": NAMED,
    "cold_start": COLD,
    "cold_prompts": COLD,
    "other_prompts": OTHERS,
    "other_file": OTHERS,
    "double_quant": {"quant": "bnb_nf4"},
    "replay_size": {"off_policy_source": "teacher"},
    "teacher_at": {"lmbda": 0, "teacher_rows": "alone"},
    "teacher_url": {"teacher_at": "server"},
    "fixed_advantage": {"on_loss": "pg"},
    "replay_injection": {"off_policy_source": "teacher", "replay_size": 50},
}


# Of the knobs that came later, those that take knots: a flat line is the number that it is.
SCHEDULES = {"position_weights", "horizon", "kept_prompts"}


def test_how_many_rows_are_written_at_once_is_versioned_only_where_it_may_change_a_token():
    assert point_id(train(rollout_rows=8)) != point_id(train())
    assert point_id(train(pair="tiny", rollout_rows=8)) == point_id(train(pair="tiny"))


def is_versioned(path: str) -> bool:
    return path not in NOT_VERSIONED and path.split(".")[0] not in NOT_VERSIONED


def test_every_leaf_has_a_second_value_in_this_file():
    assert set(OTHER) == set(leaves(TrainSpec))


@pytest.mark.parametrize(
    "name", [n for n, leaf in leaves(TrainSpec).items() if is_versioned(leaf.path)]
)
def test_each_versioned_leaf_is_part_of_the_identity(name: str):
    if name == "quant_type":  # on a command line it brings its whole group along
        plain = to_plain(train())
        plain["quant"]["quant_type"] = "bnb_nf4"
        assert digest(plain) != digest(to_plain(train()))
        return
    beside = BESIDE.get(name, {})
    assert point_id(train(**{**beside, name: OTHER[name]})) != point_id(train(**beside))


@pytest.mark.parametrize(
    "name", [n for n, leaf in leaves(TrainSpec).items() if not is_versioned(leaf.path)]
)
def test_no_unversioned_leaf_is_part_of_the_identity(name: str):
    beside = BESIDE.get(name, {})
    other = train(**{**beside, name: OTHER[name]})
    assert other != train(**beside)
    assert point_id(other) == point_id(train(**beside))


def test_a_knob_that_came_later_leaves_the_runs_before_it_what_they_were():
    plain = versioned(train(pair="tiny"))
    for key, value in AS_BEFORE.items():
        section, leaf = key.split(".")
        if section in ("suite", "task"):
            continue  # of what is asked, not of what is trained: see the test of a suite
        assert leaf not in plain.get(section, {})
        for spelt in (value, *([[[0, value], [1, value]]] if leaf in SCHEDULES else [])):
            assert point_id(train(pair="tiny", **{leaf: spelt})) == point_id(train(pair="tiny"))


def test_what_is_said_to_be_unversioned_exists():
    sections = {f.name: f.type for f in dataclasses.fields(TrainSpec)}
    paths = {leaf.path for leaf in leaves(TrainSpec).values()}
    assert all(key in sections or key in paths for key in NOT_VERSIONED)


def test_the_number_of_processes_is_versioned_and_the_micro_batch_is_not():
    plain = versioned(train())
    assert plain["training"]["num_processes"] == 8
    assert "micro_batch" not in plain["training"]
    assert not {"place", "site", "tracking", "monitor"} & set(plain)


def test_leaf_names_are_unique_over_both_specs_and_no_group_is_named_like_a_leaf():
    train_leaves, eval_leaves = leaves(TrainSpec), leaves(EvalSpec)
    for name in set(train_leaves) & set(eval_leaves):
        assert train_leaves[name] == eval_leaves[name], f"{name} means two things"
    groups = GROUPS[TrainSpec] | GROUPS[EvalSpec]
    assert not groups & {*train_leaves, *eval_leaves}


@pytest.mark.parametrize("spelling", ["5e-6", "5e-06", "0.000005", "5.0E-6"])
def test_the_spelling_of_a_number_does_not_change_the_identity(spelling: str):
    from stillhouse.compose import from_command_line

    spelt = compose(from_command_line([f"learning_rate={spelling}"], TrainSpec), TrainSpec)
    assert point_id(spelt) == point_id(train(learning_rate=0.000005))


@pytest.mark.parametrize(("a", "b"), [(0, 0.0), (1, 1.0), (0.5, "0.5")])
def test_a_whole_number_and_its_float_are_one_lmbda(a: object, b: object):
    assert point_id(train(lmbda=a)) == point_id(train(lmbda=b))


def test_minus_zero_is_zero():
    assert point_id(train(lmbda=-0.0)) == point_id(train(lmbda=0.0))


def test_key_order_does_not_change_a_digest():
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    forward = Overrides({}, {"method.lmbda": 0.5, "loss.beta": 0.5})
    backward = Overrides({}, {"loss.beta": 0.5, "method.lmbda": 0.5})
    assert point_id(compose(forward, TrainSpec)) == point_id(compose(backward, TrainSpec))


def test_two_published_names_of_one_run_are_one_id():
    from stillhouse.compose import from_command_line

    ids = {
        name_of(line): point_id(compose(from_command_line(flags_of(line), TrainSpec), TrainSpec))
        for line in lines(TRAIN)
        if line.startswith("k8s/")
    }
    assert ids["lmbda_0_int4"] == ids["lmbda0_lr1e5"]  # 1e-5 is the default learning rate
    same = {frozenset(n for n in ids if ids[n] == ids[name]) for name in ids}
    assert {names for names in same if len(names) > 1} == {
        frozenset({"lmbda_0_int4", "lmbda0_lr1e5"})
    }


def test_a_constant_schedule_is_its_value():
    assert train(lmbda=[[0, 0.5], [1, 0.5]]).method.lmbda == 0.5
    assert point_id(train(lmbda=[[0, 0.5], [0.3, 0.5]])) == point_id(train(lmbda=0.5))


def test_alpha_is_twice_the_rank_unless_given():
    assert train(lora_r=8).lora.lora_alpha == 16
    assert point_id(train(lora_r=8)) == point_id(train(lora_r=8, lora_alpha=16))
    assert train(lora_r=8, lora_alpha=5).lora.lora_alpha == 5


def named(pair: str, method: str) -> TrainSpec:
    spec = train()
    return dataclasses.replace(
        spec,
        pair=dataclasses.replace(spec.pair, pair_name=pair),
        method=dataclasses.replace(spec.method, method_name=method),
    )


DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
ASCII = st.characters(codec="ascii")


@settings(deadline=None)  # under load a first call may take long
@given(pair=st.text(ASCII, max_size=80).map(lambda t: f"p{t}"), method=st.text(ASCII, max_size=80))
def test_a_run_directory_name_is_a_dns_label_of_at_most_52_characters(pair: str, method: str):
    spec = named(pair, method)
    name = f"{slug(spec)}-{point_id(spec)}"
    assert len(name) <= 52
    assert DNS_LABEL.fullmatch(name), name


def test_a_slug_is_a_dns_label_whatever_the_pair_is_called():
    assert DNS_LABEL.fullmatch(slug(named("größe", "λ")))


def test_an_id_is_ten_hex_digits():
    assert re.fullmatch(r"[0-9a-f]{10}", point_id(train()))


def test_specs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        train().method.lmbda = 0.0  # pyright: ignore


def test_a_spec_survives_json_and_back():
    from pydantic import TypeAdapter

    for spec in (train(pair="tiny", lmbda=[[0, 0], [1, 1]]), compose(Overrides({}, {}), EvalSpec)):
        assert TypeAdapter(type(spec)).validate_python(to_plain(spec)) == spec


OUT_OF_RANGE = {
    "lmbda": [-0.1, 1.1, "x", None, [], [[0.5, 0], [0.2, 1]], [[0, 2], [1, 0]], [[0, 1, 2]]],
    "lmbda_as": ["dice"],
    "seed_tokens": [-1, 128, [[0, 200], [0.5, 0]]],  # 128 is all of a rollout
    "anchor_weight": [-0.1, [[0, 0], [2, 1]], float("inf")],
    "replay_size": [-1, 1.5],
    "replay_injection": [1.5],
    "on_loss": ["ce"],
    "off_loss": ["pg"],
    "advantage_clip": [-1],
    "loss_top_k": [0, 151_937],
    "vocab_size": [0],
    "overlap_k": [0, 151_937],
    "overlap_bins": [
        [],
        [[1, None]],
        [[0, 8]],  # a gap at its end
        [[0, 8], [9, None]],  # a gap
        [[0, 8], [7, None]],  # an overlap
        [[0, None], [8, None]],
        [[0, 0], [0, None]],
        [[0, 8, None]],
    ],
    "beta": [-0.1, 1.1, float("nan")],
    "loss_temperature": [0, -1, float("inf")],
    "quant_group_size": [None, 0, 33],
    "lora_r": [0, 1.5],
    "lora_dropout": [1, -0.1],
    "prompt_template": ["no slot"],
    "max_length": [8],
    "min_completion": [0, 1024],
    "max_new_tokens": [0, 8],  # 8 is below min_new_tokens
    "temperature": [0],
    "learning_rate": [0, -1e-5, float("inf")],
    "lr_scheduler_type": ["sawtooth"],
    "warmup_ratio": [-0.1, 1.1],
    "adam_beta2": [1.0],
    "max_steps": [-1, 1.5],
    "num_processes": [0],
    "mixed_precision": ["fp8", False],
    "seed": [-1],
    "micro_batch": [0, 3],  # 3 does not divide the batch of 4
    "tags": ["a"],
    "max_parallel": [0],
    "price_usd_per_hour": [-1],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_nonsense_is_refused_in_one_or_two_lines_that_name_the_knob(name: str, value: object):
    with pytest.raises(ConfigError) as refused:
        train(**{name: value})
    message = str(refused.value)
    section = leaves(TrainSpec)[name].path.split(".")[0]
    assert name in message or section in message
    assert message.count("\n") <= 1
    assert "pydantic" not in message


@pytest.mark.parametrize("name", ["lmbda", "max_steps", "seed"])
def test_true_is_not_a_number(name: str):
    with pytest.raises(ConfigError):
        train(**{name: True})


def test_an_adapter_without_modules_is_refused():
    with pytest.raises(ConfigError):
        train(target_modules=[])


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", "", "."])
def test_a_name_is_one_plain_file_name(name: str):
    with pytest.raises(ConfigError):
        train(name=name)


def test_a_group_size_belongs_to_a_quantiser_and_only_to_one():
    for kind, size in (("none", 32), ("int4", None)):
        with pytest.raises(ValueError, match="group size"):
            QuantSpec(kind, size, False)  # pyright: ignore[reportArgumentType]
    assert QuantSpec("none", None, False).quant_group_size is None
    with pytest.raises(ValueError, match=r"1024 is not one that int4 has: 32, 64, 128 \["):
        QuantSpec("int4", 1024, False)
    assert QuantSpec("bnb_nf4", 1024, False).quant_group_size == 1024


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"on_loss": "pg", "fixed_advantage": 0}, "fixed_advantage 0: no rollout would change"),
        ({"on_loss": "pg", "fixed_advantage": -1, "lmbda": 0}, "-1 with lmbda 0: it is of roll"),
        ({"data": "packaged", "data_path": "sciq+boolq+sciq"}, "data_path=sciq\\+boolq$"),
    ],
)
def test_what_would_do_nothing_or_nothing_more_is_refused(values: dict[str, object], why: str):
    with pytest.raises(ConfigError, match=why):
        train(**values)


def test_knots_keep_their_jump():
    knots = ((0, 0), (0.5, 0), (0.5, 1))
    method = MethodSpec("m", knots, "coin", "teacher", 0, 0, 0, 0)
    assert method.lmbda == ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0))


def test_only_what_the_teacher_writes_makes_a_method_need_its_text():
    def needs(**values: object) -> bool:
        return train(**values).method.samples_teacher

    assert [needs(method=name) for name in ("on_policy_gkd", "gkd")] == [False, False]
    assert not needs(lmbda=0.5)  # the dataset's sequences
    assert needs(lmbda=0.5, off_policy_source="teacher")
    assert needs(seed_tokens=[[0, 4], [0.5, 0]])
    assert needs(method="replay_buffer")
    assert not needs(method="replay_buffer", replay_injection=0)


def test_a_score_is_the_same_question_only_with_all_its_settings():
    suite = compose(Overrides({"suite": "tiny"}, {}), EvalSpec).suite
    task = suite.tasks[0]
    key = score_key(suite, task)
    assert key == score_key(suite, task)
    changes: list[dict[str, typing.Any]] = [
        {"apply_chat_template": not suite.apply_chat_template},
        {"limit": 5},
        {"max_gen_toks": (suite.max_gen_toks or 0) + 1},
    ]
    for change in changes:
        assert score_key(dataclasses.replace(suite, **change), task) != key
    assert score_key(suite, dataclasses.replace(task, num_fewshot=3)) != key
    # The suite's name and its other tasks are not part of the question.
    assert score_key(dataclasses.replace(suite, suite_name="another", tasks=(task,)), task) == key
    assert isinstance(task, TaskSpec)
    assert score_key(suite, task, chat_settings({})) != key


def test_a_conversation_that_is_written_otherwise_is_another_point_baseline_and_evaluation():
    before = train(pair="tiny")
    keys = {baseline_key("teacher", before.pair, before.quant)}
    assert keys == {baseline_key("teacher", before.pair, before.quant, before.data)}
    ids, evals = {point_id(before)}, {eval_id(compose(Overrides({"pair": "tiny"}, {}), EvalSpec))}
    for leaf, value in (
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("chat_template_kwargs", {"enable_thinking": 0}),
        ("template_date", "2026-06-01"),
    ):
        after = train(pair="tiny", **{leaf: value})
        ids.add(point_id(after))
        keys.add(baseline_key("teacher", after.pair, after.quant, after.data))
        asked = Overrides({"pair": "tiny"}, {f"data.{leaf}": value})
        evals.add(eval_id(compose(asked, EvalSpec)))
    assert len(ids) == len(keys) == len(evals) == 4


@pytest.mark.parametrize(
    "words",
    [
        ["chat_template_kwargs={enable_thinking: false}", "template_date=2026-06-01"],
        ["--chat-template-kwargs", "{enable_thinking: false}", "--template-date", "2026-06-01"],
        ['data.chat_template_kwargs={"enable_thinking": false}', "template_date='2026-06-01'"],
    ],
)
def test_a_templates_variables_are_said_in_either_dialect(words: list[str]):
    asked = from_command_line(words, TrainSpec)
    data = compose(asked, TrainSpec).data
    assert data.chat_template_kwargs == {"enable_thinking": False}
    assert data.template_date == "2026-06-01"


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": True, "b": None, "c": 2, "d": 2.0, "e": "2", "f": 'it\'s {x}, "y"'},
        {"l": [1, "a", None]},
    ],
)
def test_a_templates_variables_come_back_from_the_words_that_say_them(value: typing.Any):
    """2.0 and 2 are two variables to a template, which writes them as they are."""
    asked = Overrides({}, {"data.chat_template_kwargs": value})
    back = from_command_line(as_command_line(asked), TrainSpec).values
    assert json.dumps(back["data.chat_template_kwargs"]) == json.dumps(value)


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        ("template_date", "yesterday"),
        ("template_date", "2026-02-30"),
        ("template_date", 20260101),
        ("chat_template_kwargs", {"enable-thinking": False}),
        ("chat_template_kwargs", {"a": {"b": 1}}),
        ("chat_template_kwargs", {"a": float("nan")}),
        ("chat_template_kwargs", "enable_thinking"),
    ],
)
def test_what_no_template_could_be_given_is_refused(leaf: str, value: object):
    with pytest.raises(ConfigError, match=f"data.{leaf}"):
        train(**{leaf: value})


def test_only_the_quantised_baseline_depends_on_the_quantiser():
    int4, none = train(quant="int4"), train(quant="none")
    for label in ("teacher", "student"):
        key = baseline_key(label, int4.pair, int4.quant)
        assert key == baseline_key(label, int4.pair, none.quant)
    assert baseline_key("ptq", int4.pair, int4.quant) != baseline_key("ptq", int4.pair, none.quant)
    keys = {baseline_key(label, int4.pair, int4.quant) for label in ("teacher", "student", "ptq")}
    assert len(keys) == 3
