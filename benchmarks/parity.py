"""Compare our loss and our training step with TRL's GKD.

    make parity       prints two Markdown tables; exit code 1 if something differs beyond its limit

TRL is installed in an environment of its own (pyproject.toml's group `parity`), not the package's.

The loss: `distill_loss` and `GKDTrainer.generalized_jsd_loss` on the same logits. TRL's "batchmean"
divides the sum by the number of labels that are not -100, as our callers divide by completion
tokens: the factor is 1. Neither multiplies by temperature². TRL shifts the labels before the call.

The step: our loop and `GKDTrainer.train` from the same weights and adapter, each with its own
tokenizing, padding, masks, accumulation, clipping and AdamW. lmbda is 0, so that both train on the
rows of one file. (On rollouts TRL 1.16 still divides by the tokens of the rows that they replace;
we divide by those of the rollouts.)
Legend: B sequences, T positions, N completion positions of all sequences, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from trl.experimental.gkd import (  # pyright: ignore[reportMissingImports]
    GKDConfig,
    GKDTrainer,
)

from stillhouse.compose import compose, from_command_line
from stillhouse.distill.head import Head
from stillhouse.distill.losses import distill_loss
from stillhouse.distill.objectives import Jsd
from stillhouse.distill.run import Run
from stillhouse.rundir import Runs
from stillhouse.spec import TrainSpec
from stillhouse.stop import StopFlag

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (1.0, 2.0)
VOCABULARY, POSITIONS = 97, 40
# (prompt tokens, completion tokens, spread of the logits): nearly uniform to nearly one-hot. The
# rest of a row is padding; the last one has nothing to train on.
ROWS = [(3, 20, 1.0), (11, 1, 2.0), (7, 33, 8.0), (20, 9, 30.0), (9, 0, 2.0)]
# float64 shows that the formulas are one; float32, which models have, what rounding makes of that.
LOSS_LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}

STEP_BETAS = (0.0, 0.5, 1.0)
STEPS = 3  # in the first, Adam's betas cancel
STEP_LIMIT = 1e-5
# Of unlike lengths: each micro batch pads differently, and holds another share of the tokens.
CONVERSATIONS = [
    ("7+3?", "10"),
    ("Ben has 7 beads. A friend adds 3. Ben gives 2 up. How many beads?", "7+3=10. 10-2=8. #### 8"),
    ("Ida has 5 cups. Then 4 more are found. How many cups are there now?", "#### 9"),
    ("Count down.", "9 8 7 6 5 4 3 2 1 0. Then there are none, and none are left to count."),
]


def off_by(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest of theirs (itself, if theirs are all 0)."""
    largest = theirs.abs().max()
    return float((ours - theirs).abs().max() / (largest if largest > 0 else 1))


# ---------------------------------------------------------------- the loss


class Logits(NamedTuple):
    student_BTV: Tensor
    teacher_BTV: Tensor
    labels_BT: Tensor  # -100 at prompts and padding


def logits(dtype: torch.dtype) -> Logits:
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.stack([torch.randn(POSITIONS, VOCABULARY, generator=g) * s for _, _, s in ROWS])
        for _ in range(2)
    )
    labels_BT = torch.full((len(ROWS), POSITIONS), -100)
    for row, (prompt, completion, _) in enumerate(ROWS):
        drawn = torch.randint(VOCABULARY, (completion,), generator=g)
        labels_BT[row, prompt : prompt + completion] = drawn
    return Logits(student.to(dtype).requires_grad_(), teacher.to(dtype), labels_BT)


def our_loss(x: Logits, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean per completion token, and values [B, T], 0 where there is none.

    The head is the identity: hidden states are logits.
    """
    is_trained_BT = x.labels_BT != -100
    teacher_NV = x.teacher_BTV[is_trained_BT]
    total, stats = distill_loss(
        x.student_BTV[is_trained_BT],
        Head(torch.eye(VOCABULARY, dtype=x.student_BTV.dtype)),
        lambda rows: teacher_NV[rows],
        x.labels_BT[is_trained_BT],
        objective=Jsd(beta),
        temperature=temperature,
        chunk=16,
    )
    values_BT = x.teacher_BTV.new_zeros(x.labels_BT.shape)
    values_BT[is_trained_BT] = stats.loss
    return total / is_trained_BT.sum(), values_BT


def their_loss(x: Logits, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The same from TRL; the values from its unreduced form, [N, V]."""
    arguments = (x.student_BTV, x.teacher_BTV, x.labels_BT, beta, temperature)
    values_BT = x.teacher_BTV.new_zeros(x.labels_BT.shape)
    with torch.no_grad():
        values_NV = GKDTrainer.generalized_jsd_loss(*arguments, reduction="none")
    values_BT[x.labels_BT != -100] = values_NV.sum(-1)
    return GKDTrainer.generalized_jsd_loss(*arguments), values_BT


def compared_loss(beta: float, temperature: float, dtype: torch.dtype) -> list[float]:
    """How far ours is off: the mean, the values of the worst row, the gradient.

    The gradient as a whole, not row by row: where teacher and student are sure of two different
    tokens, JSD is at its ceiling, and what is left of its gradient (1e-11) is both sides' rounding.
    """
    x = logits(dtype)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for loss in (our_loss, their_loss):
        mean, values_BT = loss(x, beta, temperature)
        (gradient_BTV,) = torch.autograd.grad(mean, x.student_BTV)
        found.append((mean.detach(), values_BT, gradient_BTV))
    (mean, values_BT, gradient_BTV), (their_mean, their_values_BT, their_gradient_BTV) = found
    return [
        off_by(mean, their_mean),
        max(off_by(*row) for row in zip(values_BT, their_values_BT, strict=True)),
        off_by(gradient_BTV, their_gradient_BTV),
    ]


def loss_table() -> bool:
    """Print the comparison of the losses; whether all limits are kept."""
    print("| beta | temperature | dtype | mean off by | worst row's values | gradient | limit |")
    print("|---|---|---|---|---|---|---|")
    kept = True
    for dtype, limit in LOSS_LIMITS.items():
        for beta in BETAS:
            for temperature in TEMPERATURES:
                off = compared_loss(beta, temperature, dtype)
                kept &= all(value <= limit for value in off)
                name = str(dtype).removeprefix("torch.")
                shown = " | ".join(f"{value:.1e}" for value in off)
                print(f"| {beta:g} | {temperature:g} | {name} | {shown} | {limit:g} |")
    return kept


# ---------------------------------------------------------------- the step


class Trained(NamedTuple):
    """What a few steps said and did."""

    losses: Tensor  # [steps], nats per completion token
    norms: Tensor  # [steps], of the gradient before clipping
    change: Tensor  # of all adapter parameters


def our_run(beta: float, place: Path, rows: Path) -> Run:
    """A run that is ready for its first step, with an adapter that already does something."""
    words = [
        "pair=tiny", "student_steps=5", "teacher_steps=20", "quant=none", "data=local",
        f"data_path={rows}", "held_out_rows=0", "min_completion=1", "method=gkd", "lmbda=0",
        f"beta={beta}", "per_device_train_batch_size=2", "gradient_accumulation_steps=2",
        f"max_steps={STEPS}", "learning_rate=0.01", "lr_scheduler_type=constant", "warmup_ratio=0",
        "weight_decay=0.1", "adam_beta1=0.8", "adam_beta2=0.95", "max_grad_norm=0.2",
        # At Adam's usual 1e-8 its first step is the gradient's sign: a loss that is ten times too
        # large would make the same one.
        "adam_epsilon=0.01",
        "threads=1", f"runs={place / 'runs'}", f"cache_dir={place / 'cache'}",
    ]  # fmt: skip
    spec = compose(from_command_line(words, TrainSpec), TrainSpec)
    run = Run(spec, Runs(place / "runs").of(spec), StopFlag())
    # A fresh adapter has B = 0, and then A has no gradient.
    g = torch.Generator().manual_seed(0)
    for parameter in run.loop.parameters:
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return run


def flat(parameters: list[Any]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


def our_steps(run: Run) -> Trained:
    before = flat(run.loop.parameters)
    seen = [run.loop.gradients(step) | run.loop.update(step) for step in range(STEPS)]
    losses, norms = (torch.tensor([m[f"train/{n}"] for m in seen]) for n in ("loss", "grad_norm"))
    return Trained(losses, norms, flat(run.loop.parameters) - before)


def their_steps(student: Any, run: Run, place: Path, conversations: list[Any]) -> Trained:
    """The same steps by TRL, with the settings of `run`; `student` is trained in place."""
    training, optim = run.spec.training, run.spec.optim
    arguments = GKDConfig(
        output_dir=str(place / "theirs"), lmbda=0.0, beta=run.spec.loss.beta,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=STEPS, learning_rate=optim.learning_rate, lr_scheduler_type="constant",
        weight_decay=optim.weight_decay, adam_beta1=optim.adam_beta1, adam_beta2=optim.adam_beta2,
        adam_epsilon=optim.adam_epsilon, max_grad_norm=optim.max_grad_norm,
        bf16=False, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(),
        logging_steps=1, disable_tqdm=True, report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = GKDTrainer(
        model=student,
        teacher_model=run.prepared.teacher,
        args=arguments,
        train_dataset=Dataset.from_list(conversations),
        processing_class=copy.deepcopy(run.tokenizer),
    )
    parameters = [p for p in student.parameters() if p.requires_grad]
    before = flat(parameters)
    trainer.train()
    seen = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    losses, norms = (torch.tensor([entry[n] for entry in seen]) for n in ("loss", "grad_norm"))
    return Trained(losses, norms, flat(parameters) - before)


def step_table(place: Path) -> bool:
    """Print the comparison of the steps; whether all limits are kept."""
    rows = place / "rows.jsonl"
    roles = ("user", "assistant")
    conversations = [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]}
        for turns in CONVERSATIONS
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in conversations))
    lines: list[str] = []
    kept = True
    for beta in STEP_BETAS:
        with contextlib.redirect_stdout(sys.stderr):  # what both say meanwhile is no table
            run = our_run(beta, place, rows)
            student = copy.deepcopy(run.student)
            ours, theirs = our_steps(run), their_steps(student, run, place, conversations)
        off = [off_by(*pair) for pair in zip(ours, theirs, strict=True)]
        kept &= all(value <= STEP_LIMIT for value in off)
        loss, norm = float(theirs.losses[0]), float(theirs.norms[0])
        shown = " | ".join(f"{value:.1e}" for value in off)
        lines.append(f"| {beta:g} | {loss:.6f} | {norm:.4f} | {shown} | {STEP_LIMIT:g} |")
    head = "| beta | TRL's first loss | its gradient's norm | losses off by | norms | parameters"
    print(f"\n{head} | limit |\n|---|---|---|---|---|---|---|", *lines, sep="\n")
    return kept


def main() -> int:
    torch.set_num_threads(1)
    names = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    print(f"Ours against {names}. Differences are relative to the largest of theirs.\n")
    kept = loss_table()
    with tempfile.TemporaryDirectory() as place:
        kept &= step_table(Path(place))
    if not kept:
        print("parity: a difference is above its limit", file=sys.stderr)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
