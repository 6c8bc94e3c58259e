"""The losses on the logits, one module each: to add one, add a module with a subclass of `LossConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config import kinds_in, one_of
from pipeline.training.losses.base import LossConfig

if TYPE_CHECKING:
    AnyLoss = LossConfig
else:
    AnyLoss = one_of(kinds_in(__name__, LossConfig), default="cross_entropy")
