"""The interface for displaying a sweep: a line for each event, and the trials for a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from tuning.record import Trial

REMIND_EVERY_S = 60.0


class Watcher(Protocol):
    """`say` gets a line for each event, `show` the trials at each poll; `close` is called before a hard exit."""

    def say(self, text: str) -> None: ...

    def show(self, trials: Sequence[Trial], running: int) -> None: ...

    def close(self) -> None: ...


class SilentWatcher:
    """Shows nothing."""

    def say(self, text: str) -> None: ...

    def show(self, trials: Sequence[Trial], running: int) -> None: ...

    def close(self) -> None: ...


class Reminder:
    """Reports what a sweep is waiting for, each reason at most every REMIND_EVERY_S."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._times = say, dict[str, float]()

    def said_again(self, text: str) -> bool:
        """Reports the reason if it is due; returns whether it had been reported before."""
        before, now = self._times.get(text), time.monotonic()
        due = before is None or now - before > REMIND_EVERY_S
        if due:
            self._times[text] = now
            self._say(text)
        return due and before is not None
