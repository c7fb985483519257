"""Write files atomically, and read JSON with errors that name the file.

A process may be killed at any moment, and two machines may write the same name on a shared volume:
a reader always finds one complete file. What a killed writer left is removed later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from stillhouse.errors import ContractError

Json = dict[str, Any]

LEFT_S = 3600.0  # a temporary file of this age has no writer any more
_LEFTOVER = re.compile(r"\..+\.(\d+|[0-9a-f]{16})\.tmp")


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that a reader, or a crash, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else has: on a shared volume two pods have one pid."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def sweep_leftovers(directory: Path) -> None:
    """Remove the temporary files that killed writers left in a directory.

    An entry that was written to in the last hour, at any depth, may still have a writer and stays.
    Both times are the file server's, so the clock of another machine does not matter.
    """
    if not directory.is_dir():
        return
    found = [entry for entry in directory.glob(".*.tmp") if _LEFTOVER.fullmatch(entry.name)]
    if not found:
        return
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".", suffix=".now") as mark:
        now_there = os.stat(mark.name).st_mtime
    for entry in found:
        with contextlib.suppress(FileNotFoundError):
            if now_there - _last_written(entry) < LEFT_S:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()


def _last_written(entry: Path) -> float:
    """When anything was last written at or below a path; writing a large file advances its time."""
    inside = entry.rglob("*") if entry.is_dir() and not entry.is_symlink() else ()
    return max(path.lstat().st_mtime for path in (entry, *inside))


def write_json(path: Path, content: Any) -> None:
    """Write JSON-able content atomically; NaN is not JSON and is refused."""
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Json | None:
    """The object in a JSON file, or None where there is no file.

    Raises:
        ContractError: the file is there and is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    # A directory in its place, or no permission to read. Other errors may pass by themselves.
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise ContractError(f"{path}: cannot be read ({error.strerror}); mend that") from error
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{path}: not JSON ({error}); move it away and run again") from error
    if not isinstance(content, dict):
        raise ContractError(f"{path}: holds no JSON object; move it away and run again")
    return cast("Json", content)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """fsync every file below `path` and the directory, so that a rename publishes all of it."""
    for entry in [*path.rglob("*"), path]:
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish(temporary: Path, final: Path) -> None:
    """Make a finished directory visible under its name in one step, replacing what was there."""
    sync_directory(temporary)
    if final.exists():
        old = temporary_name(final)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)
