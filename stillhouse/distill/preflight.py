"""Measure a pair before training: will it distill?

The student writes answers, the teacher scores what it wrote, and both answer questions, from the
start and from the middle of the student's answers. The results are numbers with intervals over
prompts. Rules with thresholds that are plain data (`stillhouse.preflight_rules`) decide what they
mean.

Legend: P prompts, N positions of all answers, c columns of numbers per prompt.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, islice, product
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.distill.agreement import compared, row_means
from stillhouse.distill.chat import declared_stop_ids
from stillhouse.distill.encoded import Example
from stillhouse.distill.loaded import Loaded, load
from stillhouse.distill.monitor import answer_in
from stillhouse.distill.rollouts import Completions
from stillhouse.distill.run import Run
from stillhouse.errors import ConfigError
from stillhouse.preflight_rules import Measured
from stillhouse.rundir import Json, RunDir
from stillhouse.spec import TrainSpec
from stillhouse.stop import StopFlag

SHARES = (25, 50)  # percent of the student's answer that both models continue from
TOP = (1, 4)  # in addition to overlap_k: in small vocabularies, few tokens show a difference
RESAMPLES = 2000  # of prompts, per interval: its ends are then stable to a tenth of its width
SEED = 0  # of the resampling; the answers depend on training.seed
# Step numbers that seed the draws: beyond those of any run, so that no draw is used twice.
FIRST, SECOND = 10**9, 10**9 + 1


def preflight(
    spec: TrainSpec,
    prompts: int,
    pilot: int | None,
    stop: StopFlag,
    prefixes: Sequence[int] = (),
) -> Json:
    """The measurements of a pair, by name, with facts about how they were made, and the weights and
    rows they come from.

    prompts: how many are used, held-out ones first. pilot: steps of a run that is thrown away.
    prefixes: after these numbers of tokens of the student's answers, both models continue, too.

    Raises:
        ConfigError: too few prompts; weights are not on this machine.
        ContractError: the tokenizers differ.
    """
    loaded = load(spec, stop.check)
    examples = [*islice(chain(loaded.prompts.held_out, loaded.prompts.train), prompts)]
    if len(examples) < 2:
        raise ConfigError(
            f"data {spec.data.data_name} has {len(examples)} rows to ask; a preflight needs two"
        )
    if pilot and not any(example.answer for example in loaded.prompts.held_out):
        raise ConfigError(
            f"--pilot: data {spec.data.data_name} has no held-out row with an answer, so a pilot"
            " has nothing to show; leave it out"
        )
    look = _Look(spec, loaded, examples)
    numbers = look.overlap() | look.told_apart() | look.capability() | look.along(prefixes)
    prepared = loaded.prepared
    facts = {
        "prompts": len(examples),
        "with_answers": int((~look.has_no_answer_P).sum()),
        "tokenizers": "equal",  # or load() had refused
        "end_of_text": {
            "student": declared_stop_ids(prepared.student, prepared.student_revision),
            "teacher": declared_stop_ids(prepared.teacher, prepared.teacher_revision),
        },
        "teacher_writes": spec.pair.teacher_samples,
        "is_same_function": loaded.roles.is_same_function,
        "quantization_error": prepared.facts.get("quantization_error"),
    }
    if pilot:
        numbers |= _pilot(spec, pilot, stop)
        facts["pilot_steps"] = pilot
    plain = {name: m.as_json() for name, m in numbers.items()}
    return {"numbers": plain, "facts": facts, "sources": loaded.sources}


class _Look:
    """Measurements of one pair on a set of prompts."""

    def __init__(self, spec: TrainSpec, loaded: Loaded, examples: Sequence[Example]) -> None:
        self.spec, self.loaded, self.examples = spec, loaded, examples
        self.writers = loaded.roles.writers()
        self.has_no_answer_P = torch.tensor([example.answer is None for example in examples])
        self.written = {
            "rollouts": self._write("student", FIRST),
            "again": self._write("student", SECOND),
        }
        if spec.pair.teacher_samples:
            self.written["teacher"] = self._write("teacher", FIRST)
        self.known: dict[tuple[str, int], tuple[dict[str, Tensor], Tensor]] = {}

    # ------------------------------------------------------------------ what models do

    def _write(
        self,
        who: str,
        step: int,
        prefixes: Sequence[Sequence[int]] | None = None,
        greedy: bool = False,
    ) -> Completions:
        rows = range(len(self.examples))
        return self.writers[who](self.examples, step, rows, prefixes=prefixes, greedy=greedy)

    def _right(self, written: Completions) -> Float[Tensor, " P"]:
        texts = self.loaded.tokenizer.batch_decode(written.ids, skip_special_tokens=True)
        return torch.tensor(
            [
                torch.nan if e.answer is None else float(answer_in(text) == e.answer)
                for text, e in zip(texts, self.examples, strict=True)
            ],
            dtype=torch.float64,
        )

    def _positions(self, name: str, k: int) -> tuple[dict[str, Tensor], Tensor]:
        """Numbers per position [N] of these answers, and each position's prompt index."""
        if (name, k) not in self.known:
            ids = self.written[name].ids
            self.known[name, k] = compared(self.spec, self.loaded, self.examples, ids, k)
        return self.known[name, k]

    # ------------------------------------------------------------------ what it comes to

    def overlap(self) -> dict[str, Measured]:
        """How similar the two models are on the student's rollouts, before the first step."""
        found: dict[str, Measured] = {}
        for k in sorted({*TOP, self.spec.monitor.overlap_k}):
            values, rows_N = self._positions("rollouts", k)
            names = ["ratio", "advantage", "mass_student", "mass_teacher"]
            for name in names:
                found[f"{name}_{k}"] = _per_token(values[name], rows_N, len(self.examples))
        for name in ("entropy_gap", "student_entropy", "teacher_entropy", "reverse_kl"):
            found[name] = _per_token(values[name], rows_N, len(self.examples))
        if "teacher" in self.written:
            of_teacher, rows_N = self._positions("teacher", 1)
            found["forward_kl"] = _per_token(of_teacher["forward_kl"], rows_N, len(self.examples))
        return found

    def told_apart(self) -> dict[str, Measured]:
        """Whether both models together can distinguish the teacher's answers from the student's.

        The probability that, of one answer of each, the teacher's has the higher log q - log p per
        token: 0.5 means indistinguishable. The same for two answers of the student is the noise
        level. Empty if the teacher only scores.
        """
        if "teacher" not in self.written:
            return {}
        means = []
        for name in self.written:
            values, rows_N = self._positions(name, 1)
            means.append(row_means(values["log_ratio"], rows_N, len(self.examples)))
        mine, again, theirs = means

        def higher(columns_Pc: Tensor) -> Tensor:
            first, second = columns_Pc.unbind(-1)
            wins = (second[..., None, :] > first[..., :, None]).double()
            ties = (second[..., None, :] == first[..., :, None]).double()
            return (wins + ties / 2).mean((-1, -2))

        return {
            "told_apart": bootstrapped(torch.stack([mine, theirs], 1), higher),
            "told_apart_noise": bootstrapped(torch.stack([mine, again], 1), higher),
        }

    def capability(self) -> dict[str, Measured]:
        """Whether the teacher is more accurate, and whether it can continue the student's answers.

        Empty if the data has no answers, or the teacher only scores.
        """
        known_P = ~self.has_no_answer_P
        if known_P.sum() < 2 or "teacher" not in self.written:
            return {}
        alone = [
            self._right(self._write(who, FIRST, greedy=True)) for who in ("student", "teacher")
        ]
        columns = {"student": alone[0], "teacher": alone[1]}
        for share in SHARES:
            prefixes = [ids[: len(ids) * share // 100] for ids in self.written["rollouts"].ids]
            for who in ("student", "teacher"):
                columns[f"{who}_{share}"] = self._right(
                    self._write(who, FIRST, prefixes, greedy=True)
                )
        names = list(columns)
        table_Pc = torch.stack([columns[name][known_P] for name in names], 1)

        def of(*wanted: str, how: Callable[..., Tensor]) -> Measured:
            places = [names.index(name) for name in wanted]
            return shares(table_Pc[:, places], lambda x: how(*x.mean(-2).unbind(-1)))

        found = {f"{name}_accuracy": of(name, how=lambda a: a) for name in ("student", "teacher")}
        found["teacher_lead"] = of("teacher", "student", how=lambda t, s: t - s)
        for share in SHARES:
            both = (f"teacher_{share}", f"student_{share}")
            found[f"continuation_{share}"] = of(*both, how=lambda t, s: t - s)
            # NaN if the teacher is never right.
            found[f"kept_{share}"] = of(both[0], "teacher", how=lambda t, whole: t / whole)
        return found

    def along(self, prefixes: Sequence[int]) -> dict[str, Measured]:
        """How much more often the teacher's continuation is right, after these numbers of tokens.

        Over the prompts whose own answers are longer; omitted if there are fewer than two.
        """
        found: dict[str, Measured] = {}
        for count in prefixes if "teacher" in self.written else ():
            begun = [ids[:count] for ids in self.written["rollouts"].ids]
            goes_on_P = torch.tensor([len(ids) > count for ids in self.written["rollouts"].ids])
            known_P = ~self.has_no_answer_P & goes_on_P
            if known_P.sum() < 2:
                continue
            right = [
                self._right(self._write(who, FIRST, begun, greedy=True))[known_P]
                for who in ("teacher", "student")
            ]
            found[f"continuation_at_{count}"] = shares(
                torch.stack(right, 1), lambda x: x.mean(-2)[..., 0] - x.mean(-2)[..., 1]
            )
            found[f"teacher_at_{count}"] = shares(right[0][:, None], lambda x: x.mean(-2)[..., 0])
        return found


def _pilot(spec: TrainSpec, steps: int, stop: StopFlag) -> dict[str, Measured]:
    """How held-out accuracy changes over a short run that is thrown away."""
    monitor = replace(spec.monitor, accuracy_steps=steps, do_eval=False, score_steps=0)
    training = replace(spec.training, max_steps=steps, save_steps=steps)
    short = replace(spec, monitor=monitor, training=training)
    with tempfile.TemporaryDirectory() as home:
        run = Run(short, RunDir(Path(home) / "pilot"), stop)
        before_P = run.monitor.right()
        run.train()
        table_Pc = torch.stack([before_P, run.monitor.right()], 1)
    return {"pilot_gain": shares(table_Pc, lambda x: x.mean(-2)[..., 1] - x.mean(-2)[..., 0])}


# ---------------------------------------------------------------------- intervals


def bootstrapped(
    columns_Pc: Tensor, statistic: Callable[[Tensor], Tensor], unseen_Uc: Tensor | None = None
) -> Measured:
    """A statistic of prompts with its 95 % percentile interval over resampled prompts.

    `statistic` takes [..., P, c] and gives [...]. NaN where it is not defined. `unseen_Uc` are
    outcomes that count once in the interval although they were not observed.
    """
    value = float(statistic(columns_Pc))
    seen = len(columns_Pc)
    if unseen_Uc is not None:
        columns_Pc = torch.cat([columns_Pc, unseen_Uc])
    P = len(columns_Pc)
    picks_RP = torch.randint(P, (RESAMPLES, P), generator=torch.Generator().manual_seed(SEED))
    resampled_R = torch.cat([statistic(columns_Pc[part]) for part in picks_RP.split(100)])
    ends = resampled_R.nanquantile(torch.tensor([0.025, 0.975], dtype=resampled_R.dtype))
    low, high = ends.tolist()
    return Measured(value, low, high, seen)


def shares(columns_Pc: Tensor, statistic: Callable[[Tensor], Tensor]) -> Measured:
    """The same for columns of 0 and 1, with an interval that is not empty if all rows are equal.

    For no right answer in 64, resampling alone would give [0, 0]. Every combination counts once
    more in the interval, in the spirit of Agresti and Coull (1998), and of Agresti and Min (2005)
    for pairs.
    """
    every = product((0.0, 1.0), repeat=columns_Pc.shape[1])
    return bootstrapped(columns_Pc, statistic, torch.tensor([*every], dtype=columns_Pc.dtype))


def _per_token(values_N: Tensor, rows_N: Tensor, prompts: int) -> Measured:
    """The mean over positions; the interval is over prompts, whose positions are correlated."""
    counts_N = ~values_N.isnan()
    sums_Pc = torch.zeros(prompts, 2, dtype=torch.float64)
    both_Nc = torch.stack([values_N.nan_to_num(nan=0.0), counts_N.double()], 1)
    sums_Pc.index_add_(0, rows_N, both_Nc)

    def mean(columns_Pc: Tensor) -> Tensor:
        total, count = columns_Pc.sum(-2).unbind(-1)
        return total / count

    return bootstrapped(sums_Pc, mean)
