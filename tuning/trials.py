"""A running trial: its driver in a thread, its journal as it grows, and what an earlier driver left behind."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline import config as configs
from pipeline.data.index import open_splits
from pipeline.errors import AdaptNetError
from pipeline.execution import launch
from pipeline.execution.launch import Result
from pipeline.run_config import RunConfig
from pipeline.runs import journal, records
from pipeline.runs.journal import FirstValues, Record
from pipeline.runs.lease import Lease
from pipeline.tracking import Uploader
from pipeline.training import checkpoint
from tuning.record import Trial

REASON_CHARS = 500  # most characters of a failed trial's error


@dataclass(frozen=True)
class LoggedMetric:
    """A metric of a trial's journal, such as eval/gates-hard/top1 at a step."""

    key: str
    step: int
    value: float


class Runner:
    """Trains a trial in a thread and reads the metrics that its journal gets meanwhile.

    result or error is set once the thread has `ended`. reached: the newest step of this attempt; newest: of all
    attempts. trained_s: seconds of training over all attempts.
    """

    def __init__(self, trial: Trial, config: RunConfig, folder: Path) -> None:
        self.trial, self.folder = trial, folder
        self.resumes = (folder / "config.yaml").exists()
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.reached, self.newest, self.trained_s = -1, 0, 0.0
        self._config = launch.absolute(config)
        self._path = folder / "journal" / f"rank0{journal.SUFFIX}"
        self._earlier_attempts = records.attempts(folder)
        self._offset, self._first = 0, FirstValues()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"trial-{trial.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = launch.train(self._config, self.folder)
        except BaseException as error:  # the sweep decides what it means for the trial
            self.error = error
        self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def is_to_stop(self) -> bool:
        """Whether the trial is to stop early and this attempt has reached that step."""
        return self.trial.ends_at is not None and self.reached >= self.trial.ends_at

    def stop(self) -> None:
        """Asks the driver to save and stop. Repeat it: a driver that starts removes earlier requests."""
        if (self.folder / "lease.json").exists() and not self.ended:
            (self.folder / "stop").touch()

    @cached_property
    def epochs_per_step(self) -> float:
        """The share of the training images in a batch."""
        config = self._config
        return config.training.batch_size / len(open_splits(config.data, config.seed).train)

    def read(self) -> Iterator[LoggedMetric]:
        """The metrics that are new since the last call, each (key, step) once, earlier attempts' first."""
        moved = True
        while moved and self._path.exists():
            before = self._offset
            new, self._offset = journal.read(self._path, before)
            moved = self._offset > before
            for record in new:
                self._note(record)
                if self._first.take(record):
                    if record["key"] == "time/interval_s":
                        self.trained_s += record["value"]
                    yield LoggedMetric(record["key"], record["step"], record["value"])

    def _note(self, record: Record) -> None:
        self.trial.total_steps = record.get("total_steps", self.trial.total_steps)
        if "key" in record:
            self.trial.step = record["step"]
            self.newest = max(self.newest, record["step"])
            if record.get("attempt", 0) > self._earlier_attempts:
                self.reached = max(self.reached, record["step"])


def saved_step(config: RunConfig, folder: Path) -> int:
    """The step of a trial's newest complete checkpoint; -1 if it has none."""
    if not folder.exists():
        return -1
    names = checkpoint.open_storage(launch.absolute(config).checkpoint, folder).names()
    return int(names[-1].rpartition("-")[2]) if names else -1


def send_rest(config: RunConfig, folder: Path) -> None:
    """Sends to the trackers what a killed driver left unsent of a trial that has ended."""
    held = Lease(folder).acquire()
    try:
        with Uploader(folder, config.tracking, configs.as_mapping(config), command=sys.argv, fence=held.fence):
            pass
    finally:
        held.release()


def reason_of(error: BaseException) -> str:
    """An error in one line, as the reason of a failed trial."""
    kind = "" if isinstance(error, AdaptNetError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).strip().splitlines())}"[:REASON_CHARS]
