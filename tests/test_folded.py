"""Test that a folded copy writes what the model writes, in any architecture, and is never stale."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.distill.adapters import new_student
from stillhouse.distill.engine import Engine, generate
from stillhouse.distill.folded import Folded, obstacle
from stillhouse.distill.quant import PackedLinear, _PackedLinear, quantize_
from stillhouse.distill.rollouts import Completions, pad_left, uniforms, write
from stillhouse.errors import ConfigError
from stillhouse.spec import LoraSpec, QuantSpec, RolloutSpec
from tools.architectures import FAMILIES, SIZES, tiny

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUANTS = {
    "none": QuantSpec(quant_type="none", quant_group_size=None, double_quant=False),
    "int4": QuantSpec(quant_type="int4", quant_group_size=32, double_quant=False),
    "int2": QuantSpec(quant_type="int2", quant_group_size=32, double_quant=False),
    "nf4": QuantSpec(quant_type="bnb_nf4", quant_group_size=32, double_quant=False),
    "fp4": QuantSpec(quant_type="bnb_fp4", quant_group_size=32, double_quant=False),
}
# Sliding windows, scaled and capped logits, biases, fused projections, no positions, Conv1D.
DENSE = (
    "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2",
    "smollm3", "glm4", "granite", "cohere2", "gpt2", "bloom", "opt",
)  # fmt: skip
WINDOWED = ("mistral", "gemma2", "gemma3_text", "cohere2")
PAD, EOS = 0, 2
PROMPTS = [[11, 7, 30, 44, 5, 9, 21, 60, 3, 8], [4], [17, 29, 90], [6, 33, 12, 70, 8, 8]] * 2
PREFIXES = [[], [5, 9], [], [7], [3, EOS], [], [40, 41, 42], []]
ROLLOUT = RolloutSpec(12, 2, 1.0, 1, 64)


@pytest.fixture(autouse=True)
def _makers_warnings() -> Iterator[None]:
    with warnings.catch_warnings():  # of how their own old layers are written
        warnings.simplefilter("ignore")
        yield


def student(
    kind: str, quant: str = "int4", dtype: torch.dtype = torch.float32, **sizes: Any
) -> Any:
    """A random model whose adapter is not zero; windows are shorter than what is written."""
    family = next(family for family in FAMILIES if family.kind == kind)
    if kind in WINDOWED:
        sizes["sliding_window"] = 6
    base = tiny(family._replace(sizes={**family.sizes, **sizes})).to(dtype)
    quantize_(base, QUANTS[quant])
    lora = LoraSpec(lora_r=4, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS)
    try:
        adapted = new_student(base, lora, 0)
    except ConfigError as error:
        told = re.search(r"Set target_modules=\[([^\]]+)\]", str(error))
        assert told is not None
        named = tuple(told[1].split(","))
        adapted = new_student(
            base, LoraSpec(lora_r=4, lora_alpha=8, lora_dropout=0.1, target_modules=named), 0
        )
    return moved(adapted, 1)


def moved(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def written(engine: Engine, **more: Any) -> Completions:
    draws = uniforms(1, "student", 0, range(len(PROMPTS)), ROLLOUT.max_new_tokens)
    return write(
        engine, PROMPTS, draws, ROLLOUT, pad_id=PAD, eos_ids=[EOS], poll=lambda: None, **more
    )


def by_generate(model: Any, **more: Any) -> Completions:
    engine = Engine(model)
    engine.refold = lambda: None  # never folded: what is left is `generate`
    return written(engine, **more)


def folded(model: Any) -> Engine:
    engine = Engine(model)
    assert engine.how().startswith("a folded copy in "), engine.how()
    return engine


def alike(ours: Completions, theirs: Completions) -> None:
    assert ours.ids == theirs.ids
    for row, (mine, other) in enumerate(zip(ours.log_probs, theirs.log_probs, strict=True)):
        assert mine == pytest.approx(other, abs=1e-5), row


def test_sixteen_architectures_write_what_generate_writes_under_every_quantiser():
    quants = cycle(QUANTS)
    for kind in DENSE:
        model = student(kind, next(quants))
        engine = folded(model.train())
        ours = written(engine, prefixes=PREFIXES)
        alike(ours, by_generate(model, prefixes=PREFIXES))
        assert len(set(map(len, ours.ids))) > 1, kind
        assert model.training
        with model.disable_adapter():
            base = written(engine)
            alike(base, by_generate(model))
        assert base.ids != written(engine).ids, "this adapter does nothing"


def test_a_mixture_with_dense_experts_is_folded_too_and_a_recurrent_state_is_not():
    alike(written(folded(student("qwen3_moe", "none"))), by_generate(student("qwen3_moe", "none")))
    hybrid = Engine(student("qwen3_5_text"))
    assert hybrid.how() == (
        "transformers' generate (it has a recurrent state (LinearAttentionLayer))"
    )
    alike(written(hybrid), by_generate(hybrid.model))


def test_the_next_rollout_sees_an_update_in_the_same_memory():
    model = student("qwen3")
    engine = folded(model)
    first = written(engine)
    form = engine.form
    assert isinstance(form, Folded)
    before = {name: p.data_ptr() for name, p in form.copy.named_parameters()}
    for seed in (2, 3):
        moved(model, seed)
        now = written(engine)
        assert now.ids != first.ids
        alike(now, by_generate(model))
    assert engine.form is form
    assert {name: p.data_ptr() for name, p in form.copy.named_parameters()} == before
    for parameter in model.parameters():  # other tensors, not other numbers in the same ones
        parameter.data = parameter.data.clone()
    name, norm = next((n, m) for n, m in model.named_modules() if n.endswith("input_layernorm"))
    norm.weight = nn.Parameter(norm.weight.detach() * 3)
    alike(written(engine), by_generate(model))
    assert name


def test_an_adapter_that_comes_later_is_written_with_as_are_others_in_its_place():
    family = next(family for family in FAMILIES if family.kind == "qwen3")
    base = tiny(family)
    quantize_(base, QUANTS["int4"])
    alone = written(folded(base))
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    engine = folded(moved(model, 1))
    first = written(engine)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["v_proj", "up_proj"]))
    model.set_adapter("other")
    moved(model, 2)
    other = written(engine)
    alike(other, by_generate(model))
    model.delete_adapter("other")
    model.set_adapter("default")
    assert len({str(each.ids) for each in (alone, first, other)}) == 3
    alike(written(engine), by_generate(model))


def test_a_copy_shares_all_but_its_projections_and_leaves_the_model_as_it_was():
    model = student("qwen3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = folded(model.train())
    written(engine)
    form = engine.form
    assert isinstance(form, Folded)
    own = {id(p) for p in form.copy.parameters()} - {id(p) for p in model.parameters()}
    sizes = {n: p for n, p in form.copy.named_parameters() if id(p) in own}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in sizes} == {*TARGETS}
    assert 4 * sum(p.numel() for p in sizes.values()) == form.bytes()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(t.is_inference() for t in [*model.parameters(), *model.buffers()])
    ids = torch.tensor([PROMPTS[0]])
    model(input_ids=ids, labels=ids).loss.backward()


def own_log_probs(model: Any, texts: Completions) -> Tensor:
    """Of all drawn tokens, by the model's own forward."""
    rows = [[*prompt, *ids] for prompt, ids in zip(PROMPTS, texts.ids, strict=True)]
    ids_BT, mask_BT = pad_left(rows, max(map(len, rows)), PAD)
    positions = (mask_BT.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions).logits
    found = []
    for logits_TV, ids_T, ids in zip(logits.double(), ids_BT, texts.ids, strict=True):
        logits_CV = logits_TV[-len(ids) - 1 : -1]
        logits_CV[: ROLLOUT.min_new_tokens, EOS] = -torch.inf
        found.append(logits_CV.log_softmax(-1).gather(1, ids_T[-len(ids) :, None]))
    return torch.cat(found).squeeze(1)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_in_half_precision_it_is_as_near_to_the_model_as_float32_is(how):
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    model = student("qwen3", "int4", dtype, num_hidden_layers=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.no_grad():
        engine = folded(model)
        assert engine.how() == "a folded copy in bfloat16"
        ours = written(engine)
        trained = own_log_probs(model, ours)
    with torch.no_grad():
        exact = own_log_probs(copy.deepcopy(model).float(), ours)
    drawn = torch.tensor([value for row in ours.log_probs for value in row], dtype=torch.float64)
    to_model, to_exact = ((trained - other).abs().mean() for other in (drawn, exact))
    assert 0 < to_model < 1.5 * to_exact


# --- what is not folded ---------------------------------------------------------------------------


def test_what_cannot_be_folded_is_written_by_generate_and_says_why():
    def adapted(**more: Any) -> nn.Module:
        base = tiny(next(family for family in FAMILIES if family.kind == "qwen3"))
        return get_peft_model(base, LoraConfig(target_modules=["q_proj"], **more))

    merged = student("qwen3", "none")
    merged.merge_adapter()
    lame = student("qwen3", "none")
    lame.get_base_model().model.layers[0].mlp.act_fn = Remembering()
    cases = {
        "q_proj (Linear) is not W x": adapted(use_dora=True),
        "norm (ModulesToSaveWrapper) is trained whole": adapted(modules_to_save=["norm"]),
        "is not W x + (alpha / r) B A x": merged,
        "its copy gives other logits, by": lame,
    }
    for reason, model in cases.items():
        assert reason in Engine(model.eval()).how(), reason
    bias = student("opt", "none")
    assert obstacle(bias) is None


class Remembering(nn.Module):
    """Gives something else each time, as nothing in a model may."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x * self.calls


def test_where_memory_lacks_it_is_generate_and_the_log_says_how_much():
    engine = Engine(student("qwen3"), free=lambda _: 1000)
    assert re.fullmatch(
        r"transformers' generate \(a folded copy takes [\d.e-]+ GB and 1e-06 GB are free\)",
        engine.how(),
    )
    alike(written(engine), by_generate(engine.model))


# --- what a step costs ----------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Counts what would be kernels on a GPU: no views, no casts to the dtype that is there."""

    VIEWS = (
        "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "detach",
        "unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "unbind", "unflatten",
        "alias", "as_strided", "reshape", "_reshape_alias", "view_as_real", "view_as_complex",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        is_same = isinstance(out, Tensor) and any(
            isinstance(a, Tensor) and a.data_ptr() == out.data_ptr() and a.dtype == out.dtype
            for a in args
        )
        self.count += name not in self.VIEWS and (not is_same or name.endswith("_"))
        return out


def launches(model: Any, engine: Engine) -> tuple[int, int]:
    """Of one decoding step: the engine's, and `generate`'s with Q(W) unpacked per call."""
    ids_BP, mask_BP = pad_left(PROMPTS[:4], 10, PAD)
    settings = {"pad_id": PAD, "eos_ids": [EOS]}

    def count(way: Any, new: int) -> int:
        with Launches() as counted, torch.no_grad():
            way(ids_BP, mask_BP, pick, **settings, max_new_tokens=new)
        return counted.count

    def pick(logits_bV: Tensor, row_b: Tensor) -> Tensor:
        return torch.full((len(row_b),), 5)

    ours, theirs = engine.tokens, functools.partial(generate, model)
    return count(ours, 3) - count(ours, 2), count(theirs, 3) - count(theirs, 2)


@pytest.mark.parametrize(
    ("kind", "most"),
    [("qwen3", 0.40), ("gemma2", 0.50), ("phi3", 0.50), ("olmo2", 0.50), ("llama", 0.17)],
)
def test_a_step_launches_few_of_the_kernels_of_generate(kind, most, monkeypatch):
    precision = torch.float32 if kind == "llama" else torch.bfloat16
    model = student(kind, "int4", precision, num_hidden_layers=SIZES["num_hidden_layers"] * 12)
    unpacked = lambda self, x: _PackedLinear.apply(  # noqa: E731  (as on a GPU)
        x, self.packed, self.scale, self.zero, None
    )
    monkeypatch.setattr(PackedLinear, "forward", unpacked)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
        engine = Engine(model)
        engine.refold()
        assert engine.form is not None, engine.reason
        ours, theirs = launches(model, engine)
    assert ours <= most * theirs, (ours, theirs)
