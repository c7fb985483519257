"""This file is where lm-eval's own model class, progress bars and log are made to fit this project.

Importing it redirects the bars and the log of the lm_eval package, for the whole process.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
from lm_eval.models.huggingface import HFLM

# Tokens of context, whatever the model could hold: a wikitext page is one window of a model with
# 262,144 positions, and the logits of that window alone take gigabytes. Written into every score.
LONGEST = 4096
SECONDS_BETWEEN_LINES = 20.0


_HFLM: Any = HFLM  # its class decorator has no types


class Lm(_HFLM):
    """lm-eval's HFLM over a loaded model; its texts end where training's rollouts end."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, chat: bool) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype="float32",  # sums of bfloat16 log-probabilities would tie
            # A chat template writes its own BOS, or means to have none; lm-eval would add one.
            add_bos_token=False if chat else None,
        )
        of_config = model.config.eos_token_id
        ids = {*(of_config if isinstance(of_config, list) else [of_config]), tokenizer.eos_token_id}
        self.eos_ids = sorted(ids - {None})

    @property
    def max_length(self) -> int:
        return min(super().max_length, LONGEST)

    def _model_generate(
        self, context: Any, max_length: int, stop: list[str], **settings: Any
    ) -> Any:
        # A batch goes on until its last row is done; without these ids, what a row writes after its
        # own end (lm-eval drops the end itself from the text) would be read as part of its answer.
        settings["eos_token_id"] = self.eos_ids
        return super()._model_generate(context, max_length, stop, **settings)

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
