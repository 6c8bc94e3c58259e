"""Cross-entropy of one sigmoid per class."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import BelowOne
from pipeline.training.losses.base import LossConfig


class BinaryCrossEntropyConfig(LossConfig):
    """Each class against all others, the mean over images and classes.

    The mean over classes is K times smaller than the sum: that is the released recipe's too, and the step of an
    optimizer that divides by the gradient's size, as LAMB, hardly depends on it; SGD's does. Label smoothing by e
    spreads e evenly over all classes before the threshold: e/K and 1 - e + e/K.
    Source: Wightman et al., "ResNet strikes back", 2021 (arXiv 2110.00476), §3.2; timm's BinaryCrossEntropy.
    """

    kind: Literal["binary_cross_entropy"] = "binary_cross_entropy"
    target_threshold: BelowOne | None = None  # targets above it become 1, the others 0; RSB: 0.2; null: as they are

    @property
    def binary_targets(self) -> bool:
        """Whether every target becomes 0 or 1, so that label smoothing changes nothing."""
        return self.target_threshold is not None

    def per_image(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._compared(logits, targets, "none").mean(dim=1)

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._compared(logits, targets, "mean")

    def _compared(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        dense = targets if targets.dim() == 2 else F.one_hot(targets, logits.shape[1])
        if self.target_threshold is not None:
            dense = dense > self.target_threshold
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.binary_cross_entropy_with_logits(logits, dense.to(logits.dtype), reduction=reduction)
