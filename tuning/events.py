"""The events of a sweep's record: samples, measurements, decisions and results, one line of the journal each.

In RUN/journal/sweep.jsonl an event is {"event": its name in NAMES, and its fields}; the fields are the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypeAlias

from pipeline.errors import JsonValue
from pipeline.runs.journal import Record
from tuning.config import Bounds

State = Literal["planned", "running", "finished", "stopped", "failed", "refused"]


@dataclass(frozen=True)
class NetCost:
    """The cost of the whole net on one image: MACs and parameters."""

    macs: int
    parameters: int

    def refusal(self, bounds: Bounds) -> str | None:
        """The bound that it exceeds, as a reason; None if it is within all of them."""
        amounts = {"max_gmacs": self.macs / 1e9, "max_mparameters": self.parameters / 1e6}
        limits = {"max_gmacs": bounds.max_gmacs, "max_mparameters": bounds.max_mparameters}
        for key, amount in amounts.items():
            limit = limits[key]
            if limit is not None and amount > limit:
                return f"{key}: {amount:.4g} above {limit:g}"
        return None


@dataclass(frozen=True)
class SampleDrawn:
    """A sample was drawn; it is the trial `number`, from 0."""

    number: int
    case: int
    values: Mapping[str, JsonValue]


@dataclass(frozen=True)
class CostMeasured:
    """The net of a sample was measured, since a bound limits its cost."""

    number: int
    macs: int
    parameters: int


@dataclass(frozen=True)
class TrialRefused:
    """A sample is not trained: it exceeds a bound, or the recipe does not accept it."""

    number: int
    reason: str


@dataclass(frozen=True)
class TrialJudged:
    """The scheduler judged an evaluation of a running trial; `ends` if the trial is to stop at that step."""

    number: int
    step: int
    epoch: float
    value: float
    ends: bool


@dataclass(frozen=True)
class TrialOvertime:
    """A trial exceeded bounds.max_minutes and is to stop at `step`."""

    number: int
    step: int


@dataclass(frozen=True)
class TrialEnded:
    """A trial finished, failed or was stopped, with its final metrics."""

    number: int
    state: State
    reason: str
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrialRetried:
    """A failed trial is to be trained again."""

    number: int


Event: TypeAlias = SampleDrawn | CostMeasured | TrialRefused | TrialJudged | TrialOvertime | TrialEnded | TrialRetried
NAMES: dict[type[Event], str] = {
    SampleDrawn: "drawn",
    CostMeasured: "priced",
    TrialRefused: "refused",
    TrialJudged: "judged",
    TrialOvertime: "overtime",
    TrialEnded: "ended",
    TrialRetried: "retried",
}
KINDS = {name: kind for kind, name in NAMES.items()}


def to_json(event: Event) -> dict[str, JsonValue]:
    """The fields of an event, for `from_json`."""
    return asdict(event)


def from_json(record: Record) -> Event:
    """The event of a line of the journal."""
    kind = KINDS[record["event"]]
    event = kind(**{each.name: record[each.name] for each in fields(kind)})
    if type(event.number) is not int or event.number < 0:
        raise TypeError("the number of a trial is no whole number")
    return event
