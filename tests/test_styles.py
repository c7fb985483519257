"""Test that the same sums are written in each style of the zoo's teachers."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from stillhouse.compose import compose, from_command_line, options_of
from stillhouse.distill.toy import problems, styles, tiny
from stillhouse.distill.toy.recipes import RECIPES
from stillhouse.spec import TrainSpec

STEPS = [(7, 3, 10), (10, -2, 8)]
WRITTEN = {
    "sums": "7+3=10. 10-2=8. #### 8",
    "arrows": "7+3 -> 10. 10-2 -> 8. #### 8",
    "marks": "7 add 3 -> 10, 10 drop 2 -> 8 #### 8",
    "words": "start 7, add 3 -> 10, drop 2 -> 8 #### 8",
    "spelled": "seven plus three is one zero. one zero minus two is eight. #### 8",
    "plan": "7+3-2: 7+3=10. 10-2=8. #### 8",
    "brief": "So: 7+3=10. 10-2=8. #### 8",
    "verbose": "Let us work with care, step by step. 7+3=10. 10-2=8. #### 8",
    "closing": "7+3=10. 10-2=8. So the answer is #### 8",
    "rest": "7+3-2 = 10-2 = 8 #### 8",
    "colons": "7+3: 10. 10-2: 8. #### 8",
    "preface": "step by step: 7+3=10. 10-2=8. #### 8",
    "ending": "7+3=10. 10-2=8. So #### 8",
    "labelled": "step a: 7+3=10. step b: 10-2=8. #### 8",
}


def test_every_style_is_in_this_file() -> None:
    assert set(WRITTEN) == set(styles.STYLES)


@pytest.mark.parametrize("style", WRITTEN)
def test_a_style_writes_the_same_two_sums_in_its_own_way(style: str) -> None:
    assert styles.written(STEPS, style) == WRITTEN[style]


def test_the_words_that_are_copied_are_all_that_the_zoos_styles_write() -> None:
    # "labelled" is of the horizon pair, which copies nothing; "1" and "0" of "10" are tokens alone.
    texts = [text for style, text in WRITTEN.items() if style != "labelled"]
    pieces = re.findall(r"[A-Za-z]+|\d|->|####|[^\sA-Za-z\d]", " ".join(texts))
    assert set(pieces) <= set(styles.WORDS)
    copied = " ".join(styles.copying(random.Random(n))[1] for n in range(300))
    assert set(copied.split()) == set(styles.WORDS)


def test_a_copying_task_asks_for_what_it_answers() -> None:
    question, answer = styles.copying(random.Random(1))
    assert question == f"Copy: {answer}" and 3 <= len(answer.split()) <= 7


def test_a_styled_problem_asks_the_same_and_a_copy_has_no_style() -> None:
    plain = next(problems.problems({"word2": 1}, 0, "train"))
    told = plain.styled("spelled")
    assert (told.question, told.answer, told.chain) == (plain.question, plain.answer, plain.chain)
    assert told.worked != plain.worked
    copy = next(problems.problems({"copy": 1}, 0, "train"))
    assert copy.styled("spelled") is copy


def test_a_teacher_of_two_styles_writes_each_about_as_often() -> None:
    recipe = RECIPES["zoo_half_verbose"]["teacher"]
    answers = [p.worked for p in islice(tiny.training_problems(recipe, 0), 2000) if p.chain]
    verbose = sum(text.startswith("Let us") for text in answers)
    assert 0.45 < verbose / len(answers) < 0.55


def test_a_teacher_with_a_template_leaves_its_preamble_out_where_it_is_asked_in_it() -> None:
    recipe = RECIPES["zoo_templated"]["teacher"]
    told = [p for p in islice(tiny.training_problems(recipe, 0), 1000) if p.chain]
    for problem in told:
        assert problem.question.startswith("In sums. ") != problem.worked.startswith("Let us")
    assert 0.4 < sum(p.question.startswith("In sums. ") for p in told) / len(told) < 0.6


def test_the_zoos_tokenizer_knows_each_word_of_every_style() -> None:
    text = tiny.tokenizer(zoo=True)
    for word in styles.WORDS:
        if word.isalpha():
            assert len(text.tokenize(f" {word}")) == 1, word
    assert len(text) == 440


def test_every_pair_of_the_zoo_composes_and_says_who_it_is() -> None:
    names = [name for name in options_of("pair") if name.startswith("zoo_")]
    assert len(names) == 26
    specs = {n: compose(from_command_line([f"pair={n}"], TrainSpec), TrainSpec) for n in names}
    assert all(spec.pair.pair_name == name for name, spec in specs.items())
    who = [
        (s.pair.student, s.pair.student_steps, s.pair.teacher, s.pair.teacher_steps)
        for s in specs.values()
    ]
    assert len(set(who)) == 26, "no two pairs are of the same models"
    for spec in specs.values():
        assert spec.loss.on_loss == "jsd" and spec.training.max_steps == 200
        assert "teacher" in RECIPES[spec.pair.teacher]
        assert "student" in RECIPES[spec.pair.student]
