"""Log metrics: always to metrics.jsonl, and to Weights & Biases if requested."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

from stillhouse.errors import visible
from stillhouse.identity import to_plain
from stillhouse.rundir import Json, RunDir
from stillhouse.spec import TrainSpec

DELETED = "previously created and deleted"  # W&B's message for an id that it no longer accepts
TRIES = 5  # ids


class Tracker:
    """Appends one object per completed step; a step is in the file before the next one begins."""

    def __init__(self, spec: TrainSpec, run: RunDir, first_step: int) -> None:
        run.keep_metrics_before(first_step)
        self._file = run.metrics_file.open("a", encoding="utf-8")
        self._wandb = _Wandb(spec, run) if spec.tracking.tracker == "wandb" else None

    def log(self, metrics: Json) -> None:
        """Write one step."""
        self._file.write(json.dumps(finite(metrics)) + "\n")
        self._file.flush()
        if self._wandb is not None:
            known = {k: v for k, v in metrics.items() if v is not None}
            self._wandb.log(known, step=int(metrics["step"]))

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def finite(metrics: Json) -> Json:
    """The metrics with null for what is not finite: neither NaN nor infinity is JSON."""
    return {k: None if v is None or not math.isfinite(v) else v for k, v in metrics.items()}


class _Wandb:
    """Copies the metrics to Weights & Biases. Any failure there gives a warning and stops the
    copying: metrics.jsonl has every step, and training continues."""

    def __init__(self, spec: TrainSpec, run: RunDir) -> None:
        self._run: Any = None
        with self._warned("start"):
            self._run = _started(spec, run)

    def log(self, metrics: Json, step: int) -> None:
        if self._run is not None:
            with self._warned("log"):
                self._run.log(metrics, step=step)

    def finish(self) -> None:
        if self._run is not None:
            with self._warned("finish"):
                self._run.finish()

    @contextlib.contextmanager
    def _warned(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of library, network, or service: it must not end the run
            self._run = None
            why = visible(str(error).strip().partition("\n")[0])
            print(
                f"warning: W&B did not {doing} ({type(error).__name__}: {why}); training goes on"
                " without it, and metrics.jsonl has every step",
                flush=True,
            )


def _started(spec: TrainSpec, run: RunDir) -> Any:
    """The run at W&B. Ids are hashes of content, so a run that was deleted there has the same id
    again, which W&B does not accept twice: the id then gets a suffix."""
    import wandb

    for number in range(1, TRIES + 1):
        try:
            return wandb.init(
                project=spec.tracking.wandb_project,
                id=run.id if number == 1 else f"{run.id}-{number}",
                name=spec.place.name or run.path.name,
                group=spec.place.sweep,
                tags=list(spec.place.tags),
                config=to_plain(spec),
                dir=str(run.path),
                mode=spec.tracking.wandb_mode,
                resume="allow",
            )
        except Exception as error:
            if number == TRIES or DELETED not in str(error):
                raise
    raise AssertionError("the last turn returns or raises")
