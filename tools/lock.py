#!/usr/bin/env python3
"""Remove the address of a package index from uv.lock, and restore it.

The committed uv.lock holds versions, file names and hashes, and no host, so any index that serves
the same files can install it (docs/decisions/0001-host-free-lock.md). Standard library and uv only.

    lock.py strip [FILE]   print FILE (or standard input) without hosts; twice is the same as once
    lock.py write          strip ./uv.lock in place, before `git add uv.lock`
    lock.py setup          let git do that in this clone: a clean filter (see .gitattributes)
    lock.py check          fail unless the staged uv.lock is host-free and ./uv.lock pins the same
    lock.py restore        put this machine's index into ./uv.lock and prove every hash against it;
                           `uv sync --frozen` then installs what is locked and nothing else
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

Pins = set[tuple[str, ...]]
LOCK = Path("uv.lock")
INDEX = 'registry = "index"'  # a relative name: no machine has a folder of it, so it points nowhere
REGISTRY = re.compile(r'\bregistry = "[a-z+]+://[^"]+"')
FILE_URL = re.compile(r'\burl = "[a-z+]+://[^"]*?([^"/?#]+)(?:[?#][^"]*)?"')
SHOWN = 10  # differences printed; a lock of another project would print thousands


class Refused(Exception):
    """The lock is not what it must be; the text says what to do."""


def strip(text: str) -> str:
    """The lock's text without hosts: an index becomes a name, a file's address its file name."""
    return REGISTRY.sub(INDEX, FILE_URL.sub(r'path = "\1"', text))


def pins(text: str) -> Pins:
    """What an install depends on: each package's version, each file's hash, and what we ask for.

    Order, markers and layout are left out: they may change from one release of uv to the next.
    """
    import tomllib  # here, because `strip` runs as a git filter under whichever python3 there is

    found: Pins = set()
    for package in tomllib.loads(strip(text))["package"]:
        found.add(("package", package["name"], package.get("version", "")))
        files = package.get("wheels", []) + [f for f in [package.get("sdist")] if f]
        found |= {("file", file["path"], file["hash"]) for file in files}
        metadata = package.get("metadata", {})  # only our own package has it
        groups = {"": metadata.get("requires-dist", []), **metadata.get("requires-dev", {})}
        for group, wants in groups.items():
            found |= {("pyproject", group, json.dumps(w, sort_keys=True)) for w in wants}
    return found


def differences(before: Pins, after: Pins) -> list[str]:
    """One line per pin that only one of the two has (the first SHOWN); empty if they are equal."""
    changed = sorted(before ^ after)
    lines = [f"  {'-' if pin in before else '+'} {' '.join(pin)}" for pin in changed[:SHOWN]]
    rest = len(changed) - SHOWN
    return lines + ([f"  and {rest} more"] if rest > 0 else [])


def without_new_files(text: str, known: Pins) -> str:
    """The lock without files that `known` lacks: wheels uploaded to an old release since."""
    names = {pin[1] for pin in known if pin[0] == "file"}

    def is_new(line: str) -> bool:
        file = FILE_URL.search(line)
        holds_file = line.startswith(("    { url = ", "sdist = { url = "))
        return holds_file and file is not None and file.group(1) not in names

    return "".join(line for line in text.splitlines(keepends=True) if not is_new(line))


def staged() -> str:
    """The uv.lock that git would commit now."""
    shown = subprocess.run(["git", "show", ":./uv.lock"], capture_output=True, text=True)
    if shown.returncode:
        raise Refused(f"git knows no uv.lock here ({shown.stderr.strip()}); git add uv.lock")
    return shown.stdout


def check() -> None:
    """Hold ./uv.lock against the staged one.

    Raises:
        Refused: the staged lock names a host, or the two pin different things.
    """
    want = staged()
    if "://" in want:
        raise Refused("the staged uv.lock names a host; lock.py write, then git add uv.lock")
    changed = differences(pins(want), pins(LOCK.read_text()))
    if changed:
        head = "uv.lock pins other things than the staged one (- staged, + here):"
        cure = "If that is wanted, git add uv.lock; if not, git checkout uv.lock."
        raise Refused("\n".join([head, *changed, cure]))


def restore() -> None:
    """Let uv write hosts into ./uv.lock; what is then installed is what the lock pinned before.

    Raises:
        Refused: the index serves another hash or version, or pyproject.toml asks for more than is
            locked. ./uv.lock is then host-free and otherwise as it was.
    """
    bare = strip(LOCK.read_text())
    want = pins(bare)
    beside = Path(sys.executable).parent  # the environment's own uv first: make and CI pin that one
    uv = shutil.which("uv", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv is None:
        raise Refused(f"no uv beside {sys.executable} or on PATH; pip install uv")
    LOCK.write_text(bare)
    try:
        if subprocess.run([uv, "lock", "--quiet"]).returncode:
            raise Refused("uv could not lock against this machine's index; its words are above")
        LOCK.write_text(without_new_files(LOCK.read_text(), want))
        changed = differences(want, pins(LOCK.read_text()))
        if changed:
            head = "this machine's index does not serve what uv.lock pins (- locked, + served):"
            cure = (
                "If pyproject.toml changed: uv lock, then git add uv.lock. If not, ask who runs the"
                " index; plain `uv sync` would install what it serves, unproven."
            )
            raise Refused("\n".join([head, *changed, cure]))
    except BaseException:
        LOCK.write_text(bare)
        raise


def main(argv: list[str]) -> int:
    """0 when done, 1 when refused, 2 when asked for nothing we know."""
    verb, *rest = argv or [""]
    try:
        if verb == "strip" and len(rest) <= 1:
            raw = Path(rest[0]).read_bytes() if rest else sys.stdin.buffer.read()
            sys.stdout.buffer.write(strip(raw.decode()).encode())
        elif verb == "write" and not rest:
            LOCK.write_text(strip(LOCK.read_text()))
        elif verb == "setup" and not rest:
            clean = ["git", "config", "filter.hostfree.clean", "python3 tools/lock.py strip"]
            subprocess.run(clean, check=True)
        elif verb == "check" and not rest:
            check()
        elif verb == "restore" and not rest:
            restore()
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except Refused as error:
        print(f"lock.py {verb}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
