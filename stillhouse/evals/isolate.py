"""Keep what goes wrong with one row of an evaluation from ending it for the others.

    eval_begun.json   in a row's directory while the row is scored; it stays if the process dies
    eval_error.json   why the row could not be scored; removed when it is tried again

A death is charged to the row that was at work, which is scored last from then on: the others have
their scores before it can kill the process again. How often it is tried is up to who starts the
processes: the launcher on this machine counts deaths (`sweep.local.outcomes`), a Job of Kubernetes
only starts the next pod. So in a pod the note counts, and after DEATHS the row has failed.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Generator
from pathlib import Path

from stillhouse.errors import (
    MISTAKE,
    POISON,
    UNKNOWN,
    ContractError,
    NotScored,
    StillhouseError,
    Unwritable,
)
from stillhouse.files import explained_writing
from stillhouse.pod import tell
from stillhouse.rundir import (
    RunDir,
    eval_note,
    now,
    read_eval_note,
    sweep_leftovers,
    write_json,
)

DEATHS = 2  # of one Job's pods at the same row: a single one may be its node's fault
TRACE = 4000  # characters of a traceback that are kept


class Isolation:
    """What became of the rows of one evaluation. A row is known by its directory, `home`."""

    def __init__(self) -> None:
        self.job = os.environ.get("STILLHOUSE_JOB")  # uid of the pod's Job
        self.failed: dict[Path, tuple[int, str]] = {}  # row -> exit code that it is worth, and why

    def forget(self, home: Path) -> None:
        """Forget why a row could not be scored before."""
        with self.guard(home), explained_writing(home):
            sweep_leftovers(home)
            eval_note(home, "error").unlink(missing_ok=True)

    def is_suspect(self, home: Path) -> bool:
        """Whether a process died at this row; it has failed where that were DEATHS of our Job's."""
        deaths = self._deaths(home)
        if deaths >= DEATHS:
            self.fail(
                home, MISTAKE,
                f"{deaths} processes in a row died while they scored it: killed, out of memory or"
                " crashed",
            )  # fmt: skip
            self.forget_begun(home)
        return bool(read_eval_note(home, "begun"))

    def _deaths(self, home: Path) -> int:
        """How many pods of our Job in a row died while they scored this row."""
        note = read_eval_note(home, "begun")
        is_counted = self.job is not None and note.get("job") == self.job
        return note.get("deaths", 0) + 1 if is_counted else 0

    @contextlib.contextmanager
    def guard(self, *homes: Path) -> Generator[None, None, None]:
        """Note what goes wrong with these rows in this context, and leave it; other rows go on.

        Raises what is wrong with the whole evaluation, a stop, and memory that was too small.
        """
        try:
            yield
        except (ContractError, Unwritable) as error:
            if _is_no_memory(error):
                raise
            for home in homes:
                self.fail(home, error.exit_code, f"{type(error).__name__}: {error}")
        except StillhouseError:
            raise
        except Exception as error:
            if _is_no_memory(error) or _is_broken(error):
                raise
            last = traceback.format_exception_only(error)[-1].strip()
            for home in homes:
                self.fail(home, UNKNOWN, last, traceback.format_exc()[-TRACE:])

    @contextlib.contextmanager
    def scoring(self, home: Path) -> Generator[None, None, None]:
        """The same, and a note says that this row is at work; it stays if the process dies."""
        begun, row = eval_note(home, "begun"), _name(home)
        note = {"format": 1, "pid": os.getpid(), "job": self.job, "at": now()}
        with self.guard(home):
            write_json(begun, note | {"deaths": self._deaths(home)})
        tell(row=row, state="begun")
        try:
            with self.guard(home):
                yield
        except BaseException as error:
            if not _is_broken(error):
                self.forget_begun(home)
                tell(row=row, state="open")
            raise
        self.forget_begun(home)
        if home not in self.failed:
            self.done(home)

    def forget_begun(self, home: Path) -> None:
        """Remove the note that a row is at work: its process did not die."""
        with self.guard(home), explained_writing(home):
            eval_note(home, "begun").unlink(missing_ok=True)

    def done(self, home: Path) -> None:
        """Tell that a row has all its scores."""
        tell(row=_name(home), state="done")

    def check(self) -> None:
        """Raise where rows could not be scored, when all others are.

        Raises:
            ContractError: each of them would fail again.
            NotScored: one may succeed when it is tried again.
        """
        if not self.failed:
            return
        said = "; ".join(f"{home.name}: {cause}" for home, (_, cause) in self.failed.items())
        rows = f"{len(self.failed)} row{'s' if len(self.failed) > 1 else ''}"
        text = f"eval: {rows} could not be scored, all others are: {said}"
        is_final = all(code in POISON for code, _ in self.failed.values())
        raise ContractError(text) if is_final else NotScored(text)

    def fail(self, home: Path, code: int, cause: str, trace: str = "") -> None:
        """Note why a row cannot be scored, beside it where its directory is there."""
        self.failed[home] = code, cause
        if home.is_dir() or home.parent.name == "baselines":
            note = {"format": 1, "pid": os.getpid(), "job": self.job, "at": now()}
            note |= {"code": code, "cause": cause, "traceback": trace}
            with contextlib.suppress(Unwritable, OSError):  # it is printed and told all the same
                write_json(eval_note(home, "error"), note)
        print(f"eval: {home.name} could not be scored: {cause}\n{trace}".rstrip(), flush=True)
        tell(row=_name(home), state="failed", code=code, cause=cause)


def _name(home: Path) -> str:
    """What a launcher calls a row: the id of its run, or the name of its baseline's directory."""
    return home.name if home.parent.name == "baselines" else RunDir(home).id


def _is_no_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error)


def _is_broken(error: BaseException) -> bool:
    """Whether this process can compute nothing more: after an error of CUDA's each call fails."""
    return "CUDA error" in str(error) and not _is_no_memory(error)
