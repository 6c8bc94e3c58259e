"""Linear decay."""

from __future__ import annotations

from typing import Literal

from pipeline.config import Share
from pipeline.training.schedules.base import ScheduleConfig


class LinearConfig(ScheduleConfig):
    """Falls in a straight line from 1 at the end of the warm-up to `final_lr` at the last epoch."""

    kind: Literal["linear"] = "linear"
    final_lr: Share = 0.0  # share of the full rate at the end

    def factor_at(self, epoch: float, epochs: float) -> float:
        done = min(1.0, (epoch - self.warmup_epochs) / max(epochs - self.warmup_epochs, 1e-9))
        return 1 - (1 - self.final_lr) * done
