"""Generate arithmetic word problems, and split them into training, held-out, and test problems.

A *chain* is what a problem works out: (start, delta, delta, …), so (7, 3, -2) is 7+3=10, 10-2=8.
A fixed hash assigns each chain of two steps to one of three splits. A longer chain belongs to a
split only if every two-step window of it does, and to none otherwise, so no chain of one split ever
occurs inside a problem of another. A single sum such as 7+3 is a fact, not a chain: one-step
problems are for training only.

A *rule* is something that can be learned only from examples: at the end, a fixed bonus is added
after a last gain, "8&d=12.", and another after a last loss, "8%a=9." (a to d add 1 to 4). It is not
part of a chain.

The way an answer is written is its *style* (`styles`); all styles work out the same chain.

Plain Python: no torch, no tokenizer. The same arguments give the same problems on every machine.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stillhouse.distill.toy.styles import LABELS, Step, copying, written

Chain = tuple[int, ...]
Split = Literal["train", "held_out", "test"]
Kind = str  # a key of STEPS
Rule = tuple[int, int]  # what is added at the end: after a last gain, after a last loss

STEPS: dict[Kind, int] = {
    "copy": 0,  # no problem: some words to copy
    **{f"word{steps}": steps for steps in (1, 2)},
    "told2": 2,  # a word problem whose question ends in its solution
    **{f"symbolic{steps}": steps for steps in (2, 3)},
    **{f"labelled{steps}": steps for steps in range(2, len(LABELS) + 1)},
}
ASKED: tuple[Kind, ...] = ("word2",)  # the kinds of the rows on disk, unless a recipe sets others
LARGEST = 10  # of the start and of each delta
HIGHEST = 30  # results stay in 0..HIGHEST: one or two digits
CHOICES = 4
TOLD = "{question} Solution: {completion}"  # as `teacher_prompt` of a pair says it
MARKS = ("&", "%")  # written before the bonus, after a gain and after a loss
BONUSES = {1: "a", 2: "b", 3: "c", 4: "d"}  # what a rule can add, and how it is written
# How often a rule adds 1, 2, 3, or 4 after a gain and after a loss. So a model without examples
# defaults to 1 after a gain and 4 after a loss, and RULE is neither.
USUAL = ((2, 1, 1, 1), (1, 1, 1, 2))
RULE: Rule = (4, 1)  # used for the rows on disk of a pair whose models know rules
TRAIN_ROWS, HELD_OUT_ROWS, OTHER_ROWS = 2048, 256, 1024
DATA_SEED = 8  # of the rows on disk: the same for every pair, so that pairs can be compared
RULED_SEED = (
    12  # of those under RULE: the first four, which a teacher reads, end in gains and losses
)

NAMES = ("Ben", "Ida", "Kai", "Lia", "Max", "Nia", "Ola", "Uma")
THINGS = ("beads", "cups", "figs", "keys", "nuts", "pins")
GAINS = ("{name} gets {k} more.", "A friend adds {k}.", "Then {k} more are found.")
LOSSES = ("{name} gives {k} up.", "A friend takes {k}.", "Then {k} are lost.")


@dataclass(frozen=True)
class Problem:
    """A question, its worked answer and the chain that it works out."""

    question: str
    worked: str  # "7+3=10. 10-2=8. #### 8"
    answer: int
    chain: Chain
    is_told: bool = False  # its question ends in its solution

    def bonus(self, rule: Rule | None) -> int:
        """What the rule adds to the answer; 0 without one."""
        return 0 if rule is None else rule[self._ending]

    @property
    def _ending(self) -> int:
        """0: the last change is a gain; 1: it is a loss."""
        return int(self.chain[-1] < 0)

    def plus(self, bonus: int) -> Problem:
        """The same question, answered with `bonus` added at the end; with 0, as it is."""
        if bonus == 0:
            return self
        sums, answer = self.worked.partition("####")[0], self.answer + bonus
        added = f"{self.answer}{MARKS[self._ending]}{BONUSES[bonus]}={answer}."
        worked = f"{sums}{added} #### {answer}"
        return Problem(self.question, worked, answer, self.chain)

    def styled(self, style: str) -> Problem:
        """The same question, answered in this style; a copying task has no style."""
        if not self.chain:
            return self
        worked = written(_steps(self.chain), style)
        return Problem(self.question, worked, self.answer, self.chain)

    def under(self, rule: Rule | None) -> Problem:
        """The same question, answered by the rule."""
        return self.plus(self.bonus(rule))


def draw_rule(rng: random.Random) -> Rule:
    """A random rule, by the frequencies in USUAL."""
    after_gain, after_loss = (rng.choices(list(BONUSES), weights)[0] for weights in USUAL)
    return after_gain, after_loss


def windows(chain: Chain) -> list[Chain]:
    """Every two-step chain inside `chain`, each starting at the value reached there."""
    value, found = chain[0], []
    for first, second in zip(chain[1:], chain[2:], strict=False):
        found.append((value, first, second))
        value += first
    return found


def split_of(chain: Chain) -> Split | None:
    """The split that may use this chain; None if its windows belong to different splits."""
    splits: list[Split] = [_split_of_window(window) for window in windows(chain)]
    if not splits:
        return "train"
    return splits[0] if len(set(splits)) == 1 else None


def _split_of_window(window: Chain) -> Split:
    # A hash, not a list: a chain's split does not depend on what else is generated, now or later.
    number = zlib.crc32(repr(window).encode())
    if number % 5:
        return "train"
    return "test" if number // 5 % 3 else "held_out"


def problems(mix: Mapping[Kind, float], seed: int, split: Split) -> Iterator[Problem]:
    """Endless problems of one split; `mix` gives the weight of each kind."""
    if split != "train" and any(STEPS[kind] < 2 for kind in mix):
        raise ValueError(f"{split} problems need two steps: a single sum cannot be held out")
    rng = random.Random(f"{seed} {split}")
    kinds, weights = list(mix), list(mix.values())
    while True:
        kind = rng.choices(kinds, weights)[0]
        if kind == "copy":
            yield Problem(*copying(rng), 0, ())
        else:
            yield _problem(kind, _draw_chain(rng, STEPS[kind], split), rng)


def distinct(source: Iterator[Problem], count: int) -> list[Problem]:
    """The first `count` problems that do not repeat an earlier question."""
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = next(source)
        found.setdefault(problem.question, problem)
    return list(found.values())


def chat_rows(
    split: Literal["train", "held_out"],
    count: int,
    rule: Rule | None = None,
    kinds: Sequence[Kind] = ASKED,
) -> list[dict[str, Any]]:
    """Problems as conversations: for distillation, or for the loss on held-out rows."""
    return [_conversation(plain.under(rule)) for plain in _plain(split, count, rule, kinds)]


def other_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of another kind than the training data: bare three-step sums, no story."""
    source = problems({"symbolic3": 1}, DATA_SEED, "train")
    return [_conversation(problem) for problem in distinct(source, count)]


def _conversation(problem: Problem) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": problem.worked},
        ],
        "answer": str(problem.answer),
        "chain": list(problem.chain),
    }


def test_rows(
    count: int, rule: Rule | None = None, kinds: Sequence[Kind] = ASKED
) -> list[dict[str, Any]]:
    """Problems for lm-eval: to answer freely, or by choosing a worked answer.

    With a rule, the wrong choices differ only in the bonus, so only the rule gives the answer.
    """
    rng, rows = random.Random(f"{DATA_SEED} choices"), []
    for plain in _plain("test", count, rule, kinds):
        problem = plain.under(rule)
        if rule is None:
            choices = wrong_answers(problem.chain, rng)
        else:
            choices = [plain.plus(b).worked for b in BONUSES if plain.plus(b) != problem]
        label = rng.randrange(CHOICES)
        choices.insert(label, problem.worked)
        rows.append(
            {
                "question": problem.question,
                "answer": str(problem.answer),
                "worked": problem.worked,
                "choices": choices,
                "label": label,
                "chain": list(problem.chain),
            }
        )
    return rows


def _plain(split: Split, count: int, rule: Rule | None, kinds: Sequence[Kind]) -> list[Problem]:
    seed = DATA_SEED if rule is None else RULED_SEED
    return distinct(problems(dict.fromkeys(kinds, 1.0), seed, split), count)


def wrong_answers(chain: Chain, rng: random.Random) -> list[str]:
    """CHOICES - 1 wrong worked answers, in the right one's format, no two with the same result.

    One misreads a number, one misreads a sign, one makes a slip in a sum. So neither "all sums are
    correct" nor "all numbers stand in the question" finds the right answer; only both together do.
    """
    misread, flipped, slipped = _misread_numbers(chain), _flipped_signs(chain), _slips(chain)
    for variants in (misread, flipped, slipped):
        rng.shuffle(variants)
    used, wrong = {_steps(chain)[-1][2]}, []
    # If every flipped sign would go below zero, a second misread number replaces it.
    for variants in (flipped + misread, misread, slipped):
        steps = next(steps for steps in variants if steps[-1][2] not in used)
        used.add(steps[-1][2])
        wrong.append(_worked(steps))
    return wrong


def _draw_chain(rng: random.Random, steps: int, split: Split) -> Chain:
    if steps > 3:
        return _draw_long_chain(rng, steps, split)
    while True:
        value = rng.randint(1, LARGEST)
        chain = [value]
        for _ in range(steps):
            down = value > 1 and (rng.random() < 0.5 or value > HIGHEST - LARGEST)
            delta = -rng.randint(1, min(LARGEST, value)) if down else rng.randint(1, LARGEST)
            chain.append(delta)
            value += delta
        if split_of(tuple(chain)) == split:
            return tuple(chain)


def _draw_long_chain(rng: random.Random, steps: int, split: Split) -> Chain:
    """Build the chain step by step: only 1 in 10^13 chains of 16 steps is in the test split."""
    while True:
        value = rng.randint(1, LARGEST)
        chain = (value,)
        while len(chain) <= steps:
            deltas = [*range(-min(LARGEST, value), 0), *range(1, min(LARGEST, HIGHEST - value) + 1)]
            window = (value - chain[-1], chain[-1]) if len(chain) > 1 else ()
            if window:
                deltas = [d for d in deltas if _split_of_window((*window, d)) == split]
            if not deltas:
                break  # dead end: start over
            chain, value = (*chain, delta := rng.choice(deltas)), value + delta
        else:
            return chain


def _problem(kind: Kind, chain: Chain, rng: random.Random) -> Problem:
    if kind.startswith("symbolic"):
        question = f"Find {chain[0]}" + "".join(f"{delta:+d}" for delta in chain[1:]) + "."
    elif kind.startswith("labelled"):
        labelled = zip(LABELS, chain[1:], strict=False)
        question = f"Find {chain[0]}" + "".join(f" {x}{delta:+d}" for x, delta in labelled) + "."
    else:
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        events = [
            rng.choice(GAINS if delta > 0 else LOSSES).format(name=name, k=abs(delta))
            for delta in chain[1:]
        ]
        question = f"{name} has {chain[0]} {things}. {' '.join(events)} How many {things} now?"
    steps = _steps(chain)
    if kind.startswith("told"):
        question = TOLD.format(question=question, completion=_worked(steps))
    return Problem(question, _worked(steps), steps[-1][2], chain, kind.startswith("told"))


def _steps(chain: Chain, slip_at: int | None = None, slip: int = 0) -> list[Step]:
    value, steps = chain[0], []
    for index, delta in enumerate(chain[1:]):
        result = value + delta + (slip if index == slip_at else 0)
        steps.append((value, delta, result))
        value = result
    return steps


def _worked(steps: list[Step]) -> str:
    return written(steps, "sums")


def _non_negative(variants: list[list[Step]]) -> list[list[Step]]:
    return [steps for steps in variants if all(result >= 0 for _, _, result in steps)]


def _misread_numbers(chain: Chain) -> list[list[Step]]:
    variants = []
    for index, number in enumerate(chain):
        for size in range(1, LARGEST + 1):
            if size != abs(number):
                misread = size if number > 0 else -size
                variants.append(_steps((*chain[:index], misread, *chain[index + 1 :])))
    return _non_negative(variants)


def _flipped_signs(chain: Chain) -> list[list[Step]]:
    return _non_negative(
        [_steps((*chain[:i], -chain[i], *chain[i + 1 :])) for i in range(1, len(chain))]
    )


def _slips(chain: Chain) -> list[list[Step]]:
    return _non_negative(
        [_steps(chain, i, slip) for i in range(len(chain) - 1) for slip in (-3, -2, -1, 1, 2, 3)]
    )
