"""A sweep's own record on disk: what was drawn, judged and ended, in order. What is not there did not happen.

RUN/journal/sweep.jsonl holds one event a line, written before it is acted on:

  drawn    number, case, values          refused  number, reason
  priced   number, macs, parameters      judged   number, step, epoch, value, ends: whether it is to end by it
  overtime number, step                  ended    number, state, reason, step, metrics
  retried  number
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.runs import journal
from pipeline.runs.journal import Journal
from tuning.space import Sample

State = Literal["planned", "running", "finished", "stopped", "failed", "refused"]
ENDED = ("finished", "stopped", "failed", "refused")
NAME = "sweep"  # of the journal
OVERTIME = "max_minutes"


@dataclass
class Trial:
    """One draw and what has become of it."""

    sample: Sample
    state: State = "planned"
    reason: str = ""  # of the state, where it is refused, stopped or failed
    cost: Mapping[str, int] = field(default_factory=dict)  # macs, parameters of the whole net
    judged: dict[int, float] = field(default_factory=dict)  # step: value, of evaluations while training
    ends_at: int | None = None  # the step by which it was decided to end before its time
    ends_by: str = ""  # what decided it: ASHA or max_minutes
    metrics: Mapping[str, float] = field(default_factory=dict)  # at the end
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
        """What was judged last."""
        return self.judged[max(self.judged)] if self.judged else None


class Record:
    """The events of a sweep's folder, and the trials as they stand by them."""

    def __init__(self, run_dir: Path, fence: int) -> None:
        self.trials: list[Trial] = []
        self.ends = 0  # that were written; a trial that is tried again ends again
        self._journal = Journal(run_dir / "journal", NAME, fence=fence)
        self.before = list(past(run_dir))  # what earlier drivers wrote
        for event in self.before:
            self._apply(event)

    def close(self) -> None:
        self._journal.close()

    def write(self, kind: str, **facts: Any) -> None:
        """Puts an event on the disk, then lets it count."""
        step = facts.pop("step", None)
        self._journal.event(kind, step, **facts)
        self._journal.sync()
        self._apply({"event": kind, "step": step, **facts})

    def add(self, draw: Sample) -> Trial:
        self.write("drawn", number=draw.number, case=draw.case, values=dict(draw.values))
        return self.trials[draw.number]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Of the sweep as a whole, for its run in MLflow."""
        self._journal.metrics(step, values)

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "drawn":
            if event["number"] == len(self.trials):  # a driver may have written it while it was being taken over from
                self.trials.append(Trial(Sample(event["number"], event["case"], event["values"])))
            return
        trial = self.trials[event["number"]]
        if kind == "refused":
            trial.state, trial.reason = "refused", event["reason"]
        elif kind == "priced":
            trial.cost = {"macs": event["macs"], "parameters": event["parameters"]}
        elif kind == "judged":
            trial.judged[event["step"]] = event["value"]
            if event["ends"]:
                trial.ends_at, trial.ends_by = event["step"], "ASHA"
        elif kind == "overtime":
            trial.ends_at, trial.ends_by = event["step"], OVERTIME
        elif kind == "ended":
            trial.state, trial.reason = event["state"], event["reason"]
            trial.step, trial.metrics = event["step"], event["metrics"]
            self.ends += 1
        elif kind == "retried":
            trial.state, trial.reason = "planned", ""


def past(run_dir: Path) -> Iterator[Mapping[str, Any]]:
    """The events written so far, in order; without those of a driver that another one had taken over from."""
    path, fence = run_dir / "journal" / f"{NAME}{journal.SUFFIX}", 0
    for record in journal.read_all(path) if path.exists() else ():
        fence = max(fence, record.get("fence", 0))
        if "event" in record and record.get("fence", 0) == fence:
            yield record
