"""progress.json: what a run does now, and since when it makes no progress; the driver writes it every few seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CheckpointError, JsonValue
from pipeline.runs.files import read_json, write_json
from pipeline.runs.records import Record

FILE = "progress.json"
SILENT_S = 60.0  # a driver that has not written for so long is reported


@dataclass(frozen=True)
class RunProgress(Record):
    """moved: the time of the last sign of progress, written: of this file, in seconds since 1970.

    phase: what the rank that stands still longest does. hang: why the run makes no progress; None if it does.
    """

    FILE = FILE
    step: int = 0
    phase: str = ""
    moved: float = 0.0
    written: float = 0.0
    hang: str | None = None

    @classmethod
    def _from_fields(cls, content: Mapping[str, JsonValue]) -> RunProgress:
        return cls(
            step=int(str(content.get("step", 0))),
            phase=str(content.get("phase", "")),
            moved=float(str(content["moved"])),
            written=float(str(content["written"])),
            hang=None if content.get("hang") is None else str(content["hang"]),
        )

    def sentence(self) -> str:
        """Where the run is, or since when it makes no progress."""
        return self.stall() or f"step {self.step}, {self.phase}, at {clock(self.written)}"

    def stall(self) -> str | None:
        """What a reader must know of a run that is said to run: since when it makes no progress; None if it does."""
        if time.time() - self.written > SILENT_S:
            return f"nothing was heard of the driver since {clock(self.written)}, at step {self.step}"
        if self.hang is not None:
            return f"no progress since {clock(self.moved)}: {self.hang}"
        return None


def clock(when: float) -> str:
    """A time in seconds since 1970 as that of the day, with the date if that is another day: "Nov 28 12:03:10"."""
    day, today = time.localtime(when), time.localtime()
    return time.strftime("%H:%M:%S" if day[:3] == today[:3] else "%b %d %H:%M:%S", day)


def write(run_dir: Path, progress: RunProgress) -> None:
    write_json(run_dir / FILE, progress.to_json())


def read(run_dir: Path) -> RunProgress | None:
    """The progress of a run; None if its driver wrote none, or a file that cannot be read."""
    try:
        return RunProgress.from_json(read_json(run_dir / FILE), str(run_dir))
    except (OSError, ValueError, CheckpointError):
        return None
