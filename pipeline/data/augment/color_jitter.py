"""Random brightness, contrast and saturation, in random order: torchvision's ColorJitter without hue."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from pipeline.data.augment.chain import ChainOperation, Floats, PixelOp, chain_of
from pipeline.data.philox import Purpose, SampleKeys, between

OPS = np.array([PixelOp.BRIGHTNESS, PixelOp.CONTRAST, PixelOp.COLOR])


class ColorJitter(ChainOperation):
    """Each of the three factors is uniform within 1 - color_jitter .. 1 + color_jitter."""

    name: ClassVar[str] = "color_jitter"
    order: ClassVar[int] = 14
    purpose: ClassVar[int] = Purpose.COLOR_JITTER

    color_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0  # range of brightness, contrast and saturation; 0: off

    @property
    def active(self) -> bool:
        """Whether `color_jitter` is above 0."""
        return self.color_jitter > 0

    def draw(self, keys: SampleKeys, side_px: int) -> Floats:
        """Chains [b, 3, 2]."""
        order = np.argsort(np.stack(keys.words(self.purpose)[:3], -1), axis=-1, kind="stable")
        words = np.stack(keys.words(self.purpose, 1)[:3], -1)
        return chain_of(OPS[order], between(words, 1 - self.color_jitter, 1 + self.color_jitter))


OPERATION = ColorJitter
