"""Render Jobs of points, and take apart what was rendered."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from stillhouse.compose import Overrides, k8s_dir
from stillhouse.rundir import Json
from stillhouse.spec import SiteSpec
from stillhouse.sweep.cluster.jobspec import JobSpec
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Point, Sweep

CODE = "0123456789abcdef-01234567"
PATTERN = (k8s_dir() / "job.yaml").read_text()
PREFLIGHT = Overrides({"pair": "tiny"}, {"loss.beta": 0})


def typed(line: str) -> Sweep:
    return load_sweep(None, shlex.split(line), Path("runs"), site="cluster")


def tiny(line: str = "") -> tuple[Point, Sweep]:
    sweep = typed(f"pair=tiny owner=ada {line}")
    return sweep.points[0], sweep


def rendered(step: JobSpec, site: SiteSpec) -> Json:
    return render(step, site, CODE)


def container(job: Json) -> Json:
    (main,) = job["spec"]["template"]["spec"]["containers"]
    return main


def unscored(sweep: Sweep) -> Sweep:
    return dataclasses.replace(sweep, suite=None)


def spec_in(job: Json) -> str:
    """The spec as its pod reads it."""
    *_, flag, text = container(job)["args"]
    assert flag == "--spec"
    return text.replace("$$", "$")


def environment(job: Json) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container(job)["env"]}
