"""Test where a step's sequences come from, method by method, on the real models of a cheap pair."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from stillhouse import entrypoints
from stillhouse.compose import options_of
from stillhouse.distill.agreement import RANKED, compared, ranking, row_means
from stillhouse.distill.head import head_of
from stillhouse.distill.loaded import load
from stillhouse.distill.loop import positions_of
from stillhouse.distill.monitor import answer_in
from stillhouse.distill.replay import Entry, Replay
from stillhouse.distill.rollouts import Completions
from stillhouse.distill.run import Run
from stillhouse.errors import ConfigError, Interrupted
from stillhouse.rundir import Runs
from stillhouse.stop import StopFlag
from tests.builders.cheap import cache_with_pairs, cheap, teacher_of

# 20 seed tokens are more than these six-token rollouts hold.
SHORT = {"teacher_seeded": ["seed_tokens=[[0,4],[0.5,0]]"], "extended_on_policy": ["max_steps=6"]}


def make(runs, *words, stop=None):
    spec = cheap(runs, *words)
    return Run(spec, Runs(runs).of(spec), stop or StopFlag())


def words_of(method, *more):
    return [f"method={method}", *SHORT.get(method, []), *more]


def shares(run):
    return [share for batch in run.loop.batches for share in batch.shares]


def flat_gradient(run):
    return torch.cat([p.grad.flatten() for p in run.loop.parameters])


def steps_of(run):
    """A run's metrics without what a clock says."""
    return [{k: v for k, v in m.items() if "time/" not in k} for m in run.metrics()]


def stopped(spec, run, *polls_before):
    """Train from checkpoint to checkpoint, each time until the run has polled so often."""
    for most in polls_before:
        stop, polls = StopFlag(), []
        one, check = Run(spec, run, stop), stop.check

        def poll(polls=polls, stop=stop, check=check, most=most):
            polls.append(1)
            stop.is_set = len(polls) > most
            check()

        stop.check = poll  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            one.train()


def entry(step, writer="student"):
    written = Completions([[step, 2]], [False], [[math.log(1 / 3), -0.1 * step]], [0])
    return Entry(step, writer, [step], written)


# ------------------------------------------------------------------------------ every method, once


def assert_is_made_of_its_parts(metrics):
    """What is logged as the loss is what was differentiated: its parts, by their weights."""
    phase, parts = metrics["train/phase"], 0.0
    parts += phase * metrics.get("train/on_policy_loss", 0.0)
    parts += (1 - phase) * metrics.get("train/off_policy_loss", 0.0)
    assert math.isfinite(parts) and metrics["train/loss"] == pytest.approx(parts)


@pytest.mark.parametrize("method", [m for m in options_of("method") if m != "gkd"])
def test_three_steps_of_every_method_take_the_branches_that_its_plan_says(tmp_path, method):
    run = make(tmp_path, *words_of(method, "loss=jsd", "max_steps=3"))
    seen = []
    for step in range(3):
        metrics = run.loop.gradients(step)
        assert run.loop.update(step)["train/grad_norm"] > 0
        assert_is_made_of_its_parts(metrics)
        seen.append((metrics["train/phase"], metrics["train/seed_tokens"]))
    phases, seeds = [p for p, _ in seen], [s for _, s in seen]
    assert (
        phases
        == {
            "on_policy_gkd": [1, 1, 1],
            "extended_on_policy": [1, 1, 1],
            "hybrid": [0, 0, 1],
            "hybrid_gradual": [0, 0, 1],
            "teacher_seeded": [1, 1, 1],
            "mixture": [0.7, 0.7, 0.7],
            "replay_buffer": phases,  # by chance: a test of its own
            "kl_anchored": [0, 0, 0],
            "reverse_curriculum": [1, 1, 1],
            "off_policy": [0, 0, 0],
            "sft": [0, 0, 0],
            "cold_start": [0, 1, 1],
        }[method]
    )
    assert seeds == ([4, 1, 0] if method == "teacher_seeded" else [0, 0, 0])


@pytest.mark.parametrize("method", [m for m in options_of("method") if m != "gkd"])
def test_a_run_that_is_stopped_in_the_middle_of_a_method_ends_in_the_same_bits(tmp_path, method):
    """Stopped in each half, in the middle of a rollout where there are any."""
    words = words_of(method, "loss=ce_pg", "lora_dropout=0.1", "save_steps=100")
    spec = cheap(tmp_path / "stopped", *words)
    run = Runs(tmp_path / "stopped").of(spec)
    stopped(spec, run, 5, 13)
    assert entrypoints.train(spec) == 0
    whole = cheap(tmp_path / "whole", *words)
    assert entrypoints.train(whole) == 0
    there = Runs(tmp_path / "whole").of(whole)
    assert steps_of(run) == steps_of(there)
    for metrics in there.metrics():
        assert_is_made_of_its_parts(metrics)
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (there.adapter / name).read_bytes()


# --------------------------------------------------------------------------------------- rescue

RESCUE = ["cold_start=0.5", "cold_prompts=5", "kept_prompts=[[0,0.5],[1,1]]", "other_prompts=0.25"]


def test_a_cold_start_learns_one_answer_per_prompt_and_asks_the_teacher_once(tmp_path):
    run = make(tmp_path, "lmbda=1", "off_loss=ce", "cold_start=0.5", "cold_prompts=5")
    steps, learnt = [], {}
    for step in range(run.spec.training.max_steps):
        steps.append(run.loop.gradients(step))
        for share in shares(run) if step < 3 else ():
            for example, ids in zip(share.examples, share.written.ids, strict=True):
                assert learnt.setdefault(example.row, ids) == ids, "the same answer in every step"
    # Three cold steps of four prompts, and there are five: the third step asks nothing new.
    assert [m["tokens/teacher"] > 0 for m in steps] == [True, True, False, False, False, False]
    assert sum(m["tokens/teacher"] for m in steps) == sum(map(len, learnt.values()))
    assert [m["tokens/rollout"] > 0 for m in steps] == [False] * 3 + [True] * 3
    assert ["train/off_policy_loss" in m for m in steps] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("method", ["on_policy_gkd", "teacher_seeded"])
def test_a_rescued_run_that_is_stopped_ends_in_the_same_bits(tmp_path, method):
    words = words_of(method, *RESCUE)
    spec = cheap(tmp_path / "stopped", *words)
    run = Runs(tmp_path / "stopped").of(spec)
    stopped(spec, run, 5, 12)
    assert entrypoints.train(spec) == 0
    whole = cheap(tmp_path / "whole", *words)
    assert entrypoints.train(whole) == 0
    assert steps_of(run) == steps_of(Runs(tmp_path / "whole").of(whole))


def test_prompts_are_ranked_once_and_those_first_on_which_both_agree_most(tmp_path):
    cache = cache_with_pairs(tmp_path / "cache")
    words = ["max_rows=24", "overlap_k=4", "kept_prompts=0.5", f"cache_dir={cache}"]
    orders = {}
    for by in ("mass", "kl"):
        spec = cheap(tmp_path, *words, f"kept_by={by}")
        loaded = load(spec, StopFlag().check)
        orders[by] = ranking(spec, loaded)
        assert sorted(orders[by]) == list(range(24))
        asked = loaded.prompts.train
        means = []
        for row, example in enumerate(asked):  # one by one, as its place in the ranking's draw
            ids = loaded.roles.writers()["student"]([example], RANKED, [row]).ids
            numbers, rows_N = compared(spec, loaded, [example], ids, 4)
            name = {"mass": "mass_teacher", "kl": "reverse_kl"}[by]
            means.append(float(row_means(numbers[name], rows_N, 1)))
        agreement = [m if by == "mass" else -m for m in means]
        ordered = [agreement[row] for row in orders[by]]
        assert ordered == pytest.approx(sorted(agreement, reverse=True), abs=1e-6)
        loaded.roles.writers = dict  # whoever would write again could not
        assert ranking(spec, loaded) == orders[by]
    assert orders["mass"] != orders["kl"]


# --------------------------------------------------------------------------------------- seeding


def test_seed_tokens_are_the_teachers_own_and_the_loss_does_not_count_them(tmp_path):
    run = make(tmp_path, "method=teacher_seeded", "seed_tokens=3", "loss=ce_pg", "beta=1")
    metrics = run.loop.gradients(0)
    (share,) = shares(run)
    alone = run.loop.sequences.writers["teacher"](share.examples, 0, range(4), tokens=3)
    assert [ids[:3] for ids in share.written.ids] == alone.ids
    assert share.written.forced == [3] * 4, "none of these teachers ends within three tokens"
    own = sum(map(len, share.written.ids)) - 12
    assert metrics["tokens/completion"] == own == metrics["tokens/rollout"]
    assert metrics["tokens/teacher"] == 12
    # By hand: one row at a time, only behind the prefix.
    losses = []
    for example, ids, drawn in zip(
        share.examples, share.written.ids, share.written.log_probs, strict=True
    ):
        full = torch.tensor([[*example.prompt_ids, *ids]])
        first = len(example.prompt_ids) + 3
        run.student.eval()
        with torch.no_grad():
            p_TV = run.student(full).logits[0, first - 1 : -1].log_softmax(-1)
            q_TV = teacher_of(run)(full).logits[0, first - 1 : -1].log_softmax(-1)
        y_T, old_T = full[0, first:, None], torch.tensor(drawn)
        log_p, log_q = (x.gather(1, y_T).squeeze(1) for x in (p_TV, q_TV))
        advantage = (log_q - old_T).clamp(-2, 2)  # at step 0 the clip has not warmed up yet
        losses.append(-advantage * (log_p - old_T).exp())
    assert metrics["train/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


def test_a_rollout_whose_seed_already_ends_teaches_nothing(tmp_path):
    run = make(tmp_path, "method=teacher_seeded", "seed_tokens=3", "loss=ce_pg")
    eos = run.roles.eos_ids[0]

    def ended(examples, step, rows, *, tokens=None, prefixes=None, greedy=False):
        ids = [[5, eos] for _ in examples]
        return Completions(ids, [False] * len(ids), [[-1.0, -1.0] for _ in ids], [0] * len(ids))

    run.loop.sequences.writers["teacher"] = ended
    metrics = run.loop.gradients(0)
    (share,) = shares(run)
    assert share.written.ids == [[5, eos]] * 4 and share.written.forced == [2] * 4
    assert metrics["tokens/completion"] == 0 and metrics["train/loss"] == 0
    assert not flat_gradient(run).any()


# --------------------------------------------------------------------------------------- mixture


def test_a_mixture_is_the_weighted_sum_of_its_two_halves(tmp_path):
    mixed = make(tmp_path, "method=mixture", "loss=ce_pg")
    on = make(tmp_path, "method=on_policy_gkd", "loss=ce_pg")
    off = make(tmp_path, "method=sft", "loss=ce_pg")
    found, on_found, off_found = (run.loop.gradients(2) for run in (mixed, on, off))
    torch.testing.assert_close(
        flat_gradient(mixed), 0.7 * flat_gradient(on) + 0.3 * flat_gradient(off)
    )
    assert found["train/loss"] == pytest.approx(
        0.7 * on_found["train/loss"] + 0.3 * off_found["train/loss"]
    )
    assert found["tokens/rollout"] == on_found["tokens/rollout"] > 0
    assert found["tokens/teacher"] == off_found["tokens/teacher"] > 0


def test_a_mixture_of_weight_one_is_on_policy_and_never_asks_the_teacher_to_write(tmp_path):
    run = make(tmp_path, "method=mixture", "lmbda=1")
    metrics = run.loop.gradients(0)
    assert metrics["train/phase"] == 1 and metrics["tokens/teacher"] == 0


# ---------------------------------------------------------------------------------------- anchor


def test_the_anchor_is_the_kl_to_the_student_before_its_first_step(tmp_path):
    run = make(tmp_path, "method=kl_anchored", "anchor_weight=0.5", "quant=int4")
    assert run.loop.gradients(0)["train/anchor_kl"] == pytest.approx(0, abs=1e-6)
    for parameter in run.loop.parameters:
        parameter.data.add_(0.02)
        parameter.grad = None
    metrics = run.loop.gradients(1)
    held = flat_gradient(run)
    (share,) = shares(run)
    kl = []
    for example, ids in zip(share.examples, share.written.ids, strict=True):
        full, first = torch.tensor([[*example.prompt_ids, *ids]]), len(example.prompt_ids)
        with torch.no_grad():
            p_TV = run.student.eval()(full).logits[0, first - 1 : -1].log_softmax(-1)
            with run.student.disable_adapter():
                start_TV = run.student(full).logits[0, first - 1 : -1].log_softmax(-1)
        kl.append((p_TV.exp() * (p_TV - start_TV)).sum(-1))
    expected = torch.cat(kl).mean().item()
    assert expected > 1e-3
    assert metrics["train/anchor_kl"] == pytest.approx(expected, rel=1e-3)
    free = make(tmp_path, "method=kl_anchored", "anchor_weight=0", "quant=int4")
    for parameter in free.loop.parameters:
        parameter.data.add_(0.02)
    alone = free.loop.gradients(1)
    assert metrics["train/loss"] == pytest.approx(alone["train/loss"] + 0.5 * expected, rel=1e-3)
    assert (held - flat_gradient(free)).norm() > 0.01 * held.norm(), "it pulls"


# ---------------------------------------------------------------------------------------- replay


def test_the_buffer_forgets_its_oldest_and_counts_a_repeated_step_once():
    replay = Replay(3)
    for step in range(5):
        replay.push([entry(step)])
    assert [e.step for e in replay.entries] == [2, 3, 4]
    replay.push([entry(5), entry(5, "teacher")])
    replay.push([entry(5), entry(5, "teacher")])  # the step was interrupted and is repeated
    assert [(e.step, e.writer) for e in replay.entries] == [
        (4, "student"), (5, "student"), (5, "teacher"),
    ]  # fmt: skip


def test_newer_entries_are_drawn_more_often_by_the_documented_weights():
    replay = Replay(10)
    replay.push([entry(0), entry(9)])  # weights 1 + 1/10 and 1 + 10/10 in step 9
    drawn = [replay.draw(seed, 9).step for seed in range(2000)]
    assert drawn == [replay.draw(seed, 9).step for seed in range(2000)]
    assert abs(drawn.count(9) / 2000 - 2 / 3.1) < 0.043  # 4 standard errors


def test_the_buffer_comes_back_from_json_to_the_bit():
    replay, other = Replay(4), Replay(4)
    replay.push([entry(step) for step in range(3)])
    other.load(json.loads(json.dumps(replay.state())))
    assert list(other.entries) == list(replay.entries)


def test_a_replayed_rollout_keeps_its_own_log_probabilities_and_says_its_age(tmp_path):
    run = make(tmp_path, "method=replay_buffer", "loss=ce_pg", "replay_injection=0.5",
               "learning_rate=0.05")  # fmt: skip
    sampled, ages, teachers = {}, [], 0
    for step in range(8):
        metrics = run.loop.gradients(step)
        newest = [e for e in run.loop.sequences.replay.entries if e.step == step]
        sampled |= {(step, e.writer): e.written for e in newest}
        (batch,) = run.loop.batches
        (share,) = batch.shares
        assert share.written == sampled[batch.step, batch.writer], "as it was drawn then, not now"
        assert ("rollout/staleness" in metrics) == batch.is_on_policy
        if batch.is_on_policy:
            ages.append(metrics["rollout/staleness"])
        teachers += not batch.is_on_policy
        assert metrics["tokens/rollout"] > 0, "every step writes, whatever it draws"
        run.loop.update(step)
    assert max(ages) > 0 and teachers > 0
    written = len(run.loop.sequences.replay.entries)
    assert 8 < written < 16, "a rollout every step, teacher sequences in some"


# --------------------------------------------------------------------------------------- monitor


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7+3=10. 10-2=8. #### 8", "8"),
        ("so #### 1,234 it is", "1234"),
        ("#### -5", "-5"),
        ("####7.5", "7.5"),
        ("no mark 8", None),
    ],
)
def test_an_answer_is_the_number_behind_the_mark(text, answer):
    assert answer_in(text) == answer


def test_held_out_accuracy_is_measured_when_asked_and_at_the_end(tmp_path):
    spec = cheap(tmp_path, "lmbda=0", "accuracy_steps=4", "max_steps=6")
    assert entrypoints.train(spec) == 0
    measured = {m["step"]: m["eval/accuracy"] for m in Runs(tmp_path).of(spec).metrics()
                if "eval/accuracy" in m}  # fmt: skip
    assert set(measured) == {3, 5} and all(0 <= value <= 1 for value in measured.values())


# -------------------------------------------------------------------- a teacher that is the student

SELF = ["pair=tiny_told", "teacher_steps=8", "student_steps=null", "max_new_tokens=6", "lmbda=0.5",
        "off_policy_source=teacher", "save_steps=2", "max_steps=6"]  # fmt: skip


def average_of(run):
    assert run.roles.average is not None
    return run.roles.average


def test_a_live_teacher_is_the_student_and_reads_more(tmp_path):
    run = make(tmp_path, *SELF, "ema_decay=0")
    for step in range(2):
        run.loop.gradients(step)
        run.loop.update(step)
        average_of(run).update()
    (share,) = shares(run)
    told = [replace(e, prompt_ids=e.teacher_prompt_ids) for e in share.examples]
    before = {name: p.clone() for name, p in run.student.named_parameters()}
    teacher_NV = run.roles.teacher_scorer()(share.examples, share.written.ids, share.written.forced)
    student_NH, _ = positions_of(
        run.student, [e.prompt_ids for e in told], share.written.ids, share.written.forced,
        max(len(e.prompt_ids) for e in told), run.roles.pad_id, run.accelerator.device,
    )  # fmt: skip
    rows = slice(0, len(student_NH))
    torch.testing.assert_close(teacher_NV(rows), head_of(run.student).logits(student_NH))
    start_NV = run.roles.start_scorer()(told, share.written.ids, share.written.forced)
    assert not torch.allclose(teacher_NV(rows), start_NV(rows), atol=1e-4), "it has moved"
    after = dict(run.student.named_parameters())
    assert all(torch.equal(before[name], p) for name, p in after.items()), "and gives all back"


def test_an_average_follows_by_its_decay_and_the_teacher_writes_with_it(tmp_path):
    run = make(tmp_path, *SELF, "ema_decay=0.75")
    name, start = next((n, t.clone()) for n, t in average_of(run).tensors.items() if "lora_A" in n)
    weight = dict(run.student.named_parameters())[name]
    weight.data.add_(4.0)
    average_of(run).update()
    torch.testing.assert_close(average_of(run).tensors[name], start + 1.0)
    example = run.prompts.train[0]

    def drawn():
        return run.roles.writers()["teacher"]([example], 0, [0]).log_probs

    before = drawn()
    weight.data.add_(4.0)
    assert drawn() == before, "the student moves alone until the average is updated"
    for tensor in average_of(run).tensors.values():
        tensor.add_(0.5)
    assert drawn() != before


@pytest.mark.parametrize("decay", [0, 0.5])
def test_a_run_with_an_average_that_is_stopped_ends_in_the_same_bits(tmp_path, decay):
    words = [*SELF, f"ema_decay={decay}"]
    spec = cheap(tmp_path / "stopped", *words)
    run = Runs(tmp_path / "stopped").of(spec)
    stopped(spec, run, 5, 12)
    assert list(run.checkpoints.glob("*/teacher.safetensors"))
    assert entrypoints.train(spec) == 0
    whole = cheap(tmp_path / "whole", *words)
    assert entrypoints.train(whole) == 0
    there = Runs(tmp_path / "whole").of(whole)
    assert steps_of(run) == steps_of(there)
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (there.adapter / name).read_bytes()


def test_replayed_text_of_an_earlier_teacher_is_not_held_against_the_present_one(tmp_path):
    words = ["method=replay_buffer", "replay_injection=1", "ema_decay=0", "max_rollout_gap=3e-5"]
    run = make(tmp_path, *SELF[:-4], *words, "max_steps=6", "learning_rate=0.1")
    for step in range(5):
        run.loop.gradients(step)
        run.loop.check_rollouts(step)
        run.loop.update(step)
        average_of(run).update()
    assert run.loop.found_gaps["teacher"] is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["ema_decay=0.9"],
            r"is not the student: the student was trained by itself \(student_steps",
        ),
        (
            ["ema_decay=0.9", "teacher_dtype=bfloat16"],
            "its dtype is bfloat16, not float32; the stu",
        ),
        ([*SELF, "teacher_prompt=null", "ema_decay=0"], "there is nothing to learn"),
        ([*SELF, "ema_decay=0", "cold_start=0.5", "cold_prompts=4"], "this teacher changes with"),
        ([*SELF, "lmbda=0", "ema_decay=0.9", "teacher_at=cache"], "cache with ema_decay 0.9"),
        ([*SELF, "other_prompts=0.5"], "teacher_prompt: its fields are of the data's own kind"),
        ([*SELF, "fixed_advantage=-1"], "fixed_advantage -1 is of on_loss pg, and on_loss is jsd"),
        ([*SELF, "teacher_prompt='{completion}'"], "must contain {question}"),
        ([*SELF, "teacher_prompt='{question.x}'"], "a field is a name in braces"),
        ([*SELF, "teacher_prompt='{question'"], "a brace that is meant as one is written twice"),
    ],
)
def test_a_teacher_that_cannot_be_the_student_is_refused(tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        cheap(tmp_path, *words)


def test_a_fixed_advantage_has_no_teacher_in_its_loss(tmp_path):
    run = make(tmp_path, *SELF, "lmbda=1", "on_loss=pg", "fixed_advantage=-1")
    metrics = run.loop.gradients(0)
    gradient = flat_gradient(run)
    # The ratio of a token that was just drawn is 1, and its loss is minus the advantage.
    assert metrics["train/loss"] == pytest.approx(1.0, abs=1e-5)
    run.loop.score = lambda *of: lambda rows: torch.zeros(rows.stop - rows.start, 440)
    run.loop.optimizer.zero_grad()
    run.loop.gradients(0)
    torch.testing.assert_close(flat_gradient(run), gradient)
