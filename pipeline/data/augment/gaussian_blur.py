"""Some images are blurred: torchvision's Gaussian with a standard deviation of 0.1 to 2 pixels, as timm draws it."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from pipeline.data.augment.chain import ChainOperation, Floats, PixelOp, chain_of
from pipeline.data.augment.three_augment import DEVIATIONS_PX
from pipeline.data.philox import Purpose, SampleKeys, between, uniform


class GaussianBlur(ChainOperation):
    """Each image is blurred with the same probability."""

    name: ClassVar[str] = "gaussian_blur"
    order: ClassVar[int] = 16
    purpose: ClassVar[int] = Purpose.BLUR

    gaussian_blur: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability that an image is blurred

    @property
    def active(self) -> bool:
        """Whether `gaussian_blur` is above 0."""
        return self.gaussian_blur > 0

    def draw(self, keys: SampleKeys, side_px: int) -> Floats:
        """Chains [b, 1, 2]."""
        words = keys.words(self.purpose)
        blurred = uniform(words[0]) < self.gaussian_blur
        ops = np.where(blurred, PixelOp.BLUR, PixelOp.IDENTITY)
        return chain_of(ops, np.where(blurred, between(words[1], *DEVIATIONS_PX), 0.0))[:, None]


OPERATION = GaussianBlur
