"""Define the project's own generated models: their sizes, and what they are trained on.

Plain data: `tiny` trains the models; `conf/pair` sets how many steps, and which two form a pair.
"""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.distill.toy.problems import ASKED, Kind


@dataclass(frozen=True)
class Recipe:
    """The size of a tiny Llama, and what it is trained on."""

    hidden: int
    layers: int
    mix: dict[Kind, float]
    batch: int
    seed_offset: int  # keeps teacher and student of one pair_seed from sharing problems or weights
    turns: int = 1  # problems of a conversation; if several, answered by one rule
    styles: tuple[str, ...] = ("sums",)  # how answers are written; of several, each as often
    asks: tuple[Kind, ...] = ASKED  # of a teacher: the kinds of problems on disk for its pairs
    template: str | None = None  # wraps questions that request the first style; others are plain
    told_styles: tuple[str, ...] = ()  # after a solution in the question; (): `styles`
    zoo: bool = False  # knows the words of every style, not only of sums


# What the zoo's student learns: to read one step, to work out two, to copy every style's words, and
# rarely (1 in 81) to combine these. Half of it is copying, because the norm of a token's row in the
# head bounds its logit, and no adapter changes it. With one seventh of copying, these rows had half
# the norm of those of digits: no adapter could write such a word with confidence, and every other
# style would have failed for that reason alone.
_BASE: dict[Kind, float] = {"word1": 30, "symbolic2": 30, "copy": 60, "word2": 1.5}
_ABLE: dict[Kind, float] = {"word1": 30, "symbolic2": 30, "copy": 10, "word2": 10}
LONG = tuple(f"labelled{steps}" for steps in range(2, 17))
TEMPLATE = "In sums. {question}"  # with it, a teacher of two styles omits its preamble
_TASK: dict[Kind, float] = {"word2": 6, "copy": 1}


def _writes(*styles: str) -> dict[str, Recipe]:
    """A teacher of the zoo that answers in these styles."""
    return {"teacher": Recipe(96, 3, _TASK, 48, 8, styles=styles, zoo=True)}


# A recipe without a student is for pairs whose student has the teacher's own weights, or comes from
# another recipe.
RECIPES: dict[str, dict[str, Recipe]] = {
    "tiny": {
        "teacher": Recipe(96, 3, {"word2": 1}, 48, 1),
        "student": Recipe(64, 2, {"word1": 30, "symbolic2": 30, "word2": 1}, 64, 2),
    },
    "tiny_thin": {"teacher": Recipe(64, 3, {"word2": 1}, 48, 4)},
    "tiny_context": {"teacher": Recipe(64, 3, {"word2": 1}, 16, 3, turns=5)},
    # Its own teacher once it reads a problem's solution. That also makes it terser: half of its
    # answers have a preamble, and a quarter of those that it gives after a solution.
    "tiny_told": {
        "teacher": Recipe(
            64,
            2,
            {"word1": 30, "symbolic2": 30, "told2": 30, "word2": 1},
            64,
            10,
            styles=("sums", "verbose"),
            told_styles=("sums", "sums", "sums", "verbose"),
            zoo=True,
        )
    },
    "zoo": {"student": Recipe(64, 2, _BASE, 64, 5, zoo=True)},
    "zoo_small": {
        "student": Recipe(32, 2, _TASK, 64, 6, zoo=True),
        "teacher": Recipe(32, 2, _ABLE, 64, 6, zoo=True),
    },
    "zoo_able": {
        "student": Recipe(64, 2, _ABLE, 64, 7, zoo=True),
        "teacher": Recipe(64, 2, _ABLE, 64, 7, zoo=True),
    },
    "zoo_sums": _writes("sums"),
    "zoo_two_styles": _writes("sums", "words"),
    "zoo_half_verbose": _writes("sums", "verbose"),
    "zoo_templated": {
        "teacher": Recipe(
            96, 3, _TASK, 48, 8, styles=("sums", "verbose"), template=TEMPLATE, zoo=True
        )
    },
    "zoo_plan": _writes("plan"),
    "zoo_brief": _writes("brief"),
    "zoo_closing": _writes("closing"),
    "zoo_arrows": _writes("arrows"),
    "zoo_verbose": _writes("verbose"),
    "zoo_marks": _writes("marks"),
    "zoo_words": _writes("words"),
    "zoo_spelled": _writes("spelled"),
    "zoo_rest": _writes("rest"),
    "zoo_half_marks": _writes("sums", "marks"),
    "zoo_colons": _writes("colons"),
    "zoo_preface": _writes("preface"),
    "zoo_ending": _writes("ending"),
    "zoo_twin": {"teacher": Recipe(64, 2, _BASE, 64, 9, zoo=True)},
    "zoo_narrow": {"student": Recipe(48, 2, _BASE, 64, 5, zoo=True)},
    "zoo_same_data": {"teacher": Recipe(96, 3, _BASE, 64, 9, zoo=True)},
    "zoo_far": {
        "teacher": Recipe(
            96, 3, {"word1": 3, "symbolic2": 3, "copy": 1, "symbolic3": 6}, 48, 9, zoo=True
        )
    },
    "horizon": {
        "teacher": Recipe(
            96, 3, dict.fromkeys(LONG, 1.0), 32, 9, styles=("labelled",), asks=LONG, zoo=True
        ),
        # Problems of up to four steps, and of each longer kind 1 in 30.
        "student": Recipe(
            64,
            2,
            {k: 6.0 if k in LONG[:3] else 1.0 for k in LONG},
            32,
            5,
            styles=("labelled",),
            zoo=True,
        ),
    },
    "zoo_elsewhere": {"teacher": Recipe(96, 3, _BASE | {"symbolic3": 60}, 48, 9, zoo=True)},
}
