"""MixUp: each image and target is blended with those of the image before it in the micro-batch.

torchvision v2's mathematics. Source: Zhang et al., mixup (ICLR 2018).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from pipeline.data.augment.operation import MixOperation

if TYPE_CHECKING:
    from torch import Tensor


class MixUp(MixOperation):
    """All images of a micro-batch are blended in the same proportion."""

    name: ClassVar[str] = "mixup"
    order: ClassVar[int] = 30

    mixup_alpha: Annotated[float, Field(ge=0, le=100)] = 0.0  # Beta(alpha, alpha) draws the mixing proportion; 0: off

    @property
    def active(self) -> bool:
        """Whether `mixup_alpha` is above 0."""
        return self.mixup_alpha > 0

    def mix(
        self, images: Tensor, labels: Tensor, num_classes: int, numbers: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Blends the images in a random proportion."""
        return mixup(images, labels, num_classes, share=numbers.beta(self.mixup_alpha, self.mixup_alpha))


def mixup(images: Tensor, labels: Tensor, num_classes: int, *, share: float) -> tuple[Tensor, Tensor]:
    """`share` of each image and of its target, the rest from the image before it; the memory format stays."""
    import torch

    mixed = torch.lerp(images.roll(1, 0), images, share, out=torch.empty_like(images))
    return mixed, mixed_targets(labels, num_classes, share)


def mixed_targets(labels: Tensor, num_classes: int, share: float) -> Tensor:
    """Targets [B, K]: `share` of each image's class, the rest of the class of the image before it."""
    import torch
    import torch.nn.functional as F

    targets = F.one_hot(labels, num_classes).float()
    return torch.lerp(targets.roll(1, 0), targets, share)


OPERATION = MixUp
