"""Step decay: a factor at each milestone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import Positive, meant
from pipeline.training.schedules.base import ScheduleConfig


def _lowers(factor: float) -> str | None:
    return None if factor < 1 else "the rate is multiplied by it, so it is below 1: 0.1 for a tenth"


class StepsConfig(ScheduleConfig):
    """The rate is multiplied by `factor` at each milestone."""

    kind: Literal["steps"] = "steps"
    milestones: tuple[Positive, ...] = ()  # epochs, rising
    factor: Annotated[float, Field(gt=0), meant(_lowers)] = 0.1  # what the rate is multiplied by, not divided

    @model_validator(mode="after")
    def _rules(self) -> StepsConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones (={list(self.milestones)}) must rise")
        if not self.milestones:
            raise ValueError("kind: steps needs milestones, e.g. [30, 60, 90]")
        return self

    def factor_at(self, epoch: float, epochs: float) -> float:
        return float(self.factor ** sum(epoch >= milestone for milestone in self.milestones))

    def why_fixed(self, epoch: float, epochs: float) -> str | None:
        return None
