"""Provide `stillhouse.load("quickstart")`; importing the package loads no other library."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

__all__ = ["load"]


def load(sweep_name: str, runs: str | Path = "runs") -> pd.DataFrame:
    """One row per (point, task) of a sweep, baselines too: see `stillhouse.results.table.load`."""
    from stillhouse.results.table import load as load_frame

    return load_frame(sweep_name, runs)
