"""Decode with a folded copy in steps of fixed shape and address, for CUDA graphs to replay.

A step of the copy launches about two thousand kernels, and a GPU waits for Python between them.
Here keys and values have their full length from the start, also in layers with a sliding window,
whose window is in the mask; so all steps are one sequence of kernels over the same memory, and
nothing in it asks the device for a value. On a GPU the sequence is captured once per (rows, bucket
of length) and then replayed, whatever the weights in the copy are by then. On a CPU, where it is
tested, it is called as it is.

Legend: B rows, P prompt positions, L positions of a bucket, n positions of one call, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import Cache, DummyLayer, StaticLayer

BUCKET = 128  # positions; lengths are rounded up to a multiple, so that few graphs are captured
KEPT = 2  # buckets whose graphs, keys, and values stay in memory while the run trains
# A step that computes one of these waits until the device has answered.
QUESTIONS = ("_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "equal")


class _Unasked(TorchDispatchMode):
    """Raises where a kernel's result decides what Python does next."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in QUESTIONS:
            raise RuntimeError(f"a step asks the device for a value ({name})")
        return func(*args, **(kwargs or {}))


def obstacle(
    module: Any,
    ids_BT: Int[Tensor, "B T"],
    mask_BT: Int[Tensor, "B T"],
    want_BTV: Float[Tensor, "B T V"],
    may: float,
) -> str | None:
    """Why the module cannot be asked in steps of fixed shape; None if it can. Its logits after the
    last two tokens are compared with the wanted ones: they may differ by `may` of their norm."""
    try:
        state = FixedDecodings(module).begin(mask_BT[:, :-2], 2)
        state.next_logits(ids_BT[:, :-2])
        got_BV = list[Tensor]()
        with _Unasked():
            got_BV.append(state.step(ids_BT[:, -2:-1]).clone())
        got_BV.append(state.next_logits(ids_BT[:, -1:]).clone())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any of a model's own code
        return f"{type(error).__name__}: {error}".splitlines()[0]
    want = want_BTV[:, -2:].float()
    off = (torch.stack(got_BV, 1).float() - want).norm() / want.norm()
    return None if off <= may else f"its logits differ by {off.item():.2g} of their size"


def bucket_of(length: int) -> int:
    """The positions that a decoding of `length` positions is given."""
    return -(-length // BUCKET) * BUCKET


class _FullLength(StaticLayer):
    """Keys and values, each in its dtype: under autocast, norms and rotations leave keys wider."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        assert self.values is not None
        self.values = self.values.to(value_states.dtype)


class FixedDecoding:
    """The decoding state of a module for B rows and L positions, to be used again and again."""

    def __init__(self, module: Any, rows: int, length: int) -> None:
        """Allocates all but keys and values, which the first prompt does."""
        device = module.get_input_embeddings().weight.device
        dynamic = DynamicCache(config=module.config).layers
        # A layer without keys and values of its own shares those of another.
        layers: list[Any] = [
            one if type(one) is DummyLayer else _FullLength(length) for one in dynamic
        ]
        self.module, self.cache = module, Cache(layers=layers)
        self.windows: set[int | None] = {getattr(one, "sliding_window", None) for one in dynamic}
        source = inspect.getsource(type(module.base_model).forward)
        self.has_masks_by_layer = "isinstance(causal_mask_mapping := attention_mask" in source
        takes = inspect.signature(type(module).forward).parameters
        self.takes_positions = "position_ids" in takes
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.is_text_BL = torch.ones(rows, length, dtype=torch.bool, device=device)
        self.padding_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.place_L = torch.arange(length, device=device)
        self.at = torch.zeros((), dtype=torch.long, device=device)  # the next position
        self.ids_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_BV: Tensor | None = None  # of the graph
        self.is_uncapturable = False

    def begin(self, mask_BP: Int[Tensor, "B P"]) -> FixedDecoding:
        """Ready for prompts of that mask."""
        length = self.is_text_BL.shape[1]
        self.is_text_BL.copy_(F.pad(mask_BP.bool(), (0, length - mask_BP.shape[1]), value=True))
        self.padding_B1.copy_(mask_BP.shape[1] - mask_BP.sum(1, keepdim=True))
        self._rewind(None)
        return self

    def next_logits(self, ids_Bn: Int[Tensor, "B n"]) -> Float[Tensor, "B V"]:
        """Logits [B, V] after these n new tokens: first the prompt, then one token at a time.

        The next call may overwrite them.
        """
        if ids_Bn.shape[1] > 1 or not ids_Bn.is_cuda or self.is_uncapturable:
            return self.step(ids_Bn)
        self.ids_B1.copy_(ids_Bn)
        if self.graph is None:
            try:
                self._capture()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.is_uncapturable = True
                first = str(error).splitlines()[0]
                print(f"rollouts: no CUDA graph of {len(ids_Bn)} rows, so step by step: {first}")
                return self.step(ids_Bn)
        assert self.graph is not None and self.logits_BV is not None
        self.graph.replay()
        return self.logits_BV

    def step(self, ids_Bn: Int[Tensor, "B n"]) -> Float[Tensor, "B V"]:
        """The same, kernel by kernel."""
        more: dict[str, Any] = dict(self.last)
        new_n = self.at + torch.arange(ids_Bn.shape[1], device=ids_Bn.device)
        if self.takes_positions:
            more["position_ids"] = (new_n - self.padding_B1).clamp_min(0)
        output = self.module(
            input_ids=ids_Bn,
            attention_mask=self._masks(new_n),
            past_key_values=self.cache,
            use_cache=True,
            **more,
        )
        self.at.add_(len(new_n))
        return output.logits[:, -1]

    def _masks(self, new_n: Tensor) -> Tensor | dict[str, Tensor]:
        """What is added to attention scores, [B, 1, n, L]; by kind of layer if it has several."""
        new_n1 = new_n.unsqueeze(1)
        # A padded position attends to itself: a softmax over nothing would be NaN.
        seen_BnL = (self.place_L <= new_n1) & self.is_text_BL.unsqueeze(1)
        dtype = self.module.get_input_embeddings().weight.dtype
        least = torch.finfo(dtype).min
        by_window: dict[int | None, Tensor] = {}
        for window in self.windows:
            near_BnL = seen_BnL if window is None else seen_BnL & (self.place_L > new_n1 - window)
            hidden_BnL = ~(near_BnL | (self.place_L == new_n1))
            mask_BnL = torch.zeros(hidden_BnL.shape, dtype=dtype, device=new_n.device)
            by_window[window] = mask_BnL.masked_fill_(hidden_BnL, least).unsqueeze(1)
        if not self.has_masks_by_layer:
            (mask_B1nL,) = by_window.values()
            return mask_B1nL
        return {
            "full_attention" if window is None else "sliding_attention": mask_B1nL
            for window, mask_B1nL in by_window.items()
        }

    def _rewind(self, by: int | None) -> None:
        """Go back by this many positions, or to the beginning."""
        layers: list[Any] = [x for x in self.cache.layers if isinstance(x, StaticLayer)]
        for counter in [self.at, *(layer.cumulative_length for layer in layers)]:
            counter.zero_() if by is None else counter.sub_(by)

    def _capture(self) -> None:
        """Record one step; what it did to warm up is done again when it is replayed."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries allocate their workspaces in a first call
            self.step(self.ids_B1)
            self._rewind(1)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device: a tracker's, a data loader's. A capture that fails does
        # not give back the current stream by itself.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            self.logits_BV = self.step(self.ids_B1)
        self.graph = graph


class FixedDecodings:
    """The decodings of one copy by rows and bucket; forgotten when a tensor of it has moved."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.addresses: list[int] = []
        self.kept: dict[tuple[int, int], FixedDecoding] = {}

    def begin(self, mask_BP: Int[Tensor, "B P"], room: int) -> FixedDecoding:
        """A state for prompts of that mask and `room` more positions."""
        addresses = [t.data_ptr() for t in (*self.module.parameters(), *self.module.buffers())]
        if addresses != self.addresses:  # a graph would read what is no longer there
            self.kept.clear()
            self.addresses = addresses
        key = (len(mask_BP), bucket_of(mask_BP.shape[1] + room))
        if key not in self.kept and len(self.kept) == KEPT:
            del self.kept[next(iter(self.kept))]
        if key not in self.kept:
            self.kept[key] = FixedDecoding(self.module, *key)
        return self.kept[key].begin(mask_BP)
