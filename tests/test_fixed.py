"""Test that steps of fixed shape and address write what the folded copy writes.

A CUDA graph replays such steps; that needs a GPU (`tests/test_gpu.py`). What makes it possible is
checked here: one traced graph for all steps, nothing asked of the device, memory that stays.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import Tensor

from stillhouse.distill.fixed import (
    BUCKET,
    KEPT,
    FixedDecoding,
    FixedDecodings,
    bucket_of,
    obstacle,
)
from stillhouse.distill.folded import ALIKE, Folded
from stillhouse.distill.rollouts import pad_left
from tests.test_folded import DENSE, PAD, PROMPTS, Launches, moved, student

STEPS = 8  # more than a window of 6 positions
KINDS = [kind for kind in DENSE if kind != "bloom"]
# Of each way to write positions, masks, windows and norms one; a trace takes a second.
UNLIKE = ["qwen3", "gemma3_text", "cohere2", "phi3", "gpt2", "opt"]


@pytest.fixture(autouse=True)
def _makers_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def copy_of(kind: str, **sizes: Any) -> Folded:
    form = Folded(student(kind, "int4", **sizes))
    assert form.fold_() is None
    return form


def logits(state: Any, ids_BP: Tensor, new_BT: Tensor) -> Tensor:
    """After the prompt, and after each of the new tokens."""
    first = state.next_logits(ids_BP).clone()
    return torch.stack([first, *(state.next_logits(t.unsqueeze(1)) for t in new_BT.unbind(1))])


def drawn(seed: int) -> Tensor:
    return torch.randint(3, 90, (4, STEPS), generator=torch.Generator().manual_seed(seed))


def test_every_architecture_gives_the_copys_logits_in_memory_that_stays():
    for kind in KINDS:
        form = copy_of(kind)
        fixed = FixedDecodings(form.copy)
        places = set[int]()
        for rows in (PROMPTS[:4], PROMPTS[3:7]):  # the second one over what the first one left
            ids_BP, mask_BP = pad_left(rows, 10, PAD)
            with form.arithmetic():
                state = fixed.begin(mask_BP, STEPS)
                ours = logits(state, ids_BP, drawn(1))
                theirs = logits(form.begin(mask_BP, STEPS), ids_BP, drawn(1))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=kind)
            layers: list[Any] = state.cache.layers
            places.add(layers[0].keys.data_ptr())
        assert len(places) == 1 and len(fixed.kept) == 1, kind


@pytest.mark.parametrize(
    "kinds", [UNLIKE, pytest.param([*{*KINDS} - {*UNLIKE}], marks=pytest.mark.slow)]
)
def test_all_steps_are_one_graph_and_ask_the_device_for_nothing(kinds, monkeypatch):
    for name in ("step", "_masks"):  # the checks of annotations cannot be traced
        monkeypatch.setattr(FixedDecoding, name, inspect.unwrap(getattr(FixedDecoding, name)))
    for kind in kinds:
        form = copy_of(kind)
        ids_BP, mask_BP = pad_left(PROMPTS[:4], 10, PAD)
        torch._dynamo.reset()
        traced = torch._dynamo.testing.CompileCounter()
        with form.arithmetic():
            assert obstacle(form.copy, *form._wanted(), ALIKE) is None, kind
            state = FixedDecodings(form.copy).begin(mask_BP, STEPS)
            state.next_logits(ids_BP)
            step: Any = torch.compile(state.step, backend=traced, fullgraph=True)
            for token_B in drawn(2).unbind(1):
                step(token_B.unsqueeze(1))
        assert traced.frame_count == 1, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_can_be_asked_so_in_half_precision_too(dtype):
    form = Folded(student("qwen3", "int4", dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert form.fold_() is None
        wanted = form._wanted()
        with form.arithmetic():
            assert obstacle(form.copy, *wanted, 0.05) is None


def test_what_cannot_be_asked_so_says_why():
    form = copy_of("bloom")  # its positions are made from a mask of two dimensions
    with form.arithmetic():
        found = obstacle(form.copy, *form._wanted(), ALIKE)
    assert found is not None and found.startswith("ValueError: ")
    form = copy_of("qwen3")
    ids_BT, mask_BT, want_BTV = form._wanted()
    with form.arithmetic():
        found = obstacle(form.copy, ids_BT, mask_BT, want_BTV.flip(0), ALIKE)
        form.copy.lm_head.register_forward_pre_hook(lambda _, x: None if x[0].any() else None)
        asks = obstacle(form.copy, ids_BT, mask_BT, want_BTV, ALIKE)
    assert found is not None and found.startswith("its logits differ by ")
    assert asks is not None and asks.startswith("RuntimeError: a step asks the device for a value")


def test_an_update_is_seen_in_the_same_memory_and_a_moved_tensor_forgets_it():
    form = copy_of("qwen3")
    fixed, (ids_BP, mask_BP) = FixedDecodings(form.copy), pad_left(PROMPTS[:4], 10, PAD)

    def ours() -> Tensor:
        with form.arithmetic():
            return logits(fixed.begin(mask_BP, STEPS), ids_BP, drawn(3))

    before, state = ours(), next(iter(fixed.kept.values()))
    moved(form.causal_lm, 2)
    assert form.fold_() is None
    with form.arithmetic():
        theirs = logits(form.begin(mask_BP, STEPS), ids_BP, drawn(3))
    torch.testing.assert_close(ours(), theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(before, theirs, atol=1e-3), "this update does nothing"
    assert next(iter(fixed.kept.values())) is state
    norm: Any = form.causal_lm.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2, requires_grad=False)
    assert form.fold_() is None
    torch.testing.assert_close(ours(), 2 * theirs, rtol=0, atol=1e-4)
    assert next(iter(fixed.kept.values())) is not state


def test_lengths_share_buckets_and_few_of_them_stay():
    assert [bucket_of(n) for n in (1, BUCKET, BUCKET + 1)] == [BUCKET, BUCKET, 2 * BUCKET]
    fixed = FixedDecodings(copy_of("qwen3").copy)
    mask_BP = torch.ones(4, 10, dtype=torch.long)
    for room in (1, 2, BUCKET, 3 * BUCKET, 3):
        fixed.begin(mask_BP, room)
    assert len(fixed.kept) == KEPT
    assert [length for _, length in fixed.kept] == [4 * BUCKET, BUCKET]


def test_a_step_launches_hardly_more_kernels_than_the_copys_own():
    form = copy_of("qwen3", num_hidden_layers=12)
    ids_BP, mask_BP = pad_left(PROMPTS[:4], 10, PAD)
    counts = list[int]()
    with form.arithmetic():
        for state in (FixedDecodings(form.copy).begin(mask_BP, 3), form.begin(mask_BP, 3)):
            state.next_logits(ids_BP)
            with Launches() as launched:
                state.next_logits(ids_BP[:, :1])
            counts.append(launched.count)
    assert counts[0] <= 1.1 * counts[1], counts
