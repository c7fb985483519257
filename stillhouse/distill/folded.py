"""Build a copy of a model for generation, with adapters folded in: W = Q(W) + s B A.

The copy is the architecture's own transformers module. In it, each projection that is quantized,
adapted, or of another dtype is a plain nn.Linear. Its weight is rewritten in place once per
rollout: formed in float32, and rounded once to the dtype that the model computes in. Embeddings,
norms, the head, and everything else are the model's own tensors. So a decoding step has no adapter,
no quantizer, and no casts; the copy takes only the memory of those projections; and its tensors
never move.

Legend: B rows, b rows still being written, P prompt positions, S = P + new positions, n positions
of one call, V vocabulary, [N, K] a map from K to N.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from stillhouse.distill import fixed
from stillhouse.distill.fixed import FixedDecoding, FixedDecodings
from stillhouse.distill.layers import is_quantised, shape
from stillhouse.distill.quant import dequantized_weight

# Cache layers that store a list of positions: with these, rows can be padded on the left, and be
# removed from the batch. A recurrent state would include the padding.
LISTS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
# Allowed difference between the logits of copy and model, relative to their Euclidean norm; another
# function gives about 1.4. Half precision gives up to 0.4 in chaotic nets of 12 layers; each step
# of a run checks what it draws against a bound of its own.
ALIKE, ALIKE_HALF = 1e-4, 0.6


def base_of(model: Any) -> Any:
    """The causal LM inside an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def computes_in(causal_lm: Any) -> torch.dtype:
    """The dtype of its products now: autocast's, or else that of its embeddings."""
    embedding = causal_lm.get_input_embeddings().weight
    if torch.is_autocast_enabled(embedding.device.type):
        return torch.get_autocast_dtype(embedding.device.type)
    return embedding.dtype


def can_fold(layer: Any) -> bool:
    """Whether a layer is W x + b, perhaps plus (alpha / r) B A x, and W can be read back."""
    if isinstance(layer, LoraLayer):
        odd = layer.merged or layer.lora_variant or any(layer.lora_bias.values())
        return not odd and can_fold(layer.base_layer)
    if isinstance(layer, nn.Linear | Conv1D) and not is_quantised(layer):
        return True  # a subclass may compute something else: the copy is compared with the model
    state: Any = getattr(getattr(layer, "weight", None), "quant_state", None)
    is_repacked = getattr(state, "packing_format_for_cpu", False)
    return is_quantised(layer) and not is_repacked


@torch.no_grad()
def dense_weight(layer: Any, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N K"]:
    """The float32 matrix of a projection and of its active adapters: a new tensor.

    Q(W) is taken as a model that computes in `dtype` multiplies by it, rounded to that.
    """
    base = getattr(layer, "base_layer", layer)
    if is_quantised(base):
        weight_NK = dequantized_weight(base)
    else:
        stored = base.weight.T if isinstance(base, Conv1D) else base.weight
        weight_NK = stored.detach().to(torch.float32, copy=True)
    if dtype != torch.float32:
        weight_NK = weight_NK.to(dtype).float()
    if base is not layer and not layer.disable_adapters:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                weight_NK.addmm_(b.float(), a.float(), alpha=layer.scaling[name])
    return weight_NK


def obstacle(model: nn.Module) -> str | None:
    """Why a folded copy would not compute what `model` computes; None if it would, as far as the
    types of its modules show."""
    if isinstance(model, PeftModel) and not isinstance(model.base_model, LoraModel):
        return f"its adapter is a {type(model.base_model).__name__}, not LoRA"
    causal_lm = base_of(model)
    name = type(causal_lm).__name__
    if not isinstance(causal_lm, PreTrainedModel) or causal_lm.config.is_encoder_decoder:
        return f"{name} is no decoder of transformers"
    for name, module in causal_lm.named_modules():
        of = f"{name} ({type(module).__name__})" if name else type(module).__name__
        if isinstance(module, BaseTunerLayer) and not can_fold(module):
            return f"{of} is not W x + (alpha / r) B A x"
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{of} is trained whole"
        if "forward" in vars(module):
            return f"{of} has a forward of its own"
    for layer in DynamicCache(config=causal_lm.config).layers:
        if type(layer) not in LISTS:
            return f"it has a recurrent state ({type(layer).__name__})"
    return None


class Folded:
    """A copy of a model for generation, with adapters folded in."""

    def __init__(self, model: nn.Module) -> None:
        """Copies nothing; `fold_` does."""
        self.causal_lm = base_of(model)
        self.copy: Any = None
        self.dtype = torch.float32
        self.refused: str | None = None  # why the model with its current modules cannot be copied
        self.fixed: FixedDecodings | None = None  # on a GPU, if steps of fixed shape are the same
        self.unfixed = ""  # why they are not
        self._modules: list[nn.Module] = []  # the model's modules when the copy was built
        self._own: list[tuple[Any, nn.Linear]] = []
        self._shared: list[tuple[nn.Module, nn.Module]] = []

    def bytes(self) -> int:
        """The size of the copy's own projections, in the dtype that the model computes in now."""
        size, dtype = 0, computes_in(self.causal_lm)
        head = self.causal_lm.get_output_embeddings()
        inside = set[int]()
        for module in self.causal_lm.modules():
            if id(module) in inside or module is head or not _is_folded(module, dtype):
                continue
            inside |= {id(part) for part in module.modules()}
            n, k = shape(getattr(module, "base_layer", module))
            size += n * k * dtype.itemsize
        return size

    def fold_(self) -> str | None:
        """Update the copy to the model's current function. None, or why it does not compute that.

        The first time, and whenever the model's modules or compute dtype have changed, the copy is
        built anew and its logits are compared with the model's.
        """
        modules, dtype = [*self.causal_lm.modules()], computes_in(self.causal_lm)
        is_known = dtype == self.dtype and len(modules) == len(self._modules)
        is_known = is_known and all(map(lambda a, b: a is b, modules, self._modules))
        if is_known and self.refused:
            return self.refused
        if not is_known:
            self.dtype, self._modules = dtype, modules
            self._empty()  # free the old copy before the new one is built
            self.copy = self._twin(self.causal_lm, {})
        with torch.no_grad():
            for layer, linear in self._own:
                linear.weight.copy_(dense_weight(layer, self.dtype))
                bias = getattr(layer, "base_layer", layer).bias
                if bias is not None:
                    linear.bias.copy_(bias)
        for module, twin in self._shared:  # pick up tensors that were replaced
            twin._parameters.update(module._parameters)
            twin._buffers.update(module._buffers)
        if not is_known:
            ids_BT, mask_BT, want_BTV = self._wanted()
            self.refused = self._difference(ids_BT, mask_BT, want_BTV)
            if self.refused:
                self._empty()
            elif ids_BT.is_cuda:
                with self.arithmetic():
                    why = fixed.obstacle(self.copy, ids_BT, mask_BT, want_BTV, self._may())
                self.fixed = FixedDecodings(self.copy) if why is None else None
                self.unfixed = why or ""
        return self.refused

    def _empty(self) -> None:
        self.copy, self._own, self._shared, self.fixed = None, [], [], None

    def _twin(self, module: Any, known: dict[int, nn.Module]) -> nn.Module:
        if id(module) in known:
            return known[id(module)]
        is_head = module is self.causal_lm.get_output_embeddings()
        if not is_head and _is_folded(module, self.dtype):
            known[id(module)] = twin = self._linear(module)
            self._own.append((module, twin))
            return twin
        known[id(module)] = twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twin.__dict__ |= {
            "training": False,
            "_parameters": dict(module._parameters),
            "_buffers": dict(module._buffers),
            "_modules": {
                name: child if child is None else self._twin(child, known)
                for name, child in module._modules.items()
            },
        }
        self._shared.append((module, twin))
        return twin

    def _linear(self, layer: Any) -> nn.Linear:
        base = getattr(layer, "base_layer", layer)
        (n, k), device = shape(base), self.causal_lm.get_input_embeddings().weight.device
        linear = nn.Linear(k, n, bias=base.bias is not None, device="meta", dtype=self.dtype)
        return linear.to_empty(device=device).requires_grad_(False).eval()

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The context in which decoding steps compute as the model does; with autocast only if a
        base of another dtype needs it."""
        device = self.causal_lm.get_input_embeddings().weight.device.type
        dtypes = {p.dtype for _, twin in self._shared for p in twin.parameters(recurse=False)}
        is_mixed = torch.is_autocast_enabled(device) and dtypes != {self.dtype}
        with torch.inference_mode(), torch.autocast(device, self.dtype, enabled=is_mixed):
            yield

    def begin(self, mask_BP: Int[Tensor, "B P"], room: int) -> Decoding:
        """A state for prompts of that mask and `room` more positions."""
        return Decoding(self.copy, mask_BP, room)

    def begin_rollout(self, mask_BP: Int[Tensor, "B P"], room: int) -> Decoding | FixedDecoding:
        """The same; on a GPU, in steps of fixed shape, which cannot leave out rows."""
        return (self.fixed or self).begin(mask_BP, room)

    def how(self) -> str:
        """What it is, for the log."""
        named = f"a folded copy in {str(self.dtype).removeprefix('torch.')}"
        if self.fixed is not None:
            return f"{named}, its steps replayed as CUDA graphs"
        return f"{named}, step by step ({self.unfixed})" if self.unfixed else named

    def _may(self) -> float:
        return ALIKE if torch.finfo(self.dtype).eps <= 2**-20 else ALIKE_HALF

    @torch.no_grad()
    def _wanted(self) -> tuple[Tensor, Tensor, Tensor]:
        """A few tokens of two rows, the shorter one padded on the left, their mask, and the model's
        logits after each."""
        embedding = self.causal_lm.get_input_embeddings().weight
        ids_T = torch.arange(1, 11, device=embedding.device) * len(embedding) // 24
        ids_BT = torch.stack([ids_T, ids_T.roll(3)])
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[1, :3] = 0
        was_training = self.causal_lm.training
        self.causal_lm.eval()
        try:
            whole = Decoding(self.causal_lm, mask_BT, 0)
            with torch.no_grad():
                want_BTV = whole.logits(ids_BT).float()
        finally:
            self.causal_lm.train(was_training)
        return ids_BT, mask_BT, want_BTV

    @torch.no_grad()
    def _difference(self, ids_BT: Tensor, mask_BT: Tensor, want_BTV: Tensor) -> str | None:
        """How the copy's logits differ from the model's; None if they agree. The padded row remains
        alone at the end."""
        try:
            with self.arithmetic():
                state = self.begin(mask_BT[:, :8], 2)
                got = [state.next_logits(ids_BT[:, :8]), state.next_logits(ids_BT[:, 8:9])]
                state.keep(torch.tensor([1], device=ids_BT.device))
                got.append(state.next_logits(ids_BT[1:, 9:]))
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # any of a model's own code
            if "allocate memory" in str(error):
                raise
            return f"its copy cannot be asked token by token: {type(error).__name__}: {error}"
        want = torch.cat([want_BTV[:, 7], want_BTV[:, 8], want_BTV[1:, 9]])
        off = (torch.cat(got).float() - want).norm() / want.norm()
        if off <= (may := self._may()):
            return None
        return f"its copy gives other logits, by {off.item():.2g} of their size (allowed: {may:g})"


def _is_folded(module: Any, dtype: torch.dtype) -> bool:
    """Whether the copy replaces this layer by a plain one of its own."""
    if isinstance(module, BaseTunerLayer) or is_quantised(module):
        return True
    return type(module) in (nn.Linear, Conv1D) and module.weight.dtype != dtype


class Decoding:
    """The decoding state of a module: keys and values of all positions so far."""

    def __init__(self, module: Any, mask_BP: Int[Tensor, "B P"], room: int) -> None:
        self.module, self.length = module, 0
        self.mask_BS = F.pad(mask_BP, (0, room), value=1)
        self.position_BS = (self.mask_BS.cumsum(1) - 1).clamp_min(0)
        self.cache = DynamicCache(config=module.config)
        takes = inspect.signature(type(module).forward).parameters
        self.takes_positions = "position_ids" in takes
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def logits(self, ids_bn: Int[Tensor, "b n"], **more: Any) -> Float[Tensor, "b k V"]:
        """Logits [b, n, V] of the token after each of these n new tokens."""
        start, self.length = self.length, self.length + ids_bn.shape[1]
        if self.takes_positions:
            more["position_ids"] = self.position_BS[:, start : self.length]
        output = self.module(
            input_ids=ids_bn,
            attention_mask=self.mask_BS[:, : self.length],
            past_key_values=self.cache,
            use_cache=True,
            **more,
        )
        return output.logits

    def next_logits(self, ids_bn: Int[Tensor, "b n"]) -> Float[Tensor, "b V"]:
        """Logits [b, V] after these n new tokens: first the prompt, then one token at a time."""
        return self.logits(ids_bn, **self.last)[:, -1]

    def keep(self, rows_b: Int[Tensor, " b"]) -> None:
        """Continue with these rows only; a row that is listed twice is duplicated."""
        self.cache.batch_select_indices(rows_b)
        self.mask_BS, self.position_BS = self.mask_BS[rows_b], self.position_BS[rows_b]
