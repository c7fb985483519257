"""Test the training loop: what a step differentiates, how it is shared, and its first numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from stillhouse.distill.loop import check_first_step, learning_rate, needed_shares
from stillhouse.distill.run import Run
from stillhouse.errors import ConfigError
from stillhouse.rundir import Runs
from stillhouse.stop import StopFlag
from tests.builders.cheap import cheap, teacher_of


def make(runs, *words):
    spec = cheap(runs, *words)
    return Run(spec, Runs(runs).of(spec), StopFlag())


def shares(run):
    return [share for batch in run.loop.batches for share in batch.shares]


def flat_gradient(run):
    return torch.cat([p.grad.flatten() for p in run.loop.parameters])


def test_the_logged_numbers_are_those_of_a_dense_computation_on_shifted_targets(tmp_path):
    run = make(tmp_path, "lmbda=0", "beta=0.3", "quant=none")
    metrics = run.loop.gradients(0)
    gradient = flat_gradient(run)
    run.loop.optimizer.zero_grad()
    rows = [run.prompts.train[row] for row in run.loop.sequences.choice.rows(0)]
    losses, nlls = [], []
    for row in rows:  # one row at a time: no padding, no mask, no chunk
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        first = len(row.prompt_ids)
        student_TV = run.student(ids).logits[0, first - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            teacher_TV = teacher_of(run)(ids).logits[0, first - 1 : -1].log_softmax(-1)
        p, q = student_TV.exp(), teacher_TV.exp()
        log_m = (0.3 * q + 0.7 * p).log()
        losses.append((0.3 * q * (teacher_TV - log_m) + 0.7 * p * (student_TV - log_m)).sum(-1))
        nlls.append(cross_entropy(student_TV, ids[0, first:], reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["train/nll"] == pytest.approx(torch.cat(nlls).mean().item(), rel=1e-5)
    assert metrics["tokens/completion"] == sum(len(r.completion_ids) for r in rows)
    torch.testing.assert_close(flat_gradient(run), gradient, rtol=1e-4, atol=1e-8)


def test_weights_by_position_weigh_what_is_differentiated_and_logged(tmp_path):
    words = ["lmbda=1", "beta=0.3", "max_new_tokens=8", "position_weights=[[0,1],[0.5,0]]"]
    run = make(tmp_path, *words)
    metrics = run.loop.gradients(0)
    gradient = flat_gradient(run)
    run.loop.optimizer.zero_grad()
    [share] = shares(run)
    total, tokens = torch.zeros(()), 0
    for example, ids in zip(share.examples, share.written.ids, strict=True):
        sequence = torch.tensor([[*example.prompt_ids, *ids]])
        first = len(example.prompt_ids)
        student_TV = run.student(sequence).logits[0, first - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            teacher_TV = teacher_of(run)(sequence).logits[0, first - 1 : -1].log_softmax(-1)
        p, q = student_TV.exp(), teacher_TV.exp()
        log_m = (0.3 * q + 0.7 * p).log()
        losses_T = (0.3 * q * (teacher_TV - log_m) + 0.7 * p * (student_TV - log_m)).sum(-1)
        # 1 at the first token, 0 from the fifth of at most eight on.
        total = (
            total + (losses_T * torch.tensor([1, 0.75, 0.5, 0.25, 0, 0, 0, 0])[: len(ids)]).sum()
        )
        tokens += len(ids)
    (total / tokens).backward()
    assert metrics["train/loss"] == pytest.approx(total.item() / tokens, rel=1e-4)
    torch.testing.assert_close(flat_gradient(run), gradient, rtol=1e-4, atol=1e-8)


def test_a_horizon_ends_rollouts_early_and_no_other_sequences(tmp_path):
    growing = ["horizon=[[0,0.5],[0.5,0.5],[0.5,1]]", "max_new_tokens=8", "min_new_tokens=8"]
    run = make(tmp_path, "lmbda=1", "max_steps=4", *growing)
    lengths = []
    for step in range(4):
        run.loop.gradients(step)
        lengths.append({len(ids) for share in shares(run) for ids in share.written.ids})
    assert lengths == [{4}, {4}, {8}, {8}]
    other = make(tmp_path, "lmbda=0", "off_policy_source=teacher", *growing)
    other.loop.gradients(0)
    assert {len(ids) for share in shares(other) for ids in share.written.ids} == {8}


@pytest.mark.parametrize("words", [["micro_batch=1"], ["micro_batch=2"], ["loss_chunk=3"]])
def test_splitting_a_step_further_does_not_change_its_gradient(tmp_path, words):
    whole, split = make(tmp_path, "lmbda=1"), make(tmp_path, "lmbda=1", *words)
    assert whole.dir == split.dir, "how a sum is split is not part of a point"
    one, many = whole.loop.gradients(0), split.loop.gradients(0)
    assert many["train/loss"] == pytest.approx(one["train/loss"], rel=1e-6)
    torch.testing.assert_close(flat_gradient(split), flat_gradient(whole), rtol=1e-4, atol=1e-8)


def test_accumulation_normalises_by_all_completion_tokens_of_the_step(tmp_path):
    whole = make(tmp_path, "lmbda=0")
    parts = make(
        tmp_path, "lmbda=0", "per_device_train_batch_size=1", "gradient_accumulation_steps=4"
    )
    assert (
        whole.loop.gradients(0)["tokens/completion"] == parts.loop.gradients(0)["tokens/completion"]
    )
    torch.testing.assert_close(flat_gradient(parts), flat_gradient(whole), rtol=1e-4, atol=1e-8)


def test_a_share_of_two_processes_and_a_double_batch_are_the_same_step(tmp_path):
    one = make(tmp_path, "lmbda=1")
    two = make(tmp_path, "lmbda=1", "per_device_train_batch_size=2", "num_processes=2")
    one.loop.gradients(3)
    two.loop.gradients(3)
    assert [c for s in shares(two) for c in s.written.ids] == shares(one)[0].written.ids
    torch.testing.assert_close(flat_gradient(two), flat_gradient(one), rtol=1e-5, atol=1e-7)


def test_rollouts_are_what_a_token_by_token_replay_of_the_trained_function_gives(tmp_path):
    run = make(tmp_path, "lmbda=1", "quant=int4", "learning_rate=0.05")
    for step in range(2):  # move the adapter away from its start, where it is the base
        run.loop.gradients(step)
        run.loop.update(step)
    run.loop.gradients(2)
    (share,) = shares(run)
    from stillhouse.distill.rollouts import uniforms

    draws = uniforms(run.spec.training.seed, "student", 2, range(4), 6)
    for row, (example, written) in enumerate(zip(share.examples, share.written.ids, strict=True)):
        ids = torch.tensor([[*example.prompt_ids, *written]])
        first = len(example.prompt_ids)
        with torch.no_grad():
            logits_TV = run.student.eval()(ids).logits[0, first - 1 : -1]
        cdf_TV = torch.softmax(logits_TV.double(), -1).cumsum(-1)
        picked = torch.searchsorted(cdf_TV, draws[row, : len(written), None], right=True)
        assert picked.flatten().tolist() == written


def test_lambda_one_never_reads_a_completion_and_lambda_zero_never_generates(tmp_path):
    def forbidden(*_, **__):
        raise AssertionError("this writer must not be asked")

    on, off = make(tmp_path, "lmbda=1"), make(tmp_path, "lmbda=0")
    on.loop.sequences.writers["dataset"] = forbidden
    off.loop.sequences.writers["student"] = forbidden
    for step in range(5):
        assert on.loop.gradients(step)["train/phase"] == 1.0
        assert off.loop.gradients(step)["train/phase"] == 0.0


def test_the_coin_is_the_schedules_and_the_same_in_every_attempt(tmp_path):
    run = make(tmp_path, "lmbda=0.5", "max_steps=400")
    tossed = [run.loop.sequences.happens("coin", step, 0.5) for step in range(400)]
    assert tossed == [run.loop.sequences.happens("coin", step, 0.5) for step in range(400)]
    assert 160 < sum(tossed) < 240  # 4 standard deviations
    hybrid = make(tmp_path, "method=hybrid", "max_steps=4")
    assert [hybrid.loop.gradients(step)["train/phase"] for step in range(4)] == [0, 0, 1, 1]


def test_a_teacher_that_is_the_student_gives_a_loss_of_zero(tmp_path):
    made = make(tmp_path)
    weights = made.prepared.student
    run = make(tmp_path, "pair=tiny", "pair_source=hub", f"student={weights}", f"teacher={weights}",
               "quant=none", "lmbda=1", "pair_name=self")  # fmt: skip
    assert teacher_of(run) is run.student, "one model, with its adapter switched off as the teacher"
    metrics = run.loop.gradients(0)
    assert abs(metrics["train/loss"]) < 1e-6
    check_first_step(run.spec, metrics, run.roles.is_same_function)
    run.loop.update(0)
    for parameter in run.loop.parameters:  # Adam moves even on a gradient of 1e-12: push it apart
        parameter.data.add_(0.05)
    assert run.loop.gradients(1)["train/loss"] > 1e-3, "the teacher stays where the student left"
    with pytest.raises(ConfigError, match="not fed the same text"):
        check_first_step(
            run.spec, {"train/nll": 1.0, "train/loss": 0.2, "train/reverse_kl": 0.2}, True
        )


def test_a_context_teacher_reads_exemplars_that_the_student_does_not(tmp_path):
    made = make(tmp_path)
    weights = made.prepared.teacher
    run = make(tmp_path, "pair_source=hub", f"student={weights}", f"teacher={weights}",
               "quant=none", "teacher_few_shot=2", "lmbda=1", "pair_name=fewshot")  # fmt: skip
    example = run.prompts.train[0]
    assert example.teacher_prompt_ids[-len(example.prompt_ids) :] == example.prompt_ids
    assert len(example.teacher_prompt_ids) > 2 * len(example.prompt_ids)
    assert not run.roles.is_same_function
    assert run.loop.gradients(0)["train/loss"] > 1e-4


def test_a_step_zero_that_says_misaligned_stops_the_run(tmp_path):
    run = make(tmp_path, "sanity_max_nll=0.5")
    with pytest.raises(ConfigError, match=r"train/nll is .* above sanity_max_nll 0.5"):
        check_first_step(run.spec, run.loop.gradients(0), run.roles.is_same_function)


def test_swapped_targets_are_seen_at_step_zero(tmp_path):
    """A published trainer fed its targets unshifted; a trained model then sees about ln V nats."""
    run = make(tmp_path, "lmbda=0")
    good = run.loop.gradients(0)["train/nll"]
    row = run.prompts.train[run.loop.sequences.choice.rows(0)[0]]
    ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
    with torch.no_grad():
        logits_TV = teacher_of(run)(ids).logits[0]
    shifted = cross_entropy(logits_TV[:-1], ids[0, 1:])
    unshifted = cross_entropy(logits_TV, ids[0])
    assert unshifted > shifted
    assert good < math.log(len(run.tokenizer))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(tmp_path, kind, expected):
    spec = cheap(tmp_path, "max_steps=10", "warmup_ratio=0.2", "learning_rate=1",
                 f"lr_scheduler_type={kind}")  # fmt: skip
    assert [learning_rate(spec, step) for step in range(10)] == pytest.approx(expected)


def test_processes_that_cannot_share_evenly_are_refused(tmp_path):
    spec = cheap(tmp_path, "num_processes=8")
    needed_shares(spec, 1)
    needed_shares(spec, 4)
    with pytest.raises(ConfigError, match="num_processes is 8 and 3 processes"):
        needed_shares(spec, 3)


@pytest.mark.parametrize("quant", ["none", "int4", "bnb_fp4", "bnb_nf4"])
def test_every_quantiser_trains_and_its_base_stays_as_it_was(tmp_path, quant):
    run = make(tmp_path, f"quant={quant}", "lmbda=1")
    before = {n: b.clone() for n, b in run.student.named_parameters() if not b.requires_grad}
    for step in range(2):
        run.loop.gradients(step)
        assert run.loop.update(step)["train/grad_norm"] > 0
    after = dict(run.student.named_parameters())
    assert before and all(torch.equal(b, after[n]) for n, b in before.items())
