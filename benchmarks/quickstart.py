"""Time `make quickstart` as for a new user: a fresh clone, nothing prepared, packages cached.

The second run in the same clone must find nothing left to do.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def timed(clone: Path) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(
        ["make", "quickstart"], cwd=clone, text=True, capture_output=True, stdin=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        sys.exit(done.returncode)
    return seconds, done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        clone = Path(directory) / "stillhouse"
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
        first, _ = timed(clone)
        second, said = timed(clone)
        table = (clone / "runs/reports/quickstart/table.md").read_text()
    assert "nothing left to do" in said, said
    print("| | seconds | limit |")
    print("|---|---|---|")
    print(f"| first time, environment included | {first:.0f} | 420 |")
    print(f"| second time | {second:.1f} | 15 |")
    print(f"\nWhat it ended in:\n\n{first_table(table)}")


def first_table(page: str) -> str:
    """The first Markdown table of a page."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join(lines[start:end])


if __name__ == "__main__":
    main()
