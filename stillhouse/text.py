"""Format times, progress, and text from other programs for people to read."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterable
from typing import Any

from stillhouse.errors import visible


def say(text: str, file: Any = None, flush: bool = False) -> None:
    """Print for a person; to stdout if no `file` is given."""
    print(visible(text), file=file, flush=flush)


def number_of(count: int, noun: str) -> str:
    """A number of things: 1 step, or 2000 steps."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shell_line(words: Iterable[str]) -> str:
    """The words as a line for a shell; of KEY=VALUE only the value is quoted."""
    return " ".join(map(_for_shell, words))


def _for_shell(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals or shlex.quote(key) != key or shlex.quote(value) == value:
        return shlex.quote(word)
    if "'" in value and re.search(r'[\\$`"!]', value) is None:  # nothing that a shell fills in
        return f'{key}="{value}"'
    return f"{key}={shlex.quote(value)}"


def duration(seconds: float) -> str:
    """A time as a person says it: 0.4 s, 42 s, 7 min, 3 h 20 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


class Pace:
    """Progress of a task that goes step by step, and the time left at its current rate."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # a count of steps, and when it was seen

    def told(self, done: int, of: int | None, clock: float | None = None) -> str:
        """`step 12/100, about 3 min left`; no time before a second count of steps is seen."""
        clock = time.monotonic() if clock is None else clock
        first, since = self._first = self._first or (done, clock)
        if of is None:
            return f"step {done}"
        if not first < done < of:
            return f"step {done}/{of}"
        left = (clock - since) / (done - first) * (of - done)
        return f"step {done}/{of}, about {duration(left)} left"
