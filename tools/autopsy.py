"""Reintroduce published faults one at a time, to see which of them causes the cliff.

    .venv/bin/python -m tools.autopsy              all faults × methods × seeds; minutes to an hour
    .venv/bin/python -m tools.autopsy --seeds 2    fewer

The faults are those of the cliff repository (bledden/context-distillation-tinkerideas,
tinker_trainer.py): its supervised step trains each position on the token that it reads, not on the
next one; its on-policy step feeds the response without its prompt; its supervised steps have twice
the learning rate. They are patched into the package's own loop from outside; the package has no
switch for them. A run lies in runs/autopsy/<fault>, like any other, and a repeated call resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RUNS = Path("runs/autopsy")
METHODS = ("on_policy_gkd", "hybrid", "reverse_curriculum", "sft")
FAULTS = ("none", "unshifted", "no_prompt", "double_rate", "all")
# As the ce_pg arms of sweeps/cliff.yaml; a fault would end a run at its first step otherwise.
WORDS = (
    "pair=tiny",
    "quant=none",
    "loss=ce_pg",
    "learning_rate=2e-3",
    "accuracy_steps=10",
    "threads=1",
    "sanity_max_nll=1e9",
)


@contextlib.contextmanager
def fault(name: str) -> Iterator[None]:
    """The loop with a fault in it, for as long as the context lasts."""
    from stillhouse.distill import loop

    right, micro_batch = loop.positions_of, loop.Loop._micro_batch
    rate = loop.learning_rate
    on_policy = [False]  # whether the current micro batch is on-policy

    def seen(self: Any, batch: Any, *rest: Any) -> Any:
        on_policy[0] = batch.is_on_policy
        return micro_batch(self, batch, *rest)

    def positions(
        model: Any,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        forced: Sequence[int],
        prompt_length: int,
        *rest: Any,
    ) -> Any:
        if on_policy[0] and name in ("no_prompt", "all"):
            # The prompt's last token stays: the first answer token needs a token before it.
            return right(model, [p[-1:] for p in prompts], completions, forced, 1, *rest)
        if not on_policy[0] and name in ("unshifted", "all"):
            longer = [[*c, c[-1]] for c in completions]
            behind = [n + 1 for n in forced]
            hidden_NH, next_N = right(model, prompts, longer, behind, prompt_length, *rest)
            read = [t for c, n in zip(completions, forced, strict=True) for t in c[n:]]
            return hidden_NH, next_N.new_tensor(read)
        return right(model, prompts, completions, forced, prompt_length, *rest)

    def doubled(spec: Any, step: int) -> float:
        faulty = name in ("double_rate", "all") and not on_policy[0]
        return rate(spec, step) * (2 if faulty else 1)

    loop.positions_of, loop.learning_rate = positions, doubled
    setattr(loop.Loop, "_micro_batch", seen)  # noqa: B010 - pyright knows its signature
    try:
        yield
    finally:
        loop.positions_of, loop.learning_rate = right, rate
        loop.Loop._micro_batch = micro_batch


def curve(job: tuple[str, str, int, tuple[str, ...]]) -> list[float]:
    """Held-out accuracy every ten steps of one run, which is trained unless it is there."""
    name, method, seed, more = job
    from stillhouse import entrypoints
    from stillhouse.compose import compose, from_command_line
    from stillhouse.rundir import Runs
    from stillhouse.spec import TrainSpec

    words = [*WORDS, f"method={method}", f"seed={seed}", f"runs={RUNS / name}", *more]
    spec = compose(from_command_line(words, TrainSpec), TrainSpec)
    run = Runs(RUNS / name).of(spec)
    with fault(name), contextlib.redirect_stdout(None):
        code = entrypoints.train(spec)
    found = [m["eval/accuracy"] for m in run.metrics() if "eval/accuracy" in m]
    # A run that diverged has no later accuracy than its last.
    return found if code == 0 else [*found, float("nan")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Put published faults back, one at a time.")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    asked, more = parser.parse_known_args()
    jobs = [
        (name, method, seed, tuple(more))
        for seed in range(asked.seeds)
        for method in METHODS
        for name in FAULTS
    ]
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["stillhouse.distill.run"])
    with spawn.Pool(asked.processes) as pool:
        curves = []
        for job, found in zip(jobs, pool.imap(curve, jobs), strict=True):
            curves.append(found)
            print(f"{len(curves)}/{len(jobs)} {' '.join(map(str, job[:3]))} {found}", flush=True)
    _table(jobs, curves)


def _table(jobs: Sequence[tuple[Any, ...]], curves: Sequence[list[float]]) -> None:
    """Final accuracy and the lowest on the way, mean ± standard error over seeds."""
    from stillhouse.results.stats import estimate, number

    def told(values: Sequence[float]) -> str:
        e = estimate(values)
        return f"{number(e.mean)} ± {number(e.se)}"

    print("| method | fault | final accuracy | lowest on the way | n |\n|---|---|---|---|---|")
    for method in METHODS:
        for name in FAULTS:
            mine = [c for j, c in zip(jobs, curves, strict=True) if j[:2] == (name, method)]
            last, lowest = [c[-1] for c in mine], [min(c) for c in mine]
            print(f"| {method} | {name} | {told(last)} | {told(lowest)} | {len(mine)} |")


if __name__ == "__main__":
    main()
