"""Some images become grey, with torchvision's weights of the channels."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from pipeline.data.augment.chain import ChainOperation, Floats, PixelOp, chain_of
from pipeline.data.philox import Purpose, SampleKeys, uniform


class Grayscale(ChainOperation):
    """Each image becomes grey with the same probability."""

    name: ClassVar[str] = "grayscale"
    order: ClassVar[int] = 15
    purpose: ClassVar[int] = Purpose.GRAYSCALE

    grayscale: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability that an image becomes grey

    @property
    def active(self) -> bool:
        """Whether `grayscale` is above 0."""
        return self.grayscale > 0

    def draw(self, keys: SampleKeys, side_px: int) -> Floats:
        """Chains [b, 1, 2]."""
        grey = uniform(keys.words(self.purpose)[0]) < self.grayscale
        ops = np.where(grey, PixelOp.COLOR, PixelOp.IDENTITY)
        return chain_of(ops, np.zeros(len(ops)))[:, None]


OPERATION = Grayscale
