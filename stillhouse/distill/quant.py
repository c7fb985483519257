"""Quantize the student's frozen base to 4 bits or less, in place, before PEFT wraps it.

Training, rollouts, and scoring all use Q(W) x + B A x: the base is quantized once and stays so.
Q(W + B A) is another function, so nothing here lets an adapter be merged into packed weights.

    int4, int3, int2  ours: uniform grid, a scale and an integer zero point per group (asymmetric)
    bnb_fp4, bnb_nf4  bitsandbytes: 16 fixed levels times the largest magnitude of each block

lm_head, everything tied to an embedding, the embeddings, the norms, and vision or audio towers keep
their dense weights. A mixture whose experts would stay dense is refused (`layers.py` counts).

Legend: N out_features, K in_features, G weights per group, J = K / G groups per row, rounded up:
the last group of a row may be shorter.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from stillhouse.distill.layers import (
    LEAST_QUANTISED,
    is_quantised,
    kinds,
    linear_layers,
    matrices,
)
from stillhouse.errors import ConfigError, ContractError
from stillhouse.spec import QuantSpec

INT_FORMAT = "1"  # increment it if the same W gives another Q(W): old adapters are then refused


def quantize_(model: nn.Module, quant: QuantSpec) -> None:
    """Replace every linear layer of a dense causal LM's text decoder by its quantized form.

    One layer at a time, keeping device and train/eval mode; draws no random number.
    Raises ConfigError if a layer's width does not fit the group or too many of the decoder's
    weights are not in linear layers, ContractError if the model is already quantized, already
    wrapped by PEFT, or has nothing to quantize.
    """
    if quant.quant_type == "none":
        return
    for name in _quantisable(model):
        dense = _as_linear(model.get_submodule(name))
        model.set_submodule(name, _quantised(name, dense, quant))
    if not _is_ours(quant):
        # PEFT 0.21 asks the model, not the layer, before it picks its bitsandbytes LoRA layer.
        # Without this mark it takes the dense one, whose merge adds floats to packed bytes.
        model.is_loaded_in_4bit = True  # type: ignore[assignment]


def quantization_error(model: nn.Module, quant: QuantSpec) -> float:
    """||Q(W) - W|| / ||W||, Frobenius, over all layers that quantize_ would replace.

    0 for "none". The model is not changed; a copy of one layer at a time is quantized.
    """
    if quant.quant_type == "none":
        return 0.0
    error = norm = 0.0
    for name in _quantisable(model):
        dense = _as_linear(model.get_submodule(name))
        weight_NK = dequantized_weight(dense)
        difference_NK = dequantized_weight(_quantised(name, dense, quant)) - weight_NK
        error += torch.linalg.vector_norm(difference_NK, dtype=torch.float64).item() ** 2
        norm += torch.linalg.vector_norm(weight_NK, dtype=torch.float64).item() ** 2
    return (error / norm) ** 0.5 if norm else 0.0


@torch.no_grad()
def dequantized_weight(layer: nn.Module) -> Tensor:
    """The float32 [N, K] matrix a layer multiplies by, before rounding to its compute dtype.

    For an nn.Linear, a PackedLinear, or a bitsandbytes Linear4bit; a copy, never a view.
    Raises ContractError for anything else.
    """
    if isinstance(layer, PackedLinear):
        if layer._constant is not None and layer._constant.dtype == torch.float32:
            return layer._constant.clone()
        return _unpack(layer.packed, layer.scale, layer.zero, layer.in_features)
    if type(layer) is nn.Linear:
        return layer.weight.detach().to(torch.float32, copy=True)
    weight: Any = getattr(layer, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None and not getattr(state, "packing_format_for_cpu", False):
        import bitsandbytes.functional as bnb

        kept: Any = getattr(layer, "_constant", None)
        if kept is not None and kept.dtype == torch.float32 and kept.device == weight.device:
            return kept.clone()
        return bnb.dequantize_4bit(weight.data, state).float()
    raise ContractError(
        f"{type(layer).__name__} has no weight that can be read back; "
        "allowed: nn.Linear, PackedLinear, bitsandbytes Linear4bit as quantize_ makes it"
    )


def assert_gradients_exact(model: nn.Module) -> None:
    """Raises ContractError if a backward pass through the model's 4-bit base would be wrong.

    See _bnb_linear for the cause. Cheap: checks every module, reads no tensor.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ContractError(
                f"{name}: bitsandbytes repacked this layer for CPU inference: no gradient would "
                "reach its input, and adapters would get wrong ones. quantize_ forbids it: use that"
            )


def numerics(quant: QuantSpec) -> dict[str, Any]:
    """What Q is, as plain JSON for an adapter's contract: equal dicts mean the same Q(W).

    `symmetric`: whether the grid of a group spans [-max|w|, max|w|] (no zero point).
    """
    if quant.quant_type == "none":
        return {"quant_type": "none"}
    shared = {
        "quant_type": quant.quant_type,
        "quant_group_size": _group(quant),
        "kept_dense": ["lm_head", "embeddings", "norms"],
    }
    if _is_ours(quant):
        ours = {"library": "stillhouse", "library_version": INT_FORMAT, "zero_point": "integer"}
        return shared | ours | {"symmetric": False, "scale_dtype": "float32"}
    theirs = {"library": "bitsandbytes", "library_version": version("bitsandbytes")}
    return shared | theirs | {"symmetric": True, "double_quant": quant.double_quant}


class PackedLinear(nn.Linear):
    """nn.Linear over packed 4-bit weights; computes in its input's dtype, with exact gradients.

    A group's weight is (q - zero) * scale, q and zero integers in [0, 2^bits - 1], scale float32
    > 0: every |w - Q(w)| <= scale / 2 and Q(0) = 0. Fewer than four bits are stored as four.
    A subclass of nn.Linear, so that PEFT wraps it as one.
    """

    packed: Tensor  # [N, J G / 2] uint8: even columns in the high half, odd columns in the low half
    scale: Tensor  # [N, J] float32
    zero: Tensor  # [N, J] uint8

    def __init__(self, dense: nn.Linear, group: int, bits: int = 4) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.dense_dtype = dense.weight.dtype
        packed, scale, zero = _pack(dense.weight.detach(), group, bits)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bias = dense.bias
        self._constant: Tensor | None = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Q(W) [N, K] in the dense layer's dtype, read-only: computed, so `.data` raises."""
        return dequantized_weight(self).to(self.dense_dtype).as_subclass(_ReadOnlyWeight)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.device.type == "cpu":
            return F.linear(x, self._dense_constant(x.dtype), bias)
        return _PackedLinear.apply(x, self.packed, self.scale, self.zero, bias)

    def _dense_constant(self, dtype: torch.dtype) -> Tensor:
        """Q(W) in `dtype`, cached: it never changes, and a CPU run has enough memory.

        Unpacking at every call instead costs 10 % of a training step and 40 % of a decoding step of
        a model of width 64, 30 % and 150 % at width 512 (one CPU thread, float32, measured).
        """
        if self._constant is None or self._constant.dtype != dtype:
            # Not an inference tensor, even if the first call is a rollout or an eval under
            # inference_mode: autograd could not save that for a later backward.
            with torch.inference_mode(False):
                self._constant = dequantized_weight(self).to(dtype)
        return self._constant

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        scale = self.scale
        super()._apply(fn, recurse)
        # model.to(bfloat16) rounds activations and biases, not the grid: Q(W) stays what it was.
        self.scale = scale.to(self.scale.device)
        self._constant = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._constant = None


class _ReadOnlyWeight(Tensor):
    """A computed weight. PEFT merges by writing to `weight.data`; here that would be lost."""

    # Results of arithmetic on it are ordinary tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def _refuse(self, *_: Any) -> NoReturn:
        raise ContractError(
            "an adapter cannot be merged into packed int4 weights, nor start by changing them (as "
            "PiSSA's does): it would be lost. Keep it beside them, as it is trained: Q(W)x + BAx"
        )

    data = property(_refuse, _refuse)


class _PackedLinear(torch.autograd.Function):
    """x Q(W)^T + bias that keeps only the packed form between forward and backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(packed, scale, zero)
        ctx.width = x.shape[-1]
        return F.linear(x, _unpack(packed, scale, zero, ctx.width).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            packed, scale, zero = ctx.saved_tensors
            grad_x = grad_y @ _unpack(packed, scale, zero, ctx.width).to(grad_y.dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0)
        return grad_x, None, None, None, grad_bias


def _pack(weight_NK: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(packed [N, J G / 2], scale [N, J], zero [N, J]) of a dense weight, see PackedLinear."""
    levels = 2**bits - 1  # steps between the values
    # A last group that is shorter is filled up with zeros, which change no group's range.
    weight_NK = F.pad(weight_NK.float(), (0, -weight_NK.shape[1] % group))
    weight_NJG = weight_NK.unflatten(1, (-1, group))
    # 0 belongs to every range: without it the zero point of a group of one sign would fall outside
    # the levels, and clipping it there moves the whole group (a constant 0.3 would become 0).
    low_NJ1 = weight_NJG.amin(-1, keepdim=True).clamp_max(0)
    high_NJ1 = weight_NJG.amax(-1, keepdim=True).clamp_min(0)
    scale_NJ1 = (high_NJ1 - low_NJ1) / levels
    scale_NJ1[scale_NJ1 == 0] = 1  # an all-zero group: any scale gives it back
    zero_NJ1 = (-low_NJ1 / scale_NJ1).round()
    q_NJG = ((weight_NJG / scale_NJ1).round() + zero_NJ1).clamp(0, levels)
    q_NK = q_NJG.flatten(1).to(torch.uint8)
    packed = (q_NK[:, ::2] << 4) | q_NK[:, 1::2]
    return packed, scale_NJ1.squeeze(-1), zero_NJ1.squeeze(-1).to(torch.uint8)


def _unpack(packed: Tensor, scale_NJ: Tensor, zero_NJ: Tensor, width: int) -> Tensor:
    """float32 Q(W) [N, K] of what _pack gave; width: K."""
    q_NJG = torch.stack((packed >> 4, packed & 15), -1).view(*scale_NJ.shape, -1)
    steps_NJG = q_NJG.float() - zero_NJ.unsqueeze(-1)
    return (steps_NJG * scale_NJ.unsqueeze(-1)).flatten(1)[:, :width]


@functools.cache
def _linear4bit() -> Any:
    """bitsandbytes' Linear4bit, with Q(W) cached dense on a CPU, as in PackedLinear and for the
    same reasons: a decoding step of SmolLM2-135M in nf4 takes 0.05 s instead of 0.16 s (batch 4,
    two threads). The stored form, the GPU's path and every value stay bitsandbytes' own."""
    import bitsandbytes

    bnb: Any = bitsandbytes.nn

    class KeptLinear4bit(bnb.Linear4bit):
        _constant: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if x.device.type != "cpu" or self.support_avx512bf16_for_cpu:
                return super().forward(x)
            dtype = self.compute_dtype or x.dtype
            if self._constant is None or self._constant.dtype != dtype:
                with torch.inference_mode(False):
                    self._constant = dequantized_weight(self).to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self._constant, bias).to(x.dtype)

    return KeptLinear4bit


def _bnb_linear(dense: nn.Linear, quant: QuantSpec) -> nn.Module:
    import bitsandbytes

    bnb: Any = bitsandbytes.nn  # its stubs know neither Linear4bit nor what Params4bit takes
    # On "meta": otherwise its constructor would draw random weights that are then discarded.
    layer = _linear4bit()(
        dense.in_features,
        dense.out_features,
        bias=dense.bias is not None,
        compute_dtype=dense.weight.dtype,
        device="meta",
    )
    layer.weight = bnb.Params4bit(
        dense.weight.detach(),
        requires_grad=False,
        blocksize=_group(quant),
        compress_statistics=quant.double_quant,
        quant_type=quant.quant_type.removeprefix("bnb_"),
        module=layer,
    ).to(dense.weight.device)  # bitsandbytes quantizes here
    layer.bias = dense.bias
    # On a CPU with AVX512-BF16, a forward in eval mode whose input needs no gradient (the first
    # rollout) repacks the weight in place for a kernel without autograd support. From then on,
    # in train mode too, the layer's input gets no gradient: adapters below it train on wrong ones
    # (relative error 0.7 to 0.9 measured) and only a warning says so. It also fails where
    # out_features is no multiple of 32. Other CPUs, and GPUs, never do it.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _quantised(name: str, dense: nn.Linear, quant: QuantSpec) -> nn.Module:
    """A new quantized layer for the dense one called `name`; shares the bias, keeps the mode."""
    group = _group(quant)
    # bitsandbytes lets a block extend into the next row, but its CPU dequantizer (0.50.2) then
    # silently reads the wrong scales: in_features 96 at 64 errs by 36 %.
    if not _is_ours(quant) and dense.in_features % group:
        allowed = [size for size in quant.groups if dense.in_features % size == 0]
        raise ConfigError(
            f"{name}: in_features {dense.in_features} (out_features {dense.out_features}) is no "
            f"multiple of quant_group_size {group}. {quant.quant_type} allows {quant.groups}; "
            f"this layer fits {tuple(allowed) or 'none of them, so choose quant=none'}"
        )
    if not torch.isfinite(dense.weight).all():
        raise ContractError(f"{name}: its weight holds NaN or infinity; load the model again")
    if not _is_ours(quant):
        return _bnb_linear(dense, quant).train(dense.training)
    bits = int(quant.quant_type.removeprefix("int"))
    return PackedLinear(dense, group, bits).train(dense.training)


def _quantisable(model: nn.Module) -> list[str]:
    """Names of the layers to quantize: all linear layers of the text decoder.

    Names only, so that each dense weight can be freed as soon as its layer is replaced.
    """
    names = []
    for name, layer in linear_layers(model).items():
        if is_quantised(layer) or name.endswith(".base_layer"):
            raise ContractError(
                f"{name} ({type(layer).__name__}) is already quantised or wrapped by PEFT; "
                "quantise a model loaded dense, once, before PEFT"
            )
        if type(layer) in (nn.Linear, Conv1D):  # subclasses may compute something else
            names.append(name)
    if not names:
        raise ContractError(
            f"the text decoder of {type(model).__name__} has no nn.Linear, so there is nothing to "
            "quantise; choose quant=none"
        )
    sizes = matrices(model)
    share = sum(sizes[name] for name in names) / sum(sizes.values())
    if share < LEAST_QUANTISED:
        left = kinds(name for name in sizes if name not in set(names))
        raise ConfigError(
            f"a quantiser would store {share:.1%} of the text decoder's matrix weights of this"
            f" {type(model).__name__}, at least {LEAST_QUANTISED:.0%} are wanted: {', '.join(left)}"
            " are no plain linear layers and would stay dense (a mixture's experts are stacked"
            " parameters). Choose quant=none, or a student without them"
        )
    return names


def _as_linear(layer: nn.Module) -> nn.Linear:
    """A layer as nn.Linear: itself, or GPT-2's Conv1D, which keeps its matrix transposed."""
    if not isinstance(layer, Conv1D):
        assert isinstance(layer, nn.Linear)
        return layer
    linear = nn.Linear(layer.nx, layer.nf, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def _is_ours(quant: QuantSpec) -> bool:
    return quant.quant_type.startswith("int")


def _group(quant: QuantSpec) -> int:
    """Weights per scale."""
    assert quant.quant_group_size is not None, "a quantiser has a group size"
    return quant.quant_group_size
