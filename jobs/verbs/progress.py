"""Shows a run while it trains, from its journal: a live bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from jobs import run_lines
from jobs.run_lines import RunLines
from pipeline.errors import without_secrets
from pipeline.runs import journal, progress
from pipeline.runs.journal import Tail

LINE_EVERY_S = 5.0
POLL_S = 0.5
OF_A_STEP = ("", "waiting for data", "a step", "reporting to Ray")  # phases that the bar shows better
NO_LINE = (*OF_A_STEP, "an evaluation", "saving")  # phases that are no news in a log


class View:
    """Follows the journal of a run folder in a thread and prints new records. uri: where the run is tracked."""

    def __init__(self, run_dir: Path, uri: str = "") -> None:
        self._run_dir, home = run_dir, Path.cwd()
        self._places = _places(run_dir, uri, home)
        self._lines = RunLines(self._places)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._console = Console(stderr=False, soft_wrap=True)
        self._since, self._wall = time.monotonic(), time.time()
        self._printed = 0.0
        self._shown: float | None = None  # the step of the last line
        self._phase = "starting"

    def start(self) -> None:
        """Call this once the driver holds the folder's lease, so that only records of this driver are shown."""
        self._tail = Tail(self._run_dir / "journal", from_end=True)
        written = self._run_dir / "journal" / f"rank0{journal.SUFFIX}"
        self._lines.remember(journal.read_all(written) if written.is_file() else ())
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Prints the remaining records and ends the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def index(self, what: str, done: int, total: int) -> None:
        """Prints the progress of building the index, as a line every few seconds."""
        now = time.monotonic()
        if total == 0 or done == total or now - self._printed > LINE_EVERY_S:
            self._printed = now
            self.notify(what if total == 0 else f"{what}: {done:,} of {total:,}")

    def notify(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False)

    def _follow(self) -> None:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            with Live(console=self._console, get_renderable=self._bar, refresh_per_second=4, transient=True):
                self._loop(self._note_phase)
        else:
            self._loop(self._print_progress)
            self._print_step()

    def _loop(self, show: Callable[[], object]) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(POLL_S)
            for line in self._lines.take(self._tail.read()):
                self.notify(line)
            show()

    def _bar(self) -> Text:
        """What the terminal shows below the lines: the progress, or the phase while nothing is trained."""
        width = self._console.width - 1  # a full line would wrap in some terminals
        if self._trains():
            values = dict(self._lines.values)  # another thread adds to them
            line = run_lines.bar_line(values, self._lines.total, width)
        else:
            line = f"{self._phase} {run_lines.duration(time.monotonic() - self._since)}"[:width]
        return Text(line, no_wrap=True, overflow="crop", end="")

    def _trains(self) -> bool:
        return "train/loss" in self._lines.values and self._phase in OF_A_STEP

    def _note_phase(self) -> bool:
        """Reads what the run does now; whether that is another phase than before, and worth a line."""
        found = progress.read(self._run_dir)
        if found is None or found.written < self._wall or found.phase == self._phase:
            return False
        if found.phase == "starting" and self._lines.started:  # nothing is heard of ranks that have ended
            return False
        self._phase = found.phase
        return self._phase not in NO_LINE

    def _print_progress(self) -> None:
        if self._note_phase():
            self.notify(f"... {self._phase}")
        if time.monotonic() - self._printed > LINE_EVERY_S:
            self._print_step()

    def _print_step(self) -> None:
        step = self._lines.values.get("step")
        if "train/loss" in self._lines.values and step != self._shown:
            self._shown, self._printed = step, time.monotonic()
            self.notify(run_lines.plain_line(self._lines.values, self._lines.total))


def _places(run_dir: Path, uri: str, home: Path) -> dict[str, str]:
    """Where the run is, and how its curves are looked at."""
    places = {"run": shorter(run_dir, home)}
    return places | ({"MLflow": look_at(uri, home)} if uri else {})


def shorter(path: Path, home: Path | None = None) -> str:
    """The path from the folder `home`, by default the working directory, if it is below that."""
    home = Path.cwd() if home is None else home
    return os.path.relpath(path, home) if path.is_relative_to(home) else str(path)


def look_at(uri: str, home: Path | None = None) -> str:
    """The address of a tracking server, or the command that shows a database in a browser; without secrets."""
    if uri.startswith(("http://", "https://")):
        return without_secrets(uri)
    scheme, colon, path = uri.partition(":///")
    shown = f"{scheme}{colon}{shorter(Path(path), home)}" if scheme == "sqlite" else without_secrets(uri)
    return f"mlflow ui --backend-store-uri {shown}"


@contextmanager
def follow(run_dir: Path, uri: str = "") -> Iterator[View]:
    """Shows the run in `run_dir` until the end of the with block."""
    view = View(run_dir.absolute(), uri)  # the working directory changes while Ray starts
    try:
        yield view
    finally:
        view.stop()
        sys.stdout.flush()
