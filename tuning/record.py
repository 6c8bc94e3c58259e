"""A sweep's record on disk: an event is written before it takes effect, so what is not in the record did not happen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import ResourceError
from pipeline.runs import journal
from pipeline.runs.files import remark
from pipeline.runs.journal import Journal
from tuning.events import (
    NAMES,
    CostMeasured,
    Event,
    NetCost,
    SampleDrawn,
    State,
    TrialEnded,
    TrialJudged,
    TrialOvertime,
    TrialRefused,
    from_json,
    to_json,
)
from tuning.space import Sample

ENDED = ("finished", "stopped", "failed", "refused")
NAME = "sweep"  # name of the journal
OVERTIME = "max_minutes"  # the reason of a trial that was stopped by this bound


@dataclass
class Trial:
    """One sample and its state by the events so far."""

    sample: Sample
    state: State = "planned"
    reason: str = ""  # why a trial was refused, stopped or failed
    cost: NetCost | None = None  # if it was measured
    judged: dict[int, float] = field(default_factory=dict)  # step: value, of the evaluations during training
    ends_at: int | None = None  # the step at which it is to stop before its time
    ends_by: str = ""  # what decided that: ASHA or max_minutes
    metrics: Mapping[str, float] = field(default_factory=dict)  # final metrics
    step: int = 0
    total_steps: int = 0

    @property
    def number(self) -> int:
        return self.sample.number

    @property
    def name(self) -> str:
        return self.sample.name

    @property
    def newest(self) -> float | None:
        """The newest judged value."""
        return self.judged[max(self.judged)] if self.judged else None


class SweepRecord:
    """The events in a sweep's folder, and the trials in their state by these events.

    `before` holds the events of earlier drivers. Raises ResourceError if the journal cannot be written.
    """

    def __init__(self, run_dir: Path, fence: int) -> None:
        self.trials: list[Trial] = []
        self.num_ends = 0  # trials that ended, each retry counted again
        self._journal = Journal(run_dir / "journal", NAME, fence=fence)
        self.before = list(past_events(run_dir))
        path = run_dir / "journal" / f"{NAME}{journal.SUFFIX}"
        if path.is_file() and (lost := journal.unreadable(path)):
            remark(path, f"{lost} of its lines cannot be read and are left out")
        try:
            for event in self.before:
                self._apply(event)
        except LookupError:
            self.close()
            raise _damaged(path, "the sample of a trial is missing") from None

    def close(self) -> None:
        self._journal.close()

    def write(self, event: Event) -> None:
        """Writes an event to the disk, then applies it to its trial."""
        fields = {key: value for key, value in to_json(event).items() if key != "step"}
        self._journal.event(NAMES[type(event)], getattr(event, "step", None), **fields)
        self._journal.sync()
        self._apply(event)

    def add(self, sample: Sample) -> Trial:
        """Records a new sample; returns its trial."""
        self.write(SampleDrawn(sample.number, sample.case, dict(sample.values)))
        return self.trials[sample.number]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metrics of the sweep as a whole, for its tracked run."""
        self._journal.metrics(step, values)

    def _apply(self, event: Event) -> None:
        if isinstance(event, SampleDrawn):
            if event.number == len(self.trials):  # it is known already if a driver wrote it during a takeover
                self.trials.append(Trial(Sample(event.number, event.case, event.values)))
            return
        trial = self.trials[event.number]
        match event:
            case TrialRefused():
                trial.state, trial.reason = "refused", event.reason
            case CostMeasured():
                trial.cost = NetCost(event.macs, event.parameters)
            case TrialJudged():
                trial.judged[event.step] = event.value
                if event.ends:
                    trial.ends_at, trial.ends_by = event.step, "ASHA"
            case TrialOvertime():
                trial.ends_at, trial.ends_by = event.step, OVERTIME
            case TrialEnded():
                trial.state, trial.reason = event.state, event.reason
                trial.step, trial.metrics = event.step, event.metrics
                self.num_ends += 1
            case _:
                trial.state, trial.reason = "planned", ""


def past_events(run_dir: Path) -> Iterator[Event]:
    """The events written so far, in order; without those that a driver wrote after another one had taken over."""
    path, fence = run_dir / "journal" / f"{NAME}{journal.SUFFIX}", 0
    for record in journal.read_all(path) if path.exists() else ():
        fence = max(fence, record.get("fence", 0))
        if "event" in record and record.get("fence", 0) == fence:
            yield _event(record, path)


def _event(record: journal.Record, path: Path) -> Event:
    try:
        return from_json(record)
    except (LookupError, TypeError) as error:
        raise _damaged(path, f"an event {record['event']!r} has not its fields ({error})") from None


def _damaged(path: Path, why: str) -> ResourceError:
    return ResourceError(
        f"{path}: {why}. What the sweep decided is in this file: restore a copy, or start the sweep in another folder",
        key=path.name,
        subject=path,
    )
