"""CutMix: a box of each image is replaced by that of the image before it in the micro-batch.

torchvision v2's mathematics. Source: Yun et al., CutMix (ICCV 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from pipeline.data.augment.mixup import mixed_targets
from pipeline.data.augment.operation import MixOperation

if TYPE_CHECKING:
    from torch import Tensor


class CutMix(MixOperation):
    """All images of a micro-batch have the same box."""

    name: ClassVar[str] = "cutmix"
    order: ClassVar[int] = 40

    cutmix_alpha: Annotated[float, Field(ge=0, le=100)] = (
        0.0  # Beta(alpha, alpha) draws the unchanged share of area; 0: off
    )

    @property
    def active(self) -> bool:
        """Whether `cutmix_alpha` is above 0."""
        return self.cutmix_alpha > 0

    def mix(
        self, images: Tensor, labels: Tensor, num_classes: int, numbers: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draws the area and the centre of the box, and replaces it."""
        share = numbers.beta(self.cutmix_alpha, self.cutmix_alpha)
        box = box_of(share, (numbers.random(), numbers.random()), images.shape[-2:])
        return cutmix(images, labels, num_classes, box=box)


def cutmix(
    images: Tensor, labels: Tensor, num_classes: int, *, box: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Each image with `box` (left, top, right, bottom) from the image before it; targets by area."""
    left, top, right, bottom = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    height, width = images.shape[-2:]
    return mixed, mixed_targets(labels, num_classes, 1 - (right - left) * (bottom - top) / (width * height))


def box_of(share: float, centre: tuple[float, float], size: Sequence[int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of CutMix's box: 1 - share of an image of `size` (height, width), cut at its edges.

    centre: (x, y) in [0, 1).
    """
    height, width = size
    x, y = int(centre[0] * width), int(centre[1] * height)
    half = 0.5 * math.sqrt(1 - share)
    dx, dy = int(half * width), int(half * height)
    return max(x - dx, 0), max(y - dy, 0), min(x + dx, width), min(y + dy, height)


OPERATION = CutMix
