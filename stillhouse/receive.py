"""Receive files from a laptop on a cluster's volume: the pod's half of `stillhouse push`.

    python -m stillhouse.receive REQUEST    run in a pod by `exec`: reads stdin, writes one JSON

A request is one word (`transfer.pack`). `root` is a directory of the volume; `name` is the name of
what is pushed, as LABEL-DIGEST. The end of stdin is not reliable, so each request says how much
follows:

    {"root", "name", "do": "ask", "bytes": n}     n bytes: the list, {file: {"size", "sha256"}}
    {"root", "name", "do": "add", "pieces": n}    n times {"file": index in the list, "at", "size"},
                                                  a line each, followed by `size` bytes
    {"root", "name", "do": "finish"}              all has come: move it to its final path, by rename

The answer says how many bytes of each file have come, so that an interrupted push can resume. All
bytes of a file are counted only once its digest was right; -1 means an empty file that did not
come:

    {"format": 1, "is_there": whether it is at its final path, "have": [bytes], "spoilt": [indices
     in the list of files that came with a wrong digest], "free": bytes}

Incomplete files are kept in ROOT/.coming/NAME.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from stillhouse.errors import ConfigError, exit_code_of
from stillhouse.files import write_atomic
from stillhouse.transfer import Json, say_used, unpack

FORMAT = 1
COMING = ".coming"  # below the root: files that are not complete yet
DIGITS = 12  # of the list's digest, at the end of a name
MOST_LIST = 64 << 20  # bytes; 100,000 files take some 15 MB
PIECE = 1 << 20  # bytes read at once


def digest_of(files: Json) -> str:
    """sha256 in hex of a list: of each file's path, size and content."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def name_of(label: str, files: Json) -> str:
    """The directory name of this content on a volume."""
    return f"{label}-{digest_of(files)[:DIGITS]}"


def is_plain(path: str) -> bool:
    """Whether a path of a list stays below its directory, and can be printed."""
    parts = path.split("/")
    return path.isprintable() and not {"", ".", ".."} & {*parts} and not path.startswith("~")


def take(request: Json, stdin: io.BufferedIOBase) -> Json:
    """Carry out a request; returns the state of the volume after it.

    Raises:
        ConfigError: the request cannot be right, or the volume cannot be written.
    """
    root, name = Path(request["root"]), request["name"]
    if not is_plain(name) or "/" in name or name == COMING:
        raise ConfigError(f"{name!r} is no name of something pushed")
    place = _Place(root, name)
    say_used()
    try:
        if request["do"] == "ask":
            return place.answer(place.begin(stdin.read(min(request["bytes"], MOST_LIST))))
        files = place.listed()
        if request["do"] == "add":
            return place.answer(files, [place.add(files, stdin) for _ in range(request["pieces"])])
        place.finish(files)
        return place.answer(files)
    except OSError as error:
        raise ConfigError(f"{root} of the volume: {error.strerror or error}") from error


class _Place:
    """The directories of something that is pushed, while it arrives and once it is complete."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.final = name, root / name
        self.coming = root / COMING / name
        self.whole, self.parts = self.coming / "files", self.coming / "parts"

    def begin(self, data: bytes) -> Json:
        """Save the list of files that will come, and return it.

        Raises:
            ConfigError: its digest is not the name's, or a path of it leads elsewhere.
        """
        try:
            files: Json = json.loads(data)
        except ValueError as error:
            raise ConfigError("the list of files did not come whole; push again") from error
        if name_of(self.name[: -DIGITS - 1], files) != self.name:
            raise ConfigError(f"{self.name}: another list of files than its digest says")
        odd = [file for file in files if not is_plain(file)]
        if odd:
            raise ConfigError(f"{odd[0]!r}: no plain path below what is pushed")
        if not self.final.exists():
            for folder in (self.whole, self.parts):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.coming / "list.json", data)
        return files

    def listed(self) -> Json:
        try:
            return json.loads((self.coming / "list.json").read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(f"{self.name}: nobody said what is to come; push again") from error

    def answer(self, files: Json, spoilt: Iterable[int | None] = ()) -> Json:
        """How much of a list is on the volume.

        Raises:
            ConfigError: it is at its final path, and was changed there.
        """
        sizes = [entry["size"] for entry in files.values()]
        is_there = self.final.exists()
        if is_there:
            odd = [file for file in files if _size(self.final / file) != files[file]["size"]]
            if odd:
                raise ConfigError(
                    f"{self.final} is on the volume, and its {odd[0]} was changed there since: have"
                    " that directory removed, then push again"
                )
        have = sizes if is_there else [self._have(n, file, files) for n, file in enumerate(files)]
        broken = [number for number in spoilt if number is not None]
        free = shutil.disk_usage(self.final.parent).free
        return {
            "format": FORMAT, "is_there": is_there, "have": have, "spoilt": broken, "free": free,
        }  # fmt: skip

    def _have(self, number: int, file: str, files: Json) -> int:
        if _size(self.whole / file) is not None:
            return files[file]["size"]
        # A full part is not verified yet: its last byte is sent again, and that triggers the check.
        return min(_size(self.parts / str(number)) or 0, files[file]["size"] - 1)

    def add(self, files: Json, stdin: io.BufferedIOBase) -> int | None:
        """Write the next piece; the file's number if the file is full and its digest is wrong.

        Raises:
            ConfigError: the piece does not follow what is here, or stdin ended before it did.
        """
        try:
            piece = json.loads(stdin.readline(1000))
            number, at, left = (int(piece[key]) for key in ("file", "at", "size"))
            file = [*files][number]
        except (ValueError, LookupError, TypeError) as error:
            raise Cut("a piece without its line") from error
        size, part = files[file]["size"], self.parts / str(number)
        if not (0 <= at <= (_size(part) or 0) and 0 <= left <= size - at):
            raise ConfigError(f"{file}: a piece that does not follow what is here")
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as out:
            out.seek(at)  # two who push the same write the same bytes to the same place
            while left:
                data = stdin.read1(min(left, PIECE))
                if not data:
                    raise Cut(f"{file}: the stream ended in it")
                out.write(data)
                left -= len(data)
                say_used()
            out.flush()
            os.fsync(out.fileno())
        return number if _size(part) == size and not self._settle(part, file, files[file]) else None

    def _settle(self, part: Path, file: str, entry: Json) -> bool:
        """Whether a full part has the right digest: then it is moved to its file, else deleted."""
        with part.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != entry["sha256"]:
            part.unlink()
            return False
        (self.whole / file).parent.mkdir(parents=True, exist_ok=True)
        part.replace(self.whole / file)
        return True

    def finish(self, files: Json) -> None:
        """Move the complete files to their final path.

        Raises:
            ConfigError: some of them are not complete.
        """
        if not self.final.exists():
            left = [file for file in files if _size(self.whole / file) != files[file]["size"]]
            if left:
                raise ConfigError(f"{self.name}: {left[0]} is not whole here; push again")
            self.whole.rename(self.final)
        shutil.rmtree(self.coming, ignore_errors=True)


class Cut(Exception):
    """The stream ended early; the bytes that came are kept."""


def _size(path: Path) -> int | None:
    """Bytes of a plain file, None where there is none; links are not followed."""
    try:
        stat = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_size if path.is_file() and not path.is_symlink() else None


def main(words: list[str]) -> int:
    """The exit code of this file as a program."""
    if len(words) != 1:
        raise ConfigError("receive: one request")
    try:
        print(json.dumps(take(unpack(words[0]), cast("io.BufferedIOBase", sys.stdin.buffer))))
    except Cut as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
