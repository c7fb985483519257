"""Test that published ids stay the same: of files and lines, baselines, and eval questions.

`golden/ids.json` was written at the commit that it names. A new knob must not change any of it
(AS_BEFORE in identity.py). A line is only ever added, for a new sweep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stillhouse.compose import compose, from_command_line
from stillhouse.identity import as_before, eval_id, point_id, score_key
from stillhouse.preflight_rules import key_of
from stillhouse.spec import EvalSpec, TrainSpec
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep
from tests.builders.published import EVAL, TRAIN, flags_of, lines

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "ids.json").read_text())
SWEEPS = Path(__file__).parent.parent / "sweeps"
# Of README.md and docs/, what trains and is not in published.py.
SHOWN = (
    "--pair tiny --lmbda 0.5 --learning-rate 5e-3",
    "--pair tiny --beta 1",
    "--pair tiny --beta 1 --max-steps 500",
    "--pair smollm2_self --lmbda 1 --do-eval --eval-steps 15 --score-steps 10",
)


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
    sweep = load_sweep(str(SWEEPS / f"{name}.yaml"), [], Path("runs"))
    assert held(sweep) == GOLDEN["sweeps"][name]


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
