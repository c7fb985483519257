"""Generate tokens fastest from a float32 Llama: fold its weights once, then use plain products.

Each projection becomes one dense float32 matrix Q(W) + (alpha / r) B A, multiplied by the weight of
the norm before it. This is the function that is trained, up to rounding; it is never quantized
again. Queries, keys, and values are one product, and so are gate and up, so a step needs a third of
the kernel launches of the folded copy that all other models use (`folded.py`). transformers'
`generate` is the reference: same logits within 1e-5, same tokens.

Legend: B rows, b rows still being written, P prompt positions, S = P + new positions, n positions
of one call, X = b n, H hidden width, V vocabulary, Q query heads, G key heads, D width of a head,
[N, K] a map from K to N.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from peft import PeftModel
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama

from stillhouse.distill.folded import base_of, can_fold, dense_weight

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def obstacle(model: nn.Module) -> str | None:
    """Why FusedLlama would not compute what `model` computes now; None if it would."""
    if isinstance(model, PeftModel) and not isinstance(model.base_model, LoraModel):
        return f"its adapter is a {type(model.base_model).__name__}, not LoRA"
    causal_lm = base_of(model)
    if type(causal_lm) is not llama.LlamaForCausalLM:
        return f"{type(causal_lm).__name__} has no fused form"
    parameters = list(causal_lm.parameters())
    if torch.is_autocast_enabled(parameters[0].device.type):
        return "mixed precision"
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if dtypes != {torch.float32}:
        return f"it computes in {' and '.join(sorted(map(str, dtypes)))}, not in float32 alone"
    rope = str(causal_lm.model.rotary_emb.rope_type)
    if rope == "longrope" or "dynamic" in rope:
        return f"its rotary embedding ({rope}) changes with the length"
    return _odd_part(causal_lm)


def _odd_part(causal_lm: Any) -> str | None:
    """The first module that is not what transformers builds, or whose adapter is not plain LoRA."""
    plain = {"embed_tokens": nn.Embedding, "lm_head": nn.Linear, "norm": llama.LlamaRMSNorm,
             "input_layernorm": llama.LlamaRMSNorm, "post_attention_layernorm": llama.LlamaRMSNorm,
             "self_attn": llama.LlamaAttention, "mlp": llama.LlamaMLP}  # fmt: skip
    for name, module in causal_lm.named_modules():
        last = name.rpartition(".")[2]
        if last in PROJECTIONS:
            if not can_fold(module):
                return f"{name} ({type(module).__name__}) is not W x, or W x + (alpha / r) B A x"
        elif last in plain and type(module) is not plain[last]:
            return f"{name} is a {type(module).__name__}"
    return None


class FusedLlama:
    """The folded weights of a model for which `obstacle` returns None."""

    def __init__(self, model: nn.Module) -> None:
        """Copies nothing; `fold_` does."""
        self.causal_lm = base_of(model)
        self.layers: list[_Layer] = []
        self.head: _Projection | None = None

    def bytes(self) -> int:
        """The size of the folded matrices."""
        sizes = (p.numel() for p in self.causal_lm.parameters() if p.dim() == 2)
        return 4 * sum(sizes)

    @torch.no_grad()
    def fold_(self) -> str | None:
        """Fold the model's current weights and adapters, in place."""
        decoder = self.causal_lm.model
        config, attention = self.causal_lm.config, decoder.layers[0].self_attn
        self.Q, self.G = config.num_attention_heads, config.num_key_value_heads
        self.D = attention.head_dim
        # Put the two channels that the rotary embedding rotates together, i and i + D / 2 of each
        # query and key head, side by side: a rotation is then one complex product, and q . k does
        # not depend on the order.
        rows = torch.arange((self.Q + 2 * self.G) * self.D, device=decoder.norm.weight.device)
        turned, kept = rows.split([(self.Q + self.G) * self.D, self.G * self.D])
        order = torch.cat([turned.view(-1, 2, self.D // 2).mT.flatten(), kept])
        before: list[_Layer | None] = [*self.layers] or [None] * len(decoder.layers)
        self.layers = [
            _Layer(
                _fold(
                    a.q_proj, a.k_proj, a.v_proj, norm=layer.input_layernorm, order=order,
                    into=old and old.qkv,
                ),
                _fold(a.o_proj, into=old and old.out),
                _fold(
                    mlp.gate_proj, mlp.up_proj, norm=layer.post_attention_layernorm,
                    into=old and old.gate_up,
                ),
                _fold(mlp.down_proj, into=old and old.down),
            )
            for layer, old in zip(decoder.layers, before, strict=True)
            for a, mlp in [(layer.self_attn, layer.mlp)]
        ]  # fmt: skip
        self.head = _fold(self.causal_lm.lm_head, norm=decoder.norm, into=self.head)
        return None

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The context in which decoding steps compute as the model does."""
        with torch.inference_mode():
            yield

    def begin(self, mask_BP: Int[Tensor, "B P"], room: int) -> _State:
        """A state for prompts of that mask and `room` more positions."""
        return _State(self, mask_BP.bool(), room)


class _Projection(NamedTuple):
    # [K, N], not nn.Linear's [N, K]: with few rows the product is up to twice as fast.
    weight_KN: Tensor
    bias_N: Tensor | None

    def of(self, x_XK: Tensor) -> Tensor:
        if self.bias_N is None:
            return torch.mm(x_XK, self.weight_KN)
        return torch.addmm(self.bias_N, x_XK, self.weight_KN)

    def add_to_(self, sum_XN: Tensor, x_XK: Tensor) -> None:
        sum_XN.addmm_(x_XK, self.weight_KN)
        if self.bias_N is not None:
            sum_XN.add_(self.bias_N)


class _Layer(NamedTuple):
    qkv: _Projection
    out: _Projection
    gate_up: _Projection
    down: _Projection


class _State:
    """The keys and values of all positions so far."""

    def __init__(self, fused: FusedLlama, mask_BP: Tensor, room: int) -> None:
        causal_lm, device = fused.causal_lm, mask_BP.device
        decoder, config = causal_lm.model, causal_lm.config
        self.layers, self.head = fused.layers, fused.head
        self.Q, self.G, self.D = fused.Q, fused.G, fused.D
        B, S = len(mask_BP), mask_BP.shape[1] + room
        self.embed = decoder.embed_tokens  # as a module, so that its forward hooks still run
        self.activation = decoder.layers[0].mlp.act_fn
        root = (config.hidden_size * config.rms_norm_eps) ** 0.5
        self.root_of_epsilon = torch.tensor(root, device=device)
        # Keys are stored with positions contiguous: a step's product is then twice as fast.
        self.keys = [torch.zeros(B, self.G, self.D, S, device=device) for _ in self.layers]
        self.values = [torch.zeros(B, self.G, S, self.D, device=device) for _ in self.layers]
        is_text_BS = F.pad(mask_BP, (0, room), value=True)
        position_BS = (is_text_BS.cumsum(1) - 1).clamp_min(0)
        cos_BSD, sin_BSD = decoder.rotary_emb(decoder.norm.weight, position_BS)
        # The second half of its channels repeats the first.
        cos, sin = (x[..., : self.D // 2].contiguous() for x in (cos_BSD, sin_BSD))
        self.turn_BS1D = torch.complex(cos, sin).unsqueeze(2)
        self.is_text_BS = is_text_BS
        self.padding_BS = torch.zeros(B, S, device=device).masked_fill_(~is_text_BS, -torch.inf)
        self.padding_Y1S = self.padding_BS.repeat_interleave(self.G, 0).unsqueeze(1)
        self.length = 0

    def keep(self, rows_b: Int[Tensor, " b"]) -> None:
        """Continue with these rows only."""
        self.keys = [keys_BGDS[rows_b] for keys_BGDS in self.keys]
        self.values = [values_BGSD[rows_b] for values_BGSD in self.values]
        self.turn_BS1D, self.padding_BS = self.turn_BS1D[rows_b], self.padding_BS[rows_b]
        self.is_text_BS = self.is_text_BS[rows_b]
        self.padding_Y1S = self.padding_BS.repeat_interleave(self.G, 0).unsqueeze(1)

    def next_logits(self, ids_bn: Int[Tensor, "b n"]) -> Tensor:
        """Logits [b, V] after these n new tokens: first the prompt, then one token at a time."""
        assert self.head is not None, "fold_ comes first"
        return self.head.of(self._direction(self._hidden(ids_bn)[:, -1]))

    def logits(self, ids_bn: Int[Tensor, "b n"]) -> Tensor:
        """Logits [b, n, V] of the token after each of these n new tokens."""
        assert self.head is not None, "fold_ comes first"
        x_bnH = self._direction(self._hidden(ids_bn))
        return self.head.of(x_bnH.flatten(0, 1)).unflatten(0, ids_bn.shape)

    def _hidden(self, ids_bn: Tensor) -> Tensor:
        """The input of the last norm, [b, n, H]."""
        (B, n), start = ids_bn.shape, self.length
        self.length = start + n
        attend = self._attend
        if start == 0 or n > 1:
            attend = self._attend_to(self._seen(start, n))
        turn_bn1D = self.turn_BS1D[:, start : self.length]
        # Padding is computed in attention only: it is a third of ragged prompts.
        is_text_bn = self.is_text_BS[:, start : self.length]
        is_padded = start == 0 and not is_text_bn.all()
        text_X = is_text_bn.flatten().nonzero().squeeze(1) if is_padded else None
        x_XH = self.embed(ids_bn).flatten(0, 1)
        x_XH = x_XH if text_X is None else x_XH[text_X]
        for layer, keys_BGDS, values_BGSD in zip(self.layers, self.keys, self.values, strict=True):
            heads_XN = _spread(layer.qkv.of(self._direction(x_XH)), text_X, B * n)
            heads_bnAD = heads_XN.view(B, n, -1, self.D)
            query_key, value_bnGD = heads_bnAD.split([self.Q + self.G, self.G], 2)
            pairs = torch.view_as_complex(query_key.unflatten(-1, (-1, 2)))
            turned = torch.view_as_real(pairs * turn_bn1D).flatten(-2)
            query_bnQD, key_bnGD = turned.split([self.Q, self.G], 2)
            keys_BGDS[..., start : self.length] = key_bnGD.permute(0, 2, 3, 1)
            values_BGSD[:, :, start : self.length] = value_bnGD.transpose(1, 2)
            attended_XN = attend(query_bnQD, keys_BGDS, values_BGSD).reshape(B * n, -1)
            layer.out.add_to_(x_XH, attended_XN if text_X is None else attended_XN[text_X])
            gate, up = layer.gate_up.of(self._direction(x_XH)).chunk(2, -1)
            layer.down.add_to_(x_XH, self.activation(gate) * up)
        return _spread(x_XH, text_X, B * n).view(B, n, -1)

    def _seen(self, start: int, n: int) -> Tensor:
        """Attention mask: which positions each of n new ones attends to, [b, 1, n, start + n]."""
        device = self.is_text_BS.device
        new_n1 = torch.arange(start, start + n, device=device).unsqueeze(1)
        position_S = torch.arange(start + n, device=device)
        seen_bnS = (position_S <= new_n1) & self.is_text_BS[:, None, : start + n]
        # A padded position attends to itself: a softmax over nothing would be NaN.
        return (seen_bnS | (position_S == new_n1)).unsqueeze(1)

    def _direction(self, x_XH: Tensor) -> Tensor:
        """RMSNorm without its weight, over sqrt(H): x / sqrt(|x|^2 + H epsilon)."""
        norm_X1 = torch.linalg.vector_norm(x_XH, dim=-1, keepdim=True)
        return x_XH / torch.hypot(norm_X1, self.root_of_epsilon)

    def _attend_to(self, seen_b1nS: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention for several new positions per row."""

        def attend(query_bnQD: Tensor, keys_bGDS: Tensor, values_bGSD: Tensor) -> Tensor:
            attended_bQnD = F.scaled_dot_product_attention(
                query_bnQD.transpose(1, 2),
                keys_bGDS[..., : self.length].mT.contiguous(),
                values_bGSD[:, :, : self.length],
                seen_b1nS,
                enable_gqa=self.Q != self.G,
            )
            return attended_bQnD.transpose(1, 2)

        return attend

    def _attend(self, query_b1QD: Tensor, keys_bGDS: Tensor, values_bGSD: Tensor) -> Tensor:
        """Attention for one new position per row; Y = b G, Z = Q / G query heads per key head."""
        scores_YZS = torch.baddbmm(
            self.padding_Y1S[..., : self.length],
            query_b1QD.reshape(len(self.padding_Y1S), -1, self.D),
            keys_bGDS.flatten(0, 1)[..., : self.length],
            alpha=self.D**-0.5,
        )
        return torch.bmm(scores_YZS.softmax(-1), values_bGSD.flatten(0, 1)[:, : self.length])


def _spread(x_XN: Tensor, text_X: Tensor | None, length: int) -> Tensor:
    """Scatter rows into `length` rows, zeros elsewhere; unchanged if text_X is None."""
    if text_X is None:
        return x_XN
    return x_XN.new_zeros(length, x_XN.shape[1]).index_copy_(0, text_X, x_XN)


def _fold(
    *parts: Any, norm: Any = None, order: Tensor | None = None, into: _Projection | None = None
) -> _Projection:
    """Fuse projections of one input, and the norm of that input; rows in the given `order`."""
    weight_NK = torch.cat([dense_weight(part) for part in parts])
    biases = [getattr(part, "base_layer", part).bias for part in parts]
    bias_N = None if biases[0] is None else torch.cat(biases)
    if norm is not None:
        weight_NK *= norm.weight * len(norm.weight) ** 0.5
    if order is not None:
        weight_NK, bias_N = weight_NK[order], None if bias_N is None else bias_N[order]
    if into is None:
        return _Projection(weight_NK.T.contiguous(), bias_N)
    into.weight_KN.copy_(weight_NK.T)
    if bias_N is not None and into.bias_N is not None:
        into.bias_N.copy_(bias_N)
    return into
