"""Train small models in a process whose kernels are the same on every CPU.

Libraries choose their kernels by what the CPU supports, and these kernels round differently: with
AVX-512 a sum has sixteen parts, with AVX2 eight, and a product that is fused with a sum is rounded
once. After five hundred training steps, that gives a different model. The choice is made once per
process, from its environment, before torch is imported. So a separate process trains, and forks
itself for each model it is asked to train.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillhouse.rundir import Json

# x86-64 with glibc: makes each library use only instructions that every CPU has. Each line changes
# the results on some machine (docs/decisions/0012-same-kernels.md).
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's own loops: SSE2
    "MKL_CBWR": "COMPATIBLE",  # matrix products: SSE2, and sums in one order
    "DNNL_MAX_CPU_ISA": "SSE41",  # oneDNN, if a later torch uses it
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4",  # log, cos, and others: fused or not
    "OMP_NUM_THREADS": "1",  # with two threads, sums are added in another order
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Prefixes of variables that would interfere; the user's settings are for the rest of the run.
OTHERS = ("ATEN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_", "TORCH_")
IDLE_S = 60.0  # it exits after this long without a job
LONGEST_JOB = 1 << 16  # bytes


def fixed_environment() -> dict[str, str]:
    """The environment of the process that trains."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
    code = str(Path(__file__).parents[2])
    paths = [code, *filter(None, [kept.get("PYTHONPATH")])]
    return kept | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}


# ---------------------------------------------------------------- client


class _Server:
    """A handle on the training process, which ends when this process does."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stillhouse.distill.same_kernels"],
                stdin=theirs.fileno(),
                env=fixed_environment(),
                start_new_session=True,  # Ctrl-C goes only to us, who may wait for the model
            )
        self._pid = os.getpid()

    def ask(self, job: Json) -> int:
        """Send a job; return the read end of a pipe with its answers, one JSON object per line."""
        reads, writes = os.pipe()
        try:
            socket.send_fds(self._socket, [json.dumps(job).encode()], [writes])
            if not self._socket.recv(1):  # acknowledged, so that the next job is a separate message
                raise ConnectionResetError("it ended")
        except OSError:
            os.close(reads)
            raise
        finally:
            os.close(writes)
        return reads

    def is_waiting(self) -> bool:
        """Whether this process started it and it still accepts jobs."""
        return self._pid == os.getpid() and self._process.poll() is None

    def end(self) -> None:
        """Kill it and its forks, if this process started it."""
        if self.is_waiting():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._socket.close()


_server: _Server | None = None
_lock = threading.Lock()


def stop() -> None:
    """End all training for this process: threads that wait for it get ChildProcessError."""
    global _server
    with _lock:
        if _server is not None:
            _server.end()
        _server = None


def trained(job: Json, say: Callable[[str], None]) -> Json:
    """What `tiny.train` returned for this job, in a process whose kernels are fixed.

    Raises:
        ChildProcessError: that process ended without an answer.
    """
    with os.fdopen(_asked(job), encoding="utf-8") as answers:
        for line in answers:
            answer: Json = json.loads(line)
            if "facts" in answer:
                return answer["facts"]
            say(answer["say"])
    raise ChildProcessError("the process that trains a pair ended before it was done; see above")


def _asked(job: Json) -> int:
    global _server
    with _lock:
        if _server is not None:
            if _server.is_waiting():
                with contextlib.suppress(OSError):  # it ended in between
                    return _server.ask(job)
            _server.end()
        _server = _Server()
        return _server.ask(job)


atexit.register(stop)

# ---------------------------------------------------------------- server


def serve(jobs: socket.socket) -> None:
    """Train each requested model in a fork of this process, until no more jobs come."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped automatically
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  # once, not in each fork

    torch.set_num_threads(1)
    jobs.settimeout(IDLE_S)
    while True:
        try:
            said, fds, _, _ = socket.recv_fds(jobs, LONGEST_JOB, 1)
        except TimeoutError:
            if _is_anybody_training():
                continue
            return
        if not fds:
            return  # the client is gone
        jobs.sendall(b"y")
        if os.fork() == 0:
            _answer(json.loads(said), fds[0])
        os.close(fds[0])


def _is_anybody_training() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _answer(job: Json, fd: int) -> None:
    """Train in a fork, report progress and result, and exit."""
    code = 1
    try:
        from stillhouse.distill.toy import tiny

        threading.Thread(target=_end_with_the_reader_of, args=(fd,), daemon=True).start()
        with open(fd, "w", buffering=1, encoding="utf-8") as answers:

            def tell(**answer: Any) -> None:
                answers.write(json.dumps(answer) + "\n")

            tell(facts=tiny.train(job, lambda line: tell(say=line)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _end_with_the_reader_of(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, 0)  # wait only for the reader to close it
    poll.poll()
    os._exit(1)


if __name__ == "__main__":
    serve(socket.socket(fileno=os.dup(0)))
