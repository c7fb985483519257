"""Test the overlap measures against worked examples and Python sets."""

from __future__ import annotations

import math
from math import log
from pathlib import Path

import pytest
import torch
from dense import F64, some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.distill.diagnostics import Bins, Overlap, Summary
from stillhouse.distill.head import Head
from stillhouse.distill.loop import Loop
from stillhouse.distill.losses import distill_loss
from stillhouse.distill.objectives import Jsd, evaluate_
from stillhouse.distill.run import Run
from stillhouse.errors import ContractError
from stillhouse.rundir import Runs
from stillhouse.spec import TrainSpec
from stillhouse.stop import StopFlag
from tests.builders.cheap import cheap, teacher_of

ANYWHERE: Bins = [(0, None)]


def overlap_of(p_nV: Tensor, q_nV: Tensor, k: int, temperature: float = 1.0) -> Overlap:
    """What the loss chunk finds; logits that are off by a constant are the same distribution."""
    targets = torch.zeros(len(p_nV), dtype=torch.long)
    logits = p_nV + 3
    _, found = evaluate_(Jsd(0.5), logits, q_nV - 5, targets, temperature, False, overlap_k=k)
    assert found is not None
    return found


def by_sets(logits: Tensor, teacher: Tensor, k: int) -> dict[str, float]:
    """One position, by the definitions of the paper, in float64."""
    log_p, log_q = (x.double().log_softmax(0) for x in (logits, teacher))
    of_student, of_teacher = (set(x.topk(k).indices.tolist()) for x in (log_p, log_q))
    shared = of_student & of_teacher
    p, q = (x.exp().tolist() for x in (log_p, log_q))
    of_p, of_q = sum(p[v] for v in shared), sum(q[v] for v in shared)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    def reward(tokens: set[int], over_p: float = 1.0, over_q: float = 1.0) -> float:
        return mean([p[v] / over_p * log((q[v] / over_q) / (p[v] / over_p)) for v in tokens])

    entropy_p, entropy_q = (-sum(x * log(x) for x in side) for side in (p, q))
    return {
        "ratio": len(shared) / k,
        "advantage": reward(shared, of_p, of_q),
        "entropy_gap": abs(entropy_q - entropy_p),
        "mass_student": of_p,
        "mass_teacher": of_q,
        "advantage_shared": reward(shared),
        "advantage_student_only": reward(of_student - of_teacher),
        "advantage_teacher_only": reward(of_teacher - of_student),
        "student_entropy": entropy_p,
        "teacher_entropy": entropy_q,
    }


def test_four_tokens_by_hand() -> None:
    p, q = torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    found = overlap_of(p.log(), q.log(), k=3)
    # S^p = {0, 1, 2}, S^q = {1, 2, 3}. On {1, 2} p' = (0.6, 0.4) and q' = (2/3, 1/3).
    by_hand = {
        "ratio": 2 / 3,
        "advantage": (0.6 * log(10 / 9) + 0.4 * log(5 / 6)) / 2,
        "mass_student": 0.5,
        "mass_teacher": 0.6,
        "advantage_shared": (0.3 * log(4 / 3) + 0.2 * log(1)) / 2,
        "advantage_student_only": 0.4 * log(1 / 4),
        "advantage_teacher_only": 0.1 * log(3),
        "student_entropy": -(0.4 * log(0.4) + 0.3 * log(0.3) + 0.2 * log(0.2) + 0.1 * log(0.1)),
    }
    got = {name: getattr(found, name).item() for name in by_hand}
    assert got == pytest.approx(by_hand, abs=1e-6)
    assert found.entropy_gap.item() == pytest.approx(0, abs=1e-6)  # q is p in another order


def test_where_the_models_agree_everything_overlaps_and_nothing_is_gained() -> None:
    logits = some(6, 4, 20)[2]
    found = overlap_of(logits, logits, k=5)
    assert found.ratio.tolist() == [1.0] * 6
    assert found.advantage.abs().max() < 1e-9
    assert found.entropy_gap.abs().max() < 1e-9
    torch.testing.assert_close(found.mass_student, found.mass_teacher, rtol=1e-12, atol=0)
    assert found.advantage_student_only.isnan().all()


def test_without_a_shared_token_there_is_no_advantage_on_shared_tokens_and_no_mass() -> None:
    p = torch.tensor([[0.5, 0.4, 0.06, 0.04]], dtype=F64)
    found = overlap_of(p.log(), p.flip(1).log(), k=2)
    assert found.ratio.item() == found.mass_student.item() == found.mass_teacher.item() == 0
    assert found.advantage.isnan().all() and found.advantage_shared.isnan().all()
    assert found.advantage_student_only.item() < 0 < found.advantage_teacher_only.item()


@given(st.integers(1, 12), st.integers(0, 10_000), st.floats(0.5, 2), st.sampled_from([1.0, 4.0]))
@settings(deadline=None)
def test_every_number_equals_its_definition(
    k: int, seed: int, temperature: float, spread: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, teacher = (spread * torch.randn(5, 12, generator=g) for _ in range(2))
    found = overlap_of(logits.clone(), teacher, k, temperature)
    for row in range(5):
        exact = by_sets(logits[row] / temperature, teacher[row] / temperature, k)
        got = {name: getattr(found, name)[row].item() for name in exact}
        assert got == pytest.approx(exact, rel=1e-5, abs=1e-5, nan_ok=True)


def test_among_thousands_of_tokens_the_right_sixteen_are_compared() -> None:
    g = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(4, 4096, generator=g)
    teacher = logits + torch.randn(4, 4096, generator=g)
    found = overlap_of(logits.clone(), teacher, k=16)
    for row in range(4):
        exact = by_sets(logits[row], teacher[row], 16)
        got = {name: getattr(found, name)[row].item() for name in exact}
        assert 0 < exact["ratio"] < 1
        assert got == pytest.approx(exact, rel=1e-5, abs=1e-5)


def summarised(summary: Summary, chunk: int, places: list[int]) -> dict[str, float]:
    hidden, head, teacher, targets = some(len(places), 6, 30)
    loss, _ = distill_loss(
        hidden.requires_grad_(), Head(head), lambda rows: teacher[rows], targets,
        objective=Jsd(0.5), chunk=chunk, summary=summary, places_N=torch.tensor(places),
    )  # fmt: skip
    plain, _ = distill_loss(
        hidden, Head(head), lambda rows: teacher[rows], targets, objective=Jsd(0.5), chunk=chunk
    )
    assert torch.equal(loss, plain)  # to look is not to change
    return summary.metrics(summary.numbers())


def test_a_summary_has_the_mean_of_all_positions_and_of_each_bin() -> None:
    places = [0, 1, 2, 3, 4, 0, 1, 2]
    found = summarised(Summary(4, [(0, 2), (2, 4), (4, None)]), 3, places)
    hidden, head, teacher, _ = some(8, 6, 30)
    each = overlap_of(hidden @ head.T, teacher, k=4)
    assert found["overlap/ratio"] == pytest.approx(each.ratio.mean().item())
    for name, rows in {"0-1": [0, 1, 5, 6], "2-3": [2, 3, 7], "4-": [4]}.items():
        assert found[f"overlap/mass_teacher/{name}"] == pytest.approx(
            each.mass_teacher[rows].mean().item()
        )
    assert found["overlap/positions"] == 8


def test_a_bin_where_no_rollout_gets_has_no_number() -> None:
    found = summarised(Summary(4, [(0, 50), (50, None)]), 8, [0, 1, 2])
    assert "overlap/ratio/0-49" in found and "overlap/ratio/50-" not in found


def test_positions_without_a_shared_token_are_left_out_of_the_mean_and_counted() -> None:
    p = torch.tensor([[0.5, 0.4, 0.06, 0.04], [0.4, 0.3, 0.2, 0.1]], dtype=F64)
    q = torch.stack([p[0].flip(0), torch.tensor([0.3, 0.4, 0.1, 0.2], dtype=F64)])
    summary, found = Summary(2, ANYWHERE), overlap_of(p.log(), q.log(), k=2)
    summary.add(found, torch.tensor([0, 1]))
    metrics = summary.metrics(summary.numbers())
    assert metrics["overlap/empty"] == 1 and metrics["overlap/positions"] == 2
    assert metrics["overlap/ratio"] == 0.5
    assert metrics["overlap/advantage"] == pytest.approx(found.advantage[1].item())


def test_processes_add_up_to_the_mean_of_all_their_positions() -> None:
    hidden, head, teacher, _ = some(9, 6, 30)
    each = overlap_of(hidden @ head.T, teacher, k=4)
    numbers = []
    for rows in (slice(0, 2), slice(2, 9)):
        summary = Summary(4, ANYWHERE)
        summary.add(Overlap(*(x[rows] for x in each)), torch.zeros(9, dtype=torch.long)[rows])
        numbers.append(summary.numbers())
    both = [sum(pair) for pair in zip(*numbers, strict=True)]
    metrics = Summary(4, ANYWHERE).metrics(both)
    assert metrics["overlap/student_entropy"] == pytest.approx(each.student_entropy.mean().item())


def test_more_tokens_than_the_shared_vocabulary_has_are_refused() -> None:
    hidden, head, teacher, targets = some(3, 4, 12)
    with pytest.raises(ContractError, match="the top 11 tokens of 10 .* lower overlap_k"):
        distill_loss(
            hidden, Head(head), lambda rows: teacher[rows, :10], targets.clamp(max=9),
            objective=Jsd(0.5), summary=Summary(11, ANYWHERE), places_N=targets,
        )  # fmt: skip


def loop_of(spec: TrainSpec) -> Loop:
    return Run(spec, Runs(Path(spec.place.runs)).of(spec), StopFlag()).loop


def test_a_run_logs_what_a_dense_computation_finds_on_its_rollouts(tmp_path: Path) -> None:
    bins = "overlap_bins=[[0,2],[2,null]]"
    run_spec = cheap(tmp_path, "lmbda=1", bins, "overlap_k=5", "micro_batch=2")
    run = Run(run_spec, Runs(tmp_path).of(run_spec), StopFlag())
    loop = run.loop
    metrics = loop.gradients(0)
    (batch,) = loop.batches
    (share,) = batch.shares
    found: dict[str, list[float]] = {}
    for example, ids in zip(share.examples, share.written.ids, strict=True):
        sides = [
            model(torch.tensor([[*example.prompt_ids, *ids]])).logits[0, -len(ids) - 1 : -1]
            for model in (run.student, teacher_of(run))
        ]
        for place, (z, t) in enumerate(zip(*sides, strict=True)):
            for name, value in by_sets(z, t, 5).items():
                where = "0-1" if place < 2 else "2-"
                for key in (f"overlap/{name}", f"overlap/{name}/{where}"):
                    found.setdefault(key, []).append(value)
    assert metrics["overlap/positions"] == len(found["overlap/ratio"])
    for key, values in found.items():
        there = [value for value in values if not math.isnan(value)]
        assert metrics[key] == pytest.approx(sum(there) / len(there), rel=1e-5, abs=1e-5)


def test_every_nth_step_and_the_last_are_looked_at(tmp_path: Path) -> None:
    loop = loop_of(cheap(tmp_path, "lmbda=1", "overlap_steps=2", "max_steps=4"))
    assert ["overlap/ratio" in loop.gradients(step) for step in range(4)] == [1, 0, 1, 1]


def test_sequences_that_the_student_did_not_write_are_not_looked_at(tmp_path: Path) -> None:
    loop = loop_of(cheap(tmp_path, "lmbda=0", "overlap_steps=1"))
    assert not [name for name in loop.gradients(0) if name.startswith("overlap/")]
