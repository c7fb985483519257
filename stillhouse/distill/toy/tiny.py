"""Train small teachers, student bases, and their tokenizer from scratch, on generated problems.

The teacher learns two-step word problems. The student base learns to read one-step problems and to
work out two-step sums, and sees just enough two-step problems (1 in 61) to start an answer the
right way: what remains to distill is the combination of the two skills. A teacher of conversations
learns to answer by the rule that earlier answers show; its student has the same weights and is
shown no examples. The zoo's models are of the same kind, with teachers that write in other styles,
know other things, or know no more than the student: pairs on which a prediction can be wrong.
The result depends only on a seed and a number of steps, on any CPU (`same_kernels` has the process
that trains).

Legend: B sequences, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from stillhouse.distill.same_kernels import trained
from stillhouse.distill.toy.problems import BONUSES, MARKS, Kind, Problem, draw_rule, problems
from stillhouse.distill.toy.recipes import Recipe
from stillhouse.distill.toy.styles import ZOO

VERSION = 2  # increment it whenever anything here or in problems.py would give other bytes
POSITIONS = 512  # room for few-shot prompts
VOCABULARY = 384
ZOO_VOCABULARY = 440  # the words of all styles are tokens of their own
TRAINING_PROBLEMS = 8000
LEARNING_RATE = 3e-3
SPECIALS = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<|user|>' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '<|assistant|>' + message.content + eos_token }}"
    "{% else %}{{ raise_exception('the roles are user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def training_problems(recipe: Recipe, pair_seed: int) -> Iterator[Problem]:
    """The training problems of a model of this recipe; only from the train split."""
    seed = 10 * pair_seed + recipe.seed_offset
    source = problems(recipe.mix, seed, "train")
    if recipe.styles == ("sums",):
        return source
    rng = random.Random(f"{seed} styles")
    told = recipe.told_styles or recipe.styles
    return (
        _asked_for(problem, rng.choice(told if problem.is_told else recipe.styles), recipe)
        for problem in source
    )


def _asked_for(problem: Problem, style: str, recipe: Recipe) -> Problem:
    styled = problem.styled(style)
    if recipe.template is None or style != recipe.styles[0] or not problem.chain:
        return styled
    return replace(styled, question=recipe.template.replace("{question}", problem.question))


def tokenizer(zoo: bool = False) -> Any:
    """A byte-level BPE tokenizer with single digits and a chat template; the same at every call.

    There is no BOS token, which could be prepended twice or forgotten: <|user|> starts every
    sequence. The zoo's tokenizer has the words of every style.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(r"\d|####| ?[A-Za-z]+|\s|[^\sA-Za-z\d]"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ZOO_VOCABULARY if zoo else VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(zoo), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIALS[0],
        eos_token=SPECIALS[1],
        additional_special_tokens=SPECIALS[2:],
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _texts(zoo: bool) -> Iterator[str]:
    """The texts that a tokenizer is trained on."""
    mix: dict[Kind, float] = {"word1": 1, "word2": 1, "symbolic2": 1}
    source = islice(problems(mix, 0, "train"), 3000)
    if zoo:
        copies = islice(problems({"copy": 1}, 0, "train"), 400)
        styled = (p.styled(style) for style in ZOO for p in islice(problems(mix, 0, "train"), 400))
        source = chain(source, copies, styled)
    return (f"{p.question}\n{p.worked}" for p in source)


def make(
    recipe: Recipe, steps: int, pair_seed: int, directory: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train a model and save it with its tokenizer, in a process whose kernels are fixed.

    Calls `say` with one plain line per tenth of the work. Returns its final loss (nats per answer
    token, mean of the last tenth of the steps; None for 0 steps) and the seconds that it took.
    """
    job = {"recipe": asdict(recipe), "steps": steps, "seed": pair_seed, "into": str(directory)}
    return trained(job, say)


def train(job: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Do the work of `make` in this process."""
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in job["recipe"].items()
    }
    recipe, steps, directory = Recipe(**fields), job["steps"], Path(job["into"])
    text, start, tenths = tokenizer(recipe.zoo), time.monotonic(), 0

    def tell(step: int, loss: float) -> None:
        nonlocal tenths
        if 10 * step // steps > tenths:
            tenths = 10 * step // steps
            seconds = time.monotonic() - start
            say(f"{10 * tenths} % after {seconds:.0f} s (step {step}/{steps}, loss {loss:.2f})")

    with no_bars():
        model, loss = _train(recipe, text, job["seed"], steps, tell)
        model.save_pretrained(directory)
        text.save_pretrained(directory)
    return {"loss": loss, "seconds": round(time.monotonic() - start, 1)}


@contextmanager
def no_bars() -> Iterator[None]:
    """Disable transformers' progress bars, which are noise in a log."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _train(
    recipe: Recipe, text: Any, pair_seed: int, steps: int, tell: Callable[[int, float], None]
) -> tuple[Any, float | None]:
    import torch
    import torch.nn.functional as F

    batches = _batches(recipe, text, pair_seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10 * pair_seed + recipe.seed_offset)
        model = _llama(recipe, text)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    losses: list[float] = []
    marks = torch.tensor(text.convert_tokens_to_ids(list(MARKS)))
    for step in range(steps):
        ids_BT, answer_BT = next(batches)
        # Pads are at the end: causal attention never sees them, so there is no mask to pay for.
        hidden_BTD = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
        is_target_BT = answer_BT[:, 1:]
        logits_NV = model.lm_head(hidden_BTD[is_target_BT])
        target_N = ids_BT[:, 1:][is_target_BT]
        loss = F.cross_entropy(logits_NV, target_N)
        losses.append(loss.item())
        if recipe.turns > 1:
            # One token in thirty can be learned only from earlier answers. In the plain mean it has
            # too little weight to be learned, even in twice the steps that the rest needs.
            told_N = torch.isin(ids_BT[:, :-1][is_target_BT], marks)
            loss = loss + F.cross_entropy(logits_NV[told_N], target_N[told_N])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _warm_up_then_cosine(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        tell(step + 1, losses[-1])
    last = losses[-math.ceil(steps / 10) :] if steps else []
    return model.eval(), sum(last) / len(last) if last else None


def _llama(recipe: Recipe, text: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        vocab_size=len(text),
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=text.pad_token_id,
        bos_token_id=None,
        eos_token_id=text.eos_token_id,
        dtype="float32",
    )
    config._attn_implementation = "eager"  # without AVX, a step is a tenth faster than with sdpa
    return LlamaForCausalLM(config)


def _batches(recipe: Recipe, text: Any, pair_seed: int) -> Iterator[tuple[Any, Any]]:
    """Endless (ids [B, T], whether each belongs to an answer [B, T]), padded at the end."""
    import torch

    source = list(islice(training_problems(recipe, pair_seed), TRAINING_PROBLEMS))
    prompts = text([f"<|user|>{p.question}<|assistant|>" for p in source])["input_ids"]
    bonuses = BONUSES if recipe.turns > 1 else (0,)
    answers = {
        bonus: text([f"{p.plus(bonus).worked}<eos>" for p in source])["input_ids"]
        for bonus in bonuses
    }
    rng = random.Random(f"{pair_seed} {recipe.seed_offset} batches")
    while True:
        rows: list[list[tuple[list[int], list[int]]]] = []
        for _ in range(recipe.batch):
            rule = draw_rule(rng) if recipe.turns > 1 else None
            chosen = [rng.randrange(len(source)) for _ in range(recipe.turns)]
            rows.append([(prompts[i], answers[source[i].bonus(rule)][i]) for i in chosen])
        longest = max(sum(len(p) + len(a) for p, a in row) for row in rows)
        ids_BT = torch.full((recipe.batch, longest), text.pad_token_id)
        answer_BT = torch.zeros((recipe.batch, longest), dtype=torch.bool)
        for row, turns in enumerate(rows):
            start = 0
            for prompt, answer in turns:
                middle, end = start + len(prompt), start + len(prompt) + len(answer)
                ids_BT[row, start:end] = torch.tensor(prompt + answer)
                answer_BT[row, middle:end] = True
                start = end
        yield ids_BT, answer_BT


def _warm_up_then_cosine(step: int, steps: int) -> float:
    """The share of the peak learning rate: warm-up over a tenth of the steps, then decay to 0."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
