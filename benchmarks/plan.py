"""Time the launcher's start-up: whole processes, as a user waits for them.

    python benchmarks/plan.py        prints a Markdown table; median and range of five runs each

All 10,000 points of the grid are composed and checked; Hydra alone takes about 12 minutes for it.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = 5
TWENTY = ["pair=tiny", "lmbda=0,0.5", "beta=0,1", "seeds=5"]
TENTHS = ",".join(str(i / 10) for i in range(10))
TEN_THOUSAND = [
    "pair=tiny",
    f"learning_rate={','.join(f'{i}e-5' for i in range(1, 11))}",
    f"beta={TENTHS}",
    f"lmbda={TENTHS}",
    "seeds=10",
]


def row(name: str, limit_s: float, *words: str) -> str:
    """A table row: RUNS processes of the launcher, after one that fills the file cache."""
    wall: list[float] = []
    processor: list[float] = []
    for _ in range(RUNS + 1):
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "stillhouse", *words], cwd=ROOT, capture_output=True, text=True
        )
        wall.append(time.perf_counter() - begin)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode:
            sys.exit(f"stillhouse {' '.join(words)} ended with {done.returncode}: {done.stderr}")
    middle, low, high = statistics.median(wall[1:]), min(wall[1:]), max(wall[1:])
    used = statistics.median(processor[1:])
    return f"| {name} | {middle:.2f} | {low:.2f}–{high:.2f} | {used:.2f} | {limit_s} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as runs:
        rows = [
            row("`stillhouse --help`", 1, "--help"),
            row("`plan` of 20 points", 1, "plan", *TWENTY, "--runs", runs),
            row("`plan` of 10,000 points", 5, "plan", *TEN_THOUSAND, "--runs", runs),
        ]
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, load average"
        f" {os.getloadavg()[0]:.1f} at the end (wall far above processor time: others ran too).\n"
    )
    print(f"| whole process | median of {RUNS}, s | range, s | processor, s | limit, s |")
    print("|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
