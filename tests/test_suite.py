"""Test what a task asks a model, and what it makes of the answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import lm_eval.utils
import pytest
import torch
from lm_eval.api.group import Group
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM

from stillhouse.distill import models
from stillhouse.distill.chat import Chat
from stillhouse.distill.encoder import Context
from stillhouse.distill.engine import Engine
from stillhouse.distill.prompts import load_prompts
from stillhouse.distill.toy import problems, tiny
from stillhouse.errors import ConfigError, DataError
from stillhouse.evals import harness, written
from stillhouse.evals.lm import Lm
from stillhouse.evals.suite import (
    LoadedTask,
    Scorer,
    _Rows,
    _set_every_field,
    _tiny_task,
    load_tasks,
)
from stillhouse.spec import TaskSpec
from tests.builders.micro_models import (
    DATA,
    GEN,
    LIMIT,
    MC,
    Never,
    data_dir,
    llama,
    suite,
    train_spec,
)

GEN_AGAIN = TaskSpec("tiny_gen@requantised", "exact_match", None, True)


def test_a_template_is_compiled_once_for_all_documents():
    compiled: Any = lm_eval.utils.env.from_string
    before = compiled.cache_info().misses
    filled = [lm_eval.utils.apply_template("{{ n }} apples", {"n": n}) for n in range(3)]
    assert filled == ["0 apples", "1 apples", "2 apples"]
    assert compiled.cache_info().misses == before + 1


def test_distinct_n_grams_and_lengths_by_hand():
    assert written.pieces("A: 7+3=10. #### 8") == [*"A:7+3=", "10", *".####", "8"]
    assert written.length(["7+3", "a"]) == 2
    # n = 1: 4 of 6 (a, b, c, d); n = 2: ab, bc, ab, bd, 3 of 4; n = 3: abc, abd, 2 of 2.
    assert written.distinct(["a b c", "a b d", ""]) == pytest.approx((4 / 6 + 3 / 4 + 1) / 3)
    assert written.distinct([""]) == 0


def test_drawn_answers_are_the_same_in_any_batch_and_others_to_the_same_question(
    models_dir, tmp_path
):
    text = tiny.tokenizer()
    model = llama(len(text))
    names = [TaskSpec(name, name.split("_")[-1], None, True) for name in written.TASKS]
    found = []
    for size in (LIMIT * written.SAMPLES, 3):
        scorer = Scorer(suite(*names, limit=3), Chat(text, DATA), size, Never())
        tasks = load_tasks(scorer.suite, names, data_dir(models_dir, tmp_path))
        scores = [scorer.score(model, task, "model") for task in tasks]
        found.append([(score["value"], score["samples"]) for score in scores])
    assert found[0] == found[1]
    (length, _), (distinct, of_all), (drawn_length, _), (drawn, per_question) = found[0]
    assert length != drawn_length, "one is of the likeliest tokens"
    assert of_all == [] and len(per_question) == 3
    assert 0 < distinct <= 1 and drawn > 0.5, "four answers that differ"


def test_a_task_is_asked_as_trained_or_requantised_and_in_no_third_way():
    assert (GEN_AGAIN.asks, GEN_AGAIN.is_requantised) == ("tiny_gen", True)
    assert (GEN.asks, GEN.is_requantised) == ("tiny_gen", False)
    with pytest.raises(ValueError, match="a task is NAME or NAME@requantised, got tiny_gen@int8"):
        TaskSpec("tiny_gen@int8", "exact_match", None, True)


def bos_outside_template() -> Any:
    """A tokenizer that adds a BOS to whatever it reads, while its chat template has none."""
    text = tiny.tokenizer()
    text.add_special_tokens({"bos_token": "<bos>"})
    text.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", text.bos_token_id)]
    )
    assert text.encode("x")[0] == text.bos_token_id
    return text


def with_bos() -> Any:
    """The same, and the chat template writes a BOS too."""
    text = bos_outside_template()
    text.chat_template = "{{ bos_token }}" + text.chat_template
    return text


@pytest.mark.parametrize("make_tokenizer", [tiny.tokenizer, with_bos, bos_outside_template])
def test_lm_eval_feeds_exactly_the_prompts_of_training(models_dir, tmp_path, make_tokenizer):
    text = make_tokenizer()
    rows = problems.test_rows(LIMIT)
    file = tmp_path / "same.jsonl"
    turns = [
        [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["worked"]}]
        for r in rows
    ]
    file.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    spec = train_spec(models_dir, tmp_path, "data=local", f"data_path={file}", "held_out_rows=0")
    prepared = models.prepare(spec.pair, spec.quant, models_dir / "cache")
    prompts = load_prompts(
        spec.data, prepared, Chat(text, spec.data), Context(), models_dir / "cache"
    )
    training = {e.prompt_ids for e in prompts.train}
    assert len(training) == LIMIT

    model, seen = llama(len(text)), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    scorer = Scorer(suite(), Chat(text, DATA), LIMIT, Never())
    for task in load_tasks(suite(), [GEN, MC], data_dir(models_dir, tmp_path)):
        seen.clear()
        scorer.score(model, task, "model")
        if task.spec == GEN:  # the first forward pass holds all prompts, padded on the left
            fed = seen[0].tolist()
        else:  # two questions of four choices at a time: both prompts, then what follows them
            assert [len(batch) for batch in seen] == [2, 8] * 4
            fed = [ids for batch in seen[::2] for ids in batch.tolist()]
        assert len(fed) == LIMIT
        assert {tuple(i for i in ids if i != text.pad_token_id) for ids in fed} == training


@pytest.mark.parametrize("source", ["tiny", "tiny_context"])
def test_a_teacher_of_few_shots_is_asked_exactly_what_it_reads_in_training(
    models_dir, tmp_path, source
):
    """The examples, too: they are the ones that load_prompts shows it."""
    text, rule = tiny.tokenizer(), problems.RULE if source == "tiny_context" else None
    rows = {
        "train": problems.chat_rows("train", 8, rule),
        "held_out": problems.chat_rows("held_out", LIMIT, rule),
        "test": problems.test_rows(LIMIT, rule),
    }
    # What is asked is what is trained on, this once: so the two prompts can be compared.
    rows["test"] = [
        task_row | {"question": row["messages"][0]["content"]}
        for task_row, row in zip(rows["test"], rows["held_out"], strict=True)
    ]
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    spec = train_spec(models_dir, tmp_path, f"held_out_rows={LIMIT}", "teacher_few_shot=4")
    prepared = models.prepare(spec.pair, spec.quant, models_dir / "cache")
    prepared = dataclasses.replace(prepared, data_dir=tmp_path)
    prompts = load_prompts(
        spec.data, prepared, Chat(text, spec.data), Context(4), models_dir / "cache"
    )
    read = {e.teacher_prompt_ids for e in prompts.held_out}
    assert len(read) == LIMIT and all(len(ids) > 150 for ids in read)

    model, seen = llama(len(text), positions=512), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    scorer = Scorer(suite(), Chat(text, DATA), LIMIT, Never())
    for task in load_tasks(suite(), [GEN, MC], tmp_path):
        for examples in (4, 0):
            seen.clear()
            scorer.score(model, task, "teacher", examples)
            fed = [tuple(i for i in ids if i != text.pad_token_id) for ids in seen[0].tolist()]
            if task.spec == GEN:
                assert (set(fed) == read) == (examples == 4)
            else:
                assert all(any(ids[: len(p)] == p for p in read) for ids in fed) == (examples == 4)


def chain(text: Any, steps: dict[int, int]) -> LlamaForCausalLM:
    """A model whose next token follows from the current one alone; by default it ends the text."""
    size = len(text)
    hidden = size + -size % 4  # RoPE wants even heads
    model: Any = llama(size, hidden=hidden, tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, hidden))
        model.lm_head.weight.zero_()
        for now in range(size):
            model.lm_head.weight[steps.get(now, text.eos_token_id), now] = 1.0
    return model


def test_what_a_row_writes_after_its_end_is_no_part_of_its_answer(tmp_path):
    text = tiny.tokenizer()

    def token(word: str) -> int:
        (found,) = text.encode(word)
        return found

    # x goes straight to "#### 8<eos>" and would then write 9; y first loses six tokens.
    words = ["#", "a", "b", "c", "d", "e", "####", " ", "8"]
    ids = [*map(token, words), text.eos_token_id, token("9")]
    steps = dict(zip(ids, ids[1:], strict=False)) | {
        token("x"): token("####"),
        token("9"): token("9"),
    }
    steps[token("y")] = ids[0]
    rows = [
        {"question": q, "answer": "8", "choices": ["8", "9"], "label": 0} for q in ("x", "y", "y")
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plain = suite(GEN, chat=False)
    (task,) = load_tasks(plain, [GEN], tmp_path)
    score = Scorer(plain, Chat(text, DATA), 8, Never()).score(chain(text, steps), task, "chain")
    assert [s["value"] for s in score["samples"]] == [1.0, 1.0, 1.0]
    rows[1]["answer"] = "88"
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (task,) = load_tasks(plain, [GEN], tmp_path)
    score = Scorer(plain, Chat(text, DATA), 8, Never()).score(chain(text, steps), task, "chain")
    assert [s["value"] for s in score["samples"]] == [1.0, 0.0, 1.0]
    assert score["value"] == pytest.approx(2 / 3)


def test_an_answer_ends_where_the_chat_template_ends_a_turn(tmp_path):
    """The end is no part of it, though this tokenizer would write it as it writes any word."""
    text = tiny.tokenizer()
    text.add_tokens(["<|done|>"])
    text.chat_template = text.chat_template.replace("eos_token", "'<|done|>'")
    chat = Chat(text, DATA)
    assert chat.stop_ids == sorted({text.eos_token_id, chat.end_id}) and len(chat.stop_ids) == 2
    (eight,), (nine,), (asks,) = (text.encode(t) for t in ("8", "9", "<|assistant|>"))
    steps = {asks: eight, eight: chat.end_id, chat.end_id: nine, nine: nine}
    row = {"question": "x", "answer": "8", "choices": ["8", "9"], "label": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    whole = _tiny_task("tiny_gen", tmp_path)
    whole["filter_list"] = [{"name": "none", "filter": [{"function": "take_first"}]}]
    loaded = TaskManager(include_defaults=False).load([whole])["tasks"]["tiny_gen"]
    _set_every_field(loaded, None, 6, False)
    score = Scorer(suite(GEN), chat, 8, Never()).score(
        chain(text, steps), LoadedTask(GEN, loaded), "m"
    )
    assert score["value"] == 1.0


def test_what_is_asked_without_a_template_never_ends_in_end_of_text():
    text = with_bos()
    around = TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[("<bos>", text.bos_token_id), ("<eos>", text.eos_token_id)],
    )
    text.backend_tokenizer.post_processor = around
    lm = Lm(Engine(llama(len(text))), Chat(text, DATA), 8, is_chat=False)
    (eight,) = text.encode("8", add_special_tokens=False)
    assert text.encode("8") == [text.bos_token_id, eight, text.eos_token_id]
    assert lm.tok_encode("8") == [text.bos_token_id, eight]
    ids_BT, mask_BT = lm.tok_batch_encode(["8", "88"])
    assert ids_BT.tolist()[0] == [text.pad_token_id, text.bos_token_id, eight]
    assert mask_BT.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_tasks_are_asked_as_training_asks(monkeypatch):
    """The same day, the same variables; a begun answer is gone on with; a system turn may go."""
    text = tiny.tokenizer()
    head = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    text.chat_template = (
        f"{head}{{{{ strftime_now('%Y') }}}}{{{{ ' briefly' if brief else '' }}}}"
        + text.chat_template
    )
    data = dataclasses.replace(DATA, template_date="1999-12-31", chat_template_kwargs={"brief": 1})
    lm = Lm(Engine(llama(len(text))), Chat(text, data), 8, is_chat=True)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "8 "}]
    assert lm.apply_chat_template(turns[:1]) == "1999 briefly<|user|>x<|assistant|>"
    begun = lm.apply_chat_template(turns, add_generation_prompt=False)
    assert begun == "1999 briefly<|user|>x<|assistant|>8 "
    system = {"role": "system", "content": "Be kind."}
    assert lm.apply_chat_template([system, *turns], add_generation_prompt=False) == begun
    assert lm.left_out == 1
    with pytest.raises(ConfigError, match="a task has turns that the chat template refuses"):
        lm.apply_chat_template([{"role": "tool", "content": "x"}])


def test_perplexity_keeps_nats_and_units_per_document_and_prefixes_one_bos(models_dir, tmp_path):
    text = with_bos()
    model = llama(len(text))
    pages = ["Ben has 3 cups.", "Then 2 are lost. How many cups now?"]
    config = {
        "task": "pages",
        "custom_dataset": lambda **_: {"test": _Rows([{"page": p} for p in pages])},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "page",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity",
             "higher_is_better": False}
        ],
    }  # fmt: skip
    loaded = TaskManager(include_defaults=False).load([config])["tasks"]["pages"]
    loaded.set_config(key="num_fewshot", value=0)
    task = LoadedTask(TaskSpec("pages", "word_perplexity", None, False), loaded)
    score = Scorer(suite(chat=False), Chat(text, DATA), 8, Never()).score(model, task, "model")
    nats, words = [], [len(p.split()) for p in pages]
    for page in pages:
        ids = torch.tensor([text.encode(page)])  # its own BOS is the one prefix
        with torch.no_grad():
            log_p_TV = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        nats.append(-log_p_TV.gather(1, ids[0, 1:, None]).sum().item())
    assert [s["weight"] for s in score["samples"]] == words
    per_word = [n / w for n, w in zip(nats, words, strict=True)]
    assert [s["value"] for s in score["samples"]] == pytest.approx(per_word, rel=1e-5)
    assert score["value"] == pytest.approx(2.718281828459045 ** (sum(nats) / sum(words)), rel=1e-5)
    assert score["higher_is_better"] is False


def test_the_documents_of_a_group_are_numbered_through(models_dir, tmp_path):
    local = TaskManager(include_defaults=False)
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = Group.from_config(GroupConfig(group="both", aggregate_metric_list=[mean]))
    config = _tiny_task("tiny_mc", data_dir(models_dir, tmp_path))
    for name in ("left", "right"):
        (member,) = local.load([config | {"task": name}])["tasks"].values()
        member.set_config(key="num_fewshot", value=0)
        group.add(member)
    task = LoadedTask(TaskSpec("both", "acc", None, True), group)
    text = tiny.tokenizer()
    score = Scorer(suite(limit=5), Chat(text, DATA), 8, Never()).score(
        llama(len(text)), task, "model"
    )
    assert [s["doc"] for s in score["samples"]] == list(range(10)) and score["n"] == 10
    values = [s["value"] for s in score["samples"]]
    assert values[:5] == values[5:] and score["value"] == pytest.approx(sum(values) / 10)


def test_a_prompt_that_loses_its_beginning_is_said(models_dir, tmp_path, capsys):
    text = tiny.tokenizer()
    row = {"question": "Ben has 1 cup. " * 60, "answer": "1", "choices": ["1", "2"], "label": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    for task in load_tasks(suite(), [GEN, MC], tmp_path):
        Scorer(suite(), Chat(text, DATA), 8, Never()).score(llama(len(text)), task, "model")
        out = capsys.readouterr().out
        assert f"model {task.spec.task}" in out and "lost their beginning (over 256 tokens)" in out


def test_a_task_that_cannot_be_asked_is_one_sentence(models_dir, tmp_path):
    here = data_dir(models_dir, tmp_path)
    missing = TaskSpec("hellaswag", "acc", None, True)
    known = Path(TaskManager.__init__.__code__.co_filename).parent / "hellaswag"

    def only_hellaswag() -> TaskManager:
        return TaskManager(include_path=str(known), include_defaults=False)

    harness._stay_offline()
    with pytest.raises(ConfigError, match="hellaswag: its data is not on this machine.*OFFLINE=0"):
        load_tasks(suite(missing), [missing], here, only_hellaswag)
    typo = TaskSpec("helaswag", "acc", None, True)
    with pytest.raises(ConfigError, match='Did you mean "hellaswag"'):
        load_tasks(suite(typo), [typo], here, only_hellaswag)
    shots = TaskSpec("tiny_gen", "exact_match", 3, True)
    with pytest.raises(ConfigError, match="trained to answer without examples"):
        load_tasks(suite(shots), [shots], here)
    with pytest.raises(ConfigError, match="test.jsonl: not there"):
        load_tasks(suite(), [GEN], tmp_path / "nowhere")
    (tmp_path / "test.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(DataError, match="line 1"):
        load_tasks(suite(), [GEN], tmp_path)


def test_a_metric_that_the_task_does_not_have_is_refused_with_those_it_has(models_dir, tmp_path):
    text, odd = tiny.tokenizer(), TaskSpec("tiny_mc", "acc_nrm", None, True)
    (task,) = load_tasks(suite(odd), [odd], data_dir(models_dir, tmp_path))
    with pytest.raises(ConfigError, match=r'it has acc, acc_norm\. Did you mean "acc_norm"'):
        Scorer(suite(odd), Chat(text, DATA), 8, Never()).score(llama(len(text)), task, "model")


def test_a_chat_suite_refuses_a_tokenizer_without_a_template():
    text = tiny.tokenizer()
    text.chat_template = None
    with pytest.raises(ConfigError, match="apply_chat_template=false"):
        Scorer(suite(), Chat(text, DATA), 8, Never())
