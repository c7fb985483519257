"""Score the rows of a table on a suite: teacher, student, PTQ and adapters.

Every adapter is scored as the function it was trained as, Q(W)x + BAx under its own quantizer,
which its contract names. It is scored as Q(W + BA) only for a task whose name says so, in a
separate column. A teacher is scored as the function that teaches: after its few-shot examples, if
it has any. A score is written as soon as it is known, and computed again only if something that it
depends on has changed (`scores`), with a note of the one that it replaces. What a row does wrong
costs the others nothing (`isolate`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stillhouse import packaged_prompts, scores
from stillhouse.distill import models
from stillhouse.distill.chat import chat_of
from stillhouse.errors import MISTAKE, ContractError, OutOfMemory
from stillhouse.evals import find
from stillhouse.evals.isolate import Isolation
from stillhouse.evals.sample import shown
from stillhouse.evals.suite import LoadedTask, Scorer, Stop, clear_torch_cache, load_tasks
from stillhouse.identity import baseline_key, chat_settings, digest, score_key
from stillhouse.rundir import (
    Json,
    Runs,
    eval_file,
    make_directory,
    now,
    read_json,
    read_score,
    sweep_leftovers,
    write_json,
)
from stillhouse.sources import sources_of
from stillhouse.spec import DataSpec, EvalSpec, PairSpec, QuantSpec, SuiteSpec, TaskSpec
from stillhouse.text import number_of

NAME_WIDTH, SCORE_WIDTH = 25, 8  # of the printed table, as in the seeds
PROBE = "Ida has 7 cups. Then 3 more are found. How many cups now?"


@dataclass(frozen=True)
class Base:
    """A base model that is loaded once and used by several rows."""

    path: str
    revision: str | None
    dtype: str
    quant: QuantSpec | None


@dataclass(frozen=True)
class Row:
    """One line of the table: a base, with or without an adapter."""

    label: str
    kind: str  # adapter, teacher, student or ptq
    home: Path  # its scores are eval_file(home, task)
    base: Base
    adapter: Path | None
    adapter_digest: str | None  # of its contract, which holds the digests of its files
    pair: PairSpec
    cache_dir: Path
    sources: Json = field(compare=False)  # of the pair, as they are now
    examples: int = 0  # few-shot examples that only this row reads before each question
    chat: str | None = None  # chat_settings of its prompts; None: those of its home

    def key(self, suite: SuiteSpec, task: TaskSpec) -> str:
        """The key of this question for this row."""
        return score_key(suite, task, self.chat)

    @property
    def rests_on(self) -> Json:
        """The sources that this row's scores depend on."""
        return scores.rests_on(self.kind, self.sources)

    def drift(self, score: Json, suite: SuiteSpec, task: TaskSpec) -> list[str]:
        """Why a score that answers this question is not valid; [] if it is, or answers another."""
        if score.get("key") != self.key(suite, task):
            return []
        found = scores.changes(
            score, task, self.kind, self.pair, self.sources, self.cache_dir, self.adapter_digest
        )
        if not found and score.get("base_revision", self.base.revision) != self.base.revision:
            found = [f"its base was {score['base_revision']} and is {self.base.revision} here"]
        return found

    def is_answered_by(self, score: Json, suite: SuiteSpec, task: TaskSpec) -> bool:
        """Whether a score answers this question about exactly these weights."""
        question = (self.key(suite, task), self.adapter_digest)
        is_it = question == (score.get("key"), score.get("adapter_digest"))
        return is_it and not self.drift(score, suite, task)

    def finished(self, suite: SuiteSpec, task: TaskSpec) -> Json | None:
        """The score on disk, if it answers this question."""
        score = read_score(self.home, task.task) or {}
        return score if self.is_answered_by(score, suite, task) else None


def run_suite(spec: EvalSpec, adapters: find.Adapters, stop: Stop) -> int:
    """Scores what the spec asks for, prints the table and returns 0.

    Raises:
        ConfigError: an unknown task, data that is not here.
        ContractError: an adapter whose base or quantizer cannot be rebuilt, or that does nothing;
            after all others were scored.
        NotScored: the same, where what went wrong may not go wrong again.
        OutOfMemory: the device cannot hold eval_batch_size.
        Interrupted: asked to stop; every finished score is kept.
    """
    if os.environ.get("RANK", "0") != "0":  # of a launcher's processes the first does it all
        return 0
    runs, suite = Runs(Path(spec.place.runs)), spec.suite
    if adapters.untrained:
        left = number_of(adapters.untrained, "run")
        _say(f"eval: left out, because not trained yet: {left} found there")
    _stay_offline()
    models.use_threads(spec.place.threads)
    cache_dir = Path(spec.place.cache_dir)
    prepared = models.prepare(spec.pair, spec.quant, cache_dir, spec.place.commits)
    sources = sources_of(spec, cache_dir)
    isolation = Isolation()
    for home, why in adapters.gone.items():
        isolation.fail(home, MISTAKE, f"ContractError: {why}")
    rows = [
        *_baselines(spec, prepared, sources, runs, isolation),
        *_adapters(spec, prepared, sources, adapters.found, isolation),
    ]
    missing: set[tuple[Row, TaskSpec]] = set()
    for row in rows:
        isolation.forget(row.home)
        with isolation.guard(row.home):
            open_tasks = {(row, t) for t in suite.tasks if row.finished(suite, t) is None}
            if open_tasks:
                make_directory(row.home)
                missing |= open_tasks
            else:
                isolation.forget_begun(row.home)  # it died after the last score
                isolation.done(row.home)
    rows = [row for row in rows if row.home not in isolation.failed]
    todo = f"{len(missing)} of {number_of(len(rows) * len(suite.tasks), 'score')} to find"
    _say(f"eval: {number_of(len(rows), 'row')}, suite {suite.suite_name}: {todo}")
    _say_what_drifted(rows, suite)
    if missing:
        _score_all(spec, prepared, rows, missing, stop, isolation)
    _say(table(rows, suite))
    isolation.check()
    return 0


def load_suite(suite: SuiteSpec, data_dir: Path, cache_dir: Path, fetches: bool) -> None:
    """Load every task of a suite with its data once, downloading it if `fetches`.

    Raises:
        ConfigError: an unknown task, data that is not here and cannot be downloaded.
        ConnectionError: the hub cannot be reached; try again.
    """
    if not fetches:
        _stay_offline()
    load_tasks(suite, suite.tasks, data_dir, cache_dir=cache_dir)


def _say(text: str) -> None:
    print(text, flush=True)


def _stay_offline() -> None:
    """Nothing is downloaded unless the user said so; the libraries are imported by now."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])
    if os.environ["HF_HUB_OFFLINE"].upper() in ("1", "ON", "YES", "TRUE"):
        for name in ("huggingface_hub.constants", "datasets.config"):
            vars(sys.modules[name])["HF_HUB_OFFLINE"] = True


def _say_what_drifted(rows: list[Row], suite: SuiteSpec) -> None:
    for row in rows:
        for task in suite.tasks:
            if why := row.drift(read_score(row.home, task.task) or {}, suite, task):
                _say(f"eval: {row.label} {task.task} drifted, scored anew: {'; '.join(why)}")


# ---------------------------------------------------------------- rows


def _baselines(
    spec: EvalSpec, prepared: models.PreparedPair, sources: Json, runs: Runs, isolation: Isolation
) -> list[Row]:
    """The rows that no run trained, but for those whose directory is no baseline's."""
    pair, wants, cache_dir = spec.pair, spec.evaluation, Path(spec.place.cache_dir)
    teacher = Base(prepared.teacher, prepared.teacher_revision, pair.teacher_dtype, None)
    student = Base(prepared.student, prepared.student_revision, pair.student_dtype, None)
    wanted = [("teacher", "teacher", teacher)] if wants.eval_teacher else []
    wanted += [("student", "student", student)] if wants.eval_student else []
    if wants.eval_ptq and spec.quant.quant_type != "none":  # with none it is the student's row
        quantised = replace(student, quant=spec.quant)
        wanted += [("ptq", f"ptq_{spec.quant.quant_type}", quantised)]
    rows = []
    for kind, label, base in wanted:
        home = runs.baseline(kind, baseline_key(kind, pair, spec.quant, spec.data))
        plain = TypeAdapter(type(pair)).dump_python(pair, mode="json")
        quant = base.quant and _plain(base.quant)
        about = {"format": 1, "label": kind, "pair": plain, "quant": quant}
        if (chat := chat_settings(_plain(spec.data))) != chat_settings({}):
            about["chat"] = chat
        examples = pair.teacher_few_shot if kind == "teacher" else 0
        if kind == "teacher" and pair.teacher_prompt is not None:
            _say("eval: teacher is asked without its teacher_prompt, whose fields no test has")
        with isolation.guard(home):
            if read_json(home / "baseline.json") != about:
                write_json(home / "baseline.json", about)
            rows.append(
                Row(label, kind, home, base, None, None, pair, cache_dir, sources, examples)
            )
    return rows


def _adapters(
    spec: EvalSpec, prepared: models.PreparedPair, sources: Json, found: Iterable[find.Found],
    isolation: Isolation,
) -> list[Row]:  # fmt: skip
    """The rows of these adapters, but for those that cannot be rebuilt."""
    rows, elsewhere = [], []
    checked: set[str] = set()
    for each in found:
        with isolation.guard(each.home):
            contract = models.read_contract(each.adapter)
            packaged_prompts.check_apart(contract["data"], spec.suite, str(each.adapter))
            quant = _quant(contract, each.adapter)
            # Many adapters, one base: its weights are hashed once, not once per adapter.
            promise = digest([contract["base"], contract["quant"], contract["numerics"]])
            if promise not in checked:
                models.check_contract(contract, prepared, quant)
                checked.add(promise)
            base = Base(
                prepared.student,
                prepared.student_revision,
                contract["dtype"],
                None if quant.quant_type == "none" else quant,
            )
            label = _label(quant.quant_type, each)
            place = (each.home, base, each.adapter, digest(contract)[:16])
            cache_dir = Path(spec.place.cache_dir)
            row = Row(label, "adapter", *place, spec.pair, cache_dir, sources)
            own, chat = chat_settings(contract["data"]), chat_settings(_plain(spec.data))
            if chat != own and spec.suite.apply_chat_template:
                row = replace(row, chat=chat)
                _say(f"eval: {label} was trained with {own}, and is asked with {chat}")
            rows.append(row)
            if quant != spec.quant:
                elsewhere.append(f"{label} ({_words(quant)})")
    if elsewhere:
        _say(
            f"eval: trained under another quantiser than {_words(spec.quant)}, scored under their"
            f" own: {', '.join(elsewhere)}"
        )
    return rows


def _quant(contract: Json, adapter: Path) -> QuantSpec:
    try:
        return TypeAdapter(QuantSpec).validate_python(contract["quant"])
    except (KeyError, ValidationError) as error:
        raise ContractError(
            f"{adapter}: its quantiser {contract.get('quant')} is unknown to this version"
        ) from error


def _plain(section: QuantSpec | DataSpec) -> Json:
    return TypeAdapter(type(section)).dump_python(section, mode="json")


def _words(quant: QuantSpec) -> str:
    group = f" group {quant.quant_group_size}" if quant.quant_group_size else ""
    return f"{quant.quant_type}{group}{', double' if quant.double_quant else ''}"


def _label(quant_type: str, found: find.Found) -> str:
    """The seeds' name of a row: lmbda_1_int4 is int4_lmbda_1; a run without a name keeps its id."""
    if found.name is not None:
        return f"{quant_type}_{found.name.removesuffix(f'_{quant_type}')}"
    slug, _, identity = found.home.name.rpartition("-")
    readable = f"{quant_type}_{slug}"[: NAME_WIDTH - len(identity) - 1].rstrip("-")
    return f"{readable}-{identity}"


def table(rows: list[Row], suite: SuiteSpec) -> str:
    """The seeds' table, blank where there is no score; one of a sample has its standard error."""
    body = [
        [task.task for task in suite.tasks],
        *([shown(row.finished(suite, t)) for t in suite.tasks] for row in rows),
    ]
    widths = [max(SCORE_WIDTH, *map(len, column)) for column in zip(*body, strict=True)]
    labels = ["model", *(row.label[:NAME_WIDTH] for row in rows)]
    return "\n".join(
        " | ".join([label.ljust(NAME_WIDTH), *map(str.rjust, cells, widths)])
        for label, cells in zip(labels, body, strict=True)
    )


# ---------------------------------------------------------------- scoring


def _score_all(
    spec: EvalSpec,
    prepared: models.PreparedPair,
    rows: list[Row],
    missing: set[tuple[Row, TaskSpec]],
    stop: Stop,
    isolation: Isolation,
) -> None:
    wanted = [task for task in spec.suite.tasks if any(t == task for _, t in missing)]
    tasks = load_tasks(spec.suite, wanted, prepared.data_dir, cache_dir=Path(spec.place.cache_dir))
    tokenizer = models.load_tokenizer(prepared.student, prepared.student_revision)
    chat = chat_of(prepared, tokenizer, spec.data)
    scorer = Scorer(spec.suite, chat, spec.evaluation.eval_batch_size, stop)
    rows = [row for row in rows if any(r == row for r, _ in missing)]
    suspects = {row.home for row in rows if isolation.is_suspect(row.home)}
    for home in suspects:
        _say(f"eval: a process died while it scored {home.name}, which is scored last")
    rows = [row for row in rows if row.home not in isolation.failed]
    batches = dict.fromkeys((row.home in suspects, row.base) for row in rows)
    for is_last, base in sorted(batches, key=lambda batch: batch[0]):
        stop.check()
        of_base = [r for r in rows if (r.home in suspects, r.base) == (is_last, base)]
        # Rows without an adapter first: they need the base before PEFT has changed it.
        of_base.sort(key=lambda row: row.adapter is not None)
        try:
            _score_base(base, of_base, tasks, missing, scorer, spec.suite, isolation)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise OutOfMemory(
                f"eval: out of memory at eval_batch_size={spec.evaluation.eval_batch_size};"
                " finished scores are kept, run again with a smaller one"
            ) from error
        finally:
            scorer.engine = None  # it holds the base, and memory may not hold two
            clear_torch_cache()


def _score_base(
    base: Base, rows: list[Row], tasks: list[LoadedTask], missing: set[tuple[Row, TaskSpec]],
    scorer: Scorer, suite: SuiteSpec, isolation: Isolation,
) -> None:  # fmt: skip
    device = models.pick_device()
    model: Any = None
    # Teacher and untrained student of a self pair are one model: it is scored once.
    of_base: dict[tuple[str, str, int], Json] = {}
    for number, row in enumerate(rows):
        if model is None:
            with isolation.guard(*(row.home for row in rows[number:])):
                model = models.load_base(base.path, base.revision, base.dtype, base.quant, device)
            if model is None:
                return
        wanted = [task for task in tasks if (row, task.spec) in missing]
        with isolation.scoring(row.home):
            if row.adapter is None:
                _ask(model, row, wanted, scorer, suite, of_base)
            elif as_trained := [task for task in wanted if not task.spec.is_requantised]:
                model = models.attach_adapter(model, row.adapter, f"row{number}")
                _check_effect(model, row, scorer.chat.tokenizer)
                _ask(model, row, as_trained, scorer, suite, {})
                model.delete_adapter(f"row{number}")
            otherwise = [task for task in wanted if task.spec.is_requantised]
            if row.adapter is not None and otherwise:
                other = models.merged_and_requantised(
                    base.path, base.revision, base.dtype, base.quant, device, row.adapter
                )
                _ask(other, row, otherwise, scorer, suite, {})
        if row.home in isolation.failed:  # what it left in the base is no part of the others
            model = scorer.engine = None
            clear_torch_cache()


def _ask(
    model: Any, row: Row, tasks: list[LoadedTask], scorer: Scorer, suite: SuiteSpec,
    known: dict[tuple[str, str, int], Json],
) -> None:  # fmt: skip
    """Score and write; results in `known` of this model are reused, and new ones added to it."""
    if tasks:
        _check_numbers(model, row, scorer.chat.tokenizer)
    for task in tasks:
        scorer.stop.check()
        # A model without an adapter has nothing to merge: it is itself in both columns of a task.
        question = (task.spec.asks, task.spec.metric, row.examples)
        if question not in known:
            known[question] = scorer.score(model, task, row.label, row.examples)
        # Another process of this sweep may have been faster: a baseline's directory has no lock.
        if row.finished(suite, task.spec) is None:
            _write(row, task.spec, suite, known[question])


def _check_numbers(model: Any, row: Row, tokenizer: Any) -> None:
    """Refuse a model with NaN outputs, whose answers would be scored as wrong."""
    if not _probe(model, tokenizer).isfinite().all():
        raise ContractError(f"{row.adapter or row.base.path}: its outputs are NaN or infinite")


def _check_effect(model: Any, row: Row, tokenizer: Any) -> None:
    """Refuse an adapter that changes nothing: its score would be the base's."""
    logits_1TV = _probe(model, tokenizer)
    with model.disable_adapter():
        is_idle = (_probe(model, tokenizer) == logits_1TV).all()
    if is_idle:
        raise ContractError(
            f"{row.adapter}: switched on or off, this adapter leaves every output as it is; it"
            " is untrained, or its weights do not reach the base"
        )


def _probe(model: Any, tokenizer: Any) -> Any:
    ids_1T = tokenizer(PROBE, return_tensors="pt")["input_ids"].to(model.device)
    return model(input_ids=ids_1T).logits


def _write(row: Row, task: TaskSpec, suite: SuiteSpec, score: Json) -> None:
    # Read once: another evaluation, which was here first, may write it at any moment.
    there = read_score(row.home, task.task) or {}
    if row.is_answered_by(there, suite, task):
        return
    ours = {name: models.versions()[name] for name in ("transformers", "torch", "peft")}
    score = score | {
        "task": task.task,
        "examples": row.examples,
        "key": row.key(suite, task),
        "adapter_digest": row.adapter_digest,
        "base_revision": row.base.revision,
        "sources": row.rests_on,
        "machine": models.machine(),
        "before": scores.replaced(there, row.drift(there, suite, task) or ["another question"]),
        "quant_type": row.base.quant.quant_type if row.base.quant else "none",
        "versions": score["versions"] | ours,
        "finished": now(),
    }
    file = eval_file(row.home, task.task)
    sweep_leftovers(file.parent)
    write_json(file, score)
    _say(
        f"  {row.label} {task.task}: {score['metric']} {shown(score)}"
        f" ({number_of(score['n'], 'document')}, {score['seconds']:.1f} s)"
    )
