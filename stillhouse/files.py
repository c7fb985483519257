"""Write files atomically, and read JSON with errors that name the file.

A process may be killed at any moment, and two machines may write the same name on a shared volume:
a reader always finds one complete file. What a killed writer left is removed later.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

from stillhouse.errors import ConfigError, ContractError, NodeFault, Unwritable

Json = dict[str, Any]

LEFT_S = 3600.0  # a temporary file of this age has no writer any more
_LEFTOVER = re.compile(r"\..+\.(\d+|[0-9a-f]{16})\.tmp")
# Errors of a path itself. A full disk or a lost file server is another matter: those may pass.
_OF_THE_PATH = frozenset({
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
})  # fmt: skip


@contextlib.contextmanager
def explained_writing(path: Path, option: str = "") -> Generator[None, None, None]:
    """Turn an error that is the path's fault into the user's; `option` is what named the path.

    Raises:
        Unwritable: nothing can be written at the path.
        NodeFault: in a pod, its file system is read-only, as after an error of its node.
    """
    if "\0" in str(path):
        raise Unwritable(f"{option} {str(path)!r}: no path has a null character".lstrip())
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_PATH:
            raise
        why = error.strerror
        if error.errno == errno.EEXIST:
            why = f"{error.filename} is a file, or a link that leads nowhere"
        is_of_node = error.errno == errno.EROFS and os.environ.get("STILLHOUSE_IN_POD")
        raise (NodeFault if is_of_node else Unwritable)(
            f"{option} {path}: cannot be written ({why}); mend that, or name another place"
            " (--runs, --cache-dir, --output-dir)".lstrip()
        ) from error


def make_directory(path: Path, option: str = "") -> None:
    """Make a directory to write into, unless it is there; raises as `explained_writing`."""
    with explained_writing(path, option):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def check_directory(path: Path, option: str) -> None:
    """Refuse a path at which no directory is, and none can be made.

    Raises:
        ConfigError: it, or what is above it, is a file or a link that leads nowhere, or no name.
    """
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}; name a directory") from error
    except ValueError as error:  # a null character, which no path has
        raise ConfigError(f"{option} {str(path)!r}: {error}; name a directory") from error
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise ConfigError(
            f"{option} {path}: {there} is a file, or a link that leads nowhere; name a directory"
        )


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that a reader, or a crash, sees the old file or the new one.

    Raises:
        Unwritable, NodeFault: as `explained_writing`.
    """
    temporary = temporary_name(path)
    with explained_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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


def link_path(link: Path, run: Path) -> None:
    """Make a path lead to a run's directory; atomic, and a no-op if it does already.

    Raises:
        ContractError: something else is at that path, or it leads to another run.
        Unwritable, NodeFault: as `explained_writing`.
    """
    with explained_writing(link):
        if link.is_symlink():
            there = os.path.basename(os.readlink(link))
            if there == run.name:
                return
            raise ContractError(
                f"{link} already means {there}, this is {run.name}: another configuration."
                " Choose another name, or remove the link"
            )
        if link.exists():
            raise ContractError(f"{link} exists and is not a link to a run; choose another path")
        target = os.path.relpath(run.absolute(), link.parent.absolute())
        temporary = temporary_name(link)
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary.symlink_to(target)
        temporary.replace(link)


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
    except OSError as error:
        if error.errno not in _OF_THE_PATH:
            raise
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
