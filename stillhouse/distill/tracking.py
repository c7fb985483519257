"""This file is where metrics go: always to metrics.jsonl, to Weights & Biases when asked."""

from __future__ import annotations

import json
import math
from typing import Any

from stillhouse.rundir import Json, RunDir
from stillhouse.spec import TrainSpec, to_plain


class Tracker:
    """Appends one object per completed step; a step is in the file before the next one begins."""

    def __init__(self, spec: TrainSpec, run: RunDir, first_step: int) -> None:
        run.keep_metrics_before(first_step)
        self._file = run.metrics_file.open("a", encoding="utf-8")
        self._wandb = _wandb_run(spec, run) if spec.tracking.tracker == "wandb" else None

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


def _wandb_run(spec: TrainSpec, run: RunDir) -> Any:
    import wandb

    return wandb.init(
        project=spec.tracking.wandb_project,
        id=run.id,
        name=spec.place.name or run.path.name,
        group=spec.place.sweep,
        tags=list(spec.place.tags),
        config=to_plain(spec),
        dir=str(run.path),
        mode=spec.tracking.wandb_mode,
        resume="allow",
    )
