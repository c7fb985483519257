"""Print the logs of points on this machine: one log whole, or the ends of several."""

from __future__ import annotations

import time
from pathlib import Path

from stillhouse.sweep.points import Sweep
from stillhouse.sweep.registry import log_file
from stillhouse.sweep.show import SHOWN, TAIL_LINES
from stillhouse.sweep.snapshot import Observations, observe
from stillhouse.sweep.state import FAILED
from stillhouse.text import say

FOLLOW_S = 0.3  # how often a followed log is looked at


def show(sweep: Sweep, observations: Observations, follows: bool) -> bool:
    """Print the logs, and if it `follows` what comes until the points end; whether there was any.

    Of several points, those at work and those that failed are shown, and the sweep's own log.
    """
    shown: dict[Path, int] = {}
    while True:
        for title, path in _of_interest(sweep, observations):
            _show_new(title, path, shown, len(sweep.points) == 1)
        states = {seen.state for seen in observations.values()}
        if not follows or not states & {"new", "waiting", "running"}:
            return bool(shown)
        time.sleep(FOLLOW_S)
        observations = observe(sweep)


def texts(sweep: Sweep, observations: Observations) -> dict[str, str]:
    """The logs by point's id: whole where it is one point, else the ends of those that matter."""
    ids = {sweep.run(point.id).log_file: point.id for point in sweep.points}
    found: dict[str, str] = {}
    for _, path in _of_interest(sweep, observations):
        if path in ids and path.is_file():
            lines = path.read_text(errors="replace").splitlines()
            found[ids[path]] = "\n".join(lines if len(sweep.points) == 1 else lines[-TAIL_LINES:])
    return found


def _of_interest(sweep: Sweep, observations: Observations) -> list[tuple[str, Path]]:
    if len(sweep.points) == 1:
        return [(str(sweep.points[0]), sweep.run(sweep.points[0].id).log_file)]
    at_work = [
        point for point in sweep.points if observations[point.id].state in ("running", *FAILED)
    ]
    found = [(str(point), sweep.run(point.id).log_file) for point in at_work[-SHOWN:]]
    return [*found, (f"{sweep.name}: pairs and scores", log_file(sweep.runs, sweep.name))]


def _show_new(title: str, path: Path, shown: dict[Path, int], is_single: bool) -> None:
    """Print what a log has that was not shown yet, under its name where there are several."""
    if not path.is_file() or path.stat().st_size == shown.get(path, 0):
        return
    with path.open("rb") as file:
        file.seek(shown.get(path, 0))
        new = file.read()
    lines = new.decode(errors="replace").splitlines()
    if not is_single:
        say(f"==> {title} <==")
        lines = lines if path in shown else lines[-TAIL_LINES:]
    say("\n".join(lines), flush=True)
    shown[path] = shown.get(path, 0) + len(new)
