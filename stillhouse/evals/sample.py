"""Choose a sample of a task's documents, and say how far its mean may be off."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string

from stillhouse.errors import ConfigError
from stillhouse.rundir import Json


def chosen(name: str, loaded: Any, count: int) -> dict[str, list[int]]:
    """The `count` documents of the smallest hashes, of a task or of all tasks of a group together.

    A hash is lm-eval's doc_hash, so every model is asked the same documents. Tasks of the group
    that have none of them are taken out of it.

    Raises:
        ConfigError: there are fewer documents, or a group's score is no mean over documents.
    """
    is_group = hasattr(loaded, "get_all_tasks")
    if is_group and any(not each.weight_by_size for each in loaded.aggregate_metric_list or ()):
        raise ConfigError(
            f"task {name}: a group whose score is a mean over tasks, whatever their size; sample"
            " takes documents of all of them together. List its tasks, or use limit"
        )
    ranked = sorted(
        (_hash(document), leaf.task_name, number)
        for leaf in (loaded.get_all_tasks() if is_group else [loaded])
        for number, document in enumerate(leaf.task_docs)
    )
    if count > len(ranked):
        raise ConfigError(f"task {name}: sample {count} is above its {len(ranked):,} documents")
    found: dict[str, list[int]] = {}
    for _, leaf, number in ranked[:count]:
        found.setdefault(leaf, []).append(number)
    if is_group:
        _keep(loaded, found.keys())
    return {leaf: sorted(numbers) for leaf, numbers in found.items()}


def standard_error(samples: list[Json]) -> float | None:
    """Of the mean over a sample's documents; None for a perplexity, which is no such mean."""
    values = [sample["value"] for sample in samples if "weight" not in sample]
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def shown(score: Json | None) -> str:
    """A score as text, one of a sample with its standard error; "" where there is none."""
    if score is None:
        return ""
    error = score.get("stderr")
    return f"{score['value']:.4f}" + ("" if error is None else f" ±{error:.4f}")


def _hash(document: Json) -> str:
    text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return hash_string(text)


def _keep(group: Any, names: Collection[str]) -> None:
    """Take the tasks of other names out of a group, and the groups that are then empty."""
    for child in [*group]:
        if hasattr(child, "get_all_tasks"):
            _keep(child, names)
            if not len(child):
                group.pop(child.name)
        elif child.task_name not in names:
            group.pop(child.task_name)
