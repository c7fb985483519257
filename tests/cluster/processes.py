"""Start and stop the programs that a test needs."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tests.cluster.api import Refused

Found = TypeVar("Found")


def until(what: str, check: Callable[[], Found], timeout_s: float = 60.0) -> Found:
    """The first true value that `check` returns. Until then it may raise OSError or Refused.

    Raises TimeoutError after `timeout_s`.
    """
    end = time.monotonic() + timeout_s
    while True:
        trouble: object = ""
        try:
            if found := check():
                return found
        except (OSError, Refused) as error:
            trouble = error
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s:g} s: {what} {trouble}".strip())
        time.sleep(0.03)


def free_port() -> int:
    """A port of the loopback that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Processes:
    """Programs by name, each with its output in `logs`. They die with this process in any case."""

    def __init__(self, home: Path, logs: Path) -> None:
        self.home = home
        self.logs = logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        # A program dies with the thread that started it: this one thread starts all, and lives on.
        self.starter = ThreadPoolExecutor(1)

    def start(self, name: str, *command: str, cwd: Path | None = None) -> None:
        """Starts a program in a session of its own."""
        die_with_us = ["setpriv", "--pdeathsig=KILL", "--"] if shutil.which("setpriv") else []
        # All of them talk to this machine only: no proxy may come between, and no user's settings.
        env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        env |= {"HOME": str(self.home)}
        with open(self.logs / f"{name}.log", "ab") as log:
            begin = functools.partial(
                subprocess.Popen[bytes],
                [*die_with_us, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=cwd or self.home,
                env=env,
                start_new_session=True,
            )
            self.running[name] = self.starter.submit(begin).result()

    def wait_for(self, name: str, check: Callable[[], object], timeout_s: float = 120.0) -> None:
        """Waits until a program is ready. Raises RuntimeError with its last output if it ends."""

        def at_work() -> object:
            if self.running[name].poll() is None:
                return check()
            said = (self.logs / f"{name}.log").read_text(errors="replace")
            raise RuntimeError(
                f"{name} ended with {self.running[name].returncode}:\n{said[-3000:]}"
            )

        until(f"{name} at work (see {self.logs})", at_work, timeout_s)

    def stop(self, name: str) -> None:
        """Kills a program, and waits for its end."""
        program = self.running.pop(name)
        program.kill()
        program.wait()

    def stop_all(self) -> None:
        """Ends every program; none can be started afterwards."""
        for name in list(self.running):
            self.stop(name)
        self.starter.shutdown()
