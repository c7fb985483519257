"""Derive a point's identity, and that of a score, from the content of a spec alone.

`point_id` hashes the versioned fields. A field that was added later counts only where its value
changes something, so that the ids of older runs stay (`AS_BEFORE`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

from pydantic import TypeAdapter

from stillhouse.spec import (
    ID_DIGITS,
    MAX_NAME,
    DataSpec,
    EvalSpec,
    PairSpec,
    QuantSpec,
    SuiteSpec,
    TaskSpec,
    TrainSpec,
    is_float32,
)

# Not part of a point's identity, and why. Whole sections first.
NOT_VERSIONED: dict[str, str] = {
    "monitor": "measures, does not train",
    "watch": "ends a run early, or says something; the steps it takes are the same",
    "tracking": "where metrics are copied to",
    "place": "paths, names, tags, threads, sweeps, and what an open revision means",
    "site": "where it runs",
    "pair.teacher_samples": "says what the teacher is asked for, not what it answers",
    "pair.vocab_size": "a fact about the weights, for checks",
    "loss.loss_chunk": "splits a sum",
    "scoring.teacher_at": "the same numbers, from elsewhere",
    "scoring.teacher_cache_gib": "how many of the same numbers are kept",
    "scoring.teacher_url": "where the same numbers are asked for",
    "scoring.teacher_patience_s": "how long they are waited for",
    "training.micro_batch": "splits a sum",
    "training.save_steps": "a resumed run equals one that never stopped",
    "training.sanity_max_nll": "a check, not a computation",
    "training.max_rollout_gap": "a check, not a computation",
}

# Knobs that were added when runs already existed, and the value that keeps the old behavior. A knob
# with that value is no part of the content, so that the identity of older runs does not change. A
# key is a section and its leaf; `task.LEAF` is a leaf of a suite's tasks.
ROLLOUT_ROWS = 64
AS_BEFORE: dict[str, Any] = {
    "pair.teacher_prompt": None,
    "loss.fixed_advantage": None,
    "loss.ema_decay": None,
    "loss.position_weights": 1,
    "loss.ratio_cap": None,
    "scoring.teacher_rows": "together",
    "rollout.horizon": 1,
    "rollout.rollout_rows": ROLLOUT_ROWS,
    "rescue.cold_start": 0,
    "rescue.cold_prompts": 0,
    "rescue.kept_prompts": 1,
    "rescue.kept_by": "mass",
    "rescue.other_prompts": 0,
    "rescue.other_file": None,
    "data.chat_template_kwargs": {},
    "data.template_date": "2026-01-01",
    "suite.include_path": None,
    "suite.sample": None,
    "suite.benchmark_rows": "hub",
    "task.content": None,
}

# Knobs that are no part of the content and were added when records already existed, and the value
# that a record without them has.
ADDED: dict[str, Any] = {
    "training.max_rollout_gap": None,
    "monitor.eval_answers": "dataset",
    "scoring.teacher_at": "process",
    "scoring.teacher_cache_gib": 50,
    "scoring.teacher_url": None,
    "scoring.teacher_patience_s": 600,
    "place.commits": {},
    "place.sources": "same",
    "place.sweep": None,
    "site.runtime_class": None,
    "site.pull_secret": None,
    "site.pod_annotations": {},
}
_BEFORE: dict[str, dict[str, Any]] = {}  # the same by section
for _key, _value in AS_BEFORE.items():
    _BEFORE.setdefault(_key.partition(".")[0], {})[_key.partition(".")[2]] = _value
_TRAIN = TypeAdapter(TrainSpec)
_SKIP_SECTIONS = frozenset(key for key in NOT_VERSIONED if "." not in key)
_SKIP_LEAVES = [key.split(".") for key in NOT_VERSIONED if "." in key]


def to_plain(spec: TrainSpec | EvalSpec) -> dict[str, Any]:
    """The spec as JSON-able dicts and lists."""
    if isinstance(spec, TrainSpec):
        return _TRAIN.dump_python(spec, mode="json")
    return TypeAdapter(EvalSpec).dump_python(spec, mode="json")


def from_plain(plain: Mapping[str, Any]) -> TrainSpec:
    """The spec in a record; a knob that was added after the record has its old-behavior value.

    Raises:
        ValidationError: it is no spec of this version.
    """
    sections = [field.name for field in dataclasses.fields(TrainSpec)]
    return _TRAIN.validate_python({name: filled(name, plain.get(name, {})) for name in sections})


def filled(section: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a record, with later knobs added at their old-behavior values."""
    keys = [(*key.split("."), value) for key, value in (AS_BEFORE | ADDED).items()]
    return {leaf: value for name, leaf, value in keys if name == section} | {**leaves}


def versioned(spec: TrainSpec) -> dict[str, dict[str, Any]]:
    """The fields that decide the numbers a run produces: what its identity is made of."""
    plain = to_plain(spec)
    for section in _SKIP_SECTIONS:
        del plain[section]
    for section, leaf in _SKIP_LEAVES:
        del plain[section][leaf]
    if is_float32(spec):  # there the same tokens are drawn, however many rows are written at once
        del plain["rollout"]["rollout_rows"]
    plain = {section: as_before(section, leaves) for section, leaves in plain.items()}
    return {section: leaves for section, leaves in plain.items() if leaves}


def as_before(section: str, leaves: dict[str, Any]) -> dict[str, Any]:
    """A section as plain data, without the later knobs that have their old-behavior value.

    Two sections have the same content if this is equal, whichever version wrote them.
    """
    before = _BEFORE.get(section)
    if before is None:
        return leaves
    return {
        leaf: value for leaf, value in leaves.items() if leaf not in before or value != before[leaf]
    }


def _content(spec: TrainSpec | EvalSpec) -> dict[str, Any]:
    """All sections of a spec, each after `as_before`."""
    plain = {name: as_before(name, leaves) for name, leaves in to_plain(spec).items()}
    if isinstance(spec, EvalSpec):
        plain["suite"] = suite_content(spec.suite)
    return plain


def suite_content(suite: SuiteSpec) -> dict[str, Any]:
    """A suite as plain data after `as_before`, without the path of its files."""
    plain = as_before("suite", TypeAdapter(SuiteSpec).dump_python(suite, mode="json"))
    plain.pop("include_path", None)
    plain["tasks"] = [as_before("task", task) for task in plain["tasks"]]
    return plain


def digest(content: Any) -> str:
    """sha256 of JSON-able content: key order and the spelling of a number do not matter."""
    text = json.dumps(_canonical(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(content: Any) -> Any:
    """-0.0 and 0.0 are one number; JSON alone would tell them apart."""
    if isinstance(content, dict):
        return {k: _canonical(v) for k, v in cast("dict[str, Any]", content).items()}
    if isinstance(content, list | tuple):
        return [_canonical(item) for item in cast("list[Any]", content)]
    return content + 0.0 if isinstance(content, float) else content


def point_id(spec: TrainSpec) -> str:
    """Ten hex digits that name this content, and no other."""
    return digest(versioned(spec))[:ID_DIGITS]


def slug(spec: TrainSpec) -> str:
    """The readable half of a run's directory name: pair and method, as a DNS label."""
    words = f"{spec.pair.pair_name}-{spec.method.method_name}".lower()
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in words).strip("-")
    return label[: MAX_NAME - ID_DIGITS - 1].rstrip("-")


def chat_settings(data: Mapping[str, Any]) -> str:
    """The settings by which conversations are formatted, as JSON, of a data section as plain data.

    A section that an earlier version wrote lacks them, and means the defaults.
    """
    leaves = ("chat_template_kwargs", "template_date")
    return json.dumps({leaf: data.get(leaf, AS_BEFORE[f"data.{leaf}"]) for leaf in leaves})


def score_key(suite: SuiteSpec, task: TaskSpec, chat: str | None = None) -> str:
    """What makes two scores of one row on one task the same question.

    `chat`: settings of the chat template, if they differ from those that the row was trained with
    or stands for (which are part of the row's identity).
    """
    asked = as_before("task", TypeAdapter(TaskSpec).dump_python(task, mode="json"))
    settings = (suite.apply_chat_template, suite.limit, suite.max_gen_toks)
    later = {"sample": suite.sample, "benchmark_rows": suite.benchmark_rows}
    told: list[Any] = [each for each in (as_before("suite", later), chat) if each]
    return digest([asked, settings, *told])[:ID_DIGITS]


def baseline_key(label: str, pair: PairSpec, quant: QuantSpec, data: DataSpec | None = None) -> str:
    """Identity of a row that no run trained: only `ptq` depends on the quantizer.

    Of `data`, only the formatting of conversations counts; None: the default.
    """
    plain = TypeAdapter(PairSpec).dump_python(pair, mode="json")
    for section, leaf in _SKIP_LEAVES:
        if section == "pair":
            del plain[leaf]
    stored = TypeAdapter(QuantSpec).dump_python(quant, mode="json") if label == "ptq" else None
    stored = stored and as_before("quant", stored)
    chat = chat_settings(TypeAdapter(DataSpec).dump_python(data, mode="json") if data else {})
    told = [] if chat == chat_settings({}) else [chat]
    return digest([label, as_before("pair", plain), stored, *told])[:ID_DIGITS]


def suite_key(suite: SuiteSpec) -> str:
    """Identity of a suite's questions, whatever the suite is called."""
    return digest(sorted(score_key(suite, task) for task in suite.tasks))[:ID_DIGITS]


def eval_id(spec: EvalSpec) -> str:
    """Ten hex digits of what an evaluation asks: all of its spec but paths, names and threads."""
    return eval_digest(spec)[:ID_DIGITS]


def eval_digest(spec: EvalSpec) -> str:
    """The whole hash that `eval_id` begins."""
    plain = _content(spec)
    del plain["place"]
    return digest(plain)
