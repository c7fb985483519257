"""Transfer files of runs from a volume to a laptop that does not mount it.

    python -m stillhouse.transfer hold SECONDS    keep a pod alive until SECONDS pass without a send
    python -m stillhouse.transfer send REQUEST    run in that pod by `exec`: a stream to stdout

A request is JSON, encoded as one word by `pack`:

    {"runs": root, "directories": [below root], "files": [glob patterns in each],
     "have": {directory: its state},       a directory whose `state` is unchanged is left out
     "largest": bytes, "most": bytes}      limits of the receiver: for one file, and for all

The stream is a gzipped tar of `directory/file`. Its last member is `manifest.json`, so that a
truncated stream has none:

    {"format": 1, "files": {"directory/file": {"sha256": …, "size": …}}, "unchanged": [directories],
     "missing": [directories], "names": {NAME: directory}}

Digests are of the bytes that were sent: a file may grow during the transfer, and only the bytes
that it had at the start are sent.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from stillhouse.errors import ConfigError, exit_code_of
from stillhouse.spec import NAME

Json = dict[str, Any]

FORMAT = 1
MANIFEST = "manifest.json"
# Of one stream: 200 directories of some ten files each, or adapters of a few GiB.
MOST_FILES, MOST_BYTES = 100_000, 64 << 30
MOST_MANIFEST = 64 << 20  # bytes; it is read as a whole
MOST_HEADER = 1 << 20  # bytes of a name and the like: tarfile reads each into memory
# A part of a member's name: what tasks, adapters' files and our own are called, never hidden.
PART = re.compile(r"(?!\.)[\w.,:=+@%~|()\[\] -]{1,200}")
SHOWN = 5  # names in an error
STOPS = (signal.SIGTERM, signal.SIGINT)


def pack(request: Json) -> str:
    """A request as one word; small, because it travels in a URL."""
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(request).encode(), 9)).decode()


def unpack(word: str) -> Json:
    """The request that `pack` encoded.

    Raises:
        ConfigError: the word is no encoded request.
    """
    try:
        return json.loads(zlib.decompress(base64.urlsafe_b64decode(word)))
    except (ValueError, zlib.error) as error:
        raise ConfigError(f"transfer send: a request that cannot be read: {error}") from error


def state(directory: Path, patterns: Sequence[str]) -> str:
    """16 hex digits over the names and contents of the files that the patterns match."""
    hasher = hashlib.sha256()
    for path in _matching(directory, patterns):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
            hasher.update(f"{path.relative_to(directory).as_posix()} {content}\n".encode())
    return hasher.hexdigest()[:16]


def _matching(directory: Path, patterns: Sequence[str]) -> list[Path]:
    found = {path for pattern in patterns for path in directory.glob(pattern)}
    # A hidden file is one that is being written.
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


# ---------------------------------------------------------------- in the pod


def hold(seconds: float) -> int:
    """Wait until so many seconds pass without a send, or until SIGTERM or SIGINT; 0."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    print(f"waiting for somebody to collect, at most {seconds:g} s", flush=True)
    used = time.time()
    while (left := used + seconds - time.time()) > 0:
        if signal.sigtimedwait(STOPS, left):
            break
        with contextlib.suppress(FileNotFoundError):
            used = max(used, _sent().stat().st_mtime)
    return 0


def _sent() -> Path:
    """Touched by each send, so that the pod stays."""
    return Path(tempfile.gettempdir()) / "stillhouse-sent"


def say_used() -> None:
    """Mark the pod as in use, so that `hold` keeps it alive."""
    _sent().touch()


def send(request: Json, out: io.BufferedIOBase) -> int:
    """Write what a request asks for; 0."""
    runs, patterns, have = Path(request["runs"]), request["files"], request.get("have", {})
    files: Json = {}
    unchanged: list[str] = []
    missing: list[str] = []
    with (
        gzip.GzipFile(fileobj=cast("Any", out), mode="wb", compresslevel=1, mtime=0) as zipped,
        tarfile.open(fileobj=cast("Any", zipped), mode="w|") as tar,
    ):
        for name in request["directories"]:
            say_used()
            if not (runs / name).is_dir():
                missing.append(name)
            elif name in have and have[name] == state(runs / name, patterns):
                unchanged.append(name)
            else:
                for path in _matching(runs / name, patterns):
                    member = path.relative_to(runs).as_posix()
                    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                        files[member] = _add(tar, member, file)
        manifest = {
            "format": FORMAT,
            "files": files,
            "unchanged": unchanged,
            "missing": missing,
            "names": _names(runs, {*request["directories"]}),
        }
        _add(tar, MANIFEST, io.BytesIO(json.dumps(manifest).encode()))
    return 0


def _names(runs: Path, directories: set[str]) -> dict[str, str]:
    links = [link for link in sorted((runs / "names").glob("*")) if link.is_symlink()]
    leads = {link.name: os.path.basename(os.readlink(link)) for link in links}
    return {name: to for name, to in leads.items() if to in directories}


class _Hashed:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: Any) -> None:
        self._file, self.hasher = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.hasher.update(data)
        return data


def _add(tar: tarfile.TarFile, name: str, file: io.BufferedIOBase) -> Json:
    info = tarfile.TarInfo(name)
    info.size = file.seek(0, os.SEEK_END)
    file.seek(0)
    hashed = _Hashed(file)
    tar.addfile(info, cast("Any", hashed))
    return {"sha256": hashed.hasher.hexdigest(), "size": info.size}


# ---------------------------------------------------------------- on the laptop


def receive(chunks: Iterable[bytes], into: Path, request: Json) -> Json:
    """Unpack what `send` wrote into an empty directory, and return its manifest.

    The stream is not trusted: anyone who can write to the volume, or pose as the pod, decides what
    is in it. So each name must match `request` and be made of plain letters, and counts
    and sizes have limits; all are checked before a file is written.

    Raises:
        ValueError: the stream was cut, or differs from its manifest or from the request; keep
            nothing of it.
    """
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=into) as file:  # /tmp may be memory, and adapters are large
        most = _most(request) + MOST_MANIFEST
        for chunk in chunks:
            if file.tell() + len(chunk) > most:
                raise ValueError(f"more than {most:,} bytes came; nothing asks for so much")
            file.write(chunk)
        file.seek(0)
        try:
            with (
                _Bounded(fileobj=cast("Any", file), mode="rb") as plain,
                tarfile.open(fileobj=plain, mode="r:") as tar,
            ):
                found = _extract(tar, into, request)
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise ValueError(f"the stream was cut: {error}") from error
    if MANIFEST not in found:
        raise ValueError("the stream was cut: it has no manifest")
    manifest = _manifest((into / MANIFEST).read_bytes(), request)
    (into / MANIFEST).unlink()
    del found[MANIFEST]
    if manifest["files"] != found:
        odd = [
            n for n in {**found, **manifest["files"]} if found.get(n) != manifest["files"].get(n)
        ]
        raise ValueError(f"what came is not what was sent: {', '.join(map(repr, odd[:SHOWN]))}")
    return manifest


def _most(request: Json) -> int:
    return min(request.get("most", MOST_BYTES), MOST_BYTES)


class _Bounded(gzip.GzipFile):
    """A gzipped tar that refuses headers too long to read into memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MOST_HEADER:
            raise ValueError(f"a member's header is longer than {MOST_HEADER:,} bytes")
        return super().read(size)


def _manifest(data: bytes, request: Json) -> Json:
    """A manifest, of which every name was checked."""
    try:
        manifest: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its manifest is not JSON ({error})") from error
    shape = {"format": int, "files": dict, "unchanged": list, "missing": list, "names": dict}
    found: Json = cast("Json", manifest) if isinstance(manifest, dict) else {}
    if any(not isinstance(found.get(key), kind) for key, kind in shape.items()):
        raise ValueError(f"its manifest is no object of {', '.join(shape)}")
    if found["format"] != FORMAT:
        raise ValueError(f"its manifest has format {found['format']}, this version reads {FORMAT}")
    directories = request["directories"]
    for name in (*found["unchanged"], *found["missing"], *found["names"].values()):
        if name not in directories:
            raise ValueError(f"directory {name!r} was not asked for")
    for name in found["names"]:
        if re.fullmatch(NAME, name) is None:
            raise ValueError(f"{name!r} is no name of a run")
    return found


def _is_requested(name: str, request: Json) -> bool:
    """Whether a member is a plain file of a directory and a pattern that were asked for."""
    for directory in request["directories"]:
        if not name.startswith(f"{directory}/"):
            continue
        parts = name[len(directory) + 1 :].split("/")
        for pattern in request["files"]:
            wanted = pattern.split("/")
            if len(wanted) == len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                return all(map(PART.fullmatch, parts))
    return False


def _extract(tar: tarfile.TarFile, into: Path, request: Json) -> Json:
    found: Json = {}
    size = 0
    for member in tar:
        name = member.name
        is_plain = member.isfile() and not member.issparse() and name not in found
        if not is_plain or not (name == MANIFEST or _is_requested(name, request)):
            raise ValueError(f"{name[:200]!r}: not a plain file that was asked for")
        largest = MOST_MANIFEST if name == MANIFEST else request.get("largest", MOST_BYTES)
        size += member.size if name != MANIFEST else 0
        if member.size > largest or size > _most(request) or len(found) >= MOST_FILES:
            raise ValueError(
                f"{name!r}: more than {MOST_FILES:,} files, {largest:,} bytes of this or"
                f" {_most(request):,} of all; nothing asks for so much"
            )
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = _Hashed(tar.extractfile(member))
        with path.open("wb") as file:
            shutil.copyfileobj(content, file)
        found[name] = {"sha256": content.hasher.hexdigest(), "size": member.size}
    return found


def main(words: list[str]) -> int:
    """The exit code of this file as a program."""
    if len(words) != 2 or words[0] not in ("hold", "send"):
        raise ConfigError("transfer: `hold SECONDS` or `send REQUEST`")
    if words[0] == "hold":
        return hold(float(words[1]))
    return send(unpack(words[1]), cast("io.BufferedIOBase", sys.stdout.buffer))


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
