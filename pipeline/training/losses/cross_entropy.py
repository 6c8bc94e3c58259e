"""Cross-entropy of the softmax."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pipeline.family import cross_entropy
from pipeline.training.losses.base import LossConfig


class CrossEntropyConfig(LossConfig):
    """`pipeline.family.cross_entropy`."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets)
