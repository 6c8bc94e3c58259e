"""How images become squares: the window that is decoded, its size after the resize, and the square cut from that.

All loaders do the same: decode a window of the upright picture, resize it, and cut a square of side S, which is zero
where it reaches beyond the picture. b images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LONGEST = 64  # times the shorter side; of a longer image only the middle is evaluated, to bound memory


@dataclass(frozen=True)
class CropGeometry:
    """The windows, resizes and squares of b images; all arrays are i32.

    windows [b, 4]: y, x, height, width, inside the image and not empty.
    sizes [b, 2]: height and width after the resize.
    origins [b, 2]: y, x of the square in the resized picture, negative where it begins outside.
    """

    windows: NDArray[np.int32]
    sizes: NDArray[np.int32]
    origins: NDArray[np.int32]
    side_px: int

    def __len__(self) -> int:
        return len(self.windows)

    def only(self, position: int) -> CropGeometry:
        """The geometry of one image."""
        at = slice(position, position + 1)
        return CropGeometry(self.windows[at], self.sizes[at], self.origins[at], self.side_px)


def for_evaluation(image_sizes: NDArray[np.int32], *, side_px: int, resize_px: int) -> CropGeometry:
    """The shorter side is resized to `resize_px`, and the square is in the middle; rounded as torchvision does.

    image_sizes [b, 2]: height and width.
    """
    image_sizes = image_sizes.astype(np.int64)
    shorter = image_sizes.min(axis=1, keepdims=True)
    extents = np.minimum(image_sizes, LONGEST * shorter)
    starts = (image_sizes - extents) // 2
    sizes = (resize_px * extents / shorter).astype(np.int64)
    spare = sizes - side_px
    origins = np.where(spare >= 0, np.rint(spare / 2), -(-spare // 2)).astype(np.int32)
    windows = np.hstack([starts, extents]).astype(np.int32)
    return CropGeometry(windows, sizes.astype(np.int32), origins, side_px)
