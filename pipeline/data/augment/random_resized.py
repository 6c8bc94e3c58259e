"""A random window of the image, resized to the square: the distribution of torchvision's RandomResizedCrop."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import AfterValidator

from pipeline.data.augment.operation import Crop
from pipeline.data.philox import Ints, Purpose, SampleKeys, below, between

ATTEMPTS = 10  # attempts to draw a window that fits the image, as in torchvision


def _rising_to_1(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError("must rise within (0, 1]")
    return scale


def _rising(ratio: tuple[float, float]) -> tuple[float, float]:
    if not 0.01 <= ratio[0] <= ratio[1] <= 100:
        raise ValueError("must rise within 0.01..100")
    return ratio


class RandomResizedCrop(Crop):
    """A window of random area and aspect ratio, anywhere in the image."""

    name: ClassVar[str] = "random-resized"
    order: ClassVar[int] = 0

    scale: Annotated[tuple[float, float], AfterValidator(_rising_to_1)] = (0.08, 1.0)  # share of the image's area
    ratio: Annotated[tuple[float, float], AfterValidator(_rising)] = (3 / 4, 4 / 3)  # width : height of the window

    def windows(self, keys: SampleKeys, side_px: int, height: Ints, width: Ints) -> Ints:
        """Where none of the attempts fits, the middle of the image within `ratio`."""
        windows = _largest_in_ratio(self.ratio, height, width)
        log_ratio = np.log(self.ratio)
        due = np.arange(len(keys))
        for attempt in range(ATTEMPTS):
            words = keys.only(due).words(Purpose.CROP, attempt)
            area = height[due] * width[due] * between(words[0], *self.scale)
            ratio = np.exp(between(words[1], *log_ratio))
            h, w = np.rint(np.sqrt(area / ratio)).astype(np.int64), np.rint(np.sqrt(area * ratio)).astype(np.int64)
            fits = (h > 0) & (h <= height[due]) & (w > 0) & (w <= width[due])
            y, x = below(words[2], height[due] - h + 1), below(words[3], width[due] - w + 1)
            windows[due[fits]] = np.stack([y, x, h, w], axis=-1)[fits]
            due = due[~fits]
            if not len(due):
                break
        return windows


def _largest_in_ratio(ratio: tuple[float, float], height: Ints, width: Ints) -> Ints:
    """The middle of an image; the whole image where its width : height lies within `ratio`."""
    h = np.where(width < height * ratio[0], np.rint(width / ratio[0]), height).astype(np.int64)
    w = np.where(width > height * ratio[1], np.rint(height * ratio[1]), width).astype(np.int64)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=-1)


OPERATION = RandomResizedCrop
