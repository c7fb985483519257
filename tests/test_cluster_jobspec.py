"""Test what a Job is asked to do, and which name that gives it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from stillhouse.compose import Overrides, compose, from_command_line, from_json
from stillhouse.errors import ConfigError
from stillhouse.identity import eval_id, suite_key
from stillhouse.rundir import directory_name
from stillhouse.spec import EvalSpec, TrainSpec
from stillhouse.sweep.cluster.jobspec import (
    JobSpecs,
    drive_step,
    eval_line_step,
    eval_step,
    prepare_step,
    refuse_collisions,
    train_step,
)
from stillhouse.sweep.cluster.manifest import (
    refuse_unsendable,
    render,
)
from stillhouse.sweep.plan import Action
from tests.builders.manifests import (
    rendered,
    spec_in,
    tiny,
    typed,
    unscored,
)


def test_a_step_of_training_has_the_name_of_its_run_directory():
    point, sweep = tiny("lmbda=0.5 name=half tags=[a,b]")
    step = train_step(point, sweep)
    assert step.name == directory_name(point.slug, point.id)
    assert step.id == point.id
    assert step.log == f"{step.name}/log.txt"
    assert (step.names, step.tags) == (("half",), ("a", "b"))


@pytest.mark.parametrize(
    "line",
    [
        "pair=tiny",
        "pair=tiny quant=none student_steps=10",
        "quant=bnb_nf4 double_quant=false max_rows=10",
        "pair=smollm2_self data=gsm8k --prompt-template 'Say \"{question}\", please: now'",
        "pair=tiny data=local data_path=/data/rows.jsonl limit=5",
    ],
)
def test_the_spec_of_an_evaluation_has_pair_quantiser_data_and_suite(line: str):
    sweep = typed(f"{line} suite=tiny")
    first = sweep.points[0]
    step = eval_step([first], ["student-0123456789"], sweep)
    spec = from_json(spec_in(rendered(step, sweep.site)), EvalSpec)
    assert (spec.pair, spec.quant, spec.data) == (
        first.spec.pair,
        first.spec.quant,
        first.spec.data,
    )
    assert spec.suite == sweep.suite
    assert spec.evaluation.lora_paths == (f"/runs/{directory_name(first.slug, first.id)}",)
    told = (
        spec.evaluation.eval_teacher,
        spec.evaluation.eval_student,
        spec.evaluation.eval_ptq,
    )
    assert told == (False, True, False)
    assert eval_id(spec) == step.id
    assert step.scores == suite_key(spec.suite)


def test_a_text_that_no_word_can_say_reaches_the_pod_as_it_is():
    point, sweep = tiny()
    data = dataclasses.replace(point.spec.data, prompt_template="{question} ${price} $(HOME)\n'")
    odd = dataclasses.replace(point, resolved=dataclasses.replace(point.spec, data=data))
    for step in (eval_step([odd], [], sweep), prepare_step(odd, sweep)):
        assert from_json(spec_in(rendered(step, sweep.site)), EvalSpec).data == data
    trained = rendered(train_step(odd, sweep), sweep.site)
    assert from_json(spec_in(trained), TrainSpec).data == data


@pytest.mark.parametrize("text", ["", "[]", "{}", "{'pair': 1}", '{"pair": {"pair_name": 1}}'])
def test_what_is_no_spec_is_refused_by_what_is_wrong_with_it(text: str):
    with pytest.raises(ConfigError, match="--spec: "):
        from_json(text, TrainSpec)


def test_the_spec_of_a_preparation_has_the_suite_where_there_is_one():
    point, sweep = tiny()
    scored = prepare_step(point, sweep)
    trained = prepare_step(point, unscored(sweep))
    assert isinstance(scored.spec, EvalSpec) and scored.spec.suite == sweep.suite
    assert scored.words == ("--fetch",)
    assert trained.words == ("--fetch", "--no-scores")
    assert scored.name != trained.name


def test_points_of_one_group_are_prepared_once():
    sweep = typed("pair=tiny lmbda=0,1 seeds=2")
    assert len({prepare_step(point, sweep).name for point in sweep.points}) == 1


def test_the_label_of_an_eval_line_does_not_change_its_job():
    overrides = from_command_line(shlex.split("--pair tiny --lora-paths dump/a"), EvalSpec)
    one, two = eval_line_step("one", overrides), eval_line_step("two", overrides)
    assert (one.name, one.hash, one.spec) == (two.name, two.hash, two.spec)
    assert (one.names, two.names) == (("one",), ("two",))
    assert one.baselines and all(
        name.startswith(("teacher-", "student-", "ptq-")) for name in one.baselines
    )


def test_an_eval_line_leaves_out_where_things_lie_on_the_laptop():
    words = shlex.split("--pair tiny --lora-paths out/a --runs here --cache-dir there --name x")
    step = eval_line_step("x", from_command_line(words, EvalSpec))
    assert step.typed == ("pair=tiny", "lora_paths=[out/a]", "runs=/runs", "cache_dir=/cache")
    assert step.spec == compose(from_command_line([*step.typed], EvalSpec), EvalSpec)


def test_a_driver_repeats_what_was_typed_and_says_whose_jobs_these_are():
    _, sweep = tiny("kube_context=far namespace=lab")
    sweep = dataclasses.replace(sweep, file="sweeps/a_b.yaml", name="a_b", words=("lmbda=0,1",))
    step = drive_step(sweep, b"x", ["--code=new"])
    assert step.words[:4] == ("run", "/sweep/a_b.yaml", "lmbda=0,1", "--code=new")
    assert {"owner=ada", "kube_context=null", "namespace=null"} <= {*step.words}
    assert step.name.startswith("drive-a-b-")
    assert step.sweep_file is not None and len(step.sweep_file) <= 63
    assert drive_step(sweep, b"y", ["--code=new"]).name != step.name
    with pytest.raises(ConfigError, match="rename it"):
        drive_step(dataclasses.replace(sweep, file="sweeps/a b.yaml"), b"x")


def test_each_action_of_a_sweep_has_its_step():
    sweep = typed("pair=tiny lmbda=0,1")
    steps = JobSpecs(sweep)
    ids = tuple(point.id for point in sweep.points)
    group = "tiny/int4"
    assert steps.of(Action("prepare", group)).kind == "prepare"
    assert steps.of(Action("train", group, ids[:1])) == train_step(sweep.points[0], sweep)
    teacher = Path("runs/baselines/teacher-0123456789")
    scored = steps.of(Action("eval", group, ids, (teacher,)))
    assert scored == eval_step(sweep.points, [teacher.name], sweep)
    assert scored.points == ids


def test_two_steps_of_one_name_are_refused():
    point, sweep = tiny()
    step = train_step(point, sweep)
    refuse_collisions([step, step])
    with pytest.raises(ConfigError, match=step.name):
        refuse_collisions([step, dataclasses.replace(step, hash="0" * 64)])
    step = eval_step([point], [], sweep)
    other = dataclasses.replace(step, hash="0" * 64, points=("abc",))
    with pytest.raises(ConfigError, match=f": eval of {point.id}; and eval of abc. Change"):
        refuse_collisions([step, other])


def test_a_configuration_that_no_container_starts_with_is_refused_by_what_is_long():
    point, sweep = tiny()
    step = eval_step([point], [], sweep)
    assert isinstance(step.spec, EvalSpec)
    paths = tuple(f"/runs/{number:0100}" for number in range(1200))
    scored = dataclasses.replace(step.spec.evaluation, lora_paths=paths)
    long = dataclasses.replace(step, spec=dataclasses.replace(step.spec, evaluation=scored))
    with pytest.raises(ConfigError, match="lora_paths 1[0-9]{2},[0-9]{3} of them, .* lower pack"):
        refuse_unsendable([long], sweep.site)
    assert isinstance(point.spec, TrainSpec)
    pair = dataclasses.replace(point.spec.pair, teacher_prompt="{question}" + "é" * 66_000)
    long = dataclasses.replace(step, spec=dataclasses.replace(point.spec, pair=pair))
    with pytest.raises(ConfigError, match="131,071 in one argument; shorten teacher_prompt"):
        rendered(long, sweep.site)


def test_ranks_have_the_time_of_their_site_to_save():
    point, sweep = tiny("num_processes=2 per_device_train_batch_size=2 lmbda=0.5")
    step, args = train_step(point, sweep), {}
    for grace in (25, 600):
        job = render(step, dataclasses.replace(sweep.site, grace_s=grace), "0" * 64)
        args[grace] = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "--grace=25" in args[25] and "--grace=600" in args[600]


def test_overrides_that_name_nothing_make_a_step_of_the_defaults():
    step = eval_line_step("eval", Overrides({}, {}))
    assert step.typed == ("runs=/runs", "cache_dir=/cache")
