"""No random crop: the largest square in the middle of the image, resized."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pipeline.data.augment.operation import Crop
from pipeline.data.philox import Ints, SampleKeys


class CentreSquareCrop(Crop):
    """`crop: none`."""

    name: ClassVar[str] = "none"
    order: ClassVar[int] = 2

    def windows(self, keys: SampleKeys, side_px: int, height: Ints, width: Ints) -> Ints:
        """The largest square in the middle; draws nothing."""
        side = np.minimum(height, width)
        return np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=-1)


OPERATION = CentreSquareCrop
