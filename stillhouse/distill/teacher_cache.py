"""Keep a teacher's hidden states on disk, for sequences that do not depend on a student.

    <cache>/teachers/<key>/manifest.json   which teacher it is (`teacher.difference`)
                           head            its head: who finds every row loads no model
                           rows/ab/cdef…   one row: hidden states [n, H] in the teacher's dtype
                           rows/ab.lock    held by whoever scores a row of that folder

The key is of the teacher's files, its dtype and the libraries; a row's name is of its token ids. A
row is scored alone, unpadded, once: whoever comes first writes it, others wait for it. Each file
begins with the sha256 of its rest: what is torn counts as not there, and is written again. If the
disk is full, or the cache is as large as it may become, a run goes on without writing.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stillhouse.distill.head import Head
from stillhouse.distill.rollouts import Completions
from stillhouse.distill.teacher import Draws, Ids, Teacher, difference, probe
from stillhouse.errors import ContractError, NodeFault, Unwritable
from stillhouse.identity import digest
from stillhouse.rundir import Json, read_json, sweep_leftovers, temporary_name, write_json
from stillhouse.spec import RolloutSpec

SEAL = hashlib.sha256().digest_size  # bytes of a file before its content
KEY_DIGITS = 16


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
    ) -> None:
        """`described`: the manifest's part that follows from the teacher's files.

        Raises:
            ContractError: what lies under this teacher's key is another teacher's.
        """
        key = digest({name: v for name, v in described.items() if name != "tokenizer"})
        self.folder = cache_dir / "teachers" / key[:KEY_DIGITS]
        self.most_bytes, self.device = most_bytes, device
        self._load_model, self.say = load_model, say
        self._model: Teacher | None = None
        self._head: Head | None = None
        self.is_writing = True
        self.forwards = 0  # rows that the model was asked for
        rows = self.folder / "rows"
        folders = [folder for folder in rows.glob("??") if folder.is_dir()]
        for folder in folders:
            sweep_leftovers(folder)
        # Another point's temporary file may be renamed at any moment; a row's never is.
        whole = (file for folder in folders for file in folder.iterdir() if file.name[0] != ".")
        self.used = sum(file.stat().st_size for file in whole)
        self._compare(described)

    def _compare(self, described: Json) -> None:
        file = self.folder / "manifest.json"
        there, here = read_json(file), described | {"probe": probe(self)}
        if there is None:
            self._try(lambda: write_json(file, here))
        elif other := difference(there, here):
            raise ContractError(
                f"{self.folder}: what is kept here is of another teacher than {file.name} says:"
                f" {other}. Remove that folder; its rows are then scored again"
            )

    def model(self) -> Teacher:
        """The teacher's model, loaded now if it was not needed before."""
        if self._model is None:
            self.say("teacher: not every row is in the cache; loading its model")
            self._model = self._load_model()
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
        lock = FileLock(lock_file)
        self._try(lambda: (lock_file.parent.mkdir(parents=True, exist_ok=True), lock.acquire()))
        try:
            yield
        finally:
            lock.release()

    def _write(self, file: Path, tensors: dict[str, Tensor]) -> None:
        content = save(tensors)
        data = hashlib.sha256(content).digest() + content
        if self.is_writing and self.used + len(data) > self.most_bytes:
            self.is_writing = False
            self.say(
                f"teacher cache {self.folder}: {self.used / 2**30:.3g} GiB of"
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
            self.used += len(data)

        self._try(put)

    def _try(self, do: Callable[[], object]) -> None:
        try:
            do()
        except (OSError, Unwritable, NodeFault) as error:
            if self.is_writing:
                why = getattr(error, "strerror", None) or error
                self.say(f"teacher cache {self.folder}: {why}; it goes on without writing")
            self.is_writing = False


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
