"""This file is where lm-eval's own model class, progress bars and log are made to fit this project.

Importing it redirects the bars and the log of the lm_eval package, for the whole process.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
from lm_eval.models.huggingface import HFLM

from stillhouse.distill.chat import Chat, Skip
from stillhouse.errors import ConfigError

# Tokens of context, whatever the model could hold: a wikitext page is one window of a model with
# 262,144 positions, and the logits of that window alone take gigabytes. Written into every score.
LONGEST = 4096
SECONDS_BETWEEN_LINES = 20.0


_HFLM: Any = HFLM  # its class decorator has no types


class Lm(_HFLM):
    """lm-eval's HFLM over a loaded model; its texts end where training's rollouts end."""

    def __init__(self, model: Any, chat: Chat, batch_size: int, is_chat: bool) -> None:
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
        # A batch goes on until its last row is done; without these ids, what a row writes after its
        # own end would be read as part of its answer.
        settings["eos_token_id"] = self.chat.stop_ids
        ids_BT = super()._model_generate(context, max_length, stop, **settings)
        # The end itself is no part of it either, and lm-eval drops what is special alone.
        new_BC = ids_BT[:, context.shape[1] :]
        is_end_BC: Any = sum(new_BC == id_ for id_ in self.chat.stop_ids)
        has_ended_BC = is_end_BC.cumsum(1) > 0
        new_BC[has_ended_BC] = self.tokenizer.pad_token_id
        return ids_BT

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Turns as training writes them; without a generation prompt, the last one is begun."""
        try:
            if add_generation_prompt:
                return self.chat.render(chat_history).prompt
            return self.chat.continued(chat_history)
        except Skip as refusal:
            asked = [turn for turn in chat_history if turn["role"] != "system"]
            if len(asked) == len(chat_history):
                raise ConfigError(f"a task has {refusal} ({refusal.seen})") from refusal
            # As lm-eval does, and the published scores of such models with it.
            self.left_out += 1
            return self.apply_chat_template(asked, add_generation_prompt)

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


class ProgressLines:
    """Stands where lm-eval puts a progress bar: a plain line now and then, calm in any log."""

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
        """What the next lines are about; the first comes some seconds from now, if at all."""
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
    """Of what lm-eval logs, errors are shown and cut prompts are counted; no more."""

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
