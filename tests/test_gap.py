"""Test that rollouts come from the function that is trained, and that a run that differs ends.

The error states the numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse import entrypoints
from stillhouse.distill.gap import Drawn, Gap, check, numbers, watched
from stillhouse.distill.objectives import PolicyGradient, evaluate_
from stillhouse.distill.rollouts import Completions
from stillhouse.distill.run import Run
from stillhouse.errors import ConfigError, Diverged
from stillhouse.rundir import Runs
from stillhouse.stop import StopFlag
from tests.builders.cheap import cheap


def make(runs: Path, *words: str) -> Run:
    spec = cheap(runs, *words)
    return Run(spec, Runs(runs).of(spec), StopFlag())


def test_the_numbers_are_those_of_two_rows_by_hand():
    gap = Gap()
    gap.add(
        torch.tensor([-1.0, -1.9, -3.2], dtype=torch.float64),
        Completions([[5, 6], [7], [8]], [True] * 3, [[-1.1, -2.0], [-3.0], []], [0, 0, 1]),
    )
    # d is 0.1, 0.1 in the first row and -0.2 in the second; nobody drew the third.
    r = [math.exp(0.1), math.exp(0.1), math.exp(-0.2)]
    rows = [math.exp(0.2), math.exp(-0.2)]
    assert numbers(gap.sums, gap.largest) == pytest.approx(
        {
            "rollout/gap_mean": 0.4 / 3,
            "rollout/gap_max": 0.2,
            "rollout/gap_k3": (sum(r) - 3) / 3,
            "rollout/ess": sum(r) ** 2 / (3 * sum(x * x for x in r)),
            "rollout/ess_sequence": sum(rows) ** 2 / (2 * sum(x * x for x in rows)),
        }
    )
    assert numbers(Gap().sums, 0.0) == {}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_of_the_processed_distribution(temperature):
    torch.manual_seed(0)
    logits_NV, target_N = torch.randn(9, 7) * 3, torch.randint(2, 7, (9,))
    is_endless_N = torch.arange(9) % 3 == 0
    drawn = Drawn(temperature, [0, 1], is_endless_N)
    score = watched(lambda rows: logits_NV[rows], drawn, target_N)
    assert torch.equal(torch.cat([score(slice(0, 4)), score(slice(4, 9))]), logits_NV)
    expected_NV = logits_NV.double() / temperature
    expected_NV[is_endless_N, :2] = -torch.inf
    expected_N = expected_NV.log_softmax(1).gather(1, target_N[:, None]).squeeze(1)
    torch.testing.assert_close(drawn.seen_N(), expected_N, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        ["method=on_policy_gkd", "temperature=0.7", "min_new_tokens=3", "loss_temperature=2"],
        ["method=on_policy_gkd", "lora_dropout=0.3", "micro_batch=2"],
        ["method=teacher_seeded", "seed_tokens=3", "loss=ce_pg", "min_new_tokens=4"],
        ["method=mixture", "off_policy_source=teacher", "loss=ce_pg"],
    ],
    ids=["processed", "dropout", "seeded", "teacher"],
)
def test_every_step_finds_what_it_drew_to_be_what_it_trains(tmp_path, words):
    run = make(tmp_path, *words)
    for step in range(2):
        metrics = run.loop.gradients(step)
        run.loop.update(step)
        assert 0 < metrics["rollout/gap_mean"] < 1e-5
        assert metrics["rollout/gap_mean"] <= metrics["rollout/gap_max"] < 1e-4
        assert metrics["rollout/ess"] == pytest.approx(1, abs=1e-4)
        assert metrics["rollout/ess_sequence"] == pytest.approx(1, abs=1e-4)
        assert abs(metrics["rollout/gap_k3"]) < 1e-6
        assert ("rollout/teacher_gap" in metrics) == ("off_policy_source=teacher" in words)
        if "off_policy_source=teacher" in words:
            assert metrics["rollout/teacher_gap"] < 1e-5


def test_of_old_rollouts_only_the_staleness_is_known(tmp_path):
    run = make(tmp_path, "method=replay_buffer", "replay_injection=0")
    for step in range(6):
        metrics = run.loop.gradients(step)
        run.loop.update(step)
        assert ("rollout/gap_mean" in metrics) == (metrics["rollout/staleness"] == 0)


def test_a_capped_ratio_counts_so_often_and_the_share_of_such_tokens_is_logged(tmp_path):
    run = make(tmp_path, "method=on_policy_gkd", "loss=ce_pg", "ratio_cap=1.5")
    metrics = run.loop.gradients(0)
    assert metrics["train/ratio_capped"] == 0, "just drawn, all ratios are 1"
    logits_NV = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    teacher_NV, target_N = logits_NV.roll(1, 0), torch.tensor([0, 1, 2, 3, 4, 0])
    log_p_N = logits_NV.log_softmax(1).gather(1, target_N[:, None]).squeeze(1)
    log_q_N = teacher_NV.log_softmax(1).gather(1, target_N[:, None]).squeeze(1)
    sampled_N = log_p_N - torch.tensor([0.0, 0.1, 1.0, 2.0, -1.0, 0.4])
    objective = PolicyGradient(sampled_N, 9.0, 1.5)
    work = logits_NV.clone()
    stats, _ = evaluate_(objective, work, teacher_NV, target_N, 1.0, True)
    ratio_N = torch.tensor([1, math.exp(0.1), 1.5, 1.5, math.exp(-1), math.exp(0.4)])
    advantage_N = log_q_N - sampled_N
    torch.testing.assert_close(stats.loss, -advantage_N * ratio_N)
    push_N1 = (advantage_N * ratio_N)[:, None]
    hot_NV = torch.nn.functional.one_hot(target_N, 5)
    torch.testing.assert_close(work, push_N1 * (logits_NV.softmax(1) - hot_NV))
    assert sum(objective.capped) == 2


def stale(run: Run) -> None:
    """Let the student write with the weights of its first rollout from then on."""
    engine = run.roles.engine
    engine.refold()
    engine.refold = lambda: None


def test_a_writer_that_misses_an_update_ends_the_run_with_the_numbers(tmp_path, monkeypatch):
    spec = cheap(tmp_path, "method=on_policy_gkd", "learning_rate=0.02", "max_steps=4")
    load = Run.__init__

    def begin(self: Any, *args: Any) -> None:
        load(self, *args)
        stale(self)

    monkeypatch.setattr(Run, "__init__", begin)
    with pytest.raises(Diverged, match=r"step 1: the student's tokens.*gap_mean 0\.\d+.*ess ") as e:
        entrypoints.train(spec)
    assert e.value.exit_code == 43
    assert "allowed 0.001 (max_rollout_gap)" in str(e.value)
    run = Runs(tmp_path).of(spec)
    assert [m["step"] for m in run.metrics()] == [0]
    saved = json.loads((run.path / "diverged.json").read_text())
    assert saved["step"] == 1 and float(saved["metrics"]["rollout/gap_mean"]) > 0.001


def test_a_bound_is_by_dtype_unless_it_is_given_and_never_below_rounding(tmp_path):
    plain, half = cheap(tmp_path), cheap(tmp_path, "mixed_precision=bf16")
    wide = cheap(tmp_path, "max_rollout_gap=0.5")
    for spec, bound in ((plain, 1e-3), (half, 0.2), (wide, 0.5)):
        check(spec, 3, {"rollout/gap_mean": bound}, "student")
        with pytest.raises(Diverged, match="nats per token, allowed"):
            check(spec, 3, {"rollout/gap_mean": bound * 1.01}, "student")
        with pytest.raises(Diverged):
            check(spec, 3, {"rollout/gap_mean": math.nan}, "student")
    with pytest.raises(
        ConfigError, match=r"max_rollout_gap 1e-06 is below the rounding of float32"
    ):
        cheap(tmp_path, "max_rollout_gap=1e-6")
