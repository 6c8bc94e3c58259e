"""A constant learning rate."""

from __future__ import annotations

from typing import Literal

from pipeline.training.schedules.base import ScheduleConfig


class ConstantConfig(ScheduleConfig):
    """The factor is 1 after the warm-up."""

    kind: Literal["constant"] = "constant"

    def factor_at(self, epoch: float, epochs: float) -> float:
        return 1.0

    def why_fixed(self, epoch: float, epochs: float) -> str | None:
        return None
