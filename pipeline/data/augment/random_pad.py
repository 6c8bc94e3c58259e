"""A square window of the training side, not resized, anywhere in the image with zeros around it (CIFAR)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.augment.operation import Crop
from pipeline.data.crop_geometry import CropGeometry
from pipeline.data.philox import Ints, Purpose, SampleKeys, Words, below


class RandomPadCrop(Crop):
    """The window may reach beyond the image, by up to `pad_px`; there the square is zero."""

    name: ClassVar[str] = "random-pad"
    order: ClassVar[int] = 1

    pad_px: Annotated[int, Field(ge=0, le=8192)] = 4  # zeros on each side before the window is cut

    def windows(self, keys: SampleKeys, side_px: int, height: Ints, width: Ints) -> Ints:
        """A square of `side_px`, each place alike."""
        words = keys.words(Purpose.CROP)
        side = np.full_like(height, side_px)
        y, x = _offset(words[0], height, self.pad_px, side_px), _offset(words[1], width, self.pad_px, side_px)
        return np.stack([y, x, side, side], axis=-1)

    def geometry(self, windows: NDArray[np.int32], image_sizes: NDArray[np.int32], side_px: int) -> CropGeometry:
        """The part of the window inside the image is decoded and put in its place within the square."""
        starts = np.clip(windows[:, :2], 0, image_sizes - 1)
        ends = np.clip(windows[:, :2] + windows[:, 2:], starts + 1, image_sizes)
        return CropGeometry(np.hstack([starts, ends - starts]), ends - starts, windows[:, :2] - starts, side_px)


def _offset(words: Words, length: Ints, pad_px: int, side_px: int) -> Ints:
    """Where the window begins; it is centred where it is larger than the padded image."""
    places = length + 2 * pad_px - side_px + 1
    return np.where(places > 0, below(words, np.maximum(places, 1)) - pad_px, (length - side_px) // 2)


OPERATION = RandomPadCrop
