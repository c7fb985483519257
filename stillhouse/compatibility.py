"""Check, without torch, that a pair's files, its data and the knobs fit one another.

A model directory has parts that somebody put together: a config, a tokenizer, a generation config,
weights. Anything that would end a run at its first step, on every attempt, is reported here in one
sentence before torch is imported. Nothing is guessed: what a file does not say is not checked. A
model that is not on this machine is checked on the machine that has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter

from stillhouse.errors import ConfigError, ContractError
from stillhouse.identity import digest
from stillhouse.local_models import at_hand
from stillhouse.model_files import HEADS, PLAIN_DTYPES, Checkpoint, count, read
from stillhouse.rundir import Json, read_json, write_json
from stillhouse.scores import check_rows
from stillhouse.sources import of_pair, rows_of
from stillhouse.spec import DataSpec, EvalSpec, TrainSpec

# Ends of the names of architectures that are no causal language models.
NOT_CAUSAL = (
    "MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "MultipleChoice",
    "QuestionAnswering", "NextSentencePrediction", "EncoderModel", "RewardModel", "ForEmbedding",
)  # fmt: skip
# Model types whose experts transformers stores as two tensors of three dimensions, and the names by
# which PEFT targets them (transformers 5.23, peft 0.21; a test compares). They get no adapter
# (`new_student`).
EXPERT_NAMES = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
MOE = {kind: "mixtral" for kind in ("minimax", "minimax_m2", "mixtral")} | {
    kind: "qwen2_moe"
    for kind in (
        "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
        "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
        "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen2_moe",
        "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker", "solar_open",
    )
}  # fmt: skip
SHOWN = 3  # tokens that a sentence names


# ------------------------------------------------------------------------- what does not fit


def misfits(checkpoint: Checkpoint, data_text: str = "") -> Iterator[str]:
    """Faults that no knob can fix, one sentence each; `data_text`: text of the data, or ''."""
    config, text, rows = checkpoint.config, checkpoint.text, checkpoint.rows
    yield from _of_another_kind(config, checkpoint.strange)
    vocabulary, width = count(text, "vocab_size"), count(text, "hidden_size")
    if checkpoint.embedding is not None and rows is not None and vocabulary not in (None, rows):
        yield (
            f"config.json says vocab_size {vocabulary}, {checkpoint.embedding} has {rows} rows;"
            " they are not of one checkpoint: get both again"
        )
    is_known = None not in (width, checkpoint.width) and not _has_projection(text)
    if is_known and width != checkpoint.width:
        yield (
            f"config.json says hidden_size {width}, {checkpoint.embedding} is"
            f" {checkpoint.width} wide; they are not of one checkpoint: get both again"
        )
    if checkpoint.has_head is False:
        yield (
            "config.json says tie_word_embeddings false, and no file holds a head"
            f" ({HEADS[0]}), which would be random numbers; get the missing weights, or say true"
            " if embedding and head are the same"
        )
    yield from _beyond(checkpoint, data_text)
    if checkpoint.ends is False:
        yield (
            "nothing says where an answer ends: no eos_token_id in config.json or"
            " generation_config.json, no eos_token in tokenizer_config.json, and no chat template;"
            " name the token in tokenizer_config.json"
        )


def _of_another_kind(config: Json, strange: str | None) -> Iterator[str]:
    stored: Any = config.get("quantization_config") or config.get("compression_config")
    if isinstance(stored, dict):
        how = cast("Json", stored).get("quant_method") or "a quantiser"
        yield (
            f"its weights are stored by {how} (quantization_config); here a base is loaded as it"
            " was before, and quant=NAME quantises the student's: use the checkpoint it was made of"
        )
    elif strange is not None:
        yield (
            f"a tensor is stored as {strange}; weights of {', '.join(sorted(PLAIN_DTYPES))} are"
            " read: use the checkpoint before it was quantised"
        )
    if config.get("is_encoder_decoder") is True:
        yield "it is an encoder with a decoder; what is distilled here is a causal language model"
    for name in cast("list[Any]", config.get("architectures") or []):
        if str(name).endswith(NOT_CAUSAL):
            yield (
                f"it is a {name}; what is distilled here is a causal language model (ForCausalLM)"
            )


def _has_projection(text: Json) -> bool:
    """Some embeddings are narrower than the model, and widened by a matrix (OPT, Electra)."""
    return any(text.get(key) for key in ("word_embed_proj_dim", "embedding_size"))


def _beyond(checkpoint: Checkpoint, data_text: str) -> Iterator[str]:
    """Faults from tokens that have no embedding and will be read. An added token that is never used
    does no harm: Gemma 3's text models have one for images, which they cannot read."""
    tokens = checkpoint.tokens
    used = [
        token
        for token in sorted(tokens, key=lambda t: tokens[t])
        if token in checkpoint.named or token in checkpoint.template or token in data_text
    ]
    if not used and not checkpoint.base_tokens:
        return
    shown = used or sorted(tokens, key=lambda t: tokens[t])
    listed = ", ".join(f"{token!r} ({tokens[token]})" for token in shown[:SHOWN])
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    yield (
        f"its tokenizer's largest token id is {max(tokens.values())}, and"
        f" {checkpoint.embedding or 'the embedding'} has {checkpoint.rows} rows, so ids end at"
        f" {(checkpoint.rows or 0) - 1}: {listed}{more} would be read and cannot be; use the"
        " tokenizer that belongs to these weights, or resize the embedding"
        " (resize_token_embeddings)"
    )


def knob_misfits(checkpoint: Checkpoint, spec: TrainSpec, role: str) -> Iterator[str]:
    """Faults that another knob can fix, one sentence each; `role` is student or teacher."""
    kind = str(checkpoint.config.get("model_type"))
    family = MOE.get(kind)
    targets = spec.lora.target_modules
    if role == "student" and family and (taken := EXPERT_NAMES[family] & {*targets}):
        kept = [name for name in targets if name not in taken]
        yield (
            f"target_modules: PEFT takes {', '.join(sorted(taken))} of {kind} for its experts,"
            " tensors of three dimensions that cannot drop out what goes in and get no adapter"
            f" here; set target_modules=[{','.join(kept) or 'the attention layers'}]"
        )
    most = positions(spec)
    room = count(checkpoint.text, "max_position_embeddings") or count(
        checkpoint.text, "n_positions"
    )
    if room is not None and most > room and not _is_stretched(checkpoint.text):
        data, rollout = spec.data, spec.rollout
        yield (
            f"it has {room} positions (max_position_embeddings), and max_length {data.max_length}"
            f" with min_completion {data.min_completion} and max_new_tokens"
            f" {rollout.max_new_tokens} may ask for {most}: use"
            f" max_length={max(room - most + data.max_length, 0)} or less, or fewer new tokens"
        )
    for leaf, k in (
        ("loss_top_k", spec.loss.loss_top_k if spec.loss.on_loss == "topk" else 0),
        ("overlap_k", spec.monitor.overlap_k if spec.monitor.overlap_steps else 0),
    ):
        if checkpoint.rows is not None and k > checkpoint.rows:
            yield f"{leaf} {k} is above its {checkpoint.rows} tokens; the top k are some of them"


def positions(spec: TrainSpec) -> int:
    """The longest sequence that a model may have to read: prompt and completion."""
    data = spec.data
    prompt = data.max_length - data.min_completion
    return max(data.max_length, prompt + spec.rollout.max_new_tokens)


def _is_stretched(text: Json) -> bool:
    """Whether rotary positions are scaled to reach beyond max_position_embeddings."""
    for key in ("rope_scaling", "rope_parameters"):
        said = text.get(key)
        parts: Iterable[Any] = (
            [said, *cast("Json", said).values()] if isinstance(said, dict) else []
        )
        for part in parts:  # some families have one set for each kind of layer
            if isinstance(part, dict):
                entry = cast("Json", part)
                if entry.get("rope_type", entry.get("type", "default")) not in (None, "default"):
                    return True
    return False


# ------------------------------------------------------------------------- pairs and specs


def check(specs: Iterable[TrainSpec | EvalSpec]) -> None:
    """Look at the models of these specs that are on this machine.

    Raises:
        ContractError: a model whose files do not fit one another. ConfigError: a knob or data that
            do not fit a model, or rows that a suite asks and no package has.
    """
    done: set[object] = set()
    for spec in specs:
        key = _relevant(spec)
        if key not in done:
            done.add(key)
            _check_one(spec)


def _relevant(spec: TrainSpec | EvalSpec) -> object:
    """The part of a spec that is checked here."""
    data = (spec.data.data_path, spec.data.max_length, spec.data.min_completion)
    if isinstance(spec, EvalSpec):
        return spec.pair, data
    loss, monitor = spec.loss, spec.monitor
    ks = (loss.on_loss, loss.loss_top_k, monitor.overlap_k, monitor.overlap_steps)
    return spec.pair, data, spec.lora, spec.rollout.max_new_tokens, ks


def _check_one(spec: TrainSpec | EvalSpec) -> None:
    pair = spec.pair
    if isinstance(spec, EvalSpec):
        check_rows(spec.suite, "eval")
    if pair.pair_source != "hub":  # what `prepare` makes or unpacks fits
        return
    for role, name, revision in (
        ("student", pair.student, pair.student_revision),
        ("teacher", pair.teacher, pair.teacher_revision),
    ):
        found = at_hand(name, revision, "model", spec.place.commits)
        if found is None or not found.path.is_dir():
            continue
        who = f"pair {pair.pair_name}: {role} {name}"
        try:
            checkpoint = read(found.path)
        except ContractError as error:
            raise ContractError(f"{who}: {error}") from error
        data_text = _data_text(spec) if checkpoint.tokens else ""
        if said := next(misfits(checkpoint, data_text), None):
            raise ContractError(f"{who}: {said}")
        largest = _noted(spec) if checkpoint.tokens else None
        if largest is not None:
            check_ids(largest, checkpoint, who)
        mendable = knob_misfits(checkpoint, spec, role) if isinstance(spec, TrainSpec) else iter(())
        if said := next(mendable, None):
            raise ConfigError(f"{who}: {said}")


def _data_text(spec: TrainSpec | EvalSpec) -> str:
    """The text of a local data file, for tokens that only some of its rows may hold."""
    path = Path(spec.data.data_path or "").expanduser()
    is_text = spec.data.data_path and path.suffix in (".jsonl", ".json") and path.is_file()
    return path.read_text(errors="replace") if is_text else ""


# ------------------------------------------------------------------------- ids of encoded rows


def note_largest_id(spec: TrainSpec | EvalSpec, largest: int) -> None:
    """Save the largest token id of these rows under this tokenizer, for checks at plan time."""
    file = _note_file(spec)
    if file is not None:
        write_json(file, {"largest_token_id": largest})


def _noted(spec: TrainSpec | EvalSpec) -> int | None:
    with contextlib.suppress(ContractError, OSError):
        file = _note_file(spec)
        found = None if file is None else (read_json(file) or {}).get("largest_token_id")
        return found if isinstance(found, int) else None
    return None


def _note_file(spec: TrainSpec | EvalSpec) -> Path | None:
    """The file, named by a digest of rows, tokenizer and limits; None if these are not here."""
    cache_dir = Path(spec.place.cache_dir)
    models = of_pair(spec.pair, cache_dir, spec.place.commits)
    rows = rows_of(spec, cache_dir)
    written_by = models.get("tokenizer") or models.get("student")
    if rows is None or written_by is None:
        return None
    sides = [source.get("digest") or source.get("commit") for source in (written_by, rows)]
    limits = TypeAdapter(DataSpec).dump_python(spec.data, mode="json")
    told = [spec.pair.teacher_prompt] if spec.pair.teacher_prompt is not None else []
    content = [sides, limits, spec.pair.teacher_few_shot, *told]
    return cache_dir / "largest_ids" / f"{digest(content)[:16]}.json"


def check_ids(largest: int, checkpoint: Checkpoint, who: str) -> None:
    """Refuse data whose largest token id the model cannot read.

    Raises:
        ContractError: names the id and the rows of the embedding.
    """
    if checkpoint.rows is not None and largest >= checkpoint.rows:
        token = next((t for t, id_ in checkpoint.tokens.items() if id_ == largest), None)
        raise ContractError(
            f"{who}: the data holds token id {largest}{f' ({token!r})' if token else ''}, and"
            f" {checkpoint.embedding or 'the embedding'} has {checkpoint.rows} rows, so ids end at"
            f" {checkpoint.rows - 1}; use the tokenizer that belongs to these weights, or resize"
            " the embedding (resize_token_embeddings)"
        )
