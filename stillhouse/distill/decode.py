"""This file is where a Llama in float32 writes fast: weights folded once, then plain products.

Each projection becomes one dense float32 matrix Q(W) + (alpha / r) B A, times the weight of the
norm before it: the function that is trained, up to rounding, and never quantised anew. A rollout
needs room for that copy of the weights. transformers' `generate` stays the reference: same logits
within 1e-5, same tokens.

Legend: B rows, P prompt positions, S = P + new positions, n positions of one call, X = B n, H
hidden width, V vocabulary, Q query heads, G key heads, D width of a head, [N, K] a map from K to N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama

from stillhouse.distill.quant import PackedLinear, dequantized_weight

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def obstacle(model: nn.Module) -> str | None:
    """Why decode() would not compute what `model` computes here and now; None where it would."""
    if isinstance(model, PeftModel) and not isinstance(model.base_model, LoraModel):
        return f"its adapter is a {type(model.base_model).__name__}, not LoRA"
    causal_lm = _causal_lm(model)
    if type(causal_lm) is not llama.LlamaForCausalLM:
        return f"{type(causal_lm).__name__} is not an architecture that the fast decoder knows"
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


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _odd_part(causal_lm: Any) -> str | None:
    """The first module that is not what transformers builds, or whose adapter is not plain."""
    plain = {"embed_tokens": nn.Embedding, "lm_head": nn.Linear, "norm": llama.LlamaRMSNorm,
             "input_layernorm": llama.LlamaRMSNorm, "post_attention_layernorm": llama.LlamaRMSNorm,
             "self_attn": llama.LlamaAttention, "mlp": llama.LlamaMLP}  # fmt: skip
    for name, module in causal_lm.named_modules():
        last = name.rpartition(".")[2]
        if last in PROJECTIONS:
            if not _can_fold(module):
                return f"{name} ({type(module).__name__}) is not W x, or W x + (alpha / r) B A x"
        elif last in plain and type(module) is not plain[last]:
            return f"{name} is a {type(module).__name__}"
    return None


def _can_fold(layer: Any) -> bool:
    if isinstance(layer, LoraLayer):
        odd = layer.merged or layer.lora_variant or any(layer.lora_bias.values())
        return not odd and _can_fold(layer.base_layer)
    if type(layer) is nn.Linear or isinstance(layer, PackedLinear):
        return True
    state = getattr(getattr(layer, "weight", None), "quant_state", None)  # bitsandbytes
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return False
    return layer.compute_dtype in (None, torch.float32)


@torch.inference_mode()
def decode(
    model: nn.Module,
    ids_BP: Int[Tensor, "B P"],
    mask_BP: Int[Tensor, "B P"],
    pick: Callable[[Tensor], Tensor],
    *,
    eos_ids: Sequence[int],
    max_new_tokens: int,
) -> Int[Tensor, "B C"]:
    """What `model` writes behind prompts that end at the last position, as if in eval mode.

    `pick` gets each next position's logits [B, V] and gives its tokens [B]. C is `max_new_tokens`,
    or less where every row has ended before; what follows a row's end is to be cut off.
    """
    state = _State(_causal_lm(model), mask_BP.bool(), max_new_tokens)
    eos_E = torch.tensor(list(eos_ids), device=ids_BP.device)
    ended_B = torch.zeros(len(ids_BP), dtype=torch.bool, device=ids_BP.device)
    written: list[Tensor] = []
    input_Bn = ids_BP
    while True:
        token_B = pick(state.next_logits(input_Bn))
        written.append(token_B)
        input_Bn = token_B.unsqueeze(1)
        ended_B |= (input_Bn == eos_E).any(1)
        if len(written) == max_new_tokens or ended_B.all():
            return torch.stack(written, 1)


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
    keys_BGDS: Tensor  # positions side by side: a step's product is then twice as fast
    values_BGSD: Tensor


class _State:
    """The folded weights, and the keys and values of all positions so far."""

    def __init__(self, causal_lm: Any, mask_BP: Tensor, room: int) -> None:
        decoder, config, device = causal_lm.model, causal_lm.config, mask_BP.device
        (B, P), S = mask_BP.shape, mask_BP.shape[1] + room
        self.Q, self.G = config.num_attention_heads, config.num_key_value_heads
        self.D = decoder.layers[0].self_attn.head_dim
        self.embedding_VH = decoder.embed_tokens.weight
        self.activation = decoder.layers[0].mlp.act_fn
        root = (config.hidden_size * config.rms_norm_eps) ** 0.5
        self.root_of_epsilon = torch.tensor(root, device=device)
        # The two channels that the rotary embedding turns together, i and i + D / 2 of each query
        # and key head, side by side: a turn is one complex product, and q . k knows no order.
        rows = torch.arange((self.Q + 2 * self.G) * self.D, device=device)
        turned, kept = rows.split([(self.Q + self.G) * self.D, self.G * self.D])
        order = torch.cat([turned.view(-1, 2, self.D // 2).mT.flatten(), kept])
        self.layers = [
            _Layer(
                _fold(
                    attention.q_proj, attention.k_proj, attention.v_proj,
                    norm=layer.input_layernorm, order=order,
                ),
                _fold(attention.o_proj),
                _fold(mlp.gate_proj, mlp.up_proj, norm=layer.post_attention_layernorm),
                _fold(mlp.down_proj),
                torch.zeros(B, self.G, self.D, S, device=device),
                torch.zeros(B, self.G, S, self.D, device=device),
            )
            for layer in decoder.layers
            for attention, mlp in [(layer.self_attn, layer.mlp)]
        ]  # fmt: skip
        self.head = _fold(causal_lm.lm_head, norm=decoder.norm)
        is_text_BS = F.pad(mask_BP, (0, room), value=True)
        position_BS = (is_text_BS.cumsum(1) - 1).clamp_min(0)
        cos_BSD, sin_BSD = decoder.rotary_emb(self.embedding_VH, position_BS)
        # The second half of its channels repeats the first.
        cos, sin = (x[..., : self.D // 2].contiguous() for x in (cos_BSD, sin_BSD))
        self.turn_BS1D = torch.complex(cos, sin).unsqueeze(2)
        # A padded position sees itself: a softmax over nothing would be NaN.
        causal_PP = torch.ones(P, P, dtype=torch.bool, device=device).tril()
        seen_BPP = (causal_PP & mask_BP[:, None]) | torch.eye(P, dtype=torch.bool, device=device)
        self.prompt_mask_B1PP = seen_BPP.unsqueeze(1)
        padding_BS = torch.zeros(B, S, device=device).masked_fill_(~is_text_BS, -torch.inf)
        self.padding_Y1S = padding_BS.repeat_interleave(self.G, 0).unsqueeze(1)
        self.length = 0

    def next_logits(self, ids_Bn: Tensor) -> Tensor:
        """Logits [B, V] of what follows after these n more tokens: the prompt, then one by one."""
        (B, n), start = ids_Bn.shape, self.length
        attend = self._attend_in_prompt if start == 0 else self._attend
        self.length = start + n
        turn_Bn1D = self.turn_BS1D[:, start : self.length]
        x_XH = F.embedding(ids_Bn.flatten(), self.embedding_VH)
        for layer in self.layers:
            heads_BnAD = layer.qkv.of(self._direction(x_XH)).view(B, n, -1, self.D)
            query_key, value_BnGD = heads_BnAD.split([self.Q + self.G, self.G], 2)
            pairs = torch.view_as_complex(query_key.unflatten(-1, (-1, 2)))
            turned = torch.view_as_real(pairs * turn_Bn1D).flatten(-2)
            query_BnQD, key_BnGD = turned.split([self.Q, self.G], 2)
            layer.keys_BGDS[..., start : self.length] = key_BnGD.permute(0, 2, 3, 1)
            layer.values_BGSD[:, :, start : self.length] = value_BnGD.transpose(1, 2)
            layer.out.add_to_(x_XH, attend(query_BnQD, layer).reshape(B * n, -1))
            gate, up = layer.gate_up.of(self._direction(x_XH)).chunk(2, -1)
            layer.down.add_to_(x_XH, self.activation(gate) * up)
        return self.head.of(self._direction(x_XH.view(B, n, -1)[:, -1]))

    def _direction(self, x_XH: Tensor) -> Tensor:
        """RMSNorm without its weight, over sqrt(H): x / sqrt(|x|^2 + H epsilon)."""
        norm_X1 = torch.linalg.vector_norm(x_XH, dim=-1, keepdim=True)
        return x_XH / torch.hypot(norm_X1, self.root_of_epsilon)

    def _attend_in_prompt(self, query_BPQD: Tensor, layer: _Layer) -> Tensor:
        P = self.length
        attended_BQPD = F.scaled_dot_product_attention(
            query_BPQD.transpose(1, 2),
            layer.keys_BGDS[..., :P].mT.contiguous(),
            layer.values_BGSD[:, :, :P],
            self.prompt_mask_B1PP,
            enable_gqa=self.Q != self.G,
        )
        return attended_BQPD.transpose(1, 2)

    def _attend(self, query_B1QD: Tensor, layer: _Layer) -> Tensor:
        """One new position each; Y = B G, and Z = Q / G query heads share a key head."""
        scores_YZS = torch.baddbmm(
            self.padding_Y1S[..., : self.length],
            query_B1QD.reshape(len(self.padding_Y1S), -1, self.D),
            layer.keys_BGDS.flatten(0, 1)[..., : self.length],
            alpha=self.D**-0.5,
        )
        return torch.bmm(scores_YZS.softmax(-1), layer.values_BGSD.flatten(0, 1)[:, : self.length])


def _fold(*parts: Any, norm: Any = None, order: Tensor | None = None) -> _Projection:
    """Projections of one input, and the norm of that input, as one; rows in the `order` given."""
    weight_NK = torch.cat([_dense(part) for part in parts])
    biases = [getattr(part, "base_layer", part).bias for part in parts]
    bias_N = None if biases[0] is None else torch.cat(biases)
    if norm is not None:
        weight_NK *= norm.weight * len(norm.weight) ** 0.5
    if order is not None:
        weight_NK, bias_N = weight_NK[order], None if bias_N is None else bias_N[order]
    return _Projection(weight_NK.T.contiguous(), bias_N)


def _dense(layer: Any) -> Tensor:
    """The dense float32 matrix [N, K] of a projection and its active adapters."""
    base = getattr(layer, "base_layer", layer)
    weight_NK = dequantized_weight(base)
    if base is not layer and not layer.disable_adapters:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                weight_NK.addmm_(b, a, alpha=layer.scaling[name])
    return weight_NK
