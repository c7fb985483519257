"""Count lines of Python per package, blank lines and comments included: `python tools/lines.py`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = (
    "stillhouse",
    "stillhouse/distill",
    "stillhouse/evals",
    "stillhouse/sweep",
    "stillhouse/results",
    "tests",
    "tests/cluster",
)


def tracked() -> list[Path]:
    """The Python files that git tracks, relative to the root."""
    said = subprocess.run(
        ["git", "ls-files", "-z", "*.py"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [Path(name) for name in said.stdout.split("\0") if name]


def count(files: Iterable[Path]) -> int:
    return sum(len((ROOT / file).read_bytes().splitlines()) for file in files)


def table(files: list[Path]) -> list[str]:
    """A line for each of ROOMS: its lines, its files, and its longest file."""
    rows = [f"{'':20} {'lines':>7} {'files':>6}  longest"]
    for room in ROOMS:
        inside = [file for file in files if file.is_relative_to(room)]
        longest = max(inside, key=lambda file: count([file]))
        rows.append(
            f"{room:20} {count(inside):7,} {len(inside):6}  {longest.name} {count([longest])}"
        )
    return rows


if __name__ == "__main__":
    print("\n".join(table(tracked())))
