"""Test on a GPU what the other tests check on a CPU: `make test-gpu`, on a machine with a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.distill.diagnostics import Summary
from stillhouse.distill.engine import Engine
from stillhouse.distill.folded import Folded
from stillhouse.distill.head import Head
from stillhouse.distill.losses import distill_loss
from stillhouse.distill.models import load_base, new_student
from stillhouse.distill.objectives import CrossEntropy, Jsd, Objective, TopK
from stillhouse.distill.pairs import prepare
from stillhouse.distill.quant import dequantized_weight
from stillhouse.distill.rollouts import pad_left
from stillhouse.rundir import file_digest
from stillhouse.spec import LoraSpec, QuantSpec
from tests.builders.cheap import words

pytestmark = pytest.mark.gpu

GPU, CPU = torch.device("cuda"), torch.device("cpu")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraSpec(lora_r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS)
QUANTS = {
    "int4": QuantSpec(quant_type="int4", quant_group_size=32, double_quant=False),
    "nf4": QuantSpec(quant_type="bnb_nf4", quant_group_size=64, double_quant=True),
}
EVERY_QUANT = pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS.keys())
STEPS, SAVED_EVERY = 40, 5


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    assert torch.cuda.is_available(), "these tests want a CUDA device, and there is none"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny student base, as a directory."""
    from stillhouse.compose import compose, from_command_line
    from stillhouse.spec import TrainSpec

    line = words(tmp_path_factory.mktemp("runs"))
    spec = compose(from_command_line(line, TrainSpec), TrainSpec)
    return prepare(spec.pair, spec.quant, Path(spec.place.cache_dir)).student


@pytest.mark.parametrize(
    "objective",
    [Jsd(0.0), Jsd(0.5), Jsd(1.0), CrossEntropy(), TopK(16, "student", 1.0)],
    ids=["forward_kl", "jsd", "reverse_kl", "cross_entropy", "top_k"],
)
def test_a_loss_its_gradient_and_the_overlap_are_those_of_a_cpu(objective: Objective) -> None:
    N, H, V = 300, 64, 4096
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(N, H, generator=generator) for _ in range(2))
    head, teacher_head = (0.3 * torch.randn(V, H, generator=generator) for _ in range(2))
    targets = torch.randint(V, (N,), generator=generator)

    def on(device: torch.device) -> tuple[Tensor, Tensor, dict[str, float]]:
        hidden_NH = hidden.to(device).requires_grad_()
        teacher_NV = (taught @ teacher_head.T).to(device)
        summary = Summary(16, [(0, 50), (50, None)])
        loss, _ = distill_loss(
            hidden_NH, Head(head.to(device)), lambda rows: teacher_NV[rows], targets.to(device),
            objective=objective, summary=summary, places_N=torch.arange(N, device=device) % 100,
        )  # fmt: skip
        loss.backward()
        assert hidden_NH.grad is not None
        seen = summary.metrics(summary.numbers())
        return loss.detach().cpu(), hidden_NH.grad.cpu(), seen

    (value, gradient, seen), (here, own, known) = on(GPU), on(CPU)
    torch.testing.assert_close(value, here, rtol=1e-5, atol=0)
    assert (gradient - own).norm() <= 1e-4 * own.norm()
    assert seen == pytest.approx(known, rel=1e-4)


@EVERY_QUANT
def test_a_quantised_weight_is_the_one_of_a_cpu(base: str, quant: QuantSpec) -> None:
    layers = [
        dict(load_base(base, None, "float32", quant, device).named_modules())[
            "model.layers.0.mlp.up_proj"
        ]
        for device in (GPU, CPU)
    ]
    on_gpu, on_cpu = (dequantized_weight(layer).cpu() for layer in layers)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-5, atol=1e-6)


@EVERY_QUANT
def test_the_decoder_writes_what_generate_writes(base: str, quant: QuantSpec) -> None:
    student: Any = new_student(load_base(base, None, "float32", quant, GPU), LORA, 0).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    prompts = [[5 + (7 * row + place) % 300 for place in range(9 + row)] for row in range(8)]
    ids_BP, mask_BP = (t.to(GPU) for t in pad_left(prompts, 16, 0))
    engine = Engine(student)
    engine.refold()
    assert engine.form is not None
    ours = engine.tokens(
        ids_BP, mask_BP, lambda logits_bV, row_b: logits_bV.argmax(-1),
        pad_id=0, eos_ids=[], max_new_tokens=24,
    )  # fmt: skip
    theirs = student.generate(
        input_ids=ids_BP, attention_mask=mask_BP, max_new_tokens=24, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[:, 16:]  # fmt: skip
    assert torch.equal(ours, theirs)


@EVERY_QUANT
def test_a_replayed_graph_writes_what_steps_write_and_sees_the_next_fold(
    base: str, quant: QuantSpec
) -> None:
    student: Any = new_student(load_base(base, None, "bfloat16", quant, GPU), LORA, 0).eval()
    prompts = [[5 + (7 * row + place) % 300 for place in range(9 + row)] for row in range(8)]
    ids_BP, mask_BP = (t.to(GPU) for t in pad_left(prompts, 16, 0))
    engine = Engine(student)

    def written() -> Tensor:
        return engine.tokens(
            ids_BP, mask_BP, lambda logits_bV, row_b: logits_bV.argmax(-1),
            pad_id=0, eos_ids=[], max_new_tokens=24,
        )  # fmt: skip

    texts = list[Tensor]()
    for std in (0.05, 0.2):
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=std)
        assert engine.how().endswith("its steps replayed as CUDA graphs"), engine.how()
        form = engine.form
        assert isinstance(form, Folded) and form.fixed is not None
        replayed, again = written(), written()
        state = next(iter(form.fixed.kept.values()))
        assert state.graph is not None
        with form.arithmetic():  # the same kernels, one after the other
            token_B1 = state.begin(mask_BP).step(ids_BP).argmax(-1, keepdim=True)
            stepped = [token_B1]
            for _ in range(23):
                stepped.append(token_B1 := state.step(token_B1).argmax(-1, keepdim=True))
        assert torch.equal(replayed, torch.cat(stepped, 1)) and torch.equal(replayed, again)
        texts.append(replayed)
    assert not torch.equal(*texts), "this update does nothing"


@pytest.mark.parametrize("more", [["quant=bnb_nf4"], ["quant=int4", "mixed_precision=bf16"]])
def test_killed_and_begun_again_a_run_ends_in_the_same_bits(
    tmp_path: Path, more: list[str]
) -> None:
    def line(name: str) -> list[str]:
        point = [f"max_steps={STEPS}", f"save_steps={SAVED_EVERY}", "lmbda=1", *more]
        out = f"output_dir={tmp_path / name}"
        return [sys.executable, "train.py", *words(tmp_path / f"runs_{name}", *point), out]

    whole = subprocess.run(line("whole"), text=True, capture_output=True)
    assert whole.returncode == 0, whole.stderr
    metrics = tmp_path / "killed" / "metrics.jsonl"
    process = subprocess.Popen(line("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    while not metrics.exists() or len(metrics.read_text().splitlines()) < STEPS // 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run(line("killed"), text=True, capture_output=True)
    assert again.returncode == 0, again.stderr

    def numbers(name: str) -> list[dict[str, float]]:
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    assert numbers("killed") == numbers("whole")
    both = [
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("killed", "whole")
    ]
    assert file_digest(both[0]) == file_digest(both[1])
