"""Keep a teacher's hidden states on disk, for sequences that do not depend on a student.

    <cache>/teachers/<key>/manifest.json   which teacher it is (`teacher.difference`)
                           head            its head: who finds every row loads no model
                           rows/ab/cdef…   one row: hidden states [n, H] in the teacher's dtype
                           rows/ab.lock    held by whoever scores a row of that folder

The key is of the teacher's files, its dtype, the libraries, and the kind of device that computes; a
row's name is of its token ids. A row is scored alone, unpadded, once: whoever comes first writes
it, others wait for it. Each file begins with the sha256 of its rest: what is torn counts as not
there, and is written again. If the disk is full, or the caches of all teachers are as large as they
may become, a run goes on without writing.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stillhouse.distill.head import Head
from stillhouse.distill.rollouts import Completions
from stillhouse.distill.teacher import Draws, Ids, Teacher, difference, probe
from stillhouse.errors import ContractError, NodeFault, Unwritable
from stillhouse.file_formats import TEACHER, checked
from stillhouse.identity import digest
from stillhouse.rundir import Json, read_json, sweep_leftovers, temporary_name, write_json
from stillhouse.spec import RolloutSpec

SEAL = hashlib.sha256().digest_size  # bytes of a file before its content
KEY_DIGITS = 16
LOCK_S = 1.0  # between two looks at whether somebody asked us to stop
COUNTED = 0.01  # of the limit: after writing so much, a point counts what others wrote


class CachedTeacher:
    """A teacher whose rows are read from disk; its model is loaded when a row is not there."""

    def __init__(
        self,
        described: Json,
        cache_dir: Path,
        most_bytes: int,
        device: torch.device,
        load_model: Callable[[], Teacher],
        say: Callable[[str], None],
        poll: Callable[[], None],
    ) -> None:
        """`described`: the manifest's part that follows from the teacher's files; `most_bytes`: of
        the caches of all teachers; `poll` is called while another point scores a row, and may
        raise.

        Raises:
            ContractError: what lies under this teacher's key is another teacher's.
        """
        self.folder = cache_dir / "teachers" / key_of(described, device)
        self.described, self.most_bytes, self.device = described, most_bytes, device
        self._load_model, self.say, self.poll = load_model, say, poll
        self._model: Teacher | None = None
        self._head: Head | None = None
        self.is_writing = True
        self.forwards = 0  # rows that the model was asked for
        for folder in (self.folder / "rows").glob("??"):
            sweep_leftovers(folder)
        self.used, self.uncounted = _size(self.folder.parent), 0
        self._compare(self)

    def _compare(self, teacher: Teacher) -> None:
        """Record which teacher this is, or raise ContractError if it is not the recorded one."""
        file, cure = (
            self.folder / "manifest.json",
            f"remove {self.folder}: its rows are scored anew",
        )
        there = read_json(file)
        if there is not None:
            checked(there, TEACHER, file, cure)
        here = self.described | {"probe": probe(teacher)}
        if there is None:
            self._try(lambda: write_json(file, here))
        elif other := difference(there, here):
            raise ContractError(
                f"{file}: the teacher that it names is not the one in use: {other}; {cure}"
            )

    def model(self) -> Teacher:
        """The teacher's model, loaded now, and compared, if it was not needed before."""
        if self._model is None:
            self.say("teacher: not every row is in the cache; loading its model")
            model = self._load_model()
            self._compare(model)
            self._model = model
        return self._model

    def head(self) -> Head:
        if self._head is None:
            file = self.folder / "head"
            kept = _read(file)
            if kept is None:
                self._head = self.model().head()
                self._write(file, head_tensors(self._head))
            else:
                self._head = head_of_tensors(kept, self.device)
        return self._head

    def hidden(
        self, prompts: Ids, completions: Ids, forced: Sequence[int], *, alone: bool
    ) -> Float[Tensor, "N H"]:
        assert alone and not any(forced), "the spec lets no other rows come here"
        rows = [self._row(p, c) for p, c in zip(prompts, completions, strict=True)]
        return torch.cat(rows).to(self.device)

    def write(
        self,
        prompts: Ids,
        draws: Draws,
        rollout: RolloutSpec,
        *,
        prefixes: Ids | None = None,
        greedy: bool = False,
    ) -> Completions:
        return self.model().write(prompts, draws, rollout, prefixes=prefixes, greedy=greedy)

    # ------------------------------------------------------------------------------ rows

    def _row(self, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        ids = array("I", [len(prompt), *prompt, *completion]).tobytes()
        name = hashlib.sha256(ids).hexdigest()
        file = self.folder / "rows" / name[:2] / name[2:]
        found = _row_in(file, len(completion))
        if found is not None:
            return found
        with self._alone(file.parent.with_suffix(".lock")):
            found = _row_in(file, len(completion))
            if found is None:
                self.forwards += 1
                hidden = self.model().hidden([prompt], [completion], [0], alone=True)
                found = hidden.cpu()
                if bool(found.isfinite().all()):
                    self._write(file, {"hidden": found})
        return found

    @contextlib.contextmanager
    def _alone(self, lock_file: Path) -> Iterator[None]:
        """Hold a lock where one can be had: without it a row may be scored twice, to the same
        bits."""
        lock = FileLock(lock_file, timeout=LOCK_S)

        def take() -> None:
            lock_file.parent.mkdir(parents=True, exist_ok=True)
            while not lock.is_locked:
                try:
                    lock.acquire()
                except Timeout:
                    self.poll()

        self._try(take)
        try:
            yield
        finally:
            lock.release()

    def _write(self, file: Path, tensors: dict[str, Tensor]) -> None:
        content = save(tensors)
        data = hashlib.sha256(content).digest() + content
        if self.is_writing and not self._has_room(len(data)):
            self.is_writing = False
            self.say(
                f"teacher cache {self.folder.parent}: {self.used / 2**30:.3g} GiB of"
                f" {self.most_bytes / 2**30:.3g} (teacher_cache_gib); it goes on without writing"
            )
        if not self.is_writing:
            return

        def put() -> None:
            temporary = temporary_name(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as stream:  # no fsync: the seal tells what is torn
                    stream.write(data)
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)
            self.uncounted += len(data)

        self._try(put)

    def _has_room(self, size: int) -> bool:
        """Whether the caches may grow so much; n points at once exceed their limit by at most n
        times `COUNTED` of it."""
        if self.uncounted + size > COUNTED * self.most_bytes:
            self.used, self.uncounted = _size(self.folder.parent), 0
        return self.used + self.uncounted + size <= self.most_bytes

    def _try(self, do: Callable[[], object]) -> None:
        try:
            do()
        except (OSError, Unwritable, NodeFault) as error:
            if self.is_writing:
                why = getattr(error, "strerror", None) or error
                self.say(f"teacher cache {self.folder}: {why}; it goes on without writing")
            self.is_writing = False


def key_of(described: Json, device: torch.device) -> str:
    """The name of a teacher's folder: what shares it has equal rows, to the bit."""
    return digest(described | {"device": device.type})[:KEY_DIGITS]


def _size(folder: Path) -> int:
    """Bytes of the whole files below a folder; others may write and remove files meanwhile."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += 0 if name[0] == "." else os.stat(os.path.join(where, name)).st_size
    return total


def _read(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a whole file; None if it is torn or not there."""
    try:
        data = file.read_bytes()
        content = data[SEAL:]
        return load(content) if hashlib.sha256(content).digest() == data[:SEAL] else None
    except (OSError, SafetensorError):
        return None


def _row_in(file: Path, length: int) -> Tensor | None:
    hidden = (_read(file) or {}).get("hidden")
    return hidden if hidden is not None and len(hidden) == length else None


def head_tensors(head: Head) -> dict[str, Tensor]:
    """A head as tensors by name."""
    cap = math.nan if head.cap is None else head.cap
    form = torch.tensor([head.scale, cap], dtype=torch.float64)
    found = {"weight": head.weight_VH.cpu().contiguous(), "form": form}
    return found if head.bias_V is None else found | {"bias": head.bias_V.cpu().contiguous()}


def head_of_tensors(tensors: dict[str, Tensor], device: torch.device) -> Head:
    """The head that these tensors are."""
    scale, cap = tensors["form"].tolist()
    bias = tensors.get("bias")
    bias_V = None if bias is None else bias.to(device)
    return Head(tensors["weight"].to(device), bias_V, scale, None if math.isnan(cap) else cap)
