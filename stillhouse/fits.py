"""This file is where it is said, without torch, what of a pair, its data and knobs does not fit.

A model directory has halves that somebody put together: a config, a tokenizer, a generation config,
weights. Whatever would end a run at its first step, on every attempt, is said here in a sentence
before torch is imported. Nothing is guessed: what a file does not tell is not checked, and a model
that is not on this machine is checked where it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stillhouse.at_hand import at_hand
from stillhouse.errors import ConfigError, ContractError
from stillhouse.rundir import Json
from stillhouse.spec import EvalSpec, TrainSpec
from stillhouse.weights_file import TensorHeader, read_object, tensors_of

# Last parts of the names that embeddings and heads have, over all families.
EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
    "tok_embeddings.weight", "backbone.embeddings.weight",
)  # fmt: skip
HEADS = ("lm_head.weight", "embed_out.weight", "lm_head.linear.weight")
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
# Ends of the names of architectures that write no text from left to right.
NOT_CAUSAL = (
    "MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "MultipleChoice",
    "QuestionAnswering", "NextSentencePrediction", "EncoderModel", "RewardModel", "ForEmbedding",
)  # fmt: skip
# Whose experts transformers holds as two tensors of three dimensions, and what PEFT takes for their
# names (transformers 5.23, peft 0.21; a test compares). They get no adapter (`new_student`).
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


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a model directory say about it."""

    directory: Path
    config: Json
    text: Json  # the part of the config that is about text; of most models, all of it
    embedding: str | None  # the tensor's name; None: no name that we know
    rows: int | None  # token ids below it have an embedding and, if the head is another, a logit
    width: int | None  # of the embedding's rows
    tokens: Mapping[str, int]  # those from `rows` on, added ones included
    base_tokens: int  # how many of these are the tokenizer's own, and none that somebody added
    ends: bool | None  # whether a file names the token that ends an answer; None: a template may
    named: frozenset[str]  # tokens that a role (eos, pad, …) names
    template: str
    strange: str | None  # dtype of a tensor that is no plain number
    has_head: bool | None  # None: cannot be told from the files


def read(directory: Path) -> Checkpoint:
    """What a model directory's files say; read once as long as they do not change.

    Raises:
        ContractError: a file that is missing, torn, or not of the others' checkpoint.
    """
    files = sorted(f for f in directory.iterdir() if f.is_file())
    seen = tuple((f.name, (s := f.stat()).st_size, s.st_mtime_ns) for f in files)
    return _read(directory, seen)


@functools.lru_cache(maxsize=64)
def _read(directory: Path, seen: tuple[tuple[str, int, int], ...]) -> Checkpoint:
    config = read_object(directory / "config.json")
    text = text_config(config)
    tensors = tensors_of(directory)
    embedding = _named(tensors, EMBEDDINGS)
    head = _named(tensors, HEADS)
    sides = [tensors[name].shape for name in (embedding, head) if name is not None]
    rows = min((shape[0] for shape in sides if len(shape) == 2), default=_count(text, "vocab_size"))
    tokens, own = _tokens(directory)
    beyond = {} if rows is None else {token: id_ for token, id_ in tokens.items() if id_ >= rows}
    words = _optional(directory / "tokenizer_config.json")
    template = _template(directory, words)
    wide = tensors[embedding].shape if embedding is not None else ()
    return Checkpoint(
        directory,
        config,
        text,
        embedding,
        rows,
        wide[1] if len(wide) == 2 else None,
        beyond,
        sum(token in own for token in beyond),
        _ends(directory, config, text, words, template),
        _roles(directory, words),
        template,
        next((t.dtype for t in tensors.values() if t.dtype not in PLAIN_DTYPES), None),
        _has_head(tensors, embedding, head, _is_untied(config, text)),
    )


def text_config(config: Json) -> Json:
    """What a config says about text: of a multimodal model, a part of it."""
    part = config.get("text_config")
    return cast("Json", part) if isinstance(part, dict) else config


def _named(tensors: Mapping[str, TensorHeader], ends: tuple[str, ...]) -> str | None:
    """The tensor whose name ends so; of several, the one of the text model."""
    found = [name for name in tensors if name.endswith(ends)]
    of_text = [n for n in found if not any(word in n for word in ("vision", "visual", "audio"))]
    return min(of_text, key=lambda name: (len(name), name), default=None)


def _optional(file: Path) -> Json:
    return read_object(file) if file.is_file() else {}


def _count(config: Json, key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _tokens(directory: Path) -> tuple[dict[str, int], frozenset[str]]:
    """Every token's id, and which of them are the tokenizer's own; none where no file tells."""
    whole = _optional(directory / "tokenizer.json")
    model = whole.get("model")
    vocabulary: Any = cast("Json", model).get("vocab") if isinstance(model, dict) else None
    own: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        own = {t: i for t, i in cast("Json", vocabulary).items() if isinstance(i, int)}
    elif isinstance(vocabulary, list):  # Unigram's: [token, score] pairs
        pairs = cast("list[list[Any]]", vocabulary)
        own = {str(pair[0]): id_ for id_, pair in enumerate(pairs) if pair}
    added: dict[str, int] = {}
    for entry in cast("list[Any]", whole.get("added_tokens") or []):
        if isinstance(entry, dict) and isinstance(cast("Json", entry).get("id"), int):
            added[str(cast("Json", entry).get("content"))] = cast("Json", entry)["id"]
    later: Any = _optional(directory / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(later, dict):
        for id_, entry in cast("Json", later).items():
            if id_.isdecimal() and isinstance(entry, dict):
                added[str(cast("Json", entry).get("content"))] = int(id_)
    return own | added, frozenset(own.keys() - added.keys())


def _template(directory: Path, words: Json) -> str:
    """The chat template's text, wherever it is kept; '' where there is none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(errors="replace")
    kept = words.get("chat_template") or _optional(directory / "chat_template.json").get(
        "chat_template"
    )
    return str(kept) if kept else ""


def _roles(directory: Path, words: Json) -> frozenset[str]:
    """The tokens that some role names, such as eos_token and pad_token."""
    special = _optional(directory / "special_tokens_map.json")
    found: set[str] = set()
    for source in (special, words):
        for key, value in source.items():
            if key.endswith("_token"):
                content = cast("Json", value).get("content") if isinstance(value, dict) else value
                found |= {content} if isinstance(content, str) else set()
    return frozenset(found)


def _ends(directory: Path, config: Json, text: Json, words: Json, template: str) -> bool | None:
    generation = _optional(directory / "generation_config.json")
    if any(part.get("eos_token_id") is not None for part in (config, text, generation)):
        return True
    special = _optional(directory / "special_tokens_map.json")
    if any(part.get("eos_token") is not None for part in (words, special)):
        return True
    return None if template else False


def _has_head(
    tensors: Mapping[str, TensorHeader], embedding: str | None, head: str | None, is_untied: bool
) -> bool | None:
    if head is not None or not is_untied or embedding is None:
        return True if head is not None else None
    rows = tensors[embedding].shape[0]
    # A head of a name that we do not know is still a matrix with a row for each token.
    others = (t.shape for name, t in tensors.items() if name != embedding)
    return None if any(len(shape) == 2 and shape[0] == rows for shape in others) else False


def _is_untied(config: Json, text: Json) -> bool:
    """Whether the config says that the head has weights of its own; a default is not known here."""
    return config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is False


# ------------------------------------------------------------------------- what does not fit


def misfits(checkpoint: Checkpoint, asked: str = "") -> Iterator[str]:
    """What no knob could mend, one sentence each; `asked`: text of the data, if it is at hand."""
    config, text, rows = checkpoint.config, checkpoint.text, checkpoint.rows
    yield from _of_another_kind(config, checkpoint.strange)
    vocabulary, width = _count(text, "vocab_size"), _count(text, "hidden_size")
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
    yield from _beyond(checkpoint, asked)
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


def _beyond(checkpoint: Checkpoint, asked: str) -> Iterator[str]:
    """Tokens without an embedding that will be read. An added one that nobody uses does no harm:
    Gemma 3's text models have one for images, which they cannot read."""
    tokens = checkpoint.tokens
    used = [
        token
        for token in sorted(tokens, key=lambda t: tokens[t])
        if token in checkpoint.named or token in checkpoint.template or token in asked
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
    """What another knob could mend, one sentence each; `role` is student or teacher."""
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
    room = _count(checkpoint.text, "max_position_embeddings") or _count(
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
            do not fit a model.
    """
    done: set[object] = set()
    for spec in specs:
        key = _relevant(spec)
        if key not in done:
            done.add(key)
            _check_one(spec)


def _relevant(spec: TrainSpec | EvalSpec) -> object:
    """What of a spec is looked at here."""
    data = (spec.data.data_path, spec.data.max_length, spec.data.min_completion)
    if isinstance(spec, EvalSpec):
        return spec.pair, data
    loss, monitor = spec.loss, spec.monitor
    ks = (loss.on_loss, loss.loss_top_k, monitor.overlap_k, monitor.overlap_steps)
    return spec.pair, data, spec.lora, spec.rollout.max_new_tokens, ks


def _check_one(spec: TrainSpec | EvalSpec) -> None:
    pair = spec.pair
    if pair.pair_source != "hub":  # what is made or unpacked here fits
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
        asked = _asked(spec) if checkpoint.tokens else ""
        if said := next(misfits(checkpoint, asked), None):
            raise ContractError(f"{who}: {said}")
        mendable = knob_misfits(checkpoint, spec, role) if isinstance(spec, TrainSpec) else iter(())
        if said := next(mendable, None):
            raise ConfigError(f"{who}: {said}")


def _asked(spec: TrainSpec | EvalSpec) -> str:
    """The text of a local data file, for tokens that only some of its rows may hold."""
    path = Path(spec.data.data_path or "").expanduser()
    is_text = spec.data.data_path and path.suffix in (".jsonl", ".json") and path.is_file()
    return path.read_text(errors="replace") if is_text else ""


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
