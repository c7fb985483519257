"""Test measurements during training: by hand where possible, and without effect on the training."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st

from stillhouse import entrypoints
from stillhouse.distill.monitor import score
from stillhouse.distill.run import Run
from stillhouse.errors import ConfigError, Interrupted
from stillhouse.rundir import Runs
from stillhouse.stop import StopFlag
from tests.builders.cheap import cheap

TEXT = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=8).map(" ".join)


def test_the_score_by_hand():
    # words {a b c d} and {a b d}: Jaccard 3/4; lengths 3/4; of the bigrams ab, bd one is shared
    assert score("a b c d", "a b d") == pytest.approx(0.4 * 0.75 + 0.3 * 0.75 + 0.3 * 0.5)
    assert score("", "a b") == 0.0


@given(TEXT, TEXT)
def test_a_score_lies_in_0_to_1_and_a_text_is_most_like_itself(student, teacher):
    assert 0 <= score(student, teacher) <= 1
    if len(teacher.split()) > 1:
        assert score(teacher, teacher) == pytest.approx(1.0)


def test_monitoring_measures_and_changes_nothing_that_is_trained(tmp_path):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    words = ["lmbda=0.5", "lora_dropout=0.1"]
    more = ["do_eval=true", "eval_steps=3", "score_steps=2", "tracker=wandb", "name=watched"]
    assert entrypoints.train(cheap(plain, *words)) == 0
    assert entrypoints.train(cheap(watched, *words, *more)) == 0
    a, b = (Runs(runs).of(cheap(runs, *words)) for runs in (plain, watched))
    assert a.id == b.id
    name = "adapter_model.safetensors"
    assert (a.adapter / name).read_bytes() == (b.adapter / name).read_bytes()
    scored = [m["step"] for m in b.metrics() if "train/score" in m]
    evaluated = [m["step"] for m in b.metrics() if "eval/loss" in m]
    assert scored == [1, 3, 5] and evaluated == [2, 5]
    last = b.metrics()[-1]
    assert 0 <= last["train/score"] <= 1 and 0 <= last["eval/avg_score"] <= 1
    assert last["eval/loss"] == pytest.approx(last["eval/reverse_kl"], rel=1e-4)  # beta is 1
    assert last["eval/forward_kl"] > 0 and last["eval/nll"] > 0


def test_held_out_prompts_without_answers_are_judged_on_the_teachers_if_asked(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} plus {n}"}) + "\n" for n in range(12)))
    words = ["data=local", f"data_path={rows}", "held_out_rows=4", "min_completion=4"]
    bare = cheap(tmp_path, "do_eval=true", *words)
    with pytest.raises(ConfigError, match="no held-out row with a completion .*eval_answers=teach"):
        Run(bare, Runs(tmp_path).of(bare), StopFlag())
    spec = cheap(tmp_path, "do_eval=true", "eval_answers=teacher", *words)
    one = Run(spec, Runs(tmp_path).of(spec), StopFlag())
    last = spec.training.max_steps - 1
    before, answers = one.monitor.measure(last), [e.completion_ids for e in one.monitor.held_out]
    assert len(answers) == 4 and all(answers) and before["eval/forward_kl"] > 0
    again = Run(spec, Runs(tmp_path).of(spec), StopFlag())  # as after a kill
    assert again.monitor.measure(last) == before
    assert [e.completion_ids for e in again.monitor.held_out] == answers


def test_a_stop_while_measuring_loses_no_update_and_no_measurement(tmp_path):
    words = ["lmbda=0", "score_steps=3", "save_steps=1000"]
    spec = cheap(tmp_path / "stopped", *words)
    run, stop = Runs(tmp_path / "stopped").of(spec), StopFlag()
    one, polls, check = Run(spec, run, stop), [], stop.check

    def poll():
        polls.append(1)
        stop.is_set = len(polls) > 5  # 3 steps; what else polls here is the score's sampling
        check()

    stop.check = poll  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        one.train()
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-3"]
    assert [m["step"] for m in run.metrics()] == [0, 1]
    assert entrypoints.train(spec) == 0
    assert entrypoints.train(cheap(tmp_path / "whole", *words)) == 0
    whole = Runs(tmp_path / "whole").of(spec)

    def timeless(run):
        return [{k: v for k, v in m.items() if "time/" not in k} for m in run.metrics()]

    assert timeless(run) == timeless(whole)
    assert "train/score" in run.metrics()[2]


def test_wandb_is_offline_unless_told_otherwise_and_has_every_step(tmp_path):
    spec = cheap(tmp_path, "tracker=wandb", "sweep=a-sweep")
    assert spec.tracking.wandb_mode == "offline"
    assert entrypoints.train(spec) == 0
    [offline] = (Runs(tmp_path).of(spec).path / "wandb").glob("offline-run-*")
    [log] = offline.glob("*.wandb")
    assert log.stat().st_size > 1000
    # In a field of its own, its length before it; in the config it stands in quotes.
    assert b"\x07a-sweep" in log.read_bytes(), "runs are grouped by sweep"


@pytest.mark.parametrize(
    "words",
    [["mixed_precision=bf16"], ["gradient_checkpointing=true"],
     ["student_dtype=bfloat16", "teacher_dtype=bfloat16", "mixed_precision=bf16"]],
)  # fmt: skip
def test_lower_precision_and_checkpointed_blocks_give_nearly_the_same_step(tmp_path, words):
    def gradient(*more):
        AcceleratorState._reset_state(True)  # it is one per process, and a process trains one run
        spec = cheap(tmp_path, "lmbda=0", "quant=int4", *more)
        run = Run(spec, Runs(tmp_path).of(spec), StopFlag())
        loss = run.loop.gradients(0)["train/loss"]
        return loss, torch.cat(
            [p.grad.flatten() for p in run.loop.parameters if p.grad is not None]
        )

    (loss, full), (other_loss, other) = gradient(), gradient(*words)
    AcceleratorState._reset_state(True)
    assert other_loss == pytest.approx(loss, rel=0.05)
    assert torch.cosine_similarity(full, other, dim=0) > 0.98


def test_metrics_are_json_even_where_a_number_is_none(tmp_path):
    from stillhouse.distill.tracking import Tracker

    spec = cheap(tmp_path)
    run = Runs(tmp_path).of(spec)
    run.path.mkdir(parents=True)
    tracker = Tracker(spec, run, 0)
    tracker.log({"step": 0, "train/loss": float("nan")})
    tracker.close()
    assert json.loads(run.metrics_file.read_text()) == {"step": 0, "train/loss": None}
