# ruff: noqa: E402  (a PID 1 that has no handler yet hears no SIGTERM, so that comes before imports)
"""Run as PID 1 of a pod: start the command, forward signals, and report how it ended.

    pod.py [--code=D] [--id=I] [--log=FILE] [--processes=N] [--grace=S] KIND -- WORDS…

    train eval prepare preflight drive
                               starts train.py, eval.py or `python -m stillhouse` with these words;
                               what a launcher resolved, they are given as `--spec JSON`
    collect -- SECONDS         transfer.py: waits for SECONDS without a send, or for a SIGTERM
    push -- SECONDS            the same, with the cache in place of the runs
    send -- REQUEST            transfer.py, by `exec` in a collect pod: files of runs to stdout
    take -- REQUEST            receive.py, by `exec` in a push pod: files from stdin to the cache

It forwards SIGTERM and SIGINT, reaps orphaned processes, and copies the output to stdout and to
FILE. It reports how it ended by its exit code (`verdict`) and by one JSON object in the termination
message: {"exit_code": n, "cause": "…", "tail": "last lines"}. An evaluation adds what became of its
rows: {"done": "id,id", "failed": {"id": [code, "cause"]}}.

It imports the standard library only, and no module of this project: the code that it unpacks may
differ from the image's. STILLHOUSE_POD_ROOT, for tests, is put before /tmp, /dev and /sys.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

ASKED: list[int] = []  # the signals that asked us to stop, in order
STOPS = (signal.SIGTERM, signal.SIGINT)


def _hear(number: int, frame: Any) -> None:
    ASKED.append(number)


if __name__ == "__main__":
    for _number in STOPS:
        signal.signal(_number, _hear)

import argparse
import contextlib
import hashlib
import io
import json
import selectors
import shutil
import tarfile
import traceback
from pathlib import Path
from typing import NoReturn

Json = dict[str, Any]

ROOT = Path(os.environ.get("STILLHOUSE_POD_ROOT", "/"))
CODE = ROOT / "tmp/code"
EXIT_FILE = ROOT / "tmp/exit-code"  # lines of JSON: how a process ended, or what became of a row
MESSAGE = ROOT / "dev/termination-log"
CGROUP = ROOT / "sys/fs/cgroup"

COMMANDS = {
    "train": "train.py",
    "eval": "eval.py",
    "prepare": "-m stillhouse prepare",
    "preflight": "-m stillhouse preflight",
    "drive": "-m stillhouse",
    "collect": "-m stillhouse.transfer hold",
    "push": "-m stillhouse.transfer hold",
    "send": "-m stillhouse.transfer send",
    "take": "-m stillhouse.receive",
}
MISTAKE, OUT_OF_MEMORY, AGAIN = 42, 44, 85
FINAL = (42, 43, 44, 46)  # never retried, so what one rank says of it counts for all
MESSAGE_BYTES = 4096  # what Kubernetes keeps of a termination message
CAUSE_LENGTH, ROW_CAUSE_LENGTH = 1000, 300
TAIL_BYTES = 3000
GRACE_S = 180  # between the SIGTERM of a pod and its SIGKILL


class Mistake(Exception):
    """This pod's command line cannot be right; exit 42."""


class Parser(argparse.ArgumentParser):
    """argparse, with this project's exit code for a mistake."""

    def error(self, message: str) -> NoReturn:
        raise Mistake(f"pod.py: {message}")


def main(argv: list[str]) -> int:
    """The exit code of a pod with these words; its termination message is written."""
    if argv[:1] in (["send"], ["take"]):  # a stream run by `exec`; the pod does not end with it
        os.chdir(CODE if CODE.exists() else _installed())
        words = command(argv[0], argv[argv.index("--") + 1 :], 1)
        os.execv(words[0], words)
    output = Output()
    rows: Json = {}
    try:
        code, cause, rows = _work(argv, output)
    except Mistake as error:
        code, cause = MISTAKE, str(error)
        output.write(f"{cause}\n".encode())
    except Exception as error:
        code, cause = 1, f"pod.py: {error!r}"
        output.write(traceback.format_exc().encode())
    if MESSAGE.exists():  # the kubelet makes it; elsewhere there is nobody to tell
        MESSAGE.write_bytes(message(code, cause, bytes(output.tail), rows))
    return code


def _work(argv: list[str], output: Output) -> tuple[int, str, Json]:
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(prog="pod.py", allow_abbrev=False)
    parser.add_argument("--code", help="digest of the code that code.tar.gz must hold")
    parser.add_argument("--id", help="what the words must come to")
    parser.add_argument("--log", type=Path, help="the output is appended to it")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--grace", type=int, default=GRACE_S, help="seconds to end in")
    parser.add_argument("kind", choices=COMMANDS)
    options = parser.parse_args(argv[:cut])
    if options.log:
        output.open(options.log)
    root = _unpacked(options.code) if options.code else _installed()
    EXIT_FILE.parent.mkdir(parents=True, exist_ok=True)
    EXIT_FILE.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "STILLHOUSE_IN_POD": "1",
        "STILLHOUSE_EXIT_FILE": str(EXIT_FILE),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        # torchrun kills ranks that still save after 30 s, whatever time the pod has to end.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(options.grace * 5 // 6),
        # The ranks of a pod all run inside it, so loopback is enough, whatever interfaces it has.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    environment |= {"STILLHOUSE_ID": options.id} if options.id else {}
    environment |= {"STILLHOUSE_CODE": options.code} if options.code else {}
    if ASKED:
        return AGAIN, "asked to stop before it began", {}
    before = oom_kills(CGROUP)
    os.chdir(root)
    words = command(options.kind, argv[cut + 1 :], options.processes)
    returned = run(words, environment, output)
    lines = EXIT_FILE.read_text().splitlines() if EXIT_FILE.exists() else []
    said = [json.loads(line) for line in lines]
    ends = [one for one in said if "row" not in one]
    code, cause = verdict(returned, ends, bool(ASKED), oom_kills(CGROUP) > before)
    cause = cause or output.last_line() or f"it ended with exit code {code} and said nothing"
    return code, cause, rows_of(said, code, cause)


def command(kind: str, words: list[str], processes: int) -> list[str]:
    """What a pod of this kind runs, in the directory that holds train.py."""
    ours = [*COMMANDS[kind].split(), *words]
    if kind != "train" or processes == 1:
        return [sys.executable, *ours]
    # --multi_gpu is accelerate's word for its torchrun launcher, on a CPU too; port 0: a free one.
    launch = f"--multi_gpu --num_machines 1 --num_processes {processes} --main_process_port 0"
    fixed = "--mixed_precision no --dynamo_backend no"  # the run says its own
    return [sys.executable, "-m", "accelerate.commands.launch", *f"{launch} {fixed}".split(), *ours]


def verdict(returned: int, said: list[Json], is_asked: bool, is_oom: bool) -> tuple[int, str]:
    """The exit code of a pod, and why ('' where only the output can say it).

    `returned` is the child's own, negative for a signal; `said` is what the processes left in
    STILLHOUSE_EXIT_FILE: torchrun returns 1 whatever its ranks returned.
    """
    causes = {s["code"]: str(s["cause"] or "") for s in sorted(said, key=lambda s: -s["rank"])}
    if returned == 0:
        return 0, ""
    for code in FINAL:
        if code in causes or returned == code:
            return code, causes.get(code, "")
    # A rank that its launcher stopped, because another one failed, exits with 85 as well.
    if returned == AGAIN or (is_asked and AGAIN in causes):
        return AGAIN, causes.get(AGAIN, "")
    if is_oom:
        return OUT_OF_MEMORY, (
            "the kernel ended a process at this pod's memory limit (OOMKilled); give it more with"
            " site.memory_gib, or a smaller micro_batch"
        )
    if is_asked and not causes and returned in (1, *(-number for number in STOPS)):
        return AGAIN, "asked to stop before it could listen; nothing is lost"
    if returned < 0:
        return 128 - returned, f"killed by {signal.Signals(-returned).name}"
    return returned, causes.get(1, "")


def tell(**said: Any) -> None:
    """Leave a line for the pod that this process is a child of, if it is one of a pod.

    {code, rank, cause} says how the process ended; {row, state, code, cause} what an evaluation
    does with a row: begun, done, failed, or open, which is tried again.
    """
    if file := os.environ.get("STILLHOUSE_EXIT_FILE"):
        # In one write, so that two ranks' lines do not mix.
        with open(file, "ab", buffering=0) as lines:
            lines.write(json.dumps(said).encode() + b"\n")


def rows_of(said: list[Json], code: int, cause: str) -> Json:
    """What became of the rows of an evaluation that ended so; {} where nothing did.

    A row that was at work when the process died is the one to blame.
    """
    last = {one["row"]: one for one in said if "row" in one}
    failed = {row: [s["code"], s["cause"]] for row, s in last.items() if s["state"] == "failed"}
    if code not in (0, AGAIN):
        begun = [row for row, one in last.items() if one["state"] == "begun"]
        failed |= {row: [code, f"{cause}, while it was scored"] for row in begun}
    rows: Json = {"failed": failed} if failed else {}
    if done := ",".join(row for row, one in last.items() if one["state"] == "done"):
        rows["done"] = done
    return rows


def message(code: int, cause: str, tail: bytes, rows: Json | None = None) -> bytes:
    """The termination message: JSON that Kubernetes will not cut; `rows` as `rows_of` has them."""
    if code == 0:
        return b'{"exit_code": 0}'
    cause, text, length = cause[:CAUSE_LENGTH], tail.decode(errors="replace"), ROW_CAUSE_LENGTH
    rows = dict(rows or {})
    while True:
        failed = {row: [c, words[:length]] for row, (c, words) in rows.get("failed", {}).items()}
        said = {"exit_code": code, "cause": cause, "tail": text, **rows}
        said |= {"failed": failed} if failed else {}
        encoded = json.dumps(said, ensure_ascii=False).encode()
        if len(encoded) <= MESSAGE_BYTES:
            return encoded
        # The beginning of the tail goes first, then the ends of causes; names only if they must. A
        # row that is not named is tried again, and found done, or named by the next pod: where
        # some failures are named, no reader takes the other rows for failed.
        if text:
            text = text[len(text) // 8 + 1 :]
        elif failed and length:
            length //= 2
        elif "done" in rows:
            rows.pop("done")
        elif len(failed) > 1:
            rows["failed"] = dict(list(failed.items())[: len(failed) * 7 // 8])
        else:
            cause = cause[: len(cause) // 2]


def oom_kills(cgroup: Path) -> int:
    """How many processes of this container the kernel has ended for memory so far."""
    for name in ("memory.events", "memory/memory.oom_control"):  # cgroup v2, v1
        with contextlib.suppress(OSError):
            for line in (cgroup / name).read_text().splitlines():
                key, _, count = line.partition(" ")
                if key == "oom_kill":
                    return int(count)
    return 0


# ---------------------------------------------------------------- code


def _unpacked(wanted: str) -> Path:
    archive = Path(__file__).absolute().with_name("code.tar.gz")
    found = unpack(archive, CODE)
    if found != wanted:
        raise Mistake(
            f"pod.py: this pod is to run code {wanted}, {archive} holds {found}; submit it again"
        )
    return CODE


def unpack(archive: Path, into: Path) -> str:
    """Fill `into` from a bundle; the digest of its sources, as rundir.code_identity has it."""
    shutil.rmtree(into, ignore_errors=True)
    with tarfile.open(archive) as bundle:
        for member in filter(tarfile.TarInfo.isfile, bundle):
            content, path = bundle.extractfile(member), into / member.name
            assert content is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
    package, hasher = into / "stillhouse", hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        hasher.update(f"{source.relative_to(package)}\n".encode() + source.read_bytes())
    return hasher.hexdigest()[:16]


def _installed() -> Path:
    for root in (Path(__file__).absolute().parent.parent, Path.cwd()):
        if (root / "train.py").is_file():
            return root
    raise Mistake(f"pod.py: no train.py beside the package nor in {Path.cwd()}; see the Dockerfile")


# ---------------------------------------------------------------- processes


class Output:
    """What the child prints: to stdout, to a log, and its last lines kept."""

    def __init__(self) -> None:
        self.tail = bytearray()
        self._log: io.FileIO | None = None

    def open(self, log: Path) -> None:
        """Append to this file too; if it cannot be written, report that and go on."""
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = io.FileIO(log, "a")
        except OSError as error:
            self.write(f"pod.py: no log is kept: {error}\n".encode())

    def write(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-TAIL_BYTES:]
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        try:
            while self._log and data:
                data = data[self._log.write(data) :]
        except OSError as error:
            self._log = None
            self.write(f"pod.py: the log ends here: {error}\n".encode())

    def last_line(self) -> str:
        lines = [line for line in self.tail.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


def run(words: list[str], environment: dict[str, str], output: Output) -> int:
    """The return code of a command, negative for a signal, once its output is copied.

    Each stop signal is forwarded to it once: a second SIGTERM would make torchrun forget its ranks.
    Every other child that ends is reaped, because PID 1 inherits every orphan.
    """
    woken, waker = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, _wake)
    printed, theirs = os.pipe()
    to_pipe = [(os.POSIX_SPAWN_DUP2, theirs, number) for number in (1, 2)]
    pid = os.posix_spawn(words[0], words, environment, file_actions=to_pipe)
    os.close(theirs)
    passed: set[int] = set()
    returned = None
    with selectors.DefaultSelector() as ready:
        ready.register(woken, selectors.EVENT_READ)
        ready.register(printed, selectors.EVENT_READ)
        while returned is None:
            for number in {*ASKED} - passed:
                passed.add(number)
                os.kill(pid, number)  # ours until reaped: the pid is not reused
            for key, _ in ready.select():
                if key.fd == woken:
                    os.read(woken, 1024)
                elif data := os.read(printed, 65536):
                    output.write(data)
                else:
                    ready.unregister(printed)
            returned = _bury(pid)
    os.set_blocking(printed, False)  # an orphan may hold it open
    with contextlib.suppress(BlockingIOError):
        while data := os.read(printed, 65536):
            output.write(data)
    return returned


def _wake(number: int, frame: Any) -> None:
    """Do nothing: the signal itself has woken the selector."""


def _bury(pid: int) -> int | None:
    """The return code of `pid`, if it is among the processes that ended."""
    returned = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == pid:
                returned = os.waitstatus_to_exitcode(ended[1])
    return returned


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
