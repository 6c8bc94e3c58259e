"""Cosine decay."""

from __future__ import annotations

import math
from typing import Literal

from pipeline.config import Share
from pipeline.training.schedules.base import ScheduleConfig


class CosineConfig(ScheduleConfig):
    """Falls from 1 at the end of the warm-up to `final_lr` at the last epoch.

    Source: Loshchilov & Hutter, ICLR 2017 (arXiv 1608.03983), without restarts.
    """

    kind: Literal["cosine"] = "cosine"
    final_lr: Share = 0.0  # share of the full rate at the end

    def factor_at(self, epoch: float, epochs: float) -> float:
        done = min(1.0, (epoch - self.warmup_epochs) / max(epochs - self.warmup_epochs, 1e-9))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
