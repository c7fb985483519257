"""Test published sweeps: ids of files, lines, baselines and eval questions, and what they ask.

`golden/ids.json` was written at the commit that it names. A new knob must not change any of it
(AS_BEFORE in identity.py). A line is only ever added, for a new sweep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.cli import main
from stillhouse.compose import compose, from_command_line, options_of
from stillhouse.identity import as_before, eval_id, point_id, score_key
from stillhouse.preflight_rules import key_of
from stillhouse.spec import EvalSpec, TrainSpec
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.sweep_file import Compare
from tests.builders.published import CLIFF, EVAL, TRAIN, flags_of, lines, name_of

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "ids.json").read_text())
SWEEPS = Path(__file__).parent.parent / "sweeps"
# Of README.md and docs/, what trains and is not in published.py.
SHOWN = (
    "--pair tiny --lmbda 0.5 --learning-rate 5e-3",
    "--pair tiny --beta 1",
    "--pair tiny --beta 1 --max-steps 500",
    "--pair smollm2_self --lmbda 1 --do-eval --eval-steps 15 --score-steps 10",
)


@cache
def whole(name: str) -> Sweep:
    """The sweep of a published file, as it stands."""
    return load_sweep(str(SWEEPS / f"{name}.yaml"), [], Path("runs"))


def ids(sweep: Sweep) -> set[str]:
    return {point.id for point in sweep.points}


def held(sweep: Sweep) -> dict[str, Any]:
    """What a sweep's files on disk are called by."""
    suite = sweep.suite
    return {
        "points": " ".join(point.id for point in sweep.points),
        "baselines": [row.directory.name for row in sweep.baselines],
        "scores": {t.task: score_key(suite, t) for t in suite.tasks} if suite else {},
    }


def trained(line: Sequence[str]) -> str:
    return point_id(compose(from_command_line([*line], TrainSpec), TrainSpec))


def looked_at(line: Sequence[str]) -> str:
    return key_of(compose(from_command_line([*line], TrainSpec), TrainSpec))


def scored(line: Sequence[str]) -> str:
    return eval_id(compose(from_command_line([*line], EvalSpec), EvalSpec))


@pytest.mark.parametrize("name", GOLDEN["sweeps"])
def test_the_points_of_a_published_sweep_keep_their_ids(name: str) -> None:
    sweep = whole(name)
    assert sweep.name == name
    assert held(sweep) == GOLDEN["sweeps"][name]


@pytest.mark.parametrize("name", GOLDEN["sweeps"])
def test_a_sweep_file_asks_a_question_that_it_can_answer(name: str) -> None:
    sweep, file = whole(name), SWEEPS / f"{name}.yaml"
    assert len(sweep.points) == len(ids(sweep))
    assert file.read_text().startswith("# ")
    assert sweep.question and sweep.question.endswith("?")
    if name.startswith("zoo"):  # a pair is one observation there, and preflights are compared
        assert len({(p.spec.pair.pair_name, p.spec.pair.pair_seed) for p in sweep.points}) >= 12
        return
    if name not in ("real_quantisers", "real_axes"):  # one seed each, as the files say
        assert len({point.overrides["seed"] for point in sweep.points}) >= 3
    if sweep.suite is None:  # it chooses something, so it must not see the test problems
        assert all(point.spec.monitor.accuracy_steps for point in sweep.points)
        return
    assert sweep.compare is not None
    assert len(sweep.axes[sweep.compare.by]) > 1


def test_a_published_line_trains_and_scores_what_it_did() -> None:
    assert [trained(flags_of(line)) for line in lines(TRAIN)] == GOLDEN["train"]
    assert [trained(line.split()) for line in SHOWN] == GOLDEN["shown"]
    assert [looked_at(line.split()) for line in SHOWN] == GOLDEN["verdicts"]
    assert [scored(flags_of(line)) for line in lines(EVAL)] == GOLDEN["eval"]


def test_every_sweep_file_is_held() -> None:
    assert sorted(GOLDEN["sweeps"]) == sorted(file.stem for file in SWEEPS.glob("*.yaml"))


def test_a_knob_that_came_later_is_content_only_where_it_says_something_new() -> None:
    assert as_before("rollout", {"horizon": 1, "temperature": 1.0}) == {"temperature": 1.0}
    assert as_before("rollout", {"horizon": 0.5}) == {"horizon": 0.5}
    assert as_before("rollout", {}) == as_before("rollout", {"horizon": 1})
    assert as_before("optim", {"horizon": 1}) == {"horizon": 1}


# ---- what the files ask


def test_the_null_sweep_asked_about_beta_has_the_same_points():
    by_lmbda, by_beta = (whole(name) for name in ("null", "null_beta"))
    assert ids(by_lmbda) == ids(by_beta)
    assert by_lmbda.suite == by_beta.suite


def test_the_cliff_compares_each_method_within_each_family_at_its_rate():
    sweep = whole("cliff")
    methods = {
        family: [p.overrides["method"] for p in sweep.points if p.overrides["loss"] == family]
        for family in ("ce_pg", "jsd")
    }
    everywhere = set(options_of("method")) - {"gkd", "off_policy", "sft"}
    assert set(methods["ce_pg"]) == everywhere | {"sft"}
    assert set(methods["jsd"]) == everywhere | {"off_policy"}
    assert {len(points) for points in methods.values()} == {11 * 8}
    rates = {(p.overrides["loss"], p.spec.optim.learning_rate) for p in sweep.points}
    assert rates == {("ce_pg", 2e-3), ("jsd", 2e-3)}, "as sweeps/cliff_rate.yaml found"
    assert sweep.compare == Compare("method", "tiny_gen/exact_match", "on_policy_gkd")


def test_the_cliff_on_the_published_pairs_has_their_one_rate_and_their_problems():
    words = ["pair=qwen3_4b_30b,llama_8b_70b", "seeds=1"]
    sweep = load_sweep(str(SWEEPS / "cliff.yaml"), words, Path("runs"))
    assert len(sweep.points) == 2 * 22
    assert {p.spec.optim.learning_rate for p in sweep.points} == {5e-5}
    assert set(sweep.axes) == {"pair", "loss", "method"}
    assert {p.spec.data.data_name for p in sweep.points} == {"gsm8k"}
    assert sweep.compare == Compare("method", "gsm8k/exact_match", "on_policy_gkd")


def test_the_cliff_renders_for_a_published_pair(capsys: pytest.CaptureFixture[str]):
    words = ["pair=llama_8b_70b", "seeds=1", "--backend", "cluster", "--dry-run"]
    assert main(["run", str(SWEEPS / "cliff.yaml"), *words]) == 0
    jobs = [*yaml.safe_load_all(capsys.readouterr().out)]
    kinds = [job["metadata"]["labels"]["app.kubernetes.io/component"] for job in jobs]
    assert kinds.count("train") == 22


def test_the_cliffs_published_lines_are_lines_of_the_sweep_as_the_findings_say():
    findings = (SWEEPS.parent / "docs" / "findings.md").read_text()
    words_of = dict(re.findall(r"^\| `(--[^`]+)` \| `([^`]+)` \|$", findings, re.M))
    asked = {
        line: [words_of[f"--{flag.strip()}"] for flag in line.split(" --")[1:]]
        for line in lines(CLIFF)
    }
    sweeps = [
        load_sweep(str(SWEEPS / "cliff.yaml"), words, Path("runs")) for words in asked.values()
    ]
    found = [
        (
            {p.spec.pair.pair_name for p in sweep.points},
            {p.overrides["seed"] for p in sweep.points},
            len(sweep.axes["method"]),
        )
        for sweep in sweeps
    ]
    assert found == [
        ({"qwen3_4b_30b"}, {*range(10)}, 12),
        ({"llama_8b_70b"}, {*range(10)}, 12),
        ({"tiny"}, {*range(3)}, 12),
        ({"tiny"}, {*range(8)}, 2),
    ]
    assert sweeps[3].axes["method"] == ("teacher_seeded", "on_policy_gkd")
    assert sweeps[3].compare is not None


def test_the_published_runs_are_points_of_the_sweeps_with_their_tags():
    points = {
        (sweep.name, point.id): point
        for sweep in (whole(path.stem) for path in SWEEPS.glob("*.yaml"))
        for point in sweep.points
    }
    sweep_of = {
        "lmbda_1_int4": "quantiser",
        "lmbda_0_int4": "quantiser",
        "lmbda_1_bnb_fp4": "quantiser",
        "lmbda_0_bnb_fp4": "quantiser",
        "lmbda0_lr5e6": "lr_lmbda0",
        "lmbda0_lr1e5": "lr_lmbda0",
        "lmbda0_lr2e5": "lr_lmbda0",
        "lmbda0_lr5e5": "lr_lmbda0",
        "lmbda0_beta0": "beta",
        "lmbda0_bs16": "batch",
        "lmbda0_bs32": "batch",
        "lmbda0_wd01": "weight_decay",
        "lmbda0_bs16_lr2e5": "lr_batch",
        "lmbda0_bs16_lr5e5": "lr_batch",
        "lmbda0_bs32_lr5e5": "lr_batch",
        "lmbda0_warmup05": "warmup",
        "lmbda0_warmup10": "warmup",
        "lmbda1_tok256": "rollout_length",
        "lmbda1_tok512": "rollout_length",
        "lmbda1_bs16": "batch",
        "lmbda1_bs32": "batch",
    }
    run_of = {name_of(line): line for line in lines(TRAIN) if line.startswith("k8s/")}
    for name, sweep in sweep_of.items():
        spec = compose(from_command_line(flags_of(run_of[name]), TrainSpec), TrainSpec)
        point = points[sweep, point_id(spec)]
        assert point.tags == spec.place.tags
    # In no grid: λ = 0.5 stands alone, and two β runs were laid out as 2 × 4 to fit a memory.
    assert set(run_of) - set(sweep_of) == {"lmbda_05_int4", "lmbda0_beta05", "lmbda1_beta05"}


def test_two_files_that_share_a_point_train_it_once():
    batch = whole("batch")
    crossed = whole("lr_batch")
    shared = [point for point in batch.points if point.id in ids(crossed)]
    assert {point.name for point in shared} == {
        f"lmbda0_bs{batch}-s{seed}" for batch in (16, 32) for seed in (42, 43, 44)
    }
