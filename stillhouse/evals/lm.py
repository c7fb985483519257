"""Adapt lm-eval's model class, progress bars and log to this project.

Importing this module redirects the bars and the log of the lm_eval package, and keeps its compiled
templates, for the whole process.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import lm_eval.utils
from lm_eval.models.huggingface import HFLM

from stillhouse.distill.answers import answers, ended, joined, log_likelihoods, samples
from stillhouse.distill.chat import Chat, Skip
from stillhouse.distill.engine import Engine
from stillhouse.errors import ConfigError

# Tokens of context, whatever the model could hold: a wikitext page is one window of a model with
# 262,144 positions, and the logits of that window alone take gigabytes. Written into every score.
LONGEST = 4096
SECONDS_BETWEEN_LINES = 20.0
GREEDY = {"do_sample", "num_beams", "temperature"}  # what a suite sets: all of it means greedy


_HFLM: Any = HFLM  # its class decorator has no types


class Lm(_HFLM):
    """lm-eval's HFLM over a loaded model; its answers end at the same tokens as rollouts."""

    def __init__(self, engine: Engine, chat: Chat, batch_size: int, is_chat: bool) -> None:
        """Over the engine's model as it is now."""
        model: Any = engine.model
        tokenizer = chat.tokenizer
        if tokenizer.eos_token is None:  # lm-eval takes it for an end, a beginning and a pad
            tokenizer.eos_token = chat.end_token
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype="float32",  # sums of bfloat16 log-probabilities would tie
            # A chat template writes its own BOS, or means to have none; lm-eval would add one.
            add_bos_token=False if is_chat else None,
        )
        self.chat, self.left_out = chat, 0
        self.engine, self.is_checked = engine, False
        self.drawn: Counter[tuple[int, ...]] = Counter()  # answers to each prompt so far
        engine.refold()
        # Some tokenizers put EOS behind every text: an answer would be asked for after the end.
        self.is_ended = tokenizer("a")["input_ids"][-1] in chat.stop_ids

    @property
    def max_length(self) -> int:
        return min(super().max_length, LONGEST)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        ids = super().tok_encode(string, add_special_tokens, **kwargs)
        if self.is_ended and ids and ids[-1] in self.chat.stop_ids:
            ids = ids[:-1]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", **settings: Any
    ) -> tuple[Any, Any]:
        if not self.is_ended:
            return super().tok_batch_encode(strings, padding_side, **settings)
        most = settings.get("left_truncate_len")
        rows = [self.tok_encode(string, left_truncate_len=most) for string in strings]
        padded = self.tokenizer.pad(
            {"input_ids": rows}, padding_side=padding_side, return_tensors="pt"
        )
        return padded["input_ids"], padded["attention_mask"]

    def _model_generate(
        self, context: Any, max_length: int, stop: list[str], **settings: Any
    ) -> Any:
        ends, pad = self.chat.stop_ids, self.tokenizer.pad_token_id
        if settings.keys() - GREEDY - {"attention_mask"}:  # a user's task sets more
            # Without these ids, what a row writes after its own end, until the last row of a batch
            # is done, would be read as part of its answer.
            settings["eos_token_id"] = ends
            ids_BT = super()._model_generate(context, max_length, stop, **settings)
            return joined(context, ended(ids_BT[:, context.shape[1] :], ends, pad))
        if settings.get("do_sample"):
            new_BC = self._sampled(context, settings["attention_mask"], max_length)
            return joined(context, ended(new_BC, ends, pad))
        new_BC = answers(
            self.engine, context, settings["attention_mask"], self.tokenizer, stop, pad_id=pad,
            eos_ids=ends, max_new_tokens=max_length - context.shape[1],
            checked=not self.is_checked,
        )  # fmt: skip
        self.is_checked = True
        return joined(context, ended(new_BC, ends, pad))

    def _sampled(self, ids_BP: Any, mask_BP: Any, max_length: int) -> Any:
        """Answers drawn at temperature 1: the n-th to a prompt has draws of its own."""
        prompts = [
            tuple(ids[mask.bool()].tolist()) for ids, mask in zip(ids_BP, mask_BP, strict=True)
        ]
        numbers: list[int] = []
        for prompt in prompts:
            numbers.append(self.drawn[prompt])
            self.drawn[prompt] += 1
        return samples(
            self.engine, prompts, numbers, pad_id=self.tokenizer.pad_token_id,
            eos_ids=self.chat.stop_ids, max_new_tokens=max_length - ids_BP.shape[1],
        )  # fmt: skip

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """As HFLM's, in batches sorted by length; a context is read once for all its choices."""
        if self.engine.form is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            cut = max(0, len(context) + len(continuation) - self.max_length - 1)
            LOG.cut += cut > 0
            by_context.setdefault(tuple(context[cut:]), []).append(number)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = ProgressLines(requests, desc="Running loglikelihood requests", disable=disable_tqdm)
        for batch in _batches(by_context, override_bs or self.batch_size):
            choices = [[requests[number][2] for number in numbers] for _, numbers in batch]
            contexts = [context for context, _ in batch]
            scores = log_likelihoods(
                self.engine, [*zip(contexts, choices, strict=True)], self.tokenizer.pad_token_id
            )
            for (_, numbers), of_context in zip(batch, scores, strict=True):
                for number, score in zip(numbers, of_context, strict=True):
                    found[number] = score
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
                bar.update(len(numbers))
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt as in training; without a generation prompt, the last turn is left open."""
        try:
            if add_generation_prompt:
                return self.chat.render(chat_history).prompt
            return self.chat.continued(chat_history)
        except Skip as refusal:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            if len(turns) == len(chat_history):
                raise ConfigError(f"a task has {refusal} ({refusal.seen})") from refusal
            # As lm-eval does, and the published scores of such models with it.
            self.left_out += 1
            return self.apply_chat_template(turns, add_generation_prompt)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Nats of whole documents, one window at a time: each has LONGEST x vocabulary logits."""
        kept = self.add_bos_token, self.batch_size_per_gpu
        # Every window gets its prefix token from lm-eval; the tokenizer's own would be a second.
        self.add_bos_token, self.batch_size_per_gpu = False, 1
        found: list[float] = []
        try:
            for request in ProgressLines(requests, desc="Running documents"):
                found += super().loglikelihood_rolling([request], disable_tqdm=True)
        finally:
            self.add_bos_token, self.batch_size_per_gpu = kept
        return found


def _batches(
    by_context: Mapping[tuple[int, ...], list[int]], size: int
) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
    """Batches of contexts with the numbers of their requests: at most `size` requests, unless one
    context has more. The longest come first, so that running out of memory shows at once."""
    batch: list[tuple[tuple[int, ...], list[int]]] = []
    for context, numbers in sorted(by_context.items(), key=lambda item: -len(item[0])):
        if batch and sum(len(each) for _, each in batch) + len(numbers) > size:
            yield batch
            batch = []
        batch.append((context, numbers))
    if batch:
        yield batch


class ProgressLines:
    """Replacement for lm-eval's progress bar: a plain line now and then, readable in any log."""

    label: ClassVar[str] = ""
    said: ClassVar[float] = 0.0

    def __init__(
        self,
        iterable: Iterable[Any] = (),
        desc: str = "",
        total: int | None = None,
        disable: bool = False,
        **_: Any,
    ) -> None:
        self.iterable, self.done = iterable, 0
        self.total = total if total is not None else len(iterable)  # type: ignore[arg-type]
        self.what = desc.removeprefix("Running ") or "documents"
        self.is_quiet = disable or self.total < 2

    @classmethod
    def begin(cls, label: str) -> None:
        """Set the label of the next lines; the first is printed some seconds later, if at all."""
        cls.label, cls.said = label, time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update(1)

    def update(self, count: int = 1) -> None:
        self.done += count
        if not self.is_quiet and time.monotonic() - self.said >= SECONDS_BETWEEN_LINES:
            ProgressLines.said = time.monotonic()
            print(f"  {self.label}: {self.what} {self.done:,} of {self.total:,}", flush=True)

    def close(self) -> None:
        pass


class _LogLines(logging.Handler):
    """Print the errors that lm-eval logs, count its truncated prompts, and drop the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            print(text, file=sys.stderr, flush=True)
        elif "runcat" in text:  # "Left truncation applied", "Truncating 12 tokens from the left"
            self.cut += 1


LOG = _LogLines()
logging.getLogger("lm_eval").handlers = [LOG]
logging.getLogger("lm_eval").propagate = False
for _module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
    setattr(_module, "tqdm", ProgressLines)  # noqa: B010  (pyright: no such attribute in its stubs)
# lm-eval (0.4.13) compiles a task's template anew for every document and field: half of the time
# that a small model's score takes.
_TEMPLATES: Any = lm_eval.utils.env
_TEMPLATES.from_string = functools.lru_cache(256)(_TEMPLATES.from_string)
