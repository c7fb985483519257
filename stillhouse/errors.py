"""Define every error that a user can meet, with its exit code.

    StillhouseError            42   a mistake in the request: never retried
    ├── ConfigError            42   a key, a flag, a value, a sweep file
    │   └── Unwritable         42   a place that takes no files
    ├── DataError              42   a data file, a row, a prompt set
    ├── ContractError          42   an adapter, base or run that cannot be what it claims to be
    ├── Diverged               43   NaN, an exploding loss, a rollout gap beyond its bound
    ├── OutOfMemory            44   retry only with a smaller micro_batch
    ├── Stopped                46   a watch rule ended the run; state is saved; not a failure
    ├── Interrupted            85   a stop was requested; state is saved; run the command again
    ├── NodeFault               1   this machine cannot do it, another one may: retried
    ├── NotScored               1   rows of an evaluation failed in a way that may pass: retried
    └── NoProgress              1   stopped again and again before a step: retried

Anything else that ends a process is an infrastructure failure and may be retried.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Callable, Generator, Iterable

DONE = 0
SOME_FAILED = 1  # how a launcher's verb ends where some points failed
MISTAKE = 42
DIVERGED = 43
OUT_OF_MEMORY = 44
STOPPED = 46
AGAIN = 85
UNKNOWN = 1  # how it ended was not recorded
TOO_LATE = 124  # its deadline passed; the code that timeout(1) has for it
CANNOT_START = 125  # it never ran: image, secret, volume, quota; the code that containers use

# Codes after which the same run would end the same way: the reconcile loop never retries them.
POISON = frozenset({MISTAKE, DIVERGED, OUT_OF_MEMORY})


class StillhouseError(Exception):
    """A mistake in the request; its text says what, where, what was allowed, what to do."""

    exit_code = MISTAKE


class ConfigError(StillhouseError):
    """A key, flag, value or sweep file that cannot be right."""


class Unwritable(ConfigError):
    """A path at which nothing can be written."""


class DataError(StillhouseError):
    """A data file or row that cannot be read as what it claims to be."""


class ContractError(StillhouseError):
    """An adapter, base model or run directory that does not match what was trained."""


class Diverged(StillhouseError):
    """The numbers left the range in which training means anything."""

    exit_code = DIVERGED


class OutOfMemory(StillhouseError):
    """The device could not hold the step."""

    exit_code = OUT_OF_MEMORY


class Stopped(StillhouseError):
    """A watch rule ended the run: not a failure, and nothing to try again."""

    exit_code = STOPPED


class Interrupted(StillhouseError):
    """A stop was requested; everything completed is saved."""

    exit_code = AGAIN


class NodeFault(StillhouseError):
    """This machine lacks what the run needs; the same run may succeed on another one."""

    exit_code = 1


class NotScored(StillhouseError):
    """Some rows of an evaluation could not be scored, for a reason that may pass."""

    exit_code = 1


class NoProgress(StillhouseError):
    """The infrastructure ended the run again and again before it completed a step."""

    exit_code = 1


def nearest(word: str, allowed: Iterable[str]) -> str:
    """' Did you mean "x"?' for the closest allowed word, or '' when nothing is close."""
    allowed = list(allowed)
    swapped = [one for one in allowed if sorted(one) == sorted(word)]  # tyni: half alike, by place
    close = swapped or difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""


_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters escaped, on which a terminal would act: \\x1b.

    Causes, events, names and logs come from programs and people that we know nothing of.
    """
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def exit_code_of(action: Callable[[], int | None]) -> int:
    """The exit code of `action`; a user's mistake is printed in its words, without traceback."""
    try:
        return action() or DONE
    except StillhouseError as error:
        print(visible(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return error.exit_code


@contextlib.contextmanager
def explained_imports() -> Generator[None, None, None]:
    """If a package cannot be imported within this context, print a sentence and exit with 42.

    For train.py and eval.py, which people start with whatever Python comes first.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "stillhouse":
            raise
        print(
            f"this Python ({sys.executable}) has no package {error.name}, which `uv sync` and `make"
            " quickstart` install into .venv: start the line with `uv run python`, or with"
            " .venv/bin/python, or activate that first (`. .venv/bin/activate`)",
            file=sys.stderr,
        )
        raise SystemExit(MISTAKE) from error
