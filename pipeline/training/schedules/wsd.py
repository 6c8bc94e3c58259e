"""Warm-up, stable, decay: a constant rate that falls in the last epochs only."""

from __future__ import annotations

import math
from typing import Literal

from pipeline.config import Positive, Share
from pipeline.training.schedules.base import ScheduleConfig


class WsdConfig(ScheduleConfig):
    """The factor is 1 after the warm-up and falls to `final_lr` within the last `decay_epochs`.

    A run that is not yet in its decay may be given more epochs and goes on at the full rate.
    Source: Hu et al., 2024 (arXiv 2404.06395); Haegele et al., 2024 (arXiv 2405.18392) for the curves, of which
    1 - sqrt is the better one there.
    """

    kind: Literal["wsd"] = "wsd"
    decay_epochs: Positive
    curve: Literal["linear", "sqrt"] = "sqrt"  # of the decay: 1 - done, or 1 - sqrt(done), of the way to final_lr
    final_lr: Share = 0.0  # share of the full rate at the end

    def factor_at(self, epoch: float, epochs: float) -> float:
        done = min(1.0, max(0.0, (epoch - self.falls_from(epochs)) / self.decay_epochs))
        return 1 - (1 - self.final_lr) * (math.sqrt(done) if self.curve == "sqrt" else done)

    def falls_from(self, epochs: float) -> float:
        """The epoch at which the decay of a training of `epochs` begins."""
        return epochs - self.decay_epochs

    def why_fixed(self, epoch: float, epochs: float) -> str | None:
        if epoch <= self.falls_from(epochs):
            return None
        return f"the learning rate has been falling since epoch {self.falls_from(epochs):g}"
