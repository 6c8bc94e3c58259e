"""Cross-entropy of the softmax."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.family import cross_entropy
from pipeline.training.losses.base import LossConfig


class CrossEntropyConfig(LossConfig):
    """`pipeline.family.cross_entropy`."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    def per_image(self, logits: Tensor, targets: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(dtype), targets, reduction="none")

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets)
