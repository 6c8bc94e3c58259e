"""Shows a run while it trains, from its journal: a live bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.runs.journal import Record, Tail

LINE_EVERY_S = 5.0
POLL_S = 0.5
QUIET = ("checkpoint", "driver-started", "driver-ended", "hang", "ray-frozen")  # events that are not printed


class View:
    """Follows the journal of a run folder in a thread and prints new records."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._console = Console(stderr=False, soft_wrap=True)
        self._values: dict[str, float] = {}
        self._total = 0
        self._printed = 0.0
        self._bar: Progress | None = None

    def start(self) -> None:
        """Call this once the driver holds the folder's lease, so that only records of this driver are shown."""
        self._tail = Tail(self._run_dir / "journal", from_end=True)
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
            line = what if total == 0 else f"{what}: {done:,} of {total:,}"
            self._console.print(line, highlight=False, markup=False)

    def notify(self, text: str) -> None:
        """Prints a message of the driver's watch."""
        self._console.print(text, highlight=False, markup=False)

    def _follow(self) -> None:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self._console) as self._bar:
                self._loop()
        else:
            self._loop()

    def _loop(self) -> None:
        task = self._bar.add_task("training", total=None, facts="starting") if self._bar else None
        ended = False
        while not ended:
            ended = self._ended.wait(POLL_S)
            for record in self._tail.read():
                self._take(record)
            if self._bar is not None and task is not None:
                done = self._values.get("step", 0)
                self._bar.update(task, total=self._total or None, completed=done, facts=self._facts())
            elif self._values and (ended or time.monotonic() - self._printed > LINE_EVERY_S):
                self._line()

    def _line(self) -> None:
        if self._values.get("step") != getattr(self, "_shown", None):
            self._shown = self._values.get("step")
            self._printed = time.monotonic()
            self._console.print(self._facts(), highlight=False)

    def _take(self, record: Record) -> None:
        if "event" in record:
            self._total = record.get("total_steps", self._total)
            if record["event"] not in QUIET:
                self._console.print(_event_line(record), highlight=False, markup=False)
        elif not record["key"].startswith("system/"):
            self._values["step"] = max(self._values.get("step", 0), record["step"])
            self._values[record["key"]] = record["value"]

    def _facts(self) -> str:
        """Step, epoch, loss, top-1, images/s, share of time spent waiting for data, remaining time."""
        values = self._values
        if "time/images_per_s" not in values:
            return "starting"
        parts = [f"step {values['step']:.0f}/{self._total}", f"epoch {values.get('train/epoch', 0):.2f}"]
        parts += [f"loss {values['train/loss']:.4f}", f"top1 {values['train/top1']:.3f}"]
        parts += [f"{values['time/images_per_s']:.0f} img/s", f"data wait {values['time/data_share']:.0%}"]
        evaluated = [key for key in values if key.startswith("eval/") and key.endswith("/top1")]
        parts += [f"val top1 {values[key]:.3f}" for key in evaluated[:1]]
        return "  ".join([*parts, f"time left {self._time_left()}"])

    def _time_left(self) -> str:
        """The remaining time, extrapolated from the last log interval."""
        if not self._total:
            return "?"
        per_step = self._values["time/interval_s"] / self._values["time/interval_steps"]
        seconds = round((self._total - self._values["step"]) * per_step)
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


def _event_line(record: Record) -> str:
    skip = ("event", "attempt", "fence", "time", "step", "text")
    facts = [f"{key} {value}" for key, value in record.items() if key not in skip and value not in (None, [])]
    text = [str(record["text"])] if "text" in record else []
    at = f" at step {record['step']}" if record.get("step") is not None else ""
    return f"[{record['event']}]{at} {', '.join([*text, *facts])}".rstrip()


@contextmanager
def follow(run_dir: Path) -> Iterator[View]:
    """Shows the run in `run_dir` until the end of the with block."""
    view = View(run_dir.absolute())  # the working directory changes while Ray starts
    try:
        yield view
    finally:
        view.stop()
        sys.stdout.flush()
