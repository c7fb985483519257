"""Classify the weights of a model: the text decoder's matrices, and everything else.

Only linear layers of the text decoder are quantized and adapted. Embeddings, the head, and norms
are not. Vision and audio towers, and the layers that connect them to the text, are excluded. A
matrix of the text decoder that is not in a linear layer (such as the stacked experts of a mixture)
is still counted, so that "int4" never silently means a small part of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stillhouse.rundir import Json

WIDE = 32  # the smallest group of weights that shares a scale: anything narrower is not a matrix
LEAST_QUANTISED = 0.95  # as a share; 0.97 to 1 without experts, 0.01 to 0.44 with them


@dataclass(frozen=True)
class Coverage:
    """How much of a student is stored by its quantizer, and how much an adapter may change.

    Counts the matrix weights of its text decoder: of all linear layers, and of every other
    parameter that can be viewed as a matrix of at least 32 by 32 (such as stacked experts), without
    embeddings and the head. Norms, kernels of short convolutions and routers over few experts are
    narrower. An adapter's own weights are not counted.
    """

    weights: int
    quantised: int
    adapted: int
    dense: tuple[str, ...]  # kinds of matrices that are not quantized: names, with `*` for a number

    def as_json(self) -> Json:
        """As stored in the contract and in a run's record; shares rounded to four digits."""
        shares = {"quantised_share": self.quantised_share, "adapted_share": self.adapted_share}
        return asdict(self) | {name: round(share, 4) for name, share in shares.items()}

    @property
    def quantised_share(self) -> float:
        """In [0, 1]."""
        return self.quantised / self.weights if self.weights else 0.0

    @property
    def adapted_share(self) -> float:
        """In [0, 1]."""
        return self.adapted / self.weights if self.weights else 0.0

    def told(self, quant_type: str) -> str:
        """A line for the log."""
        stored = f"{self.quantised_share:.1%} are stored as {quant_type} and "
        text = (
            f"of {self.weights:,} matrix weights of the text decoder,"
            f" {stored if self.quantised else ''}{self.adapted_share:.1%} are adapted"
        )
        return f"{text}; dense: {', '.join(self.dense)}" if self.quantised and self.dense else text


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The text decoder's linear layers by their names in `model`; under PEFT, the base's own.

    nn.Linear, its subclasses (also quantized ones), and GPT-2's Conv1D.
    """
    kept = _kept(model)
    return {
        name: module
        for name, module in text_modules(model)
        if isinstance(module, nn.Linear | Conv1D) and id(_stored(module)) not in kept
    }


def matrices(model: nn.Module) -> dict[str, int]:
    """The number of weights of each text-decoder matrix, by its layer's or parameter's name."""
    kept, linear = _kept(model), linear_layers(model)
    sizes = {name: prod(shape(layer)) for name, layer in linear.items()}
    for name, module in text_modules(model):
        if name in linear or isinstance(module, nn.Embedding):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if is_matrix(parameter.shape) and id(parameter) not in kept:
                sizes[f"{name}.{own}"] = parameter.numel()
    return sizes


def coverage(model: nn.Module) -> Coverage:
    """The coverage of a model in its current state: dense or quantized, with or without adapter."""
    sizes, linear = matrices(model), linear_layers(model)
    packed = {name for name, layer in linear.items() if is_quantised(layer)}
    return Coverage(
        weights=sum(sizes.values()),
        quantised=sum(sizes[name] for name in packed),
        adapted=sum(size for name, size in sizes.items() if name.endswith(".base_layer")),
        dense=kinds(name for name in sizes if name not in packed),
    )


def kinds(names: Iterable[str]) -> tuple[str, ...]:
    """Names with numbers replaced (`model.layers.*.mlp.up_proj`), each once."""
    found = dict[str, None]()
    for name in names:
        parts = [part for part in name.split(".") if part != "base_layer"]
        found[".".join("*" if part.isdigit() else part for part in parts)] = None
    return tuple(found)


def is_quantised(layer: nn.Module) -> bool:
    """Whether a linear layer stores quantized weights, ours or bitsandbytes'."""
    return hasattr(layer, "packed") or hasattr(_stored(layer), "quant_state")


def _stored(layer: nn.Module) -> nn.Parameter | None:
    """Its stored weight; None for a packed layer, which computes its weight on each access."""
    return layer._parameters.get("weight")


def shape(layer: Any) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer, however it is stored."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def is_matrix(size: Sequence[int]) -> bool:
    """Whether a tensor of that size can be viewed as a matrix of at least 32 by 32."""
    sides = ((prod(size[:i]), prod(size[i:])) for i in range(1, len(size)))
    return any(min(side) >= WIDE for side in sides)


def text_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the text decoder, by its name in the base: no head, no tower, no adapter."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = _decoder(base)
    start = next(name for name, module in base.named_modules() if module is decoder)
    out = set(_adapters(base))
    for child in decoder.children():
        if any(_is_tower(module) for module in child.modules()):
            out |= {id(module) for module in child.modules()}
    for name, module in decoder.named_modules(prefix=start):
        if id(module) not in out:
            yield name, module


def _decoder(base: Any) -> nn.Module:
    """The module that turns token ids into hidden states, in a text or multimodal model."""
    if not isinstance(base, PreTrainedModel):
        return base
    # It must contain the input embeddings: ModernBERT's get_decoder returns its head.
    embeddings = base.get_input_embeddings()
    found = (base.get_decoder(), base.base_model, base)
    return next(module for module in found if any(m is embeddings for m in module.modules()))


def _adapters(base: nn.Module) -> Iterator[int]:
    """Ids of the modules that PEFT added to its base layers."""
    for module in base.modules():
        if isinstance(module, LoraLayer):
            beside = [c for n, c in cast("nn.Module", module).named_children() if n != "base_layer"]
            yield from (id(inner) for child in beside for inner in child.modules())


def _is_tower(module: nn.Module) -> bool:
    """A model within the model that reads images or sound, not text."""
    return isinstance(module, PreTrainedModel) and (
        "text" not in module.input_modalities
        or module.main_input_name not in ("input_ids", "inputs_embeds")
    )


def _kept(model: nn.Module) -> set[int]:
    """Ids of the weights that stay dense by rule: the head's, and those of embeddings."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    modules = [m for m in base.modules() if isinstance(m, nn.Embedding) or m is head]
    named = [m for n, m in base.named_modules() if n.rpartition(".")[2] == "lm_head"]
    return {id(weight) for m in [*modules, *named] if (weight := _stored(m)) is not None}
