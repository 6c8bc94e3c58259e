"""The interface of a tracker: a service or a set of files to which a run's journal is replayed.

A tracker receives the same values more than once: after an error, a kill or a resume. Every call is therefore
idempotent, and a (key, step) that the tracker has already received changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from pipeline.errors import JsonValue

RunStatus = Literal["FINISHED", "FAILED", "KILLED", "STOPPED"]  # STOPPED: on request, after a save


@dataclass(frozen=True)
class MetricPoint:
    """One value of a metric; time in seconds since 1970."""

    key: str
    step: int
    value: float
    time: float


@dataclass(frozen=True)
class Ending:
    """How the driver of a run ended, and when, in seconds since 1970."""

    status: RunStatus
    time: float
    error: str | None = None


@dataclass(frozen=True)
class DatasetUse:
    """A split that a run uses: the data set's name, where it is, what identifies its images, how many, and for what."""

    name: str
    root: str
    identity: str
    num_images: int
    num_classes: int
    context: str  # training or validation


class Progress(Protocol):
    """How much of a run folder a tracker has received.

    offsets: bytes of each journal, by file name; what precedes an offset is not sent again. files: for each artifact,
    what identified its content when it was sent. Both only save time: that nothing is doubled does not depend on them.
    """

    offsets: dict[str, int]
    files: dict[str, JsonValue]

    def save(self) -> None:
        """Stores the progress, if the tracker has a place for it."""


@dataclass
class NoProgress:
    """The base of trackers that find out what they have received: journals are replayed from the beginning."""

    offsets: dict[str, int] = field(default_factory=dict)
    files: dict[str, JsonValue] = field(default_factory=dict)

    def save(self) -> None:
        """Stores nothing."""


class Tracker(Protocol):
    """Where a run's record is sent. Methods raise whatever their library raises; the same object may be used again."""

    @property
    def place(self) -> str:
        """Where the record goes, for messages; without secrets."""

    @property
    def takes_files(self) -> bool:
        """Whether artifacts are sent; if not, `log_artifact` is never called."""

    def open(self, run_dir: Path, recipe: Mapping[str, JsonValue]) -> Progress:
        """Connects, finds or creates the record of this run, and describes the run. Called once per object.

        Returns what has been received before.
        """

    def log(self, points: Sequence[MetricPoint]) -> None:
        """Records values of metrics, in the order of the journals."""

    def log_artifact(self, path: Path, place: str) -> None:
        """Stores a file in the folder `place` ("" is the top), or the content of a folder as the folder `place`."""

    def log_summary(self, facts: Mapping[str, str]) -> None:
        """Sets facts about the run: a value replaces the previous one of its key; other keys are unchanged.

        Known keys: checkpoint, checkpoint.best, checkpoint.last (locations), note (Markdown, as in note.md),
        description (Markdown, from the run's figures), parent (a run folder), status, and what `summary_facts` gives.
        """

    def log_inputs(self, datasets: Sequence[DatasetUse]) -> None:
        """Records which splits the run uses."""

    def running(self) -> None:
        """Marks the run as running, also if it had ended before."""

    def finish(self, ending: Ending) -> None:
        """Marks the run as ended; called after everything else has been sent."""
