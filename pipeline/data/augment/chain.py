"""Augmentations that draw a chain of pixel operations (pixel_ops.py) for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from pipeline.data.augment.operation import ImageOperation
from pipeline.data.augment.pixel_ops import apply_chain


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
        return apply_chain(images, drawn, self.uncovered)
