"""The watch's thread for the run folder, which may be on a file system that does not answer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import ResourceError
from pipeline.runs import progress
from pipeline.runs.files import write_text
from pipeline.runs.journal import Journal, Record, Tail
from pipeline.runs.progress import RunProgress

PASS_S = 0.5
SAVE_EVERY_S = 5.0
LAST_S = 5.0  # how long the end of a run waits for a folder that does not answer


class FolderThread:
    """Reads requests to stop and the newest event, and writes progress.json, reports and events."""

    def __init__(self, run_dir: Path) -> None:
        self.stop_requested = False
        self.last_event: Record | None = None
        self.progress: RunProgress | None = None  # to be written
        self._run_dir = run_dir
        self._journal: Journal | None = None
        self._events: deque[tuple[str, dict[str, object]]] = deque()
        self._reports: deque[tuple[str, str]] = deque()
        self._writes = threading.Lock()
        self._over = threading.Event()
        self._passed = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="run-folder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, within_s: float = LAST_S) -> None:
        """Writes the rest; gives up where the folder does not answer."""
        self._over.set()
        self._thread.join(within_s)

    def forgive(self) -> None:
        """Counts the folder as just heard: this process could not listen."""
        self._passed = time.monotonic()

    def silent_s(self) -> float:
        """Seconds since the folder last answered."""
        return time.monotonic() - self._passed

    @contextmanager
    def journal(self, journal: Journal) -> Iterator[None]:
        """Events go to `journal` until the end of the block; earlier ones are written now."""
        self._journal = journal
        try:
            yield
        finally:
            if self._writes.acquire(timeout=LAST_S):
                with suppress(OSError, ResourceError):
                    self._write()
                self._journal = None
                self._writes.release()

    def event(self, kind: str, **facts: object) -> None:
        """Writes an event to the driver's journal, soon."""
        self._events.append((kind, facts))

    def report(self, name: str, text: str) -> None:
        """Writes a file of the run folder, soon."""
        self._reports.append((name, text))

    def _run(self) -> None:
        tail = Tail(self._run_dir / "journal", from_end=True)
        saved, written = 0.0, RunProgress()
        ended = False
        while not ended:
            ended = self._over.wait(PASS_S)
            with suppress(OSError, ResourceError):  # a full disk: training reports it
                self._pass(tail)
                new = self.progress
                due = time.monotonic() - saved > SAVE_EVERY_S
                if new is not None and (ended or due or _differs(new, written)):
                    saved, written = time.monotonic(), new
                    progress.write(self._run_dir, new)
            self._passed = time.monotonic()

    def _pass(self, tail: Tail) -> None:
        with self._writes:
            self._write()
        self.stop_requested = self.stop_requested or (self._run_dir / "stop").exists()
        events = [record for record in tail.read() if "event" in record]
        self.last_event = events[-1] if events else self.last_event

    def _write(self) -> None:
        while self._reports:
            name, text = self._reports.popleft()
            write_text(self._run_dir / name, text)
        while self._events and self._journal is not None:
            kind, facts = self._events.popleft()
            self._journal.event(kind, None, **facts)


def _differs(new: RunProgress, written: RunProgress) -> bool:
    """Whether a reader must know at once: of a hang, or of another phase while no steps are made."""
    return new.hang != written.hang or (new.step == written.step and new.phase != written.phase)
