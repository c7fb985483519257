"""Test that evaluation answers match transformers and lm-eval, with each context read only once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_folded import student

from stillhouse.distill.answers import answers, ended, log_likelihoods
from stillhouse.distill.engine import Engine, generate
from stillhouse.distill.rollouts import cut_after_eos, pad_left
from stillhouse.distill.toy import tiny
from stillhouse.errors import Diverged

PAD, EOS = 0, 2
ASKED: list[tuple[list[int], list[list[int]]]] = [
    ([11, 7, 30, 44, 5, 9, 21], [[60, 3], [8], [4, 4, 4, 4, 17]]),
    ([4], [[29], [90, 6]]),
    ([17, 29, 90], [[33, 12, 70, 8, 8, 5]]),
]


@pytest.fixture(autouse=True)
def _makers_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def folded(kind: str) -> Engine:
    engine = Engine(student(kind))
    engine.refold()
    assert engine.form is not None
    return engine


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2"])
def test_log_likelihoods_are_those_of_whole_rows_read_alone(kind):
    engine = folded(kind)
    model: Any = engine.model
    for (context, choices), found in zip(ASKED, log_likelihoods(engine, ASKED, PAD), strict=True):
        for choice, (log_likelihood, is_greedy) in zip(choices, found, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context + choice])).logits[0]
            log_nV = logits[len(context) - 1 : -1].double().log_softmax(-1)
            token_n = torch.tensor(choice)
            own = log_nV.gather(1, token_n[:, None]).sum().item()
            assert log_likelihood == pytest.approx(own, abs=2e-5)
            assert is_greedy == bool((log_nV.argmax(-1) == token_n).all())
    best = int(log_nV[0].argmax())
    assert log_likelihoods(engine, [(ASKED[2][0], [[best]])], PAD)[0][0][1]


def test_texts_end_at_their_own_end_or_behind_a_stop_string():
    engine, tokenizer = folded("qwen3"), tiny.tokenizer()
    ids_BP, mask_BP = pad_left([context for context, _ in ASKED], 9, PAD)

    def answered(*stops: str, checked: bool = True) -> list[list[int]]:
        new_BC = answers(
            engine, ids_BP, mask_BP, tokenizer, stops, pad_id=PAD, eos_ids=[EOS],
            max_new_tokens=14, checked=checked,
        )  # fmt: skip
        return ended(new_BC, [EOS], PAD).tolist()

    with torch.no_grad():
        theirs = generate(
            engine.model, ids_BP, mask_BP, lambda logits_bV, _: logits_bV.argmax(-1),
            pad_id=PAD, eos_ids=[EOS], max_new_tokens=14,
        ).tolist()  # fmt: skip
    plain = answered()
    texts = [cut_after_eos(row, [EOS]) for row in theirs]
    texts = [row[:-1] if row[-1] == EOS else row for row in texts]
    assert [row[: len(text)] for row, text in zip(plain, texts, strict=True)] == texts
    stop = tokenizer.decode(texts[0][4:6])
    cut = answered(stop)
    assert tokenizer.decode(cut[0]).count(stop) >= 1
    kept = [token for token in cut[0] if token != PAD]
    assert kept == texts[0][: len(kept)] and len(kept) < len(texts[0])
    assert stop in tokenizer.decode(kept) and stop not in tokenizer.decode(kept[:-1])


def test_answers_of_another_function_than_the_models_are_refused():
    engine = folded("qwen3")
    for name, parameter in engine.model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(3)
    ids_BP, mask_BP = pad_left([context for context, _ in ASKED], 9, PAD)
    with pytest.raises(Diverged, match="other log-probabilities than the model gives them"):
        answers(
            engine, ids_BP, mask_BP, tiny.tokenizer(), [], pad_id=PAD, eos_ids=[EOS],
            max_new_tokens=6, checked=True,
        )  # fmt: skip
