"""Ask a teacher that another process serves (`teacher_server`).

A request is a pure function of its content, so whatever got no answer is asked again: a server that
starts anew, or was busy, or an answer that was lost. A point waits for it as long as its patience
lasts, then saves and ends with exit code 85. The point's process holds the teacher's head only.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from stillhouse.distill.head import Head
from stillhouse.distill.rollouts import Completions
from stillhouse.distill.teacher import Draws, Ids
from stillhouse.distill.teacher_cache import head_of_tensors
from stillhouse.errors import ConfigError, ContractError, Diverged, Interrupted, OutOfMemory
from stillhouse.file_formats import TEACHER
from stillhouse.rundir import Json
from stillhouse.spec import RolloutSpec

VERSION = 1  # of what is said; a server of another version is refused
PATIENT = (408, 425, 429, 500, 502, 503, 504)  # status codes after which a request is sent again
LOOK_S = 0.05  # how often a wait looks for a request to stop
PAUSE_S = 0.2  # before a request is sent again, doubled up to LONGEST_PAUSE_S
LONGEST_PAUSE_S = 5.0
SAID_S = 1.0  # a wait that lasts longer is said, once
SERVER = "server of `stillhouse teacher`"
NAME = "x-teacher"  # the header that says which teacher answered


class ServedTeacher:
    """A teacher behind a server."""

    def __init__(
        self,
        url: str,
        token: str,
        patience_s: float,
        device: torch.device,
        pad_id: int,
        eos_ids: Sequence[int],
        poll: Callable[[], None],
    ) -> None:
        """Wait for the server, and ask which teacher it has.

        Raises:
            ConfigError: the token is wrong. ContractError: no such server, or of another version.
            Interrupted: it did not answer in `patience_s` seconds, or `poll` raised.
        """
        self.url, self.patience_s, self.device, self.poll = url, patience_s, device, poll
        self.pad_id, self.eos_ids = pad_id, [*eos_ids]
        words = {"authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(patience_s, connect=10)
        self._client = httpx.Client(base_url=url, headers=words, timeout=timeout, trust_env=False)
        weakref.finalize(self, self._client.close)
        self._name: str | None = None  # of the teacher that answers
        self.manifest = self._manifest_of(self._ask("GET", "/manifest"))
        self._head = head_of_tensors(load(self._ask("GET", "/head")), device)

    def head(self) -> Head:
        return self._head

    def hidden(
        self, prompts: Ids, completions: Ids, forced: Sequence[int], *, alone: bool
    ) -> Float[Tensor, "N H"]:
        rows = [list(map(list, prompts)), list(map(list, completions)), list(forced)]
        asked = {"rows": rows, "alone": alone, "pad_id": self.pad_id}
        hidden_NH = self._ask_tensor("/hidden", asked | {"threads": torch.get_num_threads()})
        V, H = self._head.weight_VH.shape
        N = sum(map(len, completions)) - sum(forced)
        if hidden_NH.shape != (N, H) or hidden_NH.dtype != self._head.weight_VH.dtype:
            raise ContractError(
                f"the teacher at {self.url} answered {tuple(hidden_NH.shape)} hidden states of"
                f" {hidden_NH.dtype} where {(N, H)} of {self._head.weight_VH.dtype} were asked for"
            )
        if not bool(hidden_NH.isfinite().all()):
            raise Diverged(
                f"the teacher at {self.url} answered hidden states that are no numbers: its weights"
                " are damaged, or overflow in its dtype (teacher_dtype)"
            )
        return hidden_NH.to(self.device)

    def write(
        self,
        prompts: Ids,
        draws: Draws,
        rollout: RolloutSpec,
        *,
        prefixes: Ids | None = None,
        greedy: bool = False,
    ) -> Completions:
        asked = {
            "prompts": list(map(list, prompts)),
            "draws": [draws.seed, draws.purpose, draws.step, list(draws.rows)],
            "rollout": dataclasses.asdict(rollout),
            "prefixes": None if prefixes is None else list(map(list, prefixes)),
            "greedy": greedy,
            "pad_id": self.pad_id,
            "eos_ids": self.eos_ids,
            "threads": torch.get_num_threads(),
        }
        return Completions(*json.loads(self._ask("POST", "/write", asked)))

    def _manifest_of(self, answer: bytes) -> Json:
        try:
            said = json.loads(answer)
            if said["version"] != VERSION:
                raise ContractError(
                    f"the teacher at {self.url} is served by another version of this program, which"
                    f" speaks {said['version']} where this one speaks {VERSION}; start it from this"
                    " code"
                )
            return TEACHER.validate_python(said["manifest"])
        except (ValueError, TypeError, KeyError) as error:
            raise ContractError(f"what answers at {self.url} is no {SERVER}") from error

    # ------------------------------------------------------------------- asked until answered

    def _ask_tensor(self, path: str, asked: Json) -> Tensor:
        try:
            return load(self._ask("POST", path, asked))["hidden"]
        except (SafetensorError, KeyError) as error:
            raise ContractError(f"{self.url}{path} answered no hidden states: {error}") from error

    def _ask(self, method: str, path: str, asked: Json | None = None) -> bytes:
        content = None if asked is None else json.dumps(asked, separators=(",", ":")).encode()
        begun, pause, is_said = time.monotonic(), PAUSE_S, False
        end = begun + self.patience_s
        while True:
            found = self._sent(method, path, content)
            if isinstance(found, httpx.Response):
                if found.status_code == 200:
                    self._check_name(found.headers.get(NAME, ""))
                    return found.content
                self._refuse(found)
                why = f"status {found.status_code}: {found.text[:200]}"
                later = found.headers.get("retry-after", "")
                pause = max(pause, float(later)) if later.isdigit() else pause
            else:
                why = f"{type(found).__name__}: {found}"
            if time.monotonic() + pause > end:
                raise Interrupted(
                    f"the teacher at {self.url} gave no answer for {self.patience_s:g} s"
                    f" (teacher_patience_s; the last try: {why}); what is done is saved, run the"
                    " same line again"
                )
            if not is_said and time.monotonic() - begun > SAID_S:
                is_said = True
                print(f"waiting for the teacher at {self.url} ({why})", flush=True)
            self._wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _sent(
        self, method: str, path: str, content: bytes | None
    ) -> httpx.Response | httpx.TransportError:
        """The answer, or why there is none. Sent by another thread, so that a request to stop is
        heard while a slow server computes."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def send() -> None:
            try:
                answers.put(self._client.request(method, path, content=content))
            except Exception as error:
                answers.put(error)

        threading.Thread(target=send, daemon=True).start()
        while True:
            try:
                found = answers.get(timeout=LOOK_S)
            except queue.Empty:
                self.poll()
                continue
            if isinstance(found, httpx.Response | httpx.TransportError):
                return found
            raise found

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.poll()
            time.sleep(LOOK_S)

    def _check_name(self, name: str) -> None:
        """Raise ContractError if another teacher than before answers at this address."""
        if self._name is not None and name != self._name:
            raise ContractError(
                f"another teacher answers at {self.url} than when this run connected to it; give"
                " each its own address, and run the same line again"
            )
        self._name = name

    def _refuse(self, answer: httpx.Response) -> None:
        """Raise if asking again would get the same answer."""
        if answer.status_code in (401, 403):
            raise ConfigError(
                f"the teacher at {self.url} does not take this token; STILLHOUSE_TEACHER_TOKEN must"
                " be the one that it was started with"
            )
        if answer.status_code == 507:
            raise OutOfMemory(f"the teacher at {self.url}: {answer.text[:300]}")
        if answer.status_code not in PATIENT:
            raise ContractError(
                f"the teacher at {self.url} refuses: {answer.text[:300]} (status"
                f" {answer.status_code}). Is it a {SERVER}?"
            )
