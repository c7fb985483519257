"""Read what the files of a model directory say about the model, without torch.

Nothing is guessed: what a file does not say is None.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stillhouse.rundir import Json
from stillhouse.weights_file import TensorHeader, read_object, tensors_of

# Last parts of the names that embeddings and heads have, over all families.
EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
    "tok_embeddings.weight", "backbone.embeddings.weight",
)  # fmt: skip
HEADS = ("lm_head.weight", "embed_out.weight", "lm_head.linear.weight")
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


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
    rows = min((shape[0] for shape in sides if len(shape) == 2), default=count(text, "vocab_size"))
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
    """The tensor whose name has one of these ends; of several, the one of the text model."""
    found = [name for name in tensors if name.endswith(ends)]
    of_text = [n for n in found if not any(word in n for word in ("vision", "visual", "audio"))]
    return min(of_text, key=lambda name: (len(name), name), default=None)


def _optional(file: Path) -> Json:
    return read_object(file) if file.is_file() else {}


def count(config: Json, key: str) -> int | None:
    """A positive whole number that a config holds."""
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _tokens(directory: Path) -> tuple[dict[str, int], frozenset[str]]:
    """Every token's id, and which tokens are not added ones; empty where no file says."""
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
