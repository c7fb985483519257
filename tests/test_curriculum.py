"""Test which prompts a step uses: epochs, cold-start prompts, best-ranked ones, other kinds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.compose import compose, from_command_line
from stillhouse.distill.curriculum import Choice
from stillhouse.distill.encoded import Example
from stillhouse.distill.rollouts import permutation
from stillhouse.errors import ConfigError
from stillhouse.spec import TrainSpec

STEPS, BATCH = 10, 4


def spec(*words: str) -> TrainSpec:
    line = ["pair=tiny", f"max_steps={STEPS}", f"per_device_train_batch_size={BATCH}", *words]
    return compose(from_command_line(line, TrainSpec), TrainSpec)


def examples(count: int) -> list[Example]:
    return [Example((row,), (), (row,), row, None) for row in range(count)]


def chosen(asked: TrainSpec, train: int = 20, **more: Any) -> list[list[int]]:
    choice = Choice(asked, examples(train), **more)
    return [choice.rows(step) for step in range(STEPS)]


def test_by_default_all_are_asked_before_one_is_asked_again_in_the_orders_of_the_epochs() -> None:
    rows = sum(chosen(spec("seed=3")), [])
    assert rows == permutation(3, 0, 20) + permutation(3, 1, 20)


def test_a_cold_start_asks_prompts_of_its_own_and_nothing_after_it_does() -> None:
    steps = chosen(spec("cold_start=0.3", "cold_prompts=6"))
    assert {row for step in steps[:3] for row in step} == set(range(6))
    assert {row for step in steps[3:] for row in step} == set(range(6, 20))


def test_a_whole_run_of_cold_start_may_take_every_prompt() -> None:
    steps = chosen(spec("cold_start=1", "cold_prompts=20"))
    assert {row for step in steps for row in step} == set(range(20))
    with pytest.raises(
        ConfigError, match="cold_prompts 20: data generated has 20 rows to train on"
    ):
        Choice(spec("cold_start=0.3", "cold_prompts=20"), examples(20))


def test_a_kept_share_that_widens_asks_the_best_ranked_first_and_all_at_the_end() -> None:
    ranking = list(reversed(range(20)))
    steps = chosen(spec("kept_prompts=[[0,0.2],[0.5,1]]"), ranking=ranking)
    assert all(row in ranking[:4] for row in steps[0]), "0.2 of 20 are 4"
    for step, rows in enumerate(steps):
        kept = round(min(1.0, 0.2 + 1.6 * step / STEPS) * 20)
        assert set(rows) <= set(ranking[:kept]), step
        assert len(set(rows)) == BATCH, "no prompt twice in a step"
    assert {row for step in steps for row in step} - set(ranking[:12])


def test_a_pool_that_is_smaller_than_a_step_is_asked_again_as_evenly_as_can_be() -> None:
    steps = chosen(spec("kept_prompts=0.1"), ranking=list(range(20)))
    assert all(sorted(rows) == [0, 0, 1, 1] for rows in steps)


@given(st.floats(0.01, 0.99), st.integers(0, STEPS - 1))
def test_other_prompts_take_their_share_of_each_step(share: float, step: int) -> None:
    choice = Choice(spec(f"other_prompts={share:g}"), examples(20), others=examples(5))
    rows, plain = choice.rows(step), Choice(spec(), examples(20)).rows(step)
    others = [row for row in rows if row >= 20]
    assert len(others) == int(float(f"{share:g}") * BATCH + 1e-9)
    assert all(a == b for a, b in zip(rows, plain, strict=True) if a < 20), "the rest as without"
    assert all(choice.examples[row].row == row - 20 for row in others)


def test_a_cold_start_of_less_than_a_step_or_of_no_prompts_is_refused() -> None:
    for words, said in {
        ("cold_start=0.01", "cold_prompts=6"): "0.01 of 10 steps is less than one step",
        ("cold_start=0.5",): "cold_start 0.5 on 0 prompts: set both, or neither",
        ("cold_prompts=6",): "cold_start 0 on 6 prompts",
        ("cold_start=1.5", "cold_prompts=6"): "cold_start 1.5 is longer than the run",
        ("cold_start=0.5", "cold_prompts=9", "max_rows=9"): "are all of max_rows 9",
        ("kept_prompts=0",): r"a share in \(0, 1\] is kept",
        ("kept_prompts=1.2",): r"in \[0, 1\]",
        ("other_prompts=0.2", "data=gsm8k"): "other_file says where they are",
        ("other_prompts=0.2", "teacher_few_shot=2"): "exemplars are of the data's own kind",
        ("other_file=x",): "other_file without other_prompts",
        ("cold_start=0.5", "cold_prompts=6", "teacher_samples=false"): "only scores",
    }.items():
        with pytest.raises(ConfigError, match=said):
            spec(*words)
