"""Compute digests of files, which show whether their content has changed.

A digest is the file's sha256. For weights above WHOLE bytes it is the sha256 of a sample: the size,
the header with every tensor's name, type, shape and offsets, BLOCKS blocks spread over the file,
and one block in the middle of each tensor. Training, merging, quantizing or converting a model
changes all of these blocks. A sample can miss a deliberate edit that changes some numbers of a
tensor but not its middle. Nobody does that by mistake, and reading 60 GB before each run would cost
minutes.

A file is not read again while its path, size, inode and both times are the same: its digest is then
taken from a small file in the cache. Without that file, the digest is computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

from stillhouse.errors import ContractError, Unwritable
from stillhouse.identity import digest
from stillhouse.rundir import Json, file_digest, read_json, sweep_leftovers, write_json

WHOLE = 2**28  # bytes of a weights file up to which all of it is read: half a second
REMEMBERED = 2**22  # bytes from which a digest is kept in the cache
BLOCK = 4096
BLOCKS = 64
TENSORS = 1024  # at most so many tensors of a file are sampled, spread over it
LARGEST_HEADER = 10**8  # bytes; safetensors refuses longer ones
SETTLED_S = 2  # a file written so lately may be written again within one tick of its clock
# They differ between versions of transformers, and do not affect what the model computes.
SAID_BY_THE_WAY = ("transformers_version", "_name_or_path")


def of_weights(directory: Path, cache_dir: Path) -> str:
    """One digest of all safetensors files of a directory, by name."""
    files = sorted(directory.glob("*.safetensors"))
    return digest({file.name: of_file(file, cache_dir, samples=True) for file in files})


def of_rows(files: Iterable[Path], cache_dir: Path) -> str:
    """One digest of files of rows, in their order, whatever they are called."""
    hasher = hashlib.sha256()
    for file in files:
        hasher.update(bytes.fromhex(of_file(file, cache_dir)))
    return hasher.hexdigest()


def of_settings(files: Iterable[Path], cache_dir: Path) -> str:
    """One digest of small files by name; for JSON the content counts, not the formatting.

    For a file that cannot be read as JSON, its bytes count.
    """
    return digest({file.name: _content(file, cache_dir) for file in files})


def _content(file: Path, cache_dir: Path) -> Any:
    if file.suffix != ".json" or file.stat().st_size >= REMEMBERED:
        return of_file(file, cache_dir)
    try:
        content: Any = json.loads(file.read_bytes())
        if isinstance(content, dict):
            kept = cast("Json", content).items()
            content = {key: value for key, value in kept if key not in SAID_BY_THE_WAY}
        return digest(content)
    except (ValueError, RecursionError):
        return of_file(file, cache_dir)


def of_file(file: Path, cache_dir: Path, samples: bool = False) -> str:
    """A file's sha256 in hex; if it `samples` and is large, "sampled-" and a sample's.

    Raises OSError where it cannot be read.
    """
    is_sampled = samples and file.stat().st_size > WHOLE
    if file.stat().st_size < REMEMBERED:
        return file_digest(file)
    memory = cache_dir / "fingerprints" / f"{digest([str(file.resolve()), is_sampled])[:16]}.json"
    before = _identity(file)
    if (known := _remembered(memory, before)) is not None:
        return known
    found = f"sampled-{_sample(file)}" if is_sampled else file_digest(file)
    is_settled = max(file.stat().st_mtime, file.stat().st_ctime) < time.time() - SETTLED_S
    if is_settled and _identity(file) == before:
        # A cache that cannot be written is no cache.
        with contextlib.suppress(OSError, Unwritable):
            sweep_leftovers(memory.parent)
            write_json(memory, {"identity": before, "digest": found})
    return found


def _identity(file: Path) -> list[Any]:
    stat = file.stat()
    times = [stat.st_mtime_ns, stat.st_ctime_ns]
    return [str(file.resolve()), stat.st_size, stat.st_ino, *times]


def _remembered(memory: Path, identity: list[Any]) -> str | None:
    try:
        known = read_json(memory)
    except (ContractError, OSError):
        return None
    if known is None or known.get("identity") != identity:
        return None
    found = known.get("digest")
    return found if isinstance(found, str) else None


def _sample(file: Path) -> str:
    size = file.stat().st_size
    hasher = hashlib.sha256(f"{size} ".encode())
    with file.open("rb", buffering=0) as opened:
        header = _header(opened, size)
        hasher.update(header)
        for start in sorted({*_spread(size), *_middles(header, size)}):
            hasher.update(os.pread(opened.fileno(), BLOCK, start))
    return hasher.hexdigest()


def _header(opened: BinaryIO, size: int) -> bytes:
    """A safetensors file's header; b"" of a file that has none."""
    length = int.from_bytes(os.pread(opened.fileno(), 8, 0), "little")
    return os.pread(opened.fileno(), length, 8) if length < min(size, LARGEST_HEADER) else b""


def _spread(size: int) -> list[int]:
    """Where blocks begin that lie evenly over a file, its first and its last bytes among them."""
    return [index * (size - BLOCK) // (BLOCKS - 1) for index in range(BLOCKS)]


def _middles(header: bytes, size: int) -> list[int]:
    """Where a block begins in the middle of each tensor."""
    try:
        entries = cast("dict[str, Json]", json.loads(header or b"{}"))
        ends = sorted(tuple(e["data_offsets"]) for k, e in entries.items() if k != "__metadata__")
        middles = [8 + len(header) + (first + end) // 2 for first, end in ends]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    step = -(-len(middles) // TENSORS) or 1
    return [middle for middle in middles[::step] if 0 <= middle < size]
