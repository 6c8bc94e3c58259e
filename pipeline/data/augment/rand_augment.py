"""RandAugment as timm draws it: a number of random operations for each image, all at about the same level.

Operations, levels and probabilities are timm's (`rand-m9-n2-mstd0.5-inc1`); the pixels are torchvision's, with the
nearest pixel in shears, translations and rotations, where timm interpolates.
Source: Cubuk et al., RandAugment (NeurIPS 2020); timm.data.auto_augment.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.chain import Floats, PixelOp, chain_of
from pipeline.data.augment.levels import ENHANCES, MOVES
from pipeline.data.philox import Ints, SampleKeys, below, uniform

HIGHEST = 10.0  # level
APPLIED = 0.5  # probability of each operation of a chain
OPS = np.array(
    [
        *(PixelOp.AUTO_CONTRAST, PixelOp.EQUALIZE, PixelOp.INVERT, PixelOp.POSTERIZE, PixelOp.SOLARIZE),
        *(PixelOp.SOLARIZE_ADD, *ENHANCES, *MOVES),
    ]
)


def rand_chains(
    keys: SampleKeys, purpose: int, side_px: int, *, num_ops: int, level: float, deviation: float, increasing: bool
) -> Floats:
    """Chains [b, num_ops, 2]. The level of each operation is normal around `level`, cut at 0 and 10."""
    links = []
    for number in range(num_ops):
        words, more = keys.words(purpose, 2 * number), keys.words(purpose, 2 * number + 1)
        ops = OPS[below(words[0], np.full(len(keys), len(OPS)))]
        normal = np.sqrt(-2 * np.log1p(-uniform(more[0]))) * np.cos(2 * np.pi * uniform(more[1]))
        share = np.clip(level + deviation * normal, 0, HIGHEST) / HIGHEST
        values = argument(ops, share, uniform(words[2]) < 0.5, side_px, increasing=increasing)
        applied = uniform(words[1]) < APPLIED
        links.append(chain_of(np.where(applied, ops, PixelOp.IDENTITY), np.where(applied, values, 0.0)))
    return np.stack(links, axis=1)


def argument(ops: Ints, share: Floats, negative: NDArray[np.bool_], side_px: int, *, increasing: bool) -> Floats:
    """Arguments [b] of operations at a `share` of the highest level.

    increasing: a higher level changes an image more; otherwise, as in timm's older lists, it posterizes and solarizes
    less, and moves the factors of brightness, colour, contrast and sharpness from 0.1 to 1.9.
    """
    sign = np.where(negative, -1.0, 1.0)
    bits, threshold = np.trunc(share * 4), np.trunc(share * 256)
    factor = np.maximum(0.1, 1 + sign * share * 0.9) if increasing else share * 1.8 + 0.1
    moved = np.trunc(sign * share * 0.45 * side_px)
    by_op = {
        PixelOp.POSTERIZE: 4 - bits if increasing else bits,
        PixelOp.SOLARIZE: 256 - threshold if increasing else threshold,
        PixelOp.SOLARIZE_ADD: np.trunc(share * 110),
        PixelOp.SHEAR_X: sign * share * 0.3,
        PixelOp.SHEAR_Y: sign * share * 0.3,
        PixelOp.TRANSLATE_X: moved,
        PixelOp.TRANSLATE_Y: moved,
        PixelOp.ROTATE: sign * share * 30,
        **dict.fromkeys(ENHANCES, factor),
    }
    values = np.zeros(len(ops))
    for op, theirs in by_op.items():
        values = np.where(ops == op, theirs, values)
    return values
