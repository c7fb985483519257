"""Define what a run asks of its teacher, and answer it with a model in this process.

A teacher gives hidden states; the student's process turns them into logits with the teacher's head,
which is all of the teacher that it holds if the model is elsewhere. Hidden states are exact for
every loss and take 2 to 4 bytes per unit of width, where logits take as much per vocabulary entry.

Its manifest says which teacher it is: digests of its files, its dtype, the libraries, and the
log-probabilities that it gives to fixed tokens. The first use records it, every later use compares.
Legend: N trained tokens of a batch, H hidden width, V vocabulary, P probed tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse import fingerprints, local_models
from stillhouse.distill.adapters import versions
from stillhouse.distill.engine import Engine
from stillhouse.distill.head import Head, head_of
from stillhouse.distill.loop import positions_of
from stillhouse.distill.rollouts import Completions, uniforms, write
from stillhouse.errors import ContractError
from stillhouse.rundir import Json
from stillhouse.sources import SETTINGS, TOKENIZER
from stillhouse.spec import GAPS, PairSpec, RolloutSpec

PROBED = 16  # fixed tokens, whose log-probabilities are part of a manifest
Ids = Sequence[Sequence[int]]  # token ids, row by row


@dataclass(frozen=True)
class Draws:
    """The names of the random numbers of some rows: the same names give the same numbers
    everywhere (`rollouts.uniforms`)."""

    seed: int
    purpose: str
    step: int
    rows: Sequence[int]


@runtime_checkable
class Teacher(Protocol):
    """A teacher, wherever its model is."""

    def head(self) -> Head:
        """Its map from hidden states to logits."""
        ...

    def hidden(
        self, prompts: Ids, completions: Ids, forced: Sequence[int], *, alone: bool
    ) -> Float[Tensor, "N H"]:
        """The states that predict each trained token (see `positions_of`), in the head's dtype.

        `alone`: each row by itself, unpadded, so that no other row affects its last digits.
        """
        ...

    def write(
        self,
        prompts: Ids,
        draws: Draws,
        rollout: RolloutSpec,
        *,
        prefixes: Ids | None = None,
        greedy: bool = False,
    ) -> Completions:
        """Its completions of these prompts (see `rollouts.write`)."""
        ...


class ModelTeacher:
    """A teacher whose model is in this process."""

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        frozen: Callable[[], contextlib.AbstractContextManager[Any]],
        pad_id: int,
        eos_ids: Sequence[int],
        poll: Callable[[], None],
    ) -> None:
        """`frozen`: a context in which the model is the teacher, such as with its adapter
        disabled."""
        self.model, self.engine, self.frozen = model, engine, frozen
        self.pad_id, self.eos_ids, self.poll = pad_id, eos_ids, poll

    def head(self) -> Head:
        return head_of(self.model)

    @torch.no_grad()
    def hidden(
        self, prompts: Ids, completions: Ids, forced: Sequence[int], *, alone: bool
    ) -> Float[Tensor, "N H"]:
        size = 1 if alone else len(prompts)
        parts = [slice(first, first + size) for first in range(0, len(prompts), size)]
        device = self.head().weight_VH.device
        with self.frozen():
            found = [
                positions_of(
                    self.model, prompts[part], completions[part], forced[part],
                    max(map(len, prompts[part])), self.pad_id, device,
                )[0]
                for part in parts
            ]  # fmt: skip
        hidden_NH = found[0] if len(found) == 1 else torch.cat(found)
        return hidden_NH.to(self.head().weight_VH.dtype)

    def write(
        self,
        prompts: Ids,
        draws: Draws,
        rollout: RolloutSpec,
        *,
        prefixes: Ids | None = None,
        greedy: bool = False,
    ) -> Completions:
        draws_BT = uniforms(
            draws.seed, draws.purpose, draws.step, draws.rows, rollout.max_new_tokens
        )
        with self.frozen():
            return write(
                self.engine, prompts, draws_BT, rollout, pad_id=self.pad_id, eos_ids=self.eos_ids,
                poll=self.poll, prefixes=prefixes, greedy=greedy, most_rows=rollout.rollout_rows,
            )  # fmt: skip


# ------------------------------------------------------------------ which teacher it is


def described(pair: PairSpec, cache_dir: Path, commits: Mapping[str, str]) -> Json | None:
    """A manifest's part that follows from the teacher's files; None if they are not here."""
    there = local_models.model(pair, "teacher", cache_dir, commits)
    if there is None:
        return None
    settings = [there.path / name for name in SETTINGS if (there.path / name).is_file()]
    tokenizer = [file for name in TOKENIZER for file in sorted(there.path.glob(name))]
    return {
        "weights": fingerprints.of_weights(there.path, cache_dir),
        "settings": fingerprints.of_settings(settings, cache_dir),
        "tokenizer": fingerprints.of_settings(tokenizer, cache_dir),
        "dtype": pair.teacher_dtype,
        "libraries": versions(),
    }


@torch.no_grad()
def probe(teacher: Teacher) -> list[float]:
    """The log-probabilities [P - 1] that a teacher gives to fixed tokens, in nats.

    Raises:
        ContractError: one is not finite, so nothing can be learned from this teacher.
    """
    head = teacher.head()
    V = len(head.weight_VH)
    # As in the probe of a head: ids from the lower half, none of which is reserved.
    ids = [place * V // (2 * PROBED + 2) for place in range(1, PROBED + 1)]
    hidden_NH = teacher.hidden([ids[:1]], [ids[1:]], [0], alone=True)
    log_prob_NV = head.logits(hidden_NH).float().log_softmax(-1)
    picked = torch.tensor(ids[1:], device=log_prob_NV.device)
    found = log_prob_NV.gather(1, picked[:, None]).squeeze(1)
    if not bool(found.isfinite().all()):
        numbers = ", ".join(f"{value:.3g}" for value in found.tolist())
        raise ContractError(
            f"the teacher gives fixed tokens log-probabilities that are not finite ({numbers}): its"
            " weights are damaged, or overflow in their dtype (teacher_dtype=float32?)"
        )
    return found.tolist()


DIFFERENT = {
    "weights": "its weights are not what they were",
    "settings": f"{' or '.join(SETTINGS)} is not what it was",
    "tokenizer": "its tokenizer or chat template is not what it was",
    "dtype": "it computes in another dtype",
}


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What makes the second teacher another one than the first, in words; None if nothing does.

    Other versions of libraries are no other teacher; what they change must stay within rounding.
    """
    for name, words in DIFFERENT.items():
        if then[name] != now[name]:
            return f"{words}: {then[name]!s:.16} then, {now[name]!s:.16} now"
    pairs = [*zip(then["probe"], now["probe"], strict=False)]
    off = sum(abs(a - b) for a, b in pairs) / max(1, len(pairs))
    if len(then["probe"]) != len(now["probe"]) or not off <= GAPS[then["dtype"]]:
        return (
            f"it gives fixed tokens other log-probabilities, by {off:.3g} nats per token (allowed:"
            f" {GAPS[then['dtype']]:g} in {then['dtype']})"
        )
    return None
