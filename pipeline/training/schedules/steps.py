"""Step decay: a factor at each milestone."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.config import NotNegative, Positive
from pipeline.training.schedules.base import ScheduleConfig


class StepsConfig(ScheduleConfig):
    """The rate is multiplied by `factor` at each milestone."""

    kind: Literal["steps"] = "steps"
    milestones: tuple[NotNegative, ...] = ()  # epochs, rising
    factor: Positive = 0.1

    @model_validator(mode="after")
    def _rules(self) -> StepsConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones (={list(self.milestones)}) must rise")
        if not self.milestones:
            raise ValueError("kind: steps needs milestones, e.g. [30, 60, 90]")
        return self

    def factor_at(self, epoch: float, epochs: float) -> float:
        return float(self.factor ** sum(epoch >= milestone for milestone in self.milestones))
