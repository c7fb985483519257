"""Measure, on one GPU, the parts of the package that a GPU changes.

    python -m benchmarks.gpu [--write]    prints Markdown; into docs/benchmarks.md; two minutes

These are the loss at the shape of the 4B seeds' pair in bfloat16; rollouts of a float32 Llama and
of a student of that 4B shape; and train.py on a pair of it, with random weights (the text that is
written does not affect time and memory, and nothing has to be downloaded).
Legend: N positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks import loss, rollout
from benchmarks.run import put
from stillhouse.distill.engine import Engine
from stillhouse.distill.folded import Folded
from stillhouse.distill.models import load_base, new_student
from stillhouse.distill.objectives import CrossEntropy, Jsd, TopK
from stillhouse.distill.rollouts import pad_left
from stillhouse.distill.toy import tiny
from stillhouse.spec import LoraSpec, QuantSpec

GPU = torch.device("cuda")
POSITIONS, VOCABULARY, HIDDEN = 2048, 151_936, 2560
CHUNKS = (64, 128, 256, 512, 1024)
PAIRS = 9  # alternating runs per row, after one that warms up
# Qwen3-4B's shape, and SmolLM2-360M's.
QWEN = Qwen3Config(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=9728, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    max_position_embeddings=4096, dtype="bfloat16", bos_token_id=None, eos_token_id=1,
    pad_token_id=0,
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=49_152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32,
    num_attention_heads=15, num_key_value_heads=5, tie_word_embeddings=True,
    max_position_embeddings=2048, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
NF4 = QuantSpec(quant_type="bnb_nf4", quant_group_size=64, double_quant=True)
LORA = LoraSpec(
    lora_r=32, lora_alpha=64, lora_dropout=0.0, target_modules=rollout.TARGETS
)  # as the pair's
TRAINED_STEPS, LONG = 4, 64


def inputs() -> loss.Inputs:
    torch.manual_seed(0)
    bf16 = {"device": GPU, "dtype": torch.bfloat16}
    hidden, teacher_hidden = (torch.randn(POSITIONS, HIDDEN, **bf16) for _ in range(2))
    heads = (torch.randn(VOCABULARY, HIDDEN, **bf16).mul_(0.04) for _ in range(2))
    targets = torch.randint(VOCABULARY, (POSITIONS,), device=GPU)
    return loss.Inputs(hidden.requires_grad_(), next(heads), teacher_hidden, next(heads), targets)


def extra_mib(of: Callable[[loss.Inputs], Tensor], x: loss.Inputs) -> float:
    """What the allocator held at the peak of a step, above what it held before."""
    x.hidden_NH.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    of(x).backward()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def raced(first: Callable[[loss.Inputs], Tensor], second: Callable[[loss.Inputs], Tensor],
          x: loss.Inputs) -> tuple[float, float, float]:  # fmt: skip
    """Time of the first over the second's, and milliseconds of each: medians of pairs."""
    for of in (first, second):
        loss.step(of, x)
    pairs = [[loss.step(of, x)[0] for of in (first, second)] for _ in range(PAIRS)]
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, *(1000 * statistics.median(column) for column in zip(*pairs, strict=True))


def losses() -> list[str]:
    x = inputs()
    lines = [
        f"**The loss.** {POSITIONS:,} positions, vocabulary {VOCABULARY:,}, hidden {HIDDEN:,},"
        f" bfloat16 hidden states and heads, float32 after the product; {loss.CHUNK} positions a"
        f" chunk unless said. Medians of {PAIRS} alternating pairs; memory is what the allocator"
        " held at the peak above what it held before.\n",
        "| of | over | time | ms | extra MiB | gradients differ by |",
        "|---|---|---|---|---|---|",
    ]
    jsd = partial(loss.ours, Jsd(0.5))
    races: list[tuple[str, str, Callable[..., Tensor], Callable[..., Tensor]]] = [
        *(
            (f"beta {beta:g}", "dense", partial(loss.ours, Jsd(beta)), partial(loss.dense, beta))
            for beta in (0.0, 0.5, 1.0)
        ),
        *(
            (f"beta 0.5, chunk {c}", f"chunk {loss.CHUNK}", partial(jsd, chunk=c), jsd)
            for c in CHUNKS
        ),
        *(
            (f"beta {beta:g}, diagnostics", "without", partial(loss.looked_at, beta),
             partial(loss.ours, Jsd(beta)))
            for beta in (0.0, 0.5, 1.0)
        ),
        ("cross-entropy", "beta 0.5", partial(loss.ours, CrossEntropy()), jsd),
        ("top 16 of the student, beta 1", "beta 0.5",
         partial(loss.ours, TopK(16, "student", 1.0)), jsd),
    ]  # fmt: skip
    for name, other, first, second in races:
        gradients = []
        for of in (first, second):
            gradients.append(loss.step(of, x)[2].double())
        off = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
        memory = [extra_mib(of, x) for of in (first, second)]
        ratio, first_ms, second_ms = raced(first, second, x)
        is_same = "top" not in name and "entropy" not in name
        lines.append(
            f"| {name} | {other} | {ratio:.2f} | {first_ms:.1f} / {second_ms:.1f}"
            f" | {memory[0]:.0f} / {memory[1]:.0f} | {f'{off:.0e}' if is_same else '–'} |"
        )
    return lines


def drawn(of: type, config: object, directory: Path, dtype: torch.dtype) -> Path:
    """A model of this shape with weights as they are drawn, and a tokenizer, to be loaded."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with GPU:
        model = of(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def rollouts(directory: Path) -> list[str]:
    path = str(drawn(LlamaForCausalLM, LLAMA, directory / "llama", torch.float32))
    student = new_student(load_base(path, None, "float32", NF4, GPU), LORA, 0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    prompts = [[5 + (7 * row + place) % 300 for place in range(24)] for row in range(32)]
    ids_BP, mask_BP = (t.to(GPU) for t in pad_left(prompts, 24, 0))
    ways = rollout.greedy(student.eval(), ids_BP, mask_BP)
    (_, ours), (_, theirs) = map(_timed, ways)
    pairs = [[_timed(way)[0] for way in ways] for _ in range(3)]
    ratio = statistics.median(b / a for a, b in pairs)
    ms = [1000 * statistics.median(column) for column in zip(*pairs, strict=True)]
    agreed = float((ours == theirs).float().mean())
    return [
        f"**Rollouts.** A float32 Llama of SmolLM2-360M's shape, bnb_nf4 + LoRA {LORA.lora_r},"
        f" {len(prompts)} prompts, {rollout.NEW_TOKENS} new tokens each, the likeliest: the decoder"
        f" is {ratio:.1f} times as fast as `generate` ({ms[0]:.0f} / {ms[1]:.0f} ms; medians of 3"
        f" alternating pairs); {agreed:.1%} of the tokens are the same.",
    ]


def writers(path: Path) -> list[str]:
    """Rollouts of the 4B shape: graphs replayed, the same copy step by step, and `generate`."""
    student = new_student(load_base(str(path), None, "bfloat16", NF4, GPU), LORA, 0).eval()
    engines = {"step by step": Engine(student), "replayed": Engine(student)}
    engines["generate"] = Engine(student)
    engines["generate"].refold = lambda: None
    lines = list[str]()
    with torch.autocast("cuda", torch.bfloat16):
        named = engines["replayed"].how()
        stepped = engines["step by step"]
        stepped.refold()
        assert isinstance(stepped.form, Folded), stepped.reason
        stepped.form.fixed = None
        for rows in (8, 64):
            prompts = [[5 + (7 * row + place) % 300 for place in range(24)] for row in range(rows)]
            inputs = [t.to(GPU) for t in pad_left(prompts, 24, 0)]
            written = dict[str, Tensor]()
            for name, engine in engines.items():
                if rows > 8 and name == "generate":
                    continue
                way = partial(
                    rollout.refolded, engine, *inputs, lambda logits_bV, _: logits_bV.argmax(-1),
                    pad_id=0, eos_ids=[], max_new_tokens=LONG,
                )  # fmt: skip
                _timed(way)  # captures, and loads what libraries load once
                seconds, written[name] = _timed(way)
                same = float((written[name] == written["step by step"]).float().mean())
                lines.append(f"| {rows} | {name} | {rows * LONG / seconds:.0f} | {same:.0%} |")
    return [
        f"**Rollouts of the 4B shape**, bfloat16 under autocast, bnb_nf4 + LoRA {LORA.lora_r},"
        f" {LONG} new tokens a row, the likeliest; folding included. The log says: {named}. Same:"
        " tokens equal to those of the copy step by step (it rounds otherwise, and rows part).\n",
        "| rows | way | tokens per second | same |",
        "|---|---|---|---|",
        *lines,
    ]


def _timed(way: rollout.Way) -> tuple[float, Tensor]:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    out_BC = way()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, out_BC


def training(directory: Path, path: Path) -> list[str]:
    """train.py, as a pod would call it."""
    torch.cuda.empty_cache()
    line = [
        "pair=qwen3_4b_self", f"pair.student={path}", f"pair.teacher={path}", "quant=bnb_nf4",
        "data=generated", "method=on_policy_gkd", "beta=0.5", f"max_steps={TRAINED_STEPS}",
        "num_processes=1", "per_device_train_batch_size=8", "gradient_accumulation_steps=1",
        "max_new_tokens=64", "min_new_tokens=64", "sanity_max_nll=30", "overlap_steps=1",
        f"runs={directory / 'runs'}", f"output_dir={directory / 'out'}",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "train.py", *line], text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"train.py ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr}")
    metrics = (directory / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(text) for text in metrics][1:]  # the first one warms up
    rows = [
        (phase, statistics.median(step[f"time/{phase}"] for step in steps))
        for phase in ("rollout", "teacher", "train", "step")
    ]
    wrote = next(x for x in done.stdout.splitlines() if "rollouts: " in x).partition("rollouts: ")[
        2
    ]
    tokens = statistics.median(step["tokens/rollout"] for step in steps)
    return [
        f"**train.py.** A self pair of Qwen3-4B's shape in bfloat16, the student in bnb_nf4 with"
        f" LoRA {LORA.lora_r}; medians of {len(steps)} steps after one that warms up. A step writes"
        f" 8 rollouts of 64 tokens by {wrote}, {tokens / rows[0][1]:.0f} tokens a second, and"
        " looks at the overlap.\n",
        "| phase | s a step | share |",
        "|---|---|---|",
        *(f"| {phase} | {value:.2f} | {value / rows[-1][1]:.0%} |" for phase, value in rows),
    ]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no GPU here: benchmarks.gpu measures what one changes")
    home = "/dev/shm" if Path("/dev/shm").is_dir() else None
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(dir=home) as directory:
        here = Path(directory)
        said = list[str]()
        path = drawn(Qwen3ForCausalLM, QWEN, here / "qwen", torch.bfloat16)
        parts = (
            losses, partial(rollouts, here), partial(writers, path), partial(training, here, path)
        )  # fmt: skip
        for part in parts:
            lines = part()
            print("\n".join(lines), flush=True)
            said += [*lines, ""]
    if sys.argv[1:] == ["--write"]:
        gpu = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        title = "On a GPU: the loss, rollouts, a step of a 4B pair"
        put("gpu", "\n".join(said).strip(), title, gpu)


if __name__ == "__main__":
    main()
