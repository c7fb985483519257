"""Test the generated problems, and prove that their held-out split is separate."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.distill.toy import problems, tiny
from stillhouse.distill.toy.problems import Chain, Problem
from stillhouse.distill.toy.recipes import RECIPES
from stillhouse.identity import digest


@st.composite
def chains(draw: st.DrawFn, least: int = 1, most: int = 5) -> Chain:
    value = draw(st.integers(1, problems.LARGEST))
    chain = [value]
    for _ in range(draw(st.integers(least, most))):
        delta = draw(st.integers(-min(value, problems.LARGEST), problems.LARGEST).filter(bool))
        chain.append(delta)
        value += delta
    return tuple(chain)


def chain_of(worked: str) -> Chain:
    """The chain as a reader of the text sees it, so that the proof does not trust the generator."""
    sums = re.findall(r"(\d+)([+-]\d+)=(\d+)\.", worked)
    for (_, _, result), (value, _, _) in zip(sums, sums[1:], strict=False):
        assert result == value
    return (int(sums[0][0]), *(int(delta) for _, delta, _ in sums))


def windows_of(worked: list[str]) -> set[Chain]:
    return {window for text in worked for window in problems.windows(chain_of(text))}


def test_the_windows_of_a_chain_start_at_the_value_reached() -> None:
    assert problems.windows((7, 3)) == []
    assert problems.windows((7, 3, -2)) == [(7, 3, -2)]
    assert problems.windows((7, 3, -2, 5)) == [(7, 3, -2), (10, -2, 5)]


@given(chains(least=2))
def test_whatever_lies_inside_a_chain_of_a_split_is_of_that_split(chain: Chain) -> None:
    split = problems.split_of(chain)
    if split is None:
        return
    value = chain[0]
    for start in range(len(chain) - 2):
        for end in range(start + 3, len(chain) + 1):
            assert problems.split_of((value, *chain[start + 1 : end])) == split
        value += chain[start + 1]


@given(chains(least=3))
def test_a_chain_that_mixes_splits_belongs_to_none(chain: Chain) -> None:
    inside = {problems.split_of(window) for window in problems.windows(chain)}
    assert (problems.split_of(chain) is None) == (len(inside) > 1)


def test_one_two_step_chain_in_five_is_held_out() -> None:
    dealt = [
        problems.split_of((start, first, second))
        for start in range(1, 11)
        for first in range(-start, 11)
        for second in range(-start - first, 11)
    ]
    held = sum(split != "train" for split in dealt) / len(dealt)
    assert 0.18 < held < 0.22
    assert {"train", "held_out", "test"} == set(dealt)


@pytest.mark.parametrize("split", ["train", "held_out", "test"])
def test_a_chain_of_sixteen_steps_is_of_one_split_and_stays_small(split: problems.Split) -> None:
    for problem in islice(problems.problems({"labelled16": 1}, 0, split), 12):
        values = [sum(problem.chain[:n]) for n in range(1, 18)]
        assert len(problem.chain) == 17 and problems.split_of(problem.chain) == split
        assert min(values) >= 0 and max(values) <= problems.HIGHEST
        assert chain_of(problem.worked) == problem.chain


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_problems_of_different_splits_share_no_chain(seed: int, other: int) -> None:
    mix: dict[problems.Kind, float] = {"word1": 1, "word2": 1, "symbolic2": 1}
    train = islice(problems.problems(mix, seed, "train"), 60)
    test = islice(problems.problems({"word2": 1, "symbolic2": 1}, other, "test"), 20)
    trained, tested = (windows_of([p.worked for p in some]) for some in (train, test))
    assert tested
    assert not trained & tested


def test_a_rule_adds_at_the_end_what_it_says_for_a_last_gain_or_loss() -> None:
    gain = Problem("?", "7-3=4. 4+2=6. #### 6", 6, (7, -3, 2))
    loss = Problem("?", "7+3=10. 10-2=8. #### 8", 8, (7, 3, -2))
    assert gain.under((4, 1)).worked == "7-3=4. 4+2=6. 6&d=10. #### 10"
    assert loss.under((4, 1)).worked == "7+3=10. 10-2=8. 8%a=9. #### 9"
    assert (gain.under((4, 1)).answer, loss.under((4, 1)).answer) == (10, 9)
    assert loss.under(None) is loss


def test_a_rule_takes_no_problem_into_another_split() -> None:
    for split in ("train", "held_out"):
        ruled = problems.chat_rows(split, 100, problems.RULE)
        # What is added is written with another sign than a chain's steps: it makes no new chain.
        read = windows_of([row["messages"][1]["content"] for row in ruled])
        assert read == {tuple(row["chain"]) for row in ruled}
        assert {problems.split_of(chain) for chain in read} == {split}


def test_without_examples_nobody_can_tell_the_right_choice_under_a_rule() -> None:
    for row in problems.test_rows(64, problems.RULE):
        before = sum(row["chain"])
        assert int(row["answer"]) == before + (4 if row["chain"][-1] > 0 else 1)
        assert row["choices"][row["label"]] == row["worked"]
        sums = re.split("[&%]", row["worked"])[0]
        mark = "&" if row["chain"][-1] > 0 else "%"
        assert sums.endswith(f"={before}. {before}")
        assert sorted(row["choices"]) == [
            f"{sums}{mark}{letter}={before + bonus}. #### {before + bonus}"
            for letter, bonus in zip("abcd", (1, 2, 3, 4), strict=True)
        ]


def test_the_rule_of_the_rows_is_nobodys_habit() -> None:
    rng = random.Random(0)
    drawn = [problems.draw_rule(rng) for _ in range(4000)]
    for place, habit, ruled in ((0, 1, 4), (1, 4, 1)):
        added = [rule[place] for rule in drawn]
        assert 0.37 < added.count(habit) / len(added) < 0.43  # 2 in 5
        assert 0.17 < added.count(ruled) / len(added) < 0.23  # 1 in 5
        assert problems.RULE[place] == ruled


def test_the_examples_that_a_teacher_reads_show_both_halves_of_the_rule() -> None:
    shown = problems.chat_rows("train", 4, problems.RULE)
    assert [row["chain"][-1] > 0 for row in shown] == [False, True, False, True]


@pytest.mark.parametrize(
    ("pair_seed", "number"),
    [
        (0, tiny.TRAINING_PROBLEMS // 10),
        pytest.param(0, tiny.TRAINING_PROBLEMS, marks=pytest.mark.slow),
        pytest.param(1, tiny.TRAINING_PROBLEMS, marks=pytest.mark.slow),
    ],
)
def test_nothing_a_tiny_pair_learns_from_shares_a_chain_with_a_test_problem(
    pair_seed: int, number: int
) -> None:
    train = problems.chat_rows("train", problems.TRAIN_ROWS)
    held_out = problems.chat_rows("held_out", problems.HELD_OUT_ROWS)
    tested = windows_of([row["worked"] for row in problems.test_rows(256)])
    assert len(tested) > 100
    sources = {
        "distillation prompts": [row["messages"][1]["content"] for row in train],
        "held-out rows": [row["messages"][1]["content"] for row in held_out],
    }
    recipes = [recipe for roles in RECIPES.values() for recipe in roles.values()]
    # A style writes the same chains in other words, so recipes that differ in that alone are one.
    different = {(tuple(r.mix.items()), r.seed_offset): r for r in recipes}
    for recipe in different.values():
        source = islice(tiny.training_problems(recipe, pair_seed), number)
        trained = {window for p in source if p.chain for window in problems.windows(p.chain)}
        assert not trained & tested, (recipe, pair_seed)
    for name, texts in sources.items():
        assert not windows_of(texts) & tested, name
    assert not windows_of(sources["held-out rows"]) & windows_of(sources["distillation prompts"])


def test_a_single_sum_cannot_be_held_out() -> None:
    assert problems.split_of((7, 3)) == "train"
    with pytest.raises(ValueError, match="two steps"):
        next(problems.problems({"word1": 1, "word2": 1}, 0, "test"))


def test_questions_ask_what_the_worked_answer_answers() -> None:
    for kind in ("word1", "word2", "symbolic2"):
        for problem in islice(problems.problems({kind: 1}, 3, "train"), 200):
            numbers = [int(n) for n in re.findall(r"\d+", problem.question)]
            assert numbers == [abs(n) for n in problem.chain]
            assert chain_of(problem.worked) == problem.chain
            assert problem.worked.endswith(f" #### {sum(problem.chain)}")
            assert problem.answer == sum(problem.chain) >= 0


def test_a_worked_answer_reads_as_in_the_readme() -> None:
    row = next(r for r in problems.test_rows(256) if r["chain"] == [3, 6, 4])
    assert row["worked"] == "3+6=9. 9+4=13. #### 13"
    assert row["answer"] == "13"
    assert row["choices"][row["label"]] == row["worked"]


def sums_are_right(worked: str) -> bool:
    return all(
        int(a) + int(d) == int(r) for a, d, r in re.findall(r"(\d+)([+-]\d+)=(\d+)\.", worked)
    )


@given(chains(least=2, most=2), st.integers(0, 99))
def test_wrong_answers_need_both_reading_and_arithmetic_to_be_told(chain: Chain, seed: int) -> None:
    wrong = problems.wrong_answers(chain, random.Random(seed))
    results = [text.partition("#### ")[2] for text in wrong]
    assert len({*results, str(sum(chain))}) == problems.CHOICES
    for text in wrong:
        assert re.fullmatch(r"(\d+[+-]\d+=\d+\. ){2}#### \d+", text)
    read_right = [chain_of(text) == chain for text in wrong]
    summed_right = [sums_are_right(text) for text in wrong]
    assert any(read_right) and any(summed_right)
    assert not any(a and b for a, b in zip(read_right, summed_right, strict=True))


def test_the_right_choice_stands_in_every_place_about_equally_often() -> None:
    labels = [row["label"] for row in problems.test_rows(256)]
    assert all(40 < labels.count(place) < 90 for place in range(problems.CHOICES))


def test_no_question_is_asked_twice() -> None:
    def same() -> list[Problem]:
        return [
            Problem("a", "", 0, (1, 1)),
            Problem("a", "", 0, (1, 1)),
            Problem("b", "", 0, (1, 1)),
        ]

    assert [p.question for p in problems.distinct(iter(same()), 2)] == ["a", "b"]
    questions = [row["messages"][0]["content"] for row in problems.chat_rows("train", 500)]
    assert len(set(questions)) == 500


def test_the_problems_are_those_of_this_version() -> None:
    # Prepared pairs are found by tiny.VERSION: who changes the problems must raise it, and this.
    rows = [problems.chat_rows("train", 50), problems.chat_rows("held_out", 50)]
    found = digest([tiny.VERSION, *rows, problems.test_rows(50)])[:10]
    assert found == "9677f43157"
