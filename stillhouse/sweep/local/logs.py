"""Print the logs of points on this machine: one log whole, or the ends of several."""

from __future__ import annotations

import time
from pathlib import Path

from stillhouse.sweep.registry import Roster, log_file
from stillhouse.sweep.show import SHOWN, TAIL_LINES
from stillhouse.sweep.snapshot import Observations, observe
from stillhouse.sweep.state import FAILED
from stillhouse.text import say

FOLLOW_S = 0.3  # how often a followed log is looked at


def show(rows: Roster, observations: Observations, follows: bool) -> bool:
    """Print the logs, and if it `follows` what comes until the points end; whether there was any.

    Of several points, those at work and those that failed are shown, and the sweep's own log.
    """
    shown: dict[Path, int] = {}
    while True:
        for title, path in _of_interest(rows, observations):
            _show_new(title, path, shown, len(rows.rows) == 1)
        states = {seen.state for seen in observations.values()}
        if not follows or not states & {"new", "waiting", "running"}:
            return bool(shown)
        time.sleep(FOLLOW_S)
        observations = observe(rows)


def texts(rows: Roster, observations: Observations) -> dict[str, str]:
    """The logs by point's id: whole where it is one point, else the ends of those that matter."""
    ids = {rows.run(row.id).log_file: row.id for row in rows.rows}
    found: dict[str, str] = {}
    for _, path in _of_interest(rows, observations):
        if path in ids and path.is_file():
            lines = path.read_text(errors="replace").splitlines()
            found[ids[path]] = "\n".join(lines if len(rows.rows) == 1 else lines[-TAIL_LINES:])
    return found


def _of_interest(rows: Roster, observations: Observations) -> list[tuple[str, Path]]:
    if len(rows.rows) == 1:
        return [(str(rows.rows[0]), rows.run(rows.rows[0].id).log_file)]
    at_work = [row for row in rows.rows if observations[row.id].state in ("running", *FAILED)]
    found = [(str(row), rows.run(row.id).log_file) for row in at_work[-SHOWN:]]
    return [*found, (f"{rows.name}: pairs and scores", log_file(rows.runs, rows.name))]


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
