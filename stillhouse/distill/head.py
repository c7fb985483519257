"""Find the map from a model's last hidden states to its logits, and verify it on a few tokens.

The loss needs hidden states and the map from them to logits separately. Architectures define this
map in code: Granite divides, Cohere multiplies, Gemma caps, Phi adds a bias. So nothing is looked
up by name. Instead, the model reads a few tokens, the form of the map is solved from the logits it
gives, and a model whose logits cannot be reproduced is refused
(docs/decisions/0007-logits-are-proven.md).

Legend: B rows, T positions, N positions without padding, n some of those, H hidden width,
V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import ContractError

# The probe: two rows, the second shorter and padded on the left, with the same first tokens.
LONG, SHORT = 8, 5
# Differences are relative to the largest logit. In float32 and float64, forming the logits is one
# product: EXACT. In a batch, all layers of a row add in another order: at most 8e-6 measured, over
# 60 chaotic layers; wrong positions, or padding that is attended to, give 1e-2 and more.
EXACT, IN_A_BATCH = 1e-5, 1e-4
# The same in bfloat16 and float16, where the rounding of such a net reaches 0.25.
IN_A_BATCH_HALF = 0.3
LOUD = 1000.0  # the probe scales logits up to this: caps, of 10 to 100, then take effect


@dataclass(frozen=True, eq=False)
class Head:
    """The frozen map from last hidden states to logits.

        z = scale * (W h + b);  with a soft cap: cap * tanh(z / cap)

    `scale` multiplies what the matrix gives: 1 / logits_scaling of Granite, logit_scale of Cohere.
    """

    weight_VH: Float[Tensor, "V H"]
    bias_V: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden_nH: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """New logits [n, V], in the dtype of both; float32 if half-precision logits are then scaled
        or capped, as in the loss."""
        logits_nV = self.product(hidden_nH)
        if self.is_product:
            return logits_nV
        logits_nV = logits_nV.to(work_dtype(logits_nV))
        self.bend_(logits_nV)
        return logits_nV

    @property
    def is_product(self) -> bool:
        """Whether there is neither a scale nor a soft cap."""
        return self.scale == 1 and self.cap is None

    def product(self, hidden_nH: Tensor, out: Tensor | None = None) -> Tensor:
        """W h + b in the dtype of h and W."""
        if self.bias_V is None:
            return torch.mm(hidden_nH, self.weight_VH.T, out=out)
        return torch.addmm(self.bias_V, hidden_nH, self.weight_VH.T, out=out)

    def bend_(self, logits_nV: Tensor, slope_nV: Tensor | None = None) -> None:
        """Apply scale and cap in place; write the cap's slope, d capped / d z, into `slope_nV`."""
        if self.scale != 1:
            logits_nV.mul_(self.scale)
        if self.cap is None:
            return
        logits_nV.div_(self.cap).tanh_()
        if slope_nV is not None:
            torch.mul(logits_nV, logits_nV, out=slope_nV).neg_().add_(1)
        logits_nV.mul_(self.cap)


def work_dtype(of: Tensor) -> torch.dtype:
    """The dtype a loss is computed in: float32, or float64 if the hidden states are."""
    return torch.float64 if of.dtype == torch.float64 else torch.float32


def hidden_states(
    model: nn.Module, ids_BT: Int[Tensor, "B T"], mask_BT: Int[Tensor, "B T"]
) -> Float[Tensor, "B T H"]:
    """The head's input: last hidden states, after the final norm; padding may be on either side."""
    decoder = _decoder(_causal_lm(model))
    positions = _positions(decoder, mask_BT)
    output = decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **positions)
    return output.last_hidden_state


def head_of(model: nn.Module) -> Head:
    """The model's head. The first call finds and verifies its form; later calls reuse that form.

    Raises:
        ContractError: the model's logits do not have that form, its rows depend on padding or on
            later tokens, it has no separate head or decoder, or its head is adapted.
    """
    causal_lm = _causal_lm(model)
    _refuse_no_head(causal_lm)
    if causal_lm not in _FORMS:
        _FORMS[causal_lm] = _proven(causal_lm)
    return _head(causal_lm, _FORMS[causal_lm])


def head_weight(model: nn.Module) -> Float[Tensor, "V H"]:
    """The one matrix whose product with last hidden states is the model's logits, scale included.

    For inspecting logits by hand; the loss takes a `Head`, which holds no second matrix.

    Raises:
        ContractError: as `head_of`; or there is no such matrix, because of a bias or a cap.
    """
    head = head_of(model)
    if head.bias_V is not None or head.cap is not None:
        follows = "a bias" if head.cap is None else "a soft cap"
        raise ContractError(
            f"{type(_causal_lm(model)).__name__}: {follows} follows its matrix, so no matrix alone"
            " gives its logits; use head_of(model).logits"
        )
    return head.weight_VH if head.scale == 1 else head.weight_VH * head.scale


class _Form(NamedTuple):
    """Everything about a head except its parameters."""

    vocabulary: int  # rows of the matrix that become logits
    scale: float = 1.0
    cap: float | None = None


_FORMS: WeakKeyDictionary[nn.Module, _Form] = WeakKeyDictionary()


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _decoder(causal_lm: Any) -> Any:
    """The module that turns token ids into hidden states. It must contain the embeddings:
    ModernBERT's get_decoder() returns its head."""
    if isinstance(causal_lm, PreTrainedModel):
        embeddings = causal_lm.get_input_embeddings()
        for found in (causal_lm.get_decoder(), causal_lm.base_model):
            if found is not causal_lm and any(m is embeddings for m in found.modules()):
                return found
    raise ContractError(
        f"{type(causal_lm).__name__} has no decoder (get_decoder()) to be called without its head,"
        " so the loss cannot go chunk by chunk; choose another architecture"
    )


def _positions(module: Any, mask_BT: Tensor) -> dict[str, Tensor]:
    """position_ids of each token, if the module takes them."""
    if not _asks_for_positions(type(module)):
        return {}
    return {"position_ids": (mask_BT.cumsum(1) - 1).clamp_min(0)}


@functools.cache
def _asks_for_positions(of: type[nn.Module]) -> bool:
    return "position_ids" in inspect.signature(of.forward).parameters


def _head(causal_lm: Any, form: _Form) -> Head:
    output: Any = causal_lm.get_output_embeddings()
    bias = getattr(output, "bias", None)
    V = form.vocabulary
    bias_V = None if bias is None else bias.detach()[:V]
    return Head(output.weight.detach()[:V], bias_V, form.scale, form.cap)


def _refuse_no_head(causal_lm: Any) -> None:
    """Raises ContractError if the head is adapted, or is not a matrix."""
    name = type(causal_lm).__name__
    output: Any = getattr(causal_lm, "get_output_embeddings", lambda: None)()
    if isinstance(output, BaseTunerLayer):
        raise ContractError(
            f"{name}: its head is adapted; the loss takes the head as frozen, so leave it out of"
            " lora.target_modules"
        )
    if getattr(output, "weight", None) is None or output.weight.dim() != 2:
        raise ContractError(
            f"{name} has no head (get_output_embeddings()) that is a matrix from hidden states to"
            " logits, so the loss cannot go chunk by chunk; choose another architecture"
        )


# ---------------------------------------------------------------------- the probe


def _proven(causal_lm: Any) -> _Form:
    was_training = causal_lm.training
    causal_lm.eval()
    try:
        with torch.no_grad():
            return _Probe(causal_lm).form()
    except (ContractError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # any of a model's own code
        if "allocate memory" in str(error):
            raise
        raise ContractError(
            f"{type(causal_lm).__name__} cannot be asked as the loss asks it, for hidden states of"
            f" a batch that is padded on the left: {type(error).__name__}: {error}"
        ) from error
    finally:
        causal_lm.train(was_training)


class _Probe:
    """Runs a few tokens through the model itself, and the way the loss runs it."""

    def __init__(self, causal_lm: Any) -> None:
        self.causal_lm, self.name = causal_lm, type(causal_lm).__name__
        weight = causal_lm.get_output_embeddings().weight
        # Ids from the lower half: the upper end may be reserved for images or tools, whose ids need
        # more inputs than tokens.
        rows = causal_lm.get_input_embeddings().weight.shape[0]
        ids_T = torch.arange(1, LONG + 1) * rows // (2 * LONG + 2)
        ids_BT = torch.stack([ids_T, ids_T.roll(LONG - SHORT)])
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[1, : LONG - SHORT] = 0
        self.ids_BT, self.mask_BT = ids_BT.to(weight.device), mask_BT.to(weight.device)
        self.is_real_BT = self.mask_BT.bool()
        eps = torch.finfo(weight.dtype).eps
        self.is_half = eps > torch.finfo(torch.float32).eps
        self.eps = eps

    def form(self) -> _Form:
        """The verified form of the head.

        Raises:
            ContractError: the message says what differs, and by how much.
        """
        alone_NV = torch.cat([self._asked(self.ids_BT[:1]), self._asked(self.ids_BT[1:, -SHORT:])])
        if not 0 < alone_NV.abs().max().item() < torch.inf:
            raise ContractError(
                f"{self.name}: its logits are 0, NaN or infinite; its weights are damaged, or"
                " overflow in this dtype"
            )
        batch_NV = self._asked(self.ids_BT, self.mask_BT)
        own = _off(batch_NV, alone_NV)
        may_be_off = IN_A_BATCH_HALF if self.is_half else IN_A_BATCH
        ahead = _off(alone_NV[:SHORT], alone_NV[LONG:])
        if not ahead <= may_be_off:
            raise ContractError(
                f"{self.name} is no causal language model: what follows a token changes the logits"
                f" before it, by {ahead:.2g} of the largest"
            )
        if not own <= may_be_off:
            raise ContractError(
                f"{self.name} gives a row other logits in a batch that is padded on the left than"
                f" alone, by {own:.2g} of the largest (allowed: {may_be_off:g}); prompts are"
                " batched like that, so another function would be trained; choose another"
                " architecture"
            )
        hidden_NH = hidden_states(self.causal_lm, self.ids_BT, self.mask_BT)[self.is_real_BT]
        return self._solved(hidden_NH, batch_NV, own)

    def _asked(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """The model's own logits at the positions without padding, [N, V]."""
        positions = {}
        if mask_BT is None:
            mask_BT = torch.ones_like(ids_BT)
        else:
            positions = _positions(self.causal_lm, mask_BT)
        output = self.causal_lm(
            input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **positions
        )
        return output.logits[mask_BT.bool()].double()

    def _loud(self, times: float) -> Tensor:
        """The same for the whole batch, with hidden states scaled by `times` before the head."""

        def turn_up(module: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state * times
            return output

        hook = _decoder(self.causal_lm).register_forward_hook(turn_up)
        try:
            return self._asked(self.ids_BT, self.mask_BT)
        finally:
            hook.remove()

    def _solved(self, hidden_NH: Tensor, logits_NV: Tensor, own: float) -> _Form:
        """The first form, from plain to capped, that gives the model's logits up to the rounding
        of one product: unscaled, and scaled up so far that a cap would take effect. In half
        precision, if none does, the nearest, within twice the model's own difference."""
        V, top = logits_NV.shape[1], logits_NV.abs().max().item()
        plain = _head(self.causal_lm, _Form(V))
        hidden_NH = hidden_NH.to(plain.weight_VH.dtype)
        raw_NV = plain.logits(hidden_NH).double()
        most = 0.1 * torch.finfo(hidden_NH.dtype).max / hidden_NH.abs().max().item()
        times = min(LOUD / top, most)
        loud_NV = self._loud(times)
        capped = _capped(raw_NV, logits_NV, loud_NV)
        forms = [_Form(V), _Form(V, _slope(raw_NV, logits_NV)), capped._replace(scale=1.0), capped]
        offs: list[float] = []
        for form in forms:
            head = _head(self.causal_lm, form)
            off = _off(head.logits(hidden_NH), logits_NV)
            # Rounding before a cap is proportional to the uncapped value.
            uncapped = max(times * top, loud_NV.abs().max().item())
            difference = head.logits(hidden_NH * times).double() - loud_NV
            offs.append(max(off, difference.abs().max().item() / uncapped))
            if offs[-1] <= (2 * self.eps if self.is_half else EXACT):
                return form
        limit = 2 * max(own, self.eps) if self.is_half else EXACT
        if min(offs) <= limit:
            return forms[offs.index(min(offs))]
        raise ContractError(
            f"{self.name}: its logits are not what the loss would form of its hidden states and its"
            f" head; they differ by {offs[0]:.2g} of the largest, and by {min(offs[1:]):.2g} with a"
            f" scale or a soft cap (allowed: {limit:.2g}). The loss would train another function;"
            " choose another architecture"
        )


def _off(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    largest = want.abs().max().clamp_min(torch.finfo(want.dtype).tiny)
    return ((got.double() - want).abs().max() / largest).item()


def _slope(raw: Tensor, logits: Tensor) -> float:
    """The scale between two sets of logits, by least squares; snapped to a simple fraction if it is
    close to one (configs use such fractions), so that it carries no rounding error."""
    slope = ((raw * logits).sum() / (raw * raw).sum()).item()
    simple = float(Fraction(slope).limit_denominator(4096))
    return simple if abs(simple - slope) <= 1e-6 * abs(slope) else slope


def _capped(raw_NV: Tensor, logits_NV: Tensor, loud_NV: Tensor) -> _Form:
    """Estimate cap and scale: the cap from scaled-up logits, the scale after undoing the cap."""
    cap = loud_NV.abs().max().item()
    below = logits_NV.abs() < cap / 2
    before = torch.atanh(logits_NV[below] / cap) * cap
    return _Form(logits_NV.shape[1], _slope(raw_NV[below], before), cap)
