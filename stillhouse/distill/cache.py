"""Make, measure, or check something once, and let later processes find the result.

A result is complete before it gets its final name: directories are renamed into place, files are
written atomically.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stillhouse.errors import ContractError
from stillhouse.file_formats import MADE, checked
from stillhouse.identity import digest
from stillhouse.rundir import (
    Json,
    make_directory,
    publish,
    read_json,
    sweep_leftovers,
    temporary_name,
    write_json,
)

Say = Callable[[str], None]


def made_once(home: Path, say: Say, make: Callable[[Path], Json]) -> Json:
    """What `make` returned when it filled the directory `home`, now or in an earlier process.

    `make` gets an empty directory that becomes `home` when it has returned. If several processes
    call this, one runs `make`; the others wait and log that.
    Raises ContractError if a file that was made is gone or has another size.
    """
    if (done := _whole(home)) is not None:
        return done
    with alone(home.with_name(f"{home.name}.lock"), say):
        if (done := _whole(home)) is not None:
            return done
        sweep_leftovers(home.parent)
        temporary = temporary_name(home)
        temporary.mkdir()
        try:
            facts = make(temporary)
            files = {
                str(f.relative_to(temporary)): f.stat().st_size
                for f in sorted(temporary.rglob("*"))
                if f.is_file()
            }
            write_json(temporary / "made.json", {"facts": facts, "files": files})
            publish(temporary, home)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return dict(facts)


@contextlib.contextmanager
def alone(lock_file: Path, say: Say) -> Iterator[None]:
    """Hold a lock; a process that has to wait for it logs that."""
    make_directory(lock_file.parent)
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another process is preparing it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _whole(home: Path) -> Json | None:
    made = read_json(home / "made.json")
    if made is None:
        return None
    checked(made, MADE, home / "made.json", f"remove {home} and run again")
    for name, size in made["files"].items():
        if not (home / name).is_file() or (home / name).stat().st_size != size:
            raise ContractError(
                f"{home / name} is missing or was changed; remove {home} and run again"
            )
    return made["facts"]


def remembered(
    cache_dir: Path, content: Any, compute: Callable[[], Json], **kinds: type[Any]
) -> Json:
    """What `compute` returned for this content, now or in an earlier process; kept as JSON.

    Raises:
        ContractError: what was kept has not these fields of these `kinds`.
    """
    file = cache_dir / "facts" / f"{digest(content)[:16]}.json"
    facts = read_json(file)
    if facts is None:
        facts = compute()
        sweep_leftovers(file.parent)
        write_json(file, facts)
    for name, kind in kinds.items():
        if not isinstance(facts.get(name), kind):
            raise ContractError(f"{file}: {name}: no {kind.__name__}; remove it and run again")
    return facts


def fingerprint(directory: Path) -> list[list[Any]]:
    """Name, size, and time of each file: shows whether files changed, without reading them."""
    files = sorted(f for f in directory.iterdir() if f.is_file())
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
