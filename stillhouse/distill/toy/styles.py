"""Write the same worked sums in different answer styles, for the zoo's generated pairs.

If the teacher of a pair writes in another style than its student started with, the two differ in
*pattern*, not in correctness: every style works out the same chain and ends in "#### " and the
result in digits.

A model that has never written a word has no trained embedding for it, and would fail at a style for
that reason alone. So all models of the zoo are also trained to copy words of every style
(`copying`).
"""

from __future__ import annotations

import random
from collections.abc import Callable

Step = tuple[int, int, int]  # value before, delta, value after
LABELS = "abcdefghijklmnop"  # for the steps of long problems: a small model cannot count so far

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# What a copying task is made of: every word and mark of every style.
WORDS = (
    "start add drop plus minus is Let us work with care step by So the answer"
    f" + - = -> , . : #### {' '.join(DIGITS)} 0 1 2 3 4 5 6 7 8 9"
).split()


def _spelt(number: int) -> str:
    return " ".join(DIGITS[int(digit)] for digit in str(number))


def _sums(steps: list[Step]) -> str:
    return " ".join(f"{value}{delta:+d}={result}." for value, delta, result in steps)


def _arrows(steps: list[Step]) -> str:
    return " ".join(f"{value}{delta:+d} -> {result}." for value, delta, result in steps)


def _marks(steps: list[Step]) -> str:
    return ", ".join(f"{v} {_verb(d)} {abs(d)} -> {r}" for v, d, r in steps)


def _words(steps: list[Step]) -> str:
    told = "".join(f", {_verb(delta)} {abs(delta)} -> {result}" for _, delta, result in steps)
    return f"start {steps[0][0]}{told}"


def _verb(delta: int) -> str:
    return "add" if delta > 0 else "drop"


def _spelled(steps: list[Step]) -> str:
    return " ".join(
        f"{_spelt(value)} {'plus' if delta > 0 else 'minus'} {_spelt(abs(delta))} is"
        f" {_spelt(result)}."
        for value, delta, result in steps
    )


def _plan(steps: list[Step]) -> str:
    plan = f"{steps[0][0]}" + "".join(f"{delta:+d}" for _, delta, _ in steps)
    return f"{plan}: {_sums(steps)}"


def _verbose(steps: list[Step]) -> str:
    return f"Let us work with care, step by step. {_sums(steps)}"


def _brief(steps: list[Step]) -> str:
    return f"So: {_sums(steps)}"


def _closing(steps: list[Step]) -> str:
    return f"{_sums(steps)} So the answer is"


def _colons(steps: list[Step]) -> str:
    return " ".join(f"{value}{delta:+d}: {result}." for value, delta, result in steps)


def _preface(steps: list[Step]) -> str:
    return f"step by step: {_sums(steps)}"


def _ending(steps: list[Step]) -> str:
    return f"{_sums(steps)} So"


def _rest(steps: list[Step]) -> str:
    lines = [f"{steps[0][0]}" + "".join(f"{delta:+d}" for _, delta, _ in steps)]
    for done, (_, _, result) in enumerate(steps, 1):
        lines.append(f"{result}" + "".join(f"{delta:+d}" for _, delta, _ in steps[done:]))
    return " = ".join(lines)


def _labelled(steps: list[Step]) -> str:
    told = (f"step {x}: {v}{d:+d}={r}." for x, (v, d, r) in zip(LABELS, steps, strict=False))
    return " ".join(told)


STYLES: dict[str, Callable[[list[Step]], str]] = {
    "sums": _sums,  # 7+3=10. 10-2=8.
    "arrows": _arrows,  # 7+3 -> 10. 10-2 -> 8.
    "marks": _marks,  # 7 add 3 -> 10, 10 drop 2 -> 8
    "words": _words,  # start 7, add 3 -> 10, drop 2 -> 8
    "spelled": _spelled,  # seven plus three is one zero. one zero minus two is eight.
    "plan": _plan,  # 7+3-2: 7+3=10. 10-2=8.
    "brief": _brief,  # So: 7+3=10. 10-2=8.
    "verbose": _verbose,  # Let us work with care, step by step. 7+3=10. 10-2=8.
    "closing": _closing,  # 7+3=10. 10-2=8. So the answer is
    "rest": _rest,  # 7+3-2 = 10-2 = 8
    "colons": _colons,  # 7+3: 10. 10-2: 8.
    "preface": _preface,  # step by step: 7+3=10. 10-2=8.
    "ending": _ending,  # 7+3=10. 10-2=8. So
    "labelled": _labelled,  # step a: 7+3=10. step b: 10-2=8.
}
# What the zoo's tokenizer is trained on. Styles that were added later use no other words.
ZOO = (
    *("sums", "arrows", "marks", "words", "spelled"),
    *("plan", "brief", "verbose", "closing", "rest"),
)


def written(steps: list[Step], style: str) -> str:
    """The worked answer of these steps, including the result."""
    return f"{STYLES[style](steps)} #### {steps[-1][2]}"


def copying(rng: random.Random) -> tuple[str, str]:
    """A question that asks to copy some words, and the words."""
    text = " ".join(rng.choices(WORDS, k=rng.randint(3, 7)))
    return f"Copy: {text}", text
