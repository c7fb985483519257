"""Test that sequences are drawn from the model's own distribution, with reproducible seeds.

Every draw is seeded by (seed, purpose, step, row), not by what was drawn before it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stillhouse.distill.engine import Engine, generate
from stillhouse.distill.rollouts import (
    Completions,
    _Draw,
    cut_after_eos,
    pad_left,
    permutation,
    uniforms,
    write,
)
from stillhouse.spec import RolloutSpec

V, PAD, EOS = 12, 0, 1


SIZE = dict[str, Any](
    vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, pad_token_id=PAD, eos_token_id=EOS,
    bos_token_id=None, initializer_range=0.5, attention_dropout=0.5,
)  # fmt: skip


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE)).eval()


def qwen():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=8)).eval()


def patched(model):
    """Somebody else's forward in the place of the architecture's own."""
    model.forward = model.forward
    return model


ENGINES = {
    "fused": lambda: Engine(llama()),
    "folded": lambda: Engine(qwen()),
    "generate": lambda: Engine(patched(qwen())),
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    """One for each of the three ways to write; each keeps the same promises."""
    return ENGINES[request.param]()


@pytest.fixture
def model(engine):
    return engine.model


def drawn(engine, prompts, uniform_BT, temperature=1.0, longest=8, shortest=0, **more):
    return write(
        engine, prompts, uniform_BT, RolloutSpec(longest, shortest, temperature, 1, 64),
        pad_id=PAD, eos_ids=[EOS], poll=lambda: None, **more,
    )  # fmt: skip


def test_the_log_says_what_writes_and_why():
    assert {name: make().how() for name, make in ENGINES.items()} == {
        "fused": "fused forms of a float32 Llama",
        "folded": "a folded copy in float32",
        "generate": "transformers' generate (Qwen3ForCausalLM has a forward of its own)",
    }


def test_every_way_draws_the_same_tokens_and_log_probs(engine):
    rollout = RolloutSpec(12, 3, 0.8, 1, 64)
    prompts = [[2 + row % 7, 5, 3][: 1 + row % 3] for row in range(64)]
    written, settings = [], {"pad_id": PAD, "eos_ids": [EOS], "max_new_tokens": 12}
    draws = uniforms(3, "student", 0, range(64), 12)
    engine.refold()
    for way in (engine.tokens, functools.partial(generate, engine.model)):
        draw = _Draw(draws, [0] * 64, rollout, [EOS], lambda: None)
        with torch.no_grad():
            out_BC = way(*pad_left(prompts, 4, PAD), draw, **settings)
        ids = [cut_after_eos(row, [EOS]) for row in out_BC.tolist()]
        values = zip(ids, draw.log_probs_BT.tolist(), strict=True)
        written.append((ids, [log_prob for row, all_ in values for log_prob in all_[: len(row)]]))
    assert written[0][0] == written[1][0]
    assert written[0][1] == pytest.approx(written[1][1], abs=1e-5)
    assert len(set(map(len, written[0][0]))) > 3


def test_all_rows_at_once_are_what_each_is_alone_and_few_at_a_time(engine):
    prompts = [[2 + row % 9, 5, 3, 7, 2][: 1 + row % 5] for row in range(24)]
    draws = uniforms(3, "student", 0, range(24), 10)
    prefixes = [[4, 6, 2][: row % 4] for row in range(24)]
    prefixes[5] = [3, EOS]
    settings = {"longest": 10, "shortest": 2, "prefixes": prefixes}
    at_once = drawn(engine, prompts, draws, **settings)
    assert drawn(engine, prompts, draws, **settings, most_rows=5).ids == at_once.ids
    for row in range(24):
        settings["prefixes"] = [prefixes[row]]
        alone = drawn(engine, [prompts[row]], draws[row : row + 1], **settings)
        assert alone.ids[0] == at_once.ids[row]
        assert alone.log_probs[0] == pytest.approx(at_once.log_probs[row], abs=1e-5)
    assert {len(ids) for ids in at_once.ids} >= {2, 10}


def test_a_rollout_is_the_inverse_of_the_models_own_cumulative_distribution(engine, model):
    prompt = [3, 5, 2]
    uniform_BT = uniforms(7, "student", 0, [0], 8)
    [written] = drawn(engine, [prompt], uniform_BT, temperature=0.7).ids
    context = list(prompt)
    for position, token in enumerate(written):
        with torch.no_grad():
            logits_V = model(torch.tensor([context])).logits[0, -1]
        cdf_V = torch.softmax(logits_V.double() / 0.7, -1).cumsum(-1)
        assert cdf_V[token] > uniform_BT[0, position]
        assert token == 0 or cdf_V[token - 1] <= uniform_BT[0, position]
        context.append(token)


def test_draws_follow_the_distribution(engine, model):
    n = 4000
    uniform_BT = uniforms(3, "student", 0, range(n), 1)
    first = [row[0] for row in drawn(engine, [[4, 4]] * n, uniform_BT, longest=1).ids]
    with torch.no_grad():
        expected_V = torch.softmax(model(torch.tensor([[4, 4]])).logits[0, -1].double(), -1)
    counted_V = torch.bincount(torch.tensor(first), minlength=V).double() / n
    # 4.5 standard errors of a binomial share, for 12 shares at once
    assert (counted_V - expected_V).abs().max() < 4.5 * (0.25 / n) ** 0.5


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding(engine):
    rows = [[3, 5, 2], [9], [7, 7, 7, 7, 2]]
    together = drawn(engine, rows, uniforms(1, "student", 4, [10, 11, 12], 8)).ids
    alone = drawn(engine, [rows[1]], uniforms(1, "student", 4, [11], 8)).ids
    assert together[1] == alone[0]


def test_another_step_purpose_seed_or_row_is_another_draw():
    base = uniforms(1, "student", 4, [10], 4)
    for other in [(2, "student", 4, 10), (1, "teacher", 4, 10), (1, "student", 5, 10),
                  (1, "student", 4, 11)]:  # fmt: skip
        assert not torch.equal(base, uniforms(other[0], other[1], other[2], [other[3]], 4))
    assert torch.equal(base, uniforms(1, "student", 4, [10], 4))


def test_nothing_is_inherited_from_the_models_generation_config(engine, model):
    draws = uniforms(5, "student", 0, range(16), 8)
    plain = drawn(engine, [[4, 2]] * 16, draws).ids
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=9.0,
        no_repeat_ngram_size=1, suppress_tokens=[2, 3], min_new_tokens=7,
    )  # fmt: skip
    try:
        assert drawn(engine, [[4, 2]] * 16, draws).ids == plain
    finally:
        model.generation_config = GenerationConfig()


def test_end_of_text_is_kept_and_what_follows_is_cut():
    assert cut_after_eos([5, EOS, PAD, PAD], [EOS]) == [5, EOS]
    assert cut_after_eos([5, 6], [EOS]) == [5, 6]
    assert cut_after_eos([5, 1, 1, 1], [1]) == [5, 1], "pad and end-of-text may be one id"


def test_min_new_tokens_forbids_an_early_end_and_truncation_is_counted(engine):
    draws = uniforms(2, "student", 0, range(64), 6)
    free = drawn(engine, [[4]] * 64, draws, longest=6)
    late = drawn(engine, [[4]] * 64, draws, longest=6, shortest=5)
    assert any(len(row) < 5 for row in free.ids)
    assert all(EOS not in row[:5] for row in late.ids)
    assert free.is_truncated == [row[-1] != EOS for row in free.ids]
    assert set(free.is_truncated) == {True, False}


def test_log_probs_are_those_of_the_distribution_that_was_drawn_from(engine, model):
    prompts = [[4], [3, 5, 2]] * 8
    draws = uniforms(2, "student", 0, range(16), 6)
    out = drawn(engine, prompts, draws, temperature=0.7, longest=6, shortest=3)
    assert out.forced == [0] * 16
    for prompt, written, log_probs in zip(prompts, out.ids, out.log_probs, strict=True):
        replayed = []
        for position, token in enumerate(written):
            with torch.no_grad():
                ids = torch.tensor([prompt + written[:position]])
                logits_V = model(ids).logits[0, -1].double()
            if position < 3:
                logits_V[EOS] = -torch.inf
            replayed.append(torch.log_softmax(logits_V / 0.7, -1)[token].item())
        assert log_probs == pytest.approx(replayed, abs=1e-5)


def test_behind_its_own_beginning_a_rollout_goes_on_as_it_did(engine):
    prompts = [[4], [3, 5, 2], [9, 9]] * 6
    draws = uniforms(6, "student", 0, range(18), 8)
    plain = drawn(engine, prompts, draws, shortest=2)
    lengths = [row % 4 for row in range(18)]
    begun = [written[:n] for written, n in zip(plain.ids, lengths, strict=True)]
    again = drawn(engine, prompts, draws, shortest=2, prefixes=begun)
    assert again.ids == plain.ids
    assert again.is_truncated == plain.is_truncated
    assert again.forced == list(map(len, begun))
    for row, log_probs in enumerate(again.log_probs):
        expected = plain.log_probs[row][again.forced[row] :]
        assert log_probs == pytest.approx(expected, abs=1e-5)


def test_a_prefix_that_is_complete_is_not_continued(engine):
    draws = uniforms(6, "student", 0, range(3), 4)
    prefixes = [[5, EOS], [7, 7, 7, 7], [6]]
    out = drawn(engine, [[4]] * 3, draws, longest=4, shortest=4, prefixes=prefixes)
    assert out.ids[:2] == prefixes[:2]
    assert out.log_probs[:2] == [[], []]
    assert len(out.ids[2]) == 4
    assert len(out.log_probs[2]) == 3
    assert out.forced == [2, 4, 1]
    assert out.is_truncated == [False, True, True]
    assert (
        out.ids[2] == drawn(engine, [[4]], draws[2:], longest=4, shortest=4, prefixes=[[6]]).ids[0]
    )
    complete = drawn(engine, [[4]] * 2, draws[:2], longest=4, prefixes=prefixes[:2])
    assert complete.ids == prefixes[:2]


def test_greedy_writes_the_likeliest_tokens_and_draws_nothing(engine, model):
    prompts = [[4], [3, 5, 2]]
    nothing = torch.full((2, 6), torch.nan, dtype=torch.float64)
    out = drawn(engine, prompts, nothing, longest=6, shortest=2, greedy=True)
    assert out.log_probs == [[], []]
    for prompt, written in zip(prompts, out.ids, strict=True):
        for position, token in enumerate(written):
            with torch.no_grad():
                logits_V = model(torch.tensor([prompt + written[:position]])).logits[0, -1]
            if position < 2:
                logits_V[EOS] = -torch.inf
            assert token == logits_V.argmax()


def test_rows_are_parted_and_joined_and_survive_json(engine):
    draws = uniforms(6, "student", 0, range(3), 4)
    out = drawn(engine, [[4], [5], [6]], draws, longest=4, prefixes=[[], [7], []])
    assert Completions.joined([out[:1], out[1:]]) == out
    assert out[1:2].forced == [1]
    assert Completions(**json.loads(json.dumps(asdict(out)))) == out


def test_dropout_is_off_while_writing_and_back_on_after(engine, model):
    draws = uniforms(2, "student", 0, range(16), 8)
    plain = drawn(engine, [[4, 2]] * 16, draws)
    model.train()
    assert drawn(engine, [[4, 2]] * 16, draws) == plain
    assert model.training
    model.eval()


def test_a_poll_that_raises_stops_a_rollout_between_two_tokens(engine, model):
    class Enough(Exception):
        pass

    calls, habits = [], model.generation_config

    def poll():
        calls.append(1)
        if len(calls) == 3:
            raise Enough

    model.train()
    with pytest.raises(Enough):
        write(
            engine, [[4]], uniforms(2, "student", 0, [0], 8), RolloutSpec(8, 8, 1.0, 1, 64),
            pad_id=PAD, eos_ids=[EOS], poll=poll,
        )  # fmt: skip
    assert len(calls) == 3
    assert model.training
    assert model.generation_config is habits
    model.eval()


@given(st.integers(1, 50), st.integers(0, 9))
def test_every_epoch_is_a_permutation(length, epoch):
    assert sorted(permutation(3, epoch, length)) == list(range(length))


def test_prompts_end_at_the_last_position():
    ids, mask = pad_left([[5], [6, 7]], 3, PAD)
    assert ids.tolist() == [[0, 0, 5], [0, 6, 7]]
    assert mask.tolist() == [[0, 0, 1], [0, 1, 1]]
