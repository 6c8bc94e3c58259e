"""Augmentations that draw a chain of pixel operations (pipeline/data/pixel_ops.py) for each image."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.operation import ImageOperation
from pipeline.data.philox import Ints

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]


class PixelOp(IntEnum):
    """An operation on one image; its argument in the comment."""

    IDENTITY = 0
    SHEAR_X = 1  # tangent of the angle
    SHEAR_Y = 2
    TRANSLATE_X = 3  # whole pixels to the right
    TRANSLATE_Y = 4  # whole pixels down
    ROTATE = 5  # degrees, counter-clockwise
    BRIGHTNESS = 6  # factor, 1: unchanged
    COLOR = 7  # saturation's factor, 0: grey
    CONTRAST = 8  # factor
    SHARPNESS = 9  # factor
    POSTERIZE = 10  # bits that are kept
    SOLARIZE = 11  # levels from here on are inverted
    SOLARIZE_ADD = 12  # is added to levels below 128, as in timm
    AUTO_CONTRAST = 13
    EQUALIZE = 14
    INVERT = 15
    BLUR = 16  # standard deviation, pixels


def chain_of(ops: Ints, arguments: Floats) -> Floats:
    """A chain [b, n, 2] for `apply_chain` from ops and arguments [b, n]."""
    return np.stack([ops.astype(np.float64), arguments], axis=-1)


class ChainOperation(ImageOperation):
    """`draw` gives chains [b, n, 2]: PixelOp and argument. They stay on the host, which groups the images by them."""

    stage: ClassVar[Literal["uint8", "normalised"]] = "uint8"
    on_host: ClassVar[bool] = True

    @property
    def uncovered(self) -> Sequence[int]:
        """Colour of what shears, translations and rotations uncover."""
        return (0, 0, 0)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Images [B, S, S, 3] after their chains [B, n, 2]."""
        from pipeline.data.pixel_ops import apply_chain

        return apply_chain(images, drawn, self.uncovered)
