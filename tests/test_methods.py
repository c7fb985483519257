"""Test each method as one row of a table, worked out by hand from its authors' description."""

import itertools
import json
import re
from operator import attrgetter
from pathlib import Path

import pytest

from stillhouse.cli import main
from stillhouse.compose import compose, from_command_line, options_of
from stillhouse.methods import StepPlan, drawn, step_plan, value_at
from stillhouse.spec import TrainSpec

# λ and the tokens that the teacher writes first are those of the steps 0, 25, 50, 70 and 99 of 100;
# of a method with 200 steps, 0, 50, 100, 140 and 198. off: the loss on what is no rollout, in the
# family ce_pg and in the family jsd. buffer: its steps, and the rate of teacher sequences.
# A new method is a file in conf/method and a row here.
PLANS = """
method              steps  λ                as      else     off      seed tokens  anchor  buffer
on_policy_gkd       100    1 1 1 1 1        coin    teacher  ce jsd   0 0 0 0 0    0       0 0
extended_on_policy  200    1 1 1 1 1        coin    teacher  ce jsd   0 0 0 0 0    0       0 0
hybrid              100    0 0 1 1 1        coin    teacher  ce jsd   0 0 0 0 0    0       0 0
hybrid_gradual      100    0 .25 .5 .7 .99  coin    teacher  ce jsd   0 0 0 0 0    0       0 0
teacher_seeded      100    1 1 1 1 1        coin    teacher  ce jsd   20 10 0 0 0  0       0 0
mixture             100    .7 .7 .7 .7 .7   weight  teacher  ce jsd   0 0 0 0 0    0       0 0
replay_buffer       100    1 1 1 1 1        coin    teacher  ce jsd   0 0 0 0 0    0       50 .2
kl_anchored         100    0 0 0 0 0        coin    teacher  ce jsd   0 0 0 0 0    .1      0 0
reverse_curriculum  100    1 1 1 0 0        coin    teacher  ce jsd   0 0 0 0 0    0       0 0
cold_start          100    0 1 1 1 1        coin    teacher  ce jsd   0 0 0 0 0    0       0 0
off_policy          100    0 0 0 0 0        coin    teacher  jsd jsd  0 0 0 0 0    0       0 0
sft                 100    0 0 0 0 0        coin    teacher  ce ce    0 0 0 0 0    0       0 0
gkd                 100    1 1 1 1 1        coin    dataset  ce jsd   0 0 0 0 0    0       0 0
"""
ROWS = {cells[0]: cells for cells in (re.split("  +", r) for r in PLANS.strip().splitlines()[1:])}
STEPS = (0, 25, 50, 70, 99)
# What the families share out: the loss on rollouts, and how far an advantage counts at STEPS. The
# clip grows from 2 to 5 nats over the first 20 steps, of 200 as of 100.
FAMILIES = {"ce_pg": "pg", "jsd": "jsd"}
CLIP = (2, 5, 5, 5, 5)


def spec(*words: str) -> TrainSpec:
    return compose(from_command_line(["pair=tiny", *words], TrainSpec), TrainSpec)


def test_the_table_has_a_row_for_each_file_in_conf_method():
    assert sorted(ROWS) == options_of("method")


@pytest.mark.parametrize(("method", "family"), [*itertools.product(ROWS, FAMILIES)])
def test_a_methods_plan_is_its_row(method: str, family: str):
    _, steps, lmbda, as_, source, off, seeds, anchor, buffer = ROWS[method]
    asked = spec(f"method={method}", f"loss={family}")
    assert asked.training.max_steps == int(steps)
    size, injection = buffer.split()
    planned = zip(STEPS, lmbda.split(), seeds.split(), CLIP, strict=True)
    for step, share, tokens, clip in planned:
        assert step_plan(asked, step * int(steps) // 100) == StepPlan(
            is_cold=False,
            lmbda=float(share),
            lmbda_as=as_,
            off_policy_source=source,
            on_loss=FAMILIES[family],
            off_loss=off.split()[list(FAMILIES).index(family)],
            seed_tokens=int(tokens),
            anchor_weight=float(anchor),
            advantage_clip=clip,
            replay_size=int(size),
            replay_injection=float(injection),
            rollout_tokens=32,
        ), step


# --------------------------------------------------------------------------------- schedules


def test_a_schedule_is_straight_between_its_knots_and_flat_outside_of_them():
    knots = ((0.25, 1.0), (0.75, 3.0))
    assert [value_at(knots, x) for x in (0, 0.25, 0.375, 0.5, 0.75, 1)] == [1, 1, 1.5, 2, 3, 3]
    assert value_at(0.3, 0.9) == 0.3


def test_a_jump_has_the_value_after_it_from_its_own_step_on():
    hybrid = spec("method=hybrid", "max_steps=10")
    assert [step_plan(hybrid, step).lmbda for step in range(10)] == [0] * 5 + [1] * 5
    cold = spec("method=cold_start")
    assert [step_plan(cold, step).lmbda for step in (4, 5)] == [0, 1]
    back = spec("method=reverse_curriculum")
    assert [step_plan(back, step).lmbda for step in (69, 70)] == [1, 0]


def test_the_teachers_first_tokens_are_20_times_what_is_left_of_50_steps_rounded_down():
    seeded = spec("method=teacher_seeded")
    tokens = [step_plan(seeded, step).seed_tokens for step in range(100)]
    assert tokens == [20 * (50 - step) // 50 for step in range(50)] + [0] * 50


def test_the_advantage_clip_grows_over_20_steps_whatever_the_methods_length():
    for method in ("on_policy_gkd", "extended_on_policy"):
        asked = spec(f"method={method}", "loss=ce_pg")
        clips = [step_plan(asked, step).advantage_clip for step in (0, 5, 10, 19, 20, 60)]
        assert clips == pytest.approx([2, 2.75, 3.5, 4.85, 5, 5])


def test_a_horizon_is_a_share_of_the_longest_rollout_and_never_nothing():
    growing = spec("horizon=[[0,0],[0.5,1]]")
    tokens = [step_plan(growing, step).rollout_tokens for step in (0, 1, 25, 49, 50, 99)]
    assert tokens == [1, 1, 16, 31, 32, 32]


def test_a_run_of_no_steps_has_a_plan_too():
    assert step_plan(spec("method=hybrid", "max_steps=0"), 0).lmbda == 0


# ------------------------------------------------------------------------------------- lines

LINES = {
    "hybrid ce_pg": "λ ▁▁▁▁▁▁▁▁▁▁██████████ 0 → 1    pg on rollouts (clip 2 → 5), ce on teacher"
    " sequences; 100 steps",
    "reverse_curriculum jsd": "λ ██████████████▁▁▁▁▁▁ 1 → 0    jsd on rollouts, jsd on teacher"
    " sequences; 100 steps",
    "hybrid_gradual jsd": "λ ▁▂▂▂▃▃▃▄▄▄▅▅▅▆▆▆▇▇▇█ 0 → 1    jsd on rollouts, jsd on teacher"
    " sequences; 100 steps",
    "extended_on_policy jsd": "λ ████████████████████ 1        jsd on rollouts; 200 steps",
    "teacher_seeded jsd": "λ ████████████████████ 1        jsd on rollouts; seed tokens"
    " █▇▇▆▅▄▄▃▂▁▁▁▁▁▁▁▁▁▁▁ 20 → 0; 100 steps",
    "mixture ce_pg": "λ ▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆ 0.7      pg on rollouts (clip 2 → 5), ce on teacher"
    " sequences; both in each step, λ their weight; 100 steps",
    "replay_buffer jsd": "λ ████████████████████ 1        jsd on rollouts, jsd on teacher"
    " sequences; drawn from a buffer of 50 steps, teacher sequences in 0.2 of them; 100 steps",
    "kl_anchored ce_pg": "λ ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ 0        ce on teacher sequences; anchor 0.1;"
    " 100 steps",
    "off_policy ce_pg": "λ ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ 0        jsd on teacher sequences; 100 steps",
    "gkd jsd": "λ ████████████████████ 1        jsd on rollouts; 100 steps",
    "gkd jsd horizon=[[0,0.25],[1,1]]": "λ ████████████████████ 1        jsd on rollouts; horizon"
    " ▃▃▃▄▄▄▄▅▅▅▆▆▆▆▇▇▇▇██ 0.25 → 1 of 32 tokens; 100 steps",
    "gkd jsd position_weights=[[0,1],[0.5,0]]": "λ ████████████████████ 1        jsd on rollouts;"
    " weights along an answer █▇▆▆▅▄▃▃▂▁▁▁▁▁▁▁▁▁▁▁ 1 → 0; 100 steps",
}


@pytest.mark.parametrize("what", LINES)
def test_a_method_is_drawn_as_a_line(what: str):
    method, family, *more = what.split()
    assert drawn(spec(f"method={method}", f"loss={family}", *more)) == LINES[what]


def test_every_method_begins_to_say_what_it_learns_from_in_one_column():
    lines = [drawn(spec(f"method={method}")) for method in ROWS]
    assert {re.search(r"  (?=jsd|ce)", line).end() for line in lines} == {32}  # pyright: ignore[reportOptionalMemberAccess]


def test_a_plan_draws_each_way_to_train_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["pair=tiny", "method=hybrid,sft", "loss=jsd,ce_pg", "seeds=3", "--runs", str(tmp_path)]
    assert main(["plan", *words]) == 0
    shown = capsys.readouterr().out.splitlines()
    start = shown.index("share of rollouts (λ) over a run, and what is learnt from:") + 1
    bars = "λ ▁▁▁▁▁▁▁▁▁▁██████████ 0 → 1    "
    sft = "  sft     λ ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ 0        ce on teacher sequences; 100 steps"
    assert shown[start : start + 3] == [
        f"  hybrid  {bars}jsd on rollouts, jsd on teacher sequences; 100 steps",
        f"  hybrid  {bars}pg on rollouts (clip 2 → 5), ce on teacher sequences; 100 steps",
        sft,
    ]
    assert main(["plan", *words, "--json"]) == 0
    drawn_ones = json.loads(capsys.readouterr().out)["methods"]
    assert [(one["method"], one["points"]) for one in drawn_ones] == [
        ("hybrid", 3), ("hybrid", 3), ("sft", 6),
    ]  # fmt: skip
    assert f"  hybrid  {drawn_ones[0]['drawn']}" == shown[start]


def test_a_plan_counts_methods_where_they_are_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shares = ",".join(str(i / 100) for i in range(31))
    assert main(["plan", "pair=tiny", f"lmbda={shares}", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "  31 ways to train; --json draws each" in shown and "λ ▁" not in shown


def test_the_lines_that_the_readme_shows_are_those_of_the_cliffs_plan():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    [block] = re.findall(r"^```text\n(.*?)^```", readme, re.M | re.S)
    for line in block.splitlines():
        method = line.split()[0]
        assert line == f"{method:<18}  {drawn(spec(f'method={method}', 'loss=ce_pg'))}"


# -------------------------------------------------------------------------- what cannot be right

REFUSED = {
    "lmbda=1.5": "lmbda = 1.5: the values of this schedule lie in [0, 1]",
    "lmbda=[[0,0],[0.5,2]]": "lmbda = [[0, 0], [0.5, 2]]: the values of this schedule",
    "lmbda=[[0,0],[1.2,1]]": "the fractions of a schedule lie in [0, 1]: 0 is the run's start",
    "lmbda=[[0.5,0],[0.2,1]]": "must not go back; order its knots (a fraction given twice is",
    "lmbda=[[0,0,1]]": "a schedule is a number, or [fraction, value] knots such as [[0, 0],",
    "seed_tokens=[[0.5,8],[0,0]]": "seed_tokens = [[0.5, 8], [0, 0]]: the fractions of a schedule",
    "anchor_weight=-0.1": "anchor_weight = -0.1: the values of this schedule lie at or above 0",
    "method=hybrid teacher_samples=false": "method hybrid: needs text that the teacher writes,"
    " and the teacher of pair tiny only scores (teacher_samples: false); on_policy_gkd and gkd do"
    " without",
    "method=teacher_seeded teacher_samples=false": "method teacher_seeded: needs text",
    "method=replay_buffer teacher_samples=false": "method replay_buffer: needs text",
    "method=kl_anchored teacher_samples=false": "method kl_anchored: needs text",
    "score_steps=5 teacher_samples=false": "score_steps: needs text",
    "do_eval=true teacher_samples=false": "do_eval: needs text",
    "replay_injection=0.2": "replay_injection 0.2 without a buffer: set replay_size, the number of"
    " steps that it keeps, or leave replay_injection at 0",
    "method=replay_buffer lmbda=0.5": "a replay buffer takes every rollout",
    "replay_injection=1.2 replay_size=50": "replay_injection = 1.2: input should be less than or",
    "seed_tokens=32": "seed_tokens 32 must be below max_new_tokens 32: the rest of a rollout is"
    " what the student learns from; lower one or raise the other",
    "method=teacher_seeded max_new_tokens=20": "seed_tokens 20 must be below max_new_tokens 20",
    "loss_top_k=385 on_loss=topk": "loss_top_k 385 is above the 384 tokens of pair tiny's"
    " vocabulary; the top k are some of them (16 is the default)",
    "horizon=1.5": "horizon = 1.5: the values of this schedule lie in [0, 1]",
    "horizon=[[0,1],[1,0.2]] method=teacher_seeded": "seed_tokens with a horizon below 1",
    "position_weights=[[0,1],[0.5,-1]]": "the values of this schedule lie at or above 0",
    "overlap_k=385": "overlap_k 385 is above the 384 tokens of pair tiny's vocabulary",
    "overlap_bins=[[0,8],[9,null]]": "bins are [first, end) of positions, one after the other from"
    " 0 to null (no end): [9, null] begins where 8 is due",
    "overlap_bins=[[0,8],[4,null]]": "[4, null] begins where 8 is due",
    "overlap_bins=[[0,8],[8,32]]": "the last bin ends at 32 and leaves a gap: write null",
    "loss=ce_pg loss_temperature=2": "at loss_temperature 1; got 2",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_plan_refuses_what_no_run_could_do(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", "pair=tiny", *words.split(), "--runs", str(tmp_path)]) == 42
    said = capsys.readouterr()
    assert said.out == ""
    assert REFUSED[words] in said.err
    assert said.err.startswith("ConfigError: ") and said.err.count("\n") <= 2


@pytest.mark.parametrize(
    ("words", "leaf", "value"),
    [
        ("loss_top_k=384 on_loss=topk", "loss.loss_top_k", 384),
        ("seed_tokens=31", "method.seed_tokens", 31),
        ("method=on_policy_gkd teacher_samples=false", "pair.teacher_samples", False),
        ("method=gkd lmbda=0.5 teacher_samples=false", "method.off_policy_source", "dataset"),
        ("method=replay_buffer replay_injection=0 teacher_samples=false", "method.lmbda", 1),
        # The vocabulary is not known before the weights are here.
        ("loss_top_k=500 on_loss=topk vocab_size=null", "loss.loss_top_k", 500),
    ],
)
def test_what_lies_just_inside_is_taken(words: str, leaf: str, value: object):
    assert attrgetter(leaf)(spec(*words.split())) == value
