"""Determine what a score depends on besides its question, and whether that has changed.

    eval/<task>.json: key             the question: task, metric, the suite's settings (`score_key`)
                      adapter_digest  of the adapter that was scored; null: none
                      sources         its weights and tokenizer, in the form of `sources`
                      versions        of lm-eval, of the task, and of the libraries
                      before          the scores that it replaced, and why

A score is invalid once its question, adapter, weights, tokenizer, lm-eval or task has changed.
Scoring is cheap, so it is then computed again, and the old score is noted. What is not known on
this machine, such as lm-eval's version on a laptop without it, is not compared.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from stillhouse import benchmarks, local_models, packages
from stillhouse.errors import ConfigError
from stillhouse.rundir import Json, file_digest, now
from stillhouse.sources import differences
from stillhouse.spec import PairSpec, SuiteSpec, TaskSpec

# Versions of our own tasks: raise one whenever its questions or its scoring change.
TASK_VERSIONS = {
    "tiny_gen": 1,
    "tiny_mc": 1,
    "tiny_length": 1,
    "tiny_distinct": 1,
    "tiny_sampled_length": 1,
    "tiny_sampled_distinct": 1,
}
TEST_ROWS = 256  # problems that each of them asks
NOT_RECORDED = (
    "it was made before a score recorded what it rests on, and its weights may have been others"
    " than are here"
)


def check_rows(suite: SuiteSpec, where: str) -> None:
    """Refuse a task that no package has the rows of, and a sample above those that there are.

    Of the hub's tasks and of the user's own only lm-eval knows the rows, once they are loaded.

    Raises ConfigError.
    """
    for task in suite.tasks:
        if task.content is not None:
            continue
        if task.asks in TASK_VERSIONS:
            has = TEST_ROWS
        elif suite.benchmark_rows == "packaged":
            has = benchmarks.known(task.asks).rows
        else:
            continue
        if suite.sample is not None and suite.sample > has:
            raise ConfigError(
                f"{where}: suite {suite.suite_name}: sample {suite.sample} is above the {has:,}"
                f" documents of task {task.asks}; take fewer, or leave it out for all"
            )


def rests_on(label: str, here: Mapping[str, Any]) -> Json:
    """The sources of a pair that a row's scores depend on; `label`: the row's kind."""
    model = "teacher" if label == "teacher" else "student"
    return {key: here[key] for key in (model, "tokenizer") if key in here}


def changes(
    score: Mapping[str, Any],
    task: TaskSpec,
    label: str,
    pair: PairSpec,
    here: Mapping[str, Any],
    cache_dir: Path,
    adapter: str | None = None,
) -> list[str]:
    """A sentence for each thing that a score depends on and that has changed.

    `here`: the sources of its pair now (`sources.of_pair`). `adapter`: digest of the contract of
    the adapter that is asked; None: none is, or it is not known.
    """
    found = _versions(cast("Json", score.get("versions") or {}), task)
    digest = score.get("adapter_digest")
    if None not in (digest, adapter) and digest != adapter:
        found.insert(0, f"it is of adapter {digest}, and {adapter} is here")
    if "sources" in score:
        return differences(score["sources"], rests_on(label, here)) + found
    if "base_revision" not in score:
        return found
    then, model = score["base_revision"], "teacher" if label == "teacher" else "student"
    if then is None:
        return [NOT_RECORDED, *found]
    now_ = _revision(pair, model, here, cache_dir)
    if now_ not in (None, then):
        found.insert(0, f"{model}: its weights were {then[:16]} and are {now_[:16]} here")
    return found


def replaced(before: Mapping[str, Any] | None, why: list[str]) -> list[Json]:
    """The notes that a new score keeps of those it replaces; [] where there was none."""
    if before is None or "value" not in before:
        return []
    kept = ("key", "metric", "value", "n", "adapter_digest", "sources", "base_revision", "versions")
    note = {key: before[key] for key in (*kept, "finished") if key in before}
    return [*before.get("before", []), note | {"replaced": now(), "why": why}]


def _versions(then: Mapping[str, Any], task: TaskSpec) -> list[str]:
    found: list[str] = []
    here, there = lm_eval_version(), then.get("lm_eval")
    if None not in (here, there) and here != there:
        found.append(f"lm-eval was {there} and is {here} here")
    ours, theirs = TASK_VERSIONS.get(task.asks), then.get("task_version")
    if None not in (ours, theirs) and ours != theirs:
        found.append(f"task {task.asks} was version {theirs} and is {ours} here")
    return found


@functools.cache
def lm_eval_version() -> str | None:
    """The version of lm-eval in this environment; None where it is not installed."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        return None


def _revision(pair: PairSpec, role: str, here: Mapping[str, Any], cache_dir: Path) -> str | None:
    """What an older score called the revision of the weights that are here; None: not known."""
    if pair.pair_source == "gguf":
        return next((one.version for one in packages.installed(pair.student, cache_dir)), None)
    if pair.pair_source == "hub":
        return cast("Json", here.get(role) or {}).get("commit")
    there = local_models.model(pair, role, cache_dir, {})
    return file_digest(there.path / "model.safetensors")[:16] if there else None
