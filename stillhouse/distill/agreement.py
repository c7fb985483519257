"""Compare student and teacher position by position, outside of training.

The sequences are given, and the numbers come from the same code as the loss (`objectives`). Used by
the preflight, and to rank prompts by how far the two models agree on them.
Legend: N positions, n positions of a chunk, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stillhouse.distill.cache import remembered
from stillhouse.distill.encoded import Example
from stillhouse.distill.head import head_of
from stillhouse.distill.loaded import Loaded
from stillhouse.distill.loop import positions_of
from stillhouse.distill.objectives import Jsd, evaluate_
from stillhouse.identity import to_plain
from stillhouse.rundir import Json
from stillhouse.spec import TrainSpec

BATCH = 32  # sequences at a time
RANKED = 10**9 + 11  # the step number that seeds a ranking's rollouts: beyond any run's steps


@torch.no_grad()
def compared(
    spec: TrainSpec,
    loaded: Loaded,
    prompts: Sequence[Example],
    written: Sequence[Sequence[int]],
    k: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Numbers per position [N] of the completion of each prompt, and each position's prompt index.

    `written`: the ids of the prompts' completions. The numbers are those of
    `TokenStats` and `Overlap`, and log q - log p of the written token.
    """
    roles, device = loaded.roles, loaded.accelerator.device
    score, head = roles.teacher_scorer(), head_of(roles.student)
    temperature, size = spec.loss.loss_temperature, spec.loss.loss_chunk
    found: list[dict[str, Tensor]] = []
    rows: list[int] = []
    roles.student.eval()
    for first in range(0, len(prompts), BATCH):
        examples, ids = prompts[first : first + BATCH], written[first : first + BATCH]
        none = [0] * len(ids)
        logits = score(examples, ids, none)
        with loaded.accelerator.autocast():
            prompt_ids = [e.prompt_ids for e in examples]
            longest = max(map(len, prompt_ids))
            hidden_NH, target_N = positions_of(
                roles.student, prompt_ids, ids, none, longest, roles.pad_id, device
            )
        rows += [first + row for row, c in enumerate(ids) for _ in c]
        for start in range(0, len(target_N), size):
            chunk = slice(start, start + size)
            student_nV = head.logits(hidden_NH[chunk].to(head.weight_VH.dtype)).float()
            teacher_nV = logits(chunk)
            V = min(student_nV.shape[1], teacher_nV.shape[1])
            student_nV, teacher_nV, target_n = student_nV[:, :V], teacher_nV[:, :V], target_N[chunk]
            # evaluate_ overwrites the logits, so these are read first.
            of_student = _log_prob(student_nV, target_n, temperature)
            of_teacher = _log_prob(teacher_nV, target_n, temperature)
            stats, overlap = evaluate_(
                Jsd(0.5), student_nV, teacher_nV, target_n, temperature, False, min(k, V)
            )
            assert overlap is not None
            numbers = {**stats._asdict(), **overlap._asdict()}
            found.append(numbers | {"log_ratio": of_teacher - of_student})
    joined = {name: torch.cat([part[name] for part in found]).double().cpu() for name in found[0]}
    return joined, torch.tensor(rows)


def row_means(values_N: Tensor, rows_N: Tensor, rows: int) -> Tensor:
    """The mean over each row's positions, [rows]."""
    sums = torch.zeros(rows, dtype=torch.float64).index_add_(0, rows_N, values_N)
    return sums / torch.bincount(rows_N, minlength=rows)


def ranking(spec: TrainSpec, loaded: Loaded) -> list[int]:
    """The rows to train on, those first on which student and teacher agree most before training.

    Agreement is the teacher's mass on the top tokens of both (arXiv:2604.13016, Eq. 10: what
    aligned prompts raise in §5.2), or the smallest reverse KL. One rollout per row is written and
    compared, once for a pair and a seed; later runs reuse the order.
    """
    plain, prompts = to_plain(spec), loaded.prompts.train
    sections = {name: plain[name] for name in ("pair", "quant", "data", "rollout")}
    how = [spec.rescue.kept_by, spec.monitor.overlap_k, spec.loss.loss_temperature]
    content = ["ranking", sections, how, spec.training.seed, loaded.prompts.key]

    def rank() -> Json:
        ids = loaded.roles.writers()["student"](prompts, RANKED, range(len(prompts))).ids
        numbers, rows_N = compared(spec, loaded, prompts, ids, spec.monitor.overlap_k)
        is_mass = spec.rescue.kept_by == "mass"
        values_N = numbers["mass_teacher"] if is_mass else -numbers["reverse_kl"]
        means_P = row_means(values_N, rows_N, len(prompts))
        return {"rows": means_P.argsort(descending=True, stable=True).tolist()}

    return remembered(Path(spec.place.cache_dir), content, rank, rows=list)["rows"]


def _log_prob(logits_nV: Tensor, target_n: Tensor, temperature: float) -> Tensor:
    scaled_nV = logits_nV.float() / temperature
    return scaled_nV.gather(1, target_n[:, None]).squeeze(1) - scaled_nV.logsumexp(1)
