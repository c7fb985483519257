"""Load everything that a spec names: data, tokenizer, and both models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from stillhouse.distill import models
from stillhouse.distill.chat import chat_of
from stillhouse.distill.encoder import Context
from stillhouse.distill.loop import needed_shares
from stillhouse.distill.pairs import PreparedPair
from stillhouse.distill.prompts import (
    PromptSet,
    check_answers,
    check_ids,
    load_others,
    load_prompts,
)
from stillhouse.distill.roles import Roles
from stillhouse.errors import ContractError
from stillhouse.rundir import Json
from stillhouse.sources import differences, sources_of
from stillhouse.spec import TrainSpec


@dataclass(frozen=True)
class Loaded:
    """The loaded models of a pair, and their prompts."""

    accelerator: Accelerator
    prepared: PreparedPair
    tokenizer: Any
    prompts: PromptSet
    roles: Roles
    sources: Json  # the weights and data it depends on, by digest or commit


def load(spec: TrainSpec, poll: Callable[[], None]) -> Loaded:
    """Load data and models; `poll` is called while models generate, and may raise.

    Raises:
        ConfigError: weights or data are not on this machine.
        ContractError: the tokenizers differ; the data has token ids for which a model has no
            embedding; weights or data changed while they were read.
    """
    models.require_gpus()
    models.use_threads(spec.place.threads)
    accelerator = Accelerator(
        mixed_precision=spec.training.mixed_precision, cpu=not torch.cuda.is_available()
    )
    needed_shares(spec, accelerator.num_processes)
    commits, cache_dir = spec.place.commits, Path(spec.place.cache_dir)
    prepared = models.prepare(spec.pair, spec.quant, cache_dir, commits)
    sources = sources_of(spec, cache_dir)
    tokenizer = models.load_tokenizer(prepared.student, prepared.student_revision)
    chat, context = chat_of(prepared, tokenizer, spec.data), Context.of(spec.pair)
    prompts = load_prompts(spec.data, prepared, chat, context, cache_dir, commits)
    check_answers(spec, f"data {spec.data.data_name}", prompts.train)
    if spec.rescue.other_prompts:
        file = prepared.data_dir / "other.jsonl"
        if spec.rescue.other_file is not None:
            file = Path(spec.rescue.other_file).expanduser()
        others = load_others(file, spec.data, chat, cache_dir)
        check_answers(spec, f"other_file {file}", others)
        prompts = replace(prompts, others=others)
    check_ids(prepared, prompts, tokenizer)
    roles = Roles(spec, prepared, chat, accelerator, poll)
    if found := differences(sources, sources_of(spec, cache_dir)):
        raise ContractError(f"{'; '.join(found)}: it changed while it was read; run again")
    return Loaded(accelerator, prepared, tokenizer, prompts, roles, sources)
