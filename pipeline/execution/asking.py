"""A call to Ray in a thread of its own, which can be given up: Ray's C++ code cannot be interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Asking:
    """Runs `ask` in a thread; whoever gives it up just leaves it. name: of the thread."""

    def __init__(self, ask: Callable[[], None], name: str) -> None:
        self.error: Exception | None = None  # what `ask` has raised
        self._ask = ask
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def lasts(self) -> bool:
        """Whether it still runs."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Waits for its end, at most so long."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._ask()
        except Exception as error:
            self.error = error
