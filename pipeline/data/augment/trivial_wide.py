"""TrivialAugment with its wide space: one operation for each image, at a random level.

Source: Müller & Hutter, TrivialAugment (ICCV 2021); torchvision's v2.TrivialAugmentWide.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from pipeline.data.augment.chain import Floats, chain_of
from pipeline.data.augment.levels import NAMES, Strongest, arguments, signed
from pipeline.data.philox import SampleKeys, below, uniform

BINS = 31
OPS = np.array([op for name, op in NAMES.items() if name != "Invert"])


@cache
def _table() -> Floats:
    return arguments(Strongest(shear=0.99, translate_px=32.0, rotate=135.0, enhance=0.99, posterize=6), BINS)


def trivial_wide(keys: SampleKeys, purpose: int) -> Floats:
    """Chains [b, 1, 2]: each of 14 operations, each of 31 levels and each direction is equally likely."""
    words, number = keys.words(purpose), np.full(len(keys), len(OPS))
    ops, level = OPS[below(words[0], number)], below(words[1], np.full(len(keys), BINS))
    return chain_of(ops, signed(ops, _table()[ops, level], uniform(words[2]) < 0.5))[:, None]
