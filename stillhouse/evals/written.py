"""Measure how long and how diverse answers are, on the problems of a generated pair.

    tiny_length            pieces (words, numbers and marks) of the greedy answers, on average
    tiny_distinct          distinct n-grams among the greedy answers to all questions
    tiny_sampled_length    as tiny_length, of SAMPLES answers to each question at temperature 1
    tiny_sampled_distinct  distinct n-grams among the answers to a question, averaged over questions

Distinct n-grams: their number over that of all n-grams, averaged over n = 1 to 5, as in
arXiv:2310.06452 across inputs (greedy) and per input (sampled), there with a correction for length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from stillhouse.rundir import Json

SAMPLES = 4  # answers to a question, where answers are drawn
LONGEST = 5  # n of the longest n-grams
TASKS = ("tiny_length", "tiny_distinct", "tiny_sampled_length", "tiny_sampled_distinct")


def is_sampled(task: str) -> bool:
    """Whether a task's answers are drawn; otherwise they are the likeliest."""
    return task in TASKS and "sampled" in task


def pieces(text: str) -> list[str]:
    """Words, numbers and marks."""
    return re.findall(r"[^\W\d_]+|\d+|[^\w\s]", text)


def length(texts: Sequence[str]) -> float:
    """The mean number of pieces."""
    return sum(len(pieces(text)) for text in texts) / len(texts)


def distinct(texts: Iterable[str]) -> float:
    """Distinct n-grams over all n-grams of these texts, in [0, 1], averaged over n; 0 without any.

    An n of which there is no n-gram does not count.
    """
    rows = [pieces(text) for text in texts]
    shares: list[float] = []
    for n in range(1, LONGEST + 1):
        found = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
        if found:
            shares.append(len({*found}) / len(found))
    return sum(shares) / len(shares) if shares else 0.0


def task_config(task: str) -> Json:
    """What lm-eval's config of one of TASKS has besides its data."""
    metric = "length" if task.endswith("length") else "distinct"
    repeats = SAMPLES if is_sampled(task) else 1

    def measured(_: Json, answers: list[list[str]]) -> Json:
        if task == "tiny_distinct":
            return {metric: answers[0][0]}
        return {metric: (length if metric == "length" else distinct)(answers[0])}

    return {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "repeats": repeats,
        "process_results": measured,
        "filter_list": [{"name": "all", "filter": [{"function": "take_first_k", "k": repeats}]}],
        "metric_list": [
            {
                "metric": metric,
                "aggregation": distinct if task == "tiny_distinct" else "mean",
                "higher_is_better": True,
            }
        ],
        "generation_kwargs": {"until": []},
    }
