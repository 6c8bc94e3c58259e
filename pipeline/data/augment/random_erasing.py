"""A rectangle of some images is set to 0, the mean colour: torchvision's RandomErasing.

Source: Zhong et al., Random Erasing (AAAI 2020).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.data.augment.operation import ImageOperation
from pipeline.data.philox import Ints, Purpose, SampleKeys, below, between, uniform

if TYPE_CHECKING:
    from torch import Tensor

ATTEMPTS = 10  # to draw a rectangle that is smaller than the image
SCALE = (0.02, 0.33)  # of the image's area
RATIO = (0.3, 3.3)  # height : width


class RandomErasing(ImageOperation):
    """Each image loses a rectangle with the same probability."""

    name: ClassVar[str] = "random_erasing"
    order: ClassVar[int] = 25
    purpose: ClassVar[int] = Purpose.ERASING
    stage: ClassVar[Literal["uint8", "normalised"]] = "normalised"

    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability that a rectangle of an image is erased

    @property
    def active(self) -> bool:
        """Whether `random_erasing` is above 0."""
        return self.random_erasing > 0

    def draw(self, keys: SampleKeys, side_px: int) -> Ints:
        """Rectangles [b, 4] = y, x, height, width; zeros for an image that stays as it is."""
        rectangles = np.zeros((len(keys), 4), dtype=np.int64)
        due = np.flatnonzero(uniform(keys.words(self.purpose)[0]) < self.random_erasing)
        for attempt in range(1, ATTEMPTS + 1):
            words = keys.only(due).words(self.purpose, attempt)
            area = side_px**2 * between(words[0], *SCALE)
            ratio = np.exp(between(words[1], *np.log(RATIO)))
            h, w = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
            fits = (h < side_px) & (w < side_px)
            y, x = below(words[2], side_px - h + 1), below(words[3], side_px - w + 1)
            rectangles[due[fits]] = np.stack([y, x, h, w], axis=-1)[fits]
            due = due[~fits]
        return rectangles

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Images [B, 3, S, S] with their rectangles [B, 4] set to 0."""
        return erased(images, drawn)


def erased(images: Tensor, rectangles: Tensor) -> Tensor:
    """Images [B, 3, S, S] with their rectangles [B, 4] = y, x, height, width set to 0."""
    images = images.clone()
    if images.is_cuda:  # where the host would have to wait for the rectangles
        return images.masked_fill_(_within(rectangles, images.shape[-1])[:, None], 0)
    for image, (y, x, height, width) in zip(images, rectangles.tolist(), strict=True):
        if height:
            image[:, y : y + height, x : x + width] = 0
    return images


def _within(rectangles: Tensor, side: int) -> Tensor:
    """Which pixels [B, S, S] are within the rectangles."""
    import torch

    places = torch.arange(side, device=rectangles.device)
    start, length = rectangles[:, :2, None], rectangles[:, 2:, None]
    inside = (places >= start) & (places < start + length)  # [B, 2, S]
    return inside[:, 0, :, None] & inside[:, 1, None, :]


OPERATION = RandomErasing
