"""Run every benchmark and write the results, date and machine to docs/benchmarks.md.

`python benchmarks/run.py` runs all, `python benchmarks/run.py loss plan` runs those two. Ratios are
measured side by side in one run; absolute seconds apply to the machine that is named.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
TITLES = {
    "loss": "The loss: memory and time against the dense computation",
    "rollout": "A rollout: our engine against transformers' `generate`",
    "preflight": "A preflight: against a run of its pair",
    "plan": "The launcher: `--help` and `plan`",
    "local": "A point that does nothing, on the local backend",
    "teachers": "A teacher: behind one server, against one in each point",
    "rows": "A data set: encoded once, found after that",
    "quickstart": "`make quickstart` from a fresh clone",
}
BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"


def machine() -> str:
    """What the numbers were measured on, in a line."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB,"
        f" Python {platform.python_version()}"
    )


def main(names: list[str]) -> int:
    unknown = set(names) - TITLES.keys()
    if unknown:
        print(f"no benchmark {', '.join(sorted(unknown))}; there is {', '.join(TITLES)}")
        return 42
    for name in names or TITLES:
        print(f"{name} ...", flush=True)
        script = [sys.executable, HERE / f"{name}.py"]
        done = subprocess.run(script, text=True, stdout=subprocess.PIPE)
        print(done.stdout, flush=True)
        if done.returncode:  # it misses a limit: the page keeps what was measured before
            return done.returncode
        put(name, done.stdout.strip())
    return 0


def put(name: str, table: str, title: str | None = None, gpu: str = "no GPU used") -> None:
    """Replace one benchmark's section of the page, and leave the others as they were measured."""
    page = PAGE.read_text() if PAGE.exists() else "# Benchmarks\n\nMade by `make bench`.\n"
    begin, end = BEGIN.format(name), END.format(name)
    today = datetime.date.today().isoformat()
    section = (
        f"{begin}\n## {title or TITLES[name]}\n\n{today}, {machine()}, {gpu}.\n\n{table}\n{end}\n"
    )
    before, found, rest = page.partition(begin)
    after = rest.partition(end)[2].lstrip("\n") if found else ""
    PAGE.write_text(before.rstrip() + "\n\n" + section + ("\n" + after if after else ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
