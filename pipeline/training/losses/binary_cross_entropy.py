"""Cross-entropy of one sigmoid per class."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from pipeline.training.losses.base import LossConfig


class BinaryCrossEntropyConfig(LossConfig):
    """Each class against all others, the mean over images and classes.

    Source: Wightman et al., "ResNet strikes back", 2021 (arXiv 2110.00476), §3.2.
    """

    kind: Literal["binary_cross_entropy"] = "binary_cross_entropy"

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        dense = targets if targets.dim() == 2 else F.one_hot(targets, logits.shape[1])
        return F.binary_cross_entropy_with_logits(logits.float(), dense.float())
