"""Test sweep files, typed grids, and everything that can be wrong with them."""

import itertools
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.compose import as_json, compose, from_command_line, from_json
from stillhouse.errors import ConfigError
from stillhouse.identity import point_id, to_plain
from stillhouse.spec import TrainSpec
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep


def load(content: str | bytes, tmp_path: Path, *words: str) -> Sweep:
    file = tmp_path / "a_sweep.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_sweep(str(file), list(words), tmp_path / "runs")


def typed(line: str) -> Sweep:
    return load_sweep(None, line.split(), Path("runs"))


def ids(sweep: Sweep) -> set[str]:
    return {point.id for point in sweep.points}


def id_of(line: str) -> str:
    return point_id(compose(from_command_line(line.split(), TrainSpec), TrainSpec))


# ---- the grammar

WHOLE = """
question: Does it work?
base: {pair: tiny, quant: int4, max_steps: 10, tags: [a]}
grid: {lmbda: [0, 0.5], learning_rate: [5e-6, 1e-5]}
points: [{name: low, learning_rate: 1e-6, tags: [b, a]}]
seeds: 2
compare: {by: lmbda, metric: tiny_gen/exact_match, baseline: 0}
eval: {suite: tiny, pack: 3, limit: 20, baselines: [teacher, ptq]}
site: {max_parallel: 7}
"""


def test_a_whole_file_says_what_it_says(tmp_path: Path):
    sweep = load(WHOLE, tmp_path)
    assert sweep.name == "a_sweep"
    assert sweep.question == "Does it work?"
    assert sweep.axes == {"lmbda": (0.0, 0.5, 1.0), "learning_rate": (5e-6, 1e-5, 1e-6)}
    assert sweep.suite is not None
    assert (sweep.suite.suite_name, sweep.suite.limit, sweep.pack) == ("tiny", 20, 3)
    assert [row.label for row in sweep.baselines] == ["teacher", "ptq"]
    assert sweep.compare is not None
    assert (sweep.compare.by, sweep.compare.baseline) == ("lmbda", 0.0)
    assert sweep.site.max_parallel == 7
    assert sweep.runs == tmp_path / "runs"
    rows = [(p.overrides["lmbda"], p.overrides["learning_rate"]) for p in sweep.points]
    grid = list(itertools.product((0.0, 0.5), (5e-6, 1e-5)))
    assert rows == [cell for cell in [*grid, (1.0, 1e-6)] for _ in range(2)]
    assert [p.overrides["seed"] for p in sweep.points] == [0, 1] * 5
    assert [p.name for p in sweep.points] == [None] * 8 + ["low-s0", "low-s1"]
    assert [p.tags for p in sweep.points] == [("a",)] * 8 + [("a", "b")] * 2
    for point in sweep.points:
        assert set(point.overrides) == {"lmbda", "learning_rate", "seed"}
        assert point.id == point_id(point.spec)
        assert point.spec.training.max_steps == 10
        assert point.spec.place.runs == str(tmp_path / "runs")
        assert point.spec.place.name == point.name


def test_names_tags_and_the_place_of_runs_leave_the_id_alone(tmp_path: Path):
    bare = load("base: {pair: tiny}\npoints: [{lmbda: 0.5}]", tmp_path)
    named = load("base: {pair: tiny, tags: [x]}\npoints: [{name: n, lmbda: 0.5}]", tmp_path)
    assert ids(bare) == ids(named) == {id_of("pair=tiny lmbda=0.5")}
    assert named.points[0].name == "n"  # one seed, so nothing has to be told apart


def test_without_seeds_a_point_has_the_seed_of_the_configuration(tmp_path: Path):
    assert load("base: {pair: tiny}", tmp_path).points[0].overrides == {"seed": 42}
    assert load("base: {pair: tiny, seed: 5}", tmp_path).points[0].overrides == {"seed": 5}
    listed = load("base: {pair: tiny}\nseeds: [9, 3]", tmp_path)
    assert [point.spec.training.seed for point in listed.points] == [9, 3]
    axis = load("base: {pair: tiny}\ngrid: {seed: [9, 3]}", tmp_path)
    assert ids(axis) == ids(listed)
    assert axis.axes == {}


def test_a_sweep_without_eval_is_trained_and_not_scored(tmp_path: Path):
    sweep = load("base: {pair: tiny}", tmp_path)
    assert sweep.suite is None
    assert sweep.baselines == ()


def test_an_unquantised_sweep_has_no_quantised_baseline(tmp_path: Path):
    rest = "eval: {suite: tiny}"
    unquantised = load(f"base: {{pair: tiny, quant: none}}\n{rest}", tmp_path)
    assert [row.label for row in unquantised.baselines] == ["teacher", "student"]
    mixed = load(f"base: {{pair: tiny}}\ngrid: {{quant: [none, int4]}}\n{rest}", tmp_path)
    assert {row.label for row in mixed.baselines} == {"teacher", "student", "ptq"}


def test_groups_are_axes_and_every_point_has_a_value_on_every_axis(tmp_path: Path):
    sweep = load(
        "base: {pair: tiny}\npoints: [{quant_type: none}, {method: hybrid}, {max_steps: 5}]",
        tmp_path,
    )
    assert [point.overrides for point in sweep.points] == [
        {"quant": "none", "method": "gkd", "max_steps": 100, "seed": 42},
        {"quant": "int4", "method": "hybrid", "max_steps": 100, "seed": 42},
        {"quant": "int4", "method": "gkd", "max_steps": 5, "seed": 42},
    ]


RULED = """
base: {pair: tiny}
grid: {loss: [jsd, ce_pg], method: [hybrid, off_policy]}
rules:
  - {where: {pair: tiny, loss: jsd}, set: {learning_rate: 0.5, tags: [half]}}
  - {where: {loss: ce_pg, method: off_policy}, skip: true}
"""


def test_a_rule_sets_values_where_it_holds_or_leaves_the_point_out(tmp_path: Path):
    sweep = load(RULED, tmp_path)
    said = [(p.overrides["loss"], p.overrides["method"], p.tags) for p in sweep.points]
    assert said == [
        ("jsd", "hybrid", ("half",)),
        ("jsd", "off_policy", ("half",)),
        ("ce_pg", "hybrid", ()),
    ]
    # The pair's own rate where no rule holds; what tells points apart is an axis.
    assert [p.spec.optim.learning_rate for p in sweep.points] == [0.5, 0.5, 5e-3]
    assert sweep.axes["learning_rate"] == (0.5, 5e-3)
    assert all(id_of(" ".join(p.words)) == p.id for p in sweep.points)


def test_a_rule_looks_at_what_the_command_line_says_and_lies_below_it(tmp_path: Path):
    typed_rate = load(RULED, tmp_path, "learning_rate=0.25")
    assert {p.spec.optim.learning_rate for p in typed_rate.points} == {0.25}
    other_pair = load(RULED, tmp_path, "pair=smollm2_self")
    assert {p.spec.optim.learning_rate for p in other_pair.points} == {1e-5}
    assert set(other_pair.axes) == {"loss", "method"}
    with pytest.raises(ConfigError, match="its rules leave no point of what is asked"):
        load(RULED, tmp_path, "loss=ce_pg", "method=off_policy")


def test_an_axis_lies_above_a_rule_too(tmp_path: Path):
    sweep = load(RULED.replace("grid: {", "grid: {learning_rate: [0.1, 0.2], "), tmp_path)
    assert {p.spec.optim.learning_rate for p in sweep.points} == {0.1, 0.2}


def test_a_metric_alone_is_that_of_the_task_that_has_it(tmp_path: Path):
    file = FILE.replace("tiny_gen/exact_match", "exact_match").replace("suite: tiny", "suite: own")
    tiny = load(file, tmp_path).compare
    assert tiny is not None and tiny.metric == "tiny_gen/exact_match"
    other = load(file, tmp_path, "pair=qwen3_4b_30b").compare
    assert other is not None and other.metric == "gsm8k/exact_match"


def test_schedules_can_be_an_axis(tmp_path: Path):
    sweep = load("base: {pair: tiny}\ngrid: {lmbda: [0.5, [[0, 0], [1, 1]]]}", tmp_path)
    assert sweep.axes["lmbda"] == (0.5, ((0.0, 0.0), (1.0, 1.0)))


def test_variables_of_a_chat_template_can_be_an_axis(tmp_path: Path):
    """Each of its values has baselines and evaluations of its own."""
    values = "[{}, {enable_thinking: false}, {enable_thinking: true}]"
    file = f"base: {{pair: tiny}}\ngrid: {{chat_template_kwargs: {values}}}\nseeds: 2"
    written = load(f"{file}\neval: {{suite: tiny}}", tmp_path)
    assert written.axes["chat_template_kwargs"] == (
        {}, {"enable_thinking": False}, {"enable_thinking": True},
    )  # fmt: skip
    words = "chat_template_kwargs={},{enable_thinking: false},{enable_thinking: true}"
    said = load_sweep(None, ["pair=tiny", words, "seeds=2"], tmp_path)
    assert [p.id for p in said.points] == [p.id for p in written.points]
    rows = written.baselines
    assert len(rows) == 9 and all(len(row.groups) == 1 for row in rows)
    assert sorted(Counter(written.groups.values()).values()) == [2] * 3
    plain = load("base: {pair: tiny}\neval: {suite: tiny}", tmp_path)
    assert {r.directory for r in plain.baselines} < {r.directory for r in rows}


def test_five_e_minus_six_is_a_number(tmp_path: Path):
    sweep = load("base: {pair: tiny}\ngrid: {learning_rate: [5e-6, 1e-5]}", tmp_path)
    assert sweep.axes["learning_rate"] == (0.000005, 0.00001)


# ---- the command line


def test_a_typed_grid_is_the_same_points_as_its_file(tmp_path: Path):
    written = load(
        "base: {pair: tiny}\ngrid: {lmbda: [0, 0.5, 1], beta: [0, 1]}\nseeds: 3", tmp_path
    )
    for line in (
        "pair=tiny lmbda=0,0.5,1 beta=0,1 seeds=3",
        "--pair tiny --lmbda 0,0.5,1 --beta=0,1 --seeds 3",
        "seeds=0,1,2 method.lmbda=0,0.5,1.0 beta=range(0,2) --pair=tiny",
        "pair=tiny lmbda=0,0.5,1 beta=0,1 seed=0,1,2",
    ):
        sweep = typed(line)
        assert ids(sweep) == ids(written), line
        assert len(sweep.points) == 18
    assert sweep.file is None


def test_a_typed_grid_has_a_readable_name_that_follows_from_its_content():
    name = typed("pair=tiny lmbda=0,0.5,1 seeds=3").name
    assert name.startswith("tiny-lmbda-")
    assert name == typed("--seeds 3 lmbda=1,0.5,0 --pair tiny").name
    assert name != typed("pair=tiny lmbda=0,0.5 seeds=3").name
    assert name != typed("pair=tiny lmbda=0,0.5,1 seeds=3 limit=5").name


def test_a_typed_grid_is_scored_on_its_pairs_own_suite_unless_it_says_otherwise():
    def suite(line: str) -> str | None:
        found = typed(line).suite
        return found and found.suite_name

    assert suite("pair=tiny") == "tiny"
    assert suite("pair=smollm2_self") == "mcq5_perplexity"
    assert suite("pair=smollm2_self suite=gsm8k") == "gsm8k"
    assert suite("pair=qwen3_4b_30b") == suite("pair=qwen3_4b_30b suite=own") == "gsm8k"
    assert suite("pair=tiny suite=null") is None
    sweep = typed("pair=tiny --limit 5 pack=2")
    assert sweep.suite is not None
    assert (sweep.suite.limit, sweep.pack) == (5, 2)


FILE = """
base: {pair: tiny}
grid: {lmbda: [0, 1]}
points: [{name: p, lmbda: 0.5, beta: 0.5}]
seeds: 2
eval: {suite: tiny, pack: 4}
compare: {by: lmbda, metric: tiny_gen/exact_match, baseline: 0}
"""


def test_one_value_lies_on_top_of_base_and_of_points(tmp_path: Path):
    sweep = load(FILE, tmp_path, "beta=0.25")
    assert {point.spec.loss.beta for point in sweep.points} == {0.25}
    assert sweep.points[-1].overrides["beta"] == 0.25
    assert sweep.compare is not None


def test_a_word_for_an_axis_replaces_its_values(tmp_path: Path):
    file = "base: {pair: tiny}\ngrid: {lmbda: [0, 1], beta: [0, 1]}"
    assert load(file, tmp_path, "lmbda=0.25,0.75").axes == {"lmbda": (0.25, 0.75), "beta": (0, 1)}
    assert load(file, tmp_path, "lmbda=0.5").axes == {"lmbda": (0.5,), "beta": (0, 1)}
    assert {p.spec.method.lmbda for p in load(FILE, tmp_path, "lmbda=0.25").points} == {0.25}


def test_several_values_multiply_all_points_and_tell_names_apart(tmp_path: Path):
    sweep = load(FILE, tmp_path, "max_steps=5,6")
    assert len(sweep.points) == 2 * len(load(FILE, tmp_path).points)
    assert [point.name for point in sweep.points if point.name] == [
        "p-max_steps5-s0",
        "p-max_steps5-s1",
        "p-max_steps6-s0",
        "p-max_steps6-s1",
    ]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.sampled_from([0.125, 0.25, 0.375]), min_size=1, max_size=2, unique=True),
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=2, unique=True),
    st.lists(st.integers(0, 9), min_size=1, max_size=2, unique=True),
)
def test_a_word_of_several_values_is_the_union_of_its_single_values(
    tmp_path_factory: pytest.TempPathFactory,
    lmbdas: list[float],
    steps: list[int],
    seeds: list[int],
):
    def sweep(*words: str) -> Sweep:
        return load(FILE, tmp_path_factory.getbasetemp(), *words)

    together = sweep(
        "lmbda=" + ",".join(map(str, lmbdas)),
        "max_steps=" + ",".join(map(str, steps)),
        "seeds=[" + ",".join(map(str, seeds)) + "]",
    )
    apart = [
        ids(sweep(f"lmbda={lmbda}", f"max_steps={n}", f"seed={seed}"))
        for lmbda in lmbdas
        for n in steps
        for seed in seeds
    ]
    assert ids(together) == set().union(*apart)
    assert len(together.points) == sum(map(len, apart))


def test_seeds_typed_replace_seeds_written(tmp_path: Path):
    for words, seeds in (("seeds=3", {0, 1, 2}), ("seed=7", {7}), ("--seeds 4,5", {4, 5})):
        sweep = load(FILE, tmp_path, *words.split())
        assert {point.overrides["seed"] for point in sweep.points} == seeds
    own = "base: {pair: tiny}\npoints: [{beta: 0, seed: 1}, {beta: 1, seed: 2}]"
    assert [point.overrides["seed"] for point in load(own, tmp_path).points] == [1, 2]
    assert [point.overrides["seed"] for point in load(own, tmp_path, "seed=7").points] == [7, 7]


def test_a_comparison_that_the_command_line_took_apart_is_dropped(tmp_path: Path):
    for word in ("lmbda=0.25", "suite=gsm8k", "suite=null"):
        assert load(FILE, tmp_path, word).compare is None
    assert load(FILE, tmp_path, "lmbda=0,0.75").compare is not None


def test_a_flag_for_a_group_takes_several_values_too(tmp_path: Path):
    sweep = load(FILE, tmp_path, "--quant-type", "int4,bnb_fp4")
    assert sweep.axes["quant"] == ("int4", "bnb_fp4")


def test_a_name_typed_for_one_point_is_its_name():
    assert typed("pair=tiny --name mine").points[0].name == "mine"
    assert [point.name for point in typed("pair=tiny name=mine seeds=2").points] == [
        "mine-s0",
        "mine-s1",
    ]


# ---- what is refused

TINY = "base: {pair: tiny}\n"
EVAL = "eval: {suite: tiny}\n"
BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "empty; a sweep file is a mapping of question, base, grid"),
    "only a comment": ("# nothing\n", "empty"),
    "one word": ("hello", "not a mapping"),
    "one number": ("5", "not a mapping"),
    "a list": ("- a\n- b", "not a mapping"),
    "not YAML": ("grid: {lmbda: [0, 1}\n", "line 1: not YAML"),
    "bytes": (b"\xff\xfe\x00\x01", "not YAML"),
    "a zero byte": ("a: \x00", "not YAML"),
    "too deep": ("[" * 1500, "not YAML"),
    "a key twice": (TINY + TINY, "line 2: not YAML that can be meant (found duplicate key base)"),
    "an interpolation": ("question: ${nowhere}", "${…} is not filled in; write what it stands"),
    "somebody's environment": (TINY + "question: '${oc.env:HOME}'\n", "line 2: not YAML that can"),
    "base 8": (
        "base: {pair: tiny, max_steps: 010}",
        "line 1: not YAML that can be meant (010 is a",
    ),
    "base 60": ("base: {pair: tiny, max_steps: 1:30}", "(1:30 is a number in another base"),
    "base 16": ("base: {pair: tiny, seed: 0x1F}", "(0x1F is a number in another base"),
    "a commit that reads as a number": (
        "base: {pair: tiny, student_revision: 12e4}",
        "pair.student_revision = 120000.0: input should be a valid string; text that reads as a",
    ),
    "an unknown key": ("gird: {}\n" + TINY, 'no key "gird"'),
    "an unknown key, nearest": ("gird: {}\n" + TINY, 'Did you mean "grid"?'),
    "an unknown knob in base": ("base: {lmda: 0}", 'base: no knob "lmda". Did you mean "lmbda"?'),
    "an unknown knob in grid": (TINY + "grid: {lmda: [0]}", 'grid: no knob "lmda"'),
    "an unknown knob in a point": (TINY + "points: [{}, {lmda: 0}]", 'points[1]: no knob "lmda"'),
    "an unknown key of eval": (TINY + "eval: {suite: tiny, pak: 1}", 'Did you mean "pack"?'),
    "an unknown key of compare": (TINY + "compare: {buy: a}", 'Did you mean "by"?'),
    "an unknown key of site": (TINY + "site: {max_paralel: 1}", 'Did you mean "max_parallel"?'),
    "a knob of training in site": (TINY + "site: {lmbda: 1}", 'site: no key "lmbda"'),
    "one knob twice": (TINY + "grid: {quant: [int4], quant_type: [none]}", "quant is given twice"),
    "an axis that is not a list": (
        TINY + "grid: {lmbda: 0.5}",
        "grid: lmbda is not a list. Did you mean lmbda: [0.5]?",
    ),
    "a group's axis that is not a list": (TINY + "grid: {quant: int4}", "quant: [int4]?"),
    "an empty axis": (TINY + "grid: {lmbda: []}", "grid: lmbda has no values"),
    "a value twice": (TINY + "grid: {learning_rate: [1e-5, 0.00001]}", "one value twice"),
    "zero twice": (TINY + "grid: {lmbda: [0, 0.0]}", "one value twice: 0 and 0"),
    "a value in another type": (TINY + "grid: {lmbda: [0.5, '0.5']}", "two points are the same"),
    "a grid that is a list": (TINY + "grid: [lmbda]", "grid = ['lmbda']"),
    "points that are a mapping": (TINY + "points: {lmbda: 1}", "points = {'lmbda': 1}"),
    "a point twice": (TINY + "points: [{beta: 0}, {name: b, beta: 0}]", "two points are the same"),
    "a point twice, named": (TINY + "points: [{beta: 0}, {name: b, beta: 0.0}]", '"b" (beta=0'),
    "a point of the grid again": (TINY + "grid: {beta: [0, 1]}\npoints: [{beta: 1}]", "the same"),
    "an axis that trains nothing new": (
        TINY + "grid: {score_steps: [0, 5]}",
        "score_steps does not change what is trained",
    ),
    "a site that differs": (TINY + "points: [{max_parallel: 1}]", "put it in site:"),
    "a name twice": (
        TINY + "points: [{name: a, beta: 0}, {name: a, beta: 1}]",
        'two points are named "a"',
    ),
    "a name for all": ("base: {pair: tiny, name: a}\ngrid: {beta: [0, 1]}", 'named "a"'),
    "a name that is a path": (TINY + "points: [{name: ../a}]", "name '../a': a name is of letters"),
    "tags that are a word": ("base: {pair: tiny, tags: lr}", "Did you mean tags: [lr]?"),
    "an invalid value": (
        TINY + "grid: {lmbda: [0, 2]}\nseeds: 2",
        "point lmbda=2 seed=0: method.lmbda = 2: the values of this schedule lie in [0, 1]",
    ),
    "an invalid value in a named point": (
        TINY + "points: [{name: high, lmbda: 2}]",
        'point "high" (lmbda=2): method.lmbda = 2',
    ),
    "an unknown option": (TINY + "grid: {quant: [int4, int5]}", 'no "int5" in conf/quant'),
    "an option that is no word": (TINY + "grid: {quant: [int4, 5]}", "quant names a file"),
    "an unknown pair": ("base: {pair: tyni}", 'Did you mean "tiny"?'),
    "values that do not fit": (TINY + "grid: {micro_batch: [7]}", "micro_batch 7 must divide"),
    "a data path that only the user knows": ("base: {data: local}", "data_path=FILE"),
    "seeds 0": (TINY + "seeds: 0", "seeds = 0: say how many"),
    "seeds below 0": (TINY + "seeds: -1", "seeds = -1"),
    "seeds that are a word": (TINY + "seeds: many", "seeds = 'many'"),
    "seeds that are true": (TINY + "seeds: true", "seeds = True"),
    "seeds half": (TINY + "seeds: 1.5", "seeds = 1.5"),
    "a seed twice": (TINY + "seeds: [1, 1]", "seeds has one value twice"),
    "a seed below 0": (TINY + "seeds: [1, -1]", "seeds = [1, -1]"),
    "no seeds": (TINY + "seeds: []", "seeds has no values"),
    "seeds and a seed": ("base: {pair: tiny, seed: 1}\nseeds: 2", "seeds and seed are both given"),
    "seeds and a point's seed": (TINY + "seeds: 2\npoints: [{seed: 1}]", "its own seed beside"),
    "an unknown suite": (TINY + "eval: {suite: tyni}", 'Did you mean "tiny"?'),
    "eval without a suite": (TINY + "eval: {pack: 2}", "eval.suite is missing"),
    "eval that is a word": (TINY + "eval: tiny", "eval = 'tiny': input should be a dictionary"),
    "pack 0": (TINY + "eval: {suite: tiny, pack: 0}", "eval.pack = 0"),
    "limit 0": (TINY + "eval: {suite: tiny, limit: 0}", "eval.limit = 0"),
    "an unknown baseline": (TINY + "eval: {suite: tiny, baselines: [me]}", "'teacher', 'student'"),
    "compare by no axis": (
        TINY + EVAL + "grid: {beta: [0, 1]}\ncompare: {by: lmbda, metric: m, baseline: 0}",
        "compare.by = lmbda: not an axis of this sweep (beta)",
    ),
    "compare by no knob": (
        TINY + EVAL + "grid: {beta: [0, 1]}\ncompare: {by: betta, metric: m, baseline: 0}",
        'Did you mean "beta"?',
    ),
    "compare what is not scored": (
        TINY
        + EVAL
        + "grid: {beta: [0, 1]}\ncompare: {by: beta, metric: tiny_gen/acc, baseline: 0}",
        "suite tiny has tiny_gen/exact_match, tiny_mc/acc",
    ),
    "compare without eval": (
        TINY + "grid: {beta: [0, 1]}\ncompare: {by: beta, metric: a/b, baseline: 0}",
        "nothing is scored",
    ),
    "compare with no value of the axis": (
        TINY
        + EVAL
        + "grid: {beta: [0, 1]}\ncompare: {by: beta, metric: tiny_mc/acc, baseline: 0.5}",
        "compare.baseline = 0.5: not a value of beta (0, 1)",
    ),
    "compare without a baseline": (
        TINY + EVAL + "grid: {beta: [0, 1]}\ncompare: {by: beta, metric: tiny_mc/acc}",
        "compare.baseline is missing",
    ),
    "a question that is a number": ("question: 5\n" + TINY, "question = 5"),
    "rules that are a mapping": (TINY + "rules: {where: {}}", "rules = {'where': {}}"),
    "a rule without where": (TINY + "rules: [{skip: true}]", "rules.0.where is missing"),
    "an unknown key of a rule": (TINY + "rules: [{were: {pair: tiny}}]", 'Did you mean "where"?'),
    "a rule that says nothing": (
        TINY + "rules: [{where: {pair: tiny}}]",
        "rules[0]: a rule has where: {…} and either set: {…} or skip: true",
    ),
    "a rule that sets and skips": (
        TINY + "rules: [{where: {pair: tiny}, set: {beta: 0}, skip: true}]",
        "either set: {…} or skip: true",
    ),
    "a rule for all": (TINY + "rules: [{where: {}, set: {beta: 0}}]", "a rule has where: {…}"),
    "a rule about what nobody says": (
        TINY + "rules: [{where: {loss: jsd}, set: {beta: 0}}]",
        "rules[0].where: loss is not set by base, grid or points",
    ),
    "a rule about no option": (
        TINY + "rules: [{where: {pair: tyni}, set: {beta: 0}}]",
        "rules[0].where: no 'tyni' in conf/pair. Did you mean \"tiny\"?",
    ),
    "a rule about no knob": (
        TINY + "rules: [{where: {bet: 0}, skip: true}]",
        'Did you mean "beta"',
    ),
    "a rule that sets no knob": (
        TINY + "rules: [{where: {pair: tiny}, set: {bet: 0}}]",
        'rules[0].set: no knob "bet"',
    ),
    "a rule that sets a site": (
        TINY + "rules: [{where: {pair: tiny}, set: {max_parallel: 1}}]",
        "put it in site:",
    ),
    "a rule that sets what cannot be": (
        TINY + "rules: [{where: {pair: tiny}, set: {beta: 2}}]",
        "point beta=2: loss.beta = 2",
    ),
    "runs in the file": ("base: {pair: tiny, runs: here}", "use --runs DIR"),
    "millions of points": (TINY + "seeds: 3000000", "3,000,000 points; at most 100,000"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_it(case: str, tmp_path: Path):
    content, reason = BAD_FILES[case]
    with pytest.raises(ConfigError) as refused:
        load(content, tmp_path)
    message = str(refused.value)
    assert reason in message
    assert message.startswith(str(tmp_path / "a_sweep.yaml"))
    assert "\n" not in message


BAD_WORDS = {
    "lmda=0": 'no knob "lmda". Did you mean "lmbda"?',
    "--lmda 0": 'no knob "lmda"',
    "seds=2": 'Did you mean "seeds"?',
    "lmbda=0,0.0": "lmbda has one value twice",
    "lmbda=interval(0,1)": "a grid needs a list",
    "beta=2": "loss.beta = 2",
    "pack=0": "eval.pack = 0",
    "suite=tyni": 'Did you mean "tiny"?',
    "limit=all": "eval.limit = 'all'",
    "seeds=x": "command line: seeds = 'x'",
    "seeds=2 seed=1": "seeds and seed are both given",
    "tags=a,b": "tags is not a list",
    "max_parallel=1,2": "put it in site:",
    "output_dir=x": "use --runs DIR",
    "lmbda": "neither KEY=VALUE nor a flag",
    "--seeds": "--seeds needs a value",
}


@pytest.mark.parametrize("line", BAD_WORDS)
def test_a_bad_word_is_refused_in_one_line(line: str, tmp_path: Path):
    with pytest.raises(ConfigError) as refused:
        load(FILE, tmp_path, *line.split())
    assert BAD_WORDS[line] in str(refused.value)
    assert "command line" in str(refused.value) or "a_sweep.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_told_its_nearest(tmp_path: Path):
    (tmp_path / "quickstart.yaml").write_text(TINY)
    with pytest.raises(ConfigError, match='no such sweep file. Did you mean "quickstart.yaml"'):
        load_sweep(str(tmp_path / "quickstrat.yaml"), [], tmp_path)
    with pytest.raises(ConfigError, match="no such sweep file"):
        load_sweep(str(tmp_path), [], tmp_path)


def test_ten_megabytes_are_refused_before_they_are_read(tmp_path: Path):
    file = tmp_path / "big.yaml"
    file.write_text(TINY + "question: " + "x" * 10_000_000)
    begin = time.process_time()
    with pytest.raises(ConfigError, match=r"10.0 MB; a sweep file has at most 1 MB"):
        load_sweep(str(file), [], tmp_path)
    assert time.process_time() - begin < 0.1


def test_nothing_asked_is_refused():
    with pytest.raises(ConfigError, match="give a sweep file, or a grid"):
        load_sweep(None, [], Path("runs"))


# ---- speed and identity


def test_points_of_a_grid_are_those_that_train_py_would_make():
    sweep = typed("pair=tiny lmbda=0,0.5 quant=int4,none method=gkd,hybrid seeds=2")
    for point in sweep.points:
        words = [f"{key}={value}" for key, value in point.overrides.items()]
        assert point.id == id_of(" ".join(["pair=tiny", *words]))


TEN_THOUSAND = """
from pathlib import Path
from stillhouse import compose
from stillhouse.sweep.grid import load_sweep
ten = ",".join(str(i / 10) for i in range(10))
rates = ",".join(f"{i}e-5" for i in range(1, 11))
words = ["pair=tiny", f"learning_rate={rates}", f"beta={ten}", f"lmbda={ten}", "seeds=10"]
sweep = load_sweep(None, words, Path("runs"))
print(len(sweep.points), len({p.id for p in sweep.points}), compose._composed.cache_info().misses)
"""


def test_the_digits_of_a_commit_are_no_infinite_number(tmp_path: Path):
    (tmp_path / "s.yaml").write_text("base: {pair: tiny, student_revision: 1234e567}")
    (point,) = load_sweep(str(tmp_path / "s.yaml"), [], tmp_path / "runs").points
    assert point.spec.pair.student_revision == "1234e567"


def test_ten_thousand_points_are_checked_and_hydra_composes_a_handful_of_times():
    # In a process of its own: here every call is type-checked, which takes three times as long. Its
    # time is in docs/benchmarks.md (`plan` of 10,000 points); Hydra alone would need 12 minutes.
    done = subprocess.run(
        [sys.executable, "-c", TEN_THOUSAND], capture_output=True, text=True, check=True
    )
    points, distinct, composed = map(int, done.stdout.split())
    assert (points, distinct) == (10_000, 10_000)
    assert composed <= 3


def test_adding_a_value_to_an_axis_adds_only_its_own_points():
    before, after = typed("pair=tiny lmbda=0,1 seeds=2"), typed("pair=tiny lmbda=0,0.5,1 seeds=3")
    assert ids(before) < ids(after)


def test_specs_of_points_differ_from_one_another_only_in_what_their_overrides_say():
    sweep = typed("pair=tiny lmbda=0,1 beta=0,1 seeds=2")
    first = to_plain(sweep.points[0].spec)
    for point in sweep.points:
        for section, leaves in to_plain(point.spec).items():
            for leaf, value in leaves.items():
                assert value == first[section][leaf] or leaf in {"lmbda", "beta", "seed"}


# ---- a pair of one's own


def test_a_sweep_may_name_weights_where_others_name_a_pair(tmp_path: Path):
    base = "base: {student: models/small, teacher: models/large, data: local, data_path: a.jsonl}\n"
    sweep = load(f"{base}grid: {{lmbda: [0, 1]}}\neval: {{suite: mcq5}}\n", tmp_path)
    words = "student=models/small teacher=models/large data=local data_path=a.jsonl"
    assert ids(sweep) == {id_of(f"{words} lmbda={lmbda}") for lmbda in (0, 1)}
    assert {point.slug for point in sweep.points} == {"small-gkd"}
    line = typed(f"{words} lmbda=0,1 seeds=1 suite=null")
    assert line.name.startswith("small-lmbda-")
    whole = load("grid: {student: [models/a, models/b]}\nbase: {teacher: models/t}\n", tmp_path)
    assert [point.slug for point in whole.points] == ["a-gkd", "b-gkd"]


def test_a_pod_is_told_of_a_pair_that_no_file_of_conf_describes(tmp_path: Path):
    base = "{student: models/small, teacher: models/large, student_dtype: float32, vocab_size: 99}"
    point = load(f"base: {base}\n", tmp_path).points[0]
    assert id_of(" ".join(point.words)) == point.id
    assert from_json(as_json(point.spec), TrainSpec).pair == point.spec.pair
