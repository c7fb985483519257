"""Copy weights, rows or tasks of this machine to the cache volume of a cluster.

A short-lived Job mounts the volume, and by `exec` its pod writes what it receives (`intake`), below
/cache/pushed/LABEL-DIGEST. What is there already is not sent; an interrupted transfer resumes where
it stopped. Only plain files at or below the path are sent: no links, nothing hidden, nothing that
holds a key.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from stillhouse.compose import Overrides, compose
from stillhouse.errors import DONE, ConfigError, Interrupted
from stillhouse.fingerprints import of_file
from stillhouse.local_models import SUFFIXES
from stillhouse.receive import FORMAT, MOST_LIST, is_plain, name_of
from stillhouse.rundir import Json
from stillhouse.spec import SiteSpec, TrainSpec
from stillhouse.sweep.cluster import secrets
from stillhouse.sweep.cluster.collect import size
from stillhouse.sweep.cluster.connect import ApiError, Cluster, connect
from stillhouse.sweep.cluster.jobspec import CACHE, push_step
from stillhouse.sweep.cluster.manifest import image_problem
from stillhouse.sweep.cluster.volume_pod import TRIES, Say, VolumePod
from stillhouse.text import number_of, say

if TYPE_CHECKING:
    from stillhouse.sweep.call import Call

PUSHED = f"{CACHE}/pushed"
LIMIT_BYTES = 20 << 30  # all of it passes through the API server, which others need, too
ROUND_BYTES = 256 << 20  # of one exec
ROUND_FILES = 1000
FRAME = 1 << 16  # bytes of one message to the API server
SHOWN = 5  # files that a list names before it only counts them
TEXT_BYTES = 8192  # of a file, without a NUL: a text, which is searched for keys
LINE_BYTES = 1 << 24  # of a line that is searched at once


@dataclass(frozen=True)
class Load:
    """The files to push."""

    path: Path
    files: Mapping[str, Path]  # by their paths below what is pushed, in order
    states: Mapping[str, tuple[int, int]]  # size in bytes, and when it changed
    hidden: int  # files and directories left out because they begin with a dot

    @property
    def sizes(self) -> dict[str, int]:
        return {name: state[0] for name, state in self.states.items()}

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def label(self) -> str:
        """What a volume calls it, before its digest."""
        stem = re.split(r"\.(?:jsonl?|parquet|ya?ml)\b", self.path.absolute().name)[0]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:60] or "pushed"

    def lines(self) -> list[str]:
        """Its sizes, the largest files first."""
        largest = sorted(self.sizes, key=lambda name: -self.sizes[name])
        lines = [f"{self.path}: {number_of(len(self.files), 'file')}, {size(self.bytes)}"]
        lines += [f"  {size(self.sizes[name]):>8}  {name}" for name in largest[:SHOWN]]
        if len(largest) > SHOWN:
            lines.append(f"            and {len(largest) - SHOWN} more")
        if self.hidden:
            lines.append(f"  left out: {self.hidden} that begin with a dot")
        return lines


def load(path: Path) -> Load:
    """What a push of this path would send: a file, or what lies in a directory.

    Raises:
        ConfigError: nothing is there, a link, no plain file, or a name that cannot be one there.
    """
    if path.is_symlink():
        raise ConfigError(f"{path} is a link: push what it leads to, {os.readlink(path)}")
    if path.is_file():
        found, hidden = [path], 0
        root = path.parent
    elif path.is_dir():
        found, hidden = _below(path)
        root = path
    else:
        raise ConfigError(f"{path}: no such file or directory on this machine")
    files = {file.relative_to(root).as_posix(): file for file in sorted(found)}
    if not files:
        raise ConfigError(f"{path}: nothing in it to push")
    odd = next((name for name in files if not is_plain(name)), None)
    if odd is not None:
        raise ConfigError(f"{path}: {odd!r} cannot be a file's name on the volume; rename it")
    return Load(path, files, {name: _state(file) for name, file in files.items()}, hidden)


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _below(folder: Path) -> tuple[list[Path], int]:
    files: list[Path] = []
    hidden = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith(".") or entry.name == "__pycache__":
                hidden += 1
            elif entry.is_symlink():
                raise ConfigError(
                    f"{path} is a link to {os.readlink(path)}, and links are not followed: push a"
                    " copy of what it leads to (cp -rL). A model of the hub's cache needs no push:"
                    " say its OWNER/NAME"
                )
            elif entry.is_dir():
                more, others = _below(path)
                files += more
                hidden += others
            elif entry.is_file():
                files.append(path)
            else:
                raise ConfigError(f"{path}: neither a file nor a directory")
    return files, hidden


def refuse_large(load: Load) -> None:
    """Refuse more than should pass through an API server.

    Raises:
        ConfigError: it is more; the message has the other ways.
    """
    if load.bytes > LIMIT_BYTES:
        raise ConfigError(
            f"{load.path} is {size(load.bytes)}, and more than {size(LIMIT_BYTES)} should not pass"
            " through the API server. Put it on the hub (student=OWNER/NAME, hf_secret where it is"
            " private), or copy it to the storage behind the cache volume where that can be mounted"
            " elsewhere, and name it below /cache. --yes pushes it all the same; nothing was sent"
        )


def refuse_keys(load: Load) -> None:
    """Refuse a text file that holds what looks like a key.

    Raises:
        ConfigError: one does; the message has its place, not the key.
    """
    for name, file in load.files.items():
        with _opened(file) as content:
            if b"\0" in content.read(TEXT_BYTES):
                continue
            content.seek(0)
            lines = iter(partial(content.readline, LINE_BYTES), b"")
            for number, line in enumerate(lines, start=1):
                kind = secrets.find_key(line.decode(errors="replace"))
                if kind is not None:
                    raise ConfigError(
                        f"{name}, line {number}, looks like {kind}, and whoever mounts the volume"
                        " could read it: take it out. Nothing was sent"
                    )


def list_of(load: Load, memory: Path) -> Json:
    """The files with their sizes and digests; those of large files are kept below `memory`."""
    return {
        name: {"size": load.sizes[name], "sha256": of_file(file, memory)}
        for name, file in load.files.items()
    }


def send(cluster: Cluster, site: SiteSpec, load: Load, files: Json, say: Say) -> int:
    """Bring what is not there yet to the volume; how many bytes were sent now.

    Raises:
        ConfigError: a right is missing, the pod cannot start, the volume is full, a file changed.
        Interrupted: asked to stop, or the connection broke again and again; what came stays.
    """
    with VolumePod(cluster, site, load.label, say, push_step) as volume_pod:
        return _Push(volume_pod, load, files).run()


class _Push:
    """One load, and the pod that takes it."""

    def __init__(self, volume_pod: VolumePod, load: Load, files: Json) -> None:
        self.volume_pod, self.load, self.files = volume_pod, load, files
        self.name, self.names = name_of(load.label, files), [*files]
        self.sent = 0

    def run(self) -> int:
        failures = 0
        while True:
            try:
                there = self._ask()
                if there["is_there"]:
                    return self.sent
                self._refuse_full(there)
                pieces = self._pieces(there["have"])
                if not pieces:
                    self._tell({"do": "finish"}, ())
                    return self.sent
                before = _bytes(there)
                there = self._tell({"do": "add", "pieces": len(pieces)}, self._stream(pieces))
                self._say(there)
                is_more = _bytes(there) > before and not there["spoilt"]
                failures = 0 if is_more else failures + 1
                problem = "what came is not what was sent"
            except (ValueError, ApiError) as error:
                if isinstance(error, ApiError) and error.status == 403:
                    raise
                failures, problem = failures + 1, str(error)
                self.volume_pod.say(f"it broke, and goes on: {error}")
                self.volume_pod.cluster.stop.wait(
                    self.volume_pod.cluster.first_delay_s * 4**failures
                )
            if failures >= TRIES:
                raise Interrupted(
                    f"{TRIES} times in a row nothing more came ({problem}); what came before stays,"
                    " the same command goes on"
                )

    def _ask(self) -> Json:
        data = json.dumps(self.files).encode()
        if len(data) > MOST_LIST:
            raise ConfigError(
                f"{self.load.path}: {len(self.files):,} files are too many; pack them"
            )
        return self._tell({"do": "ask", "bytes": len(data)}, _cut(data))

    def _tell(self, request: Json, stdin: Iterator[bytes] | Sequence[bytes]) -> Json:
        """Send a request to the pod; its answer, once that is checked.

        Raises:
            ValueError: the answer is none; or as `VolumePod.tell`.
        """
        said = self.volume_pod.tell({"root": PUSHED, "name": self.name, **request}, stdin)
        if not self._is_answer(said):
            raise ValueError("the pod's answer is not about these files")
        numbers: list[int] = said["spoilt"]
        for number in numbers:
            self._refuse_changed(self.names[number])
        return said

    def _is_answer(self, answer: Any) -> bool:
        """Whether it has the form of an answer, and every number in it is one that can be."""
        shape = {"format": int, "is_there": bool, "have": list, "spoilt": list, "free": int}
        said: Json = cast("Json", answer) if isinstance(answer, dict) else {}
        if any(not isinstance(said.get(key), kind) for key, kind in shape.items()):
            return False
        have, spoilt = cast("list[Any]", said["have"]), cast("list[Any]", said["spoilt"])
        sizes = [entry["size"] for entry in self.files.values()]
        limits = zip(have, sizes, strict=False)
        return (
            said["format"] == FORMAT
            and len(have) == len(sizes)
            and all(isinstance(n, int) and -1 <= n <= whole for n, whole in limits)
            and all(isinstance(n, int) and 0 <= n < len(sizes) for n in spoilt)
        )

    def _refuse_full(self, there: Json) -> None:
        left = self.load.bytes - _bytes(there)
        if left > there["free"]:
            raise ConfigError(
                f"the cache volume has {size(there['free'])} left, and {size(left)} are to come:"
                f" remove what nobody needs below {PUSHED}, or enlarge the claim"
                f" {self.volume_pod.site.cache_claim}"
            )

    def _pieces(self, have: Sequence[int]) -> list[tuple[int, int, int]]:
        """What comes next: (file, offset, bytes), as much as one round takes."""
        found: list[tuple[int, int, int]] = []
        room = ROUND_BYTES
        for number, (name, at) in enumerate(zip(self.names, have, strict=True)):
            if at == self.files[name]["size"]:
                continue
            if room <= 0 or len(found) == ROUND_FILES:
                break
            at = max(at, 0)
            found.append((number, at, min(self.files[name]["size"] - at, room)))
            room -= found[-1][2]
        return found

    def _stream(self, pieces: Sequence[tuple[int, int, int]]) -> Iterator[bytes]:
        for number, at, count in pieces:
            name = self.names[number]
            line = json.dumps({"file": number, "at": at, "size": count}) + "\n"
            yield line.encode()
            with _opened(self.load.files[name]) as file:
                file.seek(at)
                while count:
                    data = file.read(min(count, FRAME))
                    if not data:
                        raise ConfigError(f"{name} became shorter while it was sent; push again")
                    yield data
                    count -= len(data)
                    self.sent += len(data)

    def _refuse_changed(self, name: str) -> None:
        if _state(self.load.files[name]) != self.load.states[name]:
            raise ConfigError(f"{name} changed while it was sent; push again")

    def _say(self, there: Json) -> None:
        self.volume_pod.say(f"{size(_bytes(there))} of {size(self.load.bytes)} are there")


def _bytes(there: Json) -> int:
    return sum(max(0, n) for n in there["have"])


def _cut(data: bytes) -> Iterator[bytes]:
    return (data[at : at + FRAME] for at in range(0, len(data), FRAME))


def _opened(file: Path) -> BinaryIO:
    """A file, and not what a link in its place leads to."""
    return os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb")


# --------------------------------------------------------------------------------------- the verb


def push(call: Call) -> int:
    """Bring weights, rows or tasks to the cache volume of a cluster."""
    if call.target is None:
        raise ConfigError("push what? `stillhouse push PATH`: a model's directory, or rows")
    if not call.is_cluster:
        raise ConfigError("push needs a cluster, not this machine: say --backend cluster")
    try:
        return _push(call, load(Path(call.target).expanduser()))
    except OSError as error:  # what this machine does not let us read
        raise ConfigError(f"{error.filename or call.target}: {error.strerror or error}") from error


def _push(call: Call, load: Load) -> int:
    site = call.only_site
    with contextlib.redirect_stdout(sys.stderr if call.is_json else sys.stdout):
        _print(load.lines())
        if not call.is_sure:
            refuse_large(load)
        problem = image_problem(site)
        if problem:
            raise ConfigError(problem)
        refuse_keys(load)
        with contextlib.closing(connect(site.kube_context, site.namespace)) as cluster:
            memory = Path(compose(Overrides({}, {}), TrainSpec).place.cache_dir).expanduser()
            files = list_of(load, memory)
            sent = send(cluster, site, load, files, _say)
    there = f"{PUSHED}/{name_of(load.label, files)}"
    if load.path.is_file():
        there = f"{there}/{load.path.name}"
    words, more = words_for(load, there)
    if call.is_json:
        said = {"path": there, "words": words, "files": len(files), "bytes": load.bytes}
        print(json.dumps(said | {"sent": sent}))
        return DONE
    say(f"{size(sent)} were sent; pods find it at {there}" if sent else f"{there} was there")
    say(f"  {words}{f'   ({more})' if more else ''}")
    return DONE


def words_for(load: Load, there: str) -> tuple[str, str]:
    """How a pushed path is said on a command line, and what else it may be."""
    if load.path.is_file():
        return f"data=local data_path={there}", "or rescue's other_file="
    if "adapter_config.json" in load.files:
        return f"lora_paths=[{there}]", "of k8s/eval.sh"
    if "config.json" in load.files:
        return f"student={there}", f"or teacher={there}"
    if any(name.endswith(SUFFIXES) for name in load.files):
        return f"data=local data_path={there}", "data_split=train"
    if any(name.endswith((".yaml", ".yml")) for name in load.files):
        here = shlex.quote(str(load.path))
        return f"include_path={here}", "tasks travel with a sweep as they are, also without a push"
    return there, ""


def _print(lines: list[str]) -> None:
    for line in lines:
        say(line)


def _say(text: str) -> None:
    say(text, file=sys.stderr, flush=True)
