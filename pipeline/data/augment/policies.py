"""AutoAugment's policies: two operations for each image, from a list that was found for a data set.

Source: Cubuk et al., AutoAugment (CVPR 2019), tables 7 to 9; torchvision's v2.AutoAugment, whose levels these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from pipeline.data.augment.chain import Floats, PixelOp, chain_of
from pipeline.data.augment.levels import NAMES, Strongest, arguments, signed
from pipeline.data.philox import SampleKeys, below, uniform

BINS = 10
TRANSLATED = 150 / 331  # of the side, at most
POLICIES: Mapping[str, str] = {  # operation, probability, level
    "imagenet": """
        Posterize 0.4 8, Rotate 0.6 9 | Solarize 0.6 5, AutoContrast 0.6 - | Equalize 0.8 -, Equalize 0.6 -
        Posterize 0.6 7, Posterize 0.6 6 | Equalize 0.4 -, Solarize 0.2 4 | Equalize 0.4 -, Rotate 0.8 8
        Solarize 0.6 3, Equalize 0.6 - | Posterize 0.8 5, Equalize 1.0 - | Rotate 0.2 3, Solarize 0.6 8
        Equalize 0.6 -, Posterize 0.4 6 | Rotate 0.8 8, Color 0.4 0 | Rotate 0.4 9, Equalize 0.6 -
        Equalize 0.0 -, Equalize 0.8 - | Invert 0.6 -, Equalize 1.0 - | Color 0.6 4, Contrast 1.0 8
        Rotate 0.8 8, Color 1.0 2 | Color 0.8 8, Solarize 0.8 7 | Sharpness 0.4 7, Invert 0.6 -
        ShearX 0.6 5, Equalize 1.0 - | Color 0.4 0, Equalize 0.6 - | Equalize 0.4 -, Solarize 0.2 4
        Solarize 0.6 5, AutoContrast 0.6 - | Invert 0.6 -, Equalize 1.0 - | Color 0.6 4, Contrast 1.0 8
        Equalize 0.8 -, Equalize 0.6 -""",
    "cifar10": """
        Invert 0.1 -, Contrast 0.2 6 | Rotate 0.7 2, TranslateX 0.3 9 | Sharpness 0.8 1, Sharpness 0.9 3
        ShearY 0.5 8, TranslateY 0.7 9 | AutoContrast 0.5 -, Equalize 0.9 - | ShearY 0.2 7, Posterize 0.3 7
        Color 0.4 3, Brightness 0.6 7 | Sharpness 0.3 9, Brightness 0.7 9 | Equalize 0.6 -, Equalize 0.5 -
        Contrast 0.6 7, Sharpness 0.6 5 | Color 0.7 7, TranslateX 0.5 8 | Equalize 0.3 -, AutoContrast 0.4 -
        TranslateY 0.4 3, Sharpness 0.2 6 | Brightness 0.9 6, Color 0.2 8 | Solarize 0.5 2, Invert 0.0 -
        Equalize 0.2 -, AutoContrast 0.6 - | Equalize 0.2 -, Equalize 0.6 - | Color 0.9 9, Equalize 0.6 -
        AutoContrast 0.8 -, Solarize 0.2 8 | Brightness 0.1 3, Color 0.7 0 | Solarize 0.4 5, AutoContrast 0.9 -
        TranslateY 0.9 9, TranslateY 0.7 9 | AutoContrast 0.9 -, Solarize 0.8 3 | Equalize 0.8 -, Invert 0.1 -
        TranslateY 0.7 9, AutoContrast 0.9 -""",
    "svhn": """
        ShearX 0.9 4, Invert 0.2 - | ShearY 0.9 8, Invert 0.7 - | Equalize 0.6 -, Solarize 0.6 6
        Invert 0.9 -, Equalize 0.6 - | Equalize 0.6 -, Rotate 0.9 3 | ShearX 0.9 4, AutoContrast 0.8 -
        ShearY 0.9 8, Invert 0.4 - | ShearY 0.9 5, Solarize 0.2 6 | Invert 0.9 -, AutoContrast 0.8 -
        Equalize 0.6 -, Rotate 0.9 3 | ShearX 0.9 4, Solarize 0.3 3 | ShearY 0.8 8, Invert 0.7 -
        Equalize 0.9 -, TranslateY 0.6 6 | Invert 0.9 -, Equalize 0.6 - | Contrast 0.3 3, Rotate 0.8 4
        Invert 0.8 -, TranslateY 0.0 2 | ShearY 0.7 6, Solarize 0.4 8 | Invert 0.6 -, Rotate 0.8 4
        ShearY 0.3 7, TranslateX 0.9 3 | ShearX 0.1 6, Invert 0.6 - | Solarize 0.7 2, TranslateY 0.6 7
        ShearY 0.8 4, Invert 0.8 - | ShearX 0.7 9, TranslateY 0.8 3 | ShearY 0.8 5, AutoContrast 0.7 -
        ShearX 0.7 2, Invert 0.1 -""",
}


@cache
def steps_of(policy: str) -> Floats:
    """The pairs of a policy [25, 2, 3]: PixelOp, probability and level."""
    pairs = [pair.split(",") for line in POLICIES[policy].strip().splitlines() for pair in line.split("|")]
    words = [[step.split() for step in pair] for pair in pairs]
    return np.array([[[NAMES[op], float(p), 0 if level == "-" else int(level)] for op, p, level in w] for w in words])


@cache
def _table(side_px: int) -> Floats:
    return arguments(Strongest(0.3, TRANSLATED * side_px, rotate=30.0, enhance=0.9, posterize=4), BINS)


def policy_chains(policy: str, keys: SampleKeys, purpose: int, side_px: int) -> Floats:
    """Chains [b, 2, 2]: a random pair, of which each operation is applied with its probability."""
    pairs = steps_of(policy)
    words, more = keys.words(purpose), keys.words(purpose, 1)
    chosen = pairs[below(words[0], np.full(len(keys), len(pairs)))]
    ops, levels = chosen[..., 0].astype(np.int64), chosen[..., 2].astype(np.int64)
    negative = uniform(np.stack(words[1:3], -1)) < 0.5
    applied = uniform(np.stack(more[:2], -1)) < chosen[..., 1]
    values = signed(ops, _table(side_px)[ops, levels], negative)
    return chain_of(np.where(applied, ops, PixelOp.IDENTITY), np.where(applied, values, 0.0))
