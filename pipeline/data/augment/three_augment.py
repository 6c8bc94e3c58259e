"""3-Augment: each image becomes grey, is solarized or is blurred.

Source: Touvron et al., DeiT III (ECCV 2022), section 3.2; it adds `color_jitter` (0.3) and a flip. The pixels are
torchvision's, where the released code has Pillow's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from pipeline.data.augment.chain import ChainOperation, Floats, PixelOp, chain_of
from pipeline.data.philox import Purpose, SampleKeys, below, between

OPS = np.array([PixelOp.COLOR, PixelOp.SOLARIZE, PixelOp.BLUR])
THRESHOLD = 128.0  # levels from here on are inverted
DEVIATIONS_PX = (0.1, 2.0)


class ThreeAugment(ChainOperation):
    """One of the three for each image, equally likely."""

    name: ClassVar[str] = "three_augment"
    order: ClassVar[int] = 13
    purpose: ClassVar[int] = Purpose.THREE_AUGMENT
    excludes: ClassVar[Mapping[str, str]] = {"auto_augment": "3-Augment replaces it; set one of the two"}

    three_augment: bool = False  # each image becomes grey, is solarized or is blurred, as in DeiT III

    @property
    def active(self) -> bool:
        """Whether `three_augment` is set."""
        return self.three_augment

    def draw(self, keys: SampleKeys, side_px: int) -> Floats:
        """Chains [b, 1, 2]."""
        words = keys.words(self.purpose)
        ops = OPS[below(words[0], np.full(len(keys), len(OPS)))]
        deviation = between(words[1], *DEVIATIONS_PX)
        arguments = np.select([ops == PixelOp.SOLARIZE, ops == PixelOp.BLUR], [THRESHOLD, deviation], 0.0)
        return chain_of(ops, arguments)[:, None]


OPERATION = ThreeAugment
