"""Catch SIGTERM and SIGINT in one flag, which is polled wherever work can be interrupted."""

from __future__ import annotations

import signal
from typing import Any

from stillhouse.errors import Interrupted


class StopFlag:
    """Set by SIGTERM or SIGINT; polled between steps and inside every rollout and evaluation."""

    def __init__(self) -> None:
        self.is_set = False

    def install(self) -> None:
        """Catch SIGTERM and SIGINT in this process; a second SIGINT acts at once."""
        signal.signal(signal.SIGTERM, self._set)
        signal.signal(signal.SIGINT, self._set)

    def _set(self, number: int, frame: Any) -> None:
        if self.is_set and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.is_set = True

    def check(self) -> None:
        """Raise Interrupted if somebody asked us to stop."""
        if self.is_set:
            raise Interrupted(
                "asked to stop; everything completed is saved, run the same line again"
            )
